#!/usr/bin/env python
"""Turn instruction data into conversations and their tokens, the data of stage B.

  python prep_data.py --dataset pydocs --tokenizer data/pydocs --out_dir data/chat --show 3
  python prep_data.py --dataset alpaca.json --tokenizer runs/base --out_dir data/alpaca
  python prep_data.py --dataset dolly --out_dir data/dolly --system "You are a helpful assistant."

Rows may be Alpaca's (instruction, input, output), Dolly's (instruction, context, response),
ShareGPT's (conversations), messages, prompt and completion, question and answer, with a system
column or without; in .jsonl, .json, .parquet, .csv, folders of those, or on the Hub. pydocs is
questions about Python.

Writes train.jsonl and val.jsonl, train_tokenized.jsonl and val_tokenized.jsonl (what is learned is
marked), the tokenizer's files, data_report.json and, where there are bad rows, rejects.jsonl; all
at once at the end. The same command again finds its work done. Bad rows end the run with exit 65
(see --skip_bad).

val is 5 % of the distinct conversations, drawn by seed, at least one; equal ones are never on both
sides. The rows stay in their order; training shuffles them.
"""

import argparse
import json
import platform
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from firstwords import prep, pydocs
from firstwords.args import build_parser, run_main
from firstwords.atomic import stage_folder
from firstwords.errors import BadData, BadFlag
from firstwords.schema import Message, RowError, conversation_row, format_row, mask_control
from firstwords.sources import Sample, find_place, find_shape, read_rows, to_conversation
from firstwords.sources.places import ROW_SUFFIXES
from firstwords.template import CHAT_TEMPLATE, encode_chat
from firstwords.tokenizer import Tokenizer, build_tokenizer, learns_from_text, load_tokenizer

FORMAT = "firstwords-chats-1"
REPORT = "data_report.json"
SPLITS = ("train", "val")
LEARNED_COLOUR, PLAIN_COLOUR = "\x1b[32m", "\x1b[0m"


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line and check what needs no look at any file."""
    parser = build_parser(__doc__)
    prep.add_source_flags(parser, dataset_help="file, folder, Hub name, or pydocs")
    add = parser.add_argument
    add(
        "--tokenizer",
        metavar="SPEC",
        help="stage A's data or model folder, so that both stages have the same; or gpt2, a "
        ".tiktoken file, bpe:N, char; default gpt2, for pydocs there is none",
    )
    add("--system", metavar="TEXT", help="the system prompt of conversations that have none")
    add(
        "--val_pct",
        type=prep.parse_percent,
        default=5.0,
        metavar="P",
        help="percent of the conversations for val, default 5; pydocs has its own val",
    )
    add(
        "--seq_len",
        type=int,
        default=1024,
        metavar="N",
        help="count conversations longer than this, default 1024 tokens; they are kept whole here",
    )
    add(
        "--pydocs_passes",
        type=int,
        default=1,
        metavar="N",
        help="how often pydocs asks each question",
    )
    add(
        "--show",
        type=int,
        default=0,
        metavar="N",
        help="print N conversations, what is learned marked",
    )
    args = parser.parse_args(argv)
    check_flags(args)
    args.tokenizer = args.tokenizer or "gpt2"
    return args


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that contradict one another or would be ignored.

    Raises:
        BadFlag: naming the flag.
    """
    for name, least in (("show", 0), ("seq_len", 1), ("pydocs_passes", 1)):
        if getattr(args, name) < least:
            raise BadFlag(f"--{name}: is {getattr(args, name)}; give {least} or more")
    if args.system is not None and not args.system.strip():
        raise BadFlag("--system: is empty; leave it out or give a text")
    if args.dataset == "pydocs":
        prep.refuse_flags(args, ("dataset_config", "split"), "pydocs has none")
        if args.tokenizer is None:
            raise BadFlag("--tokenizer: pydocs needs stage A's data or model folder; name it")
    elif args.pydocs_passes != 1:
        prep.refuse_flags(args, ["pydocs_passes"], "--dataset is not pydocs")


def main(argv: list[str] | None = None) -> None:
    """Prepare the conversations, or say that they are there."""
    args = parse_flags(argv)
    prep.refuse_out_dir_inside(args.dataset, args.out_dir)
    made_by = {"command": prep.describe_flags(args), "sources": describe_sources(args)}
    tokenizer = None
    if not learns_from_text(args.tokenizer):
        tokenizer = build_tokenizer(args.tokenizer, ())
        made_by["tokenizer_hash"] = tokenizer.hash
    if prep.is_finished(args.out_dir, REPORT, made_by, overwrite=args.overwrite):
        print(f"{args.out_dir}: these data are there already, made by the same command")
    else:
        with stage_folder(args.out_dir, overwrite=True) as staging:
            report = prepare(tokenizer, args, staging) | made_by
            prep.seal_folder(staging, args.out_dir, REPORT, report)
        if "refused" in report:
            raise BadData(report["refused"])
        print_summary(args.out_dir, report)
    for line in format_learned(args.out_dir, args.show, in_colour=sys.stdout.isatty()):
        print(line)


def describe_sources(args: argparse.Namespace) -> list[dict]:
    """Return what the data are made from, for the report."""
    if args.dataset == "pydocs":
        return [{"pydocs": f"Python {platform.python_version()}"}]
    place = find_place(args.dataset, split=args.split, config=args.dataset_config, suffixes=ROW_SUFFIXES)
    return place.describe()


def prepare(tokenizer: Tokenizer | None, args: argparse.Namespace, staging: Path) -> dict:
    """Fill the staging folder.

    Returns:
        the report; with `refused` when there are bad rows and `--skip_bad` is not given, or when
        there is no good one.
    """
    spool = staging / "spool.jsonl"
    with prep.Rejects(staging) as rejects:
        survey = survey_rows(read_conversations(args, rejects), spool, args.seed)
    report = {"format": FORMAT, "rows": survey.describe(rejects)}
    refusal = check_survey(survey, rejects, args)
    if refusal:
        return report | {"refused": refusal}
    if tokenizer is None:
        contents = (message.content for _, messages in read_spool(spool) for message in messages)
        tokenizer = build_tokenizer(args.tokenizer, contents)
    splits = write_splits(assign_splits(spool, survey, args.val_pct), tokenizer, args, staging)
    spool.unlink()
    tokenizer.save(staging, chat_template=CHAT_TEMPLATE)
    return report | {
        "vocab_size": len(tokenizer),
        "tokenizer_hash": tokenizer.hash,
        "splits": splits,
        "on_both_sides": count_overlap(staging),
        "seq_len": args.seq_len,
    }


# --- first pass: rows -> conversations


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, its split where the source decides that, and what its row was like."""

    messages: list[Message]
    split: str | None
    shape: str
    ignored: tuple[str, ...] = ()


def read_conversations(args: argparse.Namespace, rejects: prep.Rejects) -> Iterator[Chat]:
    """Read all good rows as conversations; the bad ones go to `rejects`."""
    sample = Sample(args.max_samples, args.sample_pct, args.seed)
    if args.dataset == "pydocs":
        yield from _read_pydocs(args, sample)
        return
    rows = read_rows(args.dataset, split=args.split, config=args.dataset_config, sample=sample)
    for located in rows:
        try:
            if isinstance(located.row, RowError):
                raise located.row
            messages = to_conversation(located.row, system=args.system)
        except RowError as error:
            rejects.add(located.file, located.line, error)
        else:
            shape = find_shape(located.row)
            ignored = tuple(name for name in located.row if name not in shape.columns)
            yield Chat(messages, None, shape.name, ignored)


def _read_pydocs(args: argparse.Namespace, sample: Sample) -> Iterator[Chat]:
    questions = pydocs.build_questions(args.seed, passes=args.pydocs_passes)
    system = [Message("system", args.system)] if args.system else []
    for split in SPLITS:
        for messages in sample.draw(partial(iter, getattr(questions, split))):
            yield Chat([*system, *messages], split, "pydocs")


@dataclass
class Survey:
    """What the first pass found; `hashes` are those of the conversations in the spool."""

    hashes: array = field(default_factory=lambda: array("Q"))
    shapes: Counter = field(default_factory=Counter)
    ignored: Counter = field(default_factory=Counter)

    def describe(self, rejects: prep.Rejects) -> dict:
        """Return the account of all rows: read = kept + rejected."""
        return {
            "read": len(self.hashes) + rejects.total,
            "kept": len(self.hashes),
            "rejected": rejects.describe(),
            "duplicates": prep.count_duplicates(self.hashes),
            "shapes": dict(self.shapes),
            "ignored_columns": dict(self.ignored),
        }


def survey_rows(chats: Iterable[Chat], spool: Path, seed: int) -> Survey:
    """Write the good conversations to the spool, from which they are split and encoded."""
    survey = Survey()
    with open(spool, "w", encoding="utf-8") as file:
        for chat in tqdm(chats, "reading", unit=" rows", disable=None):
            row = conversation_row(chat.messages)
            survey.hashes.append(prep.hash_content([format_row(row)], seed))
            survey.shapes[chat.shape] += 1
            survey.ignored.update(chat.ignored)
            file.write(format_row(row | {"split": chat.split}))
    return survey


def check_survey(survey: Survey, rejects: prep.Rejects, args: argparse.Namespace) -> str | None:
    """Print the first bad rows and tell why the data are refused, if they are."""
    for line in rejects.first:
        print(line, file=sys.stderr)
    read = len(survey.hashes) + rejects.total
    reasons = ", ".join(f"{reason} {count}" for reason, count in rejects.describe().items())
    listed = f"all are listed in {args.out_dir / prep.REJECTS}, mend them"
    if not survey.hashes:
        return f"{args.dataset}: none of {read} rows is usable ({reasons}); {listed}"
    if rejects.total and not args.skip_bad:
        bad = f"{rejects.total} of {read} rows are bad ({reasons})"
        return f"{args.dataset}: {bad}; {listed} or pass --skip_bad"
    return None


# --- second pass: conversations -> tokens


def read_spool(spool: Path) -> Iterator[tuple[str | None, list[Message]]]:
    """Read back what `survey_rows` wrote: the split where it is known, and the turns."""
    with open(spool, encoding="utf-8", newline="\n") as lines:
        for line in lines:
            row = json.loads(line)
            yield row["split"], [Message(**message) for message in row["messages"]]


def assign_splits(spool: Path, survey: Survey, val_pct: float) -> Iterator[tuple[str, list[Message]]]:
    """Yield each conversation with its split: the source's, or by its hash."""
    limit = prep.find_val_limit(survey.hashes, val_pct)
    progress = {"total": len(survey.hashes), "unit": " rows", "disable": None}
    rows = zip(read_spool(spool), survey.hashes, strict=True)
    for (split, messages), content in tqdm(rows, "encoding", **progress):
        yield split or ("val" if content <= limit else "train"), messages


def write_splits(
    chats: Iterable[tuple[str, list[Message]]],
    tokenizer: Tokenizer,
    args: argparse.Namespace,
    staging: Path,
) -> dict[str, dict]:
    """Write both files of both splits; returns their counts as the report has them."""
    writers = {split: SplitWriter(staging, split, args.seq_len) for split in SPLITS}
    try:
        for split, messages in chats:
            writers[split].write(messages, *encode_chat(messages, tokenizer))
    finally:
        for writer in writers.values():
            writer.close()
    empty = [split for split, writer in writers.items() if not writer.counts["conversations"]]
    if empty:
        raise BadData(f"--dataset: nothing is left for {empty[0]}; take a larger sample")
    return {split: writer.describe() for split, writer in writers.items()}


class SplitWriter:
    """One split: its conversations (contract 1), their tokens (contract 2), and their counts."""

    def __init__(self, staging: Path, split: str, seq_len: int):
        self.counts: Counter[str] = Counter()
        self._lengths: Counter[int] = Counter()
        self._seq_len = seq_len
        self._rows = _open_new(staging / f"{split}.jsonl")
        self._tokens = _open_new(staging / f"{split}_tokenized.jsonl")

    def write(self, messages: list[Message], ids: list[int], mask: list[int]) -> None:
        """Write one conversation."""
        self._rows.write(format_row(conversation_row(messages)))
        self._tokens.write(format_row({"input_ids": ids, "assistant_masks": mask}))
        self._lengths[len(ids)] += 1
        self.counts.update(
            conversations=1,
            turns=len(messages),
            tokens=len(ids),
            learned_tokens=sum(mask),
            longer_than_seq_len=len(ids) > self._seq_len,
            tokens_of_longer=len(ids) if len(ids) > self._seq_len else 0,
        )

    def close(self) -> None:
        """Close the files."""
        self._rows.close()
        self._tokens.close()

    def describe(self) -> dict:
        """Return counts, the longest conversation, and a histogram of lengths in tokens."""
        return dict(self.counts) | {
            "longest": max(self._lengths),
            "lengths": build_histogram(self._lengths),
        }


def count_overlap(folder: Path) -> int:
    """Return how many training conversations stand in val too, counted in the files themselves."""
    with open(folder / "val.jsonl", "rb") as val, open(folder / "train.jsonl", "rb") as train:
        held_out = {hash(line) for line in val}
        return sum(hash(line) in held_out for line in train)


def _open_new(path: Path) -> TextIO:
    return open(path, "w", encoding="utf-8", newline="\n")


def build_histogram(lengths: Counter[int]) -> dict[str, int]:
    """Sort lengths into bins up to 16, 32, 64, ... tokens.

    Returns:
        conversations by the upper end of the bin, shortest first.
    """
    bins: Counter[int] = Counter()
    for length, count in lengths.items():
        bins[max(16, 1 << (length - 1).bit_length())] += count
    return {str(end): bins[end] for end in sorted(bins)}


# --- what people see


def print_summary(out_dir: Path, report: dict) -> None:
    """Print the account of the rows and the size of both splits."""
    rows, splits = report["rows"], report["splits"]
    tokens, learned, longer, lost = (
        sum(counts[name] for counts in splits.values())
        for name in ("tokens", "learned_tokens", "longer_than_seq_len", "tokens_of_longer")
    )
    table = [
        ("rows read", rows["read"]),
        ("kept", rows["kept"]),
        *((f"rejected, {reason}", count) for reason, count in rows["rejected"].items()),
        ("duplicates (kept)", rows["duplicates"]),
        *((f"column ignored, {name}", count) for name, count in rows["ignored_columns"].items()),
        ("on both sides", report["on_both_sides"]),
        ("tokens", tokens),
        ("learned tokens", f"{learned:,} ({learned / tokens:.1%})"),
        ("longest", f"{max(counts['longest'] for counts in splits.values()):,} tokens"),
        (f"longer than {report['seq_len']:,}", f"{longer:,} conversations, {lost:,} tokens"),
    ]
    for split, counts in splits.items():
        shown = f"{counts['conversations']:,} conversations, {counts['tokens']:,} tokens"
        table.append((split, shown))
    print(f"{out_dir}\n{prep.format_table(table)}")


def format_learned(out_dir: Path, count: int, *, in_colour: bool) -> Iterator[str]:
    """Yield the first conversations of `train_tokenized.jsonl` with what is learned marked.

    The text is decoded from the very arrays that training reads: green on a terminal, else in [ ].
    """
    if not count:
        return
    tokenizer = load_tokenizer(out_dir)
    begin, end = (LEARNED_COLOUR, PLAIN_COLOUR) if in_colour else ("[", "]")
    with open(out_dir / "train_tokenized.jsonl", encoding="utf-8") as lines:
        for number, line in zip(range(1, count + 1), lines, strict=False):
            row = json.loads(line)
            yield f"\n--- conversation {number}: {len(row['input_ids'])} tokens"
            yield _mark_learned(row["input_ids"], row["assistant_masks"], tokenizer, begin, end)


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


if __name__ == "__main__":
    run_main(main)
