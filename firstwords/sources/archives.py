"""A file, compressed or not -> its bytes, streamed.

    with open_bytes(Path("wiki/train.jsonl.zst")) as file: ...    ->  the bytes of train.jsonl

Invariant: nothing is inflated as a whole, and an archive that breaks off is an error, never a short text.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from firstwords.errors import BadData
from firstwords.sources.places import COMPRESSED, one_line


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
            yield BufferedReader(file)
    except OSError as error:
        if error.errno:
            raise
        raise BadData(f"{path}: broken archive ({one_line(error)}); get the file anew") from None
