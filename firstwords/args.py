"""Flags, recipes and errors: the command line of every script.

    flags, extra = parse_train_args(["--recipe", "configs/recipes/chat.yaml", "--lr", "1e-3"])

Flag beats recipe beats default. Dashes and underscores are alike; an unknown flag or key is an error with
a suggestion. Imports no other room but `errors`, and torch only when a field of `TrainingArguments` is named.
"""

import argparse
import math
import os
import re
import sys
import traceback
from dataclasses import dataclass, field, fields
from pathlib import Path

from firstwords.errors import BadFlag, FirstwordsError, IOFailed, MissingInput, suggest

# What `--batch_tokens` chooses by the memory that is there; the steps stay the same.
CHOSEN_BY_TOKENS = ("batch_size", "grad_accum", "recompute")

# What `TrainingArguments` calls a thing for which the command line has a word of its own.
OUR_WORDS = {
    "output_dir": "model_dir",
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "batch_size",
    "gradient_accumulation_steps": "grad_accum",
    "learning_rate": "lr",
    "logging_steps": "log_steps",
    "num_train_epochs": "epochs",
    "use_cpu": "device",
    "resume_from_checkpoint": "resume",
    "train_sampling_strategy": "seed",
    "logging_nan_inf_filter": "debug",
    "auto_find_batch_size": "batch_size",
    "gradient_checkpointing_kwargs": "recompute",
    "activation_checkpointing_kwargs": "recompute",
    "save_strategy": "save_steps",
    "eval_strategy": "eval_steps",
}

_FLAG = re.compile(r"--[A-Za-z][\w-]*")


class Parser(argparse.ArgumentParser):
    """An argument parser for which `--out-dir` is `--out_dir`, and whose errors are one line."""

    def parse_known_args(self, args=None, namespace=None):
        """Parse, with dashes inside flag names turned into underscores."""
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([_underscore(word) for word in args], namespace)

    def parse_args(self, args=None, namespace=None):
        """Parse; an unknown flag raises `BadFlag` with a suggestion, before one that is missing does."""
        words = [_underscore(word) for word in (sys.argv[1:] if args is None else args)]
        names = [word.partition("=")[0] for word in words if _is_flag(word)]
        unknown = [name for name in names if name not in self.flag_names()]
        if not unknown:
            values, unknown = self.parse_known_args(words, namespace)
        if unknown:
            raise BadFlag(f"{unknown[0]}: unknown flag; {suggest(unknown[0], self.flag_names())}")
        return values

    def flag_names(self) -> list[str]:
        """Return all flags, with their dashes in front."""
        return [name for action in self._actions for name in action.option_strings]

    def error(self, message: str):
        """Raise what argparse found wrong as `BadFlag`."""
        raise BadFlag(f"{message.removeprefix('argument ')}; see --help")


def _is_flag(word: str) -> bool:
    # A value may begin with dashes too ("-- be brief --"), and is left as it is.
    return bool(_FLAG.fullmatch(word.partition("=")[0]))


def _underscore(word: str) -> str:
    if not _is_flag(word):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def build_parser(description: str) -> Parser:
    """Return a parser with `--debug`; `description` is the script's docstring, shown as it stands."""
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def print_line(text: str, stream) -> None:
    """Print a line; a stream whose reader has gone, or whose device is full, goes to /dev/null from then on.

    For what must not end because nobody listens any more: a run of days.
    """
    try:
        print(text, file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def run_main(main, argv: list[str] | None = None) -> None:
    """Run a script's `main` and end the process with the exit code of DESIGN.

    An error is one line on stderr; the traceback shows only with `--debug`.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        main(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = None  # the reader has gone, as `| head` does: Python is not to flush at the exit
    except (FirstwordsError, KeyboardInterrupt, OSError) as error:
        if "--debug" in argv:
            traceback.print_exc()
        code, text = describe_error(error)
        print_line(f"error: {_escape(text)}", sys.stderr)
        sys.exit(code)
    sys.exit(0)


def _escape(text: str) -> str:
    # A message may quote names and values of strangers: none of them is to act on the terminal.
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def describe_error(error: BaseException) -> tuple[int, str]:
    """Return the exit code and the line of what a user can cause."""
    if isinstance(error, FirstwordsError):
        return error.exit_code, str(error)
    if isinstance(error, OSError):
        return IOFailed.exit_code, f"{error.filename or 'system'}: {error.strerror or error}"
    return 130, "stopped by Ctrl-C"


def _flag(default, help: str, **options):
    return field(default=default, metadata={"help": help, **options})


@dataclass
class TrainFlags:
    """The flags of train.py that are our own; any field of `TrainingArguments` may stand beside them."""

    data_dir: Path = _flag(None, "folder that a prep script wrote")
    model_dir: Path = _flag(None, "the run: checkpoints, TensorBoard, train.log, at its end the model")
    init_model_dir: str = _flag(None, "weights to start from: a run, a checkpoint-<step>, hub:<id>")
    cfg: Path = _flag(None, "GPT2Config as JSON, or a name in configs/models; random weights")
    recipe: Path = _flag(None, "flat YAML of flags; flags on the command line beat it")
    seq_len: int = _flag(1024, "tokens in a row, at most n_positions")
    batch_size: int = _flag(8, "rows in a micro-batch")
    grad_accum: int = _flag(1, "micro-batches in an optimizer step, over all processes")
    lr: float = _flag(6e-4, "highest learning rate")
    warmup_steps: float = _flag(0.02, "optimizer steps of warm-up; below 1 a share of --max_steps")
    max_steps: int = _flag(None, "optimizer steps in all")
    epochs: float = _flag(None, "passes over the data, instead of --max_steps")
    hours: float = _flag(None, "hours of training, instead of --max_steps; the schedule ends with them")
    weight_decay: float = _flag(0.1, "on matrices and embeddings; never on norms and biases")
    bf16: bool = _flag(False, "compute in bfloat16 (an error where the device cannot)")
    recompute: str = _flag(
        "none",
        "what the backward pass computes again instead of keeping it: selective (norms, GELU, sums), "
        "full (whole blocks)",
        choices=["none", "selective", "full"],
    )
    log_steps: int = _flag(20, "optimizer steps between lines in train.log")
    save_steps: int = _flag(500, "optimizer steps between checkpoints")
    eval_steps: int = _flag(None, "optimizer steps between evaluations; default --save_steps, 0 never")
    save_total_limit: int = _flag(2, "checkpoints that are kept, at least 1")
    assistant_only_loss: bool = _flag(True, "learn assistant turns alone; --no_... learns every token")
    overlong: str = _flag("drop", "conversations longer than --seq_len", choices=["drop", "truncate"])
    optim: str = _flag(
        "adamw_torch_fused", "adamw_torch_fused, muon, normuon, adamw_bnb_8bit, or any of Trainer's"
    )
    muon_momentum: float = _flag(0.95, "of muon and normuon: the weight of the gradients before")
    lr_scheduler_type: str = _flag("cosine", "cosine, warmup_stable_decay, or any of Trainer's")
    decay_steps: float = _flag(
        0.2, "steps of decay, of warmup_stable_decay and of a COOLDOWN; below 1 a share"
    )
    min_lr_ratio: float = _flag(0.0, "where the schedule ends, as a share of --lr")
    tokenizer: str = _flag(None, "for bins without corpus.json: the tokenizer that made them")
    attention: str = _flag(
        "auto",
        "within packed rows on a GPU: varlen (torch's), flash (flash-attn), dense (a mask)",
        choices=["auto", "varlen", "flash", "dense"],
    )
    device: str = _flag("auto", "where to train", choices=["auto", "cpu", "cuda", "mps"])
    seed: int = _flag(0, "of weights, data order and dropout")
    on_nan: str = _flag("stop", "at a NaN or infinity: stop, or go back", choices=["stop", "rollback"])
    max_rollbacks: int = _flag(3, "batches that --on_nan rollback may go back for and leave out")
    resume: str = _flag("auto", "auto: go on with a used --model_dir; no: refuse one", choices=["auto", "no"])
    allow_change: str = _flag("", "flags that may differ from the run gone on with, comma between")
    sample_prompts: Path = _flag(None, "text file, a prompt a line, answered at each evaluation")
    keep_text: Path = _flag(
        None, "stage A's token store, whose loss stage B logs; default: its parent's data"
    )
    eval_tasks: str = _flag(None, "asked at each evaluation: hellaswag:200, the number of items")
    hellaswag_data: str = _flag(None, "its items: .jsonl, .parquet or a folder; default: from the Hub")
    preflight: bool = _flag(False, "say what the run would take, by ten steps thrown away, and end")
    explain: bool = _flag(False, "say what each setting is, where it comes from and what it does, and end")
    vram_gb: float = _flag(None, "memory to keep to, as the size of a GPU in GB; default: what is free")
    batch_tokens: int = _flag(None, "tokens in a step; --batch_size, --grad_accum and --recompute follow")
    report_to: str = _flag("", "wandb, trackio, or both with a comma, beside TensorBoard; or none at all")
    debug: bool = _flag(False, "show the traceback of an error")


def build_train_parser(description: str) -> Parser:
    """Return train.py's parser; every default is left out, so that what was said can be told apart."""
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="Any field of transformers.TrainingArguments is a flag and a recipe key too.",
    )
    for spec in fields(TrainFlags):
        options = dict(spec.metadata)
        default = "" if spec.default in (None, "") else f" (default {spec.default})"
        options["help"] += default.replace("%", "%%")
        if spec.type is bool:
            names = [f"--{spec.name}", f"--no_{spec.name}"]
            parser.add_argument(
                names[0],
                action="store_true",
                dest=spec.name,
                default=argparse.SUPPRESS,
                help=options["help"],
            )
            parser.add_argument(
                names[1],
                action="store_false",
                dest=spec.name,
                default=argparse.SUPPRESS,
                help=argparse.SUPPRESS,
            )
        else:
            parser.add_argument(f"--{spec.name}", type=spec.type, default=argparse.SUPPRESS, **options)
    return parser


def parse_train_args(argv: list[str], description: str = "") -> tuple[TrainFlags, dict]:
    """Parse recipe and flags.

    Returns:
        our flags, and the fields of `TrainingArguments` that were named beside them.

    Raises:
        BadFlag: for an unknown flag or key, or a value of the wrong type.
        MissingInput: when the recipe is not there.
    """
    parser = build_train_parser(description)
    recipe = getattr(parser.parse_known_args(argv)[0], "recipe", None)
    words = [*(_recipe_words(recipe, parser) if recipe else []), *argv]
    values, extra = parser.parse_known_args(words)
    fields = _parse_trainer_fields(extra, parser) if extra else {}
    _take_checkpointing(values, fields)
    return TrainFlags(**vars(values)), fields


def _take_checkpointing(values: argparse.Namespace, fields: dict) -> None:
    # What Trainer calls checkpointing is a level of ours, and is done here alone.
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        if name in fields:
            value = fields.pop(name)
            level = "full" if value else "none"
            if getattr(values, "recompute", level) != level:
                raise BadFlag(
                    f"--{name}: {value} is --recompute {level}, not {values.recompute}; leave one out"
                )
            values.recompute = level


def find_origins(argv: list[str]) -> dict[str, str]:
    """Return where each flag of ours that was said comes from: `flag` or `recipe`."""
    parser = build_train_parser("")
    said, _ = parser.parse_known_args(argv)
    recipe = getattr(said, "recipe", None)
    read, _ = parser.parse_known_args(_recipe_words(recipe, parser) if recipe else [])
    return dict.fromkeys(vars(read), "recipe") | dict.fromkeys(vars(said), "flag")


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
    if not 0 <= flags.muon_momentum < 1:
        raise BadFlag(f"--muon_momentum: is {flags.muon_momentum}; give 0 or more, below 1")
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
                "leave one of them out; --vram_gb makes it choose less"
            )
    if flags.batch_tokens < flags.seq_len or flags.batch_tokens % flags.seq_len:
        rows = max(1, round(flags.batch_tokens / flags.seq_len))
        raise BadFlag(
            f"--batch_tokens {flags.batch_tokens}: is no whole number of rows of --seq_len {flags.seq_len}; "
            f"give {rows * flags.seq_len}"
        )


def _recipe_words(path: Path, parser: Parser) -> list[str]:
    import yaml

    if not path.is_file():
        near = suggest(path.name, [p.name for p in path.parent.glob("*.yaml")])
        raise MissingInput(f"--recipe {path}: is not there; {near}")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadFlag(f"--recipe {path}: broken YAML ({str(error).splitlines()[0]}); mend it") from None
    if not isinstance(recipe, dict):
        raise BadFlag(f"--recipe {path}: must be `key: value` lines; see configs/recipes")
    try:
        words = [_recipe_word(str(key).replace("-", "_"), value, parser) for key, value in recipe.items()]
        parser.parse_known_args(words)
    except BadFlag as error:
        raise BadFlag(f"--recipe {path}: {error}") from None
    return words


def _recipe_word(key: str, value, parser: Parser) -> str:
    known = [name.removeprefix("--") for name in parser.flag_names() if name not in ("-h", "--help")]
    if key not in known and key not in _trainer_field_names():
        raise BadFlag(f"unknown key {key!r}; {suggest(key, known + _trainer_field_names())}")
    if key == "recipe":
        raise BadFlag(f"{key} is {value!r}; a recipe names no other, copy its lines")
    if value is None or isinstance(value, list | dict):
        raise BadFlag(f"{key} is {value!r}; recipes are flat, give one value")
    takes_no_value = any(
        f"--{key}" in action.option_strings and action.nargs == 0 for action in parser._actions
    )
    if not takes_no_value:
        # YAML reads a bare `no` as false (`resume: no`).
        return f"--{key}={'no' if value is False else value}"
    if not isinstance(value, bool):
        raise BadFlag(f"{key} is {value!r}; write true or false")
    opposite = f"--{key.removeprefix('no_')}" if key.startswith("no_") else f"--no_{key}"
    return f"--{key}" if value else opposite


def _trainer_field_names() -> list[str]:
    from transformers import TrainingArguments

    return [spec.name for spec in fields(TrainingArguments)]


def _parse_trainer_fields(words: list[str], ours: Parser) -> dict:
    from transformers import HfArgumentParser, TrainingArguments

    parser = HfArgumentParser(TrainingArguments, allow_abbrev=False, add_help=False)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    parser.error = ours.error
    values, unknown = parser.parse_known_args(words)
    if unknown:
        is_launchers = unknown[0].startswith("--mixed_precision")
        if unknown[0].startswith("--fp8") or is_launchers and "fp8" in " ".join(unknown[:2]):
            raise BadFlag(f"{unknown[0]}: nothing is computed in fp8 here, with any package; use --bf16")
        if is_launchers:
            raise BadFlag(f"{unknown[0]}: is a word of accelerate's; use --bf16, or leave it out")
        known = ours.flag_names() + [f"--{name}" for name in _trainer_field_names()]
        raise BadFlag(f"{unknown[0]}: unknown flag; {suggest(unknown[0].split('=')[0], known)}")
    for name in vars(values):
        if name in OUR_WORDS:
            raise BadFlag(f"--{name}: is ours to set; use --{OUR_WORDS[name]}")
    return vars(values)
