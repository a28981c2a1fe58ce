"""Reads files of tensors without running code, and checks that they can be network weights."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from mnist_lightning.files import check_archive


def check_tensors(tensors: Mapping[str, Any], name: str, remedy: str) -> None:
    """Checks that tensors can be the weights of a network.

    Args:
        tensors: by name.
        name: name of the file or object that holds them, for the message.
        remedy: what the user can do, for the message.

    Raises:
        ValueError: a tensor is not dense, has a type that weights cannot have, contains NaN, or is
            larger than the data that the file holds for it.
    """
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is not a mapping of names to tensors. {remedy}")
        dtype = tensor.dtype
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            fault = "not a dense tensor"
        elif tensor.numel() * dtype.itemsize > tensor.untyped_storage().nbytes():
            fault = f"larger than its data: {tuple(tensor.shape)}"
        elif not (dtype.is_floating_point or dtype == torch.int64):
            fault = f"of type {dtype}, which weights cannot have"
        elif dtype.is_floating_point and tensor.isnan().any():
            fault = "not a number (NaN): the training that wrote it diverged"
        else:
            continue
        raise ValueError(f"{name} is refused: its {key} is {fault}. {remedy}")


def load_data(path: Path, remedy: str, mmap: bool = False) -> Any:
    """Loads a file with ``torch.load`` onto the CPU, without running any code in it.

    Args:
        path: the file.
        remedy: what the user can do, for the message.
        mmap: if True, tensors are read from the file only when they are used.

    Raises:
        ValueError: the file holds code, or is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # RuntimeError, EOFError, KeyError ...
        # the messages say "unsupported global" or "unsupported operand"
        if isinstance(error, UnpicklingError) and "nsupported" in str(error):
            raise ValueError(
                f"{path} holds code besides tensors: refused, and nothing was run. {remedy}"
            ) from error
        raise ValueError(f"{path} is damaged, or not a PyTorch file. {remedy}") from error


def read_tensors(path: Path, remedy: str) -> dict[str, Tensor]:
    """Reads a state dict from a PyTorch or ``.safetensors`` file, without running any code in it.

    From a checkpoint of Lightning, it takes the tensors of the network, the attribute ``net``.

    Args:
        path: the file.
        remedy: what the user can do, for the message.

    Raises:
        ValueError: the file is damaged, is not a state dict, or its tensors cannot be weights.
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            content = load_file(path)
        except Exception as error:  # safetensors raises several types for damaged files
            raise ValueError(f"{path} is damaged, or not a safetensors file. {remedy}") from error
    else:
        if zipfile.is_zipfile(path):
            check_archive(path, remedy)
        content = load_data(path, remedy)
    state = content.get("state_dict") if isinstance(content, dict) else None
    if isinstance(state, dict) and any(str(name).startswith("net.") for name in state):
        of_net = {name: value for name, value in state.items() if str(name).startswith("net.")}
        content = {str(name).removeprefix("net."): value for name, value in of_net.items()}
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path} is not a state dict: it does not map names to tensors. {remedy}")
    check_tensors(content, f"{path}", remedy)
    return dict(content)
