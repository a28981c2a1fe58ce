"""The formats of ``export``: how each is written, how it is loaded again, how it is used.

``FORMATS`` at the end is the one list of them. Each function imports what it needs, so that the
options of ``export`` are known without PyTorch.
"""

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from mnist_lightning.console import short

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

    from mnist_lightning.deploy.network import Network
    from mnist_lightning.deploy.trained import Trained

Answers = Callable[["Tensor"], "Tensor"]
"""uint8 images -> class probabilities."""


class Export(NamedTuple):
    """What is exported."""

    trained: "Trained"
    network: "Network"
    about: dict[str, Any]
    """What a user of the file must know, as plain JSON types."""
    images: "Tensor"
    """Some images as the file takes them, uint8."""


class Format(NamedTuple):
    """A format of ``export``."""

    ending: str
    """Of the names of its files."""
    packages: tuple[str, ...]
    """What it needs of the extra ``export``, by the names that are imported."""
    write: Callable[[Export], bytes]
    """Makes the content of the file."""
    load: Callable[[bytes, Export], Answers]
    """Loads the content as its users do. The answers are compared with PyTorch's."""
    example: Callable[[Path, Export], str]
    """A Python program of at most ten lines that uses the file."""


# ---- ONNX


def _write_onnx(export: Export) -> bytes:
    import torch

    made = torch.onnx.export(
        _program(export),
        input_names=["images"],
        output_names=["probabilities"],
        dynamo=True,
        verbose=False,
    )
    model = cast(Any, made).model_proto
    graph = model.graph
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]  # paths of this machine
    for name, text in _texts(export.about).items():
        model.metadata_props.add(key=name, value=text)
    return cast(bytes, model.SerializeToString())


def _load_onnx(content: bytes, export: Export) -> Answers:
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(content)
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _use_onnx(file: Path, export: Export) -> str:
    return f"""import json
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession({short(file)!r})
classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
images = np.zeros({_shape(export)}, np.uint8)  # {_yours(export)}
(probabilities,) = session.run(None, {{"images": images}})
print([classes[label] for label in probabilities.argmax(1)], probabilities.max(1))"""


# ---- torch.export


def _write_torch(export: Export) -> bytes:
    import torch

    file = io.BytesIO()
    torch.export.save(_program(export), file, extra_files={"about.json": json.dumps(export.about)})
    return file.getvalue()


def _load_torch(content: bytes, export: Export) -> Answers:
    import torch

    return cast(Answers, torch.export.load(io.BytesIO(content)).module())


def _use_torch(file: Path, export: Export) -> str:
    return f"""import json
import torch

about = {{"about.json": ""}}
network = torch.export.load({short(file)!r}, extra_files=about).module()
classes = json.loads(about["about.json"])["classes"]
images = torch.zeros({_shape(export)}, dtype=torch.uint8)  # {_yours(export)}
probabilities = network(images)
print([classes[label] for label in probabilities.argmax(1)], probabilities.amax(1))"""


# ---- safetensors: the weights alone, for which this package builds the network


def _write_safetensors(export: Export) -> bytes:
    from safetensors.torch import save

    return save(export.network.weights(), _texts(export.about))


def _load_safetensors(content: bytes, export: Export) -> Answers:
    from safetensors.torch import load

    again = copy.copy(export.trained)
    again.model = type(again.model)(**export.about["hyper_parameters"]).eval()
    part = cast("nn.Module", again.model.net) if export.network.is_plain else again.model
    part.load_state_dict(load(content))
    return again.probabilities


def _use_safetensors(file: Path, export: Export) -> str:
    module, _, name = export.about["model_class"].rpartition(".")
    part = "model.net" if export.network.is_plain else "model"
    answer = "print(model.predict(images))"
    if not hasattr(export.trained.model, "predict"):  # no Classifier
        mean, std = (f"torch.tensor({export.about[key]})[:, None, None]" for key in ("mean", "std"))
        answer = f"print(model.eval()((images / 255 - {mean}) / {std}))"
    return f"""import json
import torch
from safetensors import safe_open
from {module} import {name}

file = safe_open({short(file)!r}, "pt")
model = {name}(**json.loads(file.metadata()["hyper_parameters"]))
{part}.load_state_dict({{name: file.get_tensor(name) for name in file.keys()}})
images = torch.zeros({_shape(export)}, dtype=torch.uint8)  # {_yours(export)}
{answer}"""


# ---- HTML: a page on which one draws, with the network inside


def _write_html(export: Export) -> bytes:
    from mnist_lightning.deploy.browser import self_contained
    from mnist_lightning.models.classifier import Classifier

    if not isinstance(export.trained.model, Classifier):
        raise ValueError("html is for a Classifier")
    return self_contained(export.trained.model).encode()


def _load_html(content: bytes, export: Export) -> Answers:
    from mnist_lightning.deploy.browser import read_back

    return read_back(content.decode())


def _use_html(file: Path, export: Export) -> str:
    return f"""import webbrowser
from pathlib import Path

webbrowser.open(Path({short(file)!r}).absolute().as_uri())"""


# ---- of several formats


def _program(export: Export) -> "ExportedProgram":
    """The network as a graph that takes any number of images, without places in our code."""
    import torch

    example = torch.zeros_like(export.images[:2])  # the file keeps it
    shapes = {"images": {0: torch.export.Dim("n")}}
    program = torch.export.export(export.network, (example,), dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def _texts(about: dict[str, Any]) -> dict[str, str]:
    return {name: json.dumps(value) for name, value in about.items()}


def _shape(export: Export) -> tuple[int, ...]:
    return 5, *export.images.shape[1:]


def _yours(export: Export) -> str:
    kind = "light signs on dark" if export.about["drawn"] else "pixels"
    return f"yours: {kind}, 0 to 255"


FORMATS = {
    "onnx": Format(
        "onnx", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _load_onnx, _use_onnx
    ),
    "torch": Format("pt2", (), _write_torch, _load_torch, _use_torch),
    "safetensors": Format(
        "safetensors", (), _write_safetensors, _load_safetensors, _use_safetensors
    ),
    "html": Format("html", (), _write_html, _load_html, _use_html),
}
