"""Several checkpoints as one: the ensemble of their models, in a folder like that of a run.

The folder, ``lightning_logs/ensemble/version_N``, is found again for the same members, so that
their test evaluations are counted together. Its ``provenance.json`` names them.
"""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mnist_lightning.console import is_first_process, short
from mnist_lightning.files import read_json, write_json, write_torch
from mnist_lightning.provenance import provenance

NAME = "ensemble"
_OPTION = "--ckpt_path"
_MEMBER = ("checkpoint", "sha256")


def as_one(argv: Sequence[str]) -> list[str]:
    """The arguments of a command, with the checkpoint of the ensemble in place of its members.

    Args:
        argv: with one value after ``--ckpt_path``, it is unchanged; with several, they are members.

    Raises:
        ValueError: a checkpoint is missing, or they cannot be an ensemble.
    """
    argv = list(argv)
    start = argv.index(_OPTION) + 1 if _OPTION in argv else len(argv)
    end = next((n for n in range(start, len(argv)) if argv[n].startswith("-")), len(argv))
    if end - start < 2:
        return argv
    # the others do not wait for what is imported here
    from mnist_lightning.configs import read_request
    from mnist_lightning.runs.folder import LOGS, find_checkpoint

    root = Path(read_request(argv).root) / LOGS
    paths = [find_checkpoint(where, root) for where in argv[start:end]]
    return [*argv[:start], str(_joined(paths, root / NAME, "--trust" in argv)), *argv[end:]]


def _joined(paths: Sequence[Path], folder: Path, trust: bool) -> Path:
    """The checkpoint of the ensemble in its folder, which is made if there is none yet."""
    from mnist_lightning.runs.folder import RunFolder, newest_first

    members = [
        {"checkpoint": short(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in paths
    ]
    digests = sorted(member["sha256"] for member in members)
    for number, member in enumerate(members):
        if member in members[:number]:
            raise ValueError(f"{_OPTION} {member['checkpoint']}: it is named twice")
    content = _content(paths, trust)  # before a folder is made or found: it imports the classes
    for run in map(RunFolder, newest_first(folder)):
        known = members_of(run.path) if run.best.is_file() else []
        if sorted(member["sha256"] for member in known) == digests:
            return run.best
    run = RunFolder.make(folder)
    if is_first_process():
        run.best.parent.mkdir()
        write_json(run.path / "provenance.json", [provenance(members=members)])
        write_torch(run.best, {**content, "members": members})
    return run.best


def members_of(folder: Path) -> list[dict[str, str]]:
    """``checkpoint`` and ``sha256`` of each member; none if the folder is not of an ensemble."""
    with suppress(ValueError, KeyError, TypeError, OSError):
        (facts,) = read_json(folder / "provenance.json", "", list)
        return [{key: str(member[key]) for key in _MEMBER} for member in facts["members"]]
    return []


def _content(paths: Sequence[Path], trust: bool) -> dict[str, Any]:
    """What the Trainer would save of the ensemble, as far as an evaluation needs it."""
    from mnist_lightning.classes import class_path, import_class, is_own
    from mnist_lightning.models.ensemble import Ensemble
    from mnist_lightning.runs import checkpoints

    read = {path: checkpoints.read(path) for path in paths}
    for path, checkpoint in read.items():
        if is_own(named := str(checkpoint.get("model_class", ""))):
            if not trust:
                raise ValueError(
                    f"{path} holds a {named}, a class from outside mnist_lightning: importing it"
                    " runs its code. If you trust it: --trust"
                )
            import_class(named)
    model = checkpoints.load(paths)
    first = read[paths[0]]
    data_class = first.get("data_class", checkpoints.DATA_CLASS).rpartition(".")[2]
    of_data = {"datamodule_hyper_parameters", "datamodule_hparams_name", "data_class", data_class}
    return {
        **{key: first[key] for key in of_data & first.keys()},
        **{key: max(c.get(key, 0) for c in read.values()) for key in ("epoch", "global_step")},
        "pytorch-lightning_version": first["pytorch-lightning_version"],
        "state_dict": model.state_dict(),
        "hparams_name": "kwargs",
        "model_class": class_path(Ensemble),
        "hyper_parameters": dict(model.hparams),
    }
