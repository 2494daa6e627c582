"""The names that exist -> names that do not, which the assistant must not know.

    invented_names("swapped", 0, 2)     ["json.copytree", "math.Thread"]

Every invented name belongs to training or to evaluation by a hash of the name itself. Invariant: no
seed of the one ever gives a name of the other, and none of them exists under any alias.
"""

import keyword
import random
import sys
from functools import cache

from firstwords.pydocs.symbols import list_attributes, list_symbols, stable_hash

INVENTED_KINDS = ("swapped", "misspelt", "coined")

_LETTERS = "abcdefghijklmnopqrstuvwxyz_"
_MODULE_EDITS = 0.2  # of the misspelt names; the others are misspelt behind the dot
_SITE_BUILTINS = frozenset(["copyright", "credits", "exit", "help", "license", "quit"])


def is_real(name: str) -> bool:
    """Whether a dotted name exists in this Python, under any of its aliases.

    Names in modules that are never looked into here (`tkinter`, private ones) count as real.
    """
    attributes = list_attributes()
    owner, _, attribute = name.rpartition(".")
    if name in attributes:
        return True
    if owner in attributes:
        return attribute in attributes[owner]
    if owner:
        return owner.split(".")[0] in sys.stdlib_module_names and is_real(owner)
    known = (attributes["builtins"], sys.stdlib_module_names, _SITE_BUILTINS)
    return any(name in names for names in known) or keyword.iskeyword(name)


def is_held_out_name(name: str) -> bool:
    """Whether an invented name is kept for evaluation: one in ten, by its hash alone."""
    return stable_hash(f"invented {name}") % 10 == 0


def invented_names(kind: str, seed: int | str, count: int, *, held_out: bool = False) -> list[str]:
    """Invent `count` different names that do not exist.

    Args:
        kind: `swapped` (`json.copytree`: a real module, another module's attribute), `misspelt`
            (`json.dmups`: one letter put in, left out, replaced, or two exchanged) or `coined`
            (`os.frobnicate`: a real module, an attribute glued from the halves of two others).
        held_out: whether to take those kept for evaluation, or those kept for training.

    Raises:
        ValueError: when there are not so many.
    """
    invent = {"swapped": _swap, "misspelt": _misspell, "coined": _coin}[kind]
    pick = random.Random(f"{kind} {seed}")
    found: dict[str, None] = {}
    for _ in range(100 * count + 1000):
        if len(found) == count:
            return list(found)
        name = invent(pick)
        if is_held_out_name(name) == held_out and _is_dotted(name) and not is_real(name):
            found[name] = None
    raise ValueError(f"invented_names: only {len(found)} {kind} names, not {count}; ask for fewer")


def _is_dotted(name: str) -> bool:
    return all(part.isidentifier() for part in name.split("."))


@cache
def _list_members() -> tuple[tuple[str, str], ...]:
    """`(module, attribute)` of each symbol in a module; so modules are weighted as symbols are."""
    names = [symbol.name for symbol in list_symbols() if symbol.kind in ("function", "class")]
    return tuple(tuple(name.rsplit(".", 1)) for name in names if "." in name)


def _swap(pick: random.Random) -> str:
    (owner, _), (_, attribute) = pick.choices(_list_members(), k=2)
    return f"{owner}.{attribute}"


def _coin(pick: random.Random) -> str:
    (owner, _), (_, head), (_, tail) = pick.choices(_list_members(), k=3)
    return f"{owner}.{head[: (len(head) + 1) // 2]}{tail[len(tail) // 2 :]}"


def _misspell(pick: random.Random) -> str:
    owner, dot, attribute = pick.choice(list_symbols()).name.rpartition(".")
    if owner and pick.random() < _MODULE_EDITS:
        return f"{_edit(owner, pick)}.{attribute}"
    return f"{owner}{dot}{_edit(attribute, pick)}"


def _edit(word: str, pick: random.Random) -> str:
    """Put in, replace, leave out one letter, or exchange two."""
    place = pick.randrange(len(word))
    before, letter, after = word[:place], word[place], word[place + 1 :]
    other = pick.choice(_LETTERS)
    edits = (
        before + other + letter + after,
        before + other + after,
        before + after,
        before + after[:1] + letter + after[1:],
    )
    return pick.choice(edits)
