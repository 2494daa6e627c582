"""One conversation with a model: text in, text out, the history kept within the context.

    session = load_session("runs/chat")
    session.ask("What does os.getcwd do?")  ->  "Return a unicode string representing the ..."
    session.ask("What are its arguments?")  ->  answered with the turn before in view

Rules. The context is the longest row that was trained. Of it a part is kept free for the reply:
`max_new_tokens`, or a quarter of the context when that is not set, never more than half. When the
turns so far do not fit, the oldest whole turns (a question with its answer) are dropped; the system
message stays. A turn is recorded when its reply holds text, though it were stopped half-way; else
the history stays as it was. Invariant: `messages` is the system message, if any, and whole turns.
"""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GPT2LMHeadModel

from firstwords.checkpoint import find_checkpoint, load_model, read_manifest
from firstwords.errors import BadData, Mismatch
from firstwords.generate import GREEDY, Sampling, generate_batch, stream_ids
from firstwords.schema import Message, RowError, check_text
from firstwords.template import encode_chat, encode_prompt
from firstwords.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back in one turn.

    Attributes:
        text: without control tokens; bytes that are no UTF-8 became U+FFFD.
        ids: as generated, the stop id included.
        stopped: ended by itself with `<|end|>`; False when cut by a limit or an interrupt.
        evicted: turns (a question with its answer) that were dropped to make room.
    """

    text: str
    ids: list[int]
    stopped: bool
    evicted: int


@dataclass(frozen=True, slots=True)
class _Plan:
    """A turn about to be answered: the messages that fit, their prompt, and the room behind it."""

    messages: list[Message]
    prompt: list[int]
    limit: int
    evicted: int


class ChatSession:
    """A conversation with a model.

    Args:
        model: in eval mode, on its device.
        tokenizer: the one the model was trained with.
        context: tokens that prompt and reply may fill together; at most the model's `n_positions`.
        system: the system message, or None.
        sampling: how replies are drawn; may be replaced between turns.

    Attributes:
        messages: the system message, if any, and the whole turns that are still in view.
        last: the newest `Reply`, or None.
        folder, manifest: where `load_session` found the model; None and `{}` of any other session.
    """

    def __init__(
        self,
        model: GPT2LMHeadModel,
        tokenizer: Tokenizer,
        *,
        context: int,
        system: str | None = None,
        sampling: Sampling = GREEDY,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.context = min(context, model.config.n_positions)
        self.messages: list[Message] = []
        self.last: Reply | None = None
        self.folder: Path | None = None
        self.manifest: dict = {}
        self.stop_ids = frozenset({tokenizer.end_id, tokenizer.endoftext_id})
        surplus = range(len(tokenizer), model.config.vocab_size)
        self.banned_ids = {*surplus, *tokenizer.control_ids.values()} - self.stop_ids
        self.set_system(system)

    @property
    def used(self) -> int:
        """Tokens that the history fills."""
        return len(encode_chat(self.messages, self.tokenizer)[0])

    @property
    def reserve(self) -> int:
        """Tokens of the context that are kept free for the reply."""
        return min(self.sampling.max_new_tokens or self.context // 4, self.context // 2)

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self.messages = self.messages[: self._count_system()]
        self.last = None

    def set_system(self, text: str | None) -> None:
        """Replace the system message, or take it away with None; the turns stay.

        Raises:
            BadData: when it leaves no room for a question.
        """
        turns = self.messages[self._count_system() :]
        if text is None:
            self.messages = turns
            return
        _check_message(text, "system message")
        system = Message("system", text)
        bare = len(encode_prompt([system, Message("user", "")], self.tokenizer))
        if bare >= self.context - self.reserve:
            raise BadData(
                f"system message: with it a prompt begins at {bare} tokens, and the context of "
                f"{self.context} less {self.reserve} for the reply ends before; shorten it"
            )
        self.messages = [system, *turns]

    def _count_system(self) -> int:
        return int(bool(self.messages) and self.messages[0].role == "system")

    def stream(self, text: str) -> Iterator[str]:
        """Ask, and get the reply piece by piece, no multi-byte character ever broken.

        The pieces together are the reply's text. Closing the iterator, or Ctrl-C, stops the reply:
        it is recorded as far as it came, and not at all when it had no text yet.

        Raises:
            BadData: at once, when the text cannot be asked: empty, not Unicode, or too long. The
                history stays as it was.
            Diverged: while streaming, when the model gives NaN; the history stays as it was.
        """
        return self._stream(self._plan(text))

    def _stream(self, plan: _Plan) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        ids: list[int] = []
        pieces: list[str] = []
        try:
            for token_id in self._stream_ids(plan):
                ids.append(token_id)
                if piece := decoder.decode(self.tokenizer.token_bytes(token_id)):
                    pieces.append(piece)
                    yield piece
            if piece := decoder.decode(b"", final=True):
                pieces.append(piece)
                yield piece
        except (GeneratorExit, KeyboardInterrupt):
            self._record(plan, ids, "".join(pieces))
            raise
        self._record(plan, ids, "".join(pieces))

    def _stream_ids(self, plan: _Plan) -> Iterator[int]:
        return stream_ids(
            self.model,
            plan.prompt,
            stop_ids=self.stop_ids,
            banned_ids=self.banned_ids,
            sampling=self.sampling,
            limit=plan.limit,
        )

    def ask(self, text: str) -> str:
        """Return the whole reply; errors as `stream`."""
        return "".join(self.stream(text))

    def _plan(self, text: str) -> _Plan:
        _check_message(text, "message")
        first = self._count_system()
        system, turns = self.messages[:first], self.messages[first:]
        for evicted in range(len(turns) // 2 + 1):
            messages = [*system, *turns[2 * evicted :], Message("user", text)]
            prompt = encode_prompt(messages, self.tokenizer)
            if len(prompt) <= self.context - self.reserve:
                return _Plan(messages, prompt, self.context - len(prompt), evicted)
        around = len(encode_prompt([*system, Message("user", "")], self.tokenizer))
        raise BadData(
            f"message: is {len(prompt) - around} tokens long, and at most "
            f"{self.context - self.reserve - around} fit (context {self.context}, of which "
            f"{self.reserve} are kept for the reply and {around} go to the frame); shorten it"
        )

    def _record(self, plan: _Plan, ids: list[int], text: str) -> Reply:
        stopped = ids[-1:] == [self.tokenizer.end_id]
        self.last = Reply(text, ids, stopped, plan.evicted)
        if text.strip():  # an empty turn is none: no row of the training data has one
            self.messages = [*plan.messages, Message("assistant", text)]
        return self.last


def _check_message(text: str, where: str) -> None:
    if not text.strip():
        raise BadData(f"{where}: is empty; write something")
    try:
        check_text(text, where)
    except RowError as error:
        raise BadData(f"{where}: cannot be encoded ({error}); write plain UTF-8 text") from None


def ask_many(sessions: Sequence[ChatSession], texts: Sequence[str], *, batch_size: int = 128) -> list[Reply]:
    """Ask each session its text, decoded together; what `.ask` gives one by one when greedy.

    Args:
        sessions: B sessions of one model, tokenizer and sampling, each of them once.
        texts: B questions.
        batch_size: streams decoded at once.

    Raises:
        BadData: when one of the texts cannot be asked; then nothing was asked.
    """
    if not sessions:
        return []
    one = sessions[0]
    assert all(s.model is one.model and s.sampling == one.sampling for s in sessions)
    plans = [session._plan(text) for session, text in zip(sessions, texts, strict=True)]
    replies = generate_batch(
        one.model,
        [plan.prompt for plan in plans],
        stop_ids=one.stop_ids,
        banned_ids=one.banned_ids,
        sampling=one.sampling,
        limits=[plan.limit for plan in plans],
        batch_size=batch_size,
    )
    return [
        session._record(plan, ids, session.tokenizer.decode(ids, skip_control=True))
        for session, plan, ids in zip(sessions, plans, replies, strict=True)
    ]


def load_session(
    model_dir: str | Path,
    *,
    device: str | torch.device = "cpu",
    system: str | None = None,
    sampling: Sampling = GREEDY,
) -> ChatSession:
    """Open a conversation with a trained model.

    Args:
        model_dir: a run (the finished model, or its newest whole checkpoint), one
            `checkpoint-<step>`, or a plain Hugging Face folder.
        device: where to compute.
        system, sampling: as `ChatSession`.

    Raises:
        MissingInput: when nothing is there.
        Damaged: when what is there is not whole.
        Mismatch: when tokenizer and weights do not belong together.
    """
    folder = find_checkpoint(Path(model_dir))
    tokenizer = load_tokenizer(folder)
    model = load_model(folder)
    if len(tokenizer) > model.config.vocab_size:
        raise Mismatch(
            f"{folder}: the model has {model.config.vocab_size} ids, its tokenizer with control "
            f"tokens {len(tokenizer)}; train it on conversations first (train.py --init_model_dir)"
        )
    manifest = read_manifest(folder)
    context = manifest.get("longest_row") or model.config.n_positions
    session = ChatSession(model.to(device), tokenizer, context=context, system=system, sampling=sampling)
    session.folder, session.manifest = folder, manifest
    return session
