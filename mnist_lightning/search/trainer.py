"""Lightning's Trainer in a search: the trials that it trains, and checkpoints as it writes them."""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

from lightning import __version__
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from mnist_lightning.classes import class_path
from mnist_lightning.console import suggest
from mnist_lightning.data.module import MNISTDataModule
from mnist_lightning.models import own
from mnist_lightning.quiet import silence
from mnist_lightning.search import space
from mnist_lightning.search.plan import Search
from mnist_lightning.search.space import Trial
from mnist_lightning.training import memory

# Takes the values of an epoch, as in CURVES, and what gives the weights; answers whether to stop.
EpochDone = Callable[[Sequence[float], Callable[[], list[Tensor]]], bool]


class Lack(ValueError):
    """A training cannot be done here and now: what is missing says nothing about the trial."""


def make_trainer(search: Search, max_epochs: int, *callbacks: Callback) -> Trainer:
    """The Trainer of one trial.

    Raises:
        Lack: it does not take the search's options, or not on this machine.
    """
    silence()  # the search reports what matters
    known = list(inspect.signature(Trainer.__init__).parameters)[1:]
    if wrong := space.unknown(search.trainer, known):
        raise Lack(f"the Trainer has no option {wrong[0]}; {suggest(wrong[0], known)}")
    settings = {
        "max_epochs": max_epochs,
        "callbacks": list(callbacks),
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    try:
        trainer = Trainer(**{**settings, **search.trainer})
        memory.check_processes(trainer.num_devices)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise Lack(f"the Trainer refuses {dict(search.trainer)}: {reason}") from error
    every, batches = trainer.check_val_every_n_epoch, trainer.limit_val_batches
    if every != 1 or not batches:
        raise Lack(
            "a search compares trials after each epoch: check_val_every_n_epoch must be 1, and"
            f" limit_val_batches above 0; got {every} and {batches}"
        )
    return trainer


def fit(
    search: Search, loaded: MNISTDataModule, trial: Trial, epoch_done: EpochDone
) -> tuple[LightningModule, list[Tensor]]:
    """Trains a trial; returns the model, and those of its tensors that training changes.

    Args:
        search: of the trial.
        loaded: see ``Search.load_data``.
        trial: what to train.
        epoch_done: is called after each epoch.
    """
    seed_everything(trial.params["seed"], verbose=False)
    model, data = search.build(trial.params), search.data_module(trial.params, loaded)
    names, train_loss = ["val/loss", "val/acc"], None
    if not own.logs_as_ours(model):
        names, train_loss = own.compared(model, data), own.TrainLoss()

    class Epochs(Checkpoint):  # callbacks of this kind are called last, when all is logged
        def on_train_epoch_end(self, trainer: Trainer, module: Any) -> None:
            logged = trainer.callback_metrics
            loss = train_loss.mean() if train_loss else float(logged["train/loss"])
            values = [loss, *(float(logged[name]) for name in names)]
            if epoch_done(values, lambda: list(module.state_dict().values())):
                trainer.should_stop = True

    callbacks = [*search.freezing(trial.params), Epochs(), *([train_loss] if train_loss else [])]
    make_trainer(search, trial.params["max_epochs"], *callbacks).fit(model, data)
    return model.cpu(), list(model.state_dict().values())


def checkpoint(
    search: Search,
    loaded: MNISTDataModule,
    trial: Trial,
    id: str,
    model: LightningModule,
    epochs: int,
) -> dict[str, Any]:
    """What the Trainer would save of a trained model, as far as it concerns the weights.

    Args:
        search: of the trial.
        loaded: see ``Search.load_data``.
        trial: what was trained.
        id: of the trial.
        model: with the weights.
        epochs: after how many epochs it had them.
    """
    data = search.data_module(trial.params, loaded)
    content = {
        "epoch": epochs - 1,  # Lightning counts from 0
        "global_step": epochs * math.ceil(len(data.train_set) / data.batch_size),
        "pytorch-lightning_version": __version__,
        "state_dict": model.state_dict(),
        "hparams_name": "kwargs",
        "model_class": class_path(type(model)),
        "hyper_parameters": {**model.hparams, **search.model_args(trial.params)},
        "datamodule_hparams_name": "kwargs",
        "datamodule_hyper_parameters": dict(data.hparams),
        "search": {"name": search.name, "trial": id},
    }
    model.on_save_checkpoint(content)
    return content
