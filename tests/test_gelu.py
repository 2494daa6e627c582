import pytest
import torch
from torch.nn import functional

from firstwords.model import gelu
from firstwords.model.gelu import Gelu


def draw(*shape):
    generator = torch.Generator().manual_seed(0)
    return 4 * torch.randn(shape, generator=generator)


def differentiate(activate, x):
    x = x.clone().requires_grad_()
    y = activate(x)
    (slope,) = torch.autograd.grad(y, x, 1 + torch.arange(y.numel()).view(y.shape).to(y) / y.numel())
    return y.detach(), slope


def torch_gelu(x):
    return functional.gelu(x, approximate="tanh")


@pytest.mark.parametrize("numbers_at_once", [7, 1 << 17])
def test_values_and_slopes_are_those_of_torch_in_double(numbers_at_once, monkeypatch):
    monkeypatch.setattr(gelu, "_AT_ONCE", numbers_at_once)
    x = torch.cat([draw(3, 5, 11).flatten(), torch.tensor([0.0, -30.0, 30.0, 1e-6, -1e4, 1e4])])
    for mine, exact in zip(differentiate(Gelu(), x), differentiate(torch_gelu, x.double()), strict=True):
        torch.testing.assert_close(mine, exact.float(), rtol=2e-6, atol=2e-6)


def test_rows_that_do_not_lie_end_to_end():
    x = draw(6, 4, 5).transpose(0, 2)
    mine, theirs = differentiate(Gelu(), x), differentiate(torch_gelu, x)
    torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=2e-6)


def test_the_slope_alone_is_kept():
    x = draw(8, 16).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda kept: kept):
        Gelu()(x)
    assert [tensor.numel() for tensor in kept] == [x.numel()]


def test_out_of_training_and_in_16_bits_it_is_torchs_own():
    x = draw(8, 16)
    assert torch.equal(Gelu()(x), torch_gelu(x))
    with_gradient = x.clone().requires_grad_()
    assert torch.equal(Gelu().eval()(with_gradient), torch_gelu(x))
    assert not torch.equal(Gelu()(with_gradient), torch_gelu(x)), "or nothing was shown"
    half = x.bfloat16().requires_grad_()
    assert torch.equal(Gelu()(half), torch_gelu(half))
    assert type(Gelu()(half).grad_fn) is type(torch_gelu(half).grad_fn)


def test_nothing_is_hidden_of_what_is_no_number():
    y, slope = differentiate(Gelu(), torch.tensor([float("nan"), 1.0]))
    assert y.isnan().tolist() == slope.isnan().tolist() == [True, False]


def test_the_range_that_is_promised_is_whole():
    x = torch.tensor([-1.6e13, 1.6e13])
    mine, theirs = differentiate(Gelu(), x), differentiate(torch_gelu, x)
    torch.testing.assert_close(mine, theirs)
