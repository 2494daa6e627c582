"""What counting scores: by hand, as makemore does, and as probabilities that sum to 1."""

import lzma
import math
import random

import numpy as np
import pytest
from tiny import BYTES, talk, write_chats, write_store

from firstwords import baselines
from firstwords.baselines import NgramCounts, Targets, cut_targets, measure_baselines, read_targets
from firstwords.tokenizer import build_char


def draw_names(count, seed):
    """Invent names of 2 to 7 letters in which letters follow letters unevenly."""
    pick = random.Random(seed)
    follow = {a: pick.choices("abcdefghijklm", k=4) for a in "abcdefghijklm"}

    def name():
        letters = [pick.choice("abcdefghijklm")]
        while len(letters) < pick.randint(2, 7):
            letters.append(pick.choice(follow[letters[-1]]))
        return "".join(letters)

    return [name() for _ in range(count)]


def makemore_bigram(train, val):
    """Return the loss of makemore's counting: `.` around each name, one added to every count."""
    letters = [".", *sorted(set("".join(train)))]
    counts = np.ones((len(letters), len(letters)))
    for name in train:
        for a, b in zip(f".{name}", f"{name}.", strict=True):
            counts[letters.index(a), letters.index(b)] += 1
    shares = counts / counts.sum(1, keepdims=True)
    nats = [
        -math.log(shares[letters.index(a), letters.index(b)])
        for name in val
        for a, b in zip(f".{name}", f"{name}.", strict=True)
    ]
    return sum(nats) / len(nats)


def test_the_bigram_of_makemore(tmp_path):
    train, val = draw_names(300, 0), draw_names(40, 0)
    tokenizer = build_char(train)
    # A store has no `.` before its first name: an empty one gives it.
    data = write_store(tmp_path / "names", ["", *train], ["", *val], tokenizer=tokenizer)
    targets = [read_targets(data, split, tokenizer, assistant_only=False) for split in ("train", "val")]
    found = measure_baselines(*targets, tokenizer)["bigram_add_one"]
    assert found.loss == pytest.approx(makemore_bigram(train, val), rel=1e-9)
    num_bytes = sum(map(len, val))
    assert found.bits_per_byte == pytest.approx(
        found.loss * (num_bytes + len(val)) / num_bytes / math.log(2), rel=1e-9
    )


def random_targets(count, vocab, seed):
    tokens = np.random.default_rng(seed).integers(0, vocab, count)
    return Targets(tokens[2:], tokens[1:-1], tokens[:-2])


@pytest.mark.parametrize("context", [(0, 1), (5, 5), (3, 6), (6, 6)])
def test_every_baseline_is_a_probability(context):
    """Summed over all tokens that may follow a context: one that was seen, or in part, or never."""
    counts = NgramCounts(random_targets(60, 6, 0), vocab_size=6, support=6)
    every = np.arange(6)
    before, previous = (np.full(6, token) for token in context)
    for name, shares in counts.probabilities(Targets(every, previous, before)).items():
        assert shares.sum() == pytest.approx(1, rel=1e-12), name
        assert (shares > 0).all(), name


def test_counts_by_hand():
    """Of a b a b a c: after a come b twice and c once; after (b, a) b and c."""
    a, b, c = 0, 1, 2
    tokens = np.array([a, b, a, b, a, c])
    learned = np.array([False] + [True] * 5)
    train = baselines.find_targets(tokens, learned, np.array([0, 6]), nothing=3)
    assert train.before.tolist() == [3, a, b, a, b]
    one = Targets(np.array([b]), np.array([a]), np.array([b]))
    found = {k: float(v[0]) for k, v in NgramCounts(train, 3, 3).probabilities(one).items()}
    unigram = (2 + 1) / (5 + 3)
    bigram = (2 + 2 * unigram) / (3 + 2)
    assert found == pytest.approx(
        {
            **{"uniform": 1 / 3, "unigram": unigram, "bigram_add_one": (2 + 1) / (3 + 3)},
            **{"bigram": bigram, "trigram": (1 + 2 * bigram) / (2 + 2)},
        }
    )


def test_a_long_val_split_is_measured_in_pieces(monkeypatch):
    counts = NgramCounts(random_targets(500, 9, 0), 9, 9)
    val = random_targets(77, 9, 1)
    whole = counts.measure(val)
    monkeypatch.setattr(baselines, "_CHUNK", 10)
    assert counts.measure(val) == pytest.approx(whole, rel=1e-12)


def test_conversations_count_what_the_mask_learns(tmp_path):
    chats = write_chats(tmp_path / "chats", [talk("ab", "cd"), talk("e", "f")])
    user, assistant, end = BYTES.role_id("user"), BYTES.role_id("assistant"), BYTES.end_id
    targets = read_targets(chats, "train", BYTES, assistant_only=True)
    assert targets.tokens.tolist() == [*b"cd", end, *b"f", end]
    assert targets.previous.tolist() == [assistant, *b"cd", assistant, *b"f"]
    assert targets.before.tolist() == [end, assistant, *b"c", end, assistant]
    every = read_targets(chats, "train", BYTES, assistant_only=False)
    assert every.tokens.tolist()[:3] == [*b"ab", end]
    assert every.before.tolist()[:3] == [len(BYTES), user, *b"a"]
    assert every.before.tolist()[7:9] == [len(BYTES), user], "the conversation before is not seen"


def test_xz_and_what_it_adds_to_the_train_text(tmp_path):
    text = "the old stone waits by the river " * 9
    val, train = ("x" + text + "y").encode(), ("a" + text).encode()
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 25}]
    size = {
        name: len(lzma.compress(data, lzma.FORMAT_RAW, filters=filters))
        for name, data in {"val": val[1:], "train": train[1:], "both": train[1:] + val[1:]}.items()
    }
    cut = {
        name: cut_targets(np.frombuffer(data, np.uint8), BYTES)
        for name, data in {"val": val, "train": train}.items()
    }
    found = measure_baselines(cut["train"], cut["val"], BYTES)
    num_bytes = len(val) - 1
    assert found["xz"].bits_per_byte == 8 * size["val"] / num_bytes
    assert found["xz_after_train"].bits_per_byte == 8 * (size["both"] - size["train"]) / num_bytes
    assert found["xz"].loss is None
    assert found["xz"].describe() == {"bits_per_byte": found["xz"].bits_per_byte}


def test_without_a_train_split_nothing_is_counted():
    found = measure_baselines(None, cut_targets(np.frombuffer(b"xhello", np.uint8), BYTES), BYTES)
    assert list(found) == ["uniform", "xz"]
    assert found["uniform"].loss == pytest.approx(math.log(256 + 1)), "256 bytes and the end of the text"


def test_of_a_long_store_the_beginning_is_counted(tmp_path, monkeypatch):
    data = write_store(tmp_path / "data", ["abcdefgh" * 9], ["abc"])
    monkeypatch.setattr(baselines, "MAX_TRAIN_TOKENS", 20)
    assert len(read_targets(data, "train", BYTES, assistant_only=False)) == 19
    assert len(read_targets(data, "val", BYTES, assistant_only=False)) == 3
