"""What ends a run -> its last step, and the learning rate on the way there.

    pace = Pace(5000, decay_steps=0.2)
    rate = pace.bend(cosine)                       # a function of the step, as LambdaLR takes it

A run ends at the step that its flags name; or when `--hours` are over, with the schedule laid out over them;
or after a cooldown that was asked for (`touch runs/base/COOLDOWN`): a straight line from the rate of that
moment to the schedule's end. Invariant: without `--hours` nothing here reads a clock; and a cooldown, once
begun, is three numbers that stand in every checkpoint: resumed, it ends in the same bytes.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import TrainerCallback

from firstwords.signals import COOLDOWN, StopWish

# A schedule over hours is laid out over as many steps as no run takes, and followed by the clock.
HORIZON = 10**9


@dataclass(frozen=True)
class Cooldown:
    """The end of a run: from step `begin` on the rate falls for `steps` steps.

    Attributes:
        top: the rate at `begin`, as a share of the highest.
    """

    begin: int
    steps: int
    top: float

    @property
    def end(self) -> int:
        """The last step of the run."""
        return self.begin + self.steps


class Pace:
    """How far a run has come, and what is left of it.

    Args:
        max_steps: optimizer steps that the flags name; `HORIZON` with `hours`.
        decay_steps: of a cooldown; below 1 a share of the steps before it.
        min_lr_ratio: where a cooldown ends, as a share of the highest rate.
        hours: of training in all, None where steps count.
        hours_spent: by earlier lives of the run.
        cooldown: one that an earlier life has begun.
    """

    def __init__(
        self,
        max_steps: int,
        *,
        decay_steps: float = 0.2,
        min_lr_ratio: float = 0.0,
        hours: float | None = None,
        hours_spent: float = 0.0,
        cooldown: Cooldown | None = None,
    ):
        self.max_steps, self.decay_steps, self.min_lr_ratio = max_steps, decay_steps, min_lr_ratio
        self.hours, self.hours_spent, self.cooldown = hours, hours_spent, cooldown
        self._last_look: float | None = None
        self._base: Callable[[int], float] | None = None

    def look_at_clock(self) -> float:
        """Return the hours since the last look, for `spend`; the first look, and without `hours` any, 0."""
        if self.hours is None:
            return 0.0
        last, self._last_look = self._last_look, time.monotonic()
        return 0.0 if last is None else (self._last_look - last) / 3600

    def spend(self, hours: float) -> None:
        """Count hours of training: by the clock of one process, or each would train at a rate of its own."""
        self.hours_spent += hours

    def find_end(self, step: int) -> int:
        """Return the last step of the run, seen from `step`; by the clock an estimate until it is reached."""
        if self.cooldown is not None:
            return self.cooldown.end
        if self.hours is None:
            return self.max_steps
        share = self.hours_spent / self.hours
        if share >= 1:
            return step
        return max(step + 1, round(step / share)) if share else self.max_steps

    def bend(self, base: Callable[[int], float]) -> Callable[[int], float]:
        """Return the schedule `base`, step -> share of the highest rate, as this run follows it."""
        self._base = base
        return lambda step: self.find_rate(step)

    def find_rate(self, step: int) -> float:
        """Return the rate after `step` steps, as a share of the highest."""
        cooldown = self.cooldown
        if cooldown is not None and step >= cooldown.begin:
            left = max(0, cooldown.end - step) / cooldown.steps
            return self.min_lr_ratio + (cooldown.top - self.min_lr_ratio) * left
        if self.hours is None:
            return self._base(step)
        return self._base(round(min(1.0, self.hours_spent / self.hours) * HORIZON))

    def begin_cooldown(self, step: int) -> Cooldown:
        """Let the rate fall from `step` on, over `decay_steps`, and never beyond the end there was."""
        steps = self.decay_steps if self.decay_steps >= 1 else self.decay_steps * step
        steps = min(max(1, round(steps)), self.find_end(step) - step)
        self.cooldown = Cooldown(step, steps, self.find_rate(step))
        return self.cooldown

    def describe(self) -> dict:
        """Return what a checkpoint has to say of it, for `resume`."""
        # To the last digit: rounded down, a run that has spent all its hours would go on for another step.
        spent = {} if self.hours is None else {"hours_spent": self.hours_spent}
        return spent if self.cooldown is None else spent | {"cooldown": asdict(self.cooldown)}

    def resume(self, manifest: dict) -> None:
        """Go on where the checkpoint of this manifest left off."""
        self.hours_spent = manifest.get("hours_spent", 0.0)
        if "cooldown" in manifest:
            self.cooldown = Cooldown(**manifest["cooldown"])


class KeepPace(TrainerCallback):
    """Tell Trainer the last step, and begin a cooldown when `touch <run>/COOLDOWN` asks for one.

    Args:
        pace: of the run; its clock is looked at by `trainer.RunTrainer`, once in a step.
        run_dir: where the file is.
        wish: knows whether it is there.
        say: takes a line for the log.
    """

    def __init__(self, pace: Pace, run_dir: Path, wish: StopWish, say: Callable[[str], None]):
        self.pace, self.path, self.wish, self.say = pace, run_dir / COOLDOWN, wish, say

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the clock of this life of the run."""
        self.pace.look_at_clock()
        state.max_steps = self.pace.find_end(state.global_step)

    def on_optimizer_step(self, args, state, control, **kwargs):
        """Look how far the run has come, just before the schedule is asked for the next rate."""
        state.max_steps = self.pace.find_end(state.global_step + 1)

    def on_step_end(self, args, state, control, **kwargs):
        """Begin what the file asks for, and save, so that a kill cannot undo it."""
        is_asked = COOLDOWN in self.wish.found and self.pace.cooldown is None
        if is_asked and state.global_step < state.max_steps:
            cooldown = self.pace.begin_cooldown(state.global_step)
            state.max_steps = cooldown.end
            control.should_save = True
            self.say(f"{COOLDOWN}: the rate falls from here on, the run ends at step {cooldown.end}")
        return control

    def on_save(self, args, state, control, **kwargs):
        """Take the file away when a checkpoint says what it said; not after a save that failed."""
        is_saved = (self.path.parent / f"checkpoint-{state.global_step}").is_dir()
        if self.pace.cooldown is not None and state.is_world_process_zero and is_saved:
            self.path.unlink(missing_ok=True)


def format_seconds(seconds: float) -> str:
    """Return a length of time for people: `2d03h`, `3h20m`, `4m05s`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
