"""Where data comes from: files, folders and Hub names -> rows, texts and conversations.

places    what a name means        streams   rows and documents, and samples of them
readers   one for a kind of file   shapes    rows -> conversations
"""

from firstwords.sources.places import HUB_NAMES, Place, find_place, read_license
from firstwords.sources.readers import RawRow, parse_raw
from firstwords.sources.shapes import SHAPES, find_shape, to_conversation
from firstwords.sources.streams import (
    SPLIT_DOCS,
    Document,
    Located,
    Sample,
    read_raw_rows,
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
    "RawRow",
    "Sample",
    "find_place",
    "find_shape",
    "parse_raw",
    "read_license",
    "read_raw_rows",
    "read_rows",
    "read_texts",
    "to_conversation",
]
