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

_REACH_SECONDS = 8  # for a mirror to answer at all
_STALL_SECONDS = 10  # without a single byte, once it has


def download(name: str, data_dir: Path) -> None:
    """Fetches a set through torchvision, from the first of its mirrors that answers.

    Raises:
        OSError: no mirror answers, or one stalls; nothing is left behind.
    """
    import torchvision.datasets

    known = getattr(torchvision.datasets, name)
    made = not data_dir.exists()
    with answering(known.mirrors, known.resources[0][0]) as mirror:
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".download-", dir=data_dir) as folder:
                # a class of the same name, because torchvision names its folder after it
                type(name, (known,), {"mirrors": [mirror]})(folder, download=True)
                target = data_dir / name / "raw"
                target.mkdir(parents=True, exist_ok=True)
                for file in (Path(folder) / name / "raw").iterdir():
                    os.replace(file, target / file.name)
        except (RuntimeError, http.client.HTTPException, OSError) as error:
            # RuntimeError is torchvision's word for a failed or damaged download
            if made:
                with contextlib.suppress(OSError):
                    data_dir.rmdir()
            reason = " ".join(str(error).split())
            raise OSError(f"the download from {mirror} failed: {reason}") from error


@contextlib.contextmanager
def answering(mirrors: Sequence[str], file: str) -> Iterator[str]:
    """The first mirror that answers for the file; within, a download that stalls is given up.

    Raises:
        OSError: none answers within ``_REACH_SECONDS``.
    """
    mirror = _first_to_answer(mirrors, file)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_STALL_SECONDS)
    try:
        yield mirror
    finally:
        socket.setdefaulttimeout(timeout)


def _first_to_answer(mirrors: Sequence[str], file: str) -> str:
    """Asks all mirrors at once; waits at most ``_REACH_SECONDS``, even for a silent name server."""
    answers: queue.Queue[str | Exception] = queue.Queue()

    def ask(mirror: str) -> None:
        try:
            urllib.request.urlopen(mirror + file, timeout=_REACH_SECONDS).close()
            answers.put(mirror)
        except Exception as error:
            answers.put(error)

    for mirror in mirrors:
        # a daemon: a thread stuck in name resolution must not keep the program from ending
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
