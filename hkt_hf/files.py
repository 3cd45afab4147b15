"""Writing files whole or not at all."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to in the block: readers see all of it or none.

    It gets the name `path` at the end of the block; after an error what was written is removed and `path` stays as it
    was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text, all of it or none ([`replacing`])."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, values: object) -> None:
    """[`write_text`] of indented JSON."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_record(path: str | Path, values: Mapping[str, object]) -> None:
    """[`write_text`] of a JSON object with one line a key, for values of many numbers."""
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in values.items()]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")
