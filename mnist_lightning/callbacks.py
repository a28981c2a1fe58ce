"""Callbacks for any LightningModule: early stopping, layer freezing, what the console shows."""

import base64
import time
import zlib
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mnist_lightning.data import in_image_order


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
    Without patterns the module's own ``trained_by_default`` counts, a list of them, if it has one.
    What is frozen gets no gradient and no place in an optimizer. The freezing is over when the
    training is.

    Args:
        train: patterns of the parameters that train; the others are frozen.
        freeze: patterns of those that are frozen; the others train. Only one of the two.
        batch_norm: of BatchNorm layers with frozen parameters: ``frozen`` keeps their running
            statistics too (evaluation mode), ``adapt`` lets these follow the training images.
        unfreeze_at_epoch: after so many epochs everything trains. Without it, never.

    Raises:
        ValueError: contradicting arguments; in training, a pattern that matches nothing, nothing
            left to train, or a checkpoint that was trained with other frozen parameters.
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
        self._frozen: dict[str, nn.Parameter] = {}
        self._norms: list[nn.Module] = []
        self._optimized: list[list[list[nn.Parameter]]] = []
        self._resumed: list[str] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"frozen": list(self._frozen)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict["frozen"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # before the optimizers are made: who asks for parameters that train then gets only these
        if stage != "fit":
            return
        self._resumed = None  # filled from a checkpoint, later
        self._frozen = self.choose(pl_module)
        if self._frozen and self.unfreeze_at_epoch and trainer.world_size > 1:
            # DistributedDataParallel exchanges the gradients of what trains at the start
            raise ValueError(
                "unfreeze_at_epoch works in a single process only, not in"
                f" {trainer.world_size}. Use one device, or freeze for the whole training."
            )
        for parameter in self._frozen.values():
            parameter.requires_grad_(False)
            parameter.grad = None  # of an earlier training
        self._norms = []
        for prefix, module in pl_module.named_modules():
            if isinstance(module, _BatchNorm) and self.batch_norm == "frozen":
                own = [name for name, _ in module.named_parameters(recurse=False)]
                # one without parameters goes by the name of its statistics
                names = [f"{prefix}.{name}" for name in own or ["running_mean"]]
                if all(self._freezes(name, self._patterns(pl_module)) for name in names):
                    self._norms.append(module)

    def choose(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters of a module that would be frozen, by name.

        Raises:
            ValueError: a pattern that matches nothing, or nothing left to train.
        """
        parameters, patterns = dict(module.named_parameters()), self._patterns(module)
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in parameters):
                raise ValueError(
                    f"freezing: no parameter matches {pattern!r}; there are:"
                    f" {', '.join(_blocks(parameters))}"
                )
        chosen = {name: p for name, p in parameters.items() if self._freezes(name, patterns)}
        if patterns and len(chosen) == len(parameters):
            raise ValueError(f"freezing: {', '.join(patterns)} leaves nothing to train")
        return chosen

    def _patterns(self, module: nn.Module) -> list[str]:
        return self.freeze or self.train or getattr(module, "trained_by_default", [])

    def _freezes(self, name: str, patterns: list[str]) -> bool:
        named = any(fnmatchcase(name, pattern) for pattern in patterns)
        return named if self.freeze else bool(patterns) and not named

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._resumed == [] and self.unfreeze_at_epoch:  # the checkpoint lies beyond it
            self._thaw()
            self._frozen = {}
        elif self._resumed is not None and set(self._resumed) != self._frozen.keys():
            raise ValueError(
                f"freezing: the checkpoint was trained with {_count(self._resumed)} frozen, now"
                f" {_count(self._frozen)} would be. Resume with the same settings."
            )
        if not self._frozen:
            return
        self._optimized = [
            [group["params"] for group in optimizer.param_groups]
            for optimizer in trainer.optimizers
        ]
        self._regroup(trainer)
        trained = {name: p for name, p in pl_module.named_parameters() if p.requires_grad}
        total = sum(p.numel() for p in pl_module.parameters())
        _say(
            f"training {', '.join(_blocks(trained))}:"
            f" {sum(p.numel() for p in trained.values()):,} of {total:,} parameters\n"
            f"frozen   {', '.join(_blocks(self._frozen))}"
            + (f", and the statistics of {len(self._norms)} BatchNorm" if self._norms else "")
        )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._frozen and trainer.current_epoch >= (self.unfreeze_at_epoch or float("inf")):
            self._thaw()
            self._frozen = {}
            self._regroup(trainer)
            _say(f"epoch {trainer.current_epoch + 1}: from here on everything trains")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # each time: whatever calls train() on the whole module would set their statistics moving
        for norm in self._norms:
            norm.eval()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._thaw()  # but a checkpoint that is saved from here on still says what was frozen

    def _thaw(self) -> None:
        for parameter in self._frozen.values():
            parameter.requires_grad_(True)
        for norm in self._norms:
            norm.train()
        self._norms = []

    def _regroup(self, trainer: Trainer) -> None:
        """Leaves in each optimizer those of its parameters that train, in their own order."""
        for optimizer, groups in zip(trainer.optimizers, self._optimized, strict=True):
            for group, parameters in zip(optimizer.param_groups, groups, strict=True):
                group["params"] = [p for p in parameters if p.requires_grad]


def _blocks(names: Iterable[str]) -> list[str]:
    """The patterns of the module's parts that hold these parameters, such as ``net.layer4.*``."""
    split = (name.split(".") for name in names)
    return list(dict.fromkeys(".".join(n[:2]) + (".*" if len(n) > 2 else "") for n in split))


def _count(names: Collection[str]) -> str:
    return f"{len(names)} parameters ({', '.join(_blocks(names))})" if names else "nothing"


@rank_zero_only
def _say(text: str) -> None:
    print(text, flush=True)


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
    """Lightning's bar, drawn at most five times a second: small steps take a millisecond."""

    def __init__(self) -> None:
        super().__init__()
        self._drawn = 0.0

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:  # type: ignore[override]
        now = time.monotonic()
        if now - self._drawn > 0.2 or trainer.is_last_batch:
            self._drawn = now
            super().on_train_batch_end(trainer, *args)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics  # type: ignore[return-value]


class EpochLines(Callback):
    """One line an epoch, for where no terminal shows a bar: log files, pipes, batch queues."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # the training's own figures are complete only once the epoch before has ended
        self._print(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._print(trainer)

    def _print(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero or "train/loss" not in trainer.callback_metrics:
            return
        figures = "  ".join(
            f"{name} {trainer.callback_metrics[name]:.4f}"
            for name in ("train/loss", "train/acc", "val/loss", "val/acc")
            if name in trainer.callback_metrics
        )
        print(f"epoch {trainer.current_epoch:>3}/{trainer.max_epochs}  {figures}", flush=True)
