"""Flags -> everything that a run is made of, open and checked: device, tokenizer, model, data.

    opened = open_run(flags, {}, Ranks(), print)
    run = build_run(flags, {}, opened, meta, Ranks())        # a RunTrainer, which nothing watches yet

Invariant: what does not fit together, or into memory, is refused before a weight is made; and what is chosen
here (`--device auto`, `--batch_tokens`) is written into the flags.
"""

import os
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path

from torch import cuda
from torch.utils.data import Dataset
from transformers import GPT2Config

from firstwords import checkpoint
from firstwords.args import TrainFlags
from firstwords.dataset import collate, open_train, open_val
from firstwords.errors import BadFlag, Mismatch, MissingInput, suggest
from firstwords.fit import Room, Setting, hold_to
from firstwords.model import (
    GPT2LMHeadModel,
    build_config,
    build_model,
    find_device,
    grow_vocabulary,
    has_bf16,
    quiet_transformers,
    set_generation,
)
from firstwords.model.attention import check_attention
from firstwords.optimizer import MUONS
from firstwords.ranks import Ranks, count_local, find_local
from firstwords.recompute import set_recompute
from firstwords.tokenizer import Tokenizer, has_other_tokenizer, load_tokenizer
from firstwords.trainer import RunMeta, RunTrainer, build_training_arguments, choose_optimizer, count_steps

MODELS = Path(__file__).parents[1] / "configs" / "models"


@dataclass
class Opened:
    """What a run is made of.

    Attributes:
        parent: what the manifest says of the weights that the run starts from, `{}` of random ones.
        max_steps: optimizer steps in all.
        room: the memory there is and what the run takes of it.
    """

    tokenizer: Tokenizer
    model: GPT2LMHeadModel
    parent: dict
    train_set: Dataset
    val_set: Dataset
    max_steps: int
    room: Room

    @property
    def tokens_per_epoch(self) -> float:
        """Real tokens of the training data, padding not counted."""
        return self.train_set.rows_per_epoch * self.train_set.tokens_per_row


def open_run(flags: TrainFlags, extra: dict, ranks: Ranks, say: Callable[[str], None]) -> Opened:
    """Open everything that a run reads, after a look at whether it would fit.

    Args:
        flags: ours; what is chosen is set in them.
        extra: fields of `TrainingArguments` beside them.
        ranks: this process among those of the run.
        say: takes a line for a person.

    Raises:
        OutOfMemory: before a weight is made, when it would not fit.
        FirstwordsError: as the functions below.
    """
    quiet_transformers()
    flags.device = choose_device(flags, extra)
    tokenizer = open_tokenizer(flags)
    folder = find_weights(flags)
    room = open_room(flags, extra, read_shape(flags, folder, tokenizer), ranks)
    model, parent = open_model(flags, folder, tokenizer)
    if parent.get("weights") == NOT_VERIFIED:
        say(f"{flags.init_model_dir}: has no manifest, its files were not verified")
    check_context(flags, model)
    check_attention(flags.attention, flags.device, flags.bf16, model.config.attn_pdrop)
    model.attention = flags.attention
    set_recompute(model, flags.recompute)
    options = {"assistant_only": flags.assistant_only_loss, "overlong": flags.overlong}
    train_set = open_train(flags.data_dir, tokenizer, flags.seq_len, seed=flags.seed, **options)
    val_set = open_val(flags.data_dir, tokenizer, flags.seq_len, **options)
    max_steps = count_steps(flags, train_set.rows_per_epoch)
    return Opened(tokenizer, model, parent, train_set, val_set, max_steps, room)


def build_run(
    flags: TrainFlags, extra: dict, opened: Opened, meta: RunMeta, ranks: Ranks, **options
) -> RunTrainer:
    """Return the trainer of a run, without what watches over it; `options` are those of `RunTrainer`."""
    arguments = build_training_arguments(flags, extra, opened.max_steps, ranks.size)
    return RunTrainer(
        opened.model,
        arguments,
        train_set=opened.train_set,
        val_set=opened.val_set,
        tokenizer=opened.tokenizer,
        meta=meta,
        collate=collate,
        optimizer_cls_and_kwargs=choose_optimizer(flags, arguments),
        **options,
    )


# --- where, and whether it fits there


def choose_device(flags: TrainFlags, extra: dict) -> str:
    """Return `cpu`, `cuda` or `mps`, and refuse what the machine cannot do; each process takes its own GPU.

    Raises:
        BadFlag: for a device that is not there, bf16 that it has not, FSDP without GPUs (accelerate would
            train with plain DDP and say nothing), or more processes than GPUs.
    """
    device = find_device(flags.device)
    if flags.bf16 and not has_bf16(device):
        raise BadFlag(f"--bf16: this {device} cannot compute in bfloat16; use --no_bf16")
    if asks_fsdp(extra) and device != "cuda":
        raise BadFlag(f"--device {device}: FSDP needs GPUs; take configs/accelerate/ddp.yaml or torchrun")
    if asks_fsdp(extra) and flags.optim in MUONS:
        raise BadFlag(
            f"--optim {flags.optim}: needs whole matrices, which FSDP cuts; take configs/accelerate/ddp.yaml"
        )
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


def open_room(flags: TrainFlags, extra: dict, shape: GPT2Config, ranks: Ranks) -> Room:
    """Return the memory there is, in which the run fits; with `--batch_tokens` the setting is chosen.

    Raises:
        BadFlag, OutOfMemory: as `Room.choose` and `Room.check`.
    """
    room = Room(flags, shape, world_size=ranks.size, is_sharded=asks_fsdp(extra))
    if flags.batch_tokens is not None:
        room.choose(read_setting(flags))
        # Each process sees another moment of the memory: what the first has chosen is what all take.
        room.setting = Setting(*ranks.ask_first(lambda: astuple(room.setting)))
    room.check()
    if flags.device == "cuda" and flags.vram_gb is not None:
        hold_to(room.limit)
    return room


def read_shape(flags: TrainFlags, folder: Path | None, tokenizer: Tokenizer) -> GPT2Config:
    """Return the configuration of the model, before there is one."""
    if folder is None:
        return build_config(find_config(flags.cfg), tokenizer)
    config = checkpoint.read_model_config(folder)
    config.vocab_size = max(config.vocab_size, tokenizer.vocab_size_padded)
    return config


def read_setting(flags: TrainFlags) -> Setting | None:
    """Return what an earlier life of the run chose for the same tokens in a step, None without one."""
    for manifest in checkpoint.read_manifests(flags.model_dir)[:1]:
        theirs = manifest["flags"]
        wished = {"batch_tokens": str(flags.batch_tokens), "seq_len": str(flags.seq_len)}
        if wished.items() <= theirs.items():
            return Setting(int(theirs["batch_size"]), int(theirs["grad_accum"]), theirs["recompute"])
    return None


# --- tokenizer and weights

NOT_VERIFIED = "not verified"


def open_tokenizer(flags: TrainFlags) -> Tokenizer:
    """Return the data's tokenizer.

    Raises:
        MissingInput: when there is none.
        Mismatch: when `--tokenizer` names another one than the data have.
    """
    checkpoint.check_folder(flags.data_dir, "--data_dir")
    folder = Path(flags.tokenizer) if flags.tokenizer else flags.data_dir
    if not (folder / "tokenizer.json").is_file():
        raise MissingInput(
            f"--data_dir {flags.data_dir}: holds no tokenizer.json; name the folder of the tokenizer that "
            "made the data with --tokenizer"
        )
    tokenizer = load_tokenizer(folder)
    if has_other_tokenizer(flags.data_dir, tokenizer):
        raise Mismatch(f"--tokenizer {folder}: is not the one in {flags.data_dir}; leave it out")
    return tokenizer


def find_weights(flags: TrainFlags) -> Path | None:
    """Return the folder of the weights to start from, None for random ones."""
    if flags.cfg is not None:
        return None
    if flags.init_model_dir.startswith("hub:"):
        return checkpoint.download_model(flags.init_model_dir.removeprefix("hub:"))
    return checkpoint.find_init(Path(flags.init_model_dir))


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


def open_model(flags: TrainFlags, folder: Path | None, tokenizer: Tokenizer) -> tuple[GPT2LMHeadModel, dict]:
    """Return the model to train and what the manifest says about its parent (`{}` of random weights)."""
    if folder is None:
        return build_model(find_config(flags.cfg), tokenizer, seed=flags.seed), {}
    model = checkpoint.load_model(folder)
    parent = check_parent(flags.init_model_dir, folder, model, tokenizer)
    grow_vocabulary(model, tokenizer, seed=flags.seed)
    set_generation(model, tokenizer)
    return model, parent


def check_parent(name: str, folder: Path, model: GPT2LMHeadModel, tokenizer: Tokenizer) -> dict:
    """Return the parent's part of the manifest.

    Args:
        name: what `--init_model_dir` said.
        folder: where that is.

    Raises:
        Mismatch: when the parent's tokenizer is another one than the data's.
    """
    theirs = load_tokenizer(folder)
    if theirs.hash != tokenizer.hash:
        raise Mismatch(
            f"--init_model_dir {name}: its tokenizer ({len(theirs)} tokens, {theirs.hash[:8]}) is not "
            f"the data's ({len(tokenizer)}, {tokenizer.hash[:8]}); prepare the data with --tokenizer {name}"
        )
    manifest = checkpoint.read_manifest(folder)
    if not manifest:
        return {"longest_row": model.config.n_positions, "weights": NOT_VERIFIED}
    return {
        "step": manifest["step"],
        "longest_row": manifest["longest_row"],
        "weights": manifest["files"]["model.safetensors"]["sha256"],
        "data_dir": manifest.get("data_dir"),
        # What it was trained on, and what it began as in its turn: a model card tells all of it.
        **{key: manifest[key] for key in ("sources", "parent") if key in manifest},
    }


def check_context(flags: TrainFlags, model: GPT2LMHeadModel) -> None:
    """Raise `BadFlag` when rows are longer than the model's context."""
    if flags.seq_len > model.config.n_positions:
        raise BadFlag(
            f"--seq_len {flags.seq_len}: the model's context is {model.config.n_positions}; give that or less"
        )
