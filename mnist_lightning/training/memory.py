"""How much memory a training takes, estimated before anything is allocated."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

# What an optimizer keeps for each weight, beside the weight and its gradient.
OPTIMIZER_STATE = {"sgd": 0, "adam": 2, "adamw": 2}
# of Python, PyTorch and Lightning, which further processes do not share
PROCESS_BYTES = 200 * 2**20


def training_bytes(
    make: Callable[[], LightningModule], batch_size: int, image_size: int, fused: bool = True
) -> float | None:
    """The memory of a training on the CPU in float32, without that of Python and the libraries.

    The weights with their gradients, the optimizer's state and the copies of fused steps, and what
    the layers put out for one mini-batch. Nothing of this size is allocated.

    Args:
        make: makes the module; its ``net`` is what counts.
        batch_size: images in a mini-batch.
        image_size: pixels a side.
        fused: whether steps may be fused, which takes copies of the weights.

    Returns:
        Bytes, or nothing for a module that cannot be made without memory.
    """
    try:
        with torch.device("meta"):
            module = make()
            net: nn.Module = module.net  # type: ignore[assignment]
            outputs = 0

            def count(layer: nn.Module, inputs: object, output: object) -> None:
                nonlocal outputs
                if isinstance(output, Tensor):
                    outputs += output.numel()

            for layer in net.modules():
                if not list(layer.children()):
                    layer.register_forward_hook(count)
            net(torch.empty(1, 1, image_size, image_size))
    except Exception:  # of a user's own module, which may do anything
        return None
    weights = sum(p.numel() for p in module.parameters())
    copies = 2 + OPTIMIZER_STATE.get(str(getattr(module, "optimizer", "")), 0)
    copies += 2 if fused and getattr(module, "fusable", False) else 0
    return 4.0 * (copies * weights + batch_size * (outputs + image_size**2))


def available_bytes() -> float:
    """What this process may still allocate, as Linux and the container that it runs in say.

    Returns:
        Bytes; infinity where nothing says it.
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
        except (OSError, ValueError):  # not there, or "max"
            continue
    return min(limits)


def check(
    make: Callable[[], LightningModule], batch_size: int, image_size: int, fused: bool = True
) -> None:
    """Refuses a training that does not fit into the memory of this machine.

    Args:
        make: makes the module.
        batch_size: images in a mini-batch.
        image_size: pixels a side.
        fused: as for ``training_bytes``.

    Raises:
        ValueError: it would take more than is available.
    """
    needed, available = training_bytes(make, batch_size, image_size, fused), available_bytes()
    if needed is not None and needed > available:
        raise ValueError(
            f"this training would take about {needed / 2**30:,.0f} GiB of memory, and"
            f" {available / 2**30:,.1f} GiB are available: a smaller --data.batch_size"
            f" (now {batch_size:,}), smaller images (now {image_size} pixels) or fewer units"
        )


def check_processes(count: int) -> None:
    """Refuses more processes than the memory of this machine has room for.

    Raises:
        ValueError: they would take more than is available.
    """
    needed, available = count * PROCESS_BYTES, available_bytes()
    if count > 1 and needed > available:
        raise ValueError(
            f"{count:,} processes (--trainer.devices) would take about {needed / 2**30:,.0f} GiB of"
            f" memory, and {available / 2**30:,.1f} GiB are available"
        )
