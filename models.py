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
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

import ops

# hidden and output width of projector and predictor
HEADS = {"resnet18": (4096, 2048), "resnet50": (4096, 2048), "resnet18-narrow": (512, 256), "small": (512, 256), "tiny": (512, 256)}
WIDTHS = {"small": (32, 64, 128, 256), "tiny": (16, 32, 64, 128)}


# ----------------------------------------------------------------------------------------------------- networks


def build_backbone(name: str) -> nn.Module:
    """An untrained backbone, images `[B, 3, S, S]` -> features `[B, d]`, d = 128 to 2048 in PyTorch's default initialisation."""
    if name in WIDTHS:
        return plain_backbone(WIDTHS[name])
    import torchvision  # imported here, since the plain encoders do not need it

    name, _, narrow = name.partition("-")
    backbone = getattr(torchvision.models, name)()
    # CIFAR's stem: 3x3, stride 1, no max-pool
    backbone.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    backbone.maxpool = backbone.fc = nn.Identity()
    if narrow:
        quarter_width(backbone)
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()  # torchvision initialises convolutions differently
    return backbone


def quarter_width(backbone: nn.Module) -> None:
    """Cut the channels of each convolution and BatchNorm to a quarter; the first convolution keeps its three input channels."""
    for parent in list(backbone.modules()):
        for name, m in list(parent.named_children()):
            if isinstance(m, nn.Conv2d):
                inputs = m.in_channels // 4 or m.in_channels
                setattr(parent, name, nn.Conv2d(inputs, m.out_channels // 4, m.kernel_size, m.stride, m.padding, bias=False))
            elif isinstance(m, nn.BatchNorm2d):
                setattr(parent, name, nn.BatchNorm2d(m.num_features // 4))


def plain_backbone(widths: tuple[int, ...]) -> nn.Sequential:
    """3x3 convolutions of stride 2 with BatchNorm and ReLU: encoders for CPU work, `small` of 3.8 and `tiny` of 1.0 million MACs."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((3, *widths)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def feature_dim(backbone: nn.Module) -> int:
    """d, the width of the backbone's features."""
    return [m.num_features for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)][-1]


def build_head(inputs: int, *widths: int) -> nn.Module:
    """The projector's and the predictor's form: Linear - BN - ReLU - Linear of widths (hidden, out), or one Linear of width (out,)."""
    if len(widths) == 1:
        return nn.Linear(inputs, *widths)
    hidden, outputs = widths
    return nn.Sequential(nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, outputs))


class Encoder(nn.Module):
    """Backbone and projector, images `[B, 3, S, S]` -> projections `[B, head[-1]]`.

    head: the projector's widths, hidden and out or out alone, by default `HEADS[name]`; 0 is the width of the backbone's features.
    """

    def __init__(self, name: str, head: Sequence[int] = ()):
        super().__init__()
        self.backbone = build_backbone(name)
        width = feature_dim(self.backbone)
        self.head = tuple(w or width for w in head or HEADS[name])
        self.projector = build_head(width, *self.head)

    def forward(self, images: Tensor) -> Tensor:
        return self.projector(self.backbone(images))


# ------------------------------------------------------------------------------------------------- flat vectors


class Segment(NamedTuple):
    """A parameter's place in its network's vector: `vector[begin:end]`."""

    name: str
    begin: int
    end: int


class Flat:
    """A module whose parameters and BatchNorm statistics are views into one contiguous float32 vector: writing to either changes both.

    `vector` is `[buffers | parameters | buffers of top]`, where `top` is the last piece of the module: with an encoder and a predictor
    on top of it, each of them is one slice. `weights` is the slice of the parameters, and `segments` names each one's place. BatchNorm's
    batch counters are left out: its momentum is fixed, so nothing reads them. A convolution's weights lie channels-last, the order in
    which a channels-last convolution reads them and gives their gradient.

    With `trainable`, `weight` is `vector[weights]` as a single Parameter whose gradient the modules' own gradients are views of, so an
    optimizer sees one tensor. Moving the module or assigning a parameter's `.data` would break the views; `check_views` asserts that
    nothing did.
    """

    def __init__(self, module: nn.Module, top: nn.Module | None = None, trainable: bool = True):
        self.module = module.requires_grad_(trainable)
        for m in module.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.num_batches_tracked = None
        parameters, last = dict(module.named_parameters()), list(top.buffers()) if top else []
        first = list(module.buffers())[: -len(last) or None]
        tensors = [*first, *parameters.values(), *last]
        self.vector = torch.cat([in_memory_order(t.detach()).flatten() for t in tensors])
        for tensor, piece in zip(tensors, self.vector.split([t.numel() for t in tensors])):
            tensor.data = shaped_like(tensor, piece)
        ends = [sum(b.numel() for b in first)]
        for p in parameters.values():
            ends.append(ends[-1] + p.numel())
        self.parameters, self.weights = parameters, slice(ends[0], ends[-1])
        self.segments = [Segment(name, *span) for name, span in zip(parameters, pairwise(ends))]
        if trainable:
            self.weight = nn.Parameter(self.vector[self.weights])
            self.weight.grad = torch.zeros_like(self.weight)
            for p, gradient in zip(parameters.values(), self.weight.grad.split([p.numel() for p in parameters.values()])):
                p.grad = shaped_like(p, gradient)

    def check_views(self) -> None:
        for (name, begin, _), p in zip(self.segments, self.parameters.values()):
            assert p.data_ptr() == self.vector[begin:].data_ptr(), f"{name} is no longer a view into the network's vector"
            if p.grad is not None:
                gradient = self.weight.grad[begin - self.weights.start :]
                assert p.grad.data_ptr() == gradient.data_ptr(), f"the gradient of {name} is no longer a view"


def in_memory_order(tensor: Tensor) -> Tensor:
    """A tensor with its axes in the order in which a Flat lays them out: channels last for images and convolutions."""
    return tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor


def shaped_like(tensor: Tensor, piece: Tensor) -> Tensor:
    """A piece of a Flat's vector as a view of the tensor's shape."""
    view = piece.view(in_memory_order(tensor).shape)
    return view.permute(0, 3, 1, 2) if tensor.ndim == 4 else view


def conv_segments(network: Flat) -> list[Segment]:
    """The segments that the authors' divergence averages over: the stem and each block's convolutions, no shortcut's.

    17 for ResNet-18, 49 for ResNet-50 (the authors sum over names that contain "conv"; torchvision calls a shortcut "downsample").
    """
    modules = network.module.named_modules()
    convs = {f"{name}.weight" for name, m in modules if isinstance(m, nn.Conv2d) and "downsample" not in name}
    return [segment for segment in network.segments if segment.name in convs]


# --------------------------------------------------------------------------------------------------- objectives


class Online(nn.Module):
    """p(f(x)): the encoder with the predictor on top, if there is one."""

    def __init__(self, encoder: Encoder, predictor: bool):
        super().__init__()
        self.encoder = encoder
        self.predictor = build_head(encoder.head[-1], *encoder.head) if predictor else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.predictor(self.encoder(images))


class Objective:
    """What a client minimises on two views of its images, and the networks that it needs for that.

    `parts` are the pieces that a client and the server exchange or keep, as views. `encoder` and `predictor` make up the online network;
    the predictor is empty where the objective has none. `own` has an entry for each part that an objective adds: its content in a
    client's first round. `trained` are the tensors that the optimizer sees. `jitter` is the strength of the colour jitter that its views
    are drawn with.
    """

    jitter = 1.0

    def __init__(self, encoder: Encoder, device: torch.device, predictor: bool = False):
        module = Online(encoder, predictor).to(device)
        self.online = Flat(module, module.predictor)
        end = sum(t.numel() for t in encoder.state_dict().values())
        self.parts = {"encoder": self.online.vector[:end], "predictor": self.online.vector[end:]}
        weights = self.online.weights
        # where in each part its parameters lie: BatchNorm's statistics come before the encoder's, and after the predictor's
        self.weights = {"encoder": slice(weights.start, end), "predictor": slice(0, weights.stop - end)}
        self.own: dict[str, Tensor] = {}
        self.trained = [self.online.weight]
        self.following: Tensor | None = None  # a target encoder's weights: `xi <- m xi + (1 - m) theta` after each step of SGD
        self.shared = torch.empty(0, 0, device=device)  # what clients shared through the server in the last round

    def networks(self) -> list[Tensor]:
        """All that training changes, as views."""
        return [self.online.vector, *(self.parts[name] for name in self.own)]

    def compile(self) -> None:
        """Let torch.compile fuse what lies between the networks' convolutions and products, once each network is first used."""
        for network in self.online.module.children():
            network.compile()

    def check_views(self) -> None:
        """Assert that the networks still are views into their vectors."""
        self.online.check_views()

    def terms(self, view1: Tensor, view2: Tensor, batch: Tensor) -> list[Callable[[], Tensor]]:
        """The loss as terms, each to be computed and differentiated before the next, so that only one term's activations are in memory.

        view1, view2: `[B, 3, S, S]`, of the images whose indices are `batch`, `[B]`.
        """
        raise NotImplementedError

    @torch.no_grad()
    def update(self, lr: Tensor, momentum: float, weight_decay: float, ema_decay: float) -> None:
        """After backward(): a step of SGD, of the target's moving average, and of the momentum, which is the gradient's own tensor.

        lr: float64 `[]`, on the networks' device. See `ops.sgd_ema_`.
        """
        ops.sgd_ema_(
            self.online.weight, self.online.weight.grad, self.following, lr,
            momentum=momentum, weight_decay=weight_decay, ema_decay=ema_decay,
        )  # fmt: skip

    def newest_representations(self, rows: int) -> Tensor:
        """After local training: what a client shares besides its networks, at most `rows` rows; nothing in most objectives."""
        return self.shared[:0]


class WithTarget(Objective):
    """An objective with a target encoder f_xi, which follows the online encoder and gets no gradient."""

    def __init__(self, encoder: Encoder, device: torch.device, predictor: bool = False, stop_gradient: bool = True):
        target = copy.deepcopy(encoder).to(device)
        super().__init__(encoder, device, predictor)
        self.stop_gradient = stop_gradient
        self.target = Flat(target, trainable=not stop_gradient)
        self.parts["target"] = self.target.vector
        self.weights["target"] = self.target.weights
        self.own["target"] = self.parts["encoder"]  # a copy of what the client received
        if stop_gradient:
            self.following = self.target.vector[self.target.weights]
        else:
            self.trained.append(self.target.weight)

    def compile(self) -> None:
        super().compile()
        self.target.module.compile()

    def check_views(self) -> None:
        super().check_views()
        self.target.check_views()

    def project(self, view: Tensor) -> Tensor:
        """The target encoder's projection of a view."""
        with torch.set_grad_enabled(not self.stop_gradient):
            return self.target.module(view)

    @torch.no_grad()
    def update(self, lr: Tensor, momentum: float, weight_decay: float, ema_decay: float) -> None:
        super().update(lr, momentum, weight_decay, ema_decay)
        if not self.stop_gradient:  # the target has a step of its own, and only then follows
            weight, gradient = self.target.weight, self.target.weight.grad
            ops.sgd_ema_(weight, gradient, None, lr, momentum=1, weight_decay=0, ema_decay=0)
            ops.ema_(weight, self.parts["encoder"][self.weights["encoder"]], ema_decay)
            gradient.mul_(momentum).add_(weight, alpha=weight_decay)


class BYOL(WithTarget):
    """Bootstrap your own latent (Grill et al. 2020): the online network predicts the target network's projection of the other view.

    The loss, in [0, 8], has two directions: `mean(2 - 2 cos(p(f_theta(x1)), f_xi(x2)))` and the same with the views exchanged. Each view
    has forward passes of its own, so that BatchNorm's statistics are per view.
    """

    def __init__(self, encoder: Encoder, device: torch.device, predictor: bool = True, stop_gradient: bool = True):
        super().__init__(encoder, device, predictor, stop_gradient)

    def terms(self, view1: Tensor, view2: Tensor, batch: Tensor) -> list[Callable[[], Tensor]]:
        return [partial(self.direction, view1, view2), partial(self.direction, view2, view1)]

    def direction(self, view: Tensor, other: Tensor) -> Tensor:
        projection = self.project(other)
        return 2 - 2 * cosine_similarity(self.online.module(view), projection).mean()


class SimSiam(Objective):
    """SimSiam (Chen and He 2021): the online network predicts its own projection of the other view; the loss is in [-1, 1]."""

    def __init__(self, encoder: Encoder, device: torch.device, predictor: bool = True, stop_gradient: bool = True):
        super().__init__(encoder, device, predictor)
        self.stop_gradient = stop_gradient

    def terms(self, view1: Tensor, view2: Tensor, batch: Tensor) -> list[Callable[[], Tensor]]:
        return [partial(self.loss, view1, view2)]

    def loss(self, view1: Tensor, view2: Tensor) -> Tensor:
        encoder, predictor = self.online.module.encoder, self.online.module.predictor
        z1, z2 = encoder(view1), encoder(view2)
        p1, p2 = predictor(z1), predictor(z2)
        if self.stop_gradient:
            z1, z2 = z1.detach(), z2.detach()
        return -(cosine_similarity(p1, z2) + cosine_similarity(p2, z1)).mean() / 2


class SimCLR(Objective):
    """NT-Xent (Chen et al. 2020): each view finds the other of its image among the batch's `2B - 1`; one forward pass for both views."""

    def __init__(self, encoder: Encoder, device: torch.device, temperature: float = 0.07):
        super().__init__(encoder, device)
        self.temperature = temperature

    def terms(self, view1: Tensor, view2: Tensor, batch: Tensor) -> list[Callable[[], Tensor]]:
        return [partial(self.loss, view1, view2)]

    def loss(self, view1: Tensor, view2: Tensor) -> Tensor:
        return self.contrast(normalize(self.online.module(torch.cat([view1, view2]))))

    def contrast(self, z: Tensor, negatives: Tensor | None = None) -> Tensor:
        """NT-Xent of unit vectors `[2B, d]`, the first view's and then the second's, with more negatives `[N, d]` for each."""
        n = len(z)
        logits = (z @ z.T / self.temperature).masked_fill(torch.eye(n, dtype=torch.bool, device=z.device), float("-inf"))
        if negatives is not None:
            logits = torch.cat([logits, z @ negatives.T / self.temperature], 1)
        return cross_entropy(logits, torch.arange(n, device=z.device).roll(n // 2))


class FedCA(SimCLR):
    """FedCA (Zhang et al. 2020, arXiv 2010.08982), made from its abstract, since there is no public code.

    From the abstract: a dictionary of all clients' representations, shared through the server, keeps their spaces consistent, and an
    alignment module draws each client to a base model trained on public data. Our choices: the dictionary holds the newest unit-length
    projections of each client, which are further negatives of NT-Xent in the next round; alignment is `mean(1 - cos(f(x), base(x)))` on
    public images, unaugmented and as many as the batch has, with weight 1; the base model is SimCLR's on these images.
    """

    def __init__(self, encoder: Encoder, device: torch.device):
        super().__init__(encoder, device)
        self.newest = torch.zeros(4096, encoder.head[-1], device=device)  # rows of zeros are not filled yet
        self.public = self.base = torch.empty(0, device=device)

    def align(self, public: Tensor, base: Tensor) -> None:
        """public: uint8 `[N, 3, S, S]`; base: the base model's projections of them, `[N, d]`."""
        self.public, self.base = public, base

    def terms(self, view1: Tensor, view2: Tensor, batch: Tensor) -> list[Callable[[], Tensor]]:
        return [*super().terms(view1, view2, batch), partial(self.alignment, batch % len(self.public))]

    def loss(self, view1: Tensor, view2: Tensor) -> Tensor:
        z = normalize(self.online.module(torch.cat([view1, view2])))
        self.newest.copy_(torch.cat([z.detach(), self.newest])[: len(self.newest)])
        return self.contrast(z, self.shared if len(self.shared) else None)

    def alignment(self, chosen: Tensor) -> Tensor:
        images = self.public[chosen].float().div_(255).contiguous(memory_format=torch.channels_last)
        return (1 - cosine_similarity(self.online.module(images), self.base[chosen])).mean()

    def newest_representations(self, rows: int) -> Tensor:
        newest = self.newest[self.newest.any(1)][:rows]
        self.newest.zero_()
        return newest


class MoCo(WithTarget):
    """Momentum contrast (He et al. 2020), both directions: a query finds its key, of the other view, among a queue of former keys.

    The key encoder is the target encoder, and stays with the client as the queue does. A queue holds 4,096 unit vectors.
    """

    def __init__(self, encoder: Encoder, device: torch.device, temperature: float, jitter: float = 1.0, queue: int = 4096):
        super().__init__(encoder, device)
        self.temperature, self.jitter, self.keys = temperature, jitter, []
        start = normalize(torch.randn(queue, encoder.head[-1])).to(device)
        self.own["queue"] = start.flatten()
        self.parts["queue"] = self.own["queue"].clone()
        self.queue = self.parts["queue"].view(start.shape)

    def terms(self, view1: Tensor, view2: Tensor, batch: Tensor) -> list[Callable[[], Tensor]]:
        return [partial(self.direction, view1, view2), partial(self.direction, view2, view1)]

    def direction(self, view: Tensor, other: Tensor) -> Tensor:
        query, key = normalize(self.online.module(view)), normalize(self.project(other))
        self.keys.append(key)
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ self.queue.T], 1) / self.temperature
        return cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))

    @torch.no_grad()
    def update(self, lr: Tensor, momentum: float, weight_decay: float, ema_decay: float) -> None:
        """A step as above; then the batch's keys replace the queue's oldest."""
        super().update(lr, momentum, weight_decay, ema_decay)
        self.queue.copy_(torch.cat([*self.keys, self.queue])[: len(self.queue)])
        self.keys.clear()


class Supervised(Objective):
    """Cross-entropy of the first view with its label; the projector is the classifier. An upper bound; it alone reads labels."""

    def __init__(self, encoder: Encoder, device: torch.device, labels: Tensor):
        super().__init__(encoder, device)
        self.labels = labels

    def terms(self, view1: Tensor, view2: Tensor, batch: Tensor) -> list[Callable[[], Tensor]]:
        return [lambda: cross_entropy(self.online.module(view1), self.labels[batch])]


# each is built from the encoder's name, the device, and the images' labels, which only `supervised` reads
OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "byol": lambda name, device, labels, **ablation: BYOL(Encoder(name), device, **ablation),
    "simsiam": lambda name, device, labels, **ablation: SimSiam(Encoder(name), device, **ablation),
    "simclr": lambda name, device, labels: SimCLR(Encoder(name), device),
    "fedca": lambda name, device, labels: FedCA(Encoder(name), device),
    "moco-v1": lambda name, device, labels: MoCo(Encoder(name, (128,)), device, temperature=0.07, jitter=0.5),
    "moco-v2": lambda name, device, labels: MoCo(Encoder(name, (0, 128)), device, temperature=0.2),
    "supervised": lambda name, device, labels: Supervised(Encoder(name, (int(labels.max()) + 1,)), device, labels),
}
