"""Trains one mini-batch at a time, as Lightning does, or many mini-batches in one execution.

Small networks spend most of their time in the framework. An execution takes k mini-batches from the
loader at once and makes the same k updates as Lightning, without Lightning's work between two
mini-batches (Keras calls k ``steps_per_execution``). If the network is a multilayer perceptron
under SGD, the updates themselves are fused: under plain SGD see ``stacked``, here with a stack of
one; with momentum or weight decay see ``sgd_steps``.

Both are used only if everything that could see or change a step is known. The lists below name what
is known; with anything else, Lightning trains one mini-batch at a time. Each epoch decides again,
and each execution checks again. Lightning itself always trains the last mini-batch before a
validation, the end of an epoch or the end of the training, and does all its work at these moments.
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
from mnist_lightning.training.features import computed
from mnist_lightning.training.freezing import LayerFreezing
from mnist_lightning.training.progress import ProgressBar
from mnist_lightning.training.stacked import BLOCK_ROWS, Population

# Operations in one execution, unless the user sets the number of steps: about 0.1 s of arithmetic.
# Lightning's overhead of a millisecond per mini-batch is small in comparison.
OPERATIONS = 1e10
MOST_STEPS = 256
# With fewer operations per mini-batch, threads wait for each other longer than they compute.
ONE_THREAD = 2e9

_NVML_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"
CONVOLUTIONS = (nn.modules.conv._ConvNd,)
PRECISIONS = (Precision, MixedPrecision, DoublePrecision, HalfPrecision)

# Names that may be overridden, because they neither see nor change a single step. Any other name,
# such as a hook of a later version of Lightning, is assumed to do so.
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

# Progress bars are updated once per execution instead of once per mini-batch.
BARS = (ProgressBar, callbacks.TQDMProgressBar, callbacks.RichProgressBar)
# Callbacks with hooks for mini-batches, each with a condition under which these hooks do nothing.
# Subclasses are not included, unless their class body has ``steps_known = True``.
HARMLESS: dict[type[Callback], Callable[[Any], bool]] = {
    callbacks.ModelCheckpoint: lambda c: (
        c._every_n_train_steps < 1 and c._train_time_interval is None
    ),
    callbacks.Timer: lambda c: c._interval != "step" or c._duration is None,
    callbacks.LearningRateMonitor: lambda c: c.logging_interval == "epoch",
    LayerFreezing: lambda c: c.held <= c.unused,  # no norm layer to keep in evaluation mode
    **dict.fromkeys(BARS, lambda c: True),
}


class Way(NamedTuple):
    """How an epoch takes its steps."""

    steps: int
    """Mini-batches in an execution."""
    fused: bool
    reason: str | None
    """Why it is not faster, if there is a reason."""

    def __str__(self) -> str:
        if self.steps == 1:
            return f"one step at a time: {self.reason}"
        mode = "fused" if self.fused else f"autograd: {self.reason}" if self.reason else "autograd"
        return f"steps per execution: {self.steps}, {mode}"


def choose(trainer: Trainer, steps: int | None, fused: bool) -> Way:
    """Chooses how the current epoch takes its steps.

    Args:
        trainer: the Trainer, in training.
        steps: mini-batches in an execution; None chooses enough to make the overhead small.
        fused: if True, steps may be fused.
    """
    if reason := obstacle(trainer):
        return Way(1, False, reason)
    if steps == 1:
        return Way(1, False, "as requested")
    module, loader = trainer.lightning_module, own_loader(trainer)
    if steps is None:
        if _convolves(module):
            return Way(1, False, "a convolution takes longer than Lightning's overhead per step")
        steps = round(OPERATIONS / _operations(module, loader.batch_size))  # type: ignore
        steps = min(MOST_STEPS, steps)
        if steps < 2:
            return Way(1, False, "a step of this network takes long enough")
    reason = unfusable(trainer) if fused else "fused steps are off"
    return Way(steps, reason is None, reason)


def _convolves(module: nn.Module) -> bool:
    return any(isinstance(layer, CONVOLUTIONS) for layer in computed(module))


def _operations(module: nn.Module, batch_size: int) -> float:
    """Counts the operations of a step, for a network without convolutions.

    A convolution uses each of its weights many times for one image.
    """
    # forward, and backward to the weights and to the layer below: a product and a sum each
    parameters = {p for layer in computed(module) for p in layer.parameters(recurse=False)}
    return 6 * batch_size * sum(p.numel() for p in parameters)


def obstacle(trainer: Trainer) -> str | None:
    """Returns what might see or change single steps, for the message; None if nothing does."""
    module: LightningModule = trainer.lightning_module
    # checked first, because the strategy for several processes replaces the module's forward
    if trainer.world_size > 1:
        return f"{trainer.world_size} processes exchange gradients after each mini-batch"
    loop = trainer.fit_loop
    loops = (type(loop), type(loop.epoch_loop), type(loop.epoch_loop.automatic_optimization))
    if loops != (_FitLoop, _EpochLoop, _AutomaticOptimization):
        return "the Trainer has custom loops"
    if reason := altered(module, MODULE_NAMES):
        return reason
    if not module.automatic_optimization:
        return "the optimization is manual"
    data = getattr(trainer, "datamodule", None)
    if data is None:
        return "the images come without a data module"
    if reason := altered(data, DATA_NAMES):
        return reason
    if own_loader(trainer) is None:
        return "the training images do not come from the data module's own loader"
    if type(trainer.strategy) is not SingleDeviceStrategy:
        return f"{type(trainer.strategy).__name__} may act on each mini-batch"
    plugin = type(trainer.precision_plugin)
    if plugin not in PRECISIONS:
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
    """Returns True if a callback does nothing in its hooks for mini-batches."""
    kind = known_kind(callback)
    return kind is not None and HARMLESS[kind](callback)


def known_kind(callback: Callback) -> type[Callback] | None:
    """Returns the class among ``HARMLESS`` whose hooks for mini-batches a callback has, or None."""
    kind = next(cls for cls in type(callback).__mro__ if not vars(cls).get("steps_known"))
    return kind if kind in HARMLESS else None


def altered(instance: object, allowed: set[str]) -> str | None:
    """Returns which known method a subclass or the instance replaces, for the message, or None.

    A class declares that its steps are known with ``steps_known = True`` in its own body. Classes
    before it in the method resolution order may add names, and override the allowed ones.
    """
    kind = type(instance)
    known = next((cls for cls in kind.__mro__ if vars(cls).get("steps_known")), None)
    if known is None:
        return f"{kind.__name__} is not a class of mnist_lightning"
    for cls in kind.__mro__[: kind.__mro__.index(known)]:
        for name in vars(cls):
            if name not in allowed and hasattr(known, name):
                return f"{cls.__name__} overrides {name}"
    for name in vars(instance):
        if callable(getattr(kind, name, None)):
            return f"{name} of this {kind.__name__} is replaced"
    return None


def own_loader(trainer: Trainer) -> DataLoader | None:
    """Returns the train loader of the epoch if it is the data module's own, else None."""
    loaders = trainer.fit_loop._combined_loader.flattened  # type: ignore[union-attr]
    loader = loaders[0]
    is_own = (
        len(loaders) == 1
        and type(loader) is DataLoader
        and (type(loader.dataset), type(loader.sampler)) == (ImageSet, EpochSampler)
        and type(loader.batch_sampler) is BatchSampler
        and loader.batch_sampler.sampler is loader.sampler
        and not loader.batch_sampler.drop_last
        and loader.num_workers == 0
        and loader.collate_fn is as_is
    )
    return loader if is_own else None


def unfusable(trainer: Trainer) -> str | None:
    """Returns why steps cannot be fused and need autograd; None if they can be fused.

    It assumes that ``obstacle`` returned None.
    """
    module: Any = trainer.lightning_module
    if not module.fusable:
        return "the model class does not set fusable"
    if changed := module.loss_options:
        return f"{changed[0]} changes the loss"
    layers = linear_layers(module.net)
    if layers is None:
        return "the network is not a plain multilayer perceptron"
    parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
    if [id(p) for p in parameters] != [id(p) for p in module.parameters()]:
        return "the model has parameters outside its network"
    if hooked(module):
        return "a hook sees the network's passes or gradients"
    for p in parameters:
        if not p.requires_grad:
            return "some parameters are frozen"
        if (p.dtype, p.device) != (parameters[0].dtype, torch.device("cpu")):
            return "fused steps need the CPU and one data type"
    if type(trainer.precision_plugin) not in (Precision, DoublePrecision):
        return f"precision is {trainer.precision}"
    if torch.is_anomaly_enabled() or torch.is_autocast_enabled("cpu"):
        return "autograd's anomaly detection or autocast is on"
    if trainer.gradient_clip_val:
        return "gradients are clipped"
    if any(config.interval == "step" for config in trainer.lr_scheduler_configs):
        return "the learning rate changes after each step"
    return _no_known_sgd(trainer.optimizers, parameters)


def linear_layers(net: nn.Module) -> list[nn.Linear] | None:
    """Returns the ``nn.Linear`` layers of a plain multilayer perceptron; None for another network.

    Plain means an ``nn.Sequential`` of ``nn.Flatten`` and linear layers with a bias, with ReLU
    between them.
    """
    layers = list(net) if type(net) is nn.Sequential else []
    kinds = [type(layer) for layer in layers]
    if kinds != [nn.Flatten, *([nn.Linear, nn.ReLU] * (len(kinds) // 2 - 1)), nn.Linear]:
        return None
    if (layers[0].start_dim, layers[0].end_dim) != (1, -1):
        return None
    linear = cast(list[nn.Linear], layers[1::2])
    fits = all(below.out_features == above.in_features for below, above in pairwise(linear))
    replaced = any("forward" in vars(layer) for layer in (net, *layers))
    plain = fits and not replaced and all(layer.bias is not None for layer in linear)
    return linear if plain else None


def hooked(module: nn.Module) -> bool:
    """Returns True if a hook or torch.compile needs the module's passes or its gradients."""
    kinds = ("forward_pre", "forward", "backward_pre", "backward")
    return (
        any(getattr(part, f"_{kind}_hooks") for part in module.modules() for kind in kinds)
        or any(getattr(nn.modules.module, f"_global_{kind}_hooks") for kind in kinds)
        or any(part._compiled_call_impl is not None for part in module.modules())
        or any(p._backward_hooks or p._post_accumulate_grad_hooks for p in module.parameters())
    )


def _no_known_sgd(optimizers: list[Any], parameters: list[Tensor]) -> str | None:
    (optimizer,) = optimizers
    if type(optimizer) is not torch.optim.SGD:
        return f"the optimizer is {type(optimizer).__name__}"
    groups = optimizer.param_groups
    if {id(p) for group in groups for p in group["params"]} != {id(p) for p in parameters}:
        return "the optimizer does not have all parameters"
    for name in ("dampening", "maximize", "differentiable"):
        if any(group[name] for group in groups):
            return f"SGD has {name}"
    if not all(isinstance(group["lr"], float | int) for group in groups):
        return "the learning rate is a tensor"
    seen = (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        _global_optimizer_pre_hooks,
        _global_optimizer_post_hooks,
    )
    # a scheduler wraps step to count the calls: that is no replacement
    step = vars(optimizer).get("step")
    replaced = step is not None and not hasattr(step, "_wrapped_by_lr_sched")
    return "a hook sees the optimizer's steps" if any(seen) or replaced else None


class Execution(Callback):
    """Trains many mini-batches in one execution, if the result is the same as Lightning's.

    A ``Classifier`` adds it to the Trainer. It prints how the training takes its steps, at the
    start and when this changes. Small networks train on one thread, which is faster than several
    and leaves the others to other programs; convolutions use all threads, unless a GPU computes
    them. All changes that it makes for a training are undone when the training ends, also after an
    exception.

    Args:
        steps: mini-batches in an execution, one update for each. They are the same mini-batches and
            updates as one by one, without the Trainer's work between them. The default depends on
            the size of the network.
        fused: if True, SGD of a multilayer perceptron may be computed without autograd:
            several times as fast, with other rounding.
        threads: number of CPU threads. The default is as above, or ``OMP_NUM_THREADS`` if it is
            set.

    Raises:
        ValueError: ``steps`` or ``threads`` is below 1. In training: ``steps`` is above 1, and
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
        """Prints the line about how the training takes its steps."""
        self._announced: str | None = None
        self._undo = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._undo.close()
        if trainer.strategy.root_device.type == "cpu":
            self._undo.enter_context(kept_memory())
            self._undo.enter_context(_quick_gpu_check())
        if threads := self.threads or _few_threads(trainer, pl_module):
            self._undo.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(threads)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._announced = None
        loop = trainer.fit_loop.epoch_loop
        if type(loop) is _TrainingEpochLoop:
            # changes the class of the loop that Lightning holds, which keeps its counters
            loop.__class__ = _EpochLoop
            cast(_EpochLoop, loop).execution = self
            self._undo.callback(_EpochLoop.undo, cast(_EpochLoop, loop))

    def choose(self, trainer: Trainer) -> Way:
        """Chooses how the current epoch takes its steps, and prints it if it has changed.

        Raises:
            ValueError: the user set more than one step, which is not possible.
        """
        way = choose(trainer, self.steps, self.fused)
        if self._announced is None and way.steps == 1 and (self.steps or 1) > 1:
            raise ValueError(
                f"{self.steps} steps per execution are not possible: {way.reason}."
                " Leave --execution.steps out, or set it to 1"
            )
        if str(way) != self._announced:
            self._announced = str(way)
            threads = torch.get_num_threads()
            self.say(f"{way}; {threads} thread{'s' if threads > 1 else ''}")
        return way

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # fused steps round differently, and a resumed training must round as before
        checkpoint["execution"] = {"fused": self.fused}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._undo.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._undo.close()


def _few_threads(trainer: Trainer, module: LightningModule) -> int | None:
    """Returns 1 if there is too little work for several threads, unless the user chose.

    That is so if mini-batches are small, or if a GPU does the work. Each of several trainings on a
    GPU would otherwise start a thread for each core, which wait for each other.
    """
    data = getattr(trainer, "datamodule", None)
    if "OMP_NUM_THREADS" in os.environ or not isinstance(data, MNISTDataModule):
        return None
    if trainer.strategy.root_device.type != "cpu":
        return None if altered(data, DATA_NAMES) else 1
    small = not _convolves(module) and _operations(module, data.batch_size) < ONE_THREAD
    return 1 if small else None


@contextmanager
def kept_memory() -> Iterator[None]:
    """Makes glibc keep the memory that this process frees, inside the context.

    By default glibc returns larger buffers to the system when they are freed, and each step of a
    training waits for new pages: 60,000 in a step of ResNet-18 at 224 pixels. With another C
    library nothing changes.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    most_mappings, trim_threshold = -4, -1
    libc.mallopt(most_mappings, 0)  # allocate no buffer with mmap, which free would unmap
    libc.mallopt(trim_threshold, -1)  # never return memory to the system
    try:
        yield
    finally:
        libc.mallopt(most_mappings, 65536)  # glibc's defaults
        libc.mallopt(trim_threshold, 128 * 1024)
        libc.malloc_trim(0)


@contextmanager
def _quick_gpu_check() -> Iterator[None]:
    """Makes PyTorch's check for a GPU quick where there is none.

    Its optimizers check in each step. Lightning makes them ask the driver's library, NVML, which
    does not initialise CUDA, but takes 0.1 ms: as much as the whole update of a small network.
    """
    asked = None if torch.cuda.is_available() else os.environ.pop(_NVML_CHECK, None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ[_NVML_CHECK] = asked


class _EpochLoop(_TrainingEpochLoop):
    """Lightning's epoch loop, which can take many mini-batches at once."""

    execution: Execution
    _way = Way(1, False, None)
    _fused: "FusedSGD | None" = None

    def undo(self) -> None:
        """Turns this loop into Lightning's class again."""
        for name in ("execution", "_way", "_fused"):
            vars(self).pop(name, None)
        self.__class__ = _TrainingEpochLoop  # type: ignore[assignment]

    def reset(self) -> None:
        with warnings.catch_warnings():
            if own_loader(self.trainer) is not None:  # it resumes at the right mini-batch
                warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")
            super().reset()

    def on_run_start(self, data_fetcher: _DataFetcher) -> None:
        if (loader := own_loader(self.trainer)) is not None:
            done = self.batch_progress.current.ready * cast(int, loader.batch_size)
            cast(EpochSampler, loader.sampler).start = done
            resuming = self.trainer.fit_loop.is_resuming and not self.restarting
            if resuming and self.trainer.current_epoch > 0:
                # Starting a pass over the loader draws a random number. Lightning started its pass
                # before SafePoints restored the generators, so start it again, as in an
                # uninterrupted training.
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
        self.val_loop.restarting = False  # as Lightning's advance does
        loader = cast(DataLoader, own_loader(self.trainer))
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
        """Gives ``SafePoints`` the chance to save, between two executions."""
        trainer = self.trainer
        if (
            self._is_training_done  # Lightning saves at the end of the epoch
            or self._should_accumulate()
            or trainer.world_size > 1
            or own_loader(trainer) is None
        ):
            return
        # a training that resumes right after a validation counts that step again
        self._batches_that_stepped -= validated
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SafePoints):
                callback.after_execution(trainer, stopping)
        self._batches_that_stepped += validated

    def _joinable(self, data_fetcher: _DataFetcher) -> int:
        """Returns the number of mini-batches that the next execution may take."""
        if self._way.steps == 1:
            return 1
        if self.restarting and self._should_check_val_fx(data_fetcher):
            return 1  # Lightning must first restore the position of a resumed training
        # a validation within the epoch may have changed something since the epoch began
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
        # Lightning takes the last of them
        return int(min(self._way.steps, *(n - 1 for n in left)))

    def _fetch(self, data_fetcher: _DataFetcher, sampler: BatchSampler, steps: int) -> Any:
        """Fetches consecutive mini-batches as one batch, on the device."""
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
        """Trains each mini-batch as Lightning does, without the hooks between mini-batches."""
        for batch in zip(images, labels, strict=True):
            if batch[0] is not images[0]:  # Lightning does this at the end of each mini-batch
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
        """Makes the same updates and counts as ``_take_each``, without autograd."""
        optimizer = self.trainer.optimizers[0]
        module: Any = self.trainer.lightning_module
        first, *more = optimizer.param_groups
        if more or first["momentum"] or first["weight_decay"]:
            loss, correct = sgd_steps(module.net, optimizer, images, labels, size)
        else:
            loss, correct = fused.steps(images, labels, size, first["lr"])
        module.epoch_metrics.note("train", loss, correct, len(labels))
        steps = -(-len(labels) // size)
        self.batch_progress.increment_by(steps)
        self.automatic_optimization.optim_progress.optimizer.step.increment_by(steps)
        self.automatic_optimization.optim_progress.optimizer.zero_grad.increment_by(steps)
        self._batches_that_stepped += steps - 1  # Lightning adds one after each execution


class FusedSGD:
    """Plain SGD on the cross entropy of one multilayer perceptron, without autograd.

    Args:
        net: a plain multilayer perceptron, see ``linear_layers``.
    """

    def __init__(self, net: nn.Module) -> None:
        self.parameters = list(net.parameters())
        self.population = Population([self.parameters], [1.0])

    @torch.no_grad()
    def steps(
        self, images: Tensor, labels: Tensor, batch_size: int, lr: float
    ) -> tuple[Tensor, Tensor]:
        """Makes one update for each of several consecutive mini-batches.

        Args:
            images: ``(n, ...)``; they are flattened.
            labels: int64, ``(n,)``.
            batch_size: images in a mini-batch.
            lr: learning rate.

        Returns:
            The sum of the cross entropy and the number of correct predictions over all images, each
            computed before the update of its mini-batch.
        """
        # copies the network's parameters in and out, so that other code may read or set them
        self.population.load(0, self.parameters, lr)
        rows = self.population.arrange(images.flatten(1))
        block = batch_size * max(1, BLOCK_ROWS // batch_size)
        scores = [
            self.population.train_block(x, y, batch_size)
            for x, y in zip(rows.split(block), labels.split(block), strict=True)
        ]
        for old, new in zip(self.parameters, self.population.parameters(0), strict=True):
            old.copy_(new)
        loss, correct = (torch.cat(column, 1).sum() for column in zip(*scores, strict=True))
        return loss.clone(), correct.clone()  # clones are not inference tensors


@torch.no_grad()
def sgd_steps(
    net: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Makes updates by SGD with momentum or weight decay, without autograd.

    Each update is that of PyTorch's SGD, operation by operation, with any parameter groups, which a
    ``Population`` does not have. It also changes the optimizer's momentum buffers, so that any
    other code may take the next step.

    Args:
        net: a plain multilayer perceptron, see ``linear_layers``.
        optimizer: SGD of all its parameters, without dampening.
        images: ``(n, ...)``; they are flattened.
        labels: int64, ``(n,)``.
        size: images in a mini-batch.

    Returns:
        As ``FusedSGD.steps``.
    """
    layers = cast(list[nn.Linear], linear_layers(net))
    # without the check of a module's attribute in each step
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    loss, correct = images.new_zeros(()), labels.new_zeros(())
    for x, y in zip(images.flatten(1).split(size), labels.split(size), strict=True):
        outputs = [x]
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            outputs.append(torch.addmm(bias, outputs[-1], weight.T).relu_())
        scores = torch.addmm(biases[-1], outputs[-1], weights[-1].T)
        log_probability = scores.log_softmax(1)
        loss -= log_probability.gather(1, y[:, None]).sum()
        correct += (scores.argmax(1) == y).sum()
        delta = log_probability.exp_()
        delta.scatter_add_(1, y[:, None], delta.new_full((len(y), 1), -1.0))
        delta /= len(y)
        gradients: dict[Tensor, Tensor] = {}
        for i in reversed(range(len(layers))):
            gradients[weights[i]], gradients[biases[i]] = delta.T @ outputs[i], delta.sum(0)
            if i:
                below = torch.ops.aten.threshold_backward
                delta = below(delta @ weights[i], outputs[i], 0)
        for group in optimizer.param_groups:
            _update(group, optimizer.state, [gradients[p] for p in group["params"]])
    return loss, correct


def _update(group: dict[str, Any], state: Any, gradients: list[Tensor]) -> None:
    """One step of PyTorch's SGD for a parameter group; it overwrites the gradients."""
    parameters, momentum = group["params"], group["momentum"]
    if group["weight_decay"]:
        torch._foreach_add_(gradients, parameters, alpha=group["weight_decay"])
    if momentum:
        buffers = [state[p].get("momentum_buffer") for p in parameters]
        if any(buffer is None for buffer in buffers):  # the first step
            for p, buffer, gradient in zip(parameters, buffers, gradients, strict=True):
                if buffer is None:
                    state[p]["momentum_buffer"] = gradient.clone()
                else:
                    buffer.mul_(momentum).add_(gradient)
            buffers = [state[p]["momentum_buffer"] for p in parameters]
        else:
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, gradients)
        if group["nesterov"]:
            torch._foreach_add_(gradients, buffers, alpha=momentum)
        else:
            gradients = buffers
    torch._foreach_add_(parameters, gradients, alpha=-group["lr"])
