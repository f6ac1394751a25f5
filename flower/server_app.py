"""The server's side of FedU on Flower: the run of `fedu.py`, whose rounds are made by parties on machines of their own.

The SuperLink starts it for `flwr run`. `options` are those of the command line of `fedu.py`; their data set is the server's own, whose test
images measure the encoder. The run folder, below where the SuperLink was started, is that of `fedu.py`, and `--resume` continues it.
"""

import io
import json
import logging
import secrets
import shlex
from argparse import ArgumentTypeError
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from messages import FLOWER_METHODS
from strategy import FedU

import fedu
from data import load_dataset, refuse_other_data
from federation import Client, assemble
from options import Command, Options, flag, parse
from runtime.bank import Bank
from runtime.cli import InputError, command_line, number
from runtime.device import choose_device
from runtime.recorder import Recorder
from runtime.run import holds_run, open_run, read_metrics, reopen_run, run_folder, write_config

# only the simulation has these
INEFFECTIVE = ("processes", "partition", "save_partition", "dry_run", "classes_per_client", "alpha", "dropout", "log")
# of a run whose parties keep their BatchNorm
NO_KNN = "The kNN column stays empty: each party keeps its BatchNorm, so the server has no whole encoder to measure."
ELSEWHERE = ", without an encoder: each party has its own, in its state folder"

app = ServerApp()


def one_sentence(record: logging.LogRecord) -> bool:
    """A filter of Flower's log: an InputError, which ends the run, is printed as its sentence, without a traceback."""
    error = record.exc_info and record.exc_info[1]
    if isinstance(error, InputError):
        record.msg, record.args, record.exc_info = f"error: {error}", (), None
    return not record.getMessage().startswith("Exit Code: 201")  # "an unhandled exception", after what the exception was


logging.getLogger("flwr").addFilter(one_sentence)


@app.main()
@command_line()
def main(grid: Grid, context: Context) -> None:
    """All rounds of a run, from the first one or from its checkpoint. Raises InputError for options that cannot be used here."""
    command = read_command(str(context.run_config["options"]))
    options = fedu.stored_options(command.resume, {}) if command.resume else Options(**command.given)
    least = read_number(context, "min-clients", number(int, 0, options.clients)) or options.clients
    timeout = read_number(context, "timeout", number(float, 0, open_low=True))
    max_share = read_number(context, "max-share", number(float, 0, 1, open_low=True))
    out = command.resume or command.out or Path("runs") / f"flower-{options.method}-{options.clients}clients-s{options.seed}"
    if not command.resume:
        holds_run(out, command.overwrite)
    fedu.load_kernels()
    device = choose_device(options.device)
    images = load_dataset(options).to(device)
    unknown = torch.empty(0, device="meta")  # a client says how many images it has when it connects
    everyone = [Client(k, unknown) for k in range(options.clients)]
    federation = assemble(options, [everyone], images.x_train, images.y_train)
    with run_folder(out, mode=0o700):  # it says how many images each party has
        if command.resume:
            config = reopen_run(out, parties=True)
            refuse_other_data(out, config.get("data", {}), {"images": images.digest}, options.dataset, moved=False)
        else:
            given = f"options={json.dumps(context.run_config['options'])}"
            config = open_run(out, asdict(options), device, {"images": images.digest}, command.overwrite)
            config |= {"command": shlex.join(["flwr", "run", "flower", "--run-config", given]), "run": secrets.token_hex(8)}
            write_config(out, config)
        strategy = FedU(options, federation, config["run"], least, timeout, max_share)
        for row in read_metrics(out):
            strategy.counts |= zip(row["clients"], row["num_examples"])
        strategy.roll_call(grid, set(range(options.clients)))
        record = Recorder(out, config, options.rounds, federation, Bank({}), device, partial(fedu.show_round, None))
        local = options.statistics == "local"  # then each party has an encoder of its own
        measured = replace(options, knn_every=0) if local else options
        fedu.introduce(measured, images, federation, record, bool(command.resume), NO_KNN * local)
        for round_ in record.rounds_left():
            row = strategy.make_round(grid, round_)
            record.write(row | {"knn": fedu.measured_knn(measured, round_, federation, images, record.bank)})
        if local:
            strategy.hand_out(grid)
        fedu.finish(options, images, federation, record, ELSEWHERE * local)


def read_command(text: str) -> Command:
    """Parse the text of `options`. Raises InputError for what `fedu.py` would refuse, and for what has no meaning between parties."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            command = parse(shlex.split(text))
    except ValueError as error:
        raise InputError(f"--run-config got options={text!r}: {error}") from None
    except SystemExit:
        raise InputError(said.getvalue().partition("error: ")[2].strip() or "--help starts no run") from None
    if ineffective := [name for name in INEFFECTIVE if name in command.given]:
        raise InputError(f"{flag(ineffective[0])} changes nothing between parties, which have images, and failures, of their own")
    if private := sorted(name for name in command.given if name.startswith("dp_")):
        raise InputError(f"{flag(private[0])} got {command.given[private[0]]:g}, but between parties each sets its own in --node-config")
    if "views" in command.given:
        raise InputError(f"--views got {command.given['views']}, but parties run no file that a server names")
    if command.given.get("aggregate") == "target":
        raise InputError("--aggregate got target, but target encoders do not leave the parties")
    if command.given.get("statistics") == "local" and "init" in command.given:
        raise InputError(f"--init got {command.given['init']}, but with --statistics local no party gets the BatchNorm of that encoder")
    if command.resume and command.given:
        raise InputError(f"--resume {command.resume} continues with the options that the run has, and got {flag(min(command.given))}")
    if command.given.get("method", FLOWER_METHODS[0]) not in FLOWER_METHODS:
        raise InputError(f"--method got {command.given['method']}, between parties it needs one of {', '.join(FLOWER_METHODS)}")
    return command


def read_number(context: Context, name: str, convert: Callable[[str], float]) -> float:
    """A number of `--run-config`. Raises InputError if it is none, or out of range."""
    try:
        return convert(str(context.run_config[name]))
    except ArgumentTypeError as error:
        raise InputError(f"--run-config {name} {error}") from None
