"""docs/extending.md: its examples are run, and what is wrong in a method of one's own is one sentence."""

import json
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, load, refused, run
from test_ranks import assert_same_runs, torchrun

import eval as evaluation
import fedu
import methods
import sweep
from methods.barlow import BarlowTwins
from models import Segment
from options import METHODS, Method, Options, Setting, parse, parse_evaluation, run_name
from report.tables import read_options
from runtime.cli import InputError, number

PAGE = (ROOT / "docs/extending.md").read_text()
EXAMPLES = {name: code for name, code in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.DOTALL)}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The page's files, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name, code in EXAMPLES.items():
        (tmp_path / name).write_text(code)
    return tmp_path


def test_the_page_is_short_and_has_its_examples():
    assert len(PAGE.splitlines()) <= 120 and list(EXAMPLES) == ["barlow.py", "ldawa.py", "grey.py", "begin.py"]
    assert all(hasattr(BarlowTwins, hook) for hook in re.findall(r"^\| `(?!super)(\w+)\(", PAGE, re.MULTILINE))
    assert {name for name in Method._fields if f"`{name}`" in PAGE} == {*Method._fields} - {
        "ablations",
        "trains",
        "servers",
    }


def test_an_objective_of_ones_own(own, tiny, monkeypatch):
    """The page's Barlow Twins gives the bits of the table's, is copied, and is resumed from the copy."""
    run(own / "mine", *tiny, "--method", "./barlow.py", "--set", "redundancy=0.01")
    table = run(own / "table", *tiny, "--method", "fedbarlow", "--set", "redundancy=0.01")
    assert_same_runs(own / "mine", own / "table")
    assert (own / "mine/method.py").read_text() == EXAMPLES["barlow.py"]
    config = json.loads((own / "mine/config.json").read_text())
    assert config["options"]["method"] == "./barlow.py" and len(config["data"]["method"]) == 32
    (own / "barlow.py").unlink()
    for name in ("encoder.pt", "checkpoint.pt"):
        (own / "mine" / name).unlink()
    fedu.resume(own / "mine")
    assert torch.equal(load(own / "mine")["encoders"][0], table["encoders"][0])
    evaluation.main(parse_evaluation(["--knn", "mine"]))
    assert read_options(own / "mine")["method"] == f"barlow.py {config['data']['method'][:6]}"
    evaluation.main(parse_evaluation(["--table", "mine", "table"]))


@pytest.mark.parametrize("name", ["fedalignuniform", "ldawa", "fedx", "fedu2", "fedbarlow", "orchestra"])
def test_each_method_after_fedu_needs_no_more_than_its_file(own, tiny, monkeypatch, name):
    """Its file of methods/, with a row behind it and named as a user's own, gives the bits of the table's."""
    monkeypatch.setattr("methods.orchestra.ITERATIONS", 20)
    named = {column: getattr(METHODS[name], column).split(":") for column in ("rule", "objective") if getattr(METHODS[name], column)}
    file = next(iter(named.values()))[0]  # of the rule, if there is one: L-DAWA's objective is BYOL's
    columns = ", ".join(f"{column}={attribute}" for column, (of, attribute) in named.items() if of == file)
    text = (ROOT / f"methods/{file}.py").read_text().replace("ITERATIONS = 500", "ITERATIONS = 20")
    (own / "mine.py").write_text(f"{text}\nfrom options import METHODS\nMETHOD = METHODS[{name!r}]._replace({columns})\n")
    run(own / "mine", *tiny, "--method", "mine.py", "--rounds", "2")
    run(own / "table", *tiny, "--method", name, "--rounds", "2")
    assert_same_runs(own / "mine", own / "table")


def test_a_transformer_with_weights_of_its_own_on_images_of_its_own(own, capsys):
    """The page's lines, in a fresh folder; the projector, which the weights lack, is random."""
    pytest.importorskip("timm", reason="timm is not installed")
    made: dict = {}
    exec(EXAMPLES["begin.py"], made)
    assert made["features"].shape == (40, 64) and "classifier" in capsys.readouterr().err
    assert json.loads((own / "runs/mine/config.json").read_text())["options"]["init"] == "weights.pth"


def test_a_rule_of_ones_own(own, tiny):
    """By hand: two tensors of two parameters, whose cosines are 0 and 1, and 1 and, of a tensor of norm 0, 1; and two statistics."""
    rule = methods.load(own / "ldawa.py", "ldawa.py", "method").content.rule
    server = SimpleNamespace(model=torch.tensor([9.0, 1, 0, 0, 2, 9]))
    rows = torch.tensor([[1.0, 0, 1, 0, 1, 5], [3, 1, 0, 0, 0, 7]])
    networks = SimpleNamespace(online=SimpleNamespace(segments=[Segment("a", 1, 3), Segment("b", 3, 5)]))
    assert rule(server, SimpleNamespace(rows=lambda: rows), networks, []).tolist() == [2, 0.5, 0, 0, 0.5, 6]
    metrics = run(own / "run", *tiny, "--method", "ldawa.py", "--clients", "4", "--clients-per-round", "2")["metrics"]
    assert metrics[0]["loss"] != metrics[1]["loss"] and metrics[0]["predictor"] == ["global", "global"]


def test_views_of_ones_own(own, tiny, refuses, monkeypatch):
    """The page's views are drawn, recorded, copied and resumed; with `ema_decay` 1 and equal views, BYOL's loss is that of equal images."""
    mine = run(own / "run", *tiny, "--views", "grey.py", "--rounds", "2")
    assert mine["metrics"][0]["loss"] != run(own / "other", *tiny, "--rounds", "2")["metrics"][0]["loss"]
    assert (own / "run/views.py").read_text() == EXAMPLES["grey.py"]
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    view = Options(views="grey.py").views.content
    drawn = [view(images, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])
    assert torch.equal(drawn[0][:, 0], drawn[0][:, 1]) and drawn[0].min() >= 0 and drawn[0].max() <= 1
    (own / "grey.py").unlink()
    for name in ("encoder.pt", "checkpoint.pt"):
        (own / "run" / name).unlink()
    fedu.resume(own / "run")
    assert torch.equal(load(own / "run")["encoders"][0], mine["encoders"][0])
    (own / "bad.py").write_text("def view(images, generator):\n    return images\n")
    words = ["bad.py, line 1: view gives [8, 3, 16, 16] of torch.uint8 on cpu, needs float32"]
    assert refuses(partial(run, own / "bad", *tiny, "--views", "bad.py"), *words)
    (own / "one.py").write_text("def view(images):\n    return images\n")
    assert refuses(lambda: parse(["--views", "one.py"]), "one.py, line 1: view(images) is called as view(images, generator)")
    (own / "none.py").write_text("def views(): pass")
    assert refuses(lambda: parse(["--views", "none.py"]), "none.py has no function view(images, generator)")
    for text in ("jitter=0.5", "crop_scale=0.5", "greyscale=0"):
        assert refuses(lambda text=text: parse(["--views", "bad.py", "--set", text]), f"--set {text} changes nothing: --views bad.py draws")
    assert refuses(
        lambda: fedu.main(parse(["--resume", "run", "--views", "bad.py"])), "--views bad.py is not the file with which run began"
    )


def test_ranks_read_the_file_themselves(own, tiny):
    run(own / "alone", *tiny, "--method", "./barlow.py", "--clients", "3")
    done = torchrun(2, *tiny, "--method", "./barlow.py", "--clients", "3", "--out", "together", cwd=own)
    assert done.returncode == 0, done.stderr
    assert_same_runs(own / "alone", own / "together")
    run(own / "forked", *tiny, "--method", "./barlow.py", "--clients", "3", "--processes", "2")
    assert_same_runs(own / "alone", own / "forked")


def test_a_run_goes_on_with_its_own_file_only(own, tiny, refuses):
    run(own / "run", *tiny, "--method", "./barlow.py", "--rounds", "1")

    def resume(*line: str):
        return lambda: fedu.main(parse(["--resume", "run", *line]))

    (own / "same.py").write_text(EXAMPLES["barlow.py"])
    resume("--method", "same.py")()
    assert refuses(resume("--method", "ldawa.py"), "--method ldawa.py is not the file with which run began", "run/method.py")
    assert refuses(resume("--method", "fedu"), "--method fedu is not the file with which run began")
    (own / "run/method.py").write_text(EXAMPLES["barlow.py"] + "\n")
    assert refuses(resume(), "run/method.py is not what run began with")


def test_names_of_runs_differ_with_the_files_content(own):
    first = run_name(Options(method="./barlow.py"))
    (own / "barlow.py").write_text(EXAMPLES["barlow.py"] + "\n")
    second = run_name(Options(method="./barlow.py"))
    assert first != second and first.startswith("fashion-barlow-5clients-s0-") and len(first) <= 60


def test_a_sweep_knows_a_run_by_the_file_that_it_was_made_with(own, tiny):
    run(own / "runs/a", *tiny, "--method", "./barlow.py", "--rounds", "1")
    options = Options(**parse([*tiny, "--method", "./barlow.py", "--rounds", "1"]).given)
    assert sweep.runs_in(own / "runs") == {run_name(options): own / "runs/a"}
    (own / "barlow.py").write_text(EXAMPLES["barlow.py"] + "\n")
    changed = Options(**parse([*tiny, "--method", "./barlow.py", "--rounds", "1"]).given)
    assert list(sweep.runs_in(own / "runs")) == [run_name(options)] != [run_name(changed)]


def test_the_help_has_the_settings_of_the_file(own, capsys):
    with pytest.raises(SystemExit) as end:
        parse(["--method", "./barlow.py", "--help"])
    assert end.value.code == 0 and "(fedbarlow, ./barlow.py: 0.005):" in " ".join(capsys.readouterr().out.split())
    assert Options(method="./barlow.py", settings={"redundancy": 2}).settings["redundancy"] == 2
    with pytest.raises(InputError, match="settings got 'bogus'; method ./barlow.py has the settings jitter, .*redundancy"):
        Options(method="./barlow.py", settings={"bogus": 2})


GOOD = EXAMPLES["barlow.py"]
LINE = {text: 2 + GOOD[: GOOD.index(text)].count("\n") for text in ("class", "def terms", "def loss", "z1, z2", "from models", "METHOD")}


def changed(old: str, new: str) -> str:
    assert old in GOOD
    return "\n" + GOOD.replace(old, new)


@pytest.mark.parametrize(
    "content, words",
    [
        (None, ["--method ./broken.py cannot be read: No such file"]),
        ("", ["broken.py has no METHOD, needs METHOD = Method(...)"]),
        ("METHOD = 5", ["broken.py has METHOD = 5, needs METHOD = Method(...)"]),
        ("x = 1\nMETHOD = (", ["broken.py, line 2: '(' was never closed"]),
        ("\n\nimport nothing_of_this_name", ["broken.py, line 3: ModuleNotFoundError: No module named 'nothing_of_this_name'"]),
        ("import sys\nsys.exit(3)", ["broken.py, line 2: SystemExit"]),
        (changed("has_target=False,", "has_target=False, uses_labels=True,"),
         ["BarlowTwins(encoder, device, redundancy=0.005) is called as BarlowTwins(encoder, device, redundancy, labels)"]),
        (changed("has_target=False,", "has_target=False, bogus=1,"), [f"broken.py, line {LINE['METHOD']}: TypeError: ", "'bogus'"]),
        (changed("(Objective)", ""), ["broken.py: METHOD has objective=", "needs a class derived from models.Objective"]),
        (changed("def terms", "def term"), [f"broken.py, line {LINE['class']}: BarlowTwins has no terms(self, view1"]),
        (changed("device, redundancy=0.005", "device"),
         [f"broken.py, line {LINE['class']}: BarlowTwins(encoder, device) is called as BarlowTwins(encoder, device, redundancy): "]),
        (changed('Setting(0.005, "weight of correlations between different features", number(float, 0))', "5"),
         ["broken.py: METHOD has the setting redundancy=5, needs Setting"]),
        (changed('SETTINGS = {"redundancy"', 'SETTINGS = {"lr"'), ["broken.py: METHOD has a setting lr, which is the name of an option"]),
        (changed("has_target=False,", "has_target=False, update='all',"), ["METHOD has update='all', needs one of online, target"]),
        (changed("has_target=False,", "has_target=False, head=('tanh',),"), ["METHOD has 'tanh' in head, needs widths"]),
        (changed("has_target=False,", "has_target=False, rule='ldawa',"), ["METHOD has rule='ldawa', which is not FILE:NAME of methods/"]),
        (changed("has_target=False,", "has_target=False, rule=5,"), ["METHOD has rule=5, needs a class or a function"]),
        ("METHOD = 1\0", ["broken.py: source code string cannot contain null bytes"]),
        (changed("has_target=False,", "has_target='no',"), ["METHOD has has_target='no', needs True or False"]),
        (changed("has_target=False,", "has_target=False, head=128,"), ["METHOD has head=128, needs a tuple"]),
        (changed("has_target=False,", "has_target=False, head=('relu',),"), ["METHOD has head=('relu',), needs a width in it"]),
        (changed("has_target=False,", "has_target=False, public=2,"), ["METHOD has public=2, needs a fraction from 0 to below 1"]),
        (changed("has_target=False,", "has_target=False, jitter=2,"), ["METHOD has a wrong jitter: got '2', needs a number of at least 0"]),
        (changed("settings=SETTINGS", "settings=[]"), ["METHOD has settings=[], needs a dict"]),
        (changed('SETTINGS = {"redundancy"', "SETTINGS = {3"), ["METHOD has a setting 3, needs a name"]),
        (changed("Setting(0.005,", "Setting('0.005',"), ["METHOD has the setting redundancy=", "whose default is a number"]),
        (changed("def __init__", "abstract = abstractmethod(lambda self: 0)\n\n    def __init__").replace(
            "(Objective)", "(Objective, ABC)").replace("\nfrom models", "\nfrom abc import ABC, abstractmethod\nfrom models", 1),
         ["Can't instantiate abstract class BarlowTwins"]),
        (changed("def __init__", "batches = 0\n\n    def __init__"), ["BarlowTwins has batches = 0, needs a number of 1 or more"]),
        (changed("batch, generator):", "batch):"),
         [f"broken.py, line {LINE['def terms']}: terms(view1, view2, batch) is called as terms(view1, view2, batch, generator): too many"]),
        (changed("def loss", "def begin(self):\n        pass\n\n    def loss"),
         ["begin() is called as begin(client_id, num_clients): too many"]),
        (changed("def loss", "def update(self, lr):\n        pass\n\n    def loss"), ["update(lr) is called as update(lr, momentum, "]),
        (changed("def loss", "def prepare(self):\n        pass\n\n    def loss"), ["prepare() is called as prepare(public, train)"]),
        (changed("def loss", "def take_shared(self, n):\n        pass\n\n    def loss"), ["take_shared(n) is called as take_shared()"]),
        (changed("has_target=False,", "has_target=False, rule=lambda server, uploads: 0,"),
         [f"broken.py, line {LINE['METHOD']}: <lambda>(server, uploads) is called as <lambda>(server, uploads, networks, shared)"]),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_is_one_sentence(own, tiny, refuses, content, words):
    if content is not None:
        (own / "broken.py").write_text(content)
    assert refuses(lambda: parse([*tiny, "--method", "./broken.py"]), *words)


def test_an_ablation_that_the_class_does_not_take_is_refused(own, refuses):
    (own / "simsiam.py").write_text(
        "from methods.simsiam import SimSiam\nfrom options import Method\n\nMETHOD = Method(SimSiam, has_target=False)\n"
    )
    assert Options(method="simsiam.py", no_stop_gradient=True, predictor="local")
    (own / "own.py").write_text(changed("has_predictor=False,", ""))
    assert refuses(lambda: parse(["--method", "own.py", "--no-stop-gradient"]), "--no-stop-gradient changes nothing")


@pytest.mark.parametrize(
    "content, words",
    [
        (changed(" / len(same)", ""), []),
        (changed("return ((1 - same).square().sum()", "return ((1 - same).square()"),
         [f"broken.py, line {LINE['def terms']}: BarlowTwins.terms needs", "a term gives [256] of torch.float32 on cpu"]),
        (changed("return ((1", "return 0 * z1.sum().detach() if same is not None else ((1"),
         [f"line {LINE['def terms']}", "a term has no gradient"]),
        (changed("return [partial(self.loss, view1, view2)]", "return self.loss(view1, view2)"),
         [f"broken.py, line {LINE['def terms']}", "returns Tensor"]),
        (changed("z1.T @ z2", "z1 @ z2"), [f"broken.py, line {LINE['z1, z2'] + 1}: RuntimeError: "]),
        (changed("super().__init__(encoder, device)", "super().__init__(encoder, device, 'no')"), ["broken.py, line ", "Error: "]),
        (changed("return [partial", "return [lambda: 0.0, partial"), [f"broken.py, line {LINE['def terms']}", "a term gives float"]),
        (changed("(correlation.square().sum() -", "(z1.exp_().sum() + correlation.square().sum() -"),
         [f"broken.py, line {LINE['def terms']}: BarlowTwins.terms needs", "the gradient of one cannot be computed (RuntimeError: "]),
        (changed("super().__init__(encoder, device)", "self.encoder = encoder"), ["BarlowTwins does not call super().__init__"]),
        (changed("has_predictor=False, has_target=False,", ""), []),
        (changed("has_predictor=False,", "predictor='dapu',"), ["BarlowTwins has no predictor, which --predictor dapu needs"]),
        (changed(" has_target=False,", " aggregate='target',"), ["BarlowTwins has no target, which --aggregate target needs"]),
        (changed("self.redundancy = r", "self.initial['queue'] = encoder.projector[0].bias\n        self.redundancy = r"),
         [f"broken.py, line {LINE['class']}: BarlowTwins needs parts['queue'] and initial['queue'] of one shape, has none and [512]"]),
        (changed("def loss", "def take_shared(self):\n        pass\n\n    def loss"),
         [f"broken.py, line {LINE['def loss']}: take_shared gives NoneType, needs rows [N, d]"]),
        (changed("def loss", "def begin(self, client_id, num_clients):\n        (0, 0)[client_id + 1]\n\n    def loss"),
         [f"broken.py, line {LINE['def loss'] + 1}: IndexError: "]),
    ],
)  # fmt: skip
def test_what_goes_wrong_in_training_is_one_sentence(own, tiny, refuses, content, words):
    (own / "broken.py").write_text(content)
    start = partial(run, own / "run", *tiny, "--method", "./broken.py", "--rounds", "1")
    assert refuses(start, *words) if words else start()
    assert (own / "run").exists() != bool(words)


@pytest.mark.parametrize(
    "line, words",
    [
        ("return None", "gives NoneType, needs the next model, a tensor of shape ["),
        ("return uploads.sum()[1:]", "gives [297583] of torch.float32 on cpu, needs the next model, a tensor of shape [297584]"),
        ("return uploads.sum() / 0", "gives a model with numbers that are not finite"),
        ("server.state['rounds'] = 1; return uploads.sum()", "keeps int as server.state['rounds'], needs a tensor, by another name"),
        ("server.state['model'] = server.model; return uploads.sum()", "as server.state['model'], needs a tensor, by another name"),
        ("server.state['shared'] = server.model; return uploads.sum()", "as server.state['shared'], needs rows [N, d]"),
    ],
)
def test_what_a_rule_gives_wrong_is_one_sentence(own, tiny, refuses, line, words):
    """Before a checkpoint has it: a state by the name of the model would take its place there."""
    (own / "broken.py").write_text(
        f"from options import Method\n\n\ndef rule(server, uploads, networks, shared):\n    {line}\n\n\n"
        'METHOD = Method("barlow:BarlowTwins", has_predictor=False, has_target=False, rule=rule)\n'
    )
    assert refuses(partial(run, own / "run", *tiny, "--encoder", "tiny", "--method", "broken.py"), "broken.py, line 4: rule ", words)
    assert not (own / "run").exists()


@pytest.mark.parametrize("kind, text, words", [("int", "2.5", "(ValueError: "), ("str", "2", "of which its type makes '2' and no number")])
def test_what_a_setting_does_not_take(own, refuses, kind, text, words):
    (own / "broken.py").write_text(changed("number(float, 0)", kind))
    line = ["--method", "broken.py", "--set", f"redundancy={text}"]
    assert refuses(lambda: parse(line), f"--set redundancy got '{text}'", words)


def test_a_mistake_in_a_copy_of_the_process_is_the_same_sentence(own, tiny, command):
    """In the client that the second of two processes trains."""
    (own / "broken.py").write_text(
        changed("def loss", "def begin(self, client_id, num_clients):\n        assert client_id != 1, 'no'\n\n    def loss")
    )
    done = command("fedu.py", *tiny, "--method", "broken.py", "--processes", "2", "--out", "run", cwd=own)
    assert refused(done, f"error: broken.py, line {LINE['def loss'] + 1}: AssertionError: no") and not (own / "run").exists()


class Notebook(BarlowTwins):
    """As a cell of a notebook defines it."""


def test_a_notebook_gives_the_row(npz, tmp_path, refuses):
    row = Method(Notebook, has_predictor=False, has_target=False, settings={"redundancy": Setting(0.01, "", number(float, 0))})
    small = {"dataset": str(npz), "encoder": "small", "clients": 2, "rounds": 2, "local_epochs": 1, "batch_size": 8, "lr": 0.05}
    options = Options(method=row, device="cpu", knn_every=0, **small)
    assert options.method == "Notebook" and options.settings["redundancy"] == 0.01
    mine = fedu.train(options, tmp_path / "run")
    table = fedu.train(Options(method="fedbarlow", settings={"redundancy": 0.01}, device="cpu", knn_every=0, **small), tmp_path / "table")
    assert torch.equal(load(mine.folder)["encoders"][0], load(table.folder)["encoders"][0])
    assert not (mine.folder / "method.py").exists() and read_options(mine.folder)["method"].startswith("Notebook ")
    fedu.resume(mine.folder, method=row)
    with pytest.raises(InputError, match="a notebook began it"):
        fedu.resume(mine.folder)
    with pytest.raises(InputError, match="is not what .*run began with"):
        fedu.resume(mine.folder, method=row._replace(objective=BarlowTwins))


def test_a_mistake_is_the_same_sentence_in_a_process(own, tiny, command):
    (own / "broken.py").write_text("import nothing_of_this_name")
    assert refused(command("fedu.py", *tiny, "--method", "./broken.py", cwd=own), "error: broken.py, line 1: ModuleNotFoundError")
