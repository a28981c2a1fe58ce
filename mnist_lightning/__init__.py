"""Train small and medium image classifiers with PyTorch Lightning, and study them properly.

The names below are imported on first use. So ``import mnist_lightning``, and with it
``mnist-lightning --help``, does not import PyTorch.
"""

import sys
from importlib import import_module
from typing import Any

from mnist_lightning.moved import FormerModules

__version__ = "0.1.0"

_HOMES = {
    "MNISTDataModule": "data.module",
    "DataSpec": "spec",
    "Classifier": "models.classifier",
    "Perceptron": "models.perceptron",
    "ShallowNetwork": "models.multilayer",
    "DeepNetwork": "models.multilayer",
    "ConvNetwork": "models.convolution",
    "ResNet18": "models.resnet",
    "Ensemble": "models.ensemble",
    "EarlyStopping": "training.callbacks",
    "LayerFreezing": "training.freezing",
    "Execution": "training.execution",
    "Dashboard": "runs.loggers",
    "RunLogger": "runs.loggers",
    "load": "runs.checkpoints",
    "load_results": "search.results",
    "load_curves": "search.results",
}

__all__ = [*_HOMES, "__version__"]

sys.meta_path.append(FormerModules())


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
