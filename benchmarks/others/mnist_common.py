"""What the two scripts share: MNIST as torchvision reads it, split as ours, and a clock."""

import json
import os
import time

import torch
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import MNIST

from mnist_lightning.data.sampling import split_indices

MARK = "MEASURED "


def datasets():
    """The same 48,000 and 12,000 of the official training images as ours, as PIL images."""
    change = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    images = MNIST(os.environ.get("MNIST_DATA_DIR", "data"), train=True, transform=change)
    train, val, _ = split_indices(70_000, 10_000, "canonical", 0.2, 0)
    return Subset(images, train.tolist()), Subset(images, val.tolist())


class Clock:
    """Seconds of training, without validation."""

    def __init__(self):
        self.seconds = 0.0

    def start(self):
        self.began = time.perf_counter()

    def stop(self):
        self.seconds += time.perf_counter() - self.began

    @torch.no_grad()
    def report(self, net, val):
        """Prints the seconds so far and the accuracy, as JSON on a line."""
        net.eval()
        right = sum(
            int((net(images).argmax(1) == labels).sum())
            for images, labels in DataLoader(val, batch_size=1000)
        )
        net.train()
        print(f"\n{MARK}{json.dumps({'seconds': self.seconds, 'accuracy': right / len(val)})}")
