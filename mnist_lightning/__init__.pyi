# What type checkers see; at run time __init__.py imports each name when it is first used.
from mnist_lightning.data.module import MNISTDataModule as MNISTDataModule
from mnist_lightning.models.classifier import Classifier as Classifier
from mnist_lightning.models.convolution import ConvNetwork as ConvNetwork
from mnist_lightning.models.ensemble import Ensemble as Ensemble
from mnist_lightning.models.multilayer import DeepNetwork as DeepNetwork
from mnist_lightning.models.multilayer import ShallowNetwork as ShallowNetwork
from mnist_lightning.models.perceptron import Perceptron as Perceptron
from mnist_lightning.models.resnet import ResNet18 as ResNet18
from mnist_lightning.runs.checkpoints import load as load
from mnist_lightning.runs.loggers import Dashboard as Dashboard
from mnist_lightning.runs.loggers import RunLogger as RunLogger
from mnist_lightning.search.results import load_curves as load_curves
from mnist_lightning.search.results import load_results as load_results
from mnist_lightning.spec import DataSpec as DataSpec
from mnist_lightning.training.callbacks import EarlyStopping as EarlyStopping
from mnist_lightning.training.execution import Execution as Execution
from mnist_lightning.training.freezing import LayerFreezing as LayerFreezing

__version__: str
