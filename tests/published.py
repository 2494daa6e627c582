"""A small GPT-2 in the very layouts of the Hub: folders of then and now, and the cache."""

import json
import re

import torch
import transformers
from safetensors.torch import save_file

SHA = "607a30d783dfa663caf39e06633721c8d4cfcd7e"  # any 40 digits
# What stands in the configuration of `gpt2`, but for its shape.
CONFIG = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}
# Of each by its name, smaller.
SHAPES = {
    "gpt2": {"n_layer": 2, "n_head": 2, "n_embd": 32},
    "gpt2-medium": {"n_layer": 4, "n_head": 4, "n_embd": 48},
    "distilgpt2": {"n_layer": 1, "n_head": 2, "n_embd": 32},
}
# What the configurations of the others say besides.
MORE = {
    "gpt2": {},
    "gpt2-medium": {"n_special": 0, "predict_special_tokens": True},
    "distilgpt2": {"_num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}},
}


def build_published(tokenizer, name="gpt2"):
    """Return a GPT-2 as they were published: rows for the words and `<|endoftext|>`, all logits low."""
    torch.manual_seed(0)
    end = tokenizer.endoftext_id
    words = {"bos_token_id": end, "eos_token_id": end, "vocab_size": end + 1}
    config = transformers.GPT2Config(**CONFIG | SHAPES[name] | words, name_or_path=name)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        # The published rows share a direction that the hidden states point away from: every logit of
        # every token lies far below zero.
        model.transformer.wte.weight += 0.5
        model.transformer.ln_f.bias -= 2.0
    return model


def write_config(folder, model):
    """Make the folder and write `config.json`, of keys that we know and keys that we do not."""
    folder.mkdir(parents=True)
    words = {key: getattr(model.config, key) for key in ("bos_token_id", "eos_token_id", "vocab_size")}
    name = model.config.name_or_path
    config = CONFIG | SHAPES[name] | MORE[name] | words
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def list_weights(model, leave_out, prefix):
    """Return the tensors of the model but for one name of the shared ones, and the masks, under a prefix."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != leave_out}
    mask = torch.tril(torch.ones(1024, 1024)).reshape(1, 1, 1024, 1024)
    weights |= {f"transformer.h.{n}.attn.bias": mask.clone() for n in range(model.config.n_layer)}
    return {re.sub(r"^transformer\.", prefix, name): tensor for name, tensor in weights.items()}


def write_vocabulary(folder, tokenizer):
    """Write `vocab.json` and `merges.txt` as OpenAI did."""
    tokens, merges = tokenizer.spell()
    vocab = {token: i for i, token in enumerate([*tokens, "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_tokenizer_json(folder, tokenizer):
    """Write `tokenizer.json` and `tokenizer_config.json` as `gpt2` has them: no chat template, old fields."""
    tokens, merges = tokenizer.spell()
    end = {"id": len(tokens), "content": "<|endoftext|>", "special": True, "single_word": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    spec = {
        **{"version": "1.0", "truncation": None, "padding": None, "normalizer": None},
        "added_tokens": [end | {"lstrip": False, "rstrip": False, "normalized": True}],
        **{"pre_tokenizer": level, "post_processor": level | {"trim_offsets": False}, "decoder": level},
        "model": {
            **{"dropout": None, "unk_token": None, "continuing_subword_prefix": "", "fuse_unk": False},
            "vocab": {token: i for i, token in enumerate([*tokens, "<|endoftext|>"])},
            "merges": [" ".join(pair) for pair in merges],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 1024}')


def write_gpt2(folder, model, tokenizer):
    """As `gpt2`: names without prefix, masks among them, every file of a tokenizer."""
    write_config(folder, model)
    save_file(list_weights(model, "lm_head.weight", ""), folder / "model.safetensors", {"format": "pt"})
    write_vocabulary(folder, tokenizer)
    write_tokenizer_json(folder, tokenizer)


def write_converted(folder, model, tokenizer):
    """Converted so that the shared weights have the name of the head; a tokenizer of two files."""
    write_config(folder, model)
    weights = list_weights(model, "transformer.wte.weight", "transformer.")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    write_vocabulary(folder, tokenizer)


def write_old(folder, model, tokenizer):
    """As before safetensors: a pickle, `vocab.json` and `merges.txt`."""
    write_config(folder, model)
    torch.save(list_weights(model, "lm_head.weight", ""), folder / "pytorch_model.bin")
    write_vocabulary(folder, tokenizer)


def write_cache(cache, repo_id, write, *args):
    """Put a model into the Hub's cache: blobs, a snapshot of links to them, and the name of its revision."""
    repo = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot = repo / "snapshots" / SHA
    write(snapshot, *args)
    (repo / "blobs").mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        blob = path.rename(repo / "blobs" / f"{number:064x}")
        path.symlink_to(f"../../blobs/{blob.name}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(SHA)
    return snapshot
