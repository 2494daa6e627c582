"""A model in fp32 -> the same model with its matrices stored in fewer bytes, and what that costs.

    cost = store_weights(session.model, "int8", tokenizer)      # in place
    cost.nats, cost.agreement                                   ->  0.0021, 0.98

One stream of decoding reads every matrix once a token, so on a CPU its speed is the memory's: half the bytes,
nearly twice the tokens. What the dtypes are:

    fp16    matrices in float16, products with float32 inputs and sums (FBGEMM, x86 CPUs)
    int8    matrices in 8 bits with a scale for each output; inputs are scaled to 7 bits as they come, all
            rows of a batch together, so that a reply can depend on its neighbours by that rounding (FBGEMM)
    bf16    everything in bfloat16, where the device computes in it

Embeddings, norms and attention stay as they are but for bf16. Invariant: the cost is measured, on what the
fp32 model itself says, before anything is decoded with the new weights.
"""

import contextlib
import random
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div
from transformers import GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from firstwords.errors import BadFlag
from firstwords.generate import Sampling, generate_batch
from firstwords.model import has_bf16
from firstwords.schema import Message
from firstwords.template import encode_prompt
from firstwords.tokenizer import Tokenizer

DTYPES = ("fp32", "fp16", "bf16", "int8")

PROBES = 8
PROBE_SAMPLING = Sampling(temperature=1.0, seed=0, max_new_tokens=32)


@dataclass(frozen=True, slots=True)
class Cost:
    """How far the stored weights lead from the fp32 ones.

    Attributes:
        nats: the mean Kullback-Leibler divergence from fp32's next-token distribution, nats per token: by so
            much the loss on text of the fp32 model's own grows.
        agreement: share of the tokens at which both find the same id likeliest.
        tokens: how many were looked at: replies of up to 32 tokens that the fp32 model draws at temperature
            1 to 8 words of its vocabulary.
    """

    nats: float
    agreement: float
    tokens: int


def check_dtype(dtype: str, device: str) -> None:
    """Refuse a dtype that this machine does not compute in.

    Raises:
        BadFlag: saying what it lacks.
    """
    if dtype == "bf16" and not has_bf16(device):
        raise BadFlag(f"--dtype bf16: this {device} does not compute in bfloat16; use fp16 or int8 on a CPU")
    if dtype in ("fp16", "int8") and not (device == "cpu" and has_fbgemm()):
        raise BadFlag(
            f"--dtype {dtype}: needs an x86 CPU and a torch with FBGEMM, this is {device} with torch "
            f"{torch.__version__}; use --device cpu on such a machine, or fp32"
        )


def has_fbgemm() -> bool:
    """Tell whether torch has the products with packed matrices that fp16 and int8 are made of."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def store_weights(model: GPT2LMHeadModel, dtype: str, tokenizer: Tokenizer) -> Cost:
    """Replace the matrices of a model in fp32 in place by ones of `dtype`, and measure what it costs.

    Args:
        model: in eval mode, on its device.
        dtype: `fp16`, `bf16` or `int8`; `check_dtype` has let it pass.
        tokenizer: the model's; it encodes the questions of the measurement.
    """
    prompts = [encode_prompt([Message("user", word)], tokenizer) for word in draw_words(tokenizer, PROBES)]
    stop_ids = {tokenizer.end_id, tokenizer.endoftext_id}
    banned = range(len(tokenizer), model.config.vocab_size)
    replies = generate_batch(model, prompts, stop_ids=stop_ids, banned_ids=banned, sampling=PROBE_SAMPLING)
    before = _predict(model, prompts, replies)
    replace_matrices(model, dtype)
    after = _predict(model, prompts, replies)
    return Cost(
        nats=float(kl_div(after, before, reduction="batchmean", log_target=True)),
        agreement=float((after.argmax(-1) == before.argmax(-1)).float().mean()),
        tokens=len(before),
    )


def draw_words(tokenizer: Tokenizer, count: int) -> list[str]:
    """Return texts that are one token each, the same for the same tokenizer: also characters can be asked."""
    words = []
    for token_id in range(len(tokenizer)):
        with contextlib.suppress(UnicodeDecodeError):
            words.append(tokenizer.token_bytes(token_id).decode())
    words = [word for word in words if word.strip()]
    return random.Random(0).sample(words, min(count, len(words)))


@torch.inference_mode()
def _predict(model: GPT2LMHeadModel, prompts: list[list[int]], replies: list[list[int]]) -> Tensor:
    """Return the log-probabilities (N, V) before each id of the replies."""
    rows = []
    for prompt, reply in zip(prompts, replies, strict=True):
        ids = torch.tensor([prompt + reply[:-1]], device=model.device)
        rows.append(model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :])
    return torch.cat(rows).float().log_softmax(-1)


def replace_matrices(model: GPT2LMHeadModel, dtype: str) -> None:
    """Replace every product of the blocks and the head in place by one that reads `dtype`."""
    build = {"fp16": pack_fp16, "int8": pack_int8, "bf16": transpose}[dtype]
    for block in model.transformer.h:
        for part in (block.attn, block.mlp):
            for name, module in list(part.named_children()):
                if isinstance(module, Conv1D):
                    setattr(part, name, build(module.weight.detach().T, module.bias.detach()))
    model.lm_head = build(model.lm_head.weight.detach(), None)
    if dtype == "bf16":
        model.to(torch.bfloat16)


class PackedLinear(nn.Module):
    """`x @ weight.T + bias` with a matrix packed by FBGEMM; float32 (..., in) -> float32 (..., out)."""

    def __init__(self, multiply, packed):
        super().__init__()
        self.multiply = multiply
        self.packed = packed

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return self.multiply(x, self.packed)


def pack_fp16(weight: Tensor, bias: Tensor | None) -> PackedLinear:
    """Pack a matrix (out, in) as float16."""
    packed = torch.ops.quantized.linear_prepack_fp16(weight.contiguous(), bias)
    return PackedLinear(torch.ops.quantized.linear_dynamic_fp16, packed)


def pack_int8(weight: Tensor, bias: Tensor | None) -> PackedLinear:
    """Pack a matrix (out, in) as 8-bit integers, the largest of each output at 127."""
    scales = weight.abs().amax(1).clamp(min=1e-12).double() / 127
    zeros = torch.zeros(len(scales), dtype=torch.long)
    with warnings.catch_warnings():
        # torch 2.13 says that quantized tensors will go. What is there in their place was measured on a CPU
        # without AVX-512: `_weight_int8pack_mm` at the speed of fp16, oneDNN at half of FBGEMM's.
        warnings.simplefilter("ignore", UserWarning)
        quantized = torch.quantize_per_channel(weight.contiguous(), scales, zeros, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(quantized, bias)
    return PackedLinear(_multiply_int8, packed)


def _multiply_int8(x: Tensor, packed) -> Tensor:
    # 7 bits for the inputs (reduce_range): two products of 8 bits overflow the 16 that AVX2 sums them in.
    return torch.ops.quantized.linear_dynamic(x, packed, True)


def transpose(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Keep a matrix as (out, in); (in, out) is 14 times as slow in bf16 on a CPU without AVX-512."""
    linear = nn.Linear(*weight.T.shape, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
