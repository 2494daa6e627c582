"""A row of a known shape -> a conversation.

    {"instruction": "Add.", "input": "1 2", "output": "3"}
        ->  [Message("user", "Add.\\n\\n1 2"), Message("assistant", "3")]

Alpaca, Dolly, ShareGPT, messages, prompt/completion, question/answer. Invariant: what comes out
keeps the contract of `schema`, and no text was changed on the way; a row that does not fit is
refused with a reason.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from firstwords.schema import Message, RowError, list_names, parse_conversation


@dataclass(frozen=True, slots=True)
class Shape:
    """A known kind of row: columns it must have, columns it may have, and how they become turns."""

    name: str
    needed: tuple[str, ...]
    optional: tuple[str, ...]
    build_turns: Callable[[dict], list]

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that are read; any other is ignored, and the report says so."""
        return (*self.needed, *self.optional, "system")


def find_shape(row: dict) -> Shape:
    """Return the first of `SHAPES` whose columns the row has.

    Raises:
        RowError: `unknown_shape`, listing the columns found.
    """
    for shape in SHAPES:
        if all(column in row for column in shape.needed):
            return shape
    raise RowError(
        "unknown_shape",
        f"the columns {list_names(row)} are no known shape; known: "
        + ", ".join(" + ".join(shape.needed) for shape in SHAPES),
    )


def to_conversation(row: dict, *, system: str | None = None) -> list[Message]:
    """Turn a row of a known shape into a conversation that keeps the contract of `schema`.

    Args:
        row: see `SHAPES`; a top-level `system` is read with each of them.
        system: the system prompt of conversations that have none.

    Returns:
        The turns. An empty `input`, `context` or `system` is left out; any other empty text is
        refused.

    Raises:
        RowError: for the first thing that is wrong.
    """
    turns = find_shape(row).build_turns(row)
    prompt = row.get("system")
    if prompt is None or prompt == "":
        has_prompt = bool(turns) and isinstance(turns[0], dict) and turns[0].get("role") == "system"
        prompt = None if has_prompt else system
    return parse_conversation({"messages": turns, "system": prompt})


def _build_message_turns(row: dict) -> list:
    return _check_list(row, "messages")


def _build_sharegpt_turns(row: dict) -> list:
    return [_rename_turn(turn) for turn in _check_list(row, "conversations")]


def _rename_turn(turn):
    if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
        return turn
    speaker = turn["from"]
    known = isinstance(speaker, str) and speaker in SPEAKERS
    return {"role": SPEAKERS[speaker] if known else speaker, "content": turn["value"]}


def _check_list(row: dict, column: str) -> list:
    if not isinstance(row[column], list):
        raise RowError("no_messages", f"{column!r} must be a list, but is {row[column]!r:.60}")
    return row[column]


def _build_pair_turns(row: dict, ask: str, more: str | None, answer: str) -> list[dict]:
    request, extra = row[ask], row.get(more)
    if not isinstance(extra, str | None):
        raise RowError("bad_content", f"{more!r} is {extra!r:.60}, not a string")
    # What is wrong with the request itself stays visible to `parse_conversation`.
    if extra and extra.strip() and isinstance(request, str) and request.strip():
        request = f"{request}\n\n{extra}"
    return [{"role": "user", "content": request}, {"role": "assistant", "content": row[answer]}]


def _build_completion_turns(row: dict) -> list:
    """Strings, or lists of messages as TRL has them (there every assistant turn is learned)."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return [*prompt, *completion]
    return _build_pair_turns(row, "prompt", None, "completion")


SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
}
SHAPES = (
    Shape("messages", ("messages",), (), _build_message_turns),
    Shape("ShareGPT", ("conversations",), (), _build_sharegpt_turns),
    Shape(
        "Alpaca",
        ("instruction", "output"),
        ("input",),
        partial(_build_pair_turns, ask="instruction", more="input", answer="output"),
    ),
    Shape(
        "Dolly",
        ("instruction", "response"),
        ("context",),
        partial(_build_pair_turns, ask="instruction", more="context", answer="response"),
    ),
    Shape("prompt/completion", ("prompt", "completion"), (), _build_completion_turns),
    Shape(
        "question/answer",
        ("question", "answer"),
        (),
        partial(_build_pair_turns, ask="question", more=None, answer="answer"),
    ),
)
