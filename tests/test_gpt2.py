"""A pretrained GPT-2, in the layouts that the Hub has and had, becomes an assistant by our commands."""

import json
import re
import shutil

import pytest
import torch
import transformers
from huggingface_hub import constants
from published import SHAPES, build_published, write_cache, write_converted, write_gpt2, write_old
from tiny import run_script

import evaluate
import export
import inference
import prep_data
import train
from firstwords import checkpoint
from firstwords.errors import BadFlag, Mismatch, MissingInput
from firstwords.model import grow_vocabulary
from firstwords.sources import streams
from firstwords.tokenizer import load_tokenizer

TEXT = "The cat sat on the mat, and the dog sat on the log. What does the function return? It returns"


@pytest.fixture(scope="module")
def published(tokenizer):
    """The model that all of these folders hold."""
    return build_published(tokenizer)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the Hub, which is offline."""
    assert constants.HF_HUB_OFFLINE
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


# --- reading what is there


@pytest.mark.parametrize("write", [write_gpt2, write_converted])
def test_weights_and_tokenizer_are_read_whatever_the_layout(published, tokenizer, tmp_path, write):
    write(tmp_path / "model", published, tokenizer)
    model = checkpoint.load_model(checkpoint.find_init(tmp_path / "model"))
    ids = torch.tensor([tokenizer.encode(TEXT)])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, published(ids).logits, rtol=0, atol=1e-4)
    assert model.config.n_positions == 1024
    assert load_tokenizer(tmp_path / "model").hash == tokenizer.hash


@pytest.mark.parametrize(
    ("text", "why"),
    [("[1, 2]", "is with merges.txt no tokenizer"), ('{"a": 0, "b": 2}', "ids have gaps")],
)
def test_a_broken_vocabulary_is_refused(published, tokenizer, tmp_path, text, why):
    write_old(tmp_path / "old", published, tokenizer)
    (tmp_path / "old" / "vocab.json").write_text(text)
    with pytest.raises(Mismatch, match=why):
        load_tokenizer(tmp_path / "old")


def test_an_end_of_text_elsewhere_is_refused(published, tokenizer, tmp_path):
    write_old(tmp_path / "old", published, tokenizer)
    vocab = json.loads((tmp_path / "old" / "vocab.json").read_text())
    (tmp_path / "old" / "vocab.json").write_text(json.dumps(vocab | {"<|endoftext|>": 999}))
    with pytest.raises(Mismatch, match="has the id 999, which is not ours"):
        load_tokenizer(tmp_path / "old")


def test_pickled_weights_are_refused_with_what_to_do(published, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_old(tmp_path / "old", published, tokenizer)
    with pytest.raises(MissingInput, match="old: has no model.safetensors; pickled weights") as caught:
        checkpoint.load_model(checkpoint.find_init(tmp_path / "old"))
    exec(re.search(r'python -c "(.*)"$', str(caught.value))[1], {})
    model = checkpoint.load_model(checkpoint.find_init(tmp_path / "converted"))
    assert torch.equal(model.transformer.wte.weight, published.transformer.wte.weight)
    assert load_tokenizer("converted").hash == tokenizer.hash


@pytest.mark.parametrize("filed_as", ["gpt2", "openai-community/gpt2"])
@pytest.mark.parametrize("asked", ["gpt2", "openai-community/gpt2"])
def test_the_cache_is_read_under_either_name(published, tokenizer, cache, filed_as, asked):
    snapshot = write_cache(cache, filed_as, write_gpt2, published, tokenizer)
    if (asked, filed_as) == ("openai-community/gpt2", "gpt2"):
        with pytest.raises(MissingInput):
            checkpoint.download_model(asked)
        return
    assert checkpoint.download_model(asked) == snapshot
    assert load_tokenizer(f"hub:{asked}").hash == tokenizer.hash


def test_a_cache_with_the_tokenizer_alone_is_passed_over_for_a_whole_one(published, tokenizer, cache):
    whole = write_cache(cache, "gpt2", write_gpt2, published, tokenizer)
    part = write_cache(cache, "openai-community/gpt2", write_gpt2, published, tokenizer)
    (part / "model.safetensors").unlink()
    assert checkpoint.download_model("gpt2") == whole
    shutil.rmtree(cache / "models--gpt2")
    with pytest.raises(MissingInput, match=r"hub:gpt2: has no model\.safetensors; pickled .*'gpt2'"):
        checkpoint.download_model("gpt2")


@pytest.mark.parametrize("name", ["../secret", "a/b/c", "", "x y"])
def test_what_can_be_no_name_on_the_hub_is_a_bad_flag(cache, name):
    with pytest.raises(BadFlag, match="is no name on the Hub; give hub:owner/name"):
        checkpoint.download_model(name)


# --- the vocabulary grows


def measure_text(model, tokenizer):
    ids = torch.tensor([tokenizer.encode(TEXT)])
    with torch.no_grad():
        return model(ids).logits, float(model(input_ids=ids, labels=ids).loss)


def check_old_text(grow, model, tokenizer):
    """Neither the logits of the old ids change, nor what the model thinks of a text that has but those."""
    logits, loss = measure_text(model, tokenizer)
    assert float(logits.max()) < -10, "else the test shows nothing"
    grow(model)
    grown, grown_loss = measure_text(model, tokenizer)
    assert torch.equal(grown[..., : logits.shape[-1]], logits)
    # The new tokens take their share like any other: at most as many as there are among all.
    assert grown_loss - loss < 1.1 * torch.tensor(grown.shape[-1] / logits.shape[-1]).log()


def load(published, tokenizer, folder):
    write_gpt2(folder, published, tokenizer)
    return checkpoint.load_model(folder)


def test_the_loss_of_old_text_stays(published, tokenizer, tmp_path):
    model = load(published, tokenizer, tmp_path / "gpt2")
    check_old_text(lambda model: grow_vocabulary(model, tokenizer, seed=0), model, tokenizer)


def test_rows_like_fresh_weights_would_drown_the_old_text(published, tokenizer, tmp_path):
    def grow(model):
        old = model.config.vocab_size
        model.resize_token_embeddings(tokenizer.vocab_size_padded, mean_resizing=False)
        with torch.no_grad():
            model.lm_head.weight[old:].normal_(std=0.02)

    with pytest.raises(AssertionError):
        check_old_text(grow, load(published, tokenizer, tmp_path / "gpt2"), tokenizer)


# --- the whole way, by our commands


def invent_dolly(place):
    """Return rows as databricks/databricks-dolly-15k has them; some have a context."""
    assert place.name == "databricks/databricks-dolly-15k"
    return [
        {
            "instruction": f"Where does cat {n} sit?",
            "context": f"Cat {n} sat on the mat." if n % 2 else "",
            "response": "On the mat." if n % 2 else "On the log.",
            "category": "closed_qa" if n % 2 else "open_qa",
        }
        for n in range(40)
    ]


def test_from_gpt2_and_dolly_to_an_assistant(published, tokenizer, cache, tmp_path, monkeypatch, capsys):
    write_cache(cache, "openai-community/gpt2", write_gpt2, published, tokenizer)
    monkeypatch.setattr(streams, "_open_hub", invent_dolly)
    data, run, out = (tmp_path / name for name in ("dolly", "run", "export"))

    words = ["--dataset", "dolly", "--tokenizer", "hub:gpt2", "--out_dir", data, "--num_proc", "1"]
    assert run_script(prep_data, words)[0] == 0
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    contexts = [row["messages"][0]["content"].split("\n")[-1] for row in rows]
    assert any(re.fullmatch(r"Cat \d+ sat on the mat\.", context) for context in contexts)

    recipe = ["--recipe", "configs/recipes/gpt2_dolly.yaml", "--data_dir", data, "--model_dir", run]
    quick = ["--epochs", "3", "--batch_tokens", "1024", "--device", "cpu", "--no_bf16"]
    assert run_script(train, [*recipe, *quick]) == (0, "")
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["parent"]["from"] == "hub:gpt2"
    assert manifest["longest_row"] == 1024, "the positions that GPT-2 had are kept for the chat"
    config = json.loads((run / "config.json").read_text())
    assert (config["n_positions"], config["vocab_size"]) == (1024, tokenizer.vocab_size_padded)

    assert run_script(evaluate, ["--model_dir", run, "--device", "cpu"])[0] == 0
    figures = json.loads((run / "evaluation.json").read_text())
    assert 0 < figures["val_loss"] < 20
    words = ["--model_dir", run, "--device", "cpu", "--prompt", "Where?", "--max_new_tokens", "4"]
    assert run_script(inference, words)[0] == 0
    assert run_script(export, ["--model_dir", run, "--format", "hf", "--out_dir", out])[0] == 0
    exported = transformers.AutoModelForCausalLM.from_pretrained(out)
    ids = torch.tensor([tokenizer.encode(TEXT)])
    with torch.no_grad():
        torch.testing.assert_close(exported(ids).logits, checkpoint.load_model(run)(ids).logits)
    assert "<|assistant|>" in transformers.AutoTokenizer.from_pretrained(out).get_vocab()
    capsys.readouterr()


@pytest.mark.parametrize("write", [write_gpt2, write_converted])
@pytest.mark.parametrize("owner", ["openai-community/gpt2-medium", "distilbert/distilgpt2"])
def test_the_others_by_name_go_the_same_way(tokenizer, cache, tmp_path, monkeypatch, capsys, owner, write):
    name = owner.split("/")[1]
    other = build_published(tokenizer, name)
    write_cache(cache, owner, write, other, tokenizer)
    monkeypatch.setattr(streams, "_open_hub", invent_dolly)
    data, run = tmp_path / "dolly", tmp_path / "run"
    words = ["--dataset", "dolly", "--tokenizer", f"hub:{name}", "--out_dir", data, "--num_proc", "1"]
    assert run_script(prep_data, words)[0] == 0
    words = ["--data_dir", data, "--model_dir", run, "--init_model_dir", f"hub:{name}", "--device", "cpu"]
    quick = ["--no_bf16", "--batch_tokens", "1024", "--epochs", "0.01", "--lr", "1e-9", "--eval_steps", "0"]
    recipe = ["--recipe", "configs/recipes/gpt2_dolly.yaml"]
    assert run_script(train, [*recipe, *words, *quick]) == (0, "")
    config = json.loads((run / "config.json").read_text())
    assert SHAPES[name].items() <= config.items()
    assert (config["n_positions"], config["vocab_size"]) == (1024, tokenizer.vocab_size_padded)
    assert json.loads((run / "manifest.json").read_text())["parent"]["from"] == f"hub:{name}"
    ids = torch.tensor([tokenizer.encode(TEXT)])
    with torch.no_grad():
        logits = checkpoint.load_model(run)(ids).logits[..., : other.config.vocab_size]
        torch.testing.assert_close(logits, other(ids).logits, rtol=0, atol=1e-4)
    capsys.readouterr()


def test_another_tokenizer_than_the_models_is_refused(published, tokenizer, cache, tmp_path, char_tokenizer):
    write_cache(cache, "gpt2", write_gpt2, published, tokenizer)
    rows = [{"instruction": f"Ask {n}", "output": "Yes."} for n in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--dataset", tmp_path / "rows.jsonl", "--tokenizer", "char", "--out_dir", tmp_path / "data"]
    assert run_script(prep_data, words)[0] == 0
    words = ["--data_dir", tmp_path / "data", "--model_dir", tmp_path / "run", "--init_model_dir", "hub:gpt2"]
    code, errors = run_script(train, [*words, "--max_steps", "2", "--device", "cpu"])
    assert code == 78
    assert "prepare the data with --tokenizer hub:gpt2" in errors
