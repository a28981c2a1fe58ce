"""Checkpoints: find them, read them, refuse what is unsafe or contradicts the request.

A run's folder is ``lightning_logs/<config name>/version_N/``; its checkpoints lie in
``checkpoints/best.ckpt`` and ``checkpoints/last.ckpt``.
"""

import pickle
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, callbacks
from lightning.pytorch.utilities import rank_zero_warn

from mnist_lightning.files import write_torch
from mnist_lightning.models import Classifier

# A model that learned from one split must not be scored on another: its training images would be
# among the test images. Nor on pixels that were scaled in another way.
BINDING_DATA = ("name", "source", "split", "val_fraction", "split_seed", "normalization")

_REMEDY = "Give another: --ckpt_path FILE, or the folder of a run."
_LEAVE_AWAY = ". What is left unsaid, the checkpoint itself says."


def find(where: str, root: Path, run_name: str | None = None) -> Path:
    """The checkpoint file that the user means.

    Args:
        where: a checkpoint file; the folder of a run, or of several runs (then the newest); or the
            name of a run. ``/best`` or ``/last`` after a folder or name says which one (``best``
            unless said). ``best`` or ``last`` alone are those of ``run_name``.
        root: the folder that holds the runs, ``lightning_logs``.
        run_name: the name that this command's configuration gives to its runs.

    Raises:
        ValueError: nothing is there; says where it looked.
    """
    path = Path(where)
    if path.is_file():
        return path
    kind = path.name if path.name in ("best", "last") and not path.is_dir() else "best"
    base = path.parent if path.name == kind else path
    if base == Path("."):
        if run_name is None:
            raise ValueError(
                f"--ckpt_path {where}: of which run? Say {root.name}/NAME/{where}, or give --config"
            )
        base = Path(run_name)
    folders = [folder for folder in (base, root / base) if folder.is_dir()]
    if not folders:
        raise ValueError(f"--ckpt_path {where}: there is no file or folder {base}{_runs(root)}")
    for folder in folders:
        newest = newest_first(folder)
        for run in [folder, *newest]:
            file = run / "checkpoints" / f"{kind}.ckpt"
            if file.is_file():
                if run not in (folder, *newest[:1]):
                    rank_zero_warn(f"{newest[0]} has no {kind}.ckpt: taking {file}")
                return file
    raise ValueError(
        f"--ckpt_path {where}: no checkpoints/{kind}.ckpt in {folders[0]}{_runs(root)}"
    )


def newest_first(folder: Path) -> list[Path]:
    """The runs ``version_N`` in a folder, the highest N first."""
    runs = [run for run in folder.glob("version_*") if run.name[8:].isdigit()]
    return sorted(runs, key=lambda run: int(run.name[8:]), reverse=True)


def _runs(root: Path) -> str:
    names = sorted(
        {run.parent.parent.parent.name for run in root.glob("*/version_*/checkpoints/*.ckpt")}
    )
    return f"; the runs in {root} are: {', '.join(names)}" if names else ""


def run_folder(checkpoint: Path) -> Path:
    """The folder of the run that a checkpoint file belongs to."""
    folder = checkpoint.absolute().parent
    return folder.parent if folder.name == "checkpoints" else folder


def read(path: Path) -> dict[str, Any]:
    """Loads a checkpoint as data: nothing that it holds is executed.

    Raises:
        ValueError: damaged, no checkpoint of this project, or one that would run code.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.load reads altered weights without a word: it compares no checksums
            damaged = archive.testzip()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}. {_REMEDY}") from error
    except Exception as error:  # BadZipFile, EOFError, NotImplementedError ...
        raise ValueError(f"{path} is truncated, or not a checkpoint at all. {_REMEDY}") from error
    if damaged:
        raise ValueError(f"{path} is damaged: wrong checksum (CRC) of {damaged}. {_REMEDY}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds code besides tensors: refused, and nothing was run. {_REMEDY}"
        ) from error
    except Exception as error:  # RuntimeError, EOFError, KeyError ...
        raise ValueError(
            f"{path} is not a checkpoint of PyTorch: {_first_line(error)}. {_REMEDY}"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{path} is not a Lightning checkpoint: it has no state_dict. {_REMEDY}")
    kinds = {"model_class": str, "hyper_parameters": Mapping, "state_dict": Mapping}
    for key, kind in kinds.items():
        if not isinstance(checkpoint.get(key), kind):
            raise ValueError(
                f"{path} is not of a Classifier of mnist_lightning: it has no {key}. {_REMEDY}"
            )
    return cast(dict[str, Any], checkpoint)


def progress(checkpoint: dict[str, Any]) -> tuple[int, int]:
    """How far the training was: whole epochs, and mini-batches of the one begun after them."""
    loops = checkpoint["loops"]["fit_loop"]
    epochs = loops["epoch_progress"]["current"]
    within = epochs["ready"] > epochs["processed"]
    batches = loops["epoch_loop.batch_progress"]["current"]["completed"] if within else 0
    return epochs["processed"], batches


def model_class(checkpoint: dict[str, Any]) -> type[Classifier]:
    """The class that wrote the checkpoint; only among modules that are imported already.

    Raises:
        ValueError: the class is not there, or is no Classifier.
    """
    module, _, name = checkpoint["model_class"].rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    if not (isinstance(found, type) and issubclass(found, Classifier)):
        raise ValueError(
            f"the checkpoint is of {checkpoint['model_class']}, which is not known here."
            f" If it is yours, name it: --model {checkpoint['model_class']}"
        )
    return found


def check_agrees(
    model: LightningModule, data: dict[str, Any], checkpoint: dict[str, Any], path: Path
) -> None:
    """Refuses a request that contradicts the checkpoint.

    Args:
        model: as asked for.
        data: the data module's hyper-parameters, as asked for.
        checkpoint: as ``read``.
        path: of the checkpoint, for the message.

    Raises:
        ValueError: another class, another shape of the network, another split of the data.
    """
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    if name != checkpoint["model_class"]:
        saved = checkpoint["model_class"].rpartition(".")[2]
        raise ValueError(f"{path} holds a {saved}, not a {type(model).__name__}")
    saved_shapes = {key: value.shape for key, value in checkpoint["state_dict"].items()}
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    if saved_shapes != shapes:
        raise ValueError(
            f"{path} does not fit the model asked for: "
            + _differences(dict(model.hparams), checkpoint["hyper_parameters"], "model")
            + _LEAVE_AWAY
        )
    saved_data = checkpoint.get("datamodule_hyper_parameters", {})
    asked = {key: data[key] for key in BINDING_DATA if key in data}
    if asked.get("source") == "auto":
        del asked["source"]
    if any(key in saved_data and saved_data[key] != value for key, value in asked.items()):
        raise ValueError(
            f"{path} was trained on other data than asked for: "
            + _differences(asked, saved_data, "data")
            + _LEAVE_AWAY
        )


def _differences(asked: dict[str, Any], saved: dict[str, Any], group: str) -> str:
    different = [key for key in asked if key in saved and asked[key] != saved[key]]
    return (
        "; ".join(f"--{group}.{key} {asked[key]}, but it has {saved[key]}" for key in different)
        or "its weights have other names or shapes"
    )


class ModelCheckpoint(callbacks.ModelCheckpoint):
    """Lightning's own, for a run that goes on in its folder whatever path now leads there.

    Lightning forgets what was best as soon as the path is spelled in another way: the first epoch
    after would then pass for the best one, and earlier files for other files, to be removed.
    """

    steps_known = True  # see execution.HARMLESS

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        folder = self.dirpath

        def here(path: str) -> str:
            return str(Path(folder or "", Path(path).name)) if path else path

        best = state_dict["best_model_path"]
        if folder and (not best or Path(here(best)).is_file()):
            state_dict = {
                **state_dict,
                "dirpath": folder,
                "best_k_models": {here(k): v for k, v in state_dict["best_k_models"].items()},
            }
            for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
                state_dict[key] = here(state_dict[key])
        super().load_state_dict(state_dict)


class WholeFiles(TorchCheckpointIO):
    """Has a Trainer write its checkpoints whole or not at all; see ``files``.

    Lightning stages a checkpoint in TMPDIR and moves it. From another file system that is a copy
    over the old file, and whatever ends it half way leaves neither.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Raises ValueError if the file cannot be written; the one before is unchanged."""
        if "://" in str(path):  # an object store: it puts whole objects in place by itself
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_torch(Path(path), checkpoint)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
