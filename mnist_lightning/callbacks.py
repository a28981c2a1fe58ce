"""Callbacks for any LightningModule: early stopping, layer freezing, what the console shows."""

import base64
import random
import sys
import time
import zlib
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from mnist_lightning.data import in_image_order
from mnist_lightning.files import printable


class EarlyStopping(callbacks.EarlyStopping):
    """Ends the training when the validation loss has stopped falling.

    Lightning's own, with a default to watch and a switch to turn it off.

    Args:
        enabled: without it, the training always takes ``max_epochs``.
        monitor: the logged value to watch.
        patience: epochs without improvement before the training ends.
        min_delta: a smaller change is no improvement.
        mode: ``min`` where less is better, ``max`` where more is.
    """

    def __init__(
        self,
        enabled: bool = True,
        monitor: str = "val/loss",
        patience: int = 10,
        min_delta: float = 0.0,
        mode: str = "min",
    ) -> None:
        if patience < 1:
            raise ValueError(
                f"patience must be at least 1 epoch, got {patience}."
                " To train without early stopping: --early_stopping.enabled false"
            )
        super().__init__(monitor, min_delta=min_delta, patience=patience, mode=mode)
        self.enabled = enabled

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not hasattr(trainer, "val_check_interval"):
            # a time; Lightning 2.6 then looks for the attribute all the same
            self._check_on_train_epoch_end = False
        super().setup(trainer, pl_module, stage)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.enabled:
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.enabled:
            super().on_validation_end(trainer, pl_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning would restore the patience too, over the one just asked for
        super().load_state_dict({**state_dict, "patience": self.patience})


class LayerFreezing(Callback):
    """Trains some parameters of a module and leaves the others as they are.

    Patterns match the names of ``named_parameters()``; a ``*`` matches dots too: ``net.layer4.*``.
    A parameter that two layers share has two names, and a pattern may match either. Without
    patterns the module's own ``trained_by_default`` counts, a list of them, if it has one.

    What is frozen gets no gradient and no place in an optimizer. The freezing ends with the
    training, also where an exception ends it. ``requires_grad`` and the layers' training mode are
    then what they were before: what you froze yourself stays frozen, also after the thaw.

    At ``unfreeze_at_epoch`` each parameter joins the parameter group that ``configure_optimizers``
    put it in, at the learning rate that the group has by then. If ``configure_optimizers`` selects
    by ``requires_grad``, it is called a second time at the start, while nothing is frozen: the
    number of groups is then the same in all epochs, as schedulers and checkpoints need it.

    This is not Lightning's ``BaseFinetuning``, which has no patterns but wants a subclass, and adds
    what it thaws as a new parameter group, which the schedulers do not know.

    Args:
        train: patterns of the parameters that train; the others are frozen.
        freeze: patterns of those that are frozen; the others train. Only one of the two.
        batch_norm: of layers with running statistics (BatchNorm, SyncBatchNorm, InstanceNorm) whose
            parameters are frozen: ``frozen`` keeps the statistics too (evaluation mode), ``adapt``
            lets these follow the training images.
        unfreeze_at_epoch: after so many epochs everything trains. Without it, never.

    Raises:
        ValueError: contradicting arguments; in training, a pattern that matches nothing, nothing
            left to train, a checkpoint that was trained with other frozen parameters, or with
            ``unfreeze_at_epoch`` several processes, or a parameter that no optimizer holds.
    """

    def __init__(
        self,
        train: list[str] | None = None,
        freeze: list[str] | None = None,
        batch_norm: Literal["frozen", "adapt"] = "frozen",
        unfreeze_at_epoch: int | None = None,
    ) -> None:
        if train and freeze:
            raise ValueError(f"say what to train or what to freeze, not both: {train}, {freeze}")
        if batch_norm not in ("frozen", "adapt"):
            raise ValueError(f"batch_norm must be frozen or adapt, got {batch_norm!r}")
        if unfreeze_at_epoch is not None and unfreeze_at_epoch < 1:
            raise ValueError(
                f"unfreeze_at_epoch must be at least 1, got {unfreeze_at_epoch}."
                " To freeze nothing, give no patterns."
            )
        self.train, self.freeze = train, freeze
        self.batch_norm, self.unfreeze_at_epoch = batch_norm, unfreeze_at_epoch
        self._frozen: list[str] = []  # kept after the training: checkpoints still name it
        self._resumed: list[str] | None = None
        # what to give back: each parameter's requires_grad, each norm layer's mode by name, and for
        # each optimizer the parameters of its groups and the state of those that are frozen
        self._required: dict[nn.Parameter, bool] = {}
        self._training: dict[str, bool] = {}
        self._optimized: list[tuple[list[list[nn.Parameter]], dict[Tensor, Any]]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"frozen": self._frozen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict["frozen"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # before the optimizers are made: who asks for parameters that train then gets only these
        if stage != "fit":
            return
        self._resumed = None  # filled from a checkpoint, later
        chosen = self.choose(pl_module)
        if chosen and self.unfreeze_at_epoch and trainer.world_size > 1:
            # DistributedDataParallel exchanges the gradients of what trains at the start
            raise ValueError(
                "unfreeze_at_epoch works in a single process only, not in"
                f" {trainer.world_size}. Use one device, or freeze for the whole training."
            )
        self._frozen = list(chosen)
        self._required = {parameter: parameter.requires_grad for parameter in chosen.values()}
        for parameter in self._required:
            parameter.requires_grad_(False)
            parameter.grad = None  # of an earlier training
        if self.batch_norm == "frozen":
            patterns = self._patterns(pl_module)
            for name, layer in pl_module.named_modules():
                if isinstance(layer, _NormBase) and layer.track_running_stats:
                    own = set(layer.parameters(recurse=False))
                    # one without parameters goes by the name of its statistics
                    alone = not own and self._freezes([f"{name}.running_mean"], patterns)
                    if alone or (own and own <= self._required.keys()):
                        self._training[name] = layer.training

    def choose(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters of a module that would be frozen, by name.

        Raises:
            ValueError: a pattern that matches nothing, or nothing left to train.
        """
        patterns = self._patterns(module)
        names: dict[nn.Parameter, list[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            names.setdefault(parameter, []).append(name)
        every = [name for own in names.values() for name in own]
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in every):
                raise ValueError(
                    f"freezing: no parameter matches {pattern!r}; there are:"
                    f" {', '.join(_blocks(every))}"
                )
        chosen = {own[0]: p for p, own in names.items() if self._freezes(own, patterns)}
        if patterns and len(chosen) == len(names):
            raise ValueError(f"freezing: {', '.join(patterns)} leaves nothing to train")
        return chosen

    def _patterns(self, module: nn.Module) -> list[str]:
        return self.freeze or self.train or getattr(module, "trained_by_default", [])

    def _freezes(self, names: list[str], patterns: list[str]) -> bool:
        named = any(fnmatchcase(name, pattern) for name in names for pattern in patterns)
        return named if self.freeze else bool(patterns) and not named

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        beyond = self._resumed == [] and self.unfreeze_at_epoch is not None  # the checkpoint
        if self._resumed is not None and not beyond and set(self._resumed) != set(self._frozen):
            raise ValueError(
                f"freezing: the checkpoint was trained with {_count(self._resumed)} frozen, now"
                f" {_count(self._frozen)} would be. Resume with the same settings."
            )
        if not self._frozen:
            return
        if self.unfreeze_at_epoch:
            self._complete(trainer, pl_module)
        if beyond:
            self._thaw(pl_module)
            self._frozen = []
            return
        self._withdraw(trainer)
        trained = {name: p for name, p in pl_module.named_parameters() if p.requires_grad}
        total = sum(p.numel() for p in pl_module.parameters())
        norms = len(self._training)
        say(
            f"training {', '.join(_blocks(trained))}:"
            f" {sum(p.numel() for p in trained.values()):,} of {total:,} parameters\n"
            f"frozen   {', '.join(_blocks(self._frozen))}"
            + (f", and the statistics of its norm layers ({norms})" if norms else "")
        )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._frozen and trainer.current_epoch >= (self.unfreeze_at_epoch or float("inf")):
            self._restore(trainer)
            self._thaw(pl_module)
            self._frozen = []
            still = [name for name, p in pl_module.named_parameters() if not p.requires_grad]
            say(
                f"epoch {trainer.current_epoch + 1}: from here on everything trains"
                + (f" but {', '.join(_blocks(still))}" if still else "")
            )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Each time: whatever calls train() on the whole module would set their statistics moving.
        # Once the freezing is over, that call counts for them too.
        for name in self._training:
            layer = pl_module.get_submodule(name)  # sync_batchnorm replaces layers after setup
            self._training[name] |= layer.training
            layer.eval()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._thaw(pl_module)  # but a checkpoint that is saved from here on says what was frozen

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._thaw(pl_module)  # Lightning calls no teardown then

    def _thaw(self, module: LightningModule) -> None:
        for parameter, required in self._required.items():
            parameter.requires_grad_(required)
        for name, training in self._training.items():
            layer = module.get_submodule(name)
            layer.train(training or layer.training)
        self._required, self._training, self._optimized = {}, {}, []

    def _complete(self, trainer: Trainer, module: LightningModule) -> None:
        """Sees that whatever thaws later has its place in an optimizer, in the group meant for it.

        Raises:
            ValueError: the module gives it none.
        """

        def missing() -> list[str]:
            groups = [group for made in trainer.optimizers for group in made.param_groups]
            held = {parameter for group in groups for parameter in group["params"]}
            named = module.named_parameters()
            return [name for name, p in named if self._required.get(p) and p not in held]

        if missing():
            for parameter, required in self._required.items():
                parameter.requires_grad_(required)
            trainer.strategy.setup_optimizers(trainer)
            for parameter in self._required:
                parameter.requires_grad_(False)
        if names := missing():
            raise ValueError(
                f"unfreeze_at_epoch: no optimizer holds {', '.join(_blocks(names))}, so it could"
                " never train. Add it in configure_optimizers, or set its requires_grad to False."
            )

    def _withdraw(self, trainer: Trainer) -> None:
        """Leaves in each optimizer those of its parameters that train, in their own order."""
        for optimizer in trainer.optimizers:
            groups = [group["params"] for group in optimizer.param_groups]
            idle: list[Tensor] = [p for own in groups for p in own if not p.requires_grad]
            # Adagrad makes its state at once, and cannot save that of a parameter in no group
            state = {p: optimizer.state.pop(p) for p in idle if p in optimizer.state}
            self._optimized.append((groups, state))
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if p.requires_grad]

    def _restore(self, trainer: Trainer) -> None:
        """Puts back into each optimizer what ``_withdraw`` took out."""
        for optimizer, (groups, state) in zip(trainer.optimizers, self._optimized, strict=True):
            for group, parameters in zip(optimizer.param_groups, groups, strict=True):
                group["params"] = parameters
            optimizer.state.update(state)


def _blocks(names: Iterable[str]) -> list[str]:
    """The patterns of the module's parts that hold these parameters, such as ``net.layer4.*``."""
    split = (name.split(".") for name in names)
    return list(dict.fromkeys(".".join(n[:2]) + (".*" if len(n) > 2 else "") for n in split))


def _count(names: Collection[str]) -> str:
    return f"{len(names)} parameters ({', '.join(_blocks(names))})" if names else "nothing"


@rank_zero_only
def say(text: str) -> None:
    """Prints, above the live line of a progress bar if there is one; in one of several processes.

    What would steer a terminal is escaped.
    """
    Tqdm.write(printable(text), file=sys.stdout)
    sys.stdout.flush()


class SafePoints(Callback):
    """Saves ``last.ckpt`` within an epoch too, and in every checkpoint the random generators.

    Every few minutes, and when the training is told to stop. A training that goes on from there
    takes the same mini-batches with the same random numbers as one that was never stopped, and its
    figures of that epoch count the mini-batches before, too.

    It needs a ``ModelCheckpoint(filename="last")``, whose file it writes, the data module's own
    loader, and a single process: in any other training only whole epochs are saved.

    Args:
        minutes: of training since the last checkpoint; with 0, after each execution.

    Raises:
        ValueError: a negative number of minutes.
    """

    def __init__(self, minutes: float = 5.0) -> None:
        if not minutes >= 0:
            raise ValueError(f"save_every_minutes must be 0 or more, got {minutes}")
        self.minutes = minutes
        self.training = False
        """Whether steps are being taken, so that a stop can wait for the end of one."""
        self._stopping = False
        self._saved = 0.0
        self._generators: dict[str, Any] | None = None

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._generators = checkpoint.get("generators")

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
        checkpoint["generators"] = {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "numpy": (name, cast(Any, keys).tolist(), *rest),
            "python": random.getstate(),
        }
        self._saved = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved, self.training, self._stopping = time.monotonic(), True, False
        if (states := self._generators) is not None:
            self._generators = None
            torch.set_rng_state(states["torch"])
            if len(states["cuda"]) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all(states["cuda"])
            np.random.set_state(states["numpy"])  # noqa: NPY002
            random.setstate(states["python"])

    def stop(self, trainer: Trainer) -> None:
        """Has the training end after the step at hand, or after the validation at hand.

        Lightning would end within a validation, where nothing can be saved.
        """
        self._stopping = True
        # of a SIGTERM, Lightning's own handler has noted it already
        trainer._signal_connector.received_sigterm = not trainer.validating

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer._signal_connector.received_sigterm &= not self._stopping  # told in the step before

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer._signal_connector.received_sigterm |= self._stopping

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer._signal_connector.received_sigterm |= self._stopping  # came after that hook

    def after_execution(self, trainer: Trainer, stopping: bool) -> None:
        """Saves if it is time to; called within an epoch, while nothing is half done."""
        if stopping or time.monotonic() - self._saved >= 60 * self.minutes:
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, callbacks.ModelCheckpoint) and callback.filename == "last":
                    trainer.save_checkpoint(Path(callback.dirpath or "", "last.ckpt"))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.training = False

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.training = False


class Mistakes(Callback):
    """Notes what a test got wrong: a confusion matrix, and the images of the surest errors.

    Args:
        most: how many images to keep.
    """

    images: int
    """How many images the test scored, in all processes."""

    def __init__(self, most: int = 60) -> None:
        self.most = most

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.images = 0
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []
        self._rows: tuple[Tensor, ...] = ()

    def on_test_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        labels = batch[1]
        self.images += len(labels)
        # a model with a test_step of its own may return its loss, or nothing
        if isinstance(outputs, Tensor) and outputs.ndim == 2:
            probability, predicted = outputs.float().max(1)
            self._seen.append((probability.cpu(), predicted.cpu(), labels.cpu()))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        counted = torch.tensor(self.images, device=pl_module.device)
        self.images = int(trainer.strategy.reduce(counted, reduce_op="sum"))
        if self._seen:
            columns = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
            self._rows = in_image_order(trainer, cast(Any, trainer.test_dataloaders), *columns)

    def facts(self, images: Tensor) -> dict[str, Any]:
        """What was noted, as plain JSON types.

        Args:
            images: the test images, uint8, ``(n, 28, 28)``.

        Returns:
            ``confusion[label][predicted]``, numbers of images; ``mistakes``, the surest first, each
            with its ``image``'s row and its ``pixels`` (28 x 28 bytes, zlib, base64).
        """
        if not self._rows:
            return {}
        index, probability, predicted, labels = self._rows
        confusion = torch.zeros(10, 10, dtype=torch.int64)
        confusion.index_put_((labels, predicted), torch.ones_like(labels), accumulate=True)
        wrong = (predicted != labels).nonzero().flatten()
        surest = wrong[probability[wrong].argsort(descending=True, stable=True)][: self.most]
        return {
            "confusion": confusion.tolist(),
            "mistakes": [
                {
                    "image": int(index[row]),
                    "label": int(labels[row]),
                    "predicted": int(predicted[row]),
                    "probability": round(float(probability[row]), 4),
                    "pixels": base64.b64encode(
                        zlib.compress(images[index[row]].numpy().tobytes(), 9)
                    ).decode(),
                }
                for row in surest.tolist()
            ],
        }


class ProgressBar(callbacks.TQDMProgressBar):
    """One live line: the mini-batches of the epoch, and the time that the rest of it takes.

    Lightning's bar, drawn at most five times a second (small steps take a millisecond), and gone
    when it is done: what stays on the screen is for ``EpochLines``.
    """

    BAR_FORMAT = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {remaining} left"

    def __init__(self) -> None:
        super().__init__()
        self._drawn = 0.0

    def init_train_tqdm(self) -> Any:
        return _line(super().init_train_tqdm())

    def init_validation_tqdm(self) -> Any:
        if self.trainer.state.fn == "fit":
            self.train_progress_bar.set_description(f"{self._epoch()}, validation")
            return Tqdm(disable=True)  # a second line would have to be made room for
        return _line(super().init_validation_tqdm())

    def init_test_tqdm(self) -> Any:
        return _line(super().init_test_tqdm())

    def init_predict_tqdm(self) -> Any:
        return _line(super().init_predict_tqdm())

    def _epoch(self) -> str:
        return f"epoch {self.trainer.current_epoch + 1}{_of(self.trainer)}"

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description(self._epoch())

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:  # type: ignore[override]
        now = time.monotonic()
        if now - self._drawn > 0.2 or trainer.is_last_batch:
            self._drawn = now
            super().on_train_batch_end(trainer, *args)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.train_progress_bar.set_description(self._epoch())

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        for bar in (self._train_progress_bar, self._val_progress_bar, self._test_progress_bar):
            if bar is not None:
                bar.close()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        return {}  # the table has them


def _line(bar: Any) -> Any:
    bar.leave = False
    return bar


def _of(trainer: Trainer) -> str:
    return "" if trainer.max_epochs in (None, -1) else f" of {trainer.max_epochs}"


class EpochLines(Callback):
    """One line an epoch, that stays: its figures, its seconds, and whether it is the best so far.

    A table on a terminal. In log files and pipes each line has the names with it. The figures are
    the losses and accuracies of a ``Classifier`` and what the model logs with ``prog_bar=True``;
    without any of these, all that it logs.

    Args:
        width: of the terminal, in characters; figures beyond it are left out. Without it, no table.
    """

    FIGURES = ("train/loss", "train/acc", "val/loss", "val/acc")

    def __init__(self, width: int | None = None) -> None:
        self.width = width
        self._columns: list[str] = []
        self._best: Tensor | None = None
        self._began = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._columns, self._best = [], _best_score(trainer)  # of a training that goes on
        self._began = time.monotonic()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # the training's own figures are complete only once the epoch before has ended
        self._print(trainer)
        self._began = time.monotonic()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._print(trainer)

    def _print(self, trainer: Trainer) -> None:
        logged: dict[str, Any] = {**trainer.progress_bar_metrics, **trainer.callback_metrics}
        shown = [name for name in self.FIGURES if name in logged]
        shown += [name for name in trainer.progress_bar_metrics if name not in (*shown, "v_num")]
        shown = shown or list(logged)  # of a model with other names, which asks for nothing
        if not trainer.is_global_zero or not shown:
            return
        best, self._best = self._best, _best_score(trainer)
        mark = "  best" if self._best is not None and self._best != best else ""
        seconds = f"{time.monotonic() - self._began:.1f}"
        epoch = trainer.current_epoch
        if self.width is None:
            figures = "  ".join(f"{name} {float(logged[name]):.4f}" for name in shown)
            of = "" if trainer.max_epochs in (None, -1) else f"/{trainer.max_epochs}"
            say(f"epoch {epoch:>3}{of}  {figures}  {seconds} s{mark}")
            return
        if not self._columns:
            self._columns = self._fitting(shown)
            say("".join(["\nepoch", *(f"  {name:>7}" for name in self._columns), "   secs"]))
        values = {name: f"{float(logged[name]):.4f}" for name in self._columns if name in logged}
        cells = (f"  {values.get(name, ''):>{max(7, len(name))}}" for name in self._columns)
        say(f"{epoch:>5}{''.join(cells)}  {seconds:>5}{mark}")

    def _fitting(self, names: list[str]) -> list[str]:
        """The first of the columns, as many as there is room for."""
        left = cast(int, self.width) - len("epoch") - len("   secs  best")
        fitting = []
        for name in names:
            left -= 2 + max(7, len(name))
            if left < 0:
                break
            fitting.append(name)
        return fitting


def _best_score(trainer: Trainer) -> Tensor | None:
    """That of the checkpoint that the training keeps as its best."""
    kept = (c for c in trainer.checkpoint_callbacks if getattr(c, "filename", None) == "best")
    return next((getattr(c, "best_model_score", None) for c in kept), None)
