"""Downloads from the first of several mirrors that answers."""

import contextlib
import http.client
import os
import queue
import socket
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

_REACH_SECONDS = 8  # longest wait for a mirror's first answer
_STALL_SECONDS = 10  # longest wait for the next byte of a download


def download(name: str, data_dir: Path) -> None:
    """Downloads a data set with torchvision, from the first mirror that answers.

    Raises:
        OSError: no mirror answers, or the download stalls or is damaged. No partial files remain.
    """
    import torchvision.datasets

    dataset = getattr(torchvision.datasets, name)
    is_new = not data_dir.exists()
    with answering(dataset.mirrors, dataset.resources[0][0]) as mirror:
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".download-", dir=data_dir) as folder:
                # the subclass has the same name, because torchvision names its folder after it
                type(name, (dataset,), {"mirrors": [mirror]})(folder, download=True)
                target = data_dir / name / "raw"
                target.mkdir(parents=True, exist_ok=True)
                for file in (Path(folder) / name / "raw").iterdir():
                    os.replace(file, target / file.name)
        except (RuntimeError, http.client.HTTPException, OSError) as error:
            # torchvision raises RuntimeError for a failed or damaged download
            if is_new:
                with contextlib.suppress(OSError):
                    data_dir.rmdir()
            reason = " ".join(str(error).split())
            raise OSError(f"the download from {mirror} failed: {reason}") from error


@contextlib.contextmanager
def answering(mirrors: Sequence[str], file: str) -> Iterator[str]:
    """Yields the first mirror that answers for the file.

    Inside the context, sockets time out after ``_STALL_SECONDS``, so that a stalled download fails.

    Raises:
        OSError: no mirror answers within ``_REACH_SECONDS``.
    """
    mirror = _first_to_answer(mirrors, file)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_STALL_SECONDS)
    try:
        yield mirror
    finally:
        socket.setdefaulttimeout(timeout)


def _first_to_answer(mirrors: Sequence[str], file: str) -> str:
    """Asks all mirrors in parallel; the time limit covers name resolution too."""
    answers: queue.Queue[str | Exception] = queue.Queue()

    def ask(mirror: str) -> None:
        try:
            urllib.request.urlopen(mirror + file, timeout=_REACH_SECONDS).close()
            answers.put(mirror)
        except Exception as error:
            answers.put(error)

    for mirror in mirrors:
        # a daemon, so that a thread stuck in name resolution does not keep the program running
        threading.Thread(target=ask, args=(mirror,), daemon=True).start()
    reason = f"no mirror answered within {_REACH_SECONDS} s"
    deadline = time.monotonic() + _REACH_SECONDS
    for _ in mirrors:
        try:
            answer = answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            break
        if isinstance(answer, str):
            return answer
        reason = f"no mirror could be reached ({answer})"
    raise OSError(reason)
