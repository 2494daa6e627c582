"""export.py: what it writes, that others' libraries read the same from it, and what it refuses."""

import base64
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from exported import QUESTIONS, invent_answer, write_run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, pipeline

import export
from firstwords.card import Facts, format_card, read_curve
from firstwords.checkpoint import COMPLETE, verify, write_manifest
from firstwords.errors import BadFlag, CannotCreate, Diverged, IOFailed, Mismatch, MissingInput
from firstwords.llamacpp import check_exportable
from firstwords.model import build_model
from firstwords.session import load_session
from firstwords.template import CHAT_TEMPLATE
from firstwords.tokenizer import CONTROL_TOKENS

META = {
    "data_dir": "/home/somebody/data",
    "flags": {"data_dir": "/home/somebody/data", "lr": "0.01", "optim": "muon"},
    "sources": [
        {"file": "/home/somebody/chats.jsonl", "bytes": 7, "license": "cc0-1.0"},
        {"hub": "tatsu-lab/alpaca", "config": None, "split": "train"},
    ],
    "parent": {
        "from": "/home/somebody/runs/base",
        "step": 1100,
        "sources": [
            {"hub": "openwebtext", "license": "cc0-1.0"},
            {"hub": "tatsu-lab/alpaca"},
            {"file": "/home/somebody/a.txt"},
        ],
        "parent": None,
    },
    "versions": {"torch": "2.13.0"},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer):
    """A finished run with its scores and its log."""
    folder = tmp_path_factory.mktemp("runs") / "chat"
    write_run(folder, tokenizer, **META)
    measured = {"exact_match": 0.97, "health": {"stop_rate": 0.5}}
    (folder / "evaluation.json").write_text(json.dumps({"checkpoint": "x", "step": 120, **measured}))
    tasks = {"results": {"hellaswag": {"alias": "hellaswag", "acc,none": 0.3}}, "versions": {"hellaswag": 1}}
    (folder / "evaluation_tasks.json").write_text(json.dumps({"step": 120, **tasks}))
    with SummaryWriter(str(folder / "runs")) as events:
        events.add_scalar("eval/loss", 0.15, 60)
    newest = folder / "checkpoint-120"
    newest.mkdir()
    log = [{"step": step, "eval_loss": 9 / step, "eval_bits_per_byte": 1 / step} for step in range(1, 61)]
    (newest / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1, "loss": 2.0}, *log]}))
    write_manifest(newest, {"step": 120})
    return folder


@pytest.fixture(scope="module")
def hf(run, tmp_path_factory):
    """The run as a Hugging Face folder in fp32."""
    folder = tmp_path_factory.mktemp("out") / "parrot"
    export.main(["--model_dir", str(run), "--format=hf", f"--out_dir={folder}", "--license=mit"])
    return folder


def words(run, out, *flags):
    return ["--model_dir", str(run), "--out_dir", str(out), *flags]


def test_the_run_says_what_it_learned(run):
    session = load_session(run)
    for question in QUESTIONS:
        session.reset()
        assert session.ask(question) == invent_answer(question)
        assert session.last.stopped


# --- a Hugging Face folder


def test_plain_transformers_computes_the_same_logits(run, hf):
    model = AutoModelForCausalLM.from_pretrained(hf).eval()
    ids = torch.arange(64).reshape(2, 32)
    assert torch.equal(model(ids).logits, load_session(run).model(ids).logits)
    assert model.config.use_cache
    assert model.dtype == torch.float32


def test_bf16_is_the_weights_rounded_once(run, hf, tmp_path):
    export.main(words(run, tmp_path / "x", "--format=hf", "--dtype=bf16"))
    rounded, full = (load_file(folder / "model.safetensors") for folder in (tmp_path / "x", hf))
    assert rounded.keys() == full.keys()
    assert all(torch.equal(rounded[name], full[name].bfloat16()) for name in full)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "x").dtype == torch.bfloat16


def test_a_pipeline_says_what_the_chat_says(run, hf):
    chat = pipeline("text-generation", str(hf), device="cpu")
    session = load_session(run, system="S")
    for question in QUESTIONS[:6]:
        session.reset()
        messages = [{"role": "system", "content": "S"}, {"role": "user", "content": question}]
        assert chat(messages, do_sample=False)[0]["generated_text"][-1]["content"] == session.ask(question)


def test_our_own_scripts_read_it(run, hf):
    session = load_session(hf)
    assert session.context == 64
    assert session.ask(QUESTIONS[0]) == invent_answer(QUESTIONS[0])
    verify(hf)
    (hf / "README.md").write_text((hf / "README.md").read_text() + "\nMore about it.\n")
    verify(hf)  # the card is there to be written on


def test_nothing_of_this_machine_is_handed_on(hf):
    for path in hf.iterdir():
        assert b"somebody" not in path.read_bytes(), path
    assert not (hf / COMPLETE).exists()


def test_the_card(hf):
    _, header, body = (hf / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "mit",
        "datasets": ["tatsu-lab/alpaca", "openwebtext"],
        "tags": ["gpt2", "conversational", "firstwords"],
    }
    for line in (
        "- file `chats.jsonl`, bytes `7`; licence: cc0-1.0",
        "- hub `tatsu-lab/alpaca`, split `train`; licence: not recorded",
        "It began as a model of another run at step 1,100, which was trained on:",
        "- hub `openwebtext`; licence: cc0-1.0",
        "- file `a.txt`; licence: not recorded",
        "| weights began as | those of a model of another run at step 1,100 |",
        "| exact_match | 0.9700 |",
        "| health: stop_rate | 0.5000 |",
        "| hellaswag: acc,none | 0.3000 |",
        "| tokens trained on | 5,000 |",
        "| val loss | 0.1500 |",
        "| tokens seen | 5,000 |",
        "| optim | muon |",
        "| 60 | 0.1500 | 0.0167 |",
        "<|user|>Hi<|end|><|assistant|>Hello!<|end|>",
        "This model is released under `mit`. The licences of the data bind whoever uses or passes it on.",
    ):
        assert line in body.splitlines(), line
    curve = body[body.index("| validation loss |") : body.index("## Scores")]
    assert len(curve.strip().splitlines()) == 22, "a heading and 20 of the 60 evaluations"


@pytest.mark.parametrize(
    ("parent", "beginning", "data"),
    [
        ({"parent": None}, ", trained from random weights with firstwords.", "Not recorded."),
        ({}, " context of 64.", "Not recorded."),
        (
            {"parent": {"from": "hub:gpt2", "weights": "not verified"}},
            ", trained with firstwords from `gpt2` of the Hub.",
            "It began as `gpt2` of the Hub; what that was trained on is not recorded here.",
        ),
        (
            {"parent": {"from": "/x/runs/base", "step": 5, "parent": {"from": "/y/gpt2"}}},
            ", trained with firstwords from another model.",
            "It began as another model; what that was trained on is not recorded here.",
        ),
        (
            {"parent": {"from": "/x/runs/base", "step": 5}},
            ", trained with firstwords from a model of another run at step 5.",
            "It began as a model of another run at step 5; what that was trained on is not recorded here.",
        ),
    ],
)
def test_the_card_says_random_weights_only_where_all_stages_are_known(parent, beginning, data):
    card = format_card("pip", Facts(parent, num_weights=9, num_tokens=8, context=64), "usage")
    about = card[card.index("A GPT-2 of 9") :].splitlines()[0]
    assert about.endswith(beginning)
    assert data in card.splitlines()
    assert ("random weights" in card) == ("random weights" in beginning)
    assert "/x/" not in card
    assert "/y/" not in card


def test_scores_of_another_step_are_not_told(run, tmp_path):
    other = tmp_path / "run"
    shutil.copytree(run, other)
    (other / "evaluation.json").write_text(json.dumps({"step": 60, "exact_match": 0.123}))
    (other / "evaluation_tasks.json").write_text(json.dumps({"step": 60, "results": {"x": {"acc": 0.123}}}))
    export.main(words(other, tmp_path / "x", "--format=hf"))
    card = (tmp_path / "x" / "README.md").read_text()
    assert "0.123" not in card
    assert "Not measured at this step." in card
    assert "No licence is stated" in card


def test_a_plain_folder_says_what_is_not_known(hf, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(hf, plain)
    (plain / "manifest.json").unlink()
    export.main(words(plain, tmp_path / "x", "--format=hf"))
    assert (tmp_path / "x" / "README.md").read_text().count("Not recorded.") == 4
    assert read_curve(plain) == []


# --- GGUF


@pytest.fixture(scope="module", params=["f32", "f16", "q8_0"])
def reader(request, run, tmp_path_factory):
    """A GGUF file of each type, as the gguf package reads it."""
    folder = tmp_path_factory.mktemp("gguf") / "chat"
    export.main(words(run, folder, "--format=gguf", f"--dtype={request.param}"))
    assert {path.name for path in folder.iterdir()} == {
        f"model-{request.param}.gguf",
        "Modelfile",
        "README.md",
    }
    reader = gguf.GGUFReader(folder / f"model-{request.param}.gguf")
    reader.dtype = request.param
    return reader


def read_field(reader, name):
    return reader.fields[name].contents()


def test_gguf_describes_model_and_tokenizer(reader, tokenizer):
    tokens = read_field(reader, "tokenizer.ggml.tokens")
    types = read_field(reader, "tokenizer.ggml.token_type")
    assert tokens[-6:] == list(CONTROL_TOKENS)
    assert len(tokens) == len(types) == len(tokenizer), "no row of the padded vocabulary"
    assert set(types[-6:]) == {gguf.TokenType.CONTROL}
    assert set(types[:-6]) == {gguf.TokenType.NORMAL}
    expected = {
        "general.architecture": "gpt2",
        "gpt2.context_length": 128,
        "gpt2.block_count": 2,
        "gpt2.feed_forward_length": 256,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": tokenizer.end_id,
        "tokenizer.ggml.eot_token_id": tokenizer.end_id,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {name: read_field(reader, name) for name in expected} == expected
    assert "generation" not in read_field(reader, "tokenizer.chat_template").replace(
        "add_generation_prompt", ""
    )


def test_gguf_holds_the_weights(reader, run):
    weights = load_session(run).model.state_dict()
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    rows = len(read_field(reader, "tokenizer.ggml.tokens"))
    close = {"f32": 0, "f16": 1e-3, "q8_0": 1e-2}[reader.dtype]
    for name, expected in (
        ("token_embd.weight", weights["transformer.wte.weight"][:rows]),
        ("position_embd.weight", weights["transformer.wpe.weight"]),
        ("blk.1.attn_qkv.weight", weights["transformer.h.1.attn.c_attn.weight"].T),
        ("blk.1.ffn_down.weight", weights["transformer.h.1.mlp.c_proj.weight"].T),
        ("blk.0.attn_norm.bias", weights["transformer.h.0.ln_1.bias"]),
        ("output_norm.weight", weights["transformer.ln_f.weight"]),
    ):
        expected = expected.numpy()
        assert np.abs(tensors[name] - expected).max() <= close * np.abs(expected).max(), name
    assert len(tensors) == 2 + 2 * 12 + 2, "tied weights stand there once"


def test_modelfile(run, tmp_path):
    export.main(words(run, tmp_path / "x", "--format=gguf"))
    assert (tmp_path / "x" / "Modelfile").read_text().splitlines() == [
        "FROM ./model-f16.gguf",
        'TEMPLATE """{{ range .Messages }}<|{{ .Role }}|>{{ .Content }}<|end|>{{ end }}<|assistant|>"""',
        *(f'PARAMETER stop "{token}"' for token in CONTROL_TOKENS),
        "PARAMETER num_ctx 64",
        "PARAMETER temperature 0",
    ]


# --- what is refused


def test_bad_flags_and_places(run, tmp_path):
    def refuse(error, match, *flags):
        with pytest.raises(error, match=match):
            export.main(words(run, tmp_path / "x", *flags))

    refuse(
        BadFlag,
        "--dtype q8: --format gguf has no such type; did you mean 'q8_0'",
        "--format=gguf",
        "--dtype=q8",
    )
    refuse(BadFlag, "--dtype f16: --format hf has no such type", "--format=hf", "--dtype=f16")
    refuse(BadFlag, "--format", "--format=onnx")
    refuse(BadFlag, "--push_to_hub a/b/c: ", "--format=hf", "--push_to_hub=a/b/c")
    refuse(BadFlag, "names no owner", "--format=hf", "--push_to_hub=chat")
    refuse(MissingInput, "did you mean 'chat'", "--format=hf", f"--model_dir={run.parent / 'caht'}")
    refuse(MissingInput, "holds no model", "--format=hf", f"--model_dir={tmp_path}")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine.txt").write_text("mine")
    refuse(CannotCreate, "is there already", "--format=hf")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    export.main(words(run, tmp_path / "x", "--format=hf", "--overwrite"))
    assert not (tmp_path / "x" / "mine.txt").exists()


def test_an_unfinished_run_is_refused_but_not_its_checkpoint(run, hf, tmp_path):
    unfinished = tmp_path / "run"
    shutil.copytree(hf, unfinished / "checkpoint-60")
    with pytest.raises(Mismatch, match="--model_dir .* has not reached its end; .*checkpoint-60"):
        export.main(words(unfinished, tmp_path / "x", "--format=hf"))
    export.main(words(unfinished / "checkpoint-60", tmp_path / "x", "--format=hf"))


def test_a_character_model_has_no_gguf(char_tokenizer, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    model = build_model(write_shape(tmp_path), char_tokenizer, seed=0)
    model.save_pretrained(run)
    char_tokenizer.save(run, chat_template=CHAT_TEMPLATE)
    with pytest.raises(Mismatch, match="llama.cpp has no tokenizer of characters.* use --format hf"):
        export.main(words(run, tmp_path / "x", "--format=gguf"))
    assert not (tmp_path / "x").exists()
    export.main(words(run, tmp_path / "x", "--format=hf"))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "x")
    assert theirs("The cat").input_ids == char_tokenizer.encode("The cat")


def write_shape(folder):
    path = folder / "c.json"
    path.write_text(json.dumps({"n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 64}))
    return path


@pytest.mark.parametrize(
    ("config", "dtype", "error", "match"),
    [
        ({"activation_function": "relu"}, "f16", Mismatch, "the activation is 'relu'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "f16", Mismatch, "does not scale attention"),
        ({"n_embd": 40, "n_head": 1}, "q8_0", BadFlag, "n_embd is 40, no multiple of 32; use f16"),
    ],
)
def test_what_llamacpp_cannot_compute_is_refused(tokenizer, config, dtype, error, match):
    with pytest.raises(error, match=match):
        check_exportable(GPT2Config(**config), tokenizer, dtype)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_spoilt_weights_are_not_handed_on(hf, tmp_path, value):
    spoilt = tmp_path / "spoilt"
    shutil.copytree(hf, spoilt)
    (spoilt / "manifest.json").unlink()
    weights = load_file(spoilt / "model.safetensors")
    weights["transformer.h.1.mlp.c_fc.bias"][3] = value
    save_file(weights, spoilt / "model.safetensors", {"format": "pt"})
    with pytest.raises(Diverged, match="h.1.mlp.c_fc.bias holds NaN or infinity"):
        export.main(words(spoilt, tmp_path / "x", "--format=hf"))


def test_a_weight_beyond_float16_is_refused(hf, tmp_path):
    large = tmp_path / "large"
    shutil.copytree(hf, large)
    (large / "manifest.json").unlink()
    weights = load_file(large / "model.safetensors")
    weights["transformer.h.0.mlp.c_fc.weight"][0, 0] = 1e6
    save_file(weights, large / "model.safetensors", {"format": "pt"})
    with pytest.raises(Mismatch, match="ffn_up.weight holds a weight beyond 65,504; use f32"):
        export.main(words(large, tmp_path / "x", "--format=gguf"))
    assert [path.name for path in tmp_path.iterdir()] == ["large"]


def test_nothing_half_written_stays(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "write_card", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(IOFailed, match="No space left"):
        export.main(words(run, tmp_path / "x", "--format=hf"))
    assert list(tmp_path.iterdir()) == []


# --- the Hub


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as an upload needs."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        if self.server.status != 200:
            return self.answer({"error": "You don't have the rights"}, self.server.status)
        if self.path == "/api/repos/create":
            row = json.loads(body)
            return self.answer({"url": f"{self.server.url}/{row['organization']}/{row['name']}"})
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            rows = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self.answer({"files": rows})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        for line in body.splitlines():
            row = json.loads(line)
            if row["key"] == "file":
                self.server.files[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
        url = f"{self.server.url}/me/chat/commit/1"
        return self.answer({"commitUrl": url, "commitOid": "1", "hookOutput": ""})

    def do_GET(self):
        self.answer({"error": "You don't have the rights"}, 403)

    def answer(self, value, status=200):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine, to which huggingface_hub talks."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.asked, server.files, server.status = [], {}, 200
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield server
    server.shutdown()
    server.server_close()


def test_push_to_hub_uploads_the_folder(run, hub, tmp_path, capsys):
    export.main(words(run, tmp_path / "x", "--format=hf", "--push_to_hub=me/chat"))
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()}
    assert all(token == "Bearer hf_secret" for _, token in hub.asked)
    assert 'pipeline("text-generation", "me/chat")' in hub.files["README.md"].decode()
    assert f"uploaded: {hub.url}/me/chat" in capsys.readouterr().out


def test_a_hub_that_refuses_leaves_the_folder(run, hub, tmp_path):
    hub.status = 403
    with pytest.raises(IOFailed, match=r"--push_to_hub me/chat: not uploaded \(.*rights.*\); .*x is whole"):
        export.main(words(run, tmp_path / "x", "--format=hf", "--push_to_hub=me/chat"))
    verify(tmp_path / "x")


def test_a_hub_out_of_reach(run, tmp_path):
    with pytest.raises(IOFailed, match="not uploaded .*offline mode"):
        export.main(words(run, tmp_path / "x", "--format=gguf", "--push_to_hub=me/chat"))
    assert (tmp_path / "x" / "Modelfile").is_file()


def test_a_hub_that_is_down(run, hub, tmp_path):
    hub.shutdown()
    hub.server_close()
    with pytest.raises(IOFailed, match=r"not uploaded \(.*[Cc]onnect"):
        export.main(words(run, tmp_path / "x", "--format=gguf", "--push_to_hub=me/chat"))


def test_safetensors_say_where_they_are_from(hf):
    with safe_open(hf / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
