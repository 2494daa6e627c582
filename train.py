#!/usr/bin/env python
"""Train a GPT-2 style model: stage A on plain text, stage B on conversations.

  python train.py --data_dir data/text --model_dir runs/base --cfg small_test --no_assistant_only_loss \\
      --seq_len 256 --batch_size 16 --max_steps 1000
  python train.py --data_dir data/chat --model_dir runs/chat --init_model_dir runs/base \\
      --seq_len 256 --batch_size 16 --max_steps 2000

The same command again goes on from the last checkpoint. Ctrl-C or SIGTERM saves first (exit 75).
A NaN stops the run before it spoils anything (exit 70); --on_nan rollback goes back and leaves its batch out.
"""

import gc
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError

from firstwords import atomic
from firstwords.args import (
    TrainFlags,
    check_flags,
    check_given,
    find_origins,
    parse_train_args,
    print_line,
    run_main,
)
from firstwords.errors import BadBatch, Damaged
from firstwords.ranks import Ranks, join_ranks
from firstwords.signals import StopWish


def main(argv: list[str]) -> None:
    """Meet the other processes of the run, parse the flags, take the lock of the run, train; or only tell."""
    with join_ranks() as ranks:
        flags, extra = parse_train_args(argv, __doc__)
        check_flags(flags)
        origins = find_origins(argv)
        check_given(flags, origins)
        if flags.preflight or flags.explain:
            describe_run(flags, extra, origins, ranks)
            return
        wish = StopWish(flags.model_dir, is_shared=ranks.size > 1)
        with hold_folder(flags.model_dir) if ranks.is_first else nullcontext():
            train_and_go_back(flags, extra, wish, ranks)


@contextmanager
def hold_folder(model_dir: Path) -> Iterator[None]:
    """Hold the lock of the run; of one that ends before it has written anything nothing is left."""
    is_new = not model_dir.exists()
    with atomic.lock_folder(model_dir):
        atomic.sweep_leftovers(model_dir)
        try:
            yield
        except BaseException:
            if is_new and [path.name for path in model_dir.iterdir()] == [".lock"]:
                shutil.rmtree(model_dir)
            raise


def train_and_go_back(flags: TrainFlags, extra: dict, wish: StopWish, ranks: Ranks) -> None:
    """Train; with `--on_nan rollback` go back for each batch that breaks a step, and leave it out.

    What was left out stands in the manifest of every checkpoint from then on. A run that is killed before
    the first of them meets the same batch again, and ends in the same bytes.

    Raises:
        BadBatch: when that may not be done, or not once more.
        Stopped: when a signal ended the start-up, whatever a library made of it.
    """
    skipped = ()
    while True:
        try:
            train(flags, extra, wish, ranks, skipped)
            return
        except BadBatch as error:
            if flags.on_nan == "stop" or len(error.skipped) > flags.max_rollbacks:
                raise
            skipped = error.skipped
            if ranks.is_first:
                warn(f"rollback {len(skipped)} of {flags.max_rollbacks}: {error}")
        except Exception:
            wish.check_startup()
            raise
        gc.collect()  # two models would not fit


def train(flags: TrainFlags, extra: dict, wish: StopWish, ranks: Ranks, skipped: tuple[int, ...]) -> None:
    """Open everything, train, and end with the finished model in the run folder.

    Args:
        flags: ours.
        extra: fields of `TrainingArguments` beside them.
        wish: ends the start-up, and later asks for a save.
        ranks: this process among those of the run; the first looks after the folder.
        skipped: batches to leave out, beside those that the checkpoint names.
    """
    # Here, as in `describe_run`: they bring torch, and --help answers without it.
    from firstwords import checkpoint, opening, preflight, resume
    from firstwords.callbacks import add_callbacks

    opened = opening.open_run(flags, extra, ranks, say)
    meta, pace = resume.build_meta(flags, extra, opened), resume.build_pace(flags, opened.max_steps)
    resumed = resume.share_resumed(flags, meta.fixed, pace, ranks, warn)
    first_step = checkpoint.read_step(resumed)
    if first_step >= pace.find_end(first_step):
        if ranks.is_first:
            resume.close_run(flags.model_dir, resumed)
            say(f"{flags.model_dir}: finished at step {first_step}; nothing to do")
        return
    if ranks.is_first:
        preflight.check_disk(flags.model_dir, **preflight.count_saves(flags, opened))
    forecast = preflight.build_forecast(flags, opened, meta, pace, first_step)
    options = {"skipped": skipped or resume.read_skipped(resumed), "pace": pace, "wish": wish}
    with preflight.tell_memory(flags, opened.room, forecast, say):
        run = opening.build_run(flags, extra, opened, meta, ranks, **options)
    log = add_callbacks(run, flags, first_step=first_step)
    if log is not None:
        preflight.announce(run, flags, forecast, resumed, log.say)
    wish.check_startup()
    wish.defer()
    try:
        with preflight.tell_memory(flags, opened.room, forecast, lambda line: log and log.say(line)):
            run.train(resume_from_checkpoint=str(resumed) if resumed else None)
            resume.finish_run(run, flags.model_dir, log)
    except UnpicklingError:
        raise Damaged(
            f"{resumed}: its state holds other things than numbers, and is not loaded; begin anew with "
            f"--init_model_dir {resumed}"
        ) from None
    finally:
        if log is not None:
            log.close()


def describe_run(flags: TrainFlags, extra: dict, origins: dict[str, str], ranks: Ranks) -> None:
    """Print `--explain`, `--preflight` or both; nothing is trained but by a probe, nothing is left behind."""
    from firstwords import opening, preflight, resume
    from firstwords.explain import explain, mark_choices

    origins = mark_choices(flags, origins)
    opened = opening.open_run(flags, extra, ranks, say)
    meta = resume.build_meta(flags, extra, opened)
    if flags.explain:
        for line in explain(flags, extra, origins, opened, meta):
            say(line)
    if flags.preflight:
        pace, done = resume.read_progress(flags, opened.max_steps)
        preflight.check_disk(flags.model_dir, **preflight.count_saves(flags, opened))
        forecast = preflight.build_forecast(flags, opened, meta, pace, done)
        with preflight.tell_memory(flags, opened.room, forecast, say):
            forecast = replace(forecast, speed=preflight.probe_run(flags, extra, opened, meta, ranks))
        say(f"{flags.model_dir}: nothing was trained; a run would take")
        for line in preflight.format_table(forecast):
            say(line)


def say(line: str) -> None:
    """Print what a person wants to know."""
    print_line(line, sys.stdout)


def warn(line: str) -> None:
    """Print what did not go as it should."""
    print_line(line, sys.stderr)


if __name__ == "__main__":
    run_main(main)
