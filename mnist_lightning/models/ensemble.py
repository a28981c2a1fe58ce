"""Ensemble: several trained models that answer together."""

import inspect
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from mnist_lightning.classes import class_path, imported
from mnist_lightning.models.classifier import Classifier, Spec
from mnist_lightning.nets import mean_of_answers
from mnist_lightning.spec import DataSpec


class Ensemble(Classifier):
    """Answers with the mean of the probabilities of trained models, its members.

    Each member answers as it does alone, with its own ``tta``. They take the same images: of the
    same size and classes, normalised in the same way.

    Args:
        members: two or more models; or of each its class, as ``model_class``, and its arguments
            without ``spec``, as a checkpoint has them.
        spec: shape and classes of the images; of models, their own.
        tta: of all members together; see ``Classifier``.

    Raises:
        ValueError: the members do not take the same images; or one is no ``Classifier``, or itself
            an ensemble.
    """

    def __init__(self, members: list[Any], spec: Spec = None, tta: int = 0) -> None:
        if len(members) < 2:
            raise ValueError(f"an ensemble needs two members or more, got {len(members)}")
        models = [
            _build(member, DataSpec.of(spec)) if isinstance(member, Mapping) else member
            for member in members
        ]
        first = _check(models)
        super().__init__(_Members(models), 1.0, "sgd", first, tta=tta)
        self.hparams["members"] = [
            {"model_class": class_path(type(model)), **_without_spec(model.hparams)}
            for model in models
        ]

    def configure_optimizers(self) -> Any:
        raise ValueError("an ensemble is not trained: train its members")


class _Members(nn.ModuleList):
    def forward(self, images: Tensor) -> Tensor:
        return mean_of_answers([cast(Classifier, member).eval_scores(images) for member in self])


def _build(member: Mapping[str, Any], spec: DataSpec) -> Classifier:
    arguments = dict(member)
    path = str(arguments.pop("model_class", None))
    kind = imported(path)
    if not (isinstance(kind, type) and issubclass(kind, Classifier)):
        raise ValueError(f"the class of a member, {path}, is not known here: import it before")
    known = inspect.signature(kind.__init__).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        # the others are of its base class, whose arguments are saved too
        arguments = {name: value for name, value in arguments.items() if name in known}
    if "spec" in known:
        arguments["spec"] = spec.plain()
    return kind(**arguments)


def _without_spec(hyper_parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in hyper_parameters.items() if name != "spec"}


def _check(models: list[Any]) -> DataSpec:
    """Returns what all members take; refuses members that differ in it."""
    for model in models:
        if isinstance(model, Ensemble):
            raise ValueError("an ensemble cannot be a member of another: name its members instead")
        if not isinstance(model, Classifier):
            raise ValueError(f"a member must be a Classifier, and {type(model).__name__} is none")
    first = models[0]
    for model in models[1:]:
        for name, value in first.spec.plain().items():
            if (other := model.spec.plain()[name]) != value:
                raise ValueError(
                    f"a {type(first).__name__} and a {type(model).__name__} cannot be one ensemble:"
                    f" they take images with {name} {_shown(value)} and {_shown(other)}"
                )
    return first.spec


def _shown(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 100 else f"{text[:100]} ..."
