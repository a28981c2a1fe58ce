"""Additions by users have their effect: each addition of ``twins``, with our models and twins."""

import csv
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from conftest import trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, TensorDataset
from twins import ADDITIONS, FUSED, MANY, MODELS, ONE, Addition, ways_table

from mnist_lightning import MNISTDataModule
from mnist_lightning.data import module
from mnist_lightning.data.sampling import epoch_order
from mnist_lightning.models.classifier import Classifier
from mnist_lightning.training.execution import Execution

README = Path(__file__).parent.parent / "README.md"
# 566 training images in 36 mini-batches; the rest are validation images
DATA: dict[str, Any] = {"source": "digits", "batch_size": 16, "val_fraction": 0.65}

# each addition with every model, or only with ShallowNetwork
COMBINATIONS = [
    (model, name)
    for name, addition in ADDITIONS.items()
    for model in MODELS
    if model == "shallow"
    or (addition.everywhere and model != "resnet" and model not in addition.but)
] + [("resnet", name) for name in ("nothing", "EMAWeightAveraging", "LambdaLR by step")]


class Epochs(Sampler):
    """A sampler in the order that the data module documents."""

    def __init__(self, n: int) -> None:
        self.n, self.epoch = n, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        return iter(epoch_order(self.n, 0, self.epoch).tolist())

    def __len__(self) -> int:
        return self.n


class PlainData(pl.LightningDataModule):
    """The same images as ours, with torch's classes only."""

    def __init__(self) -> None:
        super().__init__()
        ours = MNISTDataModule(**DATA)
        ours.setup()
        self.batch_size = DATA["batch_size"]
        self.train, self.val = (
            TensorDataset(part.images.unsqueeze(1).float().div(255).double(), part.labels)
            for part in (ours.train_set, ours.val_set)
        )

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, sampler=Epochs(len(self.train)))

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, 1000)


class Probe(pl.Callback):
    """Records the learning rates at the start of each epoch and at the end."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.rates.append([g["lr"] for o in trainer.optimizers for g in o.param_groups])

    on_train_end = on_train_epoch_start


class Outcome(NamedTuple):
    """All results of a training."""

    weights: list[Tensor]
    rates: list[list[float]]
    calls: list[Any]
    files: list[str]
    loops: list[Any]
    logged: dict[str, float]
    rows: list[dict[str, float]]
    said: list[str]


def _train(kind: Any, arguments: Any, images: Any, addition: Addition, folder: Path) -> Outcome:
    pl.seed_everything(0, verbose=False)
    if addition.methods:
        ours = issubclass(kind, Classifier) and addition.options
        kind = type("Added", (kind,), {**({} if ours else addition.methods), "calls": {}})
        kind.added = kind
    model = kind(**arguments)
    addition.then(model)
    if isinstance(images, type):
        images = images(**DATA)
        if hasattr(images, "calls"):
            images.calls = {}
    probe, said, execution = Probe(), [], Execution()
    execution.say = said.append
    callbacks = addition.callbacks(str(folder))
    settings = {"max_epochs": 3, "precision": "64-true", **addition.settings}
    if settings.get("logger"):
        settings["logger"] = CSVLogger(folder, name="log", version="")
    if settings.get("barebones"):
        settings.update(dict.fromkeys(("logger", "enable_checkpointing"), None))
        settings.update(enable_progress_bar=None, enable_model_summary=None)
        settings.update(num_sanity_val_steps=None)
    fit = trainer(
        default_root_dir=folder,
        **{**settings, "callbacks": [*callbacks, probe, execution]},
    )
    fit.fit(model, images)
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    saved = [
        torch.load(folder / name, weights_only=False)["loops"]["fit_loop"]
        for name in files
        if name.endswith(".ckpt")
    ]
    calls = [getattr(c, "calls", None) for c in callbacks]
    return Outcome(
        [*model.parameters(), *model.net.buffers()],
        probe.rates,
        [calls, getattr(model, "calls", None), getattr(images, "calls", None)],
        files,
        [fit.fit_loop.state_dict(), fit.global_step, fit.current_epoch, *saved],
        {name: float(value) for name, value in fit.callback_metrics.items()},
        _rows(folder / "log" / "metrics.csv"),
        said,
    )


def _rows(file: Path) -> list[dict[str, float]]:
    if not file.is_file():
        return []
    with file.open(newline="") as stream:
        return [{k: float(v or "nan") for k, v in row.items()} for row in csv.DictReader(stream)]


def _same(ours: dict[str, float], theirs: dict[str, float], varies: tuple[str, ...]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if not name.startswith(varies or ("\0",)):
            assert value == pytest.approx(theirs[name], rel=1e-5, abs=1e-7, nan_ok=True), name


@pytest.fixture(scope="module", autouse=True)
def _digits_read_once() -> Iterator[None]:
    """Saves a tenth of a second in each of some hundred tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "read_digits", functools.cache(module.read_digits))
        yield


@pytest.mark.parametrize(
    ("model", "name"),
    [
        pytest.param(*both, marks=[] if both[0] in ("shallow", "perceptron") else pytest.mark.slow)
        for both in COMBINATIONS
    ],
)
def test_what_is_added_counts(
    model: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    addition, (kind, twin, way, arguments) = ADDITIONS[name], MODELS[model]
    if model == "resnet":  # takes 20 times as long
        addition.settings = {**addition.settings, "limit_train_batches": 2, "max_epochs": 2}
        addition.settings["limit_val_batches"] = 0
    folders = [tmp_path / side for side in ("ours", "theirs")]
    for folder in folders:
        folder.mkdir()
    plain_data = PlainData() if model == "plain" and addition.data is MNISTDataModule else None
    ours = _train(kind, {**arguments, **addition.options}, addition.data, addition, folders[0])
    # the twin trains without Execution
    monkeypatch.setattr(Execution, "on_train_start", lambda *_: None)
    theirs = _train(twin, {}, plain_data or addition.data, addition, folders[1])
    assert theirs.said == []

    exact = model != "perceptron" and not any(", fused" in line for line in ours.said)
    for one, other in zip(ours.weights, theirs.weights, strict=True):
        if exact:
            assert torch.equal(one, other)
        else:
            double = one.dtype == torch.float64
            tolerance = {"rtol": 1e-8, "atol": 1e-10} if double else {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(one, other, **tolerance)
    assert ours.rates == theirs.rates
    assert ours.calls == theirs.calls
    assert ours.files == theirs.files
    assert ours.loops == theirs.loops
    _same(ours.logged, theirs.logged, addition.varies)
    assert len(ours.rows) == len(theirs.rows)
    for mine, other in zip(ours.rows, theirs.rows, strict=True):
        _same(mine, other, addition.varies)

    # README's table says how the training took its steps
    order = [FUSED, MANY, ONE]
    expected = max(addition.way, way, key=order.index)
    assert _way(ours.said) == expected, ours.said


def _way(said: list[str]) -> str:
    """How the first epoch took its steps."""
    if said[0].startswith("one step at a time"):
        return ONE
    return FUSED if "fused" in said[0].split(";")[0].split(":")[1] else MANY


def test_there_are_enough_combinations() -> None:
    assert len(COMBINATIONS) >= 200


def test_readme_says_what_goes_fast() -> None:
    readme = README.read_text()
    table = readme.split("<!-- ways -->\n")[1].split("<!-- end of ways -->")[0]
    assert table == ways_table()
