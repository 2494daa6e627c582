"""A model -> the same model, that keeps less for its backward pass and computes the rest again.

    set_recompute(model, "selective")

`selective` keeps each block's input and what its matrices and its attention give; norms, casts, sums and the
activation function are computed again, which costs no product of matrices. `full` keeps the inputs alone.
Invariant: no number changes, dropout included: a run may be gone on with at another level.
"""

from functools import partial

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

LEVELS = ("none", "selective", "full")


def set_recompute(model, level: str) -> None:
    """Have transformers' own checkpointing of blocks do what `level` says, from the next step on.

    Args:
        model: a GPT-2 of transformers.
        level: one of `LEVELS`.
    """
    if level == "none":
        return
    options = {"use_reentrant": False}
    if level == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, choose_kept)
    # transformers before 5.20 knows the older name alone, later ones warn of it.
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)(options)
    for block in model.transformer.h:
        block.register_forward_hook(_drop_casts)


def choose_kept(context, op, *args, **kwargs) -> CheckpointPolicy:
    """Say whether the output of an operation is kept: torch's `policy_fn`.

    Attention that drops out at random is computed again with the other dropouts: the generator is put back
    to where the block began, and each must find it where it did.
    """
    if op is torch.ops.aten.addmm.default:
        # What leads from the inner width back goes into the residual stream alone: nobody asks for it again.
        rows, columns = args[2].shape
        is_kept = rows <= columns
    else:
        is_kept = _is_attention(op) and not _drops_out(op, args, kwargs)
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


def _is_attention(op) -> bool:
    name = op.name()
    return "scaled_dot_product" in name or "attn" in name


def _drops_out(op, args, kwargs) -> bool:
    names = [argument.name for argument in op._schema.arguments]
    return bool((dict(zip(names, args, strict=False)) | kwargs).get("dropout_p"))


def _drop_casts(block, inputs, outputs) -> None:
    # Autocast holds the block's weights in bfloat16 to the end of the forward pass, for nobody: the backward
    # pass casts them again.
    if not torch.compiler.is_compiling():
        torch.clear_autocast_cache()
