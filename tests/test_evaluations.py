"""Every evaluation of the test images is counted, and described by what was scored."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mnist_lightning.__main__ import main
from mnist_lightning.runs import evaluations


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    command = "fit --config shallow --data.source digits --trainer.max_epochs 1"
    command += f" --trainer.accelerator cpu --trainer.default_root_dir {root}"
    assert main(command.split()) == 0
    return root / "lightning_logs" / "shallow" / "version_0"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of a run that nobody has tested."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def _recorded(run: Path) -> list[dict]:
    return json.loads((run / "test.json").read_text())


def test_evaluations_at_the_same_time_are_all_recorded(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from mnist_lightning import evaluations;"
        " run, mark = sys.argv[1:]; print('ready', flush=True); sys.stdin.readline();"
        " evaluations.record(Path(run), Path('best.ckpt'), {}, 5, 5, mark=mark)"
    )
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), str(mark)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for mark in range(8)
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    recorded = _recorded(tmp_path)
    assert [entry["evaluation"] for entry in recorded] == list(range(1, 9))
    assert sorted(entry["mark"] for entry in recorded) == [str(mark) for mark in range(8)]


@pytest.mark.parametrize(
    ("flags", "images"),
    [
        ("", 180),
        ("--trainer.fast_dev_run 1000", 180),
        ("--trainer.fast_dev_run 2 --data.eval_batch_size 20", 40),
        ("--trainer.limit_test_batches 2 --data.eval_batch_size 20", 40),
        ("--trainer.limit_test_batches 0.5 --data.eval_batch_size 20", 80),
    ],
)
def test_every_evaluation_is_recorded_with_what_it_scored(
    run: Path, flags: str, images: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["test", "--ckpt_path", str(run), *flags.split()]) == 0
    (entry,) = _recorded(run)
    assert (entry["images"], entry["test_set"]) == (images, 180)
    assert sum(map(sum, entry["confusion"])) == images
    assert round(entry["test/acc"] * images) == sum(entry["confusion"][d][d] for d in range(10))
    partial = "40 of the 180 test images, so it is not the run's test result"
    out = capsys.readouterr().out
    assert "test evaluation 1 " in out
    assert (partial.replace("40", str(images)) in out) == (images < 180)
    # TensorBoard shows the test of the run, not one of a part of the images
    written = b"".join(file.read_bytes() for file in run.glob("events.*"))
    assert written.count(b"test/loss") == (2 if images == 180 else 1)  # once among the columns


def test_what_cannot_be_recorded_is_not_told(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, content: object) -> None:
        raise ValueError(f"{path} cannot be written: no space left on device")

    monkeypatch.setattr(evaluations, "write_json", fail)
    assert main(["test", "--ckpt_path", str(run)]) == 1
    out, err = capsys.readouterr()
    assert "test.json cannot be written" in err
    assert "test/" not in out


def test_scoring_nothing_is_an_error_and_no_evaluation(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command, limit in (("test", "test"), ("validate", "val"), ("predict", "predict")):
        argv = [command, "--ckpt_path", str(run), f"--trainer.limit_{limit}_batches", "0"]
        assert main(argv) == 1
        assert f"limit_{limit}_batches is 0" in capsys.readouterr().err
    assert not (run / "test.json").exists()
    assert not (run / "predictions.csv").exists()


@pytest.mark.parametrize("command", ["test", "predict"])
def test_a_strategy_that_returns_no_answers_is_refused(
    run: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--trainer.accelerator cpu --trainer.strategy ddp_spawn --trainer.devices 2"
    assert main([command, "--ckpt_path", str(run), *flags.split()]) == 1
    assert "--trainer.strategy ddp" in capsys.readouterr().err


def test_records_of_earlier_versions_count(tmp_path: Path) -> None:
    """They numbered "looks", and did not say how many images they scored."""
    old = {"look": 2, "note": "the first one was not kept", "test/acc": 0.98}
    (tmp_path / "test.json").write_text(json.dumps([old]))
    (entry,) = evaluations.read(tmp_path)
    assert entry["evaluation"] == 2
    assert evaluations.is_whole(entry)
    assert evaluations.record(tmp_path, Path("last.ckpt"), {"test/acc": 0.97}, 40, 180) == 3
    first, second = evaluations.read(tmp_path)
    assert first == entry
    assert (second["evaluation"], second["checkpoint"]) == (3, "last.ckpt")
    assert not evaluations.is_whole(second)
