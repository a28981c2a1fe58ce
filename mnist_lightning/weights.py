"""Files of tensors: read as data, and refused where they cannot be the weights of a network."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from torchvision.models import ResNet18_Weights

from mnist_lightning.console import python
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


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A file of tensors by name; nothing that it holds is executed."""
    names = ", ".join(known.name for known in ResNet18_Weights)
    if not path.is_file():  # also a pipe, which might never end
        raise ValueError(f"weights must be {names} or a file; there is no file {path}")
    remedy = f"Give other weights: --model.weights FILE, or {names}."
    if zipfile.is_zipfile(path):
        check_archive(path, remedy)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        needed = python("-m", "pip", "install", "safetensors")
        raise ValueError(f"{path} needs a package: {needed}") from error
    except UnpicklingError as error:
        if "nsupported" not in str(error):  # neither an unsupported global, nor operand
            raise ValueError(f"{path} is damaged, or no file of weights") from error
        raise ValueError(f"{path} holds code besides tensors: refused, nothing was run") from error
    except Exception as error:  # whatever a truncated file leads torch or safetensors to
        raise ValueError(f"{path} is damaged, or no file of weights") from error
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path} is not a state dict: it does not hold tensors by name")
    check_tensors(content, f"{path}", remedy)
    return dict(content)
