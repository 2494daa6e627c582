#!/usr/bin/env python
"""Measure training against the plain Trainer and nanoGPT's train.py, in turn.

  python -m benchmarks.bench_train --rows train_cpu_vs_stock_fp32 --data_dir data/pydocs_chat
  python -m benchmarks.bench_train --rows train_cpu_vs_nanogpt train_cpu_vs_nanogpt_biases --nanogpt nanoGPT
  python -m benchmarks.bench_train --device cuda --nanogpt nanoGPT

Counted are real tokens (no padding) per second of whole optimizer steps. Every side is train.py's or the
rival's own trainer in a process of its own; while one computes, the other waits.

On conversations (`small_test`, `vs_stock`): the rival is Hugging Face's Trainer and model with the stock
activation (gelu_new), no dropout, rows padded to the longest of the batch, an attention mask, labels -100
outside the assistant's turns; its batch is the faster of the sizes tried. On text (`vs_nanogpt`, and all of
`--device cuda`): rows of tokens that are drawn at random, whose values cost nothing. `published` is the
Trainer with gelu_new, dropout 0.1, gradient checkpointing, 8-bit Adam where bitsandbytes is installed and an
attention mask of ones; `stock` is the same without checkpointing and with fused AdamW. The share of the
matrix rate goes by llm.c's count of 6 N + 6 L d T operations a token and by a product of 8192 x 8192 bf16
matrices, timed just before.
"""

import argparse
import json
import pickle
import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import GPT2Config, TrainingArguments

from benchmarks.record import RESULTS, describe_setup, measure_pairs, write_result
from benchmarks.turns import NanoGPT, TrainerSide, Turns, say_flags
from firstwords import trainer
from firstwords.args import TrainFlags, run_main
from firstwords.dataset import collate, open_train, read_chats
from firstwords.model import IGNORED, build_model, find_device, has_bf16, quiet_transformers, read_config
from firstwords.monitor import measure_matmul_rate
from firstwords.template import CHAT_TEMPLATE
from firstwords.tokenizer import CHARACTERS, Tokenizer, load_tokenizer
from firstwords.tokenstore import FORMAT, TokenStoreWriter

CONFIGS = Path("configs/models")
NANOGPT_CPU = {"n_layer": 4, "n_head": 4, "n_embd": 128, "n_positions": 64}
RIVAL_BATCHES = (8, 32)
EVER = 100_000  # steps, more than anybody waits for


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

    def count(self, first: int, end: int) -> int:
        """Return the real tokens of the steps from `first` to before `end`."""
        return sum(self.used[first:end])


def train_ours(args, folder: str) -> None:
    """Train with train.py's Trainer, on conversations or on a token store."""
    tokenizer = load_tokenizer(args.data_dir)
    is_chat = (args.data_dir / "train_tokenized.jsonl").is_file()
    train_set = open_train(args.data_dir, tokenizer, args.seq_len, seed=0, assistant_only=is_chat)
    flags = TrainFlags(
        model_dir=Path(folder), seq_len=args.seq_len, batch_size=args.batch_size, grad_accum=args.grad_accum,
        bf16=args.bf16, device=args.device, eval_steps=0, save_steps=10**9, log_steps=args.steps,
        lr_scheduler_type="linear", warmup_steps=0,  # the rivals' defaults: losses are compared too
    )  # fmt: skip
    tokens_per_step = args.batch_size * args.grad_accum * train_set.tokens_per_row
    model = build_model(args.cfg, tokenizer, seed=0)
    run = trainer.RunTrainer(
        model,
        trainer.build_training_arguments(
            flags, {"save_strategy": "no", "torch_compile": args.torch_compile}, EVER
        ),
        train_set=train_set,
        val_set=None,
        tokenizer=tokenizer,
        meta=trainer.RunMeta({}, tokens_per_step, 1),
        collate=collate,
    )
    run.add_callback(trainer.Throughput(run))
    about = {"parameters": model.num_parameters()}
    run.add_callback(Turns(lambda first, end: (end - first) * tokens_per_step, about))
    run.train()


def build_rival(args, **changes) -> transformers.GPT2LMHeadModel:
    """Return Hugging Face's own class with our shape, from our seed."""
    vocab_size = load_tokenizer(args.data_dir).vocab_size_padded
    config = GPT2Config(**read_config(args.cfg) | changes, vocab_size=vocab_size)
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config)


def describe_rival(args, folder: str, **fields) -> dict:
    """Return what all rivals have in common, as fields of `TrainingArguments`."""
    return {
        "output_dir": folder, "per_device_train_batch_size": args.batch_size,
        "gradient_accumulation_steps": args.grad_accum, "max_steps": EVER, "use_cpu": args.device == "cpu",
        "bf16": args.bf16, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": 0,
        "learning_rate": 6e-4, "logging_steps": args.steps, **fields,
    }  # fmt: skip


def train_stock_chat(args, folder: str) -> None:
    """Train with the plain Trainer on conversations, padded to the longest of the batch."""
    padding = Padding(load_tokenizer(args.data_dir).pad_id)
    run = transformers.Trainer(
        build_rival(args, activation_function="gelu_new"),
        TrainingArguments(**describe_rival(args, folder)),
        data_collator=padding,
        train_dataset=read_rows(args.data_dir),
        callbacks=[Turns(padding.count)],
    )
    run.train()


class Blocks(torch.utils.data.Dataset):
    """The blocks of our token store as the plain Trainer's users give them: all tokens, a mask of ones."""

    def __init__(self, blocks: torch.utils.data.Dataset):
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return `input_ids`, `labels` and `attention_mask`, each (T,) int64."""
        ids = self.blocks[index]["input_ids"]
        return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


def train_published(args, folder: str) -> None:
    """Train on text as the published pipeline does."""
    optim = "adamw_bnb_8bit" if find_spec("bitsandbytes") else "adamw_torch_fused"
    train_stock(args, folder, optim=optim, gradient_checkpointing=True)


def train_stock(args, folder: str, **fields) -> None:
    """Train on text with the plain Trainer; fused AdamW is its default."""
    tokenizer = load_tokenizer(args.data_dir)
    blocks = Blocks(open_train(args.data_dir, tokenizer, args.seq_len, seed=0, assistant_only=False))
    dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    tokens_per_step = args.batch_size * args.grad_accum * args.seq_len
    arguments = TrainingArguments(**describe_rival(args, folder, **fields))
    run = transformers.Trainer(
        build_rival(args, activation_function="gelu_new", **dropout),
        arguments,
        train_dataset=blocks,
        callbacks=[
            Turns(lambda first, end: (end - first) * tokens_per_step, {"optim": str(arguments.optim.value)})
        ],
    )
    run.train()


def read_rows(data_dir: Path) -> list[dict]:
    """Return the same conversations as ours, one a row."""
    chats = read_chats(data_dir / "train_tokenized.jsonl")
    rows = []
    for begin, end in zip(chats.starts[:-1], chats.starts[1:], strict=True):
        ids = chats.ids[begin:end].tolist()
        labels = [i if learned else IGNORED for i, learned in zip(ids, chats.masks[begin:end], strict=True)]
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)})
    return rows


SIDES = {
    "ours": train_ours,
    "stock_chat": train_stock_chat,
    "stock": train_stock,
    "published": train_published,
}


def draw_store(folder: Path, num_words: int, num_tokens: int) -> Path:
    """Write a token store of ids drawn as words are in texts, 1/rank; nanoGPT reads its bins as they are."""
    # From 0x20000 on, 4 bytes each in UTF-8: lower planes have surrogates, which are no characters.
    tokenizer = Tokenizer(CHARACTERS, [chr(0x20000 + i).encode() for i in range(num_words)])
    folder.mkdir()
    tokenizer.save(folder, chat_template=CHAT_TEMPLATE)
    chances = 1 / np.arange(1, num_words + 1)
    draw = np.random.default_rng(0)
    meta = {"format": FORMAT, "dtype": "<u2", "splits": {}, "tokenizer_hash": tokenizer.hash}
    for split, share in (("train", 1.0), ("val", 0.1)):
        writer = TokenStoreWriter(folder, split, len(tokenizer))
        ids = draw.choice(num_words, int(num_tokens * share), p=chances / chances.sum())
        writer.append(ids.tolist(), num_bytes=4 * len(ids), num_documents=1)
        meta["splits"][split] = writer.close()
    (folder / "corpus.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder


def start(name: str, **words) -> TrainerSide:
    """Start a side of this module."""
    return TrainerSide("benchmarks.bench_train", [name, *say_flags(words)])


def measure_chat(row: str, args, *, ours_bf16: bool, rival_bf16: bool) -> None:
    """Measure `small_test` on conversations, against the rival's faster batch."""
    words = {"data_dir": args.data_dir, "cfg": CONFIGS / "small_test.json", "device": "cpu", "steps": 10}
    ours = start("ours", **words, seq_len=256, batch_size=8, bf16=ours_bf16)
    rivals = [start("stock_chat", **words, batch_size=size, bf16=rival_bf16) for size in RIVAL_BATCHES]
    rival = max(rivals, key=lambda side: side.run())
    settings = {
        "ours": {"seq_len": 256, "batch_size": 8, "bf16": ours_bf16, "optim": "adamw_torch_fused"},
        "rival": {"batch_size": RIVAL_BATCHES[rivals.index(rival)], "bf16": rival_bf16},
    }
    compare(row, args, ours, rival, settings)
    for side in (ours, *rivals):
        side.close()


def compare(row: str, args, ours, rival, settings: dict) -> dict:
    """Measure two sides in turn, and write the row."""
    # A foreign script has to be stopped at its warm-up's end: what it does after that would be timed.
    rival.settle()
    ours.settle()
    settings = settings | {"device": args.device, "threads": torch.get_num_threads()}
    setup = describe_setup(settings, args.device)
    result = measure_pairs(ours.run, rival.run, args.pairs, kept=RESULTS / f"{row}.pairs", setup=setup)
    if "optim" in rival.figures[-1]:
        settings |= {"rival": settings["rival"] | {"optim": rival.figures[-1]["optim"]}}
    write_result(row, result | {"losses": read_losses(ours, rival)}, settings, args.device)
    print(f"{row}: {result['median']:.3f} ({result['low']:.3f} to {result['high']:.3f})", flush=True)
    return result


def read_losses(ours, rival) -> dict[str, dict[int, float]]:
    """Return the losses of both sides by the steps done till then.

    Ours goes on from rival to rival: only at equal steps are they to be compared.
    """
    sides = {"ours": ours, "rival": rival}
    return {name: {each["step"]: each["loss"] for each in side.figures} for name, side in sides.items()}


def measure_nanogpt(row: str, args, *, bias: bool = False) -> None:
    """Measure nanoGPT's CPU shape on the CPU, in float32 as its train.py computes there.

    Args:
        bias: what its flag of that name is set to. GPT-2 and so ours has biases, nanoGPT's default has none.
    """
    rows, steps, length = 12, 100, NANOGPT_CPU["n_positions"]
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = {**NANOGPT_CPU, **dropouts, "activation_function": "gelu_pytorch_tanh"}
    with tempfile.TemporaryDirectory() as folder:
        data = draw_store(Path(folder) / "data", 122, 1_000_000)
        (Path(folder) / "cfg.json").write_text(json.dumps(config))
        ours = start(
            "ours", data_dir=data, cfg=Path(folder) / "cfg.json", seq_len=length, batch_size=rows,
            steps=steps, device="cpu",
        )  # fmt: skip
        words = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": length, "batch_size": rows}
        words |= {"device": "cpu", "compile": False, "gradient_accumulation_steps": 1, "bias": bias}
        rival = start_nanogpt(args.nanogpt, data, Path(folder), words, steps=steps, warm_up=20)
        settings = {"ours": {**config, "batch_size": rows}, "rival": {**words, "dtype": "float32"}}
        compare(row, args, ours, rival, settings)
        for side in (ours, rival):
            side.close()


def start_nanogpt(checkout: Path, data: Path, folder: Path, words: dict, *, steps: int, warm_up: int):
    """Start nanoGPT's train.py on our bins, with our vocabulary and our rate; it evaluates two batches."""
    size = {"vocab_size": load_tokenizer(data).vocab_size_padded}
    (data / "meta.pkl").write_bytes(pickle.dumps(size))
    fixed = {"dataset": data, "out_dir": folder / "out", "eval_iters": 1, "eval_interval": 10**9}
    fixed |= {"max_iters": EVER, "lr_decay_iters": EVER, "learning_rate": 6e-4}
    flags = [f"--{name}={value}" for name, value in (fixed | words).items()]
    tokens = words["batch_size"] * words["gradient_accumulation_steps"] * words["block_size"]
    return NanoGPT(checkout, flags, tokens=tokens, steps=steps, warm_up=warm_up)


# Rows in a micro-batch, so that three sides fit on 80 GB beside one another; a step is 32 rows.
GPU_SHAPES = {"124m": 16, "355m": 8}
GPU_STEPS = 8


def measure_gpu(size: str, args) -> None:
    """Measure one model on the GPU against all rivals, and its share of the matrix rate."""
    cfg, rows = CONFIGS / f"baseline_{size}.json", GPU_SHAPES[size]
    common = {"cfg": cfg, "seq_len": 1024, "batch_size": rows, "grad_accum": 32 // rows, "steps": GPU_STEPS}
    settings = {"ours": {"torch_compile": True, **_plain(common)}, "rival": _plain(common)}
    rate = measure_matmul_rate(torch.device("cuda"), bf16=True)
    torch.cuda.empty_cache()  # its matrices are not to stand beside the sides
    with tempfile.TemporaryDirectory() as folder:
        data = draw_store(Path(folder) / "data", 50_298, 4_000_000)
        words = {**common, "data_dir": data, "device": "cuda", "bf16": True}
        ours = start("ours", **words, torch_compile=True)
        sides = {"nanogpt": start_gpu_nanogpt(args, data, folder, cfg, rows)} if args.nanogpt else {}
        for name in ("published", "stock", *sides):
            rival = sides.get(name) or start(name, **words)
            compare(f"train_gpu_{size}_vs_{name}", args, ours, rival, settings)
            rival.close()
        ours.close()
    write_share(size, ours, read_config(cfg), rate)


def start_gpu_nanogpt(args, data: Path, folder: str, cfg: Path, rows: int) -> NanoGPT:
    """Start nanoGPT's train.py as it comes, compiled and in bf16, at the shape of a configuration."""
    shape = read_config(cfg)
    words = {name: shape[name] for name in ("n_layer", "n_head", "n_embd")}
    words |= {"block_size": 1024, "batch_size": rows, "gradient_accumulation_steps": 32 // rows}
    return start_nanogpt(args.nanogpt, data, Path(folder), words, steps=GPU_STEPS, warm_up=6)


def _plain(words: dict) -> dict:
    return {name: str(value) for name, value in words.items()}


def write_share(size: str, ours: TrainerSide, shape: dict, rate: float) -> None:
    """Write what share of the matrix rate ours reached, in percent, and its tokens per second."""
    figures = ours.figures[1:]
    per_token = 6 * figures[0]["parameters"] + 6 * shape["n_layer"] * shape["n_embd"] * 1024
    speeds = sorted(figure["tokens"] / figure["seconds"] for figure in figures)
    shares = [100 * speed * per_token / rate for speed in speeds]
    result = {"median": shares[len(shares) // 2], "low": shares[0], "high": shares[-1]}
    about = {"tokens_per_second": speeds, "matmul_tflops": rate / 1e12, "operations_per_token": per_token}
    write_result(f"train_gpu_{size}_share", result, about, "cuda")
    speed = f"{speeds[len(speeds) // 2]:,.0f} tok/s"
    print(f"train_gpu_{size}_share: {result['median']:.1f} % of {rate / 1e12:.0f} TFLOP/s, {speed}")


ROWS = {
    "train_cpu_vs_stock_fp32": lambda row, args: measure_chat(
        row, args, ours_bf16=has_bf16("cpu"), rival_bf16=False
    ),
    "train_cpu_vs_stock_bf16": lambda row, args: measure_chat(row, args, ours_bf16=True, rival_bf16=True),
    "train_cpu_vs_nanogpt": measure_nanogpt,
    "train_cpu_vs_nanogpt_biases": partial(measure_nanogpt, bias=True),
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of both: the comparison, and a side."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, help="of the CPU; default: all that can be measured"
    )
    parser.add_argument("--sizes", nargs="+", choices=GPU_SHAPES, default=list(GPU_SHAPES), help="of the GPU")
    parser.add_argument("--data_dir", type=Path, default=Path("data/pydocs_chat"))
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT, to run beside")
    parser.add_argument("--pairs", type=int, default=5)
    add_side_flags(parser, SIDES)
    return parser


def add_side_flags(parser: argparse.ArgumentParser, sides) -> None:
    """Add what a side is told by the comparison that starts it."""
    parser.add_argument("--side", choices=sides, help=argparse.SUPPRESS)
    parser.add_argument("--cfg", type=Path, help=argparse.SUPPRESS)
    for name, default in {"seq_len": 1024, "batch_size": 8, "grad_accum": 1, "steps": 10}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=argparse.SUPPRESS)
    for name in ("bf16", "torch_compile"):
        parser.add_argument(f"--{name}", action="store_true", help=argparse.SUPPRESS)


def choose_rows(args) -> list[str]:
    """Return the rows of the CPU that were asked for, or all that this machine can measure."""
    if args.rows:
        return args.rows
    cannot = set() if has_bf16("cpu") else {"train_cpu_vs_stock_bf16"}
    if not args.nanogpt:
        cannot |= {row for row in ROWS if "nanogpt" in row}
    return [row for row in ROWS if row not in cannot]


def main(argv: list[str]) -> None:
    """Measure, or be a side."""
    args = build_parser().parse_args(argv)
    quiet_transformers()
    find_device(args.device)
    if args.side:
        with tempfile.TemporaryDirectory() as folder:
            SIDES[args.side](args, folder)
    elif args.device == "cuda":
        for size in args.sizes:
            measure_gpu(size, args)
    else:
        for row in choose_rows(args):
            ROWS[row](row, args)


if __name__ == "__main__":
    run_main(main)
