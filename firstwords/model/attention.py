"""Position ids of packed rows -> attention within each conversation, without a mask of (T, T).

    compute = {"attention_mask": lay_documents(find_documents(position_ids)), "packed_by": "each"}
    model.transformer(input_ids, position_ids=position_ids, use_cache=False, **compute)

It is entered into transformers' registry under `NAME`. Where a caller gives no documents, all is as with
"sdpa", masks included. Invariant: no way lets a token see another conversation.

Forward and backward of a layer of small_test on 4 rows of 1,024 tokens (35 conversations), 2 cores: 38 ms one
conversation after the other, 50 to 66 ms in groups of one padded length, 143 ms with a mask of (T, T).
"""

from importlib.util import find_spec

import torch
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from firstwords.errors import BadFlag

NAME = "firstwords"


def find_documents(position_ids: torch.Tensor) -> torch.Tensor:
    """Return where the conversations begin in the flattened rows, and the end: (N + 1,) int32.

    The pads behind the last conversation of a row, each at position 0, are one document. Filled up to a
    multiple of 64 with the end, so that there are few shapes; those documents are empty.

    Args:
        position_ids: (B, T); a conversation begins wherever they do not go up by one.
    """
    steps = position_ids.diff(dim=1, prepend=position_ids[:, :1] + 1)
    begins = steps != 1  # the first column is one too
    last = functional.pad(begins[:, 1:], (0, 1), value=True)
    starts = (begins & ~((steps == 0) & last & (position_ids == 0))).flatten().nonzero()[:, 0]
    ends = starts.new_full((-len(starts) % 64 or 64,), position_ids.numel())
    return torch.cat([starts, ends]).int()


def check_attention(way: str, device: str, bf16: bool, dropout: float) -> None:
    """Raise `BadFlag` when a way of attending within packed rows was asked for that cannot be had."""
    if way in ("auto", "dense"):
        return
    if device != "cuda":
        raise BadFlag(f"--attention {way}: needs a GPU, this is {device}; leave it out")
    if not bf16:
        raise BadFlag(f"--attention {way}: computes in 16 bits alone; add --bf16 or leave it out")
    if way == "flash" and find_spec("flash_attn") is None:
        raise BadFlag("--attention flash: flash-attn is not installed; pip install flash-attn")
    if way == "varlen" and dropout:
        raise BadFlag(f"--attention varlen: drops nothing, but attn_pdrop is {dropout}; leave it out")


@torch.compiler.assume_constant_result  # no compiler can look into the question after the card
def choose_way(wish: str, device: str, dtype: torch.dtype, dropout: float) -> str:
    """Return how packed rows are attended to.

    On a CPU one conversation after the other is the fastest (see above). On a GPU torch's own kernel for
    rows of many lengths, which takes 16 bits on a card of Ampere or later, and no dropout; else the mask.
    """
    if wish != "auto":
        return wish
    if device == "cpu":
        return "each"
    if device != "cuda" or dtype == torch.float32 or dropout:
        return "dense"
    return "varlen" if torch.cuda.get_device_capability() >= (8, 0) else "dense"


def lay_documents(documents: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Return documents (N + 1,) as (1, 1, 1, N + 1); of None, whole rows, (1, 1, 1, 0).

    With four dimensions transformers passes it on as it is: no mask is made, and nothing looked up on the
    device to find out whether one is needed.
    """
    if documents is None:
        return torch.empty((1, 1, 1, 0), dtype=torch.int32, device=device)
    return documents.view(1, 1, 1, -1)


def mask_documents(documents: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return the mask, (B, 1, T, T) bool, that says the same as documents (N + 1,)."""
    rows, length = shape
    places = torch.arange(rows * length, device=documents.device, dtype=torch.int32)
    owner = torch.searchsorted(documents, places, right=True).view(rows, 1, length)
    causal = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    return (owner[:, :, :, None] == owner[:, :, None]) & causal


def attend(
    module, query, key, value, attention_mask=None, *, dropout=0.0, scaling=None, packed_by=None, **kwargs
):
    """Attend as transformers' registry wants it: queries, keys, values (B, H, T, D) -> (B, T, H, D), None."""
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if not attention_mask.numel():
        return sdpa_attention_forward(module, query, key, value, None, dropout=dropout, scaling=scaling)
    flat = [states.transpose(1, 2).flatten(0, 1) for states in (query, key, value)]
    attended = _PACKED[packed_by](*flat, attention_mask.flatten(), query.shape[2], dropout, scaling)
    return attended.view(query.shape[0], query.shape[2], *attended.shape[1:]), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


@torch.compiler.disable  # the lengths are data
def _attend_each(query, key, value, documents, longest, dropout, scaling):
    """Attend within one conversation after the other: (B * T, H, D) -> the same."""
    lengths = [length for length in documents.diff().tolist() if length]
    parts = zip(*(states.split(lengths) for states in (query, key, value)), strict=True)
    return torch.cat([_attend_one(*part, dropout, scaling) for part in parts])


def _attend_one(query, key, value, dropout, scaling):
    heads = (states.transpose(0, 1)[None] for states in (query, key, value))
    attended = functional.scaled_dot_product_attention(
        *heads, dropout_p=dropout, scale=scaling, is_causal=True
    )
    return attended[0].transpose(0, 1)


def _attend_varlen(query, key, value, documents, longest, dropout, scaling):
    """Attend by torch's kernel for rows of many lengths; shapes as of `_attend_each`."""
    spans = (documents, documents, longest, longest)
    return varlen_attn(query, key, value, *spans, scale=scaling, window_size=(-1, 0))  # causal


def _attend_flash(query, key, value, documents, longest, dropout, scaling):
    """Attend by the package flash-attn; shapes as of `_attend_each`."""
    from flash_attn import flash_attn_varlen_func

    spans = (documents, documents, longest, longest)
    return flash_attn_varlen_func(
        query, key, value, *spans, dropout_p=dropout, softmax_scale=scaling, causal=True
    )


_PACKED = {"each": _attend_each, "varlen": _attend_varlen, "flash": _attend_flash}
