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
import json
import math
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from typing import Any

from firstwords import atomic
from firstwords.args import TrainFlags, find_origins, parse_train_args, print_line, run_main
from firstwords.errors import (
    BadBatch,
    BadData,
    BadFlag,
    CannotCreate,
    Damaged,
    FirstwordsError,
    Mismatch,
    MissingInput,
    OutOfMemory,
    Stopped,
    suggest,
)
from firstwords.explain import explain
from firstwords.ranks import Ranks, count_local, find_local, join_ranks
from firstwords.signals import STOP, StopWish

MODELS = Path(__file__).parent / "configs" / "models"

# Asked at each evaluation, and read of stage A's text: about a second each on a GPU.
HEALTH_PROMPTS, KEPT_TOKENS = 32, 65_536

# Flags that do not change what is computed at a step, so that a resumed run may change them.
FREE_FLAGS = {
    *("data_dir", "model_dir", "init_model_dir", "recipe", "resume", "allow_change", "debug", "device"),
    *("cfg", "tokenizer", "log_steps", "save_steps", "eval_steps", "save_total_limit"),
    *("sample_prompts", "epochs", "max_steps", "keep_text", "eval_tasks", "hellaswag_data", "report_to"),
    *("on_nan", "max_rollbacks", "attention", "recompute", "vram_gb", "preflight", "explain"),
}
# What `--batch_tokens` chooses by the memory that is there; the steps stay the same.
CHOSEN_FLAGS = {"batch_size", "grad_accum"}
# And what of it changes nothing at all beside them.
CHOSEN_BY_TOKENS = (*sorted(CHOSEN_FLAGS), "recompute")
# Packages of which another version may compute another number.
PACKAGES = ("torch", "transformers", "accelerate", "tokenizers")


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
    """Hold the lock of the run; of one that is refused before it begins nothing is left."""
    is_new = not model_dir.exists()
    with atomic.lock_folder(model_dir):
        atomic.sweep_leftovers(model_dir)
        try:
            yield
        except FirstwordsError:
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
                print_line(f"rollback {len(skipped)} of {flags.max_rollbacks}: {error}", sys.stderr)
        except Exception:
            wish.check_startup()
            raise
        gc.collect()  # two models would not fit


def check_flags(flags: TrainFlags) -> None:
    """Refuse what needs no look at any file.

    Raises:
        BadFlag: for a flag that is missing, out of range, or contradicts another.
    """
    for name in ("data_dir", "model_dir"):
        if getattr(flags, name) is None:
            raise BadFlag(f"--{name}: is missing; see --help")
    if (flags.cfg is None) == (flags.init_model_dir is None):
        raise BadFlag("--cfg: give either --cfg (random weights) or --init_model_dir (weights to start from)")
    for name in (
        "seq_len",
        "batch_size",
        "grad_accum",
        "log_steps",
        "save_steps",
        "save_total_limit",
    ):
        least = 2 if name == "seq_len" else 1
        if getattr(flags, name) < least:
            raise BadFlag(f"--{name}: is {getattr(flags, name)}; give {least} or more")
    if flags.hours is not None:
        check_hours(flags)
    if not 0 < flags.lr < math.inf:
        raise BadFlag(f"--lr: is {flags.lr}; give a number above 0")
    if flags.epochs is not None and not 0 < flags.epochs < math.inf:
        raise BadFlag(f"--epochs: is {flags.epochs}; give a number above 0")
    if flags.vram_gb is not None and not 1 < flags.vram_gb < 1e6:
        raise BadFlag(f"--vram_gb: is {flags.vram_gb:g}; give the size of the card in GB, more than 1")
    counts = ("eval_steps", "seed", "max_rollbacks")
    for name in (*counts, "warmup_steps", "decay_steps", "weight_decay", "min_lr_ratio"):
        value = getattr(flags, name)
        if value is not None and not 0 <= value < math.inf:
            raise BadFlag(f"--{name}: is {value}; give 0 or more")


def check_given(flags: TrainFlags, origins: dict[str, str]) -> None:
    """Refuse what contradicts another flag only when it was said.

    Raises:
        BadFlag: for a micro-batch beside `--batch_tokens`, which chooses it; that of a recipe gives way to
            `--batch_tokens` on the command line.
    """
    if flags.batch_tokens is None:
        return
    is_flag = origins["batch_tokens"] == "flag"
    for name in CHOSEN_BY_TOKENS:
        is_said = name in origins or name == "recompute" and flags.recompute != "none"
        if is_said and not (is_flag and origins.get(name) == "recipe"):
            raise BadFlag(
                f"--{name}: is {getattr(flags, name)}, but --batch_tokens {flags.batch_tokens} chooses it; "
                "leave one of them out"
            )
    if flags.batch_tokens < flags.seq_len or flags.batch_tokens % flags.seq_len:
        rows = max(1, round(flags.batch_tokens / flags.seq_len))
        raise BadFlag(
            f"--batch_tokens {flags.batch_tokens}: is no whole number of rows of --seq_len {flags.seq_len}; "
            f"give {rows * flags.seq_len}"
        )


def check_hours(flags: TrainFlags) -> None:
    """Refuse what cannot be told by the clock.

    Raises:
        BadFlag: for hours that are none, or a part of the schedule that is counted in steps.
    """
    if not 0 < flags.hours < 1e6:
        raise BadFlag(f"--hours: is {flags.hours}; give hours of training, more than 0")
    counted = ("warmup_steps", "decay_steps") if "decay" in flags.lr_scheduler_type else ("warmup_steps",)
    for name in counted:
        if getattr(flags, name) >= 1:
            raise BadFlag(
                f"--{name}: is {getattr(flags, name):g} steps, but --hours does not know how many there will "
                "be; give a share below 1"
            )


def train(flags: TrainFlags, extra: dict, wish: StopWish, ranks: Ranks, skipped: tuple[int, ...]) -> None:
    """Build everything, train, and end with the finished model in the run folder.

    Args:
        flags: ours.
        extra: fields of `TrainingArguments` beside them.
        wish: ends the start-up, and later asks for a save.
        ranks: this process among those of the run; the first looks after the folder.
        skipped: batches to leave out, beside those that the checkpoint names.
    """
    from firstwords import checkpoint, trainer
    from firstwords.pace import KeepPace
    from firstwords.preflight import Probe, format_short

    opened = open_run(flags, extra, ranks)
    tokenizer, room = opened.tokenizer, opened.room
    max_steps, meta = opened.max_steps, build_meta(flags, extra, opened)
    pace = build_pace(flags, max_steps)
    resumed = share_resumed(flags, meta.fixed, pace, ranks)
    if checkpoint.read_step(resumed) >= pace.find_end(checkpoint.read_step(resumed)):
        if ranks.is_first:
            close_run(flags, resumed)
        return
    if ranks.is_first:
        check_disk(flags, opened)
    forecast = build_forecast(flags, opened, meta, checkpoint.read_step(resumed))
    options = {"skipped": skipped or read_skipped(resumed), "pace": pace, "wish": wish}
    with tell_memory(flags, room, forecast, lambda line: print_line(line, sys.stdout)):
        run = build_run(flags, extra, opened, meta, ranks, **options)
    log = None
    run.add_callback(KeepPace(pace, flags.model_dir, lambda line: log and log.say(line)))
    run.add_callback(trainer.PendingLoss(run))
    run.add_callback(trainer.LastStep())
    if ranks.is_first:
        log = add_callbacks(run, flags, tokenizer, first_step=checkpoint.read_step(resumed))
        announce(log, flags, run, resumed)
        for line in format_short(forecast):
            log.say(line)
    run.add_callback(trainer.StopOnSignal(wish))
    if ranks.is_first:
        run.add_callback(Probe(lambda seconds, state, control: say_speed(log, forecast, seconds, state)))
    wish.check_startup()
    wish.defer()
    try:
        with tell_memory(flags, room, forecast, lambda line: log and log.say(line)):
            run.train(resume_from_checkpoint=str(resumed) if resumed else None)
            finish(run, flags, log, wish)
    except UnpicklingError:
        raise Damaged(
            f"{resumed}: its state holds other things than numbers, and is not loaded; begin anew with "
            f"--init_model_dir {resumed}"
        ) from None
    finally:
        if log is not None:
            log.close()


@dataclass
class Opened:
    """What a run is made of, open and checked: the tokenizer, the model and its parent, the data, the room.

    Attributes:
        parent: what the manifest says of the weights that the run starts from, `{}` of random ones.
        max_steps: optimizer steps in all.
        room: a `fit.Room`, the memory there is and what the run takes of it.
    """

    tokenizer: Any
    model: Any
    parent: dict
    train_set: Any
    val_set: Any
    max_steps: int
    room: Any


def open_run(flags: TrainFlags, extra: dict, ranks: Ranks) -> Opened:
    """Open everything that a run reads, after a look at whether it would fit; sets what is chosen in `flags`.

    Raises:
        OutOfMemory: before a weight is made, when it would not.
        FirstwordsError: as the functions below.
    """
    from firstwords import fit, trainer
    from firstwords.dataset import open_train, open_val
    from firstwords.model import quiet_transformers
    from firstwords.model.attention import check_attention
    from firstwords.recompute import set_recompute

    quiet_transformers()
    flags.device = choose_device(flags, extra)
    tokenizer = open_tokenizer(flags)
    folder = find_weights(flags)
    shape = read_shape(flags, folder, tokenizer)
    room = fit.Room(flags, shape, world_size=ranks.size, is_sharded=asks_fsdp(extra))
    if flags.batch_tokens is not None:
        room.choose(read_setting(flags))
        # Each process sees another moment of the memory: what the first has chosen is what all take.
        room.setting = fit.Setting(*ranks.ask_first(lambda: astuple(room.setting)))
    room.check()
    if flags.device == "cuda" and flags.vram_gb is not None:
        fit.hold_to(room.limit)
    model, parent = open_model(flags, folder, tokenizer)
    check_context(flags, model)
    check_attention(flags.attention, flags.device, flags.bf16, model.config.attn_pdrop)
    model.attention = flags.attention
    set_recompute(model, flags.recompute)
    options = {"assistant_only": flags.assistant_only_loss, "overlong": flags.overlong}
    train_set = open_train(flags.data_dir, tokenizer, flags.seq_len, seed=flags.seed, **options)
    val_set = open_val(flags.data_dir, tokenizer, flags.seq_len, **options)
    max_steps = trainer.count_steps(flags, train_set.rows_per_epoch)
    return Opened(tokenizer, model, parent, train_set, val_set, max_steps, room)


def build_run(flags: TrainFlags, extra: dict, opened: Opened, meta, ranks: Ranks, **options):
    """Return the trainer of a run, without what watches over it."""
    from firstwords import trainer
    from firstwords.dataset import collate

    arguments = trainer.build_training_arguments(flags, extra, opened.max_steps, ranks.size)
    return trainer.RunTrainer(
        opened.model,
        arguments,
        train_set=opened.train_set,
        val_set=opened.val_set,
        tokenizer=opened.tokenizer,
        meta=meta,
        collate=collate,
        optimizer_cls_and_kwargs=trainer.choose_optimizer(flags, arguments),
        **options,
    )


# --- whether it fits


def read_shape(flags: TrainFlags, folder: Path | None, tokenizer):
    """Return the configuration of the model, before there is one."""
    from firstwords import checkpoint
    from firstwords.model import build_config

    if folder is None:
        return build_config(find_config(flags.cfg), tokenizer)
    config = checkpoint.read_model_config(folder)
    config.vocab_size = max(config.vocab_size, tokenizer.vocab_size_padded)
    return config


def read_setting(flags: TrainFlags):
    """Return what an earlier life of the run chose for the same tokens in a step, None without one."""
    from firstwords import checkpoint, fit

    for manifest in checkpoint.read_manifests(flags.model_dir)[:1]:
        theirs = manifest["flags"]
        wished = {"batch_tokens": str(flags.batch_tokens), "seq_len": str(flags.seq_len)}
        if wished.items() <= theirs.items():
            return fit.Setting(int(theirs["batch_size"]), int(theirs["grad_accum"]), theirs["recompute"])
    return None


@contextmanager
def tell_memory(flags: TrainFlags, room, forecast, say: Callable[[str], None]) -> Iterator[None]:
    """Where memory runs out, say what takes it, and name a setting that takes less.

    Raises:
        OutOfMemory: instead of what torch or Python raised.
    """
    from firstwords import checkpoint
    from firstwords.preflight import format_table

    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        for line in format_table(forecast):
            say(line)
        saved = ""
        if checkpoint.list_checkpoints(flags.model_dir):
            changed = [*([] if flags.batch_tokens is None else ["batch_tokens"]), "batch_size", "grad_accum"]
            saved = f". What was saved is there, and is gone on from with --allow_change {','.join(changed)}"
        raise OutOfMemory(
            f"{room.setting} with --seq_len {flags.seq_len}: there was no memory left; "
            f"{room.advise_less()}{saved}"
        ) from None


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether a GPU or the machine had no memory left; torch has a class for its own allocator alone."""
    from torch import OutOfMemoryError

    # Of a CPU; of CUDA's runtime, NCCL and Apple's GPU; of cuBLAS.
    signs = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    is_of_kind = isinstance(error, OutOfMemoryError | MemoryError)
    return is_of_kind or any(sign in str(error) for sign in signs)


def check_disk(flags: TrainFlags, opened: Opened) -> None:
    """Refuse a run whose checkpoints will not fit on the disk, now and not at the first save."""
    from firstwords import preflight

    preflight.check_disk(flags.model_dir, **count_saves(flags, opened))


def count_saves(flags: TrainFlags, opened: Opened) -> dict[str, int]:
    """Return how many checkpoints lie on the disk at the same time, and their bytes."""
    from firstwords.memory import count_state_bytes

    model_bytes, num_saves = 4 * opened.model.num_parameters(), -(-opened.max_steps // flags.save_steps)
    state_bytes = count_state_bytes(opened.model.config, flags.optim)
    return {
        "num_checkpoints": min(flags.save_total_limit + 1, num_saves),
        "model_bytes": model_bytes,
        # Trainer goes on with FSDP from weights of its own beside the model.
        "state_bytes": state_bytes + model_bytes * opened.room.is_sharded,
    }


def describe_run(flags: TrainFlags, extra: dict, origins: dict[str, str], ranks: Ranks) -> None:
    """Print `--explain`, `--preflight` or both; nothing is trained but by a probe, nothing is left behind."""
    from firstwords import checkpoint, preflight

    opened = open_run(flags, extra, ranks)
    meta = build_meta(flags, extra, opened)
    if flags.batch_tokens is not None:
        origins = origins | dict.fromkeys(CHOSEN_BY_TOKENS, "choice")
    if flags.explain:
        for line in explain(flags, extra, origins, gather_facts(flags, opened, meta)):
            print_line(line, sys.stdout)
    if flags.preflight:
        done = max((each["step"] for each in checkpoint.read_manifests(flags.model_dir)), default=0)
        check_disk(flags, opened)
        forecast = build_forecast(flags, opened, meta, done)
        with tell_memory(flags, opened.room, forecast, lambda line: print_line(line, sys.stdout)):
            forecast = replace(forecast, speed=probe_run(flags, extra, opened, meta, ranks))
        print_line(f"{flags.model_dir}: nothing was trained; a run would take", sys.stdout)
        for line in preflight.format_table(forecast):
            print_line(line, sys.stdout)


def probe_run(flags: TrainFlags, extra: dict, opened: Opened, meta, ranks: Ranks):
    """Return the speed of ten steps of this very run, in a folder that goes away."""
    from firstwords import preflight

    without = {"save_strategy": "no", "eval_strategy": "no"}
    with TemporaryDirectory() as folder:
        wish = StopWish(flags.model_dir, is_shared=True) if ranks.size > 1 else None
        there = replace(flags, model_dir=Path(folder))
        run = build_run(there, extra | without, opened, meta, ranks, wish=wish)
        return preflight.run_probe(run)


def build_forecast(flags: TrainFlags, opened: Opened, meta, steps_done: int):
    """Return what the run will take, but for the speed."""
    from firstwords import preflight

    train_set, saves = opened.train_set, count_saves(flags, opened)
    return preflight.Forecast(
        parameters=opened.model.num_parameters(),
        memory=opened.room.predict(opened.room.setting),
        limit=opened.room.limit,
        setting=opened.room.setting,
        steps=None if flags.hours else opened.max_steps,
        steps_done=steps_done,
        hours=flags.hours,
        tokens_per_step=meta.tokens_per_step,
        tokens_per_epoch=train_set.rows_per_epoch * train_set.tokens_per_row,
        kind="text" if is_text(flags) else "conversations",
        eval_steps=flags.save_steps if flags.eval_steps is None else flags.eval_steps,
        checkpoint_bytes=saves["model_bytes"] + saves["state_bytes"],
        disk_bytes=preflight.count_disk_bytes(**saves),
        disk_free=preflight.find_free_disk(flags.model_dir),
    )


def say_speed(log, forecast, seconds: float, state) -> None:
    """Say how fast the first steps were, and how long the rest will take."""
    from firstwords.pace import format_seconds

    left = format_seconds(seconds * (state.max_steps - state.global_step))
    ends = f"the end is {left} away" if forecast.hours is None else f"{forecast.hours:g} hours"
    log.say(f"  speed: {1 / seconds:.3g} steps/s, {ends}, evaluations, saves and samples not counted")


def gather_facts(flags: TrainFlags, opened: Opened, meta) -> dict:
    """Return what the sentences of `--explain` name beside the flags."""
    steps, hours = opened.max_steps, flags.hours
    epochs = (
        steps * meta.tokens_per_step / (opened.train_set.rows_per_epoch * opened.train_set.tokens_per_row)
    )
    by_clock = f"steps for {hours:g} hours" if hours else None
    return {
        "rows": flags.batch_size * flags.grad_accum,
        "tokens": meta.tokens_per_step,
        "steps": by_clock or f"{steps:,} steps",
        "epochs": "as often as the hours allow" if hours else f"{epochs:.3g} times",
        "parameters": opened.model.num_parameters(),
        "warmup": say_share(flags.warmup_steps, flags),
        "decay": say_share(flags.decay_steps, flags),
        "precision": "in bfloat16" if flags.bf16 else "in float32",
        "loss_on": "what the assistant says" if flags.assistant_only_loss else "every token",
    }


def say_share(steps: float, flags: TrainFlags) -> str:
    """Return a part of the schedule in words."""
    return (
        f"{steps:g} steps" if steps >= 1 else f"{steps:.3g} of {'the hours' if flags.hours else 'all steps'}"
    )


def read_skipped(resumed: Path | None) -> tuple[int, ...]:
    """Return the batches that the run has left out up to a checkpoint."""
    from firstwords import checkpoint

    return tuple(checkpoint.read_manifest(resumed).get("skipped", ())) if resumed else ()


def close_run(flags: TrainFlags, folder: Path) -> None:
    """Say that `folder` is the last step; publish it when the run was killed before it could."""
    from firstwords import checkpoint

    if not checkpoint.is_complete(flags.model_dir):
        checkpoint.publish_final(folder, flags.model_dir)
    line = f"{flags.model_dir}: finished at step {checkpoint.read_step(folder)}; nothing to do"
    print_line(line, sys.stdout)


def choose_device(flags: TrainFlags, extra: dict) -> str:
    """Return `cpu`, `cuda` or `mps`, and refuse what the machine cannot do; each process takes its own GPU.

    Raises:
        BadFlag: for a device that is not there, bf16 that it has not, FSDP without GPUs (accelerate would
            train with plain DDP and say nothing), or more processes than GPUs.
    """
    from torch import cuda

    from firstwords.model import find_device, has_bf16

    device = find_device(flags.device)
    if flags.bf16 and not has_bf16(device):
        raise BadFlag(f"--bf16: this {device} cannot compute in bfloat16; leave it out")
    if asks_fsdp(extra) and device != "cuda":
        raise BadFlag(f"--device {device}: FSDP needs GPUs; take configs/accelerate/ddp.yaml or torchrun")
    if asks_fsdp(extra) and flags.optim == "muon":
        raise BadFlag("--optim muon: needs whole matrices, which FSDP cuts; take configs/accelerate/ddp.yaml")
    if device == "cuda" and count_local() > cuda.device_count():
        raise BadFlag(
            f"--device cuda: {count_local()} processes were started on this machine, and its GPUs are "
            f"{cuda.device_count()}; start one for each"
        )
    if device == "cuda" and find_local() is not None:
        cuda.set_device(find_local())  # before anybody asks how much memory the GPU has
    return device


def asks_fsdp(extra: dict) -> bool:
    """Tell whether FSDP was asked for, by a flag or by accelerate's launcher."""
    return bool(extra.get("fsdp")) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def open_tokenizer(flags: TrainFlags):
    """Return the data's tokenizer.

    Raises:
        MissingInput: when there is none.
        Mismatch: when `--tokenizer` names another one than the data have.
    """
    from firstwords.checkpoint import check_folder
    from firstwords.tokenizer import load_tokenizer

    check_folder(flags.data_dir, "--data_dir")
    folder = Path(flags.tokenizer) if flags.tokenizer else flags.data_dir
    if not (folder / "tokenizer.json").is_file():
        raise MissingInput(
            f"--data_dir {flags.data_dir}: holds no tokenizer.json; name the folder of the tokenizer that "
            "made the data with --tokenizer"
        )
    tokenizer = load_tokenizer(folder)
    has_own = (flags.data_dir / "tokenizer.json").is_file()
    if has_own and load_tokenizer(flags.data_dir).hash != tokenizer.hash:
        raise Mismatch(f"--tokenizer {folder}: is not the one in {flags.data_dir}; leave it out")
    return tokenizer


def find_weights(flags: TrainFlags) -> Path | None:
    """Return the folder of the weights to start from, None for random ones."""
    from firstwords import checkpoint

    if flags.cfg is not None:
        return None
    if flags.init_model_dir.startswith("hub:"):
        return checkpoint.download_model(flags.init_model_dir.removeprefix("hub:"))
    return checkpoint.find_init(Path(flags.init_model_dir))


def open_model(flags: TrainFlags, folder: Path | None, tokenizer):
    """Return the model to train and what the manifest says about its parent (`{}` of random weights)."""
    from firstwords import checkpoint
    from firstwords.model import build_model, grow_vocabulary, set_generation

    if folder is None:
        return build_model(find_config(flags.cfg), tokenizer, seed=flags.seed), {}
    model = checkpoint.load_model(folder)
    parent = check_parent(flags.init_model_dir, folder, model, tokenizer)
    grow_vocabulary(model, tokenizer, seed=flags.seed)
    set_generation(model, tokenizer)
    return model, parent


def find_config(cfg: Path) -> Path:
    """Return the path of a model configuration, named by path or by its name in configs/models.

    Raises:
        MissingInput: when it is neither.
    """
    named = MODELS / f"{cfg}.json"
    if cfg.is_file() or named.is_file():
        return cfg if cfg.is_file() else named
    beside = [str(path) for path in cfg.parent.glob("*.json")]
    near = suggest(str(cfg), [*beside, *(path.stem for path in MODELS.glob("*.json"))])
    raise MissingInput(f"--cfg {cfg}: is no file and no name in configs/models; {near}")


def check_parent(name: str, folder: Path, model, tokenizer) -> dict:
    """Return the parent's part of the manifest.

    Args:
        name: what `--init_model_dir` said.
        folder: where that is.

    Raises:
        Mismatch: when the parent's tokenizer is another one than the data's.
    """
    from firstwords import checkpoint
    from firstwords.tokenizer import load_tokenizer

    theirs = load_tokenizer(folder)
    if theirs.hash != tokenizer.hash:
        raise Mismatch(
            f"--init_model_dir {name}: its tokenizer ({len(theirs)} tokens, {theirs.hash[:8]}) is not "
            f"the data's ({len(tokenizer)}, {tokenizer.hash[:8]}); prepare the data with --tokenizer {name}"
        )
    manifest = checkpoint.read_manifest(folder)
    if not manifest:
        print_line(f"{name}: has no manifest, its files were not verified", sys.stdout)
        return {"longest_row": model.config.n_positions, "weights": "not verified"}
    return {
        "step": manifest["step"],
        "longest_row": manifest["longest_row"],
        "weights": manifest["files"]["model.safetensors"]["sha256"],
        "data_dir": manifest.get("data_dir"),
    }


def check_context(flags: TrainFlags, model) -> None:
    """Raise `BadFlag` when rows are longer than the model's context."""
    if flags.seq_len > model.config.n_positions:
        raise BadFlag(
            f"--seq_len {flags.seq_len}: the model's context is {model.config.n_positions}; give that or less"
        )


def build_meta(flags: TrainFlags, extra: dict, opened: Opened):
    """Return what every manifest of the run says; `compare` in it is what resuming holds fast."""
    from firstwords import trainer
    from firstwords.model import CONFIG_KEYS

    tokenizer, train_set, parent = opened.tokenizer, opened.train_set, opened.parent
    free = FREE_FLAGS if flags.batch_tokens is None else FREE_FLAGS | CHOSEN_FLAGS
    held = {k: v for k, v in vars(flags).items() if k not in free} | extra
    held["shape"] = {key: getattr(opened.model.config, key) for key in CONFIG_KEYS}
    compare = {
        **{name: str(value) for name, value in sorted(held.items())},
        "max_steps": str(opened.max_steps),
        "data": train_set.hash,
        "val_data": opened.val_set.hash,
        "tokenizer": tokenizer.hash,
        "init_weights": parent.get("weights", "random"),
        **({"fsdp": "True"} if asks_fsdp(extra) else {}),  # its checkpoints hold other files
    }
    versions = {name: version(name) for name in PACKAGES}
    fixed = {
        "format": "firstwords-checkpoint-1",
        "longest_row": max(train_set.longest_row, parent.get("longest_row", 0)),
        "tokenizer_hash": tokenizer.hash,
        "data_dir": str(flags.data_dir),
        "sources": read_sources(flags.data_dir),
        "flags": {name: str(value) for name, value in vars(flags).items() if value is not None} | extra,
        "compare": compare | versions,
        "parent": {"from": flags.init_model_dir, **parent} if parent else None,
        "versions": {"python": platform.python_version()} | versions,
    }
    fixed["flags"].pop("model_dir")
    rows = trainer.rows_per_step(flags)
    return trainer.RunMeta(fixed, rows * train_set.tokens_per_row, flags.save_total_limit)


def read_sources(data_dir: Path) -> list[dict]:
    """Return what the prep script wrote about where the data come from; `[]` of foreign data."""
    for name in ("data_report.json", "corpus.json"):
        if (data_dir / name).is_file():
            return json.loads((data_dir / name).read_text(encoding="utf-8")).get("sources", [])
    return []


def build_pace(flags: TrainFlags, max_steps: int):
    """Return what ends the run, by its flags."""
    from firstwords.pace import Pace

    return Pace(max_steps, decay_steps=flags.decay_steps, min_lr_ratio=flags.min_lr_ratio, hours=flags.hours)


def share_resumed(flags: TrainFlags, fixed: dict, pace, ranks: Ranks) -> Path | None:
    """Return what the first process finds to go on from; see `find_resumed`.

    Raises:
        MissingInput: when it is on another machine's disk.
    """
    from firstwords import checkpoint

    def find() -> str | None:
        folder = find_resumed(flags, fixed, pace)
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


def find_resumed(flags: TrainFlags, fixed: dict, pace) -> Path | None:
    """Return the checkpoint to go on from, whose place in the run `pace` takes, or None for a fresh run.

    Raises:
        CannotCreate: when the folder is used and `--resume no` was given.
        Mismatch: when flags or data are not those of the run, or a finished run is asked for more steps.
        Damaged: when checkpoints are there and none is whole.
    """
    from firstwords import checkpoint

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
            print_line(f"passed over: {reason}", sys.stderr)
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
        raise Mismatch(
            f"--max_steps {end}: the run in {folder} is finished at step {step}; begin another with "
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


def add_callbacks(run, flags: TrainFlags, tokenizer, *, first_step: int):
    """Attach all that watches over the run, in the order in which it hears of things; return the log."""
    from firstwords import monitor, samples, trainer
    from firstwords.health import read_checks

    reporters = monitor.parse_report_to(flags.report_to)
    items = read_eval_items(flags)
    kept_text, remark = open_kept_text(flags, tokenizer, run.meta.fixed["parent"] or {})
    prompts, context = read_prompts(flags), run.meta.fixed["longest_row"]
    asked = flags.data_dir / "val.jsonl"
    checks = read_checks(asked, HEALTH_PROMPTS) if asked.is_file() else []
    if not prompts and is_text(flags):
        prompts = samples.find_beginnings(run.eval_dataset, tokenizer, 3)
    log = trainer.RunLog(flags.model_dir, first_step)
    run.warn = log.say
    config = run.meta.fixed["flags"] | {"data": run.train_dataset.hash}
    log.writer = monitor.Writers(
        log.writer, *(monitor.Reporter(name, flags.model_dir, config) for name in reporters)
    )
    run.add_callback(trainer.Throughput(run))
    run.add_callback(monitor.Hardware(run))
    run.add_callback(log)
    bf16, batch_size = run.args.bf16, run.args.per_device_eval_batch_size
    if kept_text is not None:
        run.add_callback(monitor.KeptText(log, tokenizer, kept_text, batch_size=batch_size, bf16=bf16))
    if items:
        run.add_callback(monitor.TaskScores(log, tokenizer, items, context=context, bf16=bf16))
    if checks:
        run.add_callback(monitor.Health(log, tokenizer, checks, context))
    if prompts:
        speak = samples.build_speaker(tokenizer, context=context, chat=not is_text(flags))
        path = flags.model_dir / "samples.md"
        run.add_callback(monitor.Samples(log, prompts, speak, path, first_step))
    if remark:
        log.say(remark)
    return log


def is_text(flags: TrainFlags) -> bool:
    """Tell whether the data are a token store, which has no turns."""
    from firstwords import tokenstore

    return tokenstore.is_store(flags.data_dir)


def read_eval_items(flags: TrainFlags):
    """Return the items of HellaSwag that `--eval_tasks` asks for; `[]` without it.

    Raises:
        BadFlag: for what it cannot mean.
        MissingInput, BadData: as `tasks.read_hellaswag`.
    """
    from firstwords import tasks

    if flags.eval_tasks is None:
        return []
    limit = tasks.parse_eval_tasks(flags.eval_tasks)
    return tasks.read_hellaswag(flags.hellaswag_data or tasks.HELLASWAG, limit)


def open_kept_text(flags: TrainFlags, tokenizer, parent: dict):
    """Return the beginning of stage A's val text as rows, or None and why there is none.

    Raises:
        MissingInput: when `--keep_text` names no token store.
        Mismatch: when another tokenizer made it.
    """
    from firstwords import tokenstore
    from firstwords.dataset import TokenWindows
    from firstwords.tokenizer import load_tokenizer

    folder = flags.keep_text or (parent.get("data_dir") and Path(parent["data_dir"]))
    if folder is None or is_text(flags) and flags.keep_text is None:
        return None, None
    if not folder.is_dir() and flags.keep_text is None:
        return None, f"stage A's text ({folder}) is not there: what is forgotten is not measured; --keep_text"
    if not tokenstore.is_store(folder):
        if flags.keep_text is None:
            return None, None
        raise MissingInput(f"--keep_text {folder}: is no token store; name the folder that stage A read")
    if (folder / "tokenizer.json").is_file() and load_tokenizer(folder).hash != tokenizer.hash:
        raise Mismatch(f"--keep_text {folder}: made by another tokenizer than the data; leave it out")
    tokens = tokenstore.open_store(folder, "val").tokens[:KEPT_TOKENS]
    return TokenWindows(tokens, tokenizer, flags.seq_len), None


def read_prompts(flags: TrainFlags) -> list[str]:
    """Return the sample prompts: of the file, or three first questions of the val set.

    Raises:
        MissingInput: when the file is not there.
        BadData: for a row of the val set that is no conversation.
    """
    from firstwords.schema import RowError, parse_conversation, read_jsonl

    if flags.sample_prompts is not None:
        if not flags.sample_prompts.is_file():
            raise MissingInput(f"--sample_prompts {flags.sample_prompts}: is not there")
        return [line for line in flags.sample_prompts.read_text(encoding="utf-8").splitlines() if line]
    path = flags.data_dir / "val.jsonl"
    if not path.is_file():
        return []
    prompts = []
    for (number, row), _ in zip(read_jsonl(path), range(3), strict=False):
        try:
            if isinstance(row, RowError):
                raise row
            messages = parse_conversation(row)
        except RowError as error:
            raise BadData(f"{path}:{number}: {error}; run prep_data.py anew") from None
        prompts += [message.content for message in messages if message.role == "user"][:1]
    return prompts


def announce(log, flags: TrainFlags, run, resumed: Path | None) -> None:
    """Say what this run is, before the first step."""
    from firstwords.model import explain_device

    data, arguments = run.train_dataset, run.args
    how = ", bf16" if arguments.bf16 else ""
    how += f" in {arguments.world_size} processes" if arguments.world_size > 1 else ""
    steps = f"{arguments.max_steps} steps" if flags.hours is None else f"{flags.hours:g} hours, steps"
    epochs = f"{len(data) / data.rows_per_epoch:.2f} epochs of " if flags.hours is None else ""
    log.say(
        f"{flags.model_dir}: {run.model.num_parameters():,} parameters on {arguments.device.type}"
        f"{explain_device(arguments.device.type)}{how}; {steps} of "
        f"{run.meta.tokens_per_step:,.0f} tokens, {epochs}{data.rows_per_epoch:,} rows"
    )
    if getattr(data, "num_overlong", 0):
        log.say(
            f"{data.num_overlong} conversations are longer than --seq_len {flags.seq_len}: "
            f"--overlong {flags.overlong} costs {data.dropped_tokens:,} tokens"
        )
    if resumed:
        log.say(f"going on from {resumed}")


def finish(run, flags: TrainFlags, log, wish: StopWish) -> None:
    """Make the run folder the finished model, or say how to go on.

    Raises:
        Stopped: when a signal ended the run before its last step.
    """
    from firstwords import checkpoint
    from firstwords.pace import COOLDOWN

    step = run.state.global_step
    if step < run.state.max_steps:
        raise Stopped(
            f"{flags.model_dir}: stopped by {wish.reason} and saved at step {step} of "
            f"{run.state.max_steps}; the same command goes on"
        )
    if log is None:
        return
    checkpoint.publish_final(checkpoint.list_checkpoints(flags.model_dir)[0], flags.model_dir)
    for name in (STOP, COOLDOWN):  # that came when the last step was being done
        (flags.model_dir / name).unlink(missing_ok=True)
    log.say(f"{flags.model_dir}: finished, {run.tokens_seen:,} tokens in {step} steps")


if __name__ == "__main__":
    run_main(main)
