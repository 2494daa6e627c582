"""A used run folder -> the checkpoint to go on from, or why what is asked for is another run.

    meta = build_meta(flags, {}, opened)                       # what every manifest of the run says
    resumed = share_resumed(flags, meta.fixed, pace, ranks, print)
    ->  Path("runs/chat/checkpoint-400"), None for a fresh run

Invariant: a run goes on with the flags, data and versions that it was begun with, but for what changes no
step and what `--allow_change` names; so it ends in the same bytes as one in one piece.
"""

import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from firstwords import checkpoint
from firstwords.args import CHOSEN_BY_TOKENS, TrainFlags
from firstwords.errors import CannotCreate, Mismatch, MissingInput, Stopped
from firstwords.log import RunLog
from firstwords.model import CONFIG_KEYS
from firstwords.opening import Opened
from firstwords.pace import Pace
from firstwords.prep import find_report
from firstwords.ranks import Ranks
from firstwords.signals import COOLDOWN, STOP
from firstwords.trainer import RunMeta, RunTrainer, rows_per_step

# Flags that do not change what is computed at a step, so that a resumed run may change them.
FREE_FLAGS = {
    *("data_dir", "model_dir", "init_model_dir", "recipe", "resume", "allow_change", "debug", "device"),
    *("cfg", "tokenizer", "log_steps", "save_steps", "eval_steps", "save_total_limit"),
    *("sample_prompts", "epochs", "max_steps", "keep_text", "eval_tasks", "hellaswag_data", "report_to"),
    *("on_nan", "max_rollbacks", "attention", "recompute", "vram_gb", "preflight", "explain"),
}
# Packages of which another version may compute another number.
PACKAGES = ("torch", "transformers", "accelerate", "tokenizers")


def build_meta(flags: TrainFlags, extra: dict, opened: Opened) -> RunMeta:
    """Return what every manifest of the run says; `compare` in it is what resuming holds fast."""
    tokenizer, train_set, parent = opened.tokenizer, opened.train_set, opened.parent
    versions = {name: version(name) for name in PACKAGES}
    fixed = {
        "format": "firstwords-checkpoint-1",
        "longest_row": max(train_set.longest_row, parent.get("longest_row", 0)),
        "tokenizer_hash": tokenizer.hash,
        "data_dir": str(flags.data_dir),
        "sources": find_report(flags.data_dir).get("sources", []),
        "flags": {name: str(value) for name, value in vars(flags).items() if value is not None} | extra,
        "compare": list_held(flags, extra, opened) | versions,
        "parent": {"from": flags.init_model_dir, **parent} if parent else None,
        "versions": {"python": platform.python_version()} | versions,
    }
    fixed["flags"].pop("model_dir")
    return RunMeta(fixed, rows_per_step(flags) * train_set.tokens_per_row, flags.save_total_limit)


def list_held(flags: TrainFlags, extra: dict, opened: Opened) -> dict[str, str]:
    """Return what makes the run this one and no other: what resuming holds fast, but for the versions."""
    # What `--batch_tokens` chooses by the memory that is there leaves the steps the same.
    free = FREE_FLAGS if flags.batch_tokens is None else FREE_FLAGS | set(CHOSEN_BY_TOKENS)
    held = {k: v for k, v in vars(flags).items() if k not in free} | extra
    held["shape"] = {key: getattr(opened.model.config, key) for key in CONFIG_KEYS}
    return {
        **{name: str(value) for name, value in sorted(held.items())},
        "max_steps": str(opened.max_steps),
        "data": opened.train_set.hash,
        "val_data": opened.val_set.hash,
        "tokenizer": opened.tokenizer.hash,
        "init_weights": opened.parent.get("weights", "random"),
        **({"fsdp": "True"} if opened.room.is_sharded else {}),  # its checkpoints hold other files
    }


def build_pace(flags: TrainFlags, max_steps: int) -> Pace:
    """Return what ends the run, by its flags."""
    return Pace(max_steps, decay_steps=flags.decay_steps, min_lr_ratio=flags.min_lr_ratio, hours=flags.hours)


def read_progress(flags: TrainFlags, max_steps: int) -> tuple[Pace, int]:
    """Return what ends the run, and how many steps its newest checkpoint has; nothing is verified."""
    pace = build_pace(flags, max_steps)
    for manifest in checkpoint.read_manifests(flags.model_dir)[:1]:
        pace.resume(manifest)
        return pace, manifest["step"]
    return pace, 0


def share_resumed(
    flags: TrainFlags, fixed: dict, pace: Pace, ranks: Ranks, warn: Callable[[str], None]
) -> Path | None:
    """Return what the first process finds to go on from; see `find_resumed`.

    Raises:
        MissingInput: when it is on another machine's disk.
    """

    def find() -> str | None:
        folder = find_resumed(flags, fixed, pace, warn)
        return str(folder) if folder else None

    found = ranks.ask_first(find)
    if found and not Path(found).is_dir():
        raise MissingInput(
            f"{found}: process {ranks.rank} on {platform.node()} does not see it; put --model_dir on a disk "
            "that all machines share"
        )
    if not found:
        return None
    pace.resume(checkpoint.read_manifest(Path(found)))
    return Path(found)


def find_resumed(flags: TrainFlags, fixed: dict, pace: Pace, warn: Callable[[str], None]) -> Path | None:
    """Return the checkpoint to go on from, whose place in the run `pace` takes, or None for a fresh run.

    Args:
        flags: ours.
        fixed: of the run as it is asked for, from `build_meta`.
        pace: of the run.
        warn: takes a line for each checkpoint that was passed over.

    Raises:
        CannotCreate: when the folder is used and `--resume no` was given.
        Mismatch: when flags or data are not those of the run, or a finished run is asked for more.
        Damaged: when checkpoints are there and none is whole.
    """
    used = checkpoint.is_complete(flags.model_dir) or checkpoint.list_checkpoints(flags.model_dir)
    if used and flags.resume == "no":
        raise CannotCreate(
            f"--model_dir {flags.model_dir}: is used already; name another or leave --resume out"
        )
    if checkpoint.is_complete(flags.model_dir):
        folder = flags.model_dir
    else:
        folder, passed_over = checkpoint.find_resumable(flags.model_dir)
        for reason in passed_over:
            warn(f"passed over: {reason}")
    if folder is None:
        return None
    manifest, step = checkpoint.read_manifest(folder), checkpoint.read_step(folder)
    pace.resume(manifest)
    theirs, end = manifest["compare"], pace.find_end(step)
    if step >= end:  # nothing will be computed
        theirs = theirs | {name: fixed["compare"][name] for name in PACKAGES}
    compare_runs(flags, theirs, fixed["compare"])
    checkpoint.set_aside(flags.model_dir, step)
    if folder == flags.model_dir and step < end:
        asked = f"--max_steps {end}" if flags.hours is None else f"--hours {flags.hours:g}"
        raise Mismatch(
            f"{asked}: the run in {folder} is finished at step {step}; begin another with "
            f"--init_model_dir {folder}"
        )
    return folder


def compare_runs(flags: TrainFlags, theirs: dict, ours: dict) -> None:
    """Raise `Mismatch` naming what differs from the run that is gone on with, unless allowed."""
    allowed = [name.strip().removeprefix("--") for name in flags.allow_change.split(",")]
    # A run of an older firstwords went by the default of a flag that it did not know.
    theirs = {name: str(value) for name, value in vars(TrainFlags()).items() if name in ours} | theirs
    changed = [
        f"{name} was {theirs.get(name)}, is {ours.get(name)}"
        for name in sorted(theirs | ours)
        if theirs.get(name) != ours.get(name) and name not in allowed
    ]
    if changed:
        raise Mismatch(
            f"--model_dir {flags.model_dir}: the run there is another one ({'; '.join(changed)}); name "
            "another folder, or allow it with --allow_change"
        )


def read_skipped(resumed: Path | None) -> tuple[int, ...]:
    """Return the batches that the run has left out up to a checkpoint."""
    return tuple(checkpoint.read_manifest(resumed).get("skipped", ())) if resumed else ()


# --- where there is nothing to go on with


def close_run(run_dir: Path, folder: Path) -> None:
    """Publish the last step when the run was killed before it could."""
    if not checkpoint.is_complete(run_dir):
        checkpoint.publish_final(folder, run_dir)


def finish_run(run: RunTrainer, run_dir: Path, log: RunLog | None) -> None:
    """Make the run folder the finished model, or say how to go on.

    Args:
        run: that has trained.
        run_dir: its folder.
        log: of the first process, which writes; None in the others.

    Raises:
        Stopped: when a signal ended the run before its last step.
    """
    step = run.state.global_step
    if step < run.state.max_steps:
        raise Stopped(
            f"{run_dir}: stopped by {run.wish.reason} and saved at step {step} of "
            f"{run.state.max_steps}; the same command goes on"
        )
    if log is None:
        return
    checkpoint.publish_final(checkpoint.list_checkpoints(run_dir)[0], run_dir)
    for name in (STOP, COOLDOWN):  # that came when the last step was being done
        (run_dir / name).unlink(missing_ok=True)
    log.say(f"{run_dir}: finished, {run.tokens_seen:,} tokens in {step} steps")
