"""Contents -> 8-byte hashes in a file, and what they tell: duplicates, the split, what is on both sides.

    sort_hashes(Path("hashes.bin"), Path("sorted.bin"))   ->  array([ 11,  11, 302, ...], dtype=uint64)

A file of hashes is nothing but little-endian uint64. Among a billion different contents two share one with
a chance of 3 %; then one counts as the other's copy. Invariant: memory does not grow with the number of
hashes; what is large stays on disk.
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from firstwords.errors import BadData

DTYPE = np.dtype("<u8")
BLOCK = 1 << 20  # hashes held in memory at a time, 8 MB


def hash_content(parts: Iterable[str], seed: int) -> int:
    """Return 64 bits that equal contents share and that the seed changes."""
    digest = hashlib.blake2b(digest_size=8, key=str(seed).encode())
    for part in parts:
        digest.update(part.encode("utf-8"))
    return int.from_bytes(digest.digest(), "big")


def open_hashes(path: Path) -> np.ndarray:
    """Map a file of hashes; shape (N,)."""
    if not path.stat().st_size:  # an empty file cannot be mapped
        return np.empty(0, DTYPE)
    return np.memmap(path, DTYPE, mode="r")


def sort_hashes(source: Path, target: Path) -> np.ndarray:
    """Write the hashes of `source` in ascending order to `target`, and map it.

    They are dealt by their first bits into stretches of about `BLOCK`, of which each is sorted alone:
    hashes are evenly spread, so a stretch is long only where one content is very frequent.

    Returns:
        (N,) ascending, copies side by side.
    """
    hashes = open_hashes(source)
    if not len(hashes):
        target.write_bytes(b"")
        return hashes
    num_bits = (len(hashes) // BLOCK).bit_length()
    borders = np.arange(1, 1 << num_bits, dtype=np.uint64) << np.uint64(64 - num_bits)
    ends = sum(np.searchsorted(block, borders) for block in _iter_sorted_blocks(hashes))
    edges = np.concatenate([[0], ends, [len(hashes)]]).astype(np.int64)
    result = np.memmap(target, DTYPE, mode="w+", shape=hashes.shape)
    places = edges[:-1].copy()
    for block in _iter_sorted_blocks(hashes):
        for bucket, part in enumerate(np.split(block, np.searchsorted(block, borders))):
            result[places[bucket] : places[bucket] + len(part)] = part
            places[bucket] += len(part)
    for begin, end in zip(edges[:-1], edges[1:], strict=True):
        result[begin:end].sort()
    result.flush()
    return open_hashes(target)


def _iter_sorted_blocks(hashes: np.ndarray) -> Iterator[np.ndarray]:
    for begin in range(0, len(hashes), BLOCK):
        yield np.sort(hashes[begin : begin + BLOCK])


def count_distinct(ascending: np.ndarray) -> int:
    """Return how many different hashes there are in what `sort_hashes` returned."""
    return sum(len(distinct) for distinct in _iter_distinct(ascending))


def _iter_distinct(ascending: np.ndarray) -> Iterator[np.ndarray]:
    """Yield each hash once, in order, a block at a time."""
    for begin in range(0, len(ascending), BLOCK):
        block = ascending[begin : begin + BLOCK]
        is_new = np.empty(len(block), dtype=bool)
        is_new[0] = begin == 0 or block[0] != ascending[begin - 1]
        np.not_equal(block[1:], block[:-1], out=is_new[1:])
        yield block[is_new]


def find_val_limit(ascending: np.ndarray, val_pct: float) -> int:
    """Return the highest hash that belongs to val: a share of the distinct contents, at least one.

    Args:
        ascending: of all contents, from `sort_hashes`.
        val_pct: percent of the distinct ones.

    Raises:
        BadData: when there are not two distinct contents, one for each side.
    """
    distinct = count_distinct(ascending)
    if distinct < 2:
        raise BadData(
            f"--dataset: the {len(ascending)} kept rows are all equal; "
            "a split for validation needs two different ones, give more data"
        )
    wanted = min(max(1, round(distinct * val_pct / 100)), distinct - 1)
    for block in _iter_distinct(ascending):
        if wanted <= len(block):
            break
        wanted -= len(block)
    return int(block[wanted - 1])


def count_overlap(hashes: np.ndarray, ascending: np.ndarray) -> int:
    """Return how many of `hashes`, in any order, are among `ascending`; copies count each."""
    found = 0
    for block in _iter_sorted_blocks(hashes):
        if len(ascending):
            places = np.minimum(np.searchsorted(ascending, block), len(ascending) - 1)
            found += int((ascending[places] == block).sum())
    return found
