"""Packing: every item once, whole, in few rows."""

import numpy as np
import pytest

from firstwords.packing import pack_rows


def draw_lengths(seed, count, longest):
    return np.random.default_rng(seed).integers(1, longest + 1, count)


def check_rows(lengths, rows, seq_len):
    items = sorted(int(item) for row in rows for item in row)
    assert items == list(range(len(lengths)))
    assert all(0 < lengths[row].sum() <= seq_len for row in rows)


def test_the_example_of_the_docstring():
    rows = pack_rows(np.array([5, 3, 4, 2]), 7)
    assert [row.tolist() for row in rows] == [[0, 3], [2, 1]]


@pytest.mark.parametrize(
    "lengths", [[], [7], [7, 7, 7], [1] * 20, [4, 4, 4], [6, 1, 6, 1], [1, 2, 3, 4, 5, 6, 7]]
)
def test_small_sets(lengths):
    lengths = np.array(lengths, dtype=np.int64)
    rows = pack_rows(lengths, 7)
    check_rows(lengths, rows, 7)
    assert len(rows) == {0: 0, 1: 1, 3: 3, 20: 3, 4: 2, 7: 4}[len(lengths)]


@pytest.mark.parametrize("seed", range(20))
def test_every_item_stands_in_one_row_whole(seed):
    longest = 1 + seed * 5
    lengths = draw_lengths(seed, 50 * seed, longest)
    check_rows(lengths, pack_rows(lengths, 96), 96)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
def test_any_whole_number_will_do(dtype):
    lengths = draw_lengths(0, 200, 64).astype(dtype)
    check_rows(lengths, pack_rows(lengths, 64), 64)


@pytest.mark.parametrize(("longest", "filled"), [(1024, 0.98), (512, 0.99), (60, 0.99)])
def test_rows_are_full(longest, filled):
    lengths = draw_lengths(1, 3000, longest)
    rows = pack_rows(lengths, 1024)
    assert lengths.sum() / (len(rows) * 1024) > filled


def test_each_item_takes_the_fullest_row_that_has_room():
    # First fit would put the 2 beside the 13.
    rows = pack_rows(np.array([13, 10, 8, 2]), 20)
    assert [row.tolist() for row in rows] == [[0], [1, 2, 3]]


def test_equal_lengths_keep_their_order_and_two_calls_agree():
    rows = pack_rows(np.array([5, 4] * 50), 9)
    assert [row.tolist() for row in rows] == [[item, 99 - item] for item in range(0, 100, 2)]
    lengths = draw_lengths(2, 2000, 100)
    first, second = pack_rows(lengths, 128), pack_rows(lengths.copy(), 128)
    assert [row.tolist() for row in first] == [row.tolist() for row in second]


def test_an_item_longer_than_a_row_is_the_callers_mistake():
    with pytest.raises(AssertionError, match="9 tokens do not fit 8"):
        pack_rows(np.array([3, 9]), 8)
