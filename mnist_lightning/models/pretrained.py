"""Pretrained weights of ResNet-18: from torchvision, or from a file."""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models import ResNet18_Weights

from mnist_lightning.data.download import answering
from mnist_lightning.weights import read_tensors


def pretrained_tensors(weights: str, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The pretrained tensors without those of fc, checked against the shapes of our own."""
    known = weights in ResNet18_Weights.__members__
    path = _cached(ResNet18_Weights[weights]) if known else Path(weights)
    names = ", ".join(ResNet18_Weights.__members__)
    if not path.is_file():  # also a pipe, which might never end
        raise ValueError(f"weights must be {names} or a file; there is no file {path}")
    tensors = read_tensors(path, f"Give other weights: --model.weights FILE, or {names}.")
    tensors = {name: value for name, value in tensors.items() if not name.startswith("fc.")}
    needed = {name for name in shapes if not name.startswith("fc.")}
    # counters that files older than PyTorch 0.4.1 do not have
    counters = {name for name in needed if name.endswith(".num_batches_tracked")}

    def fits(name: str) -> bool:
        # an image's channels are the stem's own affair
        ours, theirs = list(shapes[name]), list(tensors[name].shape)
        if name == "conv1.weight" and theirs[1:2] in ([1], [3]):
            ours[1] = theirs[1]
        return ours == theirs

    faults = {
        "missing": needed - counters - tensors.keys(),
        "left over": tensors.keys() - needed,
        "of another shape": {name for name in needed & tensors.keys() if not fits(name)},
    }
    if any(faults.values()):
        named = (f"{what}: {_some(names)}" for what, names in faults.items() if names)
        raise ValueError(f"{path} holds no weights of ResNet-18; {'; '.join(named)}")
    return tensors


def _some(names: Collection[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(sorted(names)[:most]) + more


def _cached(weights: ResNet18_Weights) -> Path:
    """The file in torchvision's cache, fetched if it is not there."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    file = folder / Path(weights.url).name
    if not file.is_file():
        try:
            with answering([weights.url], ""):
                weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
        except (OSError, RuntimeError) as error:  # RuntimeError: a damaged download
            raise ValueError(
                f"{file.name} is not in {folder}, and could not be fetched: {error}."
                " Put it there, or name another file: --model.weights FILE"
            ) from error
    return file
