"""Time and memory of steps that take turns in one run, and their ratios to a reference step."""

import contextlib
import gc
import logging
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


try:
    import resource
except ImportError:  # not a Unix
    resource = None

logger = logging.getLogger(__name__)


class NotAvailableError(Exception):
    """What was asked for has no meaning, or can't run, at this configuration; the message is the reason."""


@dataclass(frozen=True)
class Step:
    """One thing to measure.

    Args:
        run (`Callable`): does the step once; what it returns is dropped.
        release (`Callable`, *optional*): frees what the last step left behind, such as gradients, so that the memory of
            the next step counts them.
        resident_bytes (`Callable`, *optional*): bytes of the tensors held between steps: inputs, parameters, the state
            of the optimizer, a cache.
        facts (`dict`, *optional*): what a reader of the result should know besides, e.g. the number of parameters.
    """

    run: Callable[[], object]
    release: Callable[[], None] = lambda: None
    resident_bytes: Callable[[], int] = lambda: 0
    facts: dict[str, object] = field(default_factory=dict)


def measure(
    builders: Mapping[str, Callable[[], Step]],
    reference: str,
    *,
    warm_up: int = 3,
    repeats: int = 10,
    max_step_seconds: float = 60.0,
    device: str = "cpu",
) -> dict[str, dict[str, object]]:
    """Measure steps turn by turn in one run.

    Args:
        builders (mapping of `str` to `Callable`): what makes the step of each name; it may raise `NotAvailableError`.
        reference (`str`): the name that the ratios refer to.
        warm_up (`int`): turns before the measured ones; before them each step has run three times for its memory.
        repeats (`int`): measured turns, at least 2.
        max_step_seconds (`float`): a step that takes longer, at its second call, is not measured.
        device (`str`): `"cpu"` or `"cuda"`.

    Returns:
        `dict`: for each name an entry with `status`. `"ok"`: `seconds` (`median`, `quartiles`, `samples` in the order of
        the turns), `ratio` of the medians to the reference and `paired_ratio`, the median of the ratios turn by turn
        (both `None` where the reference failed), `peak_bytes` and `largest_allocation_bytes` of [`peak_allocation`],
        `resident_bytes`, and the facts of the step. `"NA"` and `"FAIL"`: the `reason`.
    """
    steps: dict[str, Step] = {}
    entries: dict[str, dict[str, object]] = {}
    with memory_limit(device):
        for name, build in builders.items():
            with _recorded(entries, name):
                step = build()
                step.run()  # compiles and tunes
                elapsed = seconds_of(step.run, device)
                if elapsed > max_step_seconds:
                    raise NotAvailableError(f"a step took {elapsed:.1f} s, more than {max_step_seconds:g} s")
                peak, largest = peak_allocation(step, device)
                entries[name] = {
                    "status": "ok",
                    "peak_bytes": peak,
                    "largest_allocation_bytes": largest,
                    "resident_bytes": step.resident_bytes(),
                    **step.facts,
                }
                steps[name] = step
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(warm_up + repeats):
            for name in turn_order(list(steps), turn):
                with _recorded(entries, name):
                    elapsed = seconds_of(steps[name].run, device)
                    if turn >= warm_up:
                        seconds[name].append(elapsed)
                if entries[name]["status"] != "ok":
                    del steps[name]
    for name in steps:
        base = seconds[reference] if reference in steps else None
        entries[name].update(summary(seconds[name], base))
    return {name: entries[name] for name in builders}


@contextlib.contextmanager
def _recorded(entries: dict[str, dict[str, object]], name: str) -> Iterator[None]:
    """What goes wrong becomes the entry of `name`."""
    try:
        yield
        return
    except NotAvailableError as error:
        entries[name] = {"status": "NA", "reason": str(error)}
    except Exception as error:  # whatever a peer raises: the others are measured all the same
        message = str(error).strip().splitlines()
        entries[name] = {"status": "FAIL", "reason": ": ".join([type(error).__name__, *message[:1]])}
    logger.warning("%s: %s: %s", name, entries[name]["status"], entries[name]["reason"])
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def turn_order(names: Sequence[str], turn: int) -> list[str]:
    """The names in the order of a turn: each is first as often, and every other cycle goes backwards.

    A step leaves the caches to the next one as it likes, so that none should always follow the same other.
    """
    if not names:
        return []
    cycle, first = divmod(turn, len(names))
    order = [*names[first:], *names[:first]]
    return order[::-1] if cycle % 2 else order


def take_turns(
    runs: Mapping[str, Callable[[], object]], warm_up: int, repeats: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each step, `repeats` times in turns, after `warm_up` turns; what a step raises is raised."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warm_up + repeats):
        for name in turn_order(list(runs), turn):
            elapsed = seconds_of(runs[name], device)
            if turn >= warm_up:
                seconds[name].append(elapsed)
    return seconds


def seconds_of(run: Callable[[], object], device: str = "cpu") -> float:
    """Seconds of one call: wall clock on a CPU, CUDA events (which see launches that the GPU waits for) on a GPU."""
    if not device.startswith("cuda"):
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def summary(samples: Sequence[float], reference: Sequence[float] | None) -> dict[str, object]:
    """Median, quartiles and samples of seconds, and the two ratios to the samples of the reference, turn by turn."""
    median = statistics.median(samples)
    result: dict[str, object] = {
        "seconds": {
            "median": median,
            "quartiles": statistics.quantiles(samples, n=4)[::2],
            "samples": list(samples),
        },
        "ratio": None,
        "paired_ratio": None,
    }
    if reference is not None:
        result["ratio"] = median / statistics.median(reference)
        result["paired_ratio"] = statistics.median(paired_ratios(samples, reference))
    return result


def paired_ratios(samples: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Ratios turn by turn: what slows a whole turn down cancels."""
    return [a / b for a, b in zip(samples, reference, strict=True)]


def peak_allocation(step: Step, device: str = "cpu") -> tuple[int, int | None]:
    """Memory of one step: the peak of what it holds above the start, and its largest single allocation, in bytes.

    On a CPU PyTorch's profiler reports every allocation and every free of a tensor's memory, workspaces of PyTorch's own
    kernels included, and the running total is formed from them: exact, and the same on every machine with as many
    threads. What libraries such as oneDNN or BLAS allocate by themselves is not seen, nor is the allocator's slack. On a
    GPU it is what PyTorch's allocator counts, `torch.cuda.max_memory_allocated`, without the largest allocation (`None`).

    Tensors that are there when the step begins (inputs, parameters, optimizer state) do not count, and on a CPU freeing
    them is not seen; gradients do count: `step.release` frees those of the step before.
    """
    step.release()
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        step.run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - start, None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step.run()
    # The profiler's public tables attribute allocations to operators; only its raw events keep their order.
    events = profiler.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    changes.sort(key=lambda change: change[0])  # stable: events of the same nanosecond stay in their order
    total = peak = 0
    for _, change in changes:
        total += change
        peak = max(peak, total)
    return peak, max((change for _, change in changes), default=0)


@contextlib.contextmanager
def memory_limit(device: str = "cpu") -> Iterator[None]:
    """On a CPU: an allocation beyond the memory that is free raises an error, instead of the process being killed."""
    available = available_memory()
    if resource is None or available is None or device.startswith("cuda"):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + available
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def available_memory() -> int | None:
    """Bytes that this process may still take, of the machine and of its control group; `None` where unknown."""
    amounts = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                amounts.append(int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # without a limit the file reads "max"
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        used = int((group / "memory.current").read_text(encoding="ascii"))
        statistic = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        amounts.append(limit - used + int(statistic.get("inactive_file", 0)))  # file pages that can be dropped
    return min(amounts, default=None)
