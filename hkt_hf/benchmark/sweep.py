"""A sweep over configurations, each measured in one run and written at once; the same sweep again goes on from there."""

import dataclasses
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from tqdm.auto import tqdm

from ..environment import PACKAGES, environment, processor
from ..files import write_json
from ..presets import preset
from .measurement import Step, measure
from .registry import (
    MODEL_MODES,
    NOT_RECORDED,
    OPERATOR_MODES,
    PEERS,
    REFERENCE,
    ModelSizes,
    OperatorSizes,
    check_model_name,
    model_names,
    model_step,
    model_unavailable,
    operator_names,
    operator_step,
    operator_unavailable,
)


logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16", "float64")
_MEASURED_PACKAGES = (
    *PACKAGES,
    "triton",
    "mambapy",
    "mamba-ssm",
    "causal-conv1d",
    *[peer.package for peer in PEERS.values() if peer.package],
)


@dataclass(frozen=True)
class OperatorSweep:
    """Backends of the operator over modes, lengths and head widths.

    Args:
        names (sequence of `str`, *optional*): of [`operator_names`]; all by default. The reference always takes part.
        modes (sequence of `str`): of `OPERATOR_MODES`.
        lengths, widths (sequences of `int`): `T` and the head width `p`.
        batch_heads, batch_size (`int`): `B * H`, and the `B` of it.
        num_levels (`int`): `L`.
        is_causal (`bool`): a query sees no later key.
        padding (`bool`): sequences of different lengths, padded on the right.
        dtype, device (`str`): one of `DTYPES`; `"cpu"` or `"cuda"`.

    Raises:
        ValueError: a value that can't be measured; the message names the argument, its value and what would be right.
    """

    names: Sequence[str] | None = None
    modes: Sequence[str] = OPERATOR_MODES
    lengths: Sequence[int] = (512, 1024, 2048, 4096)
    widths: Sequence[int] = (64,)
    batch_heads: int = 8
    batch_size: int = 1
    num_levels: int = 3
    is_causal: bool = False
    padding: bool = False
    dtype: str = "float32"
    device: str = "cpu"

    kind: ClassVar[str] = "operators"

    def __post_init__(self):
        _check_common(self, OPERATOR_MODES)
        _check_positive("widths", self.widths)
        _check_positive("batch_heads", [self.batch_heads])
        if self.batch_heads % self.batch_size:
            raise ValueError(
                f"`batch_heads` must be a multiple of `batch_size` ({self.batch_size}), got {self.batch_heads}"
            )
        for name in self.names or ():
            if name not in operator_names():
                raise ValueError(f"`operators` must be among {operator_names()}, got {name!r}")
            _check_available("operators", name, operator_unavailable(name, self.device))

    @property
    def entries(self) -> list[str]:
        """What is measured, the reference first."""
        return _with_reference(operator_names() if self.names is None else self.names)

    def configurations(self) -> Iterator[dict[str, object]]:
        """One dictionary a row: the mode and the fields of [`OperatorSizes`]."""
        for width, mode, length in itertools.product(self.widths, self.modes, sorted(self.lengths)):
            sizes = OperatorSizes(
                length,
                width,
                self.batch_heads,
                self.batch_size,
                self.num_levels,
                self.is_causal,
                self.padding,
                self.dtype,
                self.device,
            )
            yield {"mode": mode, **dataclasses.asdict(sizes)}

    def step(self, name: str, configuration: dict[str, object], steps: int) -> Step:
        """The step of an entry; `steps` is how often it will run at most."""
        sizes = {key: value for key, value in configuration.items() if key != "mode"}
        return operator_step(name, configuration["mode"], OperatorSizes(**sizes))


@dataclass(frozen=True)
class ModelSweep:
    """HKT, its flat twin and peers of the same size over modes and lengths.

    Args:
        names (sequence of `str`, *optional*): of [`model_names`], or `"hkt:ATTN_IMPLEMENTATION"`; all by default. The
            reference always takes part.
        modes (sequence of `str`): of `MODEL_MODES`.
        lengths (sequence of `int`): `T`.
        batch_size (`int`): sequences.
        preset (`str`): a packaged model size, which the next fields change.
        width, num_heads, num_layers, intermediate_size, num_levels (`int`, *optional*): those of the preset by default;
            a `width` alone keeps the ratio of the feed-forward width to it.
        padding (`bool`): sequences of different lengths, padded on the right, with an attention mask.
        dtype, device (`str`): one of `DTYPES`, of parameters and all; `"cpu"` or `"cuda"`.

    Raises:
        ValueError: a value that can't be measured; the message names the argument, its value and what would be right.
        FileNotFoundError: an unknown preset (the message lists the known ones).
    """

    names: Sequence[str] | None = None
    modes: Sequence[str] = ("forward", "train_step")
    lengths: Sequence[int] = (512, 1024, 2048, 4096)
    batch_size: int = 1
    preset: str = "hkt-small"
    width: int | None = None
    num_heads: int | None = None
    num_layers: int | None = None
    intermediate_size: int | None = None
    num_levels: int | None = None
    padding: bool = False
    dtype: str = "float32"
    device: str = "cpu"

    kind: ClassVar[str] = "models"

    def __post_init__(self):
        base = preset(self.preset)
        width = base.hidden_size if self.width is None else self.width
        values = {
            "width": width,
            "num_heads": base.num_attention_heads,
            "num_layers": base.num_hidden_layers,
            "intermediate_size": base.intermediate_size * width // base.hidden_size,
            "num_levels": base.num_levels,
        }
        for name, value in values.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
            _check_positive(name, [getattr(self, name)])
        if self.width % (2 * self.num_heads):
            raise ValueError(
                f"`width` must be a multiple of 2 * `num_heads` = {2 * self.num_heads} (rotary positions need an even "
                f"head width), got {self.width}"
            )
        _check_common(self, MODEL_MODES)
        if self.padding and "decode_step" in self.modes:
            raise ValueError("`padding` is for encoders: leave it out, or 'decode_step' out of `modes`")
        for name in self.names or ():
            check_model_name(name)
            _check_available("models", name, model_unavailable(name))

    @property
    def entries(self) -> list[str]:
        """What is measured, the reference first."""
        return _with_reference(model_names() if self.names is None else self.names)

    def configurations(self) -> Iterator[dict[str, object]]:
        """One dictionary a row: the mode and the fields of [`ModelSizes`]."""
        for mode, length in itertools.product(self.modes, sorted(self.lengths)):
            sizes = ModelSizes(
                length=length,
                batch_size=self.batch_size,
                hidden_size=self.width,
                num_attention_heads=self.num_heads,
                num_hidden_layers=self.num_layers,
                intermediate_size=self.intermediate_size,
                num_levels=self.num_levels,
                padding=self.padding,
                dtype=self.dtype,
                device=self.device,
            )
            fields = dataclasses.asdict(sizes)
            yield {"mode": mode, **{name: value for name, value in fields.items() if name not in NOT_RECORDED}}

    def step(self, name: str, configuration: dict[str, object], steps: int) -> Step:
        """The step of an entry; `steps` is how often it will run at most."""
        sizes = {key: value for key, value in configuration.items() if key != "mode"}
        new_tokens = steps if configuration["mode"] == "decode_step" else 0
        return model_step(name, configuration["mode"], ModelSizes(**sizes, num_new_tokens=new_tokens))


@dataclass(frozen=True)
class Protocol:
    """How a configuration is measured; see [`measure`].

    Raises:
        ValueError: fewer than 2 repeats, a negative warm-up, a limit that is not positive.
    """

    warm_up: int = 3
    repeats: int = 10
    max_step_seconds: float = 60.0

    def __post_init__(self):
        if self.repeats < 2:
            raise ValueError(f"`repeats` must be at least 2 (quartiles need two samples), got {self.repeats}")
        if self.warm_up < 0:
            raise ValueError(f"`warm_up` must be at least 0, got {self.warm_up}")
        if self.max_step_seconds <= 0:
            raise ValueError(f"`max_step_seconds` must be positive, got {self.max_step_seconds}")


def run_sweep(
    sweep: OperatorSweep | ModelSweep,
    output: str | Path,
    protocol: Protocol | None = None,
    *,
    fresh: bool = False,
    command: str | None = None,
    on_row: Callable[[dict[str, object]], None] | None = None,
) -> dict[str, object]:
    """Measure every configuration that `output` does not hold yet, and write the file after each.

    A row is taken as it is when the file has it with the same configuration, protocol, threads, versions and machine,
    and with all entries that are asked for. The commit is recorded with each row, but a new one measures nothing anew:
    `fresh=True` does. Where a row is measured, the entries that it has besides those asked for are measured again, so that
    all of a row stand in one run and none is lost. Other rows of the file stay.

    Args:
        sweep ([`OperatorSweep`] or [`ModelSweep`]): what to measure.
        output (`str` or `Path`): the JSON file.
        protocol ([`Protocol`], *optional*): warm-up, repeats and limit.
        fresh (`bool`, *optional*, defaults to `False`): measure all configurations anew.
        command (`str`, *optional*): what a reader would type to do the same.
        on_row (`Callable`, *optional*): called with the result whenever it was written.

    Returns:
        `dict`: what the file holds: `kind`, `rows`, and of the last run `command`, versions, machine and commit. A row has `configuration`,
        `protocol`, `reference`, `entries` as in [`measure`], and `made`: versions, machine, processor, commit and command.

    Raises:
        ValueError: `output` is a file of something else.
    """
    protocol = protocol or Protocol()
    output = Path(output)
    rows = _read_rows(output, sweep.kind)
    here = environment(_MEASURED_PACKAGES)
    made = {**here, "processor": processor(), "command": command}
    settings = {**dataclasses.asdict(protocol), "threads": torch.get_num_threads()}
    output.parent.mkdir(parents=True, exist_ok=True)
    result = {"kind": sweep.kind, "rows": rows, "command": command, **here}
    bar = tqdm(list(sweep.configurations()), desc=sweep.kind, unit="row")
    for configuration in bar:
        bar.set_postfix_str(f"{configuration['mode']}, T = {configuration['length']}")
        index = next(
            (i for i, row in enumerate(rows) if _identity(row) == (configuration, settings, _host(made))), None
        )
        old = None if index is None else rows[index]
        names = sweep.entries
        if old is not None and not fresh and old["made"]["versions"] == made["versions"]:
            if set(names) <= set(old["entries"]):
                if old["made"]["commit"] != made["commit"]:
                    logger.info("kept from commit %s: %s", old["made"]["commit"], configuration)
                continue
        if old is not None:
            names = [*names, *(name for name in old["entries"] if name not in names)]
        # The first call, the second, the one for memory, and the turns.
        steps = 3 + protocol.warm_up + protocol.repeats
        entries = measure(
            {name: _Builder(sweep, name, configuration, steps) for name in names},
            REFERENCE,
            warm_up=protocol.warm_up,
            repeats=protocol.repeats,
            max_step_seconds=protocol.max_step_seconds,
            device=configuration["device"],
        )
        row = {
            "configuration": configuration,
            "protocol": settings,
            "reference": REFERENCE,
            "entries": entries,
            "made": made,
        }
        if index is None:
            rows.append(row)
        else:
            rows[index] = row
        write_json(output, result)
        if on_row is not None:
            on_row(result)
    return result


@dataclass(frozen=True)
class _Builder:
    sweep: OperatorSweep | ModelSweep
    name: str
    configuration: dict[str, object]
    steps: int

    def __call__(self) -> Step:
        return self.sweep.step(self.name, self.configuration, self.steps)


def read_result(path: str | Path) -> dict[str, object]:
    """What [`run_sweep`] wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of something else.
    """
    path = Path(path)
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        kind, rows = result["kind"], result["rows"]
    except (ValueError, KeyError, TypeError):
        kind = rows = None
    if kind not in (OperatorSweep.kind, ModelSweep.kind) or not isinstance(rows, list):
        raise ValueError(f"{path} is no result of `hkt benchmark operators` or `hkt benchmark models`")
    return result


def _read_rows(output: Path, kind: str) -> list[dict[str, object]]:
    if not output.exists():
        return []
    result = read_result(output)
    if result["kind"] != kind:
        raise ValueError(f"`output` {output} holds {result['kind']}, not {kind}: name another file")
    return result["rows"]


def _identity(row: dict[str, object]) -> tuple:
    return row["configuration"], row["protocol"], _host(row["made"])


def _host(made: dict[str, object]) -> tuple[object, object]:
    return made["machine"], made["processor"]


def _with_reference(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys([REFERENCE, *names]))


def _check_common(sweep: OperatorSweep | ModelSweep, modes: Sequence[str]) -> None:
    if not sweep.modes:
        raise ValueError(f"`modes` must hold at least one of {list(modes)}, got none")
    for mode in sweep.modes:
        if mode not in modes:
            raise ValueError(f"`modes` of {sweep.kind} must be among {list(modes)}, got {mode!r}")
    _check_positive("lengths", sweep.lengths)
    _check_positive("batch_size", [sweep.batch_size])
    _check_positive("num_levels", [sweep.num_levels])
    shortest = 2 ** (sweep.num_levels - 1)
    for length in sweep.lengths:
        if length < shortest:
            raise ValueError(
                f"`lengths` must be at least 2 ** (`num_levels` - 1) = {shortest}, a block of the coarsest level, "
                f"got {length}"
            )
    if sweep.padding and sweep.batch_size < 2:
        raise ValueError(
            f"`padding` needs a `batch_size` of at least 2 (a sequence alone is padded to nothing), got {sweep.batch_size}"
        )
    if sweep.dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {DTYPES}, got {sweep.dtype!r}")
    if sweep.device not in ("cpu", "cuda"):
        raise ValueError(f"`device` must be 'cpu' or 'cuda', got {sweep.device!r}")
    if sweep.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("`device` is 'cuda', but PyTorch sees no GPU here: use 'cpu'")


def _check_positive(name: str, values: Sequence[int]) -> None:
    if not values:
        raise ValueError(f"`{name}` must hold at least one value, got none")
    for value in values:
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}")


def _check_available(argument: str, name: str, reason: str | None) -> None:
    if reason is not None:
        raise ValueError(f"`{argument}` {name!r}: {reason}")
