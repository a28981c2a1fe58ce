"""Frozen layers that are computed once: the same training as with --freezing.cache false."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
from conftest import same_weights, trainer
from torch import Tensor, nn

from mnist_lightning import ConvNetwork, LayerFreezing, MNISTDataModule, ResNet18, ShallowNetwork
from mnist_lightning.models.classifier import Classifier
from mnist_lightning.training.features import computed


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
        for part in self.model.modules():
            assert "forward" not in vars(part)
        assert self.data.train_set.features is self.data.val_set.features is None


def same(one: Run, other: Run) -> bool:
    return same_weights(one.model, other.model) and one.seen.logged == other.seen.logged


TRUNK = {"freeze": ["net.0.*"]}
CASES: dict[str, tuple[Callable[[], Classifier], dict[str, Any], dict[str, Any]]] = {
    "ConvNetwork": (conv, {"freeze": ["net.stage1.*"]}, {}),
    "linear probe": (conv, {"train": ["net.output.*"]}, {}),
    "hidden layer": (lambda: ShallowNetwork(20), {"train": ["net.output.*"]}, {}),
    "ResNet18": (
        lambda: ResNet18(small_images=True, lr=0.001),
        {"train": ["net.layer4.*", "net.fc.*"]},
        {"limit_train_batches": 4, "max_epochs": 4},
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
    "sanity check": (Own, TRUNK, {"num_sanity_val_steps": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_training(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights and metrics have the same bits, also in half and double precision."""
    make, freezing, settings = CASES[case]
    data = {"image_size": 16} if case == "ResNet18" else {}
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
