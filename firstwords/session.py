"""One conversation with a model: text in, text out, the history kept within the context.

    session = load_session("runs/chat")
    session.ask("What does os.getcwd do?")  ->  "Return a unicode string representing the ..."
    session.ask("What are its arguments?")  ->  answered with the turn before in view

Rules. The context is the longest row that was trained. Of it a part is kept free for the reply:
`max_new_tokens`, or a quarter of the context when that is not set, never more than half. When the
turns so far do not fit, the oldest whole turns (a question with its answer) are out of the model's
view; the system message stays. A turn is recorded when its reply holds text, though it were stopped
half-way; else the history stays as it was. Invariant: `messages` is the system message, if any, and
whole turns, the newest 1,000 of them.
"""

import codecs
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from transformers import GPT2LMHeadModel

from firstwords.checkpoint import (
    find_checkpoint,
    find_context,
    list_checkpoints,
    load_model,
    read_manifest,
)
from firstwords.errors import BadData, Damaged, Mismatch, MissingInput
from firstwords.generate import GREEDY, Choice, Sampling, generate_batch, rank_ids, stream_ids
from firstwords.schema import Message, RowError, check_text
from firstwords.template import encode_chat, encode_prompt
from firstwords.tokenizer import Tokenizer, load_tokenizer

# Characters beyond which a text is measured by them before it is encoded: 100 MB would take half a minute.
LONG_TEXT = 1_000_000

# Turns that are kept, so that a chat of days takes no more memory than one of an hour.
KEPT_TURNS = 1000


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back in one turn.

    Attributes:
        text: without control tokens; bytes that are no UTF-8 became U+FFFD.
        prompt: the ids that the model read.
        ids: as generated, the stop id included.
        stopped: ended by itself with `<|end|>`; False when cut by a limit or an interrupt.
        evicted: turns (a question with its answer) that were out of view for want of room.
    """

    text: str
    prompt: list[int]
    ids: list[int]
    stopped: bool
    evicted: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A turn about to be answered: all messages, the prompt of those in view, and the room behind it."""

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
        messages: the system message, if any, and the newest `KEPT_TURNS` whole turns, the oldest of
            which may be out of view.
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
        self.longest_token = max(map(len, tokenizer.vocabulary))
        self.set_system(system)

    @property
    def used(self) -> int:
        """Tokens of the history that the next prompt will hold, as far as can be known before it."""
        system = self.messages[: self._count_system()]
        frame = len(encode_prompt([*system, Message("user", "")], self.tokenizer))
        sizes = self._measure_view(self.context - self.reserve - frame)
        return len(encode_chat(system, self.tokenizer)[0]) + sum(sizes)

    @property
    def reserve(self) -> int:
        """Tokens of the context that are kept free for the reply."""
        return min(self.sampling.max_new_tokens or self.context // 4, self.context // 2)

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self.messages = self.messages[: self._count_system()]
        self.last = None

    def undo(self) -> str | None:
        """Forget the newest turn and return its question; None when there is none."""
        if len(self.messages) == self._count_system():
            return None
        *self.messages, question, _ = self.messages
        self.last = None
        return question.content

    def restore(self, messages: Sequence[Message]) -> None:
        """Go on with another conversation in place of this one.

        Args:
            messages: as `schema.parse_conversation` returns them, or as another session has them.

        Raises:
            BadData: when its system message leaves no room for a question; nothing is changed then.
        """
        has_system = bool(messages) and messages[0].role == "system"
        self.set_system(messages[0].content if has_system else None)
        self.messages = list(messages)
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
        return self._stream(self.plan(text))

    def _stream(self, plan: Plan) -> Iterator[str]:
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

    def _stream_ids(self, plan: Plan) -> Iterator[int]:
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

    def plan(self, text: str) -> Plan:
        _check_message(text, "message")
        first = self._count_system()
        system, turns = self.messages[:first], self.messages[first:]
        question = Message("user", text)
        around = len(encode_prompt([*system, Message("user", "")], self.tokenizer))
        room = self.context - self.reserve - around
        if len(text) > max(LONG_TEXT, room * self.longest_token):
            raise self._refuse_length(f"{len(text):,} characters", room, around)
        size = len(encode_prompt([*system, question], self.tokenizer)) - around
        if size > room:
            raise self._refuse_length(f"{size:,} tokens", room, around)
        evicted = len(turns) // 2 - len(self._measure_view(room - size))
        prompt = encode_prompt([*system, *turns[2 * evicted :], question], self.tokenizer)
        return Plan([*self.messages, question], prompt, self.context - len(prompt), evicted)

    def _refuse_length(self, length: str, room: int, around: int) -> BadData:
        return BadData(
            f"message: is {length} long, and at most {room} tokens fit (context {self.context}, of which "
            f"{self.reserve} are kept for the reply and {around} go to the frame); shorten it"
        )

    def _measure_view(self, room: int) -> list[int]:
        """Return the tokens of the newest whole turns that fit into `room`; no older one is looked at."""
        sizes: list[int] = []
        for place in range(len(self.messages) - 2, self._count_system() - 1, -2):
            size = len(encode_chat(self.messages[place : place + 2], self.tokenizer)[0])
            if size > room:
                break
            room -= size
            sizes.append(size)
        return sizes

    def _record(self, plan: Plan, ids: list[int], text: str) -> Reply:
        stopped = ids[-1:] == [self.tokenizer.end_id]
        self.last = Reply(text, plan.prompt, ids, stopped, plan.evicted)
        if text.strip():  # an empty turn is none: no row of the training data has one
            self.messages = [*plan.messages, Message("assistant", text)]
            first = self._count_system()
            del self.messages[first : max(first, len(self.messages) - 2 * KEPT_TURNS)]
        return self.last

    def explain(self, num_others: int) -> list[Choice]:
        """Return how probable each token of the last reply was, and what else it might have been.

        Args:
            num_others: the likeliest other tokens that are named beside each.
        """
        if self.last is None:
            return []
        return rank_ids(
            self.model, self.last.prompt, self.last.ids, banned_ids=self.banned_ids, num_others=num_others
        )


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
    plans = [session.plan(text) for session, text in zip(sessions, texts, strict=True)]
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


def ask_each(
    session: ChatSession, texts: Iterable[str], *, batch_size: int = 64
) -> Iterator[tuple[str, Reply | BadData]]:
    """Ask each text in a conversation of its own; `batch_size` of them are decoded together.

    Args:
        session: lends its model, system message and sampling, and stays as it is.

    Yields:
        `(text, reply)` in order; why a text cannot be asked stands in the reply's place.
    """
    waiting = iter(texts)
    while batch := list(islice(waiting, batch_size)):
        answers = [_open_own(session, text) for text in batch]
        asked = [place for place, answer in enumerate(answers) if isinstance(answer, ChatSession)]
        replies = ask_many([answers[place] for place in asked], [batch[place] for place in asked])
        for place, reply in zip(asked, replies, strict=True):
            answers[place] = reply
        yield from zip(batch, answers, strict=True)


def _open_own(session: ChatSession, text: str) -> ChatSession | BadData:
    """Return a session without turns that can be asked the text, or why it cannot."""
    own = ChatSession(session.model, session.tokenizer, context=session.context, sampling=session.sampling)
    own.messages = session.messages[: session._count_system()]
    try:
        own.plan(text)
    except BadData as error:
        return error
    return own


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
    while True:
        there = list_checkpoints(Path(model_dir))
        try:
            session = _load_session(find_checkpoint(Path(model_dir)), device)
        except (Damaged, MissingInput, OSError):
            # A training that goes on may prune the checkpoint that is being read; then there is a newer.
            if list_checkpoints(Path(model_dir)) == there:
                raise
        else:
            session.sampling = sampling
            session.set_system(system)
            return session


def _load_session(folder: Path, device: str | torch.device) -> ChatSession:
    tokenizer = load_tokenizer(folder)
    model = load_model(folder)
    if len(tokenizer) > model.config.vocab_size:
        raise Mismatch(
            f"{folder}: the model has {model.config.vocab_size} ids, its tokenizer with control "
            f"tokens {len(tokenizer)}; train it on conversations first (train.py --init_model_dir)"
        )
    manifest = read_manifest(folder)
    session = ChatSession(model.to(device), tokenizer, context=find_context(manifest, model.config))
    session.folder, session.manifest = folder, manifest
    return session


class Follower:
    """Moves a conversation to each new complete checkpoint of a run that is still training.

    Args:
        run_dir: the run.
        load: opens a session on the newest checkpoint of it, as `load_session` does.
    """

    def __init__(self, run_dir: Path, load: Callable[[], ChatSession]):
        self.run_dir = run_dir
        self.load = load
        self.tried = 0

    def find_newest(self) -> int:
        """Return the step of the newest complete checkpoint, 0 when there is none."""
        return max((int(path.name.rpartition("-")[2]) for path in list_checkpoints(self.run_dir)), default=0)

    def has_newer(self, session: ChatSession) -> bool:
        """Tell whether there is a checkpoint beyond the session's step that was not tried yet."""
        return self.find_newest() > max(self.tried, session.manifest.get("step", 0))

    def move(self, session: ChatSession) -> ChatSession:
        """Return `session`, or one of a newer step with its conversation and sampling.

        Raises:
            Damaged, MissingInput, Mismatch: when a new checkpoint cannot be loaded; it is not tried again.
        """
        if not self.has_newer(session):
            return session
        self.tried = self.find_newest()
        newer = self.load()
        if newer.manifest.get("step", 0) <= session.manifest.get("step", 0):
            return session  # the newest is damaged, and what was loaded in its place is known
        newer.sampling = session.sampling
        newer.restore(session.messages)
        return newer
