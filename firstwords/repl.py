"""A chat by lines: questions and commands.

    chat = Chat(session, write=write, say=say)
    chat.take("What does `os.getcwd` do?")      the reply goes to `write`, piece by piece
    chat.take("/undo")                          what a command answers goes to `say`

Invariant: a line that is refused changes nothing. Nothing here prints: what the model says goes to
`write`, with U+FFFD for what a terminal would act on, and everything else to `say(text, style)`.
"""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

from firstwords import atomic
from firstwords.errors import (
    BadData,
    BadFlag,
    CannotCreate,
    FirstwordsError,
    IOFailed,
    MissingInput,
    suggest,
)
from firstwords.generate import Choice
from firstwords.schema import (
    RowError,
    conversation_row,
    format_row,
    mask_control,
    parse_conversation,
    read_jsonl,
)
from firstwords.session import ChatSession, Follower
from firstwords.tokenizer import Tokenizer

# What a line can be refused with; anything else ends the program.
REFUSED = (BadData, CannotCreate, IOFailed, MissingInput)

COMMANDS = {
    "/help": ("", "this list"),
    "/system": ("[TEXT]", "set the system message; without TEXT take it away"),
    "/undo": ("", "take the last turn back"),
    "/retry": ("", "ask the last question again"),
    "/edit": ("[TEXT]", "ask something else in place of the last question"),
    "/why": ("[N]", "the last reply's tokens, how probable each was, and N others (2)"),
    "/temp": ("[NUMBER]", "show or set the temperature; 0 is greedy"),
    "/seed": ("[NUMBER|off]", "show, set or take away the seed of the draws"),
    "/save": ("[FILE]", "write the conversation, in the form of prep_data.py's rows"),
    "/load": ("FILE", "go on with a conversation that /save wrote"),
    "/reset": ("", "forget the conversation; the system message stays"),
    "/quit": ("", "leave (also Ctrl-D)"),
}
KEYS = """\
Alt-Enter, or Esc and Enter, begins a new line in a question. The arrows and Ctrl-R find earlier lines.
Ctrl-C stops the reply; at the prompt it clears the line, and twice in a row it leaves."""
HELP = "\n".join([*(f"{f'{name} {hint}':<20}{text}" for name, (hint, text) in COMMANDS.items()), KEYS])


class Chat:
    """A session that takes lines and answers them.

    Args:
        session: the conversation.
        write: takes the text of replies as it comes.
        say: takes a remark and its style: "" for what was asked for, "dim", "warn" or "error".
        follower: finds newer checkpoints to go over to; None stays with the model.
        tells_speed: say tokens a second behind each reply.

    Attributes:
        draft: the question that the next line is to replace, as /edit wants it; else None.
    """

    def __init__(
        self,
        session: ChatSession,
        *,
        write: Callable[[str], None],
        say: Callable[[str, str], None],
        follower: Follower | None = None,
        tells_speed: bool = False,
    ):
        self.session = session
        self.write = write
        self.say = say
        self.follower = follower
        self.tells_speed = tells_speed
        self.told_eviction = False
        self.draft: str | None = None
        self.withdrawn: str | None = None  # the last question, when its turn is not in the history
        self.file: Path | None = None  # the conversation's own, which /save may write again

    def take(self, line: str) -> bool:
        """Do what one line asks, a command or a question; return False when it is to leave.

        Raises:
            BadData, CannotCreate, IOFailed, MissingInput: when it cannot be done; nothing is changed then.
        """
        line = line.strip()
        command, _, argument = line.partition(" ")
        draft, self.draft = self.draft, None
        if command == "/quit":
            return False
        if command[:1] == "/" and command[1:].isidentifier():
            self._run_command(command, argument.strip())
        elif line:
            self.follow()
            self.answer(line) if draft is None else self._answer_instead(line)
        elif draft is not None:
            self.say("(left as it was)", "dim")
        return True

    def answer(self, text: str) -> None:
        """Write the reply as it comes; Ctrl-C stops it and is passed on.

        Raises:
            BadData: when the text cannot be asked.
        """
        before, start = self.session.messages, time.monotonic()
        pieces = self.session.stream(text)
        try:
            for piece in pieces:
                self.write(mask_control(piece))
        finally:
            pieces.close()
            self.write("\n")
            self.withdrawn = text if self.session.messages is before else None
        self._comment(time.monotonic() - start)

    def _comment(self, seconds: float) -> None:
        reply = self.session.last
        if reply.evicted and not self.told_eviction:
            self.told_eviction = True
            text = f"(context of {self.session.context} tokens full: the oldest turns are out of its view)"
            self.say(text, "warn")
        if not reply.stopped:
            self.say(f"(the reply did not end by itself: {len(reply.ids)} tokens)", "warn")
        if self.tells_speed:
            rate = len(reply.ids) / max(seconds, 1e-9)
            self.say(f"({len(reply.ids)} tokens, {rate:,.0f} tokens/s)", "dim")

    def _answer_instead(self, text: str) -> None:
        """Ask in place of the last question."""
        before = self.session.messages
        if self.withdrawn is None:
            self.session.undo()
        try:
            self.answer(text)
        except BadData:
            self.session.restore(before)
            raise

    def follow(self) -> None:
        """Go over to a newer checkpoint, when a run is followed and has one, and say so."""
        if self.follower is None:
            return
        try:
            newer = self.follower.move(self.session)
        except FirstwordsError as error:
            self.say(f"error: {error}", "error")
            return
        if newer is not self.session:
            self.session = newer
            self.say(f"(now step {newer.manifest['step']:,})", "dim")

    def _run_command(self, command: str, argument: str) -> None:
        if command not in COMMANDS:
            raise BadData(f"{command}: unknown command; {suggest(command, list(COMMANDS))}")
        if argument and not COMMANDS[command][0]:
            raise BadData(f"{command}: takes nothing behind it, but there is {argument!r}; leave it out")
        getattr(self, f"_run_{command[1:]}")(argument)

    def _run_help(self, _: str) -> None:
        self.say(HELP, "")

    def _run_reset(self, _: str) -> None:
        self.session.reset()
        self._begin_anew()
        self.say("(forgotten)", "dim")

    def _begin_anew(self) -> None:
        self.told_eviction, self.withdrawn, self.file = False, None, None

    def _run_system(self, argument: str) -> None:
        self.session.set_system(argument or None)
        self.say("(system message set)" if argument else "(no system message)", "dim")

    def _run_undo(self, _: str) -> None:
        question = self.session.undo()
        if question is None:
            raise BadData("/undo: there is no turn to take back; ask something first")
        self.withdrawn = question
        self.say(f"(taken back: {_shorten(question)})", "dim")

    def _run_retry(self, _: str) -> None:
        question = self._find_question("/retry")
        sampling = self.session.sampling
        if sampling.temperature == 0:
            self.say("(greedy: the same words again; /temp 0.8 draws others)", "dim")
        elif sampling.seed is not None:
            self.say(f"(seed {sampling.seed}: the same words again; /seed off draws others)", "dim")
        self.follow()
        self._answer_instead(question)

    def _run_edit(self, argument: str) -> None:
        question = self._find_question("/edit")
        if argument:
            self.follow()
            self._answer_instead(argument)
        else:
            self.draft = question
            self.say(f"(the next line takes the place of: {_shorten(question)})", "dim")

    def _find_question(self, command: str) -> str:
        questions = [message.content for message in self.session.messages if message.role == "user"]
        if self.withdrawn is None and not questions:
            raise BadData(f"{command}: nothing was asked yet; write a question")
        return self.withdrawn or questions[-1]

    def _run_why(self, argument: str) -> None:
        num_others = int(_parse_number("/why", argument, 0, 20)) if argument else 2
        choices = self.session.explain(num_others)
        if not choices:
            raise BadData("/why: there is no reply of this model yet; ask something first")
        for choice in choices:
            likely = choice.probability >= 0.5
            self.say(_format_choice(choice, self.session.tokenizer), "" if likely else "warn")

    def _run_temp(self, argument: str) -> None:
        if argument:
            self._set_sampling("/temp", temperature=_parse_number("/temp", argument, 0, math.inf))
        temperature = self.session.sampling.temperature
        self.say(f"(temperature {temperature:g}{'' if temperature else ', greedy'})", "dim")

    def _run_seed(self, argument: str) -> None:
        if argument == "off":
            self._set_sampling("/seed", seed=None)
        elif argument:
            self._set_sampling("/seed", seed=int(_parse_number("/seed", argument, 0, 2**53)))
        seed = self.session.sampling.seed
        self.say("(no seed: drawn anew each time)" if seed is None else f"(seed {seed})", "dim")

    def _set_sampling(self, command: str, **values) -> None:
        try:
            self.session.sampling = replace(self.session.sampling, **values)
        except BadFlag as error:
            raise BadData(f"{command}{str(error).partition(':')[2]}") from None

    def _run_save(self, argument: str) -> None:
        path = Path(argument).expanduser() if argument else self.file
        if path is None:
            raise BadData("/save: names no file; write one behind it")
        turns = sum(message.role == "user" for message in self.session.messages)
        if not turns:
            raise BadData("/save: nothing was said yet; ask something first")
        if not path.parent.is_dir():
            raise MissingInput(f"/save {path}: there is no folder {path.parent}; make it, or name another")
        if path.exists() and path != self.file:
            raise CannotCreate(f"/save {path}: is there already; name another file")
        atomic.write_text(path, format_row(conversation_row(self.session.messages)))
        self.file = path
        self.say(f"(turns in {path}: {turns})", "dim")

    def _run_load(self, argument: str) -> None:
        if not argument:
            raise BadData("/load: names no file; write one behind it")
        path = Path(argument).expanduser()
        messages = _read_conversation(path)
        self.session.restore(messages)
        self._begin_anew()
        self.file = path
        self.say(f"(turns from {path}: {sum(message.role == 'user' for message in messages)})", "dim")


def _read_conversation(path: Path) -> list:
    """Return the one conversation of a file.

    Raises:
        MissingInput: when there is no such file.
        BadData: when it holds something else.
        IOFailed: when it cannot be read.
    """
    if not path.is_file():
        near = suggest(path.name, [p.name for p in path.parent.glob("*") if p.is_file()])
        raise MissingInput(f"/load {path}: is no file; {near}")
    try:
        rows = [row for _, row in islice(read_jsonl(path), 2)]
        if rows and isinstance(rows[0], RowError):
            raise rows[0]
        if len(rows) != 1:
            count = "more than one conversation" if rows else "no conversation"
            raise BadData(f"/load {path}: holds {count}; name a file that /save wrote")
        return parse_conversation(rows[0])
    except RowError as error:
        raise BadData(f"/load {path}: {error}; name a file that /save wrote") from None
    except OSError as error:
        raise IOFailed(f"/load {path}: cannot be read ({error.strerror}); name another") from None


def _parse_number(command: str, text: str, least: float, most: float) -> float:
    """Return a number of the range; counts and seeds, whose range ends, are whole ones."""
    try:
        number = float(text) if most == math.inf else int(text)
    except ValueError:
        number = math.nan
    if not least <= number <= most or number == math.inf:
        kind = f"a number from {least} on" if most == math.inf else f"a whole number from {least} to {most}"
        raise BadData(f"{command}: is {_shorten(text)}; give {kind}")
    return number


def _shorten(text: str) -> str:
    """Return text of a user or model on one short line, harmless to a terminal."""
    text = mask_control(" ".join(text.split()))
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _format_choice(choice: Choice, tokenizer: Tokenizer) -> str:
    others = "  ".join(f"{_name_token(i, tokenizer)} {_percent(p)}" for i, p in choice.others)
    return (
        f"{_name_token(choice.token_id, tokenizer):<20} {_percent(choice.probability):>7}   {others}".rstrip()
    )


def _percent(probability: float) -> str:
    return f"{100 * probability:.1f} %"


def _name_token(token_id: int, tokenizer: Tokenizer) -> str:
    """Return a token as Python would write it: of a part of a character, its bytes."""
    data = tokenizer.token_bytes(token_id)
    if not data:
        return tokenizer.decode([token_id])
    try:
        return repr(data.decode("utf-8"))
    except UnicodeDecodeError:
        return repr(data)
