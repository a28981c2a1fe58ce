"""The architectures, each a LightningModule around a plain ``torch.nn.Module``, its ``net``."""

from mnist_lightning.moved import former_names

__getattr__ = former_names(
    __name__,
    [
        "models.classifier",
        "models.perceptron",
        "models.multilayer",
        "models.resnet",
        "nets",
        "weights",
    ],
)
