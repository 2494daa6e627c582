"""Two run folders -> what differs between them, and what came of it.

    text, page, broken = compare_runs((Path("runs/a"), Path("runs/b")))

Invariant: curves are laid along what both runs spent, tokens or time, and never along their own steps.
"""

from collections.abc import Sequence
from pathlib import Path

from firstwords.figures import list_figures
from firstwords.history import Run, read_run
from firstwords.pages import escape_text, format_grid, format_html_table, format_page, list_broken
from firstwords.plot import Line, draw_lines, format_tick
from firstwords.schema import mask_control


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
