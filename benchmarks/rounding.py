"""How rounding grows: the same updates with their sums in another order.

Each network is trained three times from the same weights on the same mini-batches of MNIST:

- autograd: `loss.backward()` and `torch.optim.SGD`;
- stacked: `stacked.Population`, block by block, which is what fused steps and searches use;
- permuted: autograd again, the images of each mini-batch in another order.

Stacked and permuted make the updates of autograd and add them up in another order. Their distance
from autograd is the largest difference of a weight or bias, relative to the largest one of its
tensor. Stacked changes the order of more sums than permuted does.

    .venv/bin/python benchmarks/rounding.py

Writes results/rounding.json. Takes four minutes on one core and needs the real MNIST
(MNIST_DATA_DIR or data/).
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist_lightning.data.module import MNISTDataModule
from mnist_lightning.data.sampling import epoch_order
from mnist_lightning.files import write_json
from mnist_lightning.nets import mlp
from mnist_lightning.provenance import provenance
from mnist_lightning.training.stacked import BLOCK_ROWS, Population

RESULTS = Path(__file__).parent / "results" / "rounding.json"
STEPS, EPOCHS = 200, 5
SEEDS = range(5)  # of the initial weights, and of the order of the images


class Network(NamedTuple):
    hidden_units: tuple[int, ...]
    lr: float
    batch_size: int

    def build(self, seed: int, dtype: torch.dtype) -> nn.Module:
        torch.manual_seed(seed)
        return mlp(784, self.hidden_units, 10).to(dtype)


SHALLOW = Network((100,), 0.1, 8)
NETWORKS = [
    SHALLOW,
    Network((100,), 0.1, 4),
    Network((800,), 0.1, 8),
    Network((1024, 128), 0.01, 32),
    Network((1024, 128), 0.3, 32),
    Network((1024, 10, 1024), 0.01, 32),
]


def autograd(
    net: nn.Module, network: Network, x: Tensor, y: Tensor, permute: bool = False
) -> list[Tensor]:
    """Trains ``net`` on consecutive mini-batches; returns its weights and biases."""
    optimizer = torch.optim.SGD(net.parameters(), lr=network.lr)
    for images, labels in zip(
        x.split(network.batch_size), y.split(network.batch_size), strict=True
    ):
        rows = torch.randperm(len(labels)) if permute else slice(None)
        optimizer.zero_grad()
        F.cross_entropy(net(images[rows]), labels[rows]).backward()
        optimizer.step()
    return [p.detach() for p in net.parameters()]


def stacked(net: nn.Module, network: Network, x: Tensor, y: Tensor) -> list[Tensor]:
    """As ``autograd``, by a ``Population`` of one."""
    population = Population([list(net.parameters())], [network.lr])
    rows = population.arrange(x)
    block = network.batch_size * max(1, BLOCK_ROWS // network.batch_size)
    for images, labels in zip(rows.split(block), y.split(block), strict=True):
        population.train_block(images, labels, network.batch_size)
    for own, trained in zip(net.parameters(), population.parameters(0), strict=True):
        own.data.copy_(trained)
    return [p.detach() for p in net.parameters()]


def distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest difference, relative to the largest value of its tensor."""
    return max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True)
    )


def distances(network: Network, seed: int, x: Tensor, y: Tensor) -> tuple[float, float]:
    """From autograd, of stacked and of permuted, after training on these images in this order."""
    reference, ours, other = (network.build(seed, x.dtype) for _ in range(3))
    weights = autograd(reference, network, x, y)
    return (
        distance(stacked(ours, network, x, y), weights),
        distance(autograd(other, network, x, y, permute=True), weights),
    )


def accuracies(seed: int, train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor]) -> list[float]:
    """Of autograd, stacked and permuted after ``EPOCHS`` epochs of the shallow network."""
    nets = [SHALLOW.build(seed, torch.float32) for _ in range(3)]
    for epoch in range(EPOCHS):
        order = epoch_order(len(train[1]), seed, epoch)
        x, y = (part[order] for part in train)
        autograd(nets[0], SHALLOW, x, y)
        stacked(nets[1], SHALLOW, x, y)
        autograd(nets[2], SHALLOW, x, y, permute=True)
    with torch.no_grad():
        return [float((net(val[0]).argmax(1) == val[1]).double().mean()) for net in nets]


def measure() -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    data = MNISTDataModule(source="mnist")
    data.setup("fit")
    (x, y), val = (
        (part.images.flatten(1).float() / 255, part.labels)
        for part in (data.train_set, data.val_set)
    )
    cells = []
    for network in NETWORKS:
        for dtype in (torch.float32, torch.float64):
            pairs = []
            for seed in SEEDS:
                rows = epoch_order(len(y), seed, 0)[: STEPS * network.batch_size]
                pairs.append(distances(network, seed, x[rows].to(dtype), y[rows]))
            ours, permuted = zip(*pairs, strict=True)
            name = str(dtype).removeprefix("torch.")
            cells.append(
                {**network._asdict(), "dtype": name, "stacked": ours, "permuted": permuted}
            )
            print(f"{network}, {name}: stacked {max(ours):.1e}, permuted {max(permuted):.1e}")
    ways = zip(*(accuracies(seed, (x, y), val) for seed in SEEDS), strict=True)
    val_acc = dict(zip(("autograd", "stacked", "permuted"), ways, strict=True))
    return {
        "data": "MNIST, split study (seed 0)",
        "threads": 1,
        "n": len(SEEDS),
        "steps": STEPS,
        "distance": cells,
        "epochs": EPOCHS,
        "val_acc": {**SHALLOW._asdict(), "dtype": "float32", "val_images": len(val[1]), **val_acc},
    }


if __name__ == "__main__":
    facts = provenance()  # before a result is written, which git would call a modification
    began = time.perf_counter()
    results = measure()
    took = round(time.perf_counter() - began)
    write_json(RESULTS, {**results, "took_seconds": took, "provenance": facts})
    print(f"{RESULTS.name}: {took} s")
