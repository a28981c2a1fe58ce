"""Who trains what: workers on any number of machines agree through an Optuna storage."""

import contextlib
import os
import socket
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna

HEARTBEAT_SECONDS = 5.0
# A worker on another machine that has shown no sign of life for so long is taken for dead.
STALE_SECONDS = 60.0


class Claims:
    """Units of work, each taken by one worker at a time.

    Every Optuna storage lets exactly one caller create a study of a given name. A unit is taken by
    creating the study ``<search>/<unit>/<attempt>``; where the worker who did so died, the next
    attempt is free. Finished trials travel in it to machines that do not share the folder.

    Args:
        storage: see ``open_storage``.
        search: a name that no other search in the storage has.
    """

    def __init__(self, storage: "optuna.storages.BaseStorage", search: str) -> None:
        self.storage, self.search = storage, search
        self._seen: dict[str, tuple[Any, float]] = {}

    def take(
        self, unit: str, ids: Sequence[str] = ()
    ) -> "optuna.Study | list[dict[str, Any]] | None":
        """The unit's claim, now ours; its records, if it is finished; ``None`` if it is taken.

        Args:
            unit: its name.
            ids: of the trials that the records must have.
        """
        import optuna

        attempt = 0
        while True:
            name = f"{self.search}/{unit}/{attempt}"
            try:
                claim = optuna.create_study(
                    storage=self.storage, study_name=name, direction="maximize"
                )
            except optuna.exceptions.DuplicatedStudyError:
                known = optuna.load_study(storage=self.storage, study_name=name).user_attrs
                if set(ids) <= set(known.get("finished", ())) and "finished" in known:
                    return [known[f"trial {id}"] for id in known["finished"]]
                over = {"finished", "released"} & known.keys()
                if not over and not self._dead(name, known.get("owner")):
                    return None
                attempt += 1
            else:
                claim.set_user_attr("owner", {**_process(), "beat": 0})
                return claim

    def _dead(self, name: str, owner: dict[str, Any] | None) -> bool:
        if owner and owner["machine"] == _process()["machine"]:
            return _started(owner["pid"]) != owner["started"]
        # by the observer's own clock: two machines need not agree on the time
        seen = self._seen.get(name)
        if seen is None or seen[0] != owner:
            self._seen[name] = (owner, time.monotonic())
            return False
        return time.monotonic() - seen[1] > STALE_SECONDS

    @staticmethod
    def finish(claim: "optuna.Study", records: Sequence[dict[str, Any]]) -> None:
        """Notes what came out of a unit, so that nobody takes it again."""
        for record in records:
            claim.set_user_attr(f"trial {record['id']}", record)
        claim.set_user_attr("finished", [record["id"] for record in records])

    @staticmethod
    @contextlib.contextmanager
    def alive(claim: "optuna.Study") -> Iterator[None]:
        """Shows signs of life while the unit is trained; releases it when that is cut off."""
        over = threading.Event()

        def beat() -> None:
            number = 0
            while not over.wait(HEARTBEAT_SECONDS):
                number += 1
                with contextlib.suppress(Exception):  # a storage out of reach may come back
                    claim.set_user_attr("owner", {**_process(), "beat": number})

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            with contextlib.suppress(Exception):
                claim.set_user_attr("released", True)
            raise
        finally:
            over.set()
            thread.join()


def _process() -> dict[str, Any]:
    boot = Path("/proc/sys/kernel/random/boot_id")
    machine = f"{socket.gethostname()} {boot.read_text().strip() if boot.is_file() else ''}"
    return {"machine": machine, "pid": os.getpid(), "started": _started(os.getpid())}


def _started(pid: int) -> str | None:
    """When a process of this machine started; ``None`` where there is none.

    Without ``/proc`` only whether there is one: a number that was used again then counts as alive.
    """
    if Path("/proc/self/stat").is_file():
        try:
            # the command's name, in parentheses, may hold spaces: count from behind it
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] == "Z" else fields[19]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "running"


def open_storage(url: str | None, folder: Path) -> "optuna.storages.BaseStorage":
    """The storage where workers meet.

    Args:
        url: a journal file (on a disk that all machines see), ``grpc://host:port`` of Optuna's
            proxy, or a database like ``postgresql://user@host/name``; by default a journal in
            ``folder``.
        folder: of the search.

    Raises:
        ValueError: it cannot be reached, or Optuna is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ValueError("a search needs Optuna: pip install 'mnist-lightning[search]'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    journal = folder / "journal.log"
    try:
        storage = _connect(url or str(journal))
        storage.get_all_studies()
    except Exception as error:  # each backend has exceptions of its own
        if url is None and journal.is_file():
            # ours alone, and no more than an index: the trials hold all that matters
            os.replace(journal, folder / "journal.damaged")
            return open_storage(None, folder)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"storage {_without_password(url)} cannot be reached: {reason}") from error
    return storage


def _connect(url: str) -> "optuna.storages.BaseStorage":
    from optuna.storages import GrpcStorageProxy, JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    if "://" not in url:
        return JournalStorage(JournalFileBackend(url))
    if url.startswith("grpc://"):
        host, _, port = url.removeprefix("grpc://").rpartition(":")
        proxy = GrpcStorageProxy(host=host, port=int(port))
        proxy.wait_server_ready(timeout=15)
        return proxy
    limit = {"connect_timeout": 15} if url.startswith("postgres") else {}
    if find_spec("psycopg") is None:  # SQLAlchemy's first choice, but its forerunner will do
        url = url.replace("postgresql://", "postgresql+psycopg2://", 1)
    tries = 5
    while True:
        try:
            return RDBStorage(url, engine_kwargs={"connect_args": limit})
        except Exception as error:
            tries -= 1
            if not tries or "already exists" not in str(error):
                raise
            time.sleep(1)  # two machines make the tables at the same moment: one of them cannot


def _without_password(url: str | None) -> str:
    scheme, separator, rest = (url or "").rpartition("://")
    account, at, place = rest.rpartition("@")
    return f"{scheme}{separator}{account.partition(':')[0]}{at}{place}"
