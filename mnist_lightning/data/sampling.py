"""Chooses the images of each mini-batch: split, order in an epoch, shares of the processes."""

from collections.abc import Iterator
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


class ImageSet(Dataset):
    """Images and labels in memory; a whole mini-batch is one indexing operation.

    Args:
        images: uint8, shape ``(n, 28, 28)``.
        labels: int64, shape ``(n,)``.
        numbered: whether a mini-batch has a third tensor, the numbers of its images in the set.
    """

    def __init__(self, images: Tensor, labels: Tensor, numbered: bool = False) -> None:
        self.images, self.labels, self.numbered = images, labels, numbered

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        # DataLoader's fetcher calls this with the indices of the whole mini-batch
        rows = torch.tensor(indices)
        # index_select is several times as fast as indexing, with the same result
        batch = self.images.index_select(0, rows), self.labels.index_select(0, rows)
        return (*batch, rows) if self.numbered else batch


class EpochSampler(DistributedSampler):
    """Visits the training set in ``epoch_order``; the processes take its images in turn.

    It is a ``DistributedSampler``, so Lightning sets its epoch and does not replace it under DDP.
    Together, n processes with mini-batches of b images see the same mini-batches as one process
    with mini-batches of n * b.
    """

    start = 0
    """Number of this process's images that the next pass skips, because a resumed epoch has already
    trained on them."""

    def __iter__(self) -> Iterator[int]:
        order = epoch_order(len(cast(ImageSet, self.dataset)), self.seed, self.epoch).tolist()
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
