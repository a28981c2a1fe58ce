"""Chooses the images of each mini-batch: split, order in an epoch, shares of the processes."""

from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """Computes the order in which a training with ``seed`` visits ``n`` images in ``epoch``.

    The order depends only on these three numbers: not on other random numbers, interruptions or the
    number of processes. The Trainer and the training of many models at once therefore use the same
    mini-batches.

    Returns:
        A permutation of ``range(n)``, int64, shape ``(n,)``.
    """
    state = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]
    return torch.randperm(n, generator=torch.Generator().manual_seed(int(state >> 1)))


def balanced_order(labels: Tensor, seed: int, epoch: int) -> Tensor:
    """Draws as many images as there are labels, each class with the same probability.

    Like ``epoch_order``, it depends on nothing else. An image may be drawn several times.

    Args:
        labels: int64, ``(n,)``.
        seed: of the training.
        epoch: counted from 0.

    Returns:
        Indices of images, int64, ``(n,)``.
    """
    state = np.random.SeedSequence([seed, epoch, 1]).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(state >> 1))
    by_class = labels.argsort(stable=True)
    counts = labels.unique(return_counts=True)[1]
    drawn = torch.randint(len(counts), (len(labels),), generator=generator)
    within = torch.rand(len(labels), generator=generator, dtype=torch.float64) * counts[drawn]
    return by_class[(counts.cumsum(0) - counts)[drawn] + within.long()]


class ImageSet(Dataset):
    """Images and labels in memory; a whole mini-batch is one indexing operation.

    Args:
        images: uint8, shape ``(n, height, width)`` of gray images, else
            ``(n, channels, height, width)``.
        labels: int64, shape ``(n,)``.
        numbered: whether a mini-batch has a third tensor, the numbers of its images in the set.
        rows: if given, int64 ``(n,)``: the set has only these rows of ``images``, which may be
            mapped from a file and too large to copy.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, numbered: bool = False, rows: Tensor | None = None
    ) -> None:
        self.labels, self.numbered = labels, numbered
        self._images, self._rows = images, rows
        self.features: Callable[[Tensor], Tensor | None] | None = None
        """If given, returns what a mini-batch has in place of the images with these numbers, in
        floating point; or None, if it has the images. See ``training.frozen_cache``."""

    @property
    def images(self) -> Tensor:
        """All images of the set; a copy in memory if the set has only some rows."""
        return self._images if self._rows is None else self._images[self._rows]

    def with_numbers(self) -> "ImageSet":
        """Returns the same images, whose mini-batches have numbers too."""
        return ImageSet(self._images, self.labels, True, self._rows)

    def subset(self, numbers: Tensor) -> "ImageSet":
        """Returns a set of the images with these numbers, int64 ``(n,)``."""
        rows = numbers if self._rows is None else self._rows[numbers]
        return ImageSet(self._images, self.labels[numbers], self.numbered, rows)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = index if self._rows is None else int(self._rows[index])
        return self._images[row], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        # DataLoader's fetcher calls this with the indices of the whole mini-batch
        rows = torch.tensor(indices)
        if self.features is not None and (features := self.features(rows)) is not None:
            return features, self.labels.index_select(0, rows)
        of_file = rows if self._rows is None else self._rows.index_select(0, rows)
        # index_select is several times as fast as indexing, with the same result
        batch = self._images.index_select(0, of_file), self.labels.index_select(0, rows)
        return (*batch, rows) if self.numbered else batch


class EpochSampler(DistributedSampler):
    """Visits the training set in ``epoch_order``; the processes take its images in turn.

    It is a ``DistributedSampler``, so Lightning sets its epoch and does not replace it under DDP.
    Together, n processes with mini-batches of b images see the same mini-batches as one process
    with mini-batches of n * b.
    """

    balanced = False
    """Whether it visits the training set in ``balanced_order`` instead."""
    start = 0
    """Number of this process's images that the next pass skips, because a resumed epoch has already
    trained on them."""

    def __iter__(self) -> Iterator[int]:
        data = cast(ImageSet, self.dataset)
        drawn = (
            balanced_order(data.labels, self.seed, self.epoch)
            if self.balanced
            else epoch_order(len(data), self.seed, self.epoch)
        )
        order = drawn.tolist()
        order += order[: self.total_size - len(order)]  # all processes take equally many steps
        start, self.start = self.start, 0
        return iter(order[self.rank :: self.num_replicas][start:])


def in_image_order(trainer: Trainer, loader: DataLoader, *columns: Tensor) -> tuple[Tensor, ...]:
    """Gathers the rows of an evaluation from all processes, sorted by image.

    Every process must call it; each receives all rows.

    Args:
        trainer: the Trainer, after the evaluation.
        loader: the loader of this process.
        columns: values with one row for each scored image, in the loader's order.

    Returns:
        The indices of the images, ascending, int64; then the columns in the same order, on the CPU.
    """
    # not loader.sampler: for predictions Lightning wraps the batch sampler, with another sampler
    visited = chain.from_iterable(cast(Any, loader.batch_sampler))
    indices = torch.tensor(list(islice(visited, len(columns[0]))))
    shares: list[Any] = [(indices, *(column.cpu() for column in columns))]
    if trainer.world_size > 1:
        (share,), shares = shares, [None] * trainer.world_size
        torch.distributed.all_gather_object(shares, share)
    gathered = [torch.cat(parts) for parts in zip(*shares, strict=True)]
    order = gathered[0].argsort()
    return tuple(column[order] for column in gathered)


def as_is(batch: Any) -> Any:
    """Returns the batch unchanged: a collate function for ``ImageSet``, which returns batches."""
    return batch


def split_indices(
    n: int, official_test: int, split: str, val_fraction: float, split_seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws the indices of the training, validation and test images.

    Args:
        n: total number of images; the last ``official_test`` are the official test images.
        split: ``study`` tests on a random tenth of all images, ``canonical`` on the official ones.
        val_fraction: share of the remaining images for validation.
        split_seed: seed of a private generator, so that the split depends on no other randomness.

    Returns:
        Three disjoint int64 tensors that together contain ``range(n)``.
    """
    generator = torch.Generator().manual_seed(split_seed)
    if split == "study":
        shuffled = torch.randperm(n, generator=generator)
        test, pool = shuffled.tensor_split([round(n / 10)])
    else:
        test = torch.arange(n - official_test, n)
        pool = torch.randperm(n - official_test, generator=generator)
    val, train = pool.tensor_split([round(len(pool) * val_fraction)])
    return train, val, test
