"""Checkpoints: find them, read them, refuse what is unsafe or contradicts the request.

A run's folder is ``lightning_logs/<config name>/version_N/``; its checkpoints lie in
``checkpoints/best.ckpt`` and ``checkpoints/last.ckpt``.
"""

import contextlib
import inspect
import pickle
import re
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer, callbacks
from lightning.pytorch.utilities import rank_zero_warn

from mnist_lightning.data import MNISTDataModule
from mnist_lightning.files import check_archive, write_torch
from mnist_lightning.models import Classifier, check_tensors

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
    runs = [run for run in folder.glob("version_*") if run.name[8:].isdecimal()]
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
    check_archive(path, _remedy(path))
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
    version = checkpoint.get("pytorch-lightning_version")
    if not isinstance(version, str) or not re.match(r"\d+\.\d[\w.+]*$", version):
        raise ValueError(f"{path} is of no version of Lightning: {version!r}. {_REMEDY}")
    check_tensors(checkpoint["state_dict"], f"{path}", _REMEDY)
    for key in ("hyper_parameters", "datamodule_hyper_parameters"):
        settings = checkpoint.get(key, {})
        if not isinstance(settings, Mapping) or not _is_plain(settings):
            raise ValueError(f"{path} is not of this project: its {key} are no settings. {_REMEDY}")
    return cast(dict[str, Any], checkpoint)


def _remedy(path: Path) -> str:
    """What to take instead of a damaged file: the run's other checkpoint, where that is whole."""
    for name in ("last", "best"):
        other = path.with_name(f"{name}.ckpt")
        if path.name in ("last.ckpt", "best.ckpt") and other.name != path.name and other.is_file():
            with contextlib.suppress(ValueError):
                check_archive(other, "")
                return f"The run's other one is whole: --ckpt_path {other}"
    return _REMEDY


def _is_plain(value: Any, depth: int = 3) -> bool:
    """Whether it is a mapping, list or value as settings are, and small."""
    if isinstance(value, Mapping | list | tuple):
        parts = value.values() if isinstance(value, Mapping) else value
        if isinstance(value, Mapping) and not all(isinstance(key, str) for key in value):
            return False
        return depth > 0 and len(value) < 100 and all(_is_plain(part, depth - 1) for part in parts)
    if isinstance(value, str):
        return len(value) < 5000
    return value is None or type(value) in (bool, int, float)


def check_resumable(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Refuses a checkpoint that a training cannot go on from as if it had not stopped.

    Raises:
        ValueError: part of the state is missing; names it.
    """
    if not checkpoint.get("optimizer_states"):
        raise ValueError(f"{path} holds weights only, no optimizer state: training cannot resume")
    kinds: dict[str, Any] = {"epoch": int, "global_step": int, "loops": Mapping}
    kinds |= {"callbacks": Mapping, "optimizer_states": list, "lr_schedulers": list}
    for key, kind in kinds.items():
        value = checkpoint.get(key)
        empty = key in ("loops", "callbacks") and not value
        if not isinstance(value, kind) or empty or (key == "loops" and not value.get("fit_loop")):
            raise ValueError(f"{path} has no usable {key}: training cannot resume. {_REMEDY}")
    states = checkpoint["optimizer_states"]
    if not all(isinstance(state, Mapping) and state.get("param_groups") for state in states):
        raise ValueError(f"{path} has an empty optimizer state: training cannot resume. {_REMEDY}")


def check_facts(checkpoint: Mapping[str, Any], said: Collection[str], path: Path) -> None:
    """Refuses a checkpoint that says neither which data nor which network it is of.

    Args:
        checkpoint: as ``read``.
        said: the arguments of the data module that the user gives.
        path: of the checkpoint, for the message.

    Raises:
        ValueError: a fact of the data is missing or unknown; or its hyper-parameters make another
            network than its weights are of, perhaps one that does not fit into memory.
    """
    data = dict(checkpoint.get("datamodule_hyper_parameters", {}))
    known = inspect.signature(MNISTDataModule.__init__).parameters
    for key in data:
        if key not in known:
            raise ValueError(f"{path} says {key} of its data, which nothing here knows. {_REMEDY}")
    try:
        MNISTDataModule(**data)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is of data that cannot be: {error}. {_REMEDY}") from error
    if missing := [key for key in BINDING_DATA if key not in data and key not in said]:
        options = " ".join(f"--data.{key} ..." for key in missing)
        raise ValueError(
            f"{path} does not say on which data it was trained: its training images may be among"
            f" the test images. Say it: {options}"
        )
    model = model_class(checkpoint)
    if not model.__module__.startswith("mnist_lightning."):
        return
    try:
        with torch.device("meta"):  # shapes without memory
            made = model(**checkpoint["hyper_parameters"]).state_dict()
    except Exception as error:
        raise ValueError(
            f"{path}: {model.__name__} refuses its hyper_parameters ({_first_line(error)})."
            f" {_REMEDY}"
        ) from error
    if _kinds(made) != _kinds(checkpoint["state_dict"]):
        raise ValueError(
            f"{path} contradicts itself: its hyper_parameters make other weights than it holds."
            f" {_REMEDY}"
        )


def _kinds(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {name: (t.shape, t.is_floating_point()) for name, t in tensors.items()}


def progress(checkpoint: dict[str, Any]) -> tuple[int, int]:
    """How far the training was: whole epochs, and mini-batches of the one begun after them."""
    loops = checkpoint["loops"]["fit_loop"]
    epochs = loops["epoch_progress"]["current"]
    within = epochs["ready"] > epochs["processed"]
    batches = loops["epoch_loop.batch_progress"]["current"]["completed"] if within else 0
    return epochs["processed"], batches


def model_class(checkpoint: Mapping[str, Any]) -> type[Classifier]:
    """The class that wrote the checkpoint; only among modules that are imported already.

    Raises:
        ValueError: the class is not there, or is no Classifier.
    """
    module, _, name = checkpoint["model_class"].rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    if not (isinstance(found, type) and issubclass(found, Classifier)):
        raise ValueError(
            f"of the class {checkpoint['model_class']}, not known here"
            f" (if it is yours: --model {checkpoint['model_class']})"
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
    if _kinds(checkpoint["state_dict"]) != _kinds(model.state_dict()):
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
    after would then pass for the best one, and earlier files for other files, to be removed. And it
    removes what a checkpoint names as its earlier file, be it a whole folder of the user's: no
    ``ModelCheckpoint`` of the training takes over more than the files in its own folder.
    """

    steps_known = True  # see execution.HARMLESS

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Lightning calls this hook of all callbacks before any of them takes its state
        states = checkpoint.get("callbacks") or {}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, callbacks.ModelCheckpoint) and callback.state_key in states:
                states[callback.state_key] = _own_files(callback, states[callback.state_key])


def _own_files(callback: callbacks.ModelCheckpoint, state: Any) -> dict[str, Any]:
    """The state of a ModelCheckpoint, with checkpoints that lie in its folder and no other path."""
    state = state if isinstance(state, Mapping) else {}
    folder = Path(callback.dirpath or "").absolute()

    def own(path: Any) -> str:
        try:
            if isinstance(callback, ModelCheckpoint):  # keeps one file, wherever it was before
                file = folder / Path(path).name
                fits = file.name == f"{callback.filename}.ckpt"
            else:
                file = folder / Path(path).relative_to(state["dirpath"])
                fits = file.suffix == ".ckpt"
            # a link, or ".." on the way, could lead to a file of somebody else
            inside = file.resolve() == folder.resolve() / file.relative_to(folder)
            return str(file) if fits and inside and file.is_file() else ""
        except (TypeError, ValueError, KeyError, OSError):  # no path at all, or of elsewhere
            return ""

    scores = state.get("best_k_models")
    scores = scores if isinstance(scores, Mapping) else {}
    kept = {own(path): score for path, score in scores.items() if own(path) and _is_score(score)}
    best, worst = own(state.get("best_model_path")), own(state.get("kth_best_model_path"))
    full = 0 < callback.save_top_k <= len(kept)
    if len(kept) < len(scores) or best not in kept or (full and worst not in kept):
        kept = {}  # what is left would not be the best k
    if callback.monitor and (not kept or state.get("monitor") != callback.monitor):
        kept, best = {}, ""
    return {
        "monitor": callback.monitor,
        "dirpath": callback.dirpath,
        "best_model_path": best,
        "best_model_score": kept.get(best),
        "best_k_models": kept,
        "kth_best_model_path": worst if full and kept else "",
        "kth_value": kept.get(worst, callback.kth_value),
        "last_model_path": own(state.get("last_model_path")),
    }


def _is_score(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() == 1 and not value.isnan().any()


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
