"""Text -> token store: contract 3, its account, and what happens when something goes wrong."""

import base64
import json
import os
import sys
from collections import Counter
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import pytest
from rows import write_texts

import prep_text_corpus
from firstwords import corpus as corpus_module
from firstwords import pydocs, tokenstore
from firstwords.errors import BadData, BadFlag, CannotCreate, IOFailed, MissingInput
from firstwords.sources import readers, streams
from firstwords.tokenizer import Tokenizer, load_tokenizer

TEXTS = [f"Document {n}: the quick brown fox jumps over {n} lazy dogs. Café!\n" for n in range(60)]


def run(dataset, out_dir, *flags, tokenizer="bpe:300"):
    prep_text_corpus.main(
        ["--dataset", str(dataset), "--out_dir", str(out_dir), "--tokenizer", tokenizer, *flags]
    )
    return json.loads((out_dir / "corpus.json").read_text(encoding="utf-8"))


def read_split(out_dir, split):
    """Decode one side: the text of each document, by its closing <|endoftext|>."""
    tokenizer = load_tokenizer(out_dir)
    tokens = np.fromfile(out_dir / f"{split}.bin", dtype="<u2")
    ends = np.flatnonzero(tokens == tokenizer.endoftext_id)
    assert ends[-1] == len(tokens) - 1
    return [tokenizer.decode(part) for part in np.split(tokens, ends + 1)[:-1]]


def strip_ends(texts):
    return [text.removesuffix("<|endoftext|>") for text in texts]


@pytest.fixture
def corpus(tmp_path):
    return write_texts(tmp_path / "texts.jsonl", TEXTS)


# --- what is written


def test_store_holds_every_document_once_and_its_end(corpus, tmp_path):
    report = run(corpus, tmp_path / "out", "--val_pct", "10")
    train, val = (read_split(tmp_path / "out", split) for split in ("train", "val"))
    assert all(text.endswith("<|endoftext|>") for text in train + val)
    assert sorted(strip_ends(train + val)) == sorted(TEXTS)
    assert strip_ends(train) == [text for text in TEXTS if text in strip_ends(train)]
    assert len(val) == 6
    assert report["documents"] == {
        "read": 60, "kept": 60, "empty": 0, "rejected": {}, "duplicates": 0, "repeated": 0
    }  # fmt: skip


def test_characters_need_no_tiktoken(corpus, tmp_path, monkeypatch):
    def find_version(package):
        if package == "tiktoken":
            raise PackageNotFoundError(package)
        return version(package)

    monkeypatch.setitem(sys.modules, "tiktoken", None)
    monkeypatch.setattr(prep_text_corpus, "version", find_version)
    assert run(corpus, tmp_path / "out", tokenizer="char")["documents"]["kept"] == 60
    with pytest.raises(MissingInput, match="^tiktoken: is not installed"):
        run(corpus, tmp_path / "bpe")
    assert not (tmp_path / "bpe").exists()


def test_report_counts_what_is_there(corpus, tmp_path):
    report = run(corpus, tmp_path / "out", "--val_pct", "10")
    tokenizer = load_tokenizer(tmp_path / "out")
    assert report["tokenizer_hash"] == tokenizer.hash
    assert report["vocab_size"] == len(tokenizer) == 300
    assert sum(counts["bytes"] for counts in report["splits"].values()) == sum(
        len(text.encode()) for text in TEXTS
    )
    for split, documents in (("train", 54), ("val", 6)):
        store = tokenstore.open_store(tmp_path / "out", split)
        counts = report["splits"][split]
        assert counts["tokens"] == len(store.tokens)
        assert counts["documents"] == documents
        assert counts["sha256"] == report["files"][f"{split}.bin"]["sha256"]
    assert set(report["files"]) | {"corpus.json"} == set(os.listdir(tmp_path / "out"))
    assert report["sources"][0]["bytes"] == corpus.stat().st_size
    assert report["command"]["tokenizer"] == "bpe:300"


def test_two_runs_give_the_same_bytes(corpus, tmp_path):
    run(corpus, tmp_path / "one")
    run(corpus, tmp_path / "two")
    for name in os.listdir(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_split_is_seeded_and_equal_documents_stay_together(tmp_path):
    corpus = write_texts(tmp_path / "texts.jsonl", [text for text in TEXTS for _ in range(3)])
    drawn = []
    for seed in ("0", "1"):
        out_dir = tmp_path / seed
        report = run(corpus, out_dir, "--val_pct", "20", "--seed", seed)
        train, val = (set(read_split(out_dir, split)) for split in ("train", "val"))
        assert not train & val
        assert len(val) == 12
        assert report["splits"]["val"]["documents"] == 36
        assert report["documents"]["duplicates"] == 120
        drawn.append(val)
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("wanted", [2, 3, 9])
def test_small_samples_have_a_val_document_too(corpus, tmp_path, wanted):
    report = run(corpus, tmp_path / "out", "--max_samples", str(wanted))
    documents = {split: counts["documents"] for split, counts in report["splits"].items()}
    assert documents == {"train": wanted - 1, "val": 1}
    assert report["documents"]["read"] == wanted


def test_single_text_file_ends_in_val(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "PIECE_BYTES", 100)
    text = "".join(TEXTS)
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    report = run(tmp_path / "book.txt", tmp_path / "out")
    cut = int(len(text) * 0.9)
    assert strip_ends(read_split(tmp_path / "out", "train")) == [text[:cut]]
    assert strip_ends(read_split(tmp_path / "out", "val")) == [text[cut:]]
    assert [counts["documents"] for counts in report["splits"].values()] == [1, 1]
    run(tmp_path / "book.txt", tmp_path / "half", "--val_pct", "50")
    assert strip_ends(read_split(tmp_path / "half", "val")) == [text[len(text) // 2 :]]


def test_pieces_of_a_long_document_are_one_document(tmp_path, monkeypatch):
    text = "".join(TEXTS)
    books = tmp_path / "books"
    books.mkdir()
    for name in ("a.txt", "b.txt"):
        (books / name).write_text(name + text, encoding="utf-8")
    whole = run(books, tmp_path / "whole")
    monkeypatch.setattr(readers, "PIECE_BYTES", 50)
    pieces = run(books, tmp_path / "pieces")
    assert pieces["splits"] == whole["splits"]
    assert pieces["splits"]["train"]["documents"] == 1


def test_split_docs(tmp_path):
    (tmp_path / "names.txt").write_text("emma\nolivia\n\nava\n")
    report = run(tmp_path / "names.txt", tmp_path / "lines", "--split_docs", "line", tokenizer="char")
    assert report["documents"]["kept"] == 3
    assert report["documents"]["empty"] == 0


def test_empty_documents_are_counted_and_dropped(tmp_path):
    corpus = write_texts(tmp_path / "texts.jsonl", ["one", "", " \n", "two"])
    report = run(corpus, tmp_path / "out")
    assert report["documents"] == {
        "read": 4, "kept": 2, "empty": 2, "rejected": {}, "duplicates": 0, "repeated": 0
    }  # fmt: skip
    texts = strip_ends(read_split(tmp_path / "out", "train") + read_split(tmp_path / "out", "val"))
    assert sorted(texts) == ["one", "two"]


@pytest.mark.parametrize("tokenizer", ["bpe:300", "char"])
def test_text_that_spells_control_tokens_stays_text(tmp_path, tokenizer):
    texts = [f"{n} <|endoftext|><|end|> <|assistant|>\n<|pad|><|user|><|system|>" for n in range(4)]
    corpus = write_texts(tmp_path / "texts.jsonl", texts)
    run(corpus, tmp_path / "out", tokenizer=tokenizer)
    control = load_tokenizer(tmp_path / "out").control_ids
    tokens = np.concatenate([np.fromfile(tmp_path / "out" / f"{s}.bin", "<u2") for s in ("train", "val")])
    assert np.isin(tokens, list(control.values())).sum() == 4
    assert (tokens == control["<|endoftext|>"]).sum() == 4


# --- tokenizers and sources


def test_tokenizer_of_an_earlier_folder_or_file(corpus, tmp_path):
    first = run(corpus, tmp_path / "first")
    second = run(corpus, tmp_path / "second", tokenizer=str(tmp_path / "first"))
    assert second["tokenizer_hash"] == first["tokenizer_hash"]
    assert second["splits"] == first["splits"]
    ranks = "".join(f"{base64.b64encode(bytes([n])).decode()} {n}\n" for n in range(256))
    (tmp_path / "bytes.tiktoken").write_text(ranks)
    report = run(corpus, tmp_path / "bytes", tokenizer=str(tmp_path / "bytes.tiktoken"))
    assert report["vocab_size"] == 262


def test_default_tokenizer_and_packages_of_pydocs(tmp_path, monkeypatch):
    asked = []

    def iter_documents(packages):
        asked.append(list(packages))
        return ((f"python:m{n}", text * 9) for n, text in enumerate(TEXTS))

    monkeypatch.setattr(pydocs, "iter_documents", iter_documents)
    (tmp_path / "requirements.txt").write_text("numpy==2.0\nno-such-package==1\n")
    prep_text_corpus.main(
        ["--dataset", "pydocs", "--out-dir", str(tmp_path / "out"), "--pydocs-packages", "pytest",
         str(tmp_path / "requirements.txt")]
    )  # fmt: skip
    report = json.loads((tmp_path / "out" / "corpus.json").read_text())
    assert report["command"]["tokenizer"] == "bpe:4096"
    assert asked[0] == ["pytest", "numpy"] == list(report["sources"][0]["packages"])


def test_hub_set_is_downloaded_once(tmp_path, monkeypatch):
    opened = []

    class Rows(list):
        def shuffle(self, seed, buffer_size):
            return Rows(reversed(self))

    def open_hub(place):
        opened.append(place)
        return Rows({"text": text} for text in [*TEXTS, None])

    monkeypatch.setattr(streams, "_open_hub", open_hub)
    report = run("openwebtext", tmp_path / "out", "--skip_bad", "--dataset_config", "plain")
    assert [place.name for place in opened] == ["Skylion007/openwebtext"]
    assert report["documents"]["kept"] == 60
    assert report["documents"]["rejected"] == {"bad_content": 1}
    assert report["sources"] == [{"hub": "Skylion007/openwebtext", "config": "plain", "split": "train"}]
    assert "spool.jsonl" not in os.listdir(tmp_path / "out")
    sampled = run("openwebtext", tmp_path / "few", "--max_samples", "4", "--skip_bad")
    assert sampled["documents"]["read"] == 4


# --- what goes wrong


def test_bad_documents_refuse_the_corpus_and_are_listed(tmp_path, capsys):
    corpus = write_texts(tmp_path / "texts.jsonl", TEXTS)
    with open(corpus, "ab") as file:
        file.write(b'{"text": 5}\n{"text": "x\n')
    with pytest.raises(BadData, match="2 of 62 documents are bad, .*rejects.jsonl; .*--skip_bad"):
        run(corpus, tmp_path / "out")
    assert f"{corpus}:62: broken JSON" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path / "out")) == ["corpus.json", "rejects.jsonl"]
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [(row["line"], row["reason"]) for row in rejects] == [(61, "bad_content"), (62, "bad_json")]
    with pytest.raises(MissingInput):
        tokenstore.open_store(tmp_path / "out", "train")
    report = run(corpus, tmp_path / "out", "--skip_bad")
    assert report["documents"]["kept"] == 60
    assert report["documents"]["rejected"] == {"bad_content": 1, "bad_json": 1}
    assert len((tmp_path / "out" / "rejects.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("name", ["empty.txt", "blank.txt", "empty.jsonl"])
def test_set_without_text_is_bad_data(tmp_path, name):
    (tmp_path / name).write_text("" if "empty" in name else " \n\n")
    with pytest.raises(BadData, match=name):
        run(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out" / "train.bin").exists()


def test_equal_documents_alone_are_bad_data(tmp_path):
    corpus = write_texts(tmp_path / "texts.jsonl", ["same", "same"])
    with pytest.raises(BadData, match="all equal"):
        run(corpus, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--dataset", "no.txt"], MissingInput),
        (["--dataset", "texts.json"], MissingInput),
        (["--tokenizer", "bpe:12"], BadFlag),
        (["--tokenizer", "nothing/here"], MissingInput),
        (["--val_pct", "0"], BadFlag),
        (["--max_samples", "0"], BadFlag),
        (["--split_docs", "chapter"], BadFlag),
        (["--text_colum", "text"], BadFlag),
        (["--text_column", "absent"], BadData),
        (["--dataset", "."], BadFlag),
        (["--pydocs_packages", "numpy"], BadFlag),
        (["--dataset", "pydocs", "--split", "test"], BadFlag),
        (["--dataset", "pydocs", "--pydocs_packages", "no-such-package"], MissingInput),
    ],
)
def test_bad_flags_leave_nothing_behind(corpus, tmp_path, monkeypatch, flags, error):
    monkeypatch.chdir(tmp_path)
    dataset, flags = (flags[1], flags[2:]) if flags[0] == "--dataset" else ("texts.jsonl", flags)
    with pytest.raises(error):
        run(dataset, tmp_path / "out", *flags)
    assert not (tmp_path / "out" / "train.bin").exists()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".") and name != ".work-out"]


@pytest.mark.parametrize(
    ("error", "raised"), [(OSError(28, "No space left"), IOFailed), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_failure_in_the_middle_leaves_no_store(corpus, tmp_path, monkeypatch, error, raised):
    calls = []

    def encode(self, text):
        calls.append(text)
        if len(calls) == 30:
            raise error
        return np.zeros(1, dtype=np.uint32)

    monkeypatch.setattr(Tokenizer, "encode_array", encode)
    with pytest.raises(raised):
        run(corpus, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_corpus_that_changes_while_it_is_read(corpus, tmp_path, monkeypatch):
    check = prep_text_corpus.check_survey

    def check_then_change(*args):
        write_texts(corpus, TEXTS[:-1])
        return check(*args)

    monkeypatch.setattr(prep_text_corpus, "check_survey", check_then_change)
    with pytest.raises(BadData, match="changed while it was read"):
        run(corpus, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- the second run


def test_same_command_finds_its_work_done(corpus, tmp_path, capsys, monkeypatch):
    run(corpus, tmp_path / "out")
    monkeypatch.setattr(prep_text_corpus, "prepare", lambda *_: pytest.fail("worked again"))
    run(corpus, tmp_path / "out")
    assert "is there already, made by the same command" in capsys.readouterr().out


def test_another_command_is_refused_unless_told_to_overwrite(corpus, tmp_path):
    first = run(corpus, tmp_path / "out")
    with pytest.raises(CannotCreate, match="--seed 0, not 1"):
        run(corpus, tmp_path / "out", "--seed", "1")
    write_texts(corpus, TEXTS[1:])
    with pytest.raises(CannotCreate, match="other sources"):
        run(corpus, tmp_path / "out")
    second = run(corpus, tmp_path / "out", "--overwrite")
    assert (first["documents"]["kept"], second["documents"]["kept"]) == (60, 59)
    assert sorted(os.listdir(tmp_path)) == ["out", "texts.jsonl"]


def test_a_tokenizer_that_changed_is_noticed(corpus, tmp_path):
    run(corpus, tmp_path / "tok")
    run(corpus, tmp_path / "out", tokenizer=str(tmp_path / "tok"))
    run(corpus, tmp_path / "tok", "--overwrite", tokenizer="bpe:310")
    with pytest.raises(CannotCreate, match="other tokenizer hash"):
        run(corpus, tmp_path / "out", tokenizer=str(tmp_path / "tok"))


def test_bad_documents_never_replace_a_finished_corpus(corpus, tmp_path):
    first = run(corpus, tmp_path / "out")
    corpus.write_text('{"text": 1}\n')
    with pytest.raises(BadData, match="stays as it was"):
        run(corpus, tmp_path / "out", "--overwrite")
    assert json.loads((tmp_path / "out" / "corpus.json").read_text()) == first


# --- mixes and the page


def test_a_mix_takes_each_document_as_often_as_its_weight_says(tmp_path):
    paths = {}
    for name in "abc":
        paths[name] = tmp_path / f"{name}.txt"
        paths[name].write_text("".join(f"{name} number {n}\n" for n in range(300)))
    flags = ["--split_docs", "line", "--dataset", f"{paths['b']}:0.3", "--dataset", f"{paths['c']}:2"]
    report = run(paths["a"], tmp_path / "out", *map(str, flags))
    a, b, c = report["datasets"]
    assert (a["documents"], a["weight"], c["documents"], c["weight"]) == (300, 1, 600, 2)
    assert 60 < b["documents"] < 120
    splits = report["splits"].values()
    assert a["documents"] + b["documents"] + c["documents"] == sum(s["documents"] for s in splits)
    assert a["tokens"] + b["tokens"] + c["tokens"] == sum(s["tokens"] for s in splits)
    assert sum(report["lengths"].values()) == report["documents"]["kept"]
    assert report["documents"]["repeated"] == 300
    assert report["documents"]["duplicates"] == 0
    text = "".join(
        load_tokenizer(tmp_path / "out").decode(np.fromfile(tmp_path / "out" / f"{s}.bin", "<u2").tolist())
        for s in ("train", "val")
    )
    taken = Counter(text.split("<|endoftext|>"))
    assert {taken[f"c number {n}"] for n in range(300)} == {2}
    assert {taken[f"b number {n}"] for n in range(300)} == {0, 1}


# --- near duplicates


def write_near(path):
    """Thirty documents of which the first twenty are nearly alike, and short."""
    words = " ".join(f"word{n}" for n in range(40))
    near = [f"{words} number {n}" for n in range(20)]
    far = [" ".join(f"{n}x{k}" for k in range(40)) for n in range(10)]
    path.write_text("\n".join([*near, *far]), encoding="utf-8")
    return path


def test_near_duplicates_of_val_are_counted(tmp_path, capsys):
    path = write_near(tmp_path / "a.txt")
    flags = ["--split_docs", "line", "--near_duplicates", "--val_pct", "50"]
    report = run(path, tmp_path / "out", *flags)
    text = load_tokenizer(tmp_path / "out").decode(np.fromfile(tmp_path / "out/train.bin", "<u2").tolist())
    in_train = text.count(" number ")
    assert 0 < in_train < 20
    assert report["nearly_on_both_sides"] == in_train
    assert f"nearly on both sides  {in_train}\n" in capsys.readouterr().out
    assert f'nearly on both sides</td><td class="n">{in_train}' in (tmp_path / "out/corpus.html").read_text()
    assert run(path, tmp_path / "plain", *flags[:2])["nearly_on_both_sides"] is None


@pytest.mark.parametrize("piece_tokens", [7, 1 << 18])
def test_documents_are_read_back_from_a_store(tmp_path, monkeypatch, piece_tokens):
    path = write_near(tmp_path / "a.txt")
    run(path, tmp_path / "out", "--split_docs", "line", "--val_pct", "20")
    monkeypatch.setattr(corpus_module, "PIECE_TOKENS", piece_tokens)
    tokenizer = load_tokenizer(tmp_path / "out")
    splits = [
        [list(pieces) for pieces in corpus_module.read_back(tmp_path / "out" / f"{split}.bin", tokenizer)]
        for split in ("train", "val")
    ]
    assert sorted("".join(pieces) for split in splits for pieces in split) == sorted(
        path.read_text(encoding="utf-8").split("\n")
    )
    assert (max(len(pieces) for split in splits for pieces in split) > 1) == (piece_tokens == 7)


def test_near_duplicates_need_a_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(BadFlag, match=r"pip install 'firstwords\[near\]'"):
        run(write_near(tmp_path / "a.txt"), tmp_path / "out", "--near_duplicates")


def test_the_page_has_the_account_and_no_markup_from_data(tmp_path):
    (tmp_path / "<b>.txt").write_text("one\n\ntwo words\n\n \n\nthree words here\n")
    report = run(tmp_path / "<b>.txt", tmp_path / "out", "--split_docs", "blank_line")
    page = (tmp_path / "out" / "corpus.html").read_text(encoding="utf-8")
    assert f'<td class="n">{report["documents"]["kept"]}</td>' in page
    assert "<b>" not in page
    assert "<title>16: 3</title>" in page
