"""Estimates the memory of a training before anything is allocated."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from mnist_lightning.spec import DataSpec

# numbers that an optimizer stores for each weight, in addition to the weight and its gradient
OPTIMIZER_STATE = {"sgd": 0, "adam": 2, "adamw": 2}
# memory of Python, PyTorch and Lightning that each additional process needs for itself
PROCESS_BYTES = 200 * 2**20


def training_bytes(
    make: Callable[[], LightningModule], batch_size: int, spec: DataSpec, fused: bool = True
) -> float | None:
    """Estimates the memory of a training on the CPU in float32, without Python and the libraries.

    Counts the weights and their gradients, the optimizer's state, the copies of fused steps, and
    the layers' outputs for one mini-batch. It allocates none of these.

    Args:
        make: makes the module, whose ``net`` is measured.
        batch_size: images in a mini-batch.
        spec: shape of the images.
        fused: if True, steps may be fused, which needs copies of the weights.

    Returns:
        Bytes; None if the module cannot be made on PyTorch's meta device.
    """
    try:
        with torch.device("meta"):
            module = make()
            net: nn.Module = module.net  # type: ignore[assignment]
            outputs = 0

            def add_output(layer: nn.Module, inputs: object, output: object) -> None:
                nonlocal outputs
                if isinstance(output, Tensor):
                    outputs += output.numel()

            for layer in net.modules():
                if not list(layer.children()):
                    layer.register_forward_hook(add_output)
            net(torch.empty(1, *spec.shape))
    except Exception:  # a user's module may raise anything
        return None
    weights = sum(p.numel() for p in module.parameters())
    copies = 2 + OPTIMIZER_STATE.get(str(getattr(module, "optimizer", "")), 0)
    copies += 1 if getattr(module, "momentum", 0) else 0
    copies += 2 if fused and getattr(module, "fusable", False) else 0
    return 4.0 * (copies * weights + batch_size * (outputs + spec.pixels))


def available_bytes() -> float:
    """Reads how much this process may still allocate, from Linux and its container.

    Returns:
        Bytes; infinity if the system does not tell.
    """
    limits = [math.inf]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(line for line in lines if line.startswith("MemAvailable:"))
        limits.append(1024 * int(free.split()[1]))
    except (OSError, StopIteration):
        pass
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most, now = (Path("/sys/fs/cgroup", name).read_text() for name in (limit, used))
            limits.append(int(most) - int(now))
        except (OSError, ValueError):  # the file does not exist, or holds "max"
            continue
    return min(limits)


def check(
    make: Callable[[], LightningModule], batch_size: int, spec: DataSpec, fused: bool = True
) -> None:
    """Checks that a training fits into the memory of this machine.

    Args:
        make: as for ``training_bytes``.
        batch_size: images in a mini-batch.
        spec: shape of the images.
        fused: as for ``training_bytes``.

    Raises:
        ValueError: it would take more memory than is available.
    """
    needed, available = training_bytes(make, batch_size, spec, fused), available_bytes()
    if needed is not None and needed > available:
        raise ValueError(
            f"this training would take about {needed / 2**30:,.0f} GiB of memory, and"
            f" {available / 2**30:,.1f} GiB are available: use a smaller --data.batch_size"
            f" (now {batch_size:,}), smaller images (now {spec.height} x {spec.width} pixels) or"
            " fewer units"
        )


def check_processes(count: int) -> None:
    """Checks that the processes fit into the memory of this machine.

    Raises:
        ValueError: they would take more memory than is available.
    """
    needed, available = count * PROCESS_BYTES, available_bytes()
    if count > 1 and needed > available:
        raise ValueError(
            f"{count:,} processes (--trainer.devices) would take about {needed / 2**30:,.0f} GiB of"
            f" memory, and {available / 2**30:,.1f} GiB are available: use fewer"
        )
