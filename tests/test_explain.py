"""--explain: every flag in plain words, with its value and where it comes from."""

import re
from dataclasses import fields

import pytest
from tiny import build_flags, invent_talks, run_script, write_chats, write_config

import train
from firstwords.args import TrainFlags, find_origins
from firstwords.explain import WORDS, say_sameness


@pytest.fixture
def page(tmp_path, capsys):
    """The page of a run with a recipe: first line of each flag -> the lines below."""
    cfg = write_config(tmp_path / "c.json")
    data = write_chats(tmp_path / "chats", invent_talks(20))
    (tmp_path / "r.yaml").write_text("lr: 0.5\nbatch_size: 4\n")
    words = build_flags(data, tmp_path / "run", cfg, recipe=tmp_path / "r.yaml", explain=True, grad_accum=3)
    assert run_script(train, [*words, "--adam_beta2", "0.9"]) == (0, "")
    assert not (tmp_path / "run").exists()
    return capsys.readouterr().out


def test_every_flag_has_its_words():
    assert set(WORDS) == {spec.name for spec in fields(TrainFlags)}
    assert all(words.endswith(".") for words in WORDS.values())


def test_every_flag_is_on_the_page_with_its_value_and_where_it_comes_from(page):
    heads = [line for line in page.splitlines() if line.startswith("--")]
    assert [head.split()[0] for head in heads] == [
        *(f"--{spec.name}" for spec in fields(TrainFlags)),
        "--adam_beta2",
    ]
    assert "--lr 0.5  (from the recipe)  highest learning rate" in page
    assert "--batch_size 2  (from the command line)" in page
    assert "--weight_decay 0.1  (default)" in page
    assert "--adam_beta2 0.9  (given)" in page


def test_the_words_are_of_this_run(page):
    text = " ".join(page.split())
    assert (
        "The gradients of 3 micro-batches are added before a step, so that a step is taken on 6 rows" in text
    )
    assert "This run takes 12 steps" in text
    assert "here of 29,152 weights" in text
    assert "{" not in page


def test_nothing_is_said_to_be_the_same_to_the_bit_where_that_was_not_tried(page):
    assert " ".join(page.split()).count(", bit for bit.") == 3
    for device in ("cuda", "mps"):
        assert say_sameness(device) == "on a CPU bit for bit; on a GPU it was not tried"


def test_a_flag_beats_the_recipe_in_its_origin_too(tmp_path):
    (tmp_path / "r.yaml").write_text("lr: 0.5\nbf16: true\nseed: 3\n")
    origins = find_origins(["--recipe", str(tmp_path / "r.yaml"), "--seed", "4", "--adam_beta2", "0.9"])
    assert origins == {"recipe": "flag", "lr": "recipe", "bf16": "recipe", "seed": "flag"}


def test_what_nobody_said_is_not_given_and_a_device_that_was_found_is_chosen(tmp_path, capsys):
    cfg = write_config(tmp_path / "c.json")
    data = write_chats(tmp_path / "chats", invent_talks(20))
    assert run_script(train, build_flags(data, tmp_path / "run", cfg, device="auto", explain=True)) == (0, "")
    page = capsys.readouterr().out
    assert re.search(r"^--device (cpu|cuda|mps)  \(chosen by auto\)  ", page, re.M)
    assert "--hours  (not given)  hours of training" in page
    assert "--report_to  (not given)  wandb" in page
    assert "--warmup_steps 0.02  (default)" in page
    assert "None" not in page


def test_what_batch_tokens_chooses_is_no_default(tmp_path, capsys):
    cfg = write_config(tmp_path / "c.json")
    data = write_chats(tmp_path / "chats", invent_talks(20))
    flags = {"batch_size": None, "batch_tokens": 256, "explain": True}
    assert run_script(train, build_flags(data, tmp_path / "run", cfg, **flags)) == (0, "")
    page = capsys.readouterr().out
    assert "--batch_size 4  (chosen for --batch_tokens)" in page
    assert "--grad_accum 1  (chosen for --batch_tokens)" in page
