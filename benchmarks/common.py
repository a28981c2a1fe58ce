"""What the benchmarks share: data, a Trainer with everything on, alternating runs, their report."""

import contextlib
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from mnist_lightning import Dashboard, EarlyStopping, LayerFreezing, MNISTDataModule, RunLogger
from mnist_lightning.data.sampling import ImageSet
from mnist_lightning.runs import checkpoints
from mnist_lightning.runs.checkpoints import ModelCheckpoint
from mnist_lightning.training.progress import ProgressBar

RELIABILITY = Path(__file__).with_name("reliability.md")


def mnist(images: int | None = None, **settings: Any) -> MNISTDataModule:
    """The real MNIST, split and in memory; of the training images the first ``images``."""
    data = MNISTDataModule(source="mnist", **settings)
    data.prepare_data()
    data.setup()
    train = data.train_set
    data.train_set = ImageSet(train.images[:images], train.labels[:images])
    return data


def trainer(
    folder: str,
    *callbacks: pl.Callback,
    freezing: LayerFreezing | None = None,
    **settings: Any,
) -> pl.Trainer:
    """As the command ``fit`` makes it: TensorBoard, metrics.csv, checkpoints, bar, early stopping.

    Args:
        folder: that the run goes to.
        callbacks: in front of the usual ones.
        freezing: by default, of nothing.
        settings: of the Trainer, where they differ.
    """
    how = {"enable_version_counter": False, "save_on_train_epoch_end": True}
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "logger": RunLogger(Path(folder) / "run"),
            "num_sanity_val_steps": 0,
            "enable_model_summary": False,
            "callbacks": [
                *callbacks,
                EarlyStopping(),
                freezing or LayerFreezing(),
                ProgressBar(),
                Dashboard(),
                ModelCheckpoint(filename="best", monitor="val/acc", mode="max", **how),
                ModelCheckpoint(filename="last", **how),
            ],
            **settings,
        }
    )


@contextlib.contextmanager
def quietly() -> Iterator[str]:
    """A folder to write to, gone afterwards; what is printed within is lost, not unprinted."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield folder


def alternate(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[Any]]:
    """What each way returns, in each of the rounds, all of which run every way."""
    found: dict[str, list[Any]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            found[name].append(run())
    return found


def damaged(root: Path) -> list[str]:
    """What is wrong with the files of the runs below a folder, if anything."""
    wrong = [
        f"{file} is empty"
        for file in root.glob("lightning_logs/*/*/*")
        if file.suffix in (".yaml", ".json", ".csv") and not file.stat().st_size
    ]
    for file in root.glob("lightning_logs/*/*/checkpoints/[!.]*"):
        try:
            checkpoints.read(file)
        except ValueError as error:
            wrong.append(str(error))
    return wrong


def write_section(title: str, section: str, file: Path = RELIABILITY) -> None:
    """Puts a section of this title in the place of an earlier one, or at the end."""
    text = file.read_text() if file.is_file() else "# Reliability\n"
    earlier = re.compile(rf"{title}\n.*?(?=\n## |\Z)", re.DOTALL)
    text, found = earlier.subn(lambda _: section, text)
    file.write_text(text if found else f"{text.rstrip()}\n\n{section}")
