"""A dataset's name -> where it lies: files on this disk, or a set on the Hub.

    find_place("data/chat.json")   ->  Place("data/chat.json", files=(Path("data/chat.json"),))
    find_place("alpaca")           ->  Place("tatsu-lab/alpaca", split="train")

Invariants: a thing that looks like a path is only ever local; a mistyped one is an error that names
what is near, and never a download. No file outside a folder is read because of what lies in it.
"""

import glob
import os
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import yaml

from firstwords.atomic import hash_file
from firstwords.errors import BadData, BadFlag, MissingInput, suggest

# Short names that people know, and where those sets live on the Hub today.
HUB_NAMES = {
    "alpaca": "tatsu-lab/alpaca",
    "c4": "allenai/c4",
    "dolly": "databricks/databricks-dolly-15k",
    "fineweb-edu": "HuggingFaceFW/fineweb-edu",
    "openwebtext": "Skylion007/openwebtext",
}
ROW_SUFFIXES = (".csv", ".json", ".jsonl", ".parquet")
TEXT_SUFFIXES = (*ROW_SUFFIXES, ".txt")
# Either may follow one of those, as in `train.jsonl.zst`; pyarrow's names of them.
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
# A name that ends so is meant as a file, whether we can read it or not.
FILE_SUFFIXES = (*TEXT_SUFFIXES, *COMPRESSED, ".jsonlines", ".md", ".ndjson", ".tsv", ".zip")
# `train.jsonl`, `val_2.csv`, `train-00000-of-00002.parquet`: files that belong to one split.
SPLIT_FILE = re.compile(r"(train|test|validation|valid|val|dev)([-_.]?\d.*)?")
GLOB = re.compile(r"[*?\[]")
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
CARD_BYTES = 1 << 24  # the longest dataset card that is read
SPLIT_NAMES = dict.fromkeys(("valid", "val", "dev"), "validation")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a dataset lies: local files, or else a name for `datasets.load_dataset`."""

    name: str
    files: tuple[Path, ...] = ()
    split: str = "train"
    config: str | None = None

    @property
    def on_hub(self) -> bool:
        """Tell whether `datasets` reads it."""
        return not self.files

    def describe(self) -> list[dict]:
        """Return what tells two inputs apart: size and sha256 of each file, or the Hub name."""
        if self.on_hub:
            return [{"hub": self.name, "config": self.config, "split": self.split}]
        return [
            {"file": str(file), "bytes": file.stat().st_size, "sha256": hash_file(file)}
            for file in self.files
        ]


def find_place(
    dataset: str,
    *,
    split: str | None = None,
    config: str | None = None,
    suffixes: tuple[str, ...] = TEXT_SUFFIXES,
) -> Place:
    """Find what `--dataset` names.

    Args:
        dataset: a file, a folder, a pattern (`texts/*.jsonl.zst`), a name of `HUB_NAMES`, `owner/name`,
            or `hub:name`. A folder whose README.md is a dataset card with `configs:` has the files that
            the card names.
        split: `train` by default. Of a folder it picks the files that are named after it;
            `all` takes every file.
        config: of a Hub set.
        suffixes: kinds of files that the caller can use.

    Raises:
        MissingInput: when nothing is there, with the nearest names that are.
        BadFlag: for a suffix, split or config that does not fit.
        BadData: when a link or a card leads out of the folder.
    """
    path = Path(os.path.expanduser(dataset))
    hub_name = HUB_NAMES.get(dataset, dataset.removeprefix("hub:"))
    on_hub = Place(hub_name, (), split or "train", config)
    if dataset.startswith("hub:"):
        _check_hub_name(hub_name)
        return on_hub
    if GLOB.search(dataset) and not path.exists():
        files = _pick_split(path, _find_matches(path, suffixes), split or "all")
        return Place(dataset, tuple(files))
    if _is_path(dataset, path):
        if configs := _read_card(path):
            return Place(str(path), _pick_config(path, configs, config, split or "train", suffixes))
        if config is not None and path.exists():
            raise BadFlag(f"--dataset_config: {config!r}, but {path} is no Hub set; leave it out")
        return Place(str(path), _find_files(path, split, suffixes))
    if "/" not in dataset and dataset not in HUB_NAMES:
        raise MissingInput(f"{dataset}: no such file, folder or known set; {_suggest_path(path)}")
    return on_hub


def _is_path(dataset: str, path: Path) -> bool:
    return (
        path.exists()
        or dataset.startswith((".", "/", "~"))
        or path.suffix.lower() in FILE_SUFFIXES
        or dataset.count("/") > 1
        or (len(path.parts) > 1 and Path(path.parts[0]).is_dir())
    )


def _check_hub_name(name: str) -> None:
    # `datasets` takes a name for a folder when there is one.
    if not HUB_NAME.fullmatch(name) or Path(name).exists():
        raise BadFlag(f"--dataset: hub:{name} is no name on the Hub, or stands here too; give owner/name")


def _read_card(folder: Path) -> dict[str, dict[str, list[str]]]:
    """Return the patterns of files by config and split that a dataset card names; `{}` without one."""
    card = folder / "README.md"
    if not card.is_file() or card.stat().st_size > CARD_BYTES:
        return {}
    front, end, _ = card.read_text(encoding="utf-8", errors="replace").partition("\n---")
    if not (end and front.startswith("---") and re.search(r"^configs:", front, re.MULTILINE)):
        return {}
    import yaml

    try:
        configs = yaml.safe_load(front)["configs"]
        return {str(c.get("config_name", "default")): _parse_data_files(c["data_files"]) for c in configs}
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, RecursionError):
        raise BadData(f"{card}: its `configs:` cannot be read; name the files themselves") from None


def _parse_data_files(value) -> dict[str, list[str]]:
    """Turn what a card may say (a pattern, a list, an object, a list of objects) into one form."""
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        value = {part["split"]: part["path"] for part in value}
    if not isinstance(value, dict):
        value = {"train": value}
    lists = {split: [paths] if isinstance(paths, str) else paths for split, paths in value.items()}
    if not all(isinstance(path, str) for paths in lists.values() for path in paths):
        raise TypeError
    return lists


def _pick_config(
    folder: Path,
    configs: dict[str, dict[str, list[str]]],
    config: str | None,
    split: str,
    suffixes: tuple[str, ...],
) -> tuple[Path, ...]:
    names = list(configs)
    config = config or ("default" if "default" in configs else names[0] if len(names) == 1 else None)
    if config not in configs:
        raise BadFlag(f"--dataset_config: {folder} has the configs {names}; name one of them")
    if split not in configs[config]:
        raise BadFlag(f"--split: {config!r} has no {split!r}, only {list(configs[config])}")
    files: list[Path] = []
    for pattern in configs[config][split]:
        found = sorted(path for path in _glob_inside(folder, pattern) if path.is_file())
        if not found or any(find_suffix(path) not in suffixes for path in found):
            raise BadData(f"{folder}: its card names {pattern!r}, where nothing is that can be read here")
        files += found
    return _check_inside(folder, files)


def _glob_inside(folder: Path, pattern: str) -> list[Path]:
    if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
        raise BadData(
            f"{folder}: its card names {pattern!r}, which leads out of it; name the files themselves"
        )
    return list(folder.glob(pattern))


def _check_inside(folder: Path, files: list[Path]) -> tuple[Path, ...]:
    for file in files:
        if not file.resolve().is_relative_to(folder.resolve()):
            raise BadData(
                f"{file}: is a link that leads out of {folder}; copy the file there, or name it by itself"
            )
    return tuple(files)


def _find_files(path: Path, split: str | None, suffixes: tuple[str, ...]) -> tuple[Path, ...]:
    if path.is_dir():
        return _check_inside(path, _pick_split(path, _list_files(path, suffixes), split))
    if not path.exists():
        raise MissingInput(f"{path}: no such file or folder; {_suggest_path(path)}")
    if not path.is_file():
        raise MissingInput(f"{path}: is neither a file nor a folder; name one that is")
    if find_suffix(path) not in suffixes:
        raise BadFlag(
            f"--dataset: {path} ends in {path.suffix!r}, which cannot be read here; "
            f"known: {', '.join(suffixes)}"
        )
    if split is not None:
        raise BadFlag(f"--split: {split!r}, but {path} is one file; name the split's own file")
    return (path,)


def _find_matches(pattern: Path, suffixes: tuple[str, ...]) -> list[Path]:
    files = sorted(path for path in map(Path, glob.glob(str(pattern), recursive=True)) if path.is_file())
    if not files:
        raise MissingInput(f"{pattern}: no file matches it; try it with `ls`")
    for file in files:
        if find_suffix(file) not in suffixes:
            raise BadFlag(f"--dataset: {pattern} matches {file}, which cannot be read here; narrow it")
    return files


def find_suffix(path: Path) -> str:
    """Return what kind of file it is, compressed or not: `.jsonl` of `train.jsonl.gz`."""
    return _strip_compression(path).suffix.lower()


def _strip_compression(path: Path) -> Path:
    return path.with_suffix("") if path.suffix.lower() in COMPRESSED else path


def _list_files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and find_suffix(path) in suffixes
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not files:
        raise MissingInput(f"{folder}: no {', '.join(suffixes)} file in it; name another folder")
    return files


def _pick_split(folder: Path, files: list[Path], split: str | None) -> list[Path]:
    """Never read a test split into the training data, nor leave a file out unasked."""
    splits = [_name_split(file) for file in files]
    if split == "all" or split is None and not any(splits):
        return files
    if split is None and not all(splits):
        other = files[splits.index(None)]
        raise BadFlag(
            f"--split: needed for {folder}, where some files are named after a split and "
            f"{other.name} is not; pass --split train or --split all"
        )
    wanted = SPLIT_NAMES.get(split, split) or "train"
    picked = [file for file, name in zip(files, splits, strict=True) if name == wanted]
    if not picked:
        known = ", ".join(sorted({name for name in splits if name})) or "none named after a split"
        raise BadFlag(f"--split: {folder} has no files of {wanted!r}; it has {known}")
    return picked


def _name_split(file: Path) -> str | None:
    match = SPLIT_FILE.fullmatch(_strip_compression(file).stem)
    return SPLIT_NAMES.get(match[1], match[1]) if match else None


def _suggest_path(path: Path) -> str:
    missing = next(p for p in [path, *path.parents] if p.parent.exists() and not p.exists())
    names = sorted(entry.name for entry in missing.parent.iterdir())
    near = get_close_matches(missing.name, names, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(repr(str(missing.parent / name)) for name in near)}?"
    if get_close_matches(str(path), HUB_NAMES, n=1, cutoff=0.6):
        return suggest(str(path), list(HUB_NAMES))
    return "name a path that is there, or a Hub set as owner/name"


def one_line(error: Exception) -> str:
    """Return an error's text without its line breaks, for the middle of a message of ours."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def read_license(place: Place) -> str | None:
    """Return the licence that the card of a Hub set states (`license:` at the head of its README.md).

    Returns:
        its name, several joined by commas; None where there is no card, or none that names one.
    """
    card = _find_card(place)
    if card is None:
        return None
    front = re.match(r"---\s*\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        stated = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:
        return None
    licenses = stated.get("license") if isinstance(stated, dict) else None
    names = licenses if isinstance(licenses, list) else [licenses]
    return ", ".join(str(name) for name in names if name) or None


def _find_card(place: Place) -> Path | None:
    folder = Path(os.path.expanduser(place.name))
    if place.on_hub and not folder.is_dir():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(place.name, "README.md", repo_type="dataset"))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError):
            return None
    card = folder / "README.md"
    return card if card.is_file() else None
