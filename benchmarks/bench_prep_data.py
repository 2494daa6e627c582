#!/usr/bin/env python
"""Preparing conversations: rows/s of prep_data.py over those of TRL, and of reading bad rows alone.

  python -m benchmarks.bench_prep_data --dataset alpaca.json --tokenizer gpt2.tiktoken --work_dir runs/bench

Both sides get the same rows, repeated with a number in each so that no two are equal and nothing comes from
a cache, and the same number of processes. Ours is the whole script: reading, checks, hashes, split, tokens,
report. TRL's is `SFTTrainer._prepare_dataset` alone, chat template and tokens with assistant_only_loss, from
rows that are in memory as messages already.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import prep_data
from benchmarks.record import measure_pairs, measure_peak, write_result
from firstwords.conversations import Batch, gather_rows, survey_batch
from firstwords.parts import make_parts, open_work
from firstwords.schema import conversation_row, format_row
from firstwords.sources import read_raw_rows, read_rows, to_conversation
from firstwords.template import CHAT_TEMPLATE
from firstwords.tokenizer import load_tokenizer


def write_rows(dataset: str, path: Path, count: int, mark: str) -> None:
    """Write `count` rows as messages, the set's own ones again and again, each with a mark of its own."""
    rows = []
    for located in read_rows(dataset):
        if isinstance(located.row, dict) and all(
            str(located.row[k]).strip() for k in ("instruction", "output")
        ):
            rows.append(conversation_row(to_conversation(located.row)))
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            row = json.loads(json.dumps(rows[number % len(rows)]))
            row["messages"][0]["content"] += f" ({mark} {number})"
            file.write(format_row(row))


def measure_ours(path: Path, tokenizer: Path, out_dir: Path, num_proc: int) -> float:
    """Return the seconds of the whole of prep_data.py."""
    shutil.rmtree(out_dir, ignore_errors=True)
    flags = ["--dataset", path, "--tokenizer", tokenizer, "--out_dir", out_dir, "--num_proc", num_proc]
    begin = time.perf_counter()
    prep_data.main([str(flag) for flag in flags])
    return time.perf_counter() - begin


def measure_trl(path: Path, tokenizer: Path, out_dir: Path, num_proc: int) -> float:
    """Return the seconds of TRL's preparation."""
    from datasets import Dataset
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])
    spent = []
    prepare = SFTTrainer._prepare_dataset

    def prepare_timed(*args, **kwargs):
        begin = time.perf_counter()
        prepared = prepare(*args, **kwargs)
        spent.append(time.perf_counter() - begin)
        masked = {"assistant_masks", "labels"} & set(prepared.column_names)
        assert "input_ids" in prepared.column_names, prepared.column_names
        assert masked, prepared.column_names
        return prepared

    processing = AutoTokenizer.from_pretrained(str(tokenizer))
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(processing), n_layer=1, n_head=1, n_embd=8))
    args = SFTConfig(
        str(out_dir), assistant_only_loss=True, dataset_num_proc=num_proc, max_length=None, report_to=[],
        use_cpu=True, bf16=False,
    )  # fmt: skip
    SFTTrainer._prepare_dataset = prepare_timed
    try:
        SFTTrainer(model, args, train_dataset=rows, processing_class=processing)
    finally:
        SFTTrainer._prepare_dataset = prepare
    return spent[0]


def measure_reading(path: Path, out_dir: Path, num_proc: int) -> float:
    """Return the seconds of the first pass alone: read, parse, check, hash, write."""
    shutil.rmtree(out_dir, ignore_errors=True)
    batches = (Batch(0, False, None, None, 0, rows) for rows in gather_rows(read_raw_rows(str(path))))
    begin = time.perf_counter()
    with open_work(out_dir, {}) as work:
        list(make_parts(survey_batch, batches, work, num_proc=num_proc))
        shutil.rmtree(work.folder)
    return time.perf_counter() - begin


def compare_trl(args: argparse.Namespace, path: Path, tokenizer: Path, out_dir: Path) -> None:
    """Measure the pairs, each with rows of its own."""
    pair = iter(range(args.pairs))

    def rate_ours() -> float:
        write_rows(args.dataset, path, args.rows, f"pair {next(pair)}")
        return args.rows / measure_ours(path, tokenizer, out_dir, args.num_proc)

    def rate_trl() -> float:
        return args.rows / measure_trl(path, tokenizer, out_dir, args.num_proc)

    result = measure_pairs(rate_ours, rate_trl, args.pairs)
    print(result)
    settings = {"rows": args.rows, "num_proc": args.num_proc, "dataset": Path(args.dataset).name}
    write_result("prep_data_vs_trl", result, settings)


def rate_reading(args: argparse.Namespace, path: Path, out_dir: Path) -> None:
    """Measure the first pass alone, five times."""
    write_rows(args.dataset, path, args.lines, "line")
    rates = sorted(args.lines / measure_reading(path, out_dir, args.num_proc) for _ in range(5))
    print(rates)
    result = {"median": rates[2], "low": rates[0], "high": rates[-1]}
    write_result("reject_lines_per_s", result, {"lines": args.lines, "num_proc": args.num_proc})


def _measure_peak(path: Path, tokenizer: Path, out_dir: Path, num_proc: int) -> float:
    shutil.rmtree(out_dir, ignore_errors=True)
    flags = ["--dataset", path, "--tokenizer", tokenizer, "--out_dir", out_dir, "--num_proc", num_proc]
    return measure_peak("prep_data.py", flags)


def compare_memory(args: argparse.Namespace, path: Path, tokenizer: Path, out_dir: Path) -> None:
    """Measure a set and one of ten times the rows."""
    peaks = []
    for count in (args.memory_rows, 10 * args.memory_rows):
        write_rows(args.dataset, path, count, "row")
        size = path.stat().st_size / 1e6
        peaks.append((count, size, _measure_peak(path, tokenizer, out_dir, args.num_proc)))
    print(peaks)
    result = {"median": peaks[1][2] / peaks[0][2], "rows_mb_peak_mb": peaks}
    write_result("prep_data_memory_ratio", result, {"num_proc": args.num_proc})


def main() -> None:
    """Measure what is asked for, and write its rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", required=True, help="Alpaca rows")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--lines", type=int, default=200_000, help="for reading alone")
    parser.add_argument("--num_proc", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--memory_rows", type=int, default=30_000)
    parser.add_argument("--only", choices=("trl", "reading", "memory"))
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    tokenizer, path, out_dir = (args.work_dir / name for name in ("tokenizer", "rows.jsonl", "out"))
    tokenizer.mkdir(exist_ok=True)
    load_tokenizer(args.tokenizer).save(tokenizer, chat_template=CHAT_TEMPLATE)
    if args.only in (None, "trl"):
        compare_trl(args, path, tokenizer, out_dir)
    if args.only in (None, "reading"):
        rate_reading(args, path, out_dir)
    if args.only in (None, "memory"):
        compare_memory(args, path, tokenizer, out_dir)


if __name__ == "__main__":
    main()
