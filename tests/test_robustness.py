"""Robustness: the changes against SciPy, the counts, and the command."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from mnist_lightning import DataSpec, MNISTDataModule, ShallowNetwork
from mnist_lightning.__main__ import main
from mnist_lightning.insight import robustness
from mnist_lightning.insight.robustness import kinds
from mnist_lightning.runs import evaluations

RUN = Path("lightning_logs/shallow/version_0")
KINDS = kinds(DataSpec())
NONE = {"scale": 1.0}  # the strength that changes nothing, where it is not 0


@pytest.fixture
def images(digits: MNISTDataModule) -> torch.Tensor:
    digits.setup()
    return digits.test_set.images[:6, None].float() / 255


NUMBERS = torch.arange(6)


def test_there_are_seven_kinds_of_five_strengths() -> None:
    assert [kind.name for kind in KINDS] == (
        "shift rotation scale noise blur contrast thickness".split()
    )
    assert all(len(kind.strengths) == 5 for kind in KINDS)
    photo = DataSpec(3, 32, 32, mean=(0,) * 3, std=(1,) * 3, drawn=False)
    assert "thickness" not in [kind.name for kind in kinds(photo)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_without_strength_nothing_changes(kind: robustness.Kind, images: torch.Tensor) -> None:
    same = kind.change(images, NUMBERS, 0, NONE.get(kind.name, 0.0))
    assert torch.allclose(same, images, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_change_follows_from_the_seed_and_the_images_number(
    kind: robustness.Kind, images: torch.Tensor
) -> None:
    strength = kind.strengths[-1]
    changed = kind.change(images, NUMBERS, 3, strength)
    assert changed.shape == images.shape
    assert torch.equal(changed, kind.change(images, NUMBERS, 3, strength))
    alone = kind.change(images[4:5], NUMBERS[4:5], 3, strength)
    assert torch.allclose(alone[0], changed[4], atol=1e-6)
    drawn = kind.name in ("shift", "rotation", "scale", "noise")
    assert torch.equal(changed, kind.change(images, NUMBERS, 4, strength)) != drawn


def test_a_shift_is_as_long_as_it_says(images: torch.Tensor) -> None:
    shifted = robustness.shifted(images, NUMBERS, 0, 2 / 28)
    seen = set()
    for image, moved in zip(images.numpy(), shifted.numpy(), strict=True):
        fits = [
            (x, y)
            for x in (-2, 2)
            for y in (-2, 2)
            if np.allclose(ndimage.shift(image[0], (y, x), order=0), moved[0], atol=1e-4)
        ]
        assert len(fits) == 1
        seen.add(fits[0])
    assert len(seen) > 1


def test_a_rotation_is_as_far_as_it_says(images: torch.Tensor) -> None:
    turned = robustness.rotated(images, NUMBERS, 0, 20).numpy()
    for image, found in zip(images.numpy(), turned, strict=True):
        errors = [
            np.abs(ndimage.rotate(image[0], angle, reshape=False, order=1) - found[0]).max()
            for angle in (-20, 20)
        ]
        assert min(errors) < 1e-3 < max(errors)


def test_a_scale_enlarges_or_shrinks_by_its_factor(images: torch.Tensor) -> None:
    sums = robustness.scaled(images, NUMBERS, 0, 1.25).sum((1, 2, 3)) / images.sum((1, 2, 3))
    for ratio in sums.tolist():
        # an enlarged digit may leave the image
        assert 1.2 < ratio < 1.6 or ratio == pytest.approx(1.25**-2, rel=0.02)


def test_noise_has_its_standard_deviation() -> None:
    gray = torch.full((40, 1, 28, 28), 0.5)
    noise = robustness.noisy(gray, torch.arange(40), 0, 0.1) - gray
    assert float(noise.std()) == pytest.approx(0.1, rel=0.02)
    assert abs(float(noise.mean())) < 0.002
    assert not torch.equal(noise[0], noise[1])


def test_blur_and_strokes_are_scipys(images: torch.Tensor) -> None:
    for image, blurred, thick, thin in zip(
        images.numpy(),
        robustness.blurred(images, NUMBERS, 0, 1.4 / 28).numpy(),
        robustness.thickened(images, NUMBERS, 0, 2.0).numpy(),
        robustness.thickened(images, NUMBERS, 0, -1.0).numpy(),
        strict=True,
    ):
        expected = ndimage.gaussian_filter(image[0], 1.4, mode="nearest", radius=5)
        assert np.allclose(blurred[0], expected, atol=1e-5)
        assert np.allclose(thick[0], ndimage.grey_dilation(image[0], (5, 5), mode="nearest"))
        assert np.allclose(thin[0], ndimage.grey_erosion(image[0], (3, 3), mode="nearest"))
    half = robustness.thickened(images, NUMBERS, 0, 0.5)
    full = robustness.thickened(images, NUMBERS, 0, 1.0)
    assert torch.allclose(half, (images + full) / 2)


def test_less_contrast_keeps_the_mean(images: torch.Tensor) -> None:
    faded = robustness.faded(images, NUMBERS, 0, 0.7)
    assert torch.allclose(faded.mean((1, 2, 3)), images.mean((1, 2, 3)), atol=1e-5)
    assert torch.allclose(faded.std((1, 2, 3)), 0.3 * images.std((1, 2, 3)), atol=1e-5)


def test_colour_images_of_another_size_are_changed_before_they_are_resized() -> None:
    spec = DataSpec(3, 32, 32, mean=(0,) * 3, std=(1,) * 3, drawn=False)
    for kind in kinds(spec):
        changed = kind.change(torch.rand(2, 3, 32, 32), NUMBERS[:2], 0, kind.strengths[-1])
        assert changed.shape == (2, 3, 32, 32)


def test_a_model_without_scores_is_refused(digits: MNISTDataModule) -> None:
    digits.setup()
    model = ShallowNetwork(5)
    model.net = torch.nn.Flatten()
    with pytest.raises(ValueError, match="a score for each of 10 classes"):
        robustness.accuracy(model, digits)


def test_the_command_counts_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fit = "fit --config shallow.yaml --data.source digits --trainer.max_epochs 3 --pictures false"
    assert main(fit.split()) == 0
    capsys.readouterr()
    for _ in range(2):
        assert main("test --ckpt_path shallow --robustness".split()) == 0
    shown = capsys.readouterr().out
    assert "robustness evaluation 1 of this run" in shown
    assert "robustness evaluation 2 of this run" in shown
    assert not (RUN / "test.json").exists()
    first, second = evaluations.read(RUN, "robustness.json")
    assert [first["evaluation"], second["evaluation"]] == [1, 2]
    assert first["changes"] == second["changes"]
    assert list(first["changes"]) == [kind.name for kind in KINDS]
    assert first["images"] == first["test_set"] == 180
    for name, change in first["changes"].items():
        assert len(change["acc"]) == len(change["strengths"]) == 5
        assert f"{name:<10}" in shown
        assert f": {change['acc'][0]:.4f}" in shown
        assert min(change["acc"]) < first["test/acc"]
    Image.open(RUN / "pictures" / "robustness.png").load()
    assert main("test --ckpt_path shallow".split()) == 0
    (plain,) = json.loads((RUN / "test.json").read_text())
    assert plain["test/acc"] == pytest.approx(first["test/acc"], abs=1e-6)
    assert plain["evaluation"] == 1
    assert main("fit --config shallow.yaml --robustness".split()) == 1  # of test alone


def test_damaged_records_are_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fit = "fit --config shallow.yaml --data.source digits --trainer.max_epochs 1 --pictures false"
    assert main(fit.split()) == 0
    (RUN / "robustness.json").write_text("[{]")
    assert main("test --ckpt_path shallow --robustness".split()) == 1
    assert "robustness.json is damaged" in capsys.readouterr().err
