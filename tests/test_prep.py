"""Accounts of rows, the split, and which folders a prep script may touch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from firstwords import prep
from firstwords.errors import BadData, CannotCreate
from firstwords.schema import RowError

ROOT = Path(__file__).parent.parent


def test_rejects_are_counted_listed_and_the_first_are_kept(tmp_path):
    with prep.Rejects(tmp_path) as rejects:
        for line in range(1, 31):
            rejects.add("a.jsonl", line, RowError("even" if line % 2 == 0 else "odd", f"is {line}"))
        rejects.add("b.jsonl", 1, RowError("odd", "half a \ud800 \x1b[31m"))
    assert rejects.total == 31
    assert rejects.describe() == {"odd": 16, "even": 15}
    assert len(rejects.first) == 20
    assert rejects.first[1] == "a.jsonl:2: is 2"
    rows = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert rows[1] == {"file": "a.jsonl", "line": 2, "reason": "even", "detail": "is 2"}
    assert len(rows) == 31


def test_no_rejects_no_file(tmp_path):
    with prep.Rejects(tmp_path) as rejects:
        pass
    assert rejects.total == 0
    assert not list(tmp_path.iterdir())


MADE_BY = {"command": {"dataset": "a.txt", "seed": 0}, "sources": [{"file": "a.txt"}]}


def make_folder(out_dir, report=MADE_BY, name="report.json"):
    staging = out_dir.parent / "staging"
    staging.mkdir()
    (staging / "train.bin").write_bytes(b"12345")
    prep.seal_folder(staging, out_dir, name, dict(report))
    staging.rename(out_dir)


def is_finished(out_dir, made_by=MADE_BY, overwrite=False):
    return prep.is_finished(out_dir, "report.json", made_by, overwrite=overwrite)


def test_finished_folder_is_left_alone_or_replaced_when_asked(tmp_path):
    out_dir = tmp_path / "out"
    assert not is_finished(out_dir)
    make_folder(out_dir)
    report = json.loads((out_dir / "report.json").read_text())
    assert report["files"]["train.bin"]["bytes"] == 5
    assert is_finished(out_dir)
    assert not is_finished(out_dir, overwrite=True)
    other = MADE_BY | {"command": {"dataset": "a.txt", "seed": 1}}
    with pytest.raises(CannotCreate, match="made with --seed 0, not 1; .* pass --overwrite"):
        is_finished(out_dir, other)
    with pytest.raises(CannotCreate, match="made from other sources"):
        is_finished(out_dir, MADE_BY | {"sources": []})
    (out_dir / "train.bin").write_bytes(b"1234")
    with pytest.raises(CannotCreate, match=r"its train.bin is missing or has another size"):
        is_finished(out_dir)


def test_a_folder_of_other_things_is_never_touched(tmp_path):
    (tmp_path / "letters").mkdir()
    assert not is_finished(tmp_path / "letters")
    (tmp_path / "letters" / "to_mother.txt").write_text("Dear")
    (tmp_path / "file").write_text("x")
    for name in ("letters", "file"):
        for overwrite in (False, True):
            with pytest.raises(CannotCreate, match="not made by this script"):
                is_finished(tmp_path / name, overwrite=overwrite)


def test_a_refused_folder_may_be_made_anew_but_takes_no_finished_ones_place(tmp_path):
    out_dir, refused = tmp_path / "out", MADE_BY | {"refused": "3 rows are bad"}
    make_folder(out_dir, refused)
    assert [path.name for path in out_dir.iterdir()] == ["report.json"]
    assert not is_finished(out_dir)
    make_folder(tmp_path / "good")
    with pytest.raises(BadData, match="3 rows are bad; the finished data in .*good stays"):
        prep.seal_folder(tmp_path, tmp_path / "good", "report.json", dict(refused))


@pytest.mark.parametrize("text", ["0", "100", "-1", "x", "nan"])
def test_percent_leaves_something_on_both_sides(text):
    with pytest.raises(Exception, match="no percentage between 0 and 100"):
        prep.parse_percent(text)


def test_scripts_need_neither_torch_nor_transformers_nor_datasets():
    code = (
        "import sys, prep_data, prep_text_corpus; "
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_cores_are_counted_on_any_system(monkeypatch):
    assert prep.count_cores() >= 1
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert prep.count_cores() == os.cpu_count()
