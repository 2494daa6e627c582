"""A run folder -> what is said of it first: one sentence, its figures, what to look at before trusting it.

    list_figures(read_run(Path("runs/chat")))[0]    ->  Figure("tokens trained on", "1.2 M", "manifest.json")
    list_warnings(run, parent)                      ->  ["The data were read 270.0 times. ..."]

Invariant: every number comes from a file of the run, which the figure names; what no file tells is left out.
"""

import ast
import math
from collections.abc import Callable
from dataclasses import dataclass

from firstwords.dataset import MANY_EPOCHS
from firstwords.history import Curve, Run
from firstwords.pages import format_count, format_duration


@dataclass(frozen=True)
class Figure:
    """A number of the head: what it is, how it reads, and where it stands."""

    name: str
    shown: str
    source: str


def describe_run(run: Run) -> str:
    """Say in one or two sentences what this run is."""
    shape = ast.literal_eval(run.manifest.get("compare", {}).get("shape", "{}"))
    size = f" of {run.num_weights:,} weights" if run.num_weights else ""
    if shape:
        size += f" ({shape['n_layer']} layers, {shape['n_embd']} wide)"
    parent = run.manifest.get("parent")
    begun = (
        f"the weights of {parent['from']} (step {parent.get('step', '?')})" if parent else "random weights"
    )
    stage = "conversations" if run.is_chat else "text"
    text = f"A GPT-2{size}, trained from {begun} on the {stage} in {run.manifest.get('data_dir', '?')}"
    steps = run.manifest.get("step", run.curve("train/loss").steps[-1:] or 0)
    text += f": {steps:,} steps" if isinstance(steps, int) else ""
    if run.seconds:
        text += f" in {format_duration(run.seconds)} on {run.flags.get('device', '?')}"
    if not run.is_complete:
        text += f". It has not reached its end ({run.manifest.get('max_steps', '?')} steps) yet"
    return text + "."


def list_figures(run: Run) -> list[Figure]:
    """Return the numbers of the head; what no file tells is left out."""
    found = [*_list_work(run), *_list_machine(run), *_list_outcome(run)]
    figures = [Figure(name, form(value), source) for name, value, form, source in found if value is not None]
    if not run.curve("train/energy_wh"):
        figures.append(Figure("energy", "not measured", "NVML tells it of NVIDIA's GPUs alone"))
    return figures


_EVENTS = "runs/events*"


def _list_work(run: Run) -> list[tuple[str, float | None, Callable, str]]:
    seen, lives = run.manifest.get("tokens_seen"), f"{_EVENTS}: wall time of {run.lives} lives"
    return [
        ("tokens trained on", seen, format_count, "manifest.json: tokens_seen"),
        ("epochs", run.last("train/epoch"), "{:.2f}".format, f"{_EVENTS}: train/epoch"),
        ("time", run.seconds or None, format_duration, lives),
    ]


def _list_machine(run: Run) -> list[tuple[str, float | None, Callable, str]]:
    rate, share = (find_median(run.curve(f"train/{x}")) for x in ("tokens_per_second", "share_of_matmul"))
    memory, energy = run.curve("train/peak_memory_gb"), run.curve("train/energy_wh")
    peak, spent = max(memory.values, default=None), sum(energy.values) if energy else None
    return [
        ("tokens per second", rate, format_count, f"{_EVENTS}, median"),
        ("of the matmul rate", share, "{:.0%}".format, f"{_EVENTS}: train/share_of_matmul"),
        ("peak memory", peak, "{:.2f} GB".format, f"{_EVENTS}: peak_memory_gb"),
        ("energy", spent, "{:,.1f} Wh".format, f"{_EVENTS}: train/energy_wh"),
    ]


def _list_outcome(run: Run) -> list[tuple[str, float | None, Callable, str]]:
    measured, bits = run.evaluation, run.last("eval/bits_per_byte")
    trigram = measured.get("baselines", {}).get("trigram", {}).get("bits_per_byte")
    stop, where = find_stop_rate(run)
    return [
        ("val loss", run.last("eval/loss"), "{:.4f}".format, f"{_EVENTS}: eval/loss"),
        ("val bits per byte", bits, "{:.4f}".format, f"{_EVENTS}: eval/bits_per_byte"),
        ("trigram's, to beat", trigram, "{:.4f}".format, "evaluation.json: baselines"),
        ("answers exact", measured.get("exact_match"), "{:.1%}".format, "evaluation.json: exact_match"),
        ("replies that end", stop, "{:.1%}".format, f"{where}: stop_rate"),
    ]


def find_stop_rate(run: Run) -> tuple[float | None, str]:
    """Return the share of replies that end by themselves, over the most replies, and its file."""
    measured = run.evaluation
    if "stop_rate" in measured:
        return measured["stop_rate"], "evaluation.json"
    if measured.get("health"):
        return measured["health"]["stop_rate"], "evaluation.json: health"
    return run.last("health/stop_rate"), "runs/events*: health"


def list_warnings(run: Run, parent: Run | None = None) -> list[str]:
    """Say in plain words what a person should look at before trusting the run."""
    warnings = []
    epochs, many = run.last("train/epoch"), MANY_EPOCHS["conversations" if run.is_chat else "text"]
    if epochs and epochs > many:
        warnings.append(
            f"The data were read {epochs:.1f} times. Beyond {many} passes repeated text teaches "
            "little (Muennighoff et al. 2023), and a small set is learned by heart: take more data, or "
            "fewer steps."
        )
    warnings += _warn_of_losses(run, parent) + _warn_of_replies(run) + _warn_of_data(run)
    if _met_nan(run):
        warnings.append("A loss or gradient was NaN or infinite on the way; train.log says when. Lower --lr.")
    if not run.is_complete:
        warnings.append("The run has not reached its last step: the learning rate had not come down yet.")
    return warnings


def _warn_of_losses(run: Run, parent: Run | None) -> list[str]:
    warnings = []
    val, train = run.curve("eval/loss"), run.curve("train/loss")
    if val and min(val.values) * 1.05 < val.values[-1]:
        best = val.steps[val.values.index(min(val.values))]
        warnings.append(
            f"The val loss has risen from {min(val.values):.3f} at step {best} to {val.values[-1]:.3f}: from "
            "there on the run learned its data by heart. Stop earlier, or give it more data."
        )
    if val and train and val.values[-1] > 1.3 * train.values[-1] and val.values[-1] - train.values[-1] > 0.05:
        warnings.append(
            f"The val loss ({val.values[-1]:.3f}) stands well above the training loss "
            f"({train.values[-1]:.3f}): what was learned holds less for what is new."
        )
    baseline = run.evaluation.get("baselines", {}).get("trigram", {}).get("bits_per_byte")
    found = run.evaluation.get("bits_per_byte")
    if baseline and found and found >= baseline:
        warnings.append(
            f"The model ({found:.3f} bits per byte) does not beat counting three tokens ({baseline:.3f})."
        )
    kept = run.curve("eval/kept_text_loss")
    before = (parent and parent.last("eval/loss")) or (kept and kept.values[0])
    if kept and kept.values[-1] > 1.1 * before:
        warnings.append(
            f"It forgets: on stage A's text the loss rose from {before:.2f} to "
            f"{kept.values[-1]:.2f}. That is usual in a fine-tuning; a lower --lr, or text mixed into the "
            "conversations, holds more."
        )
    return warnings


def _warn_of_replies(run: Run) -> list[str]:
    warnings = []
    stop, _ = find_stop_rate(run)
    if stop is not None and stop < 0.95:
        warnings.append(f"Only {stop:.0%} of the replies end by themselves; is the end token learned?")
    for tag, most, text in (
        ("health/role_leak", 0.0, "open another's turn within the reply"),
        ("health/repeat_4gram", 0.05, "go round in circles (a run of four tokens three times)"),
        ("health/empty", 0.0, "are empty"),
    ):
        share = run.last(tag)
        if share is not None and share > most:
            warnings.append(f"{share:.0%} of the replies {text}.")
    return warnings


def _warn_of_data(run: Run) -> list[str]:
    warnings = []
    rows = run.data.get("rows") or run.data.get("documents") or {}
    rejected = sum(rows.get("rejected", {}).values())
    if rejected:
        warnings.append(f"{rejected:,} of {rows['read']:,} rows were refused; rejects.jsonl lists them.")
    dropped = sum(rows.get("dropped", {}).values())
    if dropped:
        warnings.append(f"{dropped:,} of {rows['read']:,} rows were dropped as too long for a row.")
    train = run.data.get("splits", {}).get("train", {})
    longer, seq_len = train.get("longer_than_seq_len", 0), run.data.get("seq_len")
    if longer and run.data.get("overlong", "keep") == "keep":
        kept = "cut" if run.flags.get("overlong") == "truncate" else "dropped"
        warnings.append(f"{longer:,} conversations are longer than {seq_len} tokens and were {kept}.")
    if run.data.get("on_both_sides"):
        warnings.append(
            f"{run.data['on_both_sides']:,} rows stand in train and val: the val loss is too good by that."
        )
    return warnings


def _met_nan(run: Run) -> bool:
    values = (value for curve in run.curves.values() for value in curve.values)
    words = (" nan", " inf ", "not finite", "diverged")
    return not all(map(math.isfinite, values)) or any(
        word in line.lower() for line in run.log if not line.startswith("  ") for word in words
    )


def find_median(curve: Curve) -> float | None:
    """Return the middle one of a curve's values; None of no curve."""
    return sorted(curve.values)[len(curve.values) // 2] if curve else None
