"""What the tests of export.py share: a run whose model knows twenty answers by heart, and ends them."""

import random

import torch
from tiny import talk, write_config

from firstwords.checkpoint import COMPLETE, write_manifest
from firstwords.model import build_model
from firstwords.template import CHAT_TEMPLATE, encode_chat

TEXT = "the cat sat on a mat and they walk to log dog what does it return list of True 1969 m²"
WORDS = TEXT.split()
QUESTIONS = [f"What is {word}?" for word in WORDS]


def invent_answer(question):
    """Return an answer of two to six words, the same for the same question."""
    pick = random.Random(question)
    return " ".join(pick.choices(WORDS, k=pick.randint(2, 6))) + "."


def memorise(model, tokenizer, steps=120):
    """Train until every question has its answer; returns the model in eval mode."""
    rows = [encode_chat(talk(question, invent_answer(question)), tokenizer) for question in QUESTIONS]
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [tokenizer.pad_id] * (width - len(ids)) for ids, _ in rows])
    learned = torch.tensor([mask + [0] * (width - len(mask)) for _, mask in rows])
    labels = ids.masked_fill(learned == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(steps):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def write_run(run, tokenizer, **meta):
    """Write a finished run of a model that has memorised, and return the run and the model."""
    run.mkdir(parents=True)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": 128}
    model = build_model(write_config(run.parent / "c.json", **shape), tokenizer, seed=0)
    memorise(model, tokenizer)
    model.config.use_cache = False  # as Trainer leaves it
    model.save_pretrained(run)
    tokenizer.save(run, chat_template=CHAT_TEMPLATE)
    write_manifest(run, {"step": 120, "longest_row": 64, "tokens_seen": 5000, **meta})
    (run / COMPLETE).write_text("step 120\n")
    return model
