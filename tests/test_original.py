"""The words of the command line that people know, as a shell takes them: nohup, LATEST, the environment.

The commands are README's, in small: another shape, few rows, no GPU; and text of ours in place of the Hub's.
"""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml
from test_docs import PARSERS, ROOT, Command, list_commands, prepare_seed, read_blocks, stand_in
from test_journey import environment, link_clone, read_json, run_bash, scale_down  # noqa: F401
from tiny import write_config

import prep_data
import prep_text_corpus
from firstwords.args import parse_train_args

SMALL = [
    ("train.py", "--cfg", "c.json"),
    ("train.py", "--seq_len", "64"),
    ("train.py", "--batch_size", "2"),
    ("train.py", "--grad_accum", "1"),
    ("train.py", "--max_steps", "8"),
    ("train.py", "--warmup_steps", "0.1"),
    ("train.py", "--log_steps", "1"),
    ("train.py", "--save_steps", "4"),
]
# What the original's users type, flag by flag; each has to mean something here.
ORIGINAL = (
    "--data_dir d --model_dir m --cfg baseline_124m --seq_len 1024 --batch_size 8 --grad_accum 4 --lr 3e-4 "
    "--warmup_steps 1000 --max_steps 50000 --weight_decay 0.1 --bf16 --log_steps 20 --save_steps 1000 "
    "--no_assistant_only_loss"
)


def find_block(words: str) -> str:
    """Return the block of README that has these words."""
    (block,) = (block for block in read_blocks("README.md") if words in block.text)
    return block.text


def scale(text: str) -> str:
    """Return a block of README in small: the values of `SMALL`, and the CPU."""
    table = [row for row in SMALL if row[1] in text]
    bare = text.replace("\\\n", " ").replace("nohup ", "").replace(" --bf16", " --device cpu")
    return scale_down(bare, table).replace("python train.py", "nohup python train.py")


def test_every_flag_of_the_original_has_its_meaning():
    dashed = re.sub(r"(?<=[a-z])_(?=[a-z])", "-", ORIGINAL.replace("baseline_124m", "x"))
    for words in (ORIGINAL.replace("baseline_124m", "x").split(), dashed.split()):
        flags, extra = parse_train_args(words)
        assert (flags.seq_len, flags.batch_size, flags.grad_accum, flags.lr) == (1024, 8, 4, 3e-4)
        assert (flags.warmup_steps, flags.max_steps, flags.weight_decay) == (1000, 50_000, 0.1)
        assert (flags.log_steps, flags.save_steps, flags.bf16) == (20, 1000, True)
        assert not flags.assistant_only_loss
        assert extra == {}
    assert str(parse_train_args(["--init_model_dir", "runs/base"])[0].init_model_dir) == "runs/base"
    for script in ("prep_data.py", "prep_text_corpus.py"):
        args = PARSERS[script](["--dataset", "alpaca", "--out-dir", "data/x"])
        assert str(args.out_dir) == "data/x"
    args = PARSERS["inference.py"](["--model_dir", "m", "--device", "cpu", "--temperature", "0.7"])
    assert (args.device, args.temperature) == ("cpu", 0.7)


def make_data(folder: Path) -> None:
    """Run README's prep commands of both stages with files of ours in place of the Hub's."""
    prepare_seed(folder)
    wanted = {"data/owt": prep_text_corpus, "data/alpaca": prep_data}
    for command in list_commands("sh hub", documents=("README.md",)):
        out_dir = find_out_dir(command)
        if out_dir in wanted:
            wanted[out_dir].main(stand_in(command, folder))


def find_out_dir(command: Command) -> str | None:
    """Return the folder that a prep command makes."""
    words = command.flags
    return words[words.index("--out_dir") + 1] if "--out_dir" in words else None


@pytest.mark.slow
def test_both_stages_in_the_background_and_a_chat_with_the_newest_checkpoint(environment, tmp_path):  # noqa: F811
    link_clone(tmp_path)
    write_config(tmp_path / "c.json")
    make_data(tmp_path)
    text, chat = (scale(find_block(f"nohup python train.py --data_dir data/{x}")) for x in ("owt", "alpaca"))
    assert text.rstrip().endswith("&")
    assert chat.rstrip().endswith("&")
    latest = find_block("LATEST=$(ls -1dt runs/chat/checkpoint-* | head -1)")
    run_bash(f"{text}\nwait $!", tmp_path)
    assert read_json(tmp_path / "runs/base/manifest.json")["step"] == 8

    # The checkpoint that the shell has named must still be there when the chat opens it.
    endless = re.sub(r"--epochs \S+", "--epochs 9999 --save_total_limit 500", chat)
    script = f"""
trap 'kill -TERM $(jobs -p) 2> /dev/null || true' EXIT
{endless}
until ls runs/chat/checkpoint-*/manifest.json > newest 2> /dev/null; do kill -0 $!; sleep 0.2; done
{{ {latest.rstrip()} --max_new_tokens 4 ; }} > reply <<< 'Add the numbers 1.'
grep "^step " runs/chat/train.log | tail -n 1 > last
kill -TERM $!
wait $! && echo finished || echo "ended with $?"
"""
    assert run_bash(script, tmp_path).splitlines()[-1] == "ended with 75", "it was training all the while"
    assert (tmp_path / "reply").read_text().strip()
    assert (tmp_path / "last").read_text().startswith("step ")


@pytest.mark.slow
def test_the_pip_part_of_the_environment_installs(tmp_path):
    """In an environment of its own, which sees the packages that are here; what differs is installed."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (site / "here.pth").write_text(sysconfig.get_path("purelib") + "\n")
    *_, pip_part = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    for line in pip_part["pip"]:
        subprocess.run([python, "-m", "pip", "install", *line.split()], cwd=ROOT, check=True)
    for script in PARSERS:
        shown = subprocess.run(
            [python, ROOT / script, "--help"],
            env=os.environ | {"PYTHONPATH": ""},
            capture_output=True,
            text=True,
            check=True,
        )
        assert shown.stdout.startswith("usage: ")
