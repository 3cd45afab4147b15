"""Writing files whole or not at all."""

import json
import os
from pathlib import Path


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text under a temporary name beside `path`, then rename it: readers see all of it or none."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, values: object) -> None:
    """[`write_text`] of indented JSON."""
    write_text(path, json.dumps(values, indent=2) + "\n")
