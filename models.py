"""Networks as flat vectors, the base of all objectives, and encoder.pt. The objectives themselves are in methods/, a file each.

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
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import torch
from torch import Tensor, nn

import ops
from images import note
from runtime.cli import InputError, first_line, nearest, write_atomic

# hidden and output width of projector and predictor
HEADS = {"resnet18": (4096, 2048), "resnet50": (4096, 2048), "resnet18-narrow": (512, 256), "small": (512, 256), "tiny": (512, 256)}
VERSION = "1.0.0"  # of this repository, as exported encoders name it
WIDTHS = {"small": (32, 64, 128, 256), "tiny": (16, 32, 64, 128)}


# ----------------------------------------------------------------------------------------------------- networks


def build_backbone(name: str, norm: str = "batch", image_size: int = 32) -> nn.Module:
    """An untrained backbone, images `[B, 3, S, S]` -> features `[B, d]`, d = 128 to 2048 in PyTorch's default initialisation.

    name: a key of HEADS, or `timm:NAME`, see `timm_backbone`, to which image_size matters. norm: `batch`, or `group` for GroupNorm (Wu and
    He 2018): 32 groups in ResNets of full width, 16 channels a group in narrower encoders.
    """
    if name.startswith("timm:"):
        return timm_backbone(name, image_size)
    backbone = plain_backbone(WIDTHS[name]) if name in WIDTHS else cifar_resnet(name)
    for parent in list(backbone.modules()) if norm == "group" else ():
        for child, m in list(parent.named_children()):
            if isinstance(m, nn.BatchNorm2d):
                groups = 32 if name in ("resnet18", "resnet50") else m.num_features // 16
                setattr(parent, child, nn.GroupNorm(groups, m.num_features))
    return backbone


def cifar_resnet(name: str) -> nn.Module:
    """torchvision's ResNet with the stem for small images; `-narrow` has a quarter of the channels."""
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


def timm_backbone(name: str, image_size: int) -> nn.Module:
    """An untrained model of the package timm, initialised by it, without classifier and without dropout, for images of `image_size` pixels.

    Its `feature_width` is d. Raises InputError if timm is missing, has no such model, or if the model cannot take such images.
    """
    try:
        import timm
    except ImportError:
        raise InputError(f"the encoder {name} needs the package timm: `pip install -r requirements-optional.txt`") from None
    model = name.removeprefix("timm:")
    if not timm.is_model(model):
        raise InputError(f"timm {timm.__version__} has no model {model!r} for the encoder {name}{nearest(model, timm.list_models())}")
    try:
        try:
            backbone = timm.create_model(model, num_classes=0, img_size=image_size)
        except TypeError:  # a network for images of any size
            backbone = timm.create_model(model, num_classes=0)
        sides = getattr(getattr(backbone, "patch_embed", None), "patch_size", (1,))
        if any(image_size % side for side in ([sides] if isinstance(sides, int) else sides)):  # some of timm's would leave out a border
            raise InputError(f"the encoder {name} needs images whose side is a multiple of its patches', {sides}; these have {image_size}")
        with torch.no_grad():
            shape = backbone.eval()(torch.zeros(1, 3, image_size, image_size)).shape
    except InputError:
        raise
    except Exception as error:  # of many types
        raise InputError(f"the encoder {name} cannot take images of {image_size} pixels ({first_line(error)})") from None
    if len(shape) != 2:
        raise InputError(f"the encoder {name} gives features of shape {list(shape)} for an image, needs [1, d]")
    for module in backbone.modules():  # dropout draws from torch's generator, which is not keyed by round and client
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    backbone.feature_width = shape[1]
    return backbone.train()


def quarter_width(backbone: nn.Module) -> None:
    """Cut the channels of each convolution and BatchNorm to a quarter; the first convolution keeps its three input channels."""
    for parent in list(backbone.modules()):
        for name, m in list(parent.named_children()):
            if isinstance(m, nn.Conv2d):
                inputs = m.in_channels // 4 or m.in_channels
                setattr(parent, name, nn.Conv2d(inputs, m.out_channels // 4, m.kernel_size, m.stride, m.padding, bias=False))
            elif isinstance(m, nn.BatchNorm2d):
                setattr(parent, name, nn.BatchNorm2d(m.num_features // 4))


class Layers(nn.Sequential):
    """Layers one after the other, through which the views of a batch can go together, one behind the other.

    In training each view is normalised by its own BatchNorm statistics, and the running ones follow view after view: all is as with a pass
    for each view, but for rounding. BatchNorm and the ReLU behind it are one op.
    """

    def forward(self, x: Tensor, views: int = 1) -> Tensor:
        """x: `[views B, ...]`."""
        if not self.training:
            return super().forward(x)
        normalised = False
        for layer, following in pairwise([*self, None]):
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                statistics, relu = (layer.running_mean, layer.running_var), isinstance(following, nn.ReLU)
                x = ops.batch_norm(x, layer.weight, layer.bias, *statistics, views=views, momentum=layer.momentum, eps=layer.eps, relu=relu)
            elif not (normalised and isinstance(layer, nn.ReLU)):
                x = layer(x)
            normalised = isinstance(layer, nn.modules.batchnorm._BatchNorm)
        return x


def pass_on(x: Tensor, module: nn.Module, views: int) -> Tensor:
    """A module's output. views: other modules than `Layers`, such as a single linear layer, treat all rows alike anyway."""
    return module(x, views) if isinstance(module, Layers) else module(x)


def plain_backbone(widths: tuple[int, ...]) -> Layers:
    """3x3 convolutions of stride 2 with BatchNorm and ReLU: encoders for CPU work, `small` of 3.8 and `tiny` of 1.0 million MACs."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((3, *widths)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return Layers(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def feature_dim(backbone: nn.Module) -> int:
    """d, the width of the backbone's features: of this project's encoders, the channels of the last convolution."""
    return getattr(backbone, "feature_width", None) or [m.out_channels for m in backbone.modules() if isinstance(m, nn.Conv2d)][-1]


def build_head(inputs: int, *layers: int | str) -> nn.Module:
    """A projector or a predictor, by its layers: a number is the width of a linear one, and between two widths lie BN and ReLU.

    (hidden, out) is Linear - BN - ReLU - Linear, and (hidden, "relu", out) the same without BN. "standardise" is a BN without parameters.
    """
    modules: list[nn.Module] = []
    for layer, following in zip(layers, (*layers[1:], "")):
        if layer == "relu":
            modules.append(nn.ReLU(inplace=True))
        elif layer == "standardise":
            modules.append(nn.BatchNorm1d(inputs, affine=False))
        else:
            modules.append(nn.Linear(inputs, layer))
            inputs = layer
            if isinstance(following, int):
                modules += [nn.BatchNorm1d(inputs), nn.ReLU(inplace=True)]
    return modules[0] if len(modules) == 1 else Layers(*modules)


class Encoder(nn.Module):
    """Backbone and projector, images `[B, 3, S, S]` -> projections `[B, width]`, of one view or of several, see `Layers`.

    head: the projector's layers, see `build_head`, by default `HEADS[name]`; of timm's, as ResNet-18's if there are as many features, else
    as the narrow encoders'. 0 is the width of the features. norm: of the backbone, see `build_backbone`; the heads keep BatchNorm, without
    which BYOL collapses. image_size: S of the images that it is trained on.
    """

    passed: list[Tensor] | None = None  # while it is a list, it gets the features of every view that passes, `[B, d]`

    def __init__(self, name: str, head: Sequence[int | str] = (), norm: str = "batch", image_size: int = 32):
        super().__init__()
        self.name, self.norm, self.image_size = name, norm, image_size
        self.backbone = build_backbone(name, norm, image_size)
        features = feature_dim(self.backbone)
        usual = HEADS.get(name) or HEADS["resnet18" if features >= 512 else "resnet18-narrow"]
        self.head = tuple(layer or features for layer in head or usual)
        self.width = next(layer for layer in reversed(self.head) if isinstance(layer, int))
        self.projector = build_head(features, *self.head)

    def forward(self, images: Tensor, views: int = 1) -> Tensor:
        features = pass_on(images, self.backbone, views)
        if self.passed is not None:
            self.passed += features.chunk(views)
        return pass_on(features, self.projector, views)


# ------------------------------------------------------------------------------------------------- flat vectors


class Segment(NamedTuple):
    """A parameter's place in its network's vector: `vector[begin:end]`."""

    name: str
    begin: int
    end: int


class Flat:
    """A module whose parameters and BatchNorm statistics are views into one contiguous float32 vector: writing to either changes both.

    `vector` is `[buffers | parameters | buffers of top]`, where `top` is the last piece of the module: with an encoder and a predictor
    on top of it, each of them is one slice. `param_slice` is the slice of the parameters, and `segments` names the place of each.
    BatchNorm's batch counters are left out: its momentum is fixed, so nothing reads them. So are buffers of whole numbers and those that
    are not in the state_dict, such as a transformer's tables of positions: training does not change them. A convolution's weights lie
    channels-last, the order in which a channels-last convolution reads them and gives their gradient.

    If the module is trained, `trainable` is `vector[param_slice]` as a single Parameter. The gradients of the module's parameters are
    views of its gradient, so an optimizer sees one tensor. Moving the module or assigning a parameter's `.data` would break the views;
    `check_views` asserts that nothing did.

    behind: another Flat, whose vector then lies at the end of this one's.
    """

    def __init__(self, module: nn.Module, top: nn.Module | None = None, trained: bool = True, behind: Flat | None = None):
        self.module = module.requires_grad_(trained)
        for m in module.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.num_batches_tracked = None
        parameters, last = dict(module.named_parameters()), changing_buffers(top) if top else []
        first = changing_buffers(module)[: -len(last) or None]
        self.tensors = [*first, *parameters.values(), *last]
        needed = torch.get_default_dtype()
        if wrong := {str(t.dtype) for t in self.tensors} - {str(needed)}:
            raise InputError(f"{type(module).__name__} has parameters of {min(wrong)}, needs {needed}")
        pieces = [in_memory_order(t.detach()).flatten() for t in self.tensors]
        self.lie_in(torch.cat(pieces + ([behind.vector] if behind else [])))
        self.behind = behind
        if behind:
            behind.lie_in(self.vector[-len(behind.vector) :])
        ends = [sum(b.numel() for b in first)]
        for p in parameters.values():
            ends.append(ends[-1] + p.numel())
        self.parameters, self.param_slice = parameters, slice(ends[0], ends[-1])
        self.segments = [Segment(name, *span) for name, span in zip(parameters, pairwise(ends))]
        if trained:
            self.trainable = nn.Parameter(self.vector[self.param_slice])
            self.trainable.grad = torch.zeros_like(self.trainable)
            for p, gradient in zip(parameters.values(), self.trainable.grad.split([p.numel() for p in parameters.values()])):
                p.grad = shaped_like(p, gradient)

    def lie_in(self, vector: Tensor) -> None:
        """Make the tensors views into the beginning of a vector, which has their values already."""
        self.vector = vector
        sizes = [t.numel() for t in self.tensors]
        for tensor, piece in zip(self.tensors, vector[: sum(sizes)].split(sizes)):
            tensor.data = shaped_like(tensor, piece)

    def check_views(self) -> None:
        for (name, begin, _), p in zip(self.segments, self.parameters.values()):
            assert p.data_ptr() == self.vector[begin:].data_ptr(), f"{name} is no longer a view into the network's vector"
            if p.grad is not None:
                gradient = self.trainable.grad[begin - self.param_slice.start :]
                assert p.grad.data_ptr() == gradient.data_ptr(), f"the gradient of {name} is no longer a view"


def changing_buffers(module: nn.Module) -> list[Tensor]:
    """The buffers that training may change, as BatchNorm's running statistics: those of real numbers in the state_dict."""
    stored = module.state_dict()
    return [buffer for name, buffer in module.named_buffers() if name in stored and buffer.is_floating_point()]


def batchnorm_places(network: Flat, names: Sequence[str] = ("running_mean", "running_var", "weight", "bias")) -> Tensor:
    """Where these tensors of its BatchNorm layers lie in a network's vector, in the vector's order: int64 `[M]`."""
    layers = [m for m in network.module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    wanted = {id(getattr(m, name)) for m in layers for name in names}
    ends = accumulate(tensor.numel() for tensor in network.tensors)
    places = [torch.arange(end - t.numel(), end) for t, end in zip(network.tensors, ends) if id(t) in wanted]
    if network.behind:
        places.append(len(network.vector) - len(network.behind.vector) + batchnorm_places(network.behind, names).cpu())
    return torch.cat([torch.arange(0), *places]).to(network.vector.device)


def in_memory_order(tensor: Tensor) -> Tensor:
    """A tensor with its axes in the order in which a Flat lays them out: channels last for images and convolutions."""
    return tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor


def shaped_like(tensor: Tensor, piece: Tensor) -> Tensor:
    """A piece of a Flat's vector as a view of the tensor's shape."""
    view = piece.view(in_memory_order(tensor).shape)
    return view.permute(0, 3, 1, 2) if tensor.ndim == 4 else view


def layer_segments(network: Flat) -> list[Segment]:
    """The segments that the authors' divergence averages over: of a ResNet the stem and each block's convolutions, no shortcut's.

    17 for ResNet-18, 49 for ResNet-50 (the authors sum over names that contain "conv"; torchvision calls a shortcut "downsample"). Of a
    network that has linear layers in its backbone, as a transformer has, their weights too.
    """
    weights = {name for name, p in network.parameters.items() if p.ndim > 1 and name.endswith("weight") and "downsample" not in name}
    return [segment for segment in network.segments if segment.name in weights and "backbone." in segment.name]


# --------------------------------------------------------------------------------------------------- objectives


class Online(nn.Module):
    """p(f(x)): the encoder with the predictor on top. predictor: whether there is one of the projector's form, or its layers."""

    def __init__(self, encoder: Encoder, predictor: bool | Sequence[int | str]):
        super().__init__()
        self.encoder = encoder
        layers = encoder.head if predictor is True else predictor or ()
        self.predictor = build_head(encoder.width, *layers) if layers else nn.Identity()

    def forward(self, images: Tensor, views: int = 1) -> Tensor:
        return pass_on(self.encoder(images, views), self.predictor, views)


class Objective:
    """What a client minimises on two views of its images, and the networks that it needs for that.

    `parts` are the pieces that a client and the server exchange or keep, as views. `encoder` and `predictor` make up the online network;
    the predictor is empty where the objective has none. Behind it lies `exchanged`, a network without gradient that is averaged with the
    others, if there is one. `initial` has an entry for each part that an objective adds, such as a target or a queue: its content in a
    client's first round. `param_slices` says where in each part its parameters lie. `trainable` are the tensors that the optimizer sees,
    `ema_target` the target encoder's parameters, which follow `xi <- m xi + (1 - m) theta` after each step. `shared` `[N, d]` is what the
    clients shared through the server in the last round. `others` are all networks but the online one. `private` int64 `[M]` are the places
    in the online vector that a client keeps for itself: BatchNorm's with `--statistics local`, else none. `unsent` int64 `[M]` are those
    that no client sends: the private ones, and with `--predictor local` the predictor's. `decorrelation`: weight of FedDecorr's term.

    A step hands `batches` batches of the client's images to `terms`, each in an order of its own. `view(batch)` draws one more random view
    `[B, 3, S, S]` of the images of a batch `[B]`, to be called in `terms`. All tensors that `terms` uses must stay where they are: a CUDA
    graph holds their addresses.

    A method of its own overrides `terms`, and of the rest what it needs. Its constructor takes an encoder, a device, and by keyword the
    settings of its row in `options.METHODS`; `predictor` and `stop_gradient` if the row has a predictor, and `labels` if it uses them.
    """

    decorrelation = 0.0
    batches = 1
    view: Callable[[Tensor], Tensor]  # set by the step of local training

    def __init__(
        self, encoder: Encoder, device: torch.device, predictor: bool | Sequence[int | str] = False, exchanged: Flat | None = None
    ):  # fmt: skip
        module = Online(encoder, predictor).to(device)
        self.online = Flat(module, module.predictor, behind=exchanged)
        self.others = [exchanged] if exchanged else []
        end = self.online.param_slice.start + sum(p.numel() for p in encoder.parameters())
        self.parts = {"encoder": self.online.vector[:end], "predictor": self.online.vector[end:]}
        parameters = self.online.param_slice
        # BatchNorm's statistics come before the encoder's parameters, and after the predictor's
        self.param_slices = {"encoder": slice(parameters.start, end), "predictor": slice(0, parameters.stop - end)}
        self.initial: dict[str, Tensor] = {}
        self.trainable = [self.online.trainable]
        self.ema_target: Tensor | None = None
        self.shared = torch.empty(0, 0, device=device)
        self.private = self.unsent = torch.empty(0, dtype=torch.int64, device=device)
        # half as many operations, each twice as large; a ResNet's are large enough, and two passes hold half of its activations at a time
        self.one_pass = device.type == "cpu" and isinstance(encoder.backbone, Layers)

    @property
    def sent(self) -> Tensor:
        """Which numbers of the online vector are sent, either way: bool `[P]`."""
        return torch.ones_like(self.online.vector, dtype=torch.bool).index_fill_(0, self.unsent, False)

    # ---- what a method may override

    def prepare(self, public: Tensor, train: Callable[[Objective, Tensor], None]) -> None:
        """Called once, before the first round. public: the images that no client has, uint8 `[N, 3, S, S]`.

        train: trains another objective on such images, for as many epochs as a client trains in the whole run.
        """

    def begin(self, client_id: int, num_clients: int) -> None:
        """Called when a client's turn begins, while the networks hold the model that it received. num_clients: K, of the round.

        What the terms need of that model later has to be copied here, into tensors of the objective.
        """

    def terms(self, view1: Tensor, view2: Tensor, batch: Tensor, generator: torch.Generator | None) -> list[Callable[[], Tensor]]:
        """The loss as terms, each to be computed and differentiated before the next, so that only one term's activations are in memory.

        view1, view2: `[B, 3, S, S]`, of the images whose indices are `batch`, `[B]`; with several `batches` it is `[batches, B]`, and the
        views are of the first. generator: the client's, for random numbers of the loss; None on the meta device.
        """
        raise NotImplementedError

    @torch.no_grad()
    def update(self, lr: Tensor, momentum: float, weight_decay: float, ema_decay: float) -> None:
        """After backward(): a step of SGD, of the target's moving average, and of the momentum, which is the gradient's own tensor.

        lr: float64 `[]`, on the networks' device. See `ops.sgd_ema_`.
        """
        ops.sgd_ema_(
            self.online.trainable, self.online.trainable.grad, self.ema_target, lr,
            momentum=momentum, weight_decay=weight_decay, ema_decay=ema_decay,
        )  # fmt: skip

    def take_shared(self) -> Tensor:
        """Return and clear what the client shares besides its networks, `[N, d]`; empty for most objectives."""
        return self.shared[:0]

    # ---- what a method may use

    def each(self, network: nn.Module, *views: Tensor) -> Tensor:
        """A network's outputs for views, one view's behind the other's, where BatchNorm treats each view by itself: `[V B, d]`."""
        if len(views) > 1 and self.one_pass:
            return network(torch.cat(views), len(views))
        return torch.cat([network(view) for view in views]) if len(views) > 1 else network(*views)

    def directions(self, loss: Callable[..., Tensor], view1: Tensor, view2: Tensor) -> list[Callable[[], Tensor]]:
        """The terms of a loss that is made of two directions, the second with the views exchanged.

        loss: takes views, as a sequence, and for each the other view of the same images; it is a mean over all rows.
        """
        if self.one_pass:
            return [lambda: 2 * loss((view1, view2), (view2, view1))]
        return [partial(loss, (view1,), (view2,)), partial(loss, (view2,), (view1,))]

    # ---- what training and the ranks need of it

    def losses(self, view1: Tensor, view2: Tensor, batch: Tensor, generator: torch.Generator | None) -> list[Callable[[], Tensor]]:
        """The terms that training differentiates: the method's, see `terms`, each with FedDecorr's if that has a weight."""
        terms = self.terms(view1, view2, batch, generator)
        return [partial(self.decorrelated, term) for term in terms] if self.decorrelation else terms

    def decorrelated(self, term: Callable[[], Tensor]) -> Tensor:
        """A term, and FedDecorr's of the backbone's features of each view that it passes through the online encoder."""
        encoder = self.online.module.encoder
        encoder.passed = []
        loss = term()
        passed, encoder.passed = encoder.passed, None
        return loss + self.decorrelation * sum(map(correlation, passed))

    def tensors(self) -> list[Tensor]:
        """Views of every tensor that training changes: what travels to a rank and back."""
        return [self.online.vector, *(self.parts[name] for name in self.initial)]

    def compile(self) -> None:
        """Let torch.compile fuse what lies between the networks' convolutions and products, once each network is first used."""
        for module in (*self.online.module.children(), *(other.module for other in self.others)):
            module.compile()

    def check_views(self) -> None:
        """Assert that the networks still are views into their vectors."""
        for network in (self.online, *self.others):
            network.check_views()


def correlation(features: Tensor) -> Tensor:
    """FedDecorr's term (Shi et al., ICLR 2023, arXiv 2210.00226) of features `[B, d]`, `[]`: how much they say the same.

    With x the features, each centred and divided by its deviation over the batch, it is the mean of the squared numbers of `x^T x` off the
    diagonal, divided by B, as in the authors' code: about B times the mean squared correlation, which is what the paper's equation has.
    """
    deviation, centre = torch.std_mean(features.float(), 0)
    x, (batch, width) = (features.float() - centre) / (deviation.square() + 1e-8).sqrt(), features.shape
    return (x.T @ x).tril(-1).float().square().sum() * 2 / (width * (width - 1)) / batch


class WithTarget(Objective):
    """An objective with a target encoder f_xi, which follows the online encoder and gets no gradient."""

    def __init__(self, encoder: Encoder, device: torch.device, predictor: bool = False, stop_gradient: bool = True):
        target = copy.deepcopy(encoder).to(device)
        super().__init__(encoder, device, predictor)
        self.stop_gradient = stop_gradient
        self.target = Flat(target, trained=not stop_gradient)
        self.others.append(self.target)
        self.parts["target"] = self.target.vector
        self.param_slices["target"] = self.target.param_slice
        self.initial["target"] = self.parts["encoder"]  # a copy of what the client received
        if stop_gradient:
            self.ema_target = self.target.vector[self.target.param_slice]
        else:
            self.trainable.append(self.target.trainable)

    def project(self, *views: Tensor) -> Tensor:
        """The target encoder's projections of views, see `each`."""
        with torch.set_grad_enabled(not self.stop_gradient):
            return self.each(self.target.module, *views)

    @torch.no_grad()
    def update(self, lr: Tensor, momentum: float, weight_decay: float, ema_decay: float) -> None:
        super().update(lr, momentum, weight_decay, ema_decay)
        if not self.stop_gradient:  # the target has a step of its own, and only then follows
            parameters, gradient = self.target.trainable, self.target.trainable.grad
            ops.sgd_ema_(parameters, gradient, None, lr, momentum=1, weight_decay=0, ema_decay=0)
            ops.ema_(parameters, self.parts["encoder"][self.param_slices["encoder"]], ema_decay)
            gradient.mul_(momentum).add_(parameters, alpha=weight_decay)


# ------------------------------------------------------------------------------- encoders of finished runs, and features


def save_encoders(run: Path, image_size: int, encoders: Iterable[Encoder]) -> None:
    """Write encoder.pt: its backbone's name and norm, its projector's layers (`head`), and the weights of each encoder.

    An encoder is copied before the next is asked for, so that all may be one module with other weights.
    """
    content: dict = {"image_size": image_size, "encoders": []}
    for encoder in encoders:
        content |= {"encoder": encoder.name, "head": list(encoder.head), "norm": encoder.norm}
        parts = {part: {k: v.clone() for k, v in module.state_dict().items()} for part, module in encoder.named_children()}
        content["encoders"].append(parts)
    write_atomic(run / "encoder.pt", lambda file: torch.save(content, file))


def load_encoders(run: Path) -> list[Encoder]:
    """A run's encoders: that of the global model, or for `single` one for each client.

    They are on the CPU, in eval mode, and need no gradient. Raises InputError if encoder.pt is missing or damaged.
    """
    path = run / "encoder.pt"
    if not path.exists():
        if not (run / "config.json").exists():
            raise InputError(f"{run} is not a run folder: it has no encoder.pt")
        reasons = f"the run is not finished (--resume {run} continues it), its weights were not kept, or its parties have the encoders"
        raise InputError(f"{run} has no encoder.pt: {reasons}")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        encoders = []
        for state in saved["encoders"]:
            # a run of an earlier version says neither norm nor size
            encoder = Encoder(saved["encoder"], saved["head"], saved.get("norm", "batch"), saved.get("image_size", 32))
            # BatchNorm's batch counters may be missing, which torch allows in a plain dict but not in a state_dict with its metadata
            encoder.backbone.load_state_dict(dict(state["backbone"]))
            encoder.projector.load_state_dict(dict(state["projector"]))
            encoder.backbone.image_size = encoder.image_size
            encoders.append(encoder.eval().requires_grad_(False))
        return encoders
    except InputError:
        raise
    except Exception as error:  # a damaged archive makes torch raise errors of many types
        raise InputError(f"{path} is not a readable encoder ({first_line(error)})") from None


def initialise(encoder: Encoder, path: Path) -> None:
    """Give an encoder the weights of a trained one: of the run in a folder or of its encoder.pt, with its projector if that has the same
    form; of a file that `eval.py --export` wrote; or of a file of torchvision's or timm's with a state_dict (see `copy_weights`).

    Raises InputError if there is none, or several, or one of another form or with numbers that are not finite.
    """
    about: dict[str, str] = {}
    if path.is_dir() or path.name == "encoder.pt" or not path.suffix:
        weights = None
    else:
        weights, about = read_weights(path)
    if weights is None:
        trained = load_encoders(path.parent if path.name == "encoder.pt" else path)
        if len(trained) > 1:
            raise InputError(f"--init {path} holds {len(trained)} encoders, needs one")
        name, norm, parts = trained[0].name, trained[0].norm, {"backbone": trained[0].backbone}
        parts |= {"projector": trained[0].projector} if trained[0].head == encoder.head else {}
    elif about.get("encoder"):
        name, norm, parts = about["encoder"], about.get("norm", "batch"), {"backbone": backbone_in(weights, about, path)}
    else:
        copy_weights(encoder, weights, path)
        name, norm, parts = encoder.name, encoder.norm, {}
    if name != encoder.name:
        raise InputError(f"--init {path} holds the encoder {name}, and --encoder is {encoder.name}")
    if norm != encoder.norm:
        raise InputError(f"--init {path} holds an encoder of --norm {norm}, and --norm is {encoder.norm}")
    for part, module in parts.items():
        own = getattr(encoder, part).state_dict()
        for key, tensor in module.state_dict().items():
            if key in own:  # BatchNorm's batch counters are not kept
                own[key].copy_(tensor)
    if not all(tensor.isfinite().all() for tensor in encoder.state_dict().values()):
        raise InputError(f"--init {path} holds numbers that are not finite")


def copy_weights(encoder: Encoder, weights: dict[str, Tensor], path: Path) -> None:
    """Give a backbone the weights of a file without its classifier; says on stderr what is not taken.

    CIFAR's stem cannot take the 7x7 convolution of ImageNet's and stays random. timm's own function converts what its models' files may
    hold, such as a table of positions for images of another size. Raises InputError if anything else is missing or of another shape.
    """
    backbone = encoder.backbone
    convert = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None) if encoder.name.startswith("timm:") else None
    try:
        weights = convert(weights, backbone) if convert else weights
    except Exception as error:  # of many types
        raise InputError(f"--init {path} does not hold a {encoder.name} backbone ({first_line(error)})") from None
    own = backbone.state_dict()
    taken = {name for name, tensor in own.items() if name in weights and weights[name].shape == tensor.shape}
    unlike = [name for name in own if name not in taken and (name, encoder.name[:6]) != ("conv1.weight", "resnet")]
    left = [name for name in weights if name not in taken and name not in own and not name.endswith("num_batches_tracked")]
    unlike += [name for name in left if not name.startswith(("fc.", "head", "classifier"))]
    if unlike:
        what = "has no" if unlike[0] not in weights else "has another" if unlike[0] in own else "has the further"
        raise InputError(f"--init {path} does not hold a {encoder.name} backbone: it {what} {unlike[0]} ({len(unlike)} such tensors)")
    for name in taken:
        own[name].copy_(weights[name])
    for what, names in (("the encoder has no classifier", left), ("CIFAR's stem has another shape and stays random", own.keys() - taken)):
        if names:
            note(f"{path}: {', '.join(names)}: not taken, since {what}")


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors in a .safetensors file with its metadata, or in a file of torch's, which may hold them as `state_dict` or `model`.

    Raises InputError if the file is missing, damaged, or of another form.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"--init {path} cannot be read: {error.strerror}") from None
    except Exception as error:  # a damaged file makes torch raise errors of many types
        more = isinstance(error, UnpicklingError)
        reason = "it is another file, or holds more than tensors, as a whole model does" if more else first_line(error)
        raise InputError(f"--init {path} needs to be a run folder or what torch.save(model.state_dict(), FILE) wrote ({reason})") from None
    content = next((content[key] for key in ("state_dict", "model") if isinstance(content, dict) and key in content), content)
    if not isinstance(content, dict) or not content or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise InputError(f"--init {path} holds no state_dict, which is a dict of tensors by their names")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}, {}  # DistributedDataParallel begins names with it


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors in a file, and its metadata. Raises InputError if it is missing or damaged."""
    try:
        from safetensors import safe_open
    except ImportError:
        raise InputError(f"{path} needs the package safetensors: `pip install -r requirements-optional.txt`") from None
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # a missing or damaged file makes safetensors raise errors of its own
        raise InputError(f"{path} is not a readable .safetensors file ({first_line(error)})") from None


def load_backbone(path: Path) -> nn.Module:
    """The backbone in a file of `eval.py --export FILE.safetensors`, as `load_encoders` gives it.

    Raises InputError if the file is missing, damaged, or does not say which backbone it holds.
    """
    return backbone_in(*read_safetensors(path), path)


def backbone_in(tensors: dict[str, Tensor], about: dict[str, str], path: Path) -> nn.Module:
    """The backbone that a file of `eval.py --export` holds. about: its metadata. Raises InputError as `load_backbone`."""
    name = about.get("encoder", "")
    if name not in HEADS and not name.startswith("timm:"):
        raise InputError(f"{path} does not say which backbone it holds; it needs to be written by `eval.py --export`")
    norm, image_size = about.get("norm", "batch"), int(about["image_size"])  # a file of an earlier version says no norm
    backbone = build_backbone(name, norm, image_size)
    try:
        backbone.load_state_dict(tensors)
    except RuntimeError as error:
        raise InputError(f"{path} does not hold a {name} backbone ({first_line(error)})") from None
    backbone.image_size = image_size  # a name or a norm would hide layers that timm calls so
    return backbone.eval().requires_grad_(False)


@torch.inference_mode()
def extract_features(module: nn.Module, images: Tensor, batch_size: int = 500) -> Tensor:
    """Features `[N, d]` of uint8 images `[N, 3, S, S]`, unaugmented, in eval mode; the module's mode is restored."""
    training = module.training
    module.eval()
    batches = (batch.float().div_(255).contiguous(memory_format=torch.channels_last) for batch in images.split(batch_size))
    features = torch.cat([module(batch) for batch in batches])
    module.train(training)
    return features
