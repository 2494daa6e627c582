"""Mixes, over-long conversations, processes, kills, and the account of every row and token."""

import html
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from rows import read_jsonl, write_jsonl

import prep_data
from firstwords import conversations, prep
from firstwords.conversations import gather_rows
from firstwords.errors import BadData, BadFlag
from firstwords.packing import choose_length, split_turns
from firstwords.pages import format_html_table, format_sections
from firstwords.plot import draw_bars, draw_shares
from firstwords.schema import parse_conversation
from firstwords.sources import Located
from firstwords.template import CHAT_TEMPLATE, encode_chat
from firstwords.tokenizer import load_tokenizer, train_bpe

ROOT = Path(__file__).parent.parent


def make_rows(name, count, words=3):
    return [
        {"question": f"{name} {n}?", "answer": " ".join([f"{name}{n}"] * (1 + n % words))}
        for n in range(count)
    ]


def count_questions(out_dir):
    """Count each question over both splits."""
    rows = read_jsonl(out_dir / "train.jsonl") + read_jsonl(out_dir / "val.jsonl")
    return Counter(row["messages"][0]["content"] for row in rows)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe([json.dumps(make_rows("a", 40))], 300).save(folder, chat_template=CHAT_TEMPLATE)
    return folder


@pytest.fixture
def run(tokenizer_folder, tmp_path):
    def run(name, *flags):
        out_dir = tmp_path / name
        flags = ["--out_dir", out_dir, "--tokenizer", tokenizer_folder, *flags]
        prep_data.main([str(flag) for flag in flags])
        return json.loads((out_dir / "data_report.json").read_text(encoding="utf-8"))

    return run


# --- mixes


@pytest.mark.parametrize(
    ("text", "name", "weight"),
    [
        ("a.jsonl", "a.jsonl", 1),
        ("a.jsonl:0.3", "a.jsonl", 0.3),
        ("a:b.jsonl", "a:b.jsonl", 1),
        ("a:b.jsonl:2", "a:b.jsonl", 2),
        ("here:2", "here:2", 1),
        ("here:2:0.5", "here:2", 0.5),
        ("hub:owner/name", "hub:owner/name", 1),
        ("hub:owner/name:1e-1", "hub:owner/name", 0.1),
        ("hub:7", "hub:7", 1),
    ],
)
def test_a_weight_is_what_follows_the_last_colon_unless_that_is_a_path(
    tmp_path, monkeypatch, text, name, weight
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here:2").mkdir()
    assert prep.parse_dataset(text) == prep.Dataset(name, weight)


@pytest.mark.parametrize("weight", ["0", "-1", "1e9", "", ".", "e"])
def test_no_weight(weight):
    with pytest.raises(Exception, match="has the weight"):
        prep.parse_dataset(f"a.jsonl:{weight}")


def test_weights_say_how_often_each_row_is_taken(tmp_path, run):
    paths = {name: write_jsonl(tmp_path / f"{name}.jsonl", make_rows(name, 400)) for name in "abc"}
    sets = ["--dataset", paths["a"], "--dataset", f"{paths['b']}:0.3", "--dataset", f"{paths['c']}:2.5"]
    report = run("out", *sets)
    taken = count_questions(tmp_path / "out")
    assert {taken[f"a {n}?"] for n in range(400)} == {1}
    assert {taken[f"b {n}?"] for n in range(400)} == {0, 1}
    assert {taken[f"c {n}?"] for n in range(400)} == {2, 3}
    drawn = {row["dataset"][-7]: row for row in report["datasets"]}
    for name, low, high in (("a", 400, 400), ("b", 90, 150), ("c", 960, 1040)):
        rows = sum(count for question, count in taken.items() if question[0] == name)
        assert low <= rows <= high
        assert drawn[name]["read"] == drawn[name]["kept"] == drawn[name]["conversations"] == rows
    assert sum(row["tokens"] for row in drawn.values()) == sum(s["tokens"] for s in report["splits"].values())
    assert report["rows"]["duplicates"] == 0  # what a weight repeats is no duplicate
    assert report["rows"]["repeated"] == drawn["c"]["kept"] - 400
    assert report["on_both_sides"] == 0
    again = run("again", *sets, "--seed", "1")
    assert again["datasets"][1]["kept"] != drawn["b"]["kept"] or count_questions(tmp_path / "again") != taken


def test_bad_rows_of_a_repeated_set_are_counted_once(tmp_path, run):
    path = write_jsonl(tmp_path / "a.jsonl", [*make_rows("a", 10), {"title": 1}])
    report = run("out", "--dataset", f"{path}:3", "--skip_bad")
    assert report["rows"]["read"] == 31
    assert report["rows"]["kept"] == 30
    assert report["rows"]["rejected"] == {"unknown_shape": 1}
    assert len(read_jsonl(tmp_path / "out" / "rejects.jsonl")) == 1


# --- over-long conversations


def test_truncation_and_dropping_have_one_owner():
    learned = np.array([0, 0, 0, 1, 1, 0, 1, 1])
    assert choose_length(learned, 8, "drop") == choose_length(learned, 8, "truncate") == 8
    assert choose_length(learned, 7, "drop") == 0
    assert choose_length(learned, 7, "truncate") == 7
    assert choose_length(learned, 3, "truncate") == 0  # nothing to learn would be left


@pytest.mark.parametrize(
    ("lengths", "num_shared", "pieces"),
    [
        ([2, 4, 4, 4, 4], 1, [[0, 1, 2], [0, 3, 4]]),
        ([4, 4, 4, 4, 4, 4], 0, [[0, 1], [2, 3], [4, 5]]),
        ([2, 2, 2, 2, 4, 4], 0, [[0, 1, 2, 3], [4, 5]]),
        ([2, 2, 9, 9, 2, 2], 0, [[0, 1], [4, 5]]),  # nothing goes on behind what is left out
        ([9, 9], 0, []),
        ([13, 1, 1], 1, []),
    ],
)
def test_split_cuts_between_exchanges(lengths, num_shared, pieces):
    assert split_turns(lengths, 12, num_shared=num_shared) == pieces


def long_rows(count=30):
    """Conversations of one to six exchanges, some with a system prompt, some with a very long reply."""
    rows = []
    for n in range(count):
        turns = [{"role": "system", "content": f"S{n}"}] if n % 3 == 0 else []
        for k in range(1 + n % 6):
            reply = f"tell {n} {k} é " * (30 if n % 5 == 4 and k == 1 else 1)
            turns += [{"role": "user", "content": f"ask {n} {k}"}, {"role": "assistant", "content": reply}]
        rows.append({"messages": turns})
    return rows


@pytest.mark.parametrize("overlong", conversations.OVERLONG)
def test_what_overlong_takes_is_counted_exactly(tmp_path, run, overlong):
    path, seq_len = write_jsonl(tmp_path / "a.jsonl", long_rows()), 64
    whole = run("whole", "--dataset", path)
    report = run("out", "--dataset", path, "--seq_len", seq_len, "--overlong", overlong)
    tokenizer = load_tokenizer(tmp_path / "out")
    for split, counts in report["splits"].items():
        before = whole["splits"][split]
        tokenized = read_jsonl(tmp_path / "out" / f"{split}_tokenized.jsonl")
        texts = read_jsonl(tmp_path / "out" / f"{split}.jsonl")
        assert counts["tokens_read"] == before["tokens"]
        assert counts["tokens"] == sum(len(row["input_ids"]) for row in tokenized)
        assert (
            counts["tokens_read"] + counts["tokens_repeated"] == counts["tokens"] + counts["tokens_dropped"]
        )
        learned = sum(sum(row["assistant_masks"]) for row in tokenized)
        assert before["learned_tokens"] - counts["learned_dropped"] == counts["learned_tokens"] == learned
        assert counts["conversations"] == counts["rows"] - counts["rows_dropped"] + counts["rows_added"]
        cut = 0
        for row, text in zip(tokenized, texts, strict=True):
            ids, mask = encode_chat(parse_conversation(text), tokenizer)
            size = len(row["input_ids"])
            assert (row["input_ids"], row["assistant_masks"]) == (ids[:size], mask[:size])
            assert size == len(ids) or overlong == "truncate"
            assert size <= seq_len or overlong == "keep"
            assert any(row["assistant_masks"])
            cut += mask[size - 1] and ids[size - 1] != tokenizer.end_id
        assert counts["cut_in_reply"] == cut
    rows = report["rows"]
    assert rows["read"] == rows["kept"] + sum(rows["dropped"].values()) + sum(rows["rejected"].values()) == 30
    train = report["splits"]["train"]
    assert (train["cut_in_reply"] > 0) == (overlong == "truncate")
    assert (train["tokens_repeated"] > 0) == (train["rows_added"] > 0) == (overlong == "split")
    assert (rows["dropped"]["overlong"] > 0) == (overlong == "drop")


def test_summary_says_what_was_lost(tmp_path, run, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", long_rows())
    report = run("out", "--dataset", path, "--seq_len", "64", "--overlong", "drop")
    lost = sum(counts["tokens_dropped"] for counts in report["splits"].values())
    total = sum(counts["tokens_read"] for counts in report["splits"].values())
    assert f"lost to --overlong drop  {lost:,} of {total:,} tokens" in capsys.readouterr().out


# --- processes and kills

NAMES = ("train.jsonl", "val.jsonl", "train_tokenized.jsonl", "val_tokenized.jsonl", "rejects.jsonl")


def read_files(out_dir):
    return {path.name: path.read_bytes() for path in sorted(out_dir.iterdir())}


def test_any_number_of_processes_writes_the_same_bytes(tmp_path, run, monkeypatch):
    monkeypatch.setattr(conversations, "BATCH_ROWS", 16)
    path = write_jsonl(tmp_path / "a.jsonl", [*make_rows("a", 200), {"title": 1}, *make_rows("a", 50)])
    made = []
    for num_proc in ("1", "8"):
        run("out", "--dataset", path, "--skip_bad", "--num_proc", num_proc, "--overwrite")
        made.append(read_files(tmp_path / "out"))
    assert made[0] == made[1]
    assert set(NAMES) < set(made[0])


def test_bad_rows_that_the_reader_found_reach_the_processes(tmp_path, run, monkeypatch):
    monkeypatch.setattr(conversations, "BATCH_ROWS", 4)
    lines = [
        "question,answer",
        *(f"q {n},a {n}" for n in range(10)),
        "one field",
        *(f"r {n},a" for n in range(5)),
    ]
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    report = run("out", "--dataset", tmp_path / "a.csv", "--skip_bad", "--num_proc", "2")
    assert report["rows"]["rejected"] == {"bad_csv": 1}
    assert read_jsonl(tmp_path / "out" / "rejects.jsonl")[0]["line"] == 12


def test_batches_end_where_rows_are_many_or_large(monkeypatch):
    monkeypatch.setattr(conversations, "BATCH_ROWS", 5)
    monkeypatch.setattr(conversations, "BATCH_BYTES", 100)
    small, large = {"q": "x"}, {"messages": [{"content": "y" * 60}, {"content": "y" * 60}]}
    rows = [Located("f", n, row) for n, row in enumerate([small] * 7 + [large, b"z" * 200, small], 1)]
    sizes = [[line for _, line, _ in batch] for batch in gather_rows(rows)]
    assert sizes == [[1, 2, 3, 4, 5], [6, 7, 8], [9], [10]]


KILLED = """
import os, signal, sys
import prep_data
from firstwords import atomic, conversations, parts
conversations.BATCH_ROWS = 10
left = int(sys.argv.pop(1))
replace_folder = atomic.replace_folder
def count_down(staging, target):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace_folder(staging, target)
atomic.replace_folder = count_down
prep_data.main(sys.argv[1:])
print("parts made:", left)
"""


def test_killed_at_each_part_it_goes_on_to_the_same_bytes(tmp_path, run, monkeypatch, tokenizer_folder):
    monkeypatch.setattr(conversations, "BATCH_ROWS", 10)
    path = write_jsonl(tmp_path / "a.jsonl", make_rows("a", 30))
    run("out", "--dataset", path)
    whole = read_files(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "whole")
    flags = [
        "--dataset",
        path,
        "--out_dir",
        tmp_path / "out",
        "--tokenizer",
        tokenizer_folder,
        "--num_proc",
        "1",
    ]

    def run_and_kill(at):
        command = [sys.executable, "-c", KILLED, str(at), *map(str, flags)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    # Three parts of rows, the tokenizer, three of tokens, out_dir itself: each run makes one more.
    for _ in range(8):
        assert run_and_kill(2).returncode in (-signal.SIGKILL, 0)
        if (tmp_path / "out").exists():
            break
        assert (tmp_path / ".work-out").is_dir()
    assert read_files(tmp_path / "out") == whole
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "out", "whole"]


# --- the report as a page


def test_page_has_every_figure_and_no_markup_from_data(tmp_path, run):
    evil = "<script>alert(1)</script>\"'&\x1b[0m"
    rows = [row | {evil: 1} for row in make_rows("a", 20)]
    (tmp_path / "<b>x").mkdir()
    path = write_jsonl(tmp_path / "<b>x" / "a.jsonl", [*rows, {"title": 1}])
    report = run("out", "--dataset", path, "--skip_bad")
    page = (tmp_path / "out" / "data_report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<b>" not in page
    assert html.escape("<script>alert(1)</script>") in page
    assert not re.search(r"""(src|href|url|@import|http)\s*[=(:]""", page.replace("http-equiv=", ""))
    assert "default-src &#x27;none&#x27;" in page or "default-src 'none'" in page
    for counts in report["splits"].values():
        assert f'<td class="n">{report["rows"]["read"]:,}</td>' in page
        for end, count in counts["lengths"].items():
            assert f"<title>{end}: {count:,}</title>" in page
    assert "unknown_shape" in page
    assert page.count("<svg") == 6


def test_pictures_are_to_scale():
    bars = draw_bars([("16", 10), ("32", 40)], x_label="tokens")
    low, high = (float(tall) for tall in re.findall(r'height="([\d.]+)"', bars))
    assert high > 100
    assert high / low == pytest.approx(4, rel=0.01)
    shares = draw_shares({"a": 10, "b": 30})
    small, large = (float(wide) for wide in re.findall(r'<rect[^>]* width="([\d.]+)"', shares))
    assert large > 100
    assert large / small == pytest.approx(3, rel=0.01)
    assert "30 (75.0%)" in shares
    assert draw_shares({}).startswith("<svg")


def test_cells_are_escaped():
    assert format_html_table(("<i>",), [("&", 1234)]) == (
        '<table><tr><th>&lt;i&gt;</th></tr><tr><td>&amp;</td><td class="n">1,234</td></tr></table>'
    )
    assert "<title>&lt;x&gt;</title>" in format_sections("<x>", [])


def test_token_page_is_made_of_the_arrays(tmp_path, run):
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"question": f"<b>{n}", "answer": "so\nit is"} for n in range(9)]
    )
    run("out", "--dataset", path, "--seq_len", "64", "--show_html", tmp_path / "tokens.html")
    page = (tmp_path / "tokens.html").read_text(encoding="utf-8")
    tokenized = read_jsonl(tmp_path / "out" / "train_tokenized.jsonl")
    ids = [int(i) for i in re.findall(r'title="\d+: id (\d+)"', page)]
    assert ids == [i for row in tokenized for i in row["input_ids"]]
    learned = sum(sum(row["assistant_masks"]) for row in tokenized)
    assert len(re.findall(r'class="learned', page)) == learned
    assert page.count('end"') == 2 * len(tokenized)
    assert "<b>" not in page
    assert "↵" in page


def test_show_names_the_packed_rows(tmp_path, run, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", make_rows("a", 30))
    run("out", "--dataset", path, "--seq_len", "64", "--show", "2")
    shown = capsys.readouterr().out
    tokenized = read_jsonl(tmp_path / "out" / "train_tokenized.jsonl")
    for line in re.findall(r"^row \d+: .*$", shown, re.M):
        used = int(re.search(r": (\d+) tokens", line)[1])
        parts = [(int(a), int(b)) for a, b in re.findall(r"(\d+) \((\d+)\)", line.split("conversations")[1])]
        assert used == sum(size for _, size in parts) <= 64
        assert all(len(tokenized[number - 1]["input_ids"]) == size for number, size in parts)
    assert shown.count("\nrow ") == 2
    assert "rows of 64 tokens" in shown


def test_refused_work_waits_for_skip_bad(tmp_path, run, monkeypatch, capsys):
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", make_rows(name, 30)) for name in "ab"]
    with open(paths[1], "a") as rows:
        rows.write('{"question": 1}\n')
    flags = ["--dataset", f"{paths[0]}:0.5", "--dataset", paths[1]]
    with pytest.raises(BadData, match="--skip_bad"):
        run("out", *flags)
    capsys.readouterr()
    monkeypatch.setattr(prep_data, "survey_batch", lambda *_: pytest.fail("read again"))
    report = run("out", *flags, "--skip_bad", "--near_duplicates")
    assert "going on with unfinished work" in capsys.readouterr().err
    assert report["rows"]["rejected"] == {"unknown_shape": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "out"]


# --- near duplicates


def test_near_duplicates_of_val_are_counted(tmp_path, run, capsys):
    words = " ".join(f"word{n}" for n in range(40))
    near = [{"question": f"{words} number {n}", "answer": words} for n in range(20)]
    far = [{"question": " ".join(f"{n}x{k}" for k in range(40)), "answer": "yes"} for n in range(20)]
    for name, rows, expected in (("near", near, 19), ("far", far, 0)):
        path = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        report = run(name, "--dataset", path, "--near_duplicates")
        assert report["nearly_on_both_sides"] == expected
        assert report["on_both_sides"] == 0
        assert f"nearly on both sides  {expected}" in capsys.readouterr().out


def test_near_duplicates_need_a_library(tmp_path, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(BadFlag, match=r"pip install 'firstwords\[near\]'"):
        run("out", "--dataset", write_jsonl(tmp_path / "a.jsonl", make_rows("a", 9)), "--near_duplicates")


# --- licences


@pytest.mark.parametrize(
    ("front", "stated"),
    [
        ("---\nlicense: cc-by-nc-4.0\n---\n# Card", "cc-by-nc-4.0"),
        ("---\nlicense:\n- mit\n- apache-2.0\n---\n", "mit, apache-2.0"),
        ("---\npretty_name: x\n---\n", None),
        ("---\n[: broken\n---\n", None),
        ("license: mit\n", None),
        (None, None),
    ],
)
def test_licence_of_a_card_is_in_the_report(tmp_path, run, front, stated):
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", make_rows("a", 5))
    write_jsonl(folder / "test.jsonl", make_rows("t", 5))
    if front is not None:
        (folder / "README.md").write_text(front)
    report = run("out", "--dataset", folder)
    assert report["datasets"][0]["license"] == stated
    assert report["rows"]["read"] == 5  # the test split is none of ours


def test_nothing_left_for_a_split_is_bad_data(tmp_path, run):
    path = write_jsonl(tmp_path / "a.jsonl", make_rows("a", 20))
    with pytest.raises(BadData, match="nothing is left for"):
        run("out", "--dataset", path, "--seq_len", "4", "--overlong", "drop")
    assert os.listdir(tmp_path) == ["a.jsonl"]
