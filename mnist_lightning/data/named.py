"""The data sets that have a name: their files, shapes and classes, without reading or loading."""

import string
from dataclasses import dataclass
from typing import Literal

from mnist_lightning.spec import DIGITS

SetName = Literal[
    "MNIST",
    "FashionMNIST",
    "KMNIST",
    "QMNIST",
    "EMNIST-byclass",
    "EMNIST-bymerge",
    "EMNIST-balanced",
    "EMNIST-letters",
    "EMNIST-digits",
    "EMNIST-mnist",
    "CIFAR10",
    "CIFAR100",
    "SVHN",
]
FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@dataclass(frozen=True)
class NamedSet:
    """What is known of a data set before any file of it is there.

    Args:
        dataset: torchvision's class, which has the addresses and the checksums.
        folder: below ``data_dir``, with the files; as in torchvision.
        files: all of them, those of the training images first. Of the format ``mnist`` without
            their ending ``.gz``.
        format: how the files are read.
        classes: the names of the classes, in the order of the labels.
        colour: whether the images are uint8 ``(n, 3, size, size)``, else ``(n, size, size)``.
        size: side of an image in pixels.
    """

    dataset: str
    folder: str
    files: tuple[str, ...]
    format: Literal["mnist", "qmnist", "emnist", "cifar", "svhn"]
    classes: tuple[str, ...] = DIGITS
    colour: bool = False
    size: int = 28

    @property
    def channels(self) -> int:
        return 3 if self.colour else 1


_CLOTHES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
_HIRAGANA = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
_QMNIST = tuple(
    f"qmnist-{part}-{what}.gz"
    for part in ("train", "test")
    for what in ("images-idx3-ubyte", "labels-idx2-int")
)
# small letters that look like their capitals are one class with them
_MERGED = (*DIGITS, *string.ascii_uppercase, *"abdefghnqrt")
_CIFAR10 = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())
_CIFAR100 = tuple(
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus"
    " butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch"
    " crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo"
    " keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse"
    " mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy"
    " porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper"
    " snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television"
    " tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm".split()
)


def _like_mnist(name: str, classes: tuple[str, ...] = DIGITS) -> NamedSet:
    return NamedSet(name, f"{name}/raw", FILES, "mnist", classes)


def _emnist(classes: tuple[str, ...] = DIGITS) -> NamedSet:
    # one archive has the files of all six splits, and only the archive has a published checksum
    return NamedSet("EMNIST", "EMNIST/raw", ("gzip.zip",), "emnist", classes)


NAMED: dict[str, NamedSet] = {
    "MNIST": _like_mnist("MNIST"),
    "FashionMNIST": _like_mnist("FashionMNIST", _CLOTHES),
    "KMNIST": _like_mnist("KMNIST", _HIRAGANA),
    "QMNIST": NamedSet("QMNIST", "QMNIST/raw", _QMNIST, "qmnist"),
    "EMNIST-byclass": _emnist((*DIGITS, *string.ascii_uppercase, *string.ascii_lowercase)),
    "EMNIST-bymerge": _emnist(_MERGED),
    "EMNIST-balanced": _emnist(_MERGED),
    "EMNIST-letters": _emnist(tuple(string.ascii_lowercase)),
    "EMNIST-digits": _emnist(),
    "EMNIST-mnist": _emnist(),
    "CIFAR10": NamedSet(
        "CIFAR10",
        "cifar-10-batches-py",
        (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"),
        "cifar",
        _CIFAR10,
        colour=True,
        size=32,
    ),
    "CIFAR100": NamedSet(
        "CIFAR100", "cifar-100-python", ("train", "test"), "cifar", _CIFAR100, colour=True, size=32
    ),
    "SVHN": NamedSet(
        "SVHN", "", ("train_32x32.mat", "test_32x32.mat"), "svhn", colour=True, size=32
    ),
}
