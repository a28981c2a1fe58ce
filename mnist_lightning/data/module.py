"""Data module for MNIST, data sets like it, and the user's own folders of images.

The whole set is kept in memory as uint8 tensors, or mapped from a file. A mini-batch is one
indexing operation; scaling, normalisation and the resize to 224 pixels happen per batch, on the
device that trains.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from mnist_lightning.checks import check_choice, check_count
from mnist_lightning.data.augmentation import Augment
from mnist_lightning.data.download import download
from mnist_lightning.data.folders import (
    Listing,
    Pictures,
    common_format,
    count_shared,
    list_images,
    read_folder,
    split_stratified,
)
from mnist_lightning.data.named import NAMED, SetName
from mnist_lightning.data.photos import IMAGES, read_for
from mnist_lightning.data.preparation import prepare
from mnist_lightning.data.readers import (
    first_picture,
    missing_files,
    not_there,
    read_digits,
    read_files,
    where_to_put,
)
from mnist_lightning.data.sampling import EpochSampler, ImageSet, as_is, split_indices
from mnist_lightning.files import printable
from mnist_lightning.spec import DIGITS, DataSpec

Source = Literal["auto", "mnist", "digits", "folder"]
Split = Literal["study", "canonical"]
Normalization = Literal["unit", "mnist", "imagenet"]

# (mean, standard deviation) of pixels in [0, 1]. "imagenet" is the mean over ImageNet's three
# channels: a gray image repeated three times needs one scalar, the same for each channel.
NORMALIZATIONS: dict[str, tuple[float, float]] = {
    "unit": (0.0, 1.0),
    "mnist": (0.1307, 0.3081),
    "imagenet": (0.449, 0.226),
}
_IMAGENET_COLOUR = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_FOLDER_SIZE = 64  # pixels a side, for images of different sizes
_MOST_LISTED = 20  # classes, in one line
_LARGEST_NATIVE = 224  # larger images of one size are scaled down
_ONLY_IF_CHOSEN = ("augment", "balance", "train_fraction")  # hyper-parameters, if not the default


class MNISTDataModule(LightningDataModule):
    """Images, split into train, validation and test, in mini-batches: MNIST's 70,000 by default.

    Args:
        name: name of the data set; by default MNIST. A set of colour images (CIFAR, SVHN) has
            3 channels and 32 pixels a side.
        source: ``mnist`` takes the set named above, from ``data_dir`` or else from its mirrors;
            ``digits`` takes scikit-learn's 1,797 real 8x8 digits, enlarged to 28x28; ``auto`` takes
            ``mnist`` and, if neither name nor ``data_dir`` nor ``MNIST_DATA_DIR`` is given, falls
            back to ``digits`` with a warning. ``folder`` takes your own images from ``data_dir``.
        data_dir: folder that contains ``MNIST/raw/...`` in torchvision's layout, raw or .gz; other
            sets likewise, in the form whose checksum is published. The default is the environment
            variable ``MNIST_DATA_DIR``, else ``data``. With source ``folder``: contains
            ``<class>/*.jpg``, or ``train|val|test/<class>/*.jpg`` if you have split the images
            already. Then your split is kept.
        split: ``study`` shuffles all 70,000 images and takes 63,000 for training and validation and
            7,000 for the test; ``canonical`` keeps MNIST's official 10,000 test images. Other
            named sets are split in the same shares, or keep their own test set. A folder has its
            own split: see ``test_fraction``.
        val_fraction: share of the non-test images for validation. With 0 there is no validation:
            all of them are trained on, also those of a folder ``val``.
        test_fraction: share of a folder's images for the test, if it has no ``test`` folder. From a
            folder, the same share of each class is taken for the test and for validation.
        split_seed: the only seed that the split depends on.
        batch_size: images in a training mini-batch, in each process.
        eval_batch_size: images in a validation or test mini-batch; changes memory, not results.
        image_size: side of the images that the model receives, in pixels; by default the side that
            the data set has: 28 for MNIST, 32 for CIFAR. If it is another, each batch is resized
            (bilinear, antialiased when it shrinks) on the device. Images of a folder are scaled and
            cropped to it once, when they are read; by default to 64 pixels if they have different
            sizes.
        normalization: ``unit`` divides pixels by 255; ``mnist`` and ``imagenet`` then subtract
            that set's mean and divide by its standard deviation, one scalar for gray images and for
            ``mnist``, one value for each channel of colour images for ``imagenet``.
        predict_dir: folder of image files for ``predict``; by default the validation images.
        augment: changes to the training images; by default none.
        channels: 1 makes the images of a folder gray, 3 colour; by default as the files are.
        classes: names of the classes of a folder, in the order of the labels; by default the names
            of its folders, sorted. A checkpoint contains them.
        train_fraction: share of each class's training images that is trained on. It changes neither
            validation nor test; the images of a smaller share are among those of a larger one.
        balance: if True, each epoch draws as many images as there are, each class equally often on
            average, instead of each image once.

    A batch is ``(images, labels)``: from the loaders uint8 ``(b, 28, 28)``, or
    ``(b, channels, height, width)`` of colour images and from a folder, and int64 ``(b,)``; after
    ``on_after_batch_transfer``, which the Trainer calls, the images are float32
    ``(b, channels, image_size, image_size)``. With ``augment``, the training loader adds the
    numbers of the images in ``train_set``, int64 ``(b,)``, which the same hook uses up.
    """

    name: str
    train_set: ImageSet
    val_set: ImageSet
    test_set: ImageSet
    checksum: str
    """SHA-256 over images and labels as read; raw and .gz files give the same value. Of a folder:
    over its images, their labels and parts."""

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
        image_size: int | None = None,
        normalization: Normalization = "unit",
        predict_dir: str | None = None,
        augment: Augment = Augment(),  # noqa: B008 (it cannot change)
        test_fraction: float = 0.1,
        channels: Literal[1, 3] | None = None,
        classes: list[str] | None = None,
        balance: bool = False,
        train_fraction: float = 1.0,
    ) -> None:
        super().__init__()
        if not isinstance(augment, Augment):  # plain, as checkpoints and YAML files have it
            augment = Augment(**augment)
        for option, fraction in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
            if not (0 < fraction < 1 or (fraction == 0 and option == "val_fraction")):
                raise ValueError(f"{option} must lie between 0 and 1, got {fraction}")
        if not 0 < train_fraction <= 1:
            raise ValueError(f"train_fraction must lie between 0 and 1, got {train_fraction}")
        check_count("batch_size", batch_size)
        check_count("eval_batch_size", eval_batch_size)
        if image_size is not None:
            check_count("image_size", image_size)
            if image_size > 1024:
                raise ValueError(f"image_size must be at most 1024, got {image_size}")
        check_choice("name", name or "MNIST", SetName)
        check_choice("source", source, Source)
        check_choice("split", split, Split)
        check_choice("normalization", normalization, Normalization)
        folder = data_dir or (os.environ.get("MNIST_DATA_DIR") if source != "folder" else None)
        if source == "auto" and (name or folder):
            source = "mnist"  # the user named a set or a folder: no fallback to the digits
        of_folder = {"test_fraction": test_fraction, "channels": channels, "classes": classes}
        if source == "folder":
            if name:
                raise ValueError(f"name {name} and source folder contradict each other: choose one")
            if folder is None:
                raise ValueError("source folder needs a folder of images: --data.data_dir DIR")
        else:
            for option in ("channels", "classes"):
                if of_folder[option] is not None:
                    raise ValueError(f"{option} is only for images from a folder: source folder")
        if source != "folder":
            name = name or "MNIST"
        self.save_hyperparameters(
            ignore=[*_ONLY_IF_CHOSEN, *of_folder, "predict_dir", "image_size"]
        )
        # a subclass may have passed other values
        self.hparams.update(name=name, source=source)
        if source == "folder":
            self.hparams.update(of_folder)
        else:
            image_size = image_size or (28 if source == "digits" else NAMED[name or "MNIST"].size)
        self.hparams.update(image_size=image_size)
        if augment:
            self.hparams["augment"] = augment.chosen()
        if balance:
            self.hparams["balance"] = True
        if train_fraction < 1:
            self.hparams["train_fraction"] = train_fraction
        self.name = name or Path(folder or "").resolve().name
        self.source, self.split = source, split
        self.data_dir = Path(folder or "data")
        self.val_fraction, self.split_seed = val_fraction, split_seed
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.normalization = normalization
        self.predict_dir, self.augment = predict_dir, augment
        self.test_fraction, self.balance = test_fraction, balance
        self.train_fraction = train_fraction
        self._loaded = False
        self._listing: Listing | None = None
        self._no_download = "not tried"

    @property
    def spec(self) -> DataSpec:
        """Shape and classes of the images that the model receives.

        Raises:
            ValueError: the source is a folder that is missing or has no classes.
        """
        channels, classes, drawn = 1, list(DIGITS), self.source != "folder"
        if self.source == "folder":
            if None in (self.hparams[name] for name in ("channels", "classes", "image_size")):
                self._look_into_folder()
            channels, classes = self.hparams["channels"], self.hparams["classes"]
        elif self.source != "digits":
            named = NAMED[self.name]
            channels, classes, drawn = named.channels, list(named.classes), not named.colour
        mean, std = ((value,) * channels for value in NORMALIZATIONS[self.normalization])
        if self.normalization == "imagenet" and channels == 3:
            mean, std = _IMAGENET_COLOUR
        size = self.hparams["image_size"]
        return DataSpec(channels, size, size, tuple(classes), mean, std, drawn)

    @property
    def image_size(self) -> int:
        """Side of the images that the model receives, in pixels."""
        return self.spec.height

    @image_size.setter
    def image_size(self, size: int) -> None:
        self.hparams["image_size"] = size  # subclasses set it after this class's constructor

    def _look_into_folder(self) -> None:
        """Chooses what the user left open: channels, classes, size. Checkpoints then have them."""
        self._listing = listing = list_images(self.data_dir)
        channels, size = common_format(listing.files)
        found = {
            "channels": channels,
            "classes": listing.classes,
            "image_size": min(size, _LARGEST_NATIVE) if size else _FOLDER_SIZE,
        }
        self.hparams.update({k: v for k, v in found.items() if self.hparams[k] is None})

    def prepare_data(self) -> None:
        """Downloads missing files; Lightning calls it in one process only."""
        if self.source == "folder" or self._predicts_files:
            return
        missing = missing_files(self.name, self.data_dir)
        if self.source == "digits" or not missing:
            return
        if len(missing) == len(NAMED[self.name].files) and (image := first_picture(self.data_dir)):
            # the user's own image folder: do not download into it
            raise ValueError(
                not_there(self.name, self.data_dir, f"it holds other images ({image.name})")
            )
        try:
            download(self.name, self.data_dir)
        except OSError as error:
            # if some files are present, the user meant this set: no fallback to the digits
            if self.source == "mnist" or len(missing) < len(NAMED[self.name].files):
                reason = f"no {', no '.join(missing)}; {error}"
                raise ValueError(not_there(self.name, self.data_dir, reason)) from error
            self._no_download = str(error)

    def setup(self, stage: str | None = None) -> None:
        """Reads, verifies and splits the set; the split is the same in every process."""
        if self._loaded or self._predicts_files:
            return
        if self.source == "folder":
            self._set_up_folder(stage)
            return
        if self.source == "auto":
            missing = missing_files(self.name, self.data_dir)
            self.source = "digits" if len(missing) == len(NAMED[self.name].files) else "mnist"
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
            if not len(indices) and not (part == "validate" and self.val_fraction == 0):
                raise ValueError(
                    f"val_fraction {self.val_fraction} of {len(train) + len(val):,} images leaves"
                    f" none to {part} on; the study uses 0.2"
                )
        self._take(*(ImageSet(pool.images[part], pool.labels[part]) for part in (train, val, test)))

    def _set_up_folder(self, stage: str | None) -> None:
        spec = self.spec
        pictures = read_folder(self.data_dir, spec.height, spec.channels, self._listing)
        self._listing = None
        for warning in pictures.warnings:
            rank_zero_warn(warning)
        unknown = sorted(set(pictures.listing.classes) - set(spec.classes))
        if unknown:
            raise ValueError(
                f"{self.data_dir} has a class {unknown[0]!r}, which is not among the known"
                f" {len(spec.classes)}: {', '.join(spec.classes[:20])}. Rename or remove its folder"
            )
        known = {name: label for label, name in enumerate(spec.classes)}
        of_folder = torch.tensor([known[name] for name in pictures.listing.classes])
        labels = of_folder[torch.tensor(pictures.listing.labels)]
        parts = self._folder_parts(pictures, labels)
        train, val, test = parts
        for part, rows, stages in (
            ("train", train, ["fit"]),
            ("val", val, ["fit", "validate", "predict"]),
            ("test", test, ["test"]),
        ):
            if part == "val" and self.val_fraction == 0:
                continue
            if stage in stages and not len(rows):
                raise ValueError(
                    f"{self.data_dir} leaves no images for {part}: put more images into each class,"
                    f" or make folders {part}/<class>"
                )
        if shared := count_shared(pictures.digests, test, torch.cat([train, val])):
            rank_zero_warn(
                f"{shared:,} of the {len(test):,} test images are also among the images for"
                " training or validation, equal in all pixels: the test result will be too good"
            )
        self.checksum = pictures.checksum
        self._take(*(ImageSet(pictures.images, labels[rows], rows=rows) for rows in parts))

    def _take(self, train: ImageSet, val: ImageSet, test: ImageSet) -> None:
        self._all_train, self.val_set, self.test_set = train, val, test
        self.train_set = train
        if self.train_fraction < 1:
            generator = torch.Generator().manual_seed(self.split_seed)
            left_out = split_stratified(train.labels, 1 - self.train_fraction, generator)
            self.train_set = train.subset((~left_out).nonzero().flatten())
        self._loaded = True

    def share(self, other: "MNISTDataModule") -> None:
        """Takes the images of another module, with the same source and split, instead of reading.

        Args:
            other: after its ``setup``.
        """
        self.checksum = other.checksum
        self._take(other._all_train, other.val_set, other.test_set)

    def _folder_parts(self, pictures: Pictures, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rows of the training, validation and test images."""
        generator = torch.Generator().manual_seed(self.split_seed)
        names = pictures.listing.parts
        rows = {
            part: torch.tensor([i for i, name in enumerate(names) if name == part]).long()
            for part in ("", "train", "val", "test")
        }
        rest = rows[""] if len(rows[""]) else rows["train"]
        for part, fraction in (("test", self.test_fraction), ("val", self.val_fraction)):
            if not len(rows[part]) and fraction > 0:
                cut = split_stratified(labels[rest], fraction, generator)
                rows[part], rest = rest[cut], rest[~cut]
        if self.val_fraction == 0:
            rest, rows["val"] = torch.cat([rest, rows["val"]]), rows["val"][:0]
        return rest, rows["val"], rows["test"]

    @property
    def _predicts_files(self) -> bool:
        """Whether only the files of ``predict_dir`` are needed, not the data set."""
        trainer = self.trainer
        predicts = trainer is not None and trainer.state.fn == TrainerFn.PREDICTING
        return predicts and self.predict_dir is not None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint says of the user's folder: its path, and the checksum of its images."""
        if self.source != "folder" or not self._loaded:
            return {}
        return {"folder": str(self.data_dir.resolve()), "checksum": self.checksum}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Warns if the folder has changed since the checkpoint was written."""
        now = self.state_dict()
        if now and now["folder"] == state_dict.get("folder") and now != state_dict:
            rank_zero_warn(
                f"the images in {self.data_dir} have changed since the training, and are split"
                " anew: images that were trained on may now be among those for validation and test"
            )

    def describe(self) -> str:
        """Describes the data in one line; call it after ``setup``."""
        sizes = f"{len(self.train_set):,} / {len(self.val_set):,} / {len(self.test_set):,}"
        if self.source == "folder":
            spec = self.spec
            kind = "gray" if spec.channels == 1 else "colour"
            what = f"{printable(self.name)}, {len(spec.classes)} classes"
            what += f", {kind} {spec.height} x {spec.width} (split seed {self.split_seed})"
            return f"{what}: {sizes} train / val / test"
        name = self.name if self.source == "mnist" else "scikit-learn's digits"
        return f"{name}, split {self.split} (seed {self.split_seed}): {sizes} train / val / test"

    def describe_classes(self) -> str:
        """Describes the classes of the training images in one line; call it after ``setup``."""
        names = self.spec.classes
        counts = torch.bincount(self.train_set.labels, minlength=len(names)).tolist()
        if len(names) > _MOST_LISTED:
            return f"{len(names)} classes of {min(counts):,} to {max(counts):,} training images"
        each = (f"{printable(name)} {n:,}" for name, n in zip(names, counts, strict=True))
        return f"training images by class: {', '.join(each)}"

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        sampler = EpochSampler(
            self.train_set,
            num_replicas=trainer.world_size if trainer else 1,
            rank=trainer.global_rank if trainer else 0,
            seed=seed(),
        )
        sampler.balanced = self.balance
        train_set = self.train_set.with_numbers() if self.augment else self.train_set
        return self._loader(train_set, self.batch_size, sampler)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        if len(self.val_set):
            return self._eval_loader(self.val_set)
        if self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING:
            return []  # Lightning then trains without a validation
        raise ValueError(
            "there are no validation images: with val_fraction 0 all of them are trained on. Use"
            " test, or predict with the paths of other images"
        )

    def test_dataloader(self) -> DataLoader:
        return self._eval_loader(self.test_set)

    def predict_dataloader(self) -> DataLoader | list[DataLoader]:
        if self.predict_dir is None:
            return self.val_dataloader()
        spec = self.spec
        images = torch.stack([read_for(spec, path) for path in self.predict_files()])
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
        if images.is_floating_point() and self._has_features:
            return images, labels  # they have passed the network's first layers
        pixels = self.preprocess(images, *numbers)
        if self.trainer is not None:
            # Lightning converts batches for "64-true" and "bf16-true" before this hook
            pixels = self.trainer.precision_plugin.convert_input(pixels)
        return pixels, labels

    @property
    def _has_features(self) -> bool:
        sets = (vars(self).get(name) for name in ("train_set", "val_set"))
        return any(images is not None and images.features is not None for images in sets)

    def preprocess(self, images: Tensor, numbers: Tensor | None = None) -> Tensor:
        """uint8 images -> normalised float32 ``(b, channels, image_size, image_size)``.

        Args:
            images: as the loaders give them.
            numbers: of training images, which are then augmented; see ``ImageSet``.
        """
        if numbers is None:
            return prepare(images, self.spec)
        epoch = self.trainer.current_epoch if self.trainer else 0
        augmented = partial(self.augment, numbers=numbers, seed=seed(), epoch=epoch)
        return prepare(images, self.spec, augmented)

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


def seed() -> int:
    """The training's; seed_everything sets it for this process and its child processes."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))
