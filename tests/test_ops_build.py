"""The build: when it happens and when not, what a user reads if it fails, and who can touch its cache."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import fedu
import ops
from ops import build
from options import parse

RUN_AN_OP = """
import os, sys, torch, ops
assert ops._fused is None, 'importing ops must not build'
if 'meta' in sys.argv:
    ops.ema_(torch.ones(3, device='meta'), torch.ones(3, device='meta'), 0.5)
    ops.aggregate(torch.ones(2, 3, device='meta'), torch.ones(2, device='meta'), torch.ones(3, device='meta'), torch.tensor([[0, 3]]))
    assert ops._fused is None, 'meta tensors must not build'
target = ops.ema_(torch.ones(3), torch.zeros(3), 0.5)
assert target.tolist() == [0.5] * 3
print(f'fused={ops._fused} extension={"torch.utils.cpp_extension" in sys.modules}')
print('cuda', torch._C._dispatch_has_kernel_for_dispatch_key('fedu::ema_', 'CUDA') if ops._fused else None)
"""


def python(cache: Path, *arguments: str, script: str = RUN_AN_OP, **environment: str) -> subprocess.Popen:
    """A process of its own that by default calls one op, with its own cache."""
    variables = {k: v for k, v in os.environ.items() if k not in ("FEDU_OPS", "TORCH_CUDA_ARCH_LIST")}
    variables |= {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT)} | environment
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.Popen(command, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def output(process: subprocess.Popen) -> tuple[str, str]:
    out, err = process.communicate(timeout=3000)
    assert process.returncode == 0, err
    return out, err


@pytest.fixture
def forget(monkeypatch):
    """ops as at its import: nothing decided."""
    monkeypatch.setattr(ops, "_fused", None)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


# ---- What FEDU_OPS does ---------------------------------------------------------------------------------------------------------


def test_reference_never_builds(forget, cache, monkeypatch):
    monkeypatch.setenv("FEDU_OPS", "reference")
    assert ops.ema_(torch.ones(2), torch.zeros(2), 0.5).tolist() == [0.5, 0.5]
    assert ops._fused is False and not cache.exists()


def test_another_value_is_refused(forget, monkeypatch):
    monkeypatch.setenv("FEDU_OPS", "on")
    with pytest.raises(ValueError, match="^FEDU_OPS must be auto, build or reference, got 'on'$"):
        ops.ema_(torch.ones(2), torch.zeros(2), 0.5)


@pytest.mark.parametrize("how, cache, words", [("on", "", "auto, build or reference"), ("build", "/proc", "/proc")])
def test_a_run_says_what_is_wrong_before_it_makes_its_folder(forget, refuses, tmp_path, monkeypatch, how, cache, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDU_OPS", how)
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    assert refuses(lambda: fedu.main(parse(["--device", "cpu"])), words)
    assert not list(tmp_path.iterdir())


def failures() -> dict[str, tuple]:
    """Ways in which a build can fail: what to break, and what the warning must name."""
    from torch.utils import cpp_extension

    def version(text):
        return lambda *_, **__: subprocess.CompletedProcess([], 0, stdout=text, stderr="")

    toolkit = (build, "find_toolkit", lambda: "/toolkit")
    return {
        "compiler": [(cpp_extension, "get_cxx_compiler", lambda: "no-such-g++")],
        "ninja": [(cpp_extension, "is_ninja_available", lambda: False)],
        "nvcc": [(build, "find_toolkit", lambda: None), (torch.version, "cuda", "13.0")],
        "cpu-only": [(torch.version, "cuda", None)],
        "major": [toolkit, (build.subprocess, "run", version("release 11.8, V11.8.89")), (torch.version, "cuda", "13.0")],
    }


SENTENCES = {
    "compiler": r"no C\+\+ compiler \(no-such-g\+\+\); to mend it, install g\+\+ or name yours in CXX",
    "ninja": r"no ninja; to mend it, pip install ninja",
    "nvcc": r"no nvcc; to mend it, install the CUDA toolkit 13.0 and set CUDA_HOME to its folder",
    "cpu-only": r"this torch was built without CUDA; to mend it, install one with it, or unset TORCH_CUDA_ARCH_LIST",
    "major": r"nvcc is 11.8 and torch's CUDA 13.0; to mend it, install CUDA 13.0 and set CUDA_HOME",
}


@pytest.mark.parametrize("cause", SENTENCES)
def test_auto_warns_once_and_build_raises(cause, forget, cache, monkeypatch, capsys):
    if cause in ("nvcc", "cpu-only", "major"):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
        monkeypatch.setattr(build, "check_tools", lambda _: None)
    for place, name, value in failures()[cause]:
        monkeypatch.setattr(place, name, value)
    monkeypatch.setenv("FEDU_OPS", "auto")
    capsys.readouterr()
    with pytest.warns(RuntimeWarning, match=SENTENCES[cause]) as caught:
        assert ops.ema_(torch.ones(2), torch.zeros(2), 0.5).tolist() == [0.5, 0.5]
    assert len(caught) == 1 and caught[0].filename == __file__  # it points at the line that called the op
    assert not capsys.readouterr().err  # no announcement of what cannot begin
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.ema_(torch.ones(2), torch.zeros(2), 0.5)  # remembered: neither tried nor warned of again
    monkeypatch.setattr(ops, "_fused", None)
    monkeypatch.setenv("FEDU_OPS", "build")
    with pytest.raises(build.BuildError, match=SENTENCES[cause]):
        ops.ema_(torch.ones(2), torch.zeros(2), 0.5)


def test_compile_error_shows_the_compilers_message(forget, cache, monkeypatch, tmp_path):
    broken = tmp_path / "broken.cpp"
    broken.write_text("int main() { return undeclared; }\n")
    monkeypatch.setattr(build, "SOURCES", [broken])
    with pytest.warns(RuntimeWarning, match="compile error: .*undeclared.*; to mend it, see the whole message with FEDU_OPS=build"):
        ops.ema_(torch.ones(2), torch.zeros(2), 0.5)
    monkeypatch.setattr(ops, "_fused", None)
    monkeypatch.setenv("FEDU_OPS", "build")
    with pytest.raises(build.BuildError, match=r"(?s)broken\.cpp:1:21: error.*\^"):
        ops.ema_(torch.ones(2), torch.zeros(2), 0.5)
    assert sorted(p.name for p in (cache / "fedu" / "ops").iterdir()) == ["lock"]  # nothing is left of it


def test_any_other_failure_falls_back_too(forget, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    with pytest.warns(RuntimeWarning, match="/proc/nowhere"):
        assert ops.ema_(torch.ones(2), torch.zeros(2), 0.5).tolist() == [0.5, 0.5]


# ---- The cache ------------------------------------------------------------------------------------------------------------------


def test_cache_is_private(cache):
    folder = build.private_folder()
    assert folder == (cache / "fedu" / "ops").resolve() and folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    assert build.private_folder().stat().st_mode & 0o777 == 0o700  # others could read it, and no longer can


@pytest.mark.parametrize("part", ["", "fedu", "fedu/ops"])
def test_refuses_a_cache_that_others_can_write(cache, part):
    build.private_folder()
    (cache / part).chmod(0o777)
    with pytest.raises(build.BuildError, match=f"^others can write {re.escape(str((cache / part).resolve()))}; to mend it, "):
        build.private_folder()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_refuses_a_cache_of_another_user(cache):
    os.chown(build.private_folder(), 12345, 12345)
    with pytest.raises(build.BuildError, match="others can write"):
        build.private_folder()


def test_refuses_a_library_that_others_can_write(cache, monkeypatch):
    library = build.private_folder() / f"fedu-{build.cache_key(False)}.so"
    library.touch()
    library.chmod(0o666)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    with pytest.raises(build.BuildError, match="others can write .*; to mend it, delete it"):
        build.load()


def test_cache_key_covers_what_the_library_depends_on(monkeypatch, tmp_path):
    keys = {build.cache_key(False), build.cache_key(True)}
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    keys.add(build.cache_key(True))
    for place, name, value in (
        (torch, "__version__", "0"),
        (sys, "version", "0"),
        (build, "cpu_features", lambda: "none"),
        (build, "CPP_FLAGS", ["-O0"]),
        (build, "SOURCES", build.SOURCES[:1]),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, value)
            keys.add(build.cache_key(False))
    assert len(keys) == 8
    assert build.cache_key(False) == build.cache_key(False) and "flags" in build.cpu_features().lower() + "features"


def test_finds_the_toolkit_behind_a_wrapper(tmp_path, monkeypatch):
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    home, wrapper = tmp_path / "cuda-13.0", tmp_path / "bin" / "nvcc"
    for file in (home / "bin/nvcc", home / "include/cuda_runtime_api.h", wrapper):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    wrapper.write_text(f"#!/bin/sh\necho '#$ TOP={home}/bin/..' >&2\n")
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", str(wrapper.parent), prepend=os.pathsep)
    assert build.find_toolkit() == str(home)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing"))  # a wrong variable does not hide the right one
    assert build.find_toolkit() == str(home)


# ---- Whole builds, in processes of their own ----------------------------------------------------------------------------------


LOAD = """
import sys
from pathlib import Path
from ops import build
build.SOURCES = [Path(sys.argv[1])]
build.load()
print('torch.utils.cpp_extension' in sys.modules)
"""


def test_builds_once_despite_a_kill_and_a_race_and_then_starts_warm(tmp_path):
    """A build is killed while its compiler runs, and two processes then race. Of a source that includes nothing."""
    source, slow, cache = tmp_path / "nothing.cpp", tmp_path / "slow-g++", tmp_path / "cache"
    source.write_text("int nothing = 0;\n")
    slow.write_text('#!/bin/sh\ncase "$*" in *nothing.cpp*) sleep 60;; esac\nexec g++ "$@"\n')
    slow.chmod(0o755)
    killed = python(cache, str(source), script=LOAD, CXX=str(slow))
    while not list((cache / "fedu/ops").glob("build-*/build.ninja")):
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    racers = [python(cache, str(source), script=LOAD) for _ in range(2)]
    results = [output(racer) for racer in racers]
    assert sorted(err.count("ops: building the fused kernels (C++") for _, err in results) == [0, 1]
    assert sorted(p.suffix for p in (cache / "fedu/ops").iterdir()) == ["", ".so"]  # the lock and the library, and no remains
    out, err = output(python(cache, str(source), script=LOAD, PATH="", CXX="no-such-compiler"))  # needs neither compiler nor ninja
    assert out == "False\n" and not err


CUDA = build.find_toolkit() is not None and torch.version.cuda is not None and shutil.which("ninja") is not None


@pytest.mark.skipif(not os.environ.get("FEDU_FAULTS"), reason="a build of a minute, by FEDU_FAULTS=1 only")
@pytest.mark.skipif(not CUDA, reason="no CUDA toolkit, or a torch without CUDA")
def test_cuda_part_builds_and_loads_without_a_gpu(tmp_path):
    out, err = output(python(tmp_path, "meta", FEDU_OPS="build", TORCH_CUDA_ARCH_LIST="9.0"))
    assert "fused=True" in out and "cuda True" in out and "(C++ and CUDA)" in err
