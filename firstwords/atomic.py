"""Folders that are complete or not there: stage, sync, rename.

    with stage_folder(Path("data/chat")) as staging:
        (staging / "train.jsonl").write_text(...)
    # only now does data/chat exist, with every file in it on disk

Invariant: at every instant, kill -9 and power loss included, the named folder is the old one, the whole
new one, or absent. What a killed process left behind is a `.staging-*` beside it, swept by the next one.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from firstwords.errors import CannotCreate, IOFailed

STAGING, TRASH = ".staging-", ".trash-"
_LEFTOVER = re.compile(r"\.(?:staging|trash)-(\d+)(?:-|$)")


@contextmanager
def stage_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a folder to write into, and make it `target` when the block ends well.

    Args:
        target: the folder to be; its parents are made.
        overwrite: replace an existing `target`, which stays until the new one is whole.

    Raises:
        CannotCreate: when `target` is there and may not be replaced, is a file, or nothing can be made
            beside it.
        IOFailed: when writing fails (disk full, folder read-only); the staging folder is gone then.
    """
    if target.exists() and not target.is_dir():
        raise CannotCreate(f"{target}: is a file; name another folder")
    if target.exists() and not overwrite and any(target.iterdir()):
        raise CannotCreate(f"{target}: is there already; name another folder, or replace it with --overwrite")
    staging = target.parent / f"{STAGING}{os.getpid()}-{target.name}"
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise CannotCreate(f"{target}: cannot be made ({error.strerror}); name another") from None
    try:
        yield staging
        sync_folder(staging)
        replace_folder(staging, target)
    except OSError as error:
        at = f" at {error.filename}" if error.filename else ""
        raise IOFailed(
            f"{target}: could not be made{at} ({error.strerror or error}); mend that, or free some space"
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Write all files below `folder` and the folders themselves through to the disk."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def replace_folder(staging: Path, target: Path) -> None:
    """Rename `staging` to `target`; a folder that stood there is renamed away first, then deleted."""
    trash = _name_trash(target)
    if target.exists():
        target.rename(trash)
    staging.rename(target)
    if trash.exists():
        shutil.rmtree(trash)
    _sync_entry(target.parent)


def remove_folder(folder: Path) -> None:
    """Delete a folder so that a kill in between leaves it whole or in the trash, never in part."""
    trash = _name_trash(folder)
    folder.rename(trash)
    shutil.rmtree(trash)


def _name_trash(folder: Path) -> Path:
    return folder.parent / f"{TRASH}{os.getpid()}-{folder.name}"


def sweep_leftovers(folder: Path) -> list[str]:
    """Delete what killed processes left in `folder`: staging and trash of processes no longer alive.

    Returns:
        the names that went.
    """
    swept = []
    for path in sorted(folder.iterdir()):
        leftover = _LEFTOVER.match(path.name)
        if leftover and not _is_alive(leftover[1]):
            _remove(path)
            swept.append(path.name)
    return swept


def _remove(path: Path) -> None:
    with suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_alive(pid: str) -> bool:
    # A leftover with this process's own id is of an earlier one: in a container they come round soon.
    if int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def write_text(path: Path, text: str) -> None:
    """Write one small file so that it is the old one or the new one, on disk when this returns.

    Raises:
        IOFailed: when writing fails; nothing is left of it then.
    """
    staging = path.with_name(f"{STAGING}{os.getpid()}-{path.name}")
    try:
        with open(staging, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        staging.rename(path)
        _sync_entry(path.parent)
    except OSError as error:
        _remove(staging)
        raise IOFailed(
            f"{path}: writing failed ({error.strerror or error}); mend that, or free some space"
        ) from None


def format_json(value) -> str:
    """Return `value` as JSON for people: indented, keys in the order given, newline at the end."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def hash_file(path: Path) -> str:
    """Return the sha256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_no_link(path: str, flags: int) -> int:
    """Open as `open` does, but for a symbolic link, which is an OSError; for its `opener`."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold `folder/.lock` for the block; the kernel frees it when the process dies, however it dies.

    Raises:
        CannotCreate: naming the process that holds it, or why the folder cannot be written.
    """
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _open_locked(path)
        while not _is_at(file, path):  # the one who held it removed it while we opened it
            file.close()
            file = _open_locked(path)
    except OSError as error:
        raise CannotCreate(f"{folder}: cannot be written ({error.strerror}); name another") from None
    with file:
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()


def _open_locked(path: Path) -> TextIO:
    # What holds the lock is truncated: never through a link that leads to another file.
    file = open(path, "a+", opener=open_no_link)  # noqa: SIM115 - held open for the whole block
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with file:
            file.seek(0)
            owner = file.read().strip() or "?"
        raise CannotCreate(
            f"{path.parent}: process {owner} is writing here; wait for it or name another folder"
        ) from None
    return file


def _is_at(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    except FileNotFoundError:
        return False


def _sync_entry(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
