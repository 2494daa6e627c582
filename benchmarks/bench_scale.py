#!/usr/bin/env python
"""Measure what one more process gains and costs; calculate what many GPUs would.

  python -m benchmarks.bench_scale                # trains in one process and in two, in turn
  python -m benchmarks.bench_scale --paper        # prints the table of BENCHMARKS.md that is on paper

Measured: `small_test` on random tokens by train.py, started by torchrun, one thread a process, the same rows
in each step; real tokens per second of the second half of the steps, from train.log. The losses of both sides
are compared. With two idle cores two processes could be twice as fast as one; what is missing is the exchange
of the gradients, waiting for the slower one, and what the two take from one another (caches, memory).

On paper: a step computes `tokens * flops_per_token` at an assumed share of a GPU's rate, and each GPU sends
and receives `2 (n - 1) / n` times the bytes of the gradients, in float32, once a step (a ring; Patarasuk and
Yuan 2009).
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.record import summarise_pairs, write_result
from firstwords.template import CHAT_TEMPLATE
from firstwords.tokenizer import BYTE_LEVEL, Tokenizer

ROOT = Path(__file__).parent.parent
SEQ_LEN, ROWS, GRAD_ACCUM, STEPS = 256, 2, 4, 16
LINE = re.compile(r"^step (\d+)/\d+  loss ([\d.]+) .*  tok/s ([\d,]+) ", re.M)


# --- measured


def write_store(folder: Path) -> Path:
    """Write a token store of random bytes in nanoGPT's layout, with its tokenizer."""
    folder.mkdir()
    Tokenizer(BYTE_LEVEL, [bytes([value]) for value in range(256)]).save(folder, chat_template=CHAT_TEMPLATE)
    pick = np.random.default_rng(0)
    for name, count in (("train", 1 << 18), ("val", SEQ_LEN)):
        pick.integers(0, 256, count).astype("<u2").tofile(folder / f"{name}.bin")
    return folder


def train(data: Path, num_processes: int) -> tuple[float, list[float]]:
    """Train once; return the tokens per second of the second half, and the loss of both halves."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        flags = {
            **{"data_dir": data, "model_dir": run, "cfg": "small_test", "device": "cpu", "seq_len": SEQ_LEN},
            **{"batch_size": ROWS, "grad_accum": GRAD_ACCUM, "max_steps": STEPS, "log_steps": STEPS // 2},
            **{"save_steps": STEPS, "eval_steps": 0, "lr": 1e-3},
        }
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
        command = [sys.executable, *launcher, str(ROOT / "train.py"), *words, "--no_assistant_only_loss"]
        alone = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, cwd=ROOT, env=alone, capture_output=True)
        lines = LINE.findall((run / "train.log").read_text())
    return float(lines[-1][2].replace(",", "")), [float(loss) for _, loss, _ in lines]


def measure(pairs: int) -> None:
    """Train in two processes and in one, in turn, and write the row."""
    measured, losses = [], []
    with tempfile.TemporaryDirectory() as folder:
        data = write_store(Path(folder) / "data")
        for _ in range(pairs):
            sides = [train(data, num_processes) for num_processes in (2, 1)]
            measured.append(tuple(rate for rate, _ in sides))
            losses += [loss for _, loss in sides]
    spread = np.ptp(losses, axis=0).max()
    assert spread < 2e-4, f"the sides did not compute the same: {losses}"  # four decimals are logged
    result = summarise_pairs(measured)
    settings = {
        "cfg": "small_test",
        "seq_len": SEQ_LEN,
        "rows_per_step": ROWS * GRAD_ACCUM,
        "steps": STEPS,
        "threads_per_process": 1,
        "processes": [2, 1],
    }
    write_result(
        "scale_cpu_2_processes",
        {**result, "losses": losses[:2], "loss_spread": round(float(spread), 4)},
        settings,
    )
    print(f"{result['median']:.2f} times ({result['low']:.2f} to {result['high']:.2f})")


# --- on paper


@dataclass(frozen=True)
class Model:
    """A shape: its name, weights, layers and width."""

    name: str
    weights: int
    n_layer: int
    n_embd: int

    def flops_per_token(self, seq_len: int) -> float:
        """Return 6 N + 6 L d T: forward and backward, attention counted as causal (llm.c, Karpathy 2024)."""
        return 6 * self.weights + 6 * self.n_layer * self.n_embd * seq_len


@dataclass(frozen=True)
class Cluster:
    """GPUs in machines; the links' rates are those of one direction, of all links of a machine or GPU."""

    name: str
    gpus: int
    bytes_per_second: float


MODELS = (Model("124M", 124_475_904, 12, 768), Model("355M", 354_871_296, 24, 1024))
# H100 SXM: 989e12 multiplications and additions a second in bfloat16, NVLink 450 GB/s each way (NVIDIA's data
# sheet). Between machines the ring passes each machine's network once: 8 x 400 Gbit/s, or 1 x 100 Gbit/s.
PEAK, SHARE, TOKENS_PER_STEP, TOKENS, ROW = 989e12, 0.45, 524_288, 10e9, 1024
CLUSTERS = (
    Cluster("1 GPU", 1, float("inf")),
    Cluster("8 GPUs, NVLink", 8, 450e9),
    Cluster("8 GPUs, PCIe 4.0 x16", 8, 32e9),
    Cluster("64 GPUs, 8 x 400 Gbit/s a machine", 64, 400e9),
    Cluster("64 GPUs, 1 x 100 Gbit/s a machine", 64, 12.5e9),
)


def format_paper() -> str:
    """Return the Markdown table of what a step and 10 billion tokens would take."""
    lines = [
        "| model | machines | rows a GPU and step | computing, ms | exchange, ms | exchange / computing "
        "| 10 billion tokens, minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        for cluster in CLUSTERS:
            n = cluster.gpus
            compute = TOKENS_PER_STEP * model.flops_per_token(ROW) / (n * PEAK * SHARE)
            exchange = 2 * (n - 1) / n * 4 * model.weights / cluster.bytes_per_second
            sides = (max(compute, exchange), compute + exchange)  # all of it hidden behind computing, or none
            minutes = [TOKENS / TOKENS_PER_STEP * seconds / 60 for seconds in sides]
            span = " to ".join(dict.fromkeys(f"{value:,.1f}" for value in minutes))
            lines.append(
                f"| {model.name} | {cluster.name} | {TOKENS_PER_STEP // ROW // n} | {1000 * compute:,.1f} "
                f"| {1000 * exchange:,.1f} | {exchange / compute:.2f} | {span} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure, or print what is on paper."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--paper", action="store_true", help="print the calculated table instead")
    args = parser.parse_args()
    if args.paper:
        print(format_paper())
    else:
        measure(args.pairs)


if __name__ == "__main__":
    main()
