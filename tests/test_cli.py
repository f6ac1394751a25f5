"""What is typed: paths, words that are nearly right, and streams that are closed or full."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, load_metrics, refused
from PIL import Image

import fedu
from data import load_dataset
from options import Options, evaluation_parser, parse, parse_evaluation
from runtime.cli import InputError, first_line, unbreakable_output


@pytest.mark.parametrize(
    "read, typed, meant",
    [
        (parse, "--methd fedu", "--method"),
        (parse, "--epochs 3", "--local-epochs"),
        (parse, "--local_epochs 3", "--local-epochs"),
        (parse, "--Rounds 3", "--rounds"),
        (parse, "--method FedU", "fedu"),
        (parse, "--method fedmoco", "fedmoco-v2"),
        (parse, "--encoder ResNet18", "resnet18"),
        (parse, "--partition Dirichlet", "dirichlet"),
        (parse_evaluation, "--kn", "--knn"),
        (parse_evaluation, "--head MLP", "mlp"),
    ],
)
def test_the_right_word_is_named(read, typed, meant, capsys):
    with pytest.raises(SystemExit, match="2"):
        read(typed.split())
    error = capsys.readouterr().err
    assert error.endswith(f"; did you mean {meant}?\n") and error.count("\n") == 1


def test_nothing_is_guessed_for_a_word_like_no_other(capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(["--xyzzy"])
    assert "did you mean" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, where",
    [
        ({"alpha": 1.0}, "--partition dirichlet or dirichlet-balanced"),
        ({"partition": "iid", "classes_per_client": 2}, "--partition classes"),
        ({"method": "fedbyol", "mu": 0.3}, "--predictor dapu"),
        ({"tau": 0.5}, "--update ema or --predictor ema"),
        ({"method": "fedsimclr", "ema_decay": 0.9}, "a method that has a target encoder"),
        ({"method": "fedx", "no_predictor": True}, "BYOL or SimSiam"),
        ({"method": "single", "predictor": "local"}, "a method that has a predictor and one server"),
        ({"method": "central", "clients_per_round": 2}, "a method with more than one client"),
        ({"image_size": 64}, "a folder of images"),
    ],
)
def test_a_refusal_says_with_what_the_option_goes(options, where):
    with pytest.raises(InputError, match="changes nothing in .*: it goes with (.*)") as error:
        Options(**options)
    assert str(error.value).endswith("it goes with " + where.replace("--", ""))


def test_a_tilde_is_the_home_folder_wherever_it_is_typed(monkeypatch, tmp_path, npz, tiny):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse(["--out=~/x"]).out == tmp_path / "x" and parse(["--resume=~/x"]).resume == tmp_path / "x"
    given = parse_evaluation(["--out=~/x.png", "--plot", "~/runs/a"])
    assert (given.out, given.runs) == (tmp_path / "x.png", [tmp_path / "runs/a"])
    assert parse_evaluation(["--export=~/b.npz"]).export == tmp_path / "b.npz"
    (tmp_path / "t.npz").write_bytes(npz.read_bytes())
    options = Options(**parse([*tiny, "--dataset", "~/t.npz", "--method", "untrained"]).given)
    assert fedu.train(options, "~/runs/b").folder == tmp_path / "runs/b"
    assert fedu.load("~/runs/b").features("~/t.npz").shape == (64, 256)
    assert fedu.resume("~/runs/b").folder == tmp_path / "runs/b"


def test_every_argument_that_is_a_path_knows_the_tilde():
    """Options that are text (the data set, CIFAR's folder) are expanded where they are read; see the test above and test_data.py."""
    from options import training_parser

    for parser in (training_parser(), evaluation_parser()):
        assert not [action.dest for action in parser._actions if action.type is Path]


@pytest.mark.parametrize("typed", ["", "~nobody-of-this-name/x"])
def test_what_is_no_path_is_one_sentence(typed, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(["--out", typed])
    assert "--out: got " in capsys.readouterr().err


def test_a_folder_with_nothing_of_a_run_may_be_used(tiny, tmp_path, command):
    """As after `fedu.py --out d > d/log.txt`, whose log the shell makes before the run begins."""
    run = tmp_path / "d"
    run.mkdir()
    (run / "log.txt").write_text("the log\n")
    (run / "notes").mkdir()
    for more in ([], ["--overwrite"]):
        fedu.main(parse([*tiny, "--rounds", "1", "--out", str(run), *more]))
        assert len(load_metrics(run)) == 1 and (run / "log.txt").read_text() == "the log\n"
    with pytest.raises(InputError, match="d holds a run: choose another --out, or --resume .*d, or --overwrite it"):
        fedu.main(parse([*tiny, "--out", str(run)]))
    (run / "config.json").unlink()
    with pytest.raises(InputError, match="it has no config.json, but it holds metrics.jsonl: choose another --out"):
        fedu.main(parse([*tiny, "--out", str(run), "--overwrite"]))


@pytest.mark.parametrize("redirection", ["<&- >&- 2>&-", "> /dev/full 2> /dev/full", "2>&- | true"])
def test_what_is_printed_never_costs_a_run(tiny, tmp_path, redirection):
    options = " ".join([*tiny, "--rounds", "2", "--encoder", "tiny", "--out", "run"])
    line = f"{sys.executable} {ROOT / 'fedu.py'} {options} {redirection}"
    subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert (tmp_path / "run/encoder.pt").exists() and len(load_metrics(tmp_path / "run")) == 2
    assert (tmp_path / "run/divergence.png").read_bytes().startswith(b"\x89PNG")  # and nothing was printed into a file of the run


def test_output_that_breaks_is_dropped_inside_the_block_only(monkeypatch):
    class Broken:
        def write(self, text):
            raise BrokenPipeError

        flush = write

    broken = Broken()
    monkeypatch.setattr(sys, "stdout", broken)
    with unbreakable_output():
        print("dropped", flush=True)
        print("dropped too")
    assert sys.stdout is broken
    with pytest.raises(BrokenPipeError):
        print("not dropped")


def test_three_mistakes_on_the_command_line(command, tmp_path):
    """The whole chain, from the process to its exit status; what the options show is answered before torch is imported."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    without = {"PYTHONPATH": str(tmp_path)}
    assert refused(
        command("fedu.py", "--alpha", "1", cwd=tmp_path, variables=without), "it goes with --partition dirichlet or dirichlet-balanced"
    )
    assert refused(command("eval.py", "--knn", "--seed", "1", cwd=tmp_path, variables=without), "--seed goes with --linear or --semi")
    (tmp_path / "torch.py").unlink()
    assert refused(command("eval.py", "none", cwd=tmp_path), "none is not a run folder")
    assert not list(tmp_path.iterdir())


def test_in_python_an_error_names_the_argument():
    with pytest.raises(InputError, match="^local_epochs got '0', needs a whole number of at least 1$"):
        Options(local_epochs=0)
    with pytest.raises(
        InputError, match="^settings got 'queue'; method fedu has the settings jitter, crop_scale, greyscale, decorrelation$"
    ):
        Options(settings={"queue": 3})


def test_running_a_cell_twice_says_what_to_write(tiny, tmp_path):
    options = Options(**parse([*tiny, "--method", "untrained"]).given)
    fedu.train(options, tmp_path / "run")
    with pytest.raises(InputError) as error:
        fedu.train(options, tmp_path / "run")
    run = tmp_path / "run"
    assert str(error.value) == f"{run} holds a run: choose another out, or fedu.resume('{run}'), or overwrite=True"
    assert error.value._render_traceback_() == [f"InputError: {error.value}"]
    with pytest.raises(InputError, match=r"fedu.resume\('.*'\) got other options than the run has: lr 0.3 \(it was 0.05\)"):
        fedu.resume(run, lr=0.3)


def test_what_is_typed_in_a_shell_stays_as_it_is():
    assert (
        str(InputError("run it by `python fedu.py --resume x`, or --set a=1")) == "run it by `python fedu.py --resume x`, or settings a=1"
    )


def test_a_data_set_and_an_argument_of_python_are_corrected_too(tmp_path):
    with pytest.raises(InputError, match="dataset got 'CIFAR10'; .*; did you mean cifar10\\?$"):
        fedu.train(Options(dataset="CIFAR10"), tmp_path / "run")
    with pytest.raises(InputError, match="^method got 'FedU', .*; did you mean fedu\\?$"):
        Options(method="FedU")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["dataset", "data_root", "labels", "partition"])
def test_a_home_that_is_not_known_is_one_sentence_wherever_it_is_named(option, tmp_path):
    given = {"dataset": str(tmp_path)} if option in ("labels", "partition") else {"dataset": "cifar10"} if option == "data_root" else {}
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    path = "~nobody-of-this-name/x" + {"dataset": ".npz", "labels": ".csv", "partition": ".json"}.get(option, "")
    with pytest.raises(InputError, match=f"{option} got '{path}', needs the path of a file or folder"):
        load_dataset(Options(**given, **{option: path}))


@pytest.mark.parametrize("option", ["dataset", "labels", "save-partition", "views", "init", "out", "resume"])
def test_an_empty_path_is_not_as_none(option, refuses):
    assert refuses(lambda: parse([f"--{option}", ""]), f"--{option}", "got '', needs the path of a file or folder")


def test_an_empty_path_is_not_as_none_in_python():
    with pytest.raises(InputError, match="^out got '', needs the path of a file or folder$"):
        fedu.train(Options(), "")
    with pytest.raises(InputError, match="^init got '', needs the path of a file or folder$"):
        Options(init="")


@pytest.mark.parametrize("option", ["dataset", "transfer", "export", "out"])
def test_an_empty_path_is_not_as_none_in_an_evaluation(option, refuses):
    assert refuses(lambda: parse_evaluation([f"--{option}", "", "run"]), f"--{option}", "got '', needs the path of a file or folder")


@pytest.mark.parametrize(
    "error, words",
    [
        (MemoryError(), "memory ran out: smaller"),
        (MemoryError("Unable to allocate 7.28 TiB for an array with shape (1000000000000,)"), "memory ran out, 7.28 TiB more were needed"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), "memory ran out, 2.00 GiB more were needed"),
    ],
)
def test_memory_that_ran_out_is_one_sentence(error, words, refuses):
    def fail():
        raise error

    assert refuses(fail, words)


def test_a_queue_that_no_memory_holds_is_one_sentence(tiny, refuses, tmp_path):
    line = [*tiny, "--method", "fedmoco-v2", "--set", "queue=1000000000000", "--out", str(tmp_path / "run")]
    assert refuses(lambda: fedu.main(parse(line)), "memory ran out, ", "000 bytes more were needed")
    assert not list(tmp_path.iterdir())


def test_what_an_error_says_is_in_one_colour():
    assert first_line(ValueError("\x1b[1mno\x1b[0m file\nmore")) == "ValueError: no file"


@pytest.mark.parametrize(
    "given, count",
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_waiting_threads_sleep_after_a_while_unless_the_user_says_how_they_wait(given, count):
    script = "import os, runtime.cli; print(os.environ.get('GOMP_SPINCOUNT'))"
    env = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")} | given
    assert subprocess.check_output([sys.executable, "-c", script], cwd=ROOT, env=env, text=True).strip() == str(count)
