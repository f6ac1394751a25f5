"""A training step as a CUDA graph, on a CPU: a graph that is emulated faithfully enough to show what it would read again."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from conftest import CPU, KINDS, networks_of, ready
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import training
from data import load_images, seed_of


class EmulatedGraph(TorchDispatchMode):
    """torch.cuda.CUDAGraph on the CPU: writes down each operation with its tensors, and replays them on these very tensors.

    As with the real one, capturing changes nothing, and a replay sees what the memory and the generator then hold.
    """

    def __init__(self):
        super().__init__()
        self.tape, self.own, self.former, self.generator = [], set(), {}, None

    def register_generator_state(self, generator: torch.Generator) -> None:
        self.generator = generator

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        for tensor in tensors_of(args, kwargs):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.own | self.former.keys():
                self.former[storage.data_ptr()] = storage, storage.clone()
        result = operation(*args, **(kwargs or {}))
        self.own |= {t.untyped_storage().data_ptr() for t in tensors_of(result)} - self.former.keys()
        self.tape.append((operation, args, kwargs or {}, result))
        return result

    @contextmanager
    def capture(self):
        state = self.generator.get_state()
        with self:
            yield
        self.generator.set_state(state)
        for storage, content in self.former.values():
            storage.copy_(content)

    @torch.no_grad()
    def replay(self) -> None:
        for operation, args, kwargs, result in self.tape:
            for old, new in zip(tensors_of(result), tensors_of(operation(*args, **kwargs)), strict=True):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


def tensors_of(*values) -> list[torch.Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, torch.Tensor)]


@pytest.fixture
def graphs(monkeypatch) -> list[EmulatedGraph]:
    """Steps on the CPU are launched as graphs; the list gets each that is captured."""
    captured = []

    def capture(graph, stream):
        captured.append(graph)
        return graph.capture()

    class Stream:
        def wait_stream(self, other) -> None:
            pass

    monkeypatch.setattr(training, "GRAPHS_ON", "cpu")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", EmulatedGraph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return captured


def train_three_clients(kind: str, npz, precision: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Three clients one after the other, each with images, learning rate and random numbers of its own, and with what the server shares."""
    images = load_images(str(npz))
    torch.manual_seed(0)
    objective = networks_of(kind, images.y_train, CPU)
    ready(objective)
    width = objective.online.module.encoder.width
    step, losses, dictionary = training.Step(objective, images.x_train, precision), [], torch.zeros(16, width)
    for client in range(3):
        dictionary.copy_(torch.randn(16, width, generator=torch.Generator().manual_seed(client)))
        objective.shared = dictionary
        objective.begin(client, 3)
        step.generator.manual_seed(seed_of(0, client))
        batches = training.local_batches(torch.arange(40) + 12 * client, 1, 8, step.generator, objective.batches)
        losses.append(training.local_training(step, batches, 0.01 * (client + 1)).item())
        objective.take_shared()
    return objective.parts, losses


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_serves_all_clients(npz, graphs, monkeypatch, kind, precision):
    parts, losses = train_three_clients(kind, npz, precision)
    assert len(graphs) == 1
    monkeypatch.setattr(training, "GRAPHS_ON", "cuda")
    expected, expected_losses = train_three_clients(kind, npz, precision)
    assert len(graphs) == 1 and len(set(losses)) == 3
    assert losses == expected_losses
    for name in expected:
        assert torch.equal(parts[name], expected[name]), name


def test_a_graph_that_holds_something_else_is_captured_anew(npz, graphs):
    """The moving average's decay is a number inside the graph, and the dictionary that clients share lies elsewhere in each round."""
    images = load_images(str(npz)).x_train
    step = training.Step(networks_of("simclr"), images)

    def train(ema_decay: float) -> int:
        training.local_training(step, torch.arange(40).split(8), 0.01, ema_decay)
        return len(graphs)

    assert [train(0.0), train(0.99), train(0.99)] == [1, 2, 2]
    step.networks.shared = torch.zeros(4, 256)
    assert [train(0.99), train(0.99)] == [3, 3]
