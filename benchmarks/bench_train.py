#!/usr/bin/env python
"""Measure training of `small_test` on conversations against the plain Trainer, in turn.

  python -m benchmarks.bench_train --data_dir data/pydocs_chat --device cpu

Both sides train on the same conversations with AdamW and the same shape. Ours: train.py's own Trainer,
packed rows, head and loss on learned tokens alone. The rival: Hugging Face's Trainer and model with the
stock activation (gelu_new), no dropout, rows padded to the longest of the batch, an attention mask, labels
-100 outside the assistant's turns. The rival's batch is the faster of the sizes tried, so that it has no
handicap. Counted are real tokens (no padding) per second of whole optimizer steps.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
import transformers
from transformers import GPT2Config, TrainerCallback, TrainingArguments

from benchmarks.record import measure_pairs, write_result
from firstwords import trainer
from firstwords.args import TrainFlags
from firstwords.dataset import collate, open_train, read_chats
from firstwords.model import IGNORED, build_model, has_bf16, quiet_transformers, read_config
from firstwords.tokenizer import load_tokenizer

CONFIG = Path("configs/models/small_test.json")
SEQ_LEN, ROWS, WARM_UP, STEPS = 256, 8, 3, 15
RIVAL_BATCHES = (8, 32)


class Clock(TrainerCallback):
    """Measure the seconds of the steps after the first `warm_up`."""

    def __init__(self, warm_up: int):
        self.warm_up = warm_up

    def on_step_begin(self, args, state, control, **kwargs):
        """Start once the warm-up is over."""
        if state.global_step == self.warm_up:
            self.begin = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Remember the last end."""
        self.end = time.perf_counter()

    @property
    def seconds(self) -> float:
        """From the end of the warm-up to the last end."""
        return self.end - self.begin


class Padding:
    """Stack rows of any length, with an attention mask, as the plain Trainer's users do.

    Attributes:
        used: real tokens of each batch.
    """

    def __init__(self, pad_id: int, *, length: int | None = None):
        self.fills = {"input_ids": pad_id, "labels": IGNORED, "attention_mask": 0}
        self.length, self.used = length, []

    def __call__(self, batch: list[dict]) -> dict[str, torch.Tensor]:
        """Pad to `length`, or to the longest of the batch; (B, T)."""
        lengths = [len(row["input_ids"]) for row in batch]
        self.used.append(sum(lengths))
        width = self.length or max(lengths)
        return {
            name: torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in batch])
            for name, fill in self.fills.items()
        }


def run_ours(data_dir: Path, bf16: bool, config: Path, seq_len: int, rows: int, warm_up: int, steps: int):
    """Train with our Trainer; return real tokens per second."""
    tokenizer = load_tokenizer(data_dir)
    train_set = open_train(data_dir, tokenizer, seq_len, seed=0, assistant_only=True)
    clock = Clock(warm_up)
    with tempfile.TemporaryDirectory() as folder:
        flags = TrainFlags(
            model_dir=Path(folder), seq_len=seq_len, batch_size=rows, bf16=bf16, device="cpu",
            eval_steps=0, save_steps=10**9,
        )  # fmt: skip
        run = trainer.RunTrainer(
            build_model(config, tokenizer, seed=0),
            trainer.build_training_arguments(flags, {"save_strategy": "no"}, warm_up + steps),
            train_set=train_set,
            val_set=None,
            tokenizer=tokenizer,
            meta=trainer.RunMeta({}, rows * train_set.tokens_per_row, 1),
            collate=collate,
        )
        run.add_callback(trainer.Throughput(run))
        run.add_callback(clock)
        run.train()
    return steps * rows * train_set.tokens_per_row / clock.seconds


def run_rival(data_dir: Path, bf16: bool, batch_size: int) -> float:
    """Train with the plain Trainer; return real tokens per second."""
    tokenizer = load_tokenizer(data_dir)
    rows = read_rows(data_dir)
    config = GPT2Config(
        **read_config(CONFIG) | {"activation_function": "gelu_new"},
        vocab_size=tokenizer.vocab_size_padded,
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    clock, padding = Clock(WARM_UP), Padding(tokenizer.pad_id)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=batch_size, max_steps=WARM_UP + STEPS,
            use_cpu=True, bf16=bf16, save_strategy="no", report_to="none", disable_tqdm=True, seed=0,
            learning_rate=6e-4, logging_steps=10**9,
        )  # fmt: skip
        run = transformers.Trainer(
            model, arguments, data_collator=padding, train_dataset=rows, callbacks=[clock]
        )
        run.train()
    return sum(padding.used[WARM_UP : WARM_UP + STEPS]) / clock.seconds


def read_rows(data_dir: Path) -> list[dict]:
    """Return the same conversations as ours, one a row."""
    chats = read_chats(data_dir / "train_tokenized.jsonl")
    rows = []
    for begin, end in zip(chats.starts[:-1], chats.starts[1:], strict=True):
        ids = chats.ids[begin:end].tolist()
        labels = [i if learned else IGNORED for i, learned in zip(ids, chats.masks[begin:end], strict=True)]
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)})
    return rows


def main() -> None:
    """Measure both rows that this machine can measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", type=Path, default=Path("data/pydocs_chat"))
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    quiet_transformers()
    measure("train_cpu_vs_stock_fp32", args, ours_bf16=has_bf16("cpu"), rival_bf16=False)
    if has_bf16("cpu"):
        measure("train_cpu_vs_stock_bf16", args, ours_bf16=True, rival_bf16=True)


def measure(row: str, args, *, ours_bf16: bool, rival_bf16: bool) -> None:
    """Find the rival's faster batch, then measure in turn, and write the row."""
    batch = max(RIVAL_BATCHES, key=lambda size: run_rival(args.data_dir, rival_bf16, size))
    result = measure_pairs(
        lambda: run_ours(args.data_dir, ours_bf16, CONFIG, SEQ_LEN, ROWS, WARM_UP, STEPS),
        lambda: run_rival(args.data_dir, rival_bf16, batch),
        args.pairs,
    )
    settings = {
        "ours": {"seq_len": SEQ_LEN, "rows": ROWS, "bf16": ours_bf16, "optim": "adamw_torch_fused"},
        "rival": {"batch_size": batch, "bf16": rival_bf16, "activation_function": "gelu_new"},
        "threads": torch.get_num_threads(),
    }
    write_result(row, result, settings)
    print(f"{row}: {result['median']:.2f} ({result['low']:.2f} to {result['high']:.2f})")


if __name__ == "__main__":
    main()
