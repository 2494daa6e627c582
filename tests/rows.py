"""What the tests of data share: files with a row on each line. Needs no torch."""

import json


def write_jsonl(path, rows):
    """Write a file of rows and return its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_texts(path, texts):
    """Write a file of documents and return its path."""
    return write_jsonl(path, [{"text": text} for text in texts])


def read_jsonl(path):
    """Return the rows of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
