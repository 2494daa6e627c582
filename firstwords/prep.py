"""What the two prep scripts share: their flags, the account of every row, the finished folder.

    with Rejects(staging) as rejects:
        rejects.add("chat.jsonl", 7, error)       -> rejects.jsonl, rejects.counts, rejects.first

Invariants: what was read is what was kept plus what was dropped, by reason; a finished folder is left
alone, or replaced when that is asked for, and a folder that no prep script made is never touched.
"""

import argparse
import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from firstwords.atomic import format_json, hash_file, sweep_leftovers
from firstwords.errors import BadData, BadFlag, CannotCreate
from firstwords.schema import RowError, format_row, mask_control

T = TypeVar("T")

REJECTS = "rejects.jsonl"
REPORTS = ("data_report.json", "corpus.json")  # of stage B's data and of stage A's
SHOWN_REJECTS = 20
# Flags that do not change what is written.
FREE_FLAGS = ("out_dir", "overwrite", "debug", "show", "show_html", "num_proc")


def add_source_flags(parser: argparse.ArgumentParser, *, dataset_help: str) -> None:
    """Add the flags that say what is read, how it is split, and where it goes."""
    add = parser.add_argument
    add(
        "--dataset",
        required=True,
        action="append",
        type=parse_dataset,
        metavar="NAME|PATH|pydocs[:WEIGHT]",
        help=f"{dataset_help}; several times for a mix. A weight, 1 by default, says how often each row "
        "is taken: of B:0.3 each row with 30 %% chance, by seed; of B:2.3 all rows twice, and 30 %% of "
        "them once more",
    )
    add("--out_dir", required=True, type=Path, metavar="DIR", help="the folder to make")
    add("--dataset_config", metavar="NAME", help="config of a Hub set (`en` of c4)")
    add(
        "--split",
        metavar="NAME",
        help="of a Hub set, or of a folder whose files are named after splits: default train; "
        "`all` takes every file of a folder",
    )
    add(
        "--max_samples",
        type=int,
        metavar="N",
        help="draw N rows by seed from all of each --dataset (of a Hub set: from a shuffle buffer of 10,000)",
    )
    add("--sample_pct", type=float, metavar="P", help="keep each row with P %% chance, by seed")
    add("--seed", type=int, default=0, help="of the sample and of the split, default 0")
    add(
        "--skip_bad",
        action="store_true",
        help="go on without the bad rows; without this flag they end the run with exit 65; they "
        "are listed in rejects.jsonl either way",
    )
    add("--overwrite", action="store_true", help="replace an --out_dir that this script made")
    add(
        "--near_duplicates",
        action="store_true",
        help="count what is in train and shares 80 %% of its runs of three words with something in val "
        "(by MinHash)",
    )
    add(
        "--num_proc",
        type=parse_count,
        default=count_cores(),
        metavar="N",
        help="processes, default one for each core; the files are the same with any number",
    )


def count_cores() -> int:
    """Return how many cores this process may use; where the system does not say, all there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class Dataset:
    """One `--dataset`: what is read, and how often each of its rows is taken."""

    name: str
    weight: float = 1.0

    def __str__(self) -> str:
        return self.name if self.weight == 1 else f"{self.name}:{self.weight:g}"

    def read(self, read: Callable[[], Iterator[T]], seed: int) -> Iterator[tuple[bool, Iterator[T]]]:
        """Yield one reading after the other until the weight is used up.

        Args:
            read: begins to read the rows anew.
            seed: of the draw for what is left of the weight behind the point.

        Yields:
            `(is_repeat, rows)`; a repeat reads what was read before.
        """
        whole = int(self.weight)
        for number in range(whole):
            yield number > 0, read()
        if share := round(self.weight - whole, 9):
            draw = random.Random(f"weight {seed}").random
            yield whole > 0, (row for row in read() if draw() < share)


def parse_dataset(text: str) -> Dataset:
    """Parse `NAME` or `NAME:WEIGHT`; what is the path of something that is there is a name."""
    name, colon, weight = text.rpartition(":")
    if not colon or name in ("", "hub") or not re.fullmatch(r"[-+.\de]*", weight) or Path(text).exists():
        return Dataset(text)
    try:
        value = float(weight)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} has the weight {weight!r}; give a number above 0")
    return Dataset(name, value)


def parse_count(text: str) -> int:
    """Parse a whole number of 1 or more."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 1 or more")
    return int(text)


def parse_percent(text: str) -> float:
    """Parse a share of `--val_pct`: both sides of the split must get something."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 100:
        raise argparse.ArgumentTypeError(f"{text!r} is no percentage between 0 and 100")
    return value


def refuse_flags(args: argparse.Namespace, names: Iterable[str], why: str) -> None:
    """Refuse flags that would be ignored.

    Raises:
        BadFlag: for the first of `names` that was given.
    """
    for name in names:
        if getattr(args, name):
            raise BadFlag(f"--{name}: {getattr(args, name)}, but {why}; leave it out")


def refuse_out_dir_inside(dataset: str, out_dir: Path) -> None:
    """Refuse an `--out_dir` whose files the next run would take for the dataset's.

    Raises:
        BadFlag: when it lies in the folder that is read.
    """
    folder = Path(dataset).expanduser().resolve()
    if folder.is_dir() and out_dir.resolve().is_relative_to(folder):
        raise BadFlag(f"--out_dir: {out_dir} lies in --dataset {dataset}; name a folder outside")


def describe_flags(args: argparse.Namespace) -> dict:
    """Return the flags that decide what is written, as a report keeps them."""
    return {
        name: [str(item) for item in value] if isinstance(value, list) else value
        for name, value in vars(args).items()
        if name not in FREE_FLAGS
    }


class Rejects:
    """The rows that were refused: counted by reason, and each in `<folder>/rejects.jsonl`.

    Attributes:
        counts: rows by reason.
        first: the first 20 as `file:line: reason`, for the screen.
    """

    def __init__(self, folder: Path):
        self.counts: Counter[str] = Counter()
        self.first: list[str] = []
        self._path = folder / REJECTS
        self._file = None

    def __enter__(self) -> "Rejects":
        return self

    def __exit__(self, *_) -> None:
        if self._file:
            self._file.close()

    @property
    def total(self) -> int:
        """Rows refused."""
        return self.counts.total()

    def add(self, file: str, line: int, error: RowError) -> None:
        """Take down one row; the file is made with the first."""
        if self._file is None:
            self._file = open(self._path, "w", encoding="utf-8")  # noqa: SIM115 - see __exit__
        self.counts[error.reason] += 1
        if len(self.first) < SHOWN_REJECTS:
            self.first.append(mask_control(f"{file}:{line}: {error}"))
        detail = str(error).encode("utf-8", "backslashreplace").decode()
        row = {"file": file, "line": line, "reason": error.reason, "detail": detail}
        self._file.write(format_row(row))

    def describe(self) -> dict[str, int]:
        """Return the counts, the commonest reason first."""
        return dict(self.counts.most_common())


def is_finished(out_dir: Path, report_name: str, made_by: dict, *, overwrite: bool) -> bool:
    """Tell whether the same command has made `out_dir` already.

    Args:
        out_dir: the folder to be.
        report_name: the report that a finished folder has.
        made_by: what must stand in that report to be the same: command, sources, ...
        overwrite: make a finished folder anew.

    Returns:
        False when it is to be made: it is not there, is empty, or holds but the report of a prep
        that was refused.

    Raises:
        CannotCreate: when something else is there.
    """
    if out_dir.parent.is_dir():
        sweep_leftovers(out_dir.parent)
    if not out_dir.exists() or out_dir.is_dir() and not any(out_dir.iterdir()):
        return False
    report = read_report(out_dir / report_name)
    if report is None:
        raise CannotCreate(f"{out_dir}: is there and was not made by this script; name another")
    if overwrite or report.get("refused"):
        return False
    changed = [key for key, value in made_by.items() if report.get(key) != value]
    changed += [name for name, file in report["files"].items() if not _is_whole(out_dir / name, file)]
    if changed:
        raise CannotCreate(
            f"{out_dir}: is there, but {_describe_change(report, made_by, changed[0])}; "
            "name another --out_dir or pass --overwrite"
        )
    return True


def read_report(path: Path) -> dict | None:
    """Return a report of ours, or None where there is none."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) and "command" in report else None


def find_report(folder: Path) -> dict:
    """Return the report of a folder that a prep script made; `{}` of foreign data."""
    return next(filter(None, (read_report(folder / name) for name in REPORTS)), {})


def check_written(path: Path, sha256: str) -> None:
    """Compare a prepared file with the report beside it; foreign data have none.

    Raises:
        BadData: when the file is another one than was written.
    """
    files = find_report(path.parent).get("files")
    written = files.get(path.name) if isinstance(files, dict) else None
    if isinstance(written, dict) and written.get("sha256") != sha256:
        raise BadData(f"{path}: is not what was written, by its sha256 in the report; prepare it anew")


def _is_whole(path: Path, described: dict) -> bool:
    return path.is_file() and path.stat().st_size == described["bytes"]


def _describe_change(report: dict, made_by: dict, key: str) -> str:
    if key not in made_by:
        return f"its {key} is missing or has another size"
    if key != "command":
        return f"was made from other {key.replace('_', ' ')}"
    flag = next(name for name in made_by[key] if report[key].get(name) != made_by[key][name])
    return f"was made with --{flag} {report[key].get(flag)}, not {made_by[key][flag]}"


def seal_folder(staging: Path, out_dir: Path, report_name: str, report: dict) -> None:
    """Write the report, the last file of a staging folder.

    Args:
        staging: what becomes `out_dir`.
        out_dir: for a look at what is there now.
        report_name: `corpus.json` or `data_report.json`.
        report: with a text under `refused` where the rows were refused; then nothing but it and the
            rejects stays. It gets `files`: bytes and sha256 of each other file.

    Raises:
        BadData: when a refused prep would take the place of a finished one.
    """
    if "refused" in report:
        if "refused" not in (read_report(out_dir / report_name) or report):
            raise BadData(f"{report['refused']}; the finished data in {out_dir} stays as it was")
        for path in staging.iterdir():
            if path.name != REJECTS:
                path.unlink()
    report["files"] = {
        path.name: {"bytes": path.stat().st_size, "sha256": hash_file(path)}
        for path in sorted(staging.iterdir())
    }
    (staging / report_name).write_text(format_json(report), encoding="utf-8")


def list_mix(datasets: list[dict], key: str, noun: str) -> list[tuple[str, str]]:
    """Return a line for each dataset of a mix, none for a single one that is taken as it is.

    Args:
        datasets: of a report.
        key, noun: what is counted beside the tokens: its key there, and its name for people.
    """
    if [drawn["weight"] for drawn in datasets] == [1]:
        return []
    return [
        (drawn["dataset"], f"weight {drawn['weight']:g}, {drawn[key]:,} {noun}, {drawn['tokens']:,} tokens")
        for drawn in datasets
    ]


def format_table(rows: Iterable[tuple[str, object]]) -> str:
    """Return two columns as text: labels, and values with thousands separated."""
    shown = [(mask_control(label), f"{v:,}" if isinstance(v, int) else str(v)) for label, v in rows]
    width = max(len(label) for label, _ in shown)
    return "\n".join(f"  {label:<{width}}  {value}" for label, value in shown)
