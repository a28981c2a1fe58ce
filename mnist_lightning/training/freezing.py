"""Layer freezing, for any LightningModule."""

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from mnist_lightning.console import say


class LayerFreezing(Callback):
    """Trains some parameters of a module and freezes the others.

    Patterns match the names of ``named_parameters()``; a ``*`` matches dots too: ``net.layer4.*``.
    A parameter that two layers share has two names, and a pattern may match either. Without
    patterns, the module's list ``trained_by_default`` is used, if it has one.

    Frozen parameters get no gradient and are in no optimizer. The freezing ends with the training,
    also after an exception. ``requires_grad`` and the layers' training mode are then restored:
    parameters that you froze yourself stay frozen, also after ``unfreeze_at_epoch``.

    At ``unfreeze_at_epoch`` each parameter joins the parameter group in which
    ``configure_optimizers`` put it, at the group's current learning rate. If
    ``configure_optimizers`` selects parameters by ``requires_grad``, it is called a second time at
    the start, without freezing: the number of groups is then the same in all epochs, as schedulers
    and checkpoints require.

    Why this is not Lightning's ``BaseFinetuning``: that needs a subclass for each model instead of
    patterns, and it adds unfrozen parameters as a new group, which the schedulers do not control.

    Args:
        train: patterns of the parameters that train; the others are frozen.
        freeze: patterns of the parameters that are frozen; the others train. Give only one of both.
        batch_norm: for layers with running statistics (BatchNorm, SyncBatchNorm, InstanceNorm)
            whose parameters are frozen: ``frozen`` freezes the statistics too (evaluation mode),
            ``adapt`` updates them with the training images.
        unfreeze_at_epoch: number of epochs after which all parameters train; by default, never.
        cache: if True, what frozen first layers make of each image is computed once and kept, if
            that gives the same training; see ``frozen_cache``.

    Raises:
        ValueError: the arguments contradict each other. In training: a pattern matches nothing;
            nothing is left to train; the checkpoint was trained with other frozen parameters; or,
            with ``unfreeze_at_epoch``, there are several processes or a parameter is in no
            optimizer.
    """

    def __init__(
        self,
        train: list[str] | None = None,
        freeze: list[str] | None = None,
        batch_norm: Literal["frozen", "adapt"] = "frozen",
        unfreeze_at_epoch: int | None = None,
        cache: bool = True,
    ) -> None:
        if train and freeze:
            raise ValueError(f"give patterns to train or to freeze, not both: {train}, {freeze}")
        if batch_norm not in ("frozen", "adapt"):
            raise ValueError(f"batch_norm must be frozen or adapt, got {batch_norm!r}")
        if unfreeze_at_epoch is not None and unfreeze_at_epoch < 1:
            raise ValueError(
                f"unfreeze_at_epoch must be at least 1, got {unfreeze_at_epoch}."
                " To freeze nothing, give no patterns."
            )
        self.train, self.freeze = train, freeze
        self.batch_norm, self.unfreeze_at_epoch = batch_norm, unfreeze_at_epoch
        self.cache = cache
        self.unused: set[str] = set()
        """Names of norm layers that no whole mini-batch passes, since their output is kept."""
        self._frozen: list[str] = []  # kept after the training, for checkpoints saved then
        self._resumed: list[str] | None = None
        # What to restore: each parameter's requires_grad; each norm layer's mode, by name; for each
        # optimizer the parameters of its groups, and the state of the frozen ones.
        self._required: dict[nn.Parameter, bool] = {}
        self._training: dict[str, bool] = {}
        self._optimized: list[tuple[list[list[nn.Parameter]], dict[Tensor, Any]]] = []

    @property
    def frozen(self) -> list[str]:
        """The names of the parameters that are frozen now, or were at the end of the training."""
        return self._frozen

    @property
    def held(self) -> set[str]:
        """The names of the norm layers that are kept in evaluation mode."""
        return set(self._training)

    def state_dict(self) -> dict[str, Any]:
        return {"frozen": self._frozen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict["frozen"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Freezes before the optimizers are made, so that a configure_optimizers that selects by
        # requires_grad finds only the parameters that train.
        if stage != "fit":
            return
        self._resumed = None  # load_state_dict sets it later, if a checkpoint is resumed
        chosen = self.choose(pl_module)
        if chosen and self.unfreeze_at_epoch and trainer.world_size > 1:
            # DistributedDataParallel exchanges only gradients of parameters that train at the start
            raise ValueError(
                "unfreeze_at_epoch works in a single process only, not in"
                f" {trainer.world_size}. Use one device, or freeze for the whole training."
            )
        self._frozen = list(chosen)
        self._required = {parameter: parameter.requires_grad for parameter in chosen.values()}
        for parameter in self._required:
            parameter.requires_grad_(False)
            parameter.grad = None  # an earlier training may have left one
        if self.batch_norm == "frozen":
            patterns = self._patterns(pl_module)
            for name, layer in pl_module.named_modules():
                if isinstance(layer, _NormBase) and layer.track_running_stats:
                    parameters = set(layer.parameters(recurse=False))
                    # patterns match a layer without parameters by the name of its statistics
                    frozen = (
                        parameters <= self._required.keys()
                        if parameters
                        else self._freezes([f"{name}.running_mean"], patterns)
                    )
                    if frozen:
                        self._training[name] = layer.training

    def choose(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Returns the parameters of a module that these settings freeze, by name.

        Raises:
            ValueError: a pattern matches nothing, or nothing is left to train.
        """
        patterns = self._patterns(module)
        names_of: dict[nn.Parameter, list[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            names_of.setdefault(parameter, []).append(name)
        all_names = [name for names in names_of.values() for name in names]
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in all_names):
                raise ValueError(
                    f"freezing: no parameter matches {pattern!r}; there are:"
                    f" {', '.join(blocks(all_names))}"
                )
        chosen = {names[0]: p for p, names in names_of.items() if self._freezes(names, patterns)}
        if patterns and len(chosen) == len(names_of):
            raise ValueError(f"freezing: {', '.join(patterns)} leaves nothing to train")
        return chosen

    def _patterns(self, module: nn.Module) -> list[str]:
        return self.freeze or self.train or getattr(module, "trained_by_default", [])

    def _freezes(self, names: list[str], patterns: list[str]) -> bool:
        matches = any(fnmatchcase(name, pattern) for name in names for pattern in patterns)
        return matches if self.freeze else bool(patterns) and not matches

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # the checkpoint was saved after the unfreezing
        unfrozen = self._resumed == [] and self.unfreeze_at_epoch is not None
        if self._resumed is not None and not unfrozen and set(self._resumed) != set(self._frozen):
            raise ValueError(
                f"freezing: the checkpoint was trained with {_count(self._resumed)} frozen, now"
                f" {_count(self._frozen)} would be. Resume with the same settings."
            )
        if not self._frozen:
            return
        if self.unfreeze_at_epoch:
            self._complete(trainer, pl_module)
        if unfrozen:
            self._thaw(pl_module)
            self._frozen = []
            return
        self._withdraw(trainer)
        trained = {name: p for name, p in pl_module.named_parameters() if p.requires_grad}
        total = sum(p.numel() for p in pl_module.parameters())
        norms = len(self._training)
        say(
            f"training {', '.join(blocks(trained))}:"
            f" {sum(p.numel() for p in trained.values()):,} of {total:,} parameters\n"
            f"frozen   {', '.join(blocks(self._frozen))}"
            + (f", and the statistics of its norm layers ({norms})" if norms else "")
        )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._frozen and trainer.current_epoch >= (self.unfreeze_at_epoch or float("inf")):
            self._restore(trainer)
            self._thaw(pl_module)
            self._frozen = []
            frozen = [name for name, p in pl_module.named_parameters() if not p.requires_grad]
            say(
                f"epoch {trainer.current_epoch + 1}: from here on everything trains"
                + (f", except {', '.join(blocks(frozen))}" if frozen else "")
            )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Before each mini-batch, because any call of train() on the module would unfreeze the
        # statistics. A layer that was set to training mode this way keeps it after the freezing.
        for name in self._training:
            layer = pl_module.get_submodule(name)  # sync_batchnorm replaces layers after setup
            self._training[name] |= layer.training
            layer.eval()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._thaw(pl_module)  # self._frozen stays, for checkpoints that are saved from here on

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._thaw(pl_module)  # Lightning does not call teardown after an exception

    def _thaw(self, module: LightningModule) -> None:
        for parameter, required in self._required.items():
            parameter.requires_grad_(required)
        for name, training in self._training.items():
            layer = module.get_submodule(name)
            layer.train(training or layer.training)
        self._required, self._training, self._optimized = {}, {}, []

    def _complete(self, trainer: Trainer, module: LightningModule) -> None:
        """Makes sure that every parameter that trains later is in an optimizer's group.

        Raises:
            ValueError: ``configure_optimizers`` leaves one out.
        """

        def missing() -> list[str]:
            groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
            optimized = {parameter for group in groups for parameter in group["params"]}
            return [
                name
                for name, p in module.named_parameters()
                if self._required.get(p) and p not in optimized
            ]

        if missing():
            for parameter, required in self._required.items():
                parameter.requires_grad_(required)
            trainer.strategy.setup_optimizers(trainer)
            for parameter in self._required:
                parameter.requires_grad_(False)
        if names := missing():
            raise ValueError(
                f"unfreeze_at_epoch: no optimizer holds {', '.join(blocks(names))}, so it could"
                " never train. Add it in configure_optimizers, or set its requires_grad to False."
            )

    def _withdraw(self, trainer: Trainer) -> None:
        """Removes the frozen parameters from the optimizers; the order of the others stays."""
        for optimizer in trainer.optimizers:
            groups = [group["params"] for group in optimizer.param_groups]
            frozen: list[Tensor] = [p for params in groups for p in params if not p.requires_grad]
            # Adagrad creates its state at once; a state without a parameter group cannot be saved
            state = {p: optimizer.state.pop(p) for p in frozen if p in optimizer.state}
            self._optimized.append((groups, state))
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if p.requires_grad]

    def _restore(self, trainer: Trainer) -> None:
        """Returns the parameters and states that ``_withdraw`` removed to their optimizers."""
        for optimizer, (groups, state) in zip(trainer.optimizers, self._optimized, strict=True):
            for group, parameters in zip(optimizer.param_groups, groups, strict=True):
                group["params"] = parameters
            optimizer.state.update(state)


def blocks(names: Iterable[str]) -> list[str]:
    """Shortens parameter names to patterns of the module's parts, such as ``net.layer4.*``."""
    split = (name.split(".") for name in names)
    return list(dict.fromkeys(".".join(n[:2]) + (".*" if len(n) > 2 else "") for n in split))


def _count(names: Collection[str]) -> str:
    return f"{len(names)} parameters ({', '.join(blocks(names))})" if names else "nothing"
