"""The architectures; each is a LightningModule whose ``net`` is a plain ``torch.nn.Module``."""

from mnist_lightning.moved import former_names

__getattr__ = former_names(
    __name__,
    [
        "models.classifier",
        "models.optimization",
        "models.perceptron",
        "models.multilayer",
        "models.convolution",
        "models.resnet",
        "nets",
        "weights",
    ],
)
