"""Questions with known answers, and a model -> marks.

    score_answers(answer_questions(open_session, held_out, seed=0))["exact_match"]   ->  0.975

Invariant: questions are asked through `ChatSession`, as a person would.
"""

from collections.abc import Callable
from dataclasses import dataclass

from firstwords.pydocs import GREETING_ANSWER, HeldOut
from firstwords.session import ChatSession, Reply, ask_many


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
