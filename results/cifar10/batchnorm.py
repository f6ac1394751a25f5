"""Is FedU's averaged encoder held back by averaged BatchNorm statistics? kNN with the statistics re-estimated, against as averaged.

python results/cifar10/batchnorm.py runs/fedu runs/fedbyol    (gave batchnorm.txt)
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import eval as evaluation
from data import load_images

images = load_images("cifar10")
for run in map(Path, sys.argv[1:]):
    backbone = evaluation.load_encoders(run)[0].backbone
    averaged = evaluation.knn(backbone, images)
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # a plain mean over the batches
    backbone.train()
    with torch.inference_mode():
        for batch in images.x_train[:20000].split(500):
            backbone(batch.float() / 255)
    backbone.eval()
    print(f"{run.name}: kNN {100 * averaged:.2f}% with averaged statistics, {100 * evaluation.knn(backbone, images):.2f}% re-estimated")
