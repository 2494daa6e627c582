"""A limit of memory -> micro-batch, accumulation and recomputation that keep to it; a step keeps its rows.

    room = Room(flags, config)
    room.check()              # OutOfMemory: what is needed, term by term, and a setting that would fit

Invariant: every setting that is named here takes its steps on the same rows, so that no choice changes what
is learned.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import psutil
import torch
from transformers import GPT2Config

from firstwords.args import TrainFlags
from firstwords.errors import BadFlag, OutOfMemory
from firstwords.memory import Memory, predict_memory
from firstwords.ranks import count_local
from firstwords.recompute import LEVELS

# Tokens in a micro-batch beyond which a device is hardly busier: of a CPU those of the recipes, of a GPU
# an estimate that was not measured.
ENOUGH = {"cpu": 2048, "cuda": 16_384, "mps": 16_384}
# Of a card the driver, CUDA's context and the libraries' workspaces take this first.
TAKEN = 1 << 30
# The share of a limit that is filled where there is a choice. `hold_to` limits what torch reserves on a GPU,
# and that is more than what lies in it, for blocks are rounded up and cut in pieces; and the formulae are
# good to 3 %.
FILLED = {"cpu": 1.0, "cuda": 0.95, "mps": 1.0}
CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Setting:
    """How the rows of a step go through the model.

    Attributes:
        batch_size: rows in a micro-batch.
        grad_accum: micro-batches in a step, over all processes.
        recompute: as in `--recompute`.
    """

    batch_size: int
    grad_accum: int
    recompute: str

    def __str__(self) -> str:
        recompute = "" if self.recompute == "none" else f" --recompute {self.recompute}"
        return f"--batch_size {self.batch_size} --grad_accum {self.grad_accum}{recompute}"


@dataclass(frozen=True)
class Limit:
    """Bytes that a run may take, and in words whose they are."""

    num_bytes: int
    whose: str


@dataclass(frozen=True)
class Advice:
    """What would fit, in words, and the flags of the run that are others then."""

    text: str
    changes: tuple[str, ...] = ()


class Room:
    """The memory that a run may take, and what its settings take of it.

    Args:
        flags: of the run; `choose` writes into them.
        config: of the model.
        world_size: processes among which the micro-batches of a step are shared.
        is_sharded: they share weights, gradients and optimizer too (FSDP).

    Attributes:
        limit: looked up now, before the run takes anything.
    """

    def __init__(
        self, flags: TrainFlags, config: GPT2Config, *, world_size: int = 1, is_sharded: bool = False
    ):
        self.flags, self.config = flags, config
        self.world_size, self.is_sharded = world_size, is_sharded
        self.limit = find_limit(flags.device, flags.vram_gb)

    @property
    def setting(self) -> Setting:
        """What the flags say."""
        return Setting(self.flags.batch_size, self.flags.grad_accum, self.flags.recompute)

    @setting.setter
    def setting(self, setting: Setting) -> None:
        self.flags.batch_size, self.flags.grad_accum = setting.batch_size, setting.grad_accum
        self.flags.recompute = setting.recompute

    def predict(self, setting: Setting, seq_len: int | None = None) -> Memory:
        """Return the memory of a setting, with the run's rows or shorter ones."""
        return predict_memory(
            self.config,
            batch_size=setting.batch_size,
            seq_len=seq_len or self.flags.seq_len,
            bf16=self.flags.bf16,
            optim=self.flags.optim,
            recompute=setting.recompute,
            grad_accum=setting.grad_accum // self.world_size,
            device=self.flags.device,
            world_size=self.world_size,
            is_sharded=self.is_sharded,
        )

    def choose(self, before: Setting | None) -> None:
        """Write the setting for `--batch_tokens` into the flags.

        Args:
            before: that of the run that is gone on with: where it fits it stays, so that the run ends in the
                same bytes.

        Raises:
            BadFlag: when the rows cannot be shared among the processes.
            OutOfMemory: when nothing fits.
        """
        tokens, rows = self.flags.batch_tokens, self.flags.batch_tokens // self.flags.seq_len
        if rows % self.world_size:
            raise BadFlag(
                f"--batch_tokens {tokens}: its {rows} rows cannot be shared among {self.world_size} "
                f"processes; give {-(-rows // self.world_size) * self.world_size * self.flags.seq_len}"
            )
        if before and not self._can_take(before):  # begun with more memory, or by other processes
            before = None
        setting = before or self._find_setting(rows, self.limit.num_bytes)
        if setting is None:
            advice = self._advise_shorter(rows, self.limit.num_bytes)
            raise OutOfMemory(f"--batch_tokens {tokens}: {advice.text}")
        self.setting = setting

    def _can_take(self, setting: Setting) -> bool:
        is_shared = setting.grad_accum % self.world_size == 0
        return is_shared and self.predict(setting).total <= self.limit.num_bytes

    def check(self) -> None:
        """Refuse a run that would not fit.

        Raises:
            OutOfMemory: naming every term, and what would fit.
        """
        memory = self.predict(self.setting)
        if memory.total > self.limit.num_bytes:
            raise OutOfMemory(
                f"{self.setting}: needs {describe_memory(memory)}, but {format_gb(self.limit.num_bytes)} GB "
                f"are {self.limit.whose}; {self._advise(self.limit.num_bytes).text}"
            )

    def advise_less(self) -> Advice:
        """Return a setting that takes clearly less than the present one, which has not fitted."""
        return self._advise(min(self.limit.num_bytes, int(0.75 * self.predict(self.setting).total)))

    def _advise(self, limit: int) -> Advice:
        rows = self.flags.batch_size * self.flags.grad_accum
        setting = self._find_setting(rows, limit)
        if setting is None:
            return self._advise_shorter(rows, limit)
        text = f"{setting} takes the same steps with {format_gb(self.predict(setting).total)} GB"
        instead_of = () if self.flags.batch_tokens is None else ("batch_tokens",)
        return Advice(text, (*instead_of, "batch_size", "grad_accum"))

    def _advise_shorter(self, rows: int, limit: int) -> Advice:
        by_tokens = self.flags.batch_tokens is not None
        changes = ("batch_tokens",) if by_tokens else ("batch_size", "grad_accum")
        seq_len = self.flags.seq_len // 2
        while seq_len > 1:
            setting = self._find_setting(rows, limit, seq_len)
            if setting is not None:
                named = f"--batch_tokens {rows * seq_len}" if by_tokens else setting
                too_long = f"no micro-batch of --seq_len {self.flags.seq_len} fits"
                return Advice(f"{too_long}; {named} --seq_len {seq_len} would fit", (*changes, "seq_len"))
            seq_len //= 2
        least = describe_memory(self.predict(Setting(1, rows, "full")))
        return Advice(f"not one row fits, it needs {least}; take a smaller --cfg")

    def _find_setting(self, rows: int, limit: int, seq_len: int | None = None) -> Setting | None:
        shares = (FILLED[self.flags.device], 1.0)
        found = (self._choose_setting(rows, int(share * limit), seq_len) for share in shares)
        return next(filter(None, found), None)

    def _choose_setting(self, rows: int, limit: int, seq_len: int | None) -> Setting | None:
        return choose_setting(
            lambda setting: self.predict(setting, seq_len),
            rows=rows,
            seq_len=seq_len or self.flags.seq_len,
            limit=limit,
            device=self.flags.device,
            world_size=self.world_size,
        )


def describe_memory(memory: Memory) -> str:
    """Return the peak and its terms, in GB."""
    terms = [(term.name, getattr(memory, term.name)) for term in fields(memory)]
    parts = ", ".join(f"{name} {format_gb(size)}" for name, size in terms if size)
    return f"{format_gb(memory.total)} GB ({parts})"


def format_gb(num_bytes: float) -> str:
    """Return bytes as gigabytes, to three digits."""
    return f"{num_bytes / 1e9:.3g}"


def choose_setting(
    predict: Callable[[Setting], Memory],
    *,
    rows: int,
    seq_len: int,
    limit: int,
    device: str,
    world_size: int = 1,
) -> Setting | None:
    """Return the setting that is likely the fastest of those that keep to the limit, None if none does.

    Recomputing in part costs a few percent, so it is taken where it makes room for a larger micro-batch;
    recomputing all costs another forward pass, so it comes last.

    Args:
        predict: the memory of a setting.
        rows: in a step, over all processes.
        seq_len: tokens in a row.
        limit: bytes.
        device: `cpu`, `cuda` or `mps`.
        world_size: processes among which the micro-batches are shared.
    """
    most = min(rows, max(1, ENOUGH[device] // seq_len))
    sizes = [size for size in range(1, most + 1) if rows % (size * world_size) == 0]
    best: dict[str, int] = {}
    for kind in LEVELS:
        settings = [Setting(size, rows // size, kind) for size in sizes]
        fitting = [each.batch_size for each in settings if predict(each).total <= limit]
        best[kind] = max(fitting, default=0)
    light = {kind: size for kind, size in best.items() if size and kind != "full"}
    is_enough = 2 * best.get("none", 0) >= most
    kind = "none" if is_enough else max(light or best, key=best.get)
    return Setting(best[kind], rows // best[kind], kind) if best[kind] else None


def find_limit(device: str, vram_gb: float | None = None) -> Limit:
    """Return the memory that a run may take on this machine, or less where `--vram_gb` asks for less.

    Of a GPU what is free; of a CPU what the system and the control group that we are in have left, shared
    among the processes of the run there. A card's size in GB is less `TAKEN`: 16 GB are 15 GiB for the run.
    """
    there = Limit(*_find_free(device))
    if vram_gb is None:
        return there
    wished = max(0, int(vram_gb * (1 << 30)) - TAKEN)
    return min(there, Limit(wished, f"allowed by --vram_gb {vram_gb:g}"), key=lambda limit: limit.num_bytes)


def hold_to(limit: Limit) -> None:
    """Let CUDA refuse what goes beyond the limit, on a larger card too."""
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit.num_bytes / total))


def _find_free(device: str) -> tuple[int, str]:
    if device == "cuda":
        # After a rollback torch still holds what the try before had, and will give it again.
        held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + held, "free on the GPU"
    if device == "mps":
        return torch.mps.recommended_max_memory(), "of the GPU"
    rooms = [*_list_cgroup_rooms(), psutil.virtual_memory().available]
    processes = count_local()
    each = f" for each of {processes} processes" if processes > 1 else ""
    return min(rooms) // processes, f"free on this machine{each}"


def _list_cgroup_rooms() -> Iterator[int]:
    """Yield what is left of the limit of each control group that this process is in: of version 1 and 2."""
    names = {
        True: ("memory.max", "memory.current", "inactive_file"),
        False: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    }
    lines = OWN_CGROUP.read_text().splitlines() if OWN_CGROUP.is_file() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers not in ("", "memory"):
            continue
        base = CGROUPS / controllers
        folder = base / path.lstrip("/")
        limit_file, usage_file, cache = names[controllers == ""]
        for group in (folder, *folder.parents):
            limit = _read_number(group / limit_file)
            if limit is not None:
                yield limit - (_read_number(group / usage_file) or 0) + _read_stat(group, cache)
            if group == base:
                break


def _read_number(path: Path) -> int | None:
    text = path.read_text().strip() if path.is_file() else "max"
    return int(text) if text.isdecimal() else None


def _read_stat(group: Path, name: str) -> int:
    # Of what a group uses, the system gives back pages of files that nobody has open.
    lines = (group / "memory.stat").read_text().splitlines() if (group / "memory.stat").is_file() else []
    return next((int(line.split()[1]) for line in lines if line.split()[0] == name), 0)
