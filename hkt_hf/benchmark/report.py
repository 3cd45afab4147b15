"""A benchmark's result for readers: tables, where HKT wins and where it loses, and a plot of time and memory against T."""

import itertools
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..files import replacing, write_text
from ..tables import format_duration, format_size, table
from .measurement import paired_ratios


_SIZE_NAMES = {
    "batch_heads": "B*H",
    "batch_size": "B",
    "width": "p",
    "hidden_size": "d",
    "num_attention_heads": "heads",
    "num_hidden_layers": "layers",
    "num_levels": "levels",
}


@dataclass(frozen=True)
class Group:
    """Rows that differ in their length alone, shortest first: one table, and one plot."""

    kind: str
    rows: list[dict[str, object]]

    @property
    def configuration(self) -> dict[str, object]:
        """What the rows share."""
        return {key: value for key, value in self.rows[0]["configuration"].items() if key != "length"}

    @property
    def title(self) -> str:
        """Mode, sizes, precision and device, in words."""
        shared = self.configuration
        sizes = [f"{name} {shared[key]}" for key, name in _SIZE_NAMES.items() if key in shared]
        flags = [word for key, word in (("is_causal", "causal"), ("padding", "padded")) if shared.get(key)]
        return ", ".join([shared["mode"].replace("_", " "), *sizes, *flags, shared["dtype"], shared["device"]])

    @property
    def lengths(self) -> list[int]:
        """The lengths of the rows."""
        return [row["configuration"]["length"] for row in self.rows]

    @property
    def names(self) -> list[str]:
        """All entries, in the order of their first row."""
        return list(dict.fromkeys(name for row in self.rows for name in row["entries"]))

    @property
    def reference(self) -> str:
        """The entry that the ratios refer to."""
        return self.rows[0]["reference"]

    @property
    def subjects(self) -> list[str]:
        """The entries that are HKT."""
        if self.kind == "operators":
            return [name for name in self.names if name != self.reference]
        return [name for name in self.names if name.partition(":")[0] == "hkt"]

    @property
    def peers(self) -> list[str]:
        """The entries that HKT is measured against."""
        return [name for name in self.names if name not in self.subjects]

    def measured(self, name: str) -> Iterator[tuple[int, dict[str, object]]]:
        """Length and entry of each row in which `name` was measured."""
        for row in self.rows:
            entry = row["entries"].get(name)
            if entry is not None and entry["status"] == "ok":
                yield row["configuration"]["length"], entry


def groups(result: dict[str, object]) -> list[Group]:
    """The groups of a result, in the order of their first rows."""
    by_key: dict[str, list[dict[str, object]]] = {}
    for row in result["rows"]:
        shared = {key: value for key, value in row["configuration"].items() if key != "length"}
        key = repr((shared, row["protocol"], row["made"]["machine"], row["made"]["processor"]))
        by_key.setdefault(key, []).append(row)
    return [
        Group(result["kind"], sorted(rows, key=lambda row: row["configuration"]["length"])) for rows in by_key.values()
    ]


@dataclass(frozen=True)
class Comparison:
    """One HKT entry against one peer over the lengths at which both were measured.

    Args:
        time_ratios, memory_ratios (`dict[int, float]`): length to the ratio of HKT to the peer: the median of the ratios
            turn by turn, and the ratio of what a step needs at its peak with what it holds between steps.
        faster, slower (`list[int]`): lengths at which three quarters of the turns, or more, agree; the others are even.
    """

    time_ratios: dict[int, float]
    memory_ratios: dict[int, float]
    faster: list[int]
    slower: list[int]

    @property
    def even(self) -> list[int]:
        """Lengths at which the turns do not agree."""
        return [length for length in self.time_ratios if length not in (*self.faster, *self.slower)]


def compare(group: Group, subject: str, peer: str) -> Comparison:
    """Time and memory of `subject` against `peer`, from the samples of the same turns."""
    others = dict(group.measured(peer))
    times, memories, faster, slower = {}, {}, [], []
    for length, entry in group.measured(subject):
        if length not in others:
            continue
        other = others[length]
        ratios = paired_ratios(entry["seconds"]["samples"], other["seconds"]["samples"])
        times[length] = statistics.median(ratios)
        memories[length] = total_bytes(entry) / total_bytes(other)
        low, high = statistics.quantiles(ratios, n=4)[::2]
        if high < 1:
            faster.append(length)
        elif low > 1:
            slower.append(length)
    return Comparison(times, memories, faster, slower)


def total_bytes(entry: dict[str, object]) -> int:
    """What a step needs at its peak together with what it holds between steps."""
    return entry["peak_bytes"] + entry["resident_bytes"]


def crossings(ratios: dict[int, float]) -> list[float]:
    """Lengths at which a ratio passes 1, interpolated between its neighbours on logarithmic axes."""
    points = sorted(ratios.items())
    found = []
    for (left, before), (right, after) in itertools.pairwise(points):
        a, b = math.log(before), math.log(after)
        if a * b < 0:
            found.append(math.exp(math.log(left) + (math.log(right) - math.log(left)) * a / (a - b)))
    return found


def markdown(result: dict[str, object]) -> str:
    """The whole report as Markdown: for each group tables of time and memory, reasons and notes, and who wins where."""
    lines = [f"# Benchmark: {result['kind']}", ""]
    commands = dict.fromkeys(row["made"]["command"] for row in result["rows"] if row["made"]["command"])
    if commands:
        lines += ["```bash", *commands, "```", ""]
    for group in groups(result):
        made, protocol = group.rows[0]["made"], group.rows[0]["protocol"]
        versions = ", ".join(f"{name} {made['versions'][name]}" for name in ("torch", "transformers"))
        hosts = made["machine"] if made["machine"] == made["processor"] else f"{made['machine']}, {made['processor']}"
        lines += [
            f"## {group.title[:1].upper()}{group.title[1:]}",
            "",
            f"{hosts}, {protocol['threads']} threads, {versions}. Medians of {protocol['repeats']} turns in one run.",
            "",
            "Time of a step, and its ratio to flat:",
            "",
            *_time_table(group),
            "",
            "Memory: peak of a step with what stays between steps (inputs, parameters, optimizer, cache), and its ratio:",
            "",
            *_memory_table(group),
            "",
            *_allocation_table(group),
            *_remarks(group),
            *_comparison_table(group),
        ]
    return "\n".join(lines).rstrip() + "\n"


def _time_table(group: Group) -> list[str]:
    def cell(row, name: str) -> str:
        entry = row["entries"].get(name)
        if entry is None or entry["status"] != "ok":
            return "" if entry is None else entry["status"]
        seconds = format_duration(entry["seconds"]["median"])
        return seconds if entry["ratio"] is None or name == row["reference"] else f"{entry['ratio']:.2f}x, {seconds}"

    return _by_length(group, cell)


def _memory_table(group: Group) -> list[str]:
    def cell(row, name: str) -> str:
        entry = row["entries"].get(name)
        if entry is None or entry["status"] != "ok":
            return "" if entry is None else entry["status"]
        size = format_size(total_bytes(entry))
        base = row["entries"].get(row["reference"])
        if name == row["reference"] or base is None or base["status"] != "ok":
            return size
        return f"{total_bytes(entry) / total_bytes(base):.2f}x, {size}"

    return _by_length(group, cell)


def _allocation_table(group: Group) -> list[str]:
    """A `T x T` matrix shows in the largest allocation."""

    def cell(row, name: str) -> str:
        size = row["entries"].get(name, {}).get("largest_allocation_bytes")
        return "" if size is None else format_size(size)

    if not any(cell(row, name) for row in group.rows for name in group.names):
        return []
    return ["Largest single allocation of a step:", "", *_by_length(group, cell), ""]


def _by_length(group: Group, cell) -> list[str]:
    rows = [
        [f"{length:,}", *(cell(row, name) for name in group.names)]
        for length, row in zip(group.lengths, group.rows, strict=True)
    ]
    return table(["T", *group.names], rows)


def _remarks(group: Group) -> list[str]:
    """Why something was not measured, and what is special about an entry: each once, with its lengths."""
    reasons: dict[tuple[str, str, str], list[int]] = {}
    notes: dict[tuple[str, str], None] = {}
    for length, row in zip(group.lengths, group.rows, strict=True):
        for name, entry in row["entries"].items():
            if entry["status"] != "ok":
                reasons.setdefault((name, entry["status"], entry["reason"]), []).append(length)
            elif "note" in entry:
                notes[name, entry["note"]] = None
    lines = [
        f"- {name}: {status} at T = {_join(lengths)}: {reason}" for (name, status, reason), lengths in reasons.items()
    ]
    lines += [f"- {name}: {note}" for name, note in notes]
    return [*lines, ""] if lines else []


def _comparison_table(group: Group) -> list[str]:
    rows = []
    for subject in group.subjects:
        for peer in group.peers:
            comparison = compare(group, subject, peer)
            if not comparison.time_ratios:
                continue
            longest = max(comparison.time_ratios)
            rows.append(
                [
                    subject,
                    peer,
                    _join(comparison.faster),
                    _join(comparison.even),
                    _join(comparison.slower),
                    _join(_round(length) for length in crossings(comparison.time_ratios)),
                    f"{comparison.time_ratios[longest]:.2f}x at {longest:,}",
                    _join(length for length, ratio in comparison.memory_ratios.items() if ratio < 1),
                    f"{comparison.memory_ratios[longest]:.2f}x at {longest:,}",
                ]
            )
    if not rows:
        return []
    what = "/".join(sorted({"HSA" if row[0].startswith("hsa") else "HKT" for row in rows}))
    header = [
        what,
        "against",
        "faster at T",
        "even at T",
        "slower at T",
        "times cross near T",
        "time",
        "less memory at T",
        "memory",
    ]
    return [
        f"Where {what} wins and where it loses (faster or slower: at least three quarters of the turns say so):",
        "",
        *table(header, rows),
        "",
    ]


def _join(lengths) -> str:
    return "; ".join(f"{length:,}" for length in lengths) or "none"


def _round(length: float) -> int:
    """Two significant digits: more would claim a precision that an interpolation does not have."""
    unit = 10 ** max(math.floor(math.log10(length)) - 1, 0)
    return round(length / unit) * unit


def plot(group: Group, path: str | Path) -> None:
    """Draw time and memory of a step against T, on logarithmic axes with a line for each entry, into a PNG file.

    Bands are the quartiles of the time.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator

    figure, (times, memories) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    colours = iter([*plt.get_cmap("tab10").colors, *plt.get_cmap("Dark2").colors])
    for name in group.names:
        measured = list(group.measured(name))
        if not measured:
            continue
        is_reference, is_subject = name == group.reference, name in group.subjects
        style = {
            "color": "black" if is_reference else next(colours, None),
            "linewidth": 2.4 if is_reference or is_subject else 1.4,
            # What `auto` chose has the same values: both lines are seen.
            "linestyle": ":" if name == "auto" else "-" if is_reference or is_subject else "--",
            "marker": "o" if is_subject else "s" if is_reference else ".",
            "markersize": 5,
            "zorder": 3 if is_reference or is_subject else 2,
        }
        lengths = [length for length, _ in measured]
        times.plot(lengths, [entry["seconds"]["median"] for _, entry in measured], label=name, **style)
        low, high = zip(*(entry["seconds"]["quartiles"] for _, entry in measured), strict=True)
        times.fill_between(lengths, low, high, color=style["color"], alpha=0.15, linewidth=0)
        memories.plot(lengths, [total_bytes(entry) for _, entry in measured], **style)
    for axes, label, formatter, ticks in (
        (times, "time of a step", format_duration, LogLocator(10, subs=(1, 2, 5))),
        (memories, "memory of a step", format_size, LogLocator(2)),
    ):
        axes.set(xscale="log", yscale="log", xlabel="length T", ylabel=label)
        axes.set_xticks(group.lengths, [f"{length:,}" for length in group.lengths])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(ticks)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _, formatter=formatter: formatter(value)))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(group.title)
    figure.legend(loc="outside right center", frameon=False)
    try:
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=120, format="png")
    finally:
        plt.close(figure)


def write_report(result: dict[str, object], output: str | Path) -> list[Path]:
    """Write the tables (`.md`) and one plot a group (`.png`) beside the JSON file `output`; returns their paths.

    Raises:
        ImportError: matplotlib is not installed; the tables are written all the same.
    """
    output = Path(output)
    tables = output.with_suffix(".md")
    write_text(tables, markdown(result))
    paths, parts = [tables], groups(result)
    for group in parts:
        suffix = "" if len(parts) == 1 else "_" + _slug(group, parts)
        paths.append(output.with_name(f"{output.stem}{suffix}.png"))
        plot(group, paths[-1])
    return paths


def _slug(group: Group, parts: list[Group]) -> str:
    """What tells a group from the others, for a file name."""
    differing = [
        key
        for key, value in group.configuration.items()
        if any(part.configuration.get(key) != value for part in parts)
    ]
    words = [
        str(group.configuration[key]) if key == "mode" else f"{key}-{group.configuration[key]}" for key in differing
    ]
    same = [part for part in parts if part.configuration == group.configuration]
    if len(same) > 1:  # another machine, number of threads or protocol
        words.append(str(same.index(group) + 1))
    return "_".join(words)
