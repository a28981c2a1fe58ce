"""Pretrained weights of ResNet-18: from torchvision, or from a file."""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models import ResNet18_Weights

from mnist_lightning.data.download import answering
from mnist_lightning.weights import read_tensors


def pretrained_tensors(weights: str, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Reads the pretrained tensors except those of fc, and checks them against ``shapes``.

    Args:
        weights: a name of torchvision's, a file with a state dict, or a checkpoint of a
            ``ResNet18``.
        shapes: of the network's tensors, by name.

    Raises:
        ValueError: there are no such weights, or they are not weights of ResNet-18.
    """
    is_name = weights in ResNet18_Weights.__members__
    path = _cached(ResNet18_Weights[weights]) if is_name else Path(weights)
    names = ", ".join(known.name for known in ResNet18_Weights)
    if not path.is_file():  # refuses a pipe too: reading it might never end
        raise ValueError(f"weights must be {names} or a file; there is no file {path}")
    tensors = read_tensors(path, f"Give other weights: --model.weights FILE, or {names}.")
    tensors = {name: value for name, value in tensors.items() if not name.startswith("fc.")}
    needed = {name for name in shapes if not name.startswith("fc.")}
    # files older than PyTorch 0.4.1 do not have these counters
    counters = {name for name in needed if name.endswith(".num_batches_tracked")}

    def fits(name: str) -> bool:
        # the first convolution may have 1 or 3 input channels: ``stem`` says how they are used
        ours, theirs = list(shapes[name]), list(tensors[name].shape)
        if name == "conv1.weight" and theirs[1:2] in ([1], [3]):
            ours[1] = theirs[1]
        return ours == theirs

    faults = {
        "missing": needed - counters - tensors.keys(),
        "unexpected": tensors.keys() - needed,
        "wrong shape": {name for name in needed & tensors.keys() if not fits(name)},
    }
    if any(faults.values()):
        lists = (f"{fault}: {_some(names)}" for fault, names in faults.items() if names)
        raise ValueError(f"{path} does not hold weights of ResNet-18; {'; '.join(lists)}")
    return tensors


def _some(names: Collection[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(sorted(names)[:most]) + more


def _cached(weights: ResNet18_Weights) -> Path:
    """Returns the file in torchvision's cache; downloads it if it is missing."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    file = folder / Path(weights.url).name
    if not file.is_file():
        try:
            with answering([weights.url], ""):
                weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
        except (OSError, RuntimeError) as error:  # RuntimeError: a damaged download
            raise ValueError(
                f"{file.name} is not in {folder}, and could not be downloaded: {error}."
                " Put it there, or name another file: --model.weights FILE"
            ) from error
    return file
