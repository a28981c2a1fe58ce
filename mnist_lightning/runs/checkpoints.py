"""Reads and writes checkpoints; refuses those that are unsafe or contradict the request.

A run's folder is ``lightning_logs/<config name>/version_N/``; its checkpoints are
``checkpoints/best.ckpt`` and ``checkpoints/last.ckpt``.
"""

import contextlib
import inspect
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from jsonargparse import ArgumentParser
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer, callbacks

from mnist_lightning.classes import imported
from mnist_lightning.data.module import MNISTDataModule
from mnist_lightning.files import check_archive, first_line, is_plain, write_torch
from mnist_lightning.models.ensemble import Ensemble
from mnist_lightning.moved import update_checkpoint
from mnist_lightning.runs.folder import LOGS, find_checkpoint
from mnist_lightning.weights import check_tensors, load_data

DATA_CLASS = "mnist_lightning.MNISTDataModule"  # if a checkpoint names no other
Kind = TypeVar("Kind")

# A model that was trained on one split must not be tested on another: its training images would be
# among the test images. Nor may it be tested on pixels with another scaling.
BINDING_DATA = ("name", "source", "split", "val_fraction", "split_seed", "normalization")

REMEDY = "Give another: --ckpt_path FILE, or the folder of a run."
_LEAVE_OUT = ". Leave these options out: the checkpoint has them."


def read(path: Path) -> dict[str, Any]:
    """Loads a checkpoint as data; no code in it is run.

    Raises:
        ValueError: it is damaged, not a checkpoint of this project, or contains code.
    """
    check_archive(path, _remedy(path))
    checkpoint = load_data(path, REMEDY, mmap=True)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), Mapping):
        raise ValueError(f"{path} is not a Lightning checkpoint: it has no state_dict. {REMEDY}")
    for key in ("model_class", "data_class"):
        if not isinstance(checkpoint.get(key, ""), str):
            raise ValueError(
                f"{path} was not written by this project: its {key} is not a name. {REMEDY}"
            )
    version = checkpoint.get("pytorch-lightning_version")
    if not isinstance(version, str) or not re.match(r"\d+\.\d[\w.+]*$", version):
        raise ValueError(f"{path} names no version of Lightning: {version!r}. {REMEDY}")
    check_tensors(checkpoint["state_dict"], f"{path}", REMEDY)
    for key in ("hyper_parameters", "datamodule_hyper_parameters", "execution"):
        settings = checkpoint.get(key, {})
        if not isinstance(settings, Mapping) or not is_plain(settings, 4):
            raise ValueError(
                f"{path} was not written by this project: its {key} are not settings. {REMEDY}"
            )
    update_checkpoint(checkpoint)
    return cast(dict[str, Any], checkpoint)


def _remedy(path: Path) -> str:
    """The remedy for a damaged file: the run's other checkpoint if it is intact."""
    for name in ("last", "best"):
        other = path.with_name(f"{name}.ckpt")
        if path.name in ("last.ckpt", "best.ckpt") and other.name != path.name and other.is_file():
            with contextlib.suppress(ValueError):
                check_archive(other, "")
                return f"The run's other checkpoint is intact: --ckpt_path {other}"
    return REMEDY


def check_resumable(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Refuses a checkpoint from which a training cannot resume exactly.

    Raises:
        ValueError: a part of the state is missing; the message names it.
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


def check_complete(
    checkpoint: Mapping[str, Any], model: type[LightningModule], given: Collection[str], path: Path
) -> None:
    """Refuses a checkpoint that does not fully describe its data and its network.

    Args:
        checkpoint: as ``read`` returns it.
        model: the class of its model.
        given: the arguments of the data module that the user gives.
        path: the file of the checkpoint, for the message.

    Raises:
        ValueError: a setting of the data is missing or unknown; or the hyper-parameters do not
            match the weights, and might describe a network that does not fit into memory.
    """
    data = dict(checkpoint.get("datamodule_hyper_parameters", {}))
    if checkpoint.get("data_class", DATA_CLASS) == DATA_CLASS:
        _check_data(data, given, path)
    if not model.__module__.startswith("mnist_lightning."):
        return
    if "hyper_parameters" not in checkpoint:
        raise ValueError(
            f"{path} was not written by this project: it has no hyper_parameters. {REMEDY}"
        )
    try:
        with torch.device("meta"):  # shapes without memory
            made = model(**checkpoint["hyper_parameters"]).state_dict()
    except Exception as error:
        raise ValueError(
            f"{path}: {model.__name__} refuses its hyper_parameters ({first_line(error)}). {REMEDY}"
        ) from error
    if _kinds(made) != _kinds(checkpoint["state_dict"]):
        raise ValueError(
            f"{path} contradicts itself: its hyper_parameters do not match its weights. {REMEDY}"
        )


def _check_data(data: Mapping[str, Any], given: Collection[str], path: Path) -> None:
    known = inspect.signature(MNISTDataModule.__init__).parameters
    for key in data:
        if key not in known:
            raise ValueError(f"{path} has an unknown setting of the data: {key}. {REMEDY}")
    try:
        MNISTDataModule(**data)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} has invalid settings of the data: {error}. {REMEDY}") from error
    if missing := [key for key in BINDING_DATA if key not in data and key not in given]:
        options = " ".join(f"--data.{key} ..." for key in missing)
        raise ValueError(
            f"{path} does not say on which data it was trained: its training images may be among"
            f" the test images. Give what is missing: {options}"
        )


def _kinds(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {name: (t.shape, t.is_floating_point()) for name, t in tensors.items()}


def progress(checkpoint: dict[str, Any]) -> tuple[int, int]:
    """The progress of the training: whole epochs, and mini-batches of the next one."""
    loops = checkpoint["loops"]["fit_loop"]
    epochs = loops["epoch_progress"]["current"]
    within = epochs["ready"] > epochs["processed"]
    batches = loops["epoch_loop.batch_progress"]["current"]["completed"] if within else 0
    return epochs["processed"], batches


def known_class(path: str, kind: type[Kind]) -> type[Kind]:
    """The class that a checkpoint names, if its module is imported already.

    Args:
        path: the dotted path of the class.
        kind: the base class that it must have.

    Raises:
        ValueError: there is no such class, or it has another base.
    """
    named = imported(path)
    if not (isinstance(named, type) and issubclass(named, kind)):
        raise ValueError(f"its class {path} is not known here. {REMEDY}")
    return named


def arguments(made: type, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The saved hyper-parameters that the class accepts, as in ``load_from_checkpoint``.

    The others are arguments of its base class, which ``save_hyperparameters`` saved too.
    """
    known = ArgumentParser(exit_on_error=False).add_class_arguments(made, fail_untyped=False)
    return {name: value for name, value in saved.items() if name in known}


def data_settings(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the data that a checkpoint has, as they can be used on this machine."""
    data = dict(checkpoint.get("datamodule_hyper_parameters", {}))
    if data.get("data_dir") and (
        data.get("source") == "digits"
        or (data.get("source") != "folder" and not Path(data["data_dir"]).is_dir())
    ):
        del data["data_dir"]  # not needed, or a folder on another machine
    return data


def load(
    where: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    model_class: type[LightningModule] | None = None,
) -> LightningModule:
    """Loads a trained model, ready to predict: on the CPU, in evaluation mode.

    ``load("lightning_logs/shallow").predict(["a.png", "b.jpg"])`` gives the names of the classes
    and the probabilities, for files or for uint8 images; see ``Classifier.predict``.
    ``load("lightning_logs/shallow")(images)`` gives class scores ``(b, 10)`` for images
    ``(b, 1, 28, 28)`` as ``MNISTDataModule.preprocess`` returns them.

    Args:
        where: as for ``--ckpt_path``: a checkpoint file, the folder of a run, or its name. Several
            are loaded as an ``Ensemble``.
        model_class: the class of your own model. Without it, the class must be imported already:
            a checkpoint never causes an import.

    Raises:
        ValueError: it is missing, damaged or contains code, or its class is not imported; or
            several cannot be an ensemble.
    """
    if not isinstance(where, str | os.PathLike):
        paths = [find_checkpoint(os.fspath(member), Path(LOGS)) for member in where]
        check_same_data({path: read(path) for path in paths})
        return Ensemble([load(path, model_class) for path in paths]).eval()
    path = find_checkpoint(os.fspath(where), Path(LOGS))
    checkpoint = read(path)
    named = str(checkpoint.get("model_class", ""))
    try:
        kind = model_class or known_class(named, LightningModule)
    except ValueError as error:
        name = named.rpartition(".")[2] or "MyModel"
        raise ValueError(
            f"{path}: its class {named} is not known here. Import the class, and pass it:"
            f" load({os.fspath(where)!r}, model_class={name})"
        ) from error
    if kind.__module__.startswith("mnist_lightning."):
        check_complete(checkpoint, kind, BINDING_DATA, path)
    return kind.load_from_checkpoint(path, map_location="cpu", weights_only=True).eval()


def check_agrees(
    model: LightningModule, data: dict[str, Any], checkpoint: dict[str, Any], path: Path
) -> None:
    """Refuses a request that contradicts the checkpoint.

    Args:
        model: the requested model.
        data: the requested hyper-parameters of the data module.
        checkpoint: as ``read`` returns it.
        path: the file of the checkpoint, for the message.

    Raises:
        ValueError: the class, the shape of the network or the split of the data differs.
    """
    saved = checkpoint.get("model_class", "").rpartition(".")[2]
    if saved not in ("", type(model).__name__):
        raise ValueError(f"{path} holds a {saved}, not a {type(model).__name__}")
    if _kinds(checkpoint["state_dict"]) != _kinds(model.state_dict()):
        raise ValueError(
            f"{path} does not fit the requested model: "
            + _differences(dict(model.hparams), checkpoint.get("hyper_parameters", {}), "model")
            + _LEAVE_OUT
        )
    saved_data = checkpoint.get("datamodule_hyper_parameters", {})
    requested = {key: data[key] for key in BINDING_DATA if key in data}
    if requested.get("source") == "auto":
        del requested["source"]
    if any(key in saved_data and saved_data[key] != value for key, value in requested.items()):
        raise ValueError(
            f"{path} was trained on other data than requested: "
            + _differences(requested, saved_data, "data")
            + _LEAVE_OUT
        )


def check_same_data(read: Mapping[Path, Mapping[str, Any]]) -> None:
    """Refuses an ensemble of models that were trained on different data.

    The training images of one could be the test images of another.

    Args:
        read: the checkpoints by their files, as ``read`` returns them.
    """
    facts = {path: _facts_of_data(checkpoint) for path, checkpoint in read.items()}
    first = next(iter(facts), None)
    for path, of_other in facts.items():
        for name, value in facts[first].items() if first else ():
            if value != (other := of_other.get(name)):
                raise ValueError(
                    f"{first} and {path} cannot be one ensemble: they were trained with {name}"
                    f" {value} and {other}"
                )


def _facts_of_data(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What decides which images a model was trained on, and how they were scaled."""
    settings = dict(checkpoint.get("datamodule_hyper_parameters", {}))
    kind = checkpoint.get("data_class", DATA_CLASS)
    if kind != DATA_CLASS:
        settings = {k: v for k, v in settings.items() if not k.endswith("batch_size")}
        return {"data": kind, **settings}
    facts = {name: settings.get(name) for name in BINDING_DATA}
    if settings.get("source") == "folder":
        # the folder and the checksum of its images
        facts |= {"test_fraction": settings.get("test_fraction")}
        facts |= dict(checkpoint.get(MNISTDataModule.__name__) or {})
    return {"data": kind, **facts}


def _differences(requested: dict[str, Any], saved: dict[str, Any], group: str) -> str:
    different = [key for key in requested if key in saved and requested[key] != saved[key]]
    return (
        "; ".join(f"--{group}.{key} {requested[key]}, but it has {saved[key]}" for key in different)
        or "its weights have other names or shapes"
    )


class Origin(Callback):
    """Writes the classes and arguments of model and data into each checkpoint.

    So the checkpoint alone is enough to build them again. A LightningModule other than
    ``Classifier`` does not save its class, and saves only arguments for which it calls
    ``save_hyperparameters()``.

    Args:
        model: ``{class_path, init_args}``, as plain values.
        data: the same for the data module; None for ``MNISTDataModule``, which saves it itself.
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
            # these hold an object, like a network, as the settings of its class
            checkpoint[name] = saved | dict(origin.get("init_args", {}))


class ModelCheckpoint(callbacks.ModelCheckpoint):
    """Lightning's ModelCheckpoint, for a run that resumes in its folder under any path.

    Lightning forgets the best epoch if the folder's path is written differently: the next epoch
    would become the best. It also removes any path that a checkpoint names as its earlier file,
    even a folder of the user. So every ``ModelCheckpoint`` of the training here keeps only files
    in its own folder.
    """

    steps_known = True  # see execution.HARMLESS

    @property
    def state_key(self) -> str:
        # without a monitor, "best" would have the same key as "last"
        ambiguous = self.monitor is None and self.filename == "best"
        return super().state_key + (self.filename if ambiguous else "")  # type: ignore[operator]

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Lightning calls this hook for all callbacks before any of them loads its state
        states = checkpoint.get("callbacks") or {}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, callbacks.ModelCheckpoint) and callback.state_key in states:
                states[callback.state_key] = _own_files(callback, states[callback.state_key])


def _own_files(callback: callbacks.ModelCheckpoint, state: Any) -> dict[str, Any]:
    """The state of a ModelCheckpoint without any path outside its folder."""
    state = state if isinstance(state, Mapping) else {}
    folder = Path(callback.dirpath or "").absolute()

    def own(path: Any) -> str:
        try:
            if isinstance(callback, ModelCheckpoint):  # it keeps one file; the run may have moved
                file = folder / Path(path).name
                fits = file.name == f"{callback.filename}.ckpt"
            else:
                file = folder / Path(path).relative_to(state["dirpath"])
                fits = file.suffix == ".ckpt"
            # a link or ".." could lead to another file
            inside = file.resolve() == folder.resolve() / file.relative_to(folder)
            return str(file) if fits and inside and file.is_file() else ""
        except (TypeError, ValueError, KeyError, OSError):  # not a path, or outside the folder
            return ""

    scores = state.get("best_k_models")
    scores = scores if isinstance(scores, Mapping) else {}
    kept = {own(path): score for path, score in scores.items() if own(path) and _is_score(score)}
    best, worst = own(state.get("best_model_path")), own(state.get("kth_best_model_path"))
    full = 0 < callback.save_top_k <= len(kept)
    if len(kept) < len(scores) or best not in kept or (full and worst not in kept):
        kept = {}  # the remaining ones may not be the best k
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
    """Writes the Trainer's checkpoints atomically; see ``files``.

    Lightning writes a checkpoint to TMPDIR and moves it. From another file system, a move is a copy
    over the old file: if it is interrupted, both files are lost.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Raises ValueError if the file cannot be written; an existing file is unchanged."""
        if "://" in str(path):  # an object store, which is atomic by itself
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_torch(Path(path), checkpoint)
