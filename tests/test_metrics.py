"""F1, calibration error, top-5 and the accuracy of each class, against scikit-learn and by hand."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from conftest import trainer
from sklearn.metrics import f1_score, top_k_accuracy_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mnist_lightning import MNISTDataModule, Perceptron, ShallowNetwork
from mnist_lightning.__main__ import main
from mnist_lightning.models import score_metrics
from mnist_lightning.models.classifier import Classifier
from mnist_lightning.models.score_metrics import MacroF1, ScoreMetrics
from mnist_lightning.runs.messages import per_class_text
from mnist_lightning.spec import DataSpec

NAMES = tuple("abcdefghijkl")
STAGES = ("val", "test")


def scores_and_labels(images: int = 501, classes: int = 12) -> tuple[Tensor, Tensor]:
    """Random scores that favour the right class; the last class has no image."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(classes - 1, (images,), generator=generator)
    scores = torch.randn(images, classes, generator=generator)
    scores[range(images), labels] += 1.5
    return scores, labels


def loader(scores: Tensor, labels: Tensor, batch_size: int = 100) -> DataLoader:
    """Gives the scores as images, of one pixel for each class."""
    return DataLoader(TensorDataset(scores[:, None, None], labels), batch_size)


def classifier(classes: tuple[str, ...] = NAMES) -> Classifier:
    """A classifier whose scores are the pixels of the image."""
    return Classifier(nn.Flatten(), 0.1, "sgd", DataSpec(1, 1, len(classes), classes))


def calibration_error(scores: Tensor, labels: Tensor) -> float:
    """The expected calibration error with 15 bins, in plain Python."""
    total, bins = len(labels), [[] for _ in range(15)]
    for row, label in zip(scores.double().softmax(1).tolist(), labels.tolist(), strict=True):
        confidence = max(row)
        bins[int(confidence * 15)].append((confidence, row.index(confidence) == label))
    error = 0.0
    for members in filter(None, bins):
        confidence = sum(c for c, _ in members) / len(members)
        accuracy = sum(right for _, right in members) / len(members)
        error += len(members) / total * abs(accuracy - confidence)
    return error


def expected(scores: Tensor, labels: Tensor, stage: str) -> dict[str, float]:
    """The values of scikit-learn and by hand."""
    classes = range(scores.shape[1])
    values = {
        "acc": float((scores.argmax(1) == labels).float().mean()),
        "ece": calibration_error(scores, labels),
        "f1": f1_score(labels, scores.argmax(1), average="macro"),
        "loss": float(nn.functional.cross_entropy(scores, labels)),
    }
    if len(classes) > 10:
        values["top5"] = top_k_accuracy_score(labels, scores, k=5, labels=classes)
    return {f"{stage}/{name}": pytest.approx(value, abs=2e-6) for name, value in values.items()}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("most", [2**24, 2500])
@pytest.mark.parametrize("classes", [2, 10, 12])
def test_values(classes: int, most: int, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the same if the scores go to the metrics in parts."""
    monkeypatch.setattr(score_metrics, "MOST_SCORES", most)
    scores, labels = scores_and_labels(classes=classes)
    model = classifier(NAMES[:classes])
    run = trainer()
    evaluate = {"val": run.validate, "test": run.test}[stage]
    for part in (slice(None), slice(150)):  # the second evaluation starts anew
        chosen = scores[part], labels[part]
        (logged,) = evaluate(model, loader(*chosen), verbose=False)
        assert logged == expected(*chosen, stage)
        rows = model.per_class(stage)
        assert [row["class"] for row in rows] == list(NAMES[:classes])
        for index, row in enumerate(rows):
            of_class = chosen[0][chosen[1] == index]
            correct = int((of_class.argmax(1) == index).sum())
            acc = correct / len(of_class) if len(of_class) else None
            assert (row["images"], row["correct"], row["acc"]) == (len(of_class), correct, acc)


def test_macro_f1_is_that_of_torchmetrics() -> None:
    """Only the counts are made in another way."""
    scores, labels = scores_and_labels(300, 7)
    ours = MacroF1(7)
    theirs = score_metrics.MulticlassF1Score(7)
    for part in (slice(100), slice(100, 300)):
        for metric in (ours, theirs):
            metric.update(scores[part].argmax(1), labels[part])
    assert torch.equal(ours.compute(), theirs.compute())
    for state in ("tp", "fp", "tn", "fn"):
        assert torch.equal(getattr(ours, state), getattr(theirs, state))


def test_many_classes_take_no_matrix_of_them() -> None:
    """20,000 classes: a matrix of all pairs would take 3 GB."""
    metrics = ScoreMetrics(20_000)
    labels = torch.arange(10)
    metrics.add(nn.functional.one_hot(labels, 20_000).float(), labels)
    assert float(dict(metrics.end())["f1"].compute()) == pytest.approx(1)


def test_the_perceptron_is_calibrated_by_its_softmax() -> None:
    """Its scores may all be between 0 and 1, and are no probabilities."""
    scores, labels = scores_and_labels(classes=10)
    scores = scores.sigmoid()
    model = Perceptron(spec=DataSpec(1, 1, 10))
    model.net.w.data = torch.eye(10)
    model.net.b.data.zero_()
    (logged,) = trainer().validate(model, loader(scores, labels), verbose=False)
    assert logged["val/ece"] == pytest.approx(calibration_error(scores, labels), abs=2e-6)


def test_an_interrupted_validation_leaves_no_scores() -> None:
    scores, labels = scores_and_labels()
    model = classifier()
    model.score("val", scores[:50], labels[:50])
    (logged,) = trainer().validate(model, loader(scores, labels), verbose=False)
    assert logged == expected(scores, labels, "val")


# ---- models of the user


class Silent(ShallowNetwork):
    """Collects no scores."""

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.loss(self(batch[0]), batch[1]))


class OwnF1(ShallowNetwork):
    """Logs a metric of its own under the same name, in the step."""

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("val/f1", float(len(batch[0])), prog_bar=True)


class LateF1(ShallowNetwork):
    """Logs it after this class has logged its own."""

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.log_dict({"val/f1": 0.25}, prog_bar=True)


class Ignoring(ShallowNetwork):
    """Ignores the images of some classes, as its loss does."""

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.score("val", self(images), labels.masked_fill(labels > 4, -100))


class FiveScores(ShallowNetwork):
    """Has fewer scores than its images have classes."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)[:, :5]

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        return super().loss(scores, labels % 5)


@pytest.mark.parametrize(
    ("model", "logged"),
    [
        (Silent, "val/loss"),
        (OwnF1, "val/acc val/ece val/f1 val/loss"),
        (LateF1, "val/acc val/ece val/f1 val/loss"),
        (Ignoring, "val/acc val/ece val/f1 val/loss"),
        (FiveScores, "val/acc val/loss"),
    ],
)
def test_models_of_the_user(model: type[Classifier], logged: str, digits: MNISTDataModule) -> None:
    digits.eval_batch_size = 100
    seen = []

    class Watch(pl.Callback):
        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            seen.append({k: float(v) for k, v in trainer.callback_metrics.items() if "val" in k})

    pl.seed_everything(0, verbose=False)
    trainer(max_epochs=2, val_check_interval=0.5, callbacks=[Watch()]).fit(model(8), digits)
    assert len(seen) == 4
    for values in seen:
        assert " ".join(sorted(values)) == logged
        if model is OwnF1:
            assert values["val/f1"] == pytest.approx((3 * 100**2 + 23**2) / 323)
        if model is LateF1:
            assert values["val/f1"] == 0.25
        if model is Ignoring:
            assert 0 < values["val/f1"] < 1


# ---- several processes

SHARED = """
import json, sys
import torch
from lightning.pytorch import Trainer
from test_metrics import classifier, loader, scores_and_labels

devices, out = int(sys.argv[1]), sys.argv[2]
trainer = Trainer(
    accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", logger=False,
    enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
    use_distributed_sampler=False,
)
scores, labels = scores_and_labels()
if devices > 1:  # 351 and 150 images, in four mini-batches and two
    part = slice(351) if trainer.global_rank == 0 else slice(351, None)
    scores, labels = scores[part], labels[part]
model = classifier()
(logged,) = trainer.validate(model, loader(scores, labels), verbose=False)
if trainer.is_global_zero:
    with open(out, "w") as file:
        json.dump([logged, model.per_class("val")], file)
"""


@pytest.mark.slow
def test_two_processes_give_the_values_of_all_images(tmp_path: Path) -> None:
    script = tmp_path / "shared.py"
    script.write_text(SHARED)
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    results = []
    for devices in (1, 2):
        out = tmp_path / f"{devices}.json"
        subprocess.run(
            [sys.executable, str(script), str(devices), str(out)],
            check=True,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        )
        results.append(json.loads(out.read_text()))
    (one, classes), (two, same_classes) = results
    assert one == expected(*scores_and_labels(), "val")
    assert two == {name: pytest.approx(value, rel=1e-6) for name, value in one.items()}
    assert same_classes == classes


# ---- the commands


def test_the_commands_show_and_record_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = "fit --config shallow --data.source digits --trainer.max_epochs 2"
    command += f" --trainer.accelerator cpu --trainer.default_root_dir {tmp_path}"
    assert main(command.split()) == 0
    run = tmp_path / "lightning_logs" / "shallow" / "version_0"
    table = run / "metrics.csv"
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {"val/f1", "val/ece"} <= rows[0].keys()
    assert not {"val/top5", "train/f1", "train/ece"} & rows[0].keys()

    capsys.readouterr()
    assert main(["validate", "--ckpt_path", str(run)]) == 0
    out = capsys.readouterr().out
    best = max(rows, key=lambda row: float(row["val/acc"]))
    metrics = (f"{name} {float(best[name]):.4f}" for name in sorted(best) if "val" in name)
    assert "  ".join(metrics) in out
    assert len(out.split("class     acc  correct   images\n")[1].splitlines()) == 10

    assert main(["test", "--ckpt_path", str(run)]) == 0
    out = capsys.readouterr().out
    (entry,) = json.loads((run / "test.json").read_text())
    assert f"test/ece {entry['test/ece']:.4f}  test/f1 {entry['test/f1']:.4f}" in out
    for digit, row in enumerate(entry["per_class"]):
        confused = entry["confusion"][digit]
        assert row["class"] == str(digit)
        assert (row["images"], row["correct"]) == (sum(confused), confused[digit])
        assert f"{digit}      {row['acc']:.4f}" in out

    # a run of before these metrics goes on in its table, with empty cells above
    names = ["epoch", "val/loss", "val/acc", "train/loss", "train/acc"]
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    assert main(["fit", "--ckpt_path", f"{run}/last", "--trainer.max_epochs", "3"]) == 0
    with table.open(newline="") as file:
        reader = csv.DictReader(file)
        resumed = list(reader)
    assert reader.fieldnames == [*names, "val/f1", "val/ece"]
    assert [bool(row["val/f1"]) for row in resumed] == [False, False, True]
    assert [row["val/acc"] for row in resumed[:2]] == [row["val/acc"] for row in rows]


def test_of_many_classes_the_ten_worst_are_shown() -> None:
    rows = [
        {"class": f"class {n}", "images": 50 - n, "correct": 25, "acc": 25 / (50 - n)}
        for n in range(20)
    ]
    assert len(per_class_text(rows).splitlines()) == 21
    rows += [{"class": "none", "images": 0, "correct": 0, "acc": None}]
    title, *lines = per_class_text(rows).splitlines()
    assert title.startswith("the 10 worst of 21 classes ")
    assert [line.split("  ")[0] for line in lines] == [f"class {n}" for n in range(10)]


def test_names_of_classes_stay_on_their_line() -> None:
    rows = [
        {"class": name, "images": 1, "correct": 1, "acc": 1.0}
        for name in ("a\nb", "\x1b[2J", "\udcff", "x" * 300)
    ]
    text = per_class_text([*rows, {"class": "none", "images": 0, "correct": 0, "acc": None}])
    assert len(text.splitlines()) == 6
    assert max(map(len, text.splitlines())) < 80
    assert text.replace("\n", "").isprintable()
