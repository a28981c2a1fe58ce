"""lightning-hydra-template's default: its network, metrics, optimizer and loaders, in Lightning."""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from mnist_common import Clock, datasets
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MaxMetric, MeanMetric
from torchmetrics.classification import MulticlassAccuracy

EPOCHS = 10


def network():
    layers = [nn.Flatten()]
    for inputs, outputs in ((784, 64), (64, 128), (128, 64)):
        layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network()
        self.train_acc, self.val_acc = MulticlassAccuracy(10), MulticlassAccuracy(10)
        self.train_loss, self.val_loss, self.val_acc_best = MeanMetric(), MeanMetric(), MaxMetric()

    def step(self, batch, loss_metric, accuracy):
        images, labels = batch
        scores = self.net(images)
        loss = F.cross_entropy(scores, labels)
        loss_metric(loss)
        accuracy(scores.argmax(1), labels)
        return loss

    def training_step(self, batch, _):
        loss = self.step(batch, self.train_loss, self.train_acc)
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("train/acc", self.train_acc, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch, _):
        self.step(batch, self.val_loss, self.val_acc)
        self.log("val/loss", self.val_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("val/acc", self.val_acc, on_step=False, on_epoch=True, prog_bar=True)

    def on_validation_epoch_end(self):
        self.val_acc_best(self.val_acc.compute())
        self.log("val/acc_best", self.val_acc_best.compute(), sync_dist=True, prog_bar=True)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.001)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=10)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": plateau, "monitor": "val/loss"},
        }


class Timed(pl.Callback):
    def __init__(self, val):
        self.clock, self.val = Clock(), val

    def on_train_epoch_start(self, *_):
        self.clock.start()

    def on_validation_start(self, trainer, *_):
        if not trainer.sanity_checking:
            self.clock.stop()

    def on_train_epoch_end(self, trainer, module):
        self.clock.report(module.net, self.val)


def main():
    pl.seed_everything(0)
    train, val = datasets()
    pl.Trainer(max_epochs=EPOCHS, accelerator="cpu", callbacks=[Timed(val)]).fit(
        Module(), DataLoader(train, batch_size=128, shuffle=True), DataLoader(val, batch_size=128)
    )


if __name__ == "__main__":
    main()
