"""The folder of a run, ``lightning_logs/<config name>/version_N/``: find it, make it, lock it."""

import re
from pathlib import Path

from mnist_lightning.configs import Asked


def find_checkpoint(
    where: str, root: Path, run_name: str | None = None, kind: str = "best"
) -> Path:
    """The checkpoint file that the user means.

    Args:
        where: a checkpoint file; the folder of a run, or of several runs (then the newest); or the
            name of a run. ``/best`` or ``/last`` after a folder or name says which one.
            ``best`` or ``last`` alone are those of ``run_name``.
        root: the folder that holds the runs, ``lightning_logs``.
        run_name: the name that this command's configuration gives to its runs.
        kind: ``best`` or ``last``, where ``where`` does not say it.

    Raises:
        ValueError: nothing is there; says where it looked.
    """
    path = Path(where)
    if path.is_file():
        return path
    base = path
    if path.name in ("best", "last") and not path.is_dir():
        base, kind = path.parent, path.name
    if base == Path("."):
        if run_name is None:
            raise ValueError(
                f"--ckpt_path {where}: of which run? Say {root.name}/NAME/{where}, or give --config"
            )
        base = Path(run_name)
    folders = [folder for folder in (base, root / base) if folder.is_dir()]
    if not folders:
        raise ValueError(f"--ckpt_path {where}: there is no file or folder {base}{_runs(root)}")
    for folder in folders:
        newest = newest_first(folder)
        for run in [folder, *newest]:
            file = run / "checkpoints" / f"{kind}.ckpt"
            if file.is_file():
                if run not in (folder, *newest[:1]):
                    from lightning.pytorch.utilities import rank_zero_warn

                    rank_zero_warn(f"{newest[0]} has no {kind}.ckpt: taking {file}")
                return file
    raise ValueError(
        f"--ckpt_path {where}: no checkpoints/{kind}.ckpt in {folders[0]}{_runs(root)}"
    )


def newest_first(folder: Path) -> list[Path]:
    """The runs ``version_N`` in a folder, the highest N first."""
    runs = [run for run in folder.glob("version_*") if run.name[8:].isdecimal()]
    return sorted(runs, key=lambda run: int(run.name[8:]), reverse=True)


def _runs(root: Path) -> str:
    names = sorted(
        {run.parent.parent.parent.name for run in root.glob("*/version_*/checkpoints/*.ckpt")}
    )
    return f"; the runs in {root} are: {', '.join(names)}" if names else ""


def run_name(asked: Asked) -> str | None:
    """The name that a command's configuration gives to its runs, if it has one."""
    if not asked.configs:
        return None
    file = asked.configs[-1].absolute()
    # of a run's own, that of the run: lightning_logs/NAME/version_N/config.yaml
    of_run = file.name == "config.yaml" and re.fullmatch(r"version_\d+", file.parent.name)
    return file.parent.parent.name if of_run else file.stem


LOGS = "lightning_logs"


def folder_of(checkpoint: Path) -> Path:
    """The folder of the run that a checkpoint file belongs to."""
    folder = checkpoint.absolute().parent
    return folder.parent if folder.name == "checkpoints" else folder
