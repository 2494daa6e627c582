"""A model and rows of tokens -> a loss that means the same everywhere.

    evaluate_loss(model, val_set, tokenizer, batch_size=16).bits_per_byte   ->  1.43

Invariant: the loss is the sum over labelled tokens divided by their number, so it does not depend on the
batch size. (Trainer's own eval_loss weights batches by rows: 5.37 / 5.09 / 5.10 for batches of 1 / 2 / 4 of
one set under an assistant mask, measured with transformers 5.23.)
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import Dataset

from firstwords.dataset import collate
from firstwords.model import IGNORED, GPT2LMHeadModel
from firstwords.tokenizer import Tokenizer


@dataclass(frozen=True)
class Part:
    """Nats and labels of some of the tokens: those at a place in the context, or of a turn."""

    nats: float
    tokens: int

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens


@dataclass(frozen=True)
class Loss:
    """Sums over a data set: nats of loss, labelled tokens, and the bytes of text they stand for.

    Attributes:
        correct: labels to which the model gave the highest probability of all tokens.
        by_position: what each label had before it in its text, in tokens: 1, 2 to 3, 4 to 7 and so on, by
            the first of them.
        by_turn: of conversations, by the assistant's turn from 1.
    """

    nats: float
    tokens: int
    num_bytes: int
    correct: int = 0
    by_position: dict[int, Part] = field(default_factory=dict)
    by_turn: dict[int, Part] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """`exp` of the mean; infinite where that is too large for a float."""
        return math.exp(self.mean) if self.mean < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text: comparable across tokenizers. Control tokens cost, but hold no bytes."""
        return self.nats / math.log(2) / max(self.num_bytes, 1)

    @property
    def accuracy(self) -> float:
        """Share of the labels that were the likeliest token."""
        return self.correct / self.tokens


def evaluate_loss(
    model: GPT2LMHeadModel,
    dataset: Dataset,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    bf16: bool = False,
) -> Loss:
    """Return the loss over all rows of the data set.

    Args:
        model: put into evaluation mode for the call, and back.
        dataset: rows as `dataset.PackedChats` and `dataset.TokenWindows` give them.
        tokenizer: gives the bytes of the labels.
        batch_size: rows at a time; it changes speed and memory, not the result.
        bf16: compute under autocast, as the training did.
    """
    sizes = np.array([len(tokenizer.token_bytes(i)) for i in range(len(tokenizer))])
    tokens = num_bytes = correct = 0
    positions, turns = _Sums(), _Sums()
    was_training = model.training
    model.eval()
    with torch.inference_mode(), autocast(model.device, bf16):
        for begin in range(0, len(dataset), batch_size):
            rows = [dataset[i] for i in range(begin, min(begin + batch_size, len(dataset)))]
            batch = collate(rows)
            learned = batch["labels"][:, 1:] != IGNORED  # (B, T-1)
            labels = batch["labels"][:, 1:][learned].numpy()
            nats, hits = score_labels(model, batch)
            tokens += len(labels)
            num_bytes += int(sizes[labels].sum())
            correct += int(hits.sum())
            before, turn = _find_places(batch, tokenizer.role_id("assistant"))
            positions.add(np.frexp(before[learned].numpy().astype(float))[1] - 1, nats)
            turns.add(turn[learned].numpy(), nats)
    model.train(was_training)
    by_position = {1 << power: part for power, part in positions.parts().items()}
    by_turn = {turn: part for turn, part in turns.parts().items() if turn}
    return Loss(float(positions.nats.sum()), tokens, num_bytes, correct, by_position, by_turn)


def sum_losses(losses: Sequence[Loss]) -> Loss:
    """Return the loss over the rows of all, each of which stood for some of them."""
    numbers = {
        name: sum(getattr(loss, name) for loss in losses)
        for name in ("nats", "tokens", "num_bytes", "correct")
    }
    parts = {
        name: _sum_parts([getattr(loss, name) for loss in losses]) for name in ("by_position", "by_turn")
    }
    return Loss(**numbers, **parts)


def _sum_parts(shares: Sequence[dict[int, Part]]) -> dict[int, Part]:
    places = sorted({place for share in shares for place in share})
    found = {place: [share[place] for share in shares if place in share] for place in places}
    return {
        place: Part(sum(part.nats for part in parts), sum(part.tokens for part in parts))
        for place, parts in found.items()
    }


def score_labels(model: GPT2LMHeadModel, batch: dict[str, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Return what each of the M labels of a batch cost, and whether it was the likeliest token.

    The logits, (M, V), are made a piece at a time: memory does not grow with the batch.

    Args:
        batch: `input_ids`, `labels` (B, T), and perhaps `position_ids`, on any device.

    Returns:
        nats (M,) float64 and hits (M,) bool, in the order of `labels[:, 1:][labels[:, 1:] != -100]`.
    """
    batch = {name: rows.to(model.device) for name, rows in batch.items()}
    labels = batch["labels"][:, 1:]
    learned = labels != IGNORED
    # Nothing is predicted from the last token.
    inputs = {name: batch[name][:, :-1] for name in ("input_ids", "position_ids") if name in batch}
    hidden = model.compute_hidden(**inputs)[learned]  # (M, d)
    size = max(1, _LOGITS_AT_ONCE // model.config.vocab_size)
    nats, hits = [], []
    for part, targets in zip(hidden.split(size), labels[learned].split(size), strict=True):
        logits = model.lm_head(part).float()
        # On the CPU first: Apple's GPU has no float64.
        nats.append(functional.cross_entropy(logits, targets, reduction="none").cpu().double())
        hits.append((logits.argmax(-1) == targets).cpu())
    return torch.cat(nats).numpy(), torch.cat(hits).numpy()


# 64 MB of float32.
_LOGITS_AT_ONCE = 1 << 24


def _find_places(batch: dict[str, torch.Tensor], assistant_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each label, (B, T-1), the tokens before it and the assistant's turn it is in (0: none)."""
    ids = batch["input_ids"]
    positions = batch.get("position_ids", torch.arange(ids.shape[1]).expand_as(ids))
    opened = (ids == assistant_id).cumsum(1)
    before_text = torch.where(positions == 0, opened - (ids == assistant_id).long(), 0).cummax(1).values
    return positions[:, 1:], (opened - before_text)[:, 1:]


class _Sums:
    """Nats and labels by a small whole number."""

    def __init__(self):
        self.nats, self.tokens = np.zeros(0), np.zeros(0, dtype=np.int64)

    def add(self, places: np.ndarray, nats: np.ndarray) -> None:
        length = max(len(self.nats), int(places.max(initial=-1)) + 1)
        more = (0, length - len(self.nats))
        self.nats = np.pad(self.nats, more) + np.bincount(places, nats, length)
        self.tokens = np.pad(self.tokens, more) + np.bincount(places, minlength=length)

    def parts(self) -> dict[int, Part]:
        return {
            place: Part(float(self.nats[place]), int(self.tokens[place]))
            for place in np.flatnonzero(self.tokens).tolist()
        }


def autocast(device: torch.device, bf16: bool):
    """Return the context that training with `--bf16` computes in, or one that does nothing."""
    return torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()
