"""Sides of a benchmark: they end when they are told to, and with the benchmark, however that ends."""

import importlib
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.turns import TrainerSide
from firstwords.args import run_main

ROOT = Path(__file__).parent.parent

# A rival's trainer: a figure, a turn, and words at its end, as Hugging Face's Trainer has them.
SIDE = """
import sys
print('figure: {"tokens": 6, "seconds": 2}', flush=True)
while sys.stdin.readline():
    print("something of a library", flush=True)
    print('figure: {"tokens": 8, "seconds": 2}', flush=True)
print({"train_runtime": 1.0}, "x" * 1_000_000, flush=True)  # more than a pipe holds
"""
# A foreign trainer: steps without end, and a child that it starts.
NANOGPT = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
while True:
    print("iter 7: loss 4.25, time 500.00ms", flush=True)
"""
# A benchmark that has paused its side, and waits to be killed.
BENCHMARK = """
import sys
from pathlib import Path
from benchmarks.turns import NanoGPT
side = NanoGPT(Path(sys.argv[1]), [], tokens=10, steps=2, warm_up=1)
print(side.run(), side.figures[0]["loss"], side.figures[0]["step"], side._process.pid, flush=True)
input()
side.close()
"""


def test_a_side_ends_by_itself_and_says_its_last_words(tmp_path, monkeypatch, capfd):
    (tmp_path / "side.py").write_text(SIDE)
    monkeypatch.chdir(tmp_path)
    side = TrainerSide("side", ["ours"])
    assert side.run() == 4.0
    side.close()
    assert side._process.returncode == 0, "it met a pipe that nobody reads"
    assert capfd.readouterr().err == ""


def list_group(group):
    """Return the numbers of the processes of a group."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(folder.name)) == group:
                found.append(int(folder.name))
        except ProcessLookupError:
            continue
    return found


@pytest.mark.parametrize("how", ["close", "kill"])
def test_a_paused_trainer_ends_with_its_benchmark(tmp_path, how):
    (tmp_path / "train.py").write_text(NANOGPT)
    words = [sys.executable, "-c", BENCHMARK, str(tmp_path)]
    bench = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    rate, loss, step, group = bench.stdout.readline().split()
    assert (float(rate), float(loss), step) == (20.0, 4.25, "8")
    group = list_group(int(group))
    assert len(group) == 2
    ends = [os.pidfd_open(number) for number in group]
    if how == "kill":
        bench.send_signal(signal.SIGKILL)
    bench.communicate("go\n" if how == "close" else None)
    assert bench.returncode == (0 if how == "close" else -signal.SIGKILL)
    for end in ends:
        assert select.select([end], [], [], 20)[0], "it outlives the benchmark"
        os.close(end)


@pytest.mark.parametrize("name", ["train", "memory", "sft", "loss", "generate", "preflight", "scale"])
def test_without_a_gpu_its_figures_are_refused_in_one_line(monkeypatch, capsys, tmp_path, name):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    needed = {"sft": ["--data_dir", str(tmp_path)], "loss": ["--out_dir", str(tmp_path / "out")]}
    bench = importlib.import_module(f"benchmarks.bench_{name}")
    with pytest.raises(SystemExit) as stop:
        run_main(bench.main, ["--device", "cuda", *needed.get(name, [])])
    errors = capsys.readouterr().err
    assert (stop.value.code, errors.count("\n")) == (2, 1)
    assert errors.startswith("error: --device cuda: torch ")
    assert list(tmp_path.iterdir()) == []
