"""One file for each objective or server's rule; a row of `options.METHODS` names its objective as FILE:CLASS.

A method of one's own is a file with a row METHOD, or a row that a notebook gives: docs/extending.md.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from runtime.cli import InputError, first_line, os_errors

if TYPE_CHECKING:
    from options import Method

COPY = "method.py"  # the name of the file's copy in the run folder


class OwnMethod(str):
    """A method that is not in the table, by the path that the user typed, or by its objective's name if a notebook made it.

    row: of the form of the table's. source: what it was made from. file: the path that was read; empty for a notebook's.
    """

    def __new__(cls, name: str, row: Method, source: bytes, file: str = "") -> OwnMethod:
        own = super().__new__(cls, name)
        own.row, own.source, own.file = row, source, file
        return own

    def __deepcopy__(self, memo: dict) -> OwnMethod:
        return self

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.source).hexdigest()[:32]


def find(name: Any) -> Any:
    """The class or function that a method's row names as FILE:NAME, where the file is in methods/; one that is none but itself."""
    if not isinstance(name, str):
        return name
    file, _, attribute = name.partition(":")
    return getattr(importlib.import_module(f"methods.{file}"), attribute)


def load(path: Path, name: str) -> OwnMethod:
    """Run a user's file and take its METHOD. Raises InputError, with the line, for what is wrong in it."""
    with os_errors(f"--method {name} cannot be read"):
        source = path.read_bytes()
    return loaded(str(path), name, source)


@cache
def loaded(file: str, name: str, source: bytes) -> OwnMethod:
    module = ModuleType("own_method_" + hashlib.sha256(source).hexdigest()[:16])
    module.__file__ = file
    sys.modules[module.__name__] = module
    with explained(file):
        exec(compile(source, file, "exec"), module.__dict__)
    return checked(OwnMethod(name, vars(module).get("METHOD"), source, file))


def of_notebook(row: Method) -> OwnMethod:
    """A method by a row that Python code gives, whose classes and functions are its source as far as they can be read."""
    pieces = [repr(row._replace(objective="", rule="", settings={k: s[:2] for k, s in row.settings.items()}))]
    for piece in (row.objective, row.rule):
        with suppress(OSError, TypeError):
            pieces.append(piece if isinstance(piece, str) else inspect.getsource(piece))
    name = getattr(row.objective, "__name__", str(row.objective).split(":")[-1])
    return checked(OwnMethod(name, row, "\n".join(pieces).encode()))


def checked(own: OwnMethod) -> OwnMethod:
    """The method, whose row says whether its objective takes `predictor` and `stop_gradient`. Raises InputError if the row is wrong."""
    from models import Objective  # only here, since it imports torch
    from options import ABLATED, OPTIONS, Method, Setting, settings_of

    row, where = own.row, own.file or "method"
    if not isinstance(row, Method):
        found = "no METHOD" if row is None else f"METHOD = {row!r:.60}"
        raise InputError(f"{where} has {found}, needs METHOD = Method(...), see docs/extending.md")
    for what, value in {"objective": row.objective, "rule": row.rule}.items():
        try:
            if not callable(value and find(value)) and (value or what == "objective"):
                raise InputError(f"{where}: METHOD has {what}={value!r:.60}, needs a class or a function")
        except (ImportError, AttributeError):
            raise InputError(f"{where}: METHOD has {what}={value!r}, which is not FILE:NAME of methods/") from None
    objective = find(row.objective)
    if not (isinstance(objective, type) and issubclass(objective, Objective)):
        raise InputError(f"{where}: METHOD has objective={objective!r:.60}, needs a class derived from models.Objective")
    if objective.terms is Objective.terms:
        raise InputError(f"{place(objective)}: {objective.__name__} has no terms(self, view1, view2, batch, generator)")
    takes = inspect.signature(objective.__init__).parameters
    for name, setting in row.settings.items():
        if not isinstance(setting, Setting):
            raise InputError(f"{where}: METHOD has the setting {name}={setting!r:.60}, needs Setting(DEFAULT, HELP, TYPE)")
        if name in OPTIONS or name in settings_of("fedu"):
            raise InputError(f"{where}: METHOD has a setting {name}, which is the name of an option or of every method's setting")
    for name in (*row.settings, *["labels"] * row.uses_labels):
        if name not in takes and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
            raise InputError(f"{place(objective)}: {objective.__name__} does not take {name}, which METHOD gives it")
    columns = {name: OPTIONS[name].metadata["choices"] for name in ABLATED} | {"servers": ("one", "each", "pooled")}
    for name, choices in columns.items():
        if getattr(row, name) not in choices:
            raise InputError(f"{where}: METHOD has {name}={getattr(row, name)!r:.60}, needs one of {', '.join(choices)}")
    for layer in row.head:
        if layer not in ("relu", "standardise") and not (isinstance(layer, int) and layer >= 0):
            raise InputError(f"{where}: METHOD has {layer!r:.60} in head, needs widths, 'relu' and 'standardise'")
    own.row = row._replace(ablations={"predictor", "stop_gradient"} <= takes.keys())
    return own


def of_run(run: Path, name: str, recorded: str | None, given: str | Method | None) -> str:
    """The method with which a run began. If it is not in the table: the copy in its folder, or the one that a notebook gives again.

    recorded: its hash. given: what the user names as its method, if anything. Raises InputError if it is another one.
    """
    from options import METHODS, method_of

    if name in METHODS:
        return name
    copy = run / COPY
    if not (copy.exists() or given):
        raise InputError(f"{run} has no {COPY}: a notebook began it, and fedu.resume needs its method=Method(...) again")
    own = load(copy, name) if copy.exists() else method_of(given)
    if getattr(own, "digest", None) != recorded:
        raise InputError(f"{copy if copy.exists() else f'--method {own}'} is not what {run} began with")
    if given and getattr(method_of(given), "digest", None) != recorded:
        raise InputError(f"--method {str(given)[:60]} is not the file with which {run} began, of which {copy} is a copy")
    return own


# --------------------------------------------------------------------------------------- errors in a user's file


def place(thing: Any) -> str:
    """Where a class or function begins, as `FILE, line N`; its name if that is not known."""
    with suppress(OSError, TypeError):
        return f"{inspect.getsourcefile(thing)}, line {inspect.getsourcelines(thing)[1]}"
    return thing.__qualname__


@contextmanager
def explained(file: str) -> Iterator[None]:
    """Turn an error that a line of this file raises, or lets through, into an InputError with the line."""
    try:
        yield
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, SyntaxError) and error.filename == file:
            raise InputError(f"{file}, line {error.lineno}: {error.msg}") from error
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        if not (file and lines):
            raise
        raise InputError(f"{file}, line {lines[-1]}: {first_line(error)}") from error
