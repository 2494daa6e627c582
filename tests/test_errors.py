"""Errors: the exit codes of the contract, and suggestions that stay short."""

import pytest

from firstwords import errors


def test_exit_codes_are_those_of_the_contract():
    codes = {kind.__name__: kind.exit_code for kind in errors.FirstwordsError.__subclasses__()}
    assert codes == {
        "BadFlag": 2,
        "BadData": 65,
        "MissingInput": 66,
        "Diverged": 70,
        "OutOfMemory": 71,
        "CannotCreate": 73,
        "IOFailed": 74,
        "Stopped": 75,
        "Damaged": 76,
        "Mismatch": 78,
    }


@pytest.mark.parametrize(
    ("word", "known", "expected"),
    [
        ("modle", ["model", "data"], "did you mean 'model'?"),
        ("xyz", ["model", "data"], "known: data, model"),
        ("xyz", [], "there is nothing like it"),
    ],
)
def test_suggestion(word, known, expected):
    assert errors.suggest(word, known) == expected


def test_a_long_list_of_names_is_cut():
    names = [f"file-{number:03}" for number in range(500)]
    assert errors.suggest("xyz", names) == f"known: {', '.join(names[:20])} and 480 more"
