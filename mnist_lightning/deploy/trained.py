"""A trained model of a run, with what its images and classes are."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from mnist_lightning.classes import import_class, is_own
from mnist_lightning.data.module import MNISTDataModule
from mnist_lightning.data.named import NAMED
from mnist_lightning.data.preparation import prepare
from mnist_lightning.files import first_line
from mnist_lightning.models import own
from mnist_lightning.models.classifier import Classifier
from mnist_lightning.runs import checkpoints
from mnist_lightning.runs.folder import LOGS, find_checkpoint
from mnist_lightning.spec import DataSpec

_AT_ONCE = 256  # images


class Trained:
    """A trained model, on the CPU, in float32 and in evaluation mode.

    Args:
        where: as for ``--ckpt_path``.
        model_class: the dotted path of the user's class, if the model is not of this package.
        trust: imports the class that the checkpoint names.

    Raises:
        ValueError: the checkpoint is missing, damaged or contains code; its class is not known, or
            cannot be built from the checkpoint alone.
    """

    def __init__(self, where: str, model_class: str | None = None, trust: bool = False) -> None:
        self.path = find_checkpoint(where, Path(LOGS))
        self.checkpoint = checkpoints.read(self.path)
        named = str(self.checkpoint.get("model_class", ""))
        users = model_class or (named if trust and is_own(named) else None)
        if users is None and is_own(named):
            raise ValueError(
                f"{self.path} holds a {named}, a class from outside mnist_lightning: importing it"
                f" runs its code. If you trust it: --model {named.replace('__main__', 'my_script')}"
            )
        held, wanted = (path.rpartition(".")[2] for path in (named, users or named))
        if named and held != wanted:
            raise ValueError(f"{self.path} holds a {held}, not a {wanted}")
        kind = _users_class(users) if users else None
        self.model = self._load(kind).float()
        self.spec = self._spec()

    def _load(self, kind: type[LightningModule] | None) -> LightningModule:
        try:
            return checkpoints.load(self.path, kind)
        except ValueError:
            raise
        except Exception as error:  # of the constructor of a user's class, or of its weights
            raise ValueError(
                f"{self.path}: {kind.__name__ if kind else 'its model'} cannot be built from the"
                f" checkpoint alone: {' '.join(str(error).split())[:200]}"
            ) from error

    def _spec(self) -> DataSpec:
        if isinstance(spec := getattr(self.model, "spec", None), DataSpec):
            return spec
        settings = self.data_settings
        return DataSpec() if settings is None else MNISTDataModule(**settings).spec

    @property
    def name(self) -> str:
        return type(self.model).__name__

    @property
    def data_settings(self) -> dict[str, Any] | None:
        """The arguments of the run's ``MNISTDataModule``; None if it had another data module."""
        ours = self.checkpoint.get("data_class", checkpoints.DATA_CLASS) == checkpoints.DATA_CLASS
        return checkpoints.data_settings(self.checkpoint) if ours else None

    @property
    def stored_size(self) -> tuple[int, int]:
        """Height and width in which the run's data set has its images, before any resize."""
        settings = self.data_settings or {}
        if self.spec.drawn and self.spec.channels == 1:
            return 28, 28
        if settings.get("source") == "mnist":
            side = NAMED[settings.get("name") or "MNIST"].size
            return side, side
        return self.spec.height, self.spec.width

    def data(self) -> MNISTDataModule:
        """The data of the run, read.

        Raises:
            ValueError: they are not there any more, or are of a data module of the user's own.
        """
        settings = self.data_settings
        if settings is None:
            raise ValueError(f"they are of a {self.checkpoint['data_class']}")
        data = MNISTDataModule(**settings)
        try:
            data.setup("validate")
        except OSError as error:
            raise ValueError(str(error)) from error
        return data

    def classes(self, count: int) -> list[str]:
        """The names of the classes; numbers if the model answers with another number of classes."""
        known = list(self.spec.classes)
        return known if len(known) == count else [str(label) for label in range(count)]

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """Class probabilities, ``(n, classes)``, of uint8 images ``(n, channels, h, w)``.

        Raises:
            ValueError: the model does not answer with class scores.
        """
        if isinstance(self.model, Classifier):
            return self.model.predict(images).probabilities
        own.check_can("predict", self.model)
        answers = []
        for part in images.split(_AT_ONCE):
            unknown = torch.full((len(part),), -1)
            batch = [prepare(part, self.spec), unknown]
            try:
                answers.append(self.model.predict_step(batch, 0))
            except Exception as error:  # the user's code, on images of another kind
                raise ValueError(
                    f"{self.name} fails on images of {self.spec.channels} x {self.spec.height} x"
                    f" {self.spec.width}: {type(error).__name__}: {first_line(error)}"
                ) from error
        return own.probabilities(answers, None, self.name)


def _users_class(path: str) -> type[LightningModule]:
    if not is_own(path):
        raise ValueError(
            f"--model {path}: it is for a class of your own, like my_module.MyModel. Leave it out"
        )
    kind = import_class(path)
    if not (isinstance(kind, type) and issubclass(kind, LightningModule)):
        raise ValueError(f"--model {path}: not a LightningModule")
    return kind
