"""Builds fused.cpp and fused_cuda.cu with torch.utils.cpp_extension, once a machine, and keeps the library in a private cache.

The cache is `$XDG_CACHE_HOME/fedu/ops` or `~/.cache/fedu/ops`, with one library for each hash of all that it depends on; deleting it is
always safe. With one there, loading needs neither compiler nor ninja and takes milliseconds.
"""

import contextlib
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

SOURCES = [Path(__file__).with_name(name) for name in ("fused.cpp", "fused_cuda.cu", "fused.h", "augment.h", "batch_norm.h")]
# -ffp-contract=off and --fmad=false: the sources say where a product and a sum are rounded once, and the compiler follows.
CPP_FLAGS = ["-std=c++20", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"]
CPP_FLAGS += ["-Wno-unknown-pragmas"]
CUDA_FLAGS = ["-std=c++20", "-O3", "--fmad=false"]


class BuildError(RuntimeError):
    """The library cannot be built; says why in one line (`summary`) and what the user can do about it (`mend`)."""

    def __init__(self, summary: str, mend: str, message: str = ""):
        super().__init__(message or f"{summary}; to mend it, {mend}")
        self.summary, self.mend = summary, mend


def load() -> None:
    """Load the library into torch, building it first where the cache has none. Raises BuildError and OSError."""
    cuda = torch.cuda.is_available() or bool(os.environ.get("TORCH_CUDA_ARCH_LIST"))
    folder = private_folder()
    library = folder / f"fedu-{cache_key(cuda)}.so"
    if not library.exists():
        with locked(folder):
            if not library.exists():  # another process may have built it while this one waited
                build(library, cuda)
                return
    if others_can_write(library):
        raise BuildError(f"others can write {library}", "delete it")
    torch.ops.load_library(library)


def private_folder() -> Path:
    """The cache, made if need be. Raises BuildError where anyone but this user and root could change what is loaded from it."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base, "fedu", "ops").resolve()
    for part in (*reversed(folder.parents), folder):
        if not part.exists():
            part.mkdir(mode=0o700, exist_ok=True)
        if others_can_write(part):
            raise BuildError(f"others can write {part}", "take that right from them, or set XDG_CACHE_HOME to a folder of your own")
    if folder.stat().st_uid != os.geteuid():
        raise BuildError(f"{folder} belongs to another user", "set XDG_CACHE_HOME to a folder of your own")
    folder.chmod(0o700)
    return folder


def others_can_write(path: Path) -> bool:
    """Whether a user other than this one and root can replace the file, or the folder's entries."""
    status = path.stat()
    if status.st_uid not in (0, os.geteuid()):
        return True
    sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX  # as /tmp: only the owner of an entry can replace it
    return bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)) and not sticky


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time; the system takes the lock from a process that dies."""
    import fcntl

    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cache_key(cuda: bool) -> str:
    """Hash of all that the library depends on: -march=native ties it to the CPU, and home folders are shared between machines."""
    parts = [torch.__version__, sys.version, platform.machine(), cpu_features(), *CPP_FLAGS, *(CUDA_FLAGS if cuda else [])]
    if cuda:
        visible = {torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())}
        parts.append(os.environ.get("TORCH_CUDA_ARCH_LIST") or repr(sorted(visible)))
    sources = [source.read_bytes() for source in SOURCES]
    return hashlib.sha256(repr((parts, sources)).encode()).hexdigest()[:32]


def cpu_features() -> str:
    """The first processor's model and instruction sets."""
    try:
        with open("/proc/cpuinfo") as file:
            # until the first blank line; clock rates and the like change from one reading to the next
            lines = iter(file.readline, "\n")
            return "".join(line for line in lines if re.match(r"vendor|cpu family|model|flags|Features|CPU", line))
    except OSError:
        return platform.processor()


def build(library: Path, cuda: bool) -> None:
    """Build and load, in a folder of its own; then move the result to `library` in one step, so no process sees half of it."""
    for leftover in library.parent.glob("build-*"):  # of a process that was killed: the lock says that none is at work
        shutil.rmtree(leftover, ignore_errors=True)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # that there is no GPU is no news here
    folder = tempfile.mkdtemp(prefix="build-", dir=library.parent)
    path = os.environ.get("PATH", "")
    try:
        # ninja, if installed by pip, lies beside python: on the PATH only where the environment was activated
        os.environ["PATH"] = os.pathsep.join([path, sysconfig.get_path("scripts")])
        from torch.utils import cpp_extension

        check_tools(cpp_extension)
        if cuda:
            cpp_extension.CUDA_HOME = check_toolkit()
        print(f"ops: building the fused kernels (C++{' and CUDA' if cuda else ''}), once, about half a minute", file=sys.stderr, flush=True)
        try:
            built = cpp_extension.load(
                "fedu_ops",
                [str(source) for source in SOURCES if source.suffix == ".cpp" or (cuda and source.suffix == ".cu")],
                extra_cflags=[*CPP_FLAGS, *(["-DFEDU_CUDA"] if cuda else [])],
                extra_cuda_cflags=CUDA_FLAGS,
                extra_ldflags=["-fopenmp"],
                build_directory=folder,
                is_python_module=False,
            )
        except RuntimeError as error:
            first = next((line for line in str(error).splitlines() if re.search(r"\b(fatal )?error\b", line)), str(error)[:200])
            raise BuildError(f"compile error: {first.strip()}", "see the whole message with FEDU_OPS=build", str(error)) from error
        os.chmod(built, 0o700)
        os.replace(built, library)
    finally:
        os.environ["PATH"] = path
        shutil.rmtree(folder, ignore_errors=True)


def check_tools(cpp_extension) -> None:
    compiler = shlex.split(cpp_extension.get_cxx_compiler())[0]
    if shutil.which(compiler) is None:
        raise BuildError(f"no C++ compiler ({compiler})", "install g++ or name yours in CXX")
    if not cpp_extension.is_ninja_available():
        raise BuildError("no ninja", "pip install ninja")


def check_toolkit() -> str:
    """The CUDA toolkit's folder, one of the same major version as torch's."""
    if torch.version.cuda is None:
        raise BuildError("this torch was built without CUDA", "install one with it, or unset TORCH_CUDA_ARCH_LIST")
    home = find_toolkit()
    if home is None:
        raise BuildError("no nvcc", f"install the CUDA toolkit {torch.version.cuda} and set CUDA_HOME to its folder")
    text = subprocess.run([f"{home}/bin/nvcc", "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", text)
    version = ".".join(release.groups()) if release else "unknown"
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        raise BuildError(f"nvcc is {version} and torch's CUDA {torch.version.cuda}", f"install CUDA {torch.version.cuda} and set CUDA_HOME")
    return home


def find_toolkit() -> str | None:
    """The variable, then what nvcc says of itself (on the PATH it may be a link or a script), then the usual folder."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        text = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
        homes += re.findall(r"^#\$ TOP=(.+)$", text, re.MULTILINE)
    for home in filter(None, [*homes, "/usr/local/cuda"]):
        if Path(home, "bin", "nvcc").exists() and Path(home, "include", "cuda_runtime_api.h").exists():
            return os.path.realpath(home)
    return None
