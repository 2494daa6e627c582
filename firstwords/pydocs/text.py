"""The documentation records and the sources of installed packages -> text documents of stage A.

    ("python:shutil.copytree", "shutil.copytree(src, dst, ...)\\n\\nRecursively copy a ...")

Packages are read by `ast` and never imported. Invariant: the order is fixed, no docstring comes
twice, and one file at a time is in memory.
"""

import ast
import inspect
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from firstwords.errors import MissingInput
from firstwords.pydocs.symbols import list_symbols, read_objects, read_records

MIN_DOCSTRING = 40  # characters; what is shorter says little beside its name
MAX_SOURCE = 2_000_000  # bytes; larger files are generated tables


def iter_documents(packages: Sequence[str] = ()) -> Iterator[tuple[str, str]]:
    """Yield the documents of stage A, those nearest to the questions of stage B first.

    Args:
        packages: names of installed distributions (`torch`) to read after the standard library.

    Yields:
        `(source, text)`: where it is from (`python:json.dumps`, `torch:torch/hub.py`), and text.

    Raises:
        MissingInput: when a package is not installed.
    """
    distributions = [_find_distribution(name) for name in packages]
    seen: set[bytes] = set()
    yield from _drop_repeated(_iter_stdlib(), seen)
    for found in distributions:
        yield from _drop_repeated(_iter_package(found), seen)


def list_packages(requirements: Path) -> list[str]:
    """Return the names in a requirements file that are installed here, in the file's order.

    Raises:
        MissingInput: when the file is not there.
    """
    if not requirements.is_file():
        raise MissingInput(f"{requirements}: no such file; give the path of a requirements.txt")
    lines = requirements.read_text(encoding="utf-8").splitlines()
    names = [match[0] for line in lines if (match := re.match(r"[A-Za-z0-9][\w.-]*", line))]
    return [name for name in dict.fromkeys(names) if _is_installed(name)]


def _is_installed(name: str) -> bool:
    try:
        return bool(distribution(name))
    except PackageNotFoundError:
        return False


def _find_distribution(name: str) -> Distribution:
    if not _is_installed(name):
        raise MissingInput(f"pydocs: package {name!r} is not installed; install it or leave it out")
    return distribution(name)


def _drop_repeated(documents: Iterable[tuple[str, str, str]], seen: set[bytes]) -> Iterator[tuple[str, str]]:
    for source, title, doc in documents:
        key = blake2b(doc.encode("utf-8", "replace"), digest_size=12).digest()
        if key not in seen:
            seen.add(key)
            yield source, f"{title}\n\n{doc}"


def _iter_stdlib() -> Iterator[tuple[str, str, str]]:
    """Yield `(source, title, doc)`: the taught symbols, everything else, the language's topics."""
    taught = {symbol.name for symbol in list_symbols()}
    for wanted in (True, False):
        for record in read_objects():
            if (record["name"] in taught) == wanted and not record["inherited"]:
                yield (
                    f"python:{record['name']}",
                    record["name"] + (record["signature"] or ""),
                    record["doc"],
                )
    for record in read_records():
        if record["type"] == "topic":
            yield f"python:{record['name']}", record["name"], record["doc"]


def _iter_package(found: Distribution) -> Iterator[tuple[str, str, str]]:
    for file in sorted(found.files or [], key=str):
        if file.suffix == ".py" and _is_public_path(file.parts):
            path = Path(str(found.locate_file(file)))
            module = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
            for name, doc in _read_docstrings(path, module):
                yield f"{found.metadata['Name']}:{file}", name, doc


def _is_public_path(parts: Sequence[str]) -> bool:
    names = [part.removesuffix(".py") for part in parts]
    return not any(
        name in ("test", "tests", "testing", "..") or (name.startswith("_") and name != "__init__")
        for name in names
    )


def _read_docstrings(path: Path, module: str) -> Iterator[tuple[str, str]]:
    """Yield `(dotted name, docstring)` of a source file; a file that cannot be parsed has none."""
    try:
        if path.stat().st_size > MAX_SOURCE:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    yield from _walk_definitions(tree, module)


def _walk_definitions(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    doc = ast.get_docstring(node, clean=False)
    if doc and len(doc := inspect.cleandoc(doc)) >= MIN_DOCSTRING and "\0" not in doc:
        yield name + _format_arguments(node), doc
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return  # what is defined within a function has no public name
    for child in node.body:
        is_definition = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        if is_definition and not child.name.startswith("_"):
            yield from _walk_definitions(child, f"{name}.{child.name}")


def _format_arguments(node: ast.AST) -> str:
    return f"({ast.unparse(node.args)})" if hasattr(node, "args") else ""
