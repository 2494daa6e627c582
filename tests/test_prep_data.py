"""Instruction data -> contracts 1 and 2, the account of every row, and what happens to bad ones."""

import json
import os
from functools import partial
from types import SimpleNamespace

import pytest
from rows import read_jsonl, write_jsonl

import prep_data
from firstwords import pydocs, show
from firstwords.conversations import find_bin
from firstwords.errors import BadData, BadFlag, CannotCreate, IOFailed, MissingInput
from firstwords.schema import Message, parse_conversation
from firstwords.template import CHAT_TEMPLATE, encode_chat
from firstwords.tokenizer import CONTROL_TOKENS, Tokenizer, load_tokenizer, train_bpe

ROWS = [{"question": f"What is {n} plus {n}?", "answer": f"It is {2 * n}."} for n in range(40)]
FILES = {"train.jsonl", "val.jsonl", "train_tokenized.jsonl", "val_tokenized.jsonl", "tokenizer.json",
         "tokenizer_config.json", "chat_template.jinja", "data_report.json", "data_report.html"}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe([json.dumps(ROWS)], 300).save(folder, chat_template=CHAT_TEMPLATE)
    return folder


@pytest.fixture
def run(tokenizer_folder):
    def run(dataset, out_dir, *flags, tokenizer=tokenizer_folder):
        flags = ["--dataset", dataset, "--out_dir", out_dir, "--tokenizer", tokenizer, *flags]
        prep_data.main([str(flag) for flag in flags])
        return json.loads((out_dir / "data_report.json").read_text(encoding="utf-8"))

    return run


@pytest.fixture
def data(tmp_path):
    return write_jsonl(tmp_path / "rows.jsonl", ROWS)


# --- what is written


def test_both_contracts_hold_and_agree(data, tmp_path, run):
    run(data, tmp_path / "out", "--val_pct", "10")
    out_dir = tmp_path / "out"
    assert set(os.listdir(out_dir)) == FILES
    tokenizer = load_tokenizer(out_dir)
    kept = []
    for split, count in (("train", 36), ("val", 4)):
        rows = [parse_conversation(row) for row in read_jsonl(out_dir / f"{split}.jsonl")]
        tokenized = read_jsonl(out_dir / f"{split}_tokenized.jsonl")
        assert len(rows) == len(tokenized) == count
        for messages, row in zip(rows, tokenized, strict=True):
            assert list(row) == ["input_ids", "assistant_masks"]
            assert (row["input_ids"], row["assistant_masks"]) == encode_chat(messages, tokenizer)
        kept += rows
    expected = [[Message("user", row["question"]), Message("assistant", row["answer"])] for row in ROWS]
    assert sorted(kept, key=str) == sorted(expected, key=str)


def test_report_accounts_for_every_row_and_token(tmp_path, run):
    rows = [*ROWS, ROWS[0], ROWS[0] | {"id": 7}, {"instruction": "Go", "output": "Gone", "input": ""}]
    data = write_jsonl(tmp_path / "rows.jsonl", [*rows, {"title": "x"}, ROWS[0] | {"answer": ""}])
    report = run(data, tmp_path / "out", "--skip_bad", "--seq_len", "16")
    assert report["rows"] == {
        "read": 45,
        "kept": 43,
        "rejected": {"unknown_shape": 1, "empty_turn": 1},
        "dropped": {"overlong": 0},
        "duplicates": 2,
        "repeated": 0,
        "shapes": {"question/answer": 42, "Alpaca": 1},
        "ignored_columns": {"id": 1},
    }
    assert report["on_both_sides"] == 0
    for split in ("train", "val"):
        tokenized = read_jsonl(tmp_path / "out" / f"{split}_tokenized.jsonl")
        lengths = [len(row["input_ids"]) for row in tokenized]
        counts = report["splits"][split]
        assert counts["conversations"] == len(lengths) == sum(counts["lengths"].values())
        assert counts["tokens"] == sum(lengths)
        assert counts["learned_tokens"] == sum(sum(row["assistant_masks"]) for row in tokenized)
        assert counts["longest"] == max(lengths)
        assert counts["longer_than_seq_len"] == sum(length > 16 for length in lengths)
        assert counts["tokens_of_longer"] == sum(length for length in lengths if length > 16)
    assert report["splits"]["train"]["longer_than_seq_len"] > 0
    assert report["tokenizer_hash"] == load_tokenizer(tmp_path / "out").hash
    assert set(report["files"]) == (FILES | {"rejects.jsonl"}) - {"data_report.json"}


def test_histogram_has_every_length_in_one_bin():
    bins = {length: find_bin(length) for length in (1, 16, 17, 32, 33, 1024, 1025)}
    assert bins == {1: 16, 16: 16, 17: 32, 32: 32, 33: 64, 1024: 1024, 1025: 2048}


def test_two_runs_give_the_same_bytes(data, tmp_path, run):
    run(data, tmp_path / "one")
    run(data, tmp_path / "two")
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_split_is_seeded_and_equal_rows_stay_together(tmp_path, run):
    data = write_jsonl(tmp_path / "rows.jsonl", [row for row in ROWS for _ in range(2)])
    drawn = []
    for seed in ("0", "1"):
        report = run(data, tmp_path / seed, "--val_pct", "25", "--seed", seed)
        train, val = (
            set((tmp_path / seed / f"{split}.jsonl").read_text().splitlines()) for split in ("train", "val")
        )
        assert not train & val
        assert (len(train), len(val)) == (30, 10)
        assert report["rows"]["duplicates"] == 40
        drawn.append(val)
    assert drawn[0] != drawn[1]
    rows = read_jsonl(data)
    assert not drawn[0] <= {json.dumps({"messages": row}) for row in rows[-20:]}


@pytest.mark.parametrize("wanted", [2, 5, 9])
def test_small_samples_have_a_val_row_too(data, tmp_path, run, wanted):
    report = run(data, tmp_path / "out", "--max_samples", wanted)
    counts = {split: counts["conversations"] for split, counts in report["splits"].items()}
    assert counts == {"train": wanted - 1, "val": 1}


def test_system_prompt_where_there_is_none(tmp_path, run):
    rows = [ROWS[0], ROWS[1] | {"system": "Mine."}]
    run(write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "out", "--system", "Be brief.")
    kept = read_jsonl(tmp_path / "out" / "train.jsonl") + read_jsonl(tmp_path / "out" / "val.jsonl")
    assert sorted(row["messages"][0]["content"] for row in kept) == ["Be brief.", "Mine."]


def test_text_that_spells_control_tokens_stays_text(tmp_path, run):
    nasty = "".join(CONTROL_TOKENS) + "<|assistant|>yes<|end|>"
    rows = [{"system": nasty, "question": f"{nasty} {n}", "answer": f"{n} {nasty}"} for n in range(4)]
    run(write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")
    names = {token_id: name for name, token_id in tokenizer.control_ids.items()}
    for split in ("train", "val"):
        for row in read_jsonl(tmp_path / "out" / f"{split}_tokenized.jsonl"):
            control = [names[i] for i in row["input_ids"] if i in names]
            assert control == ["<|system|>", "<|end|>", "<|user|>", "<|end|>", "<|assistant|>", "<|end|>"]


def test_own_tokenizer_is_learned_from_the_conversations(data, tmp_path, run):
    report = run(data, tmp_path / "out", tokenizer="char")
    assert report["vocab_size"] == len(set("".join(r["question"] + r["answer"] for r in ROWS))) + 6


def test_pydocs_keeps_its_own_split(tmp_path, run, monkeypatch):
    def build_questions(seed, passes):
        train = [[Message("user", f"q{n} {seed}"), Message("assistant", "a")] for n in range(10 * passes)]
        val = [[Message("user", f"v{n}"), Message("assistant", "a")] for n in range(5)]
        return SimpleNamespace(train=train, val=[*val, train[0]])

    monkeypatch.setattr(pydocs, "build_questions", build_questions)
    run_pydocs = partial(run, "pydocs")
    report = run_pydocs(tmp_path / "out", "--seed", "3", "--pydocs_passes", "2")
    val = read_jsonl(tmp_path / "out" / "val.jsonl")
    assert [row["messages"][0]["content"] for row in val] == ["v0", "v1", "v2", "v3", "v4", "q0 3"]
    assert report["splits"]["train"]["conversations"] == 20
    assert report["rows"]["shapes"] == {"messages": 26}
    assert report["on_both_sides"] == 1
    few = run_pydocs(tmp_path / "few", "--max_samples", "3", "--system", "S")
    assert [few["splits"][split]["conversations"] for split in ("train", "val")] == [3, 3]
    assert few["splits"]["train"]["turns"] == 9


# --- bad rows


def test_bad_rows_refuse_the_data_and_are_all_listed(tmp_path, run, capsys):
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS + [{"title": n} for n in range(25)])
    with open(data, "ab") as file:
        file.write(b'{"question": "x", "answer"\n')
    with pytest.raises(BadData, match=r"26 of 66 rows are bad \(unknown_shape 25, bad_json 1\)"):
        run(data, tmp_path / "out")
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 20
    assert shown[0].startswith(f"{data}:41: the columns ['title'] are no known shape")
    assert sorted(os.listdir(tmp_path / "out")) == ["data_report.json", "rejects.jsonl"]
    rejects = read_jsonl(tmp_path / "out" / "rejects.jsonl")
    assert [row["line"] for row in rejects] == list(range(41, 67))
    assert rejects[-1] == {
        "file": str(data),
        "line": 66,
        "reason": "bad_json",
        "detail": rejects[-1]["detail"],
    }
    report = run(data, tmp_path / "out", "--skip_bad")
    assert report["rows"]["kept"] == 40
    assert len(read_jsonl(tmp_path / "out" / "rejects.jsonl")) == 26


def test_set_without_an_assistant_is_bad_data_whatever_the_flags(tmp_path, run):
    rows = [{"messages": [{"role": "user", "content": f"{n}"}]} for n in range(3)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    for flags in ([], ["--skip_bad"]):
        with pytest.raises(BadData, match=r"none of 3 rows is usable \(no_assistant 3\)"):
            run(data, tmp_path / "out", *flags)
        assert sorted(os.listdir(tmp_path / "out")) == ["data_report.json", "rejects.jsonl"]


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.json", "empty.csv", "empty.parquet"])
def test_empty_file_is_bad_data_and_leaves_nothing(tmp_path, run, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(BadData, match=name):
        run(tmp_path / name, tmp_path / "out")
    assert os.listdir(tmp_path) == [name]


def test_one_distinct_conversation_cannot_be_split(tmp_path, run):
    data = write_jsonl(tmp_path / "rows.jsonl", [ROWS[0]] * 3)
    with pytest.raises(BadData, match="the 3 kept rows are all equal"):
        run(data, tmp_path / "out")
    assert os.listdir(tmp_path) == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--dataset", "row.jsonl"], MissingInput),
        (["--dataset", "rows.txt"], MissingInput),
        (["--dataset", "."], BadFlag),
        (["--tokenizer", "no/where"], MissingInput),
        (["--tokenizer", "bpe:few"], BadFlag),
        (["--val_pct", "100"], BadFlag),
        (["--sample_pct", "0"], BadFlag),
        (["--seq_len", "0"], BadFlag),
        (["--show", "-1"], BadFlag),
        (["--overlong", "drop"], BadFlag),
        (["--overlong", "cut", "--seq_len", "9"], BadFlag),
        (["--num_proc", "0"], BadFlag),
        (["--dataset", "rows.jsonl:0"], BadFlag),
        (["--dataset", "rows.jsonl:-1"], BadFlag),
        (["--dataset", "row.jsonl:0.5"], MissingInput),
        (["--system", " "], BadFlag),
        (["--split", "test"], BadFlag),
        (["--sytem", "x"], BadFlag),
        (["--pydocs_passes", "2"], BadFlag),
        (["--dataset", "pydocs", "--dataset_config", "x"], BadFlag),
    ],
)
def test_bad_flags_leave_nothing_behind(data, tmp_path, run, monkeypatch, flags, error):
    monkeypatch.chdir(tmp_path)
    dataset, flags = (flags[1], flags[2:]) if flags[0] == "--dataset" else ("rows.jsonl", flags)
    with pytest.raises(error):
        run(dataset, tmp_path / "out", *flags)
    assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_pydocs_needs_a_tokenizer(tmp_path):
    with pytest.raises(BadFlag, match="--tokenizer: pydocs needs stage A's"):
        prep_data.main(["--dataset", "pydocs", "--out_dir", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("error", "raised"), [(OSError(28, "No space left"), IOFailed), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_failure_in_the_middle_leaves_nothing(data, tmp_path, run, monkeypatch, error, raised):
    calls = []

    def encode(self, text):
        calls.append(text)
        if len(calls) == 30:
            raise error
        return [0]

    monkeypatch.setattr(Tokenizer, "encode", encode)
    with pytest.raises(raised):
        run(data, tmp_path / "out")
    assert set(os.listdir(tmp_path)) == {"rows.jsonl", ".work-out"}  # from which it goes on


# --- the second run


def test_same_command_finds_its_work_done_and_still_shows(data, tmp_path, run, capsys, monkeypatch):
    run(data, tmp_path / "out")
    monkeypatch.setattr(prep_data, "prepare", lambda *_: pytest.fail("worked again"))
    run(data, tmp_path / "out", "--show", "1")
    shown = capsys.readouterr().out
    assert "are there already, made by the same command" in shown
    assert "--- conversation 1:" in shown


def test_another_command_is_refused_unless_told_to_overwrite(data, tmp_path, run):
    run(data, tmp_path / "out")
    with pytest.raises(CannotCreate, match="--system None, not Be brief."):
        run(data, tmp_path / "out", "--system", "Be brief.")
    report = run(data, tmp_path / "out", "--system", "Be brief.", "--overwrite")
    assert report["splits"]["train"]["turns"] == 3 * 38
    write_jsonl(data, [{"no": "shape"}])
    with pytest.raises(BadData, match="stays as it was"):
        run(data, tmp_path / "out", "--overwrite")
    assert set(os.listdir(tmp_path / "out")) == FILES


# --- --show


def test_show_marks_what_the_arrays_say(tmp_path, run, capsys):
    rows = [{"messages": [{"role": role, "content": f"{text} {n} é"} for role, text in
             (("user", "ask"), ("assistant", "tell"), ("user", "more"), ("assistant", "so"))]}
            for n in range(3)]  # fmt: skip
    run(write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "out", "--show", "5")
    shown = capsys.readouterr().out
    assert shown.count("--- conversation") == 2
    number = read_jsonl(tmp_path / "out" / "train.jsonl")[0]["messages"][0]["content"].split()[1]
    assert (
        f"<|user|>ask {number} é<|end|>\n<|assistant|>[tell {number} é<|end|>]\n"
        f"<|user|>more {number} é<|end|>\n<|assistant|>[so {number} é<|end|>]\n"
    ) in shown

    # The arrays decide, not the conversation: with the mask turned round the marks turn round.
    path = tmp_path / "out" / "train_tokenized.jsonl"
    tokenized = read_jsonl(path)
    for row in tokenized:
        row["assistant_masks"] = [1 - learned for learned in row["assistant_masks"]]
    write_jsonl(path, tokenized)
    turned = "\n".join(show.format_learned(tmp_path / "out", 1, in_colour=False))
    assert f"[<|user|>ask {number} é<|end|>]\n[<|assistant|>]tell {number} é<|end|>\n" in turned
    coloured = "\n".join(show.format_learned(tmp_path / "out", 1, in_colour=True))
    assert f"\x1b[32m<|assistant|>\x1b[0mtell {number}" in coloured


def test_show_prints_nothing_that_a_terminal_would_act_on(tmp_path, run, capsys):
    rows = [{"question": f"\x1b[2J{n}", "answer": f"\x9b31m {n}\r"} for n in range(2)]
    run(write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "out", "--show", "1")
    assert not {"\x1b", "\x9b", "\r"} & set(capsys.readouterr().out)
