"""`inference.py --follow` beside a training that runs, each a process of its own."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
from nursery import ALONE, ROOT
from tiny import build_flags, invent_talks, write_chats

SMALL = ROOT / "configs" / "models" / "small_test.json"


def start(script, words, folder, **pipes):
    with open(folder / f"{script}.err", "w") as err:
        command = [sys.executable, script, *map(str, words)]
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | ALONE, stderr=err, text=True, **pipes)


def wait_for_newer(run, than, training):
    """Wait until the run has a checkpoint of a later step, while it trains."""
    while True:
        steps = [int(path.name.partition("-")[2]) for path in run.glob("checkpoint-*")]
        if max(steps, default=0) > than:
            return max(steps)
        assert training.poll() is None, "the training ended"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_chat_moves_on_with_a_training(tmp_path):
    run = tmp_path / "run"
    data = write_chats(tmp_path / "data", invent_talks(200))
    words = build_flags(data, run, SMALL, max_steps=100_000, save_steps=20)
    training = start("train.py", words, tmp_path, stdout=subprocess.DEVNULL)
    try:
        wait_for_newer(run, 0, training)
        flags = ["--model_dir", run, "--device", "cpu", "--follow", "--json", "--max_new_tokens", "3"]
        chat = start("inference.py", flags, tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        seen = []
        for question in ("tea", "bird", "of"):
            if seen:
                wait_for_newer(run, seen[-1], training)
            chat.stdin.write(f"{question}\n")
            chat.stdin.flush()
            assert json.loads(chat.stdout.readline())["prompt"] == question
            seen.append(wait_for_newer(run, 0, training))
        chat.stdin.close()
        assert chat.wait() == 0
        told = re.findall(r"now step ([\d,]+)", (tmp_path / "inference.py.err").read_text())
        steps = [int(step.replace(",", "")) for step in told]
        assert len(steps) >= 2
        assert steps == sorted(set(steps))
        assert training.poll() is None
    finally:
        training.terminate()
        training.wait()
    assert training.returncode == 75
