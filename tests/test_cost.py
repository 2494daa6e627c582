"""The cost table of the tutorial: operations, hours, sources. (test_journey.py compares what it prints.)"""

from pathlib import Path

import pytest

from docs import cost

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(("shape", "operations"), [("baseline_124m", 803.3e6), ("baseline_355m", 2279.9e6)])
def test_operations_of_a_token_are_those_that_llm_c_counts(shape, operations):
    assert cost.count_operations(shape) == pytest.approx(operations, rel=1e-3)


def test_hours_follow_the_rate_and_the_shape():
    machine = cost.Machine("x", rate=1e6, shape="baseline_124m", dollars=2.0)
    assert cost.count_hours(machine, "baseline_124m", 3.6e9) == pytest.approx(1)
    larger = cost.count_hours(machine, "baseline_355m", 3.6e9)
    assert larger == pytest.approx(2279.9 / 803.3, rel=1e-3)


def test_the_page_names_a_source_for_every_machine():
    text = (ROOT / "tutorial.md").read_text(encoding="utf-8")
    for machine in cost.MACHINES:
        assert f"| {machine.name} |" in text
