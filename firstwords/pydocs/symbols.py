"""The documentation records of the installed Python -> symbols with a one-sentence summary.

    Symbol("math.sqrt", "Return the square root of x.", "(x, /)", "function")

Invariant: a summary is one line and stands word for word in the docstring (white space apart).
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path

from firstwords.errors import MissingInput

MIN_SYMBOLS = 1400  # what the project promises; fewer means a Python without its docstrings
SUMMARY_LENGTHS = range(12, 91)  # characters
SIGNATURE_LENGTH = 60  # characters

# What the embedded corpus asks about: what people use, and as much as a small model can hold.
TAUGHT_MODULES = frozenset(
    """
    abc argparse asyncio atexit base64 bisect builtins bz2 calendar collections collections.abc
    concurrent.futures configparser contextlib copy csv dataclasses datetime decimal email enum
    fnmatch fractions functools getpass glob gzip hashlib heapq hmac html http http.client
    http.server importlib inspect io itertools json keyword logging math operator os os.path
    pathlib pickle platform queue random re secrets select shlex shutil signal socket sqlite3
    statistics string struct subprocess sys tarfile tempfile textwrap threading time timeit
    tomllib traceback types typing unittest urllib.error urllib.parse urllib.request uuid
    warnings weakref zipfile zlib zoneinfo
    """.split()  # noqa: SIM905
)
# Of these the methods are asked about too.
TAUGHT_CLASSES = frozenset(
    """
    argparse.ArgumentParser bytes collections.Counter collections.OrderedDict collections.deque
    complex datetime.date datetime.datetime datetime.timedelta dict float fractions.Fraction
    frozenset int list logging.Logger pathlib.Path pathlib.PurePath property range set slice str
    threading.Thread tuple type zipfile.ZipFile
    """.split()  # noqa: SIM905
)

_SENTENCE_END = re.compile(r"(?<![.])[.!?](?=\s|$)")
_ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|etc|vs|cf|resp|approx|incl)\.$")
# `D.clear() -> None.  Remove all items from D.`
_PROSE_AFTER_ARROW = re.compile(r"\)\s+-+>?\s+(?:None\.\s+)?([A-Z]\w* .*\.)$")
_BOILERPLATE = frozenset(["An enumeration."])  # what `enum` writes where the author wrote nothing
_MARKUP = re.compile(r">>>|::|->|https?:|\||\[,")


@dataclass(frozen=True, slots=True)
class Symbol:
    """A documented name; `kind` is `class`, `function`, `method` or `module`."""

    name: str
    summary: str
    signature: str | None
    kind: str


@cache
def read_records() -> tuple[dict, ...]:
    """Read the records of `collect.py` from a fresh interpreter (about a second, once a process).

    Raises:
        MissingInput: when this Python cannot start itself or has no documentation.
    """
    script = Path(__file__).with_name("collect.py")
    command = [sys.executable, "-I", "-S", "-B", str(script)]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip()
        reason = said.splitlines()[-1] if said else str(error)
        raise MissingInput(
            f"pydocs: cannot read the documentation of {sys.executable!r}: {reason};"
            " use a Python 3.11 to 3.13 with its standard library"
        ) from error
    return tuple(json.loads(line) for line in done.stdout.splitlines())


def read_objects() -> Iterator[dict]:
    """Yield the records of what is documented: first functions, classes and methods, by name."""
    return (record for record in read_records() if record["type"] == "object")


@cache
def list_symbols() -> tuple[Symbol, ...]:
    """Return the symbols that have a usable summary, each object once, sorted by name.

    Raises:
        MissingInput: when this Python has fewer than `MIN_SYMBOLS`.
    """
    parsed = (parse_symbol(record) for record in read_objects())
    symbols = sorted((s for s in parsed if s is not None), key=lambda symbol: symbol.name)
    if len(symbols) < MIN_SYMBOLS:
        raise MissingInput(
            f"pydocs: {sys.executable!r} documents only {len(symbols)} names, not {MIN_SYMBOLS};"
            " use a Python 3.11 to 3.13 that was built with its docstrings"
        )
    return tuple(symbols)


@cache
def list_attributes() -> dict[str, frozenset[str]]:
    """Return what every public module and class of the standard library has, by its name."""
    owners = (record for record in read_records() if record["type"] == "owner")
    return {record["name"]: frozenset(record["attributes"]) for record in owners}


def parse_symbol(record: dict) -> Symbol | None:
    """Return the symbol of a record, or None when its docstring gives no summary."""
    if record["inherited"] or not _is_taught(record):
        return None
    summary = parse_summary(record["doc"], record["name"].rpartition(".")[2])
    if summary is None:
        return None
    return Symbol(record["name"], summary, parse_signature(record["signature"]), record["kind"])


def _is_taught(record: dict) -> bool:
    if record["kind"] == "module":
        return record["name"] in TAUGHT_MODULES
    owner = record["name"].rpartition(".")[0] or "builtins"
    return owner in (TAUGHT_CLASSES if record["kind"] == "method" else TAUGHT_MODULES)


def parse_signature(signature: str | None) -> str | None:
    """Return the signature if it is short enough to be an answer, else None."""
    return signature if signature and len(signature) <= SIGNATURE_LENGTH else None


def parse_summary(doc: str, attribute: str) -> str | None:
    """Return the first sentence of a docstring's prose, or None when there is no clean one.

    The signature lines that C docstrings begin with are passed over, up to a sentence after their
    arrow; then the first paragraph counts. A sentence ends at a full stop before white space or
    the paragraph's end. A paragraph without one counts when it is one line that does not break
    off. Refused are: sentences outside `SUMMARY_LENGTHS`, those that do not begin with a letter or
    a quoted word, that hold markup or a signature, or that open a bracket or a quote which they do
    not close.
    """
    paragraph = _first_paragraph(doc, attribute)
    sentence = _first_sentence(" ".join(paragraph.split()), paragraph.count("\n") == 0)
    if sentence in _BOILERPLATE or len(sentence) not in SUMMARY_LENGTHS:
        return None
    if not re.match(r"[A-Za-z`'\"*]", sentence) or not sentence.isprintable():
        return None
    if _MARKUP.search(sentence) or not _is_balanced(sentence):
        return None
    return sentence


def _first_paragraph(doc: str, attribute: str) -> str:
    lines = doc.splitlines()
    is_signature = re.compile(rf"(?:\w+\.)*{re.escape(attribute)}\s?\(")
    place = 0
    while place < len(lines) and is_signature.match(lines[place]):
        if prose := _PROSE_AFTER_ARROW.search(lines[place]):
            lines[place] = prose[1]
            break
        place += 1
        while place < len(lines) and lines[place][:1].isspace():  # it goes on, indented
            place += 1
    return "\n".join(lines[place:]).strip().split("\n\n")[0]


def _first_sentence(prose: str, one_line: bool) -> str:
    for end in _SENTENCE_END.finditer(prose):
        sentence = prose[: end.end()]
        if sentence == prose or not _ABBREVIATION.search(sentence):
            return sentence
    return prose if one_line and re.search(r"[\w)\]`'\"]$", prose) else ""


def stable_hash(text: str) -> int:
    """Hash a text to 64 bits, the same in every process (`hash` is salted by PYTHONHASHSEED)."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


def _is_balanced(sentence: str) -> bool:
    pairs = ("()", "[]", "{}")
    brackets = all(sentence.count(left) == sentence.count(right) for left, right in pairs)
    return brackets and sentence.count('"') % 2 == 0 and sentence.count("`") % 2 == 0
