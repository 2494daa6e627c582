"""Strangers' files: whatever lies in a folder, nothing of it runs, reaches the network or leads out of it.

Each payload is carried out twice in `prison.py`: by us, where nothing may happen, and in the way people do
it without us, where it must happen: else the payload would prove nothing.
"""

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import BYTES, build_flags, run_script, talk, write_chats, write_config

import train
from firstwords import atomic
from firstwords.checkpoint import find_checkpoint, load_model, write_manifest
from firstwords.errors import BadData, BadFlag, Damaged, FirstwordsError, Mismatch, MissingInput
from firstwords.model import build_model
from firstwords.session import load_session
from firstwords.sources import archives, find_place, read_rows
from firstwords.template import CHAT_TEMPLATE
from firstwords.tokenizer import load_tokenizer

# All that is ever opened of a model folder; the weights are mapped by the safetensors library.
READ_BY_US = {"config.json", "manifest.json", "tokenizer.json"}
FIGURES = {"evaluation.json", "evaluation_tasks.json", "trainer_state.json"}  # for the card of an export
OURS = ("chat", "init", "export", "prompt")
NOT_OURS = pytest.mark.xfail(strict=True, raises=AssertionError)
ROW = {"question": "Why?", "answer": "So."}


class Bomb:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return open, (self.canary, "w")


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A model folder as anybody might publish it."""
    folder = tmp_path_factory.mktemp("clean")
    config = write_config(folder.parent / "shape.json")
    build_model(config, BYTES, seed=0).save_pretrained(folder)
    BYTES.save(folder, chat_template=CHAT_TEMPLATE)
    return folder


def edit_json(path, **changes):
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**values, **changes}))


def write_code(folder, name, canary, rest=""):
    (folder / f"{name}.py").write_text(f"open({str(canary)!r}, 'w').close()\n{rest}")


# --- payloads of model folders


def pickle_weights(folder, canary):
    (folder / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Bomb(canary)}, folder / "pytorch_model.bin")


def pickle_state(name):
    def add(folder, canary):
        torch.save({"state": Bomb(canary)}, folder / name)

    return add


def name_model_code(folder, canary):
    names = {"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    edit_json(folder / "config.json", auto_map=names, architectures=["Model"], model_type="evil")
    rest = "from transformers import PretrainedConfig as Config, GPT2LMHeadModel as Model\n"
    write_code(folder, "modeling_evil", canary, rest)


def name_model_code_of_gpt2(folder, canary):
    name_model_code(folder, canary)
    edit_json(folder / "config.json", model_type="gpt2")


def name_tokenizer_code(folder, canary):
    names = {"AutoTokenizer": ["tokenization_evil.Tokens", None]}
    edit_json(folder / "tokenizer_config.json", auto_map=names, tokenizer_class="Tokens")
    write_code(folder, "tokenization_evil", canary, "from transformers import GPT2Tokenizer as Tokens\n")


def lay_modules(folder, canary):
    for name in ("__init__", "json", "torch", "argparse", "firstwords", "sitecustomize"):
        write_code(folder, name, canary)


def name_kernel(folder, canary):
    edit_json(folder / "config.json", attn_implementation="evil/attention")


def name_adapter(folder, canary):
    (folder / "config.json").unlink()
    edit_json(folder / "adapter_config.json", base_model_name_or_path="evil/base", peft_type="LORA")


def name_quantiser(folder, canary):
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})


def ask_too_many_layers(folder, canary):
    edit_json(folder / "config.json", n_layer=10**9)


def split_weights(folder, canary):
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    name = "../outside.safetensors"
    names = load_file(folder.parent / "outside.safetensors")
    edit_json(folder / "model.safetensors.index.json", metadata={}, weight_map=dict.fromkeys(names, name))


def write_template(folder, canary):
    text = "{% for m in messages %}{{ m['content'] + ' and my password' }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(text)
    edit_json(folder / "tokenizer_config.json", chat_template=text)


def write_template_escape(folder, canary):
    text = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ 'x' * 10 ** 10 }}"
    (folder / "chat_template.jinja").write_text(text)


# What people do instead, and what becomes of it: what `prison` noticed, or a result that is not ours.
PICKLES = {
    "pickled weights": (pickle_weights, "stock_pickle", "canary"),
    "optimizer.pt": (pickle_state("optimizer.pt"), "stock_pickle", "canary"),
    "scheduler.pt": (pickle_state("scheduler.pt"), "stock_pickle", "canary"),
    "rng_state.pth": (pickle_state("rng_state.pth"), "stock_pickle", "canary"),
    "training_args.bin": (pickle_state("training_args.bin"), "stock_pickle", "canary"),
}
CONFIGS = {
    "auto_map": (name_model_code, "stock_auto", "canary"),
    "auto_map of a gpt2": (name_model_code_of_gpt2, "stock_auto", "canary"),
    "auto_map of the tokenizer": (name_tokenizer_code, "stock_tokenizer", "canary"),
    "a kernel's name": (name_kernel, "stock_gpt2", "kernel"),
    "adapter_config.json": (name_adapter, "stock_gpt2", "socket"),
    "quantization_config": (name_quantiser, "stock_gpt2", "crashed"),
    "10**9 layers": (ask_too_many_layers, "stock_gpt2", "crashed"),
    "weights outside": (split_weights, "stock_gpt2", "GPT2LMHeadModel"),
    "modules beside it": (lay_modules, "stock_start", "canary"),
}
TEMPLATES = {
    "a template with hidden text": (write_template, "stock_prompt", "my password"),
    "a template that escapes": (write_template_escape, "stock_prompt", "crashed"),
}
MODEL_PAYLOADS = PICKLES | CONFIGS | TEMPLATES


def list_acts(payloads):
    """Return what we do with each payload, and the stock way, in which it must act."""
    return [
        pytest.param(name, act, marks=[] if act in OURS else NOT_OURS)
        for name, (_, stock, _) in payloads.items()
        for act in (*OURS, stock)
    ]


# --- payloads of data folders


def write_rows(path, count=2):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(ROW) + "\n" for _ in range(count)))


def write_secret(folder):
    write_rows(folder.parent / "secret.jsonl", 3)
    return folder.parent / "secret.jsonl"


def write_card(folder, files):
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {files}\n---\n")


def card_leads_up(folder, canary):
    write_secret(folder)
    write_card(folder, "../secret.jsonl")


def card_is_absolute(folder, canary):
    write_card(folder, write_secret(folder))


def card_leads_away(folder, canary):
    write_card(folder, "https://example.com/rows.jsonl")


def card_leads_up_by_glob(folder, canary):
    write_secret(folder)
    write_card(folder, "x/../../secret*")
    (folder / "x").mkdir()


def link_leads_out(folder, canary):
    (folder / "train.jsonl").unlink()
    (folder / "train.jsonl").symlink_to(write_secret(folder))


DATA_PAYLOADS = {
    "a card that leads up": (card_leads_up, 3),
    "a card with an absolute path": (card_is_absolute, 3),
    "a card that names a URL": (card_leads_away, "socket"),
    "a pattern that leads up": (card_leads_up_by_glob, 3),
    "a link that leads out": (link_leads_out, 3),
}


@pytest.fixture(scope="module")
def told(clean, tmp_path_factory):
    """What each payload did, to us and elsewhere: one process for all of them."""
    root = tmp_path_factory.mktemp("payloads")
    cases, canaries = [], {}

    def add(name, build, act):
        folder = root / f"{len(cases)}" / "set"
        canaries[name, act] = folder.parent / "canary"
        build(folder, canaries[name, act])
        cases.append({"name": name, "act": act, "folder": str(folder)})

    for name, (build, stock, _) in MODEL_PAYLOADS.items():
        starts = ["start"] if stock == "stock_start" else []
        for act in (*OURS, *starts, stock):

            def lay(folder, canary, build=build):
                shutil.copytree(clean, folder)
                build(folder, canary)

            add(name, lay, act)
    for name, (build, _) in DATA_PAYLOADS.items():
        for act in ("read", "stock_read"):

            def lay_rows(folder, canary, build=build):
                write_rows(folder / "train.jsonl")
                build(folder, canary)

            add(name, lay_rows, act)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "prison.py")],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HOME": str(root / "home")},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = {}
    for case, record in zip(cases, json.loads(done.stdout), strict=True):
        key = case["name"], case["act"]
        told[key] = record
        if canaries[key].exists():
            record["did"].append("canary")
    return told


def check_harmless(record, act):
    """Nothing happened: the work was done or refused in one line, and only what we read was opened."""
    assert not record["did"], record
    result = str(record["result"])
    assert not result.startswith("crashed"), record
    if result.startswith("refused"):
        assert "\n" not in result
        assert "; " in result
    assert set(record["opened"]) <= READ_BY_US | (FIGURES if act == "export" else set()), record
    assert "my password" not in result


@pytest.mark.parametrize(("name", "act"), list_acts(PICKLES))
def test_no_pickle_is_loaded(told, name, act):
    check_harmless(told[name, act], act)


@pytest.mark.parametrize(("name", "act"), list_acts(CONFIGS))
def test_nothing_that_a_configuration_names_acts(told, name, act):
    check_harmless(told[name, act], act)


@pytest.mark.parametrize(("name", "act"), list_acts(TEMPLATES))
def test_no_template_is_executed(told, name, act):
    check_harmless(told[name, act], act)


@pytest.mark.parametrize("name", MODEL_PAYLOADS)
def test_every_payload_acts_in_the_stock_way(told, name):
    _, stock, expected = MODEL_PAYLOADS[name]
    record = told[name, stock]
    assert expected in record["did"] or expected in str(record["result"]), record


def test_a_folder_of_modules_is_no_place_to_import_from(told):
    record = told["modules beside it", "start"]
    assert record["result"] == "usage"


def test_there_are_payloads_enough(told):
    assert len(MODEL_PAYLOADS) + len(DATA_PAYLOADS) >= 12
    loaded = [name for name in MODEL_PAYLOADS if not told[name, "chat"]["result"].startswith("refused")]
    assert len(loaded) > 6, "most folders hold a good model beside the payload, and it answers"


def check_inside(record):
    """The two rows of the folder were read, or the set was refused; never the three of the secret."""
    assert not record["did"], record
    result = record["result"]
    assert result == ["Why?"] * 2 or str(result).startswith(("refused BadData", "refused BadFlag")), record


@pytest.mark.parametrize("act", ["read", pytest.param("stock_read", marks=NOT_OURS)])
@pytest.mark.parametrize("name", DATA_PAYLOADS)
def test_no_data_folder_leads_out(told, name, act):
    check_inside(told[name, act])


@pytest.mark.parametrize("name", DATA_PAYLOADS)
def test_every_data_folder_leads_out_in_the_stock_way(told, name):
    record, (_, expected) = told[name, "stock_read"], DATA_PAYLOADS[name]
    assert expected in record["did"] or record["result"] == ["Why?"] * expected, record


# --- absurd values, refused before memory is taken for them

ABSURD = [
    *({"n_layer": value} for value in (10**9, 0, -1, "2", 2.5, None, [1], True, float("nan"))),
    *({"n_positions": value} for value in (10**12, 0, -128, "128", float("inf"))),
    *({"n_embd": value} for value in (10**9, 0, -32, "32", None)),
    *({"n_head": value} for value in (0, -2, 3, 10**9, "2")),
    *({"vocab_size": value} for value in (10**12, 0, -1, "384")),
    *({"n_inner": value} for value in (10**12, -1, "x")),
    *({"activation_function": value} for value in ("os.system", "", 3, None)),
    *({"attn_pdrop": value} for value in (7, -1, "x")),
    *({"layer_norm_epsilon": value} for value in ("x", None)),
    *({"model_type": value} for value in ("llama", None, 3, "x" * 10**6)),
    *({"eos_token_id": value} for value in ("x", {"a": 1})),
]


@pytest.fixture
def folder(clean, tmp_path):
    return Path(shutil.copytree(clean, tmp_path / "model"))


def check_refused(folder):
    """One line of ours, not too long for a terminal, and no memory taken for what was asked."""
    with pytest.raises(FirstwordsError) as caught:
        load_session(folder)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 700, text
    assert isinstance(caught.value, Damaged | Mismatch | MissingInput)


@pytest.mark.parametrize("change", ABSURD, ids=lambda change: str(change)[:40])
def test_absurd_values_are_refused(folder, change):
    edit_json(folder / "config.json", **change)
    check_refused(folder)


BROKEN_JSON = {
    "deep": "[" * 100_000,
    "digits": '{"model_type": "gpt2", "n_layer": ' + "9" * 5000 + "}",
    "list": "[]",
    "text": '"gpt2"',
    "nothing": "",
    "not UTF-8": b"\xff\xfe{}",
    "long": " " * (1 << 24) + "{}",
}


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "manifest.json"])
@pytest.mark.parametrize("text", BROKEN_JSON.values(), ids=BROKEN_JSON)
def test_broken_json_is_refused(folder, name, text):
    if name == "tokenizer.json" and len(text) > 1 << 24:
        text = text * 5
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    check_refused(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_what_is_no_file_is_not_waited_for(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)  # opening it would wait for ever
    check_refused(folder)
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    check_refused(folder)
    (folder / name).unlink()
    (folder / name).symlink_to(folder / name)
    check_refused(folder)


def test_what_a_link_leads_to_is_not_told(folder, tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_text('{"model_type": "gpt2", "password": "swordfish", "n_layer": "swordfish"}')
    for name in ("config.json", "tokenizer.json"):
        (folder / name).unlink()
        (folder / name).symlink_to(secret)
    for load in (load_model, load_tokenizer):
        with pytest.raises(FirstwordsError) as caught:
            load(folder)
        assert "password" not in str(caught.value)


# --- manifests

LYING_MANIFESTS = [
    {"files": {"../../secret.txt": {"bytes": 1, "sha256": "x"}}},
    {"files": {"/etc/passwd": {"bytes": 1, "sha256": "x"}}},
    {"files": {"": {}}},
    {"files": {}, "step": "\x1b[31m"},
    {"files": {}, "step": -1},
    {"files": {}, "longest_row": "long"},
    {"files": {}, "longest_row": 1e9},
]


@pytest.mark.parametrize("manifest", LYING_MANIFESTS, ids=str)
def test_a_lying_manifest_is_damage(folder, manifest):
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Damaged, match=r"manifest\.json: is broken"):
        find_checkpoint(folder)


# --- tokenizers


def change_model(**changes):
    return lambda spec: spec["model"].update(changes)


def add_token(content, token_id):
    return lambda spec: spec["added_tokens"].append({"content": content, "id": token_id, "special": True})


def merge(*pairs):
    def change(spec):
        made = ["".join(map(str, pair)) for pair in pairs]
        vocab = {token: i for token, i in spec["model"]["vocab"].items() if i < 256}
        spec["model"]["vocab"] = {**vocab, **{token: 256 + i for i, token in enumerate(made)}}
        spec["model"]["merges"] = list(pairs)
        spec["added_tokens"] = []

    return change


HOSTILE_TOKENIZERS = {
    "a word that is a control token": add_token("the", 260),
    "a control token of another id": add_token("<|end|>", 257),
    "a control token of no id": add_token("<|end|>", None),
    "merges in a ring": merge(["ab", "c"], ["a", "b"]),
    "a merge with itself": merge(["ab", "ab"]),
    "merges of three": merge(["a", "b", "c"]),
    "merges of nothing": merge(["", ""]),
    "merges of numbers": merge([1, 2]),
    "merges that are none": change_model(merges=7),
    "a vocabulary of lists": change_model(vocab=[["a", 0.0]]),
    "ids that are text": change_model(vocab={"a": "0", "b": 1}),
    "ids of 10**18": change_model(vocab={"a": 10**18}),
    "characters beyond the bytes": merge(["a", "\u65e5"]),
    "half a surrogate": lambda spec: spec.update(
        model={"type": "WordLevel", "vocab": {"\ud800": 0}}, added_tokens=[]
    ),
    "a normalizer": lambda spec: spec.update(
        normalizer={"type": "Replace", "pattern": {"String": "a"}, "content": "<|system|>"}
    ),
}


@pytest.mark.parametrize("change", HOSTILE_TOKENIZERS.values(), ids=HOSTILE_TOKENIZERS)
def test_a_hostile_tokenizer_is_refused(folder, change):
    spec = json.loads((folder / "tokenizer.json").read_text())
    change(spec)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(Mismatch, match=r"tokenizer\.json: ") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


# --- safetensors


def change_header(data, **changes):
    """Return the file with the entries of its header changed."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name, change in changes.items():
        header[name].update(change)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def change_wte(**changes):
    return lambda data: change_header(data, **{"transformer.wte.weight": changes})


LYING_WEIGHTS = {
    "a header of 2**63 bytes": lambda data: (2**63).to_bytes(8, "little") + data[8:],
    "a header longer than the file": lambda data: len(data).to_bytes(8, "little") + data[8:],
    "a header of blanks": lambda data: (10**8).to_bytes(8, "little") + b" " * 10**6,
    "no header": lambda data: b"",
    "offsets that overlap": change_wte(data_offsets=[0, 4]),
    "offsets beyond the end": change_wte(data_offsets=[10**12, 10**12 + 49152]),
    "offsets that go back": change_wte(data_offsets=[49152, 0]),
    "a shape of 2**64": change_wte(shape=[2**32, 2**32]),
    "a negative shape": change_wte(shape=[-384, -32]),
    "another type": change_wte(dtype="F64"),
    "no type": change_wte(dtype="PICKLE"),
    "bytes behind the end": lambda data: data + bytes(99),
}


def load_in_the_stock_way(folder):
    return transformers.GPT2LMHeadModel.from_pretrained(folder)


@pytest.mark.parametrize(
    "load", [load_model, pytest.param(load_in_the_stock_way, marks=pytest.mark.xfail(strict=True))]
)
@pytest.mark.parametrize("change", LYING_WEIGHTS.values(), ids=LYING_WEIGHTS)
def test_weights_whose_header_lies_are_refused_in_one_line(folder, change, load):
    path = folder / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(Damaged, match="the weights cannot be read") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_weights_that_are_no_floats_are_refused(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["transformer.ln_f.weight"] = weights["transformer.ln_f.weight"].to(torch.int8)
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(Mismatch, match="int8, not plain floats"):
        load_model(folder)


# --- going on with a run


@pytest.fixture(scope="module")
def stranger_run(tmp_path_factory):
    """A run that stopped at step 4 of 8, and the words that go on with it."""
    root = tmp_path_factory.mktemp("stranger")
    data = write_chats(root / "data", [talk("Hi", "Hello.")] * 6)
    (data / "chat_template.jinja").write_text("{{ 'my password' }}")
    config = write_config(root / "shape.json")
    run = root / "run"
    code, errors = run_script(train, build_flags(data, run, config, max_steps=4, save_steps=4))
    assert code == 0, errors
    (run / "COMPLETE").unlink()
    return run, build_flags(data, run, config, max_steps=8, save_steps=4, allow_change="max_steps")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_resuming_never_runs_a_pickle(stranger_run, tmp_path, name):
    run, words = stranger_run
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    words = [str(copy) if word == str(run) else word for word in words]
    folder, canary = copy / "checkpoint-4", tmp_path / "canary"
    manifest = json.loads((folder / "manifest.json").read_text())
    torch.save({"state": Bomb(canary)}, folder / name)
    write_manifest(folder, {key: value for key, value in manifest.items() if key != "files"})
    code, errors = run_script(train, words)
    assert not canary.exists()
    assert code == Damaged.exit_code, errors
    assert "Traceback" not in errors
    torch.load(folder / name, weights_only=False)
    assert canary.exists(), "the payload is real"


def test_a_template_in_the_data_does_not_get_into_a_checkpoint(stranger_run):
    run, _ = stranger_run
    assert (run / "checkpoint-4" / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    assert "password" not in (run / "checkpoint-4" / "tokenizer_config.json").read_text()


def test_a_run_writes_through_no_link(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in (".lock", "train.log"):
        run = tmp_path / f"run{name}"
        run.mkdir()
        (run / name).symlink_to(victim)
        data = write_chats(tmp_path / f"data{name}", [talk("Hi", "Hello.")] * 6)
        words = build_flags(data, run, write_config(tmp_path / "shape.json"), max_steps=1)
        code, errors = run_script(train, words)
        assert code in (73, 74), errors
        assert victim.read_text() == "precious"
    with pytest.raises(OSError, match="symbolic link"), open(run / "train.log", opener=atomic.open_no_link):
        pass


# --- data


def test_a_pickle_inside_a_parquet_schema_is_not_loaded(tmp_path):
    canary = tmp_path / "canary"
    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Bomb(canary)),
    }
    fields = [pyarrow.field(name, pyarrow.string(), metadata=metadata) for name in ROW]
    table = pyarrow.table({name: [text] for name, text in ROW.items()}, schema=pyarrow.schema(fields))
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert [located.row for located in read_rows(str(tmp_path / "rows.parquet"))] == [ROW]
    assert not canary.exists()
    schema = pyarrow.parquet.read_schema(tmp_path / "rows.parquet")
    assert schema.field(0).metadata[b"ARROW:extension:metadata"] == pickle.dumps(Bomb(canary))
    pickle.loads(pickle.dumps(Bomb(canary)))
    assert canary.exists(), "the payload is real"


@pytest.mark.parametrize("name", ["hub:../secret", "hub:/etc", "hub:.", "hub:a/b/c", "hub:", "hub:data"])
def test_a_name_on_the_hub_is_no_path(tmp_path, monkeypatch, name):
    write_rows(tmp_path / "data" / "train.jsonl")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadFlag, match="is no name on the Hub"):
        find_place(name)


CARDS = {
    "one file": "train.jsonl",
    "a list": "[train.jsonl]",
    "an object": "{train: train.jsonl}",
    "a pattern": "'*.jsonl'",
    "splits": "[{split: train, path: train.jsonl}]",
}


@pytest.mark.parametrize("files", CARDS.values(), ids=CARDS)
def test_a_card_may_name_its_files_in_any_form(tmp_path, files):
    write_rows(tmp_path / "set" / "train.jsonl")
    write_card(tmp_path / "set", files)
    assert len(list(read_rows(str(tmp_path / "set")))) == 2


@pytest.mark.parametrize("files", ["3", "[[train.jsonl]]", "'[: '", "*x", "!!python/object:os.system x"])
def test_a_broken_card_is_refused(tmp_path, files):
    write_rows(tmp_path / "set" / "train.jsonl")
    write_card(tmp_path / "set", files)
    with pytest.raises(BadData):
        list(read_rows(str(tmp_path / "set")))


def test_a_fifo_or_a_script_in_a_data_folder_is_passed_over(tmp_path):
    folder = tmp_path / "set"
    write_rows(folder / "a.jsonl")
    os.mkfifo(folder / "b.jsonl")
    write_code(folder, "set", tmp_path / "canary")
    (folder / "c.jsonl").symlink_to(folder / "c.jsonl")
    assert len(list(read_rows(str(folder)))) == 2
    assert not (tmp_path / "canary").exists()
    with pytest.raises(MissingInput, match="neither a file nor a folder"):
        find_place(str(folder / "b.jsonl"))


def read_without_limit(path, monkeypatch):
    monkeypatch.setattr(archives, "FREE_BYTES", 1 << 40)
    return list(read_rows(str(path)))


def read_with_limit(path, monkeypatch):
    monkeypatch.setattr(archives, "FREE_BYTES", 1 << 20)
    return list(read_rows(str(path)))


@pytest.mark.parametrize(
    "read", [read_with_limit, pytest.param(read_without_limit, marks=pytest.mark.xfail(strict=True))]
)
@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_an_archive_that_swells_is_refused(tmp_path, monkeypatch, suffix, read):
    line = json.dumps({**ROW, "answer": "a" * 10_000}).encode() + b"\n"
    path = tmp_path / f"rows{suffix}"
    with pyarrow.output_stream(str(path), compression="gzip" if suffix.endswith("gz") else "zstd") as file:
        file.write(line * 400)
    assert path.stat().st_size * 100 < 4_000_000
    with pytest.raises(BadData, match=r"holds more than [\d,]+ bytes"):
        read(path, monkeypatch)


def test_an_archive_of_text_is_read_whole(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl.gz"
    chance = random.Random(0)
    rows = [{**ROW, "answer": f"{chance.getrandbits(9000)}"} for _ in range(500)]
    with pyarrow.output_stream(str(path), compression="gzip") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    monkeypatch.setattr(archives, "FREE_BYTES", 1000)
    assert [located.row for located in read_rows(str(path))] == rows
