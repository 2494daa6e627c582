#!/usr/bin/env python
"""How near is the time that the preflight names? It and the run in turn.

  python -m benchmarks.bench_preflight --data_dir data/pydocs
  python -m benchmarks.bench_preflight --device cuda

Each pair is `train.py --preflight` and then the run that it was about, in a process of its own: the
seconds that the preflight names against the seconds of Trainer's loop, in which saves and samples, that are
not predicted, lie too. On a CPU it is small_test; on a GPU 124M in rows of 1,024, where the prediction of
memory stands beside what torch held at most.
"""

import argparse
import gc
import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

import train
from benchmarks.bench_train import draw_store
from benchmarks.record import summarise_pairs, write_result
from benchmarks.turns import run_to_end, say_flags
from firstwords import preflight
from firstwords.args import run_main
from firstwords.model import find_device
from firstwords.trainer import RunTrainer

# Of train.py. Saves are not predicted: on a GPU, where they are large, there is one after many steps.
FLAGS = {
    "cpu": {
        **{"cfg": "small_test", "seq_len": 256, "batch_size": 4, "optim": "muon", "lr": 1e-2},
        **{"max_steps": 24, "eval_steps": 12, "save_steps": 12},
    },
    "cuda": {
        **{"cfg": "baseline_124m", "seq_len": 1024, "batch_size": 16, "grad_accum": 4, "bf16": True},
        **{"optim": "muon", "lr": 1e-2, "max_steps": 200, "eval_steps": 100, "save_steps": 200},
    },
}


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
        gc.collect()  # what the preflight has built is no memory of the run
        train.main(words)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return [watch.forecasts[-1].seconds_left, watch.seconds[-1], watch.forecasts[-1].memory.total, peak]


def call_pair(words: list[str]) -> list[float]:
    """Measure a pair in a process of its own, where nothing is warm before the preflight."""
    printed = run_to_end(["-m", "benchmarks.bench_preflight", "--pair", *words])
    return json.loads(printed.splitlines()[-1])


def say_run(flags: dict, data_dir: Path) -> list[str]:
    """Return the words for train.py."""
    fixed = ["--data_dir", str(data_dir), "--no_assistant_only_loss", "--report_to", "none"]
    return fixed + say_flags(flags)


def main(argv: list[str]) -> None:
    """Measure the pairs and write the result."""
    if argv[:1] == ["--pair"]:
        print(json.dumps(measure_pair(argv[1:])))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_dir", type=Path, help="of text; default: as many words as GPT-2's, drawn")
    parser.add_argument("--device", choices=FLAGS, default="cpu")
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args(argv)
    flags = FLAGS[find_device(args.device)] | {"device": args.device}
    with tempfile.TemporaryDirectory() as folder:
        data_dir = args.data_dir or draw_store(Path(folder) / "data", 50_298, 4_000_000)
        words = say_run(flags, data_dir)
        measured = [call_pair(words) for _ in range(args.pairs)]
    for predicted, taken, *_ in measured:
        print(f"predicted {predicted:.1f} s, taken {taken:.1f} s")
    rows = {"preflight_time": [(row[0], row[1]) for row in measured]}
    if args.device == "cuda":
        rows["preflight_memory"] = [(row[2], row[3]) for row in measured]
    for row, pairs in rows.items():
        write_result(row, summarise_pairs(pairs), flags, args.device)


if __name__ == "__main__":
    run_main(main)
