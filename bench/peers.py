"""Times a round of 1,000 clients, 10 a round, against Flower's simulation and Apple's pfl: `python -m bench.peers`.

All train the tiny encoder by BYOL with the same function, `training.train_client`: 50 images a client, 5 epochs, B = 32. Ours is all of
FedU's round, with what clients keep, divergences and a checkpoint; the others average by their own federated averaging, and keep nothing
for clients: the target begins as the online encoder. Flower's has an actor of one thread for each core, ours and pfl's one process of all
threads. Each way runs in processes of its own, in turns; the first two rounds of each are left out, and medians are printed.

Flower's needs `pip install "flwr[simulation]"`, pfl's `pip install pfl`; one that is missing is left out.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from statistics import median

import torch
from torch import nn

import training
from bench.timing import print_origin
from bench.training import ROOT, as_large_as_cifar10, installed, rounds_of_fedu
from federation import Federation, build
from options import Options
from runtime.cli import Parser, number, user_errors
from runtime.device import keep_memory

SIZE = {"clients": 1000, "clients_per_round": 10, "encoder": "tiny", "partition": "iid", "batch_size": 32, "local_epochs": 5}
OPTIONS = Options(dataset="cifar10", **SIZE)
WARM_UP = 2  # rounds


def ours(rounds: int) -> list[float]:
    keep_memory()  # as fedu.py does; for the other ways `federation` does
    with tempfile.TemporaryDirectory(dir=".") as folder:
        run, times = rounds_of_fedu(as_large_as_cifar10(), Path(folder), **SIZE), [time.perf_counter()]
        for _ in range(rounds):
            run()
            times.append(time.perf_counter())
    return times


@cache
def federation() -> Federation:
    """Of this process, be it one of Flower's actors."""
    keep_memory()
    return build(OPTIONS, as_large_as_cifar10())


def train_client(round_: int, client_id: int) -> None:
    """Train from what the online network holds."""
    parts = federation().networks.parts
    parts["target"].copy_(parts["encoder"])
    training.train_client(OPTIONS, federation(), None, round_, client_id, first_round=False, num_clients=SIZE["clients_per_round"])


def flower(rounds: int) -> list[float]:
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    times: list[float] = []
    client_app, server_app = ClientApp(), ServerApp()

    class Timed(FedAvg):
        def configure_train(self, *arguments, **named):
            times.append(time.perf_counter())
            return super().configure_train(*arguments, **named)

    @client_app.train()
    def train(message, context):
        from bench import peers  # Ray sends this function to its actors by value, and `federation` must be made once an actor

        torch.set_num_threads(1)
        vector = peers.federation().networks.online.vector
        vector.copy_(message.content["arrays"].to_torch_state_dict()["online"])
        peers.train_client(message.content["config"]["server-round"], context.node_config["partition-id"])
        content = {"arrays": ArrayRecord({"online": vector}), "metrics": MetricRecord({"num-examples": 50})}
        return Message(RecordDict(content), reply_to=message)

    @server_app.main()
    def main(grid, context):
        share = SIZE["clients_per_round"] / SIZE["clients"]
        strategy = Timed(fraction_train=share, fraction_evaluate=0, min_available_nodes=SIZE["clients"])
        strategy.start(grid, ArrayRecord({"online": federation().networks.online.vector}), num_rounds=rounds)
        times.append(time.perf_counter())

    run_simulation(server_app, client_app, SIZE["clients"], backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}})
    return times


def pfl(rounds: int) -> list[float]:
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    times: list[float] = [time.perf_counter()]

    class Averaging(FederatedAveraging):
        def simulate_one_user(self, model, user_dataset, central_context):
            self._initial_model_state = model.get_parameters(self._initial_model_state)
            copy_parameters(theirs, network)
            train_client(central_context.current_central_iteration, int(user_dataset.user_id))
            copy_parameters(network, theirs)
            difference = model.get_model_difference(self._initial_model_state)
            model.set_parameters(self._initial_model_state)
            return difference, Metrics()

    class Clock(TrainingProcessCallback):
        def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
            times.append(time.perf_counter())
            return False, Metrics()

    network = federation().networks.online.module
    theirs = copy.deepcopy(network)  # pfl gives its parameters gradients of their own, and the network's are views into one vector
    theirs.loss = theirs.metrics = None  # pfl expects these names; it has nothing to train or measure by itself here
    model = PyTorchModel(theirs, torch.optim.SGD, torch.optim.SGD(theirs.parameters(), lr=1.0))
    indices = [client.indices for client in federation().clients]
    users = FederatedDataset(
        lambda user: Dataset(raw_data=[indices[user]], user_id=str(user)), get_user_sampler("random", list(range(SIZE["clients"])))
    )
    parameters = NNAlgorithmParams(
        central_num_iterations=rounds, evaluation_frequency=rounds + 1, train_cohort_size=SIZE["clients_per_round"], val_cohort_size=0
    )
    train_parameters = NNTrainHyperParams(local_num_epochs=1, local_learning_rate=1.0, local_batch_size=None)
    Averaging().run(parameters, SimulatedBackend(users, users), model, train_parameters, callbacks=[Clock()])
    return times


@torch.no_grad()
def copy_parameters(source: nn.Module, target: nn.Module) -> None:
    for old, new in zip(target.parameters(), source.parameters(), strict=True):
        old.copy_(new)


WAYS = {"ours": (ours, ()), "flower": (flower, ("flwr", "ray")), "pfl": (pfl, ("pfl",))}


def main(way: str | None, rounds: int, repeats: int) -> None:
    if way:
        times = WAYS[way][0](WARM_UP + rounds)
        return print(json.dumps([after - before for before, after in zip(times, times[1:])][WARM_UP:]))
    print_origin("bench.peers", f"{repeats} x {rounds} rounds")
    seconds: dict[str, list[float]] = {way: [] for way, (_, packages) in WAYS.items() if installed(*packages)}
    for _ in range(repeats):
        for way in seconds:
            command = [sys.executable, "-m", "bench.peers", "--way", way, "--rounds", str(rounds)]
            env = os.environ | {"PYTHONPATH": str(ROOT)}
            done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
            seconds[way] += json.loads(done.stdout.splitlines()[-1])
    for way in seconds:
        print(f"{way:10} {median(seconds[way]):8.3f} s a round  x {median(seconds[way]) / median(seconds['ours']):.2f}", flush=True)


if __name__ == "__main__":
    with user_errors("bench.peers"):
        parser = Parser(description=__doc__.split("\n\n")[0])
        parser.add_argument("--way", choices=WAYS, default=None, help="only this one, in this process; prints its seconds as JSON")
        parser.add_argument("--rounds", type=number(int, 1), default=8, help="timed each time  [8]")
        parser.add_argument("--repeats", type=number(int, 1), default=3, help="of each way  [3]")
        main(**vars(parser.parse_args()))
