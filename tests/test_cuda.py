"""fused_cuda.cu without a GPU: what nvcc makes of it, and its kernels executed on the CPU (cuda_on_cpu/) and shown able to fail.

`FEDU_FAULTS=1 python -m pytest -vv tests/test_cuda.py` plants every fault of FAULTS, which takes some minutes; otherwise two are planted.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ops import build

OPS = Path(build.__file__).parent
HERE = Path(__file__).parent / "cuda_on_cpu"
COMPILE = ["g++", "-std=c++20", "-O1", "-g1", "-ffp-contract=off", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
COMPILE += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{HERE}"]  # that folder has the stand-in for cuda_runtime.h


# ---- What nvcc makes of it ----------------------------------------------------------------------------------------------------


def nvcc(*options: str) -> str:
    """Compile fused_cuda.cu with the flags of the build; returns what the compiler reports."""
    home = build.find_toolkit()
    if home is None:
        pytest.skip("no CUDA toolkit")
    command = [f"{home}/bin/nvcc", *build.CUDA_FLAGS, "-Werror=all-warnings", *options, str(OPS / "fused_cuda.cu")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stderr


def test_no_spills_and_no_local_memory(tmp_path):
    architectures = "-gencode=arch=compute_80,code=[sm_80,sm_90,sm_100]"
    report = nvcc(architectures, "-Xptxas=-v", "-fatbin", "-o", str(tmp_path / "fused.fatbin"))
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(frames) >= 3 * 15 and all(frame == ("0", "0", "0") for frame in frames), report


def test_sums_and_products_are_rounded_as_written(tmp_path):
    """An average's products and sums are not contracted, so that a GPU's bits are those of the CPU; sums of squares are, in double."""
    nvcc("-arch=compute_80", "-ptx", "-o", str(tmp_path / "fused.ptx"))
    entries = re.split(r"\.entry (\S+?)\(", (tmp_path / "fused.ptx").read_text())
    averages = {name: code for name, code in zip(entries[1::2], entries[2::2]) if re.search(r"weighted_mean|aggregate|ema_kernel", name)}
    for name, code in averages.items():
        if "sgd_ema" not in name:  # whose source asks for fma
            assert not re.search(r"\bfma\S*f32" if "aggregate" in name else r"\bfma\.", code), name
    assert len(averages) >= 10


# ---- Executed on the CPU ------------------------------------------------------------------------------------------------------


def copy_headers(folder: Path) -> None:
    for header in OPS.glob("*.h"):
        shutil.copy(header, folder)


def compiled_for_the_cpu(source: Path, headers: Path, *options: str) -> Path:
    """The object file of check.cpp or of a fused_cuda.cu, beside the headers."""
    made = headers / f"{source.stem}.o"
    run = subprocess.run([*COMPILE, *options, f"-I{headers}", "-c", "-xc++", str(source), f"-o{made}"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return made


def link_and_run(*objects: Path, arguments: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    program = objects[0].with_name("check")
    subprocess.run([*COMPILE, *map(str, objects), f"-o{program}"], check=True)
    try:
        return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=3000)
    finally:
        program.unlink()


@pytest.fixture(scope="module")
def check(tmp_path_factory) -> Path:
    """check.cpp, compiled once for all sources that it is to run."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("check")
    copy_headers(folder)
    return compiled_for_the_cpu(HERE / "check.cpp", folder)


@pytest.mark.slow
def test_kernels_against_float64_under_sanitizers(check):
    run = link_and_run(compiled_for_the_cpu(OPS / "fused_cuda.cu", check.parent), check)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"\d{7,} values compared", run.stdout), run.stdout


# Faults planted one at a time, each to be caught by a difference, a reported fault or a sanitizer: what, text, replacement.
FAULTS = [
    ("nothing, which must pass", "", ""),
    ("no barrier before the warps' sums are read", "  __syncthreads();\n  if (static_cast", "  if (static_cast"),
    ("no barrier before they are overwritten", "  __syncthreads();  // before the next call", "  // before the next call"),
    ("a barrier for half of the block", "  __syncthreads();  // before the next call", "  if (threadIdx.x < 128) __syncthreads();  //"),
    ("shuffle mask of half a warp", "0xffffffffu", "0xffffu"),
    ("sum of half a warp", "offset = 16", "offset = 8"),
    ("sum of all warps but one", "warp < kWarps; ++warp) sum", "warp < kWarps - 1; ++warp) sum"),
    ("dropped last float of a chunk", "j < range.end; ++j)", "j + 1 < range.end; ++j)"),
    ("dropped tail of the mean", "thread; i < size; i += step) {", "thread; i + 1 < size; i += step) {"),
    ("dropped tail of the average", "s < at.head + at.size - at.body", "s + 1 < at.head + at.size - at.body"),
    ("pack over the end of a segment", "i + kWidth <= range.end", "i < range.end"),
    ("pack over the end of the mean", "i + kWidth <= size; i +=", "i < size; i +="),
    ("pack over the end of the average", "(size - head) / kFull<T> *", "(size - head + kFull<T> - 1) / kFull<T> *"),
    ("pack before the begin of a segment", "i >= range.begin && i +", "i +"),
    ("packs at unaligned addresses", "kCanVector<T> && aligned(a) && aligned(b)", "kCanVector<T>"),
    ("packs in rows that do not line up", "(num_clients == 1 || size % kFull<T> == 0)", "true"),
    ("wrong head of the average", "(16 - past) % 16", "past"),
    ("packs of vectors never aligned together", "const bool together = (", "const bool together = true || ("),
    ("pack over the end of the target", "i + kWidth <= covered", "i < covered"),
    ("the target's last floats left out", "i + j < covered", "false"),
    ("average of the weights before the step", "step.follow(t.v[j], w.v[j])", "step.follow(t.v[j], t.v[j])"),
    ("32-bit index into the vector", "f(table.pieces[piece], chunk, chunk_range(table.pieces[piece], chunk))", """
        const Range wide = chunk_range(table.pieces[piece], chunk);
        f(table.pieces[piece], chunk, Range{static_cast<int>(wide.begin), static_cast<int>(wide.end)})"""),
    ("mean summed from the last client", "for (int64_t k = 0; k < num_clients; ++k) {", """
        for (int64_t step = 0; step < num_clients; ++step) {
        const int64_t k = step == 0 ? 0 : num_clients - step;"""),
    ("product of the average not rounded", "keep * t.v[j] + take * o.v[j]", "std::fma(keep, t.v[j], take * o.v[j])"),
    ("second tile reads the first's clients", "clients + (tile + k) * size", "clients + k * size"),
    ("second tile reads the first's received", "received + (tile + k) * received_stride", "received + k * received_stride"),
    ("one received vector for all", "if (k == 0 || received_stride) r", "if (k == 0) r"),
    ("spread from the received vector", "add_squares(x[k], m, spread[k])", "add_squares(x[k], r, spread[k])"),
    ("squares in float", "const double d = static_cast<double>(x.v[j]) - static_cast<double>(y.v[j])", "const float d = x.v[j] - y.v[j]"),
    ("chunk in the wrong segment", "pieces[piece + 1].first <= chunk) ++piece", "pieces[piece + 1].first < chunk) ++piece"),
    ("only a block's worth of chunks", "chunk < end; chunk += kThreads", "chunk < end; chunk += end"),
    ("drift and spread exchanged", "column < half ?", "column >= half ?"),
    ("only the first launch's layers", "at < pieces.size(); at +=", "at == 0; at +="),
    ("no root", "= sqrt(total)", "= total"),
    ("views of the wrong images", "images + n % num_images", "images + n / num_images"),
    ("view without its flip", "row[kFlip] != 0 ? width - 1 - x : x", "x"),
    ("contrast before its turn", "size)}, 0, contrast, 0)", "size)}, 0, 0, 0)"),
    ("operations after contrast left out", "jitter({r[i], g[i], b[i]}, contrast, 4,", "jitter({r[i], g[i], b[i]}, contrast, contrast + 1,"),
    ("only a block's worth of pixels", "Pixel p = jitter({r[i]", "if (i >= kThreads) break;\n      Pixel p = jitter({r[i]"),
    ("only the grid's worth of views", "n < num_views; n += gridDim.x", "n < gridDim.x; n += gridDim.x"),
]  # fmt: skip
ALL = bool(os.environ.get("FEDU_FAULTS"))
IN_SHORT = ("drift and spread exchanged", "pack over the end of a segment")  # one that a number shows, one that a sanitizer shows
PLANTED = [pytest.param(*fault, id=fault[0]) for fault in FAULTS if ALL or fault[0] in IN_SHORT]


@pytest.mark.slow
@pytest.mark.parametrize(("what", "text", "replacement"), PLANTED)
def test_each_planted_fault_is_caught(check, tmp_path, what, text, replacement):
    source = (OPS / "fused_cuda.cu").read_text()
    assert text in source, f"nothing to replace for: {what}"
    copy_headers(tmp_path)
    (tmp_path / "fused_cuda.cu").write_text(source.replace(text, replacement))
    made = compiled_for_the_cpu(tmp_path / "fused_cuda.cu", tmp_path, "-Wno-error")
    passes = link_and_run(made, check, arguments=("far" if "32-bit" in what else "quick",)).returncode == 0
    assert passes == (not text)
