"""Weights in fewer bytes: near the fp32 ones, measured, and refused where the machine cannot."""

from functools import partial

import pytest
import torch
from tiny import BYTES, build_babbler
from torch.nn.functional import linear

from firstwords import quantize
from firstwords.errors import BadFlag
from firstwords.generate import Decoder, stream_ids
from firstwords.quantize import check_dtype, pack_fp16, pack_int8, replace_matrices, store_weights

fbgemm = pytest.mark.skipif(not quantize.has_fbgemm(), reason="torch has no FBGEMM on this CPU")


build_model = partial(build_babbler, n_embd=64, n_layer=2, initializer_range=0.2)


@fbgemm
@pytest.mark.parametrize(("pack", "error"), [(pack_fp16, 2e-3), (pack_int8, 3e-2)])
def test_products_are_near_those_in_fp32(pack, error):
    torch.manual_seed(1)
    weight, bias, x = torch.randn(48, 40), torch.randn(48), torch.randn(2, 5, 40)
    weight[3] = 0  # an output without any weight has no scale
    exact = linear(x, weight, bias)
    distance = (pack(weight, bias)(x) - exact).norm() / exact.norm()
    assert 0 < distance < error
    assert pack(weight, None)(x).shape == (2, 5, 48)


@fbgemm
@pytest.mark.parametrize("dtype", ["fp16", "int8", "bf16"])
def test_every_matrix_is_replaced_and_the_model_still_decodes(dtype):
    model = build_model()
    exact = Decoder(model).join([[5, 6, 7]])
    replace_matrices(model, dtype)
    packed = {"fp16": quantize.PackedLinear, "int8": quantize.PackedLinear, "bf16": torch.nn.Linear}[dtype]
    parts = [part for block in model.transformer.h for part in (block.attn, block.mlp)]
    matrices = [part.c_proj for part in parts] + [parts[0].c_attn, parts[1].c_fc, model.lm_head]
    assert {type(matrix) for matrix in matrices} == {packed}
    near = Decoder(model).join([[5, 6, 7]])
    assert near.dtype == torch.float32
    assert 0 < (near - exact).norm() / exact.norm() < {"fp16": 2e-3, "int8": 0.2, "bf16": 0.1}[dtype]
    assert len(list(stream_ids(model, [5, 6, 7], stop_ids=(), limit=9))) == 9


@fbgemm
def test_the_cost_is_the_divergence_on_the_models_own_replies():
    fp16, int8 = (store_weights(build_model(), dtype, BYTES) for dtype in ("fp16", "int8"))
    assert fp16.tokens == int8.tokens > 60
    assert 0 <= fp16.nats < 1e-4 < int8.nats
    assert int8.agreement <= fp16.agreement <= 1


@fbgemm
def test_a_spoilt_matrix_shows_in_the_cost(monkeypatch):
    pack = quantize.pack_fp16
    monkeypatch.setattr(quantize, "pack_fp16", lambda weight, bias: pack(weight.roll(1, 0), bias))
    assert store_weights(build_model(), "fp16", BYTES).nats > 0.1


@fbgemm
def test_a_model_of_characters_can_be_asked(char_tokenizer):
    model = build_model(char_tokenizer)
    assert store_weights(model, "int8", char_tokenizer).tokens > 8


def test_what_the_machine_cannot_is_refused(monkeypatch):
    check_dtype("fp32", "cuda")
    monkeypatch.setattr(quantize, "has_bf16", lambda device: False)
    with pytest.raises(BadFlag, match="--dtype bf16: this cpu does not compute in bfloat16"):
        check_dtype("bf16", "cpu")
    with pytest.raises(BadFlag, match="--dtype int8: needs an x86 CPU"):
        check_dtype("int8", "cuda")
    monkeypatch.setattr(quantize, "has_fbgemm", lambda: False)
    with pytest.raises(BadFlag, match="--dtype fp16: needs an x86 CPU"):
        check_dtype("fp16", "cpu")
