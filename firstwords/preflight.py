"""A run that is to begin -> a refusal now of what it could not do in the end.

    check_disk(Path("runs/chat"), num_checkpoints=3, model_bytes=498_000_000, state_bytes=995_000_000)

Invariant: nothing is written, nothing is trained; what is needed is counted from the shapes alone.
"""

import resource
import shutil
from pathlib import Path

from firstwords import checkpoint
from firstwords.errors import IOFailed

# Beside the weights and the optimizer's state: tokenizer, logs, and what the file system takes for itself.
MARGIN, SMALL_FILES = 1.02, 16 << 20


def count_model_bytes(model) -> int:
    """Return the bytes of `model.safetensors`: shared weights once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def count_state_bytes(model, optim: str) -> int:
    """Return the bytes of `optimizer.pt`: two numbers a weight, but for optimizers known to keep fewer.

    Args:
        optim: as in `--optim`. Muon keeps one momentum of each hidden matrix; bitsandbytes keeps 8 bits of
            what is no embedding and no vector.
    """
    hidden = sum(p.numel() for name, p in model.named_parameters() if ".h." in name and p.ndim > 1)
    rest = sum(parameter.numel() for parameter in model.parameters()) - hidden
    bytes_per_hidden = 4 if optim == "muon" else 2 if "8bit" in optim else 8
    return hidden * bytes_per_hidden + rest * 8


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
    # At the end the weights lie beside the checkpoints once more.
    needed = int((num_checkpoints * (model_bytes + state_bytes) + model_bytes) * MARGIN) + SMALL_FILES
    present = sum(
        path.stat().st_size for folder in checkpoint.list_checkpoints(run_dir) for path in folder.iterdir()
    )
    free = shutil.disk_usage(run_dir).free
    if free + present < needed:
        raise IOFailed(
            f"--model_dir {run_dir}: {num_checkpoints} checkpoints and the model need {needed - present:,} "
            f"bytes more, and {free:,} are free; free some, name a folder on another disk, or lower "
            "--save_total_limit"
        )
