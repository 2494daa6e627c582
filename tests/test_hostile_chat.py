"""Chats that never end: 100,000 turns, a hundred interrupts, replies without an end, torn characters."""

import random
import resource
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import BYTES, build_babbler
from typed import PROMPT_DONE, PROMPT_READY, Terminal

from firstwords import session as session_module
from firstwords.errors import Diverged
from firstwords.generate import Sampling
from firstwords.schema import Message
from firstwords.session import ChatSession
from firstwords.template import CHAT_TEMPLATE, encode_prompt
from firstwords.tokenizer import BYTE_LEVEL, Tokenizer, train_bpe

ROOT = Path(__file__).parent.parent


build_model = partial(build_babbler, initializer_range=0.5)


def wrong(*values):
    """Parameters on which a check has to fail."""
    return pytest.param(*values, marks=pytest.mark.xfail(strict=True))


# --- 100,000 turns


class Counting(Tokenizer):
    """Counts the characters that it encodes."""

    encoded = 0

    def encode(self, text):
        Counting.encoded += len(text)
        return super().encode(text)


def check_flat(monkeypatch, turns, *, positions):
    """The work of the last turns is that of early ones, and no more memory is held.

    Work is counted, not timed: characters that are encoded and ids that the model has to read.
    """
    tokenizer = Counting(BYTE_LEVEL, BYTES.vocabulary)
    reply, read = [*b"fine", tokenizer.end_id], 0

    def stream(model, prompt, **_):
        nonlocal read
        read += len(prompt)
        return iter(reply)

    monkeypatch.setattr(session_module, "stream_ids", stream)
    model = build_model(n_embd=4)
    model.config.n_positions = positions
    session = ChatSession(model, tokenizer, context=positions, system="S")
    window = turns // 100
    work, sizes = [], []
    for turn in range(turns):
        if turn in (window, 2 * window, turns - window):
            work.append(-Counting.encoded - read)
            sizes.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # kilobytes
        session.ask(f"question {turn % 1000:03}")
        if turn in (2 * window - 1, turns - 1):
            work[-1] += Counting.encoded + read
    early, late = work[0], work[-1]
    assert early > 0
    assert late <= 1.5 * early, f"{late} against {early}"
    assert sizes[-1] - sizes[0] < 4096, f"{sizes} kB"
    assert session.ask("and now?") == "fine"


# A session that forgets nothing is one whose context never ends.
@pytest.mark.parametrize(("turns", "positions"), [(100_000, 64), wrong(300, 1 << 30)])
def test_100_000_turns_cost_what_the_first_ones_do(monkeypatch, turns, positions):
    check_flat(monkeypatch, turns, positions=positions)


# --- replies that never end


def check_capped(answer):
    """A model that never says <|end|> is cut within its positions, and what it said is text."""
    model = build_model(n_positions=64)
    prompt = encode_prompt([Message("user", "Hi")], BYTES)
    ids = answer(model, prompt)
    assert 0 < len(ids) <= 64 - len(prompt)


def answer_endlessly(model, prompt):
    session = ChatSession(model, BYTES, context=1 << 30, sampling=Sampling(max_new_tokens=10**9))
    session.stop_ids = frozenset()
    session.ask("Hi")
    assert not session.last.stopped
    return session.last.ids


def answer_in_the_stock_way(model, prompt):
    endless = {"max_new_tokens": 10**9, "eos_token_id": -1, "pad_token_id": 0, "do_sample": False}
    return model.generate(torch.tensor([prompt]), **endless)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("answer", [answer_endlessly, wrong(answer_in_the_stock_way)])
def test_a_reply_without_an_end_is_cut(answer):
    check_capped(answer)


def build_fixed(ids, *, spoilt=False):
    """A model that would rather say each id of a list, in that order, than anything else."""
    model = build_model(n_embd=4)
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(torch.tensor([torch.nan if spoilt else 1.0, 0, 0, 0]))
        model.transformer.wte.weight.zero_()
        model.transformer.wte.weight[ids, 0] = torch.arange(len(ids), 0, -1.0)
    return model


def say_with_us(model):
    session = ChatSession(model, BYTES, context=100, sampling=Sampling(max_new_tokens=3))
    return session.ask("Hi")


def say_in_the_stock_way(model):
    prompt = torch.tensor([encode_prompt([Message("user", "Hi")], BYTES)])
    ids = model.generate(prompt, max_new_tokens=3, do_sample=False, use_cache=False, pad_token_id=0)
    return BYTES.decode(ids[0, prompt.shape[1] :].tolist())


@pytest.mark.parametrize("say", [say_with_us, wrong(say_in_the_stock_way)])
def test_control_ids_and_surplus_ids_are_never_said(say):
    control = set(BYTES.control_ids.values()) - {BYTES.end_id, BYTES.endoftext_id}
    surplus = range(len(BYTES), BYTES.vocab_size_padded)
    assert say(build_fixed([*surplus, *control, ord("a")])) == "aaa"


@pytest.mark.parametrize("say", [say_with_us, wrong(say_in_the_stock_way)])
def test_a_model_that_gives_nan_is_refused(say):
    with pytest.raises(Diverged, match="NaN"):
        say(build_fixed([ord("a")], spoilt=True))


# --- characters in pieces

TEXTS = ["naïve café", "日本語のテキスト", "👩‍👩‍👧‍👦 🇩🇪 é", "עברית العربية", "\U0010ffff", "plain"]


def check_whole(stream, tokenizer, count):
    """Streamed pieces join to the text of all ids, whatever the ids are."""
    chance = random.Random(0)
    for _ in range(count):
        ids = [chance.randrange(len(tokenizer.vocabulary)) for _ in range(chance.randint(1, 12))]
        assert "".join(stream(ids)) == tokenizer.decode(ids), ids


@pytest.fixture(scope="module")
def torn():
    """A tokenizer some of whose tokens end within a character."""
    tokenizer = train_bpe(TEXTS * 3, 340)
    assert any(len(token) > 1 and token[-1] > 127 for token in tokenizer.vocabulary)
    return tokenizer


def stream_with_us(tokenizer, monkeypatch):
    session = ChatSession(build_model(tokenizer), tokenizer, context=128)

    def stream(ids):
        monkeypatch.setattr(session_module, "stream_ids", lambda *_, **__: iter(ids))
        session.reset()
        yield from session.stream("Hi")

    return stream


def stream_token_by_token(tokenizer, monkeypatch):
    return lambda ids: (tokenizer.decode([token_id]) for token_id in ids)


@pytest.mark.parametrize("build", [stream_with_us, wrong(stream_token_by_token)])
def test_10_000_streamed_replies_are_whole(torn, monkeypatch, build):
    check_whole(build(torn, monkeypatch), torn, 10_000)


# --- a hundred interrupts


def open_chat(folder):
    """Our chat with a model of random weights, whose replies have some 3,000 tokens."""
    build_model(n_positions=4096).save_pretrained(folder)
    BYTES.save(folder, chat_template=CHAT_TEMPLATE)
    return Terminal("inference.py", "--model_dir", folder, "--device", "cpu", OMP_NUM_THREADS="1")


# What many a sample script does: a loop around the model.
BARE_LOOP = f"""
import time
while True:
    input({PROMPT_READY.decode()!r})
    print({PROMPT_DONE.decode()!r})
    for number in range(3000):
        print(f"word{{number}}", end=" ", flush=True)
        time.sleep(0.01)
"""


def open_bare_loop(folder):
    return Terminal("-c", BARE_LOOP, OMP_NUM_THREADS="1")


@pytest.mark.parametrize("open_program", [open_chat, wrong(open_bare_loop)])
def test_ctrl_c_a_hundred_times_gives_the_prompt_back(tmp_path, open_program):
    terminal = open_program(tmp_path / "model")
    try:
        check_interrupts(terminal)
    finally:
        terminal.close()


def check_interrupts(terminal):
    chance, waits, stopped = random.Random(0), [], 0
    terminal.wait_for(PROMPT_READY)
    for _ in range(100):
        terminal.type("go\r")
        terminal.wait_for(PROMPT_DONE)
        said = chance.randrange(40, 300)  # bytes; the first few are still of the prompt
        while len(terminal.seen) < said:
            terminal.read()
        terminal.type("\x03")
        before, seconds = terminal.wait_for(PROMPT_READY)
        stopped += b"stopped" in before
        waits.append(seconds)
    assert stopped == 100, "no reply was left to end by itself"
    # Half a second; a machine with other work may be late a few times.
    assert sorted(waits)[94] < 0.5, sorted(waits)[90:]
    terminal.type("\x04")
    assert terminal.process.wait(20) == 0
