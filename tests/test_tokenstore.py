"""The token store: nanoGPT's bytes, honest counts, and where the blocks of an epoch lie."""

import hashlib
import json
import time

import numpy as np
import pytest

from firstwords.errors import BadData, MissingInput
from firstwords.tokenstore import (
    FORMAT,
    TokenStoreWriter,
    block_offset,
    choose_dtype,
    is_store,
    num_blocks,
    open_store,
    permute,
    read_corpus,
)

END = 300
DOCUMENTS = [[5, 6], [65_535], []]
FLAT = [5, 6, END, 65_535, END, END]


def write_store(folder, documents=DOCUMENTS, *, vocab_size=65_536, splits=("train", "val"), **changes):
    """Write a store as prep_text_corpus.py does; `changes` go into corpus.json."""
    meta = {"format": FORMAT, "dtype": choose_dtype(vocab_size).str, "splits": {}, **changes}
    for split in splits:
        writer = TokenStoreWriter(folder, split, vocab_size)
        for ids in documents:
            writer.append([*ids, END], num_bytes=10, num_documents=1)
        counts = writer.close()
        if "splits" not in changes:
            meta["splits"][split] = counts
    (folder / "corpus.json").write_text(json.dumps(meta))
    return counts


def change_corpus(folder, edit):
    meta = json.loads((folder / "corpus.json").read_text())
    edit(meta)
    (folder / "corpus.json").write_text(json.dumps(meta))


# --- bytes


def test_bytes_are_nanogpts(tmp_path):
    counts = write_store(tmp_path)
    data = (tmp_path / "train.bin").read_bytes()
    assert data[:8] == b"\x05\x00\x06\x00\x2c\x01\xff\xff"
    assert np.fromfile(tmp_path / "train.bin", dtype=np.uint16).tolist() == FLAT
    digest = hashlib.sha256(data).hexdigest()
    assert counts == {"tokens": 6, "documents": 3, "bytes": 30, "sha256": digest}


@pytest.mark.parametrize(("vocab_size", "dtype"), [(50_262, "<u2"), (65_536, "<u2"), (65_537, "<u4")])
def test_ids_up_to_65535_take_two_bytes_and_beyond_it_four(tmp_path, vocab_size, dtype):
    assert choose_dtype(vocab_size).str == dtype
    write_store(tmp_path, [[0, vocab_size - 1]], vocab_size=vocab_size)
    assert (tmp_path / "val.bin").stat().st_size == 3 * int(dtype[2])
    assert open_store(tmp_path, "val").tokens.tolist() == [0, vocab_size - 1, END]


def test_an_id_outside_the_vocabulary_is_never_wrapped(tmp_path):
    writer = TokenStoreWriter(tmp_path, "train", 65_536)
    for ids in ([65_536], [-1]):
        with pytest.raises(OverflowError):
            writer.append(ids, num_bytes=1)
    assert writer.close()["tokens"] == 0


def test_a_document_may_come_in_pieces(tmp_path):
    writer = TokenStoreWriter(tmp_path, "train", 500)
    for piece in ([5], np.array([6, 7], dtype=np.uint32), []):
        writer.append(piece, num_bytes=4)
    writer.append([END], num_bytes=0, num_documents=1)
    counts = writer.close()
    assert np.fromfile(tmp_path / "train.bin", dtype="<u2").tolist() == [5, 6, 7, END]
    assert (counts["tokens"], counts["documents"], counts["bytes"]) == (4, 1, 12)


# --- open


def test_a_store_opens_as_it_was_written(tmp_path):
    assert not is_store(tmp_path)
    counts = write_store(tmp_path)
    store = open_store(tmp_path, "train")
    assert is_store(tmp_path)
    assert store.tokens.tolist() == FLAT
    assert isinstance(store.tokens, np.memmap)
    assert store.hash == counts["sha256"]
    with pytest.raises(ValueError, match="read-only"):
        store.tokens[0] = 1


def test_a_bin_of_nanogpts_opens_without_corpus_json(tmp_path):
    np.array(FLAT, dtype=np.uint16).tofile(tmp_path / "train.bin")
    assert read_corpus(tmp_path) == {}
    store = open_store(tmp_path, "train")
    assert store.tokens.tolist() == FLAT


def test_the_hash_of_a_bin_without_corpus_json_knows_its_size_and_both_ends(tmp_path):
    tokens = np.zeros(1_500_000, dtype=np.uint16)
    hashes = set()
    for size, changed in ((1_500_000, []), (1_400_000, []), (1_500_000, [0]), (1_500_000, [-1])):
        spoilt = tokens[:size].copy()
        spoilt[changed] = 1
        spoilt.tofile(tmp_path / "train.bin")
        hashes.add(open_store(tmp_path, "train").hash)
    assert len(hashes) == 4


def cut_two_bytes(folder):
    data = (folder / "train.bin").read_bytes()
    (folder / "train.bin").write_bytes(data[:-2])


BROKEN = {
    "missing": (lambda f: (f / "train.bin").unlink(), MissingInput, "train.bin: is not there"),
    "empty": (
        lambda f: (f / "train.bin").write_bytes(b""),
        BadData,
        "train.bin: 0 bytes are no whole number",
    ),
    "odd": (
        lambda f: (f / "train.bin").write_bytes(b"123"),
        BadData,
        "train.bin: 3 bytes are no whole number",
    ),
    "truncated": (cut_two_bytes, BadData, "train.bin: 5 tokens, but corpus.json says 6"),
    "longer": (
        lambda f: (f / "train.bin").write_bytes(b"12" * 7),
        BadData,
        "train.bin: 7 tokens, but corpus.json says 6",
    ),
    "no json": (lambda f: (f / "corpus.json").write_text("{"), BadData, "corpus.json: is no JSON"),
    "no utf-8": (lambda f: (f / "corpus.json").write_bytes(b"\xff"), BadData, "corpus.json: is no JSON"),
    "a list": (lambda f: (f / "corpus.json").write_text("[]"), BadData, "the format is None"),
    "format": (
        lambda f: change_corpus(f, lambda meta: meta.update(format="theirs-2")),
        BadData,
        "the format is 'theirs-2', not 'firstwords-tokens-1'",
    ),
    "no split": (
        lambda f: change_corpus(f, lambda meta: meta["splits"].pop("train")),
        BadData,
        "no counts of train.bin",
    ),
    "no splits": (
        lambda f: change_corpus(f, lambda meta: meta.pop("splits")),
        BadData,
        "no counts of train.bin",
    ),
    "no hash": (
        lambda f: change_corpus(f, lambda meta: meta["splits"]["train"].pop("sha256")),
        BadData,
        "no counts of train.bin",
    ),
    "no dtype": (lambda f: change_corpus(f, lambda meta: meta.pop("dtype")), BadData, "has no dtype"),
    "dtype": (lambda f: change_corpus(f, lambda meta: meta.update(dtype="<f8")), BadData, "has no dtype"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_store_is_refused_in_one_line(tmp_path, name):
    spoil, error, text = BROKEN[name]
    write_store(tmp_path)
    spoil(tmp_path)
    with pytest.raises(error) as caught:
        open_store(tmp_path, "train")
    assert str(tmp_path) in str(caught.value)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_four_byte_tokens_are_checked_by_four(tmp_path):
    write_store(tmp_path, vocab_size=65_537)
    (tmp_path / "train.bin").write_bytes(b"123456")
    with pytest.raises(BadData, match="6 bytes are no whole number of uint32"):
        open_store(tmp_path, "train")


# --- order


@pytest.mark.parametrize("count", [*range(1, 70), 127, 128, 129, 1000, 1024, 1025])
def test_an_order_is_a_permutation(count):
    for seed, epoch in ((0, 0), (0, 1), (7, 3)):
        assert sorted(permute(i, count, seed=seed, epoch=epoch) for i in range(count)) == list(range(count))


def test_orders_differ_by_epoch_and_seed_and_mix_well():
    def order(seed, epoch, count=1000):
        return [permute(i, count, seed=seed, epoch=epoch) for i in range(count)]

    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len(set(map(tuple, orders))) == 9
    assert orders[0] == order(0, 0)
    for each in orders:
        assert abs(np.corrcoef(each, range(1000))[0, 1]) < 0.15
        followers = sum(b - a == 1 for a, b in zip(each, each[1:], strict=False))
        assert followers < 10  # of 999; one is expected by chance


def test_the_order_is_the_same_on_every_machine():
    # A resumed run reads on elsewhere: these numbers may never change.
    assert [permute(i, 10, seed=0, epoch=0) for i in range(10)] == [8, 7, 5, 9, 0, 2, 1, 3, 4, 6]
    offsets = [block_offset(i, 2, seed=3, num_tokens=100, seq_len=30) for i in range(3)]
    assert offsets == [62, 32, 2]


@pytest.mark.parametrize("seq_len", [1, 2, 7, 64])
@pytest.mark.parametrize("extra", [0, 1, 2, 5])
@pytest.mark.parametrize("blocks", [1, 2, 3, 10])
def test_an_epoch_covers_every_token_once_apart_from_its_ends(seq_len, extra, blocks):
    num_tokens = blocks * seq_len + min(extra, seq_len - 1)
    count = num_blocks(num_tokens, seq_len)
    assert count * seq_len > num_tokens - seq_len - 1
    for epoch in range(6):
        starts = sorted(
            block_offset(i, epoch, seed=1, num_tokens=num_tokens, seq_len=seq_len) for i in range(count)
        )
        shift = starts[0]
        assert 0 <= shift <= num_tokens - count * seq_len
        assert starts == [shift + i * seq_len for i in range(count)]
        assert starts[-1] + seq_len <= num_tokens


@pytest.mark.parametrize(
    ("num_tokens", "blocks"),
    [(0, 0), (9, 0), (10, 1), (11, 1), (19, 1), (20, 1), (21, 2), (1000, 99), (1001, 100)],
)
def test_blocks_of_ten_tokens(num_tokens, blocks):
    count = num_blocks(num_tokens, 10)
    assert (count, type(count)) == (blocks, int)


def test_epochs_are_shifted_against_one_another():
    def find_shift(epoch):
        starts = [block_offset(i, epoch, seed=0, num_tokens=1000, seq_len=64) for i in range(15)]
        return min(starts)

    shifts = {find_shift(epoch) for epoch in range(50)}
    assert len(shifts) > 20
    assert min(shifts) >= 0
    assert max(shifts) <= 1000 - 15 * 64


def test_ten_billion_tokens_open_at_once(tmp_path):
    num_tokens = 10_000_000_000
    try:
        with open(tmp_path / "train.bin", "wb") as file:
            file.truncate(2 * num_tokens)
    except OSError as error:
        pytest.skip(f"no sparse file of 20 GB here: {error}")
    if (tmp_path / "train.bin").stat().st_blocks > 10_000:
        pytest.skip("this file system keeps no sparse files")
    counts = {"tokens": num_tokens, "sha256": "0" * 64}
    meta = {"format": FORMAT, "dtype": "<u2", "splits": {"train": counts}}
    for text in (None, json.dumps(meta)):
        if text:
            (tmp_path / "corpus.json").write_text(text)
        began = time.process_time()
        store = open_store(tmp_path, "train")
        count = num_blocks(num_tokens, 1024)
        start = block_offset(count - 1, 3, seed=0, num_tokens=len(store.tokens), seq_len=1024)
        assert store.tokens[start : start + 1024].sum() == 0
        assert time.process_time() - began < 1
    assert count == 9_765_624
    (tmp_path / "train.bin").unlink()
