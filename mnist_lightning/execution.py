"""How a training steps: a mini-batch at a time or many, through autograd or fused.

Small networks spend their time in the framework. One ``training_step`` on k mini-batches, which
makes k updates, divides the Trainer's share by k (Keras calls k ``steps_per_execution``). And where
the network is a multilayer perceptron under plain SGD, the updates themselves are fused: see
``stacked``, here with a stack of one.
"""

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, WeightAveraging
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from mnist_lightning.data import MNISTDataModule
from mnist_lightning.stacked import BLOCK_ROWS, Population

# A training_step on fewer operations than these is worth joining with others: about 0.1 s of
# arithmetic, next to the half millisecond that the Trainer takes.
OPERATIONS = 1e10
MOST_STEPS = 256


def obstacle(trainer: Trainer) -> str | None:
    """Why one mini-batch at a time is the only way here, or nothing."""
    if trainer.world_size > 1:
        return f"{trainer.world_size} processes, which exchange gradients after each mini-batch"
    if trainer.accumulate_grad_batches != 1:
        return "accumulate_grad_batches"
    if trainer.fast_dev_run or trainer.overfit_batches:  # type: ignore[attr-defined]
        return "fast_dev_run or overfit_batches, which count mini-batches"
    if trainer.limit_train_batches not in (None, 1.0):
        return "limit_train_batches, which counts mini-batches"
    if trainer.max_steps != -1:
        return "max_steps, which may end between them"
    if trainer.val_check_interval not in (None, 1.0):
        return "val_check_interval, which counts mini-batches"
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (WeightAveraging, LearningRateFinder, BatchSizeFinder)):
            return f"{type(callback).__name__}, which acts after each mini-batch"
    if any(getattr(c, "_every_n_train_steps", 0) for c in trainer.checkpoint_callbacks):
        return "a ModelCheckpoint every n training steps"
    return None


def choose_steps(trainer: Trainer, module: LightningModule, data: MNISTDataModule) -> int:
    """The steps per execution: those asked for, or enough to make the Trainer's share small.

    Raises:
        ValueError: more than one was asked for, and something does not allow it.
    """
    asked, reason = data.steps_per_execution, obstacle(trainer)
    if asked is not None:
        if asked > 1 and reason:
            raise ValueError(f"steps_per_execution {asked} does not go with {reason}; set it to 1")
        return asked
    if reason or any(isinstance(layer, nn.Conv2d) for layer in module.modules()):
        return 1  # a convolution works on its weights many times over: the step is long enough
    weights = sum(p.numel() for p in module.parameters())
    # forward, and backward to the weights and to the layer below, a product and a sum each
    return max(1, min(MOST_STEPS, round(OPERATIONS / (6 * weights * data.batch_size))))


def can_fuse(trainer: Trainer, module: LightningModule) -> bool:
    """Whether nothing wants to see the gradients, change them, or compute in another precision."""
    hooks = (
        "on_before_zero_grad",
        "on_before_backward",
        "on_after_backward",
        "on_before_optimizer_step",
    )
    return (
        obstacle(trainer) is None
        and trainer.strategy.root_device.type == "cpu"
        and trainer.precision in ("32-true", "64-true")
        and not trainer.gradient_clip_val
        and all(parameter.requires_grad for parameter in module.parameters())
        and not any(is_overridden(hook, seer) for hook in hooks for seer in trainer.callbacks)  # type: ignore[attr-defined]
    )


class FusedSGD:
    """Plain SGD on the cross entropy of one multilayer perceptron, written out.

    Args:
        net: ``nn.Linear`` layers with ReLU between them.
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
