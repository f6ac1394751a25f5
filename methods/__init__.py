"""One file for each objective or server's rule; a row of `options.METHODS` names its objective as FILE:CLASS.

A method of one's own is a file with a row METHOD, and views of one's own are a file with a function `view`; a notebook gives the row or the
function itself: docs/extending.md.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
import traceback
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from runtime.cli import InputError, first_line, os_errors

if TYPE_CHECKING:
    from federation import Server
    from models import Objective
    from options import Method, Options

WANTED = {"method": "METHOD", "views": "view"}  # the options whose value may be a file of the user's: what has to be in it


class Own(str):
    """The value of such an option: the path that the user typed, or a name if a notebook made it.

    content: the method's row, or the function that draws a view. source: what it was made from. file: the path that was read; empty for a
    notebook's.
    """

    def __new__(cls, name: str, content: Any, source: bytes, file: str = "") -> Own:
        own = super().__new__(cls, name)
        own.content, own.source, own.file = content, source, file
        return own

    def __deepcopy__(self, memo: dict) -> Own:
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


def load(path: Path, name: str, option: str) -> Own:
    """Run a user's file and take what the option needs of it. Raises InputError, with the line, for what is wrong in it."""
    with os_errors(f"--{option} {name} cannot be read"):
        source = path.read_bytes()
    return loaded(str(path), name, option, source)


@cache
def loaded(file: str, name: str, option: str, source: bytes) -> Own:
    module = ModuleType("own_" + hashlib.sha256(source).hexdigest()[:16])
    module.__file__ = file
    sys.modules[module.__name__] = module
    with explained(file):
        exec(compile(source, file, "exec"), module.__dict__)
    own = Own(name, vars(module).get(WANTED[option]), source, file)
    if option == "method":
        return checked(own)
    if not callable(own.content):
        raise InputError(f"{file} has no function view(images, generator), see docs/extending.md")
    refuse_call(own.content, "images", "generator")
    return own


def of_notebook(content: Method | Callable) -> Own:
    """A method or views that Python code gives; its classes and functions are its source as far as they can be read."""
    pieces, parts = [], [content]
    if isinstance(content, tuple):
        row = checked(Own("", content, b"")).content
        pieces.append(repr(row._replace(objective="", rule="", settings={k: s[:2] for k, s in row.settings.items()})))
        content, parts = row, [row.objective, row.rule]
    else:
        refuse_call(content, "images", "generator")
    for part in parts:
        with suppress(OSError, TypeError):
            pieces.append(part if isinstance(part, str) else inspect.getsource(part))
    return Own(getattr(parts[0], "__name__", str(parts[0]).split(":")[-1]), content, "\n".join(pieces).encode())


def checked(own: Own) -> Own:
    """The method, whose row says whether its objective takes `predictor` and `stop_gradient`. Raises InputError if the row is wrong."""
    from models import Objective  # only here, since it imports torch
    from options import Method

    row, where = own.content, f"{own.file or 'method'}: METHOD has"
    if not isinstance(row, Method):
        found = "no METHOD" if row is None else f"METHOD = {row!r:.60}"
        raise InputError(f"{own.file or 'method'} has {found}, needs METHOD = Method(...), see docs/extending.md")
    refuse_columns(row, where)
    for what, value in {"objective": row.objective, "rule": row.rule}.items():
        try:
            if not callable(value and find(value)) and (value or what == "objective"):
                raise InputError(f"{where} {what}={value!r:.60}, needs a class or a function")
        except (ImportError, AttributeError):
            raise InputError(f"{where} {what}={value!r}, which is not FILE:NAME of methods/") from None
    objective = find(row.objective)
    if not (isinstance(objective, type) and issubclass(objective, Objective)):
        raise InputError(f"{where} objective={objective!r:.60}, needs a class derived from models.Objective")
    if objective.terms is Objective.terms:
        raise unfit(objective, "has no terms(self, view1, view2, batch, generator)")
    if not (isinstance(objective.batches, int) and objective.batches > 0):
        raise unfit(objective, f"has batches = {objective.batches!r:.60}, needs a number of 1 or more")
    refuse_call(objective, "encoder", "device", **dict.fromkeys([*row.settings, *["labels"] * row.uses_labels]))
    try:
        made = object.__new__(objective)
    except TypeError as error:
        raise InputError(f"{place(objective)}: {error}") from None
    for hook in ("terms", "begin", "take_shared", "update", "prepare"):
        _, *arguments = inspect.signature(getattr(Objective, hook)).parameters
        refuse_call(getattr(made, hook), *arguments)
    if row.rule:
        refuse_call(find(row.rule), "server", "uploads", "networks", "shared")
    takes = inspect.signature(objective).parameters
    own.content = row._replace(ablations={"predictor", "stop_gradient"} <= takes.keys())
    return own


def refuse_columns(row: Method, where: str) -> None:
    """Raises InputError for a column of the wrong type or out of its range. where: how the sentence begins."""
    from options import ABLATED, OPTIONS, VIEWS, Setting, settings_of

    kinds = {bool: (bool, "True or False"), float: (int | float, "a number"), tuple: (tuple, "a tuple"), dict: (Mapping, "a dict")}
    for name, default in row._field_defaults.items():
        kind, words = kinds.get(type(default), (object, ""))
        if not isinstance(value := getattr(row, name), kind):
            raise InputError(f"{where} {name}={value!r:.60}, needs {words}")
    for name, setting in row.settings.items():
        if not (isinstance(setting, Setting) and isinstance(setting.default, int | float) and callable(setting.type)):
            raise InputError(f"{where} the setting {name}={setting!r:.60}, needs Setting(DEFAULT, HELP, TYPE), whose default is a number")
        if not (isinstance(name, str) and name.isidentifier()):
            raise InputError(f"{where} a setting {name!r:.60}, needs a name that the constructor can take")
        if name in OPTIONS or name in settings_of("fedu"):
            raise InputError(f"{where} a setting {name}, which is the name of an option or of every method's setting")
    columns = {name: OPTIONS[name].metadata["choices"] for name in ABLATED} | {"servers": ("one", "each", "pooled")}
    for name, choices in columns.items():
        if getattr(row, name) not in choices:
            raise InputError(f"{where} {name}={getattr(row, name)!r:.60}, needs one of {', '.join(choices)}")
    for layer in row.head:
        if layer not in ("relu", "standardise") and not (isinstance(layer, int) and layer >= 0):
            raise InputError(f"{where} {layer!r:.60} in head, needs widths, 'relu' and 'standardise'")
    if row.head and not any(isinstance(layer, int) for layer in row.head):
        raise InputError(f"{where} head={row.head!r:.60}, needs a width in it")
    if not 0 <= row.public < 1:
        raise InputError(f"{where} public={row.public}, needs a fraction from 0 to below 1")
    try:
        VIEWS["jitter"].type(str(row.jitter))
    except ArgumentTypeError as error:
        raise InputError(f"{where} a wrong jitter: {error}") from None


def refuse_call(function: Callable, *given: str, **named: object) -> None:
    """Raises InputError if a function of the user's does not take these arguments."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some compiled functions do not say what they take
        return
    try:
        signature.bind(*given, **named)
    except TypeError as error:
        call = f"{name_of(function)}({', '.join([*given, *named])})"
        raise InputError(f"{place(function)}: {name_of(function)}{signature} is called as {call}: {error}") from None


def refuse_networks(networks: Objective, options: Options) -> None:
    """Raises InputError if an objective lacks what an option needs, or what a client takes in its first round."""
    from options import OPTIONS, flag

    if not hasattr(networks, "parts"):
        raise unfit(type(networks), "does not call super().__init__(encoder, device)")
    for name in sorted({*networks.parts, *networks.initial} - {"encoder", "predictor"}):
        shapes = [list(of[name].shape) if name in of else "none" for of in (networks.parts, networks.initial)]
        if shapes[0] != shapes[1]:
            needed = f"needs parts[{name!r}] and initial[{name!r}] of one shape, has {shapes[0]} and {shapes[1]}"
            raise unfit(type(networks), needed)
    needs = {
        "predictor": "predictor" if options.predictor != "global" else "",
        "aggregate": "target" if options.aggregate == "target" else "",
        "update": "target" if options.update in ("target", "both") else "",
        **{name: "target" for name in ("ema_decay", "first_target") if getattr(options, name) != OPTIONS[name].default},
    }
    for name, part in needs.items():
        if part and not len(networks.parts.get(part, ())):
            raise unfit(type(networks), f"has no {part}, which {flag(name)} {getattr(options, name)} needs")


def refuse_model(rule: Callable, model: Any, server: Server) -> None:
    """Raises InputError if what a server's rule gives is no next model, or if it keeps what a checkpoint cannot store."""
    from torch import Tensor  # only here, as models above

    if not (isinstance(model, Tensor) and model.shape == server.model.shape):
        raise unfit(rule, f"gives {described(model)}, needs the next model, a tensor of shape {list(server.model.shape)}")
    if not model.isfinite().all():
        raise unfit(rule, "gives a model with numbers that are not finite")
    for key, value in server.state.items():
        if not isinstance(value, Tensor) or key == "model" or (key == "shared" and value.ndim != 2):
            needed = "rows [N, d]" if key == "shared" else "a tensor, by another name than 'model'"
            raise unfit(rule, f"keeps {described(value)} as server.state[{key!r}], needs {needed}")


def unfit(thing: Any, what: str) -> InputError:
    """The error for a class or function of a method that does not fit. what: the rest of the sentence."""
    return InputError(f"{place(thing)}: {name_of(thing)} {what}")


def of_run(run: Path, config: dict, given: dict[str, Any]) -> dict[str, Own]:
    """The options of a run whose values are the user's own: from the copies in its folder, or what a notebook gives again.

    config: the run's. given: what the user names as such now, if anything. Raises InputError if it is another one.
    """
    stored, hashes = config["options"], config.get("data", {})
    return {name: own_of(run, name, stored[name], hashes[name], given.get(name)) for name in WANTED if name in hashes}


def own_of(run: Path, option: str, name: str, recorded: str, given: Any) -> Own:
    """The value of one such option. recorded: its hash."""
    from options import checked as value_of

    copy = run / f"{option}.py"
    if not (copy.exists() or given):
        raise InputError(f"{run} has no {copy.name}: a notebook began it, and fedu.resume needs its {option}=... again")
    own = load(copy, name, option) if copy.exists() else value_of(option, given)
    if getattr(own, "digest", None) != recorded:
        raise InputError(f"{copy if copy.exists() else f'--{option} {own}'} is not what {run} began with")
    if given and getattr(value_of(option, given), "digest", None) != recorded:
        raise InputError(f"--{option} {str(given)[:60]} is not the file with which {run} began, of which {copy} is a copy")
    return own


# --------------------------------------------------------------------------------------- errors in a user's file


def place(thing: Any) -> str:
    """Where a class or function begins, as `FILE, line N`; its name if that is not known."""
    with suppress(OSError, TypeError):
        return f"{inspect.getsourcefile(thing)}, line {inspect.getsourcelines(thing)[1]}"
    return name_of(thing)


def described(value: Any) -> str:
    """What a user's function gives: of a tensor its shape, type and device, else its type."""
    from torch import Tensor  # only here, as above

    return f"{list(value.shape)} of {value.dtype} on {value.device}" if isinstance(value, Tensor) else type(value).__name__


def name_of(thing: Any) -> str:
    """The name of a class or function; of another callable, its class's."""
    return getattr(thing, "__name__", type(thing).__name__)


@contextmanager
def explained(file: str) -> Iterator[None]:
    """Turn an error that a line of this file raises, or lets through, into an InputError with the line."""
    try:
        yield
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        if file and isinstance(error, SyntaxError) and error.filename in (file, None):  # None, and no line, if it is no text
            raise InputError(f"{file}{f', line {error.lineno}' if error.lineno else ''}: {error.msg}") from error
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        if not (file and lines):
            raise
        raise InputError(f"{file}, line {lines[-1]}: {first_line(error)}") from error
