"""A run folder -> `report.html` and `report.md`: what was trained on what, what it cost, what came of it.

    write_report(Path("runs/chat"))     ->  what could not be read, a line each
    compare_runs(Path("runs/a"), Path("runs/b"))

One file, no script, nothing from outside. Invariant: every number comes from a file of the run or its data,
named beside it; a part whose file is missing says so, and the rest stands.
"""

import ast
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from firstwords import atomic
from firstwords.history import Curve, Run, read_parent, read_run
from firstwords.pages import (
    escape_text,
    format_count,
    format_duration,
    format_grid,
    format_html_table,
    format_page,
    format_table,
    list_broken,
)
from firstwords.plot import Line, draw_bars, draw_lines, format_tick
from firstwords.samples import parse_samples
from firstwords.schema import mask_control

# What others measured, and where it stands. Zero-shot, as lm-eval asks, unless said otherwise.
PUBLISHED = {
    "hellaswag": (
        (
            "GPT-2 124M",
            {"acc": 0.2892, "acc_norm": 0.3114},
            "lm-eval, quoted in build-nanogpt's hellaswag.py",
        ),
        (
            "GPT-2 1558M",
            {"acc": 0.4004, "acc_norm": 0.5089},
            "lm-eval, quoted in build-nanogpt's hellaswag.py",
        ),
        ("chance", {"acc": 0.25, "acc_norm": 0.25}, "four endings"),
    ),
    "lambada_openai": (
        ("GPT-2 117M", {"acc": 0.4599}, "Radford et al. 2019, table 3; asked in another way than lm-eval's"),
        ("GPT-2 1542M", {"acc": 0.6324}, "Radford et al. 2019, table 3; asked in another way than lm-eval's"),
    ),
}
# More passes than this teach little more of repeated text (Muennighoff et al. 2023, section 6).
MANY_EPOCHS = 4


@dataclass(frozen=True)
class Section:
    """A part of the report in both forms, and the files that its numbers come from."""

    title: str
    html: str
    markdown: str
    sources: str


@dataclass(frozen=True)
class Figure:
    """A number of the head: what it is, how it reads, and where it stands."""

    name: str
    shown: str
    source: str


def write_report(folder: Path) -> list[str]:
    """Write `report.html` and `report.md` into a run.

    Returns:
        a line for each file that is broken; what it should have told is missing from the report.

    Raises:
        MissingInput: when there is no run.
    """
    run = read_run(folder)
    parent = read_parent(run)
    sections, failed = [], list(run.broken)
    for build in SECTIONS:
        try:
            section = build(run, parent)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            failed.append(f"{folder}: {build.__name__[6:]} is left out, a file has another form ({error!r})")
            continue
        if section is not None:
            sections.append(section)
    figures, warnings = list_figures(run), list_warnings(run, parent)
    atomic.write_text(folder / "report.html", format_html(run, figures, warnings, sections, failed))
    atomic.write_text(folder / "report.md", format_markdown(run, figures, warnings, sections, failed))
    return failed


# --- the head


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
    figures: list[Figure] = []

    def add(name: str, value, form: Callable, source: str) -> None:
        if value is not None:
            figures.append(Figure(name, form(value), source))

    measured, events = run.evaluation, "runs/events*"
    add("tokens trained on", run.manifest.get("tokens_seen"), format_count, "manifest.json: tokens_seen")
    add("epochs", run.last("train/epoch"), "{:.2f}".format, f"{events}: train/epoch")
    add("time", run.seconds or None, format_duration, f"{events}: wall time of {run.lives} lives")
    add("tokens per second", _middle(run.curve("train/tokens_per_second")), format_count, f"{events}, median")
    share = _middle(run.curve("train/share_of_matmul"))
    add("of the matmul rate", share, "{:.0%}".format, f"{events}: train/share_of_matmul")
    memory = run.curve("train/peak_memory_gb")
    add(
        "peak memory", max(memory.values) if memory else None, "{:.2f} GB".format, f"{events}: peak_memory_gb"
    )
    energy = run.curve("train/energy_wh")
    add("energy", sum(energy.values) if energy else None, "{:,.1f} Wh".format, f"{events}: train/energy_wh")
    add("val loss", run.last("eval/loss"), "{:.4f}".format, f"{events}: eval/loss")
    bits = run.last("eval/bits_per_byte")
    add("val bits per byte", bits, "{:.4f}".format, f"{events}: eval/bits_per_byte")
    trigram = measured.get("baselines", {}).get("trigram", {}).get("bits_per_byte")
    add("trigram's, to beat", trigram, "{:.4f}".format, "evaluation.json: baselines")
    add("answers exact", measured.get("exact_match"), "{:.1%}".format, "evaluation.json: exact_match")
    stop, where = find_stop_rate(run)
    add("replies that end", stop, "{:.1%}".format, f"{where}: stop_rate")
    if not energy:
        figures.append(Figure("energy", "not measured", "NVML tells it of NVIDIA's GPUs alone"))
    return figures


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
    epochs = run.last("train/epoch")
    if epochs and epochs > MANY_EPOCHS:
        warnings.append(
            f"The data were read {epochs:.1f} times. Beyond {MANY_EPOCHS} passes repeated text teaches "
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


def _middle(curve: Curve) -> float | None:
    return sorted(curve.values)[len(curve.values) // 2] if curve else None


# --- the parts


def build_loss(run: Run, parent: Run | None) -> Section | None:
    """Return the curves of both stages against the baselines, in bits per byte."""
    charts, rows = [], []
    for stage, one in (("stage A, text", parent), ("this run", run)):
        if one is None or not one.curve("train/bits_per_byte"):
            continue
        levels = {
            name.replace("_", " "): baseline["bits_per_byte"]
            for name, baseline in one.evaluation.get("baselines", {}).items()
            if name in ("unigram", "bigram", "trigram", "xz_after_train")
        }
        lines = _lines(one, {"train/bits_per_byte": "train", "eval/bits_per_byte": "val"})
        title = f"{stage if parent else 'this run'}: {one.folder}"
        charts.append((title, draw_lines(lines, x_label="step", levels=levels)))
        values = {"val": one.last("eval/bits_per_byte"), **levels}
        rows += [(title, name, f"{value:.4f}") for name, value in values.items() if value is not None]
    if not charts:
        return None
    source = "runs/events*: train/bits_per_byte, eval/bits_per_byte; evaluation.json: baselines"
    if "baselines" not in run.evaluation:
        source += " (none yet: run evaluate.py)"
    return Section(
        "Loss, in bits per byte of text",
        format_grid(charts),
        format_table(("run", "what", "bits per byte"), rows),
        source,
    )


def build_health(run: Run, parent: Run | None) -> Section | None:
    """Return how the replies to the fixed prompts changed, and what is forgotten meanwhile."""
    names = {
        "stop_rate": "end",
        "exact": "exact",
        "repeat_4gram": "repeat",
        "role_leak": "leak role",
        "empty": "empty",
    }
    lines = _lines(run, {f"health/{name}": shown for name, shown in names.items()})
    charts = []
    if lines:
        charts.append(("replies that ...", draw_lines(lines, x_label="step", from_zero=True)))
    if run.curve("health/mean_tokens"):
        mean = _lines(run, {"health/mean_tokens": ""})
        charts.append(("tokens in a reply", draw_lines(mean, x_label="step", from_zero=True)))
    if run.curve("eval/kept_text_bits_per_byte"):
        kept = _lines(run, {"eval/kept_text_bits_per_byte": ""})
        end = parent.last("eval/bits_per_byte") if parent else None
        before = {} if end is None else {"end of stage A": end}
        charts.append(
            (
                "what is forgotten: bits per byte of stage A's text",
                draw_lines(kept, x_label="step", levels=before),
            )
        )
    if run.curve("eval/hellaswag_acc_norm"):
        both = _lines(run, {"eval/hellaswag_acc_norm": "acc_norm", "eval/hellaswag_acc": "acc"})
        levels = {"chance": 0.25, "GPT-2 124M": 0.3114}
        charts.append(("HellaSwag", draw_lines(both, x_label="step", levels=levels)))
    if not charts:
        return None
    rows = [
        (tag.partition("/")[2], f"{run.last(tag):.4f}") for tag in run.curves if tag.startswith("health/")
    ]
    return Section(
        "Replies",
        format_grid(charts),
        format_table(("health", "at the end"), rows),
        "runs/events*: health/*, eval/*",
    )


def build_rates(run: Run, parent: Run | None) -> Section | None:
    """Return throughput, learning rate and gradient norms."""
    wanted = {
        "train/tokens_per_second": ("tokens per second", True),
        "train/learning_rate": ("learning rate", True),
        "train/grad_norm": ("gradient norm, before it is cut to 1", False),
        "train/share_of_matmul": ("share of the measured matmul rate", True),
    }
    charts = [
        (title, draw_lines(_lines(run, {tag: ""}), x_label="step", from_zero=zero))
        for tag, (title, zero) in wanted.items()
        if run.curve(tag)
    ]
    if not charts:
        return None
    rows = [(title, f"{_middle(run.curve(tag)):.4g}") for tag, (title, _) in wanted.items() if run.curve(tag)]
    return Section(
        "Speed and steps", format_grid(charts), format_table(("", "median"), rows), "runs/events*: train/*"
    )


def build_places(run: Run, parent: Run | None) -> Section | None:
    """Return the loss by place in the context and by turn."""
    charts, rows = [], []
    for key, title in (
        ("loss_by_position", "by tokens before it"),
        ("loss_by_turn", "by the assistant's turn"),
    ):
        places = run.evaluation.get(key)
        if places:
            bars = [(place if key == "loss_by_turn" else f"{place}+", loss) for place, loss in places.items()]
            charts.append((f"val loss {title}", draw_bars(bars, x_label=title)))
            rows += [(title, place, f"{loss:.4f}") for place, loss in bars]
    if not charts:
        return None
    return Section(
        "Where the loss is",
        format_grid(charts),
        format_table(("", "place", "loss"), rows),
        "evaluation.json: loss_by_*",
    )


def build_data(run: Run, parent: Run | None) -> Section | None:
    """Return what the data are: their rows, lengths and learned shares."""
    if not run.data:
        return None
    train = run.data.get("splits", {}).get("train", {})
    charts = []
    for key, title, unit in (
        ("lengths", "conversations by length", "tokens, up to"),
        ("learned_shares", "conversations by share of learned tokens", "per cent, up to"),
    ):
        if train.get(key):
            charts.append((title, draw_bars(list(train[key].items()), x_label=unit)))
    read = run.data.get("rows") or run.data.get("documents") or {}
    rows = [(f"rows {name}", f"{read[name]:,}") for name in ("read", "kept", "duplicates") if name in read]
    rows += [
        (f"{split} {name.replace('_', ' ')}", f"{counts[name]:,}")
        for split, counts in run.data.get("splits", {}).items()
        for name in ("conversations", "documents", "tokens", "learned_tokens", "bytes")
        if name in counts
    ]
    sources = run.data.get("sources", [])
    rows += [
        ("source", ", ".join(f"{key} {value}" for key, value in source.items() if value))
        for source in sources
    ]
    table = ("data", "")
    return Section(
        "Data",
        format_grid(charts) + format_html_table(table, rows),
        format_table(table, rows),
        f"{run.data_path}",
    )


def build_samples(run: Run, parent: Run | None) -> Section | None:
    """Return what was said to each prompt over time: the first three, and greedy."""
    sections = parse_samples(run.samples)
    steps = _spread(list(sections), 6)
    prompts = list(dict.fromkeys(prompt for step in steps for prompt in sections[step]))[:3]
    if not prompts:
        return None
    html, markdown = [], []
    for prompt in prompts:
        said = [(str(step), _say(sections[step].get(prompt, {}))) for step in steps]
        html.append(f"<h3>{escape_text(prompt)}</h3>{format_html_table(('step', 'greedy'), said)}")
        markdown.append(f"**{escape_text(prompt)}**\n\n{format_table(('step', 'greedy'), said)}")
    return Section("Samples while it learned", "".join(html), "\n".join(markdown), "samples.md")


def _say(replies: dict[str, str]) -> str:
    return replies.get("greedy", next(iter(replies.values()), ""))


def build_conversation(run: Run, parent: Run | None) -> Section | None:
    """Return some replies of the evaluation as a chat, with what was right and what was not."""
    picked = _pick_replies(run.replies)
    if not picked:
        return None
    html, markdown = [], []
    for row in picked:
        mark = "right" if row.get("exact") else f"wrong; documented: {row.get('expected', '')}"
        html.append(
            f'<p class="user">{escape_text(row["prompt"])}</p><p class="bot">{escape_text(row["reply"])}'
            f'<span class="mark">{escape_text(mark)}</span></p>'
        )
        markdown.append(
            f"> **{escape_text(row['prompt'])}**\n>\n> {escape_text(row['reply'])} *({escape_text(mark)})*\n"
        )
    return Section(
        "Some replies",
        f'<div class="chat">{"".join(html)}</div>',
        "\n".join(markdown),
        "evaluation_replies.jsonl; wrong ones are shown on purpose",
    )


def _pick_replies(rows: Sequence[dict]) -> list[dict]:
    """Take one right reply of each kind, and two wrong ones."""
    rows = [row for row in rows if "prompt" in row and "reply" in row]
    right = {
        row.get("kind"): row for row in reversed(rows) if row.get("exact") and row.get("kind") != "followup"
    }
    wrong = [row for row in rows if not row.get("exact") and row.get("kind") != "followup"]
    return [*list(right.values())[::-1], *wrong[:2]]


def build_scores(run: Run, parent: Run | None) -> Section | None:
    """Return what evaluate.py measured, and the tests of papers beside published figures."""
    rows = [
        (name.replace("_", " "), f"{value:.4f}" if isinstance(value, float) else f"{value}")
        for name, value in {**run.evaluation, **run.evaluation.get("health", {})}.items()
        if not isinstance(value, dict)
    ]
    results = dict(run.tasks.get("results", {}))
    in_training = {
        name: run.last(f"eval/hellaswag_{name}")
        for name in ("acc", "acc_norm")
        if run.curve(f"eval/hellaswag_{name}")
    }
    tests = []
    for task, scores in results.items():
        shown = {name.partition(",")[0]: value for name, value in scores.items() if isinstance(value, float)}
        tests.append((task, "this model", _shares(shown), "evaluation_tasks.json"))
    if in_training and "hellaswag" not in results:
        tests.append(("hellaswag", "this model", _shares(in_training), "runs/events*: eval/hellaswag_*"))
    for task, published in PUBLISHED.items():
        if task in {test[0] for test in tests}:
            tests += [(task, model, _shares(scores), where) for model, scores, where in published]
    if not tests:
        published = [
            (task, model, _shares(scores), where)
            for task, rows_ in PUBLISHED.items()
            for model, scores, where in rows_
        ]
        tests = [("hellaswag", "this model", "not measured", "evaluate.py --tasks hellaswag"), *published]
    head, test_head = ("measured", ""), ("test", "model", "score", "source")
    tests.sort(key=lambda test: test[0])
    html, markdown = format_html_table(test_head, tests), format_table(test_head, tests)
    if rows:
        html = f'<div class="columns">{format_html_table(head, rows)}</div>{html}'
        markdown = f"{format_table(head, rows)}\n{markdown}"
    return Section("Scores", html, markdown, "evaluation.json, evaluation_tasks.json, and the papers named")


def _shares(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in scores.items() if "stderr" not in name)


def build_recipe(run: Run, parent: Run | None) -> Section | None:
    """Return flags, versions and hashes, by which the run can be made again."""
    if not run.manifest:
        return None
    flags = [(f"--{name}", value) for name, value in run.flags.items()]
    rows = flags + [(name, value) for name, value in run.manifest.get("versions", {}).items()]
    rows += [(key, run.manifest[key]) for key in ("tokenizer_hash", "data_dir") if key in run.manifest]
    rows.append(("data hash", run.manifest.get("compare", {}).get("data", "")))
    table = format_html_table(("", ""), rows)
    details = f"<details><summary>{len(flags)} flags, versions, hashes</summary>{table}</details>"
    return Section("How it was made", details, format_table(("", ""), rows), "manifest.json")


SECTIONS = (
    *(build_loss, build_samples, build_conversation, build_health, build_scores),
    *(build_places, build_rates, build_data, build_recipe),
)


def _lines(run: Run, tags: dict[str, str]) -> list[Line]:
    found = [(name, run.curve(tag)) for tag, name in tags.items() if run.curve(tag)]
    return [Line(name, curve.steps, curve.values, style) for style, (name, curve) in enumerate(found)]


def _spread(items: list, count: int) -> list:
    """Take `count` of them, evenly, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[round(place * (len(items) - 1) / (count - 1))] for place in range(count)]


# --- side by side


def compare_runs(folders: tuple[Path, Path]) -> tuple[str, str, list[str]]:
    """Lay two runs beside each other.

    Returns:
        text for a terminal, an HTML page, and what could not be read.

    Raises:
        MissingInput: when one of them is no run.
    """
    runs = [read_run(folder) for folder in folders]
    differences, figures = list_differences(*runs), list_side_by_side(*runs)
    head = ("", *(str(run.folder) for run in runs))
    charts = []
    for key, label in (("tokens", "tokens"), ("seconds", "minutes of training")):
        for tag, title in (("eval/loss", "val loss"), ("train/loss", "train loss")):
            lines = [
                Line(run.folder.name, *along, style)
                for style, run in enumerate(runs)
                if (along := lay_along(run, tag, key))[0]
            ]
            if lines:
                charts.append((f"{title} at equal {key}", draw_lines(lines, x_label=label)))
    differ = [("what differs", *head[1:]), *(differences or [("flags and data", "the same", "the same")])]
    text = f"{_align(differ)}\n\n{_align([head, *figures])}"
    broken = [line for run in runs for line in run.broken]
    body = (
        f"<h1>{escape_text(runs[0].folder)} and {escape_text(runs[1].folder)}</h1>"
        f"<section><h2>What differs</h2>{format_html_table(differ[0], differ[1:])}"
        f'<p class="source">manifest.json of both</p></section>'
        f"<section><h2>What came of it</h2>{format_html_table(head, figures)}"
        f'<p class="source">runs/events* and evaluation.json of both</p></section>'
        f"<section><h2>Curves</h2>{format_grid(charts)}</section>{list_broken(broken)}"
    )
    return text, format_page("Two runs", body), broken


def list_differences(a: Run, b: Run) -> list[tuple[str, str, str]]:
    """Return flags, data and versions that are not the same, with both values."""

    def flatten(run: Run) -> dict[str, str]:
        flags = {f"--{name}": value for name, value in run.flags.items()}
        compare = run.manifest.get("compare", {})
        kept = {
            name: compare[name] for name in ("data", "tokenizer", "shape", "init_weights") if name in compare
        }
        versions = {f"version of {name}": v for name, v in run.manifest.get("versions", {}).items()}
        return {**flags, **{name: str(value)[:60] for name, value in kept.items()}, **versions}

    left, right = flatten(a), flatten(b)
    names = list(dict.fromkeys([*left, *right]))
    return [
        (name, left.get(name, "not set"), right.get(name, "not set"))
        for name in names
        if left.get(name) != right.get(name)
    ]


def list_side_by_side(a: Run, b: Run) -> list[tuple[str, str, str]]:
    """Return the figures of both heads, and the val loss at as many tokens and as much time as both have."""
    left, right = ({figure.name: figure.shown for figure in list_figures(run)} for run in (a, b))
    rows = [(name, left.get(name, "-"), right.get(name, "-")) for name in dict.fromkeys([*left, *right])]
    for key, name in (("tokens", "tokens"), ("seconds", "minutes")):
        both = [lay_along(run, "eval/loss", key) for run in (a, b)]
        if all(xs for xs, _ in both):
            most = min(xs[-1] for xs, _ in both)
            found = [read_at(xs, ys, most) for xs, ys in both]
            shown = ["not yet measured" if value is None else f"{value:.4f}" for value in found]
            rows.append((f"val loss at {format_tick(most)} {name}", *shown))
    return rows


def lay_along(run: Run, tag: str, key: str) -> tuple[list[float], list[float]]:
    """Return a curve over the tokens that were trained on, or over minutes of training."""
    curve = run.curve(tag)
    if key == "seconds":
        return [seconds / 60 for seconds in curve.seconds], list(curve.values)
    tokens = run.curve(f"{tag.partition('/')[0]}/tokens_seen")
    seen = dict(zip(tokens.steps, tokens.values, strict=True))
    pairs = [
        (seen[step], value) for step, value in zip(curve.steps, curve.values, strict=True) if step in seen
    ]
    return [x for x, _ in pairs], [y for _, y in pairs]


def read_at(xs: Sequence[float], ys: Sequence[float], x: float) -> float | None:
    """Return the height of a curve at `x`, straight between its points; None where it has not begun."""
    if not xs or x < xs[0]:
        return None
    after = next((place for place, value in enumerate(xs) if value >= x), len(xs) - 1)
    if after == 0 or xs[after] == xs[after - 1]:
        return ys[after]
    share = min((x - xs[after - 1]) / (xs[after] - xs[after - 1]), 1.0)
    return ys[after - 1] + share * (ys[after] - ys[after - 1])


def _align(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return "\n".join(
        "  ".join(mask_control(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


# --- both forms


def format_html(
    run: Run, figures: list[Figure], warnings: list[str], sections: list[Section], broken: list[str]
) -> str:
    """Return the report as one page."""
    tiles = "".join(
        f'<div class="tile"><span>{escape_text(figure.name)}</span><b>{escape_text(figure.shown)}</b>'
        f"<small>{escape_text(figure.source)}</small></div>"
        for figure in figures
    )
    warned = "".join(f"<li>{escape_text(text)}</li>" for text in warnings)
    box = f'<section class="warn"><h2>Look at this first</h2><ul>{warned}</ul></section>' if warnings else ""
    parts = "".join(
        f"<section><h2>{escape_text(part.title)}</h2>{part.html}"
        f'<p class="source">from {escape_text(part.sources)}</p></section>'
        for part in sections
    )
    body = (
        f'<h1>{escape_text(run.folder)}</h1><p class="lead">{escape_text(describe_run(run))}</p>'
        f'<div class="tiles">{tiles}</div>{box}{parts}{list_broken(broken)}'
    )
    return format_page(str(run.folder), body)


def format_markdown(
    run: Run, figures: list[Figure], warnings: list[str], sections: list[Section], broken: list[str]
) -> str:
    """Return the report as Markdown, for a model card: tables in place of the pictures."""
    parts = [f"# {escape_text(run.folder)}", escape_text(describe_run(run))]
    parts.append(
        format_table(("", "", "from"), [(figure.name, figure.shown, figure.source) for figure in figures])
    )
    if warnings:
        parts += ["## Look at this first", "\n".join(f"- {escape_text(text)}" for text in warnings)]
    for part in sections:
        parts += [f"## {part.title}", part.markdown.rstrip(), f"*From {escape_text(part.sources)}.*"]
    if broken:
        parts += ["## What could not be read", "\n".join(f"- {escape_text(line)}" for line in broken)]
    return "\n\n".join(parts) + "\n"
