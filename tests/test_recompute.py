"""recompute: less is kept, and not one number changes."""

import shutil

import pytest
import torch
from tiny import SHAPE, build_flags, invent_talks, run_script, write_chats, write_config
from torch.utils.checkpoint import CheckpointPolicy
from transformers import GPT2Config

import train
from firstwords.model import GPT2LMHeadModel
from firstwords.recompute import choose_kept, set_recompute

DROPOUTS = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}


def find_gradients(level: str, bf16: bool, backend=None, is_packed=True, **shape) -> list[torch.Tensor]:
    """Return the loss and all gradients of one micro-batch of two rows, packed ones or whole ones."""
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(**SHAPE | {"n_layer": 2, "vocab_size": 128} | shape)).train()
    set_recompute(model, level)
    ids = torch.randint(128, (2, 24))
    positions = torch.tensor([[*range(24)], [*range(9), *range(15)]])
    torch.manual_seed(2)
    run = torch.compile(model, backend=backend) if backend else model
    packed = {"position_ids": positions} if is_packed else {}
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = run(input_ids=ids, labels=ids, **packed).loss
    loss.backward()
    return [loss, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("level", ["selective", "full"])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    "shape", [{}, DROPOUTS, {"activation_function": "gelu_new"}], ids=["", "dropout", "new"]
)
def test_loss_and_gradients_are_the_same_bits(level, bf16, shape):
    pairs = zip(find_gradients("none", bf16, **shape), find_gradients(level, bf16, **shape), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("level", ["selective", "full"])
@pytest.mark.parametrize("is_packed", [False, True], ids=["whole", "packed"])
def test_compiled_it_computes_the_same(level, backend, is_packed):
    if backend == "inductor" and not any(map(shutil.which, ("g++", "clang++"))):
        pytest.skip("there is no C++ compiler")
    torch.compiler.reset()
    expected = find_gradients("none", False, is_packed=is_packed)
    found = find_gradients(level, False, backend, is_packed)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_attention_is_kept_unless_it_drops_out_at_random(dropout):
    attention = torch.ops.aten._scaled_dot_product_flash_attention.default
    heads = [torch.empty(0)] * 3
    for decision in (
        choose_kept(None, attention, *heads, dropout, True),
        choose_kept(None, attention, *heads, dropout_p=dropout),
    ):
        assert (decision is CheckpointPolicy.MUST_SAVE) == (dropout == 0)


def test_of_the_products_the_last_of_a_block_is_not_kept():
    product = torch.ops.aten.addmm.default
    kept = {
        shape: choose_kept(None, product, torch.empty(0), torch.empty(0), torch.empty(shape))
        for shape in [(4, 12), (4, 4), (4, 16), (16, 4)]
    }
    assert [shape for shape, decision in kept.items() if decision is not CheckpointPolicy.MUST_SAVE] == [
        (16, 4)
    ]


def test_a_run_goes_on_at_another_level_to_the_same_bytes(tmp_path):
    chats, cfg = write_chats(tmp_path / "d", invent_talks(20)), write_config(tmp_path / "c.json", **DROPOUTS)
    steps = {"max_steps": 4, "save_steps": 2}
    assert run_script(train, build_flags(chats, tmp_path / "whole", cfg, **steps)) == (0, "")
    for level in ("selective", "full"):
        run = tmp_path / level
        shutil.copytree(tmp_path / "whole" / "checkpoint-2", run / "checkpoint-2")
        assert run_script(train, build_flags(chats, run, cfg, recompute=level, **steps)) == (0, "")
        weights = [folder / "model.safetensors" for folder in (tmp_path / "whole", run)]
        assert weights[0].read_bytes() == weights[1].read_bytes()
