"""A dataset -> its rows, streamed, all of them or a sample by seed.

    next(read_rows("alpaca.json")).row   ->  {"instruction": "Add 1 and 2.", "output": "3"}

The order depends on names and content alone. Invariant: every row of the input comes out exactly
once, as itself or as a `RowError` with its file and line.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

from firstwords.errors import BadData, BadFlag, IOFailed, MissingInput
from firstwords.sources.places import ROW_SUFFIXES, Place, find_place, find_suffix, one_line
from firstwords.sources.readers import RAW_READERS, RawRow, parse_raw

T = TypeVar("T")

SHUFFLE_BUFFER = 10_000  # rows held while a streamed Hub set is sampled


@dataclass(frozen=True, slots=True)
class Located:
    """One row and its address; `line` is from 1 (of Parquet and Hub rows: the row's number).

    `row` is a dict or a `RowError`; only `read_raw_rows` leaves lines of JSON as they are.
    """

    file: str
    line: int
    row: RawRow

    @property
    def where(self) -> str:
        """Return `file:line`."""
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Sample:
    """Which rows to take, drawn by seed; they stay in their order.

    `pct` keeps each row with that probability. `max_samples` draws exactly so many from all rows,
    each set of rows equally likely (selection sampling: Knuth, TAOCP 2, 3.4.2, algorithm S); to
    know how many there are it reads them once more. With both, the second draws from what the
    first keeps. A Hub set is not read to its end for it: there `max_samples` are the first of a
    seeded shuffle of the shards and of `SHUFFLE_BUFFER` rows.

    Raises:
        BadFlag: for sizes that make no sense.
    """

    max_samples: int | None = None
    pct: float | None = None
    seed: int = 0

    def __post_init__(self):
        if self.max_samples is not None and self.max_samples < 1:
            raise BadFlag(f"--max_samples: {self.max_samples} is no number of rows; give 1 or more")
        if self.pct is not None and not 0 < self.pct <= 100:
            raise BadFlag(f"--sample_pct: {self.pct} is no share; give more than 0, at most 100")

    def draw(self, read: Callable[[], Iterator[T]]) -> Iterator[T]:
        """Draw from the rows that `read` begins to read at each call, in constant memory."""
        if self.max_samples is None:
            return self._keep_share(read())
        total = sum(1 for _ in self._keep_share(read()))
        return self._keep_exactly(self._keep_share(read()), total)

    def draw_hub(self, rows) -> Iterator[dict]:
        """Draw from a streamed `datasets.IterableDataset`."""
        if self.max_samples is not None:
            rows = rows.shuffle(seed=self.seed, buffer_size=SHUFFLE_BUFFER)
        return islice(self._keep_share(iter(rows)), self.max_samples)

    def _keep_share(self, items: Iterator[T]) -> Iterator[T]:
        if self.pct is None:
            return items
        draw = random.Random(f"share {self.seed}").random
        return (item for item in items if draw() * 100 < self.pct)

    def _keep_exactly(self, items: Iterator[T], total: int) -> Iterator[T]:
        draw = random.Random(f"exact {self.seed}").random
        wanted = min(self.max_samples, total)
        for left, item in zip(range(total, 0, -1), items, strict=False):
            if draw() * left < wanted:
                wanted -= 1
                yield item
            if not wanted:
                return


EVERYTHING = Sample()


def read_rows(
    dataset: str,
    *,
    split: str | None = None,
    config: str | None = None,
    sample: Sample = EVERYTHING,
) -> Iterator[Located]:
    """Read and parse rows; see `read_raw_rows`."""
    return parse_rows(read_raw_rows(dataset, split=split, config=config, sample=sample))


def parse_rows(rows: Iterable[Located]) -> Iterator[Located]:
    """Parse the rows that are still lines of JSON."""
    return (replace(located, row=parse_raw(located.row)) for located in rows)


def read_raw_rows(
    dataset: str,
    *,
    split: str | None = None,
    config: str | None = None,
    sample: Sample = EVERYTHING,
) -> Iterator[Located]:
    """Read rows from `.jsonl`, `.json` (a list), `.parquet`, `.csv`, folders of those, or the Hub.

    Args:
        dataset, split, config: see `places.find_place`.
        sample: which rows; all of them by default.

    Raises:
        MissingInput, BadFlag: see `places.find_place`.
        BadData: when there is no row at all, or a file cannot be read on from some place.
    """
    place = find_place(dataset, split=split, config=config, suffixes=ROW_SUFFIXES)
    rows = read_hub(place, sample) if place.on_hub else sample.draw(lambda: read_files(place.files))
    return refuse_empty(dataset, rows)


def read_files(files: Iterable[Path]) -> Iterator[Located]:
    """Read the rows of files, one after the other."""
    for file in files:
        for line, row in RAW_READERS[find_suffix(file)](file):
            yield Located(str(file), line, row)


def read_hub(place: Place, sample: Sample) -> Iterator[Located]:
    """Read the rows of a set on the Hub, streamed."""
    try:
        for number, row in enumerate(sample.draw_hub(_open_hub(place)), 1):
            yield Located(f"hub:{place.name}", number, row)
    except OSError as error:
        raise IOFailed(
            f"{place.name}: reading from the Hub broke off ({one_line(error)}); run it again"
        ) from None


def _open_hub(place: Place):
    import datasets

    try:
        return datasets.load_dataset(place.name, place.config, split=place.split, streaming=True)
    except ValueError as error:  # no such config or split; the text lists those that there are
        raise BadFlag(f"{place.name}: {one_line(error)}; see --dataset_config and --split") from None
    except (OSError, RuntimeError) as error:
        raise MissingInput(
            f"{place.name}: cannot be read from the Hub ({one_line(error)}); "
            "check the name and the network, or name a local file"
        ) from None


def refuse_empty(dataset: str, items: Iterator[T]) -> Iterator[T]:
    """Pass the items on; without any the set is bad data."""
    first = next(items, None)
    if first is None:
        raise BadData(f"{dataset}: has no row, or none in the sample; name another --dataset")
    yield first
    yield from items
