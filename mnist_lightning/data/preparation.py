"""From uint8 images to the tensors that a network receives."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from mnist_lightning.spec import DataSpec

# Up to so many pixels, a mini-batch is prepared on one thread. Several are 10 to 20 % faster on an
# idle machine, but on a busy one they wait for each other, up to 25 times as long.
_ONE_THREAD = 2**19


def prepare(
    images: Tensor, spec: DataSpec, change: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Scales, normalises and resizes images.

    Args:
        images: uint8, ``(b, height, width)`` of gray images, else ``(b, channels, height, width)``.
        spec: what the network receives: size, mean and standard deviation.
        change: changes the pixels, from 0 to 1, before they are normalised: the augmentation.

    Returns:
        float32, ``(b, channels, spec.height, spec.width)``.
    """
    if len(images) * spec.pixels > _ONE_THREAD or images.device.type != "cpu":
        return _prepare(images, spec, change)
    with _one_thread():
        return _prepare(images, spec, change)


def _prepare(images: Tensor, spec: DataSpec, change: Callable[[Tensor], Tensor] | None) -> Tensor:
    pixels = images if images.ndim == 4 else images.unsqueeze(1)
    pixels = pixels.float().div_(255)
    if change is not None:
        pixels = change(pixels)
    if set(spec.mean) != {0.0} or set(spec.std) != {1.0}:
        if len(set(spec.mean)) == len(set(spec.std)) == 1:  # numbers are faster than tensors
            pixels.sub_(spec.mean[0]).div_(spec.std[0])
        else:
            mean, std = (torch.tensor(v, device=pixels.device) for v in (spec.mean, spec.std))
            pixels.sub_(mean[:, None, None]).div_(std[:, None, None])
    if pixels.shape[-2:] != (spec.height, spec.width):
        size = (spec.height, spec.width)
        pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)
    return pixels


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
