"""Who trains what: workers on any number of machines agree through an Optuna storage."""

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

Record = dict[str, Any]

HEARTBEAT_SECONDS = 5.0
# A worker that has shown no sign of life for so long is taken for dead; it may only be frozen.
STALE_SECONDS = 60.0
# A journal's lock is held for milliseconds; one that is older was left by a process that died.
LOCK_SECONDS = 10
# A storage that does not answer is asked again for so long, before a worker gives up.
PATIENCE_SECONDS = 60.0


class ClaimLost(Exception):
    """Another worker has the unit now: this one was taken for dead. What it has is not written."""


class StorageLost(ValueError):
    """The storage has not answered for ``PATIENCE_SECONDS``."""


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
        self._looked = time.monotonic()

    def take(self, unit: str, ids: Sequence[str]) -> "Claim | dict[str, Record] | None":
        """The unit's claim, now ours; its records by id, if it is finished; else ``None``.

        Args:
            unit: its name.
            ids: of its trials.
        """
        from optuna.exceptions import DuplicatedStudyError
        from optuna.study import StudyDirection

        records: dict[str, Record] = {}
        deaths: list[str] = []
        furthest = -1.0
        for attempt in itertools.count():
            name = f"{self.search}/{unit}/{attempt}"
            try:
                # not through optuna.create_study, which in a journal reads all names once more
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
                    # only deaths since the last one that left something to go on from
                    if known.get("from", 0.0) > furthest:
                        furthest = known.get("from", 0.0)
                        deaths = []
                    deaths.append(known["died"])
            else:
                self.storage.set_study_user_attr(study_id, "owner", {**_process(), "beat": 0})
                if attempt:  # what the one before published until we took the unit from it
                    before = f"{self.search}/{unit}/{attempt - 1}"
                    records |= _published(self._attributes(before), ids)
                follower = f"{self.search}/{unit}/{attempt + 1}"
                return Claim(study_id, self.storage, follower, attempt > 0, records, deaths)
        raise AssertionError("there is always a next attempt")

    def _attributes(self, study_name: str) -> dict[str, Any]:
        return self.storage.get_study_user_attrs(self.storage.get_study_id_from_name(study_name))

    def _dead(self, name: str, owner: dict[str, Any] | None) -> bool:
        here = owner is not None and owner["machine"] == _process()["machine"]
        if owner and here and start_of(owner["pid"]) != owner["started"]:
            crew = owner.get("crew")  # which will note how it died, so that deaths are counted
            if crew is None or start_of(crew["pid"]) != crew["started"]:
                return True
        # by the observer's own clock: two machines need not agree on the time
        now = time.monotonic()
        if now - self._looked > STALE_SECONDS / 2:
            self._seen.clear()  # we were away ourselves, or the storage was
        self._looked = now
        seen = self._seen.get(name)
        if seen is None or seen[0] != owner:
            self._seen[name] = (owner, now)
            return False
        return now - seen[1] > STALE_SECONDS

    def note_death(self, pid: int, started: str | None, reason: str) -> bool:
        """Notes on the unit that a process of this machine held, that the process died.

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
        """Takes back what was published of these trials, so that they are trained again."""
        for study in self.storage.get_all_studies():
            if study.study_name.startswith(f"{self.search}/"):
                for id in _published(study.user_attrs, ids):
                    self.storage.set_study_user_attr(study._study_id, f"trial {id}", None)


class Claim:
    """A unit that is ours to train, until another worker takes us for dead.

    Attributes:
        had_before: whether another worker had it before.
        records: of its trials that are finished already, by id.
        deaths: how the workers ended that it killed without getting any further.
    """

    def __init__(
        self,
        study_id: int,
        storage: "optuna.storages.BaseStorage",
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
        """Makes sure that the unit is still ours.

        Raises:
            ClaimLost: it is not.
        """
        with contextlib.suppress(KeyError):
            self._storage.get_study_id_from_name(self._follower)
            self._lost.set()
        self.check_quickly()

    def check_quickly(self) -> None:
        """As ``check``, but asks no storage: as of the last sign of life."""
        if self._lost.is_set():
            raise ClaimLost

    def goes_on(self, part: float) -> None:
        """Notes that training goes on from a state in which this part of it was done."""
        self._storage.set_study_user_attr(self._study_id, "from", part)

    def publish(self, record: Record) -> None:
        """Shows a finished trial to the others.

        Raises:
            ClaimLost: the unit is no longer ours, and the record does not count: another worker's
                may differ from it, and others may have that one.
        """
        self._storage.set_study_user_attr(self._study_id, f"trial {record['id']}", record)
        # Whoever takes the unit from now on reads the record first; whoever took it before has not.
        self.check()
        self._published.add(record["id"])

    def finish(self, records: Sequence[Record]) -> None:
        """Notes what came out of the unit, so that nobody takes it again.

        Raises:
            ClaimLost: it is no longer ours.
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
        """Shows signs of life while the unit is trained; releases it when that is cut off."""
        over = threading.Event()

        def beat() -> None:
            number = 0
            while not over.wait(HEARTBEAT_SECONDS):
                number += 1
                with contextlib.suppress(Exception):  # a storage out of reach may come back
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


def _published(attributes: Mapping[str, Any], ids: Collection[str]) -> dict[str, Record]:
    """Records among the attributes of a study, of these trials."""
    found = {id: attributes.get(f"trial {id}") for id in ids}
    return {id: record for id, record in found.items() if record is not None}


def _process() -> dict[str, Any]:
    """Which process this is. A machine is one where a process number means the same to all.

    So containers are different machines, even those with one hostname.
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
        ValueError: it cannot be reached.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    journal = folder / "journal.log"
    try:
        storage = _connect(url or str(journal))
        storage.get_all_studies()
        patient: Any = _Patient(storage, f"storage {_without_password(url or str(journal))}")
        return patient
    except Exception as error:  # each backend has exceptions of its own
        if url is None and journal.is_file():
            # ours alone, and no more than an index: the trials hold all that matters
            os.replace(journal, folder / "journal.damaged")
            return open_storage(None, folder)
        place = _without_password(url or str(journal))
        raise ValueError(f"storage {place} cannot be reached: {_reason(error)}") from error


class _Patient:
    """A storage that is asked again where it does not answer: a database may be restarted.

    What it is asked may have reached it before the answer was lost. All that is asked may be asked
    twice, but for the creation of a study: that then looks like another's, with no sign of life.
    """

    def __init__(self, storage: "optuna.storages.BaseStorage", name: str) -> None:
        self._storage, self._name = storage, name

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(self._storage, attribute)
        return functools.partial(self._insist, value) if callable(value) else value

    def _insist(self, ask: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
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
                    raise StorageLost(f"{self._name} {does}: {_reason(error)}") from error
            time.sleep(pause)
            pause = min(2 * pause, 5.0)


def _may_come_back(error: BaseException) -> bool:
    """Whether a storage's error says that it is out of reach, whatever the kind of storage."""
    if isinstance(error, OSError):
        return True
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & {"StorageInternalError", "OperationalError", "InterfaceError", "RpcError"})


def _reason(error: BaseException) -> str:
    """In a line, what is behind an error of a storage."""
    if type(error).__name__ == "StorageInternalError" and error.__cause__:
        error = error.__cause__  # its own text is about something else
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _connect(url: str) -> "optuna.storages.BaseStorage":
    from optuna.storages import GrpcStorageProxy, JournalStorage, RDBStorage, get_storage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    if "://" not in url:
        # Its default lock is a link to the journal. A process that is killed may leave one, which
        # leads nowhere from another folder or machine: the next would wait for it for ever.
        lock = JournalFileOpenLock(url, grace_period=LOCK_SECONDS)
        return JournalStorage(JournalFileBackend(url, lock))
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
            # with the cache that Optuna gives a database
            return get_storage(RDBStorage(url, engine_kwargs={"connect_args": limit}))
        except Exception as error:
            tries -= 1
            if not tries or "already exists" not in str(error):
                raise
            time.sleep(1)  # two machines make the tables at the same moment: one of them cannot


def _without_password(url: str | None) -> str:
    scheme, separator, rest = (url or "").rpartition("://")
    account, at, place = rest.rpartition("@")
    return f"{scheme}{separator}{account.partition(':')[0]}{at}{place}"
