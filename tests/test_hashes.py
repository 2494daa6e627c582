"""Hashes on disk: sorted, counted, split, in blocks that the tests make small."""

import numpy as np
import pytest

from firstwords import hashes
from firstwords.errors import BadData


def write_hashes(path, values):
    np.asarray(values, dtype=np.uint64).astype(hashes.DTYPE).tofile(path)
    return path


def sort(folder, values):
    return hashes.sort_hashes(write_hashes(folder / "hashes.bin", values), folder / "sorted.bin")


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 1500])
@pytest.mark.parametrize("spread", [2**64, 2**20, 7])
def test_sorted_on_disk_as_in_memory(tmp_path, monkeypatch, count, spread):
    monkeypatch.setattr(hashes, "BLOCK", 64)
    values = np.random.default_rng(count).integers(0, spread, count, dtype=np.uint64, endpoint=False)
    ascending = sort(tmp_path, values)
    assert ascending.tolist() == sorted(values.tolist())
    assert hashes.count_distinct(ascending) == len(set(values.tolist()))
    assert (tmp_path / "sorted.bin").stat().st_size == 8 * count


def test_both_ends_of_the_range_are_sorted(tmp_path, monkeypatch):
    monkeypatch.setattr(hashes, "BLOCK", 2)
    values = [2**64 - 1, 0, 2**63, 2**63 - 1, 2**64 - 1, 0, 1, 2**62]
    assert sort(tmp_path, values).tolist() == sorted(values)


def test_sorting_holds_a_few_blocks_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(hashes, "BLOCK", 1000)
    held = []
    sort_in_memory = np.sort
    monkeypatch.setattr(np, "sort", lambda a: held.append(len(a)) or sort_in_memory(a))
    ascending = sort(tmp_path, np.random.default_rng(0).integers(0, 2**64, 20_000, dtype=np.uint64))
    assert max(held) == 1000
    assert isinstance(ascending, np.memmap)


def test_hash_is_of_content_and_seed():
    assert hashes.hash_content(["ab", "c"], 0) == hashes.hash_content(["abc"], 0)
    assert hashes.hash_content(["abc"], 0) != hashes.hash_content(["abc"], 1)
    assert hashes.hash_content(["abc"], 0) != hashes.hash_content(["abd"], 0)
    assert 0 <= hashes.hash_content([""], 0) < 2**64


@pytest.mark.parametrize(
    ("distinct", "val_pct", "in_val"),
    [(2, 1, 1), (2, 99, 1), (9, 10, 1), (100, 1, 1), (100, 5, 5), (1000, 1, 10), (3, 99.9, 2)],
)
@pytest.mark.parametrize("block", [64, 1 << 20])
def test_val_gets_its_share_of_the_distinct_and_both_sides_get_some(
    tmp_path, monkeypatch, distinct, val_pct, in_val, block
):
    monkeypatch.setattr(hashes, "BLOCK", block)
    values = [hashes.hash_content([str(n % distinct)], 0) for n in range(3 * distinct)]
    limit = hashes.find_val_limit(sort(tmp_path, values), val_pct)
    assert sum(value <= limit for value in values) == 3 * in_val


def test_equal_contents_cannot_be_split(tmp_path):
    with pytest.raises(BadData, match="the 3 kept rows are all equal"):
        hashes.find_val_limit(sort(tmp_path, [7, 7, 7]), 10)


def test_overlap_counts_each_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(hashes, "BLOCK", 3)
    val = sort(tmp_path, [5, 9, 9, 2**64 - 1])
    assert hashes.count_overlap(np.array([9, 1, 9, 5, 6, 2**64 - 1, 0, 8], dtype=np.uint64), val) == 4
    assert hashes.count_overlap(np.array([1], dtype=np.uint64), val[:0]) == 0
