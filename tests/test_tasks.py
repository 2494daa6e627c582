"""HellaSwag by our scorer and by lm-eval: the same item for item."""

import json
import random

import pytest
from tiny import BYTES, build_flags, invent_talks, run_script, write_chats, write_config, write_store

import evaluate
import train
from firstwords.checkpoint import load_model
from firstwords.errors import BadData, BadFlag, MissingInput
from firstwords.tasks import (
    CORE,
    Item,
    choose_tasks,
    parse_eval_tasks,
    read_hellaswag,
    score_endings,
    score_items,
)

WORDS = ["tea", "bird", "of", "seven", "x", "[step]", "the", "old", "[title]", "stone", "", "by", "river"]


def invent_items(count, seed=0):
    """Items in HellaSwag's layout, with its marks, blanks, and endings of very different length."""
    pick = random.Random(seed)

    def sentence(most):
        return " ".join(pick.choices(WORDS, k=pick.randint(1, most)))

    return [
        {
            **{"ind": place, "activity_label": sentence(2), "ctx_a": sentence(9).capitalize()},
            **{"ctx_b": pick.choice(["", "the bird", "it [substeps]"]), "ctx": "unused"},
            **{
                "endings": [f"{sentence(n)} end{n}." for n in (2, 4, 12, 3)],
                "label": pick.choice(["0", "1", "2", "3"]),
            },
            **{"split": "val", "split_type": "zeroshot", "source_id": "test"},
        }
        for place in range(count)
    ]


def write_items(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run with a context of 64 tokens, which longer items leave, and 30 items."""
    folder = tmp_path_factory.mktemp("tasks")
    cfg = write_config(folder / "c.json", initializer_range=0.3)
    store = write_store(folder / "store", ["tea and birds " * 30] * 5, ["birds and tea " * 9])
    words = build_flags(store, folder / "a", cfg, max_steps=2, no_assistant_only_loss=True)
    assert run_script(train, words)[0] == 0
    write_items(folder / "items.jsonl", invent_items(30))
    return folder


TASK = """
task: hellaswag_here
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {data}
output_type: multiple_choice
validation_split: validation
process_docs: !function prepare.prepare
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "choices"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


@pytest.fixture(scope="module")
def task_dir(folder, tmp_path_factory):
    """A folder with lm-eval's HellaSwag over our file: its own preparation and metrics."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    tasks = tmp_path_factory.mktemp("yaml")
    (tasks / "here.yaml").write_text(TASK.format(data=folder / "items.jsonl"))
    (tasks / "prepare.py").write_text("from lm_eval.tasks.hellaswag.utils import process_docs as prepare\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tasks / "cache")
        yield tasks


@pytest.fixture(scope="module")
def theirs(folder, task_dir):
    """What lm-eval finds for the 30 items."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=str(folder / "a"), dtype="float32", max_length=64, device="cpu", batch_size=4)
    harness = TaskManager(include_path=str(task_dir), include_defaults=False)
    return simple_evaluate(model=model, tasks=["hellaswag_here"], task_manager=harness, bootstrap_iters=0)


def check_scores(score, folder, found):
    """What `score` picks and weighs is what lm-eval does, item for item."""
    theirs = sorted(found["samples"]["hellaswag_here"], key=lambda sample: sample["doc_id"])
    items = read_hellaswag(str(folder / "items.jsonl"), None)
    ours = score(load_model(folder / "a"), BYTES, items, context=64, batch_size=7)
    assert len(ours) == len(theirs) == 30
    for outcome, sample in zip(ours, theirs, strict=True):
        nats = [float(response[0]) for response in sample["filtered_resps"]]
        assert outcome.nats == pytest.approx(nats, rel=1e-4)
        assert float(outcome.pick == outcome.gold) == sample["acc"]
        assert float(outcome.pick_norm == outcome.gold) == sample["acc_norm"]
    scores = found["results"]["hellaswag_here"]
    assert score_items(ours) == {"acc": scores["acc,none"], "acc_norm": scores["acc_norm,none"]}
    assert len({outcome.pick for outcome in ours}) > 1
    assert any(outcome.pick != outcome.pick_norm for outcome in ours)


def test_our_scores_are_those_of_lm_eval(folder, theirs):
    check_scores(score_endings, folder, theirs)


def test_an_ending_without_its_blank_is_seen(folder, theirs):
    def without_blank(model, tokenizer, items, **options):
        glued = [Item(item.context + " ", item.endings, item.gold) for item in items]
        return score_endings(model, tokenizer, glued, **options)

    with pytest.raises(AssertionError):
        check_scores(without_blank, folder, theirs)


def test_evaluate_runs_tasks_on_our_folder_as_it_is(folder, task_dir, tmp_path, capsys):
    words = ["--model_dir", folder / "a", "--tasks", "hellaswag_here", "--task_dir", task_dir]
    assert run_script(evaluate, [*words, "--limit", "20", "--out_dir", tmp_path, "--device", "cpu"])[0] == 0
    found = json.loads((tmp_path / "evaluation_tasks.json").read_text())
    items = read_hellaswag(str(folder / "items.jsonl"), 20)
    scores = score_items(score_endings(load_model(folder / "a"), BYTES, items, context=64))
    results = found["results"]["hellaswag_here"]
    assert {"acc": results["acc,none"], "acc_norm": results["acc_norm,none"]} == scores
    assert (found["step"], found["n-samples"]["hellaswag_here"]["effective"]) == (2, 20)
    assert f"acc_norm {scores['acc_norm']:.4f}" in " ".join(capsys.readouterr().out.split())


def test_names_of_tasks():
    harness = type("Harness", (), {"all_tasks": ["hellaswag", "piqa", "blimp", "copa"]})()
    assert choose_tasks("piqa, blimp,piqa", harness) == ["piqa", "blimp"]
    assert choose_tasks("core", harness) == ["hellaswag", "copa", "piqa"]
    with pytest.raises(
        BadFlag, match="--tasks hellaswagg: lm-eval has no such task; did you mean 'hellaswag'"
    ):
        choose_tasks("hellaswagg", harness)
    with pytest.raises(BadFlag, match="names no task"):
        choose_tasks(" ,", harness)


@pytest.fixture(scope="module")
def harness():
    """lm-eval's list of tasks, which takes seconds to read."""
    return pytest.importorskip("lm_eval.tasks", reason="lm-eval is not installed").TaskManager()


def test_the_tasks_of_papers_have_their_names_in_lm_eval(harness):
    names = "hellaswag,arc_easy,piqa,lambada_openai,blimp,core"
    found = choose_tasks(names, harness)
    assert len(found) == len(CORE) + 1, "all of CORE's that are named, and BLiMP"


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (
            ["--tasks", "hellaswagg"],
            2,
            "--tasks hellaswagg: lm-eval has no such task; did you mean 'hellaswag'?",
        ),
        (["--tasks", "piqa", "--task_dir", "nowhere"], 2, "--task_dir nowhere: is no folder"),
        (["--tasks", "piqa", "--limit", "2"], 66, "--tasks piqa: their data cannot be had"),
    ],
)
def test_a_task_that_cannot_be_run(folder, tmp_path, harness, monkeypatch, words, code, why):
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_path: harness)
    found, errors = run_script(evaluate, ["--model_dir", folder / "a", "--out_dir", tmp_path, *words])
    assert found == code, errors
    assert why in errors.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_without_lm_eval_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setattr("firstwords.tasks.find_spec", lambda name: None)
    code, errors = run_script(evaluate, ["--model_dir", folder / "a", "--tasks", "piqa"])
    assert code == 2
    assert errors == "error: --tasks: lm-eval is not installed; pip install 'lm-eval[hf]'\n"


# --- the items


def test_marks_and_blanks_go(tmp_path):
    row = invent_items(1)[0] | {
        **{"activity_label": "Tea", "ctx_a": " [header] How to pour [title] Heat it.", "ctx_b": "then You"},
        **{"endings": ["pour [substeps] it.", " wait."], "label": 1},
    }
    path = write_items(tmp_path / "x.jsonl", [row])
    # What stands behind the label is not at the ends of the text, and keeps one of its two blanks.
    assert read_hellaswag(str(path), None) == [
        Item("Tea:  How to pour. Heat it. Then you", ("pour it.", "wait."), 1)
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        {"label": 4},
        {"label": ""},
        {"endings": ["one"]},
        {"endings": None},
        {"ctx_b": 3},
        {"endings": ["a", "[x]"]},
    ],
)
def test_a_row_that_is_no_item(tmp_path, wrong):
    path = write_items(tmp_path / "x.jsonl", [*invent_items(1), invent_items(1)[0] | wrong])
    with pytest.raises(BadData, match="x.jsonl:2: is no item of HellaSwag"):
        read_hellaswag(str(path), None)


def test_a_folder_gives_its_validation_split_and_a_limit_the_first(tmp_path):
    write_items(tmp_path / "train.jsonl", invent_items(3, seed=1))
    write_items(tmp_path / "validation.jsonl", invent_items(5, seed=2))
    items = read_hellaswag(str(tmp_path), 4)
    assert items == read_hellaswag(str(tmp_path / "validation.jsonl"), None)[:4]


def test_items_of_the_hub_without_a_network():
    with pytest.raises(MissingInput, match="Rowan/hellaswag: cannot be read from the Hub"):
        read_hellaswag("hub:Rowan/hellaswag", 3)


def test_how_many_items():
    assert parse_eval_tasks("hellaswag:200") == 200
    assert parse_eval_tasks("hellaswag") is None


def test_a_chat_model_is_scored_too(tmp_path):
    chats = write_chats(tmp_path / "chats", invent_talks(9))
    cfg = write_config(tmp_path / "c.json")
    assert run_script(train, build_flags(chats, tmp_path / "b", cfg, max_steps=1))[0] == 0
    path = write_items(tmp_path / "items.jsonl", invent_items(3))
    outcomes = score_endings(load_model(tmp_path / "b"), BYTES, read_hellaswag(str(path), None))
    assert all(len(outcome.nats) == 4 and max(outcome.nats) < 0 for outcome in outcomes)
