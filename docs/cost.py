"""What a training costs in hours and money, on paper, from rates that others published.

    python -m docs.cost

No rate here was measured by us. One that was published for another shape is scaled by the operations that a
token needs, which flatters the larger model a little. Prices change weekly: put in your own.
"""

import json
from dataclasses import dataclass
from pathlib import Path

CONFIGS = Path(__file__).parent.parent / "configs" / "models"
VOCAB_SIZE = 50_304  # GPT-2's, padded
HOUR = 3600

# Stage A: as many tokens as are best for the work (20 per weight), and as many as llm.c gave it.
RUNS = (
    ("baseline_124m", 2.5e9),
    ("baseline_124m", 10e9),
    ("baseline_355m", 7.1e9),
    ("baseline_355m", 31.5e9),
)


@dataclass(frozen=True)
class Machine:
    """A machine: what it did, by whom, and what an hour of it costs.

    Attributes:
        name: of the GPUs.
        rate: tokens a second, of all GPUs together.
        shape: the model that the rate was published for.
        dollars: an hour.
    """

    name: str
    rate: float
    shape: str
    dollars: float


# The sources of each are in the tutorial, by name.
MACHINES = (
    Machine("4060 Ti", 14e3, "baseline_355m", 0.25 * 0.30),
    Machine("4090", 106e3, "baseline_124m", 0.60),
    Machine("H100", 188e3, "baseline_355m", 2.79),
    Machine("8 x H100", 8 * 188e3, "baseline_355m", 22.32),
)


def count_operations(shape: str) -> float:
    """Return the operations that training does for a token: 6 a weight, and those of causal attention.

    The way of counting is that of llm.c's `gpt2_estimate_mfu`.
    """
    config = json.loads((CONFIGS / f"{shape}.json").read_text(encoding="utf-8"))
    layers, width, context = config["n_layer"], config["n_embd"], config["n_positions"]
    # A layer has 12 d*d in matrices and 13 d in biases and norms; then the last norm, and both embeddings.
    weights = layers * (12 * width**2 + 13 * width) + 2 * width + (VOCAB_SIZE + context) * width
    return 6 * weights + 6 * layers * width * context


def count_hours(machine: Machine, shape: str, tokens: float) -> float:
    """Return the hours that `tokens` of a shape take on a machine."""
    rate = machine.rate * count_operations(machine.shape) / count_operations(shape)
    return tokens / rate / HOUR


def main() -> None:
    """Print a line for each machine, with hours and dollars of each run."""
    runs = [f"{shape.removeprefix('baseline_')}, {tokens / 1e9:g}B" for shape, tokens in RUNS]
    print(f"{'':9}" + "".join(f"{run:>20}" for run in runs))
    for machine in MACHINES:
        hours = [count_hours(machine, *run) for run in RUNS]
        cells = [f"{hour:,.{int(hour < 10)}f} h, ${hour * machine.dollars:,.0f}" for hour in hours]
        print(f"{machine.name:9}" + "".join(f"{cell:>20}" for cell in cells))


if __name__ == "__main__":
    main()
