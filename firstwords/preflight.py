"""A run that is to begin -> what it will take, and a refusal now of what it could not do in the end.

    forecast = build_forecast(flags, opened, meta, pace, steps_done=0)
    format_table(forecast)          -> lines: parameters, memory, steps, time, disk, epochs
    check_disk(Path("runs/chat"), num_checkpoints=3, model_bytes=498_000_000, state_bytes=995_000_000)

Invariant: nothing is written and no weight of the run is touched. What is needed is counted from shapes; only
`probe_run` trains, on a trainer that is thrown away.
"""

import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import OutOfMemoryError
from torch.utils.data import Subset
from transformers import TrainerCallback

from firstwords import checkpoint, tokenstore
from firstwords.args import TrainFlags
from firstwords.dataset import MANY_EPOCHS
from firstwords.errors import IOFailed, OutOfMemory
from firstwords.fit import Limit, Room, Setting, describe_memory, format_gb
from firstwords.loss import evaluate_loss
from firstwords.memory import Memory, count_state_bytes
from firstwords.model import explain_device
from firstwords.opening import Opened, build_run
from firstwords.pace import Pace, format_seconds
from firstwords.ranks import Ranks
from firstwords.signals import StopWish
from firstwords.trainer import RunMeta, RunTrainer, find_eval_steps

# Beside the weights and the optimizer's state: tokenizer, logs, and what the file system takes for itself.
MARGIN, SMALL_FILES = 1.02, 16 << 20
# Steps of a probe, and those before them that warm up: buffers, kernels, the processor's clock.
PROBED, WARM_UP = 10, 2
PROBED_BATCHES = 4


@dataclass(frozen=True)
class Speed:
    """Seconds of an optimizer step, and of reading the val set once."""

    step: float
    evaluation: float


@dataclass(frozen=True)
class Forecast:
    """What a run is going to take.

    Attributes:
        parameters: of the model.
        memory: at its worst, predicted.
        limit: that it has to keep to.
        setting: micro-batch, accumulation, recomputation.
        steps: optimizer steps in all; None when hours count.
        steps_done: by earlier lives of the run.
        hours: of training that are left, None when steps count.
        tokens_per_step: real tokens, padding not counted.
        tokens_per_epoch: of the training data.
        kind: of the data, `text` or `conversations`.
        eval_steps: steps between evaluations, 0 without any.
        checkpoint_bytes: of one.
        disk_bytes: of all that lie there at the same time.
        disk_free: bytes.
        speed: what a probe measured, None without one.
    """

    parameters: int
    memory: Memory
    limit: Limit
    setting: Setting
    steps: int | None
    steps_done: int
    hours: float | None
    tokens_per_step: float
    tokens_per_epoch: float
    kind: str
    eval_steps: int
    checkpoint_bytes: int
    disk_bytes: int
    disk_free: int
    speed: Speed | None = None

    @property
    def steps_left(self) -> int | None:
        """Steps to the end of the run; by the clock those that the probe's speed makes of the hours."""
        if self.steps is not None:
            return self.steps - self.steps_done
        return round(self.hours * 3600 / self._seconds_per_step) if self.speed else None

    @property
    def seconds_left(self) -> float | None:
        """Time to the end, evaluations of the val loss included; None without a probe."""
        if self.speed is None or self.hours is not None:
            return None if self.speed is None else self.hours * 3600
        evaluations = -(-self.steps_left // self.eval_steps) if self.eval_steps else 0
        return self.steps_left * self.speed.step + evaluations * self.speed.evaluation

    @property
    def _seconds_per_step(self) -> float:
        return self.speed.step + (self.speed.evaluation / self.eval_steps if self.eval_steps else 0)

    @property
    def epochs(self) -> float | None:
        """Passes over the data of the whole run; None when the number of steps is not known."""
        if self.steps_left is None:
            return None
        return (self.steps_done + self.steps_left) * self.tokens_per_step / self.tokens_per_epoch


def build_forecast(flags: TrainFlags, opened: Opened, meta: RunMeta, pace: Pace, steps_done: int) -> Forecast:
    """Return what the run will take, but for the speed; `pace` knows what ends it, also of a cooldown."""
    saves = count_saves(flags, opened)
    by_clock = pace.hours is not None and pace.cooldown is None
    return Forecast(
        parameters=opened.model.num_parameters(),
        memory=opened.room.predict(opened.room.setting),
        limit=opened.room.limit,
        setting=opened.room.setting,
        steps=None if by_clock else pace.find_end(steps_done),
        steps_done=steps_done,
        hours=max(0.0, pace.hours - pace.hours_spent) if by_clock else None,
        tokens_per_step=meta.tokens_per_step,
        tokens_per_epoch=opened.tokens_per_epoch,
        kind="text" if tokenstore.is_store(flags.data_dir) else "conversations",
        eval_steps=find_eval_steps(flags),
        checkpoint_bytes=saves["model_bytes"] + saves["state_bytes"],
        disk_bytes=count_disk_bytes(**saves),
        disk_free=find_free_disk(flags.model_dir),
    )


# --- what is said of it


def announce(
    run: RunTrainer,
    flags: TrainFlags,
    forecast: Forecast,
    resumed: Path | None,
    say: Callable[[str], None],
) -> None:
    """Say before the first step what a run is, and when some are done how fast they were."""
    for line in format_run(run, flags, forecast):
        say(line)
    if resumed:
        say(f"going on from {resumed}")
    for line in format_short(forecast):
        say(line)

    def say_pace(seconds, state, control):
        say(format_pace(forecast, seconds, state.max_steps - state.global_step))
        if forecast.steps is None:  # only now is it known how often hours read the data
            for line in format_epochs(replace(forecast, speed=Speed(seconds, 0.0))):
                say(line)

    run.add_callback(Probe(say_pace))


def format_run(run: RunTrainer, flags: TrainFlags, forecast: Forecast) -> list[str]:
    """Return what a run is: its size, its device, its steps and data."""
    data, arguments = run.train_dataset, run.args
    how = ", bf16" if arguments.bf16 else ""
    how += f" in {arguments.world_size} processes" if arguments.world_size > 1 else ""
    by_clock = forecast.steps is None
    steps = f"{forecast.hours:.4g} hours, steps" if by_clock else f"{forecast.steps} steps"
    epochs = "" if by_clock else f"{forecast.epochs:.2f} epochs of "
    lines = [
        f"{flags.model_dir}: {run.model.num_parameters():,} parameters on {arguments.device.type}"
        f"{explain_device(arguments.device.type)}{how}; {steps} of "
        f"{run.meta.tokens_per_step:,.0f} tokens, {epochs}{data.rows_per_epoch:,} rows"
    ]
    if getattr(data, "num_overlong", 0):
        lines.append(
            f"{data.num_overlong} conversations are longer than --seq_len {flags.seq_len}: "
            f"--overlong {flags.overlong} costs {data.dropped_tokens:,} tokens"
        )
    return lines


def format_table(forecast: Forecast) -> list[str]:
    """Return the preflight as lines for a person."""
    lines = [
        f"  parameters  {forecast.parameters:,}",
        f"  memory      {_format_memory(forecast)}",
        f"  a step      {forecast.tokens_per_step:,.0f} tokens; {forecast.setting}",
    ]
    if forecast.steps_left is not None:
        lines.append(f"  steps       {_format_steps(forecast)}")
    if forecast.speed is not None:
        lines.append(f"  speed       {_format_speed(forecast)}")
        lines.append(
            f"  time        {format_seconds(forecast.seconds_left)} to the end, but for saves and samples"
        )
    lines.append(f"  disk        {_format_disk(forecast)}")
    if forecast.epochs is not None:
        lines.append(f"  data        {_format_data(forecast)}")
    return lines + warn_epochs(forecast)


def format_short(forecast: Forecast) -> list[str]:
    """Return what is said before every run: the table without what takes a probe."""
    lines = [f"  memory: {_format_memory(forecast)}", f"  disk: {_format_disk(forecast)}"]
    return lines + format_epochs(forecast)


def format_epochs(forecast: Forecast) -> list[str]:
    """Return how often the data are read, and whether that is too often; nothing while that is not known."""
    data = [f"  data: {_format_data(forecast)}"] if forecast.epochs is not None else []
    return data + warn_epochs(forecast)


def format_pace(forecast: Forecast, seconds: float, steps_left: int) -> str:
    """Return how fast the first steps of a run were, and how long the rest will take."""
    left = format_seconds(seconds * steps_left)
    ends = f"the end is {left} away" if forecast.hours is None else f"{forecast.hours:.4g} hours"
    return f"  speed: {1 / seconds:.3g} steps/s, {ends}, evaluations, saves and samples not counted"


def warn_epochs(forecast: Forecast) -> list[str]:
    """Return a plain warning when the data would be read more often than that teaches; else nothing."""
    if forecast.epochs is None or forecast.epochs <= MANY_EPOCHS[forecast.kind]:
        return []
    why = {
        "text": "up to 4 times it teaches nearly as much as new text would (Muennighoff et al. 2023), then "
        "less and less",
        "conversations": "3 to 5 times are usual; dozens of times, and the answers are known by heart while "
        "new questions are answered worse",
    }[forecast.kind]
    steps = max(1, round(3 * forecast.tokens_per_epoch / forecast.tokens_per_step))
    return [
        f"  warning: the same {forecast.kind} would be read {forecast.epochs:.0f} times. {why[0].upper()}"
        f"{why[1:]}. Prepare more, or stop sooner: 3 times are --max_steps {steps}"
    ]


def _format_memory(forecast: Forecast) -> str:
    limit = forecast.limit
    return f"{describe_memory(forecast.memory)} of {format_gb(limit.num_bytes)} GB {limit.whose}"


def _format_steps(forecast: Forecast) -> str:
    if forecast.steps is None:
        before = f" after {forecast.steps_done:,}" if forecast.steps_done else ""
        return f"about {forecast.steps_left:,} in {forecast.hours:.4g} hours{before}"
    done = f", {forecast.steps_done:,} of them done" if forecast.steps_done else ""
    return f"{forecast.steps:,}{done}"


def _format_speed(forecast: Forecast) -> str:
    step, evaluation = forecast.speed.step, ""
    if forecast.eval_steps:
        evaluation = f"; val loss {forecast.speed.evaluation:.3g} s every {forecast.eval_steps} steps"
    return f"{1 / step:.3g} steps/s, {forecast.tokens_per_step / step:,.0f} tokens/s{evaluation}"


def _format_disk(forecast: Forecast) -> str:
    each = format_gb(forecast.checkpoint_bytes)
    total, free = format_gb(forecast.disk_bytes), format_gb(forecast.disk_free)
    return f"{total} GB in checkpoints of {each} GB, of {free} GB free"


def _format_data(forecast: Forecast) -> str:
    tokens = forecast.epochs * forecast.tokens_per_epoch
    return (
        f"{tokens:,.0f} tokens, {tokens / forecast.parameters:.3g} for each parameter (about 20 use the "
        f"compute best, Hoffmann et al. 2022), {forecast.epochs:.3g} epochs of "
        f"{forecast.tokens_per_epoch:,.0f}"
    )


# --- what a step and an evaluation take


class Probe(TrainerCallback):
    """Take the time of the first steps, from the end of one to the end of the next; stands behind all others.

    Evaluations and saves lie between two steps and are left out, loading the rows is not.

    Args:
        tell: called once, with the mean seconds of `PROBED` steps behind `WARM_UP`, and with Trainer's
            state and control.
    """

    def __init__(self, tell: Callable):
        self.tell, self.seconds, self._mark = tell, [], None

    def on_step_end(self, args, state, control, **kwargs):
        """Note the time of the step."""
        now = time.monotonic()
        if len(self.seconds) < WARM_UP + PROBED:
            self.seconds.append(now - self._mark)
            if len(self.seconds) == WARM_UP + PROBED:
                self.tell(self.mean, state, control)
        self._mark = time.monotonic()
        return control

    def on_event(self, args, state, control, **kwargs):
        """Begin the next step's time here."""
        self._mark = time.monotonic()

    on_train_begin = on_log = on_evaluate = on_save = on_event

    @property
    def mean(self) -> float:
        """Seconds of a step, the first ones left out where there are others."""
        kept = self.seconds[WARM_UP:] or self.seconds
        return sum(kept) / len(kept)


def probe_run(flags: TrainFlags, extra: dict, opened: Opened, meta: RunMeta, ranks: Ranks) -> Speed:
    """Return the speed of ten steps of this very run, in a folder that goes away."""
    without = {"save_strategy": "no", "eval_strategy": "no"}
    with TemporaryDirectory() as folder:
        wish = StopWish(flags.model_dir, is_shared=True) if ranks.size > 1 else None
        there = replace(flags, model_dir=Path(folder))
        return measure_speed(build_run(there, extra | without, opened, meta, ranks, wish=wish))


def measure_speed(run: RunTrainer) -> Speed:
    """Train ten steps and read a part of the val set; the trainer is of no use afterwards.

    Args:
        run: one that neither saves nor evaluates.
    """

    def stop(seconds, state, control):
        control.should_training_stop = True

    probe = Probe(stop)
    run.add_callback(probe)
    run.train()
    model, places = run.find_whole_model()
    batch = run.args.per_device_eval_batch_size
    part = Subset(run.eval_dataset, places[: PROBED_BATCHES * batch])
    if not len(part):  # the other processes read them
        return Speed(probe.mean, 0.0)
    begin = time.monotonic()
    evaluate_loss(model, part, run.tokenizer, batch_size=batch, bf16=run.args.bf16)
    return Speed(probe.mean, (time.monotonic() - begin) * len(places) / len(part))


# --- what cannot be done


def count_saves(flags: TrainFlags, opened: Opened) -> dict[str, int]:
    """Return how many checkpoints lie on the disk at the same time, and their bytes."""
    model_bytes, num_saves = 4 * opened.model.num_parameters(), -(-opened.max_steps // flags.save_steps)
    state_bytes = count_state_bytes(opened.model.config, flags.optim)
    return {
        "num_checkpoints": min(flags.save_total_limit + 1, num_saves),
        "model_bytes": model_bytes,
        # Trainer goes on with FSDP from weights of its own beside the model.
        "state_bytes": state_bytes + model_bytes * opened.room.is_sharded,
    }


def count_disk_bytes(num_checkpoints: int, model_bytes: int, state_bytes: int) -> int:
    """Return the bytes of a run's folder; at the end the weights lie beside the checkpoints once more."""
    return int((num_checkpoints * (model_bytes + state_bytes) + model_bytes) * MARGIN) + SMALL_FILES


def find_free_disk(run_dir: Path) -> int:
    """Return the bytes that are free where the run is, or will be."""
    there = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.is_dir())
    return shutil.disk_usage(there).free


def check_disk(run_dir: Path, *, num_checkpoints: int, model_bytes: int, state_bytes: int) -> None:
    """Refuse a run whose checkpoints would not find room.

    Args:
        run_dir: the run; what its checkpoints take already counts as room.
        num_checkpoints: that lie on the disk at the same time at most, one being written among them.
        model_bytes: of the weights in a checkpoint.
        state_bytes: of the optimizer's state.

    Raises:
        IOFailed: stating the bytes, when the disk or a limit on the size of files is too small.
    """
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    largest = max(model_bytes, state_bytes)
    if limit != resource.RLIM_INFINITY and limit < largest:
        raise IOFailed(
            f"--model_dir {run_dir}: a file of {largest:,} bytes will be saved there, and this process may "
            f"write {limit:,} (ulimit -f); raise that"
        )
    needed = count_disk_bytes(num_checkpoints, model_bytes, state_bytes)
    present = sum(
        path.stat().st_size for folder in checkpoint.list_checkpoints(run_dir) for path in folder.iterdir()
    )
    free = find_free_disk(run_dir)
    if free + present < needed:
        raise IOFailed(
            f"--model_dir {run_dir}: {num_checkpoints} checkpoints and the model need {needed - present:,} "
            f"bytes more, and {free:,} are free; free some, name a folder on another disk, or lower "
            "--save_total_limit"
        )


@contextmanager
def tell_memory(
    flags: TrainFlags, room: Room, forecast: Forecast, say: Callable[[str], None]
) -> Iterator[None]:
    """Where memory runs out, say what takes it, and name a setting that takes less.

    Raises:
        OutOfMemory: instead of what torch or Python raised.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        for line in format_table(forecast):
            say(line)
        advice, saved = room.advise_less(), ""
        if advice.changes and checkpoint.list_checkpoints(flags.model_dir):
            allowed = ",".join(advice.changes)
            saved = f". What was saved is there, and is gone on from with --allow_change {allowed}"
        raise OutOfMemory(
            f"{room.setting} with --seq_len {flags.seq_len}: there was no memory left; {advice.text}{saved}"
        ) from None


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether a GPU or the machine had no memory left; torch has a class for its own allocator alone."""
    # Of a CPU; of CUDA's runtime, NCCL and Apple's GPU; of cuBLAS.
    signs = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    is_of_kind = isinstance(error, OutOfMemoryError | MemoryError)
    return is_of_kind or any(sign in str(error) for sign in signs)
