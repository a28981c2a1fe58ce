"""The folder of a run, ``lightning_logs/<config name>/version_N/``: find it, make it, lock it."""

import os
import re
import shutil
from pathlib import Path

from filelock import FileLock, Timeout

from mnist_lightning.configs import Request
from mnist_lightning.console import is_first_process, short
from mnist_lightning.files import reason

LOGS = "lightning_logs"


class RunFolder:
    """The folder of a run, and the files in it.

    Args:
        path: the folder.
        is_new: whether this training made it.
    """

    def __init__(self, path: Path, is_new: bool = False) -> None:
        self.path, self.is_new = path, is_new
        self._lock: FileLock | None = None

    @classmethod
    def of(cls, checkpoint: Path) -> "RunFolder":
        """The run that a checkpoint file belongs to."""
        folder = checkpoint.absolute().parent
        return cls(folder.parent if folder.name == "checkpoints" else folder)

    @classmethod
    def make(cls, folder: Path) -> "RunFolder":
        """Makes the next ``version_N``; two trainings that start together get different ones.

        Raises:
            ValueError: it cannot be made.
        """
        if not is_first_process():  # another process of the same training: it writes nothing
            return cls(folder / "version_0")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            number = max((int(run.name[8:]) for run in newest_first(folder)), default=-1) + 1
            while True:
                run = folder / f"version_{number}"
                try:
                    run.mkdir()
                    return cls(run, is_new=True)
                except FileExistsError:
                    number += 1
        except OSError as error:
            raise ValueError(
                f"{folder} cannot hold a run: {reason(error)}."
                " Give another folder: --trainer.default_root_dir DIR"
            ) from error

    def __str__(self) -> str:
        return short(self.path)

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def best(self) -> Path:
        return self.path / "checkpoints" / "best.ckpt"

    @property
    def last(self) -> Path:
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def exists(self) -> bool:
        """Whether a training was recorded here: a checkpoint can also be outside of a run."""
        return self.config.is_file()

    @property
    def is_writable(self) -> bool:
        return os.access(self.path, os.W_OK)

    def lock(self) -> None:
        """Keeps other trainings out, until this process ends or calls ``unlock``.

        Raises:
            ValueError: another process trains in it, or the folder cannot be locked.
        """
        if not is_first_process():
            return
        self._lock = FileLock(self.path / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"{self} is being trained by another process: wait for it, or stop it"
            ) from None
        except (OSError, NotImplementedError) as error:
            lock = short(self.path / ".lock")
            raise ValueError(f"{lock} cannot be locked: {reason(error)}") from error

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def take_back(self) -> None:
        """Removes the folder of a training that failed before its first step."""
        if self.is_new and is_first_process():
            shutil.rmtree(self.path, ignore_errors=True)


def find_checkpoint(
    where: str, root: Path, run_name: str | None = None, kind: str = "best"
) -> Path:
    """Finds the checkpoint file that the user means.

    Args:
        where: a checkpoint file; the folder of a run, or of several runs (then the newest); or the
            name of a run. ``/best`` or ``/last`` after a folder or name says which one.
            ``best`` or ``last`` alone belong to ``run_name``.
        root: the folder that holds the runs, ``lightning_logs``.
        run_name: the name that this command's configuration gives to its runs.
        kind: ``best`` or ``last``, if ``where`` does not say it.

    Raises:
        ValueError: there is no such checkpoint; the message says where it looked.
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
                f"--ckpt_path {where}: of which run? Give {root.name}/NAME/{where}, or --config"
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


def run_name(request: Request) -> str | None:
    """The name that a command's configuration gives to its runs, if it has one."""
    if not request.configs:
        return None
    file = request.configs[-1].absolute()
    # the config.yaml of a run gives that run's name: lightning_logs/NAME/version_N/config.yaml
    of_run = file.name == "config.yaml" and re.fullmatch(r"version_\d+", file.parent.name)
    return file.parent.parent.name if of_run else file.stem
