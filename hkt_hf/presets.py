"""YAML that ships with the package, and the model sizes among it."""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from typing import Any

import yaml

from .modeling import HKTConfig


def preset(name: str, **overrides) -> HKTConfig:
    """The [`HKTConfig`] of a packaged model size.

    Args:
        name (`str`): `"hkt-tiny"`, `"hkt-small"` or `"hkt-base"`.
        overrides: fields of [`HKTConfig`] to change, `num_labels`, or `attn_implementation`.

    Raises:
        FileNotFoundError: unknown name (the message lists the known ones).
        ValueError: an override that is no field (with the nearest one); bad values raise as in [`HKTConfig`].
    """
    check_keys(overrides, [*field_names(HKTConfig), "num_labels", "attn_implementation"])
    values = read_yaml(packaged_config(f"models/{name}"))
    return HKTConfig(**{**values["model"], **overrides})


def field_names(cls: type) -> list[str]:
    """Names of the fields that a dataclass takes."""
    return [f.name for f in dataclasses.fields(cls) if f.init]


def check_keys(values: Mapping[str, Any], known: Iterable[str], prefix: str = "") -> None:
    """Refuse a key that is not among `known`: ValueError with the nearest one; `prefix` names the section."""
    known = list(known)
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown key `{prefix}{key}`; the nearest valid one is `{prefix}{nearest}`")


class _Loader(yaml.SafeLoader):
    """Safe YAML with the numbers and booleans of YAML 1.2: `1e-3` is a number, `no` is a word."""


_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_FLOAT, re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back unchanged: it quotes words that would be numbers."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def dump_yaml(values: Mapping[str, Any]) -> str:
    """YAML text of nested plain values, in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def parse_yaml(text: str, source: str) -> Any:
    """Read YAML text; `source` names it in the ValueError that bad text raises."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} can't be read as YAML: {error}") from error


def read_yaml(path) -> dict[str, Any]:
    """The mapping that a YAML file (a `Path` or a packaged resource) holds; ValueError where it can't be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} can't be read as YAML: it is not UTF-8 text ({error})") from error
    values = parse_yaml(text, source=str(path)) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of sections, got {type(values).__name__}")
    return values


def packaged_config(name: str):
    """The packaged YAML file of a name such as `"listops-hkt-tiny"` or `"models/hkt-tiny"`.

    Raises:
        FileNotFoundError: there is none (the message lists those there are).
    """
    folder = resources.files("hkt_hf.configs")
    file = folder.joinpath(f"{name}.yaml")
    if not file.is_file():
        raise FileNotFoundError(f"no configuration {name!r}: neither a file nor one of {sorted(_names(folder))}")
    return file


def _names(folder, prefix: str = "") -> Iterator[str]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _names(entry, prefix=f"{prefix}{entry.name}/")
        elif entry.name.endswith(".yaml"):
            yield prefix + entry.name.removesuffix(".yaml")
