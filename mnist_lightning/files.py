"""Files that are written whole or not at all, and files that are read as data, within bounds.

Every file of a run and of a search is written here: beside its target under a temporary name,
synced to the disk, renamed into place, and the folder synced, with those above it. A crash, a full
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

JSON_BYTES = 2**27  # far above what any search leaves


def write_json(path: Path, content: Any) -> None:
    """Writes JSON whole or not at all; see ``write_bytes``."""
    write_text(path, _as_json(content))


def write_text(path: Path, text: str) -> None:
    """Writes a text in UTF-8 whole or not at all; see ``write_bytes``."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all.

    Raises:
        ValueError: it cannot be written; the file that was there before is unchanged.
    """
    with _temporary(path, content) as temporary:
        os.replace(temporary, path)


def write_torch(path: Path, content: Any) -> None:
    """``torch.save``, whole or not at all; see ``write_bytes``."""
    import torch

    # in memory first: on a full disk torch.save itself raises errors that name no file
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_bytes(path, buffer.getvalue())


def read_torch(path: Path) -> Any:
    """The content of a file of ``write_torch``, as it was written.

    Raises:
        ValueError: it cannot be read, or a bit of it has changed.
    """
    import torch

    try:
        with zipfile.ZipFile(path) as archive:  # torch.load itself ignores the checksums in there
            if changed := archive.testzip():
                raise ValueError(f"{changed} in it has changed")
        return torch.load(path, weights_only=True)
    except Exception as error:  # whatever a damaged file makes of the two
        raise ValueError(f"{path} is damaged: {first_line(error)}") from error


def set_aside(path: Path) -> Path:
    """Renames a damaged file, for its owner to look at, and returns its new name."""
    aside = path.with_name(f"{path.name}.damaged")
    os.replace(path, aside)
    return aside


def create_json(path: Path, content: Any) -> bool:
    """Writes JSON whole or not at all, but never over a file that is there.

    Returns:
        Whether this call made the file.

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
    """The content of a JSON file.

    Args:
        path: the file.
        remedy: what the user can do if it is damaged, for the message.
        kind: the type that its content must have.

    Raises:
        ValueError: it cannot be read, is no JSON, or holds something else.
    """
    try:
        content = json.loads(read_bytes(path, JSON_BYTES, remedy))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}): {remedy}") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged (no JSON): {remedy}") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path} is damaged (no JSON {kind.__name__}): {remedy}")
    return content


def read_bytes(path: Path, most: int, remedy: str) -> bytes:
    """The content of a file that has at most ``most`` bytes.

    Raises:
        ValueError: it is larger, no regular file (reading a pipe may never end), or unreadable.
    """
    try:
        if not path.is_file():
            raise ValueError(f"{path} is no file: {remedy}")
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({reason(error)}): {remedy}") from error
    if len(content) > most:
        raise ValueError(f"{path} has more than {most:,} bytes: {remedy}")
    return content


def check_archive(path: Path, remedy: str) -> None:
    """Refuses a file of ``torch.save`` with other bytes than were written.

    ``torch.load`` compares no checksums: it reads altered weights without a word. And it unpacks
    what is compressed, a file of a megabyte to a terabyte; ``torch.save`` never compresses.

    Raises:
        ValueError: it is damaged, compressed, or no such file.
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
        raise ValueError(f"{path} is compressed, as PyTorch saves no file: refused. {remedy}")
    if damaged:
        raise ValueError(f"{path} is damaged: wrong checksum (CRC) of {damaged}. {remedy}")


def reason(error: Exception) -> str:
    """Why the system refused something, without the name of the file."""
    return (getattr(error, "strerror", None) or str(error)).lower()


def first_line(error: Exception) -> str:
    """What an error of another library says, as far as it fits into a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_plain(value: Any, depth: int = 3) -> bool:
    """Whether it is a mapping, list or value as settings are, and small."""
    if isinstance(value, Mapping | list | tuple):
        parts = value.values() if isinstance(value, Mapping) else value
        if isinstance(value, Mapping) and not all(isinstance(key, str) for key in value):
            return False
        return depth > 0 and len(value) < 100 and all(is_plain(part, depth - 1) for part in parts)
    if isinstance(value, str):
        return len(value) < 5000
    return value is None or type(value) in (bool, int, float)


def printable(text: str) -> str:
    """The text, with escapes for what would steer a terminal or cannot be encoded."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def csv_cell(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula: ``=1+1`` gets an apostrophe before it."""
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
    """A synced file beside ``path`` with this content, for the body to put in place."""
    # a name that no other process has, on this machine or another that shares the folder
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
        _sync_folder(path.parent)
        _sync_way(path.parent.absolute(), path.parent.stat().st_ino)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written: {reason(error)}. Make room there, or make it writable."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@functools.cache
def _sync_way(folder: Path, inode: int) -> None:
    """Makes the folder itself survive a power cut: it, or one above it, may be new."""
    for above in folder.parents:
        _sync_folder(above)


def _sync_folder(folder: Path) -> None:
    """Makes the names in the folder survive a power cut, where the system can."""
    with contextlib.suppress(OSError):  # not every file system syncs folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
