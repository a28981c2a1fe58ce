"""DataSpec: the shape and the classes of a data set's images."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

DIGITS = tuple("0123456789")


@dataclass(frozen=True)
class DataSpec:
    """What a network must know about its images; by default those of MNIST.

    The data module makes it, and each checkpoint contains it.

    Args:
        channels: 1 for gray images, 3 for colour.
        height: of the images that the network receives, in pixels.
        width: likewise.
        classes: the names of the classes; a label is a position in this list.
        mean: one value for each channel, of pixels from 0 to 1. Subtracted from the pixels.
        std: likewise. The pixels are then divided by it.
        drawn: whether an image is one drawn sign, light on dark and centred, as in MNIST. Image
            files are then prepared like that; otherwise they are scaled and cropped.

    Raises:
        ValueError: there is no pixel, there are fewer than two classes, or two have one name.
    """

    channels: int = 1
    height: int = 28
    width: int = 28
    classes: tuple[str, ...] = DIGITS
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    drawn: bool = True

    def __post_init__(self) -> None:
        for name in ("classes", "mean", "std"):  # a checkpoint and a YAML file have lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if min(self.channels, self.height, self.width) < 1:
            raise ValueError(
                f"images need at least one channel and one pixel, got {self.channels} x"
                f" {self.height} x {self.width}"
            )
        if len(self.classes) < 2 or len(set(self.classes)) < len(self.classes):
            raise ValueError(
                f"a classifier needs two or more classes with different names, got"
                f" {list(self.classes)}"
            )
        if not len(self.mean) == len(self.std) == self.channels or min(self.std) <= 0:
            raise ValueError(
                f"mean and std need one value for each of {self.channels} channels, and std must be"
                f" positive; got {list(self.mean)} and {list(self.std)}"
            )

    @classmethod
    def of(cls, spec: "DataSpec | Mapping[str, Any] | None") -> "DataSpec":
        """Makes a DataSpec of plain values, as checkpoints have them; MNIST's of None."""
        return spec if isinstance(spec, DataSpec) else cls(**(spec or {}))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return self.channels, self.height, self.width

    @property
    def pixels(self) -> int:
        """Number of values in an image, all channels together."""
        return self.channels * self.height * self.width

    @property
    def black(self) -> tuple[float, ...]:
        """What the network receives of a black pixel: one value for each channel."""
        return tuple((0 - mean) / std for mean, std in zip(self.mean, self.std, strict=True))

    def unnormalised(self) -> "DataSpec":
        """Returns the same with pixels from 0 to 1."""
        return replace(self, mean=(0.0,) * self.channels, std=(1.0,) * self.channels)

    def plain(self) -> dict[str, Any]:
        """Returns its values as a dictionary of numbers, strings and lists."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
