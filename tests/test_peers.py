"""Other people's programs read what export.py writes: llama.cpp, TRL, lm-eval, `transformers serve`.

They are heavy, so each test skips without its program; requirements-peers.txt installs them.
"""

import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from exported import QUESTIONS, invent_answer, write_run
from tiny import talk
from transformers import AutoTokenizer

import export
from firstwords.schema import Message
from firstwords.session import load_session
from firstwords.template import encode_chat, encode_prompt
from firstwords.tokenizer import CONTROL_TOKENS

# What a text is made of: words, blanks of every kind, marks, other scripts, code, pieces of control tokens.
PIECES = (
    *("don't", "DON'T", "they'll", "'s", "cat", "Mädchen", "привет", "日本語", "ﷺ", "e\u0301"),
    *("\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "²", "½", "٣", "1234", "12,5", "_", "..."),
    *(" ", "  ", "\n", "\t", "\r\n", "   \n\n ", "\u00a0", "\u3000", "\u200b", "\ufeff", "\u2028", "\u0085"),
    *("\x01", "\x7f", "<|", "|>", "< | end | >", "{{ x }}", "{% if %}", "\\n", "'\"&<b>", "a" * 40),
    *("def f(x):\n    return x + 1\n", "#!/bin/sh\n\techo $HOME\n"),
)


def invent_text(pick, pieces=PIECES):
    """Return a text with something in it that is no blank."""
    return "".join(pick.choices(pieces, k=pick.randint(0, 9))) + pick.choice(("x", "cat.", "日"))


def invent_chat(pick):
    """Return the messages of a conversation; it may begin with the system's, and ends with the assistant."""
    system = [Message("system", invent_text(pick))] if pick.random() < 0.3 else []
    return system + talk(*(invent_text(pick) for _ in range(2 * pick.randint(1, 3))))


def as_rows(messages):
    return [{"role": message.role, "content": message.content} for message in messages]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("runs") / "chat"
    write_run(folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def hf(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "chat"
    export.main(["--model_dir", str(run), "--format=hf", "--out_dir", str(folder)])
    return folder


# --- transformers


def test_transformers_applies_the_template_as_we_do(hf, tokenizer):
    theirs, pick = AutoTokenizer.from_pretrained(hf), random.Random(0)
    for _ in range(400):
        messages = invent_chat(pick)
        whole = theirs.apply_chat_template(
            as_rows(messages), return_dict=True, return_assistant_tokens_mask=True
        )
        assert (whole["input_ids"], whole["assistant_masks"]) == encode_chat(messages, tokenizer)
        opened = theirs.apply_chat_template(as_rows(messages[:-1]), add_generation_prompt=True)
        assert opened["input_ids"] == encode_prompt(messages[:-1], tokenizer)


def read_when_up(url, process, seconds=120):
    """Return what a server says at `url`, once it answers."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read().decode()[-2000:]
        try:
            return urllib.request.urlopen(url, timeout=5).read()
        except urllib.error.URLError:
            time.sleep(0.2)
    raise AssertionError(f"{url} did not answer")


@pytest.mark.slow
def test_transformers_serve_says_what_the_chat_says(run, hf):
    pytest.importorskip("fastapi", reason="transformers serve needs fastapi: pip install fastapi uvicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        Path(sys.executable).with_name("transformers"),
        "serve",
        hf,
        "--port",
        str(port),
        "--device=cpu",
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "0"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=hf.parent
    )
    try:
        read_when_up(f"http://127.0.0.1:{port}/health", process)
        session = load_session(run)
        for question in QUESTIONS[:3]:
            session.reset()
            body = {"model": str(hf), "messages": as_rows([Message("user", question)]), "temperature": 0}
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/chat/completions",
                json.dumps({**body, "max_tokens": 50}).encode(),
                {"Content-Type": "application/json"},
            )
            choice = json.load(urllib.request.urlopen(request, timeout=60))["choices"][0]
            assert choice["message"]["content"] == session.ask(question)
            assert choice["finish_reason"] == "stop"
    finally:
        process.kill()
        process.wait()


# --- llama.cpp


@pytest.fixture(scope="module", params=["f32", "f16", "q8_0"])
def llama(request, run, tmp_path_factory):
    """llama.cpp with the model in each type."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python: requirements-peers.txt")
    folder = tmp_path_factory.mktemp("gguf") / "chat"
    flags = ["--model_dir", str(run), "--format=gguf", f"--dtype={request.param}", f"--out_dir={folder}"]
    export.main(flags)
    path = folder / f"model-{request.param}.gguf"
    with_model = llama_cpp.Llama(str(path), n_ctx=128, n_threads=1, verbose=False)
    yield with_model
    with_model.close()


def render(llama, messages):
    """Return the ids that llama-cpp-python makes of messages with the template in the file."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    template = llama.metadata["tokenizer.chat_template"]
    formatted = Jinja2ChatFormatter(template, eos_token="<|end|>", bos_token="<|endoftext|>")
    text = formatted(messages=as_rows(messages)).prompt
    return llama.tokenize(text.encode(), add_bos=False, special=True)


def test_llamacpp_says_the_same_tokens_and_stops(llama, run):
    session = load_session(run)
    assert len(QUESTIONS) >= 20
    for question in QUESTIONS:
        session.reset()
        reply = session.ask(question)
        assert session.last.stopped
        said = []
        for token_id in llama.generate(session.last.prompt, temp=0.0, repeat_penalty=1.0):
            said.append(token_id)
            if token_id == llama.token_eos() or len(said) == 60:
                break
        assert said == session.last.ids
        answer = llama.create_chat_completion(as_rows([Message("user", question)]), temperature=0.0)
        assert answer["choices"][0]["message"]["content"] == reply == invent_answer(question)
        assert answer["choices"][0]["finish_reason"] == "stop"


def test_llamacpp_knows_the_end_and_says_no_surplus_id(llama, tokenizer):
    assert llama.token_eos() == tokenizer.end_id
    assert llama.n_vocab() == len(tokenizer)


def test_llamacpp_makes_our_ids_of_any_text(llama, tokenizer):
    pick = random.Random(0)
    hostile = (*PIECES, *CONTROL_TOKENS)
    texts = [*hostile, *(invent_text(pick, hostile) for _ in range(500))]
    for text in texts:
        assert llama.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text), ascii(
            text
        )


def test_llamacpp_applies_the_template_as_we_do(llama, tokenizer):
    pick = random.Random(0)
    for _ in range(300):
        messages = invent_chat(pick)[:-1]
        assert render(llama, messages) == encode_prompt(messages, tokenizer)


# --- TRL


def test_trl_goes_on_training_with_our_ids_and_masks(hf, tokenizer, tmp_path):
    trl = pytest.importorskip("trl", reason="trl: requirements-peers.txt")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    pick = random.Random(0)
    chats = [*(invent_chat(pick) for _ in range(60)), talk("What is new?", "cat.")]
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "out"),
        assistant_only_loss=True,
        max_length=None,
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
    )
    model = AutoModelForCausalLM.from_pretrained(hf)
    before = model.transformer.wte.weight.detach().clone()
    short = [chat for chat in chats if len(encode_chat(chat, tokenizer)[0]) <= 128]
    trainer = trl.SFTTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_list([{"messages": as_rows(chat)} for chat in short]),
        processing_class=AutoTokenizer.from_pretrained(hf),
    )
    for row, chat in zip(trainer.train_dataset, short, strict=True):
        ids, mask = encode_chat(chat, tokenizer)
        assert row["input_ids"] == ids
        assert row["labels"] == [i if learned else -100 for i, learned in zip(ids, mask, strict=True)]
    result = trainer.train()
    assert result.global_step == 3
    assert result.training_loss > 0
    assert not model.transformer.wte.weight.equal(before)


# --- lm-eval


def test_lm_eval_loads_it_and_scores_what_it_learned(hf):
    pytest.importorskip("lm_eval", reason="lm-eval: requirements-dev.txt")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    evaluated = HFLM(pretrained=str(hf), device="cpu", batch_size=2, dtype="float32")
    assert evaluated.max_length == 128
    frame = "<|user|>{}<|end|><|assistant|>"
    requests = [
        Instance("loglikelihood", {}, (frame.format(QUESTIONS[0]), continuation), place)
        for place, continuation in enumerate((invent_answer(QUESTIONS[0]), invent_answer(QUESTIONS[1])))
    ]
    (right, greedy), (wrong, _) = evaluated.loglikelihood(requests, disable_tqdm=True)
    assert greedy
    assert right > -1 > wrong
