"""Networks as flat vectors, and the objective that a client trains.

| word            | paper (FedU, section 3)                                                              |
|-----------------|--------------------------------------------------------------------------------------|
| encoder         | f: backbone and projector; "encoder" always includes the projector                    |
| online_encoder  | f_theta, trained by gradient                                                          |
| target_encoder  | f_xi, the exponential moving average of f_theta; no gradient reaches it               |
| predictor       | p_theta, on top of the online encoder                                                 |
| ema_decay       | m                                                                                     |
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

import ops

# hidden and output width of projector and predictor
HEADS = {"resnet18": (4096, 2048), "resnet50": (4096, 2048), "small": (512, 256), "tiny": (512, 256)}
ENCODERS = tuple(HEADS)
WIDTHS = {"small": (32, 64, 128, 256), "tiny": (16, 32, 64, 128)}


# ----------------------------------------------------------------------------------------------------- networks


def build_backbone(name: str) -> nn.Module:
    """An untrained backbone, images `[B, 3, S, S]` -> features `[B, d]`, d = 128 to 2048 in PyTorch's default initialisation."""
    if name in WIDTHS:
        return plain_backbone(WIDTHS[name])
    import torchvision  # here, since the plain encoders do without

    backbone = getattr(torchvision.models, name)()
    # CIFAR's stem: 3x3, stride 1, no max-pool
    backbone.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    backbone.maxpool = backbone.fc = nn.Identity()
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()  # torchvision's own initialisation is another one
    return backbone


def plain_backbone(widths: tuple[int, ...]) -> nn.Sequential:
    """3x3 convolutions of stride 2 with BatchNorm and ReLU: encoders for CPU work, `small` of 3.8 and `tiny` of 1.0 million MACs."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((3, *widths)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def feature_dim(backbone: nn.Module) -> int:
    """d, the width of the backbone's features."""
    return [m.num_features for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)][-1]


def build_head(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """The projector's and the predictor's form: Linear - BN - ReLU - Linear."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, outputs))


class Encoder(nn.Module):
    """Backbone and projector, images `[B, 3, S, S]` -> projections `[B, HEADS[name][1]]`."""

    def __init__(self, name: str):
        super().__init__()
        self.backbone = build_backbone(name)
        self.projector = build_head(feature_dim(self.backbone), *HEADS[name])

    def forward(self, images: Tensor) -> Tensor:
        return self.projector(self.backbone(images))


# ------------------------------------------------------------------------------------------------- flat vectors


class Segment(NamedTuple):
    """A parameter's place in its network's vector: `vector[begin:end]`."""

    name: str
    begin: int
    end: int


class Part(NamedTuple):
    """The state of a network, or of a piece of one: parameters `[P]`, BatchNorm's running statistics `[Q]` and batch counters `[C]`.

    Rows of several clients make `[K, P]`, `[K, Q]`, `[K, C]`. Slices of a `Flat` are views: writing to them changes the network.
    """

    vector: Tensor
    buffers: Tensor
    counters: Tensor

    def clone(self) -> Part:
        return Part(*(t.clone() for t in self))

    def copy_(self, other: Part) -> None:
        for mine, theirs in zip(self, other):
            mine.copy_(theirs)

    def zero_rows(self, rows: int) -> Part:
        return Part(*(t.new_zeros(rows, len(t)) for t in self))

    def row(self, k: int) -> Part:
        return Part(*(t[k] for t in self))

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self)


def in_memory_order(tensor: Tensor) -> Tensor:
    """A tensor with its axes in the order in which a Flat lays them out: channels last for images and convolutions."""
    return tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor


def shaped_like(tensor: Tensor, piece: Tensor) -> Tensor:
    """A piece of a Flat's vector as a view of the tensor's shape."""
    view = piece.view(in_memory_order(tensor).shape)
    return view.permute(0, 3, 1, 2) if tensor.ndim == 4 else view


class Flat:
    """A module whose parameters are views into one contiguous float32 vector, and its float buffers into a second one.

    `state` holds them with the integer batch counters; `segments` names each parameter's place. With `trainable`, `weight` is the
    vector as a single Parameter whose gradient the modules' own gradients are views of, so an optimizer sees one tensor.
    A convolution's weights lie there channels-last, the order in which a channels-last convolution reads them and gives their gradient.
    Moving the module or assigning a parameter's `.data` would break the views; `check_views` asserts that nothing did.
    """

    def __init__(self, module: nn.Module, trainable: bool = True):
        self.module = module.requires_grad_(trainable)
        self.parameters = dict(module.named_parameters())
        floats = [b for b in module.buffers() if b.is_floating_point()]
        counters = [b for b in module.buffers() if not b.is_floating_point()]
        kinds = (self.parameters.values(), floats, counters)
        self.state = Part(*(torch.cat([in_memory_order(t.detach()).flatten() for t in tensors]) for tensors in kinds))
        for vector, tensors in zip(self.state, kinds):
            for tensor, piece in zip(tensors, vector.split([t.numel() for t in tensors])):
                tensor.data = shaped_like(tensor, piece)
        ends = torch.tensor([0] + [p.numel() for p in self.parameters.values()]).cumsum(0).tolist()
        self.segments = [Segment(name, *span) for name, span in zip(self.parameters, pairwise(ends))]
        if trainable:
            self.weight = nn.Parameter(self.state.vector)
            self.weight.grad = torch.zeros_like(self.state.vector)
            for (_, begin, end), p in zip(self.segments, self.parameters.values()):
                p.grad = shaped_like(p, self.weight.grad[begin:end])

    def check_views(self) -> None:
        for (name, begin, _), p in zip(self.segments, self.parameters.values()):
            assert p.data_ptr() == self.state.vector[begin:].data_ptr(), f"{name} is no longer a view into the network's vector"
            if p.grad is not None:
                assert p.grad.data_ptr() == self.weight.grad[begin:].data_ptr(), f"the gradient of {name} is no longer a view"


def conv_segments(network: Flat) -> list[Segment]:
    """The segments that the authors' divergence averages over: the stem and each block's convolutions, no shortcut's.

    17 for ResNet-18, 49 for ResNet-50 (the authors sum over names that contain "conv"; torchvision calls a shortcut "downsample").
    """
    modules = network.module.named_modules()
    convs = {f"{name}.weight" for name, m in modules if isinstance(m, nn.Conv2d) and "downsample" not in name}
    return [segment for segment in network.segments if segment.name in convs]


# --------------------------------------------------------------------------------------------------- objectives


class Online(nn.Module):
    """p(f(x)): the encoder with the predictor on top."""

    def __init__(self, name: str):
        super().__init__()
        self.encoder = Encoder(name)
        self.predictor = build_head(HEADS[name][1], *HEADS[name])

    def forward(self, images: Tensor) -> Tensor:
        return self.predictor(self.encoder(images))


class BYOL:
    """Bootstrap your own latent (Grill et al. 2020): the online network predicts the target network's projection of the other view.

    `parts` are the states that a client and the server exchange or keep: encoder, predictor and target, as views.
    """

    def __init__(self, name: str, device: torch.device, ema_decay: float):
        online = Online(name).to(device)
        self.ema_decay = ema_decay
        self.online = Flat(online)
        self.target = Flat(copy.deepcopy(online.encoder), trainable=False)
        ends = [len(t) for t in self.target.state]  # in the online network's vectors the encoder comes first
        encoder = Part(*(t[:end] for t, end in zip(self.online.state, ends)))
        predictor = Part(*(t[end:] for t, end in zip(self.online.state, ends)))
        self.parts = {"encoder": encoder, "predictor": predictor, "target": self.target.state}

    def terms(self, view1: Tensor, view2: Tensor, shared_target: bool = False) -> list[Callable[[], Tensor]]:
        """The loss, in [0, 8], as its two directions, each to be computed and differentiated before the next: one's activations at a time.

        view1, view2: `[B, 3, S, S]`, each in a forward pass of its own, so that BatchNorm's statistics are per view.
        `shared_target`: the target is the online encoder itself, as in the authors' code in a client's first round.
        """
        target = self.online.module.encoder if shared_target else self.target.module
        return [partial(self.direction, target, a, b) for a, b in ((view1, view2), (view2, view1))]

    def direction(self, target: nn.Module, view: Tensor, other: Tensor) -> Tensor:
        """`mean(2 - 2 cos(p(f_theta(view)), f_xi(other)))`."""
        with torch.no_grad():
            projection = target(other)
        return 2 - 2 * cosine_similarity(self.online.module(view), projection).mean()

    @torch.no_grad()
    def update_target(self) -> None:
        """`xi <- m xi + (1 - m) theta`, over parameters only."""
        ops.ema_(self.target.state.vector, self.parts["encoder"].vector, self.ema_decay)
