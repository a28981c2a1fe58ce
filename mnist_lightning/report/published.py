"""What the study published: the figures that a repetition is compared with.

The study trained a shallow network, deep networks and ResNet-18 on 50,400 of MNIST's 70,000 images,
validated on 12,600 and tested on 7,000. Its shuffle and its seeds are not known.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Published:
    """One published figure.

    Args:
        where: table, figure or section of the study.
        model: name of a class in ``mnist_lightning.models``.
        metric: ``val_acc``, ``test_acc``, or ``correlation`` of an axis with ``val_acc``.
        value: as published.
        params: of the model that reached it, as far as they are published; for a correlation, its
            axis.
    """

    where: str
    model: str
    metric: str
    value: float
    params: Mapping[str, Any]


def _shallow(batch_size: int, max_epochs: int, lr: float, hidden_units: int) -> dict[str, Any]:
    return {
        "batch_size": batch_size,
        "max_epochs": max_epochs,
        "lr": lr,
        "hidden_units": hidden_units,
    }


def _deep(max_epochs: int, *hidden_units: int) -> dict[str, Any]:
    layers = {f"hidden_units.{i}": units for i, units in enumerate(hidden_units, 1)}
    return {"batch_size": 32, "max_epochs": max_epochs, "lr": 0.01, **layers}


def _rows(
    where: str, model: str, rows: list[tuple[dict[str, Any], float]], metric: str = "val_acc"
) -> list[Published]:
    return [Published(where, model, metric, value, params) for params, value in rows]


_SHALLOW_BEST = _shallow(8, 50, 0.1, 100)
_DEEP_BEST = _deep(50, 1024, 10, 1024)

_ADAM = {"max_epochs": 10, "optimizer": "adam", "lr": 0.01}
# the first convolution drawn anew for gray images; a frozen BatchNorm adapts, as PyTorch's does
_STEM = {"stem": "reset"}
_ADAPT = {"freezing.batch_norm": "adapt"}

PUBLISHED = [
    *_rows(
        "table 2.1, best five",
        "ShallowNetwork",
        [
            (_SHALLOW_BEST, 0.981111),
            (_shallow(16, 50, 0.1, 100), 0.979603),
            (_shallow(8, 100, 0.1, 100), 0.979444),
            (_shallow(16, 100, 0.1, 100), 0.979127),
            (_shallow(16, 20, 0.1, 100), 0.978413),
        ],
    ),
    *_rows(
        "table 2.1, worst five",
        "ShallowNetwork",
        [
            (_shallow(64, 10, 0.0001, 25), 0.273333),
            (_shallow(128, 20, 0.0001, 25), 0.252698),
            (_shallow(64, 20, 0.0001, 10), 0.226746),
            (_shallow(128, 50, 0.0001, 10), 0.221349),
            (_shallow(128, 10, 0.0001, 10), 0.196349),
        ],
    ),
    *_rows(
        "figure 2.4",
        "ShallowNetwork",
        [
            ({"axis": "lr"}, 0.34),
            ({"axis": "batch_size"}, -0.35),
            ({"axis": "max_epochs"}, 0.24),
            ({"axis": "hidden_units"}, 0.13),
        ],
        "correlation",
    ),
    *_rows("section 2.6", "ShallowNetwork", [(_SHALLOW_BEST, 0.9806)], "test_acc"),
    *_rows(
        "table 3.1, two layers",
        "DeepNetwork",
        [
            (_deep(25, 2048, 128), 0.975159),
            (_deep(25, 2048, 2048), 0.974762),
            (_deep(25, 2048, 1024), 0.974524),
            (_deep(25, 1024, 1024), 0.974444),
            (_deep(25, 1024, 20), 0.974444),
        ],
    ),
    *_rows(
        "section 3.3.2, three layers, first round",
        "DeepNetwork",
        [
            (_deep(10, 1024, 10, 1024), 0.972143),
            (_deep(10, 1024, 20, 1024), 0.971429),
            (_deep(10, 512, 10, 1024), 0.971349),
            (_deep(10, 256, 10, 1024), 0.970397),
            (_deep(10, 1024, 10, 512), 0.970397),
        ],
    ),
    *_rows(
        "section 3.3.2, three layers, second round",
        "DeepNetwork",
        [
            (_DEEP_BEST, 0.979921),
            (_deep(50, 1024, 20, 1024), 0.979841),
            (_deep(50, 1024, 10, 512), 0.978810),
            (_deep(50, 512, 10, 1024), 0.978333),
            (_deep(50, 256, 10, 1024), 0.978333),
        ],
    ),
    *_rows("section 3.5", "DeepNetwork", [(_DEEP_BEST, 0.9806)], "test_acc"),
    # 224 pixels; of the first, table and text disagree about the epochs (20, 10)
    *_rows("table 4.2", "ResNet18", [({"regime": "scratch", **_ADAM, "max_epochs": 20}, 0.9909)]),
    *_rows("table 4.3", "ResNet18", [({"regime": "finetune", **_ADAM, **_STEM}, 0.9874)]),
    *_rows("table 4.4", "ResNet18", [({"regime": "freeze", **_ADAM, **_STEM, **_ADAPT}, 0.9157)]),
    *_rows("section 4.4", "ResNet18", [({"regime": "scratch"}, 0.9924)], "test_acc"),
]

_WIDTHS = [10, 20, 256, 512, 1024]

_OF_DEEP: dict[str, list[Any]] = {"batch_size": [32], "lr": [0.01]}

# What the study searched. A grid over one of these repeats the study.
GRIDS: list[tuple[str, Mapping[str, list[Any]]]] = [
    (
        "ShallowNetwork",
        {
            "batch_size": [4, 8, 16, 32, 64, 128],
            "max_epochs": [10, 20, 50, 100],
            "lr": [0.1, 0.01, 0.001, 0.0001],
            "hidden_units": [10, 25, 50, 100],
        },
    ),
    (
        "DeepNetwork",
        {
            **_OF_DEEP,
            "max_epochs": [25],
            **{f"hidden_units.{i}": [*_WIDTHS, 128, 2048] for i in (1, 2)},
        },
    ),
    (
        "DeepNetwork",
        {**_OF_DEEP, "max_epochs": [10], **{f"hidden_units.{i}": _WIDTHS for i in (1, 2, 3)}},
    ),
    ("ResNet18", {"regime": ["scratch", "finetune", "freeze"], "lr": [0.01]}),
]

# The counterpart of each table and figure of the study.
COUNTERPARTS = [
    ("section 1.1, the perceptron's tensors", "`inspect --config perceptron.yaml`"),
    ("table 2.1, best and worst models", "the grid: best five, worst five"),
    ("figures 2.1 to 2.3, accuracy against each parameter", "the grid: nine panels"),
    ("figure 2.4, correlations", "the grid: correlations"),
    ("figures 2.5 to 2.7, learning curves", "the grid: learning curves"),
    ("table 2.2 and section 2.6, the best model and its test", "the grid: test"),
    ("table 3.1, two hidden layers", "the two-layer grid: best five"),
    ("section 3.3.2, three hidden layers, two rounds", "the three-layer grid: best of each round"),
    ("figure 3.1, learning curves", "the three-layer grid: learning curves"),
    ("section 3.5, the best three-layer network's test", "the three-layer grid: test"),
    ("figure 4.1, some images", "any search: the digits it gets wrong"),
    ("table 4.1, the layers of ResNet-18", "`inspect --config resnet18_scratch.yaml`"),
    ("tables 4.2 to 4.4 and section 4.4, ResNet-18", "published against repeated"),
]
