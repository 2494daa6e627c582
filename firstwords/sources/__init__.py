"""Where data comes from: files, folders and Hub names -> rows, texts and conversations.

places    what a name means        streams   rows and documents, and samples of them
readers   one for a kind of file   shapes    rows -> conversations
"""

from firstwords.sources.places import HUB_NAMES, Place, find_place
from firstwords.sources.shapes import SHAPES, find_shape, to_conversation
from firstwords.sources.streams import (
    SPLIT_DOCS,
    Document,
    Located,
    Sample,
    read_rows,
    read_texts,
)

__all__ = [
    "HUB_NAMES",
    "SHAPES",
    "SPLIT_DOCS",
    "Document",
    "Located",
    "Place",
    "Sample",
    "find_place",
    "find_shape",
    "read_rows",
    "read_texts",
    "to_conversation",
]
