#!/usr/bin/env python
"""Turn plain text into a token store, the data of stage A.

  python prep_text_corpus.py --dataset pydocs --out_dir data/pydocs
  python prep_text_corpus.py --dataset shakespeare.txt --out_dir data/chars --tokenizer char
  python prep_text_corpus.py --dataset my_texts/ --out_dir data/mine --tokenizer bpe:8192
  python prep_text_corpus.py --dataset openwebtext --max_samples 100000 --out_dir data/owt

Reads .txt, .jsonl, .json, .parquet, .csv, and .gz and .zst of them; folders of those (sorted), patterns
('texts/*.jsonl.zst'), Hub names (streamed), and pydocs: the documentation of the installed Python. Writes
train.bin, val.bin, corpus.json, the same as a page (corpus.html) and the tokenizer's files, all at once at
the end. The same command again finds its work done, and unfinished work (.work-<name> beside --out_dir) is
gone on with where it stopped.
Empty documents are dropped and counted; bad ones end the run with exit 65 (see --skip_bad; the work is
kept for it).

val is 1 % of the distinct documents, drawn by seed, and at least one; equal documents are never on
both sides. Of a corpus that is one single document, val is its last 10 % of characters.
"""

import argparse
import json
import platform
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from firstwords import prep, pydocs, tokenstore
from firstwords.args import build_parser, run_main
from firstwords.atomic import stage_folder
from firstwords.corpus import (
    UNIT_BYTES,
    EncodeJob,
    Survey,
    Unit,
    count_parts,
    group_units,
    read_back,
    survey_parts,
    write_store,
)
from firstwords.errors import BadData, BadFlag, IOFailed, MissingInput
from firstwords.hashes import count_distinct, sort_hashes
from firstwords.near import check_library, count_near
from firstwords.pages import format_html_table, format_sections
from firstwords.parts import Work, finish_work, make_parts, open_work, start_server, sweep_work
from firstwords.plot import draw_bars, draw_shares
from firstwords.schema import RowError
from firstwords.sources import (
    EVERYTHING,
    SPLIT_DOCS,
    Document,
    Sample,
    TextSlice,
    cut_text,
    find_place,
    iter_text_slices,
    read_license,
    read_place,
)
from firstwords.template import CHAT_TEMPLATE
from firstwords.tokenizer import Tokenizer, build_tokenizer, learns_from_text, load_tokenizer

REPORT, PAGE = prep.REPORTS[1], "corpus.html"
SPOOL = "spool.jsonl"
VAL_PCT, VAL_PCT_SINGLE = 1.0, 10.0


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line and fill in the defaults that depend on the dataset."""
    parser = build_parser(__doc__)
    prep.add_source_flags(parser, dataset_help="file, folder, Hub name, or pydocs")
    add = parser.add_argument
    add(
        "--tokenizer",
        metavar="SPEC",
        help="gpt2, hub:<id>, a .tiktoken file, a folder with tokenizer.json, bpe:N (trained on this text, "
        "N tokens) or char; default gpt2, for pydocs bpe:4096",
    )
    add("--text_column", metavar="NAME", help="of rows; default: text, content, ... or the only one")
    add(
        "--split_docs",
        choices=SPLIT_DOCS,
        default="file",
        help="what a document of a .txt is: the file (default), a paragraph, a line",
    )
    add(
        "--val_pct",
        type=prep.parse_percent,
        metavar="P",
        help="percent of the documents for val, default 1; of a single document its last P %%, default 10",
    )
    add(
        "--pydocs_packages",
        nargs="+",
        default=[],
        metavar="NAME",
        help="installed packages whose docstrings pydocs has too; a requirements.txt names many",
    )
    add(
        "--engine",
        choices=["local", "datatrove"],
        default="local",
        help="who shares the work out: this script, or datatrove, whose tasks Slurm and Ray run too",
    )
    add("--tasks", type=prep.parse_count, default=None, metavar="N", help="of datatrove, default --num_proc")
    args = parser.parse_args(argv)
    if args.near_duplicates:
        check_library()
    names = {dataset.name for dataset in args.dataset}
    args.tokenizer = args.tokenizer or ("bpe:4096" if names == {"pydocs"} else "gpt2")
    if names == {"pydocs"}:
        prep.refuse_flags(args, ("dataset_config", "split", "text_column"), "pydocs has none")
    if "pydocs" not in names:
        prep.refuse_flags(args, ["pydocs_packages"], "--dataset is not pydocs")
    if args.engine == "local":
        prep.refuse_flags(args, ["tasks"], "--engine is not datatrove")
    else:
        if [dataset.weight for dataset in args.dataset] != [1]:
            raise BadFlag("--engine: datatrove reads one --dataset, without a weight; give one")
        why = "--engine datatrove reads all of some files"
        prep.refuse_flags(args, ["max_samples", "sample_pct"], why)
    args.pydocs_packages = list(_expand_packages(args.pydocs_packages))
    return args


def _expand_packages(names: Iterable[str]) -> Iterator[str]:
    for name in names:
        yield from pydocs.list_packages(Path(name)) if name.endswith(".txt") else [name]


def main(argv: list[str] | None = None) -> None:
    """Prepare the corpus, or say that it is there."""
    args = parse_flags(argv)
    corpus = Mix(args)
    for dataset in args.dataset:
        prep.refuse_out_dir_inside(dataset.name, args.out_dir)
    made_by = {"command": describe_flags(args)}
    if args.num_proc > 1:
        start_server(EncodeJob)
    tokenizer = None
    if not learns_from_text(args.tokenizer):
        tokenizer = build_tokenizer(args.tokenizer, ())
        made_by["tokenizer_hash"] = tokenizer.hash
    if args.out_dir.exists():
        made_by["sources"] = corpus.describe()
    if prep.is_finished(args.out_dir, REPORT, made_by, overwrite=args.overwrite):
        sweep_work(args.out_dir)
        print(f"{args.out_dir}: this corpus is there already, made by the same command")
        return
    with open_work(args.out_dir, plan_work(corpus, args, tokenizer)) as work:
        report = work_through(corpus, tokenizer, args, work, made_by)
        if "refused" not in report:
            finish_work(work)
    if "refused" in report:
        raise BadData(report["refused"])
    print_summary(args.out_dir, report)


def describe_flags(args: argparse.Namespace) -> dict:
    """Return the flags that decide what is in the store."""
    return {name: v for name, v in prep.describe_flags(args).items() if name not in ("engine", "tasks")}


def plan_work(corpus: "Mix", args: argparse.Namespace, tokenizer: Tokenizer | None) -> dict:
    """Return all that decides what is in the parts; the rest may change before they are put together."""
    flags = {name: str(value) for name, value in prep.describe_flags(args).items()}
    for name in ("skip_bad", "val_pct", "tasks", "near_duplicates"):
        flags.pop(name)
    # What learns the tokens, and what encodes with them: a character tokenizer does without tiktoken.
    made_with = {name: version(name) for name in ("tiktoken", "tokenizers") if find_spec(name)}
    return {
        "format": tokenstore.FORMAT,
        "flags": flags,
        "sources": corpus.describe_quickly(),
        "tokenizer": tokenizer.hash if tokenizer else made_with,
    }


def work_through(
    corpus: "Mix", tokenizer: Tokenizer | None, args: argparse.Namespace, work: Work, made_by: dict
) -> dict:
    """Make `out_dir` from the parts, made now or by a run that was stopped; returns its report."""
    if work.state:
        print(f"{args.out_dir}: {work.state}", file=sys.stderr)
    with stage_folder(args.out_dir, overwrite=True) as staging, ThreadPoolExecutor(2) as beside:
        sources = beside.submit(corpus.describe)
        tokenizer = tokenizer or learn_tokenizer(corpus, args.tokenizer, work)
        # A second for GPT-2's, whose merges have to be found; the processes are not yet there.
        saved = beside.submit(tokenizer.save, staging, chat_template=CHAT_TEMPLATE)
        report = prepare(corpus, tokenizer, args, work, staging)
        saved.result()
        corpus.check_unchanged()
        report |= made_by | {"sources": sources.result()}
        if "refused" not in report:
            (staging / PAGE).write_text(build_page(report), encoding="utf-8")
        prep.seal_folder(staging, args.out_dir, REPORT, report)
    return report


def prepare(corpus: "Mix", tokenizer: Tokenizer, args: argparse.Namespace, work: Work, staging: Path) -> dict:
    """Fill the staging folder.

    Returns:
        the report; with `refused` when there are bad documents and `--skip_bad` is not given.
    """
    job = EncodeJob(tokenizer, args.seed)
    parts, owners = [], []
    with prep.Rejects(staging) as rejects:
        if args.engine == "datatrove":
            made = run_datatrove(corpus.build_step(job, work), args.tasks or args.num_proc, args.num_proc)
        else:
            made = make_parts(job, corpus.read_units(work.folder, owners), work, num_proc=args.num_proc)
        made = tqdm(made, "encoding", unit=f" x {UNIT_BYTES >> 20} MB", disable=None)
        survey = survey_parts(
            (parts.append(part) or part for part in made), work.folder, rejects.add, args.seed
        )
    ascending = sort_hashes(survey.hashes, work.folder / "sorted.bin")
    owners = owners or [(0, False)] * len(parts)  # datatrove has but one dataset
    counts = list(count_parts(parts, survey))
    repeated = sum(count[0] for count, (_, again) in zip(counts, owners, strict=True) if again)
    documents = describe_documents(survey, rejects) | {
        "repeated": repeated,
        "duplicates": survey.kept - repeated - count_distinct(ascending),
    }
    report = {"format": tokenstore.FORMAT, "documents": documents}
    refusal = check_survey(survey, rejects, args)
    if refusal:
        return report | {"refused": refusal}
    val_pct = args.val_pct or (VAL_PCT_SINGLE if survey.kept == 1 else VAL_PCT)
    datasets = corpus.describe_shares(owners, counts)
    splits = write_store(parts, survey, ascending, tokenizer, staging, val_pct)
    return report | {
        "dtype": tokenstore.choose_dtype(len(tokenizer)).str,
        "vocab_size": len(tokenizer),
        "tokenizer_hash": tokenizer.hash,
        "datasets": datasets,
        "lengths": dict(sorted(survey.lengths.items())),
        "splits": splits,
        "nearly_on_both_sides": find_near(staging, tokenizer, splits) if args.near_duplicates else None,
    }


def find_near(folder: Path, tokenizer: Tokenizer, splits: dict[str, dict]) -> int:
    """Return how many documents of train are nearly one of val."""
    held_out, documents = (read_back(folder / f"{split}.bin", tokenizer) for split in ("val", "train"))
    total = splits["train"]["documents"]
    return count_near(held_out, tqdm(documents, "near duplicates", total, unit=" documents", disable=None))


def run_datatrove(step, num_tasks: int, num_proc: int) -> Iterator[Path]:
    """Run a step on the processes of this machine; yields its parts in order.

    Raises:
        IOFailed: when a task has failed.
    """
    from datatrove.executor import LocalPipelineExecutor

    parts = [step.work.part(number) for number, _ in enumerate(step.iter_units())]
    logs = str(step.work.folder / f"datatrove-{num_tasks}")
    if not all(part.exists() for part in parts):
        LocalPipelineExecutor([step], tasks=num_tasks, workers=num_proc, logging_dir=logs).run()
    for part in parts:
        if not part.exists():
            raise IOFailed(f"{part}: no task has made it; see {logs} and run the same command again")
        yield part


def build_step(argv: list[str]):
    """Return the step that makes the parts of a corpus, for any executor of datatrove.

    When all its tasks are done, the script with the same flags puts the parts together.

    Args:
        argv: the flags of this script, among them `--engine datatrove`.
    """
    args = parse_flags(argv)
    corpus = Mix(args)
    tokenizer = None if learns_from_text(args.tokenizer) else build_tokenizer(args.tokenizer, ())
    with open_work(args.out_dir, plan_work(corpus, args, tokenizer)) as work:
        work.stage("datatrove")
        tokenizer = tokenizer or learn_tokenizer(corpus, args.tokenizer, work)
        return corpus.build_step(EncodeJob(tokenizer, args.seed), work)


def learn_tokenizer(corpus: "Mix", spec: str, work: Work) -> Tokenizer:
    """Make the tokenizer from all texts, or load the one that a stopped run has made of them."""
    folder = work.folder / "tokenizer"
    if not folder.exists():
        documents = tqdm(corpus.read_first(work.folder), "learning", unit=" documents", disable=None)
        texts = (document.pieces for document in documents if not isinstance(document.pieces, RowError))
        tokenizer = build_tokenizer(spec, chain.from_iterable(texts))
        with stage_folder(folder) as staging:
            tokenizer.save(staging, chat_template=CHAT_TEMPLATE)
    return load_tokenizer(folder)


def describe_documents(survey: Survey, rejects: prep.Rejects) -> dict:
    """Return the account of all documents: read = kept + empty + rejected."""
    return {
        "read": survey.read,
        "kept": survey.kept,
        "empty": survey.empty,
        "rejected": rejects.describe(),
    }


def check_survey(survey: Survey, rejects: prep.Rejects, args: argparse.Namespace) -> str | None:
    """Print the first bad documents and tell why the corpus is refused, if it is."""
    for line in rejects.first:
        print(line, file=sys.stderr)
    datasets = ", ".join(map(str, args.dataset))
    where = f"all are listed in {args.out_dir / prep.REJECTS}"
    if rejects.total and not args.skip_bad:
        return (
            f"{datasets}: {rejects.total} of {survey.read} documents are bad, "
            f"{where}; mend them or pass --skip_bad"
        )
    if survey.characters < 2 or not survey.kept:
        return f"{datasets}: holds no text; name another --dataset"
    return None


class Mix:
    """All `--dataset`s, each read as often as its weight says."""

    def __init__(self, args: argparse.Namespace):
        self._seed = args.seed
        self._sets = [(d, Corpus(d.name, f"{i}-{SPOOL}", args)) for i, d in enumerate(args.dataset)]

    def describe(self) -> list[dict]:
        """Return what the corpus is made from, for the report."""
        return [source for _, corpus in self._sets for source in corpus.describe()]

    def describe_quickly(self) -> list[dict]:
        """Return what tells two inputs apart without reading them."""
        return [source for _, corpus in self._sets for source in corpus.describe_quickly()]

    def check_unchanged(self) -> None:
        """Compare the files with what they were when the run began; see `Corpus.check_unchanged`."""
        for _, corpus in self._sets:
            corpus.check_unchanged()

    def read_units(self, folder: Path, owners: list[tuple[int, bool]]) -> Iterator[Unit]:
        """Read all units of all datasets; none has documents of two.

        Args:
            folder: where `read_first` has put what is not to be downloaded twice.
            owners: gets the number of the dataset of each unit, and whether it is a repeat.
        """
        for number, (dataset, corpus) in enumerate(self._sets):
            whole = dataset.weight == int(dataset.weight)
            read = partial(corpus.read if whole else corpus.read_documents, folder)
            for is_repeat, items in dataset.read(read, self._seed):
                for unit in group_units(items):
                    owners.append((number, is_repeat))
                    yield unit

    def read_first(self, folder: Path) -> Iterator[Document]:
        """Read all documents once, whatever the weights, for another reading to follow."""
        return chain.from_iterable(corpus.read_first(folder) for _, corpus in self._sets)

    def build_step(self, job: EncodeJob, work: Work):
        """Return the step of datatrove; see `Corpus.build_step`."""
        return self._sets[0][1].build_step(job, work)

    def describe_shares(
        self, owners: list[tuple[int, bool]], counts: Iterable[tuple[int, int]]
    ) -> list[dict]:
        """Return for each dataset its weight, licence, and what was drawn from it."""
        zeros = {"documents": 0, "tokens": 0}
        shares = [
            {"dataset": d.name, "weight": d.weight, "license": corpus.find_license()} | zeros
            for d, corpus in self._sets
        ]
        for (owner, _), (documents, tokens) in zip(owners, counts, strict=True):
            shares[owner]["documents"] += documents
            shares[owner]["tokens"] += tokens
        return shares


class Corpus:
    """The documents of one `--dataset`, which can be read more than once."""

    def __init__(self, name: str, spool: str, args: argparse.Namespace):
        self._args, self._name, self._spool = args, name, spool
        self._sample = Sample(args.max_samples, args.sample_pct, args.seed)
        self._place = None
        if name != "pydocs":
            self._place = find_place(name, split=args.split, config=args.dataset_config)
        self._seen = self.describe_quickly()

    def describe(self) -> list[dict]:
        """Return what the corpus is made from, for the report."""
        if self._place:
            return self._place.describe()
        packages = {name: find_version(name) for name in self._args.pydocs_packages}
        return [{"pydocs": f"Python {platform.python_version()}", "packages": packages}]

    def describe_quickly(self) -> list[dict]:
        """Return what tells two inputs apart without reading them: of files size and time of change."""
        if self._place is None or self._place.on_hub:
            return self.describe()
        stats = [(file, file.stat()) for file in self._place.files]
        return [{"file": str(file), "bytes": s.st_size, "changed_ns": s.st_mtime_ns} for file, s in stats]

    def check_unchanged(self) -> None:
        """Compare the files with what they were when the run began.

        Raises:
            BadData: when one is another one now.
        """
        for now, before in zip(self.describe_quickly(), self._seen, strict=True):
            if now != before:
                raise BadData(f"{now['file']}: changed while it was read; run it again")

    def read(self, folder: Path) -> Iterator[TextSlice | Document]:
        """Read all documents, or slices of files that have them, or the sample of them.

        Args:
            folder: where `read_first` has put what is not to be downloaded twice.
        """
        if self._place is None:
            return self._sample.draw(self._read_pydocs)
        if self._place.on_hub or self._sample != Sample(seed=self._args.seed):
            return self.read_documents(folder)
        return self._read_files()

    def read_documents(self, folder: Path) -> Iterator[Document]:
        """Read all documents, or the sample of them, one by one."""
        if self._place is None:
            return self._sample.draw(self._read_pydocs)
        spool = folder / self._spool
        return read_spool(spool) if spool.exists() else self._read_documents()

    def find_license(self) -> str | None:
        """Return the licence that the dataset's card states, if it has one that does."""
        return self._place and read_license(self._place)

    def build_step(self, job: EncodeJob, work: Work):
        """Return the step of datatrove that encodes the files.

        Raises:
            BadFlag: when there are none, or datatrove is not installed.
        """
        if self._place is None or self._place.on_hub:
            raise BadFlag(f"--engine: datatrove, but {self._name} is no local files; download it first")
        try:
            from firstwords.cluster import EncodeParts
        except ModuleNotFoundError as error:
            raise BadFlag(
                f"--engine: datatrove, but {error.name!r} is missing; pip install 'firstwords[cluster]'"
            ) from None
        return EncodeParts(job, self._place.files, self._args.split_docs, self._args.text_column, work)

    def read_first(self, folder: Path) -> Iterator[Document]:
        """Read all documents for another reading to follow."""
        if self._place is None:
            return self._sample.draw(self._read_pydocs)
        documents = self._read_documents()
        return spool_documents(documents, folder / self._spool) if self._place.on_hub else documents

    def _read_pydocs(self) -> Iterator[Document]:
        for number, (source, text) in enumerate(pydocs.iter_documents(self._args.pydocs_packages), 1):
            yield Document(source, number, cut_text(text))

    def _read_documents(self) -> Iterator[Document]:
        return read_place(self._place, self._args.text_column, self._args.split_docs, self._sample)

    def _read_files(self) -> Iterator[TextSlice | Document]:
        column, split_docs = self._args.text_column, self._args.split_docs
        for file in self._place.files:
            slices = iter_text_slices(file, split_docs, column)
            yield from (
                read_place(replace(self._place, files=(file,)), column, split_docs, EVERYTHING)
                if (slices is None)
                else slices
            )


def spool_documents(documents: Iterable[Document], spool: Path) -> Iterator[Document]:
    """Pass the documents on, and keep them in a file; the bad ones too."""
    with open(spool, "w", encoding="utf-8") as rows:
        for document in documents:
            row = {"file": document.file, "line": document.line}
            if isinstance(document.pieces, RowError):
                row |= {"reason": document.pieces.reason, "detail": str(document.pieces)}
            else:
                row["text"] = "".join(document.pieces)
            rows.write(json.dumps(row) + "\n")
            yield document


def read_spool(spool: Path) -> Iterator[Document]:
    """Read what `spool_documents` has kept."""
    with open(spool, encoding="utf-8") as rows:
        for row in map(json.loads, rows):
            bad = "reason" in row
            text = RowError(row["reason"], row["detail"]) if bad else cut_text(row["text"])
            yield Document(row["file"], row["line"], text)


def find_version(package: str) -> str:
    """Return the version of an installed package.

    Raises:
        MissingInput: when it is not installed.
    """
    try:
        return version(package)
    except PackageNotFoundError:
        raise MissingInput(
            f"--pydocs_packages: {package!r} is not installed; install it or leave it out"
        ) from None


def print_summary(out_dir: Path, report: dict) -> None:
    """Print the account of the corpus."""
    rows = [*list_documents(report), *list_tokens(report)]
    for split, counts in report["splits"].items():
        rows.append((split, f"{counts['documents']:,} documents, {counts['tokens']:,} tokens"))
    rows += prep.list_mix(report["datasets"], "documents", "documents")
    print(f"{out_dir}\n{prep.format_table(rows)}")


def list_documents(report: dict) -> list[tuple[str, object]]:
    """Return the lines of the account of documents."""
    documents = report["documents"]
    return [
        ("documents read", documents["read"]),
        ("kept", documents["kept"]),
        ("empty, dropped", documents["empty"]),
        *((f"rejected, {reason}", count) for reason, count in documents["rejected"].items()),
        ("duplicates (kept)", documents["duplicates"]),
        *(("nearly on both sides", near) for near in [report["nearly_on_both_sides"]] if near is not None),
    ]


def list_tokens(report: dict) -> list[tuple[str, object]]:
    """Return the lines of the account of tokens."""
    num_bytes = sum(counts["bytes"] for counts in report["splits"].values())
    tokens = sum(counts["tokens"] for counts in report["splits"].values())
    return [
        ("bytes of text", num_bytes),
        ("tokens", tokens),
        ("bytes per token", f"{num_bytes / tokens:.2f}"),
        ("vocabulary", report["vocab_size"]),
    ]


def build_page(report: dict) -> str:
    """Return the report as an HTML page: its tables, and pictures of drops, mix, sides and lengths."""
    documents, datasets = report["documents"], report["datasets"]
    drops = {
        name: count
        for name, count in (documents["rejected"] | {"empty": documents["empty"]}).items()
        if count
    }
    header = ("dataset", "weight", "licence", "documents", "tokens")
    mix = draw_shares({drawn["dataset"]: drawn["tokens"] for drawn in datasets})
    sides = {split: counts["tokens"] for split, counts in report["splits"].items()}
    sections = [
        ("Documents", format_html_table((), list_documents(report))),
        ("Documents that were dropped", draw_shares(drops) if drops else "<p>None.</p>"),
        ("Tokens", format_html_table((), list_tokens(report)) + draw_shares(sides)),
        (
            "Where they come from: tokens of each dataset",
            mix + format_html_table(header, map(dict.values, datasets)),
        ),
        ("Documents by length", draw_bars(list(report["lengths"].items()), x_label="up to so many tokens")),
    ]
    return format_sections(f"Corpus report: {', '.join(report['command']['dataset'])}", sections)


if __name__ == "__main__":
    run_main(main)
