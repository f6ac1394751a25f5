import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, heed, refused

import sweep
from options import Options, parse_evaluation, run_name
from options import parse as fedu_parse
from report.tables import SPECTRUM
from runtime.cli import InputError, locked
from sweep import Run, combine, evaluation, new_folder, parse, runs_in


def run_sweep(*argv) -> None:
    sweep.main(**parse([*map(str, argv)]))


def names(swept: dict[str, list], **common) -> list[str]:
    return [name.removeprefix("fashion-") for name in combine(swept, common)]


# ------------------------------------------------------------------------------------------------------- combinations


def test_every_combination_has_a_run_and_an_option_is_left_out_where_it_changes_nothing(capsys):
    swept = {"seed": ["0", "1"], "method": ["single", "fedu"], "mu": ["0.2", "0.4"]}
    for_each = ("single-5clients-s{}", "fedu-5clients-s{}-mu0.2", "fedu-5clients-s{}")
    assert names(swept) == [name.format(seed) for seed in (0, 1) for name in for_each]
    assert capsys.readouterr().err == "--mu changes nothing in 4 of 8 combinations, as --seed 0 --method single: it is left out there\n"


def test_settings_and_flags_are_swept_like_options(capsys):
    given = parse(
        ["--set", "temperature=0.1", "temperature=0.2", "--method", "fedu", "fedsimclr", "--seed", "3", "--no-predictor", "no", "yes"]
    )
    assert list(given["swept"]) == ["seed", "method", "no_predictor", "temperature"]
    assert names(given["swept"]) == [
        "fedu-5clients-s3", "fedu-5clients-s3-no-predictor", "fedsimclr-5clients-s3-temperature0.1", "fedsimclr-5clients-s3-temperature0.2",
    ]  # fmt: skip
    said = capsys.readouterr().err
    assert "--set temperature changes nothing in 4 of 8 combinations, as --seed 3 --method fedu: " in said
    assert "--no-predictor changes nothing in 4 of 8 combinations, as --seed 3 --method fedsimclr --set temperature=0.1: " in said


def test_the_same_options_in_other_words_are_one_run():
    assert names({"mu": ["0.4", "0.40"], "method": ["fedu"]}, rounds=20, device="cpu") == ["fedu-5clients-s0-rounds20"]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--method", "fedu", "fedsgd"], ["--method got 'fedsgd'"]),
        (["--rounds", "2", "x"], ["--rounds got 'x'"]),
        (["--clients", "2", "5", "--clients-per-round", "3"], ["--clients-per-round got 3, there are 2 clients"]),
        (["--method", "single", "fedema", "--mu", "0.2", "0.4"], ["--mu 0.2 changes nothing in --method single"]),
        (["--method", "fedu", "fedema", "--", "--mu", "0.2"], ["--mu 0.2 changes nothing in --method fedema", "before `--`"]),
        (["--set", "temprature=1"], ["--set got 'temprature'"]),
        (["--set", "temperature"], ["--set got 'temperature', needs NAME=VALUE"]),
        (["--no-predictor", "maybe"], ["--no-predictor got 'maybe', needs no, yes or both"]),
        (["--mu", "0.2", "--", "--mu", "0.3"], ["--mu has values before and after `--`"]),
        (["--", "--overwrite"], ["--overwrite cannot go to every run"]),
        (["--", "--dry-run"], ["--dry-run cannot go to every run"]),
        (["--", "--save-partition", "p.npz"], ["--save-partition cannot go to every run"]),
        (["--device", "cpu"], ["--device"]),
        (["--eval", "semi", "0.1"], ["--eval", "'semi'", "in quotes, 'semi F'"]),
        (["--eval", "semi 2"], ["--eval", "'2'", "at most 1"]),
        (["--eval", ""], ["--eval", "needs linear, knn"]),
        (["--jobs", "0"], ["--jobs", "'0'"]),
        (["--out", "/dev/null/sweep"], ["--out /dev/null/sweep cannot be made"]),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_starts(argv, words, refuses, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "start", pytest.fail)
    assert refuses(lambda: run_sweep(*argv), *words)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------------- runs


def as_if_run(folder, **given) -> None:
    folder.mkdir(parents=True)
    options = Options(**given)
    (folder / "config.json").write_text(json.dumps({"options": vars(options)}))


def test_runs_are_found_by_their_options(tmp_path):
    as_if_run(tmp_path / "any", mu=0.2)
    as_if_run(tmp_path / "twice", mu=0.2)
    (tmp_path / "twice/encoder.pt").touch()
    as_if_run(tmp_path / "fashion-fedu-5clients-s0", rounds=3)
    as_if_run(tmp_path / "parties", seed=7)
    (tmp_path / "parties/config.json").write_text((tmp_path / "parties/config.json").read_text()[:-1] + ', "run": "x"}')
    for name, text in (("damaged", "{"), ("other-version", '{"options": {"method": "fedu", "gone": 1}}'), ("list", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    found = runs_in(tmp_path)
    assert found == {
        run_name(Options(mu=0.2)): tmp_path / "twice", run_name(Options(rounds=3)): tmp_path / "fashion-fedu-5clients-s0",
    }  # fmt: skip


def test_a_name_that_is_taken_gets_a_number(tmp_path):
    assert new_folder(tmp_path, "a") == tmp_path / "a"
    (tmp_path / "a").mkdir()
    assert new_folder(tmp_path, "a") == tmp_path / "a"  # empty: killed before it began
    (tmp_path / "a/config.json").touch()
    (tmp_path / "a-2").touch()
    assert new_folder(tmp_path, "a") == tmp_path / "a-3"


def test_steps_that_are_left(tmp_path):
    wanted = dict(map(evaluation, ("knn", "spectrum", "semi 0.1")))
    run = Run(tmp_path / "a", tmp_path / "a.log", ["--mu", "1"], wanted, ["--device", "cpu"])
    folder = str(run.folder)
    evaluations = [["eval.py", "--knn", folder], ["eval.py", "--spectrum", folder], ["eval.py", "--semi", "0.1", folder]]
    assert run.steps_left() == [["fedu.py", "--mu", "1", "--out", folder], *evaluations]
    as_if_run(run.folder)
    assert run.steps_left() == [["fedu.py", "--resume", folder, "--device", "cpu"], *evaluations]
    (run.folder / "encoder.pt").touch()
    rows = {"evaluation": "semi 0.1", "accuracy": 0.5}, {"evaluation": "spectrum"} | dict.fromkeys((*SPECTRUM, "width", "singular_values"))
    (run.folder / "eval.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run.steps_left() == evaluations[:1]
    (run.folder / "eval.jsonl").write_text("{")
    with pytest.raises(InputError, match="eval.jsonl is not readable"):
        run.steps_left()


def test_every_command_is_one_that_its_script_takes(tmp_path, capsys):
    host = "--device cpu --data-root x --processes 2 --log tensorboard --dp-delta 1e-6 --dp-noise 1 --dp-clip 1"
    run_sweep("--seed", "0", "--eval", "linear", "knn", "spectrum", "semi 0.1", "--list", "--out", tmp_path, "--", *host.split())
    training, *evaluations = (line.split()[1:] for line in capsys.readouterr().out.splitlines())
    assert training[0] == "fedu.py" and fedu_parse(training[1:]).given["processes"] == 2
    assert [parse_evaluation(words).task for script, *words in evaluations if script == "eval.py"] == ["linear", "knn", "spectrum", "semi"]


def test_a_sweep_makes_what_is_not_there_and_ends_with_table_and_figures(tiny, tmp_path, monkeypatch, forks, capfd):
    forks(sweep)
    argv = ["--method", "untrained", "fedu", "--mu", "0.2", "0.4", "--eval", "linear", "--jobs", "2", "--out", tmp_path]
    argv += ["--", *tiny, "--rounds", "1"]
    run_sweep(*argv)
    folders = {json.loads(path.read_text())["options"]["mu"]: path.parent for path in tmp_path.glob("tiny-fedu-*/config.json")}
    folders["untrained"] = next(tmp_path.glob("tiny-untrained-*s0-*/"))
    assert folders.keys() == {0.2, 0.4, "untrained"} and len(list(tmp_path.glob("*/encoder.pt"))) == 3
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file() and p.suffix != ".log") == ["figure-mu.png", "figure.png", "table.md"]
    for folder in folders.values():
        log = (tmp_path / f"{folder.name}.log").read_text()
        assert [line.split()[2] for line in log.splitlines() if line.startswith("$")] == ["fedu.py", "eval.py"] and "2 clients" in log
    said, table = capfd.readouterr(), (tmp_path / "table.md").read_text()
    assert table in said.out and said.err.count("--mu changes nothing") == 1
    rows = [line.split(" | ")[:3] for line in table.splitlines() if line.startswith(("| untrained", "| fedu"))]
    assert rows == [["| untrained", "0.4", "1"], ["| fedu", "0.2", "1"], ["| fedu", "0.4", "1"]] and "| linear |" in table

    (tmp_path / "figure.png").unlink()
    folders[0.2].rename(tmp_path / "of another name")  # which is found by its options
    (folders[0.4] / "encoder.pt").unlink()  # as if interrupted
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "start", pytest.fail)
        run_sweep("--list", *argv)
        assert capfd.readouterr().out == f"python fedu.py --resume {folders[0.4]} --device cpu\n"
    run_sweep(*argv)
    assert (folders[0.4] / "encoder.pt").exists() and (tmp_path / "figure.png").exists()
    assert "continuing after 1 of 1 rounds" in (tmp_path / f"{folders[0.4].name}.log").read_text()
    assert (tmp_path / "table.md").read_text() == table
    monkeypatch.setattr(sweep, "start", pytest.fail)
    run_sweep(*argv)


def test_a_run_that_fails_is_named_at_the_end_and_does_not_end_the_others(tiny, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="1"):
        run_sweep("--method", "fedu", "untrained", "--eval", "--jobs", "2", "--", *tiny, "--lr", "1e30")
    said = capfd.readouterr()
    failed, sentence = said.err.splitlines()[-2:]
    assert failed == "sweep.py: 1 of 2 runs failed; the last lines of their logs:"
    assert sentence.startswith("runs/tiny-fedu-") and ".log: fedu.py: error: round 0: no upload is finite" in sentence
    assert "| untrained | 1 |" in said.out and "runs/figure.png was not drawn" in said.err and (tmp_path / "runs/table.md").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_end_of_a_sweep_ends_its_runs_which_the_same_command_continues(tiny, tmp_path, monkeypatch, capfd, number):
    monkeypatch.chdir(tmp_path)
    argv = ["--eval", "--jobs", str(os.cpu_count()), "--out", "s", "--", *tiny, "--rounds", "999"]
    line = [sys.executable, str(ROOT / "sweep.py"), *argv]
    with subprocess.Popen(line, preexec_fn=heed, stderr=subprocess.PIPE, text=True) as process:
        while not list(tmp_path.glob("s/*/checkpoint.pt")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        process.send_signal(number)
        assert process.wait() == (130 if number == signal.SIGINT else -number)
        assert process.stderr.read() == "\nsweep.py: interrupted; the same command goes on from here\n" * (number == signal.SIGINT)
    folder = next(Path("s").glob("*/"))
    with locked(folder):  # waits for the end of the run
        pass
    log, end = Path(f"{folder}.log"), f"fedu.py: interrupted; continue with `python fedu.py --resume {folder}`"
    deadline = time.monotonic() + 60  # it says so after it has left its folder
    while log.read_text().splitlines()[-1] != end and time.monotonic() < deadline:
        time.sleep(0.1)
    assert log.read_text().splitlines()[-1] == end
    capfd.readouterr()
    run_sweep("--list", *argv)
    assert capfd.readouterr().out == f"python fedu.py --resume {folder} --device cpu\n"


def test_a_mistake_on_the_command_line_ends_with_status_2(command, tmp_path):
    assert refused(command("sweep.py", "--method", "none", cwd=tmp_path), "--method got 'none'")
