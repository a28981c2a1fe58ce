"""Arbitrary input: properties that hold for all of it, and errors as sentences, not crashes."""

import contextlib
import io
import math
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from mnist_lightning import data
from mnist_lightning.__main__ import COMMANDS, main
from mnist_lightning.data import readers
from mnist_lightning.search import space
from mnist_lightning.training.stacked import Population

QUICK = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,  # the same examples each time: a new failure comes from the code
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

numbers = st.one_of(
    st.integers(-3, 40), st.floats(allow_nan=True, allow_infinity=True, width=32), st.booleans()
)
axes = st.one_of(
    st.lists(numbers, max_size=4),
    st.text(max_size=3),
    st.none(),
    st.fixed_dictionaries({"low": numbers, "high": numbers}, optional={"log": st.booleans()}),
    st.fixed_dictionaries({"low": st.integers(1, 3), "high": st.integers(4, 6)}),
)


@QUICK
@given(st.dictionaries(st.sampled_from(["lr", "batch_size", "hidden_units.1"]), axes))
def test_a_space_is_refused_or_can_be_drawn_from(axes: dict[str, Any]) -> None:
    try:
        space.check(axes, ranges=True)
    except ValueError:
        return
    drawn = space.random(axes, 20, seed=0)
    assert 1 <= len(drawn) <= 20
    assert drawn == space.random(axes, 20, seed=0)
    for params in drawn:
        assert params.keys() == axes.keys()
        for name, value in params.items():
            if isinstance(axes[name], dict):
                assert axes[name]["low"] <= value <= axes[name]["high"]
                assert math.isfinite(value)
            else:
                assert value in axes[name]


@QUICK
@given(
    n=st.integers(3, 400),
    official=st.integers(0, 100),
    split=st.sampled_from(["study", "canonical"]),
    fraction=st.floats(0.001, 0.999),
    seed=st.integers(0, 2**63 - 1),
)
def test_a_split_has_each_image_once(
    n: int, official: int, split: str, fraction: float, seed: int
) -> None:
    parts = data.split_indices(n, min(official, n), split, fraction, seed)
    assert torch.cat(parts).sort().values.equal(torch.arange(n))
    again = data.split_indices(n, min(official, n), split, fraction, seed)
    assert all(one.equal(other) for one, other in zip(parts, again, strict=True))


@QUICK
@given(st.integers(1, 300), st.integers(0, 2**32 - 1), st.integers(0, 10**6))
def test_an_epoch_visits_each_image_once(n: int, seed: int, epoch: int) -> None:
    assert data.epoch_order(n, seed, epoch).sort().values.equal(torch.arange(n))


@QUICK
@given(
    hnp.arrays(
        np.uint8,
        st.one_of(
            st.tuples(st.integers(1, 60), st.integers(1, 60)),
            st.tuples(st.integers(1, 60), st.integers(1, 60), st.sampled_from([3, 4])),
        ),
    ),
    st.sampled_from(["png", "gif", "webp"]),
)
def test_a_picture_becomes_a_digit_or_a_sentence(
    tmp_path: Path, pixels: np.ndarray, kind: str
) -> None:
    file = tmp_path / f"picture.{kind}"
    Image.fromarray(pixels).save(file)
    try:
        digit = data.read_image(file)
    except ValueError as error:
        message = str(error)
    else:
        assert (digit.dtype, digit.shape) == (torch.uint8, (28, 28))
        assert digit.max() > 0
        return
    assert message.startswith(f"{file} shows nothing")


@QUICK
@given(st.binary(max_size=300))
def test_bytes_are_no_picture(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"picture\.png"):
        data.read_image(file)


@QUICK
@given(content=st.binary(max_size=300), packed=st.booleans(), labels=st.booleans())
def test_bytes_are_no_data_set(tmp_path: Path, content: bytes, packed: bool, labels: bool) -> None:
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"train-{'labels-idx1' if labels else 'images-idx3'}-ubyte"
    for old in folder.iterdir():
        old.unlink()
    file = folder / (stem + ".gz" * packed)
    magic = (0x0801 if labels else 0x0803).to_bytes(4, "big")
    file.write_bytes(content if packed else magic + content)
    with pytest.raises(ValueError, match=stem):
        readers._read_idx("MNIST", stem, tmp_path)


@QUICK
@given(
    sizes=st.lists(st.integers(1, 20), max_size=3),
    batch=st.integers(1, 40),
    n=st.integers(1, 60),
    seed=st.integers(0, 1000),
)
def test_any_perceptron_steps_as_by_autograd(
    sizes: list[int], batch: int, n: int, seed: int
) -> None:
    """One pass over n images, in float64, for any shapes."""
    generator = torch.Generator().manual_seed(seed)
    shapes = list(zip([7, *sizes], [*sizes, 3], strict=True))
    network = []
    for before, after in shapes:
        network += [torch.randn(after, before, generator=generator, dtype=torch.float64)]
        network += [torch.randn(after, generator=generator, dtype=torch.float64)]
    x = torch.rand(n, 7, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (n,), generator=generator)
    population = Population([network], [0.1])
    population.train_block(population.arrange(x), y, batch)
    own = [p.clone().requires_grad_() for p in network]
    for images, labels in zip(x.split(batch), y.split(batch), strict=True):
        for i in range(0, len(own), 2):
            images = images @ own[i].T + own[i + 1]
            images = images.relu() if i + 2 < len(own) else images
        grads = torch.autograd.grad(torch.nn.functional.cross_entropy(images, labels), own)
        with torch.no_grad():
            for p, grad in zip(own, grads, strict=True):
                p -= 0.1 * grad
    for one, other in zip(population.parameters(0), own, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-10, atol=1e-12)


words = st.one_of(
    st.sampled_from(
        "--config shallow.yaml deep2 --model ShallowNetwork ResNet18 --model.lr -1 nan 1e400"
        " --data --data.batch_size 0 --data.source digits --trainer.max_epochs --trainer null []"
        " {} -c = -- --ckpt_path nowhere --execution.threads -h_ --data.image_size"
        " --model.hidden_units [1,a] : '".split()
    ),
    st.text(string.printable, max_size=6),
)


@QUICK
@given(st.sampled_from(sorted(COMMANDS)), st.lists(words, min_size=1, max_size=5))
def test_any_words_get_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, words: list[str]
) -> None:
    """No traceback, an exit code, and an error where it is not 0."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lightning.pytorch.Trainer.fit", lambda *_, **__: None)
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            code = main([command, *words])
    except SystemExit as stop:
        code = stop.code
    said = err.getvalue()
    assert code in (0, 1, 2), said
    if code:
        assert said.startswith(("error: ", "warning: ")), said
        assert "Error:" not in said.splitlines()[-1], said
        assert len(said.splitlines()[-1]) < 600
