#!/usr/bin/env python
"""Measure packed fine-tuning against padding to 1024, TRL's defaults and TRL's packing, in turn.

  # on any machine with all of requirements.txt; --data_dir may be brought to one that has not
  python prep_data.py --dataset code_alpaca_2k.json --tokenizer gpt2.tiktoken --skip_bad --out_dir data/alpaca
  python -m benchmarks.bench_sft --data_dir data/alpaca --rivals trl

All sides train the same model (on a CPU small_test's shape, on a GPU 124M; no dropout, gelu_pytorch_tanh)
from the same weights in one precision on the same tokenized conversations, labels on the assistant's tokens
alone, AdamW. Ours: train.py's Trainer, rows packed to 1024, in a step 4 on a CPU and 8 on a GPU. Rivals, 8
rows a step: the plain Trainer with every row padded to 1024; TRL's SFTTrainer as it comes but without
gradient checkpointing, which only slows it here; the same with `packing=True`. TRL reads our rows as they
are. Counted are real tokens, no padding, per second of whole optimizer steps. Each result names the loss of
both sides over the same conversations before the first step: without FlashAttention TRL's packed
conversations see one another, ours do not. A row that is broken off goes on with the next pair.
"""

import argparse
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import TrainingArguments

from benchmarks.bench_train import (
    CONFIGS,
    Padding,
    add_side_flags,
    build_rival,
    compare,
    describe_rival,
    read_rows,
    train_ours,
)
from benchmarks.turns import TrainerSide, Turns, say_flags
from firstwords.args import run_main
from firstwords.dataset import PackedChats, collate, read_chats
from firstwords.model import IGNORED, build_model, find_device, has_bf16, quiet_transformers
from firstwords.tokenizer import load_tokenizer

SEQ_LEN, RIVAL_ROWS = 1024, 8
ROWS = {"cpu": 4, "cuda": 8}  # on a GPU as many tokens a step as TRL's packing has


def read_fitting(data_dir: Path) -> list[dict]:
    """Return the conversations that fit a row, as ours drop the others."""
    return [row for row in read_rows(data_dir) if len(row["input_ids"]) <= SEQ_LEN]


def train_padded(args, folder: str) -> None:
    """Train with the plain Trainer on rows padded to 1024."""
    padding = Padding(load_tokenizer(args.data_dir).pad_id, length=SEQ_LEN)
    run = transformers.Trainer(
        build_rival(args),
        TrainingArguments(**describe_rival(args, folder)),
        data_collator=padding,
        train_dataset=read_fitting(args.data_dir),
        callbacks=[Turns(padding.count)],
    )
    run.train()


def train_trl(args, folder: str, *, packing: bool = False) -> None:
    """Train with TRL's SFTTrainer."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [
        {"input_ids": row["input_ids"], "assistant_masks": [int(i >= 0) for i in row["labels"]]}
        for row in read_fitting(args.data_dir)
    ]
    run = SFTTrainer(
        model=build_rival(args),
        args=SFTConfig(
            **describe_rival(args, folder, packing=packing, max_length=SEQ_LEN, gradient_checkpointing=False)
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(args.data_dir, local_files_only=True),
    )
    used, stack = [], run.data_collator

    def count(batch: list[dict]) -> dict[str, torch.Tensor]:
        used.append(sum(len(row["input_ids"]) for row in batch))
        return stack(batch)

    run.data_collator = count
    run.add_callback(Turns(lambda first, end: sum(used[first:end])))
    run.train()


def train_trl_packing(args, folder: str) -> None:
    """Train with TRL's SFTTrainer and its packing."""
    train_trl(args, folder, packing=True)


SIDES = {"ours": train_ours, "padded": train_padded, "trl": train_trl, "trl_packing": train_trl_packing}
# Steps of a stretch: on two cores each is 10 to 20 seconds.
STEPS = {"padded": 1, "trl": 3, "trl_packing": 1}
OUR_STEPS = 2


@torch.inference_mode()
def compare_losses(args) -> dict[str, float]:
    """Return the mean loss of the same labels by our model on packed rows, by theirs on padded ones."""
    tokenizer = load_tokenizer(args.data_dir)
    packed = PackedChats(read_chats(args.data_dir / "train_tokenized.jsonl"), tokenizer, SEQ_LEN, 0)
    kept = np.concatenate(packed.rows[:2])
    batch = collate([packed.read_row(row) for row in packed.rows[:2]])
    rows = [row for place, row in enumerate(read_rows(args.data_dir)) if place in kept]
    for row in rows:  # no label can stand at the first token
        row["labels"][0] = IGNORED
    padded = Padding(tokenizer.pad_id)(rows)
    labels = padded["labels"][:, 1:]
    model = build_rival(args).eval()
    logits = model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits[:, :-1]
    known = labels != IGNORED
    theirs = torch.nn.functional.cross_entropy(logits[known].float(), labels[known])
    ours = build_model(args.cfg, tokenizer, seed=0).eval()(**batch).loss
    return {"ours": float(ours), "rival": float(theirs)}


def measure(rival_name: str, args) -> None:
    """Measure one rival, and write the row."""
    bf16 = has_bf16(args.device)
    args.cfg = CONFIGS / ("baseline_124m.json" if args.device == "cuda" else "small_test.json")
    row = f"sft{'_gpu' if args.device == 'cuda' else ''}_vs_{rival_name}"
    if rival_name.startswith("trl") and not (find_spec("trl") and find_spec("datasets")):
        print(f"{row}: not measured, trl is not installed")
        return
    words = {"data_dir": args.data_dir, "cfg": args.cfg, "device": args.device, "seq_len": SEQ_LEN}
    words |= {"bf16": bf16}
    steps = 5 if args.device == "cuda" else 1
    sides = [
        TrainerSide(
            "benchmarks.bench_sft", [name, *say_flags(words | {"batch_size": size, "steps": count * steps})]
        )
        for name, size, count in (
            ("ours", ROWS[args.device], OUR_STEPS),
            (rival_name, RIVAL_ROWS, STEPS[rival_name]),
        )
    ]
    settings = {
        "initial_losses": compare_losses(args),
        "ours": {"seq_len": SEQ_LEN, "batch_size": ROWS[args.device], "bf16": bf16},
        "rival": {"batch_size": RIVAL_ROWS, "max_length": SEQ_LEN, "bf16": bf16},
    }
    if rival_name.startswith("trl"):
        settings["rival"] |= {"trl": version("trl"), "gradient_checkpointing": False}
    compare(row, args, *sides, settings)
    for side in sides:
        side.close()


def main(argv: list[str]) -> None:
    """Measure one row, or all, or be a side."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rivals", nargs="+", choices=list(SIDES)[1:], default=list(SIDES)[1:])
    parser.add_argument("--pairs", type=int, default=5)
    add_side_flags(parser, SIDES)
    args = parser.parse_args(argv)
    quiet_transformers()
    find_device(args.device)
    if args.side:
        with tempfile.TemporaryDirectory() as folder:
            SIDES[args.side](args, folder)
        return
    for rival_name in args.rivals:
        measure(rival_name, args)


if __name__ == "__main__":
    run_main(main)
