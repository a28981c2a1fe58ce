# What type checkers see; at run time __init__.py imports each name when it is first used.
from mnist_lightning.callbacks import EarlyStopping as EarlyStopping
from mnist_lightning.callbacks import LayerFreezing as LayerFreezing
from mnist_lightning.checkpoints import load as load
from mnist_lightning.dashboard import Dashboard as Dashboard
from mnist_lightning.dashboard import RunLogger as RunLogger
from mnist_lightning.data import MNISTDataModule as MNISTDataModule
from mnist_lightning.models import Classifier as Classifier
from mnist_lightning.models import DeepNetwork as DeepNetwork
from mnist_lightning.models import Perceptron as Perceptron
from mnist_lightning.models import ResNet18 as ResNet18
from mnist_lightning.models import ShallowNetwork as ShallowNetwork
from mnist_lightning.results import load_curves as load_curves
from mnist_lightning.results import load_results as load_results

__version__: str
