"""A run folder -> `report.html` and `report.md`: what was trained on what, what it cost, what came of it.

    write_report(Path("runs/chat"))     ->  what could not be read, a line each

One file, no script, nothing from outside. Invariant: every number comes from a file of the run or its data,
named beside it; a part whose file is missing says so, and the rest stands.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from firstwords import atomic
from firstwords.figures import Figure, describe_run, find_median, list_figures, list_warnings
from firstwords.history import Run, read_parent, read_run
from firstwords.pages import (
    escape_text,
    format_grid,
    format_html_table,
    format_page,
    format_table,
    list_broken,
)
from firstwords.plot import Line, draw_bars, draw_lines
from firstwords.samples import parse_samples

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


@dataclass(frozen=True)
class Section:
    """A part of the report in both forms, and the files that its numbers come from."""

    title: str
    html: str
    markdown: str
    sources: str


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
    charts = [*_draw_replies(run), *_draw_kept_text(run, parent), *_draw_hellaswag(run)]
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


def _draw_replies(run: Run) -> Iterator[tuple[str, str]]:
    names = {
        "stop_rate": "end",
        "exact": "exact",
        "repeat_4gram": "repeat",
        "role_leak": "leak role",
        "empty": "empty",
    }
    lines = _lines(run, {f"health/{name}": shown for name, shown in names.items()})
    if lines:
        yield "replies that ...", draw_lines(lines, x_label="step", from_zero=True)
    mean = _lines(run, {"health/mean_tokens": ""})
    if mean:
        yield "tokens in a reply", draw_lines(mean, x_label="step", from_zero=True)


def _draw_kept_text(run: Run, parent: Run | None) -> Iterator[tuple[str, str]]:
    kept = _lines(run, {"eval/kept_text_bits_per_byte": ""})
    end = parent.last("eval/bits_per_byte") if parent else None
    before = {} if end is None else {"end of stage A": end}
    if kept:
        title = "what is forgotten: bits per byte of stage A's text"
        yield title, draw_lines(kept, x_label="step", levels=before)


def _draw_hellaswag(run: Run) -> Iterator[tuple[str, str]]:
    if run.curve("eval/hellaswag_acc_norm"):
        both = _lines(run, {"eval/hellaswag_acc_norm": "acc_norm", "eval/hellaswag_acc": "acc"})
        scores = {model: scores["acc_norm"] for model, scores, _ in PUBLISHED["hellaswag"]}
        levels = {name: scores[name] for name in ("chance", "GPT-2 124M")}
        yield "HellaSwag", draw_lines(both, x_label="step", levels=levels)


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
    rows = [
        (title, f"{find_median(run.curve(tag)):.4g}") for tag, (title, _) in wanted.items() if run.curve(tag)
    ]
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
    head, test_head = ("measured", ""), ("test", "model", "score", "source")
    tests = list_tests(run)
    html, markdown = format_html_table(test_head, tests), format_table(test_head, tests)
    if rows:
        html = f'<div class="columns">{format_html_table(head, rows)}</div>{html}'
        markdown = f"{format_table(head, rows)}\n{markdown}"
    return Section("Scores", html, markdown, "evaluation.json, evaluation_tasks.json, and the papers named")


def list_tests(run: Run) -> list[tuple[str, str, str, str]]:
    """Return test, model, score and source: this run's, and what was published of the same tests."""
    tests = []
    for task, scores in run.tasks.get("results", {}).items():
        shown = {name.partition(",")[0]: value for name, value in scores.items() if isinstance(value, float)}
        tests.append((task, "this model", _shares(shown), "evaluation_tasks.json"))
    in_training = {name: run.last(f"eval/hellaswag_{name}") for name in ("acc", "acc_norm")}
    found = {name: score for name, score in in_training.items() if score is not None}
    asked = {test[0] for test in tests}
    if found and "hellaswag" not in asked:
        tests.append(("hellaswag", "this model", _shares(found), "runs/events*: eval/hellaswag_*"))
    asked = {test[0] for test in tests} or set(PUBLISHED)
    if not tests:
        tests.append(("hellaswag", "this model", "not measured", "evaluate.py --tasks hellaswag"))
    tests += [
        (task, model, _shares(scores), where)
        for task, published in PUBLISHED.items()
        if task in asked
        for model, scores, where in published
    ]
    return sorted(tests, key=lambda test: test[0])


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
