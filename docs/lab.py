"""The training loop of the tutorial's experiments, bare, on the parrot's five conversations.

    from docs.lab import batch, learn, ask
    ask(learn(batch), "Who are you?")          # in the folder where data/parrot was prepared

Everything a trainer adds (a rate that falls, saves, packing by the thousand) is left out, so that what goes
wrong in an experiment is what the experiment changed. The seed is fixed: on one machine it is the same twice.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from firstwords.dataset import collate, open_train, open_val
from firstwords.generate import Sampling
from firstwords.model import IGNORED, GPT2LMHeadModel, build_model, quiet_transformers
from firstwords.session import ChatSession
from firstwords.tokenizer import load_tokenizer

DATA = Path("data/parrot")
CONFIGS = Path(__file__).parent.parent / "configs" / "models"
SEQ_LEN = 64

quiet_transformers()
tokenizer = load_tokenizer(DATA)
rows = open_train(DATA, tokenizer, SEQ_LEN, seed=0, assistant_only=True)
val_rows = open_val(DATA, tokenizer, SEQ_LEN, assistant_only=True)
# (B, T): the four conversations for training, packed into two rows; and the one that was put aside.
batch = collate([rows[n] for n in range(len(rows))])
val_batch = collate([val_rows[0]])


def learn(
    batch: dict[str, torch.Tensor],
    *,
    optimizer: Callable = torch.optim.AdamW,
    lr: float = 1e-3,
    steps: int = 60,
    watch: Callable[[GPT2LMHeadModel, float], None] = lambda model, loss: None,
) -> GPT2LMHeadModel:
    """Train a new model on one batch, again and again.

    Args:
        batch: `input_ids`, `labels`, `position_ids`, each (B, T) int64.
        optimizer: makes one of parameters and `lr`.
        lr: how far a step goes.
        steps: how many.
        watch: called before each step with the model and the loss of the batch.
    """
    model = build_model(CONFIGS / "small_test.json", tokenizer, seed=0)
    optimizer = optimizer(model.parameters(), lr=lr)
    for _ in range(steps):
        loss = model(**batch).loss  # how wrong is it?
        watch(model, loss.item())
        loss.backward()  # which way does the loss fall, for each weight?
        optimizer.step()  # a little that way
        optimizer.zero_grad()
    return model.eval()


@torch.inference_mode()
def measure(model: GPT2LMHeadModel, batch: dict[str, torch.Tensor]) -> float:
    """Return the loss of a batch, nats per learned token."""
    return model(**batch).loss.item()


def ask(model: GPT2LMHeadModel, question: str) -> None:
    """Print the reply, of 32 tokens at most, and whether the model ended it."""
    session = ChatSession(model, tokenizer, context=SEQ_LEN, sampling=Sampling(max_new_tokens=32))
    print(repr(session.ask(question)), "and ends" if session.last.stopped else "and does not end")


def mask_labels(batch: dict[str, torch.Tensor], token_id: int) -> dict[str, torch.Tensor]:
    """Return the batch with one token left out of what is learned."""
    labels = batch["labels"]
    return dict(batch, labels=labels.masked_fill(labels == token_id, IGNORED))


def count_memory(num_rows: int) -> dict[str, int]:
    """Return the bytes that a step on so many rows keeps, by what they are."""
    model, kept = learn(batch, steps=0).train(), []
    optimizer = torch.optim.AdamW(model.parameters())

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**collate([rows[n] for n in range(num_rows)])).loss
    loss.backward()
    optimizer.step()
    weights = list(model.parameters())
    states = optimizer.state.values()
    averages = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
    parts = {"weights": weights, "gradients": [weight.grad for weight in weights], "AdamW": averages}
    own = {weight.untyped_storage().data_ptr() for weight in weights}
    parts["activations"] = [part for part in kept if part.untyped_storage().data_ptr() not in own]
    return {name: count_bytes(part) for name, part in parts.items()}


def count_bytes(tensors: list[torch.Tensor]) -> int:
    """Return the bytes of tensors, memory that some of them share once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
