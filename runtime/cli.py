"""Command lines and files: one-sentence errors, numbers with a range, and files that appear whole or not at all.

Only the standard library is imported here, so that `--help` and a mistyped option are answered before torch is loaded.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import BinaryIO, NoReturn, TextIO

RANK = int(os.environ.get("RANK", 0))  # this process's number among those that torchrun started

# how often a thread that waits for another one looks again before it sleeps, which OpenMP reads when torch is imported: by default so often
# that beside another busy program every step takes ten times as long, and threads that sleep at once double it on an idle machine
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

for descriptor in range(3):  # a stream that the shell has closed (`2>&-`): the next file that is opened would get its number
    try:
        os.fstat(descriptor)
    except OSError:
        os.open(os.devnull, os.O_RDWR)
sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115


on_command_line: ContextVar[bool] = ContextVar("on_command_line", default=False)


@contextmanager
def command_line() -> Iterator[None]:
    """Let errors name options as they are typed, `--local-epochs`, and not as arguments of Python, `local_epochs`."""
    token = on_command_line.set(True)
    try:
        yield
    finally:
        on_command_line.reset(token)


class InputError(Exception):
    """A mistake that the user can mend: one sentence that names the option or file, what it got and what it needs.

    sentence: with options as they are typed. Outside of `command_line` they become Python's arguments.
    """

    def __init__(self, sentence: str):
        super().__init__(sentence if on_command_line.get() else in_python(sentence))

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: the sentence, without a traceback."""
        return [f"{type(self).__name__}: {self}"]


def in_python(sentence: str) -> str:
    """A sentence about typed options in words of Python. What stands in backticks is a shell's, and stays."""
    pieces = sentence.split("`")
    for k in range(0, len(pieces), 2):
        text = re.sub(r"--resume ([^\s,:]+)", r"fedu.resume('\1')", pieces[k])
        text = re.sub(r"--overwrite( it)?\b", "overwrite=True", text)
        text = re.sub(r"--set\b", "settings", text)
        pieces[k] = re.sub(r"--([a-z][a-z-]*[a-z])", lambda flag: flag[1].replace("-", "_"), text)
    return "`".join(pieces)


def bars_are_hidden() -> bool:
    """Progress bars are shown on a terminal and in a notebook."""
    return not (sys.stderr.isatty() or "ipykernel" in sys.modules)


def first_line(error: BaseException) -> str:
    """What an error says, for use inside a sentence: its type and at most 100 characters of its first line, without colours."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    return f"{type(error).__name__}: {next(iter(text.splitlines()), '')[:100]}"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that ends with one sentence and exit status 2 on a mistake; its namespace has only the options that were given."""

    def __init__(self, description: str | None):
        super().__init__(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        say(f"{self.prog}: error: {message}{self.hint(message)}")
        sys.exit(2)

    def hint(self, message: str) -> str:
        """The option or the choice that was probably meant."""
        if unknown := re.search(r"unrecognized arguments:.*?(--[^\s=]+)", message):
            word, known = unknown[1].replace("_", "-"), list(self._option_string_actions)
        elif unknown := re.match(r"argument (--[\w-]+): invalid choice: '(.*?)'", message):
            word, known = unknown[2], [str(choice) for choice in self._option_string_actions[unknown[1]].choices]
        else:
            return ""
        return nearest(word, known)


def nearest(word: str, known: Collection[str]) -> str:
    """The end of a sentence that names the known word which was probably meant, or nothing."""
    from difflib import get_close_matches  # only here, since it takes a while to import

    close = get_close_matches(word.lower(), known, 1)
    return f"; did you mean {close[0]}?" if close else ""


def number(kind: type, low: float, high: float = float("inf"), open_low: bool = False) -> Callable[[str], float]:
    """An argparse type: an int or float in [low, high], or (low, high] if `open_low`."""
    article = {int: "a whole number", float: "a number"}[kind]
    needs = f"{article} {'above' if open_low else 'of at least'} {low:g}" + (f" and at most {high:g}" if high < float("inf") else "")

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high or (open_low and value == low):
            raise argparse.ArgumentTypeError(f"got {text!r}, needs {needs}")
        return value

    return convert


class PathError(InputError, argparse.ArgumentTypeError):
    """A text that is no path, for argparse too."""


def user_path(text: str | Path, option: str = "") -> Path:
    """A path that a user gives, with `~` for the home folder wherever it was typed; an argparse type. option: that named it, for an error.

    Raises PathError if the text is empty, or names the home of somebody whom this machine does not know.
    """
    try:
        if str(text):
            return Path(text).expanduser()
    except RuntimeError:  # the home is not known
        pass
    raise PathError(f"{option} got {str(text)!r}, needs the path of a file or folder".strip())


@contextmanager
def os_errors(failure: str) -> Iterator[None]:
    """Turn an OSError into an InputError: the sentence `failure`, and the system's reason."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{failure}: {error.strerror}") from None


@contextmanager
def locked(folder: Path, busy: str | None = None) -> Iterator[None]:
    """Lock a folder for this process. While another process has it, wait, or with `busy` raise an InputError with this text.

    If the file system cannot lock folders, as NFS cannot, this says so on stderr and goes on without a lock.
    """
    with os_errors(f"cannot open {folder}"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            raise InputError(busy) from None
        except OSError as error:
            print(f"{folder} cannot be locked ({error.strerror}): let no other process use it now", file=sys.stderr)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def user_errors(prog: str) -> Iterator[None]:
    """Turn an InputError, or a lack of memory, into one line on stderr and exit status 2, and an interrupt into status 130.

    If nothing can be printed any more, as after `| head`, end silently with 141, as a shell's tools do.
    """
    try:
        with command_line():
            yield
        sys.stdout.flush()
    except InputError as error:
        say(f"{prog}: error: {error}")
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        if RANK == 0:
            print(f"\n{prog}: interrupted" + (f"; {interrupt}" if interrupt.args else ""), file=sys.stderr)
        sys.exit(130)
    except (MemoryError, RuntimeError) as error:
        if not (sentence := out_of_memory(error)):
            raise
        say(f"{prog}: error: {sentence}")
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EIO):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter, on its way out, would complain
        sys.exit(141)


def out_of_memory(error: Exception) -> str:
    """The sentence for an error that means a lack of memory, of numpy or of torch, whose own is a RuntimeError on a CPU; else nothing."""
    if not isinstance(error, MemoryError) and not re.search("(out of|not enough|can't allocate) memory", str(error)):
        return ""
    needed = re.search(r"allocate ([\d.]+ \w+)", str(error))
    amount = f", {needed[1]} more were needed" if needed else ""
    return f"memory ran out{amount}: smaller batches or a smaller encoder need less"


class UnbreakableStream:
    """A stream that may fail without harm: after an error, such as a full disk or a closed pipe, what is written to it is dropped."""

    def __init__(self, stream: TextIO):
        self.stream, self.broken = stream, False

    def write(self, text: str) -> int:
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, action: Callable[..., object], *arguments: str) -> None:
        try:
            if not self.broken:
                action(*arguments)
        except (OSError, ValueError):  # ValueError: it is closed
            self.broken = True

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


@contextmanager
def unbreakable_output() -> Iterator[None]:
    """Let nothing that is printed inside this block end it."""
    former = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(UnbreakableStream, former)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = former


def say(error: str) -> None:
    """Print an error. If several processes meet the same one, rank 0 prints it, and the other ranks sleep until torchrun ends them."""
    if RANK:
        time.sleep(3)  # if torchrun has not ended this rank by then, no other rank has met the error
    print(f"rank {RANK}: {error}" if RANK else error, file=sys.stderr, flush=True)


def write_atomic(path: Path, write: Callable[[BinaryIO], object], keep_as: Path | None = None, mode: int = 0o644) -> None:
    """Let `write(file)` fill a temporary file beside `path`, then move it to `path`: a reader sees the old file or the new one, whole.

    keep_as: a path to which the old file is moved first. mode: who may read and write the file, whatever the umask.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            try:
                write(file)
                file.flush()
                os.fsync(file.fileno())
                os.chmod(file.name, mode)
                if keep_as and path.exists():
                    os.replace(path, keep_as)
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except (OSError, RuntimeError) as error:
        # whatever keeps torch.save from writing, its archive writer raises as a RuntimeError, with the cause as context
        cause = error.__context__ if isinstance(error.__context__, OSError | KeyboardInterrupt) else error
        if isinstance(cause, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise InputError(f"cannot write {path}: {getattr(cause, 'strerror', None) or first_line(cause)}") from error
