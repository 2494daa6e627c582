#!/usr/bin/env python
"""Turn plain text into a token store, the data of stage A.

  python prep_text_corpus.py --dataset pydocs --out_dir data/pydocs
  python prep_text_corpus.py --dataset shakespeare.txt --out_dir data/chars --tokenizer char
  python prep_text_corpus.py --dataset my_texts/ --out_dir data/mine --tokenizer bpe:8192
  python prep_text_corpus.py --dataset openwebtext --max_samples 100000 --out_dir data/owt

Reads .txt, .jsonl, .json, .parquet, .csv, folders of those (sorted), Hub names (streamed; the texts
wait on disk while the run lasts), and pydocs: the documentation of the installed Python. Writes
train.bin, val.bin, corpus.json and the tokenizer's files, all at once at the end. The same command
again finds its work done. Empty documents are dropped and counted; a bad one ends the run with exit
65 (see --skip_bad).

val is 1 % of the distinct documents, drawn by seed, and at least one; equal documents are never on
both sides. Of a corpus that is one single document, val is its last 10 % of characters.
"""

import argparse
import platform
import sys
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from firstwords import prep, pydocs, tokenstore
from firstwords.args import build_parser, run_main
from firstwords.atomic import stage_folder
from firstwords.errors import BadData, BadFlag, MissingInput
from firstwords.schema import RowError, format_row
from firstwords.sources import SPLIT_DOCS, Document, Sample, find_place, read_texts
from firstwords.template import CHAT_TEMPLATE
from firstwords.tokenizer import Tokenizer, build_tokenizer, learns_from_text

REPORT = "corpus.json"
VAL_PCT, VAL_PCT_SINGLE = 1.0, 10.0


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line and fill in the defaults that depend on the dataset."""
    parser = build_parser(__doc__)
    prep.add_source_flags(parser, dataset_help="file, folder, Hub name, or pydocs")
    add = parser.add_argument
    add(
        "--tokenizer",
        metavar="SPEC",
        help="gpt2, a .tiktoken file, a folder with tokenizer.json, bpe:N (trained on this text, N "
        "tokens) or char; default gpt2, for pydocs bpe:4096",
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
    args = parser.parse_args(argv)
    if [dataset.weight for dataset in args.dataset] != [1]:
        raise BadFlag("--dataset: a mix of several or of weights is not read here yet; give one")
    args.dataset = args.dataset[0].name
    args.tokenizer = args.tokenizer or ("bpe:4096" if args.dataset == "pydocs" else "gpt2")
    if args.dataset == "pydocs":
        prep.refuse_flags(args, ("dataset_config", "split", "text_column"), "pydocs has none")
    else:
        prep.refuse_flags(args, ["pydocs_packages"], "--dataset is not pydocs")
    args.pydocs_packages = list(_expand_packages(args.pydocs_packages))
    return args


def _expand_packages(names: Iterable[str]) -> Iterator[str]:
    for name in names:
        yield from pydocs.list_packages(Path(name)) if name.endswith(".txt") else [name]


def main(argv: list[str] | None = None) -> None:
    """Prepare the corpus, or say that it is there."""
    args = parse_flags(argv)
    corpus = Corpus(args)
    prep.refuse_out_dir_inside(args.dataset, args.out_dir)
    made_by = {"command": prep.describe_flags(args), "sources": corpus.describe()}
    tokenizer = None
    if not learns_from_text(args.tokenizer):
        tokenizer = build_tokenizer(args.tokenizer, ())
        made_by["tokenizer_hash"] = tokenizer.hash
    if prep.is_finished(args.out_dir, REPORT, made_by, overwrite=args.overwrite):
        print(f"{args.out_dir}: this corpus is there already, made by the same command")
        return
    with stage_folder(args.out_dir, overwrite=True) as staging:
        report = prepare(corpus, tokenizer, args, staging) | made_by
        prep.seal_folder(staging, args.out_dir, REPORT, report)
    if "refused" in report:
        raise BadData(report["refused"])
    print_summary(args.out_dir, report)


def prepare(corpus: "Corpus", tokenizer: Tokenizer | None, args: argparse.Namespace, staging: Path) -> dict:
    """Fill the staging folder.

    Returns:
        the report; with `refused` when there are bad documents and `--skip_bad` is not given.
    """
    corpus.spool = staging / "spool.jsonl"
    with prep.Rejects(staging) as rejects:
        survey = survey_documents(corpus.read(), rejects, args.seed)
    report = {"format": tokenstore.FORMAT, "documents": survey.describe(rejects)}
    refusal = check_survey(survey, rejects, args)
    if refusal:
        return report | {"refused": refusal}
    if tokenizer is None:
        tokenizer = build_tokenizer(args.tokenizer, chain.from_iterable(iter_texts(corpus.read())))
    splits = write_splits(iter_texts(corpus.read()), survey, tokenizer, args, staging)
    corpus.spool.unlink(missing_ok=True)
    tokenizer.save(staging, chat_template=CHAT_TEMPLATE)
    return report | {
        "dtype": tokenstore.choose_dtype(len(tokenizer)).str,
        "vocab_size": len(tokenizer),
        "tokenizer_hash": tokenizer.hash,
        "splits": splits,
    }


def check_survey(survey: "Survey", rejects: prep.Rejects, args: argparse.Namespace) -> str | None:
    """Print the first bad documents and tell why the corpus is refused, if it is."""
    for line in rejects.first:
        print(line, file=sys.stderr)
    where = f"all are listed in {args.out_dir / prep.REJECTS}"
    if rejects.total and not args.skip_bad:
        return (
            f"{args.dataset}: {rejects.total} of {survey.read + rejects.total} documents are bad, "
            f"{where}; mend them or pass --skip_bad"
        )
    if survey.characters < 2 or not survey.hashes:
        return f"{args.dataset}: holds no text; name another --dataset"
    return None


class Corpus:
    """The documents of `--dataset`, which can be read more than once.

    Attributes:
        spool: where the texts of a Hub set wait for the second pass, so that they are downloaded
            once.
    """

    def __init__(self, args: argparse.Namespace):
        self._args = args
        self._sample = Sample(args.max_samples, args.sample_pct, args.seed)
        self._place = None
        if args.dataset != "pydocs":
            self._place = find_place(args.dataset, split=args.split, config=args.dataset_config)
        self.spool: Path | None = None

    def describe(self) -> list[dict]:
        """Return what the corpus is made from, for the report."""
        if self._place:
            return self._place.describe()
        packages = {name: find_version(name) for name in self._args.pydocs_packages}
        return [{"pydocs": f"Python {platform.python_version()}", "packages": packages}]

    def read(self) -> Iterator[Document]:
        """Read all documents, or the sample of them."""
        if self._place is None:
            return self._sample.draw(self._read_pydocs)
        if not self._place.on_hub:
            return self._read_texts()
        if self.spool.exists():
            return read_texts(str(self.spool), text_column="text")
        return self._read_and_spool()

    def _read_pydocs(self) -> Iterator[Document]:
        for number, (source, text) in enumerate(pydocs.iter_documents(self._args.pydocs_packages), 1):
            yield Document(source, number, (text,))

    def _read_texts(self) -> Iterator[Document]:
        args = self._args
        return read_texts(
            args.dataset,
            split=args.split,
            config=args.dataset_config,
            text_column=args.text_column,
            split_docs=args.split_docs,
            sample=self._sample,
        )

    def _read_and_spool(self) -> Iterator[Document]:
        with open(self.spool, "w", encoding="utf-8") as spool:
            for document in self._read_texts():
                if not isinstance(document.pieces, RowError):
                    spool.write(format_row({"text": "".join(document.pieces)}))
                yield document


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


@dataclass
class Survey:
    """What a first pass over the documents found; `hashes` are those of the documents that stay."""

    empty: int = 0
    characters: int = 0
    num_bytes: int = 0
    hashes: array = field(default_factory=lambda: array("Q"))

    @property
    def read(self) -> int:
        """Documents that could be read."""
        return self.empty + len(self.hashes)

    def describe(self, rejects: prep.Rejects) -> dict:
        """Return the account of all documents: read = kept + empty + rejected."""
        return {
            "read": self.read + rejects.total,
            "kept": len(self.hashes),
            "empty": self.empty,
            "rejected": rejects.describe(),
            "duplicates": prep.count_duplicates(self.hashes),
        }


def survey_documents(documents: Iterable[Document], rejects: prep.Rejects, seed: int) -> Survey:
    """Read everything once, so that nothing bad is found after an hour of encoding."""
    survey = Survey()
    for document in tqdm(documents, "reading", unit=" documents", disable=None):
        if isinstance(document.pieces, RowError):
            rejects.add(document.file, document.line, document.pieces)
        else:
            _survey_text(survey, document.pieces, seed)
    return survey


def _survey_text(survey: Survey, pieces: Iterable[str], seed: int) -> None:
    kept = skip_empty(pieces)
    if kept is None:
        survey.empty += 1
        return

    def count() -> Iterator[str]:
        for piece in kept:
            survey.characters += len(piece)
            survey.num_bytes += len(piece.encode("utf-8"))
            yield piece

    survey.hashes.append(prep.hash_content(count(), seed))


def skip_empty(pieces: Iterable[str]) -> Iterator[str] | None:
    """Return the pieces of a text, or None when there is nothing but white space in it."""
    pieces = iter(pieces)
    # A text of several pieces has a word in the first: it is cut behind one.
    first = next(pieces, "")
    return chain([first], pieces) if first.strip() else None


def iter_texts(documents: Iterable[Document]) -> Iterator[Iterator[str]]:
    """Yield the pieces of each document that stays: neither bad nor empty."""
    for document in documents:
        if not isinstance(document.pieces, RowError):
            kept = skip_empty(document.pieces)
            if kept is not None:
                yield kept


def write_splits(
    texts: Iterable[Iterator[str]],
    survey: Survey,
    tokenizer: Tokenizer,
    args: argparse.Namespace,
    staging: Path,
) -> dict[str, dict]:
    """Encode and write both sides; returns their counts as `corpus.json` has them."""
    writers = {split: SplitWriter(staging, split, tokenizer) for split in ("train", "val")}
    total = {"total": survey.num_bytes, "unit": "B", "unit_scale": True}
    with tqdm(desc="encoding", disable=None, **total) as bar:
        for split, pieces in assign_splits(texts, survey, args.val_pct):
            bar.update(writers[split].write_document(pieces))
    splits = {split: writer.close() for split, writer in writers.items()}
    check_counts(splits, survey, args.dataset)
    return splits


def assign_splits(
    texts: Iterable[Iterator[str]], survey: Survey, val_pct: float | None
) -> Iterator[tuple[str, Iterable[str]]]:
    """Yield `(split, pieces)`: whole documents, or a single one in two parts."""
    if len(survey.hashes) == 1:
        val_pct = val_pct or VAL_PCT_SINGLE
        cut = min(max(1, int(survey.characters * (1 - val_pct / 100))), survey.characters - 1)
        yield from _cut_text(next(iter(texts)), cut)
        return
    limit = prep.find_val_limit(survey.hashes, val_pct or VAL_PCT)
    for content, pieces in zip(survey.hashes, texts, strict=False):
        yield ("val" if content <= limit else "train"), pieces


def _cut_text(pieces: Iterator[str], cut: int) -> Iterator[tuple[str, Iterable[str]]]:
    rest = []

    def head() -> Iterator[str]:
        left = cut
        for piece in pieces:
            yield piece[:left]
            if len(piece) >= left:
                rest.append(piece[left:])
                return
            left -= len(piece)

    yield "train", head()
    yield "val", chain(rest, pieces)


def check_counts(splits: dict[str, dict], survey: Survey, dataset: str) -> None:
    """Compare what was written with what the first pass had read.

    Raises:
        BadData: when the files have changed in between.
    """
    written = sum(counts["bytes"] for counts in splits.values())
    if written != survey.num_bytes:
        raise BadData(
            f"{dataset}: {survey.num_bytes} bytes of text at the first reading, {written} at the "
            "second; it changed meanwhile, run it again"
        )


class SplitWriter:
    """One side of the store: encodes documents and appends them."""

    def __init__(self, staging: Path, split: str, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._writer = tokenstore.TokenStoreWriter(staging, split, len(tokenizer))

    def write_document(self, pieces: Iterable[str]) -> int:
        """Write one document, then `<|endoftext|>`; returns its bytes of text."""
        total = 0
        for piece in pieces:
            size = len(piece.encode("utf-8"))
            self._writer.append(self._tokenizer.encode(piece), size)
            total += size
        self._writer.end_document(self._tokenizer.endoftext_id)
        return total

    def close(self) -> dict:
        """Return the counts of `corpus.json`."""
        return self._writer.close()


def print_summary(out_dir: Path, report: dict) -> None:
    """Print the account of the corpus."""
    documents, splits = report["documents"], report["splits"]
    num_bytes = sum(counts["bytes"] for counts in splits.values())
    tokens = sum(counts["tokens"] for counts in splits.values())
    rows = [
        ("documents read", documents["read"]),
        ("kept", documents["kept"]),
        ("empty, dropped", documents["empty"]),
        *((f"rejected, {reason}", count) for reason, count in documents["rejected"].items()),
        ("duplicates (kept)", documents["duplicates"]),
        ("bytes of text", num_bytes),
        ("tokens", tokens),
        ("bytes per token", f"{num_bytes / tokens:.2f}"),
        ("vocabulary", report["vocab_size"]),
    ]
    for split, counts in splits.items():
        rows.append((split, f"{counts['documents']:,} documents, {counts['tokens']:,} tokens"))
    print(f"{out_dir}\n{prep.format_table(rows)}")


if __name__ == "__main__":
    run_main(main)
