#!/usr/bin/env python
"""How many tokens does a recipe need? Three of them on the same model, data and tokens a step.

  python -m benchmarks.bench_loss --device cpu --text tinyshakespeare.txt --out_dir runs/bench-loss
  python -m benchmarks.bench_loss --device cuda --text tinyshakespeare.txt --out_dir runs/bench-loss

`nanogpt` is AdamW with a cosine, as nanoGPT and llm.c set it; `adamw` is an AdamW of which rate, warm-up and
betas were searched, BENCHMARKS.md says how far; `ours` is the recipe in configs/recipes. Both rivals train on
N tokens, and ours on shares of N, each in a run of its own whose schedule ends there. What counts is the
smallest share after which ours is at or below the rival's loss of the same seed. Every run is a call of
train.py, and its loss is that of the whole val set. Where tiktoken is not installed the data of `small_test`
and `124m` are to be brought as OUT_DIR/124m-data, made elsewhere by prep_text_corpus.py --val_pct 10.

Each finished run stays in --out_dir and is not run again; one that was stopped is gone on with. So the same
command may be stopped and repeated; it writes the rows of a case when all of its runs are there.
"""

import argparse
import json
import math
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.record import write_result
from firstwords.args import parse_train_args, run_main
from firstwords.checkpoint import is_complete, list_checkpoints
from firstwords.model import find_device

# What trains on characters reads --text.
CHARACTERS, PYDOCS = "--tokenizer char", "--dataset pydocs --val_pct 10"
SHAKESPEARE = "--recipe configs/recipes/shakespeare.yaml"
# The recipe's momentum was searched for steps of 768 tokens; this is that of its authors, for large ones.
SHAKESPEARE_GPU = f"{SHAKESPEARE} --muon_momentum 0.95"
PYDOCS_TEXT = "--recipe configs/recipes/pydocs_text.yaml"
# nanoGPT's train_shakespeare_char.py, 100 steps of warm-up in 2,000; and its train.py, with the warm-up of
# llm.c's run_gpt2_124M.sh, 700 steps in 18,865.
NANOGPT_SMALL = "--lr 1e-3 --min_lr_ratio 0.1 --adam_beta2 0.99 --warmup_steps 0.05"
NANOGPT_124M = "--lr 6e-4 --min_lr_ratio 0.1 --adam_beta2 0.95 --warmup_steps 0.037"
# Searched for each case; one for which nobody has searched has no such arm.
ADAMW = "--lr 6.15e-3 --lr_scheduler_type linear --warmup_steps 0.23 --adam_beta1 0.8 --adam_beta2 0.99"
ADAMW_PYDOCS = "--lr 2.86e-3 --lr_scheduler_type linear --warmup_steps 0.286"


@dataclass(frozen=True)
class Case:
    """A model, its data, and what each arm trains it with.

    Attributes:
        device: on which it is measured.
        data: words for prep_text_corpus.py.
        shape: flags of train.py that all arms share.
        steps: of both rivals; that is N.
        shares: of N that ours trains on.
        arms: flags by arm.
    """

    device: str
    data: str
    shape: str
    steps: int
    shares: tuple[float, ...]
    arms: dict[str, str]


CASES = {
    "cpu_shape": Case(
        "cpu",
        CHARACTERS,
        "--cfg shakespeare_cpu --seq_len 64 --batch_size 12",
        2000,
        (0.25, 0.5, 1.0),
        {"ours": SHAKESPEARE, "nanogpt": NANOGPT_SMALL, "adamw": ADAMW},
    ),
    "small_test": Case(
        "cpu",
        PYDOCS,
        "--cfg small_test --seq_len 256 --batch_size 8",
        160,
        (0.25, 0.5, 0.75),
        {"ours": PYDOCS_TEXT, "nanogpt": NANOGPT_SMALL, "adamw": ADAMW_PYDOCS},
    ),
    "gpu_shape": Case(
        "cuda",
        CHARACTERS,
        "--cfg shakespeare_gpu --seq_len 256 --batch_size 64 --bf16",
        2000,
        (0.25, 0.5),
        {"ours": SHAKESPEARE_GPU, "nanogpt": NANOGPT_SMALL},
    ),
    "124m": Case(
        "cuda",
        PYDOCS,
        "--cfg baseline_124m --seq_len 1024 --batch_size 16 --grad_accum 2 --bf16",
        60,
        (0.5, 0.75),
        {"ours": PYDOCS_TEXT, "nanogpt": NANOGPT_124M},
    ),
}


# Losses of ours with a goal of their own: share of N -> row.
GOALS = {
    "cpu_shape": {0.25: "loss_cpu_shape_quarter", 1.0: "loss_cpu_shape"},
    "gpu_shape": {0.5: "loss_gpu_shape"},
}
RIVALS = ("nanogpt", "adamw")


def main(argv: list[str]) -> None:
    """Measure the cases of the device."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--text", type=Path, help="Tiny Shakespeare; without it its cases are left out")
    parser.add_argument("--out_dir", type=Path, required=True, help="data and runs; what is there is used")
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default: all of the device")
    parser.add_argument("--seeds", type=int, help="default 3 on a CPU, 1 on a GPU")
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=RIVALS, help="default: all of a case")
    args = parser.parse_args(argv)
    find_device(args.device)
    seeds = args.seeds or (3 if args.device == "cpu" else 1)
    for name in args.cases or [name for name, case in CASES.items() if case.device == args.device]:
        case = keep_arms(CASES[name], ("ours", *args.rivals))
        if case.data == CHARACTERS and args.text is None:
            print(f"{name}: left out, it needs --text", flush=True)
            continue
        data = prepare(case, args.text, args.out_dir / f"{name}-data")
        losses = train_all(case, data, args.out_dir / name, args.device, seeds)
        write_rows(name, case, losses, args.device)


def keep_arms(case: Case, names: tuple[str, ...]) -> Case:
    """Return the case with those of its arms that are named."""
    return replace(case, arms={arm: flags for arm, flags in case.arms.items() if arm in names})


def prepare(case: Case, text: Path | None, folder: Path) -> Path:
    """Make the token store of a case, or find it made; return its folder."""
    if not (folder / "corpus.json").is_file():
        source = ["--dataset", str(text)] if case.data == CHARACTERS else []
        run_script("prep_text_corpus.py", [*source, *shlex.split(case.data), "--out_dir", str(folder)])
    return folder


def train_all(case: Case, data: Path, folder: Path, device: str, seeds: int) -> dict[str, list[dict]]:
    """Train every arm on every share with every seed.

    Returns:
        for each arm and steps (`ours-1000`) the val losses by step of each seed.
    """
    losses = {}
    for seed in range(seeds):
        for arm, flags in case.arms.items():
            for share in case.shares if arm == "ours" else (1.0,):
                steps = round(case.steps * share)
                words = [*shlex.split(f"{flags} {case.shape}"), "--data_dir", str(data), "--seed", str(seed)]
                curve = train(folder / f"{arm}-{steps}-{seed}", words, steps, device)
                losses.setdefault(f"{arm}-{steps}", []).append(curve)
                print(f"{folder.name} {arm} {steps} steps, seed {seed}: {curve[steps]:.4f}", flush=True)
    return losses


def train(run: Path, words: list[str], steps: int, device: str) -> dict[int, float]:
    """Train a run to its end, from where it is; return its val losses by step, four of them."""
    if not is_complete(run):
        every = str(-(-steps // 4))
        pace = ["--eval_steps", every, "--save_steps", every, "--save_total_limit", "1"]
        end = ["--no_assistant_only_loss", "--max_steps", str(steps), "--device", device]
        end += ["--report_to", "none"]  # TensorBoard may not be installed
        run_script("train.py", [*words, *pace, *end, "--model_dir", str(run)])
    state = json.loads((list_checkpoints(run)[0] / "trainer_state.json").read_text(encoding="utf-8"))
    return {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}


def run_script(script: str, words: list[str]) -> None:
    """Run a script of ours to its end; where it fails it has said why, and we end as it did."""
    code = subprocess.run([sys.executable, script, *words]).returncode
    if code:
        sys.exit(code)


def write_rows(name: str, case: Case, losses: dict[str, list[dict]], device: str) -> None:
    """Write a row for each rival and one for each share of ours whose loss has a goal."""
    ours = {share: take_last(losses[f"ours-{round(case.steps * share)}"]) for share in case.shares}
    settings = {"arms": case.arms, "shape": case.shape, "data": case.data, "steps": case.steps}
    settings["seeds"] = len(losses[f"ours-{round(case.steps * case.shares[0])}"])
    curves = {"losses": losses, "tokens_per_step": count_tokens(case.shape)}
    for rival in case.arms.keys() - {"ours"}:
        theirs = take_last(losses[f"{rival}-{case.steps}"])
        shares = sorted(find_share(ours, seed, loss) for seed, loss in enumerate(theirs))
        result = {"median": statistics.median(shares), "low": shares[0], "high": shares[-1], **curves}
        write_result(f"tokens_{name}_vs_{rival}", result, settings, device)
        print(f"{name}: {rival}'s loss after {result['median']:g} of its tokens", flush=True)
    for share, row in GOALS.get(name, {}).items():
        values = sorted(ours[share])
        result = {"median": statistics.median(values), "low": values[0], "high": values[-1]}
        write_result(row, result, settings, device)


def take_last(curves: list[dict[int, float]]) -> list[float]:
    """Return the loss at the end of each seed's curve."""
    return [curve[max(curve)] for curve in curves]


def find_share(ours: dict[float, list[float]], seed: int, loss: float) -> float:
    """Return the smallest share of N after which ours is at or below `loss`; infinite when none is."""
    return min((share for share, losses in ours.items() if losses[seed] <= loss), default=math.inf)


def count_tokens(shape: str) -> int:
    """Return the tokens of a step of these flags."""
    flags, _ = parse_train_args(shlex.split(shape))
    return flags.seq_len * flags.batch_size * flags.grad_accum


if __name__ == "__main__":
    run_main(main)
