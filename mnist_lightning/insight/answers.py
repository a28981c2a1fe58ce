"""A network's answers to many images, and what follows from them."""

from typing import NamedTuple, cast

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from mnist_lightning.data.module import MNISTDataModule
from mnist_lightning.data.sampling import ImageSet
from mnist_lightning.models import own
from mnist_lightning.models.classifier import Classifier
from mnist_lightning.nets import AffineMap
from mnist_lightning.spec import DataSpec

_FEATURES = 2000  # images whose features are kept


class Answers(NamedTuple):
    """The answers for the images of a set, on the CPU."""

    rows: Tensor
    """The numbers of the images in the set, int64 ``(n,)``."""
    labels: Tensor
    """Their true classes, int64 ``(n,)``."""
    probabilities: Tensor
    """Of each class, float32 ``(n, classes)``."""
    features: Tensor | None
    """What the last linear layer receives, ``(images, features)``, for the first 2,000 of the
    images; None if the network has no such layer."""

    @property
    def predicted(self) -> Tensor:
        return self.probabilities.argmax(1)

    @property
    def confidence(self) -> Tensor:
        return self.probabilities.amax(1)


@torch.inference_mode()
def answer(
    model: LightningModule, data: MNISTDataModule, images: ImageSet, most: int | None = None
) -> Answers | None:
    """Asks the network about images of a set. Which, and in which order, is always the same.

    Args:
        model: its training mode and its weights are unchanged afterwards.
        data: prepares the images.
        images: the set.
        most: number of images; by default all.

    Returns:
        None if the network does not answer with a score for each class.
    """
    # drawn: a folder's images are sorted by class
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:most]
    place = next(model.parameters(), torch.zeros(0))
    linear = [m for m in model.modules() if isinstance(m, nn.Linear | AffineMap)]
    features: list[Tensor] = []
    labels: list[Tensor] = []
    scores: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # with tta the network is called more than once: the first time with the images themselves
        if len(features) == len(labels) and sum(map(len, features)) < _FEATURES:
            features.append(inputs[0].flatten(1).float().cpu())

    hooks = [linear[-1].register_forward_pre_hook(keep)] if linear else []
    was_training = model.training
    model.eval()
    try:
        for part in rows.split(data.eval_batch_size):
            pixels, truth = images.__getitems__(part.tolist())[:2]
            prepared = data.preprocess(pixels.to(place.device)).to(place.dtype)
            found = own.scores(model, prepared)
            if not isinstance(found, Tensor) or found.shape != (len(part), len(data.spec.classes)):
                return None
            scores.append(found.float().cpu())
            labels.append(truth)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    kept = torch.cat(features)[:_FEATURES] if features else None
    if isinstance(model, Classifier):
        probabilities = torch.cat(scores).softmax(1)
    else:  # the user's model may return probabilities
        probabilities = own.probabilities(scores, None, type(model).__name__)
    return Answers(rows, torch.cat(labels), probabilities, kept)


def confusion(answers: Answers) -> np.ndarray:
    """``confusion[label][predicted]``, numbers of images."""
    classes = answers.probabilities.shape[1]
    pairs = answers.labels * classes + answers.predicted
    return pairs.bincount(minlength=classes**2).reshape(classes, classes).numpy()


def surest_mistakes(answers: Answers, most: int = 64) -> Tensor:
    """The wrong answers with the highest confidence, the highest first: positions in the answers.

    Args:
        answers: of the network.
        most: number of mistakes.
    """
    wrong = (answers.predicted != answers.labels).nonzero().flatten()
    return wrong[answers.confidence[wrong].argsort(descending=True, stable=True)][:most]


def calibration(answers: Answers, bins: int = 15) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How often answers of a confidence are right.

    Args:
        answers: of the network.
        bins: of equal width from 0 to 1; a bin contains its upper end.

    Returns:
        Of each bin the mean confidence, the share of correct answers, and the number of images.
    """
    confidence = answers.confidence.double()
    correct = (answers.predicted == answers.labels).double()
    place = torch.bucketize(answers.confidence, torch.linspace(0, 1, bins + 1)[1:-1])
    counts = place.bincount(minlength=bins)
    sums = (torch.zeros(bins).double().index_add_(0, place, v) for v in (confidence, correct))
    mean, right = (total / counts.clamp(min=1) for total in sums)
    return mean.numpy(), right.numpy(), counts.numpy()


def first_weights(model: nn.Module, spec: DataSpec) -> Tensor | None:
    """The weights of the first layer as images.

    Returns:
        ``(n, channels, height, width)``: a convolution's filters, or the weights of a unit from
        each pixel. None if the first layer is of another kind.
    """
    kinds = nn.Conv2d, nn.Linear, AffineMap
    first = next((module for module in model.modules() if isinstance(module, kinds)), None)
    if isinstance(first, nn.Conv2d):
        weights = first.weight
        return weights.detach().float().cpu() if weights.shape[1] in (1, 3) else None
    if first is None:
        return None
    weights = first.w.T if isinstance(first, AffineMap) else cast(Tensor, first.weight)
    if weights.shape[1] != spec.pixels:
        return None
    return weights.detach().float().cpu().reshape(-1, *spec.shape)
