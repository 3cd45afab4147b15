"""One HTML file with the attention maps of a sequence, to look through by layer, head and level; it needs no network."""

import base64
import html
import json
from importlib import resources
from pathlib import Path

import numpy as np

from ..files import write_text
from .maps import AttentionMaps


def write_page(maps: AttentionMaps, path: str | Path, title: str) -> None:
    """Write the page.

    Weights are kept in 256 steps of the largest one of each map; a page has about `1.4 * layers * heads * (L + 1) * T^2` bytes.

    Args:
        maps ([`~hkt_hf.analysis.maps.AttentionMaps`]): what to show.
        path (`str` or `Path`): the file; one that is there is replaced.
        title (`str`): heading of the page.
    """
    layers, _, heads, length, _ = maps.weights.shape
    flat = maps.weights.reshape(-1, length, length)
    largest = flat.max((1, 2))
    steps = np.rint(255 * flat / np.maximum(largest, 1e-300)[:, None, None]).astype(np.uint8)
    positions = np.arange(length)
    distance = (flat * np.abs(positions[:, None] - positions)).sum(-1).mean(-1)
    logarithms = np.log(flat, where=flat > 0, out=np.zeros_like(flat))
    data = {
        "tokens": list(maps.tokens),
        "levels": maps.level_names,
        "layers": layers,
        "heads": heads,
        "weights": base64.b64encode(steps.tobytes()).decode("ascii"),
        "largest": _rounded(largest),
        "entropy": _rounded(-(flat * logarithms).sum(-1).mean(-1)),
        "distance": _rounded(distance),
        "level_weights": np.round(maps.level_weights, 4).tolist(),
    }
    # "<" is written so that no token can end the script element.
    values = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    before, after = template.replace("__TITLE__", html.escape(title)).split("__DATA__")
    write_text(path, before + values + after)


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in values]
