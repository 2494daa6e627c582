"""OpenAI's words: a request -> what to decode, ids -> the answer or its stream of chunks.

    {"model": "chat", "messages": [{"role": "user", "content": "Hi"}]}
    {"choices": [{"message": {"role": "assistant", "content": "Hello!"}, "finish_reason": "stop", ...}], ...}

The names are those of https://platform.openai.com/docs/api-reference/chat; `top_k`, `min_p`,
`repetition_penalty` and `truncation` are additions, and `usage` tells the context beside the tokens.
Invariant: a wish that is not met is refused, never left out in silence.
"""

import codecs
import json
import secrets
import time
from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from firstwords.errors import BadFlag
from firstwords.generate import Sampling
from firstwords.schema import Message, RowError, parse_conversation
from firstwords.session import Plan
from firstwords.tokenizer import Tokenizer

MAX_STOPS = 4
# What a client may send as long as it asks for nothing by it.
NEUTRAL = {
    "n": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logprobs": False,
    "top_logprobs": 0,
    "logit_bias": {},
    "tools": [],
    "functions": [],
    "tool_choice": "none",
    "parallel_tool_calls": False,
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "store": False,
}


class ApiError(Exception):
    """An error in OpenAI's form.

    Args:
        status: of HTTP.
        message: what is wrong, with the value, and what to do.
        param: the field that it is about.
        code: a word for programs.
        retry_after: seconds after which it may be tried again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = {} if retry_after is None else {"retry-after": str(retry_after)}

    @property
    def body(self) -> dict:
        """The JSON of the answer."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    """Whether the last chunk tells the usage."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class ChatRequest(BaseModel):
    """The body of `/v1/chat/completions`; ranges are checked by `generate.Sampling`."""

    model_config = ConfigDict(extra="allow", strict=True)
    model: str
    messages: list[Any] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stop: str | list[str] | None = None
    truncation: Literal["disabled", "auto"] | None = None
    user: str | None = None
    metadata: dict | None = None

    def check(self, max_turns: int) -> None:
        """Refuse what cannot be met.

        Raises:
            ApiError: 400, naming the field.
        """
        for name, value in (self.model_extra or {}).items():
            if name not in NEUTRAL:
                raise ApiError(400, f"{name[:80]}: is no field of this API; leave it out", param=name[:80])
            if value is not None and value != NEUTRAL[name]:
                raise ApiError(400, f"{name}: only {NEUTRAL[name]!r} is supported; leave it out", param=name)
        if len(self.messages) > max_turns:
            text = f"messages: are {len(self.messages)}, and {max_turns} is the limit; send the newest"
            raise ApiError(400, text, param="messages")
        if len(self.stops) > MAX_STOPS or "" in self.stops:
            text = f"stop: must be up to {MAX_STOPS} strings that are not empty"
            raise ApiError(400, text, param="stop")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ApiError(
                400, "max_tokens: stands beside max_completion_tokens; give one", param="max_tokens"
            )

    @property
    def stops(self) -> list[str]:
        """The strings at which a reply ends."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def build_sampling(self, default: Sampling) -> Sampling:
        """Return the server's sampling with what the request changes.

        Raises:
            ApiError: 400 for a number out of its range.
        """
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        most = self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        if most is not None:
            given["max_new_tokens"] = most
        try:
            return replace(default, **given)
        except BadFlag as error:
            name, _, text = str(error).removeprefix("--").partition(":")
            name = "max_tokens" if name == "max_new_tokens" else name
            raise ApiError(400, f"{name}:{text}", param=name) from None

    def parse_messages(self) -> list[Message]:
        """Return the turns, the last of them the user's.

        Raises:
            ApiError: 400 when they are not what the model was trained on.
        """
        turns = [_join_parts(turn) for turn in self.messages]
        # A conversation ends with the assistant's turn, and that is what is asked for.
        answer = {"role": "assistant", "content": "-"}
        try:
            return parse_conversation({"messages": [*turns, answer]})[:-1]
        except RowError as error:
            raise ApiError(400, f"messages: {error}; mend it", param="messages") from None


def _join_parts(turn: Any) -> Any:
    """Return the turn with its text parts as one string; whatever else it is, the schema judges."""
    parts = turn.get("content") if isinstance(turn, dict) else None
    if not isinstance(parts, list):
        return turn
    if not all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in parts
    ):
        raise ApiError(400, "messages: content may hold text alone; leave out the rest", param="messages")
    return {**turn, "content": "".join(part["text"] for part in parts)}


class ReplyText:
    """Ids -> pieces of text, no character ever broken, up to the first of the stop strings.

    Attributes:
        ids: all that came.
        stopped: a stop string was met; it is not part of the text.
    """

    def __init__(self, tokenizer: Tokenizer, stops: list[str]):
        self.ids: list[int] = []
        self.stopped = False
        self._tokenizer = tokenizer
        self._stops = stops
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def push(self, token_id: int) -> str:
        """Return what is certain now; the beginning of a stop string is held back."""
        self.ids.append(token_id)
        return self._cut(self._held + self._decoder.decode(self._tokenizer.token_bytes(token_id)))

    def finish(self) -> str:
        """Return what was held back, at the end of the reply."""
        if self.stopped:
            return ""
        rest = self._cut(self._held + self._decoder.decode(b"", final=True))
        return rest if self.stopped else rest + self._held

    def _cut(self, text: str) -> str:
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        held = max((_count_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _count_overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of the text begin the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


class Answer:
    """One answer in OpenAI's shapes, whole or in chunks.

    Args:
        model: the name that it is given under.
        plan: of the prompt.
        context: tokens that prompt and reply may fill together.
    """

    def __init__(self, model: str, plan: Plan, context: int):
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }
        self._plan = plan
        self._context = context

    def usage(self, num_ids: int) -> dict:
        """Return the tokens read and made, the context, and the turns that were out of view."""
        prompt = len(self._plan.prompt)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": num_ids,
            "total_tokens": prompt + num_ids,
            "context": self._context,
            "evicted": self._plan.evicted,
        }

    def whole(self, text: str, num_ids: int, reason: str) -> dict:
        """Return the answer at once."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": self.usage(num_ids),
        }

    def chunk(self, delta: dict, reason: str | None = None) -> bytes:
        """Return one event of the stream."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return format_event({**self._head, "object": "chat.completion.chunk", "choices": [choice]})

    def usage_chunk(self, num_ids: int) -> bytes:
        """Return the event that tells the usage."""
        head = {**self._head, "object": "chat.completion.chunk"}
        return format_event({**head, "choices": [], "usage": self.usage(num_ids)})


def format_event(row: dict) -> bytes:
    """Return a server-sent event; ASCII, so that nothing in it can end it."""
    return b"data: " + json.dumps(row).encode("ascii") + b"\n\n"
