"""The whole journey in processes of their own: the five scripts in turn, and the tutorial as it stands.

The tutorial's `sh run` blocks are executed in order in one folder, scaled down by the table of its last part;
its experiments, `sh slow`, whole and on what those made.
"""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_docs import PARSERS, ROOT, list_commands, read_blocks, read_table

SECONDS = 600
TEXT = (
    "the old stone waits by the river and the small bird sings over the door before the seventh winter "
    "who knows where the ship goes what the wind carries and which letter the morning never opens"
)


@pytest.fixture
def environment(monkeypatch):
    """This Python is `python`, and nothing is downloaded."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def run_bash(text: str, folder: Path) -> str:
    """Run shell text in a folder and return what it wrote to stdout.

    Raises:
        AssertionError: with all output, when it failed.
    """
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{text}\nexit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def read_json(path: Path) -> dict:
    """Return the content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def link_clone(folder: Path) -> None:
    """Make a folder look like a clone, as far as the tutorial's commands need it."""
    for name in (*PARSERS, "firstwords", "configs", "docs"):
        (folder / name).symlink_to(ROOT / name)


# --- five scripts, one after the other


def write_journey_data(folder: Path) -> None:
    """Write a text of 40 documents, and four questions with their answers."""
    texts = [" ".join(random.Random(n).choices(TEXT.split(), k=40)) for n in range(40)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    asked = {
        "Who sings?": "The old stone sings.",
        "What waits?": "Seven lamps, by the door.",
        "Where is the sun?": "Behind the north wind.",
        "Which door?": "The seventh.",
    }
    rows = [{"instruction": question, "input": "", "output": answer} for question, answer in asked.items()]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


JOURNEY = """
F="--seq_len 64 --batch_size 2 --eval_steps 0 --optim muon --lr 1e-2"
python prep_text_corpus.py --dataset texts.jsonl --out_dir text --tokenizer bpe:300
python train.py --data_dir text --model_dir base --cfg small_test $F --max_steps 20 --no_assistant_only_loss
python prep_data.py --dataset chats.jsonl --out_dir chat --tokenizer text
python train.py --data_dir chat --model_dir talk --init_model_dir base $F --max_steps 60
python evaluate.py --model_dir talk
"""


def test_the_journey_ends_in_a_chat_that_says_what_was_learned(environment, tmp_path):
    link_clone(tmp_path)
    write_journey_data(tmp_path)
    run_bash(JOURNEY, tmp_path)
    base, talk = (read_json(tmp_path / run / "manifest.json") for run in ("base", "talk"))
    assert talk["parent"]["weights"] == base["files"]["model.safetensors"]["sha256"]
    assert talk["tokenizer_hash"] == read_json(tmp_path / "text" / "corpus.json")["tokenizer_hash"]
    figures = read_json(tmp_path / "talk" / "evaluation.json")
    report = read_json(tmp_path / "chat" / "data_report.json")
    assert figures["step"] == 60
    assert figures["val_tokens"] == report["splits"]["val"]["learned_tokens"]
    assert 0 < figures["val_loss"] < 20

    rows = (tmp_path / "chat" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    question, answer = (turn["content"] for turn in json.loads(rows[0])["messages"])
    asked = f"python inference.py --model_dir talk --device cpu --prompt {question!r}"
    assert run_bash(asked, tmp_path) == f"{answer}\n"


# --- the tutorial


def read_scaling() -> list[tuple[str, str, str]]:
    """Return the tutorial's table of (script, flag, value)."""
    return [tuple(cell.strip("`") for cell in row) for row in read_table("tutorial.md", "script")]


def scale_down(text: str, table: list[tuple[str, str, str]]) -> str:
    """Put the table's values into the commands of a block: in place of the flag's, or as a new flag."""
    lines = text.replace("\\\n", " ").splitlines()
    for script, flag, value in table:
        lines = [_scale_line(line, f"python {script}", flag, value) for line in lines]
    return "\n".join(lines) + "\n"


def _scale_line(line: str, command: str, flag: str, value: str) -> str:
    if not line.startswith(f"{command} "):
        return line
    scaled, replaced = re.subn(rf"(?<= {flag} )\S+", value, line)
    return scaled if replaced else line.replace(command, f"{command} {flag} {value}", 1)


def test_scale_down_replaces_or_adds():
    table = [("train.py", "--max_steps", "4"), ("train.py", "--batch_size", "2")]
    text = "echo hi\npython train.py --cfg x \\\n  --max_steps 500\npython evaluate.py --model_dir m\n"
    scaled = (
        "echo hi\npython train.py --batch_size 2 --cfg x    --max_steps 4\npython evaluate.py --model_dir m\n"
    )
    assert scale_down(text, table) == scaled


def test_every_line_of_the_scaling_table_is_used_and_known():
    commands = list_commands("sh run", documents=("tutorial.md",))
    for script, flag, value in read_scaling():
        called = [command for command in commands if command.script == script]
        assert called, f"no `sh run` block calls {script}"
        PARSERS[script]([*called[0].flags, flag, value])


def check_shown(shown: str, printed: str) -> None:
    """Compare output that the page shows with what came; lines with `...` stand for what was left out."""
    lines = printed.splitlines()
    for line in shown.splitlines():
        assert "..." in line or line in lines, f"the page shows {line!r}, but it printed\n{printed}"


def is_repeatable(text: str) -> bool:
    """Tell whether a block prints the same on every machine: no weights and no installed Python in it."""
    return not re.search(r"train\.py|evaluate\.py|inference\.py|pydocs", text)


def test_check_shown_finds_a_difference():
    check_shown("a\n...\nc\n", "a\nb\nc\n")
    with pytest.raises(AssertionError):
        check_shown("a\nd\n", "a\nb\nc\n")


def test_the_tutorial_runs_as_it_stands(environment, tmp_path):
    link_clone(tmp_path)
    blocks = read_blocks("tutorial.md")
    compared = 0
    for block, following in zip(blocks, blocks[1:], strict=False):
        if block.kind != "sh run":
            continue
        printed = run_bash(scale_down(block.text, read_scaling()), tmp_path)
        if following.kind == "text" and is_repeatable(block.text):
            check_shown(following.text, printed)
            compared += 1
    assert compared >= 2
    for run in ("parrot", "pydocs_text", "pydocs_chat"):
        assert (tmp_path / "runs" / run / "COMPLETE").read_text() == "step 4\n"
    assert read_json(tmp_path / "runs/pydocs_chat/evaluation.json")["val_loss"] > 0


# --- the tutorial's experiments


# What is other here than where the page was written: fewer documents of Python's, and made-up names.
OTHER_DATA = r"pydocs|docs\.sizes|names\.txt"
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")


def check_alike(shown: str, printed: str) -> None:
    """Compare what an experiment printed with the page: the same words, and numbers as on another machine.

    Numbers may differ by a quarter, or by 0.02; lines with `...` stand for what was left out.
    """
    lines = [(NUMBER.sub("#", line), read_numbers(line)) for line in printed.splitlines()]
    for line in shown.splitlines():
        if "..." in line:
            continue
        words, numbers = NUMBER.sub("#", line), read_numbers(line)
        near = [there for text, there in lines if text.split() == words.split()]
        assert any(are_near(numbers, there) for there in near), f"{line!r} is not like any of\n{printed}"


def read_numbers(line: str) -> list[float]:
    """Return the numbers of a line."""
    return [float(number.replace(",", "")) for number in NUMBER.findall(line)]


def are_near(some: list[float], others: list[float]) -> bool:
    """Tell whether numbers are those of another machine."""
    pairs = zip(some, others, strict=True)
    return all(abs(one - other) <= max(0.25 * abs(one), 0.02) for one, other in pairs)


@pytest.mark.parametrize(
    ("printed", "is_alike"),
    [
        ("loss 1.10 'ab'\nstep 3\n", True),
        ("loss 1.10   'ab'\nmore\nstep 3\n", True),
        ("loss 1.40 'ab'\nstep 3\n", False),
        ("loss 1.00 'ac'\nstep 3\n", False),
        ("loss 1.00 'ab'\n", False),
    ],
)
def test_check_alike_sees_other_words_and_far_numbers(printed, is_alike):
    shown = "loss 1.00 'ab'\n...\nstep 3\n"
    if is_alike:
        check_alike(shown, printed)
    else:
        with pytest.raises(AssertionError):
            check_alike(shown, printed)


@pytest.mark.slow
def test_the_experiments_of_the_tutorial_show_what_it_says(environment, tmp_path):
    link_clone(tmp_path)
    names = ["".join(random.Random(n).choices("aeilmnorst", k=3 + n % 5)) for n in range(600)]
    (tmp_path / "names.txt").write_text("\n".join(sorted(set(names))) + "\n")
    blocks = read_blocks("tutorial.md")
    compared = 0
    for block, following in zip(blocks, blocks[1:], strict=False):
        if block.kind == "sh run":
            run_bash(scale_down(block.text, read_scaling()), tmp_path)
        elif block.kind == "sh slow":
            printed = run_bash(block.text, tmp_path)
            if following.kind == "text" and not re.search(OTHER_DATA, block.text):
                check_alike(following.text, printed)
                compared += 1
    assert compared >= 8
