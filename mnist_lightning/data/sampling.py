"""Which images make a mini-batch: the split, the order of an epoch, the shares of processes."""

from collections.abc import Iterator
from itertools import chain, islice
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """The order in which epoch ``epoch`` of a training with ``seed`` visits ``n`` images.

    It depends on these three numbers alone: not on what else drew random numbers, nor on how often
    the training was interrupted, nor on the number of processes. Whoever trains on this order (the
    Trainer, or many models at once) sees the same mini-batches.

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
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        # DataLoader's fetcher calls this with the indices of the whole mini-batch
        rows = torch.tensor(indices)
        # several times as fast as plain indexing, with the same result
        return self.images.index_select(0, rows), self.labels.index_select(0, rows)


class EpochSampler(DistributedSampler):
    """Visits the training set in ``epoch_order``, dealt out to the processes one by one.

    Being a ``DistributedSampler``, Lightning tells it the epoch and leaves it in place under DDP:
    n processes with mini-batches of b images then see, together, the very mini-batches that one
    process sees with n * b.
    """

    start = 0
    """How many of this process's images the next pass leaves out, having been trained on before."""

    def __iter__(self) -> Iterator[int]:
        order = epoch_order(len(cast(ImageSet, self.dataset)), self.seed, self.epoch).tolist()
        order += order[: self.total_size - len(order)]  # all processes take as many steps
        start, self.start = self.start, 0
        return iter(order[self.rank :: self.num_replicas][start:])


def in_image_order(trainer: Trainer, loader: DataLoader, *columns: Tensor) -> tuple[Tensor, ...]:
    """Puts together the rows that all processes made of their shares of an evaluation.

    Every process must call it, and each gets the whole.

    Args:
        trainer: of the evaluation, which is over.
        loader: of this process.
        columns: a row for each image, in the loader's order; as many rows as images were scored.

    Returns:
        The indices of the images, ascending, int64; then the columns, in that order, on the CPU.
    """
    # for predictions Lightning wraps the batch sampler, and the loader's own sampler is another
    dealt = chain.from_iterable(cast(Any, loader.batch_sampler))
    indices = torch.tensor(list(islice(dealt, len(columns[0]))))
    shares: list[Any] = [(indices, *(column.cpu() for column in columns))]
    if trainer.world_size > 1:
        (share,), shares = shares, [None] * trainer.world_size
        torch.distributed.all_gather_object(shares, share)
    gathered = [torch.cat(parts) for parts in zip(*shares, strict=True)]
    order = gathered[0].argsort()
    return tuple(column[order] for column in gathered)


def as_is(batch: Any) -> Any:
    """Collates nothing: the data set gives whole mini-batches."""
    return batch


def split_indices(
    n: int, official_test: int, split: str, val_fraction: float, split_seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the train, validation and test images.

    Args:
        n: images in all; the last ``official_test`` of them are the set's own test images.
        split: ``study`` tests on a random tenth of all, ``canonical`` on the set's own.
        val_fraction: share of the others that validates.
        split_seed: seeds a private generator, so that no other randomness moves the split.

    Returns:
        Three int64 tensors, disjoint, which together hold ``range(n)``.
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
