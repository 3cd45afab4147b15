"""YAML that ships with the package, and the model sizes among it."""

import re
from collections.abc import Iterator
from importlib import resources
from typing import Any

import yaml

from .modeling import HKTConfig


def preset(name: str, **overrides) -> HKTConfig:
    """The [`HKTConfig`] of a packaged model size.

    Args:
        name (`str`): `"hkt-tiny"`, `"hkt-small"` or `"hkt-base"`.
        overrides: fields of [`HKTConfig`] to change.

    Raises:
        FileNotFoundError: unknown name (the message lists the known ones).
    """
    values = read_yaml(packaged_config(f"models/{name}"))
    return HKTConfig(**{**values["model"], **overrides})


class _Loader(yaml.SafeLoader):
    """Safe YAML with the numbers and booleans of YAML 1.2: `1e-3` is a number, `no` is a word."""


_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_FLOAT, re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


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
