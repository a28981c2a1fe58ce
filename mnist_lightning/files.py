"""Writes files atomically; reads untrusted files as data, with limits on their size.

Every file of a run and of a search is written here: under a temporary name in the same folder,
synced to the disk, and renamed; then its folder and the folders above are synced. A crash, a full
disk or a power cut leaves either the old file or the new one, never a part.
"""

import contextlib
import functools
import io
import json
import os
import uuid
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

JSON_BYTES = 2**27  # far more than any search writes
MOST_CLASSES = 10_000  # of images; their names are in each checkpoint


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically; see ``write_bytes``."""
    write_text(path, _as_json(content))


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically; see ``write_bytes``."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically: completely or not at all.

    Raises:
        ValueError: it cannot be written; an existing file is unchanged.
    """
    with _temporary(path, content) as temporary:
        os.replace(temporary, path)


def write_torch(path: Path, content: Any) -> None:
    """``torch.save``, but atomic; see ``write_bytes``."""
    import torch

    # in memory first: on a full disk, the errors of torch.save do not name the file
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_bytes(path, buffer.getvalue())


def read_torch(path: Path) -> Any:
    """Reads a file of ``write_torch`` and verifies its checksums.

    Raises:
        ValueError: it cannot be read, or a bit of it has changed.
    """
    import torch

    try:
        with zipfile.ZipFile(path) as archive:  # torch.load ignores the checksums
            if changed := archive.testzip():
                raise ValueError(f"{changed} in it has changed")
        return torch.load(path, weights_only=True)
    except Exception as error:  # a damaged file can cause any error in zipfile and torch
        raise ValueError(f"{path} is damaged: {first_line(error)}") from error


def set_aside(path: Path) -> Path:
    """Renames a damaged file, so that its owner can examine it; returns the new path."""
    aside = path.with_name(f"{path.name}.damaged")
    os.replace(path, aside)
    return aside


def create_json(path: Path, content: Any) -> bool:
    """Writes JSON atomically, but never replaces an existing file.

    Returns:
        Whether this call created the file.

    Raises:
        ValueError: it cannot be written.
    """
    with _temporary(path, _as_json(content).encode()) as temporary:
        try:
            os.link(temporary, path)  # unlike a rename, this refuses to replace
        except FileExistsError:
            return False
        return True


def read_json(path: Path, remedy: str, kind: type = dict) -> Any:
    """Reads a JSON file.

    Args:
        path: the file.
        remedy: what the user can do about a damaged file, for the message.
        kind: the type that its content must have.

    Raises:
        ValueError: it cannot be read, is not JSON, or holds another type.
    """
    try:
        content = json.loads(read_bytes(path, JSON_BYTES, remedy))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}): {remedy}") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged (not JSON): {remedy}") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path} is damaged (not a JSON {kind.__name__}): {remedy}")
    return content


def read_bytes(path: Path, most: int, remedy: str) -> bytes:
    """Reads a file of at most ``most`` bytes.

    Raises:
        ValueError: it is larger, unreadable, or not a regular file: reading a pipe may never end.
    """
    try:
        if not path.is_file():
            raise ValueError(f"{path} is not a regular file: {remedy}")
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({reason(error)}): {remedy}") from error
    if len(content) > most:
        raise ValueError(f"{path} has more than {most:,} bytes: {remedy}")
    return content


def check_archive(path: Path, remedy: str) -> None:
    """Refuses a file of ``torch.save`` whose bytes have changed, or that is compressed.

    ``torch.load`` does not verify checksums: it reads altered weights without an error. It also
    unpacks compressed files, a megabyte to a terabyte; ``torch.save`` never compresses.

    Raises:
        ValueError: it is damaged, compressed, missing, or not such a file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            stored &= sum(entry.file_size for entry in entries) <= path.stat().st_size
            damaged = archive.testzip() if stored else None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {reason(error)}. {remedy}") from error
    except Exception as error:  # BadZipFile, EOFError, NotImplementedError ...
        raise ValueError(f"{path} is truncated, or not a checkpoint at all. {remedy}") from error
    if not stored:
        raise ValueError(f"{path} is compressed: refused, as PyTorch never compresses. {remedy}")
    if damaged:
        raise ValueError(f"{path} is damaged: wrong checksum (CRC) of {damaged}. {remedy}")


def reason(error: Exception) -> str:
    """The reason in a system's error, without the name of the file."""
    return (getattr(error, "strerror", None) or str(error)).lower()


def first_line(error: Exception) -> str:
    """The first line of another library's error."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_plain(value: Any, depth: int = 3) -> bool:
    """Whether it is small and made of mappings, lists and simple values, like settings.

    A list of names, like those of the classes, may be longer than other lists.
    """
    if isinstance(value, list | tuple) and 100 <= len(value) <= MOST_CLASSES:
        return depth > 0 and all(isinstance(part, str) and len(part) < 5000 for part in value)
    if isinstance(value, Mapping | list | tuple):
        parts = value.values() if isinstance(value, Mapping) else value
        if isinstance(value, Mapping) and not all(isinstance(key, str) for key in value):
            return False
        return depth > 0 and len(value) < 100 and all(is_plain(part, depth - 1) for part in parts)
    if isinstance(value, str):
        return len(value) < 5000
    return value is None or type(value) in (bool, int, float)


def printable(text: str) -> str:
    """The text with control characters escaped, and those that cannot be encoded."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def csv_cell(value: Any) -> Any:
    """A cell that a spreadsheet does not run as a formula: ``=1+1`` becomes ``'=1+1``."""
    if not isinstance(value, str) or not value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def _as_json(content: Any) -> str:
    return json.dumps(content, indent=1) + "\n"


@contextlib.contextmanager
def _temporary(path: Path, content: bytes) -> Iterator[Path]:
    """A synced temporary file beside ``path``; the caller renames or links it to ``path``."""
    # unique also among machines that share the folder
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
        _sync_folder(path.parent)
        _sync_above(path.parent.absolute(), path.parent.stat().st_ino)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written: {reason(error)}. Make room there, or make it writable."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@functools.cache
def _sync_above(folder: Path, inode: int) -> None:
    """Makes the folder itself survive a power cut: it or a folder above it may be new."""
    for above in folder.parents:
        _sync_folder(above)


def _sync_folder(folder: Path) -> None:
    """Makes the names in the folder survive a power cut, if the system supports it."""
    with contextlib.suppress(OSError):  # not every file system syncs folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
