"""A dataset of texts -> documents, or slices of files that other processes turn into documents.

    next(read_texts("shakespeare.txt")).pieces         ->  an iterator of "First Citizen: ..."
    list(iter_text_slices(Path("wiki.jsonl"), "file", None))   ->  [TextSlice(...), ...]

Invariant: the slices of a file hold the same documents as `read_texts` yields of it, in the same order.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from firstwords.errors import BadFlag
from firstwords.schema import RowError, check_text, list_names
from firstwords.sources import blocks
from firstwords.sources.blocks import Slice, cut_pieces, decode_text
from firstwords.sources.places import Place, find_place, find_suffix
from firstwords.sources.readers import iter_row_groups, read_row_groups
from firstwords.sources.streams import (
    EVERYTHING,
    Located,
    Sample,
    parse_rows,
    read_files,
    read_hub,
    refuse_empty,
)

# A text in pieces that are read once and join to the whole, or why it is none.
Text = Iterable[str] | RowError

SPLIT_DOCS = ("file", "blank_line", "line")
# The column with the text, tried in this order.
TEXT_COLUMNS = ("text", "content", "document", "story", "article", "body")
_FIND_CUT = {
    "file": blocks.find_word_end,
    "blank_line": blocks.find_blank_line,
    "line": blocks.find_line_end,
}
_READ_TXT = {"blank_line": blocks.read_paragraphs, "line": blocks.read_lines}


@dataclass(frozen=True, slots=True)
class Document:
    """One text and its address; most have a single piece.

    Attributes:
        line: from 1 (of Parquet and Hub rows: the row's number); of a slice, within it.
        ends: false where the text goes on in the next slice.
    """

    file: str
    line: int
    pieces: Text
    ends: bool = True


@dataclass(frozen=True, slots=True)
class TextSlice:
    """A slice of a file and how its documents are found.

    Attributes:
        column: of rows; of a `.txt` None.
        split_docs: of a `.txt`: one of `SPLIT_DOCS`.
    """

    slice: Slice
    split_docs: str
    column: str | None

    @property
    def file(self) -> str:
        """Return the file that it is of."""
        return self.slice.file

    @property
    def begins_file(self) -> bool:
        """Tell whether the lines of the file are counted from here."""
        return self.slice.begin == 0

    @property
    def num_bytes(self) -> int:
        """Return about how much text it is."""
        return len(self.slice.data or b"") or max(1, self.slice.end - self.slice.begin)

    def read(self) -> Iterator[Document]:
        """Read the documents; their lines are counted from the slice's first."""
        if self.column is None:
            yield from self._read_txt()
        elif find_suffix(Path(self.file)) == ".parquet":
            rows = read_row_groups(Path(self.file), self.slice.begin, self.slice.end, self.column)
            yield from self._pick(rows)
        else:
            yield from self._pick(blocks.read_json_lines(self.slice.load()))

    def _pick(self, rows: Iterable[tuple[int, dict | RowError]]) -> Iterator[Document]:
        for line, row in rows:
            yield Document(self.file, line, parse_row(row, self.column))

    def _read_txt(self) -> Iterator[Document]:
        data = self.slice.load()
        if self.split_docs == "file":
            pieces = _decode_pieces(data, self.slice.begin)
            yield Document(self.file, 1, pieces, self.slice.is_last)
            return
        for line, text in _READ_TXT[self.split_docs](data):
            yield Document(self.file, line, text if isinstance(text, RowError) else cut_text(text))

    def count_lines(self) -> int:
        """Return by how much the lines of the next slice are behind those of this one."""
        if find_suffix(Path(self.file)) == ".parquet":
            return sum(size for size, _ in iter_row_groups(Path(self.file), self.slice.begin, self.slice.end))
        if self.column is None and self.split_docs == "file":
            return 0
        return self.slice.load().count(b"\n")


def _decode_pieces(data: bytes, begin: int) -> list[str] | RowError:
    texts = []
    for piece in cut_pieces(data, begin):
        text = decode_text(piece, begin)
        if isinstance(text, RowError):
            return text
        texts.append(text)
        begin += len(piece)
    return texts


def cut_text(text: str) -> tuple[str, ...]:
    """Return the pieces of a text, which are those of a file with the same text."""
    if len(text) * 4 <= blocks.PIECE_BYTES:
        return (text,)
    return tuple(piece.decode("utf-8") for piece in cut_pieces(text.encode("utf-8")))


def parse_row(row: dict | RowError, column: str) -> Text:
    """Return the text of a row in pieces, or why it has none."""
    if isinstance(row, RowError):
        return row
    if column not in row:
        return RowError("missing_key", f"has no {column!r}, only {list_names(row)}")
    text = row[column]
    if not isinstance(text, str):
        return RowError("bad_content", f"{column!r} is a {type(text).__name__}, not a string")
    try:
        check_text(text, repr(column))
    except RowError as error:
        return error
    return cut_text(text)


def iter_text_slices(file: Path, split_docs: str, text_column: str | None) -> Iterator[TextSlice] | None:
    """Cut a file into slices that any process can read.

    Args:
        file, split_docs, text_column: see `read_texts`.

    Returns:
        None for a kind of file that has to be read from its beginning.
    """
    suffix = find_suffix(file)
    if suffix == ".txt":
        return (TextSlice(s, split_docs, None) for s in blocks.iter_slices(file, _FIND_CUT[split_docs]))
    if suffix == ".jsonl":
        slices = blocks.iter_slices(file, blocks.find_line_end)
    elif suffix == ".parquet" and file.suffix.lower() == ".parquet":
        slices = _slice_parquet(file)
    else:
        return None
    column = text_column or _guess_file_column(file)
    return (TextSlice(part, split_docs, column) for part in slices)


def _slice_parquet(file: Path) -> Iterator[Slice]:
    begin, held, end = 0, 0, 0
    for end, (_, num_bytes) in enumerate(iter_row_groups(file), 1):
        held += num_bytes
        if held >= blocks.PIECE_BYTES * blocks.SLICE_PIECES:
            yield Slice(str(file), begin, end, False)
            begin, held = end, 0
    yield Slice(str(file), begin, end, True)


def _guess_file_column(file: Path) -> str:
    rows = (row for row in parse_rows(read_files((file,))) if not isinstance(row.row, RowError))
    first = next(rows, None)
    return guess_text_column(first) if first else TEXT_COLUMNS[0]


def guess_text_column(located: Located) -> str:
    """Tell in which column the text is.

    Raises:
        BadFlag: when none is called so, and not exactly one holds strings.
    """
    strings = [name for name, value in located.row.items() if isinstance(value, str)]
    known = [name for name in TEXT_COLUMNS if name in located.row]
    if not known and len(strings) != 1:
        raise BadFlag(
            f"--text_column: needed for {located.where}, whose columns are "
            f"{', '.join(map(repr, located.row))}; name the one with the text"
        )
    return (known or strings)[0]


def read_texts(
    dataset: str,
    *,
    split: str | None = None,
    config: str | None = None,
    text_column: str | None = None,
    split_docs: str = "file",
    sample: Sample = EVERYTHING,
) -> Iterator[Document]:
    """Read documents from `.txt` files, or from a column of what `streams.read_rows` reads.

    Args:
        dataset, split, config: see `places.find_place`; folders in sorted order.
        text_column: of rows; by default the first of `TEXT_COLUMNS` that is there, else the only
            one that holds strings.
        split_docs: of `.txt` files: each `file` is a document, or what `blank_line`s part, or each
            `line`.
        sample: which documents; all of them by default.

    Raises:
        MissingInput, BadFlag, BadData: see `streams.read_rows`; BadFlag too for a column that cannot be
            guessed.
    """
    place = find_place(dataset, split=split, config=config)
    return refuse_empty(dataset, read_place(place, text_column, split_docs, sample))


def read_place(place: Place, text_column: str | None, split_docs: str, sample: Sample) -> Iterator[Document]:
    """Read documents of a place that was found; see `read_texts`."""
    if place.on_hub:
        return _pick_texts(read_hub(place, sample), text_column)
    return sample.draw(
        lambda: chain.from_iterable(_read_file(file, text_column, split_docs) for file in place.files)
    )


def _read_file(file: Path, text_column: str | None, split_docs: str) -> Iterator[Document]:
    slices = iter_text_slices(file, split_docs, text_column)
    if slices is None:
        yield from _pick_texts(parse_rows(read_files((file,))), text_column)
    elif find_suffix(file) == ".txt" and split_docs == "file":
        yield _read_whole(file)
    else:
        lines = 0
        for part in slices:
            for document in part.read():
                yield replace(document, line=lines + document.line)
            lines += part.count_lines()


def _read_whole(file: Path) -> Document:
    def read() -> Iterator[Document]:
        for part in iter_text_slices(file, "file", None):
            yield from part.read()

    # A pass at the speed of the disk, before a long work begins.
    for document in read():
        if isinstance(document.pieces, RowError):
            return document
    return Document(str(file), 1, chain.from_iterable(document.pieces for document in read()))


def _pick_texts(rows: Iterable[Located], text_column: str | None) -> Iterator[Document]:
    for located in rows:
        if text_column is None and not isinstance(located.row, RowError):
            text_column = guess_text_column(located)
        yield Document(located.file, located.line, parse_row(located.row, text_column or ""))
