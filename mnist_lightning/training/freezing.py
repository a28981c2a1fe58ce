"""Layer freezing, for any LightningModule."""

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from mnist_lightning.console import say


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
                    f" {', '.join(blocks(every))}"
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
            still = [name for name, p in pl_module.named_parameters() if not p.requires_grad]
            say(
                f"epoch {trainer.current_epoch + 1}: from here on everything trains"
                + (f" but {', '.join(blocks(still))}" if still else "")
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
                f"unfreeze_at_epoch: no optimizer holds {', '.join(blocks(names))}, so it could"
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


def blocks(names: Iterable[str]) -> list[str]:
    """The patterns of the module's parts that hold these parameters, such as ``net.layer4.*``."""
    split = (name.split(".") for name in names)
    return list(dict.fromkeys(".".join(n[:2]) + (".*" if len(n) > 2 else "") for n in split))


def _count(names: Collection[str]) -> str:
    return f"{len(names)} parameters ({', '.join(blocks(names))})" if names else "nothing"
