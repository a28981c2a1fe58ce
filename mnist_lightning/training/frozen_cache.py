"""Has the output of frozen first layers computed once for all epochs, instead of in each one.

It is used only if the training stays the same: if everything that could see or change the images,
or these layers, is known. With anything else the layers are computed as ever. A whole mini-batch
of the training, and each mini-batch of the validation, then has features in place of images; see
``features``. The last mini-batch of an epoch, which may be smaller, has images: a processor may add
up in another order for another number of images. So in the same precision, on the same number of
threads, all weights and metrics have the same bits as without this.
"""

import copy
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from tqdm import tqdm

from mnist_lightning.console import say
from mnist_lightning.data.module import MNISTDataModule, seed
from mnist_lightning.data.sampling import ImageSet, epoch_order
from mnist_lightning.files import first_line
from mnist_lightning.training.execution import (
    DATA_NAMES,
    MODULE_NAMES,
    PRECISIONS,
    STEP_HOOKS,
    altered,
    hooked,
    known_kind,
    own_loader,
)
from mnist_lightning.training.features import Features, Layout, NoCache, Prefix, Store, find
from mnist_lightning.training.freezing import LayerFreezing

# bytes per second that a slow disk reads
DISK_SPEED = 2e8
# the hooks that receive mini-batches, of callbacks and modules
_VALIDATION_HOOKS = {"on_validation_batch_start", "on_validation_batch_end"}
_BATCH_HOOKS = [*STEP_HOOKS, *sorted(_VALIDATION_HOOKS)]
# the most that rounding may change, relative to the largest value
_ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.005}


class FrozenCache(Callback):
    """Keeps the output of the layers that ``LayerFreezing`` freezes, as far as they come first.

    A ``Classifier`` adds it to the Trainer. It prints what it keeps, or why it keeps nothing. It
    ends when the layers thaw, with the training, after an exception, and as soon as a mini-batch
    finds the network changed. Checkpoints hold the network as without it, and hold no features.
    """

    def __init__(self) -> None:
        self._use: _Use | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()
        present = trainer.callbacks  # type: ignore[attr-defined]
        freezing = next((c for c in present if isinstance(c, LayerFreezing)), None)
        if freezing is None or not freezing.cache or not freezing.frozen:
            return
        try:
            self._use = _start(trainer, pl_module, freezing)
        except NoCache as reason:
            say(f"frozen layers are computed in each epoch: {reason}")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._stop()

    def _check(self) -> None:
        if self._use is not None and self._use.is_over(thorough=True):
            self._use = None

    def _stop(self) -> None:
        if self._use is not None:
            self._use.end()
            self._use = None


def _start(trainer: Trainer, module: LightningModule, freezing: LayerFreezing) -> "_Use | None":
    """Computes the features, and has the training use them; None if it is too short for that.

    Raises:
        NoCache: they cannot be kept, or the training might be another one.
    """
    if reason := _obstacle(trainer):
        raise NoCache(reason)
    net = cast(nn.Module, module.net)
    held = {module.get_submodule(name) for name in freezing.held}
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    prefix = find(net, held, {p for group in groups for p in group["params"]})
    first_pass = _Pass(trainer, prefix)
    if not first_pass.pays(freezing.unfreeze_at_epoch):
        return None
    train_set, val_set = first_pass.train_set, first_pass.val_set
    layout, seconds = first_pass.trial()
    store = Store(first_pass.images, layout, trainer.strategy.root_device)
    if not store.in_memory and store.bytes / DISK_SPEED > seconds * first_pass.images:
        raise NoCache("reading their output from the disk may take longer than computing it")
    others = ((name, list(c.parameters())) for name, c in net.named_children())
    rest = [name for name, weights in others if weights and name not in prefix.names]
    say(
        f"frozen layers up to net.{prefix.names[-1]}: computed once for {first_pass.images:,}"
        f" images, {store}; an epoch then computes only"
        f" {', '.join(f'net.{name}' for name in rest) or 'the loss'}"
    )
    values = first_pass.run(store)
    use = _Use(trainer, prefix, freezing, layout.shape)
    use.give(train_set, Features(values[: len(train_set)], layout), first_pass.size)
    if val_set is not None:
        # any size: the validation has the mini-batches of the first pass
        use.give(val_set, Features(values[len(train_set) :], layout), 1)
    return use


def _obstacle(trainer: Trainer) -> str | None:
    """What might see or change the images, or the network, for the message; None if nothing."""
    module: Any = trainer.lightning_module
    if trainer.world_size > 1:
        return f"the training has {trainer.world_size} processes"
    if reason := altered(module, MODULE_NAMES - {"validation_step"} - _VALIDATION_HOOKS):
        return reason
    if module.tta:
        return "tta shifts the validation images"
    if "mixup" in module.loss_options:
        return "mixup mixes images"
    data: Any = getattr(trainer, "datamodule", None)
    if data is None:
        return "the images come without a data module"
    if reason := altered(data, DATA_NAMES - {"train_dataloader", "val_dataloader"}):
        return reason
    if data.augment:
        return "augmentation changes the images"
    loader, sets = own_loader(trainer), (data.train_set, data.val_set)
    if loader is None or loader.dataset is not data.train_set:
        return "the training images do not come from the data module's own loader"
    if any(
        type(images) is not ImageSet or (len(images) and images[0][0].is_floating_point())
        for images in sets
    ):
        return "the images are not of type uint8"
    if type(trainer.strategy) is not SingleDeviceStrategy:
        return f"{type(trainer.strategy).__name__} may act on each mini-batch"
    if trainer.strategy.root_device.type not in ("cpu", "cuda"):
        return f"the device is {trainer.strategy.root_device}"
    if type(trainer.precision_plugin) not in PRECISIONS:
        return f"{type(trainer.precision_plugin).__name__} may act on each mini-batch"
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        sees = any(is_overridden(hook, callback) for hook in _BATCH_HOOKS)
        if sees and known_kind(callback) is None:
            return f"{type(callback).__name__} sees each mini-batch"
    if "forward" in vars(module.net) or hooked(module):
        return "a hook, or torch.compile, sees the network's passes"
    return None


def _difference(one: Tensor, other: Tensor) -> str | None:
    """How two tensors differ; None if they are equal, but for rounding."""
    if one.equal(other):
        return None
    difference = float((one - other).abs().max() / one.abs().max())
    if difference <= _ROUNDING.get(one.dtype, 0.0):
        return None
    return f"by {difference:.1g} of the largest value"


class _Pass:
    """The first pass over the images.

    Args:
        trainer: in training.
        prefix: what the images pass through.
    """

    def __init__(self, trainer: Trainer, prefix: Prefix) -> None:
        self.trainer, self.prefix = trainer, prefix
        self.data = cast(MNISTDataModule, trainer.datamodule)  # type: ignore[attr-defined]
        self.train_set = self.data.train_set
        validates = trainer.enable_validation and len(self.data.val_set) > 0
        self.val_set = self.data.val_set if validates else None
        self.images = len(self.train_set) + (len(self.val_set) if self.val_set else 0)
        self.size = min(self.data.batch_size, len(self.train_set))
        """Images in a whole mini-batch of the training."""

    def pays(self, unfreeze_at_epoch: int | None) -> bool:
        """Whether the training would otherwise compute the layers for more images."""
        trainer = self.trainer
        last = min(
            n for n in (trainer.max_epochs, unfreeze_at_epoch, sys.maxsize) if n not in (None, -1)
        )
        steps = (last - trainer.current_epoch) * trainer.num_training_batches
        if trainer.max_steps != -1:
            steps = min(steps, trainer.max_steps - trainer.global_step)
        return steps * self.size > self.images

    def pixels(self, images: ImageSet, rows: Tensor) -> Tensor:
        """Some images as the network receives them."""
        device = self.trainer.strategy.root_device
        batch = tuple(part.to(device) for part in images.__getitems__(rows.tolist()))
        with torch.no_grad():
            return self.data.on_after_batch_transfer(batch, 0)[0]

    def features(self, pixels: Tensor) -> Tensor:
        """What the layers make of a mini-batch."""
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            return self.prefix(pixels)

    def run(self, store: Store) -> Tensor:
        """Computes the features of all images, of the training first, or reads them from a file.

        Raises:
            NoCache: the training is asked to stop; the file cannot be written; or the features of
                an image differ in another mini-batch.
        """
        began = time.monotonic()
        if store.in_memory:
            values = store.fill(self._parts(store.layout))
        else:
            key = self._key(store.layout)
            found = store.read(key)
            values = store.write(key, self._parts(store.layout)) if found is None else found
        # the first mini-batch of the training: in the first pass, these images were in others
        rows = epoch_order(len(self.train_set), seed(), self.trainer.current_epoch)[: self.size]
        again = self.features(self.pixels(self.train_set, rows))
        if (difference := _difference(again, Features(values, store.layout)(rows))) is not None:
            raise NoCache(f"their output differs in another mini-batch, {difference}")
        if (seconds := time.monotonic() - began) >= 1:
            say(f"  this took {seconds:,.0f} s")
        return values

    def _parts(self, layout: Layout) -> Iterator[Tensor]:
        """Features of consecutive images, flat."""
        sets = [(self.train_set, self.size, True)]
        if self.val_set is not None:
            sets.append((self.val_set, self.data.eval_batch_size, False))
        quiet = not sys.stderr.isatty()
        with tqdm(desc="frozen layers", total=self.images, leave=False, disable=quiet) as bar:
            for images, size, whole in sets:
                for start in range(0, len(images), size):
                    if self.trainer.received_sigterm:
                        raise NoCache("the training stops")
                    stop = min(start + size, len(images))
                    # a smaller mini-batch might be added up in another order
                    first = stop - size if whole else start
                    features = self.features(self.pixels(images, torch.arange(first, stop)))
                    if not layout.fits(features):
                        raise NoCache("their output lies differently in memory each time")
                    bar.update(stop - start)
                    yield layout.flat(features)[start - first :]

    def trial(self) -> tuple[Layout, float]:
        """Compares what the network makes of a mini-batch of images, and of its features.

        Returns:
            How features lie in memory, and the seconds that those of one image take.

        Raises:
            NoCache: the network's scores differ by more than rounding, in training or in
                validation, or there are none.
        """
        try:
            pixels = self.pixels(self.train_set, torch.arange(self.size))
            self.features(pixels)  # the first time takes longer
            began = time.perf_counter()
            features = self.features(pixels)
            seconds = time.perf_counter() - began
            layout = Layout.of(features)
            features = layout.shaped(layout.flat(features))
            for training in (False, True):
                if difference := _difference(*self._scores(training, pixels, features)):
                    raise NoCache(f"the network's scores differ if it is given it, {difference}")
        except NoCache:
            raise
        except Exception as error:  # a user's network may raise anything
            raise NoCache(f"a trial with their output failed: {first_line(error)}") from error
        if features.shape == pixels.shape:
            raise NoCache("their output has the shape of an image")
        return layout, seconds / self.size

    def _scores(self, training: bool, pixels: Tensor, features: Tensor) -> list[Tensor]:
        """What a copy of the network makes of images and of their features."""
        net = copy.deepcopy(self.prefix.net).train(training)
        prefix = Prefix(net, self.prefix.names)
        for norm in prefix.norms:
            norm.eval()
        scores = []
        for batch, shape in ((pixels, None), (features, tuple(features.shape[1:]))):
            if shape is not None:
                prefix.skip(shape)
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(0)
                with self.trainer.precision_plugin.forward_context():
                    device = self.trainer.strategy.root_device
                    scores.append(net(batch.to(device, copy=True)))
        return scores

    def _key(self, layout: Layout) -> str:
        """A name for the features, computed from all that they depend on."""
        digest = hashlib.sha256(f"1 {layout} {torch.__version__}".encode())
        digest.update(f"{torch.get_num_threads()} {self.trainer.precision}".encode())
        digest.update(f"{torch.backends.cpu.get_cpu_capability()}".encode())
        digest.update(f"{self.trainer.strategy.root_device.type}".encode())
        digest.update(f"{self.size} {self.data.eval_batch_size}".encode())
        digest.update(json.dumps(self.data.spec.plain(), sort_keys=True).encode())
        digest.update(f"{self.prefix.stages}".encode())
        for tensor in self.prefix.tensors():
            content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(content.numpy().data)
        for images in (self.train_set, self.val_set):
            digest.update(b"|")
            if images is not None:
                for rows in torch.arange(len(images)).split(1000):
                    digest.update(images.__getitems__(rows.tolist())[0].numpy().data)
        return digest.hexdigest()[:32]


class _Use:
    """The features in use by a training.

    Args:
        trainer: in training.
        prefix: the layers that are skipped from now on.
        freezing: that keeps them frozen.
        shape: of the features of an image.
    """

    def __init__(
        self, trainer: Trainer, prefix: Prefix, freezing: LayerFreezing, shape: tuple[int, ...]
    ) -> None:
        self.trainer, self.prefix, self.freezing = trainer, prefix, freezing
        self.module = trainer.lightning_module
        self.before = [tensor.clone() for tensor in prefix.tensors()]
        norms = set(map(id, prefix.norms))
        self.norms = {name for name, part in self.module.named_modules() if id(part) in norms}
        self.ended = False
        self.moment: Any = None
        """The epoch and stage of the last mini-batch."""
        self.undo = ExitStack()
        self.undo.callback(prefix.compute)
        prefix.skip(shape)
        self.undo.callback(setattr, freezing, "unused", set())
        freezing.unused = self.norms

    def give(self, images: ImageSet, features: Features, size: int) -> None:
        """Has the mini-batches of a set, of this size and its multiples, have features.

        Args:
            images: the set.
            features: of its images.
            size: images in a mini-batch.
        """

        def select(rows: Tensor) -> Tensor | None:
            if self.module._current_fx_name is not None:
                return None  # a hook asks for images, not the loop of the Trainer
            moment = (self.trainer.current_epoch, self.trainer.state.stage)
            first, self.moment = moment != self.moment, moment
            return None if self.is_over(thorough=first) or len(rows) % size else features(rows)

        self.undo.callback(setattr, images, "features", None)
        images.features = select

    def is_over(self, thorough: bool = False) -> bool:
        """Whether something has changed, so that the features may be wrong; it ends then.

        Args:
            thorough: also compares all weights, and looks at all callbacks.
        """
        if self.ended:
            return True
        thawed = not self.freezing.frozen
        over = (
            thawed
            or not self.prefix.is_in_place()
            or not self.norms <= self.freezing.held
            or hooked(self.module)
            or (thorough and _obstacle(self.trainer) is not None)
            or (thorough and not all(map(torch.equal, self.before, self.prefix.tensors())))
        )
        if over and not thawed:
            say("the network or the callbacks have changed: frozen layers are computed again")
        if over:
            self.end()
        return over

    def end(self) -> None:
        """Has the training compute all layers from here on."""
        self.ended = True
        self.undo.close()
