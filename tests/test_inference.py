"""The script: one-shot, pipe and terminal; what it prints where, and how it ends."""

import fcntl
import io
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import inference
from firstwords.checkpoint import write_manifest
from firstwords.errors import BadData, BadFlag, Damaged, MissingInput
from firstwords.schema import mask_control
from firstwords.session import load_session
from firstwords.template import CHAT_TEMPLATE
from firstwords.tokenizer import BYTE_LEVEL, Tokenizer

ROOT = Path(inference.__file__).parent


class StubSession:
    """Says what it was told to, in pieces; `evicted` as listed."""

    context = 100

    def __init__(self, *replies, evicted=()):
        self.replies, self.evictions = iter(replies), iter(evicted)
        self.asked, self.resets, self.systems, self.last = [], 0, [], None

    def stream(self, text):
        if text == "too long":
            raise BadData("message: is too long; shorten it")
        self.asked.append(text)
        return self._stream()

    def _stream(self):
        yield from next(self.replies)
        self.last = SimpleNamespace(ids=[1, 2], stopped=True, evicted=next(self.evictions, 0))

    def reset(self):
        self.resets += 1

    def set_system(self, text):
        self.systems.append(text)


def pipe_in(monkeypatch, data: bytes):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def test_lines_of_a_pipe_are_answered_to_its_end(monkeypatch, capsys):
    session = StubSession(["one", " and"], ["two"])
    pipe_in(monkeypatch, b"first?\n\n   \n  second?  ")
    inference.run_lines(inference.Chat(session))
    assert session.asked == ["first?", "second?"]
    assert capsys.readouterr().out == "one and\ntwo\n"


def test_a_refused_line_is_told_and_the_others_are_answered(monkeypatch, capsys):
    session = StubSession(["ok"])
    pipe_in(monkeypatch, b"too long\nfine\n")
    with pytest.raises(BadData, match="not answered: 1"):
        inference.run_lines(inference.Chat(session))
    printed = capsys.readouterr()
    assert printed.out == "ok\n"
    assert printed.err == "error: message: is too long; shorten it\n"


def test_commands(monkeypatch, capsys):
    session = StubSession(["path"], ["never"])
    lines = "/help\n/reset\n/system  Be brief. \n/system\n/rest\n/etc/passwd what?\n/quit\nHi\n"
    pipe_in(monkeypatch, lines.encode())
    inference.run_lines(inference.Chat(session))
    assert session.asked == ["/etc/passwd what?"], "a path is no command, and /quit ends"
    assert session.resets == 1
    assert session.systems == ["Be brief.", None]
    printed = capsys.readouterr()
    assert printed.out == "path\n"
    assert inference.HELP in printed.err
    assert "/rest: unknown command; did you mean '/reset'?" in printed.err


def test_control_characters_of_the_model_do_not_reach_the_terminal(capsys):
    everything = "".join(map(chr, range(256)))
    inference.Chat(StubSession(["\x1b[31mred\x9b0m\x07", everything])).answer("Hi")
    out = capsys.readouterr().out
    harmless = {*"\t\n", *map(chr, range(32, 127)), *map(chr, range(160, 256))}
    visible = "".join(c if c in harmless else "\ufffd" for c in everything)
    assert out == f"\ufffd[31mred\ufffd0m\ufffd{visible}\n"


def test_ctrl_c_while_printing_closes_the_stream_at_once(monkeypatch):
    closed = []

    class Endless(StubSession):
        def _stream(self):
            try:
                while True:
                    yield "word"
            except GeneratorExit:
                closed.append(True)
                raise

    class Interrupting(io.StringIO):
        def write(self, text):
            if self.tell() > 20 and not closed:
                raise KeyboardInterrupt
            return super().write(text)

    monkeypatch.setattr(sys, "stdout", Interrupting())
    with pytest.raises(KeyboardInterrupt) as caught:  # its traceback keeps the stream alive
        inference.Chat(Endless()).answer("Hi")
    assert closed, "the session must record the turn before the next prompt"
    assert caught.tb


def test_eviction_is_told_once_a_conversation(capsys):
    chat = inference.Chat(StubSession(*["x"] * 6, evicted=[0, 1, 2, 1, 0, 1]))
    told = []
    for turn in range(6):
        if turn == 4:
            chat.take("/reset")
        capsys.readouterr()
        chat.answer("?")
        told.append("oldest turns are dropped" in capsys.readouterr().err)
    assert told == [False, True, False, False, False, True]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A run with one checkpoint of a tiny model with random weights."""
    run = tmp_path_factory.mktemp("runs") / "chat"
    folder = run / "checkpoint-20"
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(BYTE_LEVEL, [bytes([value]) for value in range(256)])
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=tokenizer.vocab_size_padded,
        bos_token_id=tokenizer.endoftext_id,
        eos_token_id=tokenizer.end_id,
        n_embd=16,
        n_layer=1,
        n_head=1,
        n_positions=128,
        initializer_range=0.5,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save(folder, chat_template=CHAT_TEMPLATE)
    write_manifest(folder, {"step": 20, "longest_row": 100})
    return run


def test_prompts_continue_one_conversation(model_dir, capsys):
    flags = ["--model_dir", str(model_dir), "--device", "cpu", "--max_new_tokens", "8"]
    flags += ["--system", "S", "--temperature=0.9", "--seed=3", "--top-k", "40"]
    inference.main([*flags, "--prompt", "Hi", "--prompt", "  ", "--prompt", "/help"])
    printed = capsys.readouterr()
    session = load_session(
        model_dir,
        system="S",
        sampling=inference.build_sampling(inference.parse_flags(flags)),
    )
    assert session.sampling.temperature == 0.9
    assert (session.sampling.seed, session.sampling.top_k) == (3, 40)
    replies = [session.ask(text) for text in ("Hi", "/help")]
    assert len(session.messages) == 5
    clean = [mask_control(reply) for reply in replies]
    assert printed.out == f"{clean[0]}\n{clean[1]}\n"
    first_line = printed.err.splitlines()[0]
    assert first_line.startswith(f"loaded {model_dir / 'checkpoint-20'}: step 20, ")
    assert first_line.endswith("context 100 tokens, on cpu")


def test_one_shot_refuses_at_once(model_dir):
    flags = ["--model_dir", str(model_dir), "--prompt", "x" * 200, "--prompt", "Hi"]
    with pytest.raises(BadData, match="is 200 tokens long, and at most 72 fit"):
        inference.main(flags)


def test_device_auto_says_what_it_took(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert inference.pick_device("auto") == ("cpu", " (auto: no GPU found)")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert inference.pick_device("auto") == ("mps", " (auto)")
    assert inference.pick_device("cpu") == ("cpu", "")
    with pytest.raises(BadFlag, match="--device cuda: torch .* finds none here"):
        inference.pick_device("cuda")


def test_bad_input(model_dir, tmp_path):
    def refuse(error, match, *flags):
        with pytest.raises(error, match=match):
            inference.main(["--device=cpu", "--prompt=Hi", *flags])

    refuse(MissingInput, "did you mean 'chat'", f"--model_dir={model_dir.parent / 'caht'}")
    refuse(MissingInput, "holds no checkpoint yet", f"--model_dir={tmp_path}")
    refuse(BadFlag, "did you mean '--temperature'", "--model_dir=x", "--temprature=1")
    refuse(BadFlag, "--temperature: is -1.0", f"--model_dir={model_dir}", "--temperature=-1")
    refuse(BadFlag, "--device", "--model_dir=x", "--device=tpu")
    refuse(BadFlag, "model_dir")
    damaged = tmp_path / "run" / "checkpoint-7"
    damaged.mkdir(parents=True)
    (damaged / "config.json").write_text("{}")
    write_manifest(damaged, {"step": 7})
    (damaged / "config.json").write_text("{ }")
    refuse(Damaged, "config.json", f"--model_dir={damaged.parent}")


def run_script(code, *options, **kwargs):
    return subprocess.run(
        [sys.executable, "-c", code, *options], cwd=ROOT, capture_output=True, text=True, **kwargs
    )


def test_help_answers_without_torch():
    code = "import sys, inference, contextlib\nwith contextlib.suppress(SystemExit):"
    code += "\n inference.main(['--help'])\nassert not {'torch', 'transformers'} & set(sys.modules)"
    done = run_script(code)
    assert done.returncode == 0, done.stderr
    assert "--temperature" in done.stdout


# The terminal: the script's own loop on a pseudo terminal, with a session that talks for a minute.
TALKER = """
import sys, time
from types import SimpleNamespace
import inference
from firstwords.args import run_main

class Talker:
    context, last = 100, SimpleNamespace(ids=[], stopped=True, evicted=0)
    def stream(self, text):
        if text != "long":
            yield f"<{text}>"
            return
        for number in range(6000):
            yield f"word{number} "
            time.sleep(0.01)

run_main(lambda argv: inference.run_repl(inference.Chat(Talker())))
"""
PROMPT_READY = b"\x1b[?2004h"  # prompt_toolkit turns bracketed paste on when it begins to read


def take_terminal():
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a test run in the background ignores it


class Terminal:
    """A program on a pseudo terminal of its own, so that 0x03 typed there is a real Ctrl-C."""

    def __init__(self):
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", TALKER],
            cwd=ROOT,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"},
            start_new_session=True,
            preexec_fn=take_terminal,
        )
        os.close(slave)
        self.seen = b""

    def type(self, text):
        os.write(self.master, text.encode())

    def wait_for(self, mark, seconds=20.0):
        """Read up to and including `mark`; return what came before, and the seconds it took."""
        start = time.monotonic()
        while mark not in self.seen:
            left = start + seconds - time.monotonic()
            assert left > 0, f"no {mark!r} in {self.seen[-300:]!r}"
            if select.select([self.master], [], [], left)[0]:
                self.seen += os.read(self.master, 65536)
        before, _, self.seen = self.seen.partition(mark)
        return before, time.monotonic() - start

    def end(self):
        """Return the exit code of a program that ends by itself."""
        deadline = time.monotonic() + 20
        while self.process.poll() is None and time.monotonic() < deadline:
            if select.select([self.master], [], [], 0.05)[0]:
                try:
                    self.seen += os.read(self.master, 65536)
                except OSError:  # the other side is closed
                    break
        return self.process.wait(5)


@pytest.fixture
def terminal():
    opened = Terminal()
    yield opened
    if opened.process.poll() is None:
        opened.process.send_signal(signal.SIGKILL)
        opened.process.wait()
    os.close(opened.master)


def test_ctrl_c_stops_the_reply_and_not_the_program(terminal):
    terminal.wait_for(PROMPT_READY)
    for _ in range(3):
        terminal.type("long\r")
        terminal.wait_for(b"word20 ")
        terminal.type("\x03")
        before, seconds = terminal.wait_for(PROMPT_READY)
        assert b"(stopped)" in before
        assert seconds < 5, "the reply alone would go on for a minute"
    terminal.type("still here\r")
    terminal.wait_for(b"<still here>")
    terminal.wait_for(PROMPT_READY)
    terminal.type("\x04")
    assert terminal.end() == 0


def test_ctrl_c_at_the_prompt_clears_the_line_and_twice_leaves(terminal):
    terminal.wait_for(PROMPT_READY)
    for text in ("abc", "def"):
        terminal.type(text)
        terminal.wait_for(text.encode())
        terminal.type("\x03")
        terminal.wait_for(PROMPT_READY)
    terminal.type("x\r")
    terminal.wait_for(b"<x>")
    terminal.wait_for(PROMPT_READY)
    terminal.type("\x03")
    terminal.wait_for(PROMPT_READY)
    terminal.type("\x03")
    assert terminal.end() == 130
