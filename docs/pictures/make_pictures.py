"""The pictures of the tutorial, drawn from figures.json beside this script.

    python -m docs.pictures.make_pictures              draws every picture anew
    python -m docs.pictures.make_pictures --measure    first trains for a few minutes and writes figures.json

--measure stands where the tutorial's commands were run: it reads data/parrot and the runs of its chapters.
A picture holds its colours itself and shows on a white page and a dark one.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from firstwords.pages import escape_text
from firstwords.plot import WIDTH, Line, draw_lines

HERE = Path(__file__).parent
FIGURES = HERE / "figures.json"
COLORS = ("#2563b8", "#d9622b", "#2f8f5b", "#8b4fb8", "#b8962b", "#5b6470")
STYLE = (
    "text { font: 11px system-ui, sans-serif; fill: #626b76 } .rule { stroke: #e3e6ea } "
    "line.level { stroke: #626b76; stroke-dasharray: 5 4 } polyline { fill: none; stroke-width: 1.8 } "
    ".bar { fill: #2563b8 } .name { font-weight: 600 } .box { stroke: #b9c0c8; fill: #fff } "
    ".learned { fill: #bfe3cd } .seen { fill: #2563b8 } .mono { font: 12px monospace; fill: #1b1f24 } "
    + " ".join(
        f"polyline.c{n} {{ stroke: {color} }} circle.c{n}, text.c{n} {{ fill: {color} }}"
        for n, color in enumerate(COLORS)
    )
)
STAGES = {"after stage A": "runs/has_read", "without it": "runs/has_not_read"}
MEMORY_COLORS = (*COLORS, "#c08ee8")
CARDS, PIXELS_OF_GB = (12, 16, 24), 20  # GB
CHAR = 7.3  # pixels of a character of monospaced 12 px


# --- drawing


def make_standalone(svg: str) -> str:
    """Return an SVG of ours as a file of its own, with its colours and a white ground."""
    head, _, inside = svg.partition(">")
    head = head.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ')
    ground = '<rect width="100%" height="100%" rx="6" fill="#fff"/>'
    return f"{head}><style>{STYLE}</style>{ground}{inside}\n"


def draw_boxes(lines: list[tuple[str, list[tuple[str, str]]]]) -> str:
    """Draw lines of tokens, each in a box.

    Args:
        lines: of each its title, and the boxes as (text, attributes of the rectangle).
    """
    parts, top = [], 8
    for title, boxes in lines:
        parts.append(f'<text class="name" x="10" y="{top + 12}">{escape_text(title)}</text>')
        left, top = 10.0, top + 18
        for text, attributes in boxes:
            wide = len(text) * CHAR + 8
            if left + wide > WIDTH - 8:
                left, top = 10.0, top + 24
            parts.append(
                f'<rect x="{left:.1f}" y="{top}" width="{wide:.1f}" height="20" {attributes}/>'
                f'<text class="mono" xml:space="preserve" x="{left + 4:.1f}" y="{top + 14}">'
                f"{escape_text(text)}</text>"
            )
            left += wide + 2
        top += 30
    return f'<svg viewBox="0 0 {WIDTH} {top}" role="img">{"".join(parts)}</svg>'


def draw_tokens(figures: dict) -> str:
    """One sentence in characters, in the parrot's tokens, and in those of Python's documentation."""
    lines = []
    for name, pieces in figures["tokens"].items():
        boxes = [(piece.replace(" ", "·"), 'class="box"') for piece in pieces]
        lines.append((f"{name}: {len(pieces)} tokens", boxes))
    return draw_boxes(lines)


def draw_mask(figures: dict) -> str:
    """A packed row: what is learned is green."""
    row = figures["row"]
    boxes = [
        (piece.replace(" ", "·"), 'class="box learned"' if learned else 'class="box"')
        for piece, learned in zip(row["pieces"], row["learned"], strict=True)
    ]
    return draw_boxes([("learned: green. The rest is read, and costs nothing when guessed wrong", boxes)])


def draw_attention(figures: dict) -> str:
    """Which token of a packed row (down) sees which (across)."""
    positions = figures["row"]["positions"]
    size, left, top = 6, 10, 10
    parts, begin = [], 0
    for place, position in enumerate(positions):
        begin = place if position == 0 else begin
        parts.append(
            f'<rect class="seen" x="{left + begin * size}" y="{top + place * size}" '
            f'width="{(place - begin + 1) * size}" height="{size - 1}"/>'
        )
    side = len(positions) * size
    notes = (
        "each line is a token of the row,",
        "each column one that it may look at:",
        "itself and those before it,",
        "of its own conversation alone",
    )
    parts += [
        f'<text x="{left + side + 16}" y="{top + 16 + 16 * n}">{note}</text>' for n, note in enumerate(notes)
    ]
    frame = f'<rect x="{left}" y="{top}" width="{side}" height="{side}" fill="none" stroke="#b9c0c8"/>'
    return f'<svg viewBox="0 0 {WIDTH} {side + 20}" role="img">{frame}{"".join(parts)}</svg>'


def draw_reply(figures: dict) -> str:
    """How probable each token of a reply is, at some steps of its training."""
    reply = figures["reply"]
    lines = []
    for step, shares, loss in zip(reply["steps"], reply["shares"], reply["losses"], strict=True):
        boxes = [
            (piece.replace(" ", "·"), f'stroke="#b9c0c8" fill="#2f8f5b" fill-opacity="{0.8 * share:.2f}"')
            for piece, share in zip(reply["pieces"], shares, strict=True)
        ]
        lines.append((f"step {step}: loss {loss:.2f}", boxes))
    return draw_boxes(lines)


def draw_curves(name: str, x_label: str, **options) -> Callable[[dict], str]:
    """Return what draws the curves of one figure: by name, each `[xs, ys]`."""

    def draw(figures: dict) -> str:
        curves = enumerate(figures[name].items())
        lines = [Line(title, xs, ys, style=n % 6) for n, (title, (xs, ys)) in curves]
        return draw_lines(lines, x_label=x_label, **options)

    return draw


def draw_memory(figures: dict) -> str:
    """What a training step holds, a bar for each run, with the sizes of cards across."""
    bars = figures["memory"]
    terms = [term for term in next(iter(bars.values())) if any(bar[term] for bar in bars.values())]
    foot = 34 * len(bars) + 18
    parts = [draw_stack(name, bar, terms, 34 * n + 18) for n, (name, bar) in enumerate(bars.items())]
    for card in CARDS:
        at = 10 + card * PIXELS_OF_GB
        parts.append(f'<line class="level" x1="{at}" x2="{at}" y1="4" y2="{foot}"/>')
        parts.append(f'<text x="{at + 3}" y="12">{card} GB</text>')
    for place, (color, term) in enumerate(zip(MEMORY_COLORS, terms, strict=False)):
        at = 10 + place * 86
        parts.append(f'<rect x="{at}" y="{foot + 8}" width="10" height="10" fill="{color}"/>')
        parts.append(f'<text x="{at + 14}" y="{foot + 17}">{term}</text>')
    return f'<svg viewBox="0 0 {WIDTH} {foot + 26}" role="img">{"".join(parts)}</svg>'


def draw_stack(name: str, bar: dict[str, float], terms: list[str], top: int) -> str:
    """Draw the terms of one bar behind one another, its name and sum above."""
    total, left = sum(bar.values()), 10.0
    parts = [f'<text class="name" x="10" y="{top + 9}">{escape_text(name)}: {total:.1f} GB</text>']
    for color, term in zip(MEMORY_COLORS, terms, strict=False):
        wide = bar[term] * PIXELS_OF_GB
        parts.append(
            f'<rect x="{left:.1f}" y="{top + 13}" width="{wide:.1f}" height="13" fill="{color}">'
            f"<title>{term}: {bar[term]:.1f} GB</title></rect>"
        )
        left += wide
    return "".join(parts)


PICTURES: dict[str, Callable[[dict], str]] = {
    "tokens": draw_tokens,
    "mask": draw_mask,
    "attention": draw_attention,
    "reply": draw_reply,
    "memory": draw_memory,
    "overfitting": draw_curves("overfitting", "step", from_zero=True),
    "optimizers": draw_curves("optimizers", "step"),
    "stages": draw_curves("stages", "step of stage B"),
    "sizes": draw_curves("sizes", "tokens of training", log_x=True),
}


def draw_all(folder: Path) -> list[Path]:
    """Draw every picture into a folder; return their paths."""
    figures = json.loads(FIGURES.read_text(encoding="utf-8"))
    paths = []
    for name, draw in PICTURES.items():
        paths.append(folder / f"{name}.svg")
        paths[-1].write_text(make_standalone(draw(figures)), encoding="utf-8")
    return paths


# --- measuring


def measure_all() -> dict:
    """Return the figures of every picture; stands in the tutorial's folder, see the head of this file."""
    return {
        "tokens": measure_tokens("The captain of this ship is called Ada."),
        "row": measure_row(),
        "reply": measure_reply("Can you swim?", "No. I fly.", (0, 10, 20, 40, 60)),
        "overfitting": measure_overfitting(steps=61),
        "optimizers": measure_optimizers(steps=41),
        "stages": {
            "after stage A": read_curve("runs/has_read"),
            "without it": read_curve("runs/has_not_read"),
        },
        "sizes": measure_sizes(),
        "memory": predict_memory(),
    }


def measure_tokens(sentence: str) -> dict:
    """Return the pieces of a sentence, by tokenizer."""
    from firstwords.tokenizer import load_tokenizer

    folders = {"the parrot's 300": "data/parrot", "4,096 of Python's documentation": "data/pydocs"}
    pieces = {"characters": list(sentence)}
    for name, folder in folders.items():
        tokenizer = load_tokenizer(folder)
        pieces[name] = [tokenizer.decode([i]) for i in tokenizer.encode(sentence)]
    return pieces


def measure_row() -> dict:
    """Return the first packed row of the parrot without the pads at its end."""
    from docs.lab import IGNORED, rows, tokenizer

    row = {name: tensor.tolist() for name, tensor in rows[0].items()}
    used = sum(i != tokenizer.pad_id for i in row["input_ids"])
    names = {i: name for name, i in tokenizer.control_ids.items()}
    return {
        "pieces": [names.get(i) or tokenizer.decode([i]) for i in row["input_ids"][:used]],
        "learned": [label != IGNORED for label in row["labels"][:used]],
        "positions": row["position_ids"][:used],
    }


def measure_reply(asked: str, answered: str, steps: tuple[int, ...]) -> dict:
    """Return how probable each token of an answer is after so many steps."""
    import math

    from docs.lab import batch, learn, tokenizer
    from firstwords.generate import rank_ids
    from firstwords.schema import Message
    from firstwords.template import encode_chat, encode_prompt

    question, answer = Message("user", asked), Message("assistant", answered)
    prompt = encode_prompt([question], tokenizer)
    reply = encode_chat([question, answer], tokenizer)[0][len(prompt) :]
    shares = [
        [choice.probability for choice in rank_ids(learn(batch, steps=n), prompt, reply)] for n in steps
    ]
    return {
        "pieces": [*(tokenizer.decode([i]) for i in reply[:-1]), "<|end|>"],
        "steps": list(steps),
        "shares": [[round(share, 4) for share in line] for line in shares],
        "losses": [round(-sum(map(math.log, line)) / len(line), 4) for line in shares],
    }


def measure_overfitting(steps: int) -> dict:
    """Return the losses of what is learned and of what was put aside, by step."""
    from docs.lab import batch, learn, measure, val_batch

    curves = {"learned": [], "put aside": []}

    def watch(model, loss):
        curves["learned"].append(round(loss, 4))
        curves["put aside"].append(round(measure(model, val_batch), 4))

    learn(batch, steps=steps, watch=watch)
    return {name: [list(range(steps)), losses] for name, losses in curves.items()}


def measure_optimizers(steps: int) -> dict:
    """Return the losses by step of AdamW and of the plain gradient, each at some rates."""
    from torch.optim import SGD, AdamW

    from docs.lab import batch, learn

    curves = {}
    for optimizer, lr in ((AdamW, 1e-5), (AdamW, 1e-3), (AdamW, 1e-1), (SGD, 1e-2), (SGD, 5e-2)):
        losses = []
        learn(
            batch, optimizer=optimizer, lr=lr, steps=steps, watch=lambda _, loss, to=losses: to.append(loss)
        )
        curves[f"{optimizer.__name__} {lr:g}"] = [list(range(steps)), [round(loss, 4) for loss in losses]]
    return curves


def read_curve(run: str) -> list:
    """Return the val loss of a run by step."""
    from firstwords.history import read_run

    curve = read_run(Path(run)).curve("eval/loss")
    return [list(curve.steps), [round(value, 4) for value in curve.values]]


def measure_sizes() -> dict:
    """Return the losses of docs/sizes.py by tokens, of each size."""
    from docs.sizes import SHAPES, measure_size

    curves = {}
    for layers, width in SHAPES:
        weights, losses = measure_size(layers, width)
        ys = [round(loss, 4) for loss in losses.values()]
        curves[f"{weights / 1e6:.2g}M weights"] = [list(losses), ys]
    return curves


def predict_memory() -> dict:
    """Return the GB of a step of 8 rows of 1,024 tokens, by run and by what they are."""
    from dataclasses import asdict

    from transformers import GPT2Config

    from firstwords import memory
    from firstwords.model import read_config

    bars = {}
    for shape, recompute in (("124m", "none"), ("355m", "none"), ("355m", "selective"), ("355m", "full")):
        values = read_config(HERE.parents[1] / f"configs/models/baseline_{shape}.json")
        config = GPT2Config(**values, vocab_size=50_304)
        held = memory.predict_memory(
            config, batch_size=8, seq_len=1024, bf16=True, recompute=recompute, grad_accum=64
        )
        name = f"{shape.upper()}, recomputed: {recompute}"
        bars[name] = {term: round(size / 1e9, 3) for term, size in asdict(held).items()}
    return bars


def main(words: list[str]) -> None:
    """Draw; with `--measure` measure first."""
    if words == ["--measure"]:
        figures = json.dumps(measure_all(), ensure_ascii=False)
        FIGURES.write_text(figures.replace('], "', '],\n "') + "\n", encoding="utf-8")
    elif words:
        sys.exit(__doc__)
    for path in draw_all(HERE):
        print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
