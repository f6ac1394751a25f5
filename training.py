"""Stage 1 of a round, local training: the step and its CUDA graph, the batches, and the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data import random_views, seed_of
from methods import described, place, unfit
from models import Objective
from options import VIEWS, Options
from runtime.cli import InputError, first_line
from runtime.device import GRAPHS_ON, StepGraph, release_memory

if TYPE_CHECKING:
    from federation import Federation
    from report.progress import Progress


class Step:
    """A step of local training: two views of a batch, the gradient of their loss, and the update of the networks.

    images: uint8 `[N, 3, S, S]`; a batch is an index into them, and `views` draws two or more of its views from `generator`. momentum,
    weight_decay: SGD's, for all parameters. `lr` and `loss`, the sum of the losses so far, are scalars on the device. Every tensor that a
    step touches keeps its address from client to client, so that one CUDA graph serves all clients.
    """

    def __init__(
        self, networks: Objective, images: Tensor, precision: str = "fp32", views: Callable[..., tuple[Tensor, ...]] = random_views,
        momentum: float = 0.9, weight_decay: float = 5e-4,
    ):  # fmt: skip
        self.networks, self.images, self.precision, self.views = networks, images, precision, views
        self.momentum, self.weight_decay = momentum, weight_decay
        device = images.device
        self.generator = None if device.type == "meta" else torch.Generator(device)  # the meta device has none, and draws nothing
        self.lr, self.loss = torch.zeros((), dtype=torch.float64, device=device), torch.zeros((), device=device)
        self.ema_decay = 0.99
        self.graph: StepGraph | None = None
        self.captured: tuple = ()  # what the graph was captured with
        networks.view = lambda batch: self.draw(batch, 1)[0]

    def draw(self, batch: Tensor, count: int) -> list[Tensor]:
        """Views of the images of a batch, each `[B, 3, S, S]`."""
        views = self.views(self.images[batch], self.generator, count)
        return [view.contiguous(memory_format=torch.channels_last) for view in views]

    def __call__(self, batch: Tensor) -> None:
        view1, view2 = self.draw(batch if batch.ndim == 1 else batch[0], 2)
        with self.in_bf16():  # around all terms, so that a weight is cast once for them
            for term in terms_of(self.networks, view1, view2, batch, self.generator):
                loss = term()
                if not isinstance(loss, Tensor) or loss.shape:
                    raise wrong_terms(self.networks, f"a term gives {described(loss)}")
                if not loss.requires_grad:
                    raise wrong_terms(self.networks, "a term has no gradient")
                with self.in_bf16(False):
                    differentiate(self.networks, loss)
                self.loss.add_(loss.detach())
        self.networks.update(self.lr, self.momentum, self.weight_decay, self.ema_decay)

    def in_bf16(self, enabled: bool = True) -> AbstractContextManager:
        """Autocast to bf16 if that is the precision; `enabled=False` switches it off inside such a block."""
        bf16 = self.precision == "bf16"
        return torch.autocast(self.images.device.type, torch.bfloat16, enabled) if bf16 else nullcontext()

    def launcher(self) -> AbstractContextManager[Callable[[Tensor], None]]:
        """The callable to feed batches to: the step, or on a GPU its graph, which is captured anew only if what it holds changed."""
        if self.images.device.type != GRAPHS_ON:
            return nullcontext(self)
        holds = (self.ema_decay, self.networks.shared.data_ptr(), self.networks.shared.shape)
        if self.captured != holds:
            self.graph, self.captured = StepGraph(self, self.generator), holds
        return self.graph


def terms_of(networks: Objective, *batch: Tensor | torch.Generator | None) -> list[Callable[[], Tensor]]:
    """The loss's terms. Raises InputError if they are no list of functions, as may be in a method of one's own."""
    terms = networks.losses(*batch)
    if not (isinstance(terms, list) and all(map(callable, terms))):
        raise wrong_terms(networks, f"it returns {type(terms).__name__}")
    return terms


def differentiate(networks: Objective, loss: Tensor) -> None:
    """backward(). In a method of one's own its errors, such as that of a changed activation, are an InputError: they name no line."""
    try:
        loss.backward()
    except RuntimeError as error:
        if type(networks).__module__.startswith("methods."):
            raise
        raise wrong_terms(networks, f"the gradient of one cannot be computed ({first_line(error)})") from error


def wrong_terms(networks: Objective, what: str) -> InputError:
    name = type(networks).__name__
    return InputError(
        f"{place(type(networks).terms)}: {name}.terms needs a list of functions, each of a number with a gradient, and {what}"
    )


def local_training(step: Step, batches: Iterable[Tensor], lr: float, ema_decay: float = 0.99, progress: Progress | None = None) -> Tensor:
    """Train the networks on a client's batches; returns the mean loss, `[]`, still on the device.

    SGD whose momentum starts from zero every round. No step makes the host wait for the device.
    """
    step.networks.check_views()
    step.lr.fill_(lr)
    step.loss.zero_()
    step.ema_decay, steps = ema_decay, 0
    for parameters in step.networks.trainable:  # backward() adds to this: momentum and gradient are one vector
        torch.mul(parameters.detach(), step.weight_decay, out=parameters.grad)
    with step.launcher() as run_step:
        for batch in batches:
            run_step(batch)
            steps += 1
            if progress is not None:
                progress.update()
    return step.loss / steps


def local_batches(
    indices: Tensor, epochs: int, batch_size: int, generator: torch.Generator | None, count: int = 1
) -> Iterator[Tensor]:  # fmt: skip
    """The batches of `epochs` shuffled passes over a client's images, as indices `[B]`; the last partial one of a pass is dropped.

    count: if it is not 1, each pass has so many orders, and a step gets a batch of each, `[count, B]`.
    """
    whole = len(indices) // batch_size * batch_size
    for _ in range(epochs):
        orders = [indices[torch.randperm(len(indices), generator=generator, device=indices.device)] for _ in range(count)]
        batches = [order[:whole].split(batch_size) for order in orders]
        yield from batches[0] if count == 1 else map(torch.stack, zip(*batches))


def train_client(
    options: Options, federation: Federation, progress: Progress | None, round_: int, client_id: int, first_round: bool, num_clients: int
) -> tuple[float, Tensor]:  # fmt: skip
    """Train the client whose networks are in the workspace `federation.networks`; returns its loss and what it shares `[N, d]`.

    first_round: whether this is the client's first. num_clients: how many train in this round. Random numbers are keyed by
    (seed, round, client), so the result is the same on any rank.
    """
    networks, step = federation.networks, local_step(federation, options)
    networks.begin(client_id, num_clients)
    indices = next(client.indices for client in federation.clients if client.id == client_id)
    step.generator.manual_seed(seed_of(options.seed, "training", round_, client_id))
    batches = local_batches(indices, options.local_epochs, options.batch_size, step.generator, networks.batches)
    ema_decay = 0.0 if options.first_target == "shared" and first_round else options.ema_decay
    loss = local_training(step, batches, cosine(options.lr, round_, options.rounds), ema_decay, progress).item()
    shared = networks.take_shared()
    if not isinstance(shared, Tensor) or shared.ndim != 2:
        raise unfit(type(networks).take_shared, f"gives {described(shared)}, needs rows [N, d]")
    release_memory()
    return loss, shared


def local_step(federation: Federation, options: Options) -> Step:
    """The step that all clients share, made when it is first needed."""
    if federation.step is None:
        federation.step = make_step(federation.networks, federation.images, options)
    return federation.step


def make_step(networks: Objective, images: Tensor, options: Options) -> Step:
    views = views_of(options.settings, options.views and options.views.content)
    return Step(networks, images, options.precision, views, options.momentum, options.weight_decay)


def views_of(settings: Mapping[str, float], own: Callable | None = None) -> Callable[..., Sequence[Tensor]]:
    """What draws a run's views, see `random_views`: by settings, whose default counts where there is none, or the user's function."""
    return partial(own_views, own) if own else partial(random_views, **{k: settings.get(k, s.default) for k, s in VIEWS.items()})


def own_views(view: Callable, images: Tensor, generator: torch.Generator | None, count: int = 2) -> list[Tensor]:
    """As `random_views`, by a user's function. Raises InputError if it gives something else."""
    views = [view(images, generator) for _ in range(count)]
    for made in views:
        if not isinstance(made, Tensor) or made.shape != images.shape or made.dtype != torch.float32 or made.device != images.device:
            raise InputError(f"{place(view)}: view gives {described(made)}, needs float32 {list(images.shape)} on {images.device}")
    return views


def prepare(federation: Federation, options: Options) -> None:
    """Let the objective prepare itself on the public images, before the first round (see `Objective.prepare`)."""

    def train(objective: Objective, images: Tensor) -> None:
        step, indices = make_step(objective, images, options), torch.arange(len(images), device=images.device)
        step.generator.manual_seed(seed_of(options.seed, "public"))
        epochs = options.rounds * options.local_epochs
        batches = local_batches(indices, epochs, options.batch_size, step.generator, objective.batches)
        local_training(step, batches, options.lr)

    if len(federation.public):
        federation.networks.prepare(federation.images[federation.public], train)


def num_steps(num_examples: int, batch_size: int, epochs: int) -> int:
    """Number of SGD steps that a client takes in one round."""
    return num_examples // batch_size * epochs


def cosine(lr0: float, round_: int, rounds: int) -> float:
    """`lr0 (1 + cos(pi r / R)) / 2`: cosine over rounds, constant inside a round."""
    return lr0 * (1 + math.cos(math.pi * round_ / rounds)) / 2
