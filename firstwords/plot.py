"""Series of numbers -> a chart as inline SVG, in the colours of the page around it.

    draw_lines([Line("train", [1, 2, 3], [4.0, 3.1, 2.9])], x_label="step", levels={"trigram": 3.5})

No script and nothing from outside: a chart is text that any browser shows. Invariant: what is drawn lies
within the frame, and every line and level is named in the picture.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from firstwords.pages import escape_text

WIDTH, HEIGHT = 620, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 112, 12, 34
_MOST_POINTS = 400


@dataclass(frozen=True)
class Line:
    """A named series; `xs` ascend. `style` picks the colour (0 to 5); dots mark points that are few."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: int = 0


@dataclass(frozen=True)
class _Axis:
    """A range of values laid over a range of pixels."""

    low: float
    high: float
    begin: float
    end: float
    is_log: bool = False

    def place(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high, value = (
            map(math.log, (self.low, self.high, value)) if self.is_log else (self.low, self.high, value)
        )
        share = (value - low) / (high - low)
        return self.begin + min(max(share, 0.0), 1.0) * (self.end - self.begin)

    def ticks(self) -> list[float]:
        """Return round values within the range."""
        if self.is_log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1, 2, 5) if self.high / self.low < 300 else (1,)
            marks = [step * 10.0**power for power in powers for step in steps]
        else:
            rough = (self.high - self.low) / 5
            power = 10.0 ** math.floor(math.log10(rough))
            step = next(power * unit for unit in (1, 2, 2.5, 5, 10) if power * unit >= rough)
            first = math.ceil(self.low / step)
            marks = [step * number for number in range(first, math.floor(self.high / step) + 1)]
        return [mark for mark in marks if self.low <= mark <= self.high * (1 + 1e-9)]


def draw_lines(
    lines: Sequence[Line],
    *,
    x_label: str,
    levels: dict[str, float] | None = None,
    from_zero: bool = False,
    log_x: bool = False,
) -> str:
    """Return a chart of lines, and of dashed levels across it.

    The y axis is logarithmic when the values span more than a factor of 20 and are above 0. Values that are
    not finite are left out.

    Args:
        lines: at least one with a point.
        x_label: what x is, with its unit.
        levels: heights to compare with, by name; those far above all lines are named and not drawn.
        from_zero: begin the y axis at 0.
        log_x: lay x out by powers.
    """
    lines = [_keep_finite(line) for line in lines]
    xs = [x for line in lines for x in line.xs]
    ys = [y for line in lines for y in line.ys]
    if not xs:
        return '<p class="none">no points</p>'
    is_log = not from_zero and min(ys) > 0 and max(ys) / min(ys) > 20
    levels = levels or {}
    near = {name: y for name, y in levels.items() if y <= max(ys) * (3 if is_log else 1.6)}
    x_axis = _Axis(*_widen(min(xs), max(xs)), LEFT, WIDTH - RIGHT, log_x and min(xs) > 0)
    low = 0.0 if from_zero else min(ys + list(near.values()))
    high = max(ys + list(near.values()))
    margin = 1.08 if is_log else 1.0
    pad = 0.0 if is_log else (high - low) * 0.05
    low, high = _widen((low if from_zero else low / margin - pad), high * margin + pad)
    y_axis = _Axis(low, high, HEIGHT - BOTTOM, TOP, is_log)
    names = [(y_axis.place(line.ys[-1]), line.name, f"c{line.style}") for line in lines]
    names = [name for name in names if name[1]]
    names += [(y_axis.place(y), name, "level") for name, y in near.items()]
    parts = [_draw_frame(x_axis, y_axis, x_label)]
    for name, y in near.items():
        at = y_axis.place(y)
        parts.append(
            f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}">'
            f"<title>{escape_text(name)}: {y:.4g}</title></line>"
        )
    parts += [_draw_line(line, x_axis, y_axis) for line in lines]
    parts += _draw_names(names)
    return _wrap("".join(parts))


def draw_bars(bars: Sequence[tuple[str, float]], *, x_label: str) -> str:
    """Return a chart of upright bars from 0, each with its label below."""
    if not bars:
        return '<p class="none">nothing counted</p>'
    highest = max(value for _, value in bars)
    y_axis = _Axis(0.0, highest * 1.1 or 1.0, HEIGHT - BOTTOM, TOP)
    width = min((WIDTH - LEFT - 12) / len(bars), 90)
    parts = [_draw_rules(y_axis, WIDTH - 12)]
    for place, (label, value) in enumerate(bars):
        left, top = LEFT + place * width, y_axis.place(value)
        middle, count = left + width / 2, f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"
        parts.append(
            f'<rect class="bar" x="{left + width * 0.1:.1f}" y="{top:.1f}" width="{width * 0.8:.1f}" '
            f'height="{HEIGHT - BOTTOM - top:.1f}"><title>{escape_text(label)}: {count}</title></rect>'
            f'<text x="{middle:.1f}" y="{top - 3:.1f}" text-anchor="middle">{format_tick(value)}</text>'
            f'<text x="{middle:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">'
            f"{escape_text(label)}</text>"
        )
    parts.append(
        f'<text class="axis" x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 4}" text-anchor="middle">'
        f"{escape_text(x_label)}</text>"
    )
    return _wrap("".join(parts))


def draw_shares(counts: Mapping[str, int]) -> str:
    """Draw a bar for each name, one below the other, with its count and its share of all."""
    total = sum(counts.values())
    scale = WIDTH * 0.5 / max(1, *counts.values()) if counts else 0
    parts = []
    for place, (name, count) in enumerate(counts.items()):
        top, share = place * 22, count / max(total, 1)
        parts.append(
            f'<text x="0" y="{top + 15}">{escape_text(_shorten(name))}</text>'
            f'<rect class="bar" x="200" y="{top + 3}" width="{count * scale:.1f}" height="16">'
            f"<title>{escape_text(name)}</title></rect>"
            f'<text x="{206 + count * scale:.1f}" y="{top + 15}">{count:,} ({share:.1%})</text>'
        )
    return f'<svg viewBox="0 0 {WIDTH} {22 * len(counts) + 2}" role="img">{"".join(parts)}</svg>'


def _shorten(name: str) -> str:
    return name if len(name) <= 30 else f"…{name[-29:]}"


def draw_stretches(rows: Iterable[Iterable[tuple[str, int]]], total: int) -> str:
    """Draw rows of stretches side by side; what is left of `total` is shown as empty."""
    parts, top = [], 0
    for row in rows:
        begin = 0
        for name, size in row:
            parts.append(_draw_stretch(begin, size, top, name, WIDTH / total, "bar"))
            begin += size
        parts.append(_draw_stretch(begin, total - begin, top, "empty", WIDTH / total, "pad"))
        top += 22
    return f'<svg viewBox="0 0 {WIDTH} {max(top, 1)}" role="img">{"".join(parts)}</svg>'


def _draw_stretch(begin: int, size: int, top: int, name: str, scale: float, kind: str) -> str:
    wide = max(size * scale - 1, 0)
    label = f'<text class="inside" x="{begin * scale + 4:.1f}" y="{top + 14}">{escape_text(name)}</text>'
    return (
        f'<rect class="{kind}" x="{begin * scale:.1f}" y="{top + 2}" width="{wide:.1f}" height="18">'
        f"<title>{escape_text(name)}: {size:,} tokens</title></rect>{label if wide > 40 else ''}"
    )


def _keep_finite(line: Line) -> Line:
    pairs = [(x, y) for x, y in zip(line.xs, line.ys, strict=True) if math.isfinite(x) and math.isfinite(y)]
    # Of a long series every so many-th point, and the last.
    step = max(1, len(pairs) // _MOST_POINTS)
    pairs = pairs[::step] + ([pairs[-1]] if pairs and (len(pairs) - 1) % step else [])
    return Line(line.name, [x for x, _ in pairs], [y for _, y in pairs], line.style)


def _widen(low: float, high: float) -> tuple[float, float]:
    if high > low:
        return low, high
    return (low * 0.5, low * 1.5) if low > 0 else (low - 1, low + 1)


def _draw_frame(x_axis: _Axis, y_axis: _Axis, x_label: str) -> str:
    parts = [_draw_rules(y_axis, WIDTH - RIGHT)]
    for tick in x_axis.ticks():
        at = x_axis.place(tick)
        parts.append(
            f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{format_tick(tick)}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="axis" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape_text(x_label)}</text>'
    )
    return "".join(parts)


def _draw_rules(y_axis: _Axis, right: float) -> str:
    parts = []
    for tick in y_axis.ticks():
        at = y_axis.place(tick)
        parts.append(
            f'<line class="rule" x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>'
            f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{format_tick(tick)}</text>'
        )
    return "".join(parts)


def _draw_line(line: Line, x_axis: _Axis, y_axis: _Axis) -> str:
    if not line.xs:
        return ""
    points = [(x_axis.place(x), y_axis.place(y)) for x, y in zip(line.xs, line.ys, strict=True)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = "".join(f'<circle class="c{line.style}" cx="{x:.1f}" cy="{y:.1f}" r="2.4"/>' for x, y in points)
    title = f"<title>{escape_text(line.name)}: last {line.ys[-1]:.4g}</title>"
    return f'<polyline class="c{line.style}" points="{path}">{title}</polyline>' + (
        dots if len(points) <= 30 else ""
    )


def _draw_names(names: list[tuple[float, str, str]]) -> list[str]:
    """Write the names beside the ends of their lines, pushed apart where they would overlap."""
    parts, lowest = [], -math.inf
    names = sorted(names)
    room = HEIGHT - BOTTOM - 13 * len(names)
    for place, (at, name, style) in enumerate(names):
        at = max(min(at, room + 13 * (place + 1)), lowest + 13, TOP + 4)
        lowest = at
        parts.append(
            f'<text class="name {style}" x="{WIDTH - RIGHT + 6}" y="{at + 4:.1f}">{escape_text(name)}</text>'
        )
    return parts


def _wrap(inside: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{inside}</svg>'


def format_tick(value: float) -> str:
    """Return a short number: 0.05, 1, 250, 1.5k, 2M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
