"""Pairs of timings -> a result file, and all result files -> the table in BENCHMARKS.md.

    python -m benchmarks.record          # rewrites the table between its two marks

A row has a fixed name; one that no result file has stands there as "not measured".
"""

import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import psutil

from firstwords.atomic import write_text

RESULTS = Path(__file__).parent / "results"
TABLE = Path(__file__).parent.parent / "BENCHMARKS.md"
BEGIN, END = "<!-- table: made by benchmarks/record.py -->", "<!-- end of table -->"
CURVES = "<!-- curves: made by benchmarks/record.py -->"

# name of the row -> what it must reach, in words
ROWS = {
    "train_cpu_vs_stock_fp32": "tokens/s of train.py over the plain Trainer (fp32, gelu_new, unpacked): 2.5",
    "train_cpu_vs_stock_bf16": "tokens/s of train.py --bf16 over the Trainer in bf16, padded to longest: 1.5",
    "train_cpu_vs_nanogpt": "tokens/s of train.py over nanoGPT's train.py, its CPU shape, fp32: 1",
    "train_cpu_vs_nanogpt_biases": "the same, nanoGPT with --bias=True, the weights of both alike: 1",
    "run_all_minutes": "run_all.sh after installation, 2 cores, minutes: at most 10 with avx512_bf16",
    "run_all_peak_gb": "peak memory of run_all.sh, GB: under 3",
    "exact_match": "held-out questions answered with the documented sentence (200 drawn): 0.95",
    "exact_match_all": "the same over all held-out questions",
    "stop_rate": "replies that end by themselves: 0.99",
    "followup_match": "follow-ups answered with the signature: 0.90",
    "unknown_match": "invented names not known (100): 0.90",
    "false_unknown": "real names not known: at most 0.02",
    "stage_a_gain": "val loss of stage B from random weights less that from stage A's, at equal steps",
    "stage_a_gain_equal_time": "the same at equal total time",
    "prep_data_vs_trl": "rows/s of prep_data.py over TRL's preparation, 2 processes each: 5",
    "reject_lines_per_s": "lines/s read, checked, hashed, bad ones listed, 2 processes: 50,000",
    "prep_data_memory_ratio": "peak memory of prep_data.py at ten times the rows over that at 30,000: 1.2",
    "prep_text_vs_hf": "MB/s of prep_text_corpus.py over datasets.map with the fast GPT-2 tokenizer: 3",
    "prep_text_vs_nanogpt": "the same over nanoGPT's prepare.py: 1.2",
    "prep_text_vs_tiktoken": "the same over bare tiktoken, which reads and writes nothing: 0.9",
    "prep_text_memory_ratio": "peak memory of prep_text_corpus.py at 1 GB of text over that at 100 MB: 1.2",
    "sft_vs_padded": "packed SFT, real tokens/s over the plain Trainer padded to 1024: 6",
    "sft_vs_trl": "the same over TRL's SFTTrainer at batch 8, without gradient checkpointing: 2",
    "sft_vs_trl_packing": "the same over TRL's packing: 1.3",
    "sft_gpu_vs_padded": "on a GPU over the plain Trainer padded to 1024: 8",
    "sft_gpu_vs_trl": "the same over TRL's SFTTrainer at batch 8: 3",
    "sft_gpu_vs_trl_packing": "the same over TRL's packing: 1.3",
    "preflight_time": "seconds that --preflight names over those of the run: 0.75 to 1.25",
    "preflight_memory": "memory that --preflight names over what the GPU held at most: 0.97 to 1.03",
    "save_cost": "hashing, syncing and checking a save of 124M with AdamW, % of ten minutes: at most 0.5",
    "train_gpu_124m_vs_published": "tokens/s, GPU, 124M, over the published setup on the Trainer: 3",
    "train_gpu_355m_vs_published": "the same, 355M: 3",
    "train_gpu_124m_vs_stock": "over the Trainer without checkpointing, fused AdamW: 2.4",
    "train_gpu_355m_vs_stock": "the same, 355M: 2.4",
    "train_gpu_124m_vs_nanogpt": "over nanoGPT's train.py, compiled: 1.15",
    "train_gpu_355m_vs_nanogpt": "the same, 355M: 1.15",
    "train_gpu_124m_share": "% of the matrix rate measured beside, 124M: 60",
    "train_gpu_355m_share": "the same, 355M: 60",
    "loss_cpu_shape": "Tiny Shakespeare, nanoGPT's CPU shape, val loss after 1.54 M tokens: at most 1.58",
    "loss_cpu_shape_quarter": "the same after a quarter of them: at most 1.88",
    "tokens_cpu_shape_vs_nanogpt": "share of its tokens after which ours has nanoGPT's loss: at most 0.5",
    "tokens_cpu_shape_vs_adamw": "the same of an AdamW that was searched: at most 0.75",
    "tokens_small_test_vs_nanogpt": "share of tokens to nanoGPT's loss, small_test on pydocs: at most 0.5",
    "tokens_small_test_vs_adamw": "the same of an AdamW that was searched: at most 0.75",
    "loss_gpu_shape": "Tiny Shakespeare, nanoGPT's GPU shape, val loss (published 1.4697): at most 1.44",
    "tokens_gpu_shape_vs_nanogpt": "share of tokens to nanoGPT's loss there: at most 0.5",
    "tokens_gpu_shape_vs_adamw": "the same of an AdamW that was searched: at most 0.75",
    "tokens_124m_vs_nanogpt": "share of tokens to llm.c's loss, 124M on pydocs: at most 0.5",
    "tokens_124m_vs_adamw": "the same of an AdamW that was searched: at most 0.75",
    "scale_cpu_2_processes": "tokens/s of 2 processes over 1, one thread each, equal steps: up to 2",
    "scale_gpu_ddp": "tokens/s of all GPUs of a machine by configs/accelerate/ddp.yaml over 1",
    "scale_gpu_fsdp": "the same by configs/accelerate/fsdp.yaml over ddp.yaml",
    "memory_formulae": "predicted over counted peak of forward and backward, 3 models: 0.97 to 1.03",
    "memory_355m_row": "MiB that a further row of 1,024 tokens takes at 355M, --recompute selective: 600",
    "memory_355m_row_no_recompute": "the same without recomputation",
    "memory_355m_row_stock": "the same of the stock setup: gelu_new, dropout 0.1, all logits (about 2,655)",
    "memory_growth_cpu": "predicted over measured growth of a process, small_test, batch 8 to 40",
    "memory_recompute_speed_cpu": "tokens/s with --recompute selective over none, small_test on a CPU",
    "memory_rows_16gb": "largest micro-batch of 355M x 1,024 in 15.0 GiB, --recompute selective: 16",
    "memory_rows_16gb_no_recompute": "the same without recomputation",
    "memory_rows_16gb_stock": "the same of the stock setup (3 expected)",
    "memory_speed_16_vs_8": "tokens/s of micro-batch 16, --recompute selective, over 8 without: 0.95",
    "memory_prediction_gpu": "predicted over measured peak memory on a GPU: 0.97 to 1.03",
    "generate_cpu_fp32": "tokens/s of one stream, 124M, over transformers' generate in fp32, equal ids: 1.5",
    "generate_cpu_fp16": "the same with --dtype fp16: 3",
    "generate_cpu_bf16": "the same with --dtype bf16, on a CPU that computes in it: 3",
    "generate_cpu_int8": "the same with --dtype int8: 3",
    "generate_cpu_fp16_vs_llama": "tokens/s of --dtype fp16 over llama.cpp's f16: 0.8",
    "generate_cpu_int8_vs_llama": "tokens/s of --dtype int8 over llama.cpp's f16: 1",
    "generate_cpu_int8_vs_llama_q8": "tokens/s of --dtype int8 over llama.cpp's q8_0",
    "generate_cpu_64_streams": "tokens/s of 64 streams in fp32 over generate's one stream: 10",
    "generate_cpu_64_streams_fp16": "the same with --dtype fp16",
    "generate_cpu_64_streams_int8": "the same with --dtype int8",
    "generate_cpu_64_vs_continuous": "64 streams in fp32 over transformers' continuous batching of them",
    "serve_cpu_8": "tokens/s of inference.py --serve to 8 clients in fp32 over generate's one stream",
    "serve_cpu_32": "the same to 32 clients",
    "generate_gpu": "tokens/s of one stream in fp32 on a GPU over generate's: 8",
    "generate_gpu_bf16": "tokens/s of one stream in bf16 on a GPU over generate's in fp32",
}


def measure_pairs(
    a: Callable[[], float],
    b: Callable[[], float],
    pairs: int = 5,
    *,
    kept: Path | None = None,
    setup: dict | None = None,
) -> dict:
    """Run A B A B ... and return every figure and the ratio of each pair.

    Args:
        a, b: each runs one side once and returns its figure (larger is better, tokens per second).
        pairs: at least five.
        kept: a file that holds the setup and the pairs measured so far; another run of the same setup goes on
            from it. Removed at the end.
        setup: from `describe_setup`.
    """
    measured = read_pairs(kept, setup) if kept and kept.is_file() else []
    while len(measured) < pairs:
        measured.append((a(), b()))
        if kept:
            write_text(kept, "".join(f"{json.dumps(line)}\n" for line in (setup, *measured)))
    if kept:
        kept.unlink()
    return summarise_pairs(measured)


def read_pairs(kept: Path, setup: dict | None) -> list[tuple[float, float]]:
    """Return the pairs that were measured with this setup; another's are none."""
    head, *lines = kept.read_text().splitlines()
    if head != json.dumps(setup):
        print(f"{kept.name}: was measured elsewhere or with other settings, begun anew", flush=True)
        return []
    return [tuple(json.loads(line)) for line in lines]


def summarise_pairs(measured: list[tuple[float, float]]) -> dict:
    """Return the figures of all pairs, and the median of their ratios with the lowest and the highest."""
    ratios = sorted(x / y for x, y in measured)
    return {"pairs": measured, "median": statistics.median(ratios), "low": ratios[0], "high": ratios[-1]}


def measure_peak(script: str, words: list) -> float:
    """Run a script; return the peak MB of all its processes together.

    Measured 20 times a second; a page that several processes share is counted once (proportional set size,
    which Linux has). Not by `RUSAGE_CHILDREN`: that is the largest process alone, and never one of those
    that a fork server started.

    Raises:
        CalledProcessError: when the script fails.
    """
    command = [sys.executable, script, *map(str, words)]
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(map(_measure_process, [process, *process.children(recursive=True)])))
        time.sleep(0.05)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return peak / 1e6


def _measure_process(process: psutil.Process) -> int:
    with suppress(psutil.Error):  # it may have ended
        return process.memory_full_info().pss
    return 0


def write_result(row: str, result: dict, settings: dict, device: str = "cpu") -> None:
    """Write `results/<row>.json`: figures, settings of both sides, versions, machine, command, date.

    Args:
        device: `cpu` or `cuda`, on which it was measured.
    """
    assert row in ROWS, f"{row!r} is no row of the table"
    record = {
        "row": row,
        **result,
        **describe_setup(settings, device),
        "command": " ".join(["python", *map(_cut_folder, sys.orig_argv[1:])]),
        "date": datetime.date.today().isoformat(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{row}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _cut_folder(word: str) -> str:
    # Where the files lay is this machine's affair.
    return Path(word).name if word.startswith("/") else word


def describe_setup(settings: dict, device: str) -> dict:
    """Return what a figure is true of: the settings of both sides, versions, and the machine."""
    packages = ("torch", "transformers", "accelerate", "tokenizers")
    return {
        "settings": settings,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "machine": describe_machine(device),
    }


def describe_machine(device: str) -> str:
    """Return the GPU's name where it computes, the CPU's, its cores, and whether that has bfloat16."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    names = [line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")]
    bf16 = "with" if "avx512_bf16" in text or "amx_bf16" in text else "without"
    cpu = f"{names[0] if names else platform.processor()}, {len(names)} cores, {bf16} bfloat16"
    if device == "cpu":
        return cpu
    import torch  # here: the table is made without it

    return f"{torch.cuda.get_device_name()}; {cpu}"


def format_table() -> str:
    """Return the Markdown table of all rows."""
    lines = ["| row | what, and its goal | median | spread | date | machine |", "|---|---|---|---|---|---|"]
    for row, goal in ROWS.items():
        path = RESULTS / f"{row}.json"
        if not path.is_file():
            lines.append(f"| {row} | {goal} | not measured | | | |")
            continue
        result = json.loads(path.read_text(encoding="utf-8"))
        spread = f"{result['low']:.4g} to {result['high']:.4g}" if "low" in result else ""
        lines.append(
            f"| {row} | {goal} | {result['median']:.4g} | {spread} | {result['date']} | {result['machine']} |"
        )
    return "\n".join(lines)


def format_curves() -> str:
    """Return a Markdown table of the val losses that bench_loss.py wrote: a line for each arm and length.

    Both rows of a case may hold the same arm; it is shown once, with the first of them.
    """
    places = ("at 1/4", "at 1/2", "at 3/4", "at the end")
    lines = [f"| row | arm-steps | tokens | {' | '.join(places)} |", "|---" * 7 + "|"]
    shown = set()
    for row in (row for row in ROWS if row.startswith("tokens_")):
        path = RESULTS / f"{row}.json"
        result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        case = row.partition("_vs_")[0]
        for arm, curves in result.get("losses", {}).items():
            if (case, arm) in shown:
                continue
            shown.add((case, arm))
            tokens = result["tokens_per_step"] * max(map(int, curves[0]))
            spreads = [format_spread(values) for values in zip(*(c.values() for c in curves), strict=True)]
            lines.append(f"| {row} | {arm} | {tokens:,} | {' | '.join(spreads)} |")
    return "\n".join(lines)


def format_spread(values: Sequence[float]) -> str:
    """Return the median of some seeds, the lowest and the highest."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    """Rewrite the tables in BENCHMARKS.md."""
    text = TABLE.read_text(encoding="utf-8")
    for begin, table in ((BEGIN, format_table()), (CURVES, format_curves())):
        head, rest = text.split(begin)
        tail = rest.split(END, 1)[1]
        text = f"{head}{begin}\n{table}\n{END}{tail}"
    TABLE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
