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

from mnist_lightning.data.named import NAMED, NamedSet

_PARTS = ("train", "test")  # of SVHN; its third part has no place in its own split
_REACH_SECONDS = 8  # longest wait for a mirror's first answer
_STALL_SECONDS = 10  # longest wait for the next byte of a download


def download(name: str, data_dir: Path) -> None:
    """Downloads a data set with torchvision, from the first mirror that answers.

    Raises:
        OSError: no mirror answers, or the download stalls or is damaged. No partial files remain.
    """
    named = NAMED[name]
    mirrors, resources = _resources(named)
    is_new = not data_dir.exists()
    with answering(mirrors, resources[0][0]) as mirror:
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".download-", dir=data_dir) as folder:
                _fetch(named, mirror, resources, Path(folder))
                target = data_dir / named.folder
                target.mkdir(parents=True, exist_ok=True)
                for file in (Path(folder) / named.folder).iterdir():
                    os.replace(file, target / file.name)
        except (RuntimeError, http.client.HTTPException, OSError) as error:
            # torchvision raises RuntimeError for a failed or damaged download
            if is_new:
                with contextlib.suppress(OSError):
                    data_dir.rmdir()
            reason = " ".join(str(error).split())
            raise OSError(f"the download from {mirror} failed: {reason}") from error


def _resources(named: NamedSet) -> tuple[list[str], list[tuple[str, str]]]:
    """The mirrors of a set, and the files to download, each with its MD5."""
    import torchvision.datasets

    dataset = getattr(torchvision.datasets, named.dataset)
    if named.format == "mnist":
        return dataset.mirrors, dataset.resources
    if named.format == "qmnist":
        addresses = dataset.resources["train"] + dataset.resources["test"]
    elif named.format == "svhn":
        addresses = [(dataset.split_list[part][0], dataset.split_list[part][2]) for part in _PARTS]
    else:
        md5 = dataset.tgz_md5 if named.format == "cifar" else dataset.md5
        addresses = [(dataset.url, md5)]
    parts = [(*url.rpartition("/"), md5) for url, md5 in addresses]
    return [parts[0][0] + "/"], [(file, md5) for _, _, file, md5 in parts]


def _fetch(named: NamedSet, mirror: str, resources: list[tuple[str, str]], folder: Path) -> None:
    """Downloads, verifies and unpacks the files of a set, in torchvision's layout."""
    import torchvision.datasets
    from torchvision.datasets.utils import download_and_extract_archive, download_url

    if named.format == "mnist":
        dataset = getattr(torchvision.datasets, named.dataset)
        # the subclass has the same name, because torchvision names its folder after it
        type(named.dataset, (dataset,), {"mirrors": [mirror]})(folder, download=True)
        return
    for file, md5 in resources:
        if named.format == "cifar":
            download_and_extract_archive(mirror + file, str(folder), md5=md5)
        else:
            download_url(mirror + file, str(folder / named.folder), md5=md5)


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
