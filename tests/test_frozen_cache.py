"""Frozen layers that are computed once: the same training as with --freezing.cache false."""

import copy
import errno
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import same_weights, trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mnist_lightning import ConvNetwork, LayerFreezing, MNISTDataModule, ResNet18, ShallowNetwork
from mnist_lightning.__main__ import main
from mnist_lightning.models.classifier import Classifier
from mnist_lightning.training import features, frozen_cache
from mnist_lightning.training.callbacks import SafePoints
from mnist_lightning.training.execution import Execution
from mnist_lightning.training.features import _Skipped, computed


class Own(Classifier):
    """A network of the user's own: a plain nn.Sequential."""

    def __init__(self, dropout: float = 0.0, net: nn.Module | None = None, **options: Any) -> None:
        trunk = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(dropout), nn.ReLU())
        head = [nn.MaxPool2d(4), nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, 10)]
        super().__init__(net or nn.Sequential(trunk, *head), 0.01, "adam", **options)


class Staged(nn.Module):
    """A network that names its stages."""

    stages = ("stem", "body")

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(144, 10)
        self.body = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(4))
        self.stem = nn.Conv2d(1, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).flatten(1))


def conv(**options: Any) -> ConvNetwork:
    return ConvNetwork([4, 8], convolutions=1, dropout=0.3, lr=0.01, **options)


class Bare(Staged):
    stages = ()


class Seen(pl.Callback):
    """Collects the metrics of each epoch, and what of the network is computed in it."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.computed: list[bool] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})
        self.computed.append(len(list(computed(pl_module))) == len(list(pl_module.modules())))


class Run:
    """A training on some of the digits, 150 for training: 9 mini-batches of 16, and one of 6."""

    def __init__(
        self,
        make: Callable[[], Classifier],
        freezing: dict[str, Any],
        *callbacks: pl.Callback,
        cache: bool = True,
        data: dict[str, Any] | None = None,
        kind: type[MNISTDataModule] = MNISTDataModule,
        ckpt_path: Any = None,
        fails: Any = None,
        **settings: Any,
    ) -> None:
        pl.seed_everything(3, verbose=False)
        self.model, self.seen = make(), Seen()
        self.data = kind(
            **{"source": "digits", "batch_size": 16, "eval_batch_size": 50, **(data or {})}
        )
        self.data.setup()
        for name, count in (("train_set", 150), ("val_set", 70)):
            images = getattr(self.data, name)
            setattr(self.data, name, type(images)(images.images[:count], images.labels[:count]))
        self.freezing = LayerFreezing(**freezing, cache=cache)
        self.trainer = trainer(
            **{"max_epochs": 3, **settings}, callbacks=[self.freezing, *callbacks, self.seen]
        )
        try:
            self.trainer.fit(self.model, self.data, ckpt_path=ckpt_path, weights_only=True)
        except BaseException as error:
            if fails is None or not isinstance(error, fails):
                raise
        assert not any(isinstance(vars(p).get("forward"), _Skipped) for p in self.model.modules())
        assert self.data.train_set.features is self.data.val_set.features is None


def same(one: Run, other: Run) -> bool:
    return same_weights(one.model, other.model) and one.seen.logged == other.seen.logged


TRUNK = {"freeze": ["net.0.*"]}
CASES: dict[str, tuple[Callable[[], Classifier], dict[str, Any], dict[str, Any]]] = {
    "ConvNetwork": (conv, {"freeze": ["net.stage1.*"]}, {}),
    "linear probe": (conv, {"train": ["net.output.*"]}, {}),
    "hidden layer": (lambda: ShallowNetwork(20), {"train": ["net.output.*"]}, {}),
    "ResNet18": (
        lambda: ResNet18(lr=0.001),
        {"train": ["net.layer4.*", "net.fc.*"]},
        {"max_epochs": 2},
    ),
    "nn.Sequential": (Own, TRUNK, {}),
    "stages": (lambda: Own(net=Staged()), {"train": ["net.head.*"]}, {}),
    "float64": (Own, TRUNK, {"precision": "64-true"}),
    "bf16": (conv, {"freeze": ["net.stage1.*"]}, {"precision": "bf16-mixed"}),
    "bf16-true": (conv, {"freeze": ["net.stage1.*"]}, {"precision": "bf16-true"}),
    "validation within epochs": (Own, TRUNK, {"val_check_interval": 3}),
    "validation in every second epoch": (Own, TRUNK, {"check_val_every_n_epoch": 2}),
    "no validation": (Own, TRUNK, {"limit_val_batches": 0}),
    "thaw": (conv, {"train": ["net.output.*"], "unfreeze_at_epoch": 2}, {"max_epochs": 4}),
    "a last mini-batch of one image": (conv, {"train": ["net.output.*"]}, {"eval_batch_size": 69}),
    "mini-batches of one image": (conv, {"freeze": ["net.stage1.*"]}, {"eval_batch_size": 1}),
    "one mini-batch": (Own, TRUNK, {"batch_size": 500}),
    "sanity check": (Own, TRUNK, {"num_sanity_val_steps": 2}),
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(n, marks=[pytest.mark.slow] * (n == "ResNet18")) for n in CASES],
)
def test_the_same_training(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights and metrics have the same bits, also in half and double precision."""
    make, freezing, settings = CASES[case]
    data = {"image_size": 32} if case == "ResNet18" else {}
    data |= {key: value for key, value in settings.items() if "batch_size" in key}
    settings = {key: value for key, value in settings.items() if key not in data}
    kept = Run(make, freezing, data=data, **settings)
    assert "computed once for" in capsys.readouterr().out
    plain = Run(make, freezing, data=data, cache=False, **settings)
    assert "computed" not in capsys.readouterr().out
    assert same(kept, plain)
    assert kept.seen.computed[0] is False
    assert kept.seen.computed[-1] == ("unfreeze_at_epoch" in freezing)
    for evaluate in ("validate", "test"):
        results = [
            getattr(run.trainer, evaluate)(run.model, run.data, verbose=False)
            for run in (kept, plain)
        ]
        assert results[0] == results[1]


class NoiseInside(Staged):
    """Its stages are not all that it does to the images."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean((1, 2, 3), keepdim=True).flatten(1)


class DropoutInside(Staged):
    """Likewise, and in training only."""

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(self.stem(x), 0.5, self.training)
        return self.head(self.body(x).flatten(1))


class OwnStep(Own):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch[0] + 0.1, batch[1]), batch_idx)


class OwnValidation(Own):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step((batch[0] + 0.1, batch[1]), batch_idx)


class OwnData(MNISTDataModule):
    def preprocess(self, images: Tensor, numbers: Tensor | None = None) -> Tensor:
        return super().preprocess(images, numbers) + torch.rand(1)


class OwnLoader(MNISTDataModule):
    def val_dataloader(self) -> Any:
        return DataLoader([(torch.rand(8, 1, 28, 28), torch.arange(8))], batch_size=None)


class Reads(pl.Callback):
    """Sees the images of the mini-batches, and changes them."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        batch[0].mul_(0.9)


class ReadsValidation(pl.Callback):
    def on_validation_batch_start(self, trainer: Any, module: Any, batch: Any, *_: Any) -> None:
        batch[0].mul_(0.9)


def hooked() -> Own:
    model = Own()
    model.net[0][0].register_forward_hook(lambda layer, inputs, output: output + 0.1)
    return model


def replaced() -> Own:
    model = Own()
    inner = model.net[0][0]
    inner.forward = lambda x: type(inner).forward(inner, x) * 0.5
    return model


def shared() -> Own:
    relu = nn.ReLU()
    parts = [nn.Flatten(), relu, nn.Linear(784, 9), relu, nn.Linear(9, 10)]
    return Own(net=nn.Sequential(*parts))


class Odd(nn.ReLU):
    pass


def unknown() -> Own:
    model = Own()
    model.net[0][3] = Odd()
    return model


REFUSED: dict[str, tuple[Any, dict[str, Any], tuple[Any, ...], dict[str, Any], str]] = {
    "dropout": (lambda: Own(0.2), TRUNK, (), {}, "net.0.2 is random"),
    "statistics": (Own, {**TRUNK, "batch_norm": "adapt"}, (), {}, "statistics of net.0.1 adapt"),
    "first layer trains": (Own, {"freeze": ["net.4.*"]}, (), {}, "net.0 trains"),
    "one layer trains": (Own, {"freeze": ["net.0.0.*"]}, (), {}, "net.0 trains"),
    "an unknown layer": (unknown, TRUNK, (), {}, "net.0.3 is a Odd, which may compute anything"),
    "a replaced forward": (replaced, TRUNK, (), {}, "net.0.0 is a Conv2d, which may"),
    "a layer used twice": (shared, {"freeze": ["net.2.*"]}, (), {}, "net.1 is used twice"),
    "a hook": (hooked, TRUNK, (), {}, "a hook, or torch.compile"),
    "no stages": (
        lambda: Own(net=Bare()),
        {"freeze": ["net.stem.*"]},
        (),
        {},
        "Bare does not name",
    ),
    "more than stages": (
        lambda: Own(net=NoiseInside()),
        {"train": ["net.head.*"]},
        (),
        {},
        "a trial with their output failed: |scores differ",
    ),
    "dropout between stages": (
        lambda: Own(net=DropoutInside()),
        {"train": ["net.head.*"]},
        (),
        {},
        "scores differ if it is given it, by",
    ),
    "mixup": (lambda: Own(mixup=0.2), TRUNK, (), {}, "mixup mixes images"),
    "augmentation": (Own, TRUNK, (), {"data": {"augment": {"shift": 2}}}, "augmentation changes"),
    "a training step": (OwnStep, TRUNK, (), {}, "OwnStep overrides training_step"),
    "a validation step": (OwnValidation, TRUNK, (), {}, "OwnValidation overrides validation_step"),
    "a callback": (Own, TRUNK, (Reads,), {}, "Reads sees each mini-batch"),
    "a callback in validation": (Own, TRUNK, (ReadsValidation,), {}, "ReadsValidation sees"),
    "a data module": (Own, TRUNK, (), {"kind": OwnData}, "OwnData overrides preprocess"),
    "a loader": (Own, TRUNK, (), {"kind": OwnLoader}, "OwnLoader overrides val_dataloader"),
    "overfit_batches": (Own, TRUNK, (), {"overfit_batches": 2}, "own loader"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_anything_else_takes_the_ordinary_way(
    case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make, freezing, callbacks, settings, message = REFUSED[case]
    runs = []
    for cache in (True, False):
        run = Run(make, freezing, *(c() for c in callbacks), cache=cache, max_epochs=2, **settings)
        said = capsys.readouterr().out
        assert bool(re.search(f"computed in each epoch: .*({message})", said)) == cache
        assert all(run.seen.computed)
        runs.append(run)
    assert same(*runs)


class Backwards(Staged):
    stages = ("body", "stem")


def test_stages_in_another_order(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(lambda: Own(net=Backwards()), {"train": ["net.head.*"]})
    assert "in each epoch: a trial with their output failed: " in capsys.readouterr().out
    assert all(run.seen.computed)


def test_only_the_last_mini_batch_of_an_epoch_passes_frozen_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []

    class Counted(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            sizes.append(len(x))
            return super().forward(x)

    def counted() -> Own:
        model = Own()
        model.net[0][0].__class__ = Counted
        return model

    monkeypatch.setattr(features, "_KNOWN", {*features._KNOWN, Counted})
    Run(counted, TRUNK, max_epochs=3)
    assert sizes[-3:] == [6] * 3
    assert sizes[-5:-3] == [20, 16]  # of the first pass: the rest of validation, and a check
    assert sizes.count(16) > 10


class Rescales(Own):
    """Changes a frozen layer in a hook that is called after those of all callbacks."""

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        if self.current_epoch == 1:
            with torch.no_grad():
                self.net[0][0].weight.mul_(2)


def test_a_change_in_the_last_hook_before_an_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    runs = [Run(Rescales, TRUNK, cache=cache) for cache in (True, False)]
    assert capsys.readouterr().out.count("frozen layers are computed again") == 1
    assert same(*runs)


@pytest.mark.parametrize("settings", [{"max_epochs": 1}, {"fast_dev_run": 3}, {"max_steps": 12}])
def test_nothing_is_kept_for_a_short_training(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    Run(Own, TRUNK, **settings)
    assert "computed" not in capsys.readouterr().out


class Uses(pl.Callback):
    """Uses the network and the loaders between two epochs: with images, as without the cache."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def note(self, *args: Any) -> None:
        self.found.append(args[2])

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        for loader in (trainer.val_dataloaders, trainer.train_dataloader, data.val_dataloader()):
            images, labels = next(iter(loader))
            assert images.dtype == torch.uint8
            pixels = data.on_after_batch_transfer((images, labels), 0)[0]
            handle = pl_module.net[0][1].register_forward_hook(self.note)
            with torch.no_grad():
                self.found += [pl_module(pixels), copy.deepcopy(pl_module)(pixels)]
                self.found.append(pl_module.net[0](pixels))
            handle.remove()


class Changes(pl.Callback):
    """Changes something before the third epoch, or its validation."""

    def __init__(self, hook: str, change: Callable[[Any], Any]) -> None:
        self.change = change
        setattr(self, hook, self.act)

    def act(self, trainer: pl.Trainer, module: Any) -> None:
        if trainer.current_epoch == 2:
            with torch.no_grad():
                self.change(module)


def test_callbacks_between_epochs_use_the_whole_network() -> None:
    kept, plain = Uses(), Uses()
    assert same(Run(Own, TRUNK, kept), Run(Own, TRUNK, plain, cache=False))
    assert len(kept.found) > 30
    assert all(map(torch.equal, kept.found, plain.found))


@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_validation_start"])
@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.net[0][0].weight.mul_(2),
        lambda module: module.net[0][1].running_mean.data.add_(1),
        lambda module: module.net[0][0].register_forward_hook(lambda *args: args[2] + 1),
        lambda module: module.net.__setitem__(0, copy.deepcopy(module.net[0])),
        lambda module: module.net[0].__setitem__(3, nn.Tanh()),
    ],
    ids=["weights", "statistics", "hook", "stage", "layer"],
)
def test_a_change_ends_it(
    hook: str, change: Callable[[Any], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    kept = Run(Own, TRUNK, Changes(hook, change), max_epochs=4)
    assert capsys.readouterr().out.count("have changed: frozen layers are computed again") == 1
    assert kept.seen.computed == [False, False, True, True]
    assert same(kept, Run(Own, TRUNK, Changes(hook, change), max_epochs=4, cache=False))


def test_early_stopping() -> None:
    def stopping() -> EarlyStopping:
        return EarlyStopping("val/acc", mode="max", patience=1)

    runs = [Run(Own, TRUNK, stopping(), cache=cache, max_epochs=20) for cache in (True, False)]
    assert same(*runs)
    assert len(runs[0].seen.logged) < 20


class Cut(Exception):
    pass


class CutsIn(pl.Callback):
    """Ends a training when a checkpoint after this step is about to be saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save_checkpoint(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step > self.step:
            raise Cut


@pytest.mark.parametrize("step", [20, 25], ids=["after an epoch", "within an epoch"])
def test_resuming(tmp_path: Path, step: int) -> None:
    """With the cache, without it, and with it after a training without."""
    freezing, last = {"freeze": ["net.stage1.*"]}, tmp_path / "last.ckpt"

    def train(*more: pl.Callback, **settings: Any) -> Run:
        how: dict[str, Any] = {"enable_version_counter": False, "save_on_train_epoch_end": True}
        saver = ModelCheckpoint(tmp_path, "last", **how)
        files = {"enable_checkpointing": True, "max_epochs": 4, "fails": Cut}
        return Run(conv, freezing, SafePoints(0), saver, *more, **files, **settings)

    whole = train(cache=False)
    for before, after in ((True, True), (False, True), (True, False)):
        train(CutsIn(step), cache=before)
        assert torch.load(last, weights_only=True)["global_step"] == step
        assert last.stat().st_size < 40_000  # without the features
        resumed = train(ckpt_path=last, cache=after)
        assert same_weights(resumed.model, whole.model)
        assert resumed.seen.logged[-1] == whole.seen.logged[-1]


class Fails(pl.Callback):
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        raise OSError("no")


def test_an_exception_ends_it() -> None:
    run = Run(Own, TRUNK, Fails(), fails=OSError)
    run.trainer = trainer(max_epochs=2)
    run.trainer.fit(run.model, run.data)


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache; there is no memory for features."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(features, "available_bytes", lambda: 1000)
    monkeypatch.setattr(frozen_cache, "DISK_SPEED", math.inf)
    return tmp_path / "mnist_lightning"


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are written."""
    names: list[str] = []
    write = features.Store.write

    def noted(store: Any, key: str, parts: Any) -> Tensor:
        names.append(key)
        return write(store, key, parts)

    monkeypatch.setattr(features.Store, "write", noted)
    return names


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_file(
    cache_folder: Path,
    written: list[str],
    precision: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is found again by another training, and made anew for other weights or data."""
    plain = Run(Own, TRUNK, cache=False, precision=precision)
    other = {"batch_size": 32}

    def heavier() -> Own:
        model = Own()
        model.net[0][0].weight.data.mul_(2)
        return model

    for count, make, data in ((1, Own, {}), (1, Own, {}), (2, heavier, {}), (3, heavier, other)):
        run = Run(make, TRUNK, data=data, precision=precision)
        assert f"MB in {cache_folder}; an epoch" in capsys.readouterr().out
        assert same(run, plain) == (count == 1)
        assert len(written) == len(set(written)) == count
        assert {p.suffix for p in cache_folder.iterdir()} == {".bin", ".json"}
        assert len(list(cache_folder.iterdir())) == 2


@pytest.mark.parametrize("damage", ["a byte", "the end", "the checksum", "no checksum"])
def test_a_damaged_file_is_made_anew(cache_folder: Path, written: list[str], damage: str) -> None:
    plain = Run(Own, TRUNK)
    (file,) = cache_folder.glob("*.bin")
    content = bytearray(file.read_bytes())
    if damage == "a byte":
        content[1000] ^= 1
        file.write_bytes(content)
    elif damage == "the end":
        os.truncate(file, len(content) - 4)
    elif damage == "the checksum":
        file.with_suffix(".json").write_text("{")
    else:
        file.with_suffix(".json").unlink()
    damaged = file.read_bytes()
    assert same(Run(Own, TRUNK), plain)
    assert len(written) == 2
    assert file.read_bytes() != damaged or damage.endswith("checksum")
    assert same(Run(Own, TRUNK), plain)
    assert len(written) == 2


def test_a_full_disk(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The layers are then computed in each epoch, which one line says."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    plain = Run(Own, TRUNK, cache=False)
    capsys.readouterr()
    monkeypatch.setattr(os, "posix_fallocate", full)
    assert same(Run(Own, TRUNK), plain)
    line = f"each epoch: {cache_folder} cannot be written: no space left on device"
    assert line in capsys.readouterr().out
    assert not list(cache_folder.iterdir())
    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: SimpleNamespace(free=1e4))
    assert same(Run(Own, TRUNK), plain)
    assert "more than half of the memory (0.0 MB) and of the disk" in capsys.readouterr().out


def test_a_slow_disk(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(frozen_cache, "DISK_SPEED", 1)
    Run(Own, TRUNK)
    line = "each epoch: reading their output from the disk may take longer than computing it"
    assert line in capsys.readouterr().out


def test_a_stop_within_the_first_pass(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []

    def stopping(self: Any) -> bool:
        calls.append(1)
        return len(calls) == 3

    monkeypatch.setattr(pl.Trainer, "received_sigterm", property(stopping))
    run = Run(Own, TRUNK)
    assert "computed in each epoch: the training stops" in capsys.readouterr().out
    assert all(run.seen.computed)


def test_a_linear_probe_takes_many_steps_in_one_execution() -> None:
    run = Run(conv, {"train": ["net.output.*"]}, max_epochs=2)
    (execution,) = (c for c in run.trainer.callbacks if isinstance(c, Execution))
    assert str(execution._announced).startswith("steps per execution: 256, autograd")
    plain = Run(conv, {"train": ["net.output.*"]}, max_epochs=2, cache=False)
    (execution,) = (c for c in plain.trainer.callbacks if isinstance(c, Execution))
    assert str(execution._announced).startswith("one step at a time")


def test_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = "fit --config shallow.yaml --data.source digits --freezing.train+ net.output.*"
    words += " --trainer.max_epochs 2 --freezing.cache"
    for cache in ("true", "false"):
        assert main([*words.split(), cache]) == 0
        line = "frozen layers up to net.relu1: computed once for 1,617 images"
        assert (line in capsys.readouterr().out) == (cache == "true")
    one, two = (
        torch.load(file, weights_only=True)["state_dict"]
        for file in sorted(tmp_path.glob("lightning_logs/shallow/*/checkpoints/best.ckpt"))
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_gpu_keeps_features_in_its_own_memory_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would fetch them from elsewhere more slowly than it computes them."""
    layout = features.Layout((256, 14, 14), (196, 14, 1), torch.bfloat16)
    gpu = torch.device("cuda", 0)
    free = {gpu: 2 * 63_000 * layout.size * 2}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device], 10**12))
    store = features.Store(63_000, layout, gpu)
    assert (store.in_memory, str(store)) == (True, "6.3 GB in the GPU's memory")
    free[gpu] -= 1
    with pytest.raises(features.NoCache, match=r"6\.3 GB, more than half of the GPU's free memory"):
        features.Store(63_000, layout, gpu)
