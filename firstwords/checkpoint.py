"""CONTRACT: the checkpoint folder and the run folder.

    runs/chat/checkpoint-400/   model, tokenizer, optimizer, scheduler, rng, trainer state, manifest.json
    runs/chat/                  the finished model, manifest.json, COMPLETE, train.log, runs/ (TensorBoard)

A checkpoint is complete or it is not there: written to a staging folder, hashed, synced, renamed. A run is
finished when `COMPLETE` stands in it. Invariants: whatever this module returns as good has every file that
its manifest names, byte for byte; and an old checkpoint goes only when enough newer ones are good.
"""

import hashlib
import json
import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2Config, PreTrainedTokenizerBase

from firstwords import atomic
from firstwords.errors import Damaged, IOFailed, Mismatch, MissingInput, suggest
from firstwords.hub import download_files
from firstwords.model import CONFIG_KEYS, GPT2LMHeadModel, find_inner
from firstwords.template import CHAT_TEMPLATE
from firstwords.tokenizer import TOKENIZER_FILES, Tokenizer

logger = logging.getLogger(__name__)

MANIFEST, COMPLETE = "manifest.json", "COMPLETE"
WEIGHTS = "model.safetensors"

# The longest configuration or manifest that is read; ours have a few thousand bytes.
JSON_BYTES = 1 << 20

# Of a checkpoint, what only its own run needs to go on.
STATE_FILES = ("optimizer.pt", "scheduler.pt", "scaler.pt", "trainer_state.json")
STATE_FILES += ("optimizer.bin", "pytorch_model_fsdp.bin")  # of FSDP
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What old GPT-2 files hold beside the weights: the causal mask.
_BUFFERS = (".attn.bias", ".attn.masked_bias")
_SPECIAL_IDS = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "model_type")


def write_manifest(folder: Path, meta: dict) -> None:
    """Write `manifest.json`: `meta`, size and sha256 of every file in the folder, and a sha256 of all that.

    Args:
        folder: a staging folder with all its files in place.
        meta: no clock time in it; two runs of the same flags write the same bytes.
    """
    paths = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name != MANIFEST]
    files = {path.name: _describe_file(path) for path in paths}
    manifest = {**meta, "files": files}
    sealed = {**manifest, "sha256": _hash_manifest(manifest)}
    (folder / MANIFEST).write_text(atomic.format_json(sealed), encoding="utf-8")


def _hash_manifest(manifest: dict) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(atomic.format_json(rest).encode()).hexdigest()


def _describe_file(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "sha256": atomic.hash_file(path)}


def read_manifest(folder: Path) -> dict:
    """Return the manifest, or `{}` of a plain Hugging Face folder that has none.

    Raises:
        Damaged: when it is there and broken, or a word of it is not what was written.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    manifest = _read_json(path)
    files, counts = manifest.get("files"), [manifest.get(key, 0) for key in ("step", "longest_row")]
    # A name that leads elsewhere would have us read, and tell about, what lies there.
    is_ours = isinstance(files, dict) and all(name and Path(name).name == name for name in files)
    if not is_ours or any(type(count) is not int or count < 0 for count in counts):
        raise Damaged(f"{path}: is broken; go back to another checkpoint")
    sha256 = _hash_manifest(manifest)
    if manifest.get("sha256") != sha256:
        raise Damaged(
            f"{path}: is not what was written (sha256 {str(manifest.get('sha256')):.8}, not {sha256:.8}); go "
            "back to another checkpoint"
        )
    return manifest


def _read_json(path: Path) -> dict:
    try:
        if path.stat().st_size > JSON_BYTES:
            raise ValueError
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise Damaged(f"{path}: is broken; go back to another checkpoint")
    return values


def is_chat(manifest: dict) -> bool:
    """Tell whether assistant turns were learned, and these alone: stage B. Of no manifest nobody knows."""
    return manifest.get("flags", {}).get("assistant_only_loss") == "True"


def find_context(manifest: dict, config: GPT2Config) -> int:
    """Return the tokens that a chat may use: the longest row that was trained, else all positions."""
    return manifest.get("longest_row") or config.n_positions


def read_step(folder: Path | None) -> int:
    """Return the optimizer step of a checkpoint, 0 of None."""
    return read_manifest(folder)["step"] if folder else 0


def verify(folder: Path) -> None:
    """Check every file against the manifest.

    Raises:
        Damaged: naming the first file that is missing, of another size, or of other bytes.
    """
    manifest = read_manifest(folder)
    if not manifest:
        raise Damaged(f"{folder}: has no {MANIFEST}; it was not written to its end")
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise Damaged(f"{path}: is missing; go back to another checkpoint")
        found = _describe_file(path)
        if found != expected:
            raise Damaged(
                f"{path}: is not the file that was written ({_name_file(found)}, not "
                f"{_name_file(expected)}); go back to another checkpoint"
            )


def _name_file(described) -> str:
    try:
        return f"{described['bytes']} bytes of sha256 {described['sha256']:.8}"
    except (TypeError, KeyError, ValueError):
        return repr(described)[:80]


def is_whole(folder: Path) -> bool:
    """Tell whether `verify` finds nothing."""
    try:
        verify(folder)
    except Damaged:
        return False
    return True


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the `checkpoint-<step>` folders that have a manifest, the newest step first."""
    return [path for path in _list_named(run_dir) if _is_ours(path)]


def read_manifests(run_dir: Path) -> list[dict]:
    """Return the manifests of the run's checkpoints, the newest first; what is broken is passed over."""
    manifests = []
    for folder in list_checkpoints(run_dir):
        with suppress(Damaged):
            manifests.append(read_manifest(folder))
    return manifests


def _list_named(run_dir: Path) -> list[Path]:
    """Return whatever is named `checkpoint-<step>`, the highest step first."""
    named = [path for path in run_dir.glob("checkpoint-*") if path.name[len("checkpoint-") :].isdecimal()]
    return sorted(named, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def _is_ours(path: Path) -> bool:
    return not path.is_symlink() and (path / MANIFEST).is_file()


def find_resumable(run_dir: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that verifies, and why what is named like a newer one was passed over.

    Raises:
        Damaged: when there are checkpoints and none verifies.
    """
    passed_over, damaged = [], []
    for folder in _list_named(run_dir):
        try:
            if not _is_ours(folder):
                raise Damaged(f"{folder}: is no folder with a {MANIFEST}, torn or not ours; it is left alone")
            verify(folder)
        except Damaged as error:
            passed_over.append(str(error))
            damaged += [str(error)] if _is_ours(folder) else []
        else:
            return folder, passed_over
    if damaged:
        raise Damaged(f"{run_dir}: no checkpoint is whole ({damaged[0]}); start in a new folder")
    return None, passed_over


def set_aside(run_dir: Path, step: int) -> list[Path]:
    """Rename checkpoints beyond `step` (passed over as damaged) to `*.corrupt`; nothing is deleted."""
    return [_move_aside(folder) for folder in list_checkpoints(run_dir) if _step_of(folder) > step]


def _move_aside(path: Path) -> Path:
    number = len(list(path.parent.glob(f"{path.name}.corrupt*")))
    return path.rename(path.with_name(f"{path.name}.corrupt{number or ''}"))


def publish(staging: Path, run_dir: Path, *, keep: int, verified: dict[Path, tuple] | None = None) -> None:
    """Make a staged checkpoint appear in the run, then prune the oldest ones.

    What else has its name is kept aside, unless it is a checkpoint of ours.

    Args:
        staging: hashed as it was written, and named `checkpoint-<step>`.
        run_dir: the run.
        keep: checkpoints that stay.
        verified: what this process knows to be good, see `prune`; kept from one save to the next.

    Raises:
        IOFailed: when the disk refuses; what was there before is untouched.
    """
    target = run_dir / staging.name
    try:
        atomic.sync_folder(staging)
        if os.path.lexists(target) and not _is_ours(target):
            _move_aside(target)
        atomic.replace_folder(staging, target)
        known = {} if verified is None else verified
        known[target] = stamp_files(target)
        prune(run_dir, keep=keep, verified=known)
    except OSError as error:
        raise IOFailed(f"{run_dir}: saving failed ({error.strerror}); free some space") from None


def prune(run_dir: Path, *, keep: int, verified: dict[Path, tuple]) -> None:
    """Delete the checkpoints that are older than `keep` good ones: by step, never by file time.

    Args:
        verified: stamps of the checkpoints whose bytes this process has hashed. Where the stamp is the same,
            nobody has written there since, and 1.5 GB of a 124M run are not read again at each save (1.2 s,
            measured). A disk that changes bytes by itself is seen when the run is gone on with, where every
            byte is read. The others are read here, and added.
    """
    num_good = 0
    for folder in list_checkpoints(run_dir):
        if num_good >= keep:
            atomic.remove_folder(folder)
            verified.pop(folder, None)
        elif verified.get(folder) == (stamp := stamp_files(folder)):
            num_good += 1
        elif is_whole(folder):
            verified[folder] = stamp
            num_good += 1


def stamp_files(folder: Path) -> tuple:
    """Return name, size, time of the last write and inode of every file in the folder."""
    stats = [(path.name, path.stat()) for path in sorted(folder.iterdir())]
    return tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats)


def publish_final(checkpoint: Path, run_dir: Path) -> None:
    """Make the run folder itself the finished model: the files of `checkpoint`, then `COMPLETE`."""
    state = (*STATE_FILES, MANIFEST, *(p.name for p in checkpoint.glob("rng_state*")))
    files = [path for path in checkpoint.iterdir() if path.is_file() and path.name not in state]
    meta = {key: value for key, value in read_manifest(checkpoint).items() if key not in ("files", "sha256")}
    staging = run_dir / f"{atomic.STAGING}{os.getpid()}-final"
    staging.mkdir()
    try:
        for path in files:
            shutil.copyfile(path, staging / path.name)
        write_manifest(staging, meta)
        atomic.sync_folder(staging)
        # The manifest last: where it stands, every file that it names does.
        for path in sorted(staging.iterdir(), key=lambda path: path.name == MANIFEST):
            path.rename(run_dir / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    atomic.write_text(run_dir / COMPLETE, f"step {meta['step']}\n")


def is_complete(run_dir: Path) -> bool:
    """Tell whether the run reached its last step."""
    return (run_dir / COMPLETE).is_file()


def find_checkpoint(model_dir: Path) -> Path:
    """Return the folder to load for chat or evaluation.

    Args:
        model_dir: a run (the finished model when `COMPLETE`, else its newest whole checkpoint), one
            `checkpoint-<step>`, or a plain Hugging Face folder.

    Raises:
        MissingInput: when nothing is there; names what is near.
        Damaged: when what is there is not whole.
    """
    check_folder(model_dir, "--model_dir")
    if is_complete(model_dir) or (model_dir / MANIFEST).is_file():
        verify(model_dir)
        return model_dir
    folder, passed_over = find_resumable(model_dir)
    for reason in passed_over:
        logger.warning("passed over: %s", reason)
    if folder is None and (model_dir / "config.json").is_file():
        return model_dir
    if folder is None:
        raise MissingInput(f"--model_dir {model_dir}: holds no checkpoint yet; train one with train.py")
    return folder


def find_init(model_dir: Path, flag: str = "--init_model_dir") -> Path:
    """Return the folder of a model that is done: to start another stage from, or to hand on.

    Args:
        model_dir: a finished run, one `checkpoint-<step>`, or a plain Hugging Face folder.
        flag: what named it, for the errors.

    Raises:
        MissingInput: when nothing is there.
        Mismatch: for a run that has not reached its end.
        Damaged: when a file is not what the manifest says.
    """
    check_folder(model_dir, flag)
    if list_checkpoints(model_dir) and not is_complete(model_dir):
        newest = list_checkpoints(model_dir)[0].name
        raise Mismatch(
            f"{flag} {model_dir}: this run has not reached its end; let it finish, or name "
            f"{model_dir / newest}"
        )
    if is_complete(model_dir) or (model_dir / MANIFEST).is_file():
        verify(model_dir)
        return model_dir
    if not (model_dir / "config.json").is_file():
        raise MissingInput(f"{flag} {model_dir}: holds no model; name a run or a checkpoint")
    return model_dir


def check_folder(folder: Path, flag: str) -> None:
    """Raise `MissingInput` with the nearest names when `folder` is no folder."""
    if not folder.is_dir():
        names = [p.name for p in folder.parent.glob("*") if p.is_dir()]
        near = suggest(folder.name, names) if names else "nothing is beside it"
        raise MissingInput(f"{flag} {folder}: is no folder; {near}")


def download_model(repo_id: str, *, flag: str = "--init_model_dir") -> Path:
    """Fetch a model folder from the Hub (safetensors and tokenizer only), or from its cache.

    Args:
        repo_id: such as `gpt2`.
        flag: which asked for it, for the error.

    Raises:
        BadFlag, MissingInput: as `hub.download_files`; and when it has no safetensors.
    """
    folder = download_files(
        repo_id,
        (WEIGHTS, "config.json", *TOKENIZER_FILES),
        asked_by=f"{flag} hub:{repo_id}",
        otherwise="download it elsewhere and name the folder",
    )
    if not (folder / WEIGHTS).is_file():
        raise MissingInput(f"{flag} hub:{repo_id}: has no {WEIGHTS}; {_tell_conversion(repo_id)}")
    return folder


def load_model(folder: Path, *, dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    """Load weights for training, chat or evaluation: safetensors alone, no code from the folder.

    Args:
        folder: from `find_checkpoint` or `find_init`.
        dtype: of the weights in memory.

    Returns:
        the model in evaluation mode, on the CPU.

    Raises:
        MissingInput: when config or weights are not there.
        Damaged: when one of them cannot be read.
        Mismatch: when the weights are not those of the configuration.
    """
    config = read_model_config(folder)
    weights = _read_weights(folder / WEIGHTS)
    _check_sizes(folder, config, weights)
    # Neither the folder nor its name reaches Hugging Face's loader, which would act on what else may lie
    # there: adapters, shards, generation settings. attn_implementation is named here, so that no name in
    # config.json can reach a kernel loader; the model itself puts ours in its place.
    try:
        model, info = GPT2LMHeadModel.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            attn_implementation="sdpa",
            dtype=dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (ValueError, KeyError, RuntimeError) as error:
        raise Damaged(f"{folder}: gives no model ({_first_line(error)})") from None
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *(m[0] for m in info["mismatched_keys"])]
    if wrong:
        raise Mismatch(
            f"{folder}: model.safetensors is not of the shape in config.json ({len(wrong)} tensors, the "
            f"first {wrong[0]!r}); name a folder whose files belong together"
        )
    return model.eval()


def build_twin(tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    """Return Hugging Face's tokenizer with the same ids and our template.

    It is made from ours and not read from the folder of the data: what somebody wrote there into
    `chat_template.jinja` or `tokenizer_config.json` would go into every checkpoint.
    """
    with TemporaryDirectory() as folder:
        tokenizer.save(Path(folder), chat_template=CHAT_TEMPLATE)
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise MissingInput(f"{path.parent}: has no {WEIGHTS}; {_tell_conversion(path.parent)}")
    try:
        weights = load_file(path)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise Damaged(f"{path}: the weights cannot be read ({_first_line(error)})") from None
    if "lm_head.weight" in weights and not weights.keys() & {"wte.weight", "transformer.wte.weight"}:
        # A file holds shared weights once, and the converters disagree about under which name.
        weights["transformer.wte.weight"] = weights["lm_head.weight"]
    return {name: tensor for name, tensor in weights.items() if not name.endswith(_BUFFERS)}


def _tell_conversion(name: str | Path) -> str:
    code = (
        f"n, to = {str(name)!r}, 'converted'; from transformers import AutoTokenizer, GPT2LMHeadModel; "
        "[kind.from_pretrained(n).save_pretrained(to) for kind in (AutoTokenizer, GPT2LMHeadModel)]"
    )
    return f'pickled weights are never loaded, convert them first: python -c "{code}"'


def _check_sizes(folder: Path, config: GPT2Config, weights: dict[str, torch.Tensor]) -> None:
    """Refuse a configuration that asks for more than its weights have, before memory is taken for it."""
    shapes = {name.removeprefix("transformer."): tuple(tensor.shape) for name, tensor in weights.items()}
    asked = {
        "wte.weight": (config.vocab_size, config.n_embd),
        "wpe.weight": (config.n_positions, config.n_embd),
        "h.0.mlp.c_fc.bias": (find_inner(config),),
    }
    wrong = [
        f"{name} is {shapes.get(name)}, not {shape}"
        for name, shape in asked.items()
        if shapes.get(name) != shape
    ]
    depth = sum(name.startswith("h.") and name.endswith(".ln_1.weight") for name in shapes)
    if depth != config.n_layer:
        wrong.append(f"it has {depth} layers, not {config.n_layer}")
    if config.n_head < 1 or config.n_embd % config.n_head:
        wrong.append(f"{config.n_embd} numbers cannot be parted among {config.n_head} heads")
    wrong += [
        f"{name} is {t.dtype}, not plain floats" for name, t in weights.items() if t.dtype not in _FLOATS
    ]
    if wrong:
        raise Mismatch(
            f"{folder}: model.safetensors is not of the shape in config.json ({wrong[0]}); name a folder "
            "whose files belong together"
        )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def read_model_config(folder: Path) -> GPT2Config:
    """Read the shape of a model from its folder; errors as of `load_model`."""
    path = folder / "config.json"
    if not path.is_file():
        raise MissingInput(f"{folder}: has no config.json; name a model folder")
    values = _read_json(path)
    if values.get("model_type") != "gpt2":
        raise Mismatch(f"{folder}: is a {values.get('model_type')!r:.40} model, not GPT-2; name a GPT-2")
    known = (*CONFIG_KEYS, *_SPECIAL_IDS)
    try:
        config = GPT2Config(**{key: values[key] for key in known if key in values})
    except (StrictDataclassError, ValueError, TypeError) as error:
        why = " ".join(str(error).split())[:200]
        raise Damaged(f"{path}: gives no model ({why}); go back to another checkpoint") from None
    if config.activation_function == "gelu_new":
        # The same function in one kernel; under the name in the Hub's GPT-2 it is composed of nine.
        config.activation_function = "gelu_pytorch_tanh"
    return config
