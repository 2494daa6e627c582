"""Where data comes from: files, folders and Hub names -> rows, texts and conversations.

places    what a name means            streams   rows, and samples of them
readers   one for a kind of file       texts     documents, and slices of files
archives  what is compressed           shapes    rows -> conversations
blocks    bytes -> slices, lines, pieces
"""

from firstwords.sources.archives import is_compressed
from firstwords.sources.places import HUB_NAMES, Place, find_place, read_license
from firstwords.sources.readers import RawRow, parse_raw
from firstwords.sources.shapes import SHAPES, find_shape, to_conversation
from firstwords.sources.streams import EVERYTHING, Located, Sample, read_raw_rows, read_rows
from firstwords.sources.texts import (
    SPLIT_DOCS,
    Document,
    TextSlice,
    cut_text,
    iter_text_slices,
    read_place,
    read_texts,
)

__all__ = [
    "EVERYTHING",
    "HUB_NAMES",
    "SHAPES",
    "SPLIT_DOCS",
    "Document",
    "Located",
    "Place",
    "RawRow",
    "Sample",
    "TextSlice",
    "cut_text",
    "find_place",
    "find_shape",
    "is_compressed",
    "iter_text_slices",
    "parse_raw",
    "read_license",
    "read_place",
    "read_raw_rows",
    "read_rows",
    "read_texts",
    "to_conversation",
]
