"""FedU and the methods it is compared with, written a second time in plain PyTorch: test_method.py compares runs with it.

It shares nothing with the package but `draw_views`, whose numbers test_views.py checks. A model is a state_dict; the networks of a client
are a ModuleDict of the encoder (backbone and projector), the predictor and the target, with MoCo's queue as a buffer.
"""

import copy
import hashlib
import math
import statistics
from collections import OrderedDict
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize
from torchvision.transforms.v2 import functional as tv

from data import draw_views


def generator(*key):
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") // 2)


def view(image, draw):
    """A view of a uint8 image `[3, S, S]` by its 14 numbers: box, flip, four amounts, the order of the four operations, greyscale."""
    x = tv.resized_crop(image / 255, *draw[:4].int().tolist(), size=image.shape[1:])
    x = tv.horizontal_flip(x) if draw[4] else x
    for i in draw[9:13].int().tolist():
        x = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)[i](x, draw[5 + i].item())
    return tv.rgb_to_grayscale(x, num_output_channels=3) if draw[13] else x


# ------------------------------------------------------------------------------------------------- networks and losses


def mlp(inputs, hidden, outputs, norm=True):
    between = [nn.BatchNorm1d(hidden)] * norm + [nn.ReLU()]
    return nn.Sequential(nn.Linear(inputs, hidden), *between, nn.Linear(hidden, outputs))


def build(head, predictor, target, queue, head_norm, clusters, norm):
    """The networks in the order in which the seed initialises them. head: the projector's widths; `tiny` has 128 features."""
    layers = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(outputs) if norm == "batch" else nn.GroupNorm(outputs // 16, outputs), nn.ReLU()]
    backbone = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    encoder = nn.Sequential(OrderedDict(backbone=backbone, projector=mlp(*head, head_norm) if len(head) == 3 else nn.Linear(*head)))
    net = nn.ModuleDict({"encoder": encoder, "predictor": mlp(256, *head[1:], head_norm) if predictor else nn.Identity()})
    if target:
        net["target"] = copy.deepcopy(encoder)
    if clusters:
        encoder.projector.append(nn.BatchNorm1d(512, affine=False))
        net["rotation"], net["target"] = nn.Linear(512, 4), copy.deepcopy(encoder)
        net.first = normalize(torch.randn(clusters, 512))
    net.register_buffer("queue", normalize(torch.randn(queue, 128)))
    net.shared = net.newest = torch.empty(0, 512 if clusters else 256)  # what the server shares, and what a client adds
    return net


# A loss takes two views of a batch, a and b, with its labels; o: the options, and what the loss draws or was given besides.


def byol(net, a, b, labels, o):
    pairs = [(net.predictor(net.encoder(one)), net.target(other)) for one, other in ((a, b), (b, a))]
    return sum((2 - 2 * (normalize(p) * normalize(z)).sum(1)).mean() for p, z in pairs)


def fedu2(net, a, b, labels, o):
    """BYOL, and the distance of both views' projections from uniform ones, direction by direction."""
    total = 0
    for one, other in ((a, b), (b, a)):
        z = net.encoder(one)
        total = total + (2 - 2 * (normalize(net.predictor(z)) * normalize(net.target(other))).sum(1)).mean()
        z, d = normalize(z), z.shape[1]
        points, uniform, directions = (torch.randn(shape, generator=net.source) for shape in ((6, d), z.shape, (6, d, 6)))
        for u, columns in zip(normalize(points), directions):
            for direction in columns.T:
                sets = []
                for x in (z, normalize(uniform)):
                    angle = torch.acos(x @ u)[:, None]
                    sets.append(((x - torch.cos(angle) * u) * angle / torch.sin(angle) @ direction).sort().values)
                total = total + o.uniformity / 36 * (sets[0] - sets[1]).square().mean()
    return total


def simsiam(net, a, b, labels, o):
    za, zb = net.encoder(a), net.encoder(b)
    pa, pb = net.predictor(za), net.predictor(zb)
    if not o.no_stop_gradient:
        za, zb = za.detach(), zb.detach()
    return -sum((normalize(p) * normalize(z)).sum(1).mean() for p, z in ((pa, zb), (pb, za))) / 2


def simclr(net, a, b, labels, o):
    z, n = normalize(net.encoder(torch.cat([a, b]))), len(a)
    logits = torch.cat([z @ z.T - torch.diag(torch.full((2 * n,), math.inf)), z @ net.shared.T], 1) / o.temperature
    net.newest = torch.cat([z.detach(), net.newest])
    return sum(logits[i].logsumexp(0) - logits[i, (i + n) % (2 * n)] for i in range(2 * n)) / (2 * n)


def fedca(net, a, b, labels, o):
    """SimCLR, and the alignment of as many public images with the base model. labels: here the numbers of the batch's images."""
    contrast, chosen = simclr(net, a, b, labels, o), labels % len(net.public)
    aligned = normalize(net.encoder(net.public[chosen] / 255)) * normalize(net.base[chosen])
    return contrast + (1 - aligned.sum(1)).mean()


def moco(net, a, b, labels, o):
    pairs = [(normalize(net.encoder(one)), normalize(net.target(other)).detach()) for one, other in ((a, b), (b, a))]
    logits = [torch.cat([(q * k).sum(1, keepdim=True), q @ net.queue.T], 1) / o.temperature for q, k in pairs]
    net.queue = torch.cat([pairs[0][1], pairs[1][1], net.queue])[: o.queue]
    return sum((row.logsumexp(1) - row[:, 0]).mean() for row in logits)


def fedx(net, a, b, labels, o):
    """o.teacher: the received encoder. o.other: another batch."""
    n, views = len(a), torch.cat([a, b, o.view(o.other)])
    z = net.encoder(views)
    p, q, t = normalize(z), normalize(net.predictor(z)), normalize(o.teacher(views).detach())

    def contrast(x, y):
        similar = (torch.cat([x, y]) @ torch.cat([x, y]).T / o.temperature).exp()
        similar = similar - similar.diag().diag()
        return -sum((similar[i, (i + n) % (2 * n)] / similar[i].sum()).log() for i in range(2 * n)) / (2 * n)

    def relate(x, y, others):
        m = sum((z @ others.T / o.target_temperature).softmax(1) for z in (x, y)) / 2
        return sum((m * (m / (z @ others.T / o.temperature).softmax(1)).log()).sum(1).mean() for z in (x, y)) / 2

    return (
        contrast(p[:n], p[n : 2 * n]) + contrast(q[:n], t[n : 2 * n])
        + relate(q[:n], q[n : 2 * n], t[2 * n :]) + relate(p[:n], p[n : 2 * n], p[2 * n :])
    )  # fmt: skip


def orchestra(net, a, b, labels, o):
    """No loss before there are global centroids."""
    for p, q in zip(net.target.parameters(), net.encoder.parameters()):
        p.data = o.target_decay * p.data + (1 - o.target_decay) * q.data
    z = normalize(net.target(a)).detach()
    net.newest = torch.cat([z, net.newest])[: o.memory]
    if not len(net.shared):
        return None
    angles, x = torch.randint(4, (len(a),), generator=o.source), o.view(o.batch)
    turned = torch.stack([tv.rotate(image, 90.0 * angle) for image, angle in zip(x, angles.tolist())])
    expected = (z @ net.shared.T / o.temperature).softmax(1)
    predicted = (normalize(net.encoder(b)) @ net.shared.T / o.temperature).log_softmax(1)
    return cross_entropy(net.rotation(net.encoder(turned)), angles) - (expected * predicted).sum(1).mean()


def balance(similarities):
    """Sinkhorn and Knopp by scaling vectors of rows, c, and columns, r."""
    (n, k), p = similarities.shape, (25 * similarities).softmax(1).T
    c = torch.ones(n) / n
    for _ in range(10):
        r = 1 / k / (p @ c)
        c = 1 / n / (r @ p)
    return n * (p * c * r[:, None]).T


def local_centroids(z, o):
    found, k = [*z[: o.local_clusters]], min(o.local_clusters, len(z))
    for _ in range(5):
        nearest = balance(z @ torch.stack(found).T).argmax(1)
        found = [normalize(z[nearest == j].sum(0), dim=0) if (nearest == j).any() else z[len(z) - k + j] for j in range(k)]
    return torch.stack(found)


def global_centroids(z, start, o):
    c, momentum = start.clone(), 0
    for _ in range(o.iterations):
        c.requires_grad_()
        p = (z @ c.T / o.temperature).softmax(1)
        similar = (normalize(balance((z @ c.T).detach())) * normalize(p)).sum(1)
        (gradient,) = torch.autograd.grad(-similar.mean(), c)
        momentum = 0.9 * momentum + gradient + 1e-4 * c.detach()
        c = normalize(c.detach() - 0.01 * momentum)
    return c


def barlow(net, a, b, labels, o):
    za, zb = (net.encoder(a), net.encoder(b))
    za, zb = ((z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt() for z in (za, zb))
    errors = (za.T @ zb / len(a) - torch.eye(za.shape[1])).square()
    return (errors.diag().sum() + o.redundancy * errors[~torch.eye(len(errors), dtype=torch.bool)].sum()) / len(errors)


def alignuniform(net, a, b, labels, o):
    views = [[*z] for z in normalize(net.encoder(torch.cat([a, b]))).chunk(2)]
    near = sum((x - y).square().sum() for x, y in zip(*views)) / len(a)
    spread = [torch.stack([(-2 * (x - y).square().sum()).exp() for x in z for y in z if x is not y]).mean().log() for z in views]
    return near + o.uniformity * sum(spread) / 2


def supervised(net, a, b, labels, o):
    return cross_entropy(net.encoder(a), labels)


def feddecorr(h):
    """Of features: the mean of x^T x squared off the diagonal, over the batch's size, number by number."""
    x = (h - h.mean(0)) / (h.var(0) + 1e-8).sqrt()
    return sum((x[:, i] @ x[:, [j for j in range(h.shape[1]) if j != i]]).square().mean() for i in range(h.shape[1])) / h.shape[1] / len(h)


CONSTANTS = {
    "decorrelation": 0.0, "norm": "batch", "statistics": "shared",
    "seed": 0, "clients_per_round": None, "dropout": 0.0, "mu": 0.4, "tau": 0.7, "ema_decay": 0.99, "jitter": 1.0, "queue": 0,
    "head_norm": True, "orders": 1, "clusters": 0, "exchanged": ("encoder", "predictor"),
    "aggregate": "online", "update": "online", "predictor": "global", "divergence": "layer-mean", "divergence_from": "received",
    "first_target": "copy", "server_rule": "mean", "no_predictor": False, "no_stop_gradient": False,
}  # fmt: skip
WIDE = (128, 512, 256)
METHODS = {  # the loss; the projector's widths, and whether there are predictor and target; what differs from the constants
    "fedu": (byol, (WIDE, True, True), {"predictor": "dapu"}),
    "fedbyol": (byol, (WIDE, True, True), {}),
    "single": (byol, (WIDE, True, True), {}),
    "central": (byol, (WIDE, True, True), {}),
    "fedema": (byol, (WIDE, True, True), {"update": "ema", "predictor": "ema"}),
    "fedu2": (fedu2, (WIDE, True, True), {"uniformity": 0.01, "server_lr": 0.1}),
    "ldawa": (byol, (WIDE, True, True), {}),
    "fedsimsiam": (simsiam, (WIDE, True, False), {}),
    "fedsimclr": (simclr, (WIDE, False, False), {"temperature": 0.07}),
    "fedca": (fedca, (WIDE, False, False), {"temperature": 0.07, "dictionary": 4096}),
    "fedmoco-v1": (moco, ((128, 128), False, True), {"temperature": 0.07, "queue": 4096, "jitter": 0.5}),
    "fedmoco-v2": (moco, ((128, 128, 128), False, True), {"temperature": 0.2, "queue": 4096}),
    "fedx": (fedx, ((128, 256, 256), True, False), {"temperature": 0.1, "target_temperature": 0.1, "head_norm": False, "orders": 2}),
    "orchestra": (orchestra, ((128, 512, 512), False, False), {
        "temperature": 0.1, "clusters": 128, "local_clusters": 16, "memory": 128, "target_decay": 0.996, "iterations": 500,
        "exchanged": ("encoder", "rotation", "target"),
    }),
    "fedbarlow": (barlow, (WIDE, False, False), {"redundancy": 0.005}),
    "fedalignuniform": (alignuniform, (WIDE, False, False), {"uniformity": 1}),
    "fedavg-supervised": (supervised, ((128, 4), False, False), {}),
}  # fmt: skip


# A server's rule: the model's tensors, those of each client, and each client's share of the images.


def fedavg(model, uploads, shares, o):
    return {name: sum(share * x[name] for share, x in zip(shares, uploads)) for name in model}


def ldawa(model, uploads, shares, o):
    result = {name: sum(x[name] for x in uploads) / len(uploads) for name in model}
    for name, g in model.items():
        norms = [x[name].norm() * g.norm() for x in uploads]
        if "running" not in name and all(norms):
            result[name] = sum(min(1, (x[name] * g).sum() / norm) * x[name] for x, norm in zip(uploads, norms)) / len(uploads)
    return result


def fedu2_rule(model, uploads, shares, o):
    """Frank-Wolfe on the vectors themselves."""
    names = [name for name in model if "running" not in name]
    deltas = [torch.cat([(model[name] - x[name]).flatten() for name in names]) for x in uploads]
    deltas = [2 * d / d.norm() for d in deltas]
    point = sum(share * d for share, d in zip(shares, deltas))
    for _ in range(250):
        corner = min(deltas, key=lambda d: point @ d)
        if point @ (point - corner) < 1e-5:
            break
        point = point + min(1, point @ (point - corner) / (point - corner).square().sum()) * (corner - point)
    moves = point.split([model[name].numel() for name in names])
    moved = {name: model[name] - o.server_lr * move.view(model[name].shape) for name, move in zip(names, moves)}
    return fedavg(model, uploads, shares, o) | moved


def by_number(middle):
    """A rule that takes each number of the model by itself; middle: of one number's values at the clients."""

    def rule(model, uploads, shares, o):
        columns = {name: zip(*(x[name].flatten().tolist() for x in uploads)) for name in model}
        return {name: torch.tensor([middle(column) for column in columns[name]]).view(t.shape) for name, t in model.items()}

    return rule


def trimmed(column):
    cut = max(1, len(column) // 5)
    return sum(sorted(column)[cut:-cut]) / (len(column) - 2 * cut)


RULES = {"ldawa": ldawa, "fedu2": fedu2_rule, "median": by_number(statistics.median), "trimmed": by_number(trimmed)}


# ------------------------------------------------------------------------------------------------------------ a round


def local_training(net, loss, x, y, indices, source, epochs, lr, ema_decay, o):
    """Train on the images of these indices; returns the mean loss. source: the generator of all random numbers."""
    trained = [p for name, p in net.named_parameters() if o.no_stop_gradient or not name.startswith("target")]
    net.source = source  # of the random numbers of a loss
    losses, sgd = [], torch.optim.SGD(trained, lr, momentum=0.9, weight_decay=5e-4)
    o.teacher = copy.deepcopy(net.encoder).eval()

    def views(batch):
        draws = draw_views(len(batch), *x.shape[2:], x.device, source, o.jitter)
        return torch.stack([view(image, draw) for image, draw in zip(x[batch], draws)])

    o.view, o.source = views, source
    for _ in range(epochs):
        orders = [indices[torch.randperm(len(indices), generator=source)] for _ in range(o.orders)]
        for start in range(0, len(indices) - o.batch_size + 1, o.batch_size):
            batch, o.other = (order[start : start + o.batch_size] for order in (orders[0], orders[-1]))
            a, b = views(torch.cat([batch, batch])).chunk(2)
            o.batch = batch
            features = []  # of each pass of the online encoder
            hook = net.encoder[0].register_forward_hook(lambda module, inputs, output, features=features: features.append(output))
            value = loss(net, a, b, y[batch], o)
            hook.remove()
            if value is None:
                losses.append(0.0)
                continue
            value = value + o.decorrelation * sum(map(feddecorr, features)) if o.decorrelation else value
            sgd.zero_grad()
            value.backward()
            sgd.step()
            losses.append(value.item())
            if "target" in net and "target" not in o.exchanged:
                for p, q in zip(net.target.parameters(), net.encoder.parameters()):
                    p.data = ema_decay * p.data + (1 - ema_decay) * q.data
    return sum(losses) / len(losses)


def state(net):
    return {name: t.clone() for name, t in net.state_dict().items() if t.is_floating_point()}  # BatchNorm's counters are not read


def only(state, *parts):
    return {name: t for name, t in state.items() if name.startswith(parts)}


def renamed(state, part, other):
    return {name.replace(part, other, 1): t for name, t in only(state, part).items()}


def drift(a, b, kind):
    moved = [a[name] - b[name] for name in only(a, "encoder") if "running" not in name]
    norms = [change.norm().item() for change in moved if change.ndim == 4]  # of each convolution
    return sum(norms) / len(norms) if kind == "layer-mean" else sum(change.square().sum().item() for change in moved)


def with_own_norms(model, client, norms):
    """The model with the client's own tensors of these names, if it has any."""
    return model | {name: client["state"][name] for name in norms if client}


def model_update(client, model, initial, norms, round_, o):
    """What a client starts its round from; and whose predictor that has, how much of its own, and the divergence that decided.

    norms: the names of BatchNorm's tensors that a client keeps for itself.
    """
    server, model = model, with_own_norms(model, client, norms)
    target = only(initial, "target") and not only(model, "target")  # which is the client's own
    first = initial | model | (renamed(model, "encoder", "target") if target else {})
    nobodys = "global" if only(model, "predictor") else "-"
    if not client or (o.update == "ema" and client["round"] != round_ - 1):
        return first, (nobodys, 0.0, None)
    own, d = client["state"], client["divergence"]
    if o.divergence_from == "global":
        d = drift(own, server, o.divergence)
        client.setdefault("lambda", o.tau / d)
    share = min(1.0, client.get("lambda", 0) * d)
    mixed = {name: t if "running" in name else share * own[name] + (1 - share) * t for name, t in model.items()}
    keeps = {"global": 0.0, "local": 1.0, "dapu": float(d >= o.mu), "ema": share}[o.predictor]
    start = own | only({"ema": mixed, "target": own}.get(o.update, model), "encoder")
    start |= only(mixed if o.predictor == "ema" else own if keeps else model, "predictor") | only(model, *o.exchanged[2:], "rotation")
    if o.update in ("target", "both"):
        start |= renamed(model, "encoder", "target")
    return start, ({0: nobodys, 1: "local"}.get(keeps, "mixed"), keeps, d)


def federate(x, y, groups, method, public=(), **options):
    """Train by the options of a run; returns each server's encoder, and the rounds as in metrics.jsonl.

    groups: for each server its clients, `{client: its images as indices}`. public: FedCA's public images, as indices.
    """
    loss, networks, row = METHODS[method]
    o = SimpleNamespace(**CONSTANTS | row | options)
    torch.manual_seed(o.seed)
    head, predictor, target = networks
    net = build(head, predictor and not o.no_predictor, target, o.queue, o.head_norm, o.clusters, o.norm)
    initial = state(net)
    if len(public):
        base, net.public = copy.deepcopy(net), x[public]
        local_training(base, simclr, x, y, public, generator(o.seed, "public"), o.rounds * o.local_epochs, o.lr, 0, o)
        net.base = base.encoder.eval()(net.public / 255).detach()
    servers, clients, rounds = [only(initial, *o.exchanged) for _ in groups], {k: {} for group in groups for k in group}, []
    exchanged = [part for part in o.exchanged if part != "predictor" or o.predictor != "local"]
    norms = []
    if o.statistics == "local":
        batch_norm = {name for name, m in net.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
        norms = [name for name in only(initial, *o.exchanged) if name.rpartition(".")[0] in batch_norm]
    sent = {name: t for name, t in only(initial, *exchanged).items() if name not in norms}
    unsent, sent = only(initial, *o.exchanged).keys() - sent, sum(t.numel() * t.itemsize for t in sent.values())
    for r in range(o.rounds):
        lr = o.lr * (1 + math.cos(math.pi * r / o.rounds)) / 2
        drawn = torch.randperm(len(clients), generator=generator(o.seed, "clients", r))[: o.clients_per_round].tolist()
        dropped = {k for k in drawn if torch.rand((), generator=generator(o.seed, "dropout", r, k)) < o.dropout}
        reports, shared = [], []
        for s, (group, model) in enumerate(zip(groups, servers)):
            present, uploads = sorted(group.keys() & {*drawn} - dropped), []
            for k in present:
                start, (whose, own_share, decided_on) = model_update(clients[k], model, initial, norms, r, o)
                net.load_state_dict(start, strict=False)
                net.newest = net.shared[:0]
                decay = 0.0 if o.first_target == "shared" and not clients[k] else o.ema_decay
                source = generator(o.seed, "training", r, k)
                mean_loss = local_training(net, loss, x, y, group[k], source, o.local_epochs, lr, decay, o)
                trained = state(net)
                d = drift(trained, start, o.divergence)
                clients[k] |= {"state": trained, "round": r, "divergence": d}
                if o.divergence_from == "received" and d:  # nothing moves in Orchestra's first round
                    clients[k].setdefault("lambda", o.tau / d)
                if loss is fedca:
                    shared.append(net.newest[: o.dictionary // len(present)])
                if loss is orchestra:
                    shared.append(local_centroids(net.newest, o))
                upload = trained | (renamed(trained, "target", "encoder") if o.aggregate == "target" else {})
                uploads.append(upload | {name: model[name] for name in unsent})
                reports.append((k, len(group[k]), mean_loss, d, whose, own_share, decided_on))
            n = sum(len(group[k]) for k in present)
            if uploads:
                rule = RULES.get(o.server_rule, RULES.get(method, fedavg))
                servers[s] = rule(model, uploads, [len(group[k]) / n for k in present], o)
        names = ("clients", "num_examples", "loss", "divergence", "predictor", "own_share", "decided_on")
        up = down = sent * len(reports) * (len(groups) < len(clients))
        if shared:
            down, up = down + len(reports) * net.shared.nbytes, up + sum(t.nbytes for t in shared)
            net.shared = torch.cat(shared)
            if loss is orchestra:
                net.first = net.shared = global_centroids(net.shared, net.first, o)
        rounds.append({"lr": lr, "dropped": sorted(dropped), "upload_bytes": up, "download_bytes": down})
        rounds[-1] |= {name: [report[i] for report in reports] for i, name in enumerate(names)}
    encoders = []
    trained = [with_own_norms(servers[0], client, norms) for client in clients.values() if client] if norms else servers
    for model in trained:
        net.load_state_dict(model, strict=False)
        encoders.append(copy.deepcopy(net.encoder))
    return encoders, rounds
