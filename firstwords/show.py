"""Prepared conversations -> what a person sees of them, on the terminal and as a page.

    <|user|>Hi<|end|>
    <|assistant|>[Hello!<|end|>]          what is learned stands in [ ], or is green

Invariant: everything is decoded from the arrays of `train_tokenized.jsonl` that training reads, never from
the text beside them.
"""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from firstwords.packing import choose_length, pack_rows
from firstwords.pages import escape_text, format_sections
from firstwords.plot import draw_stretches
from firstwords.schema import mask_control
from firstwords.tokenizer import Tokenizer, load_tokenizer

LEARNED_COLOUR, PLAIN_COLOUR = "\x1b[32m", "\x1b[0m"
PAGE_TOKENS = 4096  # of one conversation; a browser shows a million badly


def read_arrays(data_dir: Path) -> Iterator[tuple[list[int], list[int]]]:
    """Yield ids and mask of each training conversation."""
    with open(data_dir / "train_tokenized.jsonl", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield row["input_ids"], row["assistant_masks"]


def format_learned(data_dir: Path, count: int, *, in_colour: bool) -> Iterator[str]:
    """Yield the first conversations with what is learned marked: green on a terminal, else in [ ]."""
    tokenizer = load_tokenizer(data_dir)
    begin, end = (LEARNED_COLOUR, PLAIN_COLOUR) if in_colour else ("[", "]")
    for number, (ids, mask) in enumerate(islice(read_arrays(data_dir), count), 1):
        yield f"\n--- conversation {number}: {len(ids)} tokens"
        yield _mark_learned(ids, mask, tokenizer, begin, end)


def _mark_learned(ids: list[int], mask: list[int], tokenizer: Tokenizer, begin: str, end: str) -> str:
    """Decode in runs that are learned or not, so that no character is torn; a turn a line."""
    shown, run = [], []
    for token, learned, next_learned in zip(ids, mask, [*mask[1:], None], strict=True):
        run.append(token)
        if learned != next_learned or token == tokenizer.end_id:
            text = mask_control(tokenizer.decode(run))
            shown.append(f"{begin}{text}{end}" if learned else text)
            shown.append("\n" if token == tokenizer.end_id else "")
            run.clear()
    return "".join(shown)


def pack_shown(data_dir: Path, seq_len: int, count: int) -> tuple[list[list[tuple[int, int]]], int]:
    """Pack the training conversations as train.py does by default.

    Returns:
        `count` rows of `seq_len` tokens from the fullest on, evenly spaced, each a list of
        `(conversation from 1, its tokens)`; and how many rows there are.
    """
    lengths = np.array([choose_length(np.array(mask), seq_len, "drop") for _, mask in read_arrays(data_dir)])
    kept = np.flatnonzero(lengths)
    rows = pack_rows(lengths[kept], seq_len)
    picked = [rows[place * len(rows) // count] for place in range(count)] if len(rows) > count else rows
    shown = [[(int(kept[i]) + 1, int(lengths[kept[i]])) for i in row] for row in picked]
    return shown, len(rows)


def format_packing(data_dir: Path, seq_len: int, count: int) -> Iterator[str]:
    """Yield which conversations share a row of training, and how full it is; see `pack_shown`."""
    rows, total = pack_shown(data_dir, seq_len, count)
    yield f"\n--- packed into {total:,} rows of {seq_len:,} tokens"
    for number, row in enumerate(rows, 1):
        used = sum(length for _, length in row)
        names = ", ".join(f"{conversation} ({length})" for conversation, length in row[:12])
        more = f" and {len(row) - 12} more" if len(row) > 12 else ""
        yield f"row {number}: {used:,} tokens ({used / seq_len:.1%}) of conversations {names}{more}"


def build_token_page(data_dir: Path, seq_len: int, count: int) -> str:
    """Return an HTML page: every token of the first conversations in a box, and packed rows."""
    tokenizer = load_tokenizer(data_dir)
    rows, total = pack_shown(data_dir, seq_len, count)
    stretches = [[(f"{number}", length) for number, length in row] for row in rows]
    sections = [(f"{total:,} rows of {seq_len:,} tokens, some of them", draw_stretches(stretches, seq_len))]
    for number, (ids, mask) in enumerate(islice(read_arrays(data_dir), count), 1):
        heading = f"Conversation {number}: {len(ids):,} tokens, {sum(mask):,} of them learned"
        if len(ids) > PAGE_TOKENS:
            heading += f"; the first {PAGE_TOKENS:,} are shown"
        sections.append((heading, _format_tokens(ids[:PAGE_TOKENS], mask, tokenizer)))
    return format_sections(f"{data_dir}: what is learned is green, what ends a turn is framed", sections)


def _format_tokens(ids: list[int], mask: list[int], tokenizer: Tokenizer) -> str:
    boxes = []
    for place, (token, learned) in enumerate(zip(ids, mask, strict=False)):
        kinds = ["learned"] * bool(learned) + ["end"] * (token == tokenizer.end_id)
        kind = f' class="{" ".join(kinds)}"' if kinds else ""
        text = escape_text(tokenizer.decode([token]).replace("\n", "↵"))
        boxes.append(f'<span{kind} title="{place}: id {token}">{text}</span>')
        boxes.append("\n" if token == tokenizer.end_id else "")
    return f'<div class="tokens">{"".join(boxes)}</div>'
