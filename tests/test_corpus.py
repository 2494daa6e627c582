"""Text in parts: the same store for any number of processes, kills, engines, and kinds of files."""

import gzip
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zstandard
from rows import write_texts

import prep_text_corpus
from firstwords import corpus, hashes
from firstwords.errors import BadData, BadFlag, MissingInput
from firstwords.sources import blocks, read_rows, read_texts
from firstwords.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
WORDS = ["the", "cat's", "12", "café", "日本", "naïve\tIt'll", "be,", "(so)", "far:", "", "end.\nNew", "🙂"]


def make_texts(count, size, seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=size)) + f" {n}" for n in range(count)]


def run(dataset, out_dir, *flags, tokenizer="bpe:300"):
    words = ["--dataset", str(dataset), "--out_dir", str(out_dir), "--tokenizer", str(tokenizer), *flags]
    prep_text_corpus.main(words)
    return json.loads((out_dir / "corpus.json").read_text(encoding="utf-8"))


def read_bins(out_dir):
    return [(out_dir / f"{split}.bin").read_bytes() for split in ("train", "val")]


@pytest.fixture
def small_units(monkeypatch):
    """Units of a megabyte; what the processes cut for themselves stays as it is."""
    monkeypatch.setattr(blocks, "SLICE_PIECES", 1)
    monkeypatch.setattr(corpus, "UNIT_BYTES", 1 << 20)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A folder with a BPE of 400 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    run(write_texts(folder / "a.jsonl", make_texts(50, 40)), folder / "out", tokenizer="bpe:400")
    return folder / "out"


# --- the same store


def test_one_process_and_eight_give_the_same_bytes(tmp_path, tokenizer, small_units):
    write_texts(tmp_path / "a.jsonl", make_texts(4000, 150))
    one = run(tmp_path / "a.jsonl", tmp_path / "one", "--num_proc", "1", tokenizer=tokenizer)
    eight = run(tmp_path / "a.jsonl", tmp_path / "eight", "--num_proc", "8", tokenizer=tokenizer)
    assert one == eight
    assert one["documents"]["kept"] == 4000
    for name in os.listdir(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "eight" / name).read_bytes(), name


def test_a_long_text_is_one_document_whoever_reads_it(tmp_path, tokenizer, small_units):
    (tmp_path / "texts").mkdir()
    for name, seed in (("a", 1), ("b", 2)):
        text = "\n".join(make_texts(300, 2200, seed))
        (tmp_path / "texts" / f"{name}.txt").write_text(text, encoding="utf-8", newline="")
    report = run(tmp_path / "texts", tmp_path / "out", "--num_proc", "2", tokenizer=tokenizer)
    ids = b"".join(sorted(read_bins(tmp_path / "out")))
    whole = load_tokenizer(tokenizer)
    expected = []
    for name in "ab":
        text = (tmp_path / "texts" / f"{name}.txt").read_bytes().decode()
        assert len(text) > 3_000_000
        expected.append(b"".join(i.to_bytes(2, "little") for i in [*whole.encode(text), whole.endoftext_id]))
    assert ids == b"".join(sorted(expected))
    assert report["documents"]["kept"] == 2


def write_kinds(folder, texts):
    import pyarrow
    import pyarrow.parquet

    rows = [{"text": text, "n": n} for n, text in enumerate(texts)]
    write_texts(folder / "a.jsonl", texts)
    (folder / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    cells = "".join('"' + text.replace('"', '""') + '",1\n' for text in texts)
    (folder / "a.csv").write_text("text,n\n" + cells, encoding="utf-8", newline="")
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=100)
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet"):
        data = (folder / name).read_bytes()
        (folder / f"{name}.gz").write_bytes(gzip.compress(data[:99]) + gzip.compress(data[99:]))
        (folder / f"{name}.zst").write_bytes(zstandard.compress(data))


def test_every_kind_of_file_gives_the_same_store(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(blocks, "PIECE_BYTES", 5000)
    monkeypatch.setattr(corpus, "UNIT_BYTES", 20_000)
    write_kinds(tmp_path, make_texts(600, 40))
    bins = {}
    for path in sorted(tmp_path.glob("a.*")):
        run(path, tmp_path / f"out-{path.name}", "--num_proc", "1", tokenizer=tokenizer)
        bins[path.name] = read_bins(tmp_path / f"out-{path.name}")
    assert len(bins) == 12
    assert all(found == bins["a.jsonl"] for found in bins.values())
    assert len(list(read_rows(str(tmp_path / "a.jsonl.gz")))) == 600


@pytest.mark.parametrize("split_docs", ["file", "line", "blank_line"])
def test_compressed_texts_are_cut_like_plain_ones(tmp_path, monkeypatch, split_docs):
    monkeypatch.setattr(blocks, "PIECE_BYTES", 100)
    text = "\n\n".join(make_texts(40, 30)) + "\n"
    data = b"\xef\xbb\xbf" + text.encode()
    (tmp_path / "a.txt").write_bytes(data)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(data))
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(data))
    found = [
        [(d.line, list(d.pieces)) for d in read_texts(str(tmp_path / name), split_docs=split_docs)]
        for name in ("a.txt", "a.txt.gz", "a.txt.zst")
    ]
    assert found[0] == found[1] == found[2]
    lines = sum(1 for line in text.split("\n") if line.strip())
    assert len(found[0]) == {"file": 1, "line": lines, "blank_line": 40}[split_docs]
    if split_docs == "file":
        assert "".join(found[0][0][1]) == text


def test_patterns_name_files(tmp_path, tokenizer):
    for name in "abc":
        data = (json.dumps({"text": f"text {name}"}) + "\n").encode()
        (tmp_path / f"{name}.jsonl.zst").write_bytes(zstandard.compress(data))
    pattern = str(tmp_path / "[ab].jsonl.*")
    assert ["".join(document.pieces) for document in read_texts(pattern)] == ["text a", "text b"]
    with pytest.raises(MissingInput, match="no file matches"):
        run(tmp_path / "*.csv", tmp_path / "out", tokenizer=tokenizer)
    (tmp_path / "d.pdf").touch()
    with pytest.raises(BadFlag, match="d.pdf, which cannot be read"):
        run(tmp_path / "*", tmp_path / "out", tokenizer=tokenizer)


# --- addresses


def test_bad_rows_of_later_slices_have_the_lines_of_the_file(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(blocks, "PIECE_BYTES", 200)
    monkeypatch.setattr(corpus, "UNIT_BYTES", 2000)
    lines = [json.dumps({"text": text}) for text in make_texts(300, 5)]
    for place in (3, 150, 299):
        lines[place] = '{"text": 5}'
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "b.jsonl").write_text('{"text": 1}\n{"text": "good"}\n')
    with pytest.raises(BadData, match="4 of 302 documents are bad"):
        run(tmp_path / "?.jsonl", tmp_path / "out", tokenizer=tokenizer)
    rows = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    found = [(Path(row["file"]).name, row["line"]) for row in rows]
    assert found == [("a.jsonl", 4), ("a.jsonl", 151), ("a.jsonl", 300), ("b.jsonl", 1)]


def test_a_bad_byte_refuses_the_whole_text_once(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(blocks, "PIECE_BYTES", 100)
    monkeypatch.setattr(corpus, "UNIT_BYTES", 500)
    data = bytearray(" ".join(make_texts(40, 90)).encode())
    data[9000] = data[12_000] = 0xFF
    (tmp_path / "a.txt").write_bytes(data)
    write_texts(tmp_path / "b.jsonl", ["one", "two"])
    report = run(tmp_path / "?.*", tmp_path / "out", "--skip_bad", tokenizer=tokenizer)
    assert report["documents"] == {
        "read": 3,
        "kept": 2,
        "repeated": 0,
        "empty": 0,
        "rejected": {"bad_utf8": 1},
        "duplicates": 0,
    }
    assert "at byte 9000" in (tmp_path / "out" / "rejects.jsonl").read_text()


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_an_archive_that_breaks_off_is_bad_data(tmp_path, kind, tokenizer):
    data = os.urandom(300_000).hex().encode()
    packed = gzip.compress(data) if kind == "gz" else zstandard.compress(data)
    (tmp_path / f"a.txt.{kind}").write_bytes(packed[:-1000])
    with pytest.raises(BadData, match="broken archive"):
        run(tmp_path / f"a.txt.{kind}", tmp_path / "out", tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()


def test_an_archive_with_a_line_without_end_is_bad_data(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(blocks, "LONGEST_BYTES", 4 << 20)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "' + bytes(64 << 20), 1))
    with pytest.raises(BadData, match="no place to cut in the 4 MB"):
        run(tmp_path / "a.jsonl.gz", tmp_path / "out", "--text_column", "text", tokenizer=tokenizer)


# --- killed and gone on with

CHILD = """
import sys
import prep_text_corpus
from firstwords import corpus
from firstwords.args import run_main
from firstwords.sources import blocks

blocks.SLICE_PIECES, corpus.UNIT_BYTES = 1, 1 << 20
if __name__ == "__main__":
    run_main(prep_text_corpus.main)
"""


def start(folder, *flags, **options):
    (folder / "child.py").write_text(CHILD)
    words = [
        sys.executable,
        folder / "child.py",
        "--dataset",
        folder / "a.jsonl",
        "--out_dir",
        folder / "out",
    ]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([*words, *flags], env=env, stderr=subprocess.PIPE, text=True, **options)


def count_parts(folder):
    return len(list(folder.glob(".work-out/part-*")))


def test_killed_at_any_moment_it_ends_with_the_same_bytes(tmp_path, tokenizer, small_units):
    draw = random.Random(0)
    write_texts(tmp_path / "a.jsonl", make_texts(6000, 150))
    whole = run(tmp_path / "a.jsonl", tmp_path / "whole", "--num_proc", "1", tokenizer=tokenizer)
    flags = ("--tokenizer", str(tokenizer), "--num_proc", "2")
    for wanted in (1, 2, 4):
        child = start(tmp_path, *flags)
        while count_parts(tmp_path) < wanted and child.poll() is None:
            time.sleep(0.01)
        time.sleep(draw.random() / 20)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        assert not (tmp_path / "out").exists()
    made = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob(".work-out/part-*")}
    child = start(tmp_path, *flags)
    _, said = child.communicate()
    assert child.returncode == 0, said
    assert "going on with unfinished work" in said
    assert made
    assert json.loads((tmp_path / "out" / "corpus.json").read_text()) == whole
    assert read_bins(tmp_path / "out") == read_bins(tmp_path / "whole")
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_a_full_disk_keeps_what_was_done(tmp_path, tokenizer, small_units):
    write_texts(tmp_path / "a.jsonl", [*make_texts(1500, 150), "x " * 700_000])
    whole = run(tmp_path / "a.jsonl", tmp_path / "whole", "--num_proc", "1", tokenizer=tokenizer)
    limit = 1_200_000
    flags = ("--tokenizer", str(tokenizer), "--num_proc", "1")
    child = start(
        tmp_path, *flags, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    _, said = child.communicate()
    assert child.returncode == 74, said
    assert said.splitlines()[-1].startswith("error: ")
    assert count_parts(tmp_path) > 0
    assert not (tmp_path / "out").exists()
    child = start(tmp_path, *flags)
    assert child.wait() == 0
    assert json.loads((tmp_path / "out" / "corpus.json").read_text()) == whole
    child.stderr.close()


def test_refused_work_waits_for_skip_bad(tmp_path, tokenizer, monkeypatch):
    path = write_texts(tmp_path / "a.jsonl", ["one", "two"])
    with open(path, "a") as rows:
        rows.write('{"text": 1}\n')
    with pytest.raises(BadData, match="--skip_bad"):
        run(path, tmp_path / "out", tokenizer=tokenizer)
    monkeypatch.setattr(corpus.EncodeJob, "__call__", lambda *_: pytest.fail("encoded again"))
    report = run(path, tmp_path / "out", "--skip_bad", "--val_pct", "50", tokenizer=tokenizer)
    assert report["documents"]["kept"] == 2
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "out"]


def test_work_on_other_input_starts_anew_and_says_so(tmp_path, tokenizer, capsys):
    path = write_texts(tmp_path / "a.jsonl", ["one", "two"])
    with open(path, "a") as rows:
        rows.write('{"text": 1}\n')
    with pytest.raises(BadData):
        run(path, tmp_path / "out", tokenizer=tokenizer)
    write_texts(path, ["three", "four", "five"])
    assert run(path, tmp_path / "out", tokenizer=tokenizer)["documents"]["kept"] == 3
    assert "unfinished work had other sources; starting anew" in capsys.readouterr().err


def test_hashes_of_contents_stay_on_disk(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(hashes, "BLOCK", 16)
    monkeypatch.setattr(corpus, "BLOCK_TOKENS", 50)
    write_texts(tmp_path / "a.jsonl", make_texts(100, 9) * 2)
    report = run(tmp_path / "a.jsonl", tmp_path / "out", "--val_pct", "10", tokenizer=tokenizer)
    assert report["documents"]["duplicates"] == 100
    assert {split: counts["documents"] for split, counts in report["splits"].items()} == {
        "train": 180,
        "val": 20,
    }


# --- datatrove


def test_datatrove_gives_the_store_of_one_machine_though_a_task_dies(tmp_path, tokenizer, small_units):
    pytest.importorskip("datatrove")
    (tmp_path / "texts").mkdir()
    for n in range(3):
        write_texts(tmp_path / "texts" / f"{n}.jsonl", make_texts(1500, 150, n))
    data = (tmp_path / "texts" / "2.jsonl").read_bytes()
    (tmp_path / "texts" / "2.jsonl").unlink()
    (tmp_path / "texts" / "2.jsonl.gz").write_bytes(gzip.compress(data, 1))
    one = run(tmp_path / "texts", tmp_path / "one", "--num_proc", "1", tokenizer=tokenizer)
    flags = ["--dataset", str(tmp_path / "texts"), "--out_dir", str(tmp_path / "many"), "--tokenizer"]
    flags += [str(tokenizer), "--engine", "datatrove", "--tasks", "3"]
    step = prep_text_corpus.build_step(flags)
    count = len(list(step.iter_units()))
    if (pid := os.fork()) == 0:  # a task that dies after its first part
        step.stat_update = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        list(step.run(rank=1, world_size=3))
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert [step.work.part(n).exists() for n in range(count)] == [n == 1 for n in range(count)]
    many = run(tmp_path / "texts", tmp_path / "many", *flags[6:], "--num_proc", "1", tokenizer=tokenizer)
    assert count == 3
    assert many == one
    assert read_bins(tmp_path / "many") == read_bins(tmp_path / "one")


def test_the_tutorial_gives_slurm_the_same_step(tmp_path, monkeypatch, tokenizer):
    pytest.importorskip("datatrove")
    from datatrove.executor import SlurmPipelineExecutor

    blocks = (b.split("```")[0] for b in (ROOT / "tutorial.md").read_text().split("```python")[1:])
    block = next(block for block in blocks if "SlurmPipelineExecutor" in block)
    (tmp_path / "my_texts").mkdir()
    write_texts(tmp_path / "my_texts" / "a.jsonl", ["one", "two"])
    monkeypatch.chdir(tmp_path)
    launched = []
    monkeypatch.setattr(SlurmPipelineExecutor, "run", lambda self: launched.append(self))
    exec(block.replace('"gpt2"', repr(str(tokenizer))), {})
    (step,) = launched[0].pipeline
    list(step.run(rank=0, world_size=launched[0].tasks))
    flags = ["--engine", "datatrove", "--tasks", "1000"]
    monkeypatch.setattr(corpus.EncodeJob, "__call__", lambda *_: pytest.fail("encoded again"))
    report = run("my_texts/", tmp_path / "data" / "big", *flags, tokenizer=tokenizer)
    assert report["documents"]["kept"] == 2


def test_datatrove_needs_files(tmp_path, tokenizer):
    with pytest.raises(BadFlag, match="--engine: datatrove, but openwebtext is no local files"):
        run("openwebtext", tmp_path / "out", "--engine", "datatrove", tokenizer=tokenizer)
    with pytest.raises(BadFlag, match="--tasks: 3, but --engine is not datatrove"):
        run("openwebtext", tmp_path / "out", "--tasks", "3", tokenizer=tokenizer)
