"""A page of runs: one HTML file with their accuracies, curves, options, commands and limits, and nothing to load from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict
from html import escape
from io import BytesIO
from pathlib import Path

from options import METHODS, OPTIONS, Options
from report.figures import plot, plot_against
from report.progress import duration
from report.tables import describe_option, distinct_seeds, is_trained, read_options, table_lines, trained_among
from runtime.cli import write_atomic
from runtime.run import read_config, read_metrics

CSS = """
body { font: 16px/1.5 sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #222; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; }
th, td { white-space: nowrap; padding: 0.25em 0.8em; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top; }
th { white-space: normal; border-bottom: 2px solid #222; }
svg { max-width: 100%; height: auto; }
code { font-size: 13px; }
"""


def write_page(runs: list[Path], out: Path) -> None:
    """Write the page of finished runs, one of each setting and seed. Raises InputError if none is finished."""
    content = page(runs).encode()
    write_atomic(out, lambda file: file.write(content))


def page(runs: list[Path]) -> str:
    """The page as HTML."""
    groups = distinct_seeds(runs)
    runs, settings = [run for _, members in groups for run in members], [setting for setting, _ in groups]
    trained = [run for setting, members in groups if is_trained(setting) for run in members]
    caption, lines = table_lines(runs)
    title = settings[0]["method"] if len(groups) == 1 else f"{len(groups)} settings compared"
    parts = [f"<h1>{escape(title)}</h1>", f"<p>{escape(caption)}</p>", html_table(lines)]
    parts += ["<h2>Limits</h2>", html_list(limits(settings, [len(members) for _, members in groups], lines))]
    if trained:
        parts += [
            "<h2>Rounds</h2>",
            svg("Divergence, own predictors, loss and kNN accuracy by round", lambda file: plot(trained, file, title=False)),
        ]
    if len(set(map(bool, map(measured, trained)))) == 1 and measured(trained[0]) and sum(map(is_trained, settings)) > 1:
        parts += [svg("kNN accuracy by round", lambda file: plot_against("round", trained, file, title=False))]
    parts += ["<h2>Options</h2>", *html_options(settings), "<h2>Commands</h2>", *html_commands(runs)]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{CSS}</style>'
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>{head}</head>\n<body>\n' + "\n".join(parts) + "\n</body>\n</html>\n"


def measured(run: Path) -> list[float]:
    """The kNN accuracies of a run."""
    return [row["knn"] for row in read_metrics(run) if row["knn"] is not None]


def limits(settings: list[dict], seeds: list[int], lines: list[list[str]]) -> list[str]:
    """What the numbers do not show, a sentence each."""
    sentences = []
    if min(seeds) == 1:
        who = "Each setting has" if max(seeds) == 1 else f"{seeds.count(1)} of {len(seeds)} settings have"
        sentences.append(f"{who} a single seed, so there is no deviation, and a small difference may be chance.")
    if max(seeds) > 1:
        sentences.append("± is the sample deviation over the seeds that were evaluated.")
    if lines[0][-1].startswith("linear, published: "):
        scale = lines[0][-1].partition(": ")[2]
        made = scale if scale.startswith("at") else f"with {scale}"
        sentences.append(f"The published numbers were made {made}. A run at another scale neither confirms nor refutes them.")
    else:
        sentences.append("No published number has these settings.")
    unmeasured = [name for column, name in enumerate(lines[0]) if name.startswith(("linear", "knn", "semi")) and "published" not in name
        and any(line[column] == "-" for line in lines[1:] if line[0] != "raw pixels")]  # fmt: skip
    if unmeasured:
        sentences.append(f"Not measured for all settings: {'; '.join(unmeasured)}.")
    sentences.append("A run repeats bit for bit only on the same machine, with the same torch version and number of threads.")
    return sentences


def html_list(sentences: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>"


def html_table(lines: list[list[str]]) -> str:
    """A table whose first line is its header."""
    head, *body = ["".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) for tag, cells in zip(["th"] + ["td"] * len(lines), lines)]
    rows = "\n".join(f"<tr>{row}</tr>" for row in body)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>'


def html_options(settings: list[dict]) -> list[str]:
    """The options that the trained settings have in common, changed ones first; those that differ are in the table of accuracies."""
    trained = trained_among(settings)
    first = trained[0]
    common = [name for name in OPTIONS if name in first and name != "method" and all(setting[name] == first[name] for setting in trained)]
    usual = asdict(Options(method=first["method"] if first["method"] in METHODS else "fedu", dataset=first["dataset"]))
    usual["dataset"] = OPTIONS["dataset"].default
    rows = [[name, describe_option(first, name), describe_option(usual, name)] for name in common]
    rows.sort(key=lambda row: row[1] == row[2])
    note = "<p>The settings have these options in common. The method sets the others, or the table of accuracies has them.</p>"
    return [note if len(trained) > 1 else "", html_table([["option", "value", "default for this method and data set"], *rows])]


def html_commands(runs: list[Path]) -> list[str]:
    """How to make each run again, and by what it was made."""
    parts = []
    for run in runs:
        config, seed = read_config(run), read_options(run)["seed"]
        made = {"torch": config.get("versions", {}).get("torch"), "on": config.get("device"), "commit": config.get("commit")}
        made |= {"in": duration(config["seconds"])} if config.get("seconds") else {}
        words = ", ".join(f"{name} {value}" for name, value in made.items() if value)
        command = config.get("command", "its command was not noted")
        parts.append(f"<p>{escape(str(run))}, seed {seed}: <code>{escape(command)}</code><br>{escape(words)}</p>")
    return parts


def svg(label: str, draw: Callable[[BytesIO], None]) -> str:
    """A figure as an inline SVG. Its ids get a prefix, since each id may be on a page only once."""
    file = BytesIO()
    draw(file)
    text = re.sub(r"<metadata>.*?</metadata>", "", file.getvalue().decode(), flags=re.DOTALL)
    prefix = re.sub(r"\W+", "-", label)
    text = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{prefix}-", text[text.index("<svg") :])
    return f'<figure><svg role="img" aria-label="{escape(label)}"{text.removeprefix("<svg")}</figure>'
