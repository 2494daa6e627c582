"""What the tests of training share: tiny data, a tiny model, and runs of the scripts in this process."""

import contextlib
import hashlib
import io
import json
import random
import signal

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from firstwords.args import TrainFlags, run_main
from firstwords.dataset import collate, open_train, open_val
from firstwords.model import build_model
from firstwords.schema import Message, conversation_row, format_row
from firstwords.signals import SIGNALS
from firstwords.template import CHAT_TEMPLATE, encode_chat
from firstwords.tokenizer import BYTE_LEVEL, Tokenizer
from firstwords.tokenstore import FORMAT, TokenStoreWriter
from firstwords.trainer import (
    RunMeta,
    RunTrainer,
    build_training_arguments,
    choose_optimizer,
    rows_per_step,
)

BYTES = Tokenizer(BYTE_LEVEL, [bytes([value]) for value in range(256)])
SHAPE = {
    **{"n_layer": 1, "n_head": 2, "n_embd": 32, "n_positions": 128},
    **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "activation_function": "gelu_pytorch_tanh",
}


def talk(*contents):
    """Return a conversation, user and assistant in turns."""
    return [Message(("user", "assistant")[place % 2], text) for place, text in enumerate(contents)]


def invent_talks(count, seed=0):
    """Return `count` conversations of one or two exchanges of one to five random words."""
    pick = random.Random(seed)

    def sentence():
        return " ".join(pick.choices(["tea", "bird", "of", "seven", "x"], k=pick.randint(1, 5)))

    return [talk(*(sentence() for _ in range(pick.choice([2, 2, 4])))) for _ in range(count)]


def write_config(path, **shape):
    """Write a model configuration and return its path."""
    path.write_text(json.dumps({**SHAPE, **shape}), encoding="utf-8")
    return path


def build_config(tokenizer=BYTES, **shape):
    """Return the configuration of a model for this tokenizer, its weights large enough to matter."""
    return GPT2Config(
        vocab_size=tokenizer.vocab_size_padded,
        bos_token_id=tokenizer.endoftext_id,
        eos_token_id=tokenizer.end_id,
        pad_token_id=tokenizer.pad_id,
        **{"initializer_range": 0.3, **SHAPE, **shape},
    )


def build_babbler(tokenizer=BYTES, **shape):
    """Return a model of random weights, in evaluation mode; it says something else to each prompt."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(build_config(tokenizer, **shape)).eval()


def write_chats(folder, train, val=None, *, encode=encode_chat, tokenizer=BYTES):
    """Write the data of stage B as prep_data.py does, and return the folder.

    Without `val` there is no val.jsonl, from which training would take prompts for samples.
    """
    folder.mkdir(parents=True)
    tokenizer.save(folder, chat_template=CHAT_TEMPLATE)
    for split, talks in {"train": train, "val": val or train[:3]}.items():
        rows = [encode(messages, tokenizer) for messages in talks]
        lines = [format_row({"input_ids": ids, "assistant_masks": mask}) for ids, mask in rows]
        (folder / f"{split}_tokenized.jsonl").write_text("".join(lines), encoding="utf-8")
        if val:
            lines = [format_row(conversation_row(messages)) for messages in talks]
            (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def write_store(folder, train, val, *, tokenizer=BYTES):
    """Write a token store of the texts as prep_text_corpus.py does, and return the folder."""
    folder.mkdir(parents=True)
    tokenizer.save(folder, chat_template=CHAT_TEMPLATE)
    meta = {"format": FORMAT, "dtype": "<u2", "splits": {}, "tokenizer_hash": tokenizer.hash}
    for split, texts in {"train": train, "val": val}.items():
        writer = TokenStoreWriter(folder, split, len(tokenizer))
        for text in texts:
            ids = [*tokenizer.encode(text), tokenizer.endoftext_id]
            writer.append(ids, num_bytes=len(text.encode()), num_documents=1)
        meta["splits"][split] = writer.close()
    (folder / "corpus.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder


def build_flags(data_dir, model_dir, cfg, **flags):
    """Return the words of a quick run of train.py: 12 steps of 2 rows of 64 tokens.

    A value of None leaves a flag out, True gives it without a value.
    """
    quick = {"seq_len": 64, "batch_size": 2, "max_steps": 12, "eval_steps": 0, "device": "cpu"}
    words = []
    for name, value in {**quick, "data_dir": data_dir, "model_dir": model_dir, "cfg": cfg, **flags}.items():
        if value is not None:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def build_trainer(data_dir, model_dir, *, model=None, trainer_class=RunTrainer, extra=None, **flags):
    """Return the trainer of a quick run of 4 steps as train.py builds it, without callbacks of ours."""
    quick = {"seq_len": 64, "batch_size": 2, "max_steps": 4, "log_steps": 1, "eval_steps": 0, "device": "cpu"}
    flags = TrainFlags(data_dir=data_dir, model_dir=model_dir, **{**quick, **flags})
    options = {"assistant_only": flags.assistant_only_loss, "overlong": flags.overlong}
    train_set = open_train(data_dir, BYTES, flags.seq_len, seed=flags.seed, **options)
    if model is None:
        model = build_model(write_config(data_dir / "c.json"), BYTES, seed=flags.seed)
    arguments = build_training_arguments(flags, extra or {}, flags.max_steps)
    return trainer_class(
        model,
        arguments,
        train_set=train_set,
        val_set=open_val(data_dir, BYTES, flags.seq_len, **options),
        tokenizer=BYTES,
        meta=RunMeta({}, rows_per_step(flags) * train_set.tokens_per_row, flags.save_total_limit),
        collate=collate,
        optimizer_cls_and_kwargs=choose_optimizer(flags, arguments),
    )


def run_script(script, words):
    """Run a script's `main` in this process.

    Returns:
        its exit code and what it wrote to stderr.
    """
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            run_main(script.main, [str(word) for word in words])
    except SystemExit as stop:
        code = stop.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return code, errors.getvalue()


def hash_results(run):
    """Return the hashes of what a run made, but for the logs, which know when they were written."""
    hashes = hash_files(run)
    return {name: h for name, h in hashes.items() if name != "train.log" and not name.startswith("runs/")}


def hash_weights(run, last_step):
    """Return the hashes of the finished model and of its last checkpoint."""
    kept = (f"checkpoint-{last_step}", "model")
    return {name: h for name, h in hash_files(run).items() if name.startswith(kept)}


def hash_files(folder):
    """Return the sha256 of every file below the folder by name, but for the lock with its process id."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
