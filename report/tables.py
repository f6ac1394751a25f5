"""Tables of runs: settings in words, evaluations as mean and deviation over seeds, and published numbers beside them."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import stdev

from methods import WANTED
from options import (
    ABLATED,
    CIFAR_CLASSES,
    DIRICHLET,
    EVALUATION_EPOCHS,
    EVALUATIONS,
    HOST_OPTIONS,
    METHODS,
    OPTIONS,
    defaults,
    in_words,
    settings_of,
)
from runtime.cli import InputError, first_line
from runtime.run import read_config, read_metrics

Group = tuple[dict, list[Path]]  # a setting, which is the options but for those that `by_setting` leaves out, and the runs with it


def mean(values: Sequence[float | None]) -> float:
    """The mean of the values that are known, or nan if none is."""
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else math.nan


def deviation(values: Sequence[float]) -> float:
    """The sample deviation, or nan for a single value, which leaves it undrawn."""
    return stdev(values) if len(values) > 1 else math.nan


# ------------------------------------------------------------------------------------------------- evaluations of runs

PIXELS = "linear, pixels"  # an evaluation without any encoder
SPECTRUM = ("rank", "alignment", "uniformity")  # what `eval.py --spectrum` measures


def read_evaluations(run: Path) -> dict[str, float]:
    """The latest accuracy, in [0, 1], of each evaluation in RUN/eval.jsonl, by its name; see `read_rows`."""
    return {name: row["accuracy"] for name, row in read_rows(run).items() if row["evaluation"] != "spectrum"}


def read_rows(run: Path) -> dict[str, dict]:
    """The latest row of each evaluation in RUN/eval.jsonl, under its `evaluation_name`. Raises InputError if a line is damaged."""
    path = run / "eval.jsonl"
    trained_on = read_config(run)["options"]["dataset"]
    results = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            for needed in (*SPECTRUM, "width", "singular_values") if row["evaluation"] == "spectrum" else ("accuracy",):
                row[needed]
            results[evaluation_name(row, trained_on)] = row
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is not readable ({first_line(error)})") from None
    return results


def spectrum_columns(run: Path) -> dict[str, float]:
    """The numbers of each spectrum in RUN/eval.jsonl, under their columns' names. Ranks of features of different widths are apart."""
    spectra = {name.removeprefix("spectrum"): row for name, row in read_rows(run).items() if row["evaluation"] == "spectrum"}
    return {k + f" of {row['width']}" * (k == "rank") + settings: row[k] for settings, row in spectra.items() for k in SPECTRUM}


def evaluation_name(row: dict, trained_on: str) -> str:
    """The name of an evaluation, which has its settings other than the defaults. trained_on: the run's data set."""
    epochs = EVALUATION_EPOCHS.get(row["evaluation"].split()[0])
    default = {"features": "backbone", "head": "linear", "dataset": trained_on, "seed": 0, "epochs": epochs}
    others = [row[k] if isinstance(row[k], str) else f"{k} {row[k]}" for k in default if row.get(k, default[k]) != default[k]]
    return ", ".join([row["evaluation"], *others])


def evaluation_names(found: Iterable[dict[str, float]]) -> list[str]:
    """The evaluations of these runs that used an encoder, linear ones first. found: of each run, by `read_evaluations`."""
    return sorted({name for evaluations in found for name in evaluations} - {PIXELS}, key=lambda n: ("linear" not in n, n))


# --------------------------------------------------------------------------------------------------- settings in words


def read_options(run: Path) -> dict:
    """A run's options as this version knows them: an option that the run does not have takes its default, an unknown one is left out.

    Between parties, by Flower, the partition is `own`: each came with images of its own.
    """
    config = read_config(run)
    options = config["options"] | ({"partition": "own"} if "run" in config else {})
    for name in config.get("data", {}).keys() & WANTED.keys():  # files of the user's; with a method of one's own all options are stored
        options[name] = f"{Path(options[name]).name} {config['data'][name][:6]}"
    default = usual(options)
    options = default | options | {"settings": (default["settings"] or {}) | options.get("settings", {})}
    return {name: value for name, value in options.items() if name in OPTIONS}


def usual(setting: dict) -> dict:
    """The defaults of a setting's method. Of one that is not in the table they are not known: only its settings count as changed."""
    return defaults(setting["method"]) if setting["method"] in METHODS else setting | {"settings": None}


def by_setting(runs: list[Path]) -> list[Group]:
    """The runs in groups that differ in nothing but the seed, the host, and how often kNN was measured."""
    groups: dict[str, list[Path]] = {}
    for run in runs:
        setting = {k: v for k, v in read_options(run).items() if k not in ("seed", "knn_every", *HOST_OPTIONS)}
        groups.setdefault(json.dumps(setting, sort_keys=True), []).append(run)
    return [(json.loads(setting), members) for setting, members in groups.items()]


def distinct_seeds(runs: list[Path], finished: bool = True) -> list[Group]:
    """As `by_setting`, with one run for each seed and, if `finished`, with finished runs only. It names on stderr what it leaves out.

    A run is finished if it has its encoder or all of its rounds: results may be kept without weights. Raises InputError if nothing is left.
    """
    groups, left_out = [], []
    for setting, members in by_setting(runs):
        of_seed: dict[int, Path] = {}
        for run in members:
            seed, done, rounds = read_options(run)["seed"], len(read_metrics(run)), setting["rounds"] if is_trained(setting) else 0
            if finished and done < rounds and not (run / "encoder.pt").exists():
                left_out.append(f"{run} is left out: it is unfinished, with {done} of {rounds} rounds")
            elif run.resolve() != of_seed.setdefault(seed, run).resolve():
                left_out.append(f"{run} is left out: it has the same setting and seed as {of_seed[seed]}")
        if of_seed:
            groups.append((setting, list(of_seed.values())))
    if not groups:
        raise InputError(f"no run is finished among {', '.join(map(str, runs))}")
    print("".join(f"{sentence}\n" for sentence in left_out), end="", file=sys.stderr)
    return groups


def is_trained(setting: dict) -> bool:
    return setting["method"] != "untrained"


def trained_among(settings: list[dict]) -> list[dict]:
    """The settings of trained encoders, or all if none is trained. For an untrained encoder, the options of training mean nothing."""
    return list(filter(is_trained, settings)) or settings


def differing(settings: list[dict]) -> list[str]:
    """The options in which trained settings differ, besides the method and what its row sets."""
    trained, by_method = trained_among(settings), ("settings", *ABLATED)
    names = [k for k in trained[0] if len({json.dumps(s.get(k)) for s in trained}) > 1 and k not in ("method", *by_method)]
    return names + [k for k in by_method if any(s[k] != usual(s)[k] for s in trained)]


def describe_scale(settings: list[dict]) -> str:
    """The options that all of these settings have in common, in words."""
    trained = trained_among(settings)
    first = trained[0]
    words = {
        ("dataset",): f"on {Path(first['dataset']).stem}",
        ("encoder",): first["encoder"],
        ("rounds", "local_epochs"): f"{first['rounds']} rounds of {first['local_epochs']} local epoch" + "s" * (first["local_epochs"] > 1),
        ("batch_size",): f"B = {first['batch_size']}",
        ("lr",): f"lr {first['lr']:g}",
        ("clients",): f"{first['clients']} clients",
        ("partition", "classes_per_client", "alpha"): describe_partition(first),
    }
    return ", ".join(text for names, text in words.items() if all(s[k] == first[k] for s in trained for k in names))


def capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def describe_partition(setting: dict) -> str:
    classes = "1/K of the" if setting["classes_per_client"] is None else setting["classes_per_client"]
    partitions = {"classes": f"{classes} class{'es' * (classes != 1)} each", "iid": "iid", "own": "with images of their own"}
    partitions |= {kind: f"{kind} {setting['alpha']}" for kind in DIRICHLET}
    partitions |= {"folders": "a folder each", "parties": "by party"}
    return partitions.get(setting["partition"], setting["partition"])


def describe_option(setting: dict, name: str) -> str:
    value = setting.get(name)
    if name == "partition":
        return describe_partition(setting)
    if name == "settings":
        common = settings_of(setting["method"]) if setting["method"] in METHODS else {}
        changed = {k: v for k, v in value.items() if k not in common or v != common[k].default}
        return in_words(changed) or "-"
    if value is None:
        return {"clients_per_round": "all", "classes_per_client": "1/K"}.get(name, "-")
    return f"{value:g}" if isinstance(value, float) else str(value)


def name_setting(setting: dict, differ: list[str]) -> str:
    """A setting's method, and its values of the options in `differ`; of flags, those that are set."""
    words = {k: k.replace("_", " ") + f" {describe_option(setting, k)}" * (setting.get(k) is not True) for k in differ}
    words |= {k: describe_option(setting, k) for k in differ if k == "partition"}
    return ", ".join([setting["method"], *(words[k] for k in differ if setting.get(k) is not False)])


def line_names(settings: list[dict], option: str) -> Callable[[dict], str]:
    """A function that names a setting's line: its method and its values of the options in which the settings differ, except `option`.

    Local epochs are compared at the same number of rounds or, if that makes fewer lines, of epochs in all; and rounds likewise.
    """
    drawn = {"partition": ("partition", "classes_per_client", "alpha")}.get(option, (option,))
    differ = [k for k in differing(list(map(comparable, settings))) if k not in drawn]
    pair = ("rounds", "local_epochs")
    kinds = [[k for k in differ if k != "epochs"], *([[k for k in differ if k not in pair]] if option in pair else [])]

    def name(setting: dict, names: list[str]) -> str:
        return name_setting(comparable(setting) | ({"method": "trained"} if option == "method" else {}), names)

    names = min(kinds, key=lambda names: len({name(setting, names) for setting in settings}))
    return lambda setting: name(setting, names)


def comparable(setting: dict) -> dict:
    """A setting with its epochs in all, and without its classes per client if they are the default, 1/K of CIFAR's classes."""
    share = -(-CIFAR_CLASSES.get(setting["dataset"], 0) // setting["clients"])
    classes = setting["classes_per_client"] if setting["classes_per_client"] != share else None
    return setting | {"epochs": setting["rounds"] * setting["local_epochs"], "classes_per_client": classes}


# ------------------------------------------------------------------------------------------------------------- tables

# Linear evaluation, top-1 %, of ResNet-18 after 100 rounds of 5 local epochs on CIFAR-10: non-IID (2 classes each of 5 clients), IID.
# From FedEMA's paper (Zhuang et al. 2022), table 1 and appendix; rows with another encoder are from FedU's (Zhuang et al. 2021).
PUBLISHED = {
    "single": ("74.95", "82.42"),
    "fedsimclr": ("78.09", "-"),
    "fedmoco-v1": ("78.21", "-"),
    "fedmoco-v2": ("79.14", "-"),
    "fedsimsiam": ("76.27", "-"),
    "fedbyol": ("79.44", "84.29"),
    "fedu": ("80.52", "83.96"),
    "fedema": ("83.34", "86.26"),
    "fedca": ("68.01 (ResNet-50)", "71.25 (ResNet-50)"),
    "fedavg-supervised": ("67.74 (ResNet-50)", "91.51 (ResNet-50)"),
    "central": ("90.46", "90.46"),
}
# From FedU's paper, by the encoder that is averaged, what it becomes at the clients, and whether the predictor is averaged.
PUBLISHED_ABLATION = {
    "online online global": "84.07", "online online local": "82.18",
    "online both global": "81.24", "online both local": "18.23",
    "online target global": "9.99", "online target local": "19.22",
    "target online global": "82.10", "target online local": "78.06",
    "target target global": "9.99", "target target local": "25.02",
    "target both global": "82.32", "target both local": "29.03",
}  # fmt: skip


def table(runs: list[Path], kind: str = "md") -> str:
    """A row for each setting, with the options in which settings differ, and a last row for raw pixels if a run has them.

    An evaluation is the mean and, over several seeds, the sample deviation, in % of the test images; it names its number of seeds where it
    has fewer than the row. Traffic is that of all clients. kind: `md`, `tex` with booktabs, or `csv`, where every number has a column.
    """
    return {"md": as_markdown, "tex": as_latex, "csv": as_csv}[kind](*table_lines(runs, apart=kind == "csv"))


def table_lines(runs: list[Path], apart: bool = False) -> tuple[str, list[list[str]]]:
    """A table's caption and its lines, of which the first is the header. apart: whether every number has a column of its own."""
    groups = distinct_seeds(runs)
    settings = [setting for setting, _ in groups]
    differ = differing(settings)
    runs = [run for _, members in groups for run in members]
    found, spectra = ({run: read(run) for run in runs} for read in (read_evaluations, spectrum_columns))
    columns, ways = evaluation_names(found.values()), ("upload_bytes", "download_bytes")
    columns += dict.fromkeys(name for numbers in spectra.values() for name in numbers)
    traffic = ["up, MB a round", "down, MB a round"] if apart else ["up and down, MB a round"]
    lines = [["method", *differ, "seeds", *traffic]]
    lines[0] += [name for column in columns for name in ((column, f"{column} deviation", f"{column} seeds") if apart else (column,))]
    for setting, members in groups:
        rounds = read_metrics(members[0])
        cells = [setting["method"], *(describe_option(setting, k) for k in differ), str(len(members))]
        megabytes = [f"{mean([row[way] for row in rounds]) / 1e6:.1f}" if rounds else "-" for way in ways]
        cells += megabytes if apart else [" + ".join(megabytes) if rounds else "-"]
        for column in columns:
            values = [100 * found[run][column] for run in members if column in found[run]]
            values += [spectra[run][column] for run in members if column in spectra[run]]
            digits = 3 if column.startswith(SPECTRUM[1:]) else 2
            parts = [f"{of(values):.{digits}f}" if len(values) > least else "-" for of, least in ((mean, 0), (deviation, 1))]
            cells += [*parts, str(len(values))] if apart else [mean_cell(values, len(members), digits)]
        lines.append(cells)
    for line, cell in zip(lines, published_column(settings, differ)):
        line.append(cell)
    for accuracy in {evaluations[PIXELS] for evaluations in found.values() if PIXELS in evaluations}:
        row = {"method": "raw pixels", "linear": f"{100 * accuracy:.2f}"}
        lines.append([row.get(column, "-") for column in lines[0]])
    caption = f"{capitalized(describe_scale(settings))}; accuracies in % of the test images"
    caption += "; a higher rank is better, and a lower alignment and uniformity" * any(spectra.values())
    return f"{caption}.", lines


def table_kind(out: Path) -> str:
    """The kind of table that a file's name asks for. Raises InputError if it asks for none."""
    if out.suffix not in (".md", ".tex", ".csv"):
        raise InputError(f"--out got {out}, needs a name that ends in .md, .tex or .csv for a table")
    return out.suffix[1:]


def as_markdown(caption: str, lines: list[list[str]]) -> str:
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return f"{caption}\n\n" + "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def as_latex(caption: str, lines: list[list[str]]) -> str:
    """A tabular for a document with `\\usepackage{booktabs}`, the caption as a comment above it."""
    head, *body = [" & ".join("--" if cell == "-" else escaped(cell) for cell in cells) + r" \\" for cells in lines]
    alignment = "".join("r" if name == "seeds" or name.startswith(("up", *EVALUATIONS, *SPECTRUM)) else "l" for name in lines[0])
    begin, end = rf"\begin{{tabular}}{{{alignment}}}", r"\end{tabular}"
    return "\n".join([f"% {caption}", begin, r"\toprule", head, r"\midrule", *body, r"\bottomrule", end])


def escaped(text: str) -> str:
    """Text without LaTeX's special characters."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
    special |= {character: rf"\{character}" for character in "&%$#_{}"} | {"<": r"\textless{}", ">": r"\textgreater{}"}
    return "".join(special.get(character, character) for character in text)


def as_csv(caption: str, lines: list[list[str]]) -> str:
    """A header and a line for each row; what was not measured is empty, and the caption is left out."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([["" if cell == "-" else cell for cell in cells] for cells in lines])
    return file.getvalue().rstrip("\n")


def mean_cell(values: list[float], seeds: int, digits: int = 2) -> str:
    """A mean with its deviation. seeds: of the row, of which some may have no value. digits: behind the point."""
    if not values:
        return "-"
    spread = f" ± {deviation(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}" + (f" ({count_seeds(values)})" if len(values) < seeds else "")


def count_seeds(members: Sequence) -> str:
    return f"{len(members)} seed{'s' * (len(members) > 1)}"


def published_column(settings: list[dict], differ: list[str]) -> list[str]:
    """A column of the papers' numbers: its title and a cell for each setting, or an empty list if they have none of these settings.

    A cell is `-` if no run of the papers has the setting, apart from its scale. differ: the options in which the settings differ.
    """
    ablation = any(k in ABLATED for k in differ)

    def cell(setting: dict) -> str:
        changed = {k for k, default in usual(setting).items() if setting.get(k, default) != default}
        changed -= {"method", "dataset", "partition", "classes_per_client", *(ABLATED if ablation else ())}
        column = {("classes", None): 0, ("classes", 2): 0, ("iid", None): 1}.get((setting["partition"], setting["classes_per_client"]))
        if Path(setting["dataset"]).stem != "cifar10" or column is None or changed:
            return "-"
        if not ablation:
            return PUBLISHED.get(setting["method"], ("-", "-"))[column]
        return PUBLISHED_ABLATION.get(" ".join(setting[k] for k in ABLATED), "-") if setting["method"] == "fedbyol" and not column else "-"

    cells = [cell(setting) for setting in settings]
    title = "linear, published: " + ("at a scale that the paper does not state" if ablation else "ResNet-18, 100 rounds of 5 epochs")
    return [title, *cells] if set(cells) != {"-"} else []
