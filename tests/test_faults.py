"""The table of faults is whole: 48 rows, and each names a test that runs, and that fails where it should."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "faults.md"


class Collector:
    """A plugin that keeps what pytest collects."""

    def pytest_collection_finish(self, session):
        self.items = session.items


def read_rows(text):
    """Return the cells of each row: first its number, or the fault where it has none."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [row for row in cells if row[0] not in ("#", "fault")]


def list_tests(rows):
    """Return the `file::test` names in the rows."""
    return {name for row in rows for name in re.findall(r"`(tests/\w+\.py::\w+)`", row[-1])}


@pytest.fixture(scope="module")
def rows():
    return read_rows(TABLE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def collected(rows):
    """Every collected item of the files that the table names, by `file::test`."""
    files = sorted({name.split("::")[0] for name in list_tests(rows)})
    plugin, items = Collector(), {}
    pytest.main(["--collect-only", "-p", "no:terminal", *(str(ROOT / file) for file in files)], [plugin])
    for item in plugin.items:
        name = f"tests/{item.path.name}::{item.originalname}"
        items.setdefault(name, []).append(item)
    return items


def is_left_out(item):
    """Tell whether something would keep the item from running."""
    names = {mark.name for mark in item.iter_markers()}
    return bool(names & {"skip", "skipif", "slow", "gpu"})


def must_fail(item):
    """Tell whether the item is a version that is known to be wrong."""
    return any(mark.kwargs.get("strict") for mark in item.iter_markers("xfail"))


def test_the_table_has_48_rows_in_order(rows):
    assert [row[0] for row in rows if row[0].isdigit()] == [str(number) for number in range(1, 49)]
    assert all(all(row) for row in rows)
    assert all(re.fullmatch(r"`tests/\w+\.py::\w+`(, `tests/\w+\.py::\w+`)*", row[-1]) for row in rows)


def test_every_row_names_a_test_that_runs_on_ours_and_must_fail_on_another(rows, collected):
    for row in rows:
        for name in list_tests([row]):
            items = collected.get(name)
            assert items, f"{row[0]}: {name} is not collected"
            assert not any(is_left_out(item) for item in items), f"{row[0]}: {name} is left out"
            wrong = [item for item in items if must_fail(item)]
            assert wrong, f"{row[0]}: {name} has no version on which it must fail"
            assert len(wrong) < len(items), f"{row[0]}: {name} does not run on ours"
