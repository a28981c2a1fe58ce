"""The test evaluations of a run: each one is counted and described in a file of the run.

Plain ones are in ``test.json``, those of changed images in ``robustness.json``.

The more often a test set is used to compare models, the more it becomes a validation set. So every
evaluation is counted.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from mnist_lightning.files import read_json, write_json
from mnist_lightning.provenance import provenance


def record(
    run: Path,
    checkpoint: Path,
    metrics: Mapping[str, float],
    images: int,
    test_set: int,
    name: str = "test.json",
    **facts: Any,
) -> int:
    """Adds an evaluation to a file of the run; other processes may do so at the same time.

    Args:
        run: the run's folder.
        checkpoint: the file that was evaluated.
        metrics: the results, by name.
        images: how many images were scored.
        test_set: how many images the test set has.
        name: of the file.
        facts: what else to record, as plain JSON types.

    Returns:
        The number of the evaluation, from 1.

    Raises:
        ValueError: the file is damaged or cannot be written; it is unchanged.
    """
    entry = {
        "checkpoint": checkpoint.name,
        "images": images,
        "test_set": test_set,
        **metrics,
        **provenance(**facts),
    }
    with FileLock(run / f".{name}.lock"):
        earlier = read(run, name)
        number = earlier[-1]["evaluation"] + 1 if earlier else 1
        write_json(run / name, [*earlier, {"evaluation": number, **entry}])
    return number


def read(run: Path, name: str = "test.json") -> list[dict[str, Any]]:
    """The evaluations in a file of the run, in order; none if there is no file.

    Raises:
        ValueError: the file is damaged.
    """
    file = run / name
    if not file.exists():
        return []
    remedy = "restore it, or move it away to restart the count"
    entries = [_renamed(entry) for entry in read_json(file, remedy, kind=list)]
    if not all(isinstance(entry.get("evaluation"), int) for entry in entries):
        raise ValueError(f"{file} is damaged (evaluations without a number): {remedy}")
    return entries


def _renamed(entry: Any) -> dict[str, Any]:
    """An entry with today's name for its number, which was "look" in earlier versions."""
    known = entry if isinstance(entry, dict) else {}
    return {"evaluation" if key == "look" else key: value for key, value in known.items()}


def is_whole(evaluation: Mapping[str, Any]) -> bool:
    """Whether it scored the whole test set. Older records have no counts; they were whole."""
    return evaluation.get("images") == evaluation.get("test_set")
