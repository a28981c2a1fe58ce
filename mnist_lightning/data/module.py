"""Data module for MNIST and data sets of the same format.

The whole set is kept in memory as uint8 tensors. A mini-batch is one indexing operation; scaling,
normalisation and the resize to 224 pixels happen per batch, on the device that trains.
"""

import os
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from mnist_lightning.checks import check_choice, check_count
from mnist_lightning.data.augmentation import Augment
from mnist_lightning.data.download import download
from mnist_lightning.data.photos import IMAGES, read_image
from mnist_lightning.data.readers import (
    FILES,
    first_picture,
    missing_files,
    not_there,
    read_digits,
    read_files,
    where_to_put,
)
from mnist_lightning.data.sampling import EpochSampler, ImageSet, as_is, split_indices

SetName = Literal["MNIST", "FashionMNIST", "KMNIST"]
Source = Literal["auto", "mnist", "digits"]
Split = Literal["study", "canonical"]
Normalization = Literal["unit", "mnist", "imagenet"]

# (mean, standard deviation) of pixels in [0, 1]. "imagenet" is the mean over ImageNet's three
# channels: a gray image repeated three times needs one scalar, the same for each channel.
NORMALIZATIONS: dict[str, tuple[float, float]] = {
    "unit": (0.0, 1.0),
    "mnist": (0.1307, 0.3081),
    "imagenet": (0.449, 0.226),
}


class MNISTDataModule(LightningDataModule):
    """The 70,000 digits, split into train, validation and test, in mini-batches.

    Args:
        name: name of the data set; by default MNIST.
        source: ``mnist`` takes the set named above, from ``data_dir`` or else from its mirrors;
            ``digits`` takes scikit-learn's 1,797 real 8x8 digits, enlarged to 28x28; ``auto`` takes
            ``mnist`` and, if neither name nor ``data_dir`` nor ``MNIST_DATA_DIR`` is given, falls
            back to ``digits`` with a warning.
        data_dir: folder that contains ``MNIST/raw/...`` in torchvision's layout, raw or .gz. The
            default is the environment variable ``MNIST_DATA_DIR``, else ``data``.
        split: ``study`` shuffles all 70,000 images and takes 63,000 for training and validation and
            7,000 for the test; ``canonical`` keeps MNIST's official 10,000 test images.
        val_fraction: share of the non-test images for validation.
        split_seed: the only seed that the split depends on.
        batch_size: images in a training mini-batch, in each process.
        eval_batch_size: images in a validation or test mini-batch; changes memory, not results.
        image_size: side of the images that the model receives, in pixels. If it is not 28, each
            batch is resized (bilinear, antialiased when it shrinks) on the device.
        normalization: ``unit`` divides pixels by 255; ``mnist`` and ``imagenet`` then subtract
            that set's mean and divide by its standard deviation, one scalar for the gray channel.
        predict_dir: folder of image files for ``predict``; by default the validation images.
        augment: changes to the training images; by default none.

    A batch is ``(images, labels)``: from the loaders uint8 ``(b, 28, 28)`` and int64 ``(b,)``;
    after ``on_after_batch_transfer``, which the Trainer calls, the images are float32
    ``(b, 1, image_size, image_size)``. With ``augment``, the training loader adds the numbers of
    the images in ``train_set``, int64 ``(b,)``, which the same hook uses up.
    """

    name: SetName
    train_set: ImageSet
    val_set: ImageSet
    test_set: ImageSet
    checksum: str
    """SHA-256 over images and labels as read; raw and .gz files give the same value."""

    steps_known = True  # see execution.altered

    def __init__(
        self,
        name: SetName | None = None,
        source: Source = "auto",
        data_dir: str | None = None,
        split: Split = "study",
        val_fraction: float = 0.2,
        split_seed: int = 0,
        batch_size: int = 32,
        eval_batch_size: int = 1000,
        image_size: int = 28,
        normalization: Normalization = "unit",
        predict_dir: str | None = None,
        augment: Augment = Augment(),  # noqa: B008 (it cannot change)
    ) -> None:
        super().__init__()
        if not isinstance(augment, Augment):  # plain, as checkpoints and YAML files have it
            augment = Augment(**augment)
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must lie between 0 and 1, got {val_fraction}")
        check_count("batch_size", batch_size)
        check_count("eval_batch_size", eval_batch_size)
        check_count("image_size", image_size)
        if image_size > 1024:
            raise ValueError(f"image_size must be at most 1024, got {image_size}")
        check_choice("name", name or "MNIST", SetName)
        check_choice("source", source, Source)
        check_choice("split", split, Split)
        check_choice("normalization", normalization, Normalization)
        folder = data_dir or os.environ.get("MNIST_DATA_DIR")
        if source == "auto" and (name or folder):
            source = "mnist"  # the user named a set or a folder: no fallback to the digits
        name = name or "MNIST"
        self.save_hyperparameters(ignore=["predict_dir", "augment"])
        # a subclass may have passed other values
        self.hparams.update(name=name, source=source)
        if augment:
            self.hparams["augment"] = augment.chosen()
        self.name, self.source, self.split = name, source, split
        self.data_dir = Path(folder or "data")
        self.val_fraction, self.split_seed = val_fraction, split_seed
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.image_size, self.normalization = image_size, normalization
        self.predict_dir, self.augment = predict_dir, augment
        self._loaded = False
        self._no_download = "not tried"

    def prepare_data(self) -> None:
        """Downloads missing files; Lightning calls it in one process only."""
        missing = missing_files(self.name, self.data_dir)
        if self.source == "digits" or not missing:
            return
        if len(missing) == len(FILES) and (image := first_picture(self.data_dir)):
            # the user's own image folder: do not download into it
            raise ValueError(
                not_there(self.name, self.data_dir, f"it holds other images ({image.name})")
            )
        try:
            download(self.name, self.data_dir)
        except OSError as error:
            # if some files are present, the user meant this set: no fallback to the digits
            if self.source == "mnist" or len(missing) < len(FILES):
                reason = f"no {', no '.join(missing)}; {error}"
                raise ValueError(not_there(self.name, self.data_dir, reason)) from error
            self._no_download = str(error)

    def setup(self, stage: str | None = None) -> None:
        """Reads, verifies and splits the set; the split is the same in every process."""
        if self._loaded:
            return
        if self.source == "auto":
            all_missing = len(missing_files(self.name, self.data_dir)) == len(FILES)
            self.source = "digits" if all_missing else "mnist"
            if self.source == "digits":
                rank_zero_warn(
                    f"{self.name} is not in {self.data_dir} and was not downloaded"
                    f" ({self._no_download}): training on scikit-learn's 1,797 small digits"
                    " instead. The results say"
                    f" nothing about {self.name}. {where_to_put(self.name, self.data_dir)}"
                )
            # checkpoints must name the source that was used, not "auto"
            self.hparams["source"] = self.source
        pool = read_digits() if self.source == "digits" else read_files(self.name, self.data_dir)
        self.checksum = pool.checksum
        train, val, test = split_indices(
            len(pool.labels), pool.official_test, self.split, self.val_fraction, self.split_seed
        )
        for part, indices in (("train", train), ("validate", val), ("test", test)):
            if not len(indices):
                raise ValueError(
                    f"val_fraction {self.val_fraction} of {len(train) + len(val):,} images leaves"
                    f" none to {part} on; the study uses 0.2"
                )
        self.train_set = ImageSet(pool.images[train], pool.labels[train])
        self.val_set = ImageSet(pool.images[val], pool.labels[val])
        self.test_set = ImageSet(pool.images[test], pool.labels[test])
        self._loaded = True

    def describe(self) -> str:
        """Describes the data in one line; call it after ``setup``."""
        name = self.name if self.source == "mnist" else "scikit-learn's digits"
        sizes = f"{len(self.train_set):,} / {len(self.val_set):,} / {len(self.test_set):,}"
        return f"{name}, split {self.split} (seed {self.split_seed}): {sizes} train / val / test"

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        sampler = EpochSampler(
            self.train_set,
            num_replicas=trainer.world_size if trainer else 1,
            rank=trainer.global_rank if trainer else 0,
            seed=_seed(),
        )
        train_set = self.train_set
        if self.augment:
            train_set = ImageSet(train_set.images, train_set.labels, numbered=True)
        return self._loader(train_set, self.batch_size, sampler)

    def val_dataloader(self) -> DataLoader:
        return self._eval_loader(self.val_set)

    def test_dataloader(self) -> DataLoader:
        return self._eval_loader(self.test_set)

    def predict_dataloader(self) -> DataLoader:
        if self.predict_dir is None:
            return self.val_dataloader()
        images = torch.stack([read_image(path) for path in self.predict_files()])
        unknown = torch.full((len(images),), -1)
        return self._eval_loader(ImageSet(images, unknown))

    def predict_files(self) -> list[Path]:
        """Lists the image files of ``predict_dir``, sorted by name.

        Raises:
            ValueError: the folder is missing or contains no image.
        """
        folder = Path(self.predict_dir or "")
        files = sorted(path for path in folder.glob("*") if path.suffix.lower() in IMAGES)
        if not files:
            raise ValueError(f"no image (.png, .jpg, .gif, .webp) in predict_dir: {folder}")
        return files

    def on_after_batch_transfer(
        self, batch: tuple[Tensor, ...], dataloader_idx: int
    ) -> tuple[Tensor, Tensor]:
        images, labels, *numbers = batch
        pixels = self.preprocess(images, *numbers)
        if self.trainer is not None:
            # Lightning converts batches for "64-true" and "bf16-true" before this hook
            pixels = self.trainer.precision_plugin.convert_input(pixels)
        return pixels, labels

    def preprocess(self, images: Tensor, numbers: Tensor | None = None) -> Tensor:
        """uint8 ``(b, 28, 28)`` -> normalised float32 ``(b, 1, image_size, image_size)``.

        Args:
            images: as the loaders give them.
            numbers: of training images, which are then augmented; see ``ImageSet``.
        """
        mean, std = NORMALIZATIONS[self.normalization]
        pixels = images.unsqueeze(1).float().div_(255)
        if numbers is not None:
            epoch = self.trainer.current_epoch if self.trainer else 0
            pixels = self.augment(pixels, numbers, _seed(), epoch)
        if (mean, std) != (0.0, 1.0):
            pixels.sub_(mean).div_(std)
        if self.image_size != images.shape[-1]:
            size = (self.image_size, self.image_size)
            pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)
        return pixels

    def _eval_loader(self, data: ImageSet) -> DataLoader:
        """Makes a loader of each image once, in order; several processes share the images.

        Raises:
            ValueError: there are fewer images than processes.
        """
        trainer = self.trainer
        if trainer is None or trainer.world_size == 1:
            return self._loader(data, self.eval_batch_size)
        processes = trainer.world_size
        if len(data) < processes:
            # Lightning would end a process without a batch, and the others would wait for it
            raise ValueError(
                f"{processes} processes cannot share {len(data)} images:"
                f" use --trainer.devices {len(data)} or fewer"
            )
        # Lightning does not replace this sampler; its default for several processes repeats images
        # until all processes have equally many
        share = UnrepeatedDistributedSampler(
            data, num_replicas=processes, rank=trainer.global_rank, shuffle=False
        )
        return self._loader(data, self.eval_batch_size, share)

    @staticmethod
    def _loader(
        data: ImageSet, batch_size: int, sampler: DistributedSampler | None = None
    ) -> DataLoader:
        # no worker processes: indexing takes less time than sending the batch between processes
        return DataLoader(data, batch_size=batch_size, sampler=sampler, collate_fn=as_is)


def _seed() -> int:
    """The training's; seed_everything sets it for this process and its child processes."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))
