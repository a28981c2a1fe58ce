"""Where a convolutional network looks: Grad-CAM, by captum (the extra ``explain``).

Selvaraju et al. 2017, "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
Localization", arXiv:1610.02391.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mnist_lightning.data.module import MNISTDataModule
from mnist_lightning.data.preparation import prepare
from mnist_lightning.insight import drawing
from mnist_lightning.models.classifier import Classifier

_LEAST_SIDE = 4  # positions a side of a heat map that shows anything


def stage_to_explain(net: nn.Module, image: Tensor) -> nn.Module | None:
    """The last part of a convolutional network that still has a map of the image.

    Args:
        net: its direct children are its parts, from input to output.
        image: ``(1, channels, height, width)``.

    Returns:
        None for a network without convolutions, or with smaller maps than 4 x 4.
    """
    fitting: list[nn.Module] = []

    def note(part: nn.Module, _: object, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and min(output.shape[2:]) >= _LEAST_SIDE:
            fitting.append(part)

    convolves = any(isinstance(module, nn.Conv2d) for module in net.modules())
    hooks = [part.register_forward_hook(note) for part in net.children() if convolves]
    was_training = net.training
    try:
        net.eval()
        with torch.inference_mode():
            net(image)
    finally:
        net.train(was_training)
        for hook in hooks:
            hook.remove()
    return fitting[-1] if fitting else None


def heat_maps(net: nn.Module, stage: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """How much each place of an image speaks for a class.

    Args:
        net: in evaluation mode.
        stage: a part of it, as ``stage_to_explain``.
        images: as the network receives them, ``(n, channels, height, width)``.
        classes: one for each image, ``(n,)``.

    Returns:
        From 0 to 1, ``(n, height, width)``. All 0 where nothing speaks for the class.

    Raises:
        ModuleNotFoundError: captum is not installed.
    """
    from captum.attr import LayerAttribution, LayerGradCam

    # a network whose weights are frozen has gradients from its input only
    images = images.detach().clone().requires_grad_()
    heat = LayerGradCam(net, stage).attribute(images, target=classes, relu_attributions=True)
    heat = LayerAttribution.interpolate(heat, tuple(images.shape[2:]), "bilinear")[:, 0].detach()
    return heat / heat.amax((1, 2), keepdim=True).clamp(min=1e-12)


def draw(model: Classifier, data: MNISTDataModule, count: int = 8) -> Image.Image | None:
    """Draws validation images, and below each one where the network looks for its answer.

    Args:
        model: trained.
        data: after ``setup``.
        count: number of images.

    Returns:
        None for a network without convolutions.
    """
    rows = torch.randperm(len(data.val_set), generator=torch.Generator().manual_seed(0))[:count]
    raw, labels = data.val_set.__getitems__(rows.tolist())[:2]
    images = data.preprocess(raw.to(model.device)).to(next(model.parameters()).dtype)
    if (stage := stage_to_explain(model.net, images[:1])) is None:
        return None
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            answers = model.net(images).argmax(1)
        heat = heat_maps(model.net, stage, images, answers).float().cpu().numpy()
    finally:
        model.train(was_training)
    pixels = prepare(raw, data.spec.unnormalised()).clamp(0, 1)
    pixels = pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    plain = (pixels * 255).round().to(torch.uint8).numpy()
    classes, right = data.spec.classes, (answers.cpu() == labels).tolist()
    captions = [
        f"{classes[label]} as {classes[found]}"
        for label, found in zip(labels.tolist(), answers.tolist(), strict=True)
    ]
    colors = [drawing.INK if fine else drawing.RED for fine in right]
    return drawing.tiles(
        np.concatenate([plain, drawing.overlay(plain, heat)]),
        [*captions, *captions],
        "Where the network looks (Grad-CAM)",
        "truth as answer; red: what speaks for the answer",
        columns=len(plain),
        colors=[*colors, *colors],
    )
