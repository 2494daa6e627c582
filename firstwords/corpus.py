"""Documents -> encoded parts -> the token store.

    units = group_units(chain(slices, documents))       # lists of about 8 MB of text
    EncodeJob(tokenizer, seed=0)(unit, folder)           # tokens.bin, pieces.npy, part.json, rejects.jsonl
    survey = survey_parts(parts, rejects, folder)        # what is in them: kept, empty, bad, hashes
    write_store(parts, survey, tokenizer, folder, 1.0)   # train.bin, val.bin

A part is a pure function of its unit; a document may go on from one part to the next. Invariant: the store
depends on the order of the documents alone, not on where the parts end.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np

from firstwords.hashes import DTYPE, find_val_limit, hash_content, open_hashes
from firstwords.schema import RowError, format_row
from firstwords.sources import EVERYTHING, Document, Place, TextSlice, read_place
from firstwords.tokenizer import Tokenizer
from firstwords.tokenstore import TokenStoreWriter, choose_dtype

UNIT_BYTES = 8 << 20
TOKENS, PIECES, PART, REJECTS = "tokens.bin", "pieces.npy", "part.json", "rejects.jsonl"
# The columns of `pieces.npy`, one row for each piece of a document, uint64.
HASH, NUM_TOKENS, NUM_BYTES, NUM_CHARACTERS, STATE = range(5)
ENDS, BLANK, BAD = 1, 2, 4  # bits of STATE: the document ends here, only white space, no text
KEPT, EMPTY, REFUSED = range(3)  # what becomes of a document
BLOCK_TOKENS = 1 << 22  # copied at a time
PIECE_TOKENS = 1 << 18  # decoded at a time


@dataclass(frozen=True, slots=True)
class Batch:
    """Documents that some process has read, for another one; the counterpart of a `TextSlice`."""

    documents: tuple[Document, ...]
    file: str = ""
    begins_file: bool = True

    def read(self) -> Iterable[Document]:
        """Return the documents."""
        return self.documents

    def count_lines(self) -> int:
        """Return 0: the documents' lines are counted from the beginning of their file."""
        return 0


@dataclass(frozen=True, slots=True)
class WholeFile:
    """A file that is read from its beginning, by the process that encodes it.

    Attributes:
        file, split_docs, column: as of a `TextSlice`; without a column the one that is guessed.
    """

    file: str
    split_docs: str
    column: str | None
    begins_file: bool = True

    @property
    def num_bytes(self) -> int:
        """Return its size."""
        return Path(self.file).stat().st_size

    def read(self) -> Iterator[Document]:
        """Read the documents, long ones in parts."""
        place = Place(self.file, (Path(self.file),))
        return _cut_documents(read_place(place, self.column, self.split_docs, EVERYTHING))

    def count_lines(self) -> int:
        """Return 0: the documents' lines are counted from the beginning of the file."""
        return 0


Source = TextSlice | Batch | WholeFile
Unit = list[Source]


def group_units(items: Iterable[Source | Document]) -> Iterator[Unit]:
    """Group slices, and documents that were read, into units of about `UNIT_BYTES`."""
    unit, documents, size = [], [], 0
    for item in _cut_documents(items):
        if isinstance(item, Document):
            documents.append(item)
            size += _measure(item)
        else:
            unit += [*_batch(documents), item]
            documents = []
            size += item.num_bytes
        if size >= UNIT_BYTES:
            yield [*unit, *_batch(documents)]
            unit, documents, size = [], [], 0
    if unit or documents:
        yield [*unit, *_batch(documents)]


def _batch(documents: list[Document]) -> list[Batch]:
    return [Batch(tuple(documents))] if documents else []


def _measure(document: Document) -> int:
    # A short document costs a microsecond or ten whatever its length, as much as 64 characters do.
    return 64 if isinstance(document.pieces, RowError) else sum(map(len, document.pieces)) + 64


def _cut_documents(items: Iterable[Source | Document]) -> Iterator[Source | Document]:
    """Read the pieces of documents, and part those that are longer than a unit."""
    for item in items:
        if not isinstance(item, Document) or isinstance(item.pieces, RowError | tuple):
            yield item
            continue
        held, size = [], 0
        for piece in item.pieces:
            if size >= UNIT_BYTES:
                yield Document(item.file, item.line, tuple(held), ends=False)
                held, size = [], 0
            held.append(piece)
            size += len(piece)
        yield Document(item.file, item.line, tuple(held))


class EncodeJob:
    """Encodes a unit into the files of its part.

    Args:
        tokenizer: of the store.
        seed: of the hashes that draw val.
    """

    def __init__(self, tokenizer: Tokenizer, seed: int):
        self._tokenizer, self._seed = tokenizer, seed

    def __call__(self, unit: Unit, folder: Path) -> None:
        """Write `tokens.bin`, `pieces.npy`, `part.json` and, if there are any, `rejects.jsonl`."""
        slices = []
        with _PartFiles(folder, self._tokenizer, self._seed) as files:
            for number, source in enumerate(unit):
                for document in source.read():
                    files.write_document(document, number)
                slices.append([source.file, source.begins_file, source.count_lines()])
        (folder / PART).write_text(json.dumps({"slices": slices}), encoding="utf-8")


class _PartFiles(ExitStack):
    """The files of a part while they are written."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, seed: int):
        super().__init__()
        self._folder, self._tokenizer, self._seed = folder, tokenizer, seed
        self._dtype = choose_dtype(len(tokenizer))
        self._end = np.array([tokenizer.endoftext_id], dtype=np.uint32)
        self._tokens = self.enter_context((folder / TOKENS).open("wb"))
        self._pieces: list[tuple[int, ...]] = []
        self._rejects = None

    def write_document(self, document: Document, number: int) -> None:
        """Encode a document of the unit's slice `number`, or take down why it is none."""
        if isinstance(document.pieces, RowError):
            self._reject(document, number)
            return
        pieces = list(document.pieces)
        for piece in pieces[:-1]:
            self._write_piece(piece, 0)
        self._write_piece(pieces[-1], ENDS * document.ends)

    def _write_piece(self, text: str, state: int) -> None:
        ids = self._tokenizer.encode_array(text)
        ids.astype(self._dtype).tofile(self._tokens)
        if state & ENDS:
            self._end.astype(self._dtype).tofile(self._tokens)
        if not text or text.isspace():
            state |= BLANK
        size = len(text) if text.isascii() else len(text.encode("utf-8"))
        num_tokens = len(ids) + (state & ENDS)
        self._pieces.append((hash_content((text,), self._seed), num_tokens, size, len(text), state))

    def _reject(self, document: Document, number: int) -> None:
        if self._rejects is None:
            self._rejects = self.enter_context((self._folder / REJECTS).open("w", encoding="utf-8"))
        error = document.pieces
        row = {"piece": len(self._pieces), "slice": number, "file": document.file, "line": document.line}
        detail = str(error).encode("utf-8", "backslashreplace").decode()
        self._rejects.write(format_row(row | {"reason": error.reason, "detail": detail}))
        self._pieces.append((0, 0, 0, 0, BAD | ENDS * document.ends))

    def __exit__(self, *error) -> bool | None:
        np.save(self._folder / PIECES, np.array(self._pieces, dtype=np.uint64).reshape(-1, 5))
        return super().__exit__(*error)


@dataclass
class Survey:
    """What is in the parts.

    Attributes:
        read, empty, kept: documents; those that are bad are read but not counted here.
        characters, num_bytes: of the documents that are kept.
        lengths: how many of those have up to 16, 32, 64, ... tokens.
        hashes: file with the hash of each kept document, in order.
        verdicts: file with a byte for each document: `KEPT`, `EMPTY` or `REFUSED`.
    """

    hashes: Path
    verdicts: Path
    kept: int = 0
    empty: int = 0
    refused: int = 0
    characters: int = 0
    num_bytes: int = 0
    lengths: Counter = field(default_factory=Counter)
    _open: np.ndarray = field(default_factory=lambda: np.empty((0, 5), dtype=np.uint64))

    @property
    def read(self) -> int:
        """Documents in all."""
        return self.kept + self.empty + self.refused

    def add(self, pieces: np.ndarray, hash_file, verdict_file, seed: int) -> None:
        """Count the documents that end in a part; what goes on waits for the next one."""
        pieces = np.concatenate([self._open, pieces])
        ends = np.flatnonzero(pieces[:, STATE] & ENDS) + 1
        self._open = pieces[ends[-1] if len(ends) else 0 :]
        if not len(ends):
            return
        starts = np.concatenate([[0], ends[:-1]])
        pieces = pieces[: ends[-1]]
        state = pieces[:, STATE]
        verdicts = np.full(len(ends), KEPT, dtype=np.uint8)
        verdicts[np.bitwise_and.reduceat(state, starts) & BLANK > 0] = EMPTY
        verdicts[np.bitwise_or.reduceat(state, starts) & BAD > 0] = REFUSED
        hashes = pieces[starts, HASH]
        for place in np.flatnonzero(ends - starts > 1):
            parts = pieces[starts[place] : ends[place], HASH].tolist()
            hashes[place] = hash_content(map(str, parts), seed)
        kept = verdicts == KEPT
        hashes[kept].astype(DTYPE).tofile(hash_file)
        verdicts.tofile(verdict_file)
        self.lengths.update(_find_bins(np.add.reduceat(pieces[:, NUM_TOKENS], starts)[kept]))
        self.kept += int(kept.sum())
        self.empty += int((verdicts == EMPTY).sum())
        self.refused += int((verdicts == REFUSED).sum())
        self.characters += int(np.add.reduceat(pieces[:, NUM_CHARACTERS], starts)[kept].sum())
        self.num_bytes += int(np.add.reduceat(pieces[:, NUM_BYTES], starts)[kept].sum())


def _find_bins(lengths: np.ndarray) -> dict[int, int]:
    """Count lengths by the upper ends of their bins."""
    ends = 16 << np.maximum(0, np.ceil(np.log2(np.maximum(lengths, 1) / 16))).astype(np.int64)
    return dict(zip(*(column.tolist() for column in np.unique(ends, return_counts=True)), strict=True))


def survey_parts(parts: Iterable[Path], folder: Path, add_reject, seed: int) -> Survey:
    """Take account of all parts as they come, in constant memory.

    Args:
        parts: in order.
        folder: where the files of the survey go.
        add_reject: called with file, line and `RowError` for each document that is bad.
        seed: of the hashes.
    """
    survey = Survey(folder / "hashes.bin", folder / "verdicts.bin")
    addresses = _Addresses()
    with open(survey.hashes, "wb") as hash_file, open(survey.verdicts, "wb") as verdict_file:
        for part in parts:
            pieces = np.load(part / PIECES)
            for file, line, error in addresses.read_rejects(part, pieces, survey.read):
                add_reject(file, line, error)
            survey.add(pieces, hash_file, verdict_file, seed)
    return survey


class _Addresses:
    """Turns the lines of slices, as the parts have them, into lines of files."""

    def __init__(self):
        self._lines = 0  # of the file that was read last, before the slice that comes next
        self._last = -1  # the document refused last; one that goes on is refused once

    def read_rejects(
        self, part: Path, pieces: np.ndarray, num_documents: int
    ) -> Iterator[tuple[str, int, RowError]]:
        """Yield `(file, line, error)`; `num_documents` ended before this part."""
        before = []
        for _, begins_file, num_lines in json.loads((part / PART).read_text(encoding="utf-8"))["slices"]:
            self._lines = 0 if begins_file else self._lines
            before.append(self._lines)
            self._lines += num_lines
        if not (part / REJECTS).exists():
            return
        ends = (pieces[:, STATE] & ENDS).astype(np.int64)
        numbers = num_documents + np.cumsum(ends) - ends
        with open(part / REJECTS, encoding="utf-8") as rows:
            for row in map(json.loads, rows):
                if numbers[row["piece"]] > self._last:
                    self._last = numbers[row["piece"]]
                    error = RowError(row["reason"], row["detail"])
                    yield row["file"], before[row["slice"]] + row["line"], error


def count_parts(parts: Iterable[Path], survey: Survey) -> Iterator[tuple[int, int]]:
    """Yield for each part the kept documents that end in it, and the tokens of kept ones."""
    # An empty file cannot be mapped.
    verdicts = np.memmap(survey.verdicts, np.uint8, mode="r") if survey.read else np.empty(0, np.uint8)
    document = 0
    for part in parts:
        pieces = np.load(part / PIECES)
        ends = (pieces[:, STATE] & ENDS).astype(np.int64)
        stays = verdicts[document + np.cumsum(ends) - ends] == KEPT
        yield int(ends[stays].sum()), int(pieces[stays, NUM_TOKENS].sum())
        document += int(ends.sum())


def write_store(
    parts: Iterable[Path],
    survey: Survey,
    ascending: np.ndarray,
    tokenizer: Tokenizer,
    folder: Path,
    val_pct: float,
) -> dict[str, dict]:
    """Write `train.bin` and `val.bin`.

    Args:
        parts: those of the survey.
        ascending: the hashes of the survey, sorted.
        val_pct: percent of the distinct documents for val; of a single document its last percent.

    Returns:
        the counts of each split, as `corpus.json` has them.
    """
    if survey.kept == 1:
        blocks = _cut_single(parts, survey, tokenizer, val_pct)
    else:
        blocks = _assign_documents(parts, survey, find_val_limit(ascending, val_pct), len(tokenizer))
    writers = {split: TokenStoreWriter(folder, split, len(tokenizer)) for split in ("train", "val")}
    for split, ids, num_bytes, num_documents in blocks:
        writers[split].append(ids, num_bytes=num_bytes, num_documents=num_documents)
    return {split: writer.close() for split, writer in writers.items()}


def read_back(path: Path, tokenizer: Tokenizer) -> Iterator[Iterator[str]]:
    """Yield the documents of a finished split, each in pieces of which only a long one has several."""
    pieces = groupby(_iter_decoded(path, tokenizer), key=itemgetter(0))
    return (map(itemgetter(1), document) for _, document in pieces)


def _iter_decoded(path: Path, tokenizer: Tokenizer) -> Iterator[tuple[int, str]]:
    """Yield `(number of the document, piece of it)`."""
    document, held = 0, np.empty(0, choose_dtype(len(tokenizer)))
    with open(path, "rb") as file:
        while len(block := np.fromfile(file, held.dtype, PIECE_TOKENS)):
            ids = np.concatenate([held, block])
            *whole, held = np.split(ids, np.flatnonzero(ids == tokenizer.endoftext_id) + 1)
            for own in whole:
                yield document, tokenizer.decode(own.tolist(), skip_control=True)
                document += 1
            if len(held) >= PIECE_TOKENS:
                yield document, tokenizer.decode(held.tolist())
                held = held[:0]
    if len(held):
        yield document, tokenizer.decode(held.tolist())


# split, ids, bytes of text, documents that end
Block = tuple[str, np.ndarray, int, int]


def _assign_documents(parts: Iterable[Path], survey: Survey, limit: int, vocab_size: int) -> Iterator[Block]:
    """Give each kept document to its side: those with the smallest hashes are val."""
    hashes, verdicts = open_hashes(survey.hashes), np.memmap(survey.verdicts, np.uint8, mode="r")
    document = kept = 0
    for pieces, ids in _iter_blocks(parts, vocab_size):
        ends = (pieces[:, STATE] & ENDS).astype(np.int64)
        numbers = np.cumsum(ends) - ends  # of the document that a piece belongs to, in this block
        stays = verdicts[document : document + numbers[-1] + 1] == KEPT
        is_val = np.zeros(len(stays), dtype=bool)
        is_val[stays] = hashes[kept : kept + int(stays.sum())] <= limit
        for split, chosen in (("train", stays & ~is_val), ("val", stays & is_val)):
            rows = pieces[chosen[numbers]]
            if len(rows):
                chosen_ids = ids[np.repeat(chosen[numbers], pieces[:, NUM_TOKENS].astype(np.int64))]
                yield split, chosen_ids, int(rows[:, NUM_BYTES].sum()), int((rows[:, STATE] & ENDS).sum())
        document += int(ends.sum())
        kept += int(stays[: int(ends.sum())].sum())


def _iter_blocks(parts: Iterable[Path], vocab_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield pieces and their ids, of about `BLOCK_TOKENS` at a time."""
    for part in parts:
        pieces = np.load(part / PIECES)
        ends = np.cumsum(pieces[:, NUM_TOKENS]).astype(np.int64)
        begin = offset = 0
        while begin < len(pieces):
            end = max(begin + 1, int(np.searchsorted(ends, offset + BLOCK_TOKENS)))
            dtype = choose_dtype(vocab_size)
            size, place = int(ends[end - 1]) - offset, offset * dtype.itemsize
            yield pieces[begin:end], np.fromfile(part / TOKENS, dtype, size, offset=place)
            begin, offset = end, int(ends[end - 1])


def _cut_single(
    parts: Iterable[Path], survey: Survey, tokenizer: Tokenizer, val_pct: float
) -> Iterator[Block]:
    """Cut the one document that is kept behind a character; only the piece with the cut is encoded anew."""
    cut = int(survey.characters * (1 - val_pct / 100))
    cut = min(max(1, cut), survey.characters - 1)
    verdicts = np.memmap(survey.verdicts, np.uint8, mode="r")
    document = 0
    for pieces, ids in _iter_blocks(parts, len(tokenizer)):
        for piece, own in zip(
            pieces, np.split(ids, np.cumsum(pieces[:-1, NUM_TOKENS].astype(np.int64))), strict=True
        ):
            if verdicts[document] == KEPT:
                yield from _cut_piece(own, cut, int(piece[NUM_CHARACTERS]), int(piece[NUM_BYTES]), tokenizer)
                cut -= int(piece[NUM_CHARACTERS])
            document += int(piece[STATE]) & ENDS


def _cut_piece(
    ids: np.ndarray, cut: int, characters: int, num_bytes: int, tokenizer: Tokenizer
) -> Iterator[Block]:
    if cut <= 0 or cut > characters:
        split = "val" if cut <= 0 else "train"
        yield split, ids, num_bytes, int(ids[-1:].tolist() == [tokenizer.endoftext_id])
        return
    # The ids have every byte of the text, so no file is read again.
    text = tokenizer.decode_bytes(ids.tolist()).decode("utf-8")
    end = [tokenizer.endoftext_id]
    head, tail = text[:cut], text[cut:]
    yield "train", np.array([*tokenizer.encode(head), *end]), len(head.encode("utf-8")), 1
    ends = end if ids[-1] == tokenizer.endoftext_id else []
    yield "val", np.array([*tokenizer.encode(tail), *ends]), len(tail.encode("utf-8")), len(ends)
