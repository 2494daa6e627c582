#!/usr/bin/env python
"""Measure what one more process gains and costs; calculate what many GPUs would.

  python -m benchmarks.bench_scale                # trains in one process and in two, in turn
  python -m benchmarks.bench_scale --device cuda  # all GPUs of this machine against one, and FSDP against DDP
  python -m benchmarks.bench_scale --paper        # prints the table of BENCHMARKS.md that is on paper

Measured: `small_test` on random tokens by train.py, started by torchrun, one thread a process; on GPUs 124M
in bf16, started by accelerate with the files in configs/accelerate. A step has the same rows on both sides.
Counted are real tokens per second of the second half of the steps, from train.log; the losses of both sides
are compared. With two idle cores two processes could be twice as fast as one; what is missing is the exchange
of the gradients, waiting for the slower one, and what the two take from one another (caches, memory).

On paper: a step computes `tokens * flops_per_token` at an assumed share of a GPU's rate, and each GPU sends
and receives `2 (n - 1) / n` times the bytes of the gradients, in float32, once a step (a ring; Patarasuk and
Yuan 2009).
"""

import argparse
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.bench_train import draw_store
from benchmarks.record import summarise_pairs, write_result
from benchmarks.turns import run_to_end, say_flags
from firstwords.args import run_main
from firstwords.errors import BadFlag
from firstwords.model import find_device
from firstwords.template import CHAT_TEMPLATE
from firstwords.tokenizer import BYTE_LEVEL, Tokenizer

ROOT = Path(__file__).parent.parent
STEPS = 16
PACE = {"max_steps": STEPS, "log_steps": STEPS // 2, "save_steps": STEPS, "eval_steps": 0}
# Of train.py. --grad_accum counts over all processes: a step has the same rows in one as in several.
FLAGS = {
    **{"cfg": "small_test", "device": "cpu", "seq_len": 256, "batch_size": 2, "grad_accum": 4, "lr": 1e-3},
    **PACE,
}
GPU_FLAGS = {
    **{"cfg": "baseline_124m", "device": "cuda", "seq_len": 1024, "batch_size": 16, "bf16": True},
    **PACE,
}
# How far the losses may lie apart: four decimals are logged; bfloat16 rounds sums that differ in their order.
SPREADS = {"cpu": 2e-4, "cuda": 5e-2}
LINE = re.compile(r"^step (\d+)/\d+  loss ([\d.]+) .*  tok/s ([\d,]+) ", re.M)


# --- measured


def write_store(folder: Path) -> Path:
    """Write a token store of random bytes in nanoGPT's layout, with its tokenizer."""
    folder.mkdir()
    Tokenizer(BYTE_LEVEL, [bytes([value]) for value in range(256)]).save(folder, chat_template=CHAT_TEMPLATE)
    pick = np.random.default_rng(0)
    for name, count in (("train", 1 << 18), ("val", FLAGS["seq_len"])):
        pick.integers(0, 256, count).astype("<u2").tofile(folder / f"{name}.bin")
    return folder


def launch(num_processes: int) -> list[str]:
    """Return the words that start train.py by torchrun."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]


def accelerate(config: str, num_processes: int) -> list[str]:
    """Return the words that start train.py by a file of configs/accelerate."""
    path = ROOT / "configs" / "accelerate" / f"{config}.yaml"
    words = ["-m", "accelerate.commands.launch", "--config_file", str(path)]
    return [*words, "--num_processes", str(num_processes)]


def train(data: Path, flags: dict, launcher: list[str]) -> tuple[float, list[float]]:
    """Train once; return the tokens per second of the second half, and the loss of both halves."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        words = ["--data_dir", str(data), "--model_dir", str(run), "--no_assistant_only_loss"]
        words += ["--report_to", "none", *say_flags(flags)]
        alone = os.environ | {"OMP_NUM_THREADS": "1"}
        run_to_end([*launcher, str(ROOT / "train.py"), *words], cwd=ROOT, env=alone)
        lines = LINE.findall((run / "train.log").read_text())
    return float(lines[-1][2].replace(",", "")), [float(loss) for _, loss, _ in lines]


def compare(row: str, data: Path, flags: dict, launchers: list[list[str]], pairs: int, **settings) -> None:
    """Train by two launchers in turn, and write the row."""
    measured, losses = [], []
    for _ in range(pairs):
        sides = [train(data, flags, launcher) for launcher in launchers]
        measured.append(tuple(rate for rate, _ in sides))
        losses += [loss for _, loss in sides]
    spread = float(np.ptp(losses, axis=0).max())
    assert spread < SPREADS[flags["device"]], f"the sides did not compute the same: {losses}"
    result = summarise_pairs(measured) | {"losses": losses[:2], "loss_spread": round(spread, 4)}
    write_result(row, result, flags | settings, flags["device"])
    print(f"{row}: {result['median']:.2f} times ({result['low']:.2f} to {result['high']:.2f})")


def measure_cpu(data: Path, pairs: int) -> None:
    """Measure two processes against one."""
    launchers = [launch(2), launch(1)]
    settings = {"threads_per_process": 1, "processes": [2, 1]}
    compare("scale_cpu_2_processes", write_store(data), FLAGS, launchers, pairs, **settings)


def measure_gpus(data: Path, pairs: int) -> None:
    """Measure all GPUs of this machine against one, and FSDP against DDP.

    Raises:
        BadFlag: where there is but one.
    """
    count = torch.cuda.device_count()
    if count < 2:
        raise BadFlag(
            f"--device cuda: needs two GPUs or more, and there is {count}; measure on such a machine"
        )
    flags = GPU_FLAGS | {"grad_accum": 4 * count}
    draw_store(data, 50_298, 4_000_000)
    ddp, fsdp = accelerate("ddp", count), accelerate("fsdp", count)
    compare("scale_gpu_ddp", data, flags, [ddp, launch(1)], pairs, processes=[count, 1])
    compare("scale_gpu_fsdp", data, flags, [fsdp, ddp], pairs, processes=[count, count])


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


def main(argv: list[str]) -> None:
    """Measure, or print what is on paper."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--paper", action="store_true", help="print the calculated table instead")
    args = parser.parse_args(argv)
    if args.paper:
        print(format_paper())
        return
    find_device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        measure = measure_gpus if args.device == "cuda" else measure_cpu
        measure(Path(folder) / "data", args.pairs)


if __name__ == "__main__":
    run_main(main)
