"""CONTRACT: the conversation row, one JSON object a line in `train.jsonl` and `val.jsonl`.

    {"messages": [{"role": "system", "content": "Be brief."},
                  {"role": "user", "content": "Hi"},
                  {"role": "assistant", "content": "Hello!"}]}

The system message is optional and first; then user and assistant take turns, beginning with the user
and ending with the assistant. A top-level `"system"` key is accepted on input. Invariant: whatever
`parse_conversation` returns can be encoded, and nothing is coerced on the way: a row is right or it
has a reason why not. The shape is the one TRL and OpenAI's fine-tuning files use.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count, cycle
from json.encoder import encode_basestring
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: who speaks (`system`, `user` or `assistant`) and the text."""

    role: str
    content: str


class RowError(ValueError):
    """Why a row is refused. `reason` is a short code to count by, the message is for people."""

    def __init__(self, reason: str, text: str):
        super().__init__(text)
        self.reason = reason

    def __reduce__(self) -> tuple:
        # An exception is pickled with what `__init__` hands on, which is the text alone.
        return RowError, (self.reason, str(self))


def parse_conversation(row: dict) -> list[Message]:
    """Check one row against the contract.

    Args:
        row: an object with `messages`, and perhaps `system`; other keys are ignored.

    Returns:
        The turns in order; the first may be the system's, the last is the assistant's.

    Raises:
        RowError: for the first thing that is wrong, naming the turn (from 1).
    """
    turns = row.get("messages")
    if not isinstance(turns, list):
        raise RowError("no_messages", f"'messages' must be a list, but is {_kind(turns)}")
    messages = [_parse_message(turn, place) for place, turn in enumerate(turns, 1)]
    _check_order([message.role for message in messages])
    if row.get("system") is None:
        return messages
    if messages[0].role == "system":
        raise RowError("bad_order", "turn 1 is the system's, and a top-level 'system' stands beside it")
    return [_parse_message({"role": "system", "content": row["system"]}, 0), *messages]


def _parse_message(turn, place: int) -> Message:
    if not isinstance(turn, dict):
        raise RowError("bad_turn", f"turn {place} must be an object, but is {_kind(turn)}")
    try:
        role, content = turn["role"], turn["content"]
    except KeyError as missing:
        raise RowError("missing_key", f"turn {place} has no {missing}, only {list_names(turn)}") from None
    if role not in ("system", "user", "assistant"):
        raise RowError("unknown_role", f"turn {place} has the role {role!r:.60}")
    if not isinstance(content, str):
        reason = "null_content" if content is None else "bad_content"
        raise RowError(reason, f"turn {place} ({role}) is {_kind(content)}, not a string")
    if not content or content.isspace():
        raise RowError("empty_turn", f"turn {place} ({role}) is empty")
    if "\0" in content or not content.isascii():  # what is ASCII has no surrogates
        check_text(content, f"turn {place} ({role})")
    return Message(role, content)


def check_text(text: str, where: str) -> None:
    """Refuse text that no tokenizer can give back: lone surrogates and NUL.

    Raises:
        RowError: naming `where` and the offset in characters.
    """
    if "\0" in text:
        raise RowError("nul", f"{where} holds a NUL character at offset {text.index(chr(0))}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError("surrogate", f"{where} holds half a surrogate at {error.start}") from None


# C0 but for newline and tab, DEL, and C1, of which 0x9b alone begins a sequence; the line and paragraph
# separators; and what turns the direction of text that stands beside it (Boucher and Anderson 2021).
_TERMINAL_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def mask_control(text: str) -> str:
    """Return the text with U+FFFD for what a terminal might act on; newline and tab stay.

    It looks at one character at a time, so that a sequence in pieces is masked as the whole is.
    """
    return _TERMINAL_CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def _check_order(roles: list[str]) -> None:
    if "assistant" not in roles:
        raise RowError("no_assistant", f"no assistant turn to learn from; the roles are {roles[:9]}")
    first = int(roles[0] == "system")
    expected = cycle(("user", "assistant"))
    for place, role, wanted in zip(count(first + 1), roles[first:], expected, strict=False):
        if role != wanted:
            twice = place > 1 and roles[place - 2] == role
            reason = "same_role_twice" if twice else "bad_order"
            raise RowError(reason, f"turn {place} is the {role}'s where the {wanted}'s belongs")
    if roles[-1] != "assistant":
        raise RowError("bad_order", "the last turn must be the assistant's, but is the user's")


def read_jsonl(path: Path) -> Iterator[tuple[int, dict | RowError]]:
    """Read JSON objects strictly, line by line, in constant memory; see `parse_line`.

    Yields:
        `(line, row)` with `line` from 1; a `RowError` stands in the row's place when the line is not
        one valid JSON object, so that the caller decides whether to go on.
    """
    with open(path, "rb") as lines:
        for number, line in iter_lines(lines):
            yield number, parse_line(line)


def iter_lines(lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Number the lines from 1, without a byte order mark and without blank ones."""
    for number, line in enumerate(lines, 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield number, line


def parse_line(line: bytes) -> dict | RowError:
    """Parse one line strictly; what is wrong with it is returned, not raised.

    Args:
        line: with the end that it has in the file, LF or CRLF. Without one it is the file's last, and
            if it is not whole, that is because the file breaks off.
    """
    row = _parse_object(line)
    is_broken = isinstance(row, RowError) and row.reason in ("bad_json", "bad_utf8")
    if is_broken and not line.endswith(b"\n") and line.lstrip().startswith(b"{"):
        return RowError("truncated", f"the file breaks off within the row ({row})")
    return row


def _parse_object(line: bytes) -> dict | RowError:
    if b"\0" in line:
        return RowError("nul", f"holds a NUL at byte {line.index(0)} of the line")
    try:
        row = _DECODER.decode(line.decode("utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        return RowError("bad_utf8", f"not UTF-8 at byte {error.start} of the line")
    except json.JSONDecodeError as error:
        return RowError("bad_json", f"broken JSON at column {error.colno}: {error.msg}")
    except RowError as error:
        return error
    except RecursionError:
        return RowError("bad_json", "nested too deep")
    except ValueError:
        return RowError("bad_json", "a number has more digits than Python converts")
    if not isinstance(row, dict):
        return RowError("not_an_object", f"must be one JSON object, but is {_kind(row)}")
    return row


def _unique_keys(pairs: list[tuple]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        seen: set[str] = set()
        double = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise RowError("double_key", f"the key {double!r:.60} stands twice in one object")
    return row


def _no_constant(name: str):
    raise RowError("bad_json", f"{name} is no JSON value")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant)


def conversation_row(messages: list[Message]) -> dict:
    """Return the row that `parse_conversation` reads back to the same messages."""
    return {"messages": [{"role": m.role, "content": m.content} for m in messages]}


def format_conversation(messages: list[Message]) -> str:
    """Return `format_row(conversation_row(messages))`, without building the row: 8 times faster."""
    turns = [f'{{"role": "{m.role}", "content": {encode_basestring(m.content)}}}' for m in messages]
    return f'{{"messages": [{", ".join(turns)}]}}\n'


def format_row(row: dict) -> str:
    """Return `row` as one line of JSON with its newline; non-ASCII text stays readable."""
    return _ENCODER.encode(row) + "\n"


_ENCODER = json.JSONEncoder(ensure_ascii=False)


def list_names(row: dict) -> str:
    """Return the keys of a row for a message: sorted, the first ten, none of them endless."""
    names = sorted(row)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return "[" + ", ".join(f"{name!r:.60}" for name in names[:10]) + f"]{more}"


def _kind(value) -> str:
    names = {type(None): "null", list: "a list", dict: "an object", str: "a string", bool: "a bool"}
    return names.get(type(value), f"a {type(value).__name__}")
