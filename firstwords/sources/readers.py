"""One file -> rows or texts, each with its line; one reader for each kind of file.

    list(RAW_READERS[".csv"](path))   ->  [(2, {"question": "Why?", "answer": "So."}), ...]

Invariant: each row or text comes out once, in the order of the file, in the memory of one of them
(of a `.txt` read whole: of one piece). One that cannot be read stands there as a `RowError`.
"""

import codecs
import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from firstwords.errors import BadData
from firstwords.schema import RowError, check_text, iter_lines, parse_line
from firstwords.sources.places import one_line

# A text in pieces that are read once and join to the whole, or why it is none. A piece begins at
# white space after a word, where GPT-2's word pattern always cuts: so the ids of the pieces are
# the ids of the whole.
Text = Iterable[str] | RowError
PIECE_BYTES = 1 << 20  # of a file that is not read by lines


# A line of JSON as it lies in the file, which nobody has parsed yet, or a row of another format.
RawRow = bytes | dict | RowError


def parse_raw(raw: RawRow) -> dict | RowError:
    """Parse what a reader of `RAW_READERS` yields; so another process may do it."""
    return parse_line(raw) if isinstance(raw, bytes) else raw


def _read_jsonl(path: Path) -> Iterator[tuple[int, bytes]]:
    with open(path, "rb") as lines:
        yield from iter_lines(lines)


def _read_json(path: Path) -> Iterator[tuple[int, bytes]]:
    """A list of rows, in the memory of one row; or one row a line, as many `.json` files are."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
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
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
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
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise BadData(
            f"{path}: cannot be read as Parquet behind row {number} ({one_line(error)}); get the file anew"
        ) from None


def _read_csv(path: Path) -> Iterator[tuple[int, dict | RowError]]:
    csv.field_size_limit(2**31 - 1)  # the default of 131,072 characters refuses long documents
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
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


def _read_whole_file(path: Path) -> Iterator[tuple[int, Text]]:
    yield 1, _check_file(path) or _iter_pieces(path)


def _check_file(path: Path) -> RowError | None:
    """Tell why a file is no text; a pass at the speed of the disk, before a long work begins."""
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    with open(path, "rb") as file:
        while True:
            block = file.read(PIECE_BYTES)
            if b"\0" in block:
                return RowError("nul", f"NUL at byte {offset + block.index(0)}; is it UTF-16?")
            try:
                held = len(decoder.getstate()[0])
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                return RowError("bad_utf8", f"not UTF-8 at byte {offset - held + error.start}")
            if not block:
                return None
            offset += len(block)


def _iter_pieces(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        held: list[str] = []
        while block := file.read(PIECE_BYTES):
            cut = _find_cut(block)
            if cut:
                yield "".join([*held, block[:cut]])
                held.clear()
            held.append(block[cut:])
        yield "".join(held)


def _find_cut(text: str) -> int:
    """Return the last place where white space begins, or 0; see `Text`."""
    end = len(text)
    while end > 0:
        end = max(text.rfind(" ", 0, end), text.rfind("\n", 0, end))
        if end > 0 and not text[end - 1].isspace():
            return end
    return 0


def _read_lines(path: Path) -> Iterator[tuple[int, Text]]:
    for line, text in _decode_lines(path):
        if isinstance(text, RowError):
            yield line, text
        elif text.strip():
            yield line, (text,)


def _read_paragraphs(path: Path) -> Iterator[tuple[int, Text]]:
    held: list[tuple[int, str | RowError]] = []
    for line, text in _decode_lines(path):
        if isinstance(text, RowError) or text.strip():
            held.append((line, text))
        elif held:
            yield _join_lines(held)
            held = []
    if held:
        yield _join_lines(held)


def _join_lines(held: list[tuple[int, str | RowError]]) -> tuple[int, Text]:
    for line, text in held:
        if isinstance(text, RowError):
            return line, text
    return held[0][0], ("\n".join(text for _, text in held),)


def _decode_lines(path: Path) -> Iterator[tuple[int, str | RowError]]:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            line = line.rstrip(b"\r\n")
            try:
                text = line.decode("utf-8")
                check_text(text, "the line")
                yield number, text
            except UnicodeDecodeError as error:
                yield number, RowError("bad_utf8", f"not UTF-8 at byte {error.start} of the line")
            except RowError as error:
                yield number, error


TXT_READERS = {"file": _read_whole_file, "blank_line": _read_paragraphs, "line": _read_lines}
