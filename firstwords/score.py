"""A model and data -> numbers that mean the same everywhere.

    evaluate_loss(model, val_set, tokenizer, batch_size=16).bits_per_byte   ->  1.43
    score_answers(answer_questions(open_session, held_out, seed=0))["exact_match"]   ->  0.975

Questions are asked through `ChatSession`, as a person would. Invariant: the loss is the sum over labelled
tokens divided by their number, so it does not depend on the batch size. (Trainer's own eval_loss weights
batches by rows: 5.37 / 5.09 / 5.10 for batches of 1 / 2 / 4 of one set under an assistant mask, measured
with transformers 5.23.)
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from firstwords.dataset import collate
from firstwords.model import IGNORED, GPT2LMHeadModel
from firstwords.pydocs import GREETING_ANSWER, HeldOut
from firstwords.session import ChatSession, Reply, ask_many
from firstwords.tokenizer import Tokenizer


@dataclass(frozen=True)
class Loss:
    """Sums over a data set: nats of loss, labelled tokens, and the bytes of text they stand for."""

    nats: float
    tokens: int
    num_bytes: int

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
    nats, tokens, num_bytes = 0.0, 0, 0
    was_training = model.training
    model.eval()
    with torch.inference_mode(), autocast(model.device, bf16):
        for begin in range(0, len(dataset), batch_size):
            rows = [dataset[i] for i in range(begin, min(begin + batch_size, len(dataset)))]
            batch = {name: rows.to(model.device) for name, rows in collate(rows).items()}
            labels = batch["labels"][:, 1:]
            labels = labels[labels != IGNORED].cpu().numpy()
            nats += float(model(**batch, num_items_in_batch=1).loss)
            tokens += len(labels)
            num_bytes += int(sizes[labels].sum())
    model.train(was_training)
    return Loss(nats, tokens, num_bytes)


def autocast(device: torch.device, bf16: bool):
    """Return the context that training with `--bf16` computes in, or one that does nothing."""
    return torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()


@dataclass(frozen=True)
class Answer:
    """One held-out prompt, what should have come, and what came.

    Attributes:
        kind: `question`, `followup`, `swapped`, `misspelt` or `greeting`.
        drawn: belongs to the sample that `exact_match` is over (of the others, true of all).
    """

    kind: str
    subject: str
    prompt: str
    expected: str
    reply: Reply
    drawn: bool = True

    @property
    def is_exact(self) -> bool:
        """The reply is the expected text, to the character, and ended by itself."""
        return self.reply.text == self.expected and self.reply.stopped

    @property
    def is_unknown(self) -> bool:
        """The reply says that the name is not known."""
        return self.reply.text.startswith("I do not know")

    def row(self) -> dict:
        """Return the line of `evaluation_replies.jsonl`."""
        return {
            "kind": self.kind,
            "subject": self.subject,
            "prompt": self.prompt,
            "expected": self.expected,
            "reply": self.reply.text,
            "exact": self.is_exact,
            "stopped": self.reply.stopped,
            "drawn": self.drawn,
        }


def answer_questions(
    open_session: Callable[[], ChatSession], held_out: HeldOut, *, seed: int
) -> list[Answer]:
    """Ask everything that was held out from training, each in a session of its own.

    Args:
        open_session: makes a fresh greedy session of the one model.
        held_out: from `pydocs.build_held_out`.
        seed: draws the 200 questions, the follow-ups and the invented names.
    """
    drawn = {question.prompt for question in held_out.draw(seed)}
    unknown = held_out.draw_unknown(seed)
    asked = [("question", q.symbol, q.prompt, q.answer) for q in held_out.questions]
    asked += [(u.kind, u.name, u.prompt, u.answer) for u in unknown]
    asked += [("greeting", text, text, GREETING_ANSWER) for text in held_out.greetings]
    replies = ask_many([open_session() for _ in asked], [prompt for _, _, prompt, _ in asked])
    answers = [
        Answer(*item, reply, drawn=item[0] != "question" or item[2] in drawn)
        for item, reply in zip(asked, replies, strict=True)
    ]
    return answers + _answer_follow_ups(open_session, held_out, seed)


def _answer_follow_ups(open_session: Callable[[], ChatSession], held_out: HeldOut, seed: int) -> list[Answer]:
    items = held_out.draw_follow_ups(seed)
    sessions = [open_session() for _ in items]
    ask_many(sessions, [item.first_prompt for item in items])
    # An empty first reply leaves no turn behind; the follow-up is then asked all the same.
    replies = ask_many(sessions, [item.prompt for item in items])
    return [
        Answer("followup", item.symbol, item.prompt, item.answer, reply)
        for item, reply in zip(items, replies, strict=True)
    ]


def score_answers(answers: list[Answer]) -> dict[str, float | int]:
    """Return the shares and the counts that `evaluation.json` holds."""
    kinds: dict[str, list[Answer]] = {}
    for answer in answers:
        kinds.setdefault(answer.kind, []).append(answer)
    questions, invented = kinds["question"], kinds["swapped"] + kinds["misspelt"]
    drawn = [answer for answer in questions if answer.drawn]
    return {
        "exact_match": _share(a.is_exact for a in drawn),
        "exact_match_all": _share(a.is_exact for a in questions),
        "stop_rate": _share(a.reply.stopped for a in answers),
        "followup_match": _share(a.is_exact for a in kinds["followup"]),
        "unknown_match": _share(a.is_unknown for a in invented),
        "unknown_match_swapped": _share(a.is_unknown for a in kinds["swapped"]),
        "unknown_match_misspelt": _share(a.is_unknown for a in kinds["misspelt"]),
        "false_unknown": _share(a.is_unknown for a in questions),
        "greeting_match": _share(a.is_exact for a in kinds["greeting"]),
        "num_questions": len(drawn),
        "num_questions_all": len(questions),
        "num_symbols": len({a.subject for a in questions}),
        "num_followups": len(kinds["followup"]),
        "num_unknown": len(invented),
        "num_greetings": len(kinds["greeting"]),
    }


def _share(holds) -> float:
    values = list(holds)
    return sum(values) / len(values)
