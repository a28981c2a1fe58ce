"""ResNet-18 for gray images: from scratch, fine-tuned, or partly frozen."""

from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from torch import nn
from torchvision.models import resnet18

from mnist_lightning.checks import check_choice
from mnist_lightning.models.classifier import Classifier, Spec
from mnist_lightning.models.optimization import OptimizerName, Schedule
from mnist_lightning.models.pretrained import pretrained_tensors
from mnist_lightning.spec import DataSpec
from mnist_lightning.training.freezing import LayerFreezing

Regime = Literal["scratch", "finetune", "freeze"]
Stem = Literal["sum", "reset"]


class ResNet18(Classifier):
    """ResNet-18; for MNIST it has 11,175,370 parameters.

    ``net`` is torchvision's (He et al. 2015, "Deep residual learning for image recognition",
    arXiv:1512.03385), in the memory format channels_last, which is faster for convolutions in bf16.

    A pretrained first convolution, the stem, expects three channels. ``sum`` adds its filters over
    the channels. For a gray image this equals the image repeated three times, also at the border,
    because all three channels are padded equally. It is exact for pixels normalised by one mean and
    one deviation, as the data's normalization ``imagenet`` does: (0.449, 0.226), the means over
    ImageNet's channels. ImageNet's normalisation for each channel would scale such pixels by 0.987,
    1.009 and 1.004, and shift them by -0.16, -0.03 and +0.19.

    Pretrained weights are loaded when a new training starts; a checkpoint does not need them.
    ``load_pretrained`` loads them without a training.

    Args:
        regime: ``scratch`` draws all weights; ``finetune`` starts from pretrained weights and
            trains all of them; ``freeze`` starts from pretrained weights and trains only layer4 and
            fc, with the callback ``LayerFreezing``, whose patterns take precedence.
        weights: ``IMAGENET1K_V1``, from torchvision's cache or download, or a file (.pth,
            .safetensors) with a state dict of ResNet-18, or a checkpoint of a ``ResNet18``; on the
            command line also the folder of its run. Its fc is ignored: it has other classes.
        stem: how to use the pretrained first convolution for gray images: ``sum``, or ``reset`` to
            draw new weights as the study did. With three channels, ``sum`` keeps it as it is.
        small_images: for images of about 32 pixels: the first convolution has filters of 3 x 3
            instead of 7 x 7, and neither it nor a pooling after it shrinks the image, as usual for
            CIFAR-10. Such a network is slower: its layers see 16 times as many positions.
        lr: learning rate; with a schedule, its maximum.
        optimizer: ``sgd``, ``adam`` or ``adamw``.
        schedule: how the learning rate changes at each step: ``constant``, ``cosine``, ``step``, or
            ``one_cycle``, which rises over the first quarter of the steps and falls to zero over
            the rest.
        compile: trains with torch.compile, which takes a minute or more to start. It is meant for a
            GPU; on a CPU it was slower.
        spec: shape and classes of the images; by default MNIST's.
        **options: more options of ``Classifier``, like momentum and label smoothing.
    """

    def __init__(
        self,
        regime: Regime = "scratch",
        weights: str = "IMAGENET1K_V1",
        stem: Stem = "sum",
        small_images: bool = False,
        lr: float = 0.01,
        optimizer: OptimizerName = "adam",
        schedule: Schedule = "constant",
        compile: bool = False,
        spec: Spec = None,
        **options: Any,
    ) -> None:
        spec = DataSpec.of(spec)
        check_choice("regime", regime, Regime)
        check_choice("stem", stem, Stem)
        net = resnet18(num_classes=len(spec.classes))
        side, stride = (3, 1) if small_images else (7, 2)
        net.conv1 = nn.Conv2d(spec.channels, 64, side, stride, padding=side // 2, bias=False)
        if small_images:
            net.maxpool = nn.Identity()
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        super().__init__(net, lr, optimizer, spec, schedule=schedule, **options)
        self.regime, self.weights, self.stem = regime, weights, stem
        self.trained_by_default = ["net.layer4.*", "net.fc.*"] if regime == "freeze" else []
        self._is_new = True
        net.register_load_state_dict_post_hook(self._note_loaded)

    def _note_loaded(self, *_: object) -> None:
        # weights were loaded, from a checkpoint or elsewhere: load_pretrained must keep them
        self._is_new = False

    def load_pretrained(self) -> None:
        """Loads pretrained weights if ``regime`` needs them and no weights were loaded before.

        Raises:
            ValueError: the weights are not available, are not of ResNet-18, or hold code.
        """
        if self.regime == "scratch" or not self._is_new:
            return
        state = self.net.state_dict()
        pretrained = pretrained_tensors(
            self.weights, {name: value.shape for name, value in state.items()}
        )
        stem = pretrained["conv1.weight"].float()
        if self.stem == "reset":
            del pretrained["conv1.weight"]
        elif stem.shape[1] != self.spec.channels:
            if self.spec.channels != 1:
                raise ValueError(
                    f"the first convolution of {self.weights} takes {stem.shape[1]} channels, the"
                    f" images have {self.spec.channels}: --model.stem reset draws a new one"
                )
            pretrained["conv1.weight"] = stem.sum(1, keepdim=True)
        self.net.load_state_dict({**state, **pretrained})

    def configure_callbacks(self) -> list[Callback]:
        # for a Trainer made in Python; the command line adds a LayerFreezing with its flags
        added = super().configure_callbacks()
        present = self.trainer.callbacks  # type: ignore[attr-defined]
        has_one = any(isinstance(c, LayerFreezing) for c in present)
        return [LayerFreezing(), *added] if self.trained_by_default and not has_one else added

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.load_pretrained()
        if self.hparams["compile"]:
            self.net.compile()  # in place, so that the names of the weights do not change

    def configure_optimizers(self) -> Any:
        # SGD too: one pass over the 11 million parameters; the default takes several
        return self._optimization(fused=True)
