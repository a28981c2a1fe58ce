"""Files of tensors: read as data, and refused where they cannot be the weights of a network."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from mnist_lightning.files import check_archive


def check_tensors(tensors: Mapping[str, Any], name: str, remedy: str) -> None:
    """Refuses what cannot be the weights of a network.

    Args:
        tensors: by name.
        name: of what holds them, for the message.
        remedy: what the user can do, for the message.

    Raises:
        ValueError: one is no dense tensor of real numbers, is not a number somewhere, or is larger
            than the memory that the file gave it.
    """
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{name} holds no tensors by name. {remedy}")
        kind = tensor.dtype
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            fault = "no dense tensor"
        elif tensor.numel() * kind.itemsize > tensor.untyped_storage().nbytes():
            fault = f"larger than its data: {tuple(tensor.shape)}"
        elif not (kind.is_floating_point or kind == torch.int64):
            fault = f"of the type {kind}, no weights"
        elif kind.is_floating_point and tensor.isnan().any():
            fault = "not a number (NaN): the training that wrote it diverged"
        else:
            continue
        raise ValueError(f"{name} is refused: its {key} is {fault}. {remedy}")


def load_data(path: Path, remedy: str, mmap: bool = False) -> Any:
    """``torch.load`` as data, onto the CPU: nothing that the file holds is executed.

    Args:
        path: of the file.
        remedy: what the user can do, for the message.
        mmap: whether tensors are read from the file only when they are used.

    Raises:
        ValueError: it holds code, or is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # RuntimeError, EOFError, KeyError ...
        # an unsupported global, or operand
        if isinstance(error, UnpicklingError) and "nsupported" in str(error):
            raise ValueError(
                f"{path} holds code besides tensors: refused, and nothing was run. {remedy}"
            ) from error
        raise ValueError(f"{path} is damaged, or no file of PyTorch. {remedy}") from error


def read_tensors(path: Path, remedy: str) -> dict[str, Tensor]:
    """A file of tensors by name, of PyTorch or ``.safetensors``; nothing in it is executed.

    Args:
        path: of the file.
        remedy: what the user can do, for the message.

    Raises:
        ValueError: it is damaged, holds anything else, or cannot be the weights of a network.
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            content = load_file(path)
        except Exception as error:  # whatever a truncated file leads safetensors to
            raise ValueError(f"{path} is damaged, or no file of safetensors. {remedy}") from error
    else:
        if zipfile.is_zipfile(path):
            check_archive(path, remedy)
        content = load_data(path, remedy)
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path} is not a state dict: it does not hold tensors by name. {remedy}")
    check_tensors(content, f"{path}", remedy)
    return dict(content)
