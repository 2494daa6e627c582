"""memory: the bytes of a training step, by formulae that the meter checks."""

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config

from firstwords.memory import count_state_bytes, count_weights, predict_memory
from firstwords.model import GPT2LMHeadModel, read_config

MODELS = Path(__file__).parent.parent / "configs" / "models"
SHAPES = ("small_test", "baseline_124m", "baseline_355m")


def shape(name: str, **changes) -> GPT2Config:
    """Return a model configuration of ours, with the vocabulary of GPT-2 and our control tokens."""
    return GPT2Config(**read_config(MODELS / f"{name}.json") | {"vocab_size": 50304} | changes)


@pytest.mark.parametrize("name", SHAPES)
def test_weights_are_counted_from_the_shape(name):
    config = shape(name)
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    assert count_weights(config).total == sum(p.numel() for p in model.parameters())
    assert count_weights(config).hidden == sum(
        p.numel() for p in model.transformer.h.parameters() if p.ndim > 1
    )


def test_muon_keeps_one_momentum_of_the_matrices_where_adamw_keeps_two():
    config = shape("baseline_355m")
    saved = count_state_bytes(config, "adamw_torch_fused") - count_state_bytes(config, "muon")
    assert saved == 4 * count_weights(config).hidden


def test_with_accumulation_the_gradients_stand_beside_the_activations():
    run = {"batch_size": 16, "seq_len": 1024, "bf16": True}
    one, many = (predict_memory(shape("baseline_355m"), grad_accum=n, **run) for n in (1, 2))
    assert many.total - one.total == many.gradients == many.weights
