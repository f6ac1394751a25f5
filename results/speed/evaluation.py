"""Times the evaluations on CIFAR-10's 50,000 and 10,000 images against scikit-learn's: `python -m results.speed.evaluation`.

Representations are the untrained small encoder's, `[N, 256]`; the time to compute them stands apart. scikit-learn has the same vote of 200
neighbours. Medians of 3, in turns; linear evaluation and fine-tuning are timed once. The steps of fine-tuning alone take one batch again
and again: forward pass, gradient and Adam.
"""

import time
from pathlib import Path

import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

import eval
from bench.timing import print_origin, time_ways
from data import balanced_subset, load_images
from models import build_backbone, extract_features

torch.manual_seed(0)
backbone, images = build_backbone("small"), load_images("cifar10", Path("~/.cache/fedu").expanduser())
start = time.perf_counter()
train, test = (extract_features(backbone, x).clone() for x in (images.x_train, images.x_test))
seconds = time.perf_counter() - start
features = images._replace(x_train=train, x_test=test)
eval.extract_features = lambda module, x: x  # the representations are there already
y_train, y_test = images.y_train.numpy(), images.y_test.numpy()


def sklearn_knn() -> float:
    a, b = (nn.functional.normalize(x).numpy() for x in (train, test))
    vote = KNeighborsClassifier(200, weights=lambda distance: np.exp((1 - distance) / 0.1), metric="cosine", algorithm="brute", n_jobs=-1)
    return vote.fit(a, y_train).score(b, y_test)


ways = {
    "knn": lambda: eval.knn(nn.Identity(), features),
    "knn, scikit-learn": sklearn_knn,
}
print_origin("results.speed.evaluation", "3", "cpu")
print(f"{'representations of 60,000 images':34} {seconds:8.2f} s")
accuracy = {name: way() for name, way in ways.items()}
for name, median in time_ways(ways, 3, float("inf"), "cpu").items():
    print(f"{name:34} {median:8.2f} s   {100 * accuracy[name]:.2f}%", flush=True)
read = time_ways({"read": lambda: train.sum()}, 25, 5, "cpu")["read"]
products = time_ways({"products": lambda: [part @ train.T for part in test.split(500)]}, 3, 60, "cpu")["products"]
print(f"{'its matrix products alone':34} {products:8.2f} s")
start = time.perf_counter()
accuracy["linear"] = eval.linear(nn.Identity(), features, epochs=20)
seconds = time.perf_counter() - start
print(f"{'linear, 20 epochs':34} {seconds:8.2f} s   {100 * accuracy['linear']:.2f}%")
print(f"{'20 reads of its representations':34} {20 * read:8.2f} s")

EPOCHS, BATCH = 5, 128
eval.extract_features = extract_features  # of images again: fine-tuning changes the encoder
labelled = balanced_subset(images.y_train, 0.1, 0)
steps = EPOCHS * -(-len(labelled) // BATCH)
model = nn.Sequential(build_backbone("small"), nn.Linear(256, 10))
optimizer = torch.optim.Adam(model.parameters(), 1e-3)
x = images.x_train[labelled[:BATCH]].float().div_(255).contiguous(memory_format=torch.channels_last)


def step() -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), images.y_train[labelled[:BATCH]]).backward()
    optimizer.step()


start = time.perf_counter()
accuracy["semi"] = eval.fine_tune(backbone, images, labelled, "linear", epochs=EPOCHS)
seconds = time.perf_counter() - start
print(f"{f'semi 0.1, {EPOCHS} epochs':34} {seconds:8.2f} s   {100 * accuracy['semi']:.2f}%")
print(f"{f'its {steps} steps alone':34} {steps * time_ways({'step': step}, 25, 10, 'cpu')['step']:8.2f} s")
tests = time_ways({"tests": lambda: extract_features(model, images.x_test)}, 3, 10, "cpu")["tests"]
print(f"{'its test images alone':34} {tests:8.2f} s")
