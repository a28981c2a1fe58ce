"""The MNIST example of pytorch/examples: its network, optimizer, schedule and loaders."""

import torch
import torch.nn.functional as F
from mnist_common import Clock, datasets
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

EPOCHS = 14


def network():
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Dropout(0.25), nn.Flatten(), nn.Linear(9216, 128), nn.ReLU()),
        *(nn.Dropout(0.5), nn.Linear(128, 10), nn.LogSoftmax(1)),
    )


def main():
    torch.manual_seed(1)
    train, val = datasets()
    net, clock = network(), Clock()
    optimizer = torch.optim.Adadelta(net.parameters(), lr=1.0)
    schedule = StepLR(optimizer, step_size=1, gamma=0.7)
    batches = DataLoader(train, batch_size=64, shuffle=True)
    for _ in range(EPOCHS):
        net.train()
        clock.start()
        for images, labels in batches:
            optimizer.zero_grad()
            F.nll_loss(net(images), labels).backward()
            optimizer.step()
        clock.stop()
        clock.report(net, val)
        schedule.step()


if __name__ == "__main__":
    main()
