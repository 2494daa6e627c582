#!/usr/bin/env python
"""Measure decoding against `transformers`' generate and llama.cpp, in turn.

  python -m benchmarks.bench_generate --save_dir random_124m      # the weights, for a GGUF of them
  python -m benchmarks.bench_generate --gguf_f16 f16.gguf --gguf_q8 q8_0.gguf
  python -m benchmarks.bench_generate --only streams

The model is GPT-2's smallest shape (`configs/models/baseline_124m.json`) with random weights and 50,304 ids;
a prompt of 32 tokens is answered by 128, greedily; counted are new tokens a second of the whole call, the
reading of the prompt with it. A round runs each side once; a ratio is that of one round. Of llama.cpp the
whole call of `llama-cpp-python` is counted too. The share of the memory's bandwidth is bytes of the matrices
in their stored dtype, read once a token, over what summing 500 MB of float32 reads in the same round.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import GPT2Config

from benchmarks.record import summarise_pairs, write_result
from firstwords.generate import generate_batch, stream_ids
from firstwords.model import find_device, has_bf16, quiet_transformers, read_config
from firstwords.quantize import has_fbgemm, replace_matrices

CONFIG = Path("configs/models/baseline_124m.json")
VOCAB, PROMPT, NEW, STREAMS = 50304, 32, 128, 64
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "llama_f16": 2, "llama_q8": 34 / 32}
READ = 500_000_000  # bytes

# row -> (side, the side it is compared with)
RATIOS = {
    "generate_cpu_fp32": ("fp32", "transformers"),
    "generate_cpu_fp16": ("fp16", "transformers"),
    "generate_cpu_bf16": ("bf16", "transformers"),
    "generate_cpu_int8": ("int8", "transformers"),
    "generate_cpu_fp16_vs_llama": ("fp16", "llama_f16"),
    "generate_cpu_int8_vs_llama": ("int8", "llama_f16"),
    "generate_cpu_int8_vs_llama_q8": ("int8", "llama_q8"),
    "generate_cpu_64_streams": ("streams", "transformers"),
    "generate_gpu": ("fp32", "transformers"),
    "generate_gpu_bf16": ("bf16", "transformers"),
}


def build_model(device: str, dtype: str = "fp32") -> transformers.GPT2LMHeadModel:
    """Build the model with the same random weights at each call."""
    torch.manual_seed(0)
    config = GPT2Config(**read_config(CONFIG), vocab_size=VOCAB, eos_token_id=None, bos_token_id=0)
    model = transformers.GPT2LMHeadModel(config).eval()
    if dtype != "fp32":
        replace_matrices(model, dtype)
    return model.to(device)


def draw_prompts(count: int) -> list[list[int]]:
    """Draw prompts of random ids; the first is the same for any count."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(50000, (PROMPT,), generator=generator).tolist() for _ in range(count)]


def run_transformers(model) -> list[int]:
    """Answer with the library's own loop."""
    ids = torch.tensor(draw_prompts(1), device=model.device)
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return output[0, PROMPT:].tolist()


def run_ours(model) -> list[int]:
    """Answer one prompt with ours."""
    return list(stream_ids(model, draw_prompts(1)[0], stop_ids=(), limit=NEW))


def run_streams(model) -> list[int]:
    """Answer 64 prompts together; return all new ids."""
    replies = generate_batch(model, draw_prompts(STREAMS), stop_ids=(), limits=[NEW] * STREAMS)
    return sum(replies, [])


def open_llama(path: Path, threads: int) -> Callable[[], list[int]]:
    """Load a GGUF of the same weights and return what answers with it."""
    import llama_cpp
    import numpy as np

    # Without room for all logits of the prompt: one call reads it, as ours does.
    llama = llama_cpp.Llama(
        str(path), n_ctx=PROMPT + NEW, n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def answer() -> list[int]:
        llama.reset()
        ids, prompt = [], draw_prompts(1)[0]
        llama.eval(prompt)
        for _ in range(NEW):
            logits = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
            ids.append(int(np.ctypeslib.as_array(logits, shape=(llama.n_vocab(),)).argmax()))
            llama.eval(ids[-1:])
        return ids

    return answer


def read_bandwidth() -> float:
    """Return the bytes a second that summing a large tensor reads, the best of three."""
    data = torch.ones(READ // 4)
    rates = []
    for _ in range(3):
        begin = time.perf_counter()
        data.sum()
        rates.append(READ / (time.perf_counter() - begin))
    return max(rates)


def build_sides(args) -> dict[str, Callable[[], list[int]]]:
    """Return what answers, by name; llama.cpp only where a GGUF is given."""
    device = args.device
    plain = build_model(device)
    sides = {"transformers": partial(run_transformers, plain), "fp32": partial(run_ours, plain)}
    dtypes = ["fp16", "int8"] if device == "cpu" and has_fbgemm() else []
    dtypes += ["bf16"] if has_bf16(device) else []
    sides |= {dtype: partial(run_ours, build_model(device, dtype)) for dtype in dtypes}
    if device == "cpu":
        for name, path in (("llama_f16", args.gguf_f16), ("llama_q8", args.gguf_q8)):
            if path:
                sides[name] = open_llama(path, torch.get_num_threads())
    sides["streams"] = partial(run_streams, plain)
    return {name: run for name, run in sides.items() if name in {"transformers", *(args.only or sides)}}


def time_side(run: Callable[[], list[int]]) -> tuple[float, list[int]]:
    """Return new tokens a second, and the ids."""
    begin = time.perf_counter()
    ids = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return len(ids) / (time.perf_counter() - begin), ids


def measure_rounds(sides: dict, rounds: int) -> tuple[list[dict[str, float]], dict[str, list[int]]]:
    """Run every side once a round, after each has answered once unmeasured; print each round."""
    replies = {name: run()[:NEW] for name, run in sides.items() if name != "streams"}
    figures = []
    for _ in range(rounds):
        figures.append({name: time_side(run)[0] for name, run in sides.items()})
        figures[-1]["bandwidth"] = read_bandwidth()
        print({name: float(f"{value:.3g}") for name, value in figures[-1].items()}, flush=True)
    return figures, replies


def write_rows(figures: list[dict[str, float]], replies: dict[str, list[int]], device: str) -> None:
    """Write each row whose two sides were measured."""
    weights = count_matrices(build_model("cpu"))
    shares = {
        name: statistics.median(f[name] * BYTES[name] * weights / f["bandwidth"] for f in figures)
        for name in BYTES.keys() & figures[0].keys()
    }
    same = {name: count_same(ids, replies["transformers"]) for name, ids in replies.items()}
    for row, (ours, rival) in RATIOS.items():
        if row.startswith("generate_gpu") != (device == "cuda") or not {ours, rival} <= set(figures[0]):
            continue
        result = summarise_pairs([(figure[ours], figure[rival]) for figure in figures])
        settings = {
            "prompt": PROMPT, "new": NEW, "streams": STREAMS if ours == "streams" else 1, "device": device,
            "threads": torch.get_num_threads(), "rounds": figures, "share_of_bandwidth": shares,
            "first_ids_as_transformers": same,
        }  # fmt: skip
        write_result(row, result, settings)
        print(f"{row}: {result['median']:.2f} ({result['low']:.2f} to {result['high']:.2f})")
    print("share of the bandwidth:", {name: round(share, 2) for name, share in shares.items()})
    print(f"ids as transformers', of {NEW}:", same)


def count_matrices(model) -> int:
    """Return the weights that one token reads: those of the blocks, and the head."""
    return sum(p.numel() for p in model.transformer.h.parameters()) + model.lm_head.weight.numel()


def count_same(ids: list[int], others: list[int]) -> int:
    """Return how many ids agree before the first that does not."""
    differ = [place for place, pair in enumerate(zip(ids, others, strict=True)) if pair[0] != pair[1]]
    return min(differ, default=len(ids))


def main() -> None:
    """Measure what this machine and the flags allow."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--rounds", type=int, default=5)
    add("--gguf_f16", type=Path, help="the same weights in f16 for llama.cpp")
    add("--gguf_q8", type=Path, help="the same in q8_0")
    add("--only", nargs="+", metavar="SIDE", help="of the sides only these; transformers is always there")
    add("--save_dir", type=Path, help="write the model here and end")
    args = parser.parse_args()
    quiet_transformers()
    if args.save_dir:
        build_model("cpu").save_pretrained(args.save_dir)
        return
    args.device = find_device(args.device)
    figures, replies = measure_rounds(build_sides(args), args.rounds)
    write_rows(figures, replies, args.device)


if __name__ == "__main__":
    main()
