"""Disturbs searches in many ways: is every trial finished exactly once, with the same bits?

python benchmarks/searches.py                      # minutes; writes its table to reliability.md
python benchmarks/searches.py --only killed frozen # some of the disturbances
"""

import argparse
import contextlib
import functools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if "DISTURBED" not in os.environ:  # a disturbed process starts without all this
    import torture
    import yaml
    from common import RELIABILITY, write_section

    from mnist_lightning.provenance import provenance
    from mnist_lightning.runs import checkpoints
    from mnist_lightning.search.leases import open_storage
    from mnist_lightning.search.results import load_results

WANTED = {
    "model": "ShallowNetwork",
    "data": {"source": "digits"},
    "space": {"batch_size": [4, 8, 16, 32], "max_epochs": [1, 20, 40], "lr": [0.1, 0.01]},
}
TRIALS = 24
POISON = """
import os, signal
from mnist_lightning.models import Perceptron

class Poison(Perceptron):
    def training_step(self, batch, batch_idx):
        if self.lr == 0.5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)
"""
TITLE = "## Searches that are disturbed"
SECTION = f"""{TITLE}

`python benchmarks/searches.py --seed {{seed}}`, commit {{commit}}: a search of {TRIALS} trials in 4
units. Finished once: each trial has one result, whose file was written once; where two commands
have a folder each, both hold the same results, and no weights twice. Same bits: all figures and
weights are those of an undisturbed search with one worker.

| what happened | exit codes | finished once | same bits |
|---|---|---|---|
{{rows}}
"""


class Outcome(NamedTuple):
    """What became of a search."""

    codes: list[int]
    once: bool
    same: bool


def disturbed() -> None:
    """In a worker: a short lease; and one of them freezes itself in the middle of a unit."""
    from mnist_lightning.search import leases
    from mnist_lightning.training.population import PopulationTraining

    leases.HEARTBEAT_SECONDS, leases.STALE_SECONDS = 0.5, 5.0
    run_epoch = PopulationTraining.run_epoch

    def freeze_once(self: Any) -> None:
        run_epoch(self)
        if self.epoch == 5:
            with contextlib.suppress(FileExistsError), open("frozen", "x") as file:
                file.write(str(os.getpid()))
                file.flush()
                os.kill(os.getpid(), signal.SIGSTOP)

    PopulationTraining.run_epoch = freeze_once  # type: ignore[method-assign]


def start(
    root: Path, *words: str, within: Sequence[str] = (), **environment: str
) -> "subprocess.Popen[str]":
    """The command, in a process group of its own."""
    (root / "wanted.yaml").write_text(yaml.safe_dump(WANTED, sort_keys=False))
    program = [__file__] if "DISTURBED" in environment else ["-m", "mnist_lightning"]
    return subprocess.Popen(
        [*within, sys.executable, *program, "search", "--config", "wanted.yaml", *words],
        cwd=root,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


class Stamps:
    """Whether a trial's file was ever written a second time."""

    def __init__(self, *folders: Path) -> None:
        self.folders, self.once = folders, True
        self._known: dict[Path, int] = {}

    def look(self) -> int:
        """Looks at all there are now; returns how many."""
        for folder in self.folders:
            for file in folder.glob("trials/[!.]*.json"):
                with contextlib.suppress(FileNotFoundError):
                    stamp = file.stat().st_mtime_ns
                    self.once &= self._known.setdefault(file, stamp) == stamp
        return len(self._known)


def wait(condition: Callable[[], Any], processes: Sequence["subprocess.Popen[str]"]) -> bool:
    """Waits until it holds; answers whether it did before one of the processes had ended."""
    while not condition():
        if any(process.poll() is not None for process in processes):
            return bool(condition())
        time.sleep(0.05)
    return True


def end(*processes: "subprocess.Popen[str]") -> list[int]:
    """Waits for the processes; returns their exit codes."""
    codes = []
    for process in processes:
        said, _ = process.communicate(timeout=900)
        codes.append(process.returncode)
        if process.returncode:
            print(said[-2000:], file=sys.stderr)
        if "Traceback" in said:
            raise RuntimeError(said)
    return codes


def trials(folder: Path) -> Any:
    """The table of a search, whatever its folder is called."""
    return load_results(folder).drop(columns="search")


def figures(folder: Path) -> Any:
    """All but the time that it took."""
    return trials(folder).drop(columns="seconds").to_dict("records")


def weights(folder: Path) -> dict[str, Any]:
    found = folder.glob("checkpoints/[!b.]*.ckpt"), folder.glob("checkpoints/b[!e]*.ckpt")
    return {f.name: checkpoints.read(f)["state_dict"] for files in found for f in files}


def compare(codes: list[int], stamps: Stamps, calm: Path) -> Outcome:
    """The outcome of a search in one folder, or of two commands with a folder each."""
    stamps.look()
    held = [figures(folder) for folder in stamps.folders]
    once = stamps.once and all(len(found) == TRIALS for found in held)
    together: dict[str, Any] = {}
    for folder in stamps.folders:
        own = weights(folder)
        once &= not own.keys() & together.keys()
        together |= own
    if len(stamps.folders) == 2:  # the seconds too: no trial was trained by both
        one, other = (trials(folder) for folder in stamps.folders)
        once &= bool(one.equals(other))
    same = all(torture.same(found, figures(calm)) for found in held)
    return Outcome(codes, once, same and torture.same(together, weights(calm)))


def killed(root: Path, calm: Path) -> Outcome:
    """four workers, six times one of them is killed at random"""
    folder = root / "found"
    process, stamps, kills = start(root, "--folder", "found", "--workers", "4"), Stamps(folder), 0
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait(lambda: (folder / "journal.log").is_file(), [process])
    while process.poll() is None:
        time.sleep(random.uniform(0.2, 3))
        stamps.look()
        with contextlib.suppress(OSError):
            workers = children.read_text().split()[1:]  # the first is multiprocessing's own
            if workers and kills < 6:
                os.kill(int(random.choice(workers)), signal.SIGKILL)
                kills += 1
    return compare(end(process), stamps, calm)


def frozen(root: Path, calm: Path) -> Outcome:
    """two workers, one of them frozen (SIGSTOP) beyond its lease, then woken"""
    folder = root / "found"
    process = start(root, "--folder", "found", "--workers", "2", DISTURBED="1")
    stamps = Stamps(folder)
    wait(lambda: (root / "frozen").is_file() and (root / "frozen").read_text(), [process])

    def taken_over() -> bool:
        stamps.look()
        studies = open_storage(None, folder).get_all_studies()
        return any(study.study_name.endswith("/1") for study in studies)

    taken = wait(taken_over, [process])
    os.kill(int((root / "frozen").read_text()), signal.SIGCONT)
    outcome = compare(end(process), stamps, calm)
    return outcome._replace(once=outcome.once and taken)


def never_woken(root: Path, calm: Path) -> Outcome:
    """two workers, one of them frozen for good"""
    process = start(root, "--folder", "found", "--workers", "2", DISTURBED="1")
    return compare(end(process), Stamps(root / "found"), calm)


def containers(root: Path, calm: Path) -> Outcome | None:
    """two containers with one hostname, a folder each, a journal that both see"""
    own = ["unshare", "--fork", "--pid", "--mount-proc"]
    if os.geteuid():
        own[1:1] = ["--user", "--map-root-user"]
    if subprocess.run([*own, "true"], capture_output=True).returncode:
        return None
    return two(root, calm, "journal.log", within=own)


def two(
    root: Path,
    calm: Path,
    storage: str,
    within: Sequence[str] = (),
    meanwhile: Callable[[], object] = lambda: None,
) -> Outcome:
    """Two commands that know of each other through a storage."""
    names = ("one", "two")
    stamps = Stamps(*(root / name for name in names))
    words = ("--workers", "1", "--storage", storage)
    both = [start(root, "--folder", name, *words, within=within) for name in names]
    wait(lambda: stamps.look() > 0, both)
    meanwhile()
    return compare(end(*both), stamps, calm)


def full(root: Path, calm: Path) -> Outcome | None:
    """a full disk, then room, and the same command again"""
    small = root / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=700k", "none", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        return None
    try:
        stamps = Stamps(small / "found")
        words = ("--folder", "small/found", "--workers", "2")
        code = start(root, *words).wait()
        stamps.look()
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        outcome = compare([code, *end(start(root, *words))], stamps, calm)
        return outcome
    finally:
        subprocess.run(["umount", str(small)], check=True)


def database(root: Path, calm: Path) -> Outcome | None:
    """PostgreSQL stopped for ten seconds, two commands with a folder each"""
    with postgres() as server:
        if server is None:
            return None

        def restart() -> None:
            server.stop()
            time.sleep(10)
            server.start()

        return two(root, calm, server.address, meanwhile=restart)


def poisoned(root: Path, calm: Path) -> Outcome:
    """a trial that kills its worker, beside one that does not"""
    (root / "poison.py").write_text(POISON)
    words = "--model poison.Poison --folder found --workers 2".split()
    space = ["--space", "{lr: [0.5, 0.001]}", "--fixed", "{max_epochs: 1}"]
    paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    codes = end(start(root, *words, *space, PYTHONPATH=paths))
    bad, good = load_results(root / "found").to_dict("records")
    failed = bad["state"] == "FAIL" and bad["error"].startswith("its worker died 3 times")
    return Outcome(codes, failed and good["state"] == "COMPLETE", True)


def stopped(root: Path, calm: Path) -> Outcome:
    """SIGTERM, then SIGINT, then the same command to its end"""
    stamps, codes, journal = Stamps(root / "found"), [], root / "found/journal.log"

    def begun(since: float) -> bool:
        return journal.is_file() and journal.stat().st_mtime > since

    for number in (signal.SIGTERM, signal.SIGINT):
        ready = functools.partial(begun, time.time())
        process = start(root, "--folder", "found", "--workers", "2")
        wait(ready, [process])
        time.sleep(random.uniform(0, 3))
        process.send_signal(number)
        codes.append(process.wait())
        stamps.look()
    codes += end(start(root, "--folder", "found", "--workers", "2"))
    return compare(codes, stamps, calm)


def hopeless(root: Path, calm: Path) -> Outcome:
    """all trials diverge"""
    space = ["--space", "{lr: [1.0e+30, 1.0e+31]}", "--fixed", "{max_epochs: 2}"]
    codes = end(start(root, "--folder", "found", "--workers", "1", *space))
    states = set(load_results(root / "found")["state"])
    return Outcome(codes, states == {"FAIL"}, True)


class Server(NamedTuple):
    """A PostgreSQL server of our own."""

    address: str
    stop: Callable[[], object]
    start: Callable[[], object]


@contextlib.contextmanager
def postgres() -> Iterator[Server | None]:
    """A server from the programs on this machine; ``None`` where there are none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    programs = str(found[-1]) if found else os.path.dirname(shutil.which("initdb") or "")
    if not programs:
        yield None
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data, shell = Path(tempfile.mkdtemp()), ["sh", "-c"]
    if os.geteuid() == 0:  # the server refuses to run as root
        shutil.chown(data, "postgres")
        shell = ["su", "postgres", "-s", "/bin/sh", "-c"]

    def run(words: str) -> None:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run([*shell, words], check=True, cwd="/", **quiet)  # type: ignore[call-overload]

    control = f"{programs}/pg_ctl -D {data} -l {data}/log -w"
    launch = f'{control} -o "-h 127.0.0.1 -p {port} -k {data}" start'
    try:
        run(f"{programs}/initdb -D {data} -A trust -U postgres")
        run(launch)
        yield Server(
            f"postgresql://postgres@127.0.0.1:{port}/postgres",
            lambda: run(f"{control} -m immediate stop"),
            lambda: run(launch),
        )
        run(f"{control} -m immediate stop")
    finally:
        shutil.rmtree(data)


DISTURBANCES: dict[str, Callable[[Path, Path], Outcome | None]] = {
    function.__name__: function
    for function in (
        killed,
        frozen,
        never_woken,
        containers,
        full,
        database,
        poisoned,
        stopped,
        hopeless,
    )
}
CODES = {"full": [1, 0], "stopped": [143, 130, 0], "hopeless": [1]}


def undisturbed(root: Path) -> Path:
    """The folder of a search that nothing happens to."""
    root.mkdir()
    if any(end(start(root, "--folder", "calm", "--workers", "1"))):
        raise RuntimeError("the undisturbed search failed")
    return root / "calm"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", nargs="+", default=DISTURBANCES, help="disturbances, by name")
    parser.add_argument("--table", type=Path, default=RELIABILITY, help="the file to write to")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    # a shell that starts this in the background has it ignored, by its children too
    signal.signal(signal.SIGINT, signal.default_int_handler)
    rows, bad = [], 0
    commit = str(provenance().get("code", {}).get("commit", ""))[:7]
    with tempfile.TemporaryDirectory() as folder:
        calm = undisturbed(Path(folder, "undisturbed"))
        for name in arguments.only:
            root = Path(folder, name)
            root.mkdir()
            outcome = DISTURBANCES[name](root, calm)
            what = (DISTURBANCES[name].__doc__ or "").strip()
            if outcome is None:
                rows.append(f"| {what} | not possible on this machine | | |")
            else:
                expected = CODES.get(name, [0] * len(outcome.codes))
                good = outcome.once and outcome.same and outcome.codes == expected
                bad += not good
                words = ["yes" if part else "**no**" for part in outcome[1:]]
                codes = ", ".join(map(str, outcome.codes))
                rows.append(f"| {what} | {codes} | {' | '.join(words)} |")
            print(rows[-1], flush=True)
            section = SECTION.format(seed=arguments.seed, commit=commit, rows="\n".join(rows))
            write_section(TITLE, section, arguments.table)
    return bool(bad)


if "DISTURBED" in os.environ:  # also in the workers, which import the main file again
    disturbed()
    if __name__ == "__main__":
        from mnist_lightning.__main__ import main as command

        sys.exit(command(sys.argv[1:]))
elif __name__ == "__main__":
    sys.exit(main())
