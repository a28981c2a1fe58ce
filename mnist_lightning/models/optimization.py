"""Optimizers and learning rate schedules by name, and what else changes a step of a training."""

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

OptimizerName = Literal["sgd", "adam", "adamw"]
Schedule = Literal["constant", "cosine", "one_cycle", "step"]
ClassWeights = Literal["none", "auto"]

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


def make_optimizer(
    module: nn.Module,
    name: OptimizerName,
    lr: float,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float | None = None,
    **more: Any,
) -> torch.optim.Optimizer:
    """Makes the optimizer of all parameters of a module.

    Adam and AdamW are PyTorch's fused ones where it has them: one pass over the parameters, where
    the default takes several. Gradients are clipped and unscaled as with any other optimizer.

    Args:
        module: its parameters are trained.
        name: of the optimizer.
        lr: learning rate.
        momentum: of ``sgd``.
        nesterov: of ``sgd``.
        weight_decay: if it is positive, it is applied to a first group of parameters; biases and
            the parameters of normalisation layers are a second group, without it. None is the
            default of PyTorch's optimizer.
        **more: other arguments of PyTorch's optimizer.
    """
    settings = {"lr": lr, **more}
    if name != "sgd" and _can_fuse(module):
        settings["fused"] = True
    if momentum:
        settings |= {"momentum": momentum, "nesterov": nesterov}
    if weight_decay is not None:
        settings["weight_decay"] = weight_decay
    groups: Any = module.parameters()
    if weight_decay:
        kept: list[nn.Parameter] = []
        decayed: list[nn.Parameter] = []
        for path, parameter in module.named_parameters():
            # the perceptron's biases, ``b``, are a row
            is_bias = parameter.ndim < 2 or path.rpartition(".")[2] == "b"
            (kept if is_bias else decayed).append(parameter)
        groups = [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
    optimizer = OPTIMIZERS[name](groups, **settings)
    # A fused optimizer offers to unscale gradients within its step, and Lightning then refuses to
    # clip them in mixed precision. Without the offer they are unscaled before, for any optimizer.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return optimizer


def _can_fuse(module: nn.Module) -> bool:
    return all(
        parameter.is_floating_point() and parameter.device.type in ("cpu", "cuda", "mps")
        for parameter in module.parameters()
    )


def make_schedule(
    module: LightningModule,
    optimizer: torch.optim.Optimizer,
    name: Schedule,
    warmup_epochs: float = 0.0,
) -> Any:
    """Makes what ``configure_optimizers`` returns: the optimizer, and its schedule by step.

    Args:
        module: attached to a Trainer, which knows the number of steps.
        optimizer: its learning rates are the maximum of the schedule.
        name: of the schedule.
        warmup_epochs: epochs in which the learning rate rises to its maximum.

    Raises:
        ValueError: the schedule needs the end of the training or of an epoch, and there is none.
    """
    if name == "constant" and not warmup_epochs:
        return optimizer
    trainer = module.trainer
    steps, warmup = trainer.estimated_stepping_batches, 0
    if steps == math.inf and name != "constant":
        raise ValueError(f"schedule {name} needs a last step: set max_epochs or max_steps")
    if warmup_epochs:
        trainer.fit_loop.setup_data()
        in_epoch = trainer.num_training_batches
        if in_epoch == math.inf:
            raise ValueError("warmup_epochs needs a number of mini-batches in each epoch")
        warmup = round(warmup_epochs * math.ceil(in_epoch / trainer.accumulate_grad_batches))
    factor = schedule_factor(name, steps, warmup)
    scheduler = LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def schedule_factor(name: Schedule, steps: float, warmup: int = 0) -> Callable[[int], float]:
    """Returns the function from the number of steps taken to the factor of the learning rate.

    Args:
        name: of the schedule.
        steps: of the whole training, a whole number, or infinite if the schedule is constant.
        warmup: first steps, over which the factor rises linearly to 1.
    """

    def factor(step: int) -> float:
        if name == "one_cycle":
            return one_cycle(step, int(steps))
        if step < warmup:
            return (step + 1) / warmup
        if name == "cosine":
            done = (step - warmup) / max(1, steps - warmup)
            return (1 + math.cos(math.pi * min(1.0, done))) / 2
        if name == "step":
            return 1.0 if 2 * step < steps else 0.1 if 4 * step < 3 * steps else 0.01
        return 1.0

    return factor


def one_cycle(step: int, steps: int) -> float:
    """Factor of the maximum learning rate at ``step`` of ``steps``: linear rise, then linear fall.

    After Smith and Topin 2017, "Super-convergence" (arXiv:1708.07120), without its final phase.
    """
    rise = max(1, steps // 4)
    return max(0.0, min((step + 1) / rise, (steps - step) / max(1, steps - rise + 1)))


def draw_mixup(alpha: float, images: int, *place: int) -> tuple[float, Tensor]:
    """Draws how a mini-batch is mixed: the share of each image itself, and its partners.

    The draw depends on the arguments alone, so a resumed training draws the same.

    Args:
        alpha: of the distribution Beta(alpha, alpha) of the share.
        images: in the mini-batch.
        *place: of the mini-batch in the training: whole numbers, 0 or more.

    Returns:
        The share, from 0 to 1, and the position of each image's partner, int64 ``(images,)``.
    """
    generator = np.random.default_rng(place)
    share = float(generator.beta(alpha, alpha))
    return share, torch.from_numpy(generator.permutation(images))


def inverse_frequencies(labels: Tensor, classes: int) -> Tensor:
    """Returns a weight for each class, inverse to its number of images; their mean is 1.

    A class without images has the weight 0, and the mean is over the others.
    """
    counts = torch.bincount(labels, minlength=classes)
    weights = torch.where(counts > 0, 1.0 / counts, 0.0)
    return weights * ((counts > 0).sum() / weights.sum())
