"""Tables in GitHub's Markdown, and numbers for people."""

import re
from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table; cells must hold no line break, and `|` only as `escape` writes it."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def escape(text: str, longest: int = 160) -> str:
    """Any text as one line that Markdown shows as it is; cut after `longest` characters."""
    text = " ".join(text.split())
    text = text if len(text) <= longest else f"{text[: longest - 3]}..."
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", text)


def format_duration(seconds: float) -> str:
    """Seconds to three digits, below one second in milliseconds."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def format_size(size: float) -> str:
    """Bytes to three digits, in MiB or GiB."""
    return f"{size / 2**30:.3g} GiB" if size >= 2**30 else f"{size / 2**20:.3g} MiB"
