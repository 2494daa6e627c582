"""The tutorial's pictures: the script beside them makes them, and they are small and whole."""

import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from docs.pictures import make_pictures

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "docs/pictures"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The pictures, drawn anew."""
    return make_pictures.draw_all(tmp_path_factory.mktemp("pictures"))


def test_the_script_makes_every_picture_that_is_committed(drawn):
    committed = {path.name: path.read_text(encoding="utf-8") for path in PICTURES.glob("*.svg")}
    assert {path.name: path.read_text(encoding="utf-8") for path in drawn} == committed


def test_the_tutorial_shows_every_picture_once():
    text = (ROOT / "tutorial.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[[^\]]+\]\(docs/pictures/(\w+)\.svg\)", text)
    assert sorted(shown) == sorted(make_pictures.PICTURES)


def test_pictures_are_small_stand_alone_and_load_nothing(drawn):
    for path in drawn:
        text = path.read_text(encoding="utf-8")
        root = ElementTree.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg", f"{path.name} is no SVG file of its own"
        assert len(text) < 40_000
        assert "href" not in text
        assert "var(--" not in text


def test_every_mark_of_a_picture_has_its_colour(drawn):
    known = set(re.findall(r"\.([\w-]+)", make_pictures.STYLE))
    for path in drawn:
        for names in re.findall(r'class="([^"]+)"', path.read_text(encoding="utf-8")):
            assert set(names.split()) - {"axis"} <= known, f"{path.name}: {names} is nowhere in the style"


def test_boxes_lie_within_the_picture():
    svg = make_pictures.draw_boxes([("a title", [("x" * 20, 'class="box"')] * 9)])
    places = re.findall(r'<rect x="([\d.]+)" y="\d+" width="([\d.]+)"', svg)
    assert len(places) == 9
    assert all(float(x) + float(width) <= make_pictures.WIDTH for x, width in places)


def test_attention_is_causal_and_stays_in_its_conversation():
    svg = make_pictures.draw_attention({"row": {"positions": [0, 1, 0, 1, 2]}})
    seen = [(int(x), int(w)) for x, w in re.findall(r'class="seen" x="(\d+)" y="\d+" width="(\d+)"', svg)]
    assert [((x - 10) // 6, w // 6) for x, w in seen] == [(0, 1), (0, 2), (2, 1), (2, 2), (2, 3)]


def test_measured_figures_are_those_of_the_page():
    """What the page prints and what its pictures show come from the same experiments."""
    figures = json.loads(make_pictures.FIGURES.read_text(encoding="utf-8"))
    text = (ROOT / "tutorial.md").read_text(encoding="utf-8")
    for step in (0, 10, 60):
        learned, aside = (figures["overfitting"][name][1][step] for name in ("learned", "put aside"))
        shown = re.search(rf"^step {step:2}  train +([\d.]+)  val +([\d.]+)$", text, re.M)
        assert [float(number) for number in shown.groups()] == pytest.approx([learned, aside], abs=1e-3)
    for name, (steps, losses) in figures["stages"].items():
        lowest = min(losses)
        assert f"val loss {lowest:.4f}" in text, f"{name}: {lowest} at step {steps[losses.index(lowest)]}"

    for name, bar in figures["memory"].items():
        shape, recompute = name.lower().split(", recomputed: ")
        total = float(re.search(rf"^{shape} {recompute} +([\d.]+):", text, re.M)[1])
        assert sum(bar.values()) == pytest.approx(total, abs=0.3)


def test_an_unknown_word_is_answered_with_the_help():
    ended = subprocess.run(
        [sys.executable, "-m", "docs.pictures.make_pictures", "--mesure"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    assert "--measure" in ended.stderr
