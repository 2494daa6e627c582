"""A shape and the settings of a run -> the bytes it takes on the device, term by term.

    predict_memory(config, batch_size=16, seq_len=1024, bf16=True, optim="muon", recompute="selective").total
    measure_step(config, batch_size=16, seq_len=1024, bf16=True).peak     # counted, not calculated

Invariant: the terms are those of the moment at which most is needed, so `total` is what the device must
have beside the framework's own context; nothing is allocated to find it out.
"""

import weakref
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, fields
from unittest.mock import patch

import torch
from torch._subclasses import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config

from firstwords.model import GPT2LMHeadModel, attention, find_inner
from firstwords.model.cross_entropy import count_rows
from firstwords.model.gelu import Gelu
from firstwords.optimizer import MUONS
from firstwords.recompute import set_recompute


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
        activations: what the blocks keep from the forward to the backward pass.
        logits: what the head and the loss hold, the gradient of the embeddings among it.
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
    d, m = config.n_embd, find_inner(config)
    return Weights(
        hidden=config.n_layer * (4 * d * d + 2 * d * m),
        embeddings=(config.vocab_size + config.n_positions) * d,
        vectors=config.n_layer * (9 * d + m) + 2 * d,
    )


# Averages that an optimizer of Trainer's keeps of each weight where they are not two, without `--optim_args`;
# Adafactor's are of rows and columns, 1 % of the weights and less.
AVERAGES = {"sgd": 0, "adafactor": 0, "adagrad": 1, "lion": 1, "rmsprop": 1, "ademamix": 3}


def count_state_bytes(config: GPT2Config, optim: str) -> int:
    """Return the bytes of an optimizer's state: float32, two of a weight but where `AVERAGES` knows better.

    Args:
        config: of the model.
        optim: as in `--optim`. Both Muons keep one momentum of each hidden matrix; bitsandbytes keeps 8 bits
            of what is no embedding and no vector.
    """
    weights = count_weights(config)
    averages = AVERAGES.get(optim.removeprefix("paged_").split("_")[0], 2)
    per_hidden = 4 if optim in MUONS else averages * (1 if "8bit" in optim else 4)
    return weights.hidden * per_hidden + (weights.total - weights.hidden) * averages * 4


def predict_memory(
    config: GPT2Config,
    *,
    batch_size: int,
    seq_len: int,
    bf16: bool,
    optim: str = "adamw_torch_fused",
    recompute: str = "none",
    grad_accum: int = 1,
    device: str = "cuda",
    whole_logits: bool = False,
    world_size: int = 1,
    is_sharded: bool = False,
) -> Memory:
    """Return what a training step takes on the device, of several processes in each.

    It is the most of five moments. The loss: all activations, and what the head holds. The first block's
    backward pass: the same, and what a block takes, while the head's gradient waits for the embedding's, for
    they are one weight. The last block's: its activations alone, and the gradients of all that is above. The
    embedding's: all gradients, and that of the embedding as it comes, which is added to the one that waited;
    beside it only the gradient of what the blocks were given is left. And the optimizer's step.

    Under DDP the buckets that are sent hold all gradients once more (torch's `gradient_as_bucket_view` is
    off). Of FSDP it is an estimate that was not measured.

    Args:
        config: of the model.
        batch_size: rows in a micro-batch.
        seq_len: tokens in a row; every one is taken to be learned.
        bf16: compute under autocast to bfloat16; weights and state stay float32.
        optim: as in `--optim`.
        recompute: as of `set_recompute`.
        grad_accum: micro-batches in a step. From the second on all gradients are there at the worst moment;
            with one they come while the activations go.
        device: decides how many logits are made at a time.
        whole_logits: the loss of transformers, which makes all of them.
        world_size: processes of the run.
        is_sharded: FSDP cuts weights, gradients and state among them.
    """
    weights, tokens = count_weights(config), batch_size * seq_len
    shards = world_size if is_sharded else 1
    gathered, sent = _count_shared(weights, config.n_layer, world_size, is_sharded)
    held = {
        "weights": 4 * weights.total // shards + gathered,
        "optimizer": count_state_bytes(config, optim) // shards,
    }
    every = {**held, "gradients": 4 * weights.total // shards + sent}
    before = every if grad_accum > 1 else {**held, "gradients": sent}
    activations = tokens * count_activation_bytes(config, bf16=bf16, recompute=recompute)
    block = tokens * _count_block_bytes(config, bf16=bf16, recompute=recompute)
    casts = 2 * weights.hidden * bf16
    if recompute != "none":  # of one block at a time
        block, casts = block + casts // config.n_layer, 0
    head = (_count_whole if whole_logits else _count_pieces)(config, tokens, bf16, device)
    if batch_size >= 64:  # of so many places some are left out, the last of each row: the others are a copy
        head += 4 * tokens * config.n_embd
    d, tied = config.n_embd, 4 * config.vocab_size * config.n_embd
    # Of the last block those matrices have no gradient yet that lead to the activation function; nor have the
    # positions. With one micro-batch it is the head's own gradient that waits, counted among `every`.
    late = 4 * (weights.hidden // config.n_layer - d * find_inner(config) + config.n_positions * d)
    late, waiting = (late, 0) if grad_accum == 1 else (0, tied)
    stream = 4 * tokens * d  # the gradient of the residual stream
    moments = [
        Memory(**before, casts=casts, activations=activations, logits=head),
        Memory(**before, casts=casts, activations=activations, logits=tied, workspace=block),
        Memory(
            **every | {"gradients": every["gradients"] - late},
            activations=activations // config.n_layer,
            logits=waiting,
            workspace=stream + block,
        ),
        Memory(**every, logits=waiting + tied, workspace=stream),
        Memory(**every, workspace=9 * weights.hidden if optim in MUONS else 0),
    ]
    if is_sharded:  # the first process evaluates a copy of the whole
        moments.append(Memory(**held | {"weights": held["weights"] + 4 * weights.total}))
    return max(moments, key=lambda memory: memory.total)


def _count_shared(weights: Weights, n_layer: int, world_size: int, is_sharded: bool) -> tuple[int, int]:
    """Return the bytes of weights and of gradients that a process holds because there are others."""
    two_blocks = 4 * 2 * weights.hidden // n_layer  # one in use, one on its way
    if is_sharded:
        return 4 * weights.embeddings + two_blocks, two_blocks
    return 0, 4 * weights.total if world_size > 1 else 0


def count_activation_bytes(config: GPT2Config, *, bf16: bool, recompute: str = "none") -> int:
    """Return the bytes per token that the blocks, and the last norm, keep for the backward pass.

    Of width d, inner width m, and e bytes a number, a block keeps its input and the middle of its residual
    stream (4 d each), both normed (e d), Q, K and V (3 e d), the attended (e d), both sides of the
    activation function (e m each) and, in float32, a number a head and the norms' statistics. The composed
    `gelu_new` keeps another 12 m, each dropout a mask.
    """
    d, m, e = config.n_embd, find_inner(config), 2 if bf16 else 4
    block = {
        "none": 8 * d + 6 * e * d + 2 * e * m + 4 * config.n_head + 16,
        "selective": 4 * d + 5 * e * d + e * m + 4 * config.n_head,
        "full": 4 * d,
    }[recompute]
    if recompute == "none":
        block += 12 * m * (config.activation_function == "gelu_new") + 2 * d * (config.resid_pdrop > 0)
    return config.n_layer * block + d * (config.embd_pdrop > 0) + 4 * d + 8


def _count_pieces(config: GPT2Config, tokens: int, bf16: bool, device: str) -> int:
    """Return the bytes of our head and loss at their worst: while a piece of the logits is scored.

    Then the hidden states are there in float32 and in autocast's type, their gradient in the latter, that of
    the head and its cast, and of the piece the logits twice, their logarithms, and the gradient of the last.
    """
    d, v = config.n_embd, config.vocab_size
    rows = count_rows(device, v)
    piece = 12 * v * rows if tokens > rows else (10 if bf16 else 8) * v * tokens
    return tokens * (8 if bf16 else 12) * d + (6 if bf16 else 4) * v * d + piece


def _count_whole(config: GPT2Config, tokens: int, bf16: bool, device: str) -> int:
    """Return the bytes of transformers' head and loss at their worst: three times all logits in float32."""
    d, v = config.n_embd, config.vocab_size
    return tokens * (12 * v + (2 if bf16 else 4) * d) + 2 * v * d * bf16


def _count_block_bytes(config: GPT2Config, *, bf16: bool, recompute: str) -> int:
    """Return the bytes per token that the backward pass of a block takes beside what was kept.

    That is where the gradient comes to the activation function; by then a level has computed again what it
    did not keep.
    """
    d, m, e = config.n_embd, find_inner(config), 2 if bf16 else 4
    again = {"none": 0, "selective": 4 * d + e * d + e * m, "full": 4 * d + 6 * e * d + 2 * e * m}[recompute]
    gelu = 0
    if config.activation_function == "gelu_new":
        gelu = (9 if bf16 else 7) * m + 12 * m * (recompute != "none")
    return again + gelu + e * m + 2 * d * bf16


@dataclass(frozen=True)
class Step:
    """Bytes of one micro-batch beyond weights and optimizer, as the meter counts them.

    Attributes:
        activations: that the blocks keep from the forward to the backward pass.
        casts: of the weights in bfloat16 that are kept likewise.
        logits: that the head and the loss keep likewise.
        peak: the most that is there at once, gradients included, from the first operation to the last.
    """

    activations: int
    casts: int
    logits: int
    peak: int


def measure_step(
    config: GPT2Config,
    *,
    batch_size: int,
    seq_len: int,
    bf16: bool,
    recompute: str = "none",
    is_packed: bool = False,
    model_class: type = GPT2LMHeadModel,
) -> Step:
    """Run one micro-batch, forward and backward, on tensors without contents, and count what is allocated.

    It takes the way of a GPU: its attention kernels, its GELU, its rules of autocast, its dropout. Nothing is
    computed and no GPU is needed. What kernels allocate within themselves is not seen.

    Args:
        config: of the model.
        batch_size: rows.
        seq_len: tokens in a row; each is learned.
        bf16: under autocast.
        recompute: as of `set_recompute`.
        is_packed: rows are of several conversations.
        model_class: ours, or transformers' own.
    """
    with FakeTensorMode():
        model = model_class(config).train()
        set_recompute(model, recompute)
        batch = _lay_batch(model, batch_size, seq_len, is_packed)
        ledger = _Ledger(model)
        with ledger, _on_cuda():
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model(**batch).loss
            kept = ledger.sum_phases()
            ledger.phase = "backward"
            loss.backward()
    return Step(kept["blocks"], kept["casts"], kept["head"], ledger.peak)


def _lay_batch(model, batch_size: int, seq_len: int, is_packed: bool) -> dict[str, torch.Tensor]:
    rows = torch.zeros(batch_size, seq_len, dtype=torch.long)
    batch = {"input_ids": rows, "labels": rows, "use_cache": False}
    if not isinstance(model, GPT2LMHeadModel):
        # Whole rows; transformers would look into their contents for the beginnings of documents.
        model.config._attn_implementation = attention.NAME
        return batch | {"attention_mask": attention.lay_documents(None, rows.device)}
    model.attention = "varlen"
    # As `collate` lays them.
    batch["learned"] = torch.zeros(-(-batch_size * (seq_len - 1) // 64) * 64, dtype=torch.long)
    if is_packed:
        batch |= {"position_ids": rows, "documents": torch.zeros(64, dtype=torch.int32)}
    return batch


class _Ledger(TorchDispatchMode):
    """Keeps account of the bytes of every storage from where it comes into being to where it ends."""

    def __init__(self, model):
        super().__init__()
        self._weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self._live: dict[int, tuple[int, str]] = {}
        self._total = self.peak = 0
        self.phase = "blocks"
        model.transformer.register_forward_hook(self._enter_head)

    def _enter_head(self, *_) -> None:
        self.phase = "head"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.add.Tensor and self.phase == "backward" and not torch.is_grad_enabled():
            self._replace(args[0].untyped_storage(), outputs.untyped_storage())
        is_cast = func is torch.ops.aten._to_copy.default and self._key(args[0]) in self._weights
        for output in tree_leaves(outputs):
            if isinstance(output, torch.Tensor):
                self._enter(output.untyped_storage(), "casts" if is_cast else self.phase)
        return outputs

    @staticmethod
    def _key(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _enter(self, storage, phase: str) -> None:
        key = storage._cdata
        if key not in self._live and key not in self._weights:
            self._live[key] = storage.nbytes(), phase
            self._total += storage.nbytes()
            self.peak = max(self.peak, self._total)
            weakref.finalize(storage, self._leave, key)

    def _replace(self, summand, total) -> None:
        """Let a sum of two gradients take the place of the first.

        So autograd adds them, but for those of a subclass of tensors, which those without contents are
        (torch/csrc/autograd/input_buffer.cpp, `accumulate`).
        """
        key, num_bytes = summand._cdata, summand.nbytes()
        if key in self._live and self._live[key][0] == num_bytes == total.nbytes():
            self._total -= num_bytes
            self._live[key] = 0, self._live[key][1]

    def _leave(self, key: int) -> None:
        self._total -= self._live.pop(key)[0]

    def sum_phases(self) -> Counter:
        """Return the bytes that are there now, by the phase in which they came."""
        sums = Counter()
        for num_bytes, phase in self._live.values():
            sums[phase] += num_bytes
        return sums


@contextmanager
def _on_cuda():
    """Do on a CPU's tensors what is done on a GPU's, where that allocates otherwise.

    Not by a mode of torch: none is in force while the backward pass computes a block again.
    """
    kernels = {"dropout": _drop_out, "scaled_dot_product_attention": _attend}
    ours = patch.object(Gelu, "forward", _activate)
    with patch.multiple(functional, **kernels), patch.object(torch, "pow", _raise_to_power), ours:
        yield


def _activate(gelu, states):
    return functional.gelu(states, approximate="tanh")  # ours is for a CPU's numbers, a piece at a time


def _raise_to_power(states, exponent, _pow=torch.pow):
    return _pow(states.float(), exponent)  # as autocast has it on a GPU


def _drop_out(states, p=0.5, training=True, inplace=False):
    return torch.native_dropout(states, p, True)[0] if p and training else states


def _attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **kwargs):
    """Call the kernel that a GPU of Ampere or later takes for whole rows: flash, or in float32 the other."""
    aten = torch.ops.aten
    if query.dtype == torch.float32:
        options = (attn_mask, True, dropout_p, True)
        return aten._scaled_dot_product_efficient_attention(query, key, value, *options, scale=scale)[0]
    options = (dropout_p, True, False)
    return aten._scaled_dot_product_flash_attention(query, key, value, *options, scale=scale)[0]
