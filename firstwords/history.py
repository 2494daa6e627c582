"""A run folder -> all that its files tell: curves, time, figures, samples, what it was made from.

    run = read_run(Path("runs/chat"))
    run.curve("eval/loss").values[-1], run.seconds        ->  (0.013, 540.2)

Invariant: nothing is computed that a file does not say, and no file that is broken or missing hides the rest:
what could not be read stands in `broken`.
"""

import json
import math
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path

from firstwords.checkpoint import is_chat, is_complete, list_checkpoints, read_manifest
from firstwords.errors import FirstwordsError, MissingInput, suggest
from firstwords.prep import REPORTS

# What a run's folder may hold beside its events: attribute of `Run`, and file.
FILES = {
    "evaluation": "evaluation.json",
    "tasks": "evaluation_tasks.json",
}
_RECORD_HEAD = struct.Struct("<QI")


@dataclass(frozen=True)
class Curve:
    """One tag of the event files, each step once, with the seconds of work up to it."""

    steps: tuple[int, ...] = ()
    values: tuple[float, ...] = ()
    seconds: tuple[float, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.steps)


@dataclass
class Run:
    """What is known of a run.

    Attributes:
        folder: the run.
        manifest: of the finished model, or of the newest checkpoint; `{}` without one.
        curves: by tag.
        seconds: of all lives of the run together; the time between them does not count.
        lives: how often it was begun or gone on with.
        is_complete: it reached its last step.
        num_weights: numbers in model.safetensors, by its header; None without one.
        evaluation, tasks: what evaluate.py measured; `{}` when it was not.
        data: `data_report.json` or `corpus.json` of the data, while they are there; and its path.
        replies: lines of `evaluation_replies.jsonl`.
        samples: text of `samples.md`.
        log: lines of train.log.
        broken: a line for each file that is there and cannot be read.
    """

    folder: Path
    manifest: dict = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    seconds: float = 0.0
    lives: int = 0
    is_complete: bool = False
    num_weights: int | None = None
    evaluation: dict = field(default_factory=dict)
    tasks: dict = field(default_factory=dict)
    data: dict = field(default_factory=dict)
    data_path: Path | None = None
    replies: list[dict] = field(default_factory=list)
    samples: str = ""
    log: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def curve(self, tag: str) -> Curve:
        """Return a curve; an empty one for a tag that was not written."""
        return self.curves.get(tag, Curve())

    def last(self, tag: str) -> float | None:
        """Return the newest value of a tag, or None."""
        return self.curve(tag).values[-1] if self.curve(tag) else None

    @property
    def flags(self) -> dict:
        """Flags of the run as they stand in the manifest, each a string."""
        return self.manifest.get("flags", {})

    @property
    def is_chat(self) -> bool:
        """It learned assistant turns: stage B."""
        return is_chat(self.manifest)


def read_run(folder: Path) -> Run:
    """Read everything that a run's folder holds.

    Raises:
        MissingInput: when it is no folder, or holds no run.
    """
    if not folder.is_dir():
        names = [path.name for path in folder.parent.glob("*") if path.is_dir()]
        near = suggest(folder.name, names) if names else "nothing is beside it"
        raise MissingInput(f"{folder}: is no folder; {near}")
    run = Run(folder, is_complete=is_complete(folder))
    _read_manifest(run)
    _read_events(run)
    if not run.manifest and not run.curves:
        raise MissingInput(f"{folder}: holds no run, neither a manifest nor events; name one of train.py")
    for name, file in FILES.items():
        setattr(run, name, _read_json(run, folder / file))
    _read_data(run)
    run.replies = _read_lines(run, folder / "evaluation_replies.jsonl")
    run.samples = _read_text(folder / "samples.md")
    run.log = _read_text(folder / "train.log").splitlines()
    return run


def read_parent(run: Run) -> Run | None:
    """Return the run of stage A, while it is where stage B found it."""
    folder = (run.manifest.get("parent") or {}).get("from")
    if folder is None or folder.startswith("hub:") or not Path(folder).is_dir():
        return None
    try:
        path = Path(folder)
        return read_run(path.parent if re.fullmatch(r"checkpoint-\d+", path.name) else path)
    except FirstwordsError:
        return None


def _read_manifest(run: Run) -> None:
    newest = list_checkpoints(run.folder)
    folder = run.folder if (run.folder / "manifest.json").is_file() or not newest else newest[0]
    try:
        run.manifest = read_manifest(folder)
        run.num_weights = _count_weights(folder / "model.safetensors")
    except (FirstwordsError, OSError, ValueError, struct.error) as error:
        run.broken.append(str(error).splitlines()[0])


def _count_weights(path: Path) -> int | None:
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > 1 << 26:
            raise ValueError(f"{path}: its header would have {length} bytes")
        header = json.loads(file.read(length))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def _read_events(run: Run) -> None:
    """Read the event files with TensorBoard's own reader, which leaves out what a resume wrote again."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    paths = sorted((run.folder / "runs").glob("events.out.tfevents.*"))
    lives = []
    for path in paths:
        if cut := find_cut(path):
            run.broken.append(f"{path}: is cut short at byte {cut}; what stands before was read")
        times = [event.wall_time for event in EventFileLoader(str(path)).Load()]
        if times:
            lives.append((min(times), max(times)))
    run.lives, run.seconds = len(lives), sum(end - begin for begin, end in lives)
    if not paths:
        return
    events = EventAccumulator(str(run.folder / "runs"), size_guidance={"scalars": 0, "tensors": 1})
    events.Reload()
    for tag in events.Tags()["scalars"]:
        points = events.Scalars(tag)
        seconds = tuple(_count_seconds(point.wall_time, lives) for point in points)
        run.curves[tag] = Curve(
            tuple(point.step for point in points), tuple(point.value for point in points), seconds
        )


def _count_seconds(now: float, lives: list[tuple[float, float]]) -> float:
    return sum(max(0.0, min(now, end) - begin) for begin, end in lives)


def find_cut(path: Path) -> int | None:
    """Return where an event file ends within a record, or None for a whole one.

    A record is its length (8 bytes), a checksum (4), the data, and another checksum (4).
    """
    size, place = path.stat().st_size, 0
    with open(path, "rb") as file:
        while place < size:
            head = file.read(_RECORD_HEAD.size)
            if len(head) < _RECORD_HEAD.size:
                return size
            end = place + _RECORD_HEAD.size + _RECORD_HEAD.unpack(head)[0] + 4
            if end > size:
                return size
            file.seek(end)
            place = end
    return None


def _read_json(run: Run, path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
    except (ValueError, OSError):
        pass
    run.broken.append(f"{path}: is no JSON object; make it anew")
    return {}


def _read_data(run: Run) -> None:
    data_dir = run.manifest.get("data_dir")
    for name in REPORTS:
        if data_dir and (Path(data_dir) / name).is_file():
            run.data_path = Path(data_dir) / name
            run.data = _read_json(run, run.data_path)
            return


def _read_lines(run: Run, path: Path) -> list[dict]:
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            run.broken.append(f"{path}:{number}: is no JSON; make it anew")
            break
    return [row for row in rows if isinstance(row, dict)]


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
