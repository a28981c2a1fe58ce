"""A trained network together with the preparation of its images, as one module."""

import copy
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist_lightning.classes import class_path
from mnist_lightning.deploy.trained import Trained
from mnist_lightning.files import read_json
from mnist_lightning.models import own
from mnist_lightning.models.classifier import Classifier
from mnist_lightning.nets import mean_over_shifts
from mnist_lightning.provenance import provenance
from mnist_lightning.runs import checkpoints
from mnist_lightning.runs.folder import RunFolder


class Network(nn.Module):
    """uint8 images ``(n, channels, height, width)`` -> class probabilities ``(n, classes)``.

    It scales, normalises and resizes as ``data.preparation.prepare`` does. The resize is written as
    two products with constant matrices. Resizing is linear in the rows and in the columns, so that
    the result is the same, and every format can express it.

    Args:
        trained: the model; it is copied, not changed.
        images: some images, uint8, to see what the model answers: scores, or probabilities.
    """

    mean: Tensor
    std: Tensor
    rows: Tensor
    columns: Tensor
    black: Tensor

    def __init__(self, trained: Trained, images: Tensor) -> None:
        super().__init__()
        model, spec = trained.model, trained.spec
        # the plain network where there is nothing else, so that its weights have their own names
        self.is_plain = type(model).forward is Classifier.forward
        net = cast(nn.Module, copy.deepcopy(model.net if self.is_plain else model))
        self.net = net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        size = images.shape[-2:]
        for name, values in (("mean", spec.mean), ("std", spec.std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None])
        for name, now, then in zip(
            ("rows", "columns"), size, (spec.height, spec.width), strict=True
        ):
            self.register_buffer(name, _resize(now, then))
        self.resizes = tuple(size) != (spec.height, spec.width)
        self.tta = model.tta if isinstance(model, Classifier) else 0
        if self.tta:
            self.register_buffer("black", torch.tensor(spec.black)[:, None, None])
        self.answers_probabilities = False
        self.eval().requires_grad_(False)
        if not isinstance(model, Classifier):
            scores = self._scores(images[:32])
            self.answers_probabilities = own.are_probabilities(scores)

    def forward(self, images: Tensor) -> Tensor:
        scores = self._scores(images)
        return scores if self.answers_probabilities else scores.softmax(1)

    def _scores(self, images: Tensor) -> Tensor:
        pixels = (images.float() / 255 - self.mean) / self.std
        if self.resizes:
            pixels = self.rows @ pixels @ self.columns.T
        if self.tta:
            return mean_over_shifts(self.net, pixels, self.tta, self.black)
        return self.net(pixels)

    def weights(self) -> dict[str, Tensor]:
        """The tensors of the network alone, each with its own memory."""
        return {name: value.clone().contiguous() for name, value in self.net.state_dict().items()}


def _resize(now: int, then: int) -> Tensor:
    """The matrix ``(then, now)`` that resizes a column of pixels, as ``F.interpolate`` does."""
    unit = torch.eye(now)[None, None]
    return F.interpolate(unit, size=(then, now), mode="bilinear", antialias=True)[0, 0]


def about(trained: Trained, images: Tensor, classes: list[str]) -> dict[str, Any]:
    """What a user of the exported file must know, as plain JSON types."""
    spec, run = trained.spec, RunFolder.of(trained.path).path
    recorded = run / "provenance.json"
    remedy = "remove it, then the export has no provenance of the training"
    settings = checkpoints.arguments(
        type(trained.model), trained.checkpoint.get("hyper_parameters", {})
    )
    return {
        "classes": classes,
        "input": f"images: uint8 (n, {', '.join(map(str, images.shape[1:]))}), pixels 0 to 255",
        "output": f"probabilities: float32 (n, {len(classes)}), in the order of classes",
        "mean": list(spec.mean),
        "std": list(spec.std),
        "network_size": [spec.height, spec.width],
        "drawn": spec.drawn,
        "model_class": class_path(type(trained.model)),
        "hyper_parameters": settings,
        "training": read_json(recorded, remedy, list) if recorded.is_file() else [],
        "export": provenance(epoch=trained.checkpoint.get("epoch")),
    }
