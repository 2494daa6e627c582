"""What the tests of faults share: ours beside a version that is known to be wrong."""

import pytest


def beside(ours, *broken):
    """Run a check on `ours`, and on each of `broken`, where it must fail.

    The check takes it as `implementation`: a function or a class, named in the test's id by its name.
    """
    cases = [pytest.param(ours, id="ours")]
    for wrong in broken:
        mark = pytest.mark.xfail(strict=True, reason="a version that is known to be wrong")
        cases.append(pytest.param(wrong, id=wrong.__name__, marks=mark))
    return pytest.mark.parametrize("implementation", cases)
