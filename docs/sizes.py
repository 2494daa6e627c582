"""Three sizes of model on the same text: what more weights and more tokens do to the loss.

python -m docs.sizes          in the folder where data/pydocs was prepared; half a minute to a minute
"""

import json
import tempfile
from pathlib import Path

from firstwords.dataset import collate, open_train, open_val
from firstwords.loss import evaluate_loss
from firstwords.model import build_model
from firstwords.optimizer import MuonAdamW
from firstwords.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[1]
DATA = Path("data/pydocs")
SHAPES = ((1, 16), (2, 64), (4, 192))  # layers, and numbers in each
SEQ_LEN, BATCH_SIZE = 64, 8
MEASURED = (10, 20, 40, 80)  # steps


def measure_size(layers: int, width: int) -> tuple[int, dict[int, float]]:
    """Train a model of a shape; return its weights, and the val loss by tokens read."""
    tokenizer = load_tokenizer(DATA)
    rows = open_train(DATA, tokenizer, SEQ_LEN, seed=0, assistant_only=False)
    val = open_val(DATA, tokenizer, SEQ_LEN, assistant_only=False)
    shape = json.loads((ROOT / "configs/models/small_test.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shape.json"
        path.write_text(json.dumps({**shape, "n_layer": layers, "n_embd": width}), encoding="utf-8")
        model = build_model(path, tokenizer, seed=0)
    optimizer = MuonAdamW(model, lr=1e-2, weight_decay=0.0)
    losses = {}
    for step in range(max(MEASURED)):
        model(**collate([rows[BATCH_SIZE * step + n] for n in range(BATCH_SIZE)])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 in MEASURED:
            tokens = (step + 1) * BATCH_SIZE * SEQ_LEN
            losses[tokens] = evaluate_loss(model, val, tokenizer, batch_size=32).mean
    return model.num_parameters(), losses


def main() -> None:
    """Print a line for each size."""
    for layers, width in SHAPES:
        weights, losses = measure_size(layers, width)
        line = "   ".join(f"{tokens:,}: {loss:.2f}" for tokens, loss in losses.items())
        print(f"{weights:9,} weights   val loss by tokens   {line}")


if __name__ == "__main__":
    main()
