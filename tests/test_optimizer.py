"""Muon and AdamW as one: who is stepped how, and a state that goes on bit for bit."""

import copy
import io

import pytest
import torch
from tiny import BYTES, write_config
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from firstwords.model import build_model
from firstwords.optimizer import MUONS, MuonAdamW, MuonAdamWFactory, NorMuonAdamW, even_neurons, orthogonalize

D = 32  # n_embd of the tiny model


@pytest.fixture
def model(tmp_path):
    return build_model(write_config(tmp_path / "c.json"), BYTES, seed=0)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def set_gradients(model, seed):
    for place, parameter in enumerate(model.parameters()):
        parameter.grad = draw(*parameter.shape, seed=1000 * seed + place)


def read_weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def take_step(optimizer, model, seed=0):
    """Return by how much each parameter moved, as a fraction of the rate."""
    before = read_weights(model)
    set_gradients(model, seed)
    optimizer.step()
    lr = optimizer.param_groups[0]["lr"]
    return {name: (before[name] - after) / lr for name, after in read_weights(model).items()}


# --- orthogonalize


@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 32, 96), (2, 128, 32), (1, 1, 40)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_singular_values_come_near_1(shape, scale):
    values = torch.linalg.svdvals(orthogonalize(scale * draw(*shape)))
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.25


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_singular_vectors_stay(shape):
    matrix = draw(*shape)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    turned = left.T @ orthogonalize(matrix[None])[0] @ right.T
    assert float(turned.diagonal().min()) > 0.6, "and so do their signs"
    assert float((turned - turned.diagonal().diag()).abs().max()) < 1e-4


def test_matrices_of_a_batch_do_not_mix():
    matrices = draw(4, 16, 24) * torch.tensor([1.0, 100.0, 1e-3, 7.0]).reshape(4, 1, 1)
    apart = torch.cat([orthogonalize(matrix[None]) for matrix in matrices])
    torch.testing.assert_close(orthogonalize(matrices), apart, rtol=1e-4, atol=1e-5)


def test_nothing_gives_nothing():
    assert torch.equal(orthogonalize(torch.zeros(1, 4, 6)), torch.zeros(1, 4, 6))


# --- one step


def check_parts(optimizer, model, name, parts):
    """The first step turns each part of the gradient by itself, scaled to a step of AdamW."""
    moved = take_step(optimizer, model)[name]
    gradients = dict(model.named_parameters())[name].grad.chunk(parts, 1)
    for part, gradient in zip(moved.chunk(parts, 1), gradients, strict=True):
        expected = 0.2 * max(part.shape) ** 0.5 * orthogonalize(gradient[None])[0]
        torch.testing.assert_close(part, expected, rtol=1e-3, atol=1e-3)


C_ATTN, C_FC = "transformer.h.0.attn.c_attn.weight", "transformer.h.0.mlp.c_fc.weight"


def test_query_key_and_value_are_orthogonalised_apart(model):
    check_parts(MuonAdamW(model, lr=1e-2, weight_decay=0.0), model, C_ATTN, 3)


def test_orthogonalised_as_one_they_would_fail(model):
    optimizer = MuonAdamW(model, lr=1e-2, weight_decay=0.0)
    optimizer.parts = [1] * len(optimizer.parts)
    with pytest.raises(AssertionError):
        check_parts(optimizer, model, C_ATTN, 3)


def test_another_matrix_of_three_times_the_width_is_one(tmp_path):
    model = build_model(write_config(tmp_path / "c.json", n_inner=3 * D), BYTES, seed=0)
    check_parts(MuonAdamW(model, lr=1e-2, weight_decay=0.0), model, C_FC, 1)


def test_two_steps_of_muon_by_hand(model):
    optimizer = MuonAdamW(model, lr=1e-2, weight_decay=0.5)
    weight, place = read_weights(model)[C_FC], list(read_weights(model)).index(C_FC)
    momentum = torch.zeros_like(weight)
    for seed in (1, 2):
        gradient = draw(*weight.shape, seed=1000 * seed + place)
        momentum = 0.95 * momentum + (1 - 0.95) * gradient
        nesterov = 0.95 * momentum + (1 - 0.95) * gradient
        weight = weight * (1 - 1e-2 * 0.5) - 1e-2 * 0.2 * 128**0.5 * orthogonalize(nesterov[None])[0]
        take_step(optimizer, model, seed)
    torch.testing.assert_close(read_weights(model)[C_FC], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "parts"), [(C_ATTN, 3), (C_FC, 1)])
def test_two_steps_of_normuon_by_hand(model, name, parts):
    optimizer = NorMuonAdamW(model, lr=1e-2, weight_decay=0.5, momentum=0.8)
    weight, place = read_weights(model)[name], list(read_weights(model)).index(name)
    columns = weight.shape[1] // parts
    momentum, squares = torch.zeros_like(weight), torch.zeros(parts, columns)
    for seed in (1, 2):
        gradient = draw(*weight.shape, seed=1000 * seed + place)
        momentum = 0.8 * momentum + (1 - 0.8) * gradient
        nesterov = 0.8 * momentum + (1 - 0.8) * gradient
        weight = weight * (1 - 1e-2 * 0.5)
        for i in range(parts):
            own = slice(i * columns, (i + 1) * columns)
            step = orthogonalize(nesterov[None, :, own])[0]
            squares[i] = 0.95 * squares[i] + 0.05 * (step**2).mean(0)
            step = step / squares[i].sqrt()
            weight[:, own] -= 1e-2 * 0.2 * step / (step**2).mean().sqrt()
        take_step(optimizer, model, seed)
    torch.testing.assert_close(read_weights(model)[name], weight, rtol=1e-4, atol=1e-6)


def test_neurons_take_steps_of_one_size():
    uneven = orthogonalize(draw(2, 32, 64)) * torch.linspace(0.5, 3, 64)
    even = even_neurons(uneven, uneven.square().mean(1, keepdim=True))
    sizes = even.norm(dim=1)
    torch.testing.assert_close(sizes, torch.full_like(sizes, (32 / 64) ** 0.5), rtol=1e-3, atol=0)
    assert torch.equal(even_neurons(torch.zeros(1, 4, 6), torch.zeros(1, 1, 6)), torch.zeros(1, 4, 6))


def test_embeddings_and_vectors_are_those_of_adamw(model):
    twin = copy.deepcopy(model)
    names = [name for name, p in twin.named_parameters() if p.ndim < 2 or ".h." not in name]
    parameters = dict(twin.named_parameters())
    assert {"transformer.wte.weight", "transformer.wpe.weight"} < set(names)
    adamw = AdamW(
        [{"params": [parameters[n]], "weight_decay": 0.1 if parameters[n].ndim > 1 else 0.0} for n in names],
        lr=1e-2,
        betas=(0.8, 0.99),
        eps=1e-6,
        fused=True,
    )
    optimizer = MuonAdamW(model, lr=1e-2, weight_decay=0.1, betas=(0.8, 0.99), eps=1e-6)
    for seed in (1, 2, 3):
        take_step(optimizer, model, seed)
        set_gradients(twin, seed)
        adamw.step()
    ours = dict(model.named_parameters())
    for name in names:
        assert torch.equal(ours[name], parameters[name]), name


def test_decay_shrinks_matrices_and_embeddings_and_spares_vectors(model):
    optimizer = MuonAdamW(model, lr=1e-2, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        expected = 1 - 1e-2 * 0.5 if parameter.ndim > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, expected), msg=name)


def test_a_parameter_without_a_gradient_stays(model):
    optimizer = MuonAdamW(model, lr=1e-2, weight_decay=0.5)
    before = read_weights(model)
    optimizer.step()
    assert all(torch.equal(before[name], after) for name, after in read_weights(model).items())


# --- the schedule and the state


def train(optimizer, scheduler, model, seeds):
    for seed in seeds:
        set_gradients(model, seed)
        optimizer.step()
        scheduler.step()


def build_pair(model, build=MuonAdamW):
    optimizer = build(model, lr=1e-2, weight_decay=0.1)
    return optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))


def test_both_follow_the_schedule(model):
    optimizer, scheduler = build_pair(model)
    train(optimizer, scheduler, model, range(3))
    rates = [group["lr"] for group in [*optimizer.param_groups, *optimizer.adamw.param_groups]]
    assert rates == [1e-2 / 4] * 5


def check_going_on(build, model):
    """Saved, loaded into a new optimizer of a copy, and gone on with: the same weights, bit for bit."""
    optimizer, scheduler = build_pair(model, build)
    train(optimizer, scheduler, model, range(3))
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), scheduler.state_dict(), model.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data.zero_()
    optimizer_2, scheduler_2 = build_pair(twin, build)
    for target, state in zip((optimizer_2, scheduler_2, twin), saved, strict=True):
        target.load_state_dict(state)
    train(optimizer, scheduler, model, range(3, 6))
    train(optimizer_2, scheduler_2, twin, range(3, 6))
    weights = read_weights(model)
    assert all(torch.equal(weights[name], weight) for name, weight in read_weights(twin).items())
    assert [g["lr"] for g in optimizer_2.adamw.param_groups] == [g["lr"] for g in optimizer.param_groups[1:]]


@pytest.mark.parametrize("kind", MUONS.values())
def test_the_state_goes_round_bit_for_bit(model, kind):
    check_going_on(kind, model)


class ForgetsMomentum(MuonAdamW):
    def load_state_dict(self, state_dict):
        super().load_state_dict({**state_dict, "muon": {**state_dict["muon"], "state": {}}})


class ForgetsSquares(NorMuonAdamW):
    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state.pop("squares", None)


class ForgetsAdamW(MuonAdamW):
    def load_state_dict(self, state_dict):
        super().load_state_dict({**state_dict, "adamw": {**state_dict["adamw"], "state": {}}})


class LosesTheSchedule(MuonAdamW):
    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.adamw.param_groups = [dict(group) for group in self.adamw.param_groups]


@pytest.mark.parametrize("broken", [ForgetsMomentum, ForgetsSquares, ForgetsAdamW, LosesTheSchedule])
def test_a_state_that_is_not_whole_is_seen(model, broken):
    with pytest.raises(AssertionError):
        check_going_on(broken, model)


def test_the_factory_builds_it_with_the_rate_given(model):
    optimizer = MuonAdamWFactory()(model, optim="normuon", momentum=0.5, lr=3e-3, weight_decay=0.2)
    assert (type(optimizer), optimizer.momentum) == (NorMuonAdamW, 0.5)
    groups = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert groups == [(3e-3, 0.2), (3e-3, 0.2), (3e-3, 0.0)]
