"""Cuts the power, in simulation, while a training, a search and a test write: is anything lost?

    python benchmarks/powerloss.py              # some minutes; writes its table to reliability.md
    python benchmarks/powerloss.py --losses 5   # of each command

The command runs in processes that keep a second copy of what a disk would hold for sure: of each
file the content when it was last synced (``os.fsync``), of each folder the names. At one of its
writes all of them are killed, and the folder is replaced by what a power cut could leave. Nothing
that was reported until then may be missing, and the command that is given again must end with the
bits of one that was never disturbed.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

if "POWERLOSS" not in os.environ:  # a recorded process starts without all this
    import torture
    from common import RELIABILITY, write_section

    from mnist_lightning.provenance import provenance
    from mnist_lightning.runs import checkpoints, evaluations
    from mnist_lightning.search.results import load_results

FIT = [
    *("fit", "--config", "shallow.yaml", "--data.source", "digits", "--early_stopping.enabled=no"),
    *("--trainer.max_epochs", "6", "--save_every_minutes", "0.002"),
]
WANTED = {
    "model": "ShallowNetwork",
    "data": {"source": "digits"},
    "space": {"batch_size": [16, 64], "max_epochs": [2, 20], "lr": [0.1, 0.01]},
}
SEARCH = ["search", "--config", "wanted.yaml", "--folder", "found", "--workers", "2"]
TEST = ["test", "--ckpt_path", "shallow"]
KEPT = ("nothing that was not synced", "names, but no contents", "each change or not, at random")
TITLE = "## Power cuts"
SECTION = f"""{TITLE}

`python benchmarks/powerloss.py --losses {{losses}} --seed {{seed}}`, commit {{commit}}. Simulated:
at a random one of its writes, a command and its workers are killed, and the folder is replaced by
what the disk could hold then. What was synced (`fsync` of the file, and of the folder for its name)
is kept. Of the rest, one third of the power cuts keep nothing, one third keep names without
contents, and one third keep each change at random. What must not be lost: epochs that were printed,
checkpoints that were saved, trials that were finished, test evaluations that were printed. Then the
same command, or `fit --ckpt_path .../last`, goes on. Left out: TensorBoard's event files. Nobody
syncs them, and `metrics.csv` and the trials hold the same figures.

| command | its writes | power cuts | lost something reported | bit-equal after the restart |
|---|--:|--:|--:|--:|
{{rows}}
"""


class Disk:
    """What a disk holds for sure, noted whenever something is synced.

    Args:
        root: the folder that is watched.
        store: where it is noted, on the same file system.
    """

    def __init__(self, root: Path, store: Path) -> None:
        self.root, self.store = root.resolve(), store
        store.mkdir(exist_ok=True)

    def note(self, path: Path) -> None:
        """A file or folder is synced."""
        number = path.stat().st_ino
        if path.is_dir():
            names = {entry.name: entry.inode() for entry in os.scandir(path)}
            self._write(self.store / f"{number}.names", json.dumps(names).encode())
            return
        self._write(self.store / f"{number}.content", path.read_bytes())
        kept = self.store / f"{number}.kept"  # so that no other file gets its number
        if not kept.exists():
            os.link(path, kept)

    def _write(self, file: Path, content: bytes) -> None:
        fresh = file.with_name(f"{file.name}.{os.getpid()}")
        fresh.write_bytes(content)
        fresh.rename(file)

    def settle(self) -> None:
        """All that is there now is on the disk."""
        for path in [self.root, *self.root.rglob("*")]:
            if not path.is_symlink():
                self.note(path)

    def cut(self, kept: str) -> None:
        """Leaves in the folder what a power cut could.

        Args:
            kept: of what was not synced; one of ``KEPT``.
        """
        after = self.root.with_name(f"{self.root.name}.after")
        self._rebuild(self.root.stat().st_ino, self.root, after, kept)
        shutil.rmtree(self.root)
        after.rename(self.root)

    def _rebuild(self, number: int, now: Path | None, target: Path, kept: str) -> None:
        """Writes a file or folder anew, as it is after the power cut.

        Args:
            number: its inode.
            now: where it is before the power cut; ``None`` if no name leads to it any more.
            target: where it goes.
            kept: see ``cut``.
        """
        noted = self.store / f"{number}.names"
        if noted.is_file() or (now is not None and now.is_dir()):
            target.mkdir()
            old = json.loads(noted.read_text()) if noted.is_file() else {}
            new = {e.name: e.inode() for e in os.scandir(now)} if now is not None else {}
            for name in sorted(old.keys() | new.keys()):
                chosen = {
                    KEPT[0]: old.get(name),
                    KEPT[1]: new.get(name),
                    KEPT[2]: random.choice([old.get(name), new.get(name)]),
                }[kept]
                if chosen is not None:
                    here = now / name if now is not None and new.get(name) == chosen else None
                    self._rebuild(chosen, here, target / name, kept)
            return
        if now is not None and now.is_symlink():
            target.symlink_to(os.readlink(now))
            return
        synced = self.store / f"{number}.content"
        content = synced.read_bytes() if synced.is_file() else b""
        if kept == KEPT[2] and now is not None:
            whole = now.read_bytes()
            content = random.choice([content, whole, whole[: random.randint(0, len(whole))]])
            if synced.is_file() and whole.startswith(synced.read_bytes()):
                content = max(content, synced.read_bytes(), key=len)  # what was appended was not
        target.write_bytes(content)


def record() -> None:
    """Has this process note what it syncs, and die at the write that is meant to be the last."""
    facts = json.loads(os.environ["POWERLOSS"])
    disk = Disk(Path(facts["root"]), Path(facts["store"]))
    counter, reported = (
        os.open(facts[name], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        for name in ("counter", "reported")
    )

    def step() -> None:
        os.write(counter, b".")
        if os.fstat(counter).st_size >= facts["last"]:
            os.killpg(0, signal.SIGKILL)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not (flags & (os.O_WRONLY | os.O_RDWR)):
                return
        elif event in ("os.rename", "os.link", "os.remove", "os.mkdir"):
            path = arguments[0]
        else:
            return
        if isinstance(path, str | os.PathLike) and Path(path).absolute().is_relative_to(disk.root):
            step()

    def fsync(file: Any) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_relative_to(disk.root):
            step()
            disk.note(path)
            step()

    def say_afterwards(owner: type, name: str, what: Callable[..., str]) -> None:
        method = getattr(owner, name)

        def reporting(self: Any, *arguments: Any, **more: Any) -> Any:
            result = method(self, *arguments, **more)
            os.write(reported, f"{what(*arguments)}\n".encode())
            return result

        setattr(owner, name, reporting)

    from mnist_lightning.runs import checkpoints
    from mnist_lightning.search import results

    os.fsync = fsync
    sys.addaudithook(watch)
    say_afterwards(
        checkpoints.WholeFiles, "save_checkpoint", lambda c, p, *_: f"{p} {c['global_step']}"
    )
    say_afterwards(results.Results, "add", lambda trial: trial["id"])


def lose(words: Sequence[str], root: Path, last: int, kept: str) -> tuple[int, list[str], str]:
    """Runs a command and cuts the power at a write.

    Args:
        words: of the command.
        root: the folder that it runs in, and may write to.
        last: the write at which it ends.
        kept: see ``Disk.cut``.

    Returns:
        How many writes there were; what was reported as saved, a line each; what was printed.
    """
    with tempfile.TemporaryDirectory(dir=root.parent) as store:
        disk = Disk(root, Path(store) / "disk")
        disk.settle()
        facts = {"root": str(disk.root), "store": str(disk.store), "last": last}
        facts |= {name: f"{store}/{name}" for name in ("counter", "reported")}
        done = subprocess.run(
            [sys.executable, __file__, *words],
            cwd=root,
            env={**os.environ, "POWERLOSS": json.dumps(facts)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        writes = Path(facts["counter"]).stat().st_size
        if done.returncode not in (0, -signal.SIGKILL):
            raise RuntimeError(f"{words} ended with {done.returncode}: {done.stdout}")
        if writes >= last:
            disk.cut(kept)
        return writes, Path(facts["reported"]).read_text().splitlines(), done.stdout


def again(words: Sequence[str], root: Path) -> str:
    """Runs a command, undisturbed; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "mnist_lightning", *words],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}: {done.stdout}")
    return done.stdout


class Fit:
    """A training."""

    words = FIT

    def prepare(self, root: Path) -> None:
        """What the folder holds before."""

    def lost(self, root: Path, saved: Sequence[str], said: str) -> list[str]:
        """What was reported and is not there."""
        printed = max([0, *map(int, re.findall(r"^epoch +(\d+)/", said, re.MULTILINE))])
        steps = {Path(line.split()[0]).name: int(line.split()[1]) for line in saved}
        run = torture.run_folder(root)
        if run is None:
            return [f"epoch {printed}"] * bool(printed) + [f"{name}" for name in steps]
        missing = []
        for name, step in steps.items():
            file = run / "checkpoints" / name
            if not file.is_file() or checkpoints.read(file)["global_step"] < step:
                missing.append(f"{name} of step {step}")
        last = checkpoints.read(run / "checkpoints/last.ckpt")
        if checkpoints.progress(last)[0] < printed:
            missing.append(f"epoch {printed}")
        return missing

    def restart(self, root: Path) -> None:
        """As its user would."""
        run = torture.run_folder(root)
        again(self.words if run is None else ["fit", "--ckpt_path", str(run / "last")], root)

    def contents(self, root: Path) -> Any:
        """What must be bit-equal."""
        run = torture.run_folder(root)
        assert run is not None
        return torture.contents(run)


class Search(Fit):
    """A search with two workers."""

    words = SEARCH

    def prepare(self, root: Path) -> None:
        (root / "wanted.yaml").write_text(yaml.safe_dump(WANTED, sort_keys=False))

    def lost(self, root: Path, saved: Sequence[str], said: str) -> list[str]:
        missing = []
        for id in saved:
            record = root / f"found/trials/{id}.json"
            if not record.is_file() or not record.stat().st_size:
                missing.append(f"trial {id}")
            checkpoints.read(root / f"found/checkpoints/{id}.ckpt")
        return missing

    def restart(self, root: Path) -> None:
        again(self.words, root)

    def contents(self, root: Path) -> Any:
        table = load_results(root / "found").drop(columns="seconds")
        weights = {
            file.name: checkpoints.read(file)["state_dict"]
            for file in (root / "found/checkpoints").glob("*.ckpt")
        }
        return {"trials": table.to_dict("records"), "weights": weights}


class Test(Fit):
    """An evaluation on the test images."""

    words = TEST

    def prepare(self, root: Path) -> None:
        again(FIT, root)

    def lost(self, root: Path, saved: Sequence[str], said: str) -> list[str]:
        noted = evaluations.read(root / "lightning_logs/shallow/version_0")
        return ["the evaluation"] if "test/acc" in said and not noted else []

    def restart(self, root: Path) -> None:
        if not evaluations.read(root / "lightning_logs/shallow/version_0"):
            again(self.words, root)

    def contents(self, root: Path) -> Any:
        (noted,) = evaluations.read(root / "lightning_logs/shallow/version_0")
        return {name: noted[name] for name in ("evaluation", "test/acc", "test/loss", "mistakes")}


COMMANDS: dict[str, Fit] = {"fit": Fit(), "search": Search(), "test": Test()}


def losses(name: str, count: int, folder: Path) -> tuple[int, int, int, list[str]]:
    """Cuts the power so many times while a command runs, each time from its start.

    Returns:
        How many writes the command has; how many power cuts lost something that was reported; how
        many were followed by a restart with the undisturbed bits; and all that was wrong.
    """
    command = COMMANDS[name]
    root = folder / "undisturbed"
    root.mkdir()
    command.prepare(root)
    start = shutil.copytree(root, folder / "start")
    writes, _, _ = lose(command.words, root, sys.maxsize, KEPT[0])
    expected = command.contents(root)
    lost, equal, wrong = 0, 0, []
    for number in range(count):
        root = shutil.copytree(start, folder / f"cut{number}")
        last = random.randint(1, writes)
        kept = KEPT[number % len(KEPT)]
        _, saved, said = lose(command.words, root, last, kept)
        where = f"{name}, write {last} of {writes}, kept {kept}"
        try:
            missing = command.lost(root, saved, said)
            lost += bool(missing)
            wrong += [f"{where}: lost {what}" for what in missing]
            command.restart(root)
            same = torture.same(expected, command.contents(root))
            equal += same
            wrong += [] if same else [f"{where}: other bits"]
        except (RuntimeError, ValueError) as error:
            wrong.append(f"{where}: {error}")
    return writes, lost, equal, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--losses", type=int, default=9, help="of each command")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", nargs="+", default=COMMANDS, help="commands")
    parser.add_argument("--table", type=Path, default=RELIABILITY, help="the file to write to")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    rows, faults = [], []
    commit = str(provenance().get("code", {}).get("commit", ""))[:7]
    for name in arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            writes, lost, equal, wrong = losses(name, arguments.losses, Path(folder))
        rows.append(f"| `{name}` | {writes:,} | {arguments.losses} | {lost} | {equal} |")
        print(rows[-1], *wrong, sep="\n  ", flush=True)
        faults += wrong
        section = SECTION.format(
            losses=arguments.losses, seed=arguments.seed, commit=commit, rows="\n".join(rows)
        )
        write_section(TITLE, section, arguments.table)
    return 1 if faults else 0


if "POWERLOSS" in os.environ:  # also in a search's workers, which import the main file again
    record()
    if __name__ == "__main__":
        from mnist_lightning.__main__ import main as command

        sys.exit(command(sys.argv[1:]))
elif __name__ == "__main__":
    sys.exit(main())
