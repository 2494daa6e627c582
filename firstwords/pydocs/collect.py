"""The installed Python -> what its standard library documents, as JSON lines on stdout.

    {"type": "object", "name": "shutil.copytree", "kind": "function", "inherited": false,
     "signature": "(src, dst, ...)", "doc": "Recursively copy a directory tree ..."}

Runs as a script in a fresh interpreter (`python -I -S collect.py`), so that importing some 300
modules leaves no trace in the caller, and what the caller has imported, patched or set in its
environment leaves none here. Invariant: the output depends on the Python installation alone.
"""

import builtins
import importlib
import inspect
import json
import os
import pkgutil
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator

# Modules that act when imported (print, open a browser, set up the terminal), the test suites and
# IDLE, and what other modules only implement (`os.path` is the public name of `posixpath`).
SKIPPED = frozenset(
    """
    antigravity distutils encodings ensurepip genericpath idlelib lib2to3 msilib nt ntpath
    nturl2path posix posixpath pydoc_data readline rlcompleter sre_compile sre_constants sre_parse
    test tests this tkinter turtle turtledemo winreg winsound
    """.split()  # noqa: SIM905
)

# Defaults that differ from run to run or from machine to machine: the address in `<function f at
# 0x7f..>`, a path, the order of a set, and `environ({...})`, which would even copy secrets.
_UNSTABLE = re.compile(r"""<|['"]/|\{""")


def list_modules() -> list[str]:
    """Return the dotted names of the public standard library modules, sorted; none is imported."""
    names = [name for name in sys.stdlib_module_names if _is_public(name)]
    return sorted(name for top in names for name in _walk(top)) + ["os.path"]


def _is_public(dotted: str) -> bool:
    return not any(part.startswith("_") or part in SKIPPED for part in dotted.split("."))


def _walk(package: str) -> Iterator[str]:
    yield package
    folder = os.path.join(sysconfig.get_path("stdlib"), *package.split("."))
    for found in pkgutil.iter_modules([folder], package + "."):
        if _is_public(found.name):
            yield from _walk(found.name)


def import_modules(names: Iterable[str]) -> dict[str, object]:
    """Import what can be imported on this platform; the rest is left out."""
    modules = {}
    for name in names:
        try:
            modules[name] = importlib.import_module(name)
        except (Exception, SystemExit):  # another platform's, or a C library is not there
            continue
    return modules


def list_public(module_name: str, module) -> Iterator[tuple[str, object]]:
    """Yield `(attribute, object)` for the functions and classes that a module calls its own."""
    stated = getattr(module, "__all__", None)
    for attribute in sorted(set(stated if stated is not None else vars(module))):
        value = getattr(module, attribute, None)
        if attribute.startswith("_") or not (inspect.isclass(value) or inspect.isroutine(value)):
            continue
        home = getattr(value, "__module__", None) or ""
        if stated is not None or home in (module_name, f"_{module_name}") or module is builtins:
            yield attribute, value


def name_objects(modules: dict[str, object]) -> dict[str, object]:
    """Give each public function and class one name, however many it has.

    The fewest dots win, then the name it calls itself, then the module it says it is from, then the
    shortest, then the alphabet: `json.JSONDecoder`, not `json.decoder.JSONDecoder`.
    """
    candidates: dict[int, list] = {}
    for module_name, module in modules.items():
        prefix = "" if module_name == "builtins" else module_name + "."
        for attribute, value in list_public(module_name, module):
            home = getattr(value, "__module__", None)
            called = attribute != getattr(value, "__name__", None)
            name = prefix + attribute
            rank = (name.count("."), called, home != module_name, len(name), name)
            candidates.setdefault(_identity(value), []).append((rank, name, value))
    best = (min(entries, key=lambda entry: entry[0]) for entries in candidates.values())
    return {name: value for _, name, value in sorted(best, key=lambda entry: entry[1])}


def _identity(value) -> int:
    """`random.randint` is a new bound method at each look; what it is bound to is not."""
    return id(getattr(value, "__func__", value))


def name_methods(class_name: str, class_object: type) -> Iterator[tuple[str, object]]:
    """Yield `(name, method)` for the public methods that a class defines itself."""
    for attribute in sorted(vars(class_object)):
        value = inspect.getattr_static(class_object, attribute)
        is_method = inspect.isroutine(value) or isinstance(value, (classmethod, staticmethod))
        if is_method and not attribute.startswith("_"):
            yield f"{class_name}.{attribute}", getattr(class_object, attribute)


def is_inherited(value, doc: str) -> bool:
    """Whether the docstring is only that of a base class."""
    return inspect.isclass(value) and any(base.__doc__ == doc for base in value.__mro__[1:])


def format_signature(value) -> str | None:
    """Return `str(inspect.signature(value))`, or None where there is none that stays the same."""
    try:
        signature = str(inspect.signature(value))
    except Exception:  # ValueError and TypeError by contract; odd objects raise others
        return None
    return None if _UNSTABLE.search(signature) else signature


def describe_object(name: str, value, kind: str) -> dict | None:
    """Return the record of one object, or None when it has no docstring."""
    doc = getattr(value, "__doc__", None)
    if not isinstance(doc, str) or not doc.strip():
        return None
    return {
        "type": "object",
        "name": name,
        "kind": kind,
        "signature": None if kind == "module" else format_signature(value),
        "doc": inspect.cleandoc(doc),
        "inherited": is_inherited(value, doc),
    }


def collect_objects(objects: dict[str, object]) -> Iterator[dict | None]:
    """Yield the records of all objects and of their methods, each object once, sorted by name."""
    methods: dict[str, object] = {}
    seen = {_identity(value) for value in objects.values()}
    for class_name, value in objects.items():
        if not inspect.isclass(value):
            continue
        for name, method in name_methods(class_name, value):
            if _identity(method) not in seen:
                seen.add(_identity(method))
                methods[name] = method
    for name, value in sorted({**objects, **methods}.items()):
        kind = "class" if inspect.isclass(value) else "function"
        yield describe_object(name, value, "method" if name in methods else kind)


def collect() -> Iterator[dict | None]:
    """Yield every record: objects, modules, what owners have, and the language's topics."""
    modules = import_modules(list_modules())
    objects = name_objects(modules)
    yield from collect_objects(objects)
    for name, module in modules.items():
        yield describe_object(name, module, "module")
    classes = {name: value for name, value in objects.items() if inspect.isclass(value)}
    for name, owner in (modules | classes).items():
        yield {"type": "owner", "name": name, "attributes": sorted(dir(owner))}
    topics = importlib.import_module("pydoc_data.topics").topics
    for name, doc in sorted(topics.items()):
        yield {"type": "topic", "name": name, "doc": doc.strip()}


def main() -> None:
    """Write the records to stdout; whatever an imported module prints goes nowhere."""
    out = os.fdopen(os.dup(1), "w", encoding="ascii")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    warnings.simplefilter("ignore")
    for record in collect():
        if record is not None:
            out.write(json.dumps(record) + "\n")
    out.flush()
    os._exit(0)  # no exit handler of any of the imported modules runs


if __name__ == "__main__":
    main()
