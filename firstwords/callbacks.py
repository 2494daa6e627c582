"""The flags of a run -> all that watches over it, attached in the order in which it hears of things.

    log = add_callbacks(run, flags, first_step=0)
    log.say("...")                                     # to train.log and to the screen

What each callback does is written in `trainer`, `pace` and `monitor`; which of them a run has, in which order
and over which prompts, texts and tests, is decided here. Invariant: a wish that cannot be met is refused
before the log is opened, so that a run that is refused has written nothing.
"""

from itertools import islice
from pathlib import Path

from transformers import TrainerCallback

from firstwords import monitor, tokenstore
from firstwords.args import TrainFlags
from firstwords.dataset import TokenWindows
from firstwords.errors import Mismatch, MissingInput
from firstwords.health import Check, iter_checks, read_checks
from firstwords.log import EventWriter, RunLog
from firstwords.pace import KeepPace
from firstwords.samples import build_speaker, find_beginnings
from firstwords.tasks import HELLASWAG, Item, parse_eval_tasks, read_hellaswag
from firstwords.tokenizer import Tokenizer, has_other_tokenizer
from firstwords.trainer import LastStep, PendingLoss, RunTrainer, StopOnSignal, Throughput

# Asked at each evaluation, and read of stage A's text: about a second each on a GPU.
HEALTH_PROMPTS, KEPT_TOKENS = 32, 65_536


def add_callbacks(run: RunTrainer, flags: TrainFlags, *, first_step: int) -> RunLog | None:
    """Attach all that watches over a run.

    Args:
        run: from `opening.build_run`.
        flags: ours.
        first_step: the step from which it goes on.

    Returns:
        the log; None in all processes but the first, which looks and speaks alone.
    """
    log, watching = None, []
    if run.is_world_process_zero():
        log, watching = build_watch(run, flags, first_step)
    callbacks = [
        KeepPace(run.pace, flags.model_dir, run.wish, lambda line: log and log.say(line)),
        PendingLoss(run),
        LastStep(),
        *watching,
        StopOnSignal(run.wish),
    ]
    for callback in callbacks:
        run.add_callback(callback)
    return log


def build_watch(run: RunTrainer, flags: TrainFlags, first_step: int) -> tuple[RunLog, list[TrainerCallback]]:
    """Return the log, and what looks at the run and writes into it; the order is that of the lines.

    Raises:
        BadFlag, MissingInput, BadData, Mismatch: as the functions below.
    """
    tokenizer, context = run.tokenizer, run.meta.fixed["longest_row"]
    bf16, batch_size = run.args.bf16, run.args.per_device_eval_batch_size
    is_text = tokenstore.is_store(flags.data_dir)
    reporters = monitor.parse_report_to(flags.report_to)
    items = read_eval_items(flags)
    kept_text, remark = open_kept_text(flags, tokenizer, run.meta.fixed["parent"] or {})
    prompts, checks = read_prompts(flags), read_health_checks(flags)
    if not prompts and is_text:
        prompts = find_beginnings(run.eval_dataset, tokenizer, 3)
    log = open_log(run, flags, first_step, reporters)
    callbacks = [Throughput(run), monitor.Hardware(run), log]
    if kept_text is not None:
        callbacks.append(monitor.KeptText(log, tokenizer, kept_text, batch_size=batch_size, bf16=bf16))
    if items:
        callbacks.append(monitor.TaskScores(log, tokenizer, items, context=context, bf16=bf16))
    if checks:
        callbacks.append(monitor.Health(log, tokenizer, checks, context))
    if prompts:
        speak = build_speaker(tokenizer, context=context, chat=not is_text)
        callbacks.append(monitor.Samples(log, prompts, speak, flags.model_dir / "samples.md", first_step))
    if remark:
        log.say(remark)
    return log, callbacks


def open_log(run: RunTrainer, flags: TrainFlags, first_step: int, reporters: list[str]) -> RunLog:
    """Return the log, which writes to the `reporters` of `monitor.parse_report_to`."""
    config = run.meta.fixed["flags"] | {"data": run.train_dataset.hash}
    writers = [
        EventWriter(flags.model_dir / "runs", first_step)
        if name == "tensorboard"
        else monitor.Reporter(name, flags.model_dir, config)
        for name in reporters
    ]
    log = RunLog(flags.model_dir, monitor.Writers(*writers))
    run.warn = log.say
    return log


def read_eval_items(flags: TrainFlags) -> list[Item]:
    """Return the items of HellaSwag that `--eval_tasks` asks for; `[]` without it.

    Raises:
        BadFlag: for what it cannot mean.
        MissingInput, BadData: as `tasks.read_hellaswag`.
    """
    if flags.eval_tasks is None:
        return []
    limit = parse_eval_tasks(flags.eval_tasks)
    return read_hellaswag(flags.hellaswag_data or HELLASWAG, limit)


def read_health_checks(flags: TrainFlags) -> list[Check]:
    """Return questions of the val set with their answers; `[]` where there is none to read."""
    path = flags.data_dir / "val.jsonl"
    return read_checks(path, HEALTH_PROMPTS) if path.is_file() else []


def open_kept_text(
    flags: TrainFlags, tokenizer: Tokenizer, parent: dict
) -> tuple[TokenWindows | None, str | None]:
    """Return the beginning of stage A's val text as rows, or None and why there is none.

    Raises:
        MissingInput: when `--keep_text` names no token store.
        Mismatch: when another tokenizer made it.
    """
    folder = flags.keep_text or (parent.get("data_dir") and Path(parent["data_dir"]))
    if folder is None or tokenstore.is_store(flags.data_dir) and flags.keep_text is None:
        return None, None
    if not folder.is_dir() and flags.keep_text is None:
        return None, f"stage A's text ({folder}) is not there: what is forgotten is not measured; --keep_text"
    if not tokenstore.is_store(folder):
        if flags.keep_text is None:
            return None, None
        raise MissingInput(f"--keep_text {folder}: is no token store; name the folder that stage A read")
    if has_other_tokenizer(folder, tokenizer):
        raise Mismatch(f"--keep_text {folder}: made by another tokenizer than the data; leave it out")
    tokens = tokenstore.open_store(folder, "val").tokens[:KEPT_TOKENS]
    return TokenWindows(tokens, tokenizer, flags.seq_len), None


def read_prompts(flags: TrainFlags) -> list[str]:
    """Return the sample prompts: of the file, or three first questions of the val set.

    Raises:
        MissingInput: when the file is not there.
        BadData: for a row of the val set that is no conversation.
    """
    if flags.sample_prompts is not None:
        if not flags.sample_prompts.is_file():
            raise MissingInput(f"--sample_prompts {flags.sample_prompts}: is not there")
        return [line for line in flags.sample_prompts.read_text(encoding="utf-8").splitlines() if line]
    path = flags.data_dir / "val.jsonl"
    return [check.prompt for check in islice(iter_checks(path), 3)] if path.is_file() else []
