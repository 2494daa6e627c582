"""The floors of the package: imports go down, and torch stays above floor 2."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import firstwords

PACKAGE = Path(firstwords.__file__).parent
# What stands apart: below all floors, and beside them.
BELOW = {"errors": -2, "atomic": -1}
BESIDE = "args"


def read_table(docstring: str) -> dict[str, int]:
    """Return the floor of each module in the table of a package's docstring."""
    rows = re.findall(r"^    (\d)  (\w+)  +\S", docstring, re.M)
    return {module: int(floor) for floor, module in rows}


def list_modules(package: Path) -> dict[str, list[Path]]:
    """Return the files of each module; a package below counts as one module."""
    modules = {}
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).parts[0].removesuffix(".py")
        if name != "__init__":
            modules.setdefault(name, []).append(path)
    return modules


def list_imports(path: Path, package: Path) -> set[str]:
    """Return the modules of the package that a file imports, inside functions too."""
    dotted = [package.name, *path.relative_to(package).with_suffix("").parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = dotted[: -node.level] if node.level else []
            module = ".".join([*origin, *([node.module] if node.module else [])])
            found.update(f"{module}.{alias.name}" for alias in node.names)
    parts = [name.split(".") for name in found]
    return {names[1] for names in parts if names[0] == package.name and len(names) > 1}


def check_imports(package: Path, floors: dict[str, int]) -> None:
    """Every import goes to a lower floor; `args` knows `errors` alone, and anyone may know it."""
    heights = floors | BELOW
    for module, paths in list_modules(package).items():
        for other in set().union(*(list_imports(path, package) for path in paths)) - {module}:
            if module == BESIDE:
                allowed = other == "errors"
            else:
                allowed = other == BESIDE or heights.get(other, 99) < heights.get(module, -99)
            assert allowed, f"{module} imports {other}"


def test_every_module_stands_in_the_table():
    floors = read_table(firstwords.__doc__)
    assert set(floors) | set(BELOW) | {BESIDE} == set(list_modules(PACKAGE))
    assert list(floors.values()) == sorted(floors.values())
    assert set(floors.values()) == set(range(10))


def test_imports_go_down():
    check_imports(PACKAGE, read_table(firstwords.__doc__))


GOOD = {
    "schema": "from firstwords.errors import BadData\nimport json",
    "packing": "import numpy",
    "template": "from firstwords import packing\nfrom firstwords.schema import Message",
    "model/__init__": "from firstwords.model.loss import Loss\nfrom ..args import TrainFlags",
    "model/loss": "from . import other\nfrom ..template import encode",
    "args": "from firstwords.errors import BadFlag",
}
BAD = {
    "up": {"schema": "from firstwords.template import x"},
    "up in a function": {"schema": "def f():\n    from firstwords import template"},
    "up by name": {"schema": "import firstwords.template"},
    "up by dots": {"packing": "from .template import encode"},
    "up by one dot": {"packing": "from . import template"},
    "up from a package": {"model/loss": "from firstwords.trainer import Trainer"},
    "a neighbour": {"template": "from firstwords.pydocs import x"},
    "args knows a room": {"args": "from firstwords.schema import Message"},
    "errors knows a room": {"errors": "from firstwords.schema import Message"},
}
TABLE = {"schema": 0, "packing": 1, "pydocs": 2, "template": 2, "model": 3, "trainer": 7}


@pytest.mark.parametrize("name", ["good", *BAD])
def test_the_check_of_imports(tmp_path, name):
    package = tmp_path / "firstwords"
    for module, text in (GOOD | BAD.get(name, {})).items():
        path = package / f"{module}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    if name == "good":
        check_imports(package, TABLE)
    else:
        with pytest.raises(AssertionError, match="imports"):
            check_imports(package, TABLE)


def test_floors_0_to_2_need_no_torch():
    floors = read_table(firstwords.__doc__)
    light = [module for module, floor in floors.items() if floor <= 2]
    names = ", ".join(f"firstwords.{module}" for module in [*light, *BELOW, BESIDE])
    heavy = "{'torch', 'transformers', 'datasets', 'accelerate'}"
    code = f"import sys, {names}\nprint(sorted({heavy} & set(sys.modules)))"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    assert ended.stdout == "[]\n"
    assert len(light) >= 7
