"""Train small and medium image classifiers with PyTorch Lightning, and study them properly.

The names below are imported when they are first used, so that ``import mnist_lightning`` (and
with it ``mnist-lightning --help``) does not wait for PyTorch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "MNISTDataModule": "data",
    "Classifier": "models",
    "Perceptron": "models",
    "ShallowNetwork": "models",
    "DeepNetwork": "models",
    "ResNet18": "models",
    "EarlyStopping": "callbacks",
    "LayerFreezing": "callbacks",
    "Dashboard": "dashboard",
    "RunLogger": "dashboard",
    "load": "checkpoints",
    "load_results": "results",
    "load_curves": "results",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
