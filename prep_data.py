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
marked), the tokenizer's files, data_report.json, the same as a page (data_report.html) and, where
there are bad rows, rejects.jsonl; all at once at the end. The same command again finds its work
done. Bad rows end the run with exit 65 (see --skip_bad; the work is kept for it).

Killed or interrupted, the same command goes on where it stopped. val is 5 % of the distinct
conversations, drawn by seed, at least one; equal ones are never on both sides. The rows stay in
their order; training shuffles them.
"""

import argparse
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from firstwords import prep, pydocs, show
from firstwords.args import build_parser, run_main
from firstwords.atomic import stage_folder, write_text
from firstwords.conversations import (
    OVERLONG,
    SPLITS,
    Batch,
    EncodeParts,
    add_counts,
    gather_rows,
    join_files,
    read_account,
    read_rows,
    survey_batch,
)
from firstwords.errors import BadData, BadFlag
from firstwords.hashes import count_distinct, count_overlap, find_val_limit, open_hashes, sort_hashes
from firstwords.near import check_library, count_near
from firstwords.pages import format_grid, format_html_table, format_sections
from firstwords.parts import Work, finish_work, make_parts, open_work, sweep_work
from firstwords.plot import draw_bars, draw_shares
from firstwords.schema import Message, conversation_row, read_jsonl
from firstwords.sources import Located, Place, Sample, find_place, read_license, read_raw_rows
from firstwords.sources.places import ROW_SUFFIXES
from firstwords.template import CHAT_TEMPLATE
from firstwords.tokenizer import Tokenizer, build_tokenizer, learns_from_text, load_tokenizer

FORMAT = "firstwords-chats-1"
REPORT, PAGE = prep.REPORTS[0], "data_report.html"
TOKENIZER = "tokenizer"  # its folder among the parts
SEQ_LEN = 1024  # beyond which conversations are counted when --seq_len is not given
SHOWN_ON_PAGE = 20


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line and check what needs no look at any file."""
    parser = build_parser(__doc__)
    prep.add_source_flags(parser, dataset_help="file, folder, Hub name, or pydocs")
    add = parser.add_argument
    add(
        "--tokenizer",
        metavar="SPEC",
        help="stage A's data or model folder, so that both stages have the same; or gpt2, hub:<id>, a "
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
        type=prep.parse_count,
        metavar="N",
        help="tokens of a training row: what --overlong is about; default: conversations of more than "
        "1024 tokens are counted",
    )
    add(
        "--overlong",
        choices=OVERLONG,
        default="keep",
        help="conversations longer than --seq_len: keep them whole, the default (train.py has an "
        "--overlong of its own); drop them; split them between exchanges, the system prompt at the head "
        "of each piece; or truncate their tokens, in the middle of a reply where it comes so. What is "
        "lost is counted",
    )
    add(
        "--pydocs_passes",
        type=prep.parse_count,
        default=1,
        metavar="N",
        help="how often pydocs asks each question",
    )
    add(
        "--show",
        type=int,
        default=0,
        metavar="N",
        help="print N conversations, what is learned marked, and N packed rows of --seq_len",
    )
    add(
        "--show_html",
        type=Path,
        metavar="FILE",
        help="write the same as a page, each token in a box; of --show N conversations, default 20",
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
    if args.show < 0:
        raise BadFlag(f"--show: is {args.show}; give 0 or more")
    if args.overlong != "keep" and args.seq_len is None:
        raise BadFlag(f"--overlong: {args.overlong}, but longer than what? Give --seq_len")
    if args.near_duplicates:
        check_library()
    if args.system is not None and not args.system.strip():
        raise BadFlag("--system: is empty; leave it out or give a text")
    names = [dataset.name for dataset in args.dataset]
    if set(names) == {"pydocs"}:
        prep.refuse_flags(args, ("dataset_config", "split"), "pydocs has none")
    if "pydocs" in names and args.tokenizer is None:
        raise BadFlag("--tokenizer: pydocs needs stage A's data or model folder; name it")
    if "pydocs" not in names and args.pydocs_passes != 1:
        prep.refuse_flags(args, ["pydocs_passes"], "--dataset is not pydocs")


def main(argv: list[str] | None = None) -> None:
    """Prepare the conversations, or say that they are there."""
    args = parse_flags(argv)
    for dataset in args.dataset:
        prep.refuse_out_dir_inside(dataset.name, args.out_dir)
    made_by = {"command": prep.describe_flags(args), "sources": describe_sources(args)}
    tokenizer = None
    if not learns_from_text(args.tokenizer):
        tokenizer = build_tokenizer(args.tokenizer, ())
        made_by["tokenizer_hash"] = tokenizer.hash
    if prep.is_finished(args.out_dir, REPORT, made_by, overwrite=args.overwrite):
        sweep_work(args.out_dir)
        print(f"{args.out_dir}: these data are there already, made by the same command")
    else:
        report = make_data(tokenizer, args, made_by)
        if "refused" in report:
            raise BadData(report["refused"])
        print_summary(args.out_dir, report)
    show_data(args)


def describe_sources(args: argparse.Namespace) -> list[dict]:
    """Return what the data are made from, for the report."""
    places = (find_source(dataset, args) for dataset in args.dataset)
    pydocs_source = [{"pydocs": f"Python {platform.python_version()}"}]
    return [source for place in places for source in (place.describe() if place else pydocs_source)]


def find_source(dataset: prep.Dataset, args: argparse.Namespace) -> Place | None:
    """Return where a dataset lies, or None for pydocs."""
    if dataset.name == "pydocs":
        return None
    return find_place(dataset.name, split=args.split, config=args.dataset_config, suffixes=ROW_SUFFIXES)


def make_data(tokenizer: Tokenizer | None, args: argparse.Namespace, made_by: dict) -> dict:
    """Make `--out_dir`; the parts of a run that was killed are gone on with.

    Returns:
        the report; with `refused` when there are bad rows and `--skip_bad` is not given, or when
        there is no good one.
    """
    args.out_dir.parent.mkdir(parents=True, exist_ok=True)
    # What may be asked for of the same parts.
    flags = {name: v for name, v in made_by["command"].items() if name not in ("skip_bad", "near_duplicates")}
    with open_work(args.out_dir, made_by | {"command": flags, "format": FORMAT}) as work:
        if work.state:
            print(f"{args.out_dir}: {work.state}", file=sys.stderr)
        report = fill_folder(tokenizer, args, made_by, work)
        if "refused" not in report:
            finish_work(work)
    return report


def fill_folder(tokenizer: Tokenizer | None, args: argparse.Namespace, made_by: dict, work: Work) -> dict:
    """Make the files of `--out_dir`, and rename them into place; returns the report."""
    with stage_folder(args.out_dir, overwrite=True) as staging:
        report = prepare(tokenizer, args, work, staging) | made_by
        if "refused" not in report:
            (staging / PAGE).write_text(build_page(report), encoding="utf-8")
        prep.seal_folder(staging, args.out_dir, REPORT, report)
    return report


def prepare(tokenizer: Tokenizer | None, args: argparse.Namespace, work: Work, staging: Path) -> dict:
    """Fill the staging folder from parts; returns the report, see `make_data`."""
    parts, survey = survey_rows(args, work, staging)
    report = {"format": FORMAT, "rows": survey.rows}
    refusal = check_survey(survey, args)
    if refusal:
        return report | {"refused": refusal}
    join_files(parts, "hashes.bin", work.folder / "hashes.bin")
    ascending = sort_hashes(work.folder / "hashes.bin", work.folder / "sorted.bin")
    survey.rows["duplicates"] = len(ascending) - survey.rows["repeated"] - count_distinct(ascending)
    tokenizer = keep_tokenizer(tokenizer, args, parts, work)
    shutil.copytree(work.folder / TOKENIZER, staging, dirs_exist_ok=True)
    decided = all(dataset.name == "pydocs" for dataset in args.dataset)
    limit = -1 if decided else find_val_limit(ascending, args.val_pct)
    job = EncodeParts(tokenizer, limit, args.seq_len or SEQ_LEN, args.overlong, args.seed)
    tokens = encode_parts(job, parts, args, work, survey)
    splits = write_splits(tokens, staging)
    survey.rows["kept"] = sum(counts["rows"] - counts["rows_dropped"] for counts in splits.values())
    survey.rows["dropped"] = {"overlong": sum(counts["rows_dropped"] for counts in splits.values())}
    return report | {
        "datasets": survey.datasets,
        "vocab_size": len(tokenizer),
        "tokenizer_hash": tokenizer.hash,
        "splits": splits,
        "on_both_sides": find_overlap(tokens, work),
        "nearly_on_both_sides": find_near(staging) if args.near_duplicates else None,
        "seq_len": args.seq_len or SEQ_LEN,
        "overlong": args.overlong,
    }


# --- first pass: rows -> conversations


def iter_batches(args: argparse.Namespace) -> Iterator[Batch]:
    """Yield the rows of all datasets in batches; in the same order at every run."""
    for number, dataset in enumerate(args.dataset):
        for split, read in list_readings(dataset, args):
            for is_repeat, rows in dataset.read(read, args.seed):
                for batch in gather_rows(rows):
                    yield Batch(number, is_repeat, split, args.system, args.seed, batch)


def list_readings(
    dataset: prep.Dataset, args: argparse.Namespace
) -> list[tuple[str | None, Callable[[], Iterator[Located]]]]:
    """Return what is to be read of a dataset, and the split of each where the dataset says so."""
    sample = Sample(args.max_samples, args.sample_pct, args.seed)
    if dataset.name == "pydocs":
        questions = pydocs.build_questions(args.seed, passes=args.pydocs_passes)
        return [
            (split, partial(sample.draw, partial(_locate_talks, getattr(questions, split))))
            for split in SPLITS
        ]
    where = {"split": args.split, "config": args.dataset_config}
    return [(None, partial(read_raw_rows, dataset.name, **where, sample=sample))]


def _locate_talks(talks: list[list[Message]]) -> Iterator[Located]:
    for number, messages in enumerate(talks, 1):
        yield Located("pydocs", number, conversation_row(messages))


@dataclass
class Survey:
    """What the first pass found.

    Attributes:
        rows: the account of all rows; at first `kept` are the good ones, of which some may be dropped.
        datasets: the same of each `--dataset`.
        first_rejects: the first bad rows, for the screen.
    """

    rows: dict
    datasets: list[dict]
    first_rejects: list[str]

    def add(self, account: dict) -> None:
        """Count a part in."""
        rejected = sum(account["rejected"].values())
        drawn = {"read": account["kept"] + rejected, "kept": account["kept"]}
        add_counts(self.rows, drawn | {"repeated": account["kept"] * account["is_repeat"]})
        for name in ("rejected", "shapes", "ignored_columns"):
            add_counts(self.rows[name], account[name])
        add_counts(self.datasets[account["dataset"]], drawn)
        self.first_rejects += account["first_rejects"][: prep.SHOWN_REJECTS - len(self.first_rejects)]


def survey_rows(args: argparse.Namespace, work: Work, staging: Path) -> tuple[list[Path], Survey]:
    """Make the parts of the first pass, list all bad rows, and count."""
    names = ("rejected", "shapes", "ignored_columns")
    zeros = {"read": 0, "kept": 0}
    datasets = [
        {"dataset": dataset.name, "weight": dataset.weight, "license": find_license(dataset, args)} | zeros
        for dataset in args.dataset
    ]
    survey = Survey(zeros | {"repeated": 0} | {name: {} for name in names}, datasets, [])
    parts = []
    with tqdm(desc="reading", unit=" rows", disable=None) as bar:
        for part in make_parts(survey_batch, iter_batches(args), work, num_proc=args.num_proc):
            account = read_account(part)
            survey.add(account)
            parts.append(part)
            bar.update(account["kept"])
    if survey.first_rejects:
        join_files(parts, prep.REJECTS, staging / prep.REJECTS)
    return parts, survey


def find_license(dataset: prep.Dataset, args: argparse.Namespace) -> str | None:
    """Return the licence that the card of a dataset states, if it has one that does."""
    place = find_source(dataset, args)
    return place and read_license(place)


def check_survey(survey: Survey, args: argparse.Namespace) -> str | None:
    """Print the first bad rows and tell why the data are refused, if they are."""
    for line in survey.first_rejects:
        print(line, file=sys.stderr)
    rows = survey.rows
    datasets = ", ".join(map(str, args.dataset))
    bad = sum(rows["rejected"].values())
    ordered = sorted(rows["rejected"].items(), key=lambda item: -item[1])
    reasons = ", ".join(f"{reason} {count}" for reason, count in ordered)
    listed = f"all are listed in {args.out_dir / prep.REJECTS}, mend them"
    if not rows["kept"]:
        return f"{datasets}: none of {rows['read']} rows is usable ({reasons}); {listed}"
    if bad and not args.skip_bad:
        return f"{datasets}: {bad} of {rows['read']} rows are bad ({reasons}); {listed} or pass --skip_bad"
    return None


# --- second pass: conversations -> tokens


def keep_tokenizer(
    tokenizer: Tokenizer | None, args: argparse.Namespace, parts: list[Path], work: Work
) -> Tokenizer:
    """Return the tokenizer, learned from the conversations where that is asked for, and kept in `work`."""
    folder = work.folder / TOKENIZER
    if tokenizer is None:
        if folder.exists():
            return load_tokenizer(folder)
        contents = (m.content for part in parts for _, messages in read_rows(part) for m in messages)
        tokenizer = build_tokenizer(args.tokenizer, contents)
    if not folder.exists():
        with stage_folder(folder) as staging:
            tokenizer.save(staging, chat_template=CHAT_TEMPLATE)
    return tokenizer


def encode_parts(
    job: EncodeParts, surveyed: list[Path], args: argparse.Namespace, work: Work, survey: Survey
) -> list[Path]:
    """Make the parts of the second pass, and count for each dataset what was drawn from it."""
    parts = []
    with tqdm(desc="encoding", total=survey.rows["kept"], unit=" rows", disable=None) as bar:
        for part in make_parts(job, surveyed, work.stage("tokens"), num_proc=args.num_proc):
            account = read_account(part)
            for counts in account["splits"].values():
                drawn = {name: counts[name] for name in ("conversations", "tokens", "learned_tokens")}
                add_counts(survey.datasets[account["dataset"]], drawn)
                bar.update(counts["rows"])
            parts.append(part)
    return parts


def write_splits(parts: list[Path], staging: Path) -> dict[str, dict]:
    """Put the parts together; returns the counts of both splits as the report has them."""
    splits: dict[str, dict] = {split: {} for split in SPLITS}
    for part in parts:
        add_counts(splits, read_account(part)["splits"])
    for split, counts in splits.items():
        if not counts["conversations"]:
            raise BadData(
                f"--dataset: nothing is left for {split}; take a larger sample or another --overlong"
            )
        for name in (f"{split}.jsonl", f"{split}_tokenized.jsonl"):
            join_files(parts, name, staging / name)
        for histogram in ("lengths", "learned_shares"):
            counts[histogram] = dict(sorted(counts[histogram].items(), key=lambda item: int(item[0])))
    return splits


def find_overlap(parts: list[Path], work: Work) -> int:
    """Return how many training conversations stand in val too, by the hashes of what was written."""
    for split in SPLITS:
        join_files(parts, f"{split}_hashes.bin", work.folder / f"{split}_hashes.bin")
    held_out = sort_hashes(work.folder / "val_hashes.bin", work.folder / "val_sorted.bin")
    return count_overlap(open_hashes(work.folder / "train_hashes.bin"), held_out)


def find_near(folder: Path) -> int:
    """Return how many training conversations are nearly one of val."""
    return count_near(_read_texts(folder / "val.jsonl"), _read_texts(folder / "train.jsonl"))


def _read_texts(path: Path) -> Iterator[list[str]]:
    for _, row in read_jsonl(path):
        yield ["\n".join(message["content"] for message in row["messages"])]


# --- what people see


def print_summary(out_dir: Path, report: dict) -> None:
    """Print the account of the rows and tokens, and the size of both splits."""
    table = [*list_rows(report), *list_tokens(report)]
    for split, counts in report["splits"].items():
        shown = f"{counts['conversations']:,} conversations, {counts['tokens']:,} tokens"
        table.append((split, shown))
    table += prep.list_mix(report["datasets"], "kept", "rows")
    print(f"{out_dir}\n{prep.format_table(table)}")


def list_rows(report: dict) -> list[tuple[str, object]]:
    """Return the lines of the account of rows."""
    rows = report["rows"]
    return [
        ("rows read", rows["read"]),
        ("kept", rows["kept"]),
        *((f"rejected, {reason}", count) for reason, count in rows["rejected"].items()),
        *((f"dropped, {reason}", count) for reason, count in rows["dropped"].items() if count),
        ("duplicates (kept)", rows["duplicates"]),
        *((f"column ignored, {name}", count) for name, count in rows["ignored_columns"].items()),
        ("on both sides", report["on_both_sides"]),
        *(("nearly on both sides", near) for near in [report["nearly_on_both_sides"]] if near is not None),
    ]


def list_tokens(report: dict) -> list[tuple[str, object]]:
    """Return the lines of the account of tokens."""
    total = {}
    for counts in report["splits"].values():
        add_counts(total, counts)
    learned = f"{total['learned_tokens']:,} ({total['learned_tokens'] / total['tokens']:.1%})"
    longer = f"{total['longer_than_seq_len']:,} conversations, {total['tokens_of_longer']:,} tokens"
    lines = [
        ("tokens", total["tokens"]),
        ("learned tokens", learned),
        ("longest", f"{total['longest']:,} tokens"),
        (f"longer than {report['seq_len']:,}", longer),
    ]
    if report["overlong"] != "keep":
        lost = f"{total['tokens_dropped']:,} of {total['tokens_read']:,} tokens, learned ones among them: "
        lines.append((f"lost to --overlong {report['overlong']}", f"{lost}{total['learned_dropped']:,}"))
        if total["cut_in_reply"]:
            lines.append(("cut within a reply", total["cut_in_reply"]))
    return lines


def build_page(report: dict) -> str:
    """Return the report as an HTML page: its tables, and pictures of drops, mix, lengths and shares."""
    rows, datasets = report["rows"], report["datasets"]
    drops = {reason: count for reason, count in (rows["rejected"] | rows["dropped"]).items() if count}
    header = ("dataset", "weight", "licence", "rows read", "kept", "conversations", "tokens", "learned")
    table = format_html_table(header, (drawn.values() for drawn in datasets))
    mix = draw_shares({str(drawn["dataset"]): drawn["tokens"] for drawn in datasets})
    sections = [
        ("Rows", format_html_table((), list_rows(report))),
        ("Rows that were dropped", draw_shares(drops) if drops else "<p>None.</p>"),
        ("Tokens", format_html_table((), list_tokens(report))),
        ("Where they come from: tokens of each dataset", mix + table),
    ]
    for split, counts in report["splits"].items():
        lengths = list(counts["lengths"].items())
        shares = [(f"{end} %", count) for end, count in counts["learned_shares"].items()]
        charts = (
            ("conversations by length", draw_bars(lengths, x_label="up to so many tokens")),
            ("conversations by the share that is learned", draw_bars(shares, x_label="up to")),
        )
        sections.append((split, format_grid(charts)))
    return format_sections(f"Data report: {', '.join(report['command']['dataset'])}", sections)


def show_data(args: argparse.Namespace) -> None:
    """Show what `--show` and `--show_html` ask for, from the arrays that were written."""
    seq_len = args.seq_len or SEQ_LEN
    if args.show:
        for line in show.format_learned(args.out_dir, args.show, in_colour=sys.stdout.isatty()):
            print(line)
        for line in show.format_packing(args.out_dir, seq_len, args.show):
            print(line)
    if args.show_html:
        page = show.build_token_page(args.out_dir, seq_len, args.show or SHOWN_ON_PAGE)
        write_text(args.show_html, page)


if __name__ == "__main__":
    run_main(main)
