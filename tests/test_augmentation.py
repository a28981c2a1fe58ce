"""Augmentation against torchvision, and its draws against SplitMix64 in Python's own integers."""

import json
import math
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import same_weights, trainer
from scipy import stats
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as vision
from torchvision.transforms.v2 import functional as vision_v2

from mnist_lightning import Classifier, Execution, MNISTDataModule, Perceptron, ShallowNetwork
from mnist_lightning.__main__ import main
from mnist_lightning.data.augmentation import Augment, points, uniform
from mnist_lightning.data.sampling import EpochSampler
from mnist_lightning.search.command import read, run

NUMBERS = torch.arange(64)


@pytest.fixture
def images() -> Tensor:
    """Smooth pictures that are not square, in colour."""
    generator = torch.Generator().manual_seed(0)
    rough = torch.rand(64, 3, 5, 6, generator=generator)
    return F.interpolate(rough, size=(24, 32), mode="bilinear")


def draws(**values: float) -> dict[str, Tensor]:
    """Draws in the middle, which change nothing, but those that are given."""
    middle = {name: 0.5 for name in uniform(NUMBERS, 0, 0)}
    return {name: torch.tensor([value]).double() for name, value in {**middle, **values}.items()}


def moved(augment: Augment, image: Tensor, **values: float) -> Tensor:
    maps = augment.maps(draws(**values), *image.shape[-2:]).to(image.dtype)
    grid = F.affine_grid(maps, list(image.shape), align_corners=False)
    return F.grid_sample(image, grid, align_corners=False)


def expected(image: Tensor, angle=0.0, translate=(0, 0), scale=1.0) -> Tensor:
    how = InterpolationMode.BILINEAR
    return vision.affine(image, angle, list(translate), scale, [0.0, 0.0], interpolation=how)


@pytest.mark.parametrize(
    ("augment", "values", "theirs"),
    [
        (Augment(rotate=30), {"rotate": 1.0}, {"angle": 30.0}),
        (Augment(rotate=30), {"rotate": 0.0}, {"angle": -30.0}),
        (Augment(scale=0.5), {"scale": 1.0}, {"scale": 1.5}),
        (Augment(scale=0.5), {"scale": 0.0}, {"scale": 1 / 1.5}),
        (Augment(shift=4), {"shift_x": 1.0}, {"translate": (-4, 0)}),
        (Augment(shift=4), {"shift_y": 0.25}, {"translate": (0, 2)}),
        (Augment(crop=3), {"crop_x": 0.999, "crop_y": 0.0}, {"translate": (-3, 3)}),
        (
            Augment(rotate=20, scale=0.2),
            {"rotate": 1.0, "scale": 1.0},
            {"angle": 20.0, "scale": 1.2},
        ),
    ],
    ids=["rotate", "rotate back", "larger", "smaller", "left", "down", "crop", "both"],
)
def test_moves_are_torchvisions(
    images: Tensor, augment: Augment, values: dict[str, float], theirs: dict[str, object]
) -> None:
    image = images[:1]
    torch.testing.assert_close(
        moved(augment, image, **values), expected(image, **theirs), atol=2e-5, rtol=0
    )


def test_a_shear_moves_each_row_by_its_distance_from_the_middle(images: Tensor) -> None:
    image = torch.arange(32.0).expand(1, 1, 24, 32) / 32
    sheared = moved(Augment(shear=45), image, shear_x=1.0)
    for row, middle in ((11, -0.5), (14, 2.5)):  # tan 45 is 1: a pixel to the side for each up
        kept = slice(8, 24)
        difference = (sheared - image)[0, 0, row, kept] * 32
        torch.testing.assert_close(difference, torch.full((16,), middle), atol=1e-4, rtol=0)


def test_a_bend_is_torchvisions_elastic_transform(images: Tensor) -> None:
    augment = Augment(elastic=2)
    bends = augment.bends(points(NUMBERS, 0, 0), 24, 32).float()
    bent = augment(images, NUMBERS, 0, 0)
    for image, bend, ours in zip(images, bends, bent, strict=True):
        theirs = vision_v2.elastic(image, bend[None])
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_a_bend_moves_its_points_by_their_draws() -> None:
    drawn = torch.full((1, 2, 5, 5), 0.5).double()
    drawn[0, 0, 2, 4], drawn[0, 1, 0, 0] = 1.0, 0.25  # at the right, and at the upper left
    bend = Augment(elastic=2).bends(drawn, 25, 33)[0]
    width, height = 2 / 33, 2 / 25  # of a pixel, if a side goes from -1 to 1
    assert bend[12, 32].tolist() == pytest.approx([2 * width, 0])
    assert bend[0, 0].tolist() == pytest.approx([0, -1 * height])
    assert bend[24, 0].tolist() == pytest.approx([0, 0])  # other points stay
    along = bend[12, 24:, 0] / width
    assert (along.diff() > 0).all()  # smoothly between them
    assert along.max() == pytest.approx(2)


def test_a_flip_is_a_mirror_image_of_half_of_them(images: Tensor) -> None:
    flipped = Augment(flip=True)(images, NUMBERS, 0, 0)
    turned = [torch.allclose(f, i.flip(2), atol=1e-5) for f, i in zip(flipped, images, strict=True)]
    same = [torch.allclose(f, i, atol=1e-5) for f, i in zip(flipped, images, strict=True)]
    assert all(a != b for a, b in zip(turned, same, strict=True))
    assert 20 < sum(turned) < 44


def test_a_crop_is_exact(images: Tensor) -> None:
    """Pixels move as a whole: pad, and cut out."""
    cropped = Augment(crop=2)(images, NUMBERS, 3, 1)
    padded = F.pad(images, (2, 2, 2, 2))
    places = uniform(NUMBERS, 3, 1)
    for i, (x, y) in enumerate(zip(places["crop_x"], places["crop_y"], strict=True)):
        left, top = int(x * 5), int(y * 5)
        cut = padded[i, :, top : top + 24, left : left + 32]
        torch.testing.assert_close(cropped[i], cut, atol=1e-5, rtol=0)


def test_an_erased_square(images: Tensor) -> None:
    erased = Augment(erase=6)(images + 0.01, NUMBERS, 0, 0)
    black = (erased == 0).all(1)
    counts = black.sum((1, 2))
    assert set(counts.tolist()) == {0, 36}
    assert 20 < int((counts == 36).sum()) < 44
    for square in black[counts == 36]:
        rows, columns = square.any(1), square.any(0)
        assert (int(rows.sum()), int(columns.sum())) == (6, 6)
    assert Augment(erase=99)(images, NUMBERS, 0, 0).shape == images.shape


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_colours_are_torchvisions(images: Tensor, name: str) -> None:
    changed = Augment(**{name: 0.5})(images, NUMBERS, 0, 0)
    theirs = getattr(vision, f"adjust_{name}")
    for i, draw in enumerate(uniform(NUMBERS, 0, 0)[name].tolist()):
        factor = 1 + (2 * draw - 1) * 0.5
        torch.testing.assert_close(changed[i], theirs(images[i], factor), atol=2e-4, rtol=0)


ALL = Augment(2, 10, 0.1, 5, True, 2, 4, 0.2, 0.2, 0.2, 1.5)


def test_a_draw_depends_on_nothing_but_seed_epoch_and_image(images: Tensor) -> None:
    whole = ALL(images, NUMBERS, 7, 3)
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    torch.rand(5)  # other random numbers
    parts = [ALL(images[rows], NUMBERS[rows], 7, 3) for rows in shuffled.split(10)]
    assert torch.equal(torch.cat(parts), whole[shuffled])
    assert not torch.equal(ALL(images, NUMBERS, 7, 4), whole)
    assert not torch.equal(ALL(images, NUMBERS, 8, 3), whole)


def test_settings_do_not_change_each_others_draws(images: Tensor) -> None:
    one = Augment(rotate=10).maps(uniform(NUMBERS, 0, 0), 24, 32)
    both = Augment(rotate=10, shift=3).maps(uniform(NUMBERS, 0, 0), 24, 32)
    assert torch.equal(one[:, :, :2], both[:, :, :2])


def test_without_settings_the_images_stay(images: Tensor) -> None:
    assert Augment()(images, NUMBERS, 0, 0) is images
    assert not Augment()


def test_the_random_numbers_are_splitmix64s() -> None:
    """In Python's own integers, of any size."""

    def mix(value: int) -> int:
        value = (value + 0x9E3779B97F4A7C15) % 2**64
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
        return value ^ (value >> 31)

    for seed, epoch, number in ((0, 0, 0), (12345, 7, 59_999), (2**63 - 1, 2**31, 2**40)):
        found = uniform(torch.tensor([number]), seed, epoch)
        row = mix(mix(mix(seed) + epoch) + number) * len(found)
        for column, value in enumerate(found.values()):
            assert float(value) == (mix(row + column) >> 11) / 2**53
    # the reference implementation's first outputs, with its state at 0
    assert mix(0) == 0xE220A8397B1DCDAF


def test_the_random_numbers_are_uniform_and_independent() -> None:
    table = torch.stack(list(uniform(torch.arange(20_000), 0, 0).values()))
    for row in table.numpy():
        assert stats.kstest(row, "uniform").pvalue > 1e-4
    correlations = torch.corrcoef(table) - torch.eye(len(table))
    assert float(correlations.abs().max()) < 5 / math.sqrt(20_000)
    following = torch.corrcoef(torch.stack([table[0, :-1], table[0, 1:]]))[0, 1]
    assert abs(float(following)) < 5 / math.sqrt(20_000)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shift": -1}, "augment.shift must be 0 or more, got -1"),
        ({"rotate": 200}, "augment.rotate must be from 0 to 180, got 200"),
        ({"contrast": 1.5}, "augment.contrast must be from 0 to 1, got 1.5"),
        ({"scale": float("nan")}, "augment.scale must be 0 or more, got nan"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augment(**settings)


MOVED = Augment(shift=2, rotate=10)


def trained(
    make: type[Classifier], epochs: int, *, steps: int | None = 1, ckpt_path: Path | None = None
) -> pl.Trainer:
    pl.seed_everything(3, verbose=False)
    data = MNISTDataModule(source="digits", batch_size=16, augment=MOVED)
    execution = Execution(steps, fused=False)
    fit = trainer(max_epochs=epochs, callbacks=[execution])
    fit.fit(make(), data, ckpt_path=ckpt_path, weights_only=True)
    return fit


@pytest.mark.parametrize("make", [ShallowNetwork, Perceptron])
def test_a_training_depends_neither_on_executions_nor_on_interruptions(
    make: type[Classifier], tmp_path: Path
) -> None:
    """Many steps at once, and one that is resumed: the same weights, bit for bit."""
    whole = trained(make, 3)
    assert same_weights(whole.lightning_module, trained(make, 3, steps=40).lightning_module)
    trained(make, 1).save_checkpoint(tmp_path / "x.ckpt")
    resumed = trained(make, 3, ckpt_path=tmp_path / "x.ckpt")
    assert same_weights(whole.lightning_module, resumed.lightning_module)


def test_two_processes_see_the_images_of_one() -> None:
    pl.seed_everything(0, verbose=False)
    data = MNISTDataModule(source="digits", batch_size=8, augment=MOVED)
    data.setup()
    whole = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    for rank in (0, 1):
        sampler = EpochSampler(data.train_set, num_replicas=2, rank=rank, seed=0)
        rows = torch.tensor(list(sampler)[:4])
        share = data.preprocess(data.train_set.images[rows], rows)
        assert torch.equal(share, whole[0][rank::2])


def test_only_training_images_are_augmented_and_each_epoch_anew() -> None:
    data = MNISTDataModule(source="digits", batch_size=8, augment=MOVED)
    plain = MNISTDataModule(source="digits", batch_size=8)
    for one in (data, plain):
        one.setup()
    for name in ("val_dataloader", "test_dataloader"):
        ours, theirs = (next(iter(getattr(one, name)())) for one in (data, plain))
        assert len(ours) == 2
        assert torch.equal(
            data.on_after_batch_transfer(ours, 0)[0], plain.on_after_batch_transfer(theirs, 0)[0]
        )
    seen: list[Tensor] = []

    class Seen(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if batch_idx == 0:
                seen.append(batch[0].sum((1, 2, 3)).sort().values)

    trainer(max_epochs=2, callbacks=[Seen()]).fit(ShallowNetwork(5), data)
    assert len(seen) == 2
    assert not torch.equal(*seen)


def test_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the configuration and in the checkpoint: a training that goes on augments as before."""
    monkeypatch.chdir(tmp_path)
    fit = "fit --config shallow --data.source digits --trainer.max_epochs 1"
    assert main([*fit.split(), "--data.augment.shift", "2", "--data.augment.flip", "yes"]) == 0
    run = Path("lightning_logs/shallow/version_0")
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    saved = checkpoint["datamodule_hyper_parameters"]["augment"]
    assert saved == {"shift": 2.0, "flip": True}
    (run / "checkpoints" / "last.ckpt").rename("alone.ckpt")
    assert main("test --ckpt_path shallow".split()) == 0
    assert main("fit --ckpt_path alone.ckpt --trainer.max_epochs 2".split()) == 0
    again = Path("lightning_logs/ShallowNetwork/version_0/config.yaml")
    settings = yaml.safe_load(again.read_text())["data"]["augment"]
    assert (settings["shift"], settings["flip"], settings["rotate"]) == (2.0, True, 0.0)
    assert main([*fit.split(), "--data.augment.rotate", "-5"]) == 1
    assert "augment.rotate must be from 0 to 180, got -5" in capsys.readouterr().err


def test_a_search_augments_what_its_data_says(tmp_path: Path) -> None:
    """The Trainer trains such trials; without augmentation networks are trained together."""
    words = "--model ShallowNetwork --space.lr [0.1] --fixed.max_epochs 2 --data.source digits"
    plain, _ = read(words.split())
    moved, _ = read([*words.split(), "--data.augment.shift", "2"])
    params = {"lr": 0.1, "max_epochs": 2, "seed": 0}
    assert plain.hidden_units(params) == (100,)
    assert moved.hidden_units(params) is None
    definitions = [search.definition(search.load_data())["data"] for search in (plain, moved)]
    assert definitions[1] == {**definitions[0], "augment": {"shift": 2.0}}
    run(moved, tmp_path / "moved", workers=0)
    record = json.loads(next((tmp_path / "moved" / "trials").iterdir()).read_text())
    pl.seed_everything(0, verbose=False)
    data = MNISTDataModule(source="digits", augment=Augment(shift=2))
    alone = trainer(max_epochs=2)
    alone.fit(ShallowNetwork(lr=0.1), data)
    assert record["val_loss"] == pytest.approx(float(alone.callback_metrics["val/loss"]))
