"""Muon on the hidden matrices, AdamW on the rest, as one optimizer that Trainer saves and resumes.

    optimizer = MuonAdamW(model, lr=1e-2, weight_decay=0.1)

Muon (Jordan et al. 2024) takes the momentum of a matrix and makes all its singular values about 1 before
it steps, so that no direction is learned much faster than another. NorMuon (Li et al. 2025) then divides
the step of each neuron by its usual size, so that no neuron is either. Embeddings, norms and biases stay
with AdamW. All follow the same rate: a Muon step is scaled to the size of an AdamW step (Liu et al. 2025,
section 2.2). Invariant: the state is saved and loaded in full, so a resumed run goes on bit for bit.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from transformers import GPT2LMHeadModel

NEURON_MOMENTUM = 0.95
NEWTON_SCHULZ_STEPS = 5


class MuonAdamW(Optimizer):
    """One optimizer of two: groups marked `muon` are stepped here, the others by AdamW.

    Args:
        model: its parameters are sorted by name and shape.
        lr: the rate of both.
        weight_decay: decoupled, on matrices and embeddings.
        momentum: of Muon, the weight of the steps before.
        betas, eps: of AdamW.
    """

    def __init__(
        self,
        model: GPT2LMHeadModel,
        *,
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ):
        hidden, embeddings, vectors, self.parts = [], [], [], []
        for name, parameter in model.named_parameters():
            kind = vectors if parameter.ndim < 2 else hidden if ".h." in name else embeddings
            kind.append(parameter)
            if kind is hidden:
                # c_attn holds Q, K and V side by side: three matrices to Muon.
                self.parts.append(3 if name.endswith("attn.c_attn.weight") else 1)
        self.adamw = AdamW(
            [
                {"params": embeddings, "weight_decay": weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=lr,
            betas=betas,
            eps=eps,
            fused=True,
        )
        self.momentum = momentum
        muon = {"params": hidden, "lr": lr, "weight_decay": weight_decay}
        super().__init__([muon, *self.adamw.param_groups], {})
        self._share_groups()

    def _share_groups(self) -> None:
        # The scheduler writes into these very dictionaries, so both optimizers follow it.
        self.adamw.param_groups = self.param_groups[1:]

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step; parameters without a gradient stay."""
        self.adamw.step()
        group = self.param_groups[0]
        by_shape: dict[torch.Size, list[tuple[Tensor, ...]]] = {}
        for parameter, parts in zip(group["params"], self.parts, strict=True):
            if parameter.grad is not None:
                tensors = (parameter, *self._advance_state(parameter))
                for matrix in zip(*(tensor.chunk(parts, 1) for tensor in tensors), strict=True):
                    by_shape.setdefault(matrix[0].shape, []).append(matrix)
        for shape, matrices in by_shape.items():
            targets, *states = zip(*matrices, strict=True)
            scale = 0.2 * max(shape) ** 0.5 * group["lr"]
            for target, step in zip(targets, self._find_steps(*states), strict=True):
                target.mul_(1 - group["lr"] * group["weight_decay"]).add_(step, alpha=-scale)

    def _advance_state(self, parameter: Tensor) -> tuple[Tensor, ...]:
        """Return what the step follows from: the Nesterov momentum of the gradient, (in, out)."""
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - self.momentum)
        return (parameter.grad.lerp(state["momentum"], self.momentum),)

    def _find_steps(self, momenta: Sequence[Tensor]) -> Tensor:
        """Return the steps of N matrices of a shape, (N, in, out)."""
        return orthogonalize(torch.stack(momenta))

    def state_dict(self) -> dict:
        """Return the state of both."""
        return {"muon": super().state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Load what `state_dict` returned."""
        super().load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self.param_groups[1:] = self.adamw.param_groups
        self._share_groups()


class NorMuonAdamW(MuonAdamW):
    """Muon whose neurons take steps of one size (NorMuon, arXiv 2510.05491, algorithm 1), and AdamW."""

    def _advance_state(self, parameter: Tensor) -> tuple[Tensor, ...]:
        """Return the momentum, and the average square of each neuron's steps, (1, out)."""
        state = self.state[parameter]
        if "squares" not in state:
            state["squares"] = torch.zeros_like(parameter[:1])
        return (*super()._advance_state(parameter), state["squares"])

    def _find_steps(self, momenta: Sequence[Tensor], squares: Sequence[Tensor]) -> Tensor:
        """Return the steps of N matrices of a shape, (N, in, out), and bring their squares up to date."""
        steps = super()._find_steps(momenta)
        average = torch.stack(squares).lerp_(steps.square().mean(1, keepdim=True), 1 - NEURON_MOMENTUM)
        for kept, now in zip(squares, average, strict=True):
            kept.copy_(now)
        return even_neurons(steps, average)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Bring the singular values of each matrix near 1, keeping its singular vectors.

    Five Newton-Schulz steps with the quintic's coefficients of Jordan et al. 2024; in bfloat16 on a GPU.

    Args:
        matrices: (N, R, C), any scale.

    Returns:
        (N, R, C); singular values between about 0.7 and 1.2.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x if wide else x.mT).to(matrices.dtype)


def even_neurons(steps: Tensor, squares: Tensor) -> Tensor:
    """Divide the step of each neuron by its usual size; the whole keeps that of an orthogonal matrix.

    The averages need no correction for having begun at zero: that is one factor for all neurons of a matrix.

    Args:
        steps: (N, in, out); a neuron is a column.
        squares: (N, 1, out), the average square of each neuron's steps.

    Returns:
        (N, in, out), each matrix of root mean square 1 / sqrt(max(in, out)).
    """
    steps = steps / (squares.sqrt() + 1e-8)
    size = steps.square().mean((1, 2), keepdim=True).sqrt() * max(steps.shape[1:]) ** 0.5
    return steps / (size + 1e-8)


# By the names that `--optim` has for them.
MUONS = {"muon": MuonAdamW, "normuon": NorMuonAdamW}


class MuonAdamWFactory:
    """What Trainer builds without arguments and then calls with the model."""

    def __call__(self, model: GPT2LMHeadModel, *, optim: str, **kwargs) -> MuonAdamW:
        """Return the optimizer of `model` that `optim` names."""
        return MUONS[optim](model, **kwargs)
