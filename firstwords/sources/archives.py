"""A file, compressed or not -> its bytes, streamed.

    with open_bytes(Path("wiki/train.jsonl.zst")) as file: ...    ->  the bytes of train.jsonl

Invariants: nothing is inflated as a whole; an archive that breaks off is an error, never a short text; so is
one that swells as no text does.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import BinaryIO

from firstwords.errors import BadData
from firstwords.sources.places import COMPRESSED, one_line

# What an archive may hold: so many bytes, and more as long as they are at most so many times its own. Text
# shrinks 3 to 10 times, a bomb 1,000 times (gzip) or more.
FREE_BYTES, MOST_TIMES = 1 << 30, 100


class _Limited(RawIOBase):
    """The bytes of an archive, up to what one of its size may hold."""

    def __init__(self, path: Path, inflated: BinaryIO):
        self._path, self._inflated = path, inflated
        self._most = max(FREE_BYTES, MOST_TIMES * path.stat().st_size)
        self._read = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self._inflated.read(len(buffer))
        self._read += len(data)
        if self._read > self._most:
            raise BadData(
                f"{self._path}: holds more than {self._most:,} bytes, which in an archive of its size is no "
                "text; unpack it yourself if it is to be trusted"
            )
        buffer[: len(data)] = data
        return len(data)


def is_compressed(path: Path) -> bool:
    """Tell by the name whether a file is a `.gz` or a `.zst`."""
    return path.suffix.lower() in COMPRESSED


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading its bytes, or those that are compressed in it.

    Raises:
        BadData: while it is read, when the archive is broken or breaks off.
    """
    if not is_compressed(path):
        with open(path, "rb") as file:
            yield file
        return
    import pyarrow

    # Arrow's streams, unlike those of the package zstandard, tell an archive that breaks off.
    try:
        with pyarrow.input_stream(str(path), compression=COMPRESSED[path.suffix.lower()]) as file:
            yield BufferedReader(_Limited(path, file))
    except OSError as error:
        if error.errno:
            raise
        raise BadData(f"{path}: broken archive ({one_line(error)}); get the file anew") from None
