"""SECURITY.md is true: every promise in it names tests that are there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def read_promises():
    """Return the promises and the `file::test` names that stand behind each."""
    lines = (ROOT / "SECURITY.md").read_text(encoding="utf-8").splitlines()
    rows = [line.strip("|").split(" | ") for line in lines if line.startswith("| ")]
    return {promise: re.findall(r"`(tests/\w+\.py)::(\w+)`", tests) for promise, tests in rows[1:]}


def is_left_out(mark):
    """Tell whether a decorator keeps a test from the default run."""
    return re.search(r"mark\.(skip|slow|gpu)", ast.unparse(mark)) is not None


def list_tests(path):
    """Return the tests of a file that run by default."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {f.name for f in functions if not any(is_left_out(mark) for mark in f.decorator_list)}


def test_every_promise_names_tests_that_run():
    promises = read_promises()
    assert len(promises) >= 12
    for promise, tests in promises.items():
        assert tests, f"nothing holds {promise!r}"
        for path, name in tests:
            assert name in list_tests(path), f"{path}::{name} holds {promise!r}, and is not there"
