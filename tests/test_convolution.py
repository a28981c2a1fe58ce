"""Tests ConvNetwork: its shapes, its parameters, its training and its layers' names."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from conftest import same_weights, trainer
from torch import nn

from mnist_lightning import ConvNetwork, LayerFreezing, MNISTDataModule
from mnist_lightning.nets import conv_net
from mnist_lightning.spec import DataSpec


def spec(channels: int, size: int, classes: int) -> DataSpec:
    names = tuple(str(number) for number in range(classes))
    return DataSpec(channels, size, size, names, (0.5,) * channels, (0.25,) * channels)


@pytest.mark.parametrize("hidden_units", [0, 7])
@pytest.mark.parametrize(
    ("channels", "size", "classes"), [(1, 28, 10), (3, 32, 10), (3, 64, 2), (1, 28, 62), (3, 9, 3)]
)
def test_shapes(channels: int, size: int, classes: int, hidden_units: int) -> None:
    model = ConvNetwork([4, 6, 8], hidden_units=hidden_units, spec=spec(channels, size, classes))
    assert model(torch.rand(5, channels, size, size)).shape == (5, classes)


def test_images_may_be_wider_than_high() -> None:
    net = conv_net((3, 20, 44), [4, 6], 5, hidden_units=7)
    assert net.hidden.in_features == 6 * 5 * 11  # type: ignore[union-attr]
    assert net(torch.rand(2, 3, 20, 44)).shape == (2, 5)


def test_parameters_by_hand() -> None:
    """Filters without bias, two values a channel for BatchNorm, the output's weights and biases."""
    averaged = 9 * 1 * 32 + 9 * 32 * 32 + 9 * 32 * 64 + 9 * 64 * 64 + 2 * 2 * (32 + 64)
    averaged += 64 * 10 + 10
    assert _parameters(conv_net((1, 28, 28), [32, 64], 10)) == averaged == 65_834

    hidden = 25 * 3 * 8 + 25 * 8 * 16 + 2 * (8 + 16) + (16 * 8 * 8 * 50 + 50) + 50 * 10 + 10
    net = conv_net((3, 32, 32), [8, 16], 10, convolutions=1, kernel_size=5, hidden_units=50)
    assert _parameters(net) == hidden


def _parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def test_each_stage_halves_the_image_before_its_second_convolution() -> None:
    net, image, sizes = conv_net((1, 28, 28), [3, 5, 7], 10), torch.rand(2, 1, 28, 28), []
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[-1]))
    net(image)
    assert sizes == [28, 14, 14, 7, 7, 3]


def test_the_network_by_hand() -> None:
    """Equals the same layers, called one by one."""
    torch.manual_seed(0)
    net = conv_net((1, 12, 12), [3, 4], 10, dropout=0.5).eval()
    x = torch.rand(6, 1, 12, 12)
    expected = x
    for stage in (net.stage1, net.stage2):
        expected = nn.functional.conv2d(expected, stage.conv1.weight, padding=1)
        expected = nn.functional.max_pool2d(expected, 2)
        expected = stage.norm1(expected).relu()
        expected = nn.functional.conv2d(expected, stage.conv2.weight, padding=1)
        expected = stage.norm2(expected).relu()
    expected = expected.mean((2, 3)) @ net.output.weight.T + net.output.bias
    torch.testing.assert_close(net(x), expected)


def test_dropout_is_only_in_training() -> None:
    net = conv_net((1, 12, 12), [4, 8], 10, dropout=0.5)
    images = torch.rand(6, 1, 12, 12)
    net.eval()
    assert torch.equal(net(images), net(images))
    net.train()
    assert not torch.equal(net(images), net(images))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"widths": []}, "widths must be one or more numbers above 0"),
        ({"widths": [8, 0]}, "widths must be one or more numbers above 0"),
        ({"widths": [4] * 5}, "5 stages.*need 32 pixels a side, the images have 28 x 28"),
        ({"convolutions": 0}, "convolutions must be at least 1"),
        ({"kernel_size": 4}, "kernel_size must be odd"),
        ({"hidden_units": -1}, "hidden_units must be 0 or more"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
    ],
)
def test_refuses(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvNetwork(**{"widths": [8], **settings})  # type: ignore[arg-type]


def small() -> ConvNetwork:
    return ConvNetwork([8, 16], dropout=0.1, lr=0.01)


@pytest.mark.slow
def test_trains(digits: MNISTDataModule) -> None:
    """Every weight changes, and the digits are recognised."""
    pl.seed_everything(0, verbose=False)
    model = small()
    before = [parameter.clone() for parameter in model.parameters()]
    fit = trainer(max_epochs=5)
    fit.fit(model, digits)
    assert fit.callback_metrics["val/acc"] > 0.85
    for old, new in zip(before, model.parameters(), strict=True):
        assert not torch.equal(old, new)


def test_same_seed_is_bit_equal() -> None:
    trained = []
    for seed in (1, 1, 2):
        pl.seed_everything(seed, verbose=False)
        model = small()
        trainer().fit(model, MNISTDataModule(source="digits"))
        trained.append(model)
    assert same_weights(trained[0], trained[1])
    assert not same_weights(trained[0], trained[2])


def test_a_stage_can_be_frozen_by_its_name(digits: MNISTDataModule) -> None:
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer(callbacks=[LayerFreezing(freeze=["net.stage1.*"])]).fit(model, digits)
    kept = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    assert kept == {name for name in before if name.startswith("net.stage1.")}


def test_checkpoint_round_trip(digits: MNISTDataModule, tmp_path: Path) -> None:
    """Of a network with other arguments than the defaults, for other images than MNIST's."""
    model = ConvNetwork([4, 6], 1, 5, 7, 0.1, 0.05, "sgd", spec(1, 28, 10))
    fit = trainer()
    fit.fit(model, digits)
    fit.save_checkpoint(tmp_path / "model.ckpt")
    loaded = ConvNetwork.load_from_checkpoint(tmp_path / "model.ckpt")
    assert same_weights(model, loaded)
    assert loaded.spec == model.spec
    assert loaded.hparams == model.hparams
    assert loaded.net.stage1.conv1.weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[union-attr]
