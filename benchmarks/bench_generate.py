#!/usr/bin/env python
"""Measure decoding against `transformers`' generate and llama.cpp, in turn.

  python -m benchmarks.bench_generate --save_dir random_124m      # the weights, for a GGUF of them
  python -m benchmarks.bench_generate --gguf_f16 f16.gguf --gguf_q8 q8_0.gguf
  python -m benchmarks.bench_generate --only streams streams_fp16 streams_int8
  python -m benchmarks.bench_generate --only streams continuous --new 32
  python -m benchmarks.bench_generate --only server_8 server_32

The model is GPT-2's smallest shape (`configs/models/baseline_124m.json`) with random weights and 50,304 ids;
a prompt of 32 tokens is answered by 128, greedily; counted are new tokens a second of the whole call, the
reading of the prompt with it. A round runs each side once; a ratio is that of one round. Of llama.cpp the
whole call of `llama-cpp-python` is counted too. The share of the memory's bandwidth is bytes of the matrices
in their stored dtype, read once a token, over what summing 500 MB of float32 reads in the same round.
`continuous` is transformers' own continuous batching of the 64 prompts. `server_8` and `server_32` are so
many clients of `inference.py --serve`, each asking once; the tokenizer is of bytes, `usage` is counted.
"""

import argparse
import atexit
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import torch
import transformers
from transformers import GenerationConfig, GPT2Config

from benchmarks.record import summarise_pairs, write_result
from firstwords.args import run_main
from firstwords.generate import generate_batch, stream_ids
from firstwords.model import find_device, has_bf16, quiet_transformers, read_config
from firstwords.quantize import has_fbgemm, replace_matrices
from firstwords.template import CHAT_TEMPLATE
from firstwords.tokenizer import BYTE_LEVEL, Tokenizer

CONFIG = Path("configs/models/baseline_124m.json")
VOCAB, PROMPT, STREAMS = 50304, 32, 64
CLIENTS = (8, 32)
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
    "generate_cpu_64_streams_fp16": ("streams_fp16", "transformers"),
    "generate_cpu_64_streams_int8": ("streams_int8", "transformers"),
    "generate_cpu_64_vs_continuous": ("streams", "continuous"),
    "serve_cpu_8": ("server_8", "transformers"),
    "serve_cpu_32": ("server_32", "transformers"),
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


def run_transformers(model, new: int) -> list[int]:
    """Answer with the library's own loop."""
    ids = torch.tensor(draw_prompts(1), device=model.device)
    options = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return output[0, PROMPT:].tolist()


def run_ours(model, new: int) -> list[int]:
    """Answer one prompt with ours."""
    return list(stream_ids(model, draw_prompts(1)[0], stop_ids=(), limit=new))


def run_streams(model, new: int) -> list[int]:
    """Answer 64 prompts together; return all new ids."""
    replies = generate_batch(model, draw_prompts(STREAMS), stop_ids=(), limits=[new] * STREAMS)
    return sum(replies, [])


def run_continuous(model, new: int) -> list[int]:
    """Answer the 64 prompts with transformers' continuous batching; return all new ids."""
    # An end that no id is: all replies have the same length, as ours do.
    settings = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    replies = model.generate_batch(inputs=draw_prompts(STREAMS), generation_config=settings)
    return sum((list(reply.generated_tokens) for reply in replies.values()), [])


def open_server() -> str:
    """Start `inference.py --serve` with the model; return the address. It ends with this process."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    tokenizer = Tokenizer(BYTE_LEVEL, [bytes([byte]) for byte in range(256)])
    build_model("cpu").save_pretrained(folder.name)
    tokenizer.save(Path(folder.name), chat_template=CHAT_TEMPLATE)
    words = ["--model_dir", folder.name, "--device", "cpu", "--serve", "--port", "0"]
    words += ["--max_streams", str(max(CLIENTS))]
    process = subprocess.Popen([sys.executable, "inference.py", *words], stderr=subprocess.PIPE, text=True)
    atexit.register(process.terminate)
    for line in process.stderr:
        if "API at " in line:
            return line.split("API at ")[1].split()[0]
    raise RuntimeError("inference.py --serve has ended")


def run_clients(count: int, address: str, new: int) -> list[int]:
    """Ask a server from `count` clients at once; return as many numbers as it counts new tokens."""
    model = httpx.get(f"{address}/models").json()["data"][0]["id"]

    def ask(question: list[int]) -> int:
        turn = {"role": "user", "content": "".join(chr(97 + token_id % 26) for token_id in question)}
        body = {"model": model, "messages": [turn], "temperature": 0, "max_tokens": new}
        answer = httpx.post(f"{address}/chat/completions", json=body, timeout=300)
        return answer.raise_for_status().json()["usage"]["completion_tokens"]

    with ThreadPoolExecutor(count) as clients:
        return [0] * sum(clients.map(ask, draw_prompts(count)))


def open_llama(path: Path, threads: int, new: int) -> Callable[[], list[int]]:
    """Load a GGUF of the same weights and return what answers with it."""
    import llama_cpp
    import numpy as np

    # Without room for all logits of the prompt: one call reads it, as ours does.
    llama = llama_cpp.Llama(
        str(path), n_ctx=PROMPT + new, n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def answer() -> list[int]:
        llama.reset()
        ids, prompt = [], draw_prompts(1)[0]
        llama.eval(prompt)
        for _ in range(new):
            logits = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
            ids.append(int(np.ctypeslib.as_array(logits, shape=(llama.n_vocab(),)).argmax()))
            llama.eval(ids[-1:])
        return ids

    return answer


def read_bandwidth(device: str) -> float:
    """Return the bytes a second that summing a large tensor reads, the best of three."""
    data = torch.ones(READ // 4, device=device)
    rates = []
    for _ in range(3):
        begin = time.perf_counter()
        data.sum().item()
        rates.append(READ / (time.perf_counter() - begin))
    return max(rates)


def build_sides(args) -> dict[str, Callable[[], list[int]]]:
    """Return what answers, by name; llama.cpp only where a GGUF is given."""
    device, new = args.device, args.new
    plain = build_model(device)
    sides = {"transformers": partial(run_transformers, plain, new), "fp32": partial(run_ours, plain, new)}
    dtypes = ["fp16", "int8"] if device == "cpu" and has_fbgemm() else []
    dtypes += ["bf16"] if has_bf16(device) else []
    models = {dtype: build_model(device, dtype) for dtype in dtypes}
    sides |= {dtype: partial(run_ours, model, new) for dtype, model in models.items()}
    if device == "cpu":  # the rows of a GPU are of one stream
        sides |= build_cpu_sides(args, plain, models)
    return {name: run for name, run in sides.items() if name in {"transformers", *(args.only or sides)}}


def build_cpu_sides(args, plain, models: dict) -> dict[str, Callable[[], list[int]]]:
    """Return what answers on a CPU alone: llama.cpp, many streams, servers."""
    sides, new = {}, args.new
    for name, path in (("llama_f16", args.gguf_f16), ("llama_q8", args.gguf_q8)):
        if path:
            sides[name] = open_llama(path, torch.get_num_threads(), new)
    sides["streams"] = partial(run_streams, plain, new)
    sides |= {f"streams_{dtype}": partial(run_streams, model, new) for dtype, model in models.items()}
    sides["continuous"] = partial(run_continuous, build_model("cpu"), new)
    if not args.only or any(name.startswith("server") for name in args.only):
        address = open_server()
        sides |= {f"server_{count}": partial(run_clients, count, address, new) for count in CLIENTS}
    return sides


def time_side(run: Callable[[], list[int]]) -> tuple[float, list[int]]:
    """Return new tokens a second, and the ids."""
    begin = time.perf_counter()
    ids = run()
    return len(ids) / (time.perf_counter() - begin), ids


def measure_rounds(sides: dict, args) -> tuple[list[dict[str, float]], dict[str, list[int]]]:
    """Run every side once a round, after each has answered once unmeasured; print each round."""
    replies = {name: run() for name, run in sides.items() if not is_many(name)}
    figures = []
    for _ in range(args.rounds):
        figures.append({name: time_side(run)[0] for name, run in sides.items()})
        figures[-1]["bandwidth"] = read_bandwidth(args.device)
        print({name: float(f"{value:.3g}") for name, value in figures[-1].items()}, flush=True)
    return figures, replies


def is_many(side: str) -> bool:
    """Tell whether a side answers many prompts at once."""
    return side.startswith(("streams", "server", "continuous"))


def write_rows(figures: list[dict[str, float]], replies: dict[str, list[int]], args) -> None:
    """Write each row whose two sides were measured."""
    device, new = args.device, args.new
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
            "prompt": PROMPT, "new": new, "streams": count_streams(ours), "device": device,
            "threads": torch.get_num_threads(), "rounds": figures, "share_of_bandwidth": shares,
            "first_ids_as_transformers": same,
        }  # fmt: skip
        write_result(row, result, settings, device)
        print(f"{row}: {result['median']:.2f} ({result['low']:.2f} to {result['high']:.2f})")
    print("share of the bandwidth:", {name: round(share, 2) for name, share in shares.items()})
    print(f"ids as transformers', of {new}:", same)


def count_streams(side: str) -> int:
    """Return how many prompts a side answers at once."""
    if side.startswith("server"):
        return int(side.partition("_")[2])
    return STREAMS if is_many(side) else 1


def count_matrices(model) -> int:
    """Return the weights that one token reads: those of the blocks, and the head."""
    return sum(p.numel() for p in model.transformer.h.parameters()) + model.lm_head.weight.numel()


def count_same(ids: list[int], others: list[int]) -> int:
    """Return how many ids agree before the first that does not."""
    differ = [place for place, pair in enumerate(zip(ids, others, strict=True)) if pair[0] != pair[1]]
    return min(differ, default=len(ids))


def main(argv: list[str]) -> None:
    """Measure what this machine and the flags allow."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--rounds", type=int, default=5)
    add("--new", type=int, default=128, help="tokens of a reply")
    add("--gguf_f16", type=Path, help="the same weights in f16 for llama.cpp")
    add("--gguf_q8", type=Path, help="the same in q8_0")
    add("--only", nargs="+", metavar="SIDE", help="of the sides only these; transformers is always there")
    add("--save_dir", type=Path, help="write the model here and end")
    args = parser.parse_args(argv)
    quiet_transformers()
    if args.save_dir:
        build_model("cpu").save_pretrained(args.save_dir)
        return
    args.device = find_device(args.device)
    figures, replies = measure_rounds(build_sides(args), args)
    write_rows(figures, replies, args)


if __name__ == "__main__":
    run_main(main)
