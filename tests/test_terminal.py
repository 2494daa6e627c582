"""The prompt of a terminal, on a pseudo terminal: editing, history, the meter, colours, Ctrl-C."""

import re
import stat

import pytest
from typed import PROMPT_READY, Terminal

# The script's own chat with a session that talks for a minute, or says what it was asked.
TALKER = """
import sys, time
from types import SimpleNamespace
import inference
from firstwords.args import run_main
from firstwords.schema import Message
from firstwords.session import ChatSession

class Talker(ChatSession):
    def __init__(self, step=0):
        self.context, self.last, self.messages, self.manifest = 1000, None, [], {"step": step}
    used = property(lambda self: sum(len(m.content) for m in self.messages))
    def stream(self, text):
        if not text.isprintable() and "\\n" not in text:
            from firstwords.session import _check_message
            _check_message(text, "message")
        return self._talk(text)
    def _talk(self, text):
        self.last = SimpleNamespace(ids=[1] * 5, stopped=True, evicted=0)
        if text != "long":
            self.messages = [*self.messages, Message("user", text), Message("assistant", text)]
            yield f"<{text!r}>"
            return
        for number in range(6000):
            yield f"word{number} "
            time.sleep(0.01)
    def _count_system(self):
        return 0

class Growing:
    looks = 0
    def has_newer(self, session):
        self.looks += 1
        return session.manifest["step"] == 0 and self.looks > 2
    def move(self, session):
        if not self.has_newer(session):
            return session
        newer = Talker(400)
        newer.messages = session.messages
        return newer

def chat(argv):
    flags = inference.parse_flags(["--model_dir=x", *argv])
    inference.talk(Talker(), Growing() if flags.follow else None, flags.history_file)

run_main(chat)
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Return a function that starts the program on a terminal and waits for its prompt."""
    opened = []
    state = tmp_path_factory.mktemp("state")

    def start(*flags, **environment):
        terminal = Terminal("-c", TALKER, *flags, **{"XDG_STATE_HOME": str(state), **environment})
        opened.append(terminal)
        terminal.greeting, _ = terminal.wait_for(PROMPT_READY)
        return terminal

    start.state = state
    yield start
    for terminal in opened:
        terminal.close()


@pytest.fixture(scope="module")
def open_terminal(start):
    """Return a terminal that the tests share; starting takes seconds."""
    return start()


@pytest.fixture
def terminal(open_terminal):
    """Return the shared terminal with a fresh conversation."""
    open_terminal.answer("/reset\r")
    return open_terminal


def plain(terminal):
    """Return what stands on the terminal at the prompt, without colours."""
    terminal.type("=")
    seen = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", terminal.wait_for(b"=")[0])
    terminal.type("\x15")
    return seen


def test_ctrl_c_stops_the_reply_and_not_the_program(terminal):
    for _ in range(3):
        terminal.type("long\r")
        terminal.wait_for(b"word20 ")
        terminal.type("\x03")
        before, seconds = terminal.wait_for(PROMPT_READY)
        assert b"(stopped)" in before
        assert seconds < 5, "the reply alone would go on for a minute"
    assert b"<'still here'>" in terminal.answer("still here\r")


def test_ctrl_c_at_the_prompt_clears_the_line(terminal):
    for text in ("abc", "def"):
        terminal.type(text)
        terminal.wait_for(text.encode())
        terminal.type("\x03")
        terminal.wait_for(PROMPT_READY)
    assert b"<'x'>" in terminal.answer("x\r")


def test_the_meter_and_the_speed(terminal):
    assert b"[0 used, 1,000 left]" in plain(terminal)
    assert b"(5 tokens, " in terminal.answer("abc\r")
    assert b"[6 used, 994 left]" in plain(terminal)


def test_a_question_of_several_lines_is_one_question(terminal):
    assert b"<'one\\ntwo'>" in terminal.answer("one\x1b\rtwo\r")
    assert b"<'a\\nb'>" in terminal.answer("\x1b[200~a\nb\x1b[201~\r"), "pasted"


def test_editing_keys_and_the_line_before(terminal):
    assert b"<'Xabd'>" in terminal.answer("abc\x7fd\x01X\r")
    assert b"<'Xabd'>" in terminal.answer("\x1b[A\r")


def test_edit_puts_the_last_question_into_the_line(terminal):
    terminal.answer("abc\r")
    terminal.answer("/edit\r")
    assert b"<'abcd'>" in terminal.answer("d\r")
    assert b"[8 used" in plain(terminal), "in place of the turn before"


def test_bytes_that_are_no_text_are_refused_and_the_chat_goes_on(terminal):
    assert b"error: message: cannot be encoded" in terminal.answer(b"\xff\xfe\r")
    assert b"<'abc'>" in terminal.answer("abc\r")


COLOUR = re.compile(rb"\x1b\[[0-9;]*[1-9][0-9;]*m")


def test_a_bad_command_is_an_error_in_colour_and_the_chat_goes_on(terminal):
    seen = terminal.answer("/temp warm\r")
    assert b"error: /temp: is 'warm'; give a number from 0 on" in seen
    assert COLOUR.search(seen)
    assert b"<'abc'>" in terminal.answer("abc\r")


def test_lines_are_kept_for_the_next_chat_which_may_be_without_colour(terminal, start):
    terminal.answer("kept\r")
    other = start(NO_COLOR="1")
    assert b"<'kept'>" in other.answer("\x1b[A\r")
    seen = other.greeting + other.answer("/temp warm\r") + other.answer("abc\r")
    assert not COLOUR.search(seen)
    history = start.state / "firstwords" / "history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    other.type("\x04")
    assert other.end() == 0


def test_a_waiting_prompt_goes_over_to_a_new_checkpoint_and_needs_no_history(start, tmp_path):
    (tmp_path / "firstwords").write_text("a file where a folder belongs")
    terminal = start("--follow", XDG_STATE_HOME=str(tmp_path))
    assert b"lines are not kept" in terminal.greeting
    terminal.answer("abc\r")
    terminal.type("half a ")
    terminal.wait_for(b"(now step 400)")
    terminal.type("line\r")
    terminal.wait_for(b"<'half a line'>")


def test_ctrl_c_twice_leaves(terminal):
    terminal.type("\x03")
    terminal.wait_for(PROMPT_READY)
    terminal.type("\x03")
    assert terminal.end() == 130
