#!/usr/bin/env python
"""Measure packed fine-tuning against padding to 1024, TRL's defaults and TRL's packing, in turn.

  python prep_data.py --dataset code_alpaca_2k.json --tokenizer gpt2.tiktoken --out_dir data/alpaca
  python -m benchmarks.bench_sft --data_dir data/alpaca

All sides train the same model (small_test's shape, no dropout, gelu_pytorch_tanh) in one precision on the
same tokenized conversations, labels on the assistant's tokens alone, AdamW. Ours: train.py's Trainer, rows
packed to 1024. Rivals: the plain Trainer with every row padded to 1024; TRL's SFTTrainer at batch 8 as it
comes but without gradient checkpointing, which only slows it here; the same with `packing=True`. TRL reads
our rows as they are. Counted are real tokens, no padding, per second of whole optimizer steps. Without
FlashAttention TRL's packed conversations see one another; ours do not.
"""

import argparse
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from transformers import GPT2Config, TrainingArguments
from trl import SFTConfig, SFTTrainer

from benchmarks.bench_train import Clock, Padding, read_rows, run_ours
from benchmarks.record import measure_pairs, write_result
from firstwords.model import has_bf16, quiet_transformers, read_config
from firstwords.tokenizer import load_tokenizer

CONFIG = Path("configs/models/small_test.json")
SEQ_LEN, ROWS, RIVAL_ROWS = 1024, 4, 8
WARM_UP, STEPS = 1, 4


def build_rival(data_dir: Path) -> transformers.GPT2LMHeadModel:
    """Return Hugging Face's own class with our shape and seed."""
    config = GPT2Config(**read_config(CONFIG), vocab_size=load_tokenizer(data_dir).vocab_size_padded)
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config)


def run_padded(data_dir: Path, bf16: bool) -> float:
    """Train with the plain Trainer on rows padded to 1024; return real tokens per second."""
    padding, clock = Padding(load_tokenizer(data_dir).pad_id, length=SEQ_LEN), Clock(WARM_UP)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(output_dir=folder, **describe_rival(bf16))
        rows = [row for row in read_rows(data_dir) if len(row["input_ids"]) <= SEQ_LEN]
        model = build_rival(data_dir)
        run = transformers.Trainer(
            model, arguments, data_collator=padding, train_dataset=rows, callbacks=[clock]
        )
        run.train()
    return sum(padding.used[WARM_UP : WARM_UP + STEPS]) / clock.seconds


def run_trl(data_dir: Path, bf16: bool, *, packing: bool) -> float:
    """Train with TRL's SFTTrainer; return real tokens per second."""
    clock = Clock(WARM_UP)
    rows = [row for row in read_rows(data_dir) if len(row["input_ids"]) <= SEQ_LEN]
    data = Dataset.from_list(
        [
            {"input_ids": row["input_ids"], "assistant_masks": [int(i >= 0) for i in row["labels"]]}
            for row in rows
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder, packing=packing, max_length=SEQ_LEN,
            gradient_checkpointing=False, **describe_rival(bf16),
        )  # fmt: skip
        run = SFTTrainer(
            model=build_rival(data_dir),
            args=arguments,
            train_dataset=data,
            processing_class=transformers.AutoTokenizer.from_pretrained(data_dir, local_files_only=True),
            callbacks=[clock],
        )
        used, collate = [], run.data_collator

        def count(batch: list[dict]) -> dict[str, torch.Tensor]:
            used.append(sum(len(row["input_ids"]) for row in batch))
            return collate(batch)

        run.data_collator = count
        run.train()
    return sum(used[WARM_UP : WARM_UP + STEPS]) / clock.seconds


def describe_rival(bf16: bool) -> dict:
    """Return what all rivals have in common, as fields of `TrainingArguments`."""
    return {
        "per_device_train_batch_size": RIVAL_ROWS, "max_steps": WARM_UP + STEPS, "use_cpu": True,
        "bf16": bf16, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": 0,
        "learning_rate": 6e-4, "logging_steps": 10**9,
    }  # fmt: skip


RIVALS: dict[str, Callable[[Path, bool], float]] = {
    "sft_vs_padded": run_padded,
    "sft_vs_trl": lambda data_dir, bf16: run_trl(data_dir, bf16, packing=False),
    "sft_vs_trl_packing": lambda data_dir, bf16: run_trl(data_dir, bf16, packing=True),
}


def main() -> None:
    """Measure one row, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", choices=RIVALS, default=list(RIVALS))
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    quiet_transformers()
    bf16 = has_bf16("cpu")
    for row in args.rows:
        result = measure_pairs(
            lambda: run_ours(args.data_dir, bf16, CONFIG, SEQ_LEN, ROWS, WARM_UP, STEPS),
            lambda rival=RIVALS[row]: rival(args.data_dir, bf16),
            args.pairs,
        )
        settings = {
            "ours": {"seq_len": SEQ_LEN, "rows": ROWS, "bf16": bf16},
            "rival": {**describe_rival(bf16), "max_length": SEQ_LEN, "trl": version("trl")},
            "threads": torch.get_num_threads(),
        }
        write_result(row, result, settings)
        print(f"{row}: {result['median']:.2f} ({result['low']:.2f} to {result['high']:.2f})", flush=True)


if __name__ == "__main__":
    main()
