"""Names -> files, files -> rows and texts, rows -> conversations: every kind, every refusal."""

import json
from collections import Counter

import pytest
from rows import write_jsonl

from firstwords.errors import BadData, BadFlag, MissingInput
from firstwords.schema import Message, RowError
from firstwords.sources import (
    HUB_NAMES,
    Place,
    Sample,
    blocks,
    find_place,
    find_shape,
    read_rows,
    read_texts,
    readers,
    streams,
    to_conversation,
)
from firstwords.tokenizer import train_bpe

USER, REPLY = Message("user", "Hi"), Message("assistant", "Hello")
HUMAN, GPT = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def rows_of(path, **wishes):
    return [located.row for located in read_rows(str(path), **wishes)]


def texts_of(path, **wishes):
    return ["".join(document.pieces) for document in read_texts(str(path), **wishes)]


# --- names


def test_hub_names_lead_to_current_ids():
    assert find_place("openwebtext") == Place("Skylion007/openwebtext")
    assert find_place("c4", config="en", split="validation") == Place(
        "allenai/c4", split="validation", config="en"
    )
    assert find_place("someone/some-set").on_hub
    assert find_place("hub:imdb") == Place("imdb")
    assert all(name.count("/") == 1 for name in HUB_NAMES.values())


@pytest.mark.parametrize(
    "name",
    [
        "./chat",
        "/no/chat",
        "~/no/chat",
        "chat.jsonl",
        "chat.jsonl.gz",
        "a/b/c",
        "sub/chat",
        "chat",
        "no/chat.json",
    ],
)
def test_what_looks_like_a_path_is_never_a_download(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    monkeypatch.setattr(streams, "_open_hub", lambda place: pytest.fail("went to the Hub"))
    with pytest.raises(MissingInput):
        list(read_rows(name))


def test_mistyped_path_names_what_is_near(tmp_path):
    write_jsonl(tmp_path / "alpaca_data.jsonl", [{"a": 1}])
    with pytest.raises(MissingInput, match="did you mean '.*alpaca_data.jsonl'"):
        read_rows(str(tmp_path / "alpaca_dta.jsonl"))
    with pytest.raises(MissingInput, match=f"did you mean '{tmp_path}'"):
        read_rows(str(tmp_path) + "x/alpaca_data.jsonl")
    with pytest.raises(MissingInput, match="did you mean 'openwebtext'"):
        read_texts("openwebtex")


def test_a_kind_that_cannot_be_read(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(BadFlag, match=r"'.txt', which cannot be read here; known: .*\.jsonl"):
        read_rows(str(tmp_path / "notes.txt"))
    with pytest.raises(MissingInput, match=r"no .*\.jsonl.* file in it"):
        read_rows(str(tmp_path))


def test_split_and_config_must_have_a_meaning(tmp_path):
    path = str(write_jsonl(tmp_path / "a.jsonl", [{"a": 1}]))
    with pytest.raises(BadFlag, match="--split: 'test', but .* is one file"):
        read_rows(path, split="test")
    with pytest.raises(BadFlag, match="--dataset_config: 'en'"):
        read_rows(path, config="en")


def test_folder_is_read_in_sorted_order_and_hidden_files_are_not(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    write_jsonl(tmp_path / "b.jsonl", [{"n": 2}])
    write_jsonl(tmp_path / "a.jsonl", [{"n": 1}])
    write_jsonl(tmp_path / "sub" / "c.jsonl", [{"n": 3}])
    write_jsonl(tmp_path / ".git" / "x.jsonl", [{"n": 9}])
    (tmp_path / "LICENSE").write_text("free")
    assert rows_of(tmp_path) == [{"n": 1}, {"n": 2}, {"n": 3}]


def test_folder_of_split_files_gives_one_split(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test", "val_1"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"n": name}])
    assert [row["n"][:5] for row in rows_of(tmp_path)] == ["train", "train"]
    assert rows_of(tmp_path, split="test") == [{"n": "test"}]
    assert rows_of(tmp_path, split="validation") == rows_of(tmp_path, split="val") == [{"n": "val_1"}]
    assert len(rows_of(tmp_path, split="all")) == 4
    with pytest.raises(BadFlag, match="no files of 'extra'; it has test, train, validation"):
        rows_of(tmp_path, split="extra")
    write_jsonl(tmp_path / "extra.jsonl", [{"n": "extra"}])
    with pytest.raises(BadFlag, match="extra.jsonl is not; pass --split train or --split all"):
        rows_of(tmp_path)


# --- kinds of files

ROWS = [{"question": f"What is {n}, café?", "answer": f"{n}\nit is"} for n in range(5)]


def write_parquet(path, rows):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.json").write_text(json.dumps(ROWS, indent=2))
    write_jsonl(tmp_path / "lines.json", ROWS)
    (tmp_path / "c.csv").write_text(
        "question,answer\n" + "".join(f'"{r["question"]}","{r["answer"]}"\n' for r in ROWS)
    )
    write_parquet(tmp_path / "d.parquet", ROWS)
    for name in ("a.jsonl", "b.json", "lines.json", "c.csv", "d.parquet"):
        assert rows_of(tmp_path / name) == ROWS, name


def test_every_row_has_its_line(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.json").write_text("\n[\n" + ",\n\n".join(map(json.dumps, ROWS)) + "]")
    (tmp_path / "c.csv").write_text('question,answer\nx,"1\n2"\n\ny,3\n')
    lines = {
        name: [located.line for located in read_rows(str(tmp_path / name))]
        for name in ("a.jsonl", "b.json", "c.csv")
    }
    assert lines == {"a.jsonl": [1, 2, 3, 4, 5], "b.json": [3, 5, 7, 9, 11], "c.csv": [2, 5]}
    assert next(read_rows(str(tmp_path / "b.json"))).where == f"{tmp_path / 'b.json'}:3"


@pytest.mark.parametrize("window", [1, 7, 64])
def test_json_list_across_the_edges_of_the_window(tmp_path, monkeypatch, window):
    monkeypatch.setattr(readers, "PIECE_BYTES", window)
    rows = [*ROWS, {"n": 123456, "deep": [[{"x": "]},{"}]]}]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    assert rows_of(tmp_path / "a.json") == rows
    (tmp_path / "b.json").write_text("[123456, 7]")
    assert [str(row) for row in rows_of(tmp_path / "b.json")] == ["must be one JSON object, but is a int"] * 2


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ('[{"a": 1},\n {"a": }]', 2, "Expecting value"),
        ('[{"a": 1}\n\n {"a": 2}]', 3, "']' is missing"),
        ('[{"a": 1},\n', 2, "Expecting value"),
        ('[{"a": 1}', 1, "']' is missing before the end"),
        ('[{"a": 1}]\n[]', 2, "behind the list's end"),
    ],
)
def test_broken_json_list_says_where(tmp_path, text, line, what):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(BadData, match=rf"a\.json:{line}: broken JSON") as caught:
        rows_of(tmp_path / "a.json")
    assert what in str(caught.value)
    (tmp_path / "b.json").write_text('"hello"')
    with pytest.raises(BadData, match="begins with '\"hello\"'"):
        rows_of(tmp_path / "b.json")


def test_bad_rows_stand_in_their_place(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n{"a": \n\n{"a": "\xff"}\n{"a": 2}')
    rows = list(read_rows(str(tmp_path / "a.jsonl")))
    assert [(located.line, getattr(located.row, "reason", "")) for located in rows] == [
        (1, ""),
        (2, "bad_json"),
        (4, "bad_utf8"),
        (5, ""),
    ]
    (tmp_path / "b.json").write_bytes(b'[{"a": "\xff"}, {"a": 1, "a": 2}, {"a": NaN}]')
    assert [row.reason for row in rows_of(tmp_path / "b.json")] == ["bad_utf8", "double_key", "bad_json"]
    (tmp_path / "c.csv").write_bytes(b'a,b\n1\n1,2,3\n\xff,2\n1,2\n"x"y,2\n')
    reasons = [getattr(row, "reason", "") for row in rows_of(tmp_path / "c.csv")]
    assert reasons == ["bad_csv", "bad_csv", "bad_utf8", "", "bad_csv"]
    (tmp_path / "d.csv").write_text("a,a\n1,2\n")
    with pytest.raises(BadData, match="stands twice"):
        rows_of(tmp_path / "d.csv")


def test_byte_order_mark_crlf_and_long_fields_are_fine(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbfa,b\r\n1,"' + b"x" * 200_000 + b'"\r\n')
    assert rows_of(tmp_path / "a.csv") == [{"a": "1", "b": "x" * 200_000}]
    (tmp_path / "b.json").write_bytes(b'\xef\xbb\xbf[\r\n{"a": "\xc3\xa9"}\r\n]')
    assert rows_of(tmp_path / "b.json") == [{"a": "é"}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_empty_or_torn_file_is_bad_data(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(BadData, match=name):
        rows_of(tmp_path / name)


# --- the Hub's layout


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "set"
    card = "---\nconfigs:\n"
    for config in ("plain", "other"):
        card += f"- config_name: {config}\n  data_files:\n"
        for split, count in (("train", 20), ("test", 3)):
            card += f"  - split: {split}\n    path: {config}/{split}-*\n"
            for shard in range(2):
                rows = [{"text": f"{config} {split} {shard} {n}", "id": n} for n in range(count)]
                write_parquet(folder / config / f"{split}-0000{shard}-of-00002.parquet", rows)
    (folder / "README.md").write_text(card + "---\n# A set\n")
    return folder


def test_hub_layout_has_configs_and_splits(hub_folder):
    rows = rows_of(hub_folder, config="plain")
    assert [row["text"] for row in rows[18:22]] == [
        "plain train 0 18",
        "plain train 0 19",
        "plain train 1 0",
        "plain train 1 1",
    ]
    assert len(rows_of(hub_folder, config="other", split="test")) == 6
    assert texts_of(hub_folder, config="other", split="test")[0] == "other test 0 0"
    with pytest.raises(BadFlag, match="'plain', 'other'"):
        rows_of(hub_folder)
    with pytest.raises(BadFlag, match="nothing"):
        rows_of(hub_folder, config="plain", split="nothing")


def test_hub_layout_without_a_card_is_a_folder_of_split_files(hub_folder):
    assert len(rows_of(hub_folder / "plain")) == 40
    assert len(rows_of(hub_folder / "plain", split="test")) == 6


def test_hub_sample_is_shuffled_and_seeded(hub_folder, monkeypatch):
    # datasets 5.2 waits 5 s for its threads at the end of a shuffled stream.
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.iterable_dataset.time.sleep", lambda seconds: None)

    def open_hub(place):
        files = sorted(map(str, (hub_folder / place.config).glob(f"{place.split}-*")))
        return datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)

    monkeypatch.setattr(streams, "_open_hub", open_hub)

    def draw(seed):
        rows = rows_of("hub:someone/set", config="plain", sample=Sample(4, seed=seed))
        return [row["text"] for row in rows]

    assert len(set(draw(1))) == 4
    assert draw(1) == draw(1) != draw(2)
    assert draw(1) != [f"plain train 0 {n}" for n in range(4)]


def test_unreachable_hub_is_missing_input(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def refuse(*_, **__):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(MissingInput, match=r"someone/set: cannot be read from the Hub \(no network\)"):
        list(read_rows("someone/set"))


# --- samples


def test_sample_is_exact_seeded_and_spread(tmp_path):
    path = str(write_jsonl(tmp_path / "a.jsonl", [{"n": n} for n in range(1000)]))

    def draw(**wish):
        return [row["n"] for row in rows_of(path, sample=Sample(**wish))]

    assert [len(draw(max_samples=n)) for n in (1, 3, 9, 10, 999, 1000, 5000)] == [
        1, 3, 9, 10, 999, 1000, 1000
    ]  # fmt: skip
    drawn = draw(max_samples=100)
    assert drawn == sorted(set(drawn)) == draw(max_samples=100)
    assert drawn != draw(max_samples=100, seed=1)
    assert max(drawn) > 900
    assert min(drawn) < 100
    share = draw(pct=10)
    assert 60 < len(share) < 140
    assert share == draw(pct=10) != draw(pct=10, seed=1)
    assert set(draw(pct=10, max_samples=20)) < set(share)
    assert draw(pct=100) == list(range(1000))


def test_sample_draws_every_row_alike():
    counts = Counter()
    for seed in range(600):
        counts.update(Sample(3, seed=seed).draw(lambda: iter(range(10))))
    assert min(counts[n] for n in range(10)) > 130  # 180 expected, standard deviation 11
    assert max(counts[n] for n in range(10)) < 230


@pytest.mark.parametrize("wish", [{"max_samples": 0}, {"max_samples": -1}, {"pct": 0}, {"pct": 101}])
def test_sample_sizes_without_sense(wish):
    with pytest.raises(BadFlag, match="--max_samples|--sample_pct"):
        Sample(**wish)


# --- texts


def test_text_file_is_a_document_a_paragraph_or_a_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffOne\r\ntwo\r\n\r\n \r\nThree\n\n".encode())
    assert texts_of(path) == ["One\r\ntwo\r\n\r\n \r\nThree\n\n"]
    assert texts_of(path, split_docs="blank_line") == ["One\ntwo", "Three"]
    assert texts_of(path, split_docs="line") == ["One", "two", "Three"]
    lines = [document.line for document in read_texts(str(path), split_docs="blank_line")]
    assert lines == [1, 5]


@pytest.mark.parametrize("window", [2, 5, 50])
def test_pieces_join_to_the_whole_and_encode_like_it(tmp_path, monkeypatch, window):
    monkeypatch.setattr(blocks, "PIECE_BYTES", window)
    text = (
        "It's  a test.\n\n  Don't \t cut,\r\nhere: 12 345  \n" * 9
        + "日本語のテキスト。\n終わり"
        + " " * 40
        + "!"
    )
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    pieces = list(next(read_texts(str(tmp_path / "a.txt"))).pieces)
    assert "".join(pieces) == text
    assert window > 5 or len(pieces) > 10
    tokenizer = train_bpe([text], 400)
    assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)


def test_texts_that_are_none_have_an_address(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "PIECE_BYTES", 4)
    bad = {"bad_utf8": b"abc\xc3\xa9\xff", "nul": b"abcdef\0"}
    for reason, content in bad.items():
        (tmp_path / "a.txt").write_bytes(content)
        document = next(read_texts(str(tmp_path / "a.txt")))
        assert document.pieces.reason == reason
        assert f"at byte {len(content) - 1}" in str(document.pieces)
    (tmp_path / "b.txt").write_bytes(b"good\nb\xffd\n\ngood\n")
    for split_docs, line in (("line", 2), ("blank_line", 2)):
        documents = list(read_texts(str(tmp_path / "b.txt"), split_docs=split_docs))
        bad = [d for d in documents if isinstance(d.pieces, RowError)]
        assert [(d.line, d.pieces.reason) for d in bad] == [(line, "bad_utf8")]
        assert list(documents[-1].pieces) == ["good"]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": "a", "content": "b"}, "a"),
        ({"url": "u", "content": "b"}, "b"),
        ({"id": 3, "whatever": "c"}, "c"),
    ],
)
def test_text_column_is_guessed(tmp_path, row, text):
    assert texts_of(write_jsonl(tmp_path / "a.jsonl", [row])) == [text]


def test_text_column_that_cannot_be_guessed_lists_the_columns(tmp_path):
    path = str(write_jsonl(tmp_path / "a.jsonl", [{"title": "a", "summary": "b", "n": 1}]))
    with pytest.raises(BadFlag, match="a.jsonl:1, whose columns are 'title', 'summary', 'n'"):
        texts_of(path)
    assert texts_of(path, text_column="summary") == ["b"]


def test_rows_without_a_text_are_refused_one_by_one(tmp_path):
    rows = [{"text": "ok"}, {"other": "x"}, {"text": None}, {"text": 5}, {"text": "a\0"}, {"text": "\ud800"}]
    path = str(write_jsonl(tmp_path / "a.jsonl", rows))
    found = [getattr(d.pieces, "reason", "") for d in read_texts(path)]
    assert found == ["", "missing_key", "bad_content", "bad_content", "nul", "surrogate"]


def test_folder_of_texts_mixes_kinds(tmp_path):
    (tmp_path / "b.txt").write_text("two")
    write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}])
    (tmp_path / "c.csv").write_text("story,n\nthree,3\n")
    assert texts_of(tmp_path) == ["one", "two", "three"]
    assert len(texts_of(tmp_path, sample=Sample(2))) == 2


# --- conversations


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("messages", {"messages": TURNS}, [USER, REPLY]),
        ("messages", {"system": "S", "messages": TURNS}, [Message("system", "S"), USER, REPLY]),
        (
            "ShareGPT",
            {"id": 1, "conversations": [HUMAN, GPT] * 2},
            [USER, REPLY] * 2,
        ),
        (
            "ShareGPT",
            {"conversations": [{"from": "system", "value": "S"}, *TURNS]},
            [Message("system", "S"), USER, REPLY],
        ),
        ("Alpaca", {"instruction": "Hi", "input": "", "output": "Hello"}, [USER, REPLY]),
        ("Alpaca", {"instruction": "Hi", "output": "Hello"}, [USER, REPLY]),
        ("Alpaca", {"instruction": "Hi", "input": None, "output": "Hello"}, [USER, REPLY]),
        (
            "Alpaca",
            {"instruction": "Add", "input": "1 2", "output": "Hello", "system": "S"},
            [Message("system", "S"), Message("user", "Add\n\n1 2"), REPLY],
        ),
        (
            "Dolly",
            {"instruction": "Who?", "context": "He.", "response": "Hello", "category": "qa"},
            [Message("user", "Who?\n\nHe."), REPLY],
        ),
        ("Dolly", {"instruction": "Hi", "context": " ", "response": "Hello"}, [USER, REPLY]),
        ("prompt/completion", {"prompt": "Hi", "completion": "Hello"}, [USER, REPLY]),
        (
            "prompt/completion",
            {"prompt": [*TURNS, TURNS[0]], "completion": [TURNS[1]]},
            [USER, REPLY, USER, REPLY],
        ),
        ("question/answer", {"question": "Hi", "answer": "Hello"}, [USER, REPLY]),
        ("question/answer", {"system": "", "question": "Hi", "answer": "Hello"}, [USER, REPLY]),
    ],
)  # fmt: skip
def test_every_shape_becomes_a_conversation(name, row, expected):
    assert find_shape(row).name == name
    assert to_conversation(row) == expected


def test_default_system_prompt_only_where_there_is_none():
    own, default = Message("system", "own"), Message("system", "default")
    row = {"question": "Hi", "answer": "Hello"}
    assert to_conversation(row, system="default") == [default, USER, REPLY]
    assert to_conversation(row | {"system": ""}, system="default") == [default, USER, REPLY]
    assert to_conversation(row | {"system": "own"}, system="default") == [own, USER, REPLY]
    messages = [{"role": "system", "content": "own"}, *TURNS]
    assert to_conversation({"messages": messages}, system="default") == [own, USER, REPLY]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"title": "x", "body": "y"}, "unknown_shape"),
        ({}, "unknown_shape"),
        ({"messages": None}, "no_messages"),
        ({"conversations": "hello"}, "no_messages"),
        ({"instruction": "", "input": "x", "output": "y"}, "empty_turn"),
        ({"instruction": "x", "output": " \n"}, "empty_turn"),
        ({"instruction": "x", "output": None}, "null_content"),
        ({"instruction": 5, "input": "x", "output": "y"}, "bad_content"),
        ({"instruction": "x", "input": 5, "output": "y"}, "bad_content"),
        ({"instruction": "x", "input": False, "output": "y"}, "bad_content"),
        ({"question": "x", "answer": ["y"]}, "bad_content"),
        ({"prompt": "x", "completion": TURNS}, "bad_content"),
        ({"prompt": TURNS, "completion": "x"}, "bad_content"),
        ({"prompt": [TURNS[0]], "completion": []}, "no_assistant"),
        ({"conversations": [GPT, HUMAN]}, "bad_order"),
        ({"conversations": [GPT, HUMAN, GPT]}, "bad_order"),
        ({"conversations": [HUMAN, HUMAN, GPT]}, "same_role_twice"),
        ({"conversations": [HUMAN, GPT, HUMAN]}, "bad_order"),
        ({"conversations": [HUMAN]}, "no_assistant"),
        ({"conversations": [{"from": "tool", "value": "a"}]}, "unknown_role"),
        ({"conversations": [{"from": ["x"], "value": "a"}]}, "unknown_role"),
        ({"conversations": [{"from": "human"}]}, "missing_key"),
        ({"conversations": ["Hi", "Hello"]}, "bad_turn"),
        ({"conversations": []}, "no_assistant"),
        ({"messages": TURNS, "system": 3}, "bad_content"),
        ({"messages": TURNS, "system": " "}, "empty_turn"),
        ({"messages": [{"role": "system", "content": "S"}, *TURNS], "system": "S"}, "bad_order"),
    ],
)  # fmt: skip
def test_rows_that_fit_no_shape_are_refused_with_a_reason(row, reason):
    with pytest.raises(RowError) as caught:
        to_conversation(row)
    assert caught.value.reason == reason


def test_unknown_shape_lists_the_columns_found():
    with pytest.raises(RowError, match=r"\['body', 'title'\] are no known shape; known: messages, .*"):
        to_conversation({"title": "x", "body": "y"})
