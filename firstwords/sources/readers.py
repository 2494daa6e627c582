"""One file -> rows, each with its line; one reader for each kind of file.

    list(RAW_READERS[".csv"](path))   ->  [(2, {"question": "Why?", "answer": "So."}), ...]

Invariant: each row comes out once, in the order of the file, in the memory of one of them. One that
cannot be read stands there as a `RowError`.
"""

import csv
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import BinaryIO, TextIO

from firstwords.errors import BadData
from firstwords.schema import RowError, iter_lines, parse_line
from firstwords.sources.archives import is_compressed, open_bytes
from firstwords.sources.places import one_line

PIECE_BYTES = 1 << 20  # of a file that is not read by lines


# A line of JSON as it lies in the file, which nobody has parsed yet, or a row of another format.
RawRow = bytes | dict | RowError


def parse_raw(raw: RawRow) -> dict | RowError:
    """Parse what a reader of `RAW_READERS` yields; so another process may do it."""
    return parse_line(raw) if isinstance(raw, bytes) else raw


def _read_jsonl(path: Path) -> Iterator[tuple[int, bytes]]:
    with open_bytes(path) as lines:
        yield from iter_lines(lines)


def _read_json(path: Path) -> Iterator[tuple[int, bytes]]:
    """A list of rows, in the memory of one row; or one row a line, as many `.json` files are."""
    with open_text(path) as file:
        start = file.read(PIECE_BYTES).lstrip()
    if not start:
        return
    if start[0] == "{" and isinstance(parse_line(next(_read_jsonl(path))[1]), dict):
        yield from _read_jsonl(path)
        return
    if start[0] != "[":
        raise BadData(f"{path}: begins with {start[:20]!r}; a .json holds a list of rows, or one row a line")
    for line, text in _split_json_list(path):
        yield line, text.encode("utf-8", "surrogateescape") + b"\n"


def _split_json_list(path: Path) -> Iterator[tuple[int, str]]:
    """Yield `(line, text)` of each item of the list in the file."""
    with open_text(path) as file:
        window = _JsonWindow(path, file)
        window.skip("[")
        if window.peek() == "]":
            window.skip("]")
        else:
            yield window.take_item()
            while window.peek() == ",":
                window.skip(",")
                yield window.take_item()
            window.skip("]")
        if window.peek():
            raise window.broken("there is something behind the list's end")


class _JsonWindow:
    """A stretch of a JSON file: what was read and not yet taken."""

    def __init__(self, path: Path, file):
        self._path, self._file = path, file
        self._text, self._place, self._line = "", 0, 1
        self._scan = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """Return the next character that is no blank, or `""` at the end of the file."""
        while True:
            text = self._text[self._place : self._place + 1]
            if text and text in " \t\r\n":
                self._advance(self._place + 1)
            elif text or not self._read_more():
                return text

    def skip(self, wanted: str) -> None:
        if self.peek() != wanted:
            found = repr(self.peek()) if self.peek() else "the end"
            raise self.broken(f"{wanted!r} is missing before {found}")
        self._advance(self._place + 1)

    def take_item(self) -> tuple[int, str]:
        self.peek()
        line = self._line
        while True:
            try:
                _, end = self._scan(self._text, self._place)
                # A number that reaches the edge may go on behind it.
                if end < len(self._text) or not self._read_more():
                    break
            except json.JSONDecodeError as error:
                if not self._read_more():
                    raise self.broken(error.msg) from None
            except RecursionError:
                raise self.broken("nested too deep") from None
        start = self._place
        text = self._text[start:end]
        self._advance(end)
        return line, text

    def broken(self, what: str) -> BadData:
        return BadData(
            f"{self._path}:{self._line}: broken JSON, {what}; "
            "mend the file: nothing behind this line can be read"
        )

    def _advance(self, end: int) -> None:
        self._line += self._text.count("\n", self._place, end)
        self._place = end

    def _read_more(self) -> bool:
        rest = self._text[self._place :]
        # As much again as an unfinished item already has, so that a long one costs linear time.
        more = self._file.read(max(PIECE_BYTES, len(rest)))
        self._text, self._place = rest + more, 0
        return bool(more)


def _read_parquet(path: Path) -> Iterator[tuple[int, dict | RowError]]:
    return read_row_groups(path, 0, None, None)


def read_row_groups(
    path: Path, begin: int, end: int | None, column: str | None
) -> Iterator[tuple[int, dict]]:
    """Read some row groups of a Parquet file, in the memory of one of them.

    Args:
        begin, end: the first, and the one behind the last; None for all that follow.
        column: the only one to read where there is such a one; None for all.
    """
    number = 0
    with _open_parquet(path) as file:
        groups = range(begin, file.num_row_groups if end is None else end)
        columns = [column] if column in file.schema_arrow.names else None
        for batch in file.iter_batches(batch_size=1000, row_groups=groups, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield number, row


def iter_row_groups(path: Path, begin: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
    """Yield `(rows, bytes)` of the row groups of a Parquet file."""
    with _open_parquet(path) as file:
        for number in range(begin, file.num_row_groups if end is None else end):
            group = file.metadata.row_group(number)
            yield group.num_rows, group.total_byte_size


@contextmanager
def _open_parquet(path: Path):
    import pyarrow
    import pyarrow.parquet

    with ExitStack() as stack:
        try:
            source = stack.enter_context(_inflate(path)) if is_compressed(path) else path
            yield stack.enter_context(pyarrow.parquet.ParquetFile(source))
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise BadData(
                f"{path}: cannot be read as Parquet ({one_line(error)}); get the file anew"
            ) from None


@contextmanager
def _inflate(path: Path) -> Iterator[BinaryIO]:
    # Parquet begins at its end: what is compressed once more has to lie on the disk.
    with tempfile.TemporaryFile() as file:
        with open_bytes(path) as compressed:
            shutil.copyfileobj(compressed, file, PIECE_BYTES)
        yield file


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open a file, compressed or not, as text; bytes that are no UTF-8 become lone surrogates."""
    with open_bytes(path) as file:
        yield TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _read_csv(path: Path) -> Iterator[tuple[int, dict | RowError]]:
    csv.field_size_limit(2**31 - 1)  # the default of 131,072 characters refuses long documents
    with open_text(path) as file:
        reader = csv.reader(file, strict=True)
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise BadData(f"{path}:1: a column name stands twice in {header}; rename one")
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield line, RowError("bad_csv", f"broken CSV: {error}")
                continue
            if cells is None:
                return
            if cells:
                yield line, _parse_cells(header, cells)


def _parse_cells(header: list[str], cells: list[str]) -> dict | RowError:
    if len(cells) != len(header):
        return RowError("bad_csv", f"{len(cells)} fields where the header has {len(header)}")
    if any("\udc80" <= character <= "\udcff" for cell in cells for character in cell):
        return RowError("bad_utf8", "not UTF-8")
    return dict(zip(header, cells, strict=True))


RAW_READERS = {
    ".csv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
