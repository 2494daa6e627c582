#!/usr/bin/env python
"""Does stage A earn its place? Stage B from its weights and from random ones, over three seeds.

  python -m benchmarks.bench_stage_a --out_dir runs/stage_a

Three arms a seed, with the recipes of run_all.sh: stage A, then stage B from it; stage B from random
weights with the same steps; and stage B from random weights with as many more steps as stage A's time is
worth. Compared is the loss on the assistant's tokens of the val set, at 25 % and at 100 % of the steps.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.record import write_result
from firstwords.checkpoint import list_checkpoints

TEXT, CHAT = "configs/recipes/pydocs_text.yaml", "configs/recipes/pydocs_chat.yaml"


def train(model_dir: Path, recipe: str, *flags: str) -> list[dict]:
    """Run train.py to its end; return the log history of its last checkpoint."""
    command = [sys.executable, "train.py", "--recipe", recipe, "--model_dir", str(model_dir), *flags]
    subprocess.run(command, check=True)
    state = list_checkpoints(model_dir)[0] / "trainer_state.json"
    return json.loads(state.read_text(encoding="utf-8"))["log_history"]


def find_val_losses(history: list[dict], max_steps: int) -> dict[str, float]:
    """Return the val loss nearest to 25 % of the steps, and the last."""
    losses = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    quarter = min(losses, key=lambda step: abs(step - max_steps / 4))
    return {"at_25": losses[quarter], "at_100": losses[max(losses)]}


def measure_seed(out_dir: Path, seed: int, steps: int, more_steps: int) -> dict[str, dict[str, float]]:
    """Train the arms of one seed; return their val losses."""
    seeded = ["--seed", str(seed), "--eval_steps", str(steps // 4)]
    text = out_dir / f"text-{seed}"
    train(text, TEXT, *seeded)
    arms = {
        "from_stage_a": (["--init_model_dir", str(text)], steps),
        "random": (["--cfg", "small_test"], steps),
        "random_equal_time": (["--cfg", "small_test"], more_steps),
    }
    losses = {}
    for arm, (start, max_steps) in arms.items():
        recipe = make_recipe(out_dir)
        flags = [*start, "--max_steps", str(max_steps), *seeded]
        history = train(out_dir / f"{arm}-{seed}", str(recipe), *flags)
        losses[arm] = find_val_losses(history, max_steps)
        print(seed, arm, losses[arm], flush=True)
    return losses


def make_recipe(out_dir: Path) -> Path:
    """Write stage B's recipe without its line that names the weights to start from."""
    lines = Path(CHAT).read_text(encoding="utf-8").splitlines()
    path = out_dir / "chat.yaml"
    path.write_text("\n".join(line for line in lines if not line.startswith("init_model_dir")) + "\n")
    return path


def main() -> None:
    """Measure all seeds and write both rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, required=True, help="of stage B")
    parser.add_argument("--more_steps", type=int, required=True, help="of stage B, with stage A's time")
    args = parser.parse_args()
    args.out_dir.mkdir(parents=True, exist_ok=True)
    seeds = [measure_seed(args.out_dir, seed, args.steps, args.more_steps) for seed in range(args.seeds)]
    for row, rival in (("stage_a_gain", "random"), ("stage_a_gain_equal_time", "random_equal_time")):
        gains = sorted(losses[rival]["at_100"] - losses["from_stage_a"]["at_100"] for losses in seeds)
        result = {"median": statistics.median(gains), "low": gains[0], "high": gains[-1], "seeds": seeds}
        write_result(row, result, {"steps": args.steps, "more_steps": args.more_steps})


if __name__ == "__main__":
    main()
