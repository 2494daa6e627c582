"""The prompt of a terminal: line editing, the lines of earlier chats, and a meter of the context.

    [212 used, 812 left] you> What does `os.getcwd` do?

While the prompt waits, a followed run is looked at every second, and what is said of it appears above.
"""

import asyncio
import os
from contextlib import suppress
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.application.run_in_terminal import in_terminal
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.styles import Style

from firstwords.repl import COMMANDS, REFUSED, Chat
from firstwords.session import ChatSession


def run_repl(chat: Chat, history_file: Path, *, coloured: bool) -> None:
    """Chat on the terminal until /quit, Ctrl-D, or Ctrl-C twice in a row, which exits with 130."""
    prompts = _open_prompts(_open_history(history_file, chat), coloured)
    while (line := _read_line(prompts, chat)) is not None:
        try:
            if not chat.take(line):
                break
        except KeyboardInterrupt:
            chat.say("(stopped)", "dim")
        except REFUSED as error:
            chat.say(f"error: {error}", "error")


def find_history_file() -> Path:
    """Return where the lines of earlier chats are kept, as the XDG base directories say."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "firstwords" / "history"


class _History(FileHistory):
    """A history whose file may fail: neither a full disk nor a byte that is no text ends a chat."""

    def store_string(self, string: str) -> None:
        with suppress(OSError, UnicodeEncodeError):
            super().store_string(string)


def _open_history(path: Path, chat: Chat) -> History:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # What people say to a model is nobody else's business.
        os.close(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600))
    except OSError as error:
        chat.say(f"(this chat's lines are not kept: {path}: {error.strerror})", "warn")
        return InMemoryHistory()
    return _History(str(path))


def _open_prompts(history: History, coloured: bool) -> PromptSession:
    keys = KeyBindings()

    @keys.add("enter", filter=has_focus(DEFAULT_BUFFER))
    def accept(event) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def begin_line(event) -> None:
        event.current_buffer.insert_text("\n")

    return PromptSession(
        history=history,
        key_bindings=keys,
        multiline=True,
        prompt_continuation=lambda width, *_: " " * width,
        completer=WordCompleter(list(COMMANDS), sentence=True),
        complete_while_typing=False,
        style=Style.from_dict({"meter": "ansibrightblack", "you": "ansigreen bold"} if coloured else {}),
    )


def _read_line(prompts: PromptSession, chat: Chat) -> str | None:
    """Return the next line from the terminal, or None at Ctrl-D."""

    async def watch() -> None:
        while True:
            await asyncio.sleep(1)
            if chat.follower.has_newer(chat.session):
                async with in_terminal():
                    chat.follow()
                prompts.message = _build_message(chat.session)

    def start_watching() -> None:
        if chat.follower:
            get_app().create_background_task(watch())

    interrupts = 0
    while interrupts < 2:
        prompts.message = _build_message(chat.session)
        try:
            return prompts.prompt(default=chat.draft or "", pre_run=start_watching)
        except EOFError:
            return None
        except KeyboardInterrupt:
            chat.draft = None
            interrupts = 1 if prompts.default_buffer.text else interrupts + 1
    raise SystemExit(130)


def _build_message(session: ChatSession) -> list[tuple[str, str]]:
    used = session.used
    meter = f"[{used:,} used, {session.context - used:,} left] "
    return [("class:meter", meter), ("class:you", "you> ")]
