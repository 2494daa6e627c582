"""Figures -> one HTML page with tables and pictures (SVG); no script, nothing from outside.

    format_page("data/chat", [("Lengths", draw_columns({"16": 6, "32": 469}))])   ->  "<!doctype html>..."

Invariant: whatever stands in the data is text on the page: everything is escaped here, and the page forbids
the browser to run or load anything.
"""

from collections.abc import Iterable, Mapping
from html import escape

from firstwords.schema import mask_control

HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --bar: #4878a8; --soft: #8886; --learned: #3a94; --end: #c70; }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.4rem; overflow-wrap: anywhere }} h2 {{ font-size: 1.1rem; margin-top: 2rem }}
table {{ border-collapse: collapse }}
th, td {{ padding: .15rem .8rem .15rem 0; border-bottom: 1px solid var(--soft); vertical-align: top;
  overflow-wrap: anywhere }}
th {{ text-align: left; white-space: nowrap }}
td.n {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }}
svg {{ display: block; width: 100%; height: auto }} svg rect {{ fill: var(--bar) }}
svg rect.pad {{ fill: var(--soft) }} svg text {{ font: 11px sans-serif; fill: currentColor }}
.tokens {{ font: 13px/1.9 monospace; white-space: pre-wrap; overflow-wrap: anywhere }}
.tokens span {{ border: 1px solid var(--soft); border-radius: 3px }}
.tokens .learned {{ background: var(--learned) }} .tokens .end {{ border-color: var(--end) }}
</style></head><body>
<h1>{title}</h1>
"""


def format_page(title: str, sections: Iterable[tuple[str, str]]) -> str:
    """Return the page.

    Args:
        title: plain text.
        sections: heading as plain text, and HTML made by the functions of this module.
    """
    parts = [f"<h2>{escape_text(heading)}</h2>\n{html}\n" for heading, html in sections]
    return HEAD.format(title=escape_text(title)) + "".join(parts) + "</body></html>\n"


def escape_text(text: object) -> str:
    """Return text as HTML that shows it, in an attribute too; control characters become U+FFFD."""
    return escape(mask_control(str(text).encode("utf-8", "replace").decode()))


def format_html_table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a table; whole numbers stand on the right, with their thousands separated."""
    head = "".join(f"<th>{escape_text(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(map(_format_cell, row))}</tr>\n" for row in rows)
    return f"<table>\n<tr>{head}</tr>\n{body}</table>" if head else f"<table>\n{body}</table>"


def _format_cell(value: object) -> str:
    if isinstance(value, int):
        return f'<td class="n">{value:,}</td>'
    return f"<td>{escape_text('' if value is None else value)}</td>"


def draw_columns(counts: Mapping[str, int], *, width: int = 640, height: int = 160) -> str:
    """Draw a histogram: a column for each name, its count above it."""
    step = width / max(len(counts), 1)
    scale = height / max(1, *counts.values()) if counts else 0
    parts = []
    for place, (name, count) in enumerate(counts.items()):
        tall, left = count * scale, place * step
        middle = left + step / 2
        parts.append(
            f'<rect x="{left + 2:.1f}" y="{20 + height - tall:.1f}" width="{step - 4:.1f}" '
            f'height="{tall:.1f}"><title>{escape_text(name)}: {count:,}</title></rect>'
            f'<text x="{middle:.1f}" y="{15 + height - tall:.1f}" text-anchor="middle">{count:,}</text>'
            f'<text x="{middle:.1f}" y="{height + 35}" text-anchor="middle">{escape_text(name)}</text>'
        )
    return f'<svg viewBox="0 0 {width} {height + 42}" role="img">{"".join(parts)}</svg>'


def draw_bars(counts: Mapping[str, int], *, width: int = 640) -> str:
    """Draw a bar for each name, one below the other, with its count and its share of all."""
    total = sum(counts.values())
    scale = width * 0.5 / max(1, *counts.values()) if counts else 0
    parts = []
    for place, (name, count) in enumerate(counts.items()):
        top, share = place * 22, count / max(total, 1)
        parts.append(
            f'<text x="0" y="{top + 15}">{escape_text(_shorten(name))}</text>'
            f'<rect x="200" y="{top + 3}" width="{count * scale:.1f}" height="16">'
            f"<title>{escape_text(name)}</title></rect>"
            f'<text x="{206 + count * scale:.1f}" y="{top + 15}">{count:,} ({share:.1%})</text>'
        )
    return f'<svg viewBox="0 0 {width} {22 * len(counts) + 2}" role="img">{"".join(parts)}</svg>'


def _shorten(name: str) -> str:
    return name if len(name) <= 30 else f"…{name[-29:]}"


def draw_stretches(rows: Iterable[Iterable[tuple[str, int]]], total: int, *, width: int = 640) -> str:
    """Draw rows of stretches side by side; what is left of `total` is shown as empty."""
    parts, top = [], 0
    for row in rows:
        begin = 0
        for name, size in row:
            parts.append(_draw_stretch(begin, size, top, name, width / total, ""))
            begin += size
        parts.append(_draw_stretch(begin, total - begin, top, "empty", width / total, ' class="pad"'))
        top += 22
    return f'<svg viewBox="0 0 {width} {max(top, 1)}" role="img">{"".join(parts)}</svg>'


def _draw_stretch(begin: int, size: int, top: int, name: str, scale: float, kind: str) -> str:
    wide = max(size * scale - 1, 0)
    label = f'<text x="{begin * scale + 4:.1f}" y="{top + 14}">{escape_text(name)}</text>'
    return (
        f'<rect{kind} x="{begin * scale:.1f}" y="{top + 2}" width="{wide:.1f}" height="18">'
        f"<title>{escape_text(name)}: {size:,} tokens</title></rect>{label if wide > 40 else ''}"
    )
