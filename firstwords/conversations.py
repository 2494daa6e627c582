"""Rows of any known shape -> conversations and their tokens, in parts that processes share.

    rows  --survey_batch-->  rows.jsonl hashes.bin rejects.jsonl        one part for some thousand rows
          --EncodeParts--->  train.jsonl train_tokenized.jsonl val...   one part for each of those

The first pass finds every bad row before any is encoded; the second knows all hashes, so it knows which
conversation is whose, train's or val's. Invariants: every row that is read is kept, dropped or rejected, and
counted there; `tokens_read + tokens_repeated == tokens + tokens_dropped`.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from firstwords.hashes import DTYPE, hash_content, open_hashes
from firstwords.packing import choose_length, split_turns
from firstwords.prep import Rejects
from firstwords.schema import Message, RowError, format_conversation
from firstwords.sources import Located, RawRow, find_shape, parse_raw, to_conversation
from firstwords.template import encode_chat
from firstwords.tokenizer import Tokenizer

SPLITS = ("train", "val")
OVERLONG = ("keep", "drop", "split", "truncate")
BATCH_ROWS, BATCH_BYTES = 4096, 4 << 20
ACCOUNT = "account.json"
# What is counted of a split: rows of the first pass, conversations as written, tokens.
COUNTED = (
    *("rows", "rows_dropped", "rows_added", "conversations", "turns", "longest"),
    *("tokens_read", "tokens_repeated", "tokens_dropped", "tokens", "learned_tokens", "learned_dropped"),
    *("longer_than_seq_len", "tokens_of_longer", "cut_in_reply"),
)


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows that are read together: the unit of the first pass.

    Attributes:
        dataset: which of the `--dataset`s, from 0.
        is_repeat: the rows were read before, for a weight above 1; the bad ones have been listed then.
        split: `train` or `val` where the dataset says so, else None.
        rows: `(file, line, row)`.
    """

    dataset: int
    is_repeat: bool
    split: str | None
    system: str | None
    seed: int
    rows: list[tuple[str, int, RawRow]]


def gather_rows(located: Iterable[Located]) -> Iterator[list[tuple[str, int, RawRow]]]:
    """Gather rows to lists of at most `BATCH_ROWS`, which end where `BATCH_BYTES` are reached."""
    rows, size = [], 0
    for row in located:
        rows.append((row.file, row.line, row.row))
        size += _measure(row.row)
        if len(rows) == BATCH_ROWS or size >= BATCH_BYTES:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


def _measure(value) -> int:
    """Return about how many bytes a row takes: those of its texts."""
    if isinstance(value, bytes | str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_measure, value.values()))
    return sum(map(_measure, value)) if isinstance(value, list) else 0


def survey_batch(batch: Batch, staging: Path) -> None:
    """First pass: write the good rows as conversations, with their hashes; list the bad ones."""
    account = {"dataset": batch.dataset, "is_repeat": batch.is_repeat, "split": batch.split, "kept": 0}
    shapes, ignored, hashes = Counter(), Counter(), []
    with Rejects(staging) as rejects, _open_new(staging / "rows.jsonl") as file:
        for name, line, raw in batch.rows:
            try:
                row = parse_raw(raw)
                if isinstance(row, RowError):
                    raise row
                text = format_conversation(to_conversation(row, system=batch.system))
            except RowError as error:
                if not batch.is_repeat:
                    rejects.add(name, line, error)
                continue
            shape = find_shape(row)
            shapes[shape.name] += 1
            if len(row) > len(shape.needed):
                ignored.update(name for name in row if name not in shape.columns)
            hashes.append(hash_content([text], batch.seed))
            file.write(text)
    np.array(hashes, DTYPE).tofile(staging / "hashes.bin")
    account |= {"kept": len(hashes), "shapes": shapes, "ignored_columns": ignored}
    account |= {"rejected": rejects.counts, "first_rejects": rejects.first}
    _write_account(staging, account)


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation and its tokens."""

    messages: list[Message]
    ids: list[int]
    mask: list[int]


@dataclass(frozen=True)
class EncodeParts:
    """Second pass: encode the conversations of a part of the first, and write them to their split.

    Attributes:
        val_limit: the highest hash of val; not asked where the part has a split of its own.
        overlong: one of `OVERLONG`, for conversations of more than `seq_len` tokens.
    """

    tokenizer: Tokenizer
    val_limit: int
    seq_len: int
    overlong: str
    seed: int

    def __call__(self, part: Path, staging: Path) -> None:
        """Make the part of the second pass from the folder that `survey_batch` filled."""
        survey = read_account(part)
        writers = {split: SplitWriter(staging, split, self) for split in SPLITS}
        hashes = open_hashes(part / "hashes.bin").tolist()
        for (line, messages), content in zip(read_rows(part), hashes, strict=True):
            split = survey["split"] or ("val" if content <= self.val_limit else "train")
            writers[split].add(Chat(messages, *encode_chat(messages, self.tokenizer)), line, content)
        account = {"dataset": survey["dataset"], "splits": {s: w.close() for s, w in writers.items()}}
        _write_account(staging, account)


def read_rows(part: Path) -> Iterator[tuple[str, list[Message]]]:
    """Read back the conversations of a part, each with its line."""
    with open(part / "rows.jsonl", encoding="utf-8", newline="\n") as lines:
        for line in lines:
            yield line, [Message(turn["role"], turn["content"]) for turn in json.loads(line)["messages"]]


class SplitWriter:
    """One split of a part: its conversations (contract 1), their tokens (contract 2), and their counts."""

    def __init__(self, staging: Path, split: str, job: EncodeParts):
        self._job = job
        self._counts: Counter[str] = Counter(dict.fromkeys(COUNTED, 0))
        self._lengths: Counter[int] = Counter()
        self._shares: Counter[int] = Counter()
        self._hashes: list[int] = []
        self._hashes_path = staging / f"{split}_hashes.bin"
        self._rows = _open_new(staging / f"{split}.jsonl")
        self._tokens = _open_new(staging / f"{split}_tokenized.jsonl")

    def add(self, chat: Chat, line: str, content: int) -> None:
        """Write a conversation, or what `--overlong` leaves of it, and count what it drops.

        Args:
            line: its row, as `format_conversation` spells it.
            content: the hash of that.
        """
        self._counts["rows"] += 1
        self._counts["tokens_read"] += len(chat.ids)
        if len(chat.ids) <= self._job.seq_len:
            self._write(chat, line, content)
        else:
            self._add_overlong(chat)

    def _add_overlong(self, chat: Chat) -> None:
        job = self._job
        pieces, repeated = fit_chat(chat, job.tokenizer, job.seq_len, job.overlong)
        for piece in pieces:
            line = format_conversation(piece.messages)
            self._write(piece, line, hash_content([line], job.seed))
        kept = sum(len(piece.ids) for piece in pieces)
        learned = sum(sum(piece.mask) for piece in pieces)
        self._counts.update(
            longer_than_seq_len=1,
            tokens_of_longer=len(chat.ids),
            rows_dropped=not pieces,
            rows_added=max(0, len(pieces) - 1),
            tokens_repeated=repeated,
            tokens_dropped=len(chat.ids) + repeated - kept,
            learned_dropped=sum(chat.mask) - learned,
            cut_in_reply=sum(piece.mask[-1] and piece.ids[-1] != job.tokenizer.end_id for piece in pieces),
        )

    def _write(self, chat: Chat, line: str, content: int) -> None:
        learned = sum(chat.mask)
        self._rows.write(line)
        # A list of ints is spelled alike by str and JSON, and str is 4 times faster; a mask can be had
        # without looking at each int.
        mask = bytes(chat.mask).replace(b"\0", b"0, ").replace(b"\1", b"1, ")[:-2].decode()
        self._tokens.write(f'{{"input_ids": {chat.ids}, "assistant_masks": [{mask}]}}\n')
        self._hashes.append(content)
        self._lengths[find_bin(len(chat.ids))] += 1
        self._shares[min(9, 10 * learned // len(chat.ids)) * 10 + 10] += 1
        counts = self._counts
        counts["conversations"] += 1
        counts["turns"] += len(chat.messages)
        counts["tokens"] += len(chat.ids)
        counts["learned_tokens"] += learned
        counts["longest"] = max(counts["longest"], len(chat.ids))

    def close(self) -> dict:
        """Close the files; returns counts, and histograms by the upper ends of their bins."""
        self._rows.close()
        self._tokens.close()
        np.array(self._hashes, DTYPE).tofile(self._hashes_path)
        return dict(self._counts) | {"lengths": self._lengths, "learned_shares": self._shares}


def find_bin(length: int) -> int:
    """Return the upper end of the bin of a length: 16, 32, 64, ... tokens."""
    return max(16, 1 << (length - 1).bit_length())


def fit_chat(chat: Chat, tokenizer: Tokenizer, seq_len: int, overlong: str) -> tuple[list[Chat], int]:
    """Do with a conversation of more than `seq_len` tokens what `--overlong` says.

    Returns:
        what is left, and how many tokens of it stand there more than once: `split` gives each piece
        the system prompt.
    """
    if overlong == "keep":
        return [chat], 0
    if overlong == "split":
        return _split_chat(chat, tokenizer, seq_len)
    length = choose_length(np.array(chat.mask), seq_len, overlong)
    if not length:
        return [], 0
    return [Chat(chat.messages, chat.ids[:length], chat.mask[:length])], 0


def _split_chat(chat: Chat, tokenizer: Tokenizer, seq_len: int) -> tuple[list[Chat], int]:
    ends = np.flatnonzero(np.array(chat.ids) == tokenizer.end_id)
    lengths = np.diff(ends, prepend=-1).tolist()
    has_system = chat.messages[0].role == "system"
    pieces = []
    for turns in split_turns(lengths, seq_len, num_shared=int(has_system)):
        messages = [chat.messages[turn] for turn in turns]
        pieces.append(Chat(messages, *encode_chat(messages, tokenizer)))
    return pieces, lengths[0] * max(0, len(pieces) - 1) if has_system else 0


# --- parts -> one


def join_files(parts: Iterable[Path], name: str, target: Path) -> None:
    """Write the file `name` of all parts, one behind the other; parts without it are passed over."""
    with open(target, "wb") as joined:
        for part in parts:
            if (part / name).is_file():
                with open(part / name, "rb") as file:
                    shutil.copyfileobj(file, joined, 1 << 20)


def read_account(part: Path) -> dict:
    """Read the counts of a part."""
    return json.loads((part / ACCOUNT).read_text(encoding="utf-8"))


def _write_account(staging: Path, account: dict) -> None:
    (staging / ACCOUNT).write_text(json.dumps(account), encoding="utf-8")


def add_counts(total: dict, more: dict) -> None:
    """Add up counts, nested ones too; `longest` is the longest of both."""
    for name, value in more.items():
        if isinstance(value, dict):
            add_counts(total.setdefault(name, {}), value)
        elif name == "longest":
            total[name] = max(total.get(name, 0), value)
        else:
            total[name] = total.get(name, 0) + value


def _open_new(path: Path):
    return open(path, "w", encoding="utf-8", newline="\n")
