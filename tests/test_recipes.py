"""Every recipe, by the commands in its own comment: data, training and what comes behind, in small.

What a recipe reads from the Hub, or from a file of its user, stands here as a few rows of the same shape; the
sizes are replaced, everything else is as it is written.
"""

import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants
from published import build_published, write_cache, write_converted, write_gpt2
from test_docs import ROOT, Block, check_command, parse_command, read_commands
from tiny import run_script, write_config, write_store

import evaluate
import prep_data
import prep_text_corpus
import train
from firstwords import checkpoint
from firstwords.sources import streams
from firstwords.tokenizer import load_tokenizer
from firstwords.tokenstore import open_store

# Those of the embedded corpus are executed by test_journey.py.
RECIPES = sorted(
    path for path in (ROOT / "configs/recipes").glob("*.yaml") if not path.stem.startswith("pydocs")
)
PREP = {"prep_text_corpus.py": prep_text_corpus, "prep_data.py": prep_data}

# Paul Verlaine, Chanson d'automne (1866); Charles Baudelaire, the first stanza of L'Albatros (1859).
POEMS = """\
Les sanglots longs
Des violons
De l'automne
Blessent mon cœur
D'une langueur
Monotone.

Tout suffocant
Et blême, quand
Sonne l'heure,
Je me souviens
Des jours anciens
Et je pleure

Et je m'en vais
Au vent mauvais
Qui m’emporte
Deçà, delà,
Pareil à la
Feuille morte.

Souvent, pour s'amuser, les hommes d'équipage
Prennent des albatros, vastes oiseaux des mers,
Qui suivent, indolents compagnons de voyage,
Le navire glissant sur les gouffres amers.
"""
NAMES = ("emma", "olivia", "ava", "isabella", "sophia", "mia", "amelia", "harper", "abigail", "emily", "ella")
PAGES = [
    f"Page {n} of the web.\n\nThe cat sat on the mat, and dog {n} sat on the log. " * 4 for n in range(40)
]
FILES = {
    "names_shuffled.txt": "\n".join(name + end for name in NAMES for end in ("", "a", "e", "i")) + "\n",
    "mine.txt": "A book of one's own. " * 60 + POEMS * 3,
    "poems.txt": POEMS * 2,
    "corpus.txt": "\n\n".join(PAGES),
    "tinyshakespeare.txt": "First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 40,
}
# What the Hub has under (name, config), as columns.
HUB = {
    ("Skylion007/openwebtext", None): {"text": PAGES},
    ("allenai/c4", "en"): {"text": PAGES, "timestamp": ["2019-04-25"] * 40, "url": ["https://a.b"] * 40},
    ("HuggingFaceFW/fineweb-edu", "sample-10BT"): {"text": PAGES, "score": [3.1] * 40, "id": ["x"] * 40},
    ("tatsu-lab/alpaca", None): {
        "instruction": [f"Add {n} and 1." for n in range(40)],
        "input": ["", "Slowly."] * 20,
        "output": [f"{n + 1}." for n in range(40)],
        "text": ["Below is an instruction."] * 40,
    },
    ("databricks/databricks-dolly-15k", None): {
        "instruction": [f"Where is cat {n}?" for n in range(40)],
        "context": ["", "It sat on the mat."] * 20,
        "response": ["On the mat."] * 40,
        "category": ["closed_qa"] * 40,
    },
}


class Rows(list):
    """Rows that can be shuffled as those of `datasets` can."""

    def shuffle(self, seed, buffer_size):
        """Return them; the order is not what is tested."""
        return self


def open_hub(place):
    """Stand in for the Hub: rows by name and config, and an error where those are not known."""
    columns = HUB[place.name, place.config]
    return Rows(dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))


def read_comment_commands(path):
    """Return the commands in a recipe's comment; several processes are left to those who test them."""
    lines = [line[4:] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#   ")]
    text = re.sub(
        r"^torchrun (--standalone|--nproc_per_node \d+| )*", "python ", "\n".join(lines), flags=re.M
    )
    return read_commands(Block(path.name, 1, "sh", text + "\n"))


@pytest.fixture(scope="module")
def published(tokenizer):
    """What stands in for GPT-2."""
    return build_published(tokenizer)


@pytest.fixture
def workplace(published, tokenizer, tmp_path, monkeypatch):
    """A folder as a user's clone: configurations, files, GPT-2s in the cache and as the model of stage A."""
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(ROOT / "configs")
    for name, text in FILES.items():
        Path(name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(streams, "_open_hub", open_hub)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    write_cache(tmp_path / "hub", "openai-community/gpt2", write_gpt2, published, tokenizer)
    write_cache(tmp_path / "hub", "distilbert/distilgpt2", write_converted, published, tokenizer)
    write_gpt2(Path("runs/base"), published, tokenizer)
    item = {
        "activity_label": "Cats",
        "ctx_a": "A cat",
        "ctx_b": "it",
        "endings": ["sat", "is", "of"],
        "label": 1,
    }
    Path("hellaswag.jsonl").write_text((json.dumps(item) + "\n") * 3)
    return tmp_path


def list_quick_flags(recipe):
    """Return flags that make a run of seconds of a recipe: another shape, few steps, no GPU."""
    quick = {
        **({"batch_tokens": 128} if "batch_tokens" in recipe else {"batch_size": 2, "grad_accum": 1}),
        "seq_len": 64,
        "log_steps": 1,
        "save_steps": 1,
        "eval_steps": 1,
    }
    quick["device"] = "cpu"
    quick |= {"epochs": 0.2} if "epochs" in recipe else {"max_steps": 2, "warmup_steps": 0}
    if "cfg" in recipe:
        quick["cfg"] = str(write_config(Path("tiny.json")))
    if "eval_tasks" in recipe:
        quick |= {"hellaswag_data": "hellaswag.jsonl", "eval_tasks": "hellaswag:2"}
    return ["--no_bf16", *(word for name, value in quick.items() for word in (f"--{name}", str(value)))]


def follow(path, tokenizer):
    """Run a recipe's prep commands, then those of training; returns the runs."""
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    commands = read_comment_commands(path)
    for command in (command for command in commands if command.script in PREP):
        parent = parse_command(command).tokenizer
        if parent.startswith("data/"):  # stage A's, of another recipe
            write_store(Path(parent), PAGES, PAGES[:2], tokenizer=tokenizer)
        assert run_script(PREP[command.script], [*command.flags, "--num_proc", "1"])[0] == 0, command
    runs = {}
    for command in (command for command in commands if command.script == "train.py"):
        runs.setdefault(str(parse_command(command)[0].model_dir), command)
    for command in runs.values():
        assert run_script(train, [*command.flags, *list_quick_flags(recipe)]) == (0, ""), command
    return [Path(run) for run in runs]


# --- all of them


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_commands_of_the_comment_parse(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    commands = read_comment_commands(path)
    assert {command.script for command in commands} & set(PREP), "a recipe says how its data are made"
    for command in commands:
        if command.words[0] != "shuf":
            check_command(command)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains_on_what_its_comment_prepares(workplace, tokenizer, path, capsys):
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    runs = follow(path, tokenizer)
    assert Path(recipe["model_dir"]) in runs
    for run in runs:
        assert checkpoint.is_complete(run)
        assert (run / "train.log").read_text().count("val loss") >= 1
        if "eval_tasks" in recipe:
            assert "hellaswag" in (run / "train.log").read_text()
    assert ("init_model_dir" in recipe) == bool(checkpoint.read_manifest(runs[0])["parent"])
    capsys.readouterr()


def test_a_token_budget_is_what_the_comment_says():
    """`19,073 steps`, `524,288 tokens`, `10.0 billion`: the comments are counted again."""
    for name, tokens, billions in (
        ("fineweb_124m", 524_288, 10.0),
        ("chatbot_16gb_text", 524_288, 2.6),
        ("corpus_12gb", 262_144, 2.6),
    ):
        text = (ROOT / f"configs/recipes/{name}.yaml").read_text()
        recipe = yaml.safe_load(text)
        rows = recipe.get("batch_size", 0) * recipe.get("grad_accum", 0)
        per_step = recipe.get("batch_tokens") or rows * recipe["seq_len"]
        assert per_step == tokens
        assert f"{tokens:,}" in text
        assert round(per_step * recipe["max_steps"] / 1e9, 1) == billions
        assert f"{billions} billion" in text


# --- single ones


def test_counting_stands_beside_the_model_of_names(workplace, tokenizer, capsys):
    (path,) = (path for path in RECIPES if path.stem == "names")
    (run,) = follow(path, tokenizer)
    capsys.readouterr()
    assert run_script(evaluate, ["--model_dir", run, "--device", "cpu"])[0] == 0
    shown = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.split()}
    figures = json.loads((run / "evaluation.json").read_text())
    assert shown["bigram_add_one"][1] == f"{figures['baselines']['bigram_add_one']['loss']:.4f}"
    assert shown["the"][2] == f"{figures['val_loss']:.4f}"


def check_round_trip(tokenizer, text):
    """Every text comes back byte for byte."""
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("spec", ["bpe:400", "char"])
def test_a_french_text_comes_back_as_it_was(workplace, spec, capsys):
    words = ["--dataset", "poems.txt", "--tokenizer", spec, "--out_dir", "data/fr", "--num_proc", "1"]
    assert run_script(prep_text_corpus, words)[0] == 0
    tokenizer = load_tokenizer("data/fr")
    check_round_trip(tokenizer, POEMS)
    check_round_trip(tokenizer, "l'œuvre d’été, à l’heure blême")
    stored = [open_store(Path("data/fr"), split).tokens.tolist() for split in ("train", "val")]
    text = "".join(tokenizer.decode(ids, skip_control=True) for ids in stored)
    assert text == FILES["poems.txt"]
    if spec == "char":
        assert len(tokenizer.encode("œé’")) == 3
    capsys.readouterr()


def test_an_own_bpe_joins_the_bytes_of_a_letter(workplace, capsys):
    Path("e.txt").write_text("été émue élevé " * 50, encoding="utf-8")
    words = ["--dataset", "e.txt", "--tokenizer", "bpe:280", "--out_dir", "data/e", "--num_proc", "1"]
    assert run_script(prep_text_corpus, words)[0] == 0
    assert "é".encode() in load_tokenizer("data/e").vocabulary
    capsys.readouterr()


def test_the_steps_of_older_tutorials_are_named_in_passes():
    """What the comment says of 50,000 steps follows from the recipe's own tokens in a step."""
    text = (ROOT / "configs/recipes/chatbot_16gb_chat.yaml").read_text()
    recipe = yaml.safe_load(text)
    tokens = recipe["batch_tokens"]
    assert f"{tokens:,} tokens" in text
    low, high = (round(50_000 * tokens / size, -1) for size in (8.4e6, 5e6))
    assert re.search(rf"{low:.0f} to {high:.0f}", text.replace("\n#", "")), (low, high)
