#!/usr/bin/env python
"""Measure what training takes of memory, ours and the stock setup, against what firstwords.memory predicts.

  python -m benchmarks.bench_memory --device cpu     # tensors without contents, and small_test for real
  python -m benchmarks.bench_memory --device cuda    # 355M in rows of 1,024 within 15.0 GiB

The stock setup is transformers' own model and loss with gelu_new, dropout 0.1, an attention mask of ones on
a GPU, and fused AdamW. Ours has gelu_pytorch_tanh, no dropout, and Muon. Both compute in bfloat16 (autocast).
Ids are random, every token is learned. "Trains" means three optimizer steps. The speeds are those of steps of
16 rows: one micro-batch of 16 with selective recomputation, or two of 8 without any.
"""

import argparse
import gc
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers
from transformers import GPT2Config

from benchmarks.record import measure_pairs, write_result
from firstwords.args import run_main
from firstwords.memory import Memory, Step, measure_step, predict_memory
from firstwords.model import GPT2LMHeadModel, find_device, quiet_transformers, read_config
from firstwords.model.cross_entropy import find_learned
from firstwords.optimizer import MuonAdamW
from firstwords.recompute import LEVELS, set_recompute

CARD = 15 << 30
VOCABULARY = {"small_test": 4224, "baseline_124m": 50304, "baseline_355m": 50304}
STOCK = {"activation_function": "gelu_new", "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
STEPS, WARM_UP = 6, 3


@dataclass(frozen=True)
class Setting:
    """How a model is trained.

    Attributes:
        name: of the configuration.
        batch_size: rows in a micro-batch.
        seq_len: tokens in a row.
        recompute: as of train.py.
        grad_accum: micro-batches in a step.
        bf16: compute under autocast.
        is_stock: the stock setup.
    """

    name: str
    batch_size: int
    seq_len: int = 1024
    recompute: str = "none"
    grad_accum: int = 1
    bf16: bool = True
    is_stock: bool = False

    @property
    def config(self) -> GPT2Config:
        """The model's configuration, with the vocabulary that it is made for."""
        shape = read_config(Path(f"configs/models/{self.name}.json")) | (STOCK if self.is_stock else {})
        return GPT2Config(**shape, vocab_size=VOCABULARY[self.name], bos_token_id=0, eos_token_id=0)

    @property
    def optim(self) -> str:
        """The optimizer, by its name in train.py."""
        return "adamw_torch_fused" if self.is_stock else "muon"

    @property
    def tokens(self) -> int:
        """Tokens in a step."""
        return self.batch_size * self.seq_len * self.grad_accum

    def predict(self, device: str) -> Memory:
        """Return the memory that a step is said to take."""
        return predict_memory(
            self.config,
            batch_size=self.batch_size,
            seq_len=self.seq_len,
            bf16=self.bf16,
            optim=self.optim,
            recompute=self.recompute,
            grad_accum=self.grad_accum,
            device=device,
            whole_logits=self.is_stock,
        )


def train(setting: Setting, device: str, steps: int) -> float:
    """Train on one batch of random ids; return the seconds of the steps after the first three."""
    torch.manual_seed(0)
    kind = transformers.GPT2LMHeadModel if setting.is_stock else GPT2LMHeadModel
    model = kind(setting.config).to(device).train()
    set_recompute(model, setting.recompute)
    if setting.is_stock:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    else:
        optimizer = MuonAdamW(model, lr=1e-3, weight_decay=0.1)
    ids = torch.randint(setting.config.vocab_size, (setting.batch_size, setting.seq_len))
    batch = {"input_ids": ids, "labels": ids}
    batch |= {"attention_mask": torch.ones_like(ids)} if setting.is_stock else {"learned": find_learned(ids)}
    batch = {name: rows.to(device) for name, rows in batch.items()}
    for step in range(steps):
        if step == WARM_UP:
            wait(device)
            begin = time.perf_counter()
        for _ in range(setting.grad_accum):
            with torch.autocast(device, torch.bfloat16, enabled=setting.bf16):
                loss = model(**batch, use_cache=False).loss
            (loss / setting.grad_accum).backward()
            del loss
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    wait(device)
    return time.perf_counter() - begin if steps > WARM_UP else 0.0


def measure_speed(setting: Setting, device: str) -> float:
    """Return tokens per second."""
    seconds = train(setting, device, WARM_UP + STEPS)
    clear(device)
    return STEPS * setting.tokens / seconds


def clear(device: str) -> None:
    """Give back what the last run took."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def wait(device: str) -> None:
    """Let the device finish."""
    if device == "cuda":
        torch.cuda.synchronize()


# --- on a CPU


def measure_cpu() -> None:
    """Count what a further row of 355M takes; measure by how much a process with small_test grows."""
    compare_formulae()
    write_row("memory_355m_row", Setting("baseline_355m", 12, recompute="selective"))
    write_row("memory_355m_row_no_recompute", Setting("baseline_355m", 12))
    write_row("memory_355m_row_stock", Setting("baseline_355m", 4, is_stock=True))
    small, large = (Setting("small_test", size, 256, bf16=False) for size in (8, 40))
    grown = [measure_peak(setting) for setting in (small, large)]
    predicted = [setting.predict("cpu").total for setting in (small, large)]
    result = {"median": (predicted[1] - predicted[0]) / (grown[1] - grown[0]), "measured": grown}
    write_result("memory_growth_cpu", result | {"predicted": predicted}, {"large": vars(large)})
    none = Setting("small_test", 8, 256, bf16=False)
    selective = replace(none, recompute="selective")
    result = measure_pairs(lambda: measure_speed(selective, "cpu"), lambda: measure_speed(none, "cpu"))
    settings = {"a": vars(selective), "b": vars(none), "threads": torch.get_num_threads()}
    write_result("memory_recompute_speed_cpu", result, settings)


def compare_formulae() -> None:
    """Write the predicted over the counted bytes of a micro-batch, of all models, levels and precisions.

    Left out are settings that need most in the optimizer's step, which the meter does not take.
    """
    compared = []
    for name, recompute, bf16 in product(VOCABULARY, LEVELS, (True, False)):
        setting = Setting(name, 4, recompute=recompute, bf16=bf16)
        predicted = setting.predict("cpu")
        if not predicted.activations and not predicted.logits:
            print(name, recompute, "bf16" if bf16 else "fp32", "needs most in the optimizer's step")
            continue
        counted = count_step(setting)
        beside = predicted.total - predicted.weights - predicted.optimizer
        compared.append({"setting": vars(setting), "predicted": vars(predicted), "counted": vars(counted)})
        compared[-1]["ratio"] = beside / counted.peak
        print(name, recompute, "bf16" if bf16 else "fp32", f"{beside / counted.peak:.4f}", counted, predicted)
    ratios = sorted(each["ratio"] for each in compared)
    result = {"median": ratios[len(ratios) // 2], "low": ratios[0], "high": ratios[-1]}
    write_result("memory_formulae", result | {"compared": compared}, {"seq_len": 1024, "batch_size": 4})


def write_row(row: str, setting: Setting) -> None:
    """Write the MiB by which a further row of 355M raises the peak, by the meter and by the formulae."""
    more = replace(setting, batch_size=setting.batch_size + 1)
    counted = [count_step(each).peak for each in (setting, more)]
    predicted = [each.predict("cpu").total for each in (setting, more)]
    mib = [(larger - smaller) / (1 << 20) for smaller, larger in (counted, predicted)]
    write_result(row, {"median": mib[0], "predicted": mib[1], "counted_peaks": counted}, vars(setting))


def count_step(setting: Setting) -> Step:
    """Return what the meter counts of a micro-batch."""
    return measure_step(
        setting.config,
        batch_size=setting.batch_size,
        seq_len=setting.seq_len,
        bf16=setting.bf16,
        recompute=setting.recompute,
        model_class=transformers.GPT2LMHeadModel if setting.is_stock else GPT2LMHeadModel,
    )


def measure_peak(setting: Setting) -> int:
    """Return the peak bytes of a process of its own that trains for three steps."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_train_and_look, setting).result()


def _train_and_look(setting: Setting) -> int:
    quiet_transformers()
    train(setting, "cpu", WARM_UP)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


# --- on a GPU


def measure_cuda() -> None:
    """Find the largest micro-batches within 15.0 GiB, their speed, and how true the prediction is."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, CARD / total))
    card = {"allowed_bytes": min(CARD, total)}
    for row, is_stock, level, guess in (
        ("memory_rows_16gb", False, "selective", 16),
        ("memory_rows_16gb_no_recompute", False, "none", 10),
        ("memory_rows_16gb_stock", True, "none", 3),
    ):
        setting = Setting("baseline_355m", guess, recompute=level, is_stock=is_stock)
        write_result(row, {"median": find_largest(setting)}, {**vars(setting), **card}, "cuda")
    measure_truth(card)
    sixteen = Setting("baseline_355m", 16, recompute="selective")
    eight = Setting("baseline_355m", 8, grad_accum=2)
    result = measure_pairs(lambda: measure_speed(sixteen, "cuda"), lambda: measure_speed(eight, "cuda"))
    write_result("memory_speed_16_vs_8", result, {"a": vars(sixteen), "b": vars(eight), **card}, "cuda")


def find_largest(guess: Setting) -> int:
    """Return the largest micro-batch that trains, from a guess up or down; 0 when not one row does."""
    size = guess.batch_size
    while size and not fits(replace(guess, batch_size=size)):
        size -= 1
    while size >= guess.batch_size and fits(replace(guess, batch_size=size + 1)):
        size += 1
    return size


def fits(setting: Setting) -> bool:
    """Tell whether three steps go through."""
    try:
        train(setting, "cuda", WARM_UP)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        clear("cuda")


def measure_truth(card: dict) -> None:
    """Write the predicted bytes over the measured peak of settings that differ in every term."""
    compared = []
    for setting in (
        Setting("baseline_355m", 8),
        Setting("baseline_355m", 4, grad_accum=2),
        Setting("baseline_355m", 16, recompute="selective"),
        Setting("baseline_355m", 16, recompute="full", grad_accum=2),
        Setting("baseline_355m", 2, is_stock=True),
        Setting("baseline_124m", 16),
    ):
        clear("cuda")
        train(setting, "cuda", WARM_UP)
        measured = torch.cuda.max_memory_allocated()
        compared.append((vars(setting), setting.predict("cuda").total, measured))
    clear("cuda")
    ratios = sorted(predicted / measured for _, predicted, measured in compared)
    result = {"median": ratios[len(ratios) // 2], "low": ratios[0], "high": ratios[-1]}
    write_result("memory_prediction_gpu", result | {"compared": compared}, card, "cuda")


def main(argv: list[str]) -> None:
    """Measure the rows that the device can measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args(argv)
    quiet_transformers()
    find_device(args.device)
    measure_cpu() if args.device == "cpu" else measure_cuda()


if __name__ == "__main__":
    run_main(main)
