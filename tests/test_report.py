"""The report of a run: what its files say, all of it text, and the rest when one of them is broken."""

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from tiny import build_flags, invent_talks, run_script, talk, write_chats, write_config, write_store

import evaluate
import train
from firstwords.compare import lay_along, read_at
from firstwords.figures import list_figures, list_warnings
from firstwords.history import find_cut, read_run
from firstwords.plot import Line, draw_bars, draw_lines
from firstwords.report import write_report


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two finished stages, measured, the second gone on with once."""
    folder = tmp_path_factory.mktemp("report")
    chats = write_chats(
        folder / "chats", invent_talks(20), [talk("<b>tea</b>", "bird"), talk("of", "seven x")]
    )
    store = write_store(folder / "text", ["tea and birds " * 30] * 5, ["birds and tea " * 9])
    (chats / "data_report.json").write_text(json.dumps(DATA))
    cfg = write_config(folder / "c.json")
    words = {"max_steps": 4, "eval_steps": 2, "log_steps": 1, "save_steps": 2}
    first = build_flags(store, folder / "a", cfg, no_assistant_only_loss=True, **words)
    assert run_script(train, first) == (0, "")
    for lr in ("1e-3", "2e-3"):
        second = build_flags(chats, folder / f"b{lr[0]}", None, init_model_dir=folder / "a", lr=lr, **words)
        assert run_script(train, second) == (0, "")
        assert run_script(evaluate, ["--model_dir", folder / f"b{lr[0]}"]) == (0, "")
    return folder


DATA = {
    "rows": {"read": 30, "kept": 23, "rejected": {"bad_json": 7}, "duplicates": 2},
    "splits": {
        "train": {
            "conversations": 20,
            "tokens": 900,
            "longer_than_seq_len": 3,
            "lengths": {"16": 4, "32": 16},
            "learned_shares": {"50": 9, "100": 11},
        }
    },
    "on_both_sides": 1,
    "seq_len": 64,
    "sources": [{"file": "<script>.jsonl"}],
}


@pytest.fixture
def run(folder, tmp_path):
    """A copy of the run that may be broken."""
    return shutil.copytree(folder / "b1", tmp_path / "b1")


class Tags(HTMLParser):
    """Checks that every tag is closed, and collects what a browser would fetch or run."""

    def __init__(self, text):
        super().__init__()
        self.open, self.fetched = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "line", "rect", "circle", "br"):
            self.open.append(tag)
        self.fetched += [f"{tag} {name}={value}" for name, value in attributes if name in ("src", "href")]
        self.fetched += [tag] if tag in ("script", "link", "img", "iframe") else []

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        if tag not in ("line", "rect"):
            assert self.open.pop() == tag


def test_the_report_has_every_part_and_nothing_from_outside(folder, run):
    assert run_script(evaluate, ["--model_dir", run, "--report"]) == (0, "")
    html, markdown = (run / "report.html").read_text(), (run / "report.md").read_text()
    titles = re.findall(r"<h2>(.*?)</h2>", html)
    assert titles == [
        *(
            "Look at this first",
            "Loss, in bits per byte of text",
            "Samples while it learned",
            "Replies",
            "Scores",
        ),
        *("Where the loss is", "Speed and steps", "Data", "How it was made"),
    ]
    assert [line[3:] for line in markdown.splitlines() if line.startswith("## ")] == titles
    assert Tags(html).fetched == []
    assert "url(" not in html
    assert "http" not in html.replace("http-equiv", "")
    for svg in re.findall(r"<svg.*?</svg>", html, re.S):
        ElementTree.fromstring(svg)
    assert html.count("<svg") >= 10
    assert len(re.findall(r'class="source">from ', html)) == len(titles) - 1
    assert "GPT-2 124M" in html


def test_its_numbers_are_those_of_the_files(folder, run):
    write_report(run)
    html = (run / "report.html").read_text()
    manifest = json.loads((run / "manifest.json").read_text())
    measured = json.loads((run / "evaluation.json").read_text())
    found = {figure.name: figure.shown for figure in list_figures(read_run(run))}
    assert found["tokens trained on"] == f"{manifest['tokens_seen']:,}"
    state = json.loads((run / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    losses = [row["eval_loss"] for row in state if "eval_loss" in row]
    assert found["val loss"] == f"{losses[-1]:.4f}"
    assert found["trigram's, to beat"] == f"{measured['baselines']['trigram']['bits_per_byte']:.4f}"
    assert f"{measured['accuracy']:.4f}" in html
    assert "33,248 weights" in html or "29,152 weights" in html
    assert read_run(run).curve("train/loss").steps == (1, 2, 3, 4)


def test_what_the_data_hold_stays_text(run):
    write_report(run)
    html, markdown = (run / "report.html").read_text(), (run / "report.md").read_text()
    for text in (html, markdown):
        assert "<b>tea" not in text
        assert "<script>" not in text
        assert "&lt;b&gt;tea&lt;/b&gt;" in text


def test_warnings_in_plain_words(run):
    text = " ".join(list_warnings(read_run(run)))
    assert "7 of 30 rows were refused" in text
    assert "3 conversations are longer than 64 tokens and were dropped" in text
    assert "1 rows stand in train and val" in text
    assert "of the replies end by themselves" in text
    assert "does not beat counting three tokens" in text
    assert "NaN" not in text
    assert "not reached its last step" not in text


def change_events(run, tags):
    """Return the run as read, with other values for some tags."""
    found = read_run(run)
    for tag, values in tags.items():
        steps = tuple(range(1, len(values) + 1))
        found.curves[tag] = type(found.curve(tag))(steps, values, tuple(map(float, steps)))
    return found


@pytest.mark.parametrize(
    ("tags", "says"),
    [
        ({"train/epoch": (1.0, 9.5)}, "read 9.5 times. Beyond 5 passes"),
        ({"eval/loss": (3.0, 2.0, 2.5)}, "risen from 2.000 at step 2 to 2.500"),
        (
            {"eval/loss": (3.0,), "train/loss": (1.0,)},
            "val loss (3.000) stands well above the training loss (1.000)",
        ),
        ({"train/grad_norm": (1.0, float("nan"))}, "was NaN or infinite"),
        (
            {"eval/kept_text_loss": (2.0, 2.9)},
            "It forgets: on stage A's text the loss rose from 2.00 to 2.90",
        ),
        ({"health/role_leak": (0.5,)}, "50% of the replies open another's turn"),
        ({"health/repeat_4gram": (0.25,)}, "25% of the replies go round in circles"),
        ({"health/empty": (0.25,)}, "25% of the replies are empty"),
    ],
)
def test_a_warning_comes_when_it_should(run, tags, says):
    assert says in " ".join(list_warnings(change_events(run, tags)))
    good = {tag: (1.0, 0.0) if tag.startswith("health") else (1.0, 1.0) for tag in tags}
    assert says not in " ".join(list_warnings(change_events(run, good)))


# --- broken and missing files


def test_an_event_file_cut_short_is_read_as_far_as_it_goes(run):
    path = next((run / "runs").glob("events*"))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    code, errors = run_script(evaluate, ["--model_dir", run, "--report"])
    assert (code, len(errors.splitlines())) == (65, 1)
    assert "is cut short at byte" in errors
    assert "the rest of the report is written" in errors
    html = (run / "report.html").read_text()
    assert "What could not be read" in html
    assert "Speed and steps" in html
    assert read_run(run).curve("train/loss").steps[0] == 1


def test_a_whole_event_file_is_not_cut(run):
    path = next((run / "runs").glob("events*"))
    assert find_cut(path) is None
    data = path.read_bytes()
    for short in (len(data) - 1, len(data) - 5, 7):
        path.write_bytes(data[:short])
        assert find_cut(path) == short


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("evaluation.json", "Where the loss is"),
        ("manifest.json", "How it was made"),
        ("samples.md", "Samples while"),
    ],
)
@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_a_file_that_is_missing_or_broken_costs_its_part_alone(run, name, gone, content):
    (run / name).unlink()
    if content is not None:
        (run / name).write_text(content)
    if name == "manifest.json":
        shutil.rmtree(run / "checkpoint-4")
        shutil.rmtree(run / "checkpoint-2")
    code, errors = run_script(evaluate, ["--model_dir", run, "--report"])
    assert code == (65 if content is not None and name.endswith("json") else 0), errors
    html = (run / "report.html").read_text()
    assert gone not in html
    assert "Speed and steps" in html


def test_a_file_of_another_form_costs_its_part_alone(run):
    figures = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text(json.dumps(figures | {"loss_by_turn": [1, 2]}))
    code, errors = run_script(evaluate, ["--model_dir", run, "--report"])
    assert code == 65
    assert "places is left out, a file has another form" in errors
    assert "Speed and steps" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (["--model_dir", "{folder}/none", "--report"], 66, "none: is no folder"),
        (["--model_dir", "{folder}/chats", "--report"], 66, "chats: holds no run"),
        (["--compare", "{folder}/b1", "{folder}/chats"], 66, "chats: holds no run"),
        (["--compare", "{folder}/b1"], 2, "--compare"),
        (["--model_dir", "{folder}/b1", "--report", "--timeline", "x"], 2, "--report: stands by itself"),
        (["--model_dir", "{folder}/none", "--timeline", "x"], 66, "none: is no folder"),
    ],
)
def test_what_is_refused(folder, words, code, why):
    found, errors = run_script(evaluate, [word.format(folder=folder) for word in words])
    assert (found, len(errors.splitlines())) == (code, 1), errors
    assert why in errors


# --- two runs, and one prompt through time


def test_two_runs_side_by_side(folder, tmp_path, capsys):
    assert run_script(evaluate, ["--compare", folder / "b1", folder / "b2", "--out_dir", tmp_path]) == (0, "")
    rows = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()]
    differs = rows[1 : rows.index([""])]
    assert ["--lr", "0.001", "0.002"] in differs
    assert {row[0] for row in differs} == {"--lr"}
    html = (tmp_path / "compare_with_b1.html").read_text()
    assert Tags(html).fetched == []
    assert html.index("What differs") < html.index("Curves")
    for title in ("val loss at equal tokens", "val loss at equal seconds", "train loss at equal tokens"):
        assert title in html
    run = read_run(folder / "b1")
    tokens, losses = lay_along(run, "eval/loss", "tokens")
    assert (len(tokens), losses) == (2, list(run.curve("eval/loss").values))
    assert tokens[-1] == json.loads((folder / "b1" / "manifest.json").read_text())["tokens_seen"]
    assert rows != ["val loss at", "tokens"]


def test_the_same_run_differs_in_nothing(folder, tmp_path, capsys):
    assert run_script(evaluate, ["--compare", folder / "b1", folder / "b1", "--out_dir", tmp_path]) == (0, "")
    assert "flags and data" in capsys.readouterr().out


def test_between_two_points_a_curve_is_straight():
    assert read_at([10, 20, 40], [1.0, 3.0, 7.0], 30) == 5.0
    assert read_at([10, 20, 40], [1.0, 3.0, 7.0], 40) == 7.0
    assert read_at([10, 20], [1.0, 3.0], 10) == 1.0
    assert read_at([10, 20], [1.0, 3.0], 9) is None


def test_one_prompt_through_every_checkpoint(folder, run, capsys):
    assert run_script(evaluate, ["--model_dir", run, "--timeline", "tea", "--device", "cpu"]) == (0, "")
    text = (run / "timeline.md").read_text()
    assert re.findall(r"^## step (\d+)$", text, re.M) == ["2", "4"]
    assert text.count("**tea**") == 2
    assert capsys.readouterr().out.strip().startswith("## step 2")
    again = run_script(evaluate, ["--model_dir", run, "--timeline", "tea", "--device", "cpu"])
    assert again == (0, "")
    assert (run / "timeline.md").read_text() == text


# --- charts


def read_points(svg):
    path = re.search(r'points="([^"]*)"', svg)[1]
    return [tuple(map(float, pair.split(","))) for pair in path.split()]


def test_a_line_is_drawn_to_scale():
    points = read_points(draw_lines([Line("x", [0, 5, 10], [0.0, 1.0, 2.0])], x_label="step"))
    assert points[1][0] == pytest.approx((points[0][0] + points[2][0]) / 2)
    assert points[1][1] == pytest.approx((points[0][1] + points[2][1]) / 2, abs=0.1)
    assert points[0][1] > points[2][1], "up is more"


def test_a_wide_range_is_drawn_by_powers():
    points = read_points(draw_lines([Line("x", [0, 1, 2], [100.0, 10.0, 1.0])], x_label="step"))
    assert points[1][1] == pytest.approx((points[0][1] + points[2][1]) / 2, abs=0.1)


@pytest.mark.parametrize(
    "ys", [[1.0], [0.0, 0.0], [-1.0, 5.0], [float("nan"), 2.0, float("inf")], [1e-9, 1e9]]
)
def test_any_values_are_drawn_within_the_frame(ys):
    svg = draw_lines([Line("a", range(len(ys)), ys)], x_label="step", levels={"high": 3.0, "far": 1e30})
    ElementTree.fromstring(svg)
    assert "nan" not in svg
    for x, y in read_points(svg):
        assert 0 <= x <= 620
        assert 0 <= y <= 260
    assert "far" not in svg


def test_nothing_to_draw():
    assert "no points" in draw_lines([Line("x", [], [])], x_label="step")
    assert "nothing" in draw_bars([], x_label="x")


def test_a_long_series_keeps_its_ends():
    points = read_points(draw_lines([Line("x", range(9999), range(9999))], x_label="step"))
    whole = read_points(draw_lines([Line("x", [0, 9998], [0, 9998])], x_label="step"))
    assert len(points) < 500
    assert (points[0], points[-1]) == (whole[0], whole[-1])
