"""evaluate.py: what it measures, what it writes, what it refuses."""

import json
import math
import shutil

import pytest
import transformers
from test_score import Few
from tiny import (
    BYTES,
    build_flags,
    hash_files,
    invent_talks,
    run_script,
    talk,
    write_chats,
    write_config,
    write_store,
)

import evaluate
import train
from firstwords import baselines, pydocs
from firstwords.checkpoint import load_model, write_manifest
from firstwords.dataset import open_val
from firstwords.evaluation import asks_questions
from firstwords.loss import evaluate_loss
from firstwords.tokenizer import build_char, train_bpe

FIGURES = ("val_loss", "perplexity", "bits_per_byte", "val_tokens", "val_bytes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data of both stages and a finished run of each."""
    folder = tmp_path_factory.mktemp("evaluate")
    cfg = write_config(folder / "c.json", n_positions=256)
    # The longest row that was trained is the context of the chat.
    long = talk("tea " * 30, "bird " * 25)
    chats = write_chats(folder / "chats", [*invent_talks(20), long], invent_talks(9, seed=1))
    store = write_store(folder / "store", ["tea and birds " * 30] * 5, ["birds and tea " * 9])
    assert run_script(train, build_flags(chats, folder / "b", cfg, max_steps=2, seq_len=256))[0] == 0
    words = build_flags(store, folder / "a", cfg, max_steps=2, no_assistant_only_loss=True)
    assert run_script(train, words)[0] == 0
    return folder


def measure(*words):
    return run_script(evaluate, ["--model_dir", *words])


def read_figures(folder):
    return json.loads((folder / "evaluation.json").read_text())


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_figures_of_stage_b(folder, batch_size, capsys):
    assert measure(folder / "b", "--batch_size", batch_size) == (0, "")
    figures = read_figures(folder / "b")
    val = open_val(folder / "chats", BYTES, 256, assistant_only=True)
    loss = evaluate_loss(load_model(folder / "b"), val, BYTES, batch_size=3)
    assert [figures[name] for name in FIGURES[:3]] == pytest.approx(
        [loss.mean, loss.perplexity, loss.bits_per_byte], rel=1e-5
    )
    assert [figures[name] for name in FIGURES[3:]] == [loss.tokens, loss.num_bytes]
    assert "exact_match" not in figures, "it was not trained on pydocs"
    assert figures["accuracy"] == loss.accuracy
    assert figures["loss_by_turn"]["1"] == pytest.approx(loss.by_turn[1].mean, rel=1e-5)
    assert figures["loss_by_position"]["8"] == pytest.approx(loss.by_position[8].mean, rel=1e-5)
    assert figures["data"] == str(folder / "chats")
    assert figures["health"]["num_prompts"] == 9
    assert (figures["checkpoint"], figures["step"]) == ("b", 2)
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["val_loss", f"{loss.mean:.4f}"] in printed
    assert ["val_tokens", str(loss.tokens)] in printed


def test_the_figures_of_stage_a(folder):
    assert measure(folder / "a") == (0, "")
    val = open_val(folder / "store", BYTES, 64, assistant_only=False)
    loss = evaluate_loss(load_model(folder / "a"), val, BYTES, batch_size=1)
    assert read_figures(folder / "a")["val_loss"] == pytest.approx(loss.mean, rel=1e-5)
    assert loss.tokens == 9 * len("birds and tea ")


def test_a_chat_model_is_measured_on_text_too(folder):
    assert measure(folder / "b", "--data_dir", folder / "store") == (0, "")
    assert read_figures(folder / "b")["val_bytes"] == 9 * len("birds and tea ") - 1


def test_the_baselines_are_those_of_the_data(folder, capsys):
    assert measure(folder / "a") == (0, "")
    figures = read_figures(folder / "a")
    data = [
        baselines.read_targets(folder / "store", split, BYTES, assistant_only=False)
        for split in ("train", "val")
    ]
    expected = baselines.measure_baselines(*data, BYTES)
    assert figures["baselines"] == {name: found.describe() for name, found in expected.items()}
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    for name, found in expected.items():
        assert [name, f"{found.bits_per_byte:.4f}"] in [row[:1] + row[-1:] for row in printed if row]
    assert [row[-1] for row in printed if row[:2] == ["the", "model"]] == [f"{figures['bits_per_byte']:.4f}"]
    assert measure(folder / "a", "--no_baselines") == (0, "")
    assert "baselines" not in read_figures(folder / "a")


# --- a text, and models that are not ours


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("Seven birds, and tea.\n" * 9, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A GPT-2 as Hugging Face saves it: no manifest, `<|endoftext|>` the last of its ids."""
    folder = tmp_path_factory.mktemp("plain") / "gpt2"
    config = transformers.GPT2Config(vocab_size=257, n_layer=1, n_head=2, n_embd=32, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    BYTES.save(folder, chat_template="")
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"] == 256]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder


@pytest.mark.parametrize("words", [[], ["--stride", "5"], ["--seq_len", "16"]])
def test_every_byte_of_a_text_is_predicted_once(folder, text, tmp_path, words):
    found = {}
    for batch_size in (1, 7):
        out = ["--out_dir", tmp_path, "--batch_size", batch_size]
        assert measure(folder / "b", "--text", text, *out, *words) == (0, "")
        found[batch_size] = read_figures(tmp_path)
    figures = found[1]
    size = text.stat().st_size
    assert (figures["val_bytes"], figures["val_tokens"]) == (size, size)
    assert figures["bits_per_byte"] == pytest.approx(figures["val_loss"] / math.log(2), rel=1e-9)
    for name in ("val_loss", "bits_per_byte"):
        assert found[7][name] == pytest.approx(figures[name], rel=1e-5)
    assert list(figures["baselines"]) == ["uniform", "xz"]


def test_a_smaller_stride_gives_more_context(folder, text, tmp_path):
    places = {}
    for stride in (63, 5):
        words = ["--text", text, "--out_dir", tmp_path, "--seq_len", 64, "--stride", stride]
        assert measure(folder / "b", *words) == (0, "")
        places[stride] = list(read_figures(tmp_path)["loss_by_position"])
    assert places == {63: ["1", "2", "4", "8", "16", "32"], 5: ["1", "2", "4", "8", "16", "32"]}


def test_a_plain_gpt2_is_measured_on_text(plain, text, capsys):
    assert measure(plain, "--text", text) == (0, "")
    figures = read_figures(plain)
    assert figures["val_tokens"] == text.stat().st_size
    model = transformers.GPT2LMHeadModel.from_pretrained(plain).eval()
    ids = [256, *text.read_bytes()]
    nats = 0.0
    for begin in range(0, len(ids) - 1, 63):
        row = transformers.BatchEncoding({"input_ids": [ids[begin : begin + 64]]}, tensor_type="pt").input_ids
        nats += float(model(row, labels=row).loss.detach()) * (row.shape[1] - 1)
    assert figures["val_loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-5)


def test_a_model_of_the_hub_is_measured_and_its_cache_stays_as_it_is(plain, text, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **options: str(plain))
    before = hash_files(plain)
    assert measure("hub:gpt2", "--text", text) == (0, "")
    assert "bits_per_byte" in capsys.readouterr().out
    assert hash_files(plain) == before


def test_a_character_that_the_tokenizer_has_not(tmp_path, folder):
    tokenizer = build_char(["tea and birds"])
    store = write_store(tmp_path / "store", ["tea and birds"] * 9, ["birds"], tokenizer=tokenizer)
    cfg = write_config(tmp_path / "c.json")
    words = build_flags(store, tmp_path / "run", cfg, max_steps=1, seq_len=8, no_assistant_only_loss=True)
    assert run_script(train, words)[0] == 0
    (tmp_path / "x.txt").write_text("tea & birds")
    code, errors = measure(tmp_path / "run", "--text", tmp_path / "x.txt")
    assert (code, len(errors.splitlines())) == (65, 1)
    assert "x.txt: the character '&' is not among the" in errors


def test_a_val_split_shorter_than_a_row(tmp_path, folder):
    store = write_store(tmp_path / "store", ["tea"], ["tea"])
    assert measure(folder / "a", "--data_dir", store, "--out_dir", tmp_path) == (0, "")
    assert read_figures(tmp_path)["val_tokens"] == 3


def test_conversations_longer_than_a_row_follow_the_policy_of_the_training(folder, tmp_path):
    data = write_chats(tmp_path / "data", invent_talks(3), [talk("tea", "x"), talk("bird", "y" * 300)])
    manifest = json.loads((folder / "b" / "manifest.json").read_text())
    tokens = {}
    for policy in ("drop", "truncate"):
        run = tmp_path / policy
        shutil.copytree(folder / "b", run)
        flags = manifest["flags"] | {"overlong": policy}
        write_manifest(run, manifest | {"flags": flags})
        assert measure(run, "--data_dir", data) == (0, "")
        tokens[policy] = read_figures(run)["val_tokens"]
    assert tokens == {"drop": 2, "truncate": 2 + 256 - len("<bird><")}


def test_an_unfinished_run_is_measured_at_its_newest_checkpoint(folder, tmp_path):
    shutil.copytree(folder / "b" / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    assert measure(tmp_path / "run")[0] == 0
    assert read_figures(tmp_path / "run")["checkpoint"] == "checkpoint-2"


def test_questions_are_asked_and_every_reply_is_kept(folder, tmp_path, monkeypatch):
    real = pydocs.build_held_out()
    few = Few(real.questions[::300], real.follow_ups[::500], real.greetings[:2])
    monkeypatch.setattr(pydocs, "build_held_out", lambda: few)
    shutil.copytree(folder / "b", tmp_path / "run")
    assert measure(tmp_path / "run", "--questions", "pydocs")[0] == 0
    figures = read_figures(tmp_path / "run")
    shares = ("exact_match", "exact_match_all", "followup_match", "unknown_match", "false_unknown")
    assert [figures[name] for name in shares] == [0.0] * 5
    assert {"stop_rate", *FIGURES} < set(figures)
    lines = (tmp_path / "run" / "evaluation_replies.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    counts = {name: sum(row["kind"] in kinds for row in rows) for name, kinds in KINDS.items()}
    assert counts == {name: figures[name] for name in KINDS}
    assert {row["prompt"] for row in rows} > {question.prompt for question in few.questions}
    assert measure(tmp_path / "run", "--questions", "none") == (0, "")
    assert "exact_match" not in read_figures(tmp_path / "run")


KINDS = {
    "num_questions_all": ("question",),
    "num_followups": ("followup",),
    "num_unknown": ("swapped", "misspelt"),
    "num_greetings": ("greeting",),
}


@pytest.mark.parametrize(
    ("wish", "only", "sources", "asks"),
    [
        ("auto", "True", [{"pydocs": "Python 3.11.9"}], True),
        ("auto", "False", [{"pydocs": "Python 3.11.9"}], False),
        ("auto", "True", [{"file": "chat.jsonl"}], False),
        ("auto", "True", [], False),
        ("none", "True", [{"pydocs": "Python 3.11.9"}], False),
        ("pydocs", "True", [], True),
    ],
)
def test_questions_are_asked_of_who_was_trained_on_them(wish, only, sources, asks):
    manifest = {"flags": {"assistant_only_loss": only}, "sources": sources}
    assert asks_questions(wish, manifest) is asks
    assert asks_questions(wish, {}) is (wish == "pydocs")


@pytest.fixture
def other(tmp_path):
    """Data of another tokenizer."""
    tokenizer = train_bpe(["tea and birds " * 9], 262 + 3)
    return write_chats(tmp_path / "other", invent_talks(9), tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (["--model_dir", "{folder}/bb"], 66, "--model_dir {folder}/bb: is no folder; did you mean 'b'"),
        (["--model_dir", "{folder}/b", "--data_dir", "nowhere"], 66, "--data_dir nowhere: is not there"),
        (["--model_dir", "{folder}/b", "--data_dir", "{folder}"], 66, "val_tokenized.jsonl: is not there"),
        (["--model_dir", "{folder}/b", "--data_dir", "{other}"], 78, "made by another tokenizer"),
        (["--model_dir", "{folder}/b", "--batch_size", "0"], 2, "--batch_size: is 0; give 1 or more"),
        (["--model_dir", "{folder}/b", "--device", "tpu"], 2, "--device"),
        (["--model_dir", "{folder}/b", "--device", "mps"], 2, "--device mps: torch"),
        (["--model_dir", "{folder}/b", "--modeldir", "x"], 2, "did you mean '--model_dir'"),
        ([], 2, "--model_dir"),
        (["--model_dir", "{plain}", "--data_dir", "{folder}/chats"], 78, "holds token 260, but the model"),
        (["--model_dir", "{plain}", "--text", "{text}", "--questions", "pydocs"], 78, "cannot be asked"),
        (["--model_dir", "{plain}"], 66, "--data_dir None: is not there"),
        (["--model_dir", "{plain}", "--text", "{text}", "--seq_len", "65"], 2, "context is 64"),
        (["--model_dir", "{plain}", "--text", "{text}", "--stride", "64"], 2, "--stride 64: would leave"),
        (["--model_dir", "{folder}/b", "--stride", "4"], 2, "conversations, which stay whole"),
        (["--model_dir", "{folder}/b", "--text", "{text}", "--data_dir", "x"], 2, "--text: give either"),
        (["--model_dir", "{plain}", "--text", "{folder}/none.txt"], 66, "none.txt: no such file"),
        (["--model_dir", "{plain}", "--text", "{empty}"], 65, "holds no text"),
        (["--model_dir", "{plain}", "--text", "{broken}"], 65, "not UTF-8 at byte 4"),
        (["--model_dir", "hub:no/such"], 66, "--model_dir hub:no/such: neither cached nor reachable"),
    ],
)
def test_what_is_refused_leaves_nothing(folder, other, plain, text, tmp_path, words, code, why):
    before = hash_files(folder)
    names = {"folder": folder, "other": other, "plain": plain, "text": text}
    names |= {name: tmp_path / f"{name}.txt" for name in ("empty", "broken")}
    names["empty"].write_bytes(b"")
    names["broken"].write_bytes(b"tea \xff")
    found, errors = run_script(evaluate, [word.format(**names) for word in words])
    assert (found, len(errors.splitlines())) == (code, 1), errors
    assert why.format(**names) in errors
    assert hash_files(folder) == before
