"""Features: what the frozen first stages of a network make of each image, kept for all epochs.

A network must name its stages in order: an ``nn.Sequential`` does, torchvision's ResNet is known,
and any other network can have an attribute ``stages``, the names of its children in the order in
which its ``forward`` applies them, each to the output of the one before.
"""

import contextlib
import copy
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from mnist_lightning.data.folders import cache_folder
from mnist_lightning.files import read_json, reason, write_json
from mnist_lightning.training.memory import available_bytes

# Layers whose output for an image depends on this image and their weights alone: in evaluation mode
# the BatchNorm layers too, and dropout of share 0. Subclasses are not included.
_KNOWN = {
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.Identity, nn.Flatten, nn.Unflatten),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Mish),
    *(nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.Softplus, nn.PReLU),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d, nn.ZeroPad2d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
    *(nn.Sequential, BasicBlock, Bottleneck),
}
_DAY = 24 * 3600.0


class NoCache(Exception):
    """Why the output of frozen layers is not kept, as the end of a sentence."""


class Layout(NamedTuple):
    """How the features of one image lie in memory."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, features: Tensor) -> "Layout":
        """Of a mini-batch's features.

        Raises:
            NoCache: the images of the mini-batch do not lie one after the other.
        """
        expected = 1
        for stride, size in sorted(zip(features.stride()[1:], features.shape[1:], strict=True)):
            if size > 1 and stride != expected:
                break
            expected *= size
        in_turn = len(features) == 1 or features.stride(0) == expected
        if expected != features[0].numel() or not in_turn:
            raise NoCache("their output is no dense tensor")
        return cls(tuple(features.shape[1:]), features.stride()[1:], features.dtype)

    @property
    def size(self) -> int:
        """Values of one image."""
        return torch.Size(self.shape).numel()

    def fits(self, features: Tensor) -> bool:
        """Whether the features of a mini-batch lie like this."""
        other = Layout.of(features)
        strides = zip(self.shape, self.strides, other.strides, strict=True)
        return (self.shape, self.dtype) == (other.shape, other.dtype) and all(
            size == 1 or one == another for size, one, another in strides
        )

    def flat(self, features: Tensor) -> Tensor:
        """The features of a mini-batch as ``(b, size)``, in the order in which they lie."""
        return features.as_strided((len(features), self.size), (self.size, 1))

    def shaped(self, flat: Tensor) -> Tensor:
        """The features of a mini-batch as the network made them, from ``flat``."""
        return flat.as_strided((len(flat), *self.shape), (self.size, *self.strides))


class Prefix:
    """The first stages of a network, which training cannot change.

    After ``skip``, the network takes features in place of images: these stages then return them as
    they are. Given anything else, they compute as ever, and so do copies of the network.

    Args:
        net: the network.
        names: of its first stages.
    """

    def __init__(self, net: nn.Module, names: list[str]) -> None:
        self.net, self.names = net, names
        self.stages = [cast(nn.Module, net._modules[name]) for name in names]
        self.layers = [layer for stage in self.stages for layer in stage.modules()]
        self.norms = [layer for layer in self.layers if isinstance(layer, _BatchNorm)]
        self.shape: tuple[int, ...] | None = None
        self.passing = False
        """Whether features are on their way through the stages."""

    def __call__(self, pixels: Tensor) -> Tensor:
        """What the stages make of images, as in validation."""
        trained = [norm for norm in self.norms if norm.training]
        try:
            for norm in trained:
                norm.training = False
            for stage in self.stages:
                pixels = stage(pixels)
        finally:
            for norm in trained:
                norm.training = True
        return pixels

    def skip(self, shape: tuple[int, ...]) -> None:
        """Makes the network take features of this shape, without the mini-batch."""
        self.shape = shape
        for stage in self.stages:
            stage.forward = _Skipped(self, stage)  # type: ignore[method-assign]

    def compute(self) -> None:
        """Undoes ``skip``."""
        for stage in self.stages:
            vars(stage).pop("forward", None)

    def tensors(self) -> list[Tensor]:
        """The parameters and buffers."""
        return [t for s in self.stages for t in (*s.parameters(), *s.buffers())]

    def is_in_place(self) -> bool:
        """Whether the network still consists of these layers, and none of them trains."""
        stages = (self.net._modules.get(name) for name in self.names)
        layers = [layer for stage in stages if stage is not None for layer in stage.modules()]
        return (
            len(layers) == len(self.layers)
            and all(one is other for one, other in zip(layers, self.layers, strict=True))
            and not any(p.requires_grad for stage in self.stages for p in stage.parameters())
        )


class _Skipped:
    """The ``forward`` of a stage that returns features as they are."""

    def __init__(self, prefix: Prefix, stage: nn.Module) -> None:
        self.prefix, self.stage = prefix, stage

    def __call__(self, x: Tensor) -> Tensor:
        prefix = self.prefix
        if self.stage is prefix.stages[0]:
            prefix.passing = tuple(x.shape[1:]) == prefix.shape
        passing = prefix.passing
        if self.stage is prefix.stages[-1]:
            prefix.passing = False
        return x if passing else type(self.stage).forward(self.stage, x)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        stage = copy.deepcopy(self.stage, memo)
        return partial(type(stage).forward, stage)


def computed(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of a module that a mini-batch passes, without those that are skipped."""
    if not isinstance(vars(module).get("forward"), _Skipped):
        yield module
        for child in module.children():
            yield from computed(child)


def find(net: nn.Module, held: Collection[nn.Module], trained: Collection[Tensor]) -> Prefix:
    """Finds the first stages of a network whose output for an image stays the same.

    Args:
        net: the network.
        held: the norm layers that are kept in evaluation mode.
        trained: the parameters that an optimizer has.

    Raises:
        NoCache: there are none that are worth it.
    """
    owners: dict[nn.Module, set[str]] = {}
    for name, child in net._modules.items():
        for layer in child.modules() if child is not None else ():
            owners.setdefault(layer, set()).add(name)
    names: list[str] = []
    obstacle = "they are the whole network"
    for name in _stages(net):
        stage = cast(nn.Module, net._modules[name])
        found = _changes(f"net.{name}", stage, held, trained)
        if found is None and any(len(owners[layer]) > 1 for layer in stage.modules()):
            found = f"a layer of net.{name} is used twice"
        if found is not None:
            obstacle = found
            break
        names.append(name)
    prefix = Prefix(net, names)
    if not any(isinstance(layer, _ConvNd | nn.Linear) for layer in prefix.layers):
        raise NoCache(obstacle)
    return prefix


def _stages(net: nn.Module) -> list[str]:
    if type(net) is nn.Sequential:
        return list(net._modules)
    if type(net) is ResNet:
        layers = ("layer1", "layer2", "layer3", "layer4")
        return ["conv1", "bn1", "relu", "maxpool", *layers, "avgpool"]
    named: Any = getattr(net, "stages", None)
    if named and isinstance(named, list | tuple) and all(net._modules.get(name) for name in named):
        return list(named)
    raise NoCache(
        f"{type(net).__name__} does not name its stages in order, in an attribute ``stages``"
    )


def _changes(
    name: str, stage: nn.Module, held: Collection[nn.Module], trained: Collection[Tensor]
) -> str | None:
    """What makes the output of a stage differ between epochs, or may do so; None if nothing."""
    if any(p.requires_grad or p in trained for p in stage.parameters()):
        return f"{name} trains"
    for inner, layer in stage.named_modules():
        full = f"{name}.{inner}".rstrip(".")
        if type(layer) not in _KNOWN or "forward" in vars(layer):
            return f"{full} is a {type(layer).__name__}, which may compute anything"
        if isinstance(layer, _BatchNorm) and layer not in held:
            return f"the statistics of {full} adapt"
        if isinstance(layer, _DropoutNd) and layer.p:
            return f"{full} is random"
    return None


class Features:
    """The features of a set of images.

    Args:
        values: ``(n, size)``, as ``Layout.flat`` gives them.
        layout: of the features of one image.
    """

    def __init__(self, values: Tensor, layout: Layout) -> None:
        self.values, self.layout = values, layout

    def __call__(self, rows: Tensor) -> Tensor:
        """The features of some images, by their numbers, as the network made them."""
        return self.layout.shaped(self.values.index_select(0, rows.to(self.values.device)))


class Store:
    """Room for the features of all images, in memory or in a file of the user's cache.

    A GPU keeps them in its own memory only: it computes them faster than it could fetch them.

    Args:
        n: number of images.
        layout: of the features of one image.
        device: that trains.

    Raises:
        NoCache: there is no room.
    """

    def __init__(self, n: int, layout: Layout, device: torch.device) -> None:
        self.n, self.layout, self.device = n, layout, device
        self.bytes = n * layout.size * layout.dtype.itemsize
        if device.type == "cuda":
            self.in_memory, free = True, torch.cuda.mem_get_info(device)[0]
            if self.bytes > free / 2:
                raise NoCache(
                    f"their output takes {_size(self.bytes)}, more than half of the GPU's free"
                    f" memory ({_size(free)})"
                )
            return
        memory, disk = available_bytes(), 0.0
        self.in_memory = self.bytes <= memory / 2
        if self.in_memory:
            return
        with contextlib.suppress(OSError):
            cache_folder().mkdir(parents=True, exist_ok=True)
            disk = shutil.disk_usage(cache_folder()).free
        if self.bytes > disk / 2:
            raise NoCache(
                f"their output takes {_size(self.bytes)}, more than half of the memory"
                f" ({_size(memory)}) and of the disk at {cache_folder()} ({_size(disk)}) that is"
                " free"
            )

    def __str__(self) -> str:
        memory = "in the GPU's memory" if self.device.type == "cuda" else "in memory"
        where = memory if self.in_memory else f"in {cache_folder()}"
        return f"{_size(self.bytes)} {where}"

    def fill(self, parts: Iterator[Tensor]) -> Tensor:
        """Keeps features in memory.

        Args:
            parts: of consecutive images, as ``Layout.flat`` gives them.
        """
        shape = self.n, self.layout.size
        values = torch.empty(shape, dtype=self.layout.dtype, device=self.device)
        done = 0
        for part in parts:
            values[done : done + len(part)] = part
            done += len(part)
        return values

    def read(self, key: str) -> Tensor | None:
        """The features that an earlier training has written; None if missing or damaged."""
        path = _path(key)
        try:
            about = read_json(path.with_suffix(".json"), "")
            with path.open("rb") as file:
                whole = hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
            if whole != about.get("sha256") or path.stat().st_size != self.bytes:
                return None
            return self._map(path)
        except (OSError, ValueError):
            return None

    def write(self, key: str, parts: Iterator[Tensor]) -> Tensor:
        """Writes features into a file, and maps it. It replaces the files of other trainings.

        Raises:
            NoCache: the file cannot be written.
        """
        path = _path(key)
        _remove_others()
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
        digest = hashlib.sha256()
        try:
            with temporary.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, self.bytes)  # a full disk says so
                for part in parts:
                    _append(file, part, digest)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            write_json(path.with_suffix(".json"), {"sha256": digest.hexdigest()})
            return self._map(path)
        except (OSError, ValueError) as error:
            raise NoCache(f"{cache_folder()} cannot be written: {reason(error)}") from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _map(self, path: Path) -> Tensor:
        count = self.n * self.layout.size
        flat = torch.from_file(str(path), shared=False, size=count, dtype=self.layout.dtype)
        return flat.view(self.n, self.layout.size)


def _append(file: BinaryIO, part: Tensor, digest: Any) -> None:
    content = part.contiguous().view(torch.uint8).numpy().data
    digest.update(content)
    file.write(content)


def _path(key: str) -> Path:
    return cache_folder() / f"features-{key}.bin"


def _remove_others() -> None:
    """Removes the files of earlier trainings; those that still map them keep their content."""
    with contextlib.suppress(OSError):
        for file in cache_folder().glob("features-*"):
            file.unlink(missing_ok=True)
        for file in cache_folder().glob(".features-*"):  # unless another training still writes it
            if time.time() - file.stat().st_mtime > _DAY:
                file.unlink(missing_ok=True)


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
