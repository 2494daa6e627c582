"""memory: the bytes of a training step, by formulae that the meter checks."""

from pathlib import Path

import pytest
import torch
import transformers
from tiny import BYTES, build_trainer, invent_talks, write_chats, write_config
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config

from firstwords.memory import (
    count_activation_bytes,
    count_state_bytes,
    count_weights,
    measure_step,
    predict_memory,
)
from firstwords.model import GPT2LMHeadModel, build_model, cross_entropy, gelu, read_config
from firstwords.recompute import LEVELS

MODELS = Path(__file__).parent.parent / "configs" / "models"
SHAPES = ("small_test", "baseline_124m", "baseline_355m")
MIB = 1 << 20
STOCK = {"activation_function": "gelu_new", "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}


def shape(name: str, **changes) -> GPT2Config:
    """Return a model configuration of ours, with the vocabulary of GPT-2 and our control tokens."""
    values = read_config(MODELS / f"{name}.json") | {"vocab_size": 50304} | changes
    return GPT2Config(**values, bos_token_id=0, eos_token_id=0)


@pytest.mark.parametrize("name", SHAPES)
def test_weights_are_counted_from_the_shape(name):
    config = shape(name)
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    count = sum(p.numel() for p in model.transformer.h.parameters() if p.ndim > 1)
    assert count_weights(config).hidden == count
    assert count_weights(config).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("recompute", LEVELS)
def test_the_formula_of_what_is_kept_is_the_meters(name, activation, bf16, recompute):
    config = shape(name, activation_function=activation, n_layer=2, vocab_size=128)
    run = {"bf16": bf16, "recompute": recompute}
    counted = measure_step(config, batch_size=2, seq_len=512, **run).activations
    assert 2 * 512 * count_activation_bytes(config, **run) == pytest.approx(counted, rel=0.01)


def test_without_recomputation_autograd_keeps_what_the_meter_counts():
    """The meter counts what lives; here only what autograd itself says that it saves is."""
    config = shape("small_test", n_layer=2)
    saved = {}

    def remember(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model = GPT2LMHeadModel(config).train()
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    ids = torch.zeros(2, 512, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        hidden = model.compute_hidden(ids)
    assert hidden.requires_grad
    total = sum(size for place, size in saved.items() if place not in weights)
    assert total == pytest.approx(1024 * count_activation_bytes(config, bf16=False), rel=0.01)


@pytest.mark.parametrize(
    ("name", "batch_size", "seq_len"),
    [("small_test", 64, 64), ("baseline_124m", 4, 1024), ("baseline_124m", 1, 128)],
)
@pytest.mark.parametrize("recompute", LEVELS)
@pytest.mark.parametrize("bf16", [True, False])
def test_the_predicted_peak_is_the_meters(name, batch_size, seq_len, bf16, recompute):
    run = {"batch_size": batch_size, "seq_len": seq_len, "bf16": bf16, "recompute": recompute}
    memory = predict_memory(shape(name), device="cpu", **run)
    beside = memory.total - memory.weights - memory.optimizer
    assert beside == pytest.approx(measure_step(shape(name), **run).peak, rel=0.01)


def test_the_gradients_of_the_embedding_are_added_in_place(monkeypatch):
    """Of real tensors: the meter and the formulae count two, and no third for their sum."""
    model, seen = GPT2LMHeadModel(shape("small_test", n_layer=1, vocab_size=128)), []
    backward = cross_entropy._SumCrossEntropy.backward

    def spy(*args):
        gradients = backward(*args)
        seen.append(gradients[1].data_ptr())
        return gradients

    monkeypatch.setattr(cross_entropy._SumCrossEntropy, "backward", spy)
    ids = torch.arange(64)[None]
    model(ids, labels=ids).loss.backward()
    assert seen == [model.transformer.wte.weight.grad.data_ptr()]


@pytest.mark.parametrize("recompute", LEVELS)
def test_the_meter_takes_the_gelu_of_a_gpu_in_float32_too(recompute, monkeypatch):
    """That of a CPU works on a piece at a time: for 124M the meter took seconds."""
    monkeypatch.setattr(gelu._Gelu, "apply", None)
    run = {"batch_size": 1, "seq_len": 64, "bf16": False, "recompute": recompute}
    measure_step(shape("small_test", n_layer=1, vocab_size=128), **run)


def test_a_row_of_355m_takes_at_most_600_mib_of_activations():
    run = {"batch_size": 1, "seq_len": 1024, "bf16": True}
    step = measure_step(shape("baseline_355m"), recompute="selective", **run)
    assert step.activations <= 600 * MIB
    assert step.casts == 0


def test_the_stock_setup_takes_2655_mib():
    run = {"seq_len": 1024, "bf16": True, "model_class": transformers.GPT2LMHeadModel}
    one, two = (measure_step(shape("baseline_355m", **STOCK), batch_size=size, **run).peak for size in (1, 2))
    assert (two - one) / MIB == pytest.approx(2655, rel=0.01)


def test_16_rows_of_355m_fit_a_card_of_16_gb():
    run = {"seq_len": 1024, "bf16": True, "optim": "muon"}
    ours = predict_memory(shape("baseline_355m"), batch_size=16, recompute="selective", **run)
    assert ours.total < 15 << 30
    stock = shape("baseline_355m", **STOCK)
    rows = [
        predict_memory(stock, batch_size=size, whole_logits=True, **run | {"optim": ""}) for size in (3, 4)
    ]
    assert rows[0].total < 15 << 30 < rows[1].total


def test_muon_keeps_one_momentum_of_the_matrices_where_adamw_keeps_two():
    config = shape("baseline_355m")
    saved = count_state_bytes(config, "adamw_torch_fused") - count_state_bytes(config, "muon")
    assert saved == 4 * count_weights(config).hidden


@pytest.mark.parametrize(
    "optim",
    ["adamw_torch_fused", "muon", "normuon", "adamw_bnb_8bit", "sgd", "adafactor", "adagrad"]
    + ["lion_8bit", "paged_lion_32bit", "rmsprop_bnb_8bit", "ademamix"],
)
def test_the_state_is_counted_as_trainer_keeps_it(tmp_path, optim):
    if optim.endswith("bit"):
        pytest.importorskip("bitsandbytes")
    data = write_chats(tmp_path / "chats", invent_talks(9))
    model = build_model(write_config(tmp_path / "c.json", n_embd=128, n_layer=1), BYTES, seed=0)
    run = build_trainer(data, tmp_path / "run", model=model, optim=optim, max_steps=1)
    run.train()
    kept = tree_leaves(run.optimizer.state_dict())
    kept_bytes = sum(part.nbytes for part in kept if isinstance(part, torch.Tensor))
    weights = count_weights(model.config).total
    assert count_state_bytes(model.config, optim) / weights == pytest.approx(kept_bytes / weights, abs=0.1)


def test_with_accumulation_the_gradients_stand_beside_the_activations():
    run = {"batch_size": 16, "seq_len": 1024, "bf16": True}
    one, many = (predict_memory(shape("baseline_355m"), grad_accum=n, **run) for n in (1, 2))
    assert many.total - one.total == many.gradients == many.weights


def test_ddp_holds_all_gradients_once_more():
    run = {"batch_size": 16, "seq_len": 1024, "bf16": True, "grad_accum": 2}
    alone, among = (predict_memory(shape("baseline_355m"), world_size=n, **run) for n in (1, 2))
    assert among.total - alone.total == among.weights
    assert among.gradients == 2 * among.weights


def test_fsdp_cuts_what_the_optimizer_keeps():
    run = {"batch_size": 1, "seq_len": 1024, "bf16": True, "grad_accum": 2}
    whole, cut = (predict_memory(shape("baseline_355m"), world_size=8, is_sharded=s, **run) for s in (0, 1))
    assert cut.optimizer == whole.optimizer // 8
    assert cut.total < whole.total
