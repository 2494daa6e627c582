"""The script: one-shot, pipe and terminal; what it prints where, and how it ends."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_repl import Scripted
from tiny import BYTES, build_babbler

import inference
from firstwords.checkpoint import write_manifest
from firstwords.errors import BadData, BadFlag, Damaged, IOFailed, MissingInput
from firstwords.generate import Sampling
from firstwords.quantize import has_fbgemm
from firstwords.schema import mask_control
from firstwords.session import load_session
from firstwords.template import CHAT_TEMPLATE

ROOT = Path(inference.__file__).parent


def pipe_in(monkeypatch, data: bytes):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def run_lines(session):
    inference.run_lines(inference.build_chat(session, None))


def test_lines_of_a_pipe_are_answered_to_its_end(monkeypatch, capsys):
    session = Scripted("one and", "two")
    pipe_in(monkeypatch, b"first?\n\n   \n  second?  ")
    run_lines(session)
    assert session.asked == ["first?", "second?"]
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("one and\ntwo\n", "")


def test_a_refused_line_is_told_and_the_others_are_answered(monkeypatch, capsys):
    session = Scripted("ok")
    pipe_in(monkeypatch, b"half \xff\nfine\n/temp warm\n/temp 1\n/quit\nnever\n")
    with pytest.raises(BadData, match="^stdin: lines that were not answered: 2; "):
        run_lines(session)
    printed = capsys.readouterr()
    assert printed.out == "ok\n"
    refused, number, temperature = printed.err.splitlines()
    assert refused.startswith("error: message: cannot be encoded")
    assert number == "error: /temp: is 'warm'; give a number from 0 on"
    assert temperature == "(temperature 1)", "no colour in a pipe"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A run with one checkpoint of a tiny model with random weights."""
    run = tmp_path_factory.mktemp("runs") / "chat"
    folder = run / "checkpoint-20"
    folder.mkdir(parents=True)
    build_babbler(initializer_range=0.5).save_pretrained(folder)
    BYTES.save(folder, chat_template=CHAT_TEMPLATE)
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


def test_a_dtype_says_what_it_costs_or_is_refused(model_dir, capsys, monkeypatch):
    flags = ["--model_dir", str(model_dir), "--device", "cpu", "--max_new_tokens", "8", "--prompt", "Hi"]
    if has_fbgemm():
        inference.main([*flags, "--dtype", "int8"])
        assert re.search(r"--dtype int8: costs \d\S* nats a token; of \d+ tokens", capsys.readouterr().err)
    monkeypatch.setattr("firstwords.quantize.has_bf16", lambda device: False)
    with pytest.raises(BadFlag, match="--dtype bf16"):
        inference.main([*flags, "--dtype", "bf16"])


def test_one_shot_refuses_at_once(model_dir):
    flags = ["--model_dir", str(model_dir), "--prompt", "x" * 200, "--prompt", "Hi"]
    with pytest.raises(BadData, match="is 200 tokens long, and at most 72 tokens fit"):
        inference.main(flags)


def test_json_is_an_object_a_line(model_dir, capsys, monkeypatch):
    flags = ["--model_dir", str(model_dir), "--device=cpu", "--max_new_tokens=8", "--json"]
    pipe_in(monkeypatch, "日本\n\n/help\n\n".encode() + b"\xff\n" + b"x" * 200 + b"\n")
    with pytest.raises(BadData, match="not answered: 2"):
        inference.main(flags)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    session = load_session(model_dir, sampling=Sampling(max_new_tokens=8))
    replies = [session.ask(text) for text in ("日本", "/help")]
    assert rows[0] == {
        "prompt": "日本",
        "reply": replies[0],
        "stopped": False,
        "tokens": 8,
        "prompt_tokens": 9,
        "evicted": 0,
    }
    assert (rows[1]["prompt"], rows[1]["reply"]) == ("/help", replies[1]), "no line is a command"
    assert rows[1]["prompt_tokens"] == 9 + len(session.tokenizer.encode(replies[0])) + 1 + 8
    assert rows[2] == {"prompt": "\udcff", "error": rows[2]["error"]}
    assert "cannot be encoded" in rows[2]["error"]
    assert "is 200 tokens long" in rows[3]["error"]


def test_json_lines_are_ascii(model_dir, capsys):
    inference.main(["--model_dir", str(model_dir), "--json", "--prompt=\x9b31m 日", "--max_new_tokens=4"])
    line = capsys.readouterr().out
    assert line.isascii()
    assert json.loads(line)["prompt"] == "\x9b31m 日"


def test_prompt_file_asks_each_line_for_itself(model_dir, capsys, tmp_path, monkeypatch):
    flags = ["--model_dir", str(model_dir), "--device=cpu", "--max_new_tokens=8", "--system=S"]
    path = tmp_path / "questions.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\ntwo\none\n/help\n" + b"x" * 200 + b"\nthree")
    with pytest.raises(BadData, match="questions.txt: lines that were not answered: 1"):
        inference.main([*flags, "--prompt_file", str(path)])
    expected = []
    for text in ("one", "two", "one", "/help", "three"):
        session = load_session(model_dir, system="S", sampling=Sampling(max_new_tokens=8))
        expected.append(mask_control(session.ask(text)))
    printed = capsys.readouterr()
    assert printed.out == "".join(f"{reply}\n" for reply in expected)
    assert "is 200 tokens long" in printed.err
    pipe_in(monkeypatch, b"two\n")
    inference.main([*flags, "--prompt_file=-", "--json"])
    assert mask_control(json.loads(capsys.readouterr().out)["reply"]) == expected[1]


def test_follow_moves_between_two_prompts(model_dir, capsys, monkeypatch, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(model_dir, run)

    class Growing(io.BytesIO):
        """Gives a line; before the second one the run has trained on."""

        def read1(self, size=-1):
            if self.tell() == len(b"one\n"):
                shutil.copytree(run / "checkpoint-20", run / ".staging-x")
                write_manifest(run / ".staging-x", {"step": 40, "longest_row": 100})
                (run / ".staging-x").rename(run / "checkpoint-40")
            return self.readline()

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Growing(b"one\ntwo\n"), encoding="utf-8"))
    inference.main(["--model_dir", str(run), "--device=cpu", "--max_new_tokens=4", "--follow"])
    assert "(now step 40)" in capsys.readouterr().err


def test_device_auto_says_what_it_took(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert inference.pick_device("auto") == ("cpu", " (auto: no GPU found)")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert inference.pick_device("auto") == ("mps", " (auto: Apple's GPU)")
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
    refuse(BadFlag, "--prompt_file: stands beside --prompt", "--model_dir=x", "--prompt_file=x")
    refuse(BadFlag, "--follow: is for a chat", "--model_dir=x", "--follow")
    for flag in ("top_p=0", "top_p=1.5", "top_k=-1", "min_p=2", "repetition_penalty=0", "max_new_tokens=0"):
        refuse(BadFlag, f"--{flag.partition('=')[0]}: is ", f"--model_dir={model_dir}", f"--{flag}")
    for flag in ("temperature=nan", "temperature=inf", "temperature=warm", "seed=x", "top_k=1.5"):
        refuse(BadFlag, f"--{flag.partition('=')[0]}: ", f"--model_dir={model_dir}", f"--{flag}")
    refuse(BadFlag, "model_dir")
    damaged = tmp_path / "run" / "checkpoint-7"
    damaged.mkdir(parents=True)
    (damaged / "config.json").write_text("{}")
    write_manifest(damaged, {"step": 7})
    (damaged / "config.json").write_text("{ }")
    refuse(Damaged, "config.json", f"--model_dir={damaged.parent}")


def test_prompt_file_that_is_not_there(model_dir, tmp_path):
    (tmp_path / "questions.txt").touch()
    flags = ["--device=cpu", f"--model_dir={model_dir}"]
    with pytest.raises(MissingInput, match="did you mean 'questions.txt'"):
        inference.main([*flags, f"--prompt_file={tmp_path / 'question.txt'}"])
    with pytest.raises(IOFailed, match="cannot be read"):
        inference.main([*flags, f"--prompt_file={tmp_path}"])


def test_follow_needs_a_run(model_dir):
    with pytest.raises(BadFlag, match="holds no checkpoints; name a run"):
        inference.main(["--device=cpu", f"--model_dir={model_dir / 'checkpoint-20'}", "--follow"])


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
