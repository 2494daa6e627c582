"""Muon on the hidden matrices, AdamW on the rest, as one optimizer that Trainer saves and resumes.

    optimizer = MuonAdamW(model, lr=1e-2, weight_decay=0.1)

Muon (Jordan et al. 2024) takes the momentum of a matrix and makes all its singular values about 1 before
it steps, so that no direction is learned much faster than another. Embeddings, norms and biases stay with
AdamW. Both follow the same rate: a Muon step is scaled to the size of an AdamW step (Liu et al. 2025,
section 2.2). Invariant: the state is saved and loaded in full, so a resumed run goes on bit for bit.
"""

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from transformers import GPT2LMHeadModel

MOMENTUM = 0.95
NEWTON_SCHULZ_STEPS = 5


class MuonAdamW(Optimizer):
    """One optimizer of two: groups marked `muon` are stepped here, the others by AdamW.

    Args:
        model: its parameters are sorted by name and shape.
        lr: the rate of both.
        weight_decay: decoupled, on matrices and embeddings.
        betas, eps: of AdamW.
    """

    def __init__(
        self,
        model: GPT2LMHeadModel,
        *,
        lr: float,
        weight_decay: float,
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
        updates: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for parameter, parts in zip(group["params"], self.parts, strict=True):
            if parameter.grad is not None:
                momentum = self._advance_momentum(parameter)
                for target, part in zip(parameter.chunk(parts, 1), momentum.chunk(parts, 1), strict=True):
                    updates.setdefault(part.shape, []).append((target, part))
        for shape, pairs in updates.items():
            steps = orthogonalize(torch.stack([part for _, part in pairs]))
            scale = 0.2 * max(shape) ** 0.5 * group["lr"]
            for (target, _), step in zip(pairs, steps, strict=True):
                target.mul_(1 - group["lr"] * group["weight_decay"]).add_(step, alpha=-scale)

    def _advance_momentum(self, parameter: Tensor) -> Tensor:
        """Return the Nesterov momentum of the gradient, (in, out)."""
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
        return parameter.grad.lerp(state["momentum"], MOMENTUM)

    def state_dict(self) -> dict:
        """Return the state of both."""
        return {"muon": super().state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Load what `state_dict` returned."""
        super().load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self.param_groups[1:] = self.adamw.param_groups
        self._share_groups()


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


class MuonAdamWFactory:
    """What Trainer builds without arguments and then calls with the model."""

    def __call__(self, model: GPT2LMHeadModel, **kwargs) -> MuonAdamW:
        """Return the optimizer of `model`."""
        return MuonAdamW(model, **kwargs)
