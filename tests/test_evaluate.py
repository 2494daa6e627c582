"""evaluate.py: what it measures, what it writes, what it refuses."""

import json
import shutil

import pytest
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
from firstwords import pydocs
from firstwords.checkpoint import load_model
from firstwords.dataset import open_val
from firstwords.score import evaluate_loss
from firstwords.tokenizer import train_bpe

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
    assert list(figures) == ["checkpoint", "step", *FIGURES], "no questions: it was not trained on pydocs"
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


def test_conversations_longer_than_a_row_follow_the_policy_of_the_training(folder, tmp_path):
    data = write_chats(tmp_path / "data", invent_talks(3), [talk("tea", "x"), talk("bird", "y" * 300)])
    manifest = json.loads((folder / "b" / "manifest.json").read_text())
    tokens = {}
    for policy in ("drop", "truncate"):
        run = tmp_path / policy
        shutil.copytree(folder / "b", run)
        flags = manifest["flags"] | {"overlong": policy}
        (run / "manifest.json").write_text(json.dumps(manifest | {"flags": flags}))
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
    assert evaluate.asks_questions(wish, manifest) is asks
    assert evaluate.asks_questions(wish, {}) is (wish == "pydocs")


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
    ],
)
def test_what_is_refused_leaves_nothing(folder, other, words, code, why):
    before = hash_files(folder)
    names = {"folder": folder, "other": other}
    found, errors = run_script(evaluate, [word.format(**names) for word in words])
    assert (found, len(errors.splitlines())) == (code, 1), errors
    assert why.format(**names) in errors
    assert hash_files(folder) == before
