"""ResNet-18 for gray images: from scratch, fine-tuned, or partly frozen."""

from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torchvision.models import resnet18

from mnist_lightning.checks import check_choice
from mnist_lightning.models.classifier import OPTIMIZERS, Classifier, OptimizerName
from mnist_lightning.models.pretrained import pretrained_tensors
from mnist_lightning.nets import CLASSES
from mnist_lightning.training.freezing import LayerFreezing

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
        check_choice("regime", regime, Regime)
        check_choice("stem", stem, Stem)
        check_choice("schedule", schedule, Schedule)
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
        loaded = pretrained_tensors(
            self.weights, {name: value.shape for name, value in own.items()}
        )
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


def _emulates_bf16() -> bool:
    if not hasattr(torch.cpu, "get_capabilities"):  # PyTorch too old to tell
        return False
    known = torch.cpu.get_capabilities()
    return not any(known.get(name) for name in ("avx512_bf16", "bf16"))  # x86, ARM
