#!/usr/bin/env python
"""How near is the time that the preflight names? It and the run in turn, small enough for a CPU.

  python -m benchmarks.bench_preflight --data_dir data/pydocs --device cpu

Each pair is `train.py --preflight` and then the run that it was about, in a process of its own: the
seconds that the preflight names against the seconds of Trainer's loop, in which saves and samples, that are
not predicted, lie too. On a GPU the prediction of memory stands beside what torch held at most.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

import train
from benchmarks.record import summarise_pairs, write_result
from firstwords import preflight
from firstwords.trainer import RunTrainer


@dataclass
class Watch:
    """What the code under measurement lets one see: forecasts, and the seconds of Trainer's loops."""

    forecasts: list = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def attach(self) -> None:
        """Look on from now on."""
        format_table, loop = preflight.format_table, RunTrainer.train

        def show(forecast):
            self.forecasts.append(forecast)
            return format_table(forecast)

        def go(trainer, **options):
            begin = time.monotonic()
            result = loop(trainer, **options)
            self.seconds.append(time.monotonic() - begin)
            return result

        preflight.format_table, RunTrainer.train = show, go


def measure_pair(words: list[str]) -> list[float]:
    """Return the seconds that were predicted and those that the run took, and bytes likewise on a GPU."""
    watch = Watch()
    watch.attach()
    with tempfile.TemporaryDirectory() as folder:
        words = [*words, "--model_dir", f"{folder}/run"]
        train.main([*words, "--preflight"])
        train.main(words)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return [watch.forecasts[-1].seconds_left, watch.seconds[-1], watch.forecasts[-1].memory.total, peak]


def call_pair(words: list[str]) -> list[float]:
    """Measure a pair in a process of its own, where nothing is warm before the preflight."""
    command = [sys.executable, "-m", "benchmarks.bench_preflight", "--pair", *words]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(ended.stdout.splitlines()[-1])


def main() -> None:
    """Measure the pairs and write the result."""
    if sys.argv[1:2] == ["--pair"]:
        print(json.dumps(measure_pair(sys.argv[2:])))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cfg", default="small_test")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    flags = {"cfg": args.cfg, "seq_len": 256, "batch_size": 4, "max_steps": args.steps, "device": args.device}
    flags |= {"eval_steps": args.steps // 2, "save_steps": args.steps // 2, "optim": "muon", "lr": 1e-2}
    words = ["--data_dir", str(args.data_dir), "--no_assistant_only_loss"]
    words += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    measured = [call_pair(words) for _ in range(args.pairs)]
    for predicted, taken, *_ in measured:
        print(f"predicted {predicted:.1f} s, taken {taken:.1f} s")
    rows = {"preflight_time": [(row[0], row[1]) for row in measured]}
    if args.device == "cuda":
        rows["preflight_memory"] = [(row[2], row[3]) for row in measured]
    for row, pairs in rows.items():
        write_result(row, summarise_pairs(pairs), flags, args.device)


if __name__ == "__main__":
    main()
