"""Checkpoints: find them, read them, refuse what is unsafe or contradicts the request.

A run's folder is ``lightning_logs/<config name>/version_N/``; its checkpoints lie in
``checkpoints/best.ckpt`` and ``checkpoints/last.ckpt``.
"""

import contextlib
import inspect
import os
import re
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from jsonargparse import ArgumentParser
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer, callbacks

from mnist_lightning.data.module import MNISTDataModule
from mnist_lightning.files import check_archive, first_line, is_plain, write_torch
from mnist_lightning.moved import bring_up_to_date
from mnist_lightning.runs.folder import LOGS, find_checkpoint
from mnist_lightning.weights import check_tensors, load_data

DATA_CLASS = "mnist_lightning.MNISTDataModule"  # where a checkpoint does not say another
Kind = TypeVar("Kind")

# A model that learned from one split must not be scored on another: its training images would be
# among the test images. Nor on pixels that were scaled in another way.
BINDING_DATA = ("name", "source", "split", "val_fraction", "split_seed", "normalization")

REMEDY = "Give another: --ckpt_path FILE, or the folder of a run."
_LEAVE_AWAY = ". What is left unsaid, the checkpoint itself says."


def read(path: Path) -> dict[str, Any]:
    """Loads a checkpoint as data: nothing that it holds is executed.

    Raises:
        ValueError: damaged, no checkpoint of this project, or one that would run code.
    """
    check_archive(path, _remedy(path))
    checkpoint = load_data(path, REMEDY, mmap=True)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), Mapping):
        raise ValueError(f"{path} is not a Lightning checkpoint: it has no state_dict. {REMEDY}")
    for key in ("model_class", "data_class"):
        if not isinstance(checkpoint.get(key, ""), str):
            raise ValueError(f"{path} is not of this project: its {key} is no name. {REMEDY}")
    version = checkpoint.get("pytorch-lightning_version")
    if not isinstance(version, str) or not re.match(r"\d+\.\d[\w.+]*$", version):
        raise ValueError(f"{path} is of no version of Lightning: {version!r}. {REMEDY}")
    check_tensors(checkpoint["state_dict"], f"{path}", REMEDY)
    for key in ("hyper_parameters", "datamodule_hyper_parameters", "execution"):
        settings = checkpoint.get(key, {})
        if not isinstance(settings, Mapping) or not is_plain(settings, 4):
            raise ValueError(f"{path} is not of this project: its {key} are no settings. {REMEDY}")
    bring_up_to_date(checkpoint)
    return cast(dict[str, Any], checkpoint)


def _remedy(path: Path) -> str:
    """What to take instead of a damaged file: the run's other checkpoint, where that is whole."""
    for name in ("last", "best"):
        other = path.with_name(f"{name}.ckpt")
        if path.name in ("last.ckpt", "best.ckpt") and other.name != path.name and other.is_file():
            with contextlib.suppress(ValueError):
                check_archive(other, "")
                return f"The run's other one is whole: --ckpt_path {other}"
    return REMEDY


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
            raise ValueError(f"{path} has no usable {key}: training cannot resume. {REMEDY}")
    states = checkpoint["optimizer_states"]
    if not all(isinstance(state, Mapping) and state.get("param_groups") for state in states):
        raise ValueError(f"{path} has an empty optimizer state: training cannot resume. {REMEDY}")


def check_facts(
    checkpoint: Mapping[str, Any], model: type[LightningModule], said: Collection[str], path: Path
) -> None:
    """Refuses a checkpoint that says neither which data nor which network it is of.

    Args:
        checkpoint: as ``read``.
        model: its class.
        said: the arguments of the data module that the user gives.
        path: of the checkpoint, for the message.

    Raises:
        ValueError: a fact of the data is missing or unknown; or its hyper-parameters make another
            network than its weights are of, perhaps one that does not fit into memory.
    """
    data = dict(checkpoint.get("datamodule_hyper_parameters", {}))
    if checkpoint.get("data_class", DATA_CLASS) == DATA_CLASS:
        _check_data(data, said, path)
    if not model.__module__.startswith("mnist_lightning."):
        return
    if "hyper_parameters" not in checkpoint:
        raise ValueError(f"{path} is not of this project: it has no hyper_parameters. {REMEDY}")
    try:
        with torch.device("meta"):  # shapes without memory
            made = model(**checkpoint["hyper_parameters"]).state_dict()
    except Exception as error:
        raise ValueError(
            f"{path}: {model.__name__} refuses its hyper_parameters ({first_line(error)}). {REMEDY}"
        ) from error
    if _kinds(made) != _kinds(checkpoint["state_dict"]):
        raise ValueError(
            f"{path} contradicts itself: its hyper_parameters make other weights than it holds."
            f" {REMEDY}"
        )


def _check_data(data: Mapping[str, Any], said: Collection[str], path: Path) -> None:
    known = inspect.signature(MNISTDataModule.__init__).parameters
    for key in data:
        if key not in known:
            raise ValueError(f"{path} says {key} of its data, which nothing here knows. {REMEDY}")
    try:
        MNISTDataModule(**data)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is of data that cannot be: {error}. {REMEDY}") from error
    if missing := [key for key in BINDING_DATA if key not in data and key not in said]:
        options = " ".join(f"--data.{key} ..." for key in missing)
        raise ValueError(
            f"{path} does not say on which data it was trained: its training images may be among"
            f" the test images. Say it: {options}"
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


def known_class(path: str, kind: type[Kind]) -> type[Kind]:
    """A class that a checkpoint names; only among modules that are imported already.

    Args:
        path: its dotted path.
        kind: what it must be a subclass of.

    Raises:
        ValueError: the class is not there, or is of another kind.
    """
    module, _, name = path.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise ValueError(f"of the class {path}, not known here. {REMEDY}")
    return found


def arguments(made: type, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the saved hyper-parameters that the class takes, as in ``load_from_checkpoint``.

    A subclass that passes fewer arguments on than its base takes has saved those of both.
    """
    known = ArgumentParser(exit_on_error=False).add_class_arguments(made, fail_untyped=False)
    return {name: value for name, value in saved.items() if name in known}


def load(
    where: str | os.PathLike[str], model_class: type[LightningModule] | None = None
) -> LightningModule:
    """A trained model, ready to predict: on the CPU, in evaluation mode.

    ``load("lightning_logs/shallow")(images)`` gives class scores ``(b, 10)`` for images
    ``(b, 1, 28, 28)`` as ``MNISTDataModule.preprocess`` makes them.

    Args:
        where: what ``--ckpt_path`` takes: a checkpoint file, the folder of a run, or its name.
        model_class: of a model of your own. Without it, the class has to be imported already:
            nothing is imported because a file says so.

    Raises:
        ValueError: nothing is there, it is damaged or would run code, or its class is not known.
    """
    path = find_checkpoint(os.fspath(where), Path(LOGS))
    checkpoint = read(path)
    named = str(checkpoint.get("model_class", ""))
    try:
        kind = model_class or known_class(named, LightningModule)
    except ValueError as error:
        name = named.rpartition(".")[2] or "MyModel"
        raise ValueError(
            f"{path} is of the class {named}, not known here. Import the class, and give it:"
            f" load({os.fspath(where)!r}, model_class={name})"
        ) from error
    if kind.__module__.startswith("mnist_lightning."):
        check_facts(checkpoint, kind, BINDING_DATA, path)
    return kind.load_from_checkpoint(path, map_location="cpu", weights_only=True).eval()


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
    saved = checkpoint.get("model_class", "").rpartition(".")[2]
    if saved not in ("", type(model).__name__):
        raise ValueError(f"{path} holds a {saved}, not a {type(model).__name__}")
    if _kinds(checkpoint["state_dict"]) != _kinds(model.state_dict()):
        raise ValueError(
            f"{path} does not fit the model asked for: "
            + _differences(dict(model.hparams), checkpoint.get("hyper_parameters", {}), "model")
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


class Origin(Callback):
    """Has each checkpoint say what made it, so that it alone is enough to make it again.

    A LightningModule that is no ``Classifier`` says nothing of its class, and nothing of its
    arguments unless it calls ``save_hyperparameters()``, perhaps not for all.

    Args:
        model: ``{class_path, init_args}``, as plain values.
        data: the same of the data module; of ``MNISTDataModule`` nothing, which says it itself.
    """

    def __init__(self, model: Mapping[str, Any], data: Mapping[str, Any] | None) -> None:
        self.model, self.data = model, data

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        made = {"model_class": ("hyper_parameters", self.model)}
        if self.data is not None:
            made["data_class"] = ("datamodule_hyper_parameters", self.data)
        for key, (name, origin) in made.items():
            checkpoint[key] = origin["class_path"]
            saved = {k: value for k, value in checkpoint.get(name, {}).items() if is_plain(value)}
            # an argument that is an object (a network, say) was given as settings of its class
            checkpoint[name] = saved | dict(origin.get("init_args", {}))


class ModelCheckpoint(callbacks.ModelCheckpoint):
    """Lightning's own, for a run that goes on in its folder whatever path now leads there.

    Lightning forgets what was best as soon as the path is spelled in another way: the first epoch
    after would then pass for the best one, and earlier files for other files, to be removed. And it
    removes what a checkpoint names as its earlier file, be it a whole folder of the user's: no
    ``ModelCheckpoint`` of the training takes over more than the files in its own folder.
    """

    steps_known = True  # see execution.HARMLESS

    @property
    def state_key(self) -> str:
        # without a figure to watch, that of the best would be that of the last
        alike = self.monitor is None and self.filename == "best"
        return super().state_key + (self.filename if alike else "")  # type: ignore[operator]

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
