"""A shape and the settings of a run -> the bytes it takes on the device, term by term.

    predict_memory(config, batch_size=16, seq_len=1024, bf16=True, optim="muon", recompute="selective").total

Invariant: the terms are those of the moment at which most is needed, so `total` is what the device must
have beside the framework's own context; nothing is allocated to find it out.
"""

from dataclasses import dataclass, fields

from transformers import GPT2Config

RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Weights:
    """Numbers in the matrices of the blocks, in the embeddings, and in norms and biases."""

    hidden: int
    embeddings: int
    vectors: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.hidden + self.embeddings + self.vectors


@dataclass(frozen=True)
class Memory:
    """Bytes on the device at the moment when most are needed.

    Attributes:
        weights: the parameters, in float32.
        casts: their copies in bfloat16, which autocast makes; they do not grow with the batch.
        gradients: those that are there at that moment.
        optimizer: its state.
        activations: what the forward pass of the blocks keeps for the backward pass.
        logits: the head and the loss at their worst.
        workspace: what one block, or the optimizer's step, needs for a while.
    """

    weights: int = 0
    casts: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    workspace: int = 0

    @property
    def total(self) -> int:
        """The sum of the terms."""
        return sum(getattr(self, term.name) for term in fields(self))


def count_weights(config: GPT2Config) -> Weights:
    """Return how many numbers a GPT-2 holds; the head is the token embedding."""
    d, m = config.n_embd, _inner(config)
    return Weights(
        hidden=config.n_layer * (4 * d * d + 2 * d * m),
        embeddings=(config.vocab_size + config.n_positions) * d,
        vectors=config.n_layer * (9 * d + m) + 2 * d,
    )


def count_state_bytes(config: GPT2Config, optim: str) -> int:
    """Return the bytes of an optimizer's state: two float32 a weight, but for those known to keep fewer.

    Args:
        config: of the model.
        optim: as in `--optim`. Muon keeps one momentum of each hidden matrix; bitsandbytes keeps 8 bits of
            what is no embedding and no vector.
    """
    weights = count_weights(config)
    bytes_per_hidden = 4 if optim == "muon" else 2 if "8bit" in optim else 8
    return weights.hidden * bytes_per_hidden + (weights.total - weights.hidden) * 8


def predict_memory(
    config: GPT2Config,
    *,
    batch_size: int,
    seq_len: int,
    bf16: bool,
    optim: str = "adamw_torch_fused",
    recompute: str = "none",
    grad_accum: int = 1,
) -> Memory:
    """Return what a training step takes on the device.

    Args:
        config: of the model.
        batch_size: rows in a micro-batch.
        seq_len: tokens in a row.
        bf16: compute under autocast to bfloat16; weights and state stay float32.
        optim: as in `--optim`.
        recompute: `none`, `selective` or `full`.
        grad_accum: micro-batches in a step. From the second on all gradients are there at the worst moment;
            with one they come while the activations go.
    """
    weights, tokens = count_weights(config), batch_size * seq_len
    held = {"weights": 4 * weights.total, "optimizer": count_state_bytes(config, optim)}
    every_gradient = 4 * weights.total
    all_casts = 2 * weights.total if bf16 else 0
    kept_casts = all_casts if recompute == "none" else all_casts // weights.total * weights.embeddings
    backward = Memory(
        **held,
        casts=kept_casts,
        gradients=every_gradient if grad_accum > 1 else 0,
        activations=tokens * count_activation_bytes(config, bf16=bf16, recompute=recompute),
        logits=tokens * 12 * config.vocab_size,
    )
    step = Memory(**held, gradients=every_gradient, workspace=_step_workspace(weights, optim))
    return max(backward, step, key=lambda memory: memory.total)


def count_activation_bytes(config: GPT2Config, *, bf16: bool, recompute: str = "none") -> int:
    """Return the bytes per token that the blocks keep for the backward pass.

    Of width d, inner width m, and e bytes a number, a block keeps its input and the middle of its residual
    stream (4 d each), both normed (e d), Q, K and V (3 e d), the attended (e d), both sides of the
    activation function (e m each) and, in float32, one number a head and the norms' statistics. The
    composed `gelu_new` keeps another 12 m.
    """
    d, m, e = config.n_embd, _inner(config), 2 if bf16 else 4
    gelu = 12 * m if config.activation_function == "gelu_new" else 0
    block = {
        "none": 8 * d + 6 * e * d + 2 * e * m + gelu + 4 * config.n_head + 16,
        "selective": 4 * d + 5 * e * d + e * m + 4 * config.n_head,
        "full": 4 * d,
    }
    return config.n_layer * block[recompute] + 4 * d + e * d


def _step_workspace(weights: Weights, optim: str) -> int:
    # Muon: every momentum with its look ahead, and the matrices of the largest shape stacked.
    return 6 * weights.hidden if optim == "muon" else 0


def _inner(config: GPT2Config) -> int:
    return config.n_inner or 4 * config.n_embd
