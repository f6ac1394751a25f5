"""What bench/training.py compares ours with: views of PIL and kornia, the authors' way, and lightly's BYOL example.

The authors' way is a loop as in EasyFL's fedssl: PIL images in a DataLoader without workers, EMA and optimizer tensor by tensor, a wait for
the loss in every step, deep copies around it. Lightly's has the library's transform, heads, loss and update_momentum, and 2 workers.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, default_collate
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

from bench.timing import DEVICE, as_large_as_cifar10, some_images
from models import HEADS, Encoder, Online, build_backbone, feature_dim

JITTER = dict(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)
CROP, FLIP, GREY = transforms.RandomResizedCrop(32, scale=(0.08, 1)), transforms.RandomHorizontalFlip(), transforms.RandomGrayscale(p=0.2)
PIL_VIEW = transforms.Compose([CROP, FLIP, transforms.RandomApply([transforms.ColorJitter(**JITTER)], p=0.8), GREY, transforms.ToTensor()])


def pil_views(images: Tensor) -> list[Tensor]:
    return [torch.stack([PIL_VIEW(to_pil_image(x)) for x in images]).to(DEVICE) for _ in range(2)]


def kornia_views() -> Callable[[Tensor], list[Tensor]]:
    import kornia.augmentation as K

    crop, colours = K.RandomResizedCrop((32, 32), scale=(0.08, 1)), K.ColorJitter(**JITTER, p=0.8)
    view = nn.Sequential(crop, K.RandomHorizontalFlip(), colours, K.RandomGrayscale(p=0.2))
    return lambda images: [view(images.float() / 255) for _ in range(2)]


def pairs(images: Tensor, batch_size: int, transform: Callable = lambda image: (PIL_VIEW(image), PIL_VIEW(image)), workers: int = 0):
    """A DataLoader of PIL images, which `transform` turns into the two views."""
    options = {"shuffle": True, "drop_last": True, "num_workers": workers}
    return DataLoader([*map(to_pil_image, images.cpu())], batch_size, collate_fn=lambda x: default_collate([*map(transform, x)]), **options)


def train(
    online: nn.Module, encoder: nn.Module, target: nn.Module, loader: DataLoader, loss_of: Callable, update: Callable, wait: bool,
    **sgd: float,
) -> None:  # fmt: skip
    """BYOL over the pairs of a loader. online: the encoder and a predictor. wait: for the loss of every step."""
    optimizer, losses = torch.optim.SGD(online.parameters(), lr=0.032, **sgd), []
    for x1, x2 in loader:
        x1, x2 = x1.to(DEVICE), x2.to(DEVICE)
        p1, p2 = online(x1), online(x2)
        with torch.no_grad():
            z1, z2 = target(x1).detach(), target(x2).detach()
        loss = loss_of(p1, z2) + loss_of(p2, z1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item() if wait else loss.detach())
        update(encoder, target)
    float(sum(losses))


def authors_training(model: nn.Module, target: nn.Module, loader: DataLoader) -> None:
    def loss_of(online: Tensor, target: Tensor) -> Tensor:
        return (2 - 2 * (normalize(online, dim=-1) * normalize(target, dim=-1)).sum(-1)).mean()

    def update(encoder: nn.Module, target: nn.Module) -> None:
        for new, old in zip(encoder.parameters(), target.parameters(), strict=True):
            old.data = old.data * 0.99 + (1 - 0.99) * new.data

    train(model, model.encoder, target, loader, loss_of, update, wait=True, momentum=0.9, weight_decay=5e-4)


def authors(encoder: str, count: int, batch_size: int) -> Callable[[], object]:
    """An epoch; download and upload are deep copies."""
    server = Online(Encoder(encoder), predictor=True).to(DEVICE)
    target = copy.deepcopy(server.encoder)
    loader = pairs(some_images(count), batch_size)

    def epoch() -> None:
        model = copy.deepcopy(server)
        authors_training(model, target, loader)
        copy.deepcopy(model.state_dict())

    return epoch


def lightly(encoder: str, count: int, batch_size: int, threads: int | None = None) -> Callable[[], object]:
    """An epoch of the example for plain PyTorch, with our backbone, widths and batch size; CIFAR's transform has no blur."""
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from lightly.transforms.byol_transform import BYOLTransform, BYOLView1Transform, BYOLView2Transform

    torch.set_num_threads(threads or torch.get_num_threads())
    hidden, out = HEADS[encoder]
    backbone = build_backbone(encoder)
    network = nn.Sequential(backbone, BYOLProjectionHead(feature_dim(backbone), hidden, out)).to(DEVICE)
    online, momentum = nn.Sequential(network, BYOLPredictionHead(out, hidden, out)).to(DEVICE), copy.deepcopy(network)
    deactivate_requires_grad(momentum)
    views = [V(input_size=32, gaussian_blur=0.0, solarization_prob=0.0) for V in (BYOLView1Transform, BYOLView2Transform)]
    loader = pairs(some_images(count), batch_size, BYOLTransform(*views), workers=2)
    return partial(train, online, network, momentum, loader, NegativeCosineSimilarity(), partial(update_momentum, m=0.99), wait=False)


def rounds_of_authors(rounds: int) -> Callable[[], object]:
    """Deep copies where EasyFL makes them: of the download, of each part on update, before and after training for the divergence,
    of the client's own model, and of the upload, which is pickled; the server keeps all uploads until it has averaged them."""
    images = as_large_as_cifar10().x_train
    server = {"online": Online(Encoder("resnet18"), predictor=True).to(DEVICE), "target": None}
    kept: list[dict | None] = [None] * 5
    loaders = [pairs(images[k * 10_000 :][:256], 128) for k in range(5)]

    def train_client(k: int) -> dict:
        model = copy.deepcopy(server)
        model["target"] = copy.deepcopy(kept[k]["target"] if kept[k] else model["online"].encoder)
        model["online"] = copy.deepcopy(model["online"])
        before = copy.deepcopy([model["online"].encoder, model["target"]])
        authors_training(model["online"], model["target"], loaders[k])
        kept[k] = copy.deepcopy(model)
        after = copy.deepcopy([model["online"].encoder, model["target"]])
        [torch.dist(a, b) for a, b in zip(*(m[0].state_dict().values() for m in (before, after)), strict=True) if a.ndim == 4]
        return pickle.loads(pickle.dumps(copy.deepcopy(model)))

    def round_() -> None:
        uploads = [train_client(k) for k in range(5)]
        for part in server:
            states = [upload[part].state_dict() for upload in uploads]
            mean = {name: torch.div(sum(state[name] for state in states), len(states)) for name in states[0]}
            server[part] = copy.deepcopy(uploads[0][part])
            server[part].load_state_dict(mean)

    return lambda: [round_() for _ in range(rounds)]
