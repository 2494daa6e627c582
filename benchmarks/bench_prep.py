#!/usr/bin/env python
"""Measure prep_text_corpus.py against three other ways of encoding the same text, in turn.

  python -m benchmarks.bench_prep --tokenizer gpt2.tiktoken --rounds 5
  python -m benchmarks.bench_prep --tokenizer gpt2.tiktoken --memory

The text is this machine's own: the sources and documents of the installed Python packages, 100 MB of it, a
document a file, as one .jsonl. Each side encodes it with GPT-2's vocabulary in 2 processes and is counted
in MB of text per second, from its first byte read to its last byte written:

ours      prep_text_corpus.py as a command, the start of Python, hashes, the split and the sync included
hf        datasets.map with the fast GPT-2 tokenizer of Hugging Face, batched, ids kept in its Arrow cache
nanogpt   nanoGPT's prepare.py: tiktoken's encode_ordinary in datasets.map, then 1024 shards into a memmap
tiktoken  encode_ordinary alone, on texts that are in memory; nothing is read and nothing is written

The ids are compared: `ours` by sha256 against `nanogpt`. A round takes about a minute and its figures are
kept in the work folder, so that the measuring can be stopped and gone on with; the result files are
written when all rounds are there.
"""

import argparse
import hashlib
import json
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np

from benchmarks.record import measure_peak, write_result
from firstwords.template import CHAT_TEMPLATE
from firstwords.tokenizer import load_tokenizer

PROCESSES, TOTAL_BYTES, ENDOFTEXT = 2, 100_000_000, 50256
ROWS = {"prep_text_vs_hf": "hf", "prep_text_vs_nanogpt": "nanogpt", "prep_text_vs_tiktoken": "tiktoken"}


def write_text(path: Path) -> int:
    """Write the text, a document a line; returns its bytes."""
    total = 0
    packages = Path(sysconfig.get_paths()["purelib"])
    staging = path.with_suffix(".part")
    with open(staging, "w", encoding="utf-8") as rows:
        for file in sorted(packages.rglob("*")):
            if file.suffix not in (".py", ".pyi", ".md", ".rst", ".txt") or not file.is_file():
                continue
            text = file.read_bytes().decode("utf-8", "replace").replace("\0", "")
            if text.strip() and total + len(text.encode()) <= TOTAL_BYTES * 1.01:
                rows.write(json.dumps({"text": text}) + "\n")
                total += len(text.encode())
            if total >= TOTAL_BYTES:
                break
    staging.rename(path)
    return total


def build_words(work: Path, name: str, tokenizer: str) -> list:
    """Return the words behind prep_text_corpus.py, with an empty place for what it writes."""
    shutil.rmtree(work / "ours", ignore_errors=True)
    words = ["--dataset", work / name, "--out_dir", work / "ours", "--tokenizer", tokenizer]
    return [*words, "--num_proc", PROCESSES]


def run_ours(work: Path, tokenizer: str) -> float:
    """Run the command; returns seconds."""
    words = map(str, build_words(work, "text.jsonl", tokenizer))
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "prep_text_corpus.py", *words],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return time.perf_counter() - began


def compare_memory(work: Path, tokenizer: str) -> None:
    """Write the row of the peak memory at ten times the text, each copy of it with a mark of its own."""
    small, large = work / "text.jsonl", work / "large.jsonl"
    with open(large, "w", encoding="utf-8") as rows:
        for copy in range(10):
            with open(small, encoding="utf-8") as lines:
                rows.writelines(line.replace('{"text": "', f'{{"text": "{copy} ', 1) for line in lines)
    peaks = [
        (
            path.stat().st_size / 1e6,
            measure_peak("prep_text_corpus.py", build_words(work, path.name, tokenizer)),
        )
        for path in (small, large)
    ]
    large.unlink()
    print(peaks)
    result = {"median": peaks[1][1] / peaks[0][1], "mb_peak_mb": peaks}
    write_result("prep_text_memory_ratio", result, {"processes": PROCESSES})


def _load_rows(work: Path):
    import datasets

    shutil.rmtree(work / "cache", ignore_errors=True)
    datasets.disable_progress_bars()
    return datasets.load_dataset(
        "json", data_files=str(work / "text.jsonl"), split="train", cache_dir=str(work / "cache")
    )


def run_hf(work: Path, tokenizer: str) -> float:
    """Encode by `datasets.map` and the fast tokenizer; returns seconds."""
    from transformers import AutoTokenizer

    folder = work / "tokenizer"
    folder.mkdir(exist_ok=True)
    load_tokenizer(tokenizer).save(folder, chat_template=CHAT_TEMPLATE)
    fast = AutoTokenizer.from_pretrained(folder)
    began = time.perf_counter()
    rows = _load_rows(work)
    rows.map(
        lambda batch: {"ids": fast(batch["text"])["input_ids"]},
        batched=True,
        remove_columns=["text"],
        num_proc=PROCESSES,
    )
    return time.perf_counter() - began


def run_nanogpt(work: Path, tokenizer: str) -> float:
    """Encode as nanoGPT's data/openwebtext/prepare.py does; returns seconds."""
    encoding = build_encoding(tokenizer)

    def process(row: dict) -> dict:
        ids = encoding.encode_ordinary(row["text"])
        ids.append(ENDOFTEXT)
        return {"ids": ids, "len": len(ids)}

    began = time.perf_counter()
    encoded = _load_rows(work).map(process, remove_columns=["text"], num_proc=PROCESSES)
    size = np.sum(encoded["len"], dtype=np.uint64)
    bins = np.memmap(work / "nanogpt.bin", dtype=np.uint16, mode="w+", shape=(int(size),))
    place = 0
    num_shards = min(1024, len(encoded))
    for number in range(num_shards):
        shard = encoded.shard(num_shards=num_shards, index=number, contiguous=True).with_format("numpy")
        ids = np.concatenate(shard["ids"])
        bins[place : place + len(ids)] = ids
        place += len(ids)
    bins.flush()
    return time.perf_counter() - began


def build_encoding(tokenizer: str):
    """Return tiktoken's own GPT-2, with its own pattern, from the ranks."""
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe

    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
    ranks = load_tiktoken_bpe(tokenizer)
    return tiktoken.Encoding(
        "gpt2_of_a_file", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": ENDOFTEXT}
    )


def _encode_half(number: int, work: Path, tokenizer: str, barrier, seconds) -> None:
    lines = (work / "text.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines[number::PROCESSES]]
    encoding = build_encoding(tokenizer)
    encoding.encode_ordinary("warm")
    barrier.wait()
    began = time.perf_counter()
    for text in texts:
        encoding.encode_ordinary(text)
    seconds[number] = time.perf_counter() - began


def run_tiktoken(work: Path, tokenizer: str) -> float:
    """Encode texts in memory, every second one in each process; returns the slower one's seconds."""
    context = multiprocessing.get_context("spawn")
    barrier, seconds = context.Barrier(PROCESSES), context.Array("d", PROCESSES)
    runs = [
        context.Process(target=_encode_half, args=(number, work, tokenizer, barrier, seconds))
        for number in range(PROCESSES)
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    return max(seconds)


SIDES = {"ours": run_ours, "hf": run_hf, "nanogpt": run_nanogpt, "tiktoken": run_tiktoken}


def check_ids(work: Path) -> bool:
    """Tell whether our two splits hold the documents of nanoGPT's bin, id for id."""
    theirs = np.fromfile(work / "nanogpt.bin", dtype=np.uint16)
    ours = [np.fromfile(work / "ours" / f"{split}.bin", dtype=np.uint16) for split in ("train", "val")]
    return sorted(_hash_documents(theirs)) == sorted(
        hashed for ids in ours for hashed in _hash_documents(ids)
    )


def _hash_documents(ids: np.ndarray) -> list[bytes]:
    ends = np.flatnonzero(ids == ENDOFTEXT) + 1
    return [hashlib.sha256(part.tobytes()).digest() for part in np.split(ids, ends)[:-1]]


def main() -> None:
    """Measure the rounds that are not there yet, and write the rows when all are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True, help="GPT-2's ranks, a .tiktoken file")
    parser.add_argument("--work_dir", type=Path, default=Path("data/bench_prep"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="measure memory alone, at 100 MB and 1 GB")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    state, text = args.work_dir / "rounds.json", args.work_dir / "text.jsonl"
    kept = json.loads(state.read_text()) if state.exists() else {"bytes": write_text(text), "rounds": []}
    rounds = kept["rounds"]
    if args.memory:
        compare_memory(args.work_dir, args.tokenizer)
        return
    while len(rounds) < args.rounds:
        measured = {name: run(args.work_dir, args.tokenizer) for name, run in SIDES.items()}
        if not check_ids(args.work_dir):
            sys.exit("the ids differ")
        rounds.append(measured)
        state.write_text(json.dumps(kept))
        print(
            {name: f"{kept['bytes'] / 1e6 / seconds:.1f} MB/s" for name, seconds in measured.items()},
            flush=True,
        )
    for row, rival in ROWS.items():
        pairs = [[kept["bytes"] / 1e6 / r["ours"], kept["bytes"] / 1e6 / r[rival]] for r in rounds]
        ratios = sorted(ours / theirs for ours, theirs in pairs)
        result = {"pairs": pairs, "median": statistics.median(ratios), "low": ratios[0], "high": ratios[-1]}
        settings = {"unit": "MB of text per second", "bytes": kept["bytes"], "processes": PROCESSES}
        write_result(row, result, settings | {"ids": "equal on every document"})
        print(f"{row}: {result['median']:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
