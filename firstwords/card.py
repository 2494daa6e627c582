"""What is known of a model -> its model card, the README.md of a folder that is handed on.

    format_card("chat", facts, usage="...")   ->  "---\\nlibrary_name: transformers\\n..."

Every figure comes from a file that the run wrote: the manifest, the trainer's log, evaluation.json. What
no file says is said to be unknown. Invariant: no path of the machine that trained it appears.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from firstwords.checkpoint import list_checkpoints
from firstwords.template import DESCRIPTION

# Flags of a run that say how it was trained; the others say where, and stay at home.
TOLD_FLAGS = (
    "seq_len",
    "batch_size",
    "grad_accum",
    "optim",
    "lr",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "bf16",
    "assistant_only_loss",
    "seed",
)
NOT_SCORES = ("checkpoint", "step")

LIMITS = """\
- It is a small model. It knows what was in its data, and not all of that. It says what is likely, in the same
  tone whether it is true or not. Nothing here was aligned or filtered for safety.
- It was trained on rows of up to {context:,} tokens. Beyond that, its positions have learned nothing.
- Where no score stands above, none was measured."""


@dataclass(frozen=True)
class Facts:
    """What files say of a model.

    Attributes:
        manifest: of the checkpoint, `{}` of a plain Hugging Face folder.
        scores: of evaluation.json and evaluation_tasks.json where they are of this very step.
        figures: `(name, value)` of the run's report.
        curve: `(step, validation loss, bits per byte)` at each evaluation, from the trainer's log.
        num_weights, num_tokens, context: weights, ordinary and control tokens, tokens of the longest row.
    """

    manifest: dict
    num_weights: int
    num_tokens: int
    context: int
    scores: dict = field(default_factory=dict)
    figures: list[tuple[str, str]] = field(default_factory=list)
    curve: list[tuple[int, float, float]] = field(default_factory=list)


def read_scores(folder: Path, step: int | None) -> dict:
    """Return what evaluate.py has measured of a model folder at this step."""
    measured, tasks = (_read_json(folder / name) for name in ("evaluation.json", "evaluation_tasks.json"))
    scores = measured if measured.get("step") == step else {}
    if tasks.get("step") == step and isinstance(tasks.get("results"), dict):
        scores |= tasks["results"]
    return {name: value for name, value in scores.items() if name not in NOT_SCORES}


def read_curve(folder: Path) -> list[tuple[int, float, float]]:
    """Return the evaluations of a checkpoint's log, or of the newest checkpoint of a run."""
    newest = [folder, *list_checkpoints(folder)[:1]][-1]
    log = _read_json(newest / "trainer_state.json").get("log_history", [])
    names = ("step", "eval_loss", "eval_bits_per_byte")
    rows = log if isinstance(log, list) else []
    curve = [tuple(row.get(name) for name in names) for row in rows if isinstance(row, dict)]
    return [point for point in curve if all(isinstance(value, int | float) for value in point)]


def _read_json(path: Path) -> dict:
    # A stranger's file may hold anything; what is no object tells the card nothing.
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def format_card(name: str, facts: Facts, usage: str, *, license: str | None = None) -> str:
    """Return the card as Markdown with its YAML header.

    Args:
        name: of the model.
        facts: what is known.
        usage: Markdown: how to use the files beside the card.
        license: an identifier of the Hub, such as `mit`; None leaves the question open, and says so.
    """
    sections = {
        "How to use it": usage,
        "Chat format": DESCRIPTION,
        "Data": _format_data(facts.manifest, license),
        "Training": _format_training(facts.manifest),
        "Figures of the run": _format_figures(facts.figures),
        "Curve": _format_curve(facts.curve),
        "Scores": _format_scores(facts.scores),
        "Limits": LIMITS.format(context=facts.context),
    }
    about = (
        f"A GPT-2 of {facts.num_weights:,} weights with {facts.num_tokens:,} tokens and a context of "
        f"{facts.context:,}{_describe_beginning(facts.manifest)}."
    )
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    return f"{_format_header(facts.manifest, license)}\n# {name}\n\n{about}\n\n{body}\n"


def _format_header(manifest: dict, license: str | None) -> str:
    header: dict = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if license:
        header["license"] = license
    stages = [manifest, *_list_ancestors(manifest)]
    sources = [source for stage in stages for source in stage.get("sources", [])]
    if datasets := [source["hub"] for source in sources if "hub" in source]:
        header["datasets"] = sorted(set(datasets), key=datasets.index)
    header["tags"] = ["gpt2", "conversational", "firstwords"]
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n"


def _format_data(manifest: dict, license: str | None) -> str:
    sources = manifest.get("sources")
    lines = [f"- {_describe_source(source)}" for source in sources] if sources else ["Not recorded."]
    stated = (
        f"This model is released under `{license}`." if license else "No licence is stated for this model."
    )
    stages = "".join(f"\n\n{_describe_ancestor(ancestor)}" for ancestor in _list_ancestors(manifest))
    return (
        "\n".join(lines) + f"{stages}\n\n{stated} The licences of the data bind whoever uses or passes it on."
    )


def _list_ancestors(manifest: dict) -> list[dict]:
    """Return what is known of the models whose weights this one began as, the nearest first."""
    ancestors = []
    while isinstance(parent := manifest.get("parent"), dict):
        ancestors.append(manifest := parent)
    return ancestors


def _describe_beginning(manifest: dict) -> str:
    """Return which weights the first of all its runs began with, as far as that is known."""
    first = [manifest, *_list_ancestors(manifest)][-1]
    if "parent" in first:
        return ", trained from random weights with firstwords"
    if first is manifest:
        return ""
    return f", trained with firstwords from {_name_model(first)}"


def _describe_ancestor(ancestor: dict) -> str:
    sources = ancestor.get("sources")
    if not sources:
        return f"It began as {_name_model(ancestor)}; what that was trained on is not recorded here."
    lines = "\n".join(f"- {_describe_source(source)}" for source in sources)
    return f"It began as {_name_model(ancestor)}, which was trained on:\n\n{lines}"


def _name_model(ancestor: dict) -> str:
    """Return a name for a model in which no path of the machine appears."""
    name = str(ancestor.get("from", ""))
    if name.startswith("hub:"):
        return f"`{name.removeprefix('hub:')}` of the Hub"
    if "step" in ancestor:
        return f"a model of another run at step {_format_value(ancestor['step'])}"
    return "another model"


def _describe_source(source: dict) -> str:
    known = {key: value for key, value in source.items() if value is not None}
    licence = known.pop("license", None)
    if "file" in known:
        known["file"] = Path(known["file"]).name
    words = ", ".join(f"{key} `{value}`" for key, value in known.items())
    return f"{words}; licence: {licence or 'not recorded'}"


def _format_training(manifest: dict) -> str:
    if not manifest:
        return "Not recorded."
    flags, versions = manifest.get("flags", {}), manifest.get("versions", {})
    rows = {"step": manifest.get("step"), "tokens seen": manifest.get("tokens_seen")}
    rows |= {name: flags[name] for name in TOLD_FLAGS if name in flags}
    rows |= {f"version of {name}": version for name, version in versions.items()}
    if ancestors := _list_ancestors(manifest):
        rows["weights began as"] = f"those of {_name_model(ancestors[0])}"
    return _format_table(("", "value"), [(name, _format_value(value)) for name, value in rows.items()])


def _format_curve(curve: list[tuple[int, float, float]]) -> str:
    if not curve:
        return "Not recorded."
    rows = [(f"{step:,}", f"{loss:.4f}", f"{bits:.4f}") for step, loss, bits in _thin(curve, 20)]
    return _format_table(("step", "validation loss", "bits per byte"), rows)


def _thin(rows: list, most: int) -> list:
    """Return at most `most` rows in even distances, the last one among them."""
    every = -(-len(rows) // most)
    return rows[::-1][::every][::-1]


def _format_figures(figures: list[tuple[str, str]]) -> str:
    return _format_table(("", "value"), figures) if figures else "Not recorded."


def _format_scores(scores: dict) -> str:
    rows = [(name, _format_value(value)) for name, value in _iter_scores(scores)]
    return _format_table(("score", "value"), rows) if rows else "Not measured at this step."


def _iter_scores(scores: dict, group: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers, those of a group (health, baselines, a task) under its name too."""
    for name, value in scores.items():
        if isinstance(value, dict):
            yield from _iter_scores(value, f"{group}{name}: ")
        elif isinstance(value, int | float):
            yield group + name, value


def _format_value(value) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _format_table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
