"""Compares ResNet-18 with torchvision's, and loads weights from good and bad files."""

import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import same_weights, trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights, resnet18

from mnist_lightning import LayerFreezing, MNISTDataModule, ResNet18
from mnist_lightning.__main__ import main
from mnist_lightning.data.module import NORMALIZATIONS
from mnist_lightning.models.optimization import one_cycle
from mnist_lightning.spec import DataSpec

FEW = {"limit_train_batches": 2, "limit_val_batches": 1}


@pytest.fixture
def digits() -> MNISTDataModule:
    return MNISTDataModule(source="digits", batch_size=8, eval_batch_size=8)


@pytest.fixture
def official(resnet18_file: Path) -> nn.Module:
    """Torchvision's network with three channels, 1,000 classes and the weights of the file."""
    net = resnet18()
    net.load_state_dict(torch.load(resnet18_file, weights_only=True))
    return net.eval()


def model(*args: Any, **settings: Any) -> ResNet18:
    torch.manual_seed(1)
    return ResNet18(*args, **{"lr": 0.001, "optimizer": "sgd", **settings})


def test_parameters() -> None:
    net = ResNet18().net
    assert sum(p.numel() for p in net.parameters()) == 11_175_370
    assert net.conv1.weight.numel() == 3_136
    assert sum(p.numel() for p in net.fc.parameters()) == 5_130


def test_layer_table_is_the_studys(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The study's table 4.1: 68 layers, for images of 28 x 28 pixels. Nothing is downloaded."""
    monkeypatch.chdir(tmp_path)
    words = "inspect --config resnet18_finetune.yaml --data.image_size 28 --data.source digits"
    assert main(words.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split(maxsplit=1) for line in lines if "[-1," in line]
    assert len(rows) == 68
    expected = {
        "Conv2d-1": "[-1, 64, 14, 14] 3,136",
        "MaxPool2d-4": "[-1, 64, 7, 7] 0",
        "BasicBlock-11": "[-1, 64, 7, 7] 0",
        "Conv2d-51": "[-1, 512, 1, 1] 1,179,648",
        "Conv2d-56": "[-1, 512, 1, 1] 131,072",
        "BatchNorm2d-57": "[-1, 512, 1, 1] 1,024",
        "BasicBlock-66": "[-1, 512, 1, 1] 0",
        "AdaptiveAvgPool2d-67": "[-1, 512, 1, 1] 0",
        "Linear-68": "[-1, 10] 5,130",
    }
    assert expected.items() <= {name: " ".join(rest.split()) for name, rest in rows}.items()
    assert "Total params: 11,175,370" in lines


def test_scratch_is_torchvisions_initialisation() -> None:
    """Same output channels and kernels, therefore the same standard deviations."""
    ours, theirs = ResNet18().net.state_dict(), resnet18().state_dict()
    for name, value in ours.items():
        if value.ndim == 4:
            assert value.std().item() == pytest.approx(theirs[name].std().item(), rel=0.1)


@torch.no_grad()
def test_summed_stem_is_the_gray_image_three_times(
    official: nn.Module, resnet18_file: Path
) -> None:
    """Compares every pixel of the stem's output, with the border; then the network's scores."""
    ours = model("finetune", str(resnet18_file), "sum")
    ours.load_pretrained()
    net, official = ours.net.eval().double(), official.double()
    net.fc = official.fc
    data = MNISTDataModule(source="digits", image_size=64, normalization="imagenet")
    gray = data.preprocess(torch.randint(0, 256, (4, 28, 28), dtype=torch.uint8)).double()
    assert gray[:, :, 0].abs().min() > 0  # with a border of zeros, padding would not matter
    three = gray.expand(-1, 3, -1, -1)
    # In double precision. The summed filters were rounded to single precision.
    stem = official.conv1(three)
    torch.testing.assert_close(net.conv1(gray), stem, rtol=0, atol=1e-7 * stem.abs().max().item())
    torch.testing.assert_close(net(gray), official(three), rtol=1e-5, atol=1e-6)


def test_imagenet_normalization_is_the_mean_of_its_channels() -> None:
    """Checks the docstring's numbers on one normalisation scalar for three channels."""
    preset = ResNet18_Weights.IMAGENET1K_V1.transforms()
    mean, std = NORMALIZATIONS["imagenet"]
    assert mean == pytest.approx(sum(preset.mean) / 3, abs=5e-4)
    assert std == pytest.approx(sum(preset.std) / 3, abs=5e-4)
    assert [round(std / s, 3) for s in preset.std] == [0.987, 1.009, 1.004]
    shift = [(mean - m) / s for m, s in zip(preset.mean, preset.std, strict=True)]
    assert [round(s, 2) for s in shift] == [-0.16, -0.03, 0.19]


@pytest.mark.parametrize("stem", ["sum", "reset"])
def test_what_is_taken_from_the_file(official: nn.Module, resnet18_file: Path, stem: Any) -> None:
    ours = model("finetune", str(resnet18_file), stem)
    first = {name: ours.net.state_dict()[name].clone() for name in ("conv1.weight", "fc.weight")}
    ours.load_pretrained()
    loaded, theirs = ours.net.state_dict(), official.state_dict()
    trunk = [name for name in loaded if name.split(".")[0] not in ("conv1", "fc")]
    assert all(loaded[name].equal(theirs[name]) for name in trunk)
    assert loaded["fc.weight"].equal(first["fc.weight"])
    drawn_anew = loaded["conv1.weight"].equal(first["conv1.weight"])
    assert drawn_anew == (stem == "reset")


def blocks_changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name.split(".")[0] for name in after if not after[name].equal(before[name])}


EVERYTHING = {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"}


@pytest.mark.parametrize(
    ("regime", "callbacks", "moves"),
    [
        ("finetune", [], EVERYTHING),
        ("freeze", [], {"layer4", "fc"}),
        # the callback's patterns take precedence over the regime
        ("freeze", [LayerFreezing(train=["net.fc.*"])], {"fc"}),
        (
            "freeze",
            [LayerFreezing(batch_norm="adapt")],
            {"bn1", "layer1", "layer2", "layer3", "layer4", "fc"},
        ),
    ],
)
def test_regimes_in_plain_python(
    official: nn.Module,
    resnet18_file: Path,
    digits: MNISTDataModule,
    regime: Any,
    callbacks: list[Callback],
    moves: set[str],
) -> None:
    """``fit`` starts from the file and changes the weights and statistics of the regime only."""
    ours = model(regime, str(resnet18_file), lr=0.01)
    fc = ours.net.fc.weight.clone()
    trainer(callbacks=callbacks, **FEW).fit(ours, digits)
    expected = {**official.state_dict(), "fc.weight": fc, "fc.bias": torch.zeros(10)}
    expected["conv1.weight"] = expected["conv1.weight"].sum(1, keepdim=True)
    after = ours.net.state_dict()
    assert blocks_changed(expected, after) == moves
    if callbacks and "bn1" in moves:  # of the frozen layers, only the statistics change
        changed = {n for n in after if not after[n].equal(expected[n])}
        frozen = {n for n in changed if n.split(".")[0] not in ("layer4", "fc")}
        assert all(n.endswith(("running_mean", "running_var", "tracked")) for n in frozen)


def test_who_has_weights_needs_no_pretrained_ones(
    resnet18_file: Path, digits: MNISTDataModule, tmp_path: Path
) -> None:
    """Test, resume, train and predict work without the file of pretrained weights."""
    file = tmp_path / "pretrained.pth"
    file.symlink_to(resnet18_file)
    ours, fit = model("finetune", str(file)), trainer(**FEW)
    fit.fit(ours, digits)
    checkpoint = tmp_path / "last.ckpt"
    fit.save_checkpoint(checkpoint)
    file.unlink()
    loaded = ResNet18.load_from_checkpoint(checkpoint)
    assert same_weights(loaded, ours)
    trainer(limit_test_batches=1).test(ResNet18("finetune", str(file)), digits, checkpoint)
    resumed = model("finetune", str(file))
    trainer(max_epochs=2, **FEW).fit(resumed, digits, ckpt_path=checkpoint)
    trainer(**FEW).fit(loaded, digits)
    with pytest.raises(ValueError, match=r"there is no file .*pretrained.pth"):
        trainer(**FEW).fit(model("finetune", str(file)), digits)


def _write(content: object, file: Path) -> None:
    if file.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(content, file)
    else:
        torch.save(content, file)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "change",
    [
        lambda s: s,
        lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")},
        lambda s: {k: v for k, v in s.items() if not k.startswith("fc.")},
        lambda s: {**s, "conv1.weight": s["conv1.weight"][:, :1].contiguous()},
        lambda s: {**s, "conv1.weight": s["conv1.weight"].half()},
    ],
    ids=["whole", "old", "trunk", "gray", "half"],
)
def test_files_that_fit(
    official: nn.Module, tmp_path: Path, suffix: str, change: Callable[[dict], dict]
) -> None:
    file = tmp_path / f"weights{suffix}"
    _write(change(official.state_dict()), file)
    ours = model("finetune", str(file))
    ours.load_pretrained()
    assert ours.net.layer4[1].conv2.weight.equal(official.layer4[1].conv2.weight)
    assert ours.net.conv1.weight.shape == (64, 1, 7, 7)
    assert ours.net.conv1.weight.dtype == torch.float32


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: {f"module.{k}": v for k, v in s.items()},
            "missing: bn1.bias, .* 95 more; unexpected: module.bn1.bias, ",
        ),
        (
            lambda s: {k: v for k, v in s.items() if k != "layer2.0.downsample.0.weight"},
            "missing: layer2.0.downsample.0.weight$",
        ),
        (lambda s: {**s, "layer5.weight": torch.ones(1)}, "unexpected: layer5.weight$"),
        (
            lambda s: {**s, "conv1.weight": torch.ones(64, 3, 3, 3)},
            "wrong shape: conv1.weight$",
        ),
        (lambda s: {**s, "conv1.weight": torch.ones(64, 2, 7, 7)}, "wrong shape: conv1.weight$"),
        (lambda s: {**s, "conv1.weight": torch.tensor(1.0)}, "wrong shape: conv1.weight$"),
        (lambda s: [s], "not a state dict"),
        (lambda s: {"state_dict": s}, "not a state dict"),
        (lambda s: nn.Linear(1, 1), "holds code besides tensors: refused"),
    ],
    ids=["prefix", "one", "left", "kernel", "two", "scalar", "list", "checkpoint", "module"],
)
def test_files_that_do_not_fit(
    official: nn.Module, tmp_path: Path, change: Callable[[dict], Any], message: str
) -> None:
    file = tmp_path / "weights.pth"
    torch.save(change(official.state_dict()), file)
    with pytest.raises(ValueError, match=message) as failure:
        model("finetune", str(file)).load_pretrained()
    assert str(file) in str(failure.value)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 10, 1_000, 40_000_000])
def test_damaged_files(official: nn.Module, tmp_path: Path, suffix: str, keep: int) -> None:
    file = tmp_path / f"weights{suffix}"
    _write(official.state_dict(), file)
    os.truncate(file, keep)
    with pytest.raises(ValueError, match=r"is damaged, or not a (PyTorch|safetensors) file"):
        model("finetune", str(file)).load_pretrained()


@pytest.mark.parametrize("new_format", [True, False])
def test_code_is_refused_and_not_run(tmp_path: Path, new_format: bool) -> None:
    file, marker = tmp_path / "weights.pth", tmp_path / "it ran"
    if new_format:
        torch.save({"conv1.weight": Malicious(marker)}, file)
    else:
        file.write_bytes(pickle.dumps(Malicious(marker)))
    with pytest.raises(ValueError, match=r"holds code .*refused, and nothing was run"):
        model("finetune", str(file)).load_pretrained()
    assert not marker.exists()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Torchvision's cache is empty, and there is no network."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    return tmp_path / "hub" / "checkpoints"


def test_the_cache_is_used(cache: Path, official: nn.Module) -> None:
    cache.mkdir(parents=True)
    torch.save(official.state_dict(), cache / "resnet18-f37072fd.pth")
    ours = model("finetune")
    ours.load_pretrained()
    assert ours.net.layer4[1].conv2.weight.equal(official.layer4[1].conv2.weight)


def test_without_network_one_line_says_what_to_put_where(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command also leaves no run folder."""
    monkeypatch.chdir(tmp_path)
    assert main("fit --config resnet18_finetune.yaml --data.source digits".split()) == 1
    message = capsys.readouterr().err
    assert f"resnet18-f37072fd.pth is not in {cache}" in message
    assert "no network" in message
    assert "--model.weights FILE" in message
    assert message.count("\n") <= 2
    assert not (tmp_path / "lightning_logs").exists()


@pytest.mark.parametrize(
    "settings", [{"regime": "thaw"}, {"stem": "mean"}, {"schedule": "sine"}, {"lr": 0.0}]
)
def test_bad_arguments(settings: dict[str, Any]) -> None:
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"{name} must be .*{value}"):
        ResNet18(**settings)


@pytest.mark.parametrize("capable", [True, False])
def test_processors_without_bf16_are_told(
    digits: MNISTDataModule, monkeypatch: pytest.MonkeyPatch, capable: bool
) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": capable})
    few = {"limit_train_batches": 1, "limit_val_batches": 0, "precision": "bf16-mixed"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(**few).fit(model(), digits)
    told = any("--trainer.precision 32-true is faster" in str(w.message) for w in caught)
    assert told != capable


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 1000])
def test_one_cycle(steps: int) -> None:
    """Linear rise over a quarter of the steps, linear fall over the rest; always in [0, 1]."""
    shares = [one_cycle(step, steps) for step in range(steps)]
    top = shares.index(1.0)
    assert top == max(1, steps // 4) - 1
    assert all(share > 0 for share in shares)
    rise, fall = torch.tensor(shares[: top + 1]).diff(), torch.tensor(shares[top:]).diff()
    for slope in (rise, fall):
        assert torch.allclose(slope, slope[:1].expand_as(slope), atol=1e-6)
    assert one_cycle(steps, steps) == 0


class Rates(Callback):
    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_schedule_goes_on_where_it_was(digits: MNISTDataModule, tmp_path: Path) -> None:
    """A resumed training has the same rates and weights; with another lr, scaled rates."""
    straight, whole, checkpoint = Rates(), None, tmp_path / "second.ckpt"

    class Save(Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(checkpoint)

    settings = {"max_epochs": 4, "limit_train_batches": 2, "limit_val_batches": 0}
    pl.seed_everything(2, verbose=False)
    whole = model(schedule="one_cycle", lr=0.1)
    trainer(callbacks=[straight, Save()], **settings).fit(whole, digits)
    assert straight.rates == pytest.approx([0.1 * one_cycle(step, 8) for step in range(8)])
    for lr in (0.1, 0.01):
        rates, resumed = Rates(), model(schedule="one_cycle", lr=lr)
        trainer(callbacks=[rates], **settings).fit(
            resumed, digits, ckpt_path=checkpoint, weights_only=True
        )
        assert rates.rates == pytest.approx([lr * one_cycle(step, 8) for step in range(4, 8)])
        assert same_weights(resumed, whole) == (lr == 0.1)


@pytest.mark.slow
def test_compiling_changes_speed_alone(digits: MNISTDataModule) -> None:
    """The names of the weights are equal, the values up to rounding."""
    trained = [model(lr=0.01, compile=compile) for compile in (False, True)]
    for each in trained:
        trainer(limit_train_batches=1, limit_val_batches=0).fit(each, digits)
    plain, compiled = (each.state_dict() for each in trained)
    assert plain.keys() == compiled.keys()
    for name in plain:
        torch.testing.assert_close(plain[name], compiled[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_small_config_learns_mnist(mnist_dir: Path, tmp_path: Path) -> None:
    """One epoch of the recipe for small machines; its file has the results of the whole recipe."""
    words = (
        f"fit --config resnet18_small.yaml --data.data_dir {mnist_dir} --trainer.max_epochs 1"
        f" --early_stopping.enabled false --trainer.default_root_dir {tmp_path}"
    )
    assert main(words.split()) == 0
    run = tmp_path / "lightning_logs" / "resnet18_small" / "version_0"
    last = (run / "metrics.csv").read_text().splitlines()[-1].split(",")
    header = (run / "metrics.csv").read_text().splitlines()[0].split(",")
    assert float(last[header.index("val/acc")]) > 0.975


COLOUR = DataSpec(3, 32, 32, ("cat", "dog", "ship"), (0.5,) * 3, (0.25,) * 3, drawn=False)


def test_three_channels_keep_the_pretrained_stem(official: nn.Module, tmp_path: Path) -> None:
    """The trunk computes what torchvision's network computes on the same colour images."""
    torch.save(official.state_dict(), tmp_path / "w.pth")
    ours = ResNet18("finetune", str(tmp_path / "w.pth"), spec=COLOUR).eval()
    ours.load_pretrained()
    official.eval()
    official.fc = nn.Identity()
    ours.net.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), official(images))


def test_the_stem_for_small_images() -> None:
    """As usual for CIFAR-10: torchvision's network, its first convolution and pooling replaced."""
    ours = ResNet18(small_images=True, spec=COLOUR).eval()
    theirs = resnet18(num_classes=3)
    theirs.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    theirs.maxpool = nn.Identity()
    theirs.load_state_dict(ours.net.state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(images), theirs.eval()(images))
    assert sum(p.numel() for p in ours.parameters()) == 11_170_371


@pytest.mark.slow
def test_weights_from_a_run_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of the network but its last layer; the folder of the run is enough."""
    monkeypatch.chdir(tmp_path)
    line = (
        "fit --model ResNet18 --data.source digits --data.batch_size 8 --data.eval_batch_size 64"
        " --trainer.max_epochs 1 --trainer.limit_train_batches 2 --trainer.limit_val_batches 1"
    )
    assert main(line.split()) == 0
    again = f"{line} --model.regime freeze --model.weights lightning_logs/ResNet18"
    assert main([*again.split(), "--config", "resnet18_freeze", "--data.image_size", "28"]) == 0
    first, second = (
        torch.load(f"lightning_logs/{run}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for run in ("ResNet18/version_0", "resnet18_freeze/version_0")
    )
    frozen = [name for name in first if name.startswith(("net.conv1", "net.layer1", "net.layer3"))]
    assert len(frozen) > 20
    assert all(torch.equal(first[name], second[name]) for name in frozen)
    assert not torch.equal(first["net.fc.weight"], second["net.fc.weight"])
    wrong = f"{line} --model.regime finetune --model.small_images true"
    assert main([*wrong.split(), "--model.weights", "lightning_logs/ResNet18"]) == 1
    assert "wrong shape: conv1.weight" in capsys.readouterr().err
