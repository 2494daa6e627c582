"""Files of text -> slices of about 8 MB that any process may read -> documents.

    list(iter_slices(Path("wiki.jsonl")))   ->  [Slice("wiki.jsonl", 0, 8388571), Slice(..., 8388571, ...)]

A slice ends where a line, a paragraph or a word does, so that its documents are those of the whole file;
of a `.txt` read whole it holds a part of the one document. Of what is compressed a slice carries its bytes.
Invariant: where the slices and pieces of a text end depends on its bytes alone, and joined they are the text.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from firstwords.errors import BadData
from firstwords.schema import RowError, check_text, parse_line
from firstwords.sources.archives import is_compressed, open_bytes

BOM = b"\xef\xbb\xbf"
# A text in pieces that are read once and join to the whole, or why it is none.
PIECE_BYTES = 1 << 20
SLICE_PIECES = 8
LONGEST_BYTES = 1 << 28  # without a place to cut; an archive could hold a line without end

# A piece ends behind a word and before white space, where GPT-2's word pattern always cuts: so the ids of
# the pieces are the ids of the whole. The word's last character is one of those that surely are no
# white space; the three bytes e1 9a 80, e2 80 .., e3 80 .. may be.
_WORD_END = re.compile(
    rb"(?:[!-~]|[\xc3-\xdf][\x80-\xbf]|\xe1[\x80-\x99\x9b-\xbf][\x80-\xbf]|\xe3[\x81-\xbf][\x80-\xbf]"
    rb"|[\xe0\xe4-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3})(?=[ \n])"
)
_LINE_END = re.compile(rb"\n")
_BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")


@dataclass(frozen=True, slots=True)
class Slice:
    """A stretch of a file.

    Attributes:
        begin, end: in bytes of the text behind a byte order mark; of Parquet, row groups.
        is_last: the file ends with it.
        data: what is there, if it does not lie in the file as it is.
    """

    file: str
    begin: int
    end: int
    is_last: bool
    data: bytes | None = None

    def load(self) -> bytes:
        """Return its bytes."""
        if self.data is not None:
            return self.data
        with open(self.file, "rb") as file:
            file.seek(self.begin + (len(BOM) if file.read(len(BOM)) == BOM else 0))
            return file.read(self.end - self.begin)


def find_word_end(block: bytes) -> int:
    """Return the last place between a word and white space, or 0."""
    return _find_last(_WORD_END, block)


def find_line_end(block: bytes) -> int:
    """Return the place behind the last line end, or 0."""
    return _find_last(_LINE_END, block)


def find_blank_line(block: bytes) -> int:
    """Return the place behind the last blank line, or 0."""
    return _find_last(_BLANK_LINE, block)


def _find_last(pattern: re.Pattern, block: bytes) -> int:
    for begin in (max(0, len(block) - 4096), 0):
        end = 0
        for match in pattern.finditer(block, begin):
            end = match.end()
        if end:
            return end
    return 0


def iter_slices(path: Path, find_cut: Callable[[bytes], int]) -> Iterator[Slice]:
    """Cut a file where `find_cut` says, in the last piece of every `SLICE_PIECES`.

    Raises:
        BadData: for a stretch that is too long for the memory and has no place to cut.
    """
    slices = _slice_archive(path, find_cut) if is_compressed(path) else _slice_file(path, find_cut)
    for part in slices:
        if part.end - part.begin > LONGEST_BYTES:
            raise _too_long(path, part.begin)
        yield part


def _too_long(path: Path, begin: int) -> BadData:
    return BadData(
        f"{path}: has no place to cut in the {LONGEST_BYTES >> 20} MB behind byte {begin}; "
        "break its lines, or leave it out"
    )


def _slice_file(path: Path, find_cut: Callable[[bytes], int]) -> Iterator[Slice]:
    with open(path, "rb") as file:
        origin = len(BOM) if file.read(len(BOM)) == BOM else 0
        size = file.seek(0, 2) - origin
        begin, step = 0, PIECE_BYTES * SLICE_PIECES
        for edge in range(step, size, step):
            file.seek(origin + edge - PIECE_BYTES)
            cut = find_cut(file.read(PIECE_BYTES))
            if cut:
                yield Slice(str(path), begin, edge - PIECE_BYTES + cut, False)
                begin = edge - PIECE_BYTES + cut
        yield Slice(str(path), begin, size, True)


def _slice_archive(path: Path, find_cut: Callable[[bytes], int]) -> Iterator[Slice]:
    with open_bytes(path) as file:
        start = _read_fully(file, len(BOM)).removeprefix(BOM)
        block = start + _read_fully(file, PIECE_BYTES - len(start))
        held, begin, number = [], 0, 1
        while following := _read_fully(file, PIECE_BYTES):
            cut = find_cut(block) if number % SLICE_PIECES == 0 else 0
            if cut:
                data = b"".join([*held, block[:cut]])
                yield Slice(str(path), begin, begin + len(data), False, data)
                begin, held, block = begin + len(data), [], block[cut:]
            held.append(block)
            if len(held) * PIECE_BYTES > LONGEST_BYTES:
                raise _too_long(path, begin)
            block, number = following, number + 1
        data = b"".join([*held, block])
        yield Slice(str(path), begin, begin + len(data), True, data)


def _read_fully(file, size: int) -> bytes:
    parts = []
    while size and (part := file.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def cut_pieces(data: bytes, begin: int = 0) -> Iterator[bytes]:
    """Yield the pieces of a text, or of a slice of it that begins at a piece's end.

    Args:
        data: UTF-8.
        begin: where in the text it begins, in bytes.
    """
    start = 0
    # In what is left of the piece in which `begin` lies there is no place to cut: it is the last one.
    first = -begin % PIECE_BYTES + PIECE_BYTES
    for edge in range(first, len(data), PIECE_BYTES):
        cut = find_word_end(data[edge - PIECE_BYTES : edge])
        if cut:
            yield data[start : edge - PIECE_BYTES + cut]
            start = edge - PIECE_BYTES + cut
    yield data[start:]


def decode_text(data: bytes, begin: int) -> str | RowError:
    """Decode what lies at byte `begin` of a file, strictly; NUL is refused."""
    if b"\0" in data:
        return RowError("nul", f"NUL at byte {begin + data.index(0)}; is it UTF-16?")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        return RowError("bad_utf8", f"not UTF-8 at byte {begin + error.start}")


def read_lines(data: bytes) -> Iterator[tuple[int, str | RowError]]:
    """Yield `(line, text)` of the lines that are not blank, counted from 1."""
    for number, line in _decode_lines(data):
        if isinstance(line, RowError) or line.strip():
            yield number, line


def read_paragraphs(data: bytes) -> Iterator[tuple[int, str | RowError]]:
    """Yield `(line, text)` of what blank lines part; `line` is its first."""
    held: list[tuple[int, str | RowError]] = []
    for number, line in _decode_lines(data):
        if isinstance(line, RowError) or line.strip():
            held.append((number, line))
        elif held:
            yield _join_lines(held)
            held = []
    if held:
        yield _join_lines(held)


def _join_lines(held: list[tuple[int, str | RowError]]) -> tuple[int, str | RowError]:
    bad = [(number, line) for number, line in held if isinstance(line, RowError)]
    return bad[0] if bad else (held[0][0], "\n".join(line for _, line in held))


def _decode_lines(data: bytes) -> Iterator[tuple[int, str | RowError]]:
    for number, line in enumerate(BytesIO(data), 1):
        try:
            text = line.rstrip(b"\r\n").decode("utf-8")
            check_text(text, "the line")
            yield number, text
        except UnicodeDecodeError as error:
            yield number, RowError("bad_utf8", f"not UTF-8 at byte {error.start} of the line")
        except RowError as error:
            yield number, error


def read_json_lines(data: bytes) -> Iterator[tuple[int, dict | RowError]]:
    """Yield `(line, row)` of the lines that are not blank, counted from 1."""
    for number, line in enumerate(BytesIO(data), 1):
        if not line.isspace():
            yield number, parse_line(line)
