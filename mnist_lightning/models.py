"""The study's architectures: a perceptron, a shallow network, deep networks, ResNet-18.

Each is a LightningModule around a plain ``torch.nn.Module`` (its ``net``), which can be used alone.
Hyper-parameters are plain types, so every checkpoint records them and loads as data, not as code.
"""

import copy
import inspect
import math
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError
from types import FrameType
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.parsing import collect_init_args
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric
from torchvision.models import ResNet18_Weights, resnet18

from mnist_lightning.callbacks import LayerFreezing
from mnist_lightning.console import python
from mnist_lightning.data import answering
from mnist_lightning.execution import Execution, hooked
from mnist_lightning.files import check_archive, is_plain
from mnist_lightning.names import class_path

PIXELS = 28 * 28
CLASSES = 10

Batch = tuple[Tensor, Tensor]
OptimizerName = Literal["sgd", "adam", "adamw"]
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


class Diverged(ValueError):
    """The loss of a training is no longer finite."""


class Classifier(LightningModule):
    """What all classifiers share: one step for train, validation and test, and its metrics.

    Logs ``<stage>/loss`` and ``<stage>/acc`` once an epoch, each the mean over the epoch's images.
    Those of ``train`` are accumulated during training, before each update.

    The arguments of a subclass are its hyper-parameters, without ``save_hyperparameters()``: those
    that are plain values (numbers, texts, lists and mappings of them), and so load as data.

    Args:
        net: maps images ``(b, 1, height, width)`` to class scores ``(b, 10)``.
        lr: learning rate.
        optimizer: ``sgd`` (plain, no momentum), ``adam`` or ``adamw``.

    Raises:
        ValueError: the learning rate is not positive, or the optimizer is unknown.
        Diverged: in training, at the end of an epoch or before a checkpoint is saved: the loss is
            no longer finite.
    """

    steps_known = True  # see execution.altered
    fused = False
    """Whether steps may be fused where ``execution.unfusable`` finds nothing against it."""

    def __init__(self, net: nn.Module, lr: float, optimizer: OptimizerName) -> None:
        super().__init__()
        if not lr > 0:
            raise ValueError(f"lr must be positive, got {lr}")
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
        self.net, self.lr, self.optimizer = net, lr, optimizer
        if type(self) is not Classifier:
            frame = cast(FrameType, cast(FrameType, inspect.currentframe()).f_back)
            arguments: dict[str, Any] = {}
            for of_one in collect_init_args(frame, [], classes=(Classifier,)):
                arguments |= of_one
            other = [name for name, value in arguments.items() if not is_plain(value)]
            self.save_hyperparameters(frame=frame, ignore=other)
        # A loss that is not a number must show in the mean. By default it is left out, and with
        # "disable" torchmetrics 1.9 leaves out the weights.
        self.means = nn.ModuleDict(
            {
                f"{stage}_{name}": MeanMetric(nan_strategy=float("nan"))
                for stage in ("train", "val", "test")
                for name in ("loss", "acc")
            }
        )
        # for each mini-batch: its loss summed over the images, correct answers, images
        self._seen: dict[str, list[tuple[Tensor, Tensor, int]]] = {}

    def forward(self, images: Tensor) -> Tensor:
        """``(b, 1, height, width)`` -> class scores ``(b, 10)``."""
        return self.net(images)

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Mean over the mini-batch, a scalar; cross entropy unless a model says otherwise."""
        return F.cross_entropy(scores, labels)

    def _score(self, stage: str, scores: Tensor, labels: Tensor) -> Tensor:
        loss = self.loss(scores, labels)
        correct = (scores.argmax(1) == labels).sum()
        self.note(stage, loss.detach() * len(labels), correct, len(labels))
        return loss

    def note(self, stage: str, loss: Tensor, correct: Tensor, images: int) -> None:
        """Adds to the figures of an epoch.

        Args:
            stage: ``train``, ``val`` or ``test``.
            loss: summed over the images, a scalar.
            correct: how many answers were right, a scalar.
            images: how many there were.
        """
        # Kept as they are until the epoch's end: a torchmetrics update for each mini-batch takes
        # longer than the training step of a small network.
        self._seen.setdefault(stage, []).append((loss, correct, images))

    def _log_epoch(self, stage: str) -> None:
        if stage not in self._seen:
            return  # resumed at the very end of an epoch: not a mini-batch was left
        seen = self._seen.pop(stage)
        losses, correct, sizes = zip(*seen, strict=True)
        images = sum(sizes)
        for name, parts in (("loss", losses), ("acc", correct)):
            # a metric is the mean over the images of all processes, which may have unequal shares
            mean = cast(MeanMetric, self.means[f"{stage}_{name}"])
            mean.reset()
            mean.update(torch.stack(parts).sum() / images, images)
            self.log(f"{stage}/{name}", mean, prog_bar=(stage, name) == ("val", "acc"))
        if stage == "train":
            loss = cast(MeanMetric, self.means["train_loss"]).compute()
            if not loss.isfinite():
                raise self._diverged(seen)

    def _diverged(self, seen: Sequence[tuple[Tensor, Tensor, int]]) -> Diverged:
        """Says where in the epoch the loss was no longer finite, and what the cause may be."""
        means = [float(loss) / images for loss, _, images in seen]
        first = next((i for i, mean in enumerate(means) if not math.isfinite(mean)), None)
        where, course = "", ""
        if first is not None:  # of several processes, it may be another's
            data = getattr(self.trainer, "datamodule", None)
            size = getattr(data, "batch_size", seen[0][2])
            before = sum(images for _, _, images in seen[:first])
            start, end = before // size + 1, -(-(before + seen[first][2]) // size)
            where = f", mini-batch {start:,}" + (f" to {end:,}" if end > start else "")
            if first:
                course = (
                    f" It was {means[0]:.4g} at the epoch's start and {means[first - 1]:.4g} last."
                )
        if str(self.trainer.precision).startswith("16"):
            cause = "float16 ends at 65,504: --trainer.precision bf16-mixed may help"
        else:
            cause = f"A lower lr may help (now {self.lr})"
        return Diverged(
            f"the training diverged in epoch {self.current_epoch + 1}{where}: its loss is no longer"
            f" finite.{course} {cause}"
        )

    def configure_callbacks(self) -> list[Callback]:
        """The callbacks that this model brings along, where the Trainer has none of their kind."""
        present = self.trainer.callbacks  # type: ignore[attr-defined]
        return [] if any(isinstance(c, Execution) for c in present) else [Execution()]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        return self._score("train", self(images), labels)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._score("val", self(batch[0]), batch[1])

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Class probabilities, ``(b, 10)``, for callbacks that look at single images."""
        scores = self(batch[0])
        self._score("test", scores, batch[1])
        return scores.softmax(1)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Class probabilities, ``(b, 10)``."""
        return self(batch[0]).softmax(1)

    def on_train_epoch_start(self) -> None:
        self._seen.pop("train", None)  # of an epoch that was cut off

    def on_validation_epoch_start(self) -> None:
        self._seen.pop("val", None)

    def on_test_epoch_start(self) -> None:
        self._seen.pop("test", None)

    def on_train_epoch_end(self) -> None:
        self._log_epoch("train")

    def on_validation_epoch_end(self) -> None:
        self._log_epoch("val")

    def on_test_epoch_end(self) -> None:
        self._log_epoch("test")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.optimizer](self.parameters(), lr=self.lr)  # type: ignore[call-arg]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # so that a checkpoint alone is enough to test it, whoever trained it
        checkpoint["model_class"] = class_path(type(self))
        seen = self._seen.get("train")
        if seen and self._trainer is not None and self.trainer.world_size == 1:
            losses, correct, sizes = zip(*seen, strict=True)
            if not torch.stack(losses).isfinite().all():
                raise self._diverged(seen)  # rather than save it over the last good one
            checkpoint["seen"] = [torch.stack(losses), torch.stack(correct), list(sizes)]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A resumed training takes the learning rate of this model, not the one it was saved with.

        Lightning restores the optimizer's and the schedulers' state after this hook, and their
        learning rates with it: those that are multiples of the saved one are scaled.
        """
        _count_manual_steps(checkpoint)
        if seen := checkpoint.get("seen"):  # of the epoch that it lies in
            losses, correct = (part.to(self.device).unbind() for part in seen[:2])
            self._seen["train"] = list(zip(losses, correct, seen[2], strict=True))
        if self._trainer is not None and self.trainer.precision == "64-true":
            self.double()  # Lightning would first load the weights into float32, which rounds them
        saved = checkpoint.get("hyper_parameters", {}).get("lr", self.lr)
        if saved != self.lr:
            for state in checkpoint.get("optimizer_states", []):
                for group in state["param_groups"]:
                    _scale_rates(group, saved, self.lr)
            for state in checkpoint.get("lr_schedulers", []):
                _scale_rates(state, saved, self.lr)


def _count_manual_steps(checkpoint: dict[str, Any]) -> None:
    """Of an older checkpoint, whose optimizer steps may be in Lightning's other counter."""
    loops = checkpoint.get("loops", {}).get("fit_loop", {})
    manual = loops.get("epoch_loop.manual_optimization.optim_step_progress")
    automatic = loops.get("epoch_loop.automatic_optimization.optim_progress")
    if manual and automatic:
        step = automatic["optimizer"]["step"]
        if manual["total"]["completed"] > step["total"]["completed"]:
            step.update(copy.deepcopy(manual))


def _scale_rates(state: dict[str, Any], old: float, new: float) -> None:
    """Scales the learning rates in the state of a parameter group or of a scheduler."""

    def scaled(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(scaled(one) for one in value)
        return new * (value / old)  # exactly new, where it was old

    for name, value in state.items():
        if name in ("lr", "initial_lr", "max_lr", "min_lr", "base_lrs", "max_lrs", "_last_lr"):
            state[name] = scaled(value)
        elif name == "_schedulers":  # of a scheduler made of others
            for inner in value:
                _scale_rates(inner, old, new)


class AffineMap(nn.Module):
    """The perceptron's scores y = x w + b, with w ``(784, 10)`` and b ``(1, 10)``."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(PIXELS, CLASSES).uniform_(-0.001, 0.001))
        self.b = nn.Parameter(torch.empty(1, CLASSES).uniform_(-0.001, 0.001))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.w + self.b


class Perceptron(Classifier):
    """784 -> 10 with the delta rule, written out: the weights' gradients need no autograd.

    With one-hot labels t and scores y = x w + b, a mini-batch moves w by ``lr * x^T (t - y)`` and b
    by the sum of ``lr * (t - y)`` over the images: the descent of half the squared error, summed
    over the mini-batch (Widrow and Hoff 1960, "Adaptive switching circuits").

    Args:
        lr: learning rate, for the sum over the mini-batch (not the mean).
        optimizer: ``sgd`` is the delta rule itself; the others receive the same gradient.
    """

    steps_known = True

    def __init__(self, lr: float = 0.0001, optimizer: OptimizerName = "sgd") -> None:
        super().__init__(AffineMap(), lr, optimizer)
        self._moves: tuple[Tensor, Tensor, Tensor] | None = None

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Half the squared error against one-hot labels, mean over the mini-batch."""
        return (F.one_hot(labels, CLASSES) - scores).square().sum(1).mean() / 2

    @torch.no_grad()
    def delta_rule(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """One mini-batch through the rule.

        Returns:
            Every tensor of the step under the study's names; ``dw`` and ``db`` are what w and b
            move by at a learning rate of 1.
        """
        net = cast(AffineMap, self.net)
        x = images.flatten(1)
        t = F.one_hot(labels, CLASSES).to(x.dtype)
        y = x @ net.w + net.b
        grad = t - y
        dw, db = x.T @ grad, grad.sum(0, keepdim=True)
        return {"x": x, "t": t, "y": y, "grad": grad, "w": net.w, "b": net.b, "dw": dw, "db": db}

    def on_train_start(self) -> None:
        if isinstance(self.trainer.model, DistributedDataParallel):
            # it would wait for gradients of autograd; backward exchanges those of the rule
            self.trainer.model.require_backward_grad_sync = False

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Half the squared error, summed over the mini-batch."""
        images, labels = batch
        if not self._follows_rule():
            return super().training_step(batch, batch_idx) * len(labels)
        tensors = self.delta_rule(images, labels)
        loss = self._score("train", tensors["y"], labels) * len(labels)
        self._moves = loss.requires_grad_(), tensors["dw"], tensors["db"]
        return loss

    def _follows_rule(self) -> bool:
        """Whether the rule is the gradient of this model's loss: a subclass may have another."""
        methods = (getattr(self, name).__func__ for name in ("forward", "loss"))
        return (
            tuple(methods) == (Classifier.forward, Perceptron.loss)
            and type(self.net) is AffineMap
            and not hooked(self)
        )

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        super().backward(loss, *args, **kwargs)
        if self._moves is None:
            return
        # autograd stopped at the loss of training_step, and left the factor that the Trainer set
        own, *moves = self._moves
        self._moves = None
        for parameter, move in zip(self.net.parameters(), moves, strict=True):
            if parameter.requires_grad:
                # over several processes, the sum over all their mini-batches
                total = self.trainer.strategy.reduce(move, reduce_op="sum")
                gradient = -total * cast(Tensor, own.grad)
                old = parameter.grad
                parameter.grad = gradient if old is None else old + gradient


def mlp(hidden_units: Sequence[int]) -> nn.Sequential:
    """A plain multilayer perceptron: 784 -> hidden units, each layer with ReLU -> 10 scores.

    Raises:
        ValueError: a layer without units.
    """
    if any(units < 1 for units in hidden_units):
        raise ValueError(f"hidden_units must all be at least 1, got {list(hidden_units)}")
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for index, (inputs, outputs) in enumerate(pairwise([PIXELS, *hidden_units]), start=1):
        layers[f"hidden{index}"] = nn.Linear(inputs, outputs)
        layers[f"relu{index}"] = nn.ReLU()
    layers["output"] = nn.Linear([PIXELS, *hidden_units][-1], CLASSES)
    return nn.Sequential(layers)


class ShallowNetwork(Classifier):
    """784 -> hidden -> 10, ReLU, cross entropy.

    Args:
        hidden_units: size of the hidden layer.
        lr: learning rate.
        optimizer: ``sgd`` (plain), ``adam`` or ``adamw``.
        fused: plain SGD with forward, backward and update written out, where nothing forbids it;
            rounds otherwise, and is several times as fast. Without it, autograd.
    """

    def __init__(
        self,
        hidden_units: int = 100,
        lr: float = 0.1,
        optimizer: OptimizerName = "sgd",
        fused: bool = True,
    ) -> None:
        super().__init__(mlp([hidden_units]), lr, optimizer)
        self.fused = fused


class DeepNetwork(Classifier):
    """784 -> two or more hidden layers -> 10, ReLU, cross entropy.

    Args:
        hidden_units: sizes of the hidden layers, from the input's side to the output's.
        lr: learning rate.
        optimizer: ``sgd`` (plain), ``adam`` or ``adamw``.
        fused: as for ``ShallowNetwork``.
    """

    def __init__(
        self,
        hidden_units: list[int],
        lr: float = 0.01,
        optimizer: OptimizerName = "sgd",
        fused: bool = True,
    ) -> None:
        if len(hidden_units) < 2:
            raise ValueError(
                f"hidden_units of a DeepNetwork must be two sizes or more, got {hidden_units}."
                " For one hidden layer there is ShallowNetwork."
            )
        super().__init__(mlp(hidden_units), lr, optimizer)
        self.fused = fused


Regime = Literal["scratch", "finetune", "freeze"]
Stem = Literal["sum", "reset"]
Schedule = Literal["constant", "one_cycle"]


class ResNet18(Classifier):
    """ResNet-18 for one channel and ten classes: 11,175,370 parameters.

    ``net`` is torchvision's (He et al. 2015, "Deep residual learning for image recognition",
    arXiv:1512.03385), in the memory format channels_last, which convolutions in bf16 prefer.

    A pretrained stem expects three channels. ``sum`` adds up its filters, which for a gray image is
    the same as the image three times, also at the border, since all three channels are then padded
    alike. That holds exactly for pixels normalised by one mean and deviation, as the data's
    normalization ``imagenet`` does: (0.449, 0.226), the means over ImageNet's channels. Its own
    normalisation, one for each channel, would scale such pixels by 0.987, 1.009 and 1.004, and
    shift them by -0.16, -0.03 and +0.19.

    Pretrained weights are loaded when a training starts from nothing; whoever has a checkpoint does
    not need them. Alone, ``load_pretrained`` does it.

    Args:
        regime: ``scratch`` draws all weights; ``finetune`` starts from pretrained ones and trains
            them all; ``freeze`` starts from pretrained ones and trains layer4 and fc alone (which
            the callback ``LayerFreezing`` sees to, and its own patterns take precedence).
        weights: ``IMAGENET1K_V1``, from torchvision's cache or its address, or a file (.pth,
            .safetensors) with a state dict of ResNet-18. Its fc is not used: other classes.
        stem: what becomes of the pretrained first convolution: ``sum``, or ``reset`` to draw it
            anew as the study did.
        lr: learning rate; under a schedule, its peak.
        optimizer: ``sgd`` (plain), ``adam`` or ``adamw``.
        schedule: of the learning rate: ``constant``, or ``one_cycle``, which rises over the first
            quarter of the steps and falls to zero over the rest.
        compile: trains through torch.compile, which takes a minute or more to start and is meant
            for a GPU: on a CPU it was slower.
    """

    def __init__(
        self,
        regime: Regime = "scratch",
        weights: str = "IMAGENET1K_V1",
        stem: Stem = "sum",
        lr: float = 0.01,
        optimizer: OptimizerName = "adam",
        schedule: Schedule = "constant",
        compile: bool = False,
    ) -> None:
        for name, value, allowed in (
            ("regime", regime, Regime),
            ("stem", stem, Stem),
            ("schedule", schedule, Schedule),
        ):
            choices = allowed.__args__  # type: ignore[attr-defined]
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        net = resnet18(num_classes=CLASSES)
        net.conv1 = nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        super().__init__(net.to(memory_format=torch.channels_last), lr, optimizer)  # type: ignore[call-overload]
        self.regime, self.weights, self.stem, self.schedule = regime, weights, stem, schedule
        self.trained_by_default = ["net.layer4.*", "net.fc.*"] if regime == "freeze" else []
        self._drawn = True
        net.register_load_state_dict_post_hook(self._loaded)

    def _loaded(self, *_: object) -> None:
        # from a checkpoint, a file, another model: what was loaded is not to be overwritten
        self._drawn = False

    def load_pretrained(self) -> None:
        """Loads what ``regime`` asks for, unless the network has had weights loaded already.

        Raises:
            ValueError: the weights cannot be had, are no state dict of ResNet-18, or hold code.
        """
        if self.regime == "scratch" or not self._drawn:
            return
        own = self.net.state_dict()
        loaded = _state_dict(self.weights, {name: value.shape for name, value in own.items()})
        if self.stem == "sum":
            loaded["conv1.weight"] = loaded["conv1.weight"].float().sum(1, keepdim=True)
        else:
            del loaded["conv1.weight"]
        self.net.load_state_dict({**own, **loaded})

    def configure_callbacks(self) -> list[Callback]:
        # for a Trainer made in Python; the command line's has one, with what its flags say
        brought = super().configure_callbacks()
        present = self.trainer.callbacks  # type: ignore[attr-defined]
        has_one = any(isinstance(c, LayerFreezing) for c in present)
        return [*brought, LayerFreezing()] if self.trained_by_default and not has_one else brought

    def on_fit_start(self) -> None:
        self.load_pretrained()
        if self.hparams["compile"]:
            self.net.compile()  # in place: the names of the weights stay
        bf16 = "bf16" in str(self.trainer.precision)
        if bf16 and self.device.type == "cpu" and _emulates_bf16():
            rank_zero_warn(
                "this processor computes bf16 slowly; --trainer.precision 32-true is faster here"
            )

    def configure_optimizers(self) -> Any:
        # one pass over the 11 million parameters, where the default takes several
        optimizer = OPTIMIZERS[self.optimizer](self.parameters(), lr=self.lr, fused=True)  # type: ignore[call-arg]
        if self.schedule == "constant":
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError("schedule one_cycle needs an end: set max_epochs, or max_steps")
        scheduler = LambdaLR(optimizer, lambda step: one_cycle(step, int(steps)))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def one_cycle(step: int, steps: int) -> float:
    """Share of the peak learning rate at ``step`` of ``steps``: straight up, then straight to zero.

    After Smith and Topin 2017, "Super-convergence" (arXiv:1708.07120), without its last stretch.
    """
    rise = max(1, steps // 4)
    return max(0.0, min((step + 1) / rise, (steps - step) / max(1, steps - rise + 1)))


def _state_dict(weights: str, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The pretrained tensors without those of fc, checked against the shapes of our own."""
    known = weights in ResNet18_Weights.__members__
    path = _cached(ResNet18_Weights[weights]) if known else Path(weights)
    tensors = _read_tensors(path)
    tensors = {name: value for name, value in tensors.items() if not name.startswith("fc.")}
    needed = {name for name in shapes if not name.startswith("fc.")}
    # counters that files older than PyTorch 0.4.1 do not have
    counters = {name for name in needed if name.endswith(".num_batches_tracked")}

    def fits(name: str) -> bool:
        # an image's channels are the stem's own affair
        ours, theirs = list(shapes[name]), list(tensors[name].shape)
        if name == "conv1.weight" and theirs[1:2] in ([1], [3]):
            ours[1] = theirs[1]
        return ours == theirs

    faults = {
        "missing": needed - counters - tensors.keys(),
        "left over": tensors.keys() - needed,
        "of another shape": {name for name in needed & tensors.keys() if not fits(name)},
    }
    if any(faults.values()):
        named = (f"{what}: {_some(names)}" for what, names in faults.items() if names)
        raise ValueError(f"{path} holds no weights of ResNet-18; {'; '.join(named)}")
    return tensors


def _some(names: Collection[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(sorted(names)[:most]) + more


def _cached(weights: ResNet18_Weights) -> Path:
    """The file in torchvision's cache, fetched if it is not there."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    file = folder / Path(weights.url).name
    if not file.is_file():
        try:
            with answering([weights.url], ""):
                weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
        except (OSError, RuntimeError) as error:  # RuntimeError: a damaged download
            raise ValueError(
                f"{file.name} is not in {folder}, and could not be fetched: {error}."
                " Put it there, or name another file: --model.weights FILE"
            ) from error
    return file


def check_tensors(tensors: Mapping[str, Any], name: str, remedy: str) -> None:
    """Refuses what cannot be the weights of a network.

    Args:
        tensors: by name.
        name: of what holds them, for the message.
        remedy: what the user can do, for the message.

    Raises:
        ValueError: one is no dense tensor of real numbers, is not a number somewhere, or is larger
            than the memory that the file gave it.
    """
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{name} holds no tensors by name. {remedy}")
        kind = tensor.dtype
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            fault = "no dense tensor"
        elif tensor.numel() * kind.itemsize > tensor.untyped_storage().nbytes():
            fault = f"larger than its data: {tuple(tensor.shape)}"
        elif not (kind.is_floating_point or kind == torch.int64):
            fault = f"of the type {kind}, no weights"
        elif kind.is_floating_point and tensor.isnan().any():
            fault = "not a number (NaN): the training that wrote it diverged"
        else:
            continue
        raise ValueError(f"{name} is refused: its {key} is {fault}. {remedy}")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """A file of tensors by name; nothing that it holds is executed."""
    names = ", ".join(known.name for known in ResNet18_Weights)
    if not path.is_file():  # also a pipe, which might never end
        raise ValueError(f"weights must be {names} or a file; there is no file {path}")
    remedy = f"Give other weights: --model.weights FILE, or {names}."
    if zipfile.is_zipfile(path):
        check_archive(path, remedy)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        needed = python("-m", "pip", "install", "safetensors")
        raise ValueError(f"{path} needs a package: {needed}") from error
    except UnpicklingError as error:
        if "nsupported" not in str(error):  # neither an unsupported global, nor operand
            raise ValueError(f"{path} is damaged, or no file of weights") from error
        raise ValueError(f"{path} holds code besides tensors: refused, nothing was run") from error
    except Exception as error:  # whatever a truncated file leads torch or safetensors to
        raise ValueError(f"{path} is damaged, or no file of weights") from error
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path} is not a state dict: it does not hold tensors by name")
    check_tensors(content, f"{path}", remedy)
    return dict(content)


def _emulates_bf16() -> bool:
    if not hasattr(torch.cpu, "get_capabilities"):  # PyTorch too old to tell
        return False
    known = torch.cpu.get_capabilities()
    return not any(known.get(name) for name in ("avx512_bf16", "bf16"))  # x86, ARM
