"""How a training steps: one mini-batch at a time, as Lightning does, or many in one execution.

Small networks spend their time in the framework. An execution takes k mini-batches out of the
loader at once and makes the k updates that Lightning would make, without what Lightning does
between two mini-batches (Keras calls k ``steps_per_execution``). Where the network is a multilayer
perceptron under plain SGD, the updates themselves are fused: see ``stacked``, here with a stack of
one.

Both are admitted only where everything that could see or change a step is known: the lists below
name what is known, and whatever is not on them takes Lightning's own way, one mini-batch at a time.
Each epoch decides anew, and each execution checks again. The last mini-batch before a validation,
the end of an epoch or the end of the training always takes Lightning's own way, so that all that
Lightning does at such a moment is done by Lightning.
"""

import ctypes
import os
import platform
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.optimization.automatic import _AutomaticOptimization
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.precision import (
    DoublePrecision,
    HalfPrecision,
    MixedPrecision,
    Precision,
)
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils.data import BatchSampler, DataLoader

from mnist_lightning.checks import check_count
from mnist_lightning.data.module import MNISTDataModule
from mnist_lightning.data.sampling import EpochSampler, ImageSet, as_is
from mnist_lightning.training.callbacks import SafePoints
from mnist_lightning.training.freezing import LayerFreezing
from mnist_lightning.training.progress import ProgressBar
from mnist_lightning.training.stacked import BLOCK_ROWS, Population

# An execution of fewer operations than these is worth joining with others: about 0.1 s of
# arithmetic, next to the millisecond that Lightning takes for a mini-batch.
OPERATIONS = 1e10
MOST_STEPS = 256
# Below so many operations a mini-batch, threads wait for each other longer than they compute.
ONE_THREAD = 2e9

CONVOLUTIONS = (nn.modules.conv._ConvNd,)

# What may be overridden, because it neither sees nor changes a single step. Any other name, such as
# a hook of a later version of Lightning, is taken for one that does.
_ANY_CLASS = set(
    "__init__ __module__ __doc__ __qualname__ __annotations__ __parameters__ __abstractmethods__"
    " __dict__ __weakref__"
    " __orig_bases__ __static_attributes__ __firstlineno__ __annotate_func__ _abc_impl"
    " __annotations_cache__ __jit_unused_properties__".split()
)
_DATA = set(
    "prepare_data setup teardown train_dataloader val_dataloader test_dataloader"
    " predict_dataloader".split()
)
_BETWEEN_EPOCHS = set(
    "setup teardown on_fit_start on_fit_end on_save_checkpoint on_load_checkpoint"
    " on_train_start on_train_end on_train_epoch_start on_train_epoch_end"
    " on_validation_start on_validation_end on_validation_epoch_start on_validation_epoch_end"
    " on_validation_batch_start on_validation_batch_end on_test_start on_test_end"
    " on_test_epoch_start on_test_epoch_end on_test_batch_start on_test_batch_end"
    " on_predict_start on_predict_end on_predict_epoch_start on_predict_epoch_end"
    " on_predict_batch_start on_predict_batch_end".split()
)
DATA_NAMES = (
    _ANY_CLASS
    | _DATA
    | set("on_exception state_dict load_state_dict predict_files describe".split())
)
MODULE_NAMES = (
    _ANY_CLASS
    | _DATA
    | _BETWEEN_EPOCHS
    | set(
        "fusable configure_optimizers configure_callbacks configure_model lr_scheduler_step"
        " validation_step test_step predict_step on_validation_model_eval"
        " on_validation_model_train on_validation_model_zero_grad on_test_model_eval"
        " on_test_model_train on_predict_model_eval".split()
    )
)
CALLBACK_NAMES = _BETWEEN_EPOCHS | set(
    "on_exception on_sanity_check_start on_sanity_check_end state_dict load_state_dict state_key"
    " _legacy_state_key _generate_state_key".split()
)
STEP_HOOKS = sorted({n for n in dir(Callback) if not n.startswith("__")} - CALLBACK_NAMES)

# Progress bars are told about executions in place of mini-batches.
BARS = (ProgressBar, callbacks.TQDMProgressBar, callbacks.RichProgressBar)
# Callbacks that have a hook for mini-batches, and when it does nothing there. A subclass is another
# callback, unless it says ``steps_known = True`` in its own body.
HARMLESS: dict[type[Callback], Callable[[Any], bool]] = {
    callbacks.ModelCheckpoint: lambda c: (
        c._every_n_train_steps < 1 and c._train_time_interval is None
    ),
    callbacks.Timer: lambda c: c._interval != "step" or c._duration is None,
    callbacks.LearningRateMonitor: lambda c: c.logging_interval == "epoch",
    LayerFreezing: lambda c: not c._training,  # no norm layer to keep in evaluation mode
    **dict.fromkeys(BARS, lambda c: True),
}


class Way(NamedTuple):
    """How an epoch steps."""

    steps: int
    """Mini-batches in an execution."""
    fused: bool
    reason: str | None
    """Why not faster, if anything hinders it."""

    def __str__(self) -> str:
        if self.steps == 1:
            return f"one step at a time: {self.reason}"
        how = "fused" if self.fused else f"autograd: {self.reason}" if self.reason else "autograd"
        return f"steps per execution: {self.steps}, {how}"


def choose(trainer: Trainer, steps: int | None, fused: bool) -> Way:
    """How the epoch at hand steps.

    Args:
        trainer: in training.
        steps: as asked for; by default so many that Lightning's share is small.
        fused: whether steps may be fused.
    """
    if reason := obstacle(trainer):
        return Way(1, False, reason)
    if steps == 1:
        return Way(1, False, "as asked for")
    module, loader = trainer.lightning_module, _own_loader(trainer)
    if steps is None:
        if _convolves(module):
            return Way(1, False, "a convolution takes longer than what lies between two steps")
        joined = OPERATIONS / _operations(module, loader.batch_size)  # type: ignore
        steps = min(MOST_STEPS, round(joined))
        if steps < 2:
            return Way(1, False, "a step of this network is long enough")
    hindrance = unfusable(trainer) if fused else "fused steps are off"
    return Way(steps, hindrance is None, hindrance)


def _convolves(module: nn.Module) -> bool:
    return any(isinstance(layer, CONVOLUTIONS) for layer in module.modules())


def _operations(module: nn.Module, batch_size: int) -> float:
    """Of a step of a network without convolutions, which work on their weights many times over."""
    # forward, and backward to the weights and to the layer below, a product and a sum each
    return 6 * batch_size * sum(p.numel() for p in module.parameters())


def obstacle(trainer: Trainer) -> str | None:
    """What is not known to leave single steps alone, or nothing."""
    module: LightningModule = trainer.lightning_module
    # first: such a strategy puts a forward of its own into the module
    if trainer.world_size > 1:
        return f"{trainer.world_size} processes exchange gradients after each mini-batch"
    loop = trainer.fit_loop
    loops = (type(loop), type(loop.epoch_loop), type(loop.epoch_loop.automatic_optimization))
    if loops != (_FitLoop, _EpochLoop, _AutomaticOptimization):
        return "the Trainer has loops of its own"
    if changed := altered(module, MODULE_NAMES):
        return changed
    if not module.automatic_optimization:
        return "the optimization is manual"
    data = getattr(trainer, "datamodule", None)
    if data is None:
        return "the images come without a data module"
    if changed := altered(data, DATA_NAMES):
        return changed
    if _own_loader(trainer) is None:
        return "the training images come from another loader than the data module's own"
    if type(trainer.strategy) is not SingleDeviceStrategy:
        return f"{type(trainer.strategy).__name__} may act on each mini-batch"
    plugin = type(trainer.precision_plugin)
    if plugin not in (Precision, MixedPrecision, DoublePrecision, HalfPrecision):
        return f"{plugin.__name__} may act on each mini-batch"
    profiler = type(trainer.profiler)  # type: ignore[attr-defined]
    if profiler is not PassThroughProfiler:
        return f"{profiler.__name__} measures each mini-batch"
    if trainer.accumulate_grad_batches != 1:
        return "accumulate_grad_batches joins the gradients of mini-batches"
    if getattr(trainer, "_val_check_time_interval", None) is not None:
        return "val_check_interval is a time, which may end after any mini-batch"
    if getattr(loop, "_skip_backward", False):
        return "this epoch has no backward pass"
    if trainer.should_stop:
        return "the training is about to stop"
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if any(is_overridden(hook, callback) for hook in STEP_HOOKS) and not _harmless(callback):
            return f"{type(callback).__name__} acts on each mini-batch"
    return None


def _harmless(callback: Callback) -> bool:
    """Whether a callback does nothing in its hooks for mini-batches."""
    kind = next(cls for cls in type(callback).__mro__ if not vars(cls).get("steps_known"))
    return kind in HARMLESS and HARMLESS[kind](callback)


def altered(thing: object, allowed: set[str]) -> str | None:
    """What a subclass, or the object itself, has in the place of something known.

    A class says that its steps are known with ``steps_known = True`` in its own body. What stands
    before it in the order of inheritance may add names, and override the allowed ones.
    """
    kind = type(thing)
    known = next((cls for cls in kind.__mro__ if vars(cls).get("steps_known")), None)
    if known is None:
        return f"{kind.__name__} is not of mnist_lightning"
    for cls in kind.__mro__[: kind.__mro__.index(known)]:
        for name in vars(cls):
            if name not in allowed and hasattr(known, name):
                return f"{cls.__name__} overrides {name}"
    for name in vars(thing):
        if callable(getattr(kind, name, None)):
            return f"{name} of this {kind.__name__} is replaced"
    return None


def _own_loader(trainer: Trainer) -> DataLoader | None:
    """The data module's own train loader, if it is what the epoch reads from."""
    loaders = trainer.fit_loop._combined_loader.flattened  # type: ignore[union-attr]
    loader = loaders[0]
    own = (
        len(loaders) == 1
        and type(loader) is DataLoader
        and (type(loader.dataset), type(loader.sampler)) == (ImageSet, EpochSampler)
        and type(loader.batch_sampler) is BatchSampler
        and loader.batch_sampler.sampler is loader.sampler
        and not loader.batch_sampler.drop_last
        and loader.num_workers == 0
        and loader.collate_fn is as_is
    )
    return loader if own else None


def unfusable(trainer: Trainer) -> str | None:
    """What needs autograd's own steps, where many may go in an execution; or nothing."""
    module: Any = trainer.lightning_module
    if not module.fusable:
        return "the model does not ask for fused steps"
    layers = linear_layers(module.net)
    if layers is None:
        return "the network is no plain multilayer perceptron"
    parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
    if [id(p) for p in parameters] != [id(p) for p in module.parameters()]:
        return "the model has parameters beside its network's own"
    if hooked(module):
        return "a hook sees the network's passes or gradients"
    for p in parameters:
        if not p.requires_grad:
            return "some parameters are frozen"
        if (p.dtype, p.device) != (parameters[0].dtype, torch.device("cpu")):
            return "fused steps are for a CPU and one data type"
    if type(trainer.precision_plugin) not in (Precision, DoublePrecision):
        return f"precision is {trainer.precision}"
    if torch.is_anomaly_enabled() or torch.is_autocast_enabled("cpu"):
        return "autograd's anomaly detection or autocast is on"
    if trainer.gradient_clip_val:
        return "gradients are clipped"
    if any(config.interval == "step" for config in trainer.lr_scheduler_configs):
        return "the learning rate changes after each step"
    return _no_plain_sgd(trainer.optimizers, parameters)


def linear_layers(net: nn.Module) -> list[nn.Linear] | None:
    """The ``nn.Linear`` layers of a plain multilayer perceptron, or nothing if it is another net.

    Plain is an ``nn.Sequential``: ``nn.Flatten``, then linear layers with a bias, ReLU between.
    """
    layers = list(net) if type(net) is nn.Sequential else []
    kinds = [type(layer) for layer in layers]
    if kinds != [nn.Flatten, *([nn.Linear, nn.ReLU] * (len(kinds) // 2 - 1)), nn.Linear]:
        return None
    if (layers[0].start_dim, layers[0].end_dim) != (1, -1):
        return None
    linear = cast(list[nn.Linear], layers[1::2])
    fits = all(one.out_features == other.in_features for one, other in pairwise(linear))
    replaced = any("forward" in vars(layer) for layer in (net, *layers))
    plain = fits and not replaced and all(layer.bias is not None for layer in linear)
    return linear if plain else None


def hooked(module: nn.Module) -> bool:
    """Whether anything of a user's sees the passes of a module, or the gradients of its weights."""
    kinds = ("forward_pre", "forward", "backward_pre", "backward")
    return (
        any(getattr(part, f"_{kind}_hooks") for part in module.modules() for kind in kinds)
        or any(getattr(nn.modules.module, f"_global_{kind}_hooks") for kind in kinds)
        or any(part._compiled_call_impl is not None for part in module.modules())
        or any(p._backward_hooks or p._post_accumulate_grad_hooks for p in module.parameters())
    )


def _no_plain_sgd(optimizers: list[Any], parameters: list[Tensor]) -> str | None:
    (optimizer,) = optimizers
    if type(optimizer) is not torch.optim.SGD:
        return f"the optimizer is {type(optimizer).__name__}"
    if len(optimizer.param_groups) != 1:
        return "the optimizer has several parameter groups"
    (group,) = optimizer.param_groups
    if {id(p) for p in group["params"]} != {id(p) for p in parameters}:
        return "the optimizer has not all parameters"
    for name in ("momentum", "dampening", "weight_decay", "nesterov", "maximize", "differentiable"):
        if group[name]:
            return f"SGD has {name}"
    if not isinstance(group["lr"], float | int):
        return "the learning rate is a tensor"
    seen = (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        _global_optimizer_pre_hooks,
        _global_optimizer_post_hooks,
    )
    # a scheduler puts its own wrapper, which counts, in front of step
    step = vars(optimizer).get("step")
    replaced = step is not None and not hasattr(step, "_wrapped_by_lr_sched")
    return "a hook sees the optimizer's steps" if any(seen) or replaced else None


class Execution(Callback):
    """Has a training step in the fastest way that is known to be Lightning's own.

    A ``Classifier`` brings it along. It says how the training steps, at the start and when that
    changes. Small networks train on one thread, which is faster than several of them and leaves
    the others to other programs; convolutions take all threads. All that is changed for a training
    is given back when it ends, by an exception too.

    Args:
        steps: mini-batches that a training takes at once and makes as many updates with. They are
            the same mini-batches and updates as one by one, without what the Trainer does between
            them. By default, as many as are worth it.
        fused: whether plain SGD of a multilayer perceptron may be written out: forward, backward
            and update without autograd, several times as fast, with other roundings.
        threads: of the processor. By default as above, unless ``OMP_NUM_THREADS`` says a number.

    Raises:
        ValueError: ``steps`` or ``threads`` below 1; in training, more steps than one where
            something could see or change a single step.
    """

    def __init__(
        self, steps: int | None = None, fused: bool = True, threads: int | None = None
    ) -> None:
        for name, value in (("steps", steps), ("threads", threads)):
            if value is not None:
                check_count(name, value)
        self.steps, self.fused, self.threads = steps, fused, threads
        self.say: Callable[[str], None] = rank_zero_info
        """Takes the line about how the training steps."""
        self._said: str | None = None
        self._undo = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._undo.close()
        if trainer.strategy.root_device.type != "cpu":
            return
        self._undo.enter_context(kept_memory())
        if threads := self.threads or _few_threads(trainer, pl_module):
            self._undo.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(threads)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._said = None
        loop = trainer.fit_loop.epoch_loop
        if type(loop) is _TrainingEpochLoop:
            # the same object with its counters: all that Lightning knows of it stays true
            loop.__class__ = _EpochLoop
            cast(_EpochLoop, loop).execution = self
            self._undo.callback(_EpochLoop.undo, cast(_EpochLoop, loop))

    def choose(self, trainer: Trainer) -> Way:
        """How the epoch at hand steps, which is said where it is new.

        Raises:
            ValueError: more steps than one were asked for, and are not possible.
        """
        way = choose(trainer, self.steps, self.fused)
        if self._said is None and way.steps == 1 and (self.steps or 1) > 1:
            raise ValueError(
                f"{self.steps} steps per execution are not possible: {way.reason}."
                " Leave --execution.steps out, or set it to 1"
            )
        if str(way) != self._said:
            self._said = str(way)
            threads = torch.get_num_threads()
            self.say(f"{way}; {threads} thread{'s' if threads > 1 else ''}")
        return way

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # it changes roundings: a training that goes on from here is to have the same
        checkpoint["execution"] = {"fused": self.fused}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._undo.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._undo.close()


def _few_threads(trainer: Trainer, module: LightningModule) -> int | None:
    """One, where a mini-batch is too small to share; nothing where it is not, or the user chose."""
    data = getattr(trainer, "datamodule", None)
    if "OMP_NUM_THREADS" in os.environ or not isinstance(data, MNISTDataModule):
        return None
    small = not _convolves(module) and _operations(module, data.batch_size) < ONE_THREAD
    return 1 if small else None


@contextmanager
def kept_memory() -> Iterator[None]:
    """Within, this process keeps the memory that it frees, where the C library is glibc.

    By default larger buffers go back to the system when they are freed, and each step of a training
    waits for fresh pages: 60,000 of them in a step of ResNet-18 at 224 pixels.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    most_mappings, trim_threshold = -4, -1
    libc.mallopt(most_mappings, 0)  # no buffer gets a mapping of its own
    libc.mallopt(trim_threshold, -1)  # nothing is given back
    try:
        yield
    finally:
        libc.mallopt(most_mappings, 65536)  # glibc's defaults
        libc.mallopt(trim_threshold, 128 * 1024)
        libc.malloc_trim(0)


class _EpochLoop(_TrainingEpochLoop):
    """Lightning's epoch, which may take many mini-batches at once."""

    execution: Execution
    _way = Way(1, False, None)
    _fused: "FusedSGD | None" = None

    def undo(self) -> None:
        """Makes it Lightning's own again."""
        for name in ("execution", "_way", "_fused"):
            vars(self).pop(name, None)
        self.__class__ = _TrainingEpochLoop  # type: ignore[assignment]

    def reset(self) -> None:
        with warnings.catch_warnings():
            if _own_loader(self.trainer) is not None:  # which goes on where the checkpoint was
                warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")
            super().reset()

    def on_run_start(self, data_fetcher: _DataFetcher) -> None:
        if (loader := _own_loader(self.trainer)) is not None:
            done = self.batch_progress.current.ready * cast(int, loader.batch_size)
            cast(EpochSampler, loader.sampler).start = done
            resuming = self.trainer.fit_loop.is_resuming and not self.restarting
            if resuming and self.trainer.current_epoch > 0:
                # As without a stop, where each epoch begins a pass, which draws a random number.
                # The pass that Lightning has ready was begun before SafePoints restored the
                # generators.
                iter(data_fetcher)
        super().on_run_start(data_fetcher)
        self._way = self.execution.choose(self.trainer)
        module: Any = self.trainer.lightning_module
        self._fused = FusedSGD(module.net) if self._way.fused else None

    def advance(self, data_fetcher: _DataFetcher) -> None:
        steps = self._joinable(data_fetcher)
        if steps < 2:
            super().advance(data_fetcher)
            return
        self.val_loop.restarting = False  # as Lightning, which trains before it validates
        loader = cast(DataLoader, _own_loader(self.trainer))
        size = cast(int, loader.batch_size)
        images, labels = self._fetch(data_fetcher, cast(BatchSampler, loader.batch_sampler), steps)
        if self._fused:
            self._take_fused(self._fused, images, labels, size)
        else:
            self._take_each(images.split(size), labels.split(size))
        trainer, module = self.trainer, self.trainer.lightning_module
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, BARS):
                callback.on_train_batch_end(trainer, module, {}, (images, labels), self.batch_idx)

    def on_advance_end(self, data_fetcher: _DataFetcher) -> None:
        validates = self._should_check_val_fx(data_fetcher)
        try:
            super().on_advance_end(data_fetcher)
        except SIGTERMException:
            self._after_execution(validates, stopping=True)
            raise
        self._after_execution(validates, stopping=False)

    def _after_execution(self, validated: bool, stopping: bool) -> None:
        """Nothing is half done: the place for a checkpoint that goes on with the next execution."""
        trainer = self.trainer
        if (
            self._is_training_done  # the epoch's own end saves
            or self._should_accumulate()
            or trainer.world_size > 1
            or _own_loader(trainer) is None
        ):
            return
        # a training resumed right after a validation counts that step once more
        self._batches_that_stepped -= validated
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SafePoints):
                callback.after_execution(trainer, stopping)
        self._batches_that_stepped += validated

    def _joinable(self, data_fetcher: _DataFetcher) -> int:
        """Mini-batches that may go in one execution from here."""
        if self._way.steps == 1:
            return 1
        if self.restarting and self._should_check_val_fx(data_fetcher):
            return 1  # a resumed training that Lightning has yet to bring to its place
        # what was seen when the epoch began may have changed since, in a validation within it
        if obstacle(self.trainer) or (self._fused and unfusable(self.trainer)):
            self._way = Way(1, False, None)
            return 1
        done = self.batch_progress.current.ready
        left = [self.trainer.num_training_batches - done]
        if self.max_steps != -1:
            left.append(self.max_steps - self.global_step)
        every = self.trainer.val_check_batch
        if self._should_check_val_epoch() and every is not None and every != float("inf"):
            by_epoch = self.trainer.check_val_every_n_epoch is not None
            left.append(every - (done if by_epoch else self.batch_progress.total.ready) % every)
        # the last of them is Lightning's
        return int(min(self._way.steps, *(n - 1 for n in left)))

    def _fetch(self, data_fetcher: _DataFetcher, sampler: BatchSampler, steps: int) -> Any:
        """Some consecutive mini-batches as one, on the device."""
        size = sampler.batch_size
        sampler.batch_size = size * steps  # consecutive mini-batches are consecutive images
        try:
            batch, _, _ = next(data_fetcher)
        finally:
            sampler.batch_size = size
        data_fetcher.fetched += steps - 1
        trainer = self.trainer
        batch = trainer.precision_plugin.convert_input(batch)
        batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
        return call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=0)

    def _take_each(self, images: Sequence[Tensor], labels: Sequence[Tensor]) -> None:
        """What Lightning does with mini-batches that nobody but the model sees."""
        for batch in zip(images, labels, strict=True):
            if batch[0] is not images[0]:  # what Lightning does at the end of the one before
                self.update_lr_schedulers("step", update_plateau_schedulers=True)
                self._batches_that_stepped += 1
            index = self.batch_idx + 1
            self.batch_progress.increment_ready()
            self.batch_progress.increment_started()
            arguments = OrderedDict(batch=batch, batch_idx=index)
            self.automatic_optimization.run(self.trainer.optimizers[0], index, arguments)
            self.batch_progress.increment_processed()
            self.update_lr_schedulers("step", update_plateau_schedulers=False)
            self.batch_progress.increment_completed()

    def _take_fused(self, fused: "FusedSGD", images: Tensor, labels: Tensor, size: int) -> None:
        """The same updates and the same counts, without autograd."""
        lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        loss, correct = fused.steps(images, labels, size, lr)
        module: Any = self.trainer.lightning_module
        module.epoch_metrics.note("train", loss, correct, len(labels))
        steps = -(-len(labels) // size)
        self.batch_progress.increment_by(steps)
        self.automatic_optimization.optim_progress.optimizer.step.increment_by(steps)
        self.automatic_optimization.optim_progress.optimizer.zero_grad.increment_by(steps)
        self._batches_that_stepped += steps - 1  # and one at the end of each execution


class FusedSGD:
    """Plain SGD on the cross entropy of one multilayer perceptron, written out.

    Args:
        net: see ``linear_layers``.
    """

    def __init__(self, net: nn.Module) -> None:
        self.parameters = list(net.parameters())
        self.population = Population([self.parameters], [1.0])

    @torch.no_grad()
    def steps(
        self, images: Tensor, labels: Tensor, batch_size: int, lr: float
    ) -> tuple[Tensor, Tensor]:
        """An update for each of some consecutive mini-batches.

        Args:
            images: ``(n, ...)``, flattened here.
            labels: int64, ``(n,)``.
            batch_size: images in a mini-batch.
            lr: learning rate.

        Returns:
            The sum of the cross entropy and the number of correct answers over all mini-batches,
            both before each one's update.
        """
        # from the network's own parameters and back: whatever else reads or sets them may do so
        self.population.load(0, self.parameters, lr)
        rows = self.population.arrange(images.flatten(1))
        block = batch_size * max(1, BLOCK_ROWS // batch_size)
        scores = [
            self.population.train_block(x, y, batch_size)
            for x, y in zip(rows.split(block), labels.split(block), strict=True)
        ]
        for own, new in zip(self.parameters, self.population.parameters(0), strict=True):
            own.copy_(new)
        loss, correct = (torch.cat(column, 1).sum() for column in zip(*scores, strict=True))
        return loss.clone(), correct.clone()  # out of inference mode
