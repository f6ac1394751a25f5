"""Times local training against the other ways to do it: `python bench.py [views|epoch|start ...]`, one table, medians.

Every row's ways are timed in turns in this one run. `x` is that way's time over ours: above 1, ours is faster. `epoch` trains the same
network on the same images with each: `authors`, a loop as in EasyFL's fedssl (PIL images in a DataLoader without workers, EMA tensor by
tensor, a wait for the loss every step, deep copies around it); and `lightly`, the library's BYOL example (its transform, heads,
loss and update_momentum, a DataLoader with 2 workers). `floor` is the network's convolutions and matrix products alone, each shape
by itself, forwards and backwards; `core` our step without views and moving average.

    pip install -r requirements-dev.txt kornia lightly
    python bench.py
"""

from __future__ import annotations

import copy
import importlib.util
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

from cli import Parser, number

PARTS = ("views", "epoch", "server", "start")
RECIPES = {"tiny": (32, 1184), "small": (64, 1920), "resnet18": (128, 256)}  # batch size, images of the timed epoch


def parse_options() -> dict:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}  [all]")
    parser.add_argument("--encoder", action="append", choices=RECIPES, help="for epoch, may be repeated  [all]")
    parser.add_argument("--repeats", type=number(int, 3), help="of each way  [5]")
    given = {"parts": [], "encoder": list(RECIPES), "repeats": 5} | vars(parser.parse_args())
    for part in given["parts"]:
        if part not in PARTS:
            parser.error(f"got {part!r}, wants one of {', '.join(PARTS)}")
    return given | {"parts": given["parts"] or list(PARTS)}


OPTIONS = parse_options() if __name__ == "__main__" else {}

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torchvision import transforms  # noqa: E402

import fedu  # noqa: E402
import ops  # noqa: E402
from data import draw_views, load_images, two_views  # noqa: E402
from models import BYOL, HEADS, Online, build_backbone, feature_dim  # noqa: E402
from ops.bench import time_ways  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
JITTER = dict(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)
PIL_VIEW = transforms.Compose(
    [
        transforms.ToPILImage(),
        transforms.RandomResizedCrop(32, scale=(0.08, 1)),
        transforms.RandomHorizontalFlip(),
        transforms.RandomApply([transforms.ColorJitter(**JITTER)], p=0.8),
        transforms.RandomGrayscale(p=0.2),
        transforms.ToTensor(),
    ]
)


def timed(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each way, in turns."""
    return time_ways(ways, repeats, float("inf"), DEVICE.type)


def report(what: str, seconds: dict[str, float], images: int) -> None:
    ours = next(iter(seconds.values()))
    for way, median in seconds.items():
        print(f"{what:28} {way:10} {median * 1e3:12.2f} {median / ours:8.2f} {images / median:12.0f}", flush=True)


def installed(*packages: str) -> bool:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        print(f"left out, since {', '.join(missing)} is not installed", file=sys.stderr)
    return not missing


# ---------------------------------------------------------------------------------------------------------- views


def bench_views(images: Tensor, repeats: int) -> None:
    batch = images[:128].contiguous()
    on_host = batch.cpu()
    ways = {
        "ours": lambda: two_views(batch),
        "reference": lambda: two_views_of_the_reference(batch),
        "PIL": lambda: [torch.stack([PIL_VIEW(x) for x in on_host]).to(DEVICE) for _ in range(2)],
    }
    if installed("kornia"):
        import kornia.augmentation as K

        view = nn.Sequential(
            K.RandomResizedCrop((32, 32), scale=(0.08, 1)),
            K.RandomHorizontalFlip(),
            K.ColorJitter(**JITTER, p=0.8),
            K.RandomGrayscale(p=0.2),
        )
        ways["kornia"] = lambda: [view(batch.float() / 255) for _ in range(2)]
    threads = torch.get_num_threads()
    for count in sorted({1, threads}):
        torch.set_num_threads(count)
        report(f"views, B = 128, {count} thread{'s' * (count > 1)}", timed(ways, 2 * repeats), 128)
    torch.set_num_threads(threads)


def two_views_of_the_reference(images: Tensor) -> tuple[Tensor, Tensor]:
    return ops.reference.augment(images, draw_views(2 * len(images), *images.shape[2:], images.device)).chunk(2)


# ---------------------------------------------------------------------------------------------------------- epoch


class Pairs(torch.utils.data.Dataset):
    """Images as PIL's, and a transform that makes their views: what a DataLoader wants."""

    def __init__(self, images: Tensor, transform: Callable):
        self.images, self.transform = [transforms.functional.to_pil_image(x) for x in images.cpu()], transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int):
        return self.transform(self.images[i])


def ours(encoder: str, images: Tensor, batch_size: int, views: Callable | None = None, ema: bool = True) -> Callable[[], object]:
    objective = BYOL(encoder, DEVICE, 0.99)
    if not ema:
        objective.update_target = lambda: None
    indices = torch.arange(len(images), device=DEVICE)
    return lambda: fedu.local_training(
        objective, images, fedu.local_batches(indices, 1, batch_size, None), views or two_views, 0.032
    ).item()


def authors(encoder: str, images: Tensor, batch_size: int) -> Callable[[], object]:
    """In the manner of EasyFL's fedssl: download and upload are deep copies, EMA and optimizer go tensor by tensor."""
    view = transforms.Compose(PIL_VIEW.transforms[1:])
    loader = torch.utils.data.DataLoader(Pairs(images, lambda x: (view(x), view(x))), batch_size, shuffle=True, drop_last=True)
    server = Online(encoder).to(DEVICE)
    target = copy.deepcopy(server.encoder)

    def loss_of(online: Tensor, target: Tensor) -> Tensor:
        online, target = nn.functional.normalize(online, dim=-1), nn.functional.normalize(target, dim=-1)
        return 2 - 2 * (online * target).sum(-1)

    def train() -> None:
        model = copy.deepcopy(server)
        optimizer = torch.optim.SGD(model.parameters(), 0.032, 0.9, weight_decay=5e-4)
        losses = []
        for x1, x2 in loader:
            x1, x2 = x1.to(DEVICE), x2.to(DEVICE)
            p1, p2 = model(x1), model(x2)
            with torch.no_grad():
                z1, z2 = target(x1).detach(), target(x2).detach()
            loss = (loss_of(p1, z2) + loss_of(p2, z1)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            for new, old in zip(model.encoder.parameters(), target.parameters(), strict=True):
                old.data = old.data * 0.99 + (1 - 0.99) * new.data
        copy.deepcopy(model.state_dict())

    return train


def lightly(encoder: str, images: Tensor, batch_size: int) -> Callable[[], object]:
    """The library's BYOL example for plain PyTorch, with our backbone, widths and batch size; CIFAR's transform has no blur."""
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from lightly.transforms.byol_transform import BYOLTransform, BYOLView1Transform, BYOLView2Transform

    views = [V(input_size=32, gaussian_blur=0.0, solarization_prob=0.0) for V in (BYOLView1Transform, BYOLView2Transform)]
    hidden, out = HEADS[encoder]
    backbone = build_backbone(encoder).to(DEVICE)
    projector = BYOLProjectionHead(feature_dim(backbone), hidden, out).to(DEVICE)
    predictor = BYOLPredictionHead(out, hidden, out).to(DEVICE)
    momentum = [copy.deepcopy(backbone), copy.deepcopy(projector)]
    for module in momentum:
        deactivate_requires_grad(module)
    loader = torch.utils.data.DataLoader(Pairs(images, BYOLTransform(*views)), batch_size, shuffle=True, drop_last=True, num_workers=2)
    criterion = NegativeCosineSimilarity()
    optimizer = torch.optim.SGD([*backbone.parameters(), *projector.parameters(), *predictor.parameters()], lr=0.032)

    def train() -> None:
        total = 0
        for x0, x1 in loader:
            update_momentum(backbone, momentum[0], m=0.99)
            update_momentum(projector, momentum[1], m=0.99)
            x0, x1 = x0.to(DEVICE), x1.to(DEVICE)
            p0, p1 = (predictor(projector(backbone(x))) for x in (x0, x1))
            z0, z1 = (momentum[1](momentum[0](x)).detach() for x in (x0, x1))
            loss = 0.5 * (criterion(p0, z1) + criterion(p1, z0))
            total += loss.detach()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        total.item()

    return train


def products(encoder: str, batch_size: int) -> Callable[[], None]:
    """A step's convolutions and matrix products, one by one: online forwards and backwards on two views, target forwards."""
    network = Online(encoder).to(DEVICE)
    calls: list[tuple[nn.Module, Tensor, bool]] = []  # module, input, whether the input wants a gradient

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls.append((module, inputs[0].detach().clone(memory_format=torch.preserve_format), len(calls) > 0))

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_pre_hook(record)
    network(torch.rand(batch_size, 3, 32, 32, device=DEVICE).contiguous(memory_format=torch.channels_last))
    for module, *_ in calls:
        module._forward_pre_hooks.clear()
    of_target = {id(m) for m in network.encoder.modules()}
    with torch.no_grad():
        gradients = [torch.randn_like(module(x)) for module, x, _ in calls]

    def run() -> None:
        for (module, x, wants), gradient in zip(calls, gradients, strict=True):
            for _ in range(2):
                if id(module) in of_target:
                    with torch.no_grad():
                        module(x)
                x = x.detach().requires_grad_(wants)
                torch.autograd.grad(module(x), [*module.parameters(), *([x] if wants else [])], gradient)

    return run


def bench_epoch(encoder: str, images: Tensor, repeats: int) -> None:
    batch_size, count = RECIPES[encoder]
    images = images[:count].contiguous()
    fixed = tuple(torch.rand(batch_size, 3, 32, 32, device=DEVICE) for _ in range(2))
    step = products(encoder, batch_size)
    ways = {
        "ours": ours(encoder, images, batch_size),
        "core": ours(encoder, images, batch_size, views=lambda _: fixed, ema=False),
        "floor": lambda: [step() for _ in range(count // batch_size)],
        "authors": authors(encoder, images, batch_size),
    }
    if installed("lightly"):
        ways["lightly"] = lightly(encoder, images, batch_size)
    report(f"epoch, {encoder}, B = {batch_size}", timed(ways, repeats), count // batch_size * batch_size)


# --------------------------------------------------------------------------------------------- server and start-up


def bench_server(repeats: int) -> None:
    """All that a round of 5 clients does besides training: the stages' copies, aggregation, divergences, checkpoint."""
    import tempfile

    objective = BYOL("resnet18", DEVICE, 0.99)
    clients = [fedu.Client(k, torch.arange(10_000)) for k in range(5)]
    federation = fedu.Federation(objective.online.state.clone(), clients)
    inbox = objective.online.state.empty_rows(5)
    segments = fedu.divergence_segments(objective.target, "layer-mean")

    def round_(save: bool, folder: Path) -> None:
        for k, client in enumerate(clients):
            fedu.model_update(client, federation.server, objective, "dapu", 0.4)
            fedu.model_upload(client, objective, inbox.row(k))
        federation.server, drift = fedu.aggregate(inbox, [10_000] * 5, federation.server, segments)
        for client, norms in zip(clients, drift, strict=True):
            client.divergence = fedu.divergence(norms, "layer-mean")
        if save:
            fedu.save_checkpoint(folder, 1, [federation], 0.0)

    with tempfile.TemporaryDirectory(dir=".") as folder:
        ways = {"all": partial(round_, True, Path(folder)), "without checkpoint": partial(round_, False, Path(folder))}
        report("server, resnet18, K = 5", timed(ways, repeats), 5 * 5 * 78 * 128)  # images of the paper's round


def bench_start(repeats: int) -> None:
    here = Path(__file__).parent

    def first_step() -> None:
        """From the command to the first training step: the table's header is printed just before it."""
        command = [sys.executable, str(here / "fedu.py"), "--overwrite", "--out", "runs/bench-start", "--device", DEVICE.type]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}) as process:
            while "predictor taken" not in process.stdout.readline():
                assert process.poll() is None, "fedu.py ended before its first step"
            process.kill()

    help_ = partial(subprocess.run, [sys.executable, str(here / "fedu.py"), "--help"], stdout=subprocess.DEVNULL, check=True)
    for name, way in (("--help", help_), ("to the first step", first_step)):
        report("start-up", timed({name: way}, repeats), 0)


def main(parts: list[str], encoder: list[str], repeats: int) -> None:
    ops.load()
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{torch.get_num_threads()} threads of {platform.machine()}"
    print(f"torch {torch.__version__}, {DEVICE.type}: {where}; commit {fedu.describe_code()['commit']}; medians of {repeats}")
    print(f"{'what':28} {'way':10} {'ms':>12} {'x':>8} {'images/s':>12}")
    warnings.filterwarnings("ignore", module="lightly|torch.utils.data")
    images = load_images("fashion").to(DEVICE).x_train
    if "views" in parts:
        bench_views(images, repeats)
    if "start" in parts:
        bench_start(repeats)
    if "server" in parts:
        bench_server(repeats)
    for name in encoder if "epoch" in parts else []:
        bench_epoch(name, images, repeats)


if __name__ == "__main__":
    main(**OPTIONS)
