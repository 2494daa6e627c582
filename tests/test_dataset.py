"""Prepared data -> rows: what is a label, in which order, and what is refused."""

import json

import numpy as np
import pytest
import torch
from tiny import BYTES, invent_talks, talk, write_chats, write_store

from firstwords.atomic import hash_file
from firstwords.dataset import (
    PackedChats,
    TokenBlocks,
    TokenWindows,
    bits_per_byte_factor,
    collate,
    open_train,
    open_val,
    read_chats,
)
from firstwords.errors import BadData, BadFlag, MissingInput
from firstwords.model import IGNORED
from firstwords.template import encode_chat
from firstwords.tokenstore import TokenStore, open_store


def build_store(tokens):
    return TokenStore(np.array(tokens, dtype="<u2"), "hash")


def write_rows(path, rows):
    """Write (ids, mask) rows as a tokenized file."""
    lines = [json.dumps({"input_ids": ids, "assistant_masks": mask}) + "\n" for ids, mask in rows]
    path.write_text("".join(lines))
    return path


@pytest.fixture
def talks():
    return invent_talks(30)


@pytest.fixture
def chats(tmp_path, talks):
    return read_chats(write_chats(tmp_path / "data", talks) / "train_tokenized.jsonl")


def list_rows(dataset, count=None):
    return [{k: v.tolist() for k, v in dataset[i].items()} for i in range(count or len(dataset))]


# --- stage A


def test_a_block_is_a_piece_of_the_store_and_all_but_its_first_token_are_labels():
    blocks = TokenBlocks(build_store(range(100, 200)), BYTES, 16, seed=3)
    for index in range(3 * blocks.rows_per_epoch):
        row = blocks[index]
        first = int(row["input_ids"][0])
        assert row["input_ids"].tolist() == list(range(first, first + 16))
        assert row["labels"].tolist() == [IGNORED, *range(first + 1, first + 16)]
        assert row["labels"].dtype == row["input_ids"].dtype == torch.int64


def test_blocks_are_a_function_of_seed_and_index():
    store = build_store(np.arange(1000) % 256)
    one, same, other = (TokenBlocks(store, BYTES, 10, seed=seed) for seed in (7, 7, 8))
    count = 3 * one.rows_per_epoch
    forwards = [one[i]["input_ids"].tolist() for i in range(count)]
    backwards = [same[i]["input_ids"].tolist() for i in reversed(range(count))]
    assert forwards == backwards[::-1]
    assert forwards != [other[i]["input_ids"].tolist() for i in range(count)]
    epochs = [forwards[e * one.rows_per_epoch :][: one.rows_per_epoch] for e in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]


def test_an_epoch_of_blocks_has_every_block_once():
    blocks = TokenBlocks(build_store(range(200)), BYTES, 10, seed=1)
    for epoch in range(3):
        rows = range(epoch * blocks.rows_per_epoch, (epoch + 1) * blocks.rows_per_epoch)
        tokens = [token for i in rows for token in blocks[i]["input_ids"].tolist()]
        assert len(set(tokens)) == len(tokens) == 10 * blocks.rows_per_epoch >= 190


def test_a_store_shorter_than_a_block_is_refused():
    assert len(TokenBlocks(build_store(range(16)), BYTES, 16, seed=0)) == 1
    with pytest.raises(BadData, match="holds 15 tokens, less than one block of 16"):
        TokenBlocks(build_store(range(15)), BYTES, 16, seed=0)


def check_windows(windows, tokens):
    """Each token but the first is a label once, and the token before it stands before it."""
    labels, before = [], []
    for index in range(len(windows)):
        row = windows[index]
        assert len(row["input_ids"]) == len(row["labels"]) == windows.seq_len
        places = np.flatnonzero(row["labels"] != IGNORED)
        labels += row["labels"][places].tolist()
        assert row["input_ids"][places].tolist() == row["labels"][places].tolist()
        before += row["input_ids"][places - 1].tolist()
        assert row["labels"][0] == IGNORED
    assert labels == tokens[1:]
    assert before == tokens[:-1]


@pytest.mark.parametrize("count", [2, 6, 7, 8, 13, 14, 20, 99])
def test_windows_predict_each_token_once(count):
    tokens = np.random.default_rng(count).integers(0, 200, count).tolist()
    check_windows(TokenWindows(np.array(tokens), BYTES, 7), tokens)


@pytest.mark.parametrize("stride", [1, 3, 6])
def test_a_stride_gives_each_label_so_much_to_predict_from(stride):
    tokens = list(range(40))
    windows = TokenWindows(np.array(tokens), BYTES, 7, stride=stride)
    check_windows(windows, tokens)
    for index in range(1, len(windows)):
        assert np.flatnonzero(windows[index]["labels"] != IGNORED)[0] == 7 - stride


def test_windows_that_do_not_overlap_lose_tokens():
    class Apart(TokenWindows):
        def __getitem__(self, index):
            start = index * self.seq_len
            ids = torch.from_numpy(self.tokens[start : start + self.seq_len].astype(np.int64))
            return {"input_ids": ids, "labels": torch.cat([torch.tensor([IGNORED]), ids[1:]])}

    with pytest.raises(AssertionError):
        check_windows(Apart(np.arange(21), BYTES, 7), list(range(21)))


def test_the_tail_of_the_last_window_is_padding():
    row = TokenWindows(np.array([5, 6, 7]), BYTES, 5)[0]
    assert row["input_ids"].tolist() == [5, 6, 7, BYTES.endoftext_id, BYTES.endoftext_id]
    assert row["labels"].tolist() == [IGNORED, 6, 7, IGNORED, IGNORED]


def test_a_val_split_of_one_token_is_refused():
    with pytest.raises(BadData, match="the val split holds 1 tokens"):
        TokenWindows(np.array([1]), BYTES, 5)


# --- stage B


def check_packing(dataset, talks):
    """An epoch holds each conversation once: its ids, its positions from 0, its mask as labels."""
    found = []
    for row in list_rows(dataset, dataset.rows_per_epoch):
        ids, labels, positions = row["input_ids"], row["labels"], row["position_ids"]
        starts = [i for i, position in enumerate(positions) if position == 0]
        for begin, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            assert positions[begin:end] == list(range(end - begin))
            if ids[begin] == BYTES.pad_id:
                assert (end - begin, labels[begin]) == (1, IGNORED)
            else:
                found.append((ids[begin:end], [label != IGNORED for label in labels[begin:end]]))
                assert all(label in (IGNORED, i) for i, label in zip(ids, labels, strict=True))
    expected = [encode_chat(messages, BYTES) for messages in talks]
    assert sorted(found) == sorted((ids, [bool(bit) for bit in mask]) for ids, mask in expected)


def test_an_epoch_of_rows_has_every_conversation_once_with_its_mask(chats, talks):
    dataset = PackedChats(chats, BYTES, 128, seed=0)
    assert dataset.num_overlong == dataset.dropped_tokens == 0
    assert len(dataset) < len(talks) / 2, "rows are shared"
    check_packing(dataset, talks)
    check_packing(PackedChats(chats, BYTES, 99, seed=5), talks)


@pytest.mark.parametrize("broken", ["positions", "labels", "cut"])
def test_rows_packed_wrongly_are_seen(chats, talks, broken):
    class Broken(PackedChats):
        def read_row(self, conversations):
            row = super().read_row(conversations[:-1] if broken == "cut" else conversations)
            if broken == "positions":
                row["position_ids"] = torch.arange(self.seq_len)
            elif broken == "labels":
                row["labels"] = row["labels"].roll(-1)
            return row

    with pytest.raises(AssertionError):
        check_packing(Broken(chats, BYTES, 128, seed=0), talks)


def test_rows_are_a_function_of_seed_and_index(chats):
    one, same, other = (PackedChats(chats, BYTES, 99, seed=seed) for seed in (4, 4, 5))
    count = 3 * len(one)
    rows = list_rows(one, count)
    assert rows == [{k: v.tolist() for k, v in same[i].items()} for i in reversed(range(count))][::-1]
    assert rows != list_rows(other, count)
    epochs = [rows[e * len(one) :][: len(one)] for e in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert len({str(sorted(map(str, epoch))) for epoch in epochs}) == 1, "the same rows in another order"


def test_the_first_token_of_a_conversation_is_never_a_label(tmp_path):
    rows = [([260, 65, 66], [1, 1, 1]), ([260, 67], [1, 1])]
    chats = read_chats(write_rows(tmp_path / "t.jsonl", rows))
    for assistant_only in (True, False):
        labels = PackedChats(chats, BYTES, 5, 0, assistant_only=assistant_only)[0]["labels"].tolist()
        assert labels == [IGNORED, 65, 66, IGNORED, 67]


def test_without_assistant_only_loss_all_but_the_first_token_is_learned(chats):
    masked, whole = (PackedChats(chats, BYTES, 128, 0, assistant_only=only) for only in (True, False))
    for row in list_rows(whole):
        for i, label, position in zip(row["input_ids"], row["labels"], row["position_ids"], strict=True):
            assert label == (IGNORED if position == 0 or i == BYTES.pad_id else i)

    def count_learned(dataset):
        return sum(label != IGNORED for row in list_rows(dataset) for label in row["labels"])

    assert count_learned(masked) == chats.masks.sum() < count_learned(whole)


def test_overlong_conversations_are_dropped_or_cut_and_counted(tmp_path):
    answer = [([259, 65, 260, 66, 66, 66], [0, 0, 0, 1, 1, 1]), ([259, 65, 260, 67], [0, 0, 0, 1])]
    late = ([259, 65, 65, 65, 65, 260, 66], [0, 0, 0, 0, 0, 0, 1])
    chats = read_chats(write_rows(tmp_path / "t.jsonl", [*answer, late]))
    dropped = PackedChats(chats, BYTES, 5, 0)
    assert (len(dropped), dropped.num_overlong, dropped.dropped_tokens) == (1, 2, 13)
    assert dropped.longest_row == 4
    cut = PackedChats(chats, BYTES, 5, 0, overlong="truncate")
    # The cut conversation that has nothing left to learn goes whole: 1 + 7 tokens.
    assert (len(cut), cut.num_overlong, cut.dropped_tokens) == (2, 2, 8)
    assert cut.longest_row == 5
    rows = sorted(row["input_ids"] for row in list_rows(cut))
    assert rows == [[259, 65, 260, 66, 66], [259, 65, 260, 67, BYTES.pad_id]]
    whole = PackedChats(chats, BYTES, 7, 0)
    assert (whole.num_overlong, whole.dropped_tokens) == (0, 0)


def test_nothing_that_fits_is_an_error(chats):
    with pytest.raises(BadData, match="no conversation is left that fits --seq_len 4 "):
        PackedChats(chats, BYTES, 4, 0)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "is no row with input_ids and assistant_masks"),
        ("", "is no row"),
        ("[1, 2]", "is no row"),
        ('{"input_ids": [1, 2]}', "is no row"),
        ('{"input_ids": [1, "x"], "assistant_masks": [0, 1]}', "is no row"),
        ('{"input_ids": [[1], [2, 3]], "assistant_masks": [0, 1]}', "is no row"),
        ('{"input_ids": [99999999999], "assistant_masks": [1]}', "is no row"),
        ('{"input_ids": [1, 2, 3], "assistant_masks": [0, 1]}', "3 ids and 2 mask values"),
        ('{"input_ids": [], "assistant_masks": []}', "0 ids and 0 mask values"),
    ],
)
def test_a_broken_row_is_named_by_its_line(tmp_path, line, why):
    path = tmp_path / "train_tokenized.jsonl"
    good = json.dumps({"input_ids": [1, 2], "assistant_masks": [0, 1]})
    path.write_text(f"{good}\n{good}\n{line}\n{good}\n")
    with pytest.raises(BadData, match=f"^{path}:3: {why}"):
        read_chats(path)


@pytest.mark.parametrize("rows", [[], [([1, 2], [0, 0])]])
def test_a_file_with_nothing_to_learn_is_refused(tmp_path, rows):
    path = write_rows(tmp_path / "t.jsonl", rows)
    with pytest.raises(BadData, match="has no token to learn from"):
        read_chats(path)


@pytest.mark.parametrize("wrong", [-1, len(BYTES), 40_000])
def test_an_id_beyond_the_vocabulary_is_refused(tmp_path, wrong):
    message = f"the data hold id {wrong}, but the tokenizer has {len(BYTES)}"
    chats = read_chats(write_rows(tmp_path / "t.jsonl", [([1, 2, wrong], [0, 1, 1])]))
    with pytest.raises(BadData, match=message):
        PackedChats(chats, BYTES, 8, 0)
    if wrong > 0:
        store = build_store([1, 2, 3, wrong])
        with pytest.raises(BadData, match=message):
            TokenBlocks(store, BYTES, 2, seed=0)
        with pytest.raises(BadData, match=message):
            TokenWindows(store.tokens, BYTES, 2)


def test_the_last_id_of_the_vocabulary_is_fine(tmp_path):
    rows = [([1, len(BYTES) - 1], [0, 1])]
    assert len(PackedChats(read_chats(write_rows(tmp_path / "t.jsonl", rows)), BYTES, 8, 0)) == 1


def test_the_hash_is_that_of_the_rows(tmp_path):
    hashes = [read_chats(write_rows(tmp_path / "t.jsonl", [([1, last], [0, 1])])).hash for last in (2, 2, 3)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_tokens_per_row_are_real_tokens(chats):
    dataset = PackedChats(chats, BYTES, 128, seed=0)
    real = sum(i != BYTES.pad_id for row in list_rows(dataset) for i in row["input_ids"])
    assert dataset.tokens_per_row * dataset.rows_per_epoch == pytest.approx(real)
    assert real == len(chats.ids)


def test_rows_that_are_not_what_was_written_are_refused(tmp_path):
    path = tmp_path / "train_tokenized.jsonl"
    path.write_text('{"input_ids": [5, 6], "assistant_masks": [0, 1]}\n', encoding="utf-8")
    files = {path.name: {"bytes": path.stat().st_size, "sha256": hash_file(path)}}
    (tmp_path / "data_report.json").write_text(json.dumps({"command": {}, "files": files}))
    assert read_chats(path).hash == files[path.name]["sha256"]
    path.write_text('{"input_ids": [5, 7], "assistant_masks": [0, 1]}\n', encoding="utf-8")
    with pytest.raises(BadData, match="train_tokenized.jsonl: is not what was written, by its sha256"):
        read_chats(path)
    for report in ("{}", "[", '{"command": {}, "files": [1]}'):  # then there is nothing to compare with
        (tmp_path / "data_report.json").write_text(report)
        assert read_chats(path).ids.tolist() == [5, 7]


def test_bits_per_byte_of_a_loss():
    # Three letters and a control token that stands for no byte: 4 tokens for 3 bytes.
    ids = np.array([97, 98, 99, BYTES.end_id])
    assert bits_per_byte_factor(ids, BYTES) == pytest.approx(4 / 3 / np.log(2))


# --- folders


def test_a_token_store_without_an_assistant_says_so(tmp_path):
    data = write_store(tmp_path / "data", ["some text"] * 9, ["other text"])
    for opened in (
        lambda: open_train(data, BYTES, 8, seed=0, assistant_only=True),
        lambda: open_val(data, BYTES, 8, assistant_only=True),
    ):
        with pytest.raises(BadFlag, match="is a token store.*--no_assistant_only_loss"):
            opened()
    assert isinstance(open_train(data, BYTES, 8, seed=0, assistant_only=False), TokenBlocks)
    val = open_val(data, BYTES, 8, assistant_only=False)
    check_windows(val, open_store(data, "val").tokens.tolist())


def test_conversations_open_both_splits(tmp_path):
    data = write_chats(tmp_path / "data", invent_talks(5), [talk("only", "val")])
    assert sum(map(len, open_train(data, BYTES, 128, seed=0, assistant_only=True).rows)) == 5
    val = open_val(data, BYTES, 128, assistant_only=True)
    check_packing(val, [talk("only", "val")])


def test_a_folder_that_is_not_there_or_holds_no_data(tmp_path):
    with pytest.raises(MissingInput, match="--data_dir .*nowhere: is not there"):
        open_train(tmp_path / "nowhere", BYTES, 8, seed=0, assistant_only=True)
    with pytest.raises(MissingInput, match="train_tokenized.jsonl: is not there; run prep_data.py"):
        open_train(tmp_path, BYTES, 8, seed=0, assistant_only=True)
    with pytest.raises(MissingInput, match="val_tokenized.jsonl: is not there"):
        open_val(tmp_path, BYTES, 8, assistant_only=True)


def test_a_batch_has_no_attention_mask(chats):
    dataset = PackedChats(chats, BYTES, 64, seed=0)
    batch = collate([dataset[0], dataset[1], dataset[2]])
    assert set(batch) == {"input_ids", "labels", "position_ids", "documents", "learned"}
    assert {tuple(batch[name].shape) for name in ("input_ids", "labels", "position_ids")} == {(3, 64)}
