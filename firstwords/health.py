"""A chat model and fixed prompts -> whether its replies end, repeat, or fall out of their role.

    measure_health(model, tokenizer, read_checks(val_path, 32), context=256)   ->  {"stop_rate": 1.0, ...}

A falling loss does not show these: a model whose end token was masked in training has a beautiful loss and
never stops. Invariant: the prompts are the same at every evaluation, and the replies greedy.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from firstwords.errors import BadData
from firstwords.generate import Sampling
from firstwords.schema import Message, RowError, parse_conversation, read_jsonl
from firstwords.session import ChatSession, Reply, ask_many
from firstwords.template import encode_prompt
from firstwords.tokenizer import ROLES, Tokenizer

# A reply that opens another turn in letters: what other chat formats write in front of one.
_OTHER_ROLE = re.compile(
    r"<\|(?:system|user|assistant|im_start)\|>|^\s*(?:User|Human|Assistant):", re.MULTILINE
)
# So often a run of four tokens must stand in a reply before it counts as repeating.
REPEATS = 3


@dataclass(frozen=True)
class Check:
    """A prompt, with the system message before it and the answer that the data give."""

    system: str | None
    prompt: str
    answer: str | None


def iter_checks(path: Path) -> Iterator[Check]:
    """Yield the first question of each conversation of a val split.

    Raises:
        BadData: for a row that is no conversation.
    """
    for number, row in read_jsonl(path):
        try:
            if isinstance(row, RowError):
                raise row
            messages = parse_conversation(row)
        except RowError as error:
            raise BadData(f"{path}:{number}: {error}; run prep_data.py anew") from None
        system = messages[0].content if messages[0].role == "system" else None
        question, answer = messages[system is not None :][:2]
        yield Check(system, question.content, answer.content)


def read_checks(path: Path, count: int) -> list[Check]:
    """Return `count` first questions, evenly over the conversations; errors as of `iter_checks`."""
    checks = list(iter_checks(path))
    step = max(len(checks) / count, 1)
    return [checks[int(place * step)] for place in range(min(count, len(checks)))]


def ask_checks(
    model, tokenizer: Tokenizer, checks: Sequence[Check], *, context: int, max_new_tokens: int = 96
) -> list[tuple[Check, Reply]]:
    """Answer each prompt greedily in a session of its own; one that does not fit the context is left out.

    Other than in a chat the role tokens can be generated here: that one comes is what is asked. It ends the
    reply, which then has not ended by itself.
    """
    roles = {tokenizer.role_id(role) for role in ROLES}
    asked = []
    for check in checks:
        sampling = Sampling(max_new_tokens=min(max_new_tokens, context // 2))
        try:
            session = ChatSession(model, tokenizer, context=context, system=check.system, sampling=sampling)
        except BadData:
            continue
        session.stop_ids, session.banned_ids = session.stop_ids | roles, session.banned_ids - roles
        prompt = encode_prompt([*session.messages, Message("user", check.prompt)], tokenizer)
        if len(prompt) <= session.context - session.reserve:
            asked.append((check, session))
    replies = ask_many([session for _, session in asked], [check.prompt for check, _ in asked])
    return [(check, reply) for (check, _), reply in zip(asked, replies, strict=True)]


def measure_replies(replies: Sequence[tuple[Check, Reply]], tokenizer: Tokenizer) -> dict[str, float]:
    """Return the shares of replies, and their mean length in tokens.

    Returns:
        `stop_rate`, `role_leak`, `repeat_4gram`, `empty`, `mean_tokens`, `num_prompts`, and `exact` where the
        prompts have answers; `{}` without a reply.
    """
    if not replies:
        return {}
    count = len(replies)
    roles = {tokenizer.role_id(role) for role in ROLES}
    figures = {
        "stop_rate": sum(reply.stopped for _, reply in replies) / count,
        "role_leak": sum(leaks_role(reply, roles) for _, reply in replies) / count,
        "repeat_4gram": sum(repeats(reply.ids) for _, reply in replies) / count,
        "empty": sum(not reply.text.strip() for _, reply in replies) / count,
        "mean_tokens": sum(len(reply.ids) for _, reply in replies) / count,
        "num_prompts": count,
    }
    answered = [(check.answer, reply) for check, reply in replies if check.answer is not None]
    if answered:
        exact = sum(reply.stopped and reply.text.strip() == answer.strip() for answer, reply in answered)
        figures["exact"] = exact / len(answered)
    return figures


def leaks_role(reply: Reply, role_ids: set[int]) -> bool:
    """Tell whether a reply opens a turn, by a control token or in letters."""
    return bool(role_ids & set(reply.ids)) or bool(_OTHER_ROLE.search(reply.text))


def repeats(ids: Sequence[int]) -> bool:
    """Tell whether some four tokens in a row stand in a reply `REPEATS` times or more."""
    runs = Counter(tuple(ids[place : place + 4]) for place in range(len(ids) - 3))
    return max(runs.values(), default=0) >= REPEATS


def measure_health(model, tokenizer: Tokenizer, checks: Sequence[Check], *, context: int) -> dict[str, float]:
    """Ask and measure; see `ask_checks` and `measure_replies`. The model is in eval mode."""
    return measure_replies(ask_checks(model, tokenizer, checks, context=context), tokenizer)
