"""Sides of a comparison, each in a process of its own, that compute in turn.

    ours, rival = TrainerSide("benchmarks.bench_train", ["ours"]), NanoGPT(checkout, words)
    measure_pairs(ours.run, rival.run)          # the other one waits meanwhile

A side is set up and compiled once, whatever the number of pairs. One of Hugging Face's Trainer stops at every
line of its log until it is told to go on; a foreign script is stopped as by Ctrl-Z.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from transformers import TrainerCallback

MARK = "figure: "


class Turns(TrainerCallback):
    """In the process of a side: tell of each stretch of `logging_steps` steps, and wait for the next turn.

    Args:
        count: (first, last + 1) steps -> real tokens that they trained on.
        about: what else is told with every figure.
    """

    def __init__(self, count: Callable[[int, int], float], about: dict | None = None):
        self.count, self.about, self.first = count, about or {}, 0

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the clock of the warm-up."""
        self.begin = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **kwargs):
        """The loss in the line has been waited for: this is the end of the stretch on a GPU too."""
        if "loss" not in logs:
            return control
        seconds = time.perf_counter() - self.begin
        figure = {"tokens": self.count(self.first, state.global_step), "seconds": seconds}
        figure |= {"step": state.global_step, "loss": logs["loss"]}
        print(MARK + json.dumps(figure | self.about), flush=True)
        control.should_training_stop = not sys.stdin.readline()
        self.first, self.begin = state.global_step, time.perf_counter()
        return control


class TrainerSide:
    """A module's side, started as `python -m MODULE --side NAME ...`; its first stretch is the warm-up.

    Attributes:
        figures: all that it told, the warm-up's first; none before it has settled.
    """

    def __init__(self, module: str, words: list[str]):
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, "--side", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.figures = []

    def settle(self) -> None:
        """Wait until it has warmed up; sides that are started together compile together."""
        if not self.figures:
            self.figures.append(self._read())

    def run(self) -> float:
        """Let it train for a stretch; return real tokens per second."""
        self.settle()
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        self.figures.append(self._read())
        return self.figures[-1]["tokens"] / self.figures[-1]["seconds"]

    def _read(self) -> dict:
        for line in self._process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        raise SystemExit(f"{' '.join(self._process.args)}: ended with {self._process.wait()}")

    def close(self) -> None:
        """End it: at the end of its input it stops, and what it has still to say is read."""
        self._process.communicate()


class NanoGPT:
    """nanoGPT's own train.py, timed by the milliseconds that it prints for every step.

    Args:
        checkout: its folder.
        words: flags of train.py.
        tokens: in one of its steps.
        steps: in a stretch.
        warm_up: steps before the first.
    """

    def __init__(self, checkout: Path, words: list[str], *, tokens: int, steps: int, warm_up: int):
        self.tokens, self.steps, self.warm_up, self.figures = tokens, steps, warm_up, []
        self._process = subprocess.Popen(
            [sys.executable, "-u", "train.py", *words],
            cwd=checkout,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # its compiler's processes are stopped with it
        )
        self._end = watch_group(self._process.pid)

    def settle(self) -> None:
        """Wait until it has warmed up, and stop it."""
        if self.warm_up:
            self._read(self.warm_up)
        self.warm_up = 0

    def run(self) -> float:
        """Let it train for a stretch; return tokens per second."""
        self.settle()
        os.killpg(self._process.pid, signal.SIGCONT)
        lines = self._read(2 + self.steps)[2:]  # it was stopped in one of the first two
        seconds = sum(float(line.split("time ")[1].split("ms")[0]) for line in lines) / 1000
        step = 1 + int(lines[-1].removeprefix("iter ").split(":")[0])  # it counts from 0
        loss = float(lines[-1].split("loss ")[1].split(",")[0])
        tokens = self.tokens * self.steps
        self.figures.append({"tokens": tokens, "seconds": seconds, "step": step, "loss": loss})
        return tokens / seconds

    def _read(self, steps: int) -> list[str]:
        lines = []
        for line in self._process.stdout:
            if line.startswith("iter "):
                lines.append(line)
            if len(lines) == steps:
                os.killpg(self._process.pid, signal.SIGSTOP)
                return lines
        raise SystemExit(f"nanoGPT's train.py ended with {self._process.wait()}")

    def close(self) -> None:
        """End it."""
        self._end.communicate()
        self._process.stdout.close()
        self._process.wait()


def say_flags(flags: dict) -> list[str]:
    """Return flags as words: a value of True stands for itself, one of False is left out."""
    words = [[f"--{key}"] if value is True else [f"--{key}", str(value)] for key, value in flags.items()]
    return [word for flag in words if flag[1:] != ["False"] for word in flag]


def run_to_end(words: list[str], **options) -> str:
    """Run Python with these words; return what it printed.

    Args:
        options: of `subprocess.run`.

    Raises:
        SystemExit: when it fails, with its last words.
    """
    ended = subprocess.run([sys.executable, *words], capture_output=True, text=True, **options)
    if ended.returncode:
        last = "\n".join(ended.stderr.splitlines()[-10:])
        raise SystemExit(f"{' '.join(words[:2])} ended with {ended.returncode}:\n{last}")
    return ended.stdout


def watch_group(group: int) -> subprocess.Popen:
    """Start what kills a group of processes, stopped ones too, when its input ends: with us at the latest.

    Who is stopped does not notice that its parent was killed, and would stay for ever.
    """
    words = ["sh", "-c", 'cat; kill -s KILL -- "-$0"', str(group)]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
