"""Which worker trains what: workers on any number of machines agree through an Optuna storage."""

import contextlib
import errno
import functools
import itertools
import multiprocessing
import os
import socket
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import optuna
from optuna.exceptions import DuplicatedStudyError
from optuna.storages import GrpcStorageProxy, JournalStorage, RDBStorage, get_storage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import StudyDirection

from mnist_lightning.search.results import Record

HEARTBEAT_SECONDS = 5.0
# A worker without a sign of life for so long counts as dead, though it may only be frozen.
STALE_SECONDS = 60.0
# A journal is locked for milliseconds; an older lock was left by a process that died.
LOCK_SECONDS = 10
# A worker asks a storage that does not answer again for so long, then gives up.
PATIENCE_SECONDS = 60.0


class LeaseLost(Exception):
    """The unit now belongs to another worker, as this one seemed dead; its results do not count."""


class StorageLost(ValueError):
    """The storage has not answered for ``PATIENCE_SECONDS``."""


class Leases:
    """Leases of units of work, each held by one worker at a time.

    Every Optuna storage lets exactly one caller create a study of a given name. A worker takes a
    unit by creating the study ``<search>/<unit>/<attempt>``; if that worker dies, the next attempt
    is free. The study also carries finished trials to machines that do not share the folder.

    Args:
        storage: see ``open_storage``.
        search: a name that no other search in the storage has.
    """

    def __init__(self, storage: optuna.storages.BaseStorage, search: str) -> None:
        self.storage, self.search = storage, search
        self._seen: dict[str, tuple[Any, float]] = {}
        self._last_check = time.monotonic()

    def take(self, unit: str, ids: Sequence[str]) -> "Lease | dict[str, Record] | None":
        """Takes a unit, if it is free.

        Args:
            unit: its name.
            ids: of its trials.

        Returns:
            The lease; of a finished unit its records, by id; ``None`` if another worker has it.
        """
        records: dict[str, Record] = {}
        deaths: list[str] = []
        furthest = -1.0
        for attempt in itertools.count():
            name = f"{self.search}/{unit}/{attempt}"
            try:
                # optuna.create_study would read all names of a journal once more
                study_id = self.storage.create_new_study([StudyDirection.MAXIMIZE], name)
            except DuplicatedStudyError:
                known = self._attributes(name)
                records |= _published(known, ids)
                if "finished" in known and set(ids) <= records.keys():
                    return records
                over = {"finished", "released", "died"} & known.keys()
                if not over and not self._dead(name, known.get("owner")):
                    return None
                if "died" in known:
                    # only deaths since the last one that left some progress
                    if known.get("from", 0.0) > furthest:
                        furthest = known.get("from", 0.0)
                        deaths = []
                    deaths.append(known["died"])
            else:
                self.storage.set_study_user_attr(study_id, "owner", {**_process(), "beat": 0})
                if attempt:  # the records that the worker before published until now
                    before = f"{self.search}/{unit}/{attempt - 1}"
                    records |= _published(self._attributes(before), ids)
                follower = f"{self.search}/{unit}/{attempt + 1}"
                return Lease(study_id, self.storage, follower, attempt > 0, records, deaths)
        raise AssertionError("there is always a next attempt")

    def _attributes(self, study_name: str) -> dict[str, Any]:
        return self.storage.get_study_user_attrs(self.storage.get_study_id_from_name(study_name))

    def _dead(self, name: str, owner: dict[str, Any] | None) -> bool:
        here = owner is not None and owner["machine"] == _process()["machine"]
        if owner and here and start_of(owner["pid"]) != owner["started"]:
            crew = owner.get("crew")  # if it lives, it notes the death itself, with the reason
            if crew is None or start_of(crew["pid"]) != crew["started"]:
                return True
        # by the clock of this machine: the clocks of two machines may differ
        now = time.monotonic()
        if now - self._last_check > STALE_SECONDS / 2:
            self._seen.clear()  # this worker was frozen itself, or the storage did not answer
        self._last_check = now
        seen = self._seen.get(name)
        if seen is None or seen[0] != owner:
            self._seen[name] = (owner, now)
            return False
        return now - seen[1] > STALE_SECONDS

    def note_death(self, pid: int, started: str | None, reason: str) -> bool:
        """Notes the death of a process of this machine on the unit that it held.

        Returns:
            Whether it held one.
        """
        who = {"machine": _process()["machine"], "pid": pid, "started": started}
        for study in self.storage.get_all_studies():
            known = study.user_attrs
            if (
                study.study_name.startswith(f"{self.search}/")
                and who.items() <= known.get("owner", {}).items()
                and not {"finished", "released", "died"} & known.keys()
            ):
                self.storage.set_study_user_attr(study._study_id, "died", reason)
                return True
        return False

    def forget(self, ids: Collection[str]) -> None:
        """Withdraws the records of these trials, so that they are trained again."""
        for study in self.storage.get_all_studies():
            if study.study_name.startswith(f"{self.search}/"):
                for id in _published(study.user_attrs, ids):
                    self.storage.set_study_user_attr(study._study_id, f"trial {id}", None)


class Lease:
    """The right to train a unit, until another worker takes this one for dead.

    Attributes:
        had_before: whether another worker had the unit before.
        records: of its finished trials, by id.
        deaths: how each worker ended that the unit has killed since the last progress.
    """

    def __init__(
        self,
        study_id: int,
        storage: optuna.storages.BaseStorage,
        follower: str,
        had_before: bool,
        records: dict[str, Record],
        deaths: Sequence[str],
    ) -> None:
        self.had_before, self.records, self.deaths = had_before, records, deaths
        self._study_id, self._storage, self._follower = study_id, storage, follower
        self._published: set[str] = set()
        self._lost = threading.Event()

    def check(self) -> None:
        """Makes sure that the lease still holds.

        Raises:
            LeaseLost: it does not.
        """
        with contextlib.suppress(KeyError):
            self._storage.get_study_id_from_name(self._follower)
            self._lost.set()
        self.check_quickly()

    def check_quickly(self) -> None:
        """The same without asking the storage: what the last sign of life has found."""
        if self._lost.is_set():
            raise LeaseLost

    def continues_from(self, part: float) -> None:
        """Notes that training continues from a state in which this part of it was done."""
        self._storage.set_study_user_attr(self._study_id, "from", part)

    def publish(self, record: Record) -> None:
        """Shows a finished trial to other machines.

        Raises:
            LeaseLost: another worker has the unit. The record does not count: other machines may
                have that worker's, which may differ.
        """
        self._storage.set_study_user_attr(self._study_id, f"trial {record['id']}", record)
        # a worker that takes the unit from now on reads the record; one that took it before may not
        self.check()
        self._published.add(record["id"])

    def finish(self, records: Sequence[Record]) -> None:
        """Notes the unit as finished, with its records.

        Raises:
            LeaseLost: another worker has the unit.
        """
        for record in records:
            if record["id"] not in self._published and self.records.get(record["id"]) != record:
                self.publish(record)
        self.check()
        self._storage.set_study_user_attr(
            self._study_id, "finished", [record["id"] for record in records]
        )

    @contextlib.contextmanager
    def alive(self) -> Iterator[None]:
        """Shows signs of life while the unit is trained; frees the unit if that is interrupted."""
        over = threading.Event()

        def beat() -> None:
            number = 0
            while not over.wait(HEARTBEAT_SECONDS):
                number += 1
                with contextlib.suppress(Exception):  # the storage may come back
                    self._storage.set_study_user_attr(
                        self._study_id, "owner", {**_process(), "beat": number}
                    )
                    self.check()

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            with contextlib.suppress(Exception):
                self._storage.set_study_user_attr(self._study_id, "released", True)
            raise
        finally:
            over.set()
            thread.join(HEARTBEAT_SECONDS)  # it may be waiting for the storage


Claim, Claims = Lease, Leases  # names of before


def _published(attributes: Mapping[str, Any], ids: Collection[str]) -> dict[str, Record]:
    """The records of these trials among the attributes of a study."""
    records = {id: attributes.get(f"trial {id}") for id in ids}
    return {id: record for id, record in records.items() if record is not None}


def _process() -> dict[str, Any]:
    """Which process this is, on which machine.

    On one machine, a process number means the same to all processes. So containers are different
    machines, even with the same hostname.
    """
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    facts = [socket.gethostname()]
    facts += [boot.read_text().strip()] if boot.is_file() else []
    facts += [os.readlink(namespace)] if namespace.is_symlink() else []
    who = {"machine": " ".join(facts), "pid": os.getpid(), "started": start_of(os.getpid())}
    if crew := multiprocessing.parent_process():  # of a worker: the command that started it
        who["crew"] = {"pid": crew.pid, "started": start_of(cast(int, crew.pid))}
    return who


def start_of(pid: int) -> str | None:
    """When a process of this machine started; ``None`` if there is none.

    Without ``/proc`` only whether there is one: a process that reuses the number then counts as it.
    """
    if Path("/proc/self/stat").is_file():
        try:
            # the command's name, in parentheses, may hold spaces: count after it
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


def open_storage(
    url: str | None, folder: Path, answered: bool = False
) -> optuna.storages.BaseStorage:
    """The storage where workers meet.

    Args:
        url: a journal file (on a disk that all machines see), ``grpc://host:port`` of Optuna's
            proxy, or a database like ``postgresql://user@host/name``; by default a journal in
            ``folder``.
        folder: of the search.
        answered: whether it has answered this command before. Then it is asked again for
            ``PATIENCE_SECONDS``, since it may be restarting.

    Raises:
        ValueError: it cannot be reached.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    journal = folder / "journal.log"
    place = _without_password(url or str(journal))

    def connect() -> optuna.storages.BaseStorage:
        storage = _connect(url or str(journal))
        storage.get_all_studies()
        return storage

    try:
        storage = _insist(f"storage {place}", connect) if answered else connect()
        patient: Any = _Patient(storage, f"storage {place}")
        return patient
    except Exception as error:  # each backend has exceptions of its own
        if url is None and journal.is_file():
            # only an index of the trials, which nobody else uses: begin a new one
            os.replace(journal, folder / "journal.damaged")
            return open_storage(None, folder)
        raise ValueError(f"storage {place} cannot be reached: {_reason(error)}") from error


class _Patient:
    """Asks a storage again if it does not answer: a database may be restarting.

    A request may have arrived although its answer was lost. All requests can be repeated, except
    the creation of a study: it then looks like that of another worker without a sign of life.
    """

    def __init__(self, storage: optuna.storages.BaseStorage, name: str) -> None:
        self._storage, self._name = storage, name

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(self._storage, attribute)
        if not callable(value):
            return value
        return functools.partial(_insist, self._name, value)


def _insist(name: str, ask: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Asks again for ``PATIENCE_SECONDS``.

    Raises:
        StorageLost: there is no answer, or no room.
    """
    deadline, pause = time.monotonic() + PATIENCE_SECONDS, 0.1
    while True:
        try:
            return ask(*args, **kwargs)
        except Exception as error:
            if not _may_come_back(error):
                raise
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
            if full or time.monotonic() + pause > deadline:
                does = "cannot be written" if full else "does not answer"
                raise StorageLost(f"{name} {does}: {_reason(error)}") from error
        time.sleep(pause)
        pause = min(2 * pause, 5.0)


def _may_come_back(error: BaseException) -> bool:
    """Whether an error of any kind of storage says that it cannot be reached."""
    if isinstance(error, OSError):
        return True
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & {"StorageInternalError", "OperationalError", "InterfaceError", "RpcError"})


def _reason(error: BaseException) -> str:
    """The cause of a storage's error, in one line."""
    if type(error).__name__ == "StorageInternalError" and error.__cause__:
        error = error.__cause__  # the error's own text does not name the cause
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _connect(url: str) -> optuna.storages.BaseStorage:
    if "://" not in url:
        # The default lock is a link to the journal. One that a killed process left leads nowhere
        # from another folder or machine, and the next process would wait for it for ever.
        lock = JournalFileOpenLock(url, grace_period=LOCK_SECONDS)
        return JournalStorage(JournalFileBackend(url, lock))
    if url.startswith("grpc://"):
        host, _, port = url.removeprefix("grpc://").rpartition(":")
        proxy = GrpcStorageProxy(host=host, port=int(port))
        proxy.wait_server_ready(timeout=15)
        return proxy
    limit = {"connect_timeout": 15} if url.startswith("postgres") else {}
    if find_spec("psycopg") is None:  # SQLAlchemy's default; psycopg2 will do
        url = url.replace("postgresql://", "postgresql+psycopg2://", 1)
    tries = 5
    while True:
        try:
            # with Optuna's cache for databases
            return get_storage(RDBStorage(url, engine_kwargs={"connect_args": limit}))
        except Exception as error:
            tries -= 1
            if not tries or "already exists" not in str(error):
                raise
            time.sleep(1)  # two machines made the tables at the same moment, and this one failed


def _without_password(url: str | None) -> str:
    scheme, separator, rest = (url or "").rpartition("://")
    account, at, place = rest.rpartition("@")
    return f"{scheme}{separator}{account.partition(':')[0]}{at}{place}"
