"""The architectures by name."""

from mnist_lightning.models.classifier import Classifier
from mnist_lightning.models.convolution import ConvNetwork
from mnist_lightning.models.multilayer import DeepNetwork, ShallowNetwork
from mnist_lightning.models.perceptron import Perceptron
from mnist_lightning.models.resnet import ResNet18

ARCHITECTURES: dict[str, type[Classifier]] = {
    cls.__name__: cls for cls in (Perceptron, ShallowNetwork, DeepNetwork, ConvNetwork, ResNet18)
}
