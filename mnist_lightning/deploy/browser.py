"""The page on which one draws: with the network inside as one file, or for the server of ``demo``.

The file needs no server and no other file. Its JavaScript prepares the drawing as ``data.photos``
and ``data.preparation`` do, and computes the network from a list of layers.
"""

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from mnist_lightning.console import command
from mnist_lightning.data.preparation import prepare
from mnist_lightning.models.classifier import Classifier
from mnist_lightning.models.ensemble import Ensemble
from mnist_lightning.nets import ACTIVATIONS, AffineMap
from mnist_lightning.spec import DIGITS, DataSpec

MOST_BYTES = 10_000_000  # of weights; a browser should open the file at once, also on a phone

_TEMPLATE = Path(__file__).with_name("page.html")
_WITH_SERVER = f"the same page with a server: {command('demo', '--ckpt_path', 'RUN')}"
_NAMES = {kind: name for name, kind in ACTIVATIONS.items()}
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def self_contained(module: Classifier) -> str:
    """The page with the network inside, which needs no server.

    Raises:
        ValueError: the network is too large, or has a layer that the page does not know.
    """
    layers = Layers(module)
    if layers.bytes > MOST_BYTES:
        raise ValueError(
            f"its weights take {layers.bytes / 1e6:.1f} MB, and html holds up to"
            f" {MOST_BYTES / 1e6:.0f} MB; {_WITH_SERVER}"
        )
    return page(module, layers)


def page(module: Classifier, layers: "Layers | None" = None) -> str:
    """The page as text.

    Args:
        module: the trained model.
        layers: the network, to be computed in the browser; None to ask a server for each answer.
    """
    blank = torch.zeros(1, *module.spec.shape, dtype=torch.uint8)
    about = {
        "name": type(module).__name__,
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "spec": module.spec.plain(),
        "layers": layers and layers.listed,
        "hidden": [len(values) for values in answer(module, blank)[1]],
    }
    parts = {
        "policy": html.escape(policy(alone=layers is not None)),
        "title": _title(module.spec),
        # text that would end the script element cannot be in it
        "model": json.dumps(about).replace("<", r"\u003c"),
        "weights": layers.as_base64() if layers else "",
    }
    return re.sub(r"\{\{ (\w+) \}\}", lambda found: parts[found[1]], _TEMPLATE.read_text())


def policy(alone: bool) -> str:
    """The Content-Security-Policy of the page: its own style and script, nothing from elsewhere."""
    sources = {"default": "'none'", "img": "data:", "connect": "'none'" if alone else "'self'"}
    for name in ("style", "script"):
        (text,) = re.findall(rf"<{name}>(.*?)</{name}>", _TEMPLATE.read_text(), re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        sources[name] = f"'sha256-{digest}'"
    directives = [f"{name}-src {source}" for name, source in sources.items()]
    return "; ".join([*directives, "base-uri 'none'", "form-action 'none'"])


def _title(spec: DataSpec) -> str:
    if not spec.drawn:
        return "Choose a picture, see the answer"
    return f"Draw a {'digit' if spec.classes == DIGITS else 'sign'}, see the answer"


def answer(module: Classifier, image: Tensor) -> tuple[list[float], list[list[float]]]:
    """The probabilities for one image, and the activations of each hidden layer.

    Args:
        module: the model; an ensemble, or one without hidden units, has no activations here.
        image: uint8, a batch of one, as ``Classifier.predict`` takes it.
    """
    hidden: list[list[float]] = []

    def note(_: nn.Module, __: Any, values: Tensor) -> None:
        if values.ndim == 2:  # units, not the channels of an image
            hidden.append(values[0].tolist())

    layers = () if isinstance(module, Ensemble) else module.modules()
    hooks = [m.register_forward_hook(note) for m in layers if type(m) in _NAMES]
    try:
        probabilities = module.predict(image).probabilities[0].tolist()
        # with tta the network is called nine times: first with the image itself
        return probabilities, hidden[: len(hidden) // 9] if module.tta else hidden
    finally:
        for hook in hooks:
            hook.remove()


class Layers:
    """A network as the page computes it: layers as plain values, and their weights.

    BatchNorm is folded into the convolution or the linear layer before it.

    Args:
        module: a ``Classifier`` whose network consists of layers that the page knows.

    Raises:
        ValueError: it has another layer, or a forward of its own.
    """

    def __init__(self, module: Classifier) -> None:
        self._weights: list[np.ndarray] = []
        self._count = 0
        if isinstance(module, Ensemble):
            raise _unknown("an ensemble")
        if module.tta:
            raise _unknown("tta, the mean over shifted images")
        for method in ("forward", "predict"):
            if getattr(type(module), method) is not getattr(Classifier, method):
                raise _unknown(f"a {method} of its own")
        self.listed = self._list(module.net)
        """The layers, each with its name ``op``, its settings, and where its weights begin."""

    @property
    def bytes(self) -> int:
        """Size of the weights as float32."""
        return 4 * self._count

    @property
    def weights(self) -> np.ndarray:
        """All weights, one after the other."""
        return np.concatenate([np.zeros(0, np.float32), *self._weights])

    def as_base64(self) -> str:
        return base64.b64encode(self.weights.astype("<f4").tobytes()).decode()

    def _list(self, *modules: nn.Module) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = []
        parts = [part for module in modules for part in _parts(module)]
        while parts:
            layer = parts.pop(0)
            if type(layer) in (nn.Linear, nn.Conv2d):
                is_normalised = bool(parts) and type(parts[0]) in _BATCH_NORMS
                listed.append(self._weighted(layer, parts.pop(0) if is_normalised else None))
            elif type(layer) in _BATCH_NORMS:  # behind a pooling, for example
                listed.append({"op": "scale", **self._keep(*_as_scale(layer))})
            elif type(layer) is BasicBlock:
                listed.append(self._residual(layer))
            elif type(layer) is AffineMap:
                listed += [{"op": "flatten"}, self._linear(layer.w.T, layer.b[0])]
            else:
                listed.append(_unweighted(layer))
        return listed

    def _weighted(self, layer: Any, norm: Any) -> dict[str, Any]:
        weight, bias = layer.weight.detach().double(), torch.zeros(layer.weight.shape[0]).double()
        if layer.bias is not None:
            bias = layer.bias.detach().double()
        if norm is not None:
            scale, shift = _as_scale(norm)
            weight = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
            bias = bias * scale + shift
        if isinstance(layer, nn.Linear):
            return self._linear(weight, bias)
        is_plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
        if not is_plain or isinstance(layer.padding, str):
            raise _unknown(f"{layer}")
        return {
            "op": "conv",
            "outputs": layer.out_channels,
            "kernel": list(layer.kernel_size),
            "stride": list(layer.stride),
            "padding": list(layer.padding),
            **self._keep(weight, bias),
        }

    def _linear(self, weight: Tensor, bias: Tensor) -> dict[str, Any]:
        outputs, inputs = weight.shape
        return {"op": "linear", "inputs": inputs, "outputs": outputs, **self._keep(weight, bias)}

    def _residual(self, block: BasicBlock) -> dict[str, Any]:
        body = self._list(block.conv1, block.bn1, block.relu, block.conv2, block.bn2)
        shortcut = self._list(block.downsample) if block.downsample is not None else []
        return {"op": "residual", "body": body, "shortcut": shortcut}

    def _keep(self, weight: Tensor, bias: Tensor) -> dict[str, int]:
        places = {}
        for name, values in (("weight", weight), ("bias", bias)):
            places[name] = self._count
            self._weights.append(values.detach().float().cpu().contiguous().numpy().ravel())
            self._count += values.numel()
        return places


def _parts(module: Any) -> Iterator[nn.Module]:
    """The layers of a network, in the order in which they are computed."""
    if type(module) is nn.Sequential:
        for child in module:
            yield from _parts(child)
    elif type(module) is ResNet:
        yield from (module.conv1, module.bn1, module.relu)
        for part in (module.maxpool, module.layer1, module.layer2, module.layer3, module.layer4):
            yield from _parts(part)
        yield from (module.avgpool, nn.Flatten(), module.fc)
    elif type(module) is BasicBlock:
        yield from (module, module.relu)  # it ends with the activation
    elif not isinstance(module, nn.Identity | nn.Dropout):
        yield module


def _unweighted(layer: nn.Module) -> dict[str, Any]:
    if name := _NAMES.get(type(layer)):
        if isinstance(layer, nn.GELU) and layer.approximate != "none":
            raise _unknown(f"{layer}")
        return {"op": name, "slope": getattr(layer, "negative_slope", 0)}
    if isinstance(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) == (1, -1):
        return {"op": "flatten"}
    if isinstance(layer, nn.AdaptiveAvgPool2d) and layer.output_size in (1, (1, 1)):
        return {"op": "global_average"}
    is_pool = isinstance(layer, nn.MaxPool2d | nn.AvgPool2d) and not layer.ceil_mode
    if is_pool and isinstance(layer, nn.MaxPool2d) and layer.dilation in (1, (1, 1)):
        return {"op": "max_pool", **_window(layer)}
    if is_pool and isinstance(layer, nn.AvgPool2d) and layer.padding in (0, (0, 0)):
        return {"op": "average_pool", **_window(layer)}
    raise _unknown(f"{layer}")


def _window(layer: nn.MaxPool2d | nn.AvgPool2d) -> dict[str, list[int]]:
    sizes = {"kernel": layer.kernel_size, "stride": layer.stride, "padding": layer.padding}
    return {name: [v, v] if isinstance(v, int) else list(v) for name, v in sizes.items()}


def _as_scale(norm: Any) -> tuple[Tensor, Tensor]:
    """BatchNorm in evaluation: the factor and the summand of each channel, in float64."""
    if norm.running_mean is None or norm.running_var is None:
        raise _unknown(f"{norm}, which has no running statistics")
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach().double()


def _unknown(what: str) -> ValueError:
    return ValueError(f"html does not know {what}; {_WITH_SERVER}")


def read_back(text: str) -> Callable[[Tensor], Tensor]:
    """Reads the network in a page, and computes it with PyTorch as the page's script does.

    Returns:
        a function of uint8 images that gives class probabilities.
    """
    model, weights = (
        re.findall(rf'id="{name}">(.*?)</script>', text)[0] for name in ("model", "weights")
    )
    about = json.loads(model)
    spec = DataSpec.of(about["spec"])
    values = torch.from_numpy(np.frombuffer(base64.b64decode(weights), "<f4").astype(np.float32))
    return lambda images: _run(about["layers"], values, prepare(images, spec)).softmax(1)


def _run(layers: list[dict[str, Any]], weights: Tensor, x: Tensor) -> Tensor:
    for layer in layers:
        x = _compute(layer, weights, x)
    return x


def _compute(layer: dict[str, Any], weights: Tensor, x: Tensor) -> Tensor:
    def part(name: str, *shape: int) -> Tensor:
        return weights[layer[name] :][: math.prod(shape)].reshape(shape)

    match layer["op"]:
        case "linear":
            outputs = layer["outputs"]
            return F.linear(x, part("weight", outputs, layer["inputs"]), part("bias", outputs))
        case "conv":
            weight = part("weight", layer["outputs"], x.shape[1], *layer["kernel"])
            bias = part("bias", layer["outputs"])
            return F.conv2d(x, weight, bias, layer["stride"], layer["padding"])
        case "scale":
            shape = x.shape[1], *[1] * (x.ndim - 2)
            return x * part("weight", *shape) + part("bias", *shape)
        case "residual":
            return _run(layer["body"], weights, x) + _run(layer["shortcut"], weights, x)
        case "max_pool":
            return F.max_pool2d(x, layer["kernel"], layer["stride"], layer["padding"])
        case "average_pool":
            return F.avg_pool2d(x, layer["kernel"], layer["stride"])
        case "global_average":
            return x.mean((2, 3), keepdim=True)
        case "flatten":
            return x.flatten(1)
        case "leaky_relu":
            return F.leaky_relu(x, layer["slope"])
        case activation:
            return cast(Tensor, ACTIVATIONS[activation]()(x))
