"""Prepared data -> what a score is worth: the losses of counting, and of a compressor.

    measure_baselines(train, val, tokenizer)["bigram"].loss   ->  4.31 nats a token

A model that does not beat the trigram has not learned more than which token follows which two. All counts are
fitted on the train split and measured on the labels of the val split, the same that the model is measured on.
Invariant: each of them is a probability over the same tokens, summing to 1, so that its loss compares with
the model's. (`xz` is no model of the tokens: it has bytes alone.)
"""

import lzma
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from firstwords import tokenstore
from firstwords.dataset import choose_learned, find_chats, read_chats
from firstwords.tokenizer import Tokenizer

# What is counted at most of a train split, so that memory stays below 1 GB: its first tokens.
MAX_TRAIN_TOKENS = 10_000_000
# The window of `xz`; what lies further back could not help it.
XZ_WINDOW = 1 << 24
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Targets:
    """Tokens to be predicted, each with the two before it.

    Attributes:
        tokens: (N,) int64.
        previous: (N,) the token before.
        before: (N,) the one before that; `len(tokenizer)` where the text had not begun.
    """

    tokens: np.ndarray
    previous: np.ndarray
    before: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def cut(self, begin: int, end: int) -> "Targets":
        """Return the targets from `begin` to `end`."""
        return Targets(self.tokens[begin:end], self.previous[begin:end], self.before[begin:end])


def find_targets(ids: np.ndarray, learned: np.ndarray, starts: np.ndarray, nothing: int) -> Targets:
    """Lay beside each learned token what comes before it in its own text.

    Args:
        ids: (N,) texts end to end.
        learned: (N,) bool; False at the first token of each text.
        starts: where the texts begin.
        nothing: stands for the place before the first token.
    """
    places = np.flatnonzero(learned)
    is_second = np.zeros(len(ids) + 1, dtype=bool)
    is_second[starts[:-1] + 1] = True
    before = np.where(is_second[places], nothing, ids[np.maximum(places - 2, 0)])
    return Targets(ids[places].astype(np.int64), ids[places - 1].astype(np.int64), before.astype(np.int64))


def read_targets(data_dir: Path, split: str, tokenizer: Tokenizer, *, assistant_only: bool) -> Targets:
    """Return what is learned of a split: of a token store all but its first token, of chats by the mask.

    Raises:
        MissingInput, BadData: as `dataset.open_train`.
    """
    if tokenstore.is_store(data_dir):
        most = MAX_TRAIN_TOKENS if split == "train" else None
        return cut_targets(tokenstore.open_store(data_dir, split).tokens[:most], tokenizer)
    chats = read_chats(find_chats(data_dir, split))
    return find_targets(chats.ids, choose_learned(chats, assistant_only), chats.starts, len(tokenizer))


def cut_targets(tokens: np.ndarray, tokenizer: Tokenizer) -> Targets:
    """Return all tokens but the first as targets, each after those before it."""
    learned = np.ones(len(tokens), dtype=bool)
    learned[0] = False
    return find_targets(np.asarray(tokens), learned, np.array([0, len(tokens)]), len(tokenizer))


class _Table:
    """How often each token follows each context: keys sorted, looked up by bisection."""

    def __init__(self, contexts: np.ndarray, tokens: np.ndarray, base: int):
        self.base = base
        self.keys, self.counts = np.unique(contexts * base + tokens, return_counts=True)
        owners = self.keys // base
        first = np.flatnonzero(np.diff(owners, prepend=-1))
        self.contexts = owners[first]
        self.totals = np.add.reduceat(self.counts, first)
        self.kinds = np.diff(first, append=len(owners))

    def count(self, contexts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """(N,) how often the token followed the context."""
        return _look_up(self.keys, self.counts, contexts * self.base + tokens)

    def describe(self, contexts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N,) how often the context was seen, and how many different tokens followed it."""
        return tuple(_look_up(self.contexts, values, contexts) for values in (self.totals, self.kinds))


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)


class NgramCounts:
    """Counts of one, two and three tokens of a train split.

    Args:
        train: what is counted.
        vocab_size: ids lie below it.
        support: how many tokens may follow at all; the smoothing shares its mass among them.
    """

    def __init__(self, train: Targets, vocab_size: int, support: int):
        self.base, self.support, self.total = vocab_size + 1, support, len(train)
        self.ones = np.bincount(train.tokens, minlength=self.base)
        self.twos = _Table(train.previous, train.tokens, self.base)
        self.threes = _Table(train.before * self.base + train.previous, train.tokens, self.base)

    def measure(self, val: Targets) -> dict[str, float]:
        """Return nats per token over `val`, of each kind of counting; see `probabilities`."""
        sums: dict[str, float] = {}
        for begin in range(0, len(val), _CHUNK):
            for name, shares in self.probabilities(val.cut(begin, begin + _CHUNK)).items():
                sums[name] = sums.get(name, 0.0) - float(np.log(shares).sum())
        return {name: nats / len(val) for name, nats in sums.items()}

    def probabilities(self, targets: Targets) -> dict[str, np.ndarray]:
        """Return (N,) the probability that each kind of counting gave the token that came.

        `bigram_add_one` is that of makemore (Karpathy 2022): one is added to every count. `bigram` and
        `trigram` fall back on the shorter context by as much as the longer one had different followers
        (Witten and Bell 1991, method C), which needs no constant.
        """
        tokens, pair = targets.tokens, targets.before * self.base + targets.previous
        ones = (self.ones[tokens] + 1) / (self.total + self.support)
        count, seen = self.twos.count(targets.previous, tokens), self.twos.describe(targets.previous)
        twos = _fall_back(count, *seen, ones)
        return {
            "uniform": np.full(len(tokens), 1 / self.support),
            "unigram": ones,
            "bigram_add_one": (count + 1) / (seen[0] + self.support),
            "bigram": twos,
            "trigram": _fall_back(self.threes.count(pair, tokens), *self.threes.describe(pair), twos),
        }


def _fall_back(counts, totals, kinds, shorter: np.ndarray) -> np.ndarray:
    return np.where(totals > 0, (counts + kinds * shorter) / np.maximum(totals + kinds, 1), shorter)


@dataclass(frozen=True)
class Baseline:
    """What one way of counting scores: nats per token, and bits per byte of the text it stands for."""

    loss: float | None
    bits_per_byte: float

    def describe(self) -> dict:
        """Return what stands in `evaluation.json`; `xz` knows no tokens and has no loss."""
        if self.loss is None:
            return {"bits_per_byte": self.bits_per_byte}
        return {"loss": self.loss, "perplexity": math.exp(self.loss), "bits_per_byte": self.bits_per_byte}


def measure_baselines(train: Targets | None, val: Targets, tokenizer: Tokenizer) -> dict[str, Baseline]:
    """Measure all baselines on the labels of a val split.

    Args:
        train: what is counted; without it only `uniform` and `xz` remain.
        val: what is measured, at least one token.
        tokenizer: gives the bytes of the tokens.

    Returns:
        by name: `uniform`, `unigram`, `bigram_add_one`, `bigram`, `trigram`, `xz` (the val text alone), and
        `xz_after_train` (what it adds to the last 16 MiB of the train text).
    """
    ordinary = len(tokenizer.vocabulary)
    labels = np.concatenate([val.tokens, *([train.tokens] if train else [])])
    support = ordinary + max(len(np.unique(labels[labels >= ordinary])), 1)
    if train is None:
        losses = {"uniform": math.log(support)}
    else:
        losses = NgramCounts(train, len(tokenizer), support).measure(val)
    text = tokenizer.decode_bytes(val.tokens.tolist())
    num_bytes = max(len(text), 1)
    per_byte = len(val) / num_bytes / math.log(2)
    baselines = {name: Baseline(loss, loss * per_byte) for name, loss in losses.items()}
    baselines["xz"] = Baseline(None, 8 * _compress(text) / num_bytes)
    if train is not None:
        known = tokenizer.decode_bytes(train.tokens[-XZ_WINDOW:].tolist())[-XZ_WINDOW:]
        added = _compress(known + text[:XZ_WINDOW]) - _compress(known)
        baselines["xz_after_train"] = Baseline(None, 8 * added / min(num_bytes, XZ_WINDOW))
    return baselines


def _compress(text: bytes) -> int:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 2 * XZ_WINDOW}]
    return len(lzma.compress(text, format=lzma.FORMAT_RAW, filters=filters))
