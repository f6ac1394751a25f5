"""The page of runs: one file, valid, with nothing to load."""

import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser

import pytest
from conftest import refused
from test_report import linear, write_run

BROWSER = next(filter(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome")), None)
VOID = {"meta", "br"}


class Page(HTMLParser):
    """Counts tags and ids, and checks that each tag is closed in its order. text: by the tag that directly holds it."""

    def __init__(self, source: str):
        super().__init__()
        self.open, self.tags, self.ids, self.addresses, self.text = [], Counter(), Counter(), [], {}
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.ids.update(value for name, value in attrs if name == "id")
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.setdefault(self.open[-1] if self.open else "", []).append(data)


@pytest.fixture
def page(tmp_path, evaluates):
    """The page of four runs: two seeds, another method, and an untrained encoder, whose folder's name is no HTML."""
    write_run(tmp_path / "runs/s0", [linear(0.5)], batch_size=32)
    write_run(tmp_path / "runs/s1", [linear(0.75)], seed=1, batch_size=32)
    write_run(tmp_path / "runs/<simclr>", [linear(0.25)], method="fedsimclr", batch_size=32)
    write_run(tmp_path / "runs/untrained", [linear(0.125)], rounds=0, method="untrained")
    write_run(tmp_path / "runs/unfinished", rounds=1, method="single", seed=7)
    (tmp_path / "runs/unfinished/encoder.pt").unlink()
    config = tmp_path / "runs/s0/config.json"
    config.write_text(config.read_text()[:-1] + ', "command": "python fedu.py --out \'a<b\'", "device": "cpu", "seconds": 90}')
    done = evaluates("--report", "runs", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("report.html shows "), done.stderr
    assert done.stderr == "runs/unfinished is left out: it is unfinished, with 1 of 3 rounds\n"
    return tmp_path / "report.html"


def test_a_page_is_valid_and_loads_nothing(page):
    source = page.read_text()
    read = Page(source)
    assert source.startswith("<!DOCTYPE html>") and read.tags["html"] == read.tags["body"] == read.tags["title"] == 1
    assert read.tags["svg"] == 2 and max(read.ids.values()) == 1
    assert all(address.startswith("#") and address[1:] in read.ids for address in read.addresses)
    assert all(name in read.ids for name in re.findall(r"url\(#([^)]*)\)", source))
    assert not {"script", "link", "img", "iframe", "metadata", "object"} & set(read.tags)
    assert not re.search(r"url\((?!#)|@import", source)
    assert set(re.findall(r"https?://[^\"'< ]*", source)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_a_page_says_what_was_run_and_what_it_does_not_show(page):
    text = Page(page.read_text()).text
    cells, sentences = text["td"], " ".join(text["li"])
    assert {"62.50 ± 17.68", "80.52", "25.00", "12.50"} <= set(cells)
    assert cells[cells.index("batch_size") :][:3] == ["batch_size", "32", "128"]
    assert cells.index("batch_size") < cells.index("partition") and not {"seed", "predictor", "method"} & set(cells)
    assert "2 of 3 settings have a single seed" in sentences and "ResNet-18, 100 rounds of 5 epochs" in sentences
    assert "python fedu.py --out 'a<b'" in text["code"] and "on cpu, in 1.5 min" in text["p"]
    assert "fedu (2 seeds)" in text["text"]


def test_a_page_goes_where_it_is_told(tmp_path, evaluates):
    write_run(tmp_path / "run")
    done = evaluates("--report", "run", "--out", "x.html", cwd=tmp_path)
    assert done.returncode == 0 and Page((tmp_path / "x.html").read_text()).tags["svg"] == 1
    (tmp_path / "run/encoder.pt").unlink()
    (tmp_path / "run/metrics.jsonl").write_text("")
    assert refused(evaluates("--report", "run", cwd=tmp_path), "no run is finished among run")


@pytest.mark.skipif(not BROWSER, reason="there is no Chromium")
def test_a_browser_shows_the_page(page):
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'browser'}", "--window-size=1000,3000"]
    screenshot = page.parent / "page.png"
    subprocess.run([BROWSER, *options, f"--screenshot={screenshot}", page.as_uri()], capture_output=True, timeout=120, check=True)
    assert screenshot.read_bytes().startswith(b"\x89PNG")
    shown = subprocess.run([BROWSER, *options, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True).stdout
    shown, written = Page(shown), Page(page.read_text())
    assert shown.text["td"] == written.text["td"] and shown.text["text"] == written.text["text"] and shown.ids == written.ids
