"""The installed Python -> the embedded corpus: text for stage A, conversations for stage B.

    list_symbols()      Symbol("math.sqrt", "Return the square root of x.", "(x, /)", "function")
    iter_documents()    ("python:shutil.copytree", "shutil.copytree(src, dst, ...)\\n\\nRecur...")
    build_questions()   user: What does `math.sqrt` do?   assistant: Return the square root of x.

`collect` runs in a fresh interpreter and reads the documentation, `symbols` makes one-sentence
summaries, `invented` names that do not exist, `text` and `questions` the two corpora. Invariant:
everything is a function of the Python installation and the seed.
"""

from firstwords.pydocs.invented import INVENTED_KINDS, invented_names, is_real
from firstwords.pydocs.questions import (
    FOLLOW_UPS,
    GREETING_ANSWER,
    PHRASINGS,
    UNKNOWN_ANSWER,
    FollowUp,
    HeldOut,
    Question,
    Questions,
    Unknown,
    build_held_out,
    build_questions,
)
from firstwords.pydocs.symbols import Symbol, list_symbols
from firstwords.pydocs.text import iter_documents, list_packages

__all__ = [
    "FOLLOW_UPS",
    "GREETING_ANSWER",
    "INVENTED_KINDS",
    "PHRASINGS",
    "UNKNOWN_ANSWER",
    "FollowUp",
    "HeldOut",
    "Question",
    "Questions",
    "Symbol",
    "Unknown",
    "build_held_out",
    "build_questions",
    "invented_names",
    "is_real",
    "iter_documents",
    "list_packages",
    "list_symbols",
]
