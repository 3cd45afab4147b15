"""Reading labelled text from files or the Hub: sources, columns, labels and splits."""

import csv
import difflib
import gzip
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.exceptions import DatasetsError


SPLITS = ("train", "validation", "test")
SINGLE_LABEL = "single_label_classification"
MULTI_LABEL = "multi_label_classification"
REGRESSION = "regression"

# How each suffix is read: the builder of `datasets` and its settings. In CSV, "NA" or "null" may be a text.
_CSV = {"keep_default_na": False}
_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", _CSV),
    ".tsv": ("csv", {**_CSV, "sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".parquet": ("parquet", {}),
}
_SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HIDDEN_LABEL = -1
# What stands in CSV for a number that is missing, in lower case.
_MISSING = ("na", "n/a", "#n/a", "nan", "null", "none")


# --- Sources ---------------------------------------------------------------------------------------------------------


def read_files(files: Mapping[str, str], cache_dir: str | None = None) -> dict[str, datasets.Dataset]:
    """Read one file per split.

    Args:
        files (mapping of `str` to `str`): local file or URL, by split.
        cache_dir (`str`, *optional*): cache of `datasets`.

    Returns:
        `dict[str, datasets.Dataset]`: by split, with the files' columns.

    Raises:
        FileNotFoundError: no such local file.
        ValueError: unsupported suffix, or a file that can't be read, or has more fields in a row than in its header.
    """
    for split, file in files.items():
        _check_file(file, f"`data.{split}_file`")
    return {split: _read([file], split, cache_dir) for split, file in files.items()}


def read_path(
    path: str, subset: str | None = None, cache_dir: str | None = None
) -> tuple[dict[str, datasets.Dataset], str]:
    """Read a local folder, a local file, or a dataset on the Hub.

    Args:
        path (`str`): what is there decides: a folder with files named after the splits, a file (all of it `train`), or
            else a Hub id.
        subset (`str`, *optional*): configuration of the Hub dataset, or folder within `path`.
        cache_dir (`str`, *optional*): cache of `datasets`.

    Returns:
        `tuple[dict[str, datasets.Dataset], str]`: datasets by split (those of `train`, `validation` and `test` that
        exist), and a few words on the source.

    Raises:
        FileNotFoundError: neither a local file or folder nor a dataset that can be reached.
        ValueError: no train split, unsupported suffix, or data that can't be read.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        files = _split_files(local / subset if subset else local)
        names = [file.name for split in files.values() for file in split]
        splits = {split: _read([str(file) for file in group], split, cache_dir) for split, group in files.items()}
        return splits, f"local files {', '.join(names)}"
    if local.is_file():
        if subset:
            raise ValueError(f"`data.subset`={subset!r} can't be used with the file `data.path`={path!r}")
        _check_file(str(local), "`data.path`")
        return {"train": _read([str(local)], "train", cache_dir)}, f"local file {local.name}"
    if not _HUB_ID.fullmatch(path) or path.startswith(".") or _suffix(path) in _FORMATS:
        raise FileNotFoundError(f"`data.path`={path!r}: no such file or folder")
    return _read_hub(path, subset, cache_dir), f"{path}{f' ({subset})' if subset else ''} on the Hub"


def _suffix(file: str) -> str:
    name = urlparse(file).path if "://" in file else file
    return Path(name.removesuffix(".gz")).suffix.lower()


def _check_file(file: str, argument: str) -> None:
    if _suffix(file) not in _FORMATS:
        raise ValueError(f"{argument}={file!r}: unsupported suffix {_suffix(file)!r}, use one of {list(_FORMATS)}")
    if "://" in file:
        return
    if not Path(file).is_file():
        raise FileNotFoundError(f"{argument}={file!r}: no such file")
    if Path(file).stat().st_size == 0:
        raise ValueError(f"{argument}={file!r}: the file is empty")


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """Files of a folder by split: `train.csv`, or else shards such as `train-00000-of-00002.csv`."""
    if not folder.is_dir():
        raise FileNotFoundError(f"`data.subset`: no folder {str(folder)!r}")
    known = sorted(file for file in folder.iterdir() if file.is_file() and _suffix(file.name) in _FORMATS)
    found: dict[str, list[Path]] = {}
    for split, names in _SPLIT_NAMES.items():
        files = [file for file in known if file.name.split(".")[0] in names]
        files = files or [file for file in known if re.match(rf"({'|'.join(names)})[-_]", file.name)]
        if len({_suffix(file.name) for file in files}) > 1 or len({file.name.split(".")[0] for file in files}) < len(
            files
        ):
            raise ValueError(f"`data.path`: {split} is ambiguous, found {[file.name for file in files]}")
        for file in files:
            _check_file(str(file), "`data.path`")
        if files:
            found[split] = files
    if "train" not in found:
        raise FileNotFoundError(
            f"`data.path`: no train file in {str(folder)!r}, expected train{{{','.join(_FORMATS)}}}; "
            f"it holds {sorted(entry.name for entry in folder.iterdir())[:10]}"
        )
    return found


def _read(files: list[str], split: str, cache_dir: str | None) -> datasets.Dataset:
    builder, settings = _FORMATS[_suffix(files[0])]
    if builder == "csv":
        local = [file for file in files if "://" not in file]
        separator = settings.get("sep", ",")
        if separator == "\t" and not all(_is_quoted(file) for file in local):
            settings = {**settings, "quoting": csv.QUOTE_NONE}
        for file in local:
            _check_first_row(file, separator, settings.get("quoting", csv.QUOTE_MINIMAL))
    try:
        return datasets.load_dataset(builder, data_files={split: files}, split=split, cache_dir=cache_dir, **settings)
    except (DatasetsError, pa.ArrowException, StopIteration, ValueError) as error:
        reason = error.__cause__ or error
        raise ValueError(f"{split}: {files} can't be read as {builder}, or holds no examples: {reason}") from error


def _open(file: str):
    return (gzip.open if file.lower().endswith(".gz") else open)(file, "rt", encoding="utf-8-sig", newline="")


def _is_quoted(file: str) -> bool:
    """Whether quotation marks enclose fields of a tab-separated file, as spreadsheets write them, or are part of the texts.

    They are text if each line is a row, and on some line they do not enclose whole fields.
    """
    try:
        with _open(file) as lines:
            num_tabs = next(lines, "").count("\t")
            is_each_whole = True
            for line in lines:
                if line.count("\t") != num_tabs and line.strip():
                    return True
                if is_each_whole and '"' in line:
                    try:
                        # Strictly: nothing between a closing quotation mark and the next tab.
                        is_each_whole = len(next(csv.reader([line], delimiter="\t", strict=True))) == num_tabs + 1
                    except csv.Error:
                        is_each_whole = False
            return is_each_whole
    except UnicodeDecodeError:
        return True  # the reader says so


def _check_first_row(file: str, separator: str, quoting: int) -> None:
    """ValueError for a row of more fields than the header: pandas would take the first for an index, and drop it."""
    try:
        with _open(file) as lines:
            rows = (row for row in csv.reader(lines, delimiter=separator, quoting=quoting) if row)
            header, first = next(rows, []), next(rows, [])
    except (UnicodeDecodeError, csv.Error):
        return  # the reader says so
    if len(first) > len(header):
        raise ValueError(
            f"{file!r} has {len(header)} fields in its header, {header}, and {len(first)} in its first row: a text that holds "
            f"{separator!r} must be in quotation marks"
        )


def _read_hub(path: str, subset: str | None, cache_dir: str | None) -> dict[str, datasets.Dataset]:
    try:
        loaded = datasets.load_dataset(path, subset, cache_dir=cache_dir)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"`data.path`={path!r} is neither a local file or folder nor a dataset on the Hub that can be reached: {error}"
        ) from error
    except (DatasetsError, ValueError) as error:
        raise ValueError(f"`data.path`={path!r} with `data.subset`={subset!r} can't be read: {error}") from error
    found = {}
    for split, names in _SPLIT_NAMES.items():
        name = next((name for name in names if name in loaded), None)
        if name:
            found[split] = loaded[name]
    if "train" not in found:
        raise ValueError(f"`data.path`={path!r} has no train split, only {list(loaded)}")
    return found


# --- Columns ---------------------------------------------------------------------------------------------------------


def find_column(dataset: datasets.Dataset, candidates: Sequence[str], argument: str, split: str) -> str:
    """The first of some columns that a dataset has.

    Args:
        dataset ([`datasets.Dataset`]): one split.
        candidates (sequence of `str`): names, most wanted first.
        argument (`str`): the setting that names the column, for messages.
        split (`str`): name of the split, for messages.

    Raises:
        ValueError: there is none; the message names the columns there are, and the nearest.
    """
    for name in candidates:
        if name in dataset.column_names:
            return name
    message = f"{split} has no column {' or '.join(map(repr, candidates))}, but {dataset.column_names}"
    nearest = difflib.get_close_matches(candidates[0], dataset.column_names, n=1)
    raise ValueError(f"{message}: set `{argument}`" + (f", perhaps to {nearest[0]!r}" if nearest else ""))


def check_text_column(dataset: datasets.Dataset, column: str, split: str) -> None:
    """Check that every row of a column holds some text.

    Args:
        dataset ([`datasets.Dataset`]): one split.
        column (`str`): name of its text column.
        split (`str`): name of the split, for messages.

    Raises:
        ValueError: the column isn't of strings, or a row is null or empty (rows count from 0).
    """
    values = _arrow(dataset, column)
    where = f"column {column!r} of {split}"
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        raise ValueError(f"{where} must hold text, got {values.type}")
    _check_no_null(values, where)
    empty = pc.index(
        pc.binary_length(values), 0 if pa.types.is_string(values.type) else pa.scalar(0, pa.int64())
    ).as_py()
    if empty >= 0:
        raise ValueError(f"{where} holds an empty text in row {empty}")


def _arrow(dataset: datasets.Dataset, column: str) -> pa.ChunkedArray:
    return dataset.select_columns([column]).with_format("arrow")[:].column(column)


def _check_no_null(values: pa.ChunkedArray, where: str) -> None:
    if values.null_count:
        raise ValueError(f"{where} holds a null in row {pc.index(values.is_null(), True).as_py()}")


# --- Labels ----------------------------------------------------------------------------------------------------------


@dataclass
class Labels:
    """Encoded labels of all splits.

    Args:
        values (`dict[str, np.ndarray]`): by split: `int64` of shape `(rows,)` for one label a row, `float32` of shape
            `(rows, labels)` for several, `float32` of shape `(rows,)` for regression.
        problem_type (`str`): one of the three that `transformers` knows.
        names (`list[str]`): names of the labels in the order of ids; `["value"]` for regression.
    """

    values: dict[str, np.ndarray]
    problem_type: str
    names: list[str]

    @property
    def feature(self) -> Any:
        """Type of the column in `datasets`."""
        if self.problem_type == SINGLE_LABEL:
            return datasets.ClassLabel(names=self.names)
        value = datasets.Value("float32")
        return value if self.problem_type == REGRESSION else datasets.List(value)


def labels_are_hidden(dataset: datasets.Dataset, column: str) -> bool:
    """Whether all labels are -1, as in the test sets of GLUE on the Hub."""
    if column not in dataset.column_names:
        return False
    values = _arrow(dataset, column)
    return pa.types.is_integer(values.type) and values.unique().to_pylist() == [_HIDDEN_LABEL]


def encode_labels(splits: Mapping[str, datasets.Dataset], column: str, names: Sequence[str] | None = None) -> Labels:
    """Turn a label column into class ids, 0/1 vectors or numbers.

    Its type decides. Integers and booleans: one class a row, numbered 0 to n-1 or 1 to n. Strings: one class name a row;
    the names in `train` are sorted. Decimal numbers: regression. Lists: several labels a row, as 0/1 vectors of one
    length, as lists of names, or (where the dataset names its classes) as lists of class ids.

    Args:
        splits (mapping of `str` to [`datasets.Dataset`]): all splits, one of them `train`.
        column (`str`): name of the label column.
        names (sequence of `str`, *optional*): names of the classes, where they are known; the labels must then be
            single ones.

    Returns:
        [`Labels`]

    Raises:
        ValueError: types that differ or aren't supported, a null, a label out of range or unknown (naming column,
            value and row, from 0), or a single class in `train`.
    """
    columns = {split: _arrow(dataset, column) for split, dataset in splits.items()}
    kinds = {}
    for split, values in columns.items():
        where = f"column {column!r} of {split}"
        kinds[split] = _kind(values.type, where)
        _check_no_null(values, where)
    if set(kinds.values()) == {"integer", "decimal"}:
        kinds = dict.fromkeys(kinds, "decimal")
    if len(set(kinds.values())) > 1:
        raise ValueError(f"column {column!r} must be of one type in all splits, got {kinds}")
    kind = kinds["train"]
    if names is not None and kind not in ("integer", "string"):
        raise ValueError(f"column {column!r} must hold the classes {list(names)} or their ids, got {kind} values")
    feature = splits["train"].features[column]
    if kind == "string":
        labels = _encode_strings(columns, column, names)
    elif kind == "decimal":
        labels = _encode_decimals(columns, column)
    elif kind == "list":
        labels = _encode_lists(columns, column, getattr(getattr(feature, "feature", None), "names", None))
    else:
        if kind == "boolean":
            names = ["False", "True"]
        labels = _encode_integers(columns, column, names or getattr(feature, "names", None))
    present = np.unique(labels.values["train"])
    if labels.problem_type == SINGLE_LABEL and len(present) < 2:
        raise ValueError(f"column {column!r} of train holds a single class, {labels.names[present[0]]!r}")
    return labels


def _kind(arrow_type: pa.DataType, where: str) -> str:
    if pa.types.is_boolean(arrow_type):
        return "boolean"
    if pa.types.is_integer(arrow_type):
        return "integer"
    if pa.types.is_floating(arrow_type):
        return "decimal"
    if pa.types.is_string(arrow_type) or pa.types.is_large_string(arrow_type):
        return "string"
    if pa.types.is_list(arrow_type) or pa.types.is_large_list(arrow_type) or pa.types.is_fixed_size_list(arrow_type):
        return "list"
    raise ValueError(f"{where} must hold integers, strings, decimal numbers or lists of them, got {arrow_type}")


def _encode_integers(columns: Mapping[str, pa.ChunkedArray], column: str, names: Sequence[str] | None) -> Labels:
    values = {split: labels.to_numpy().astype(np.int64) for split, labels in columns.items()}
    present = np.unique(values["train"])
    first = 1 if names is None and present[0] == 1 else 0
    last = int(present[-1]) if names is None else len(names) - 1
    for split, labels in values.items():
        wrong = np.flatnonzero((labels < first) | (labels > last))
        if wrong.size:
            raise ValueError(
                f"column {column!r} of {split} holds the label {labels[wrong[0]]} in row {wrong[0]}; labels must be "
                f"{first} to {last}"
            )
    if names is None:
        names = [str(label) for label in range(first, last + 1)]
        if len(present) < len(names):
            missing = next(label for label in range(first, last) if label not in present)
            raise ValueError(
                f"column {column!r} of train holds labels up to {last} but never {missing}: classes must be numbered "
                "without a gap, 0 to n-1 or 1 to n (for regression, write decimal numbers)"
            )
    return Labels({split: labels - first for split, labels in values.items()}, SINGLE_LABEL, list(names))


def _encode_strings(columns: Mapping[str, pa.ChunkedArray], column: str, names: Sequence[str] | None) -> Labels:
    if names is None:
        names = sorted(columns["train"].unique().to_pylist())
        missing = [name for name in names if name.strip().lower() in _MISSING]
        if missing and all(_is_number(name) for name in names if name not in missing):
            row = pc.index(columns["train"], pa.scalar(missing[0], columns["train"].type)).as_py()
            raise ValueError(f"column {column!r} of train holds numbers, but {missing[0]!r} in row {row}")
    names = list(names)
    values = {}
    for split, labels in columns.items():
        where = f"column {column!r} of {split}"
        empty = pc.index(labels, pa.scalar("", labels.type)).as_py()
        if empty >= 0:
            raise ValueError(f"{where} holds an empty label in row {empty}")
        ids = pc.index_in(labels, value_set=pa.array(names, labels.type))
        if ids.null_count:
            row = pc.index(ids.is_null(), True).as_py()
            raise ValueError(f"{where} holds the unknown label {labels[row].as_py()!r} in row {row}; known: {names}")
        values[split] = ids.to_numpy().astype(np.int64)
    return Labels(values, SINGLE_LABEL, names)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _encode_decimals(columns: Mapping[str, pa.ChunkedArray], column: str) -> Labels:
    values = {split: labels.to_numpy().astype(np.float32) for split, labels in columns.items()}
    for split, labels in values.items():
        wrong = np.flatnonzero(~np.isfinite(labels))
        if wrong.size:
            raise ValueError(
                f"column {column!r} of {split} holds the label {labels[wrong[0]]} in row {wrong[0]}; it must be finite"
            )
    return Labels(values, REGRESSION, ["value"])


def _encode_lists(columns: Mapping[str, pa.ChunkedArray], column: str, names: Sequence[str] | None) -> Labels:
    rows = {split: labels.to_pylist() for split, labels in columns.items()}
    if pa.types.is_string(columns["train"].type.value_type) and names is None:
        names = sorted({name for row in rows["train"] for name in row})
        ids = {name: index for index, name in enumerate(names)}
    elif names is not None:
        ids = {index: index for index in range(len(names))}
    else:
        return _encode_vectors(rows, column)
    values = {}
    for split, lists in rows.items():
        values[split] = np.zeros((len(lists), len(names)), dtype=np.float32)
        for number, row in enumerate(lists):
            for label in row:
                if label not in ids:
                    raise ValueError(
                        f"column {column!r} of {split} holds the unknown label {label!r} in row {number}; "
                        f"known: {list(ids)}"
                    )
                values[split][number, ids[label]] = 1.0
    if not names:
        raise ValueError(f"column {column!r} of train holds no label in any row")
    return Labels(values, MULTI_LABEL, list(names))


def _encode_vectors(rows: Mapping[str, list[list]], column: str) -> Labels:
    num_labels = len(rows["train"][0])
    values = {}
    for split, vectors in rows.items():
        for number, vector in enumerate(vectors):
            if len(vector) != num_labels or not vector or any(value not in (0, 1) for value in vector):
                raise ValueError(
                    f"column {column!r} of {split} holds {vector} in row {number}; several labels a row must be 0/1 "
                    f"vectors of one length, here {num_labels}"
                )
        values[split] = np.array(vectors, dtype=np.float32)
    return Labels(values, MULTI_LABEL, [str(index) for index in range(num_labels)])


def with_labels(dataset: datasets.Dataset, column: str, labels: Labels | None, split: str) -> datasets.Dataset:
    """A dataset of two columns: one input column, renamed to `text`, and the encoded `label`.

    Args:
        dataset ([`datasets.Dataset`]): one split.
        column (`str`): name of its input column.
        labels ([`Labels`], *optional*): labels of all splits; without them there is no column `label`.
        split (`str`): which of them.
    """
    dataset = dataset.select_columns([column])
    if column != "text":
        dataset = dataset.rename_column(column, "text")
    if labels is None:
        return dataset
    values = labels.values[split]
    return dataset.add_column("label", values if values.ndim == 1 else values.tolist(), feature=labels.feature)


def check_several_classes(train: datasets.Dataset) -> None:
    """Check that what is left to train on, after cuts and samples, holds more than one class.

    Args:
        train ([`datasets.Dataset`]): encoded by [`with_labels`]; several labels a row and regression are not checked.

    Raises:
        ValueError: every row has the same class.
    """
    feature = train.features["label"]
    if isinstance(feature, datasets.ClassLabel) and len(present := train.unique("label")) < 2:
        raise ValueError(
            f"train holds a single class, {feature.int2str(present[0])!r}, after cuts and samples ({len(train)} rows)"
        )


# --- Splits ----------------------------------------------------------------------------------------------------------


def cut_split(
    dataset: datasets.Dataset, fraction: float, seed: Sequence[int], argument: str
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Set part of a dataset aside, at random; where each row has one class, the same part of each class.

    Args:
        dataset ([`datasets.Dataset`]): rows, with or without a column `label`.
        fraction (`float`): part to set aside, between 0 and 1.
        seed (sequence of `int`): seed of `numpy.random.default_rng`.
        argument (`str`): the setting that holds the fraction, for messages.

    Returns:
        `tuple[datasets.Dataset, datasets.Dataset]`: the rest and the part, both in their original order.

    Raises:
        ValueError: too few rows for both.
    """
    size = round(fraction * len(dataset))
    if not 0 < size < len(dataset):
        raise ValueError(
            f"`{argument}`={fraction} of {len(dataset)} train examples is {size}: "
            "give a split of your own, or another fraction"
        )
    order = np.random.default_rng(seed).permutation(len(dataset))
    if isinstance(dataset.features.get("label"), datasets.ClassLabel):
        order = _spread_classes(order, np.asarray(dataset["label"][:]))
    mask = np.zeros(len(dataset), dtype=bool)
    mask[order[:size]] = True
    return dataset.select(np.flatnonzero(~mask)), dataset.select(np.flatnonzero(mask))


def _spread_classes(order: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Reorder a permutation so that each beginning of it holds every class in proportion, within one row."""
    position = np.empty(len(order))
    for label in np.unique(labels):
        members = np.flatnonzero(labels[order] == label)
        position[members] = (np.arange(len(members)) + 0.5) / len(members)
    return order[np.argsort(position, kind="stable")]


def sample(dataset: datasets.Dataset, size: int | None, seed: Sequence[int]) -> datasets.Dataset:
    """At most `size` rows: all of them in order, or a random choice in random order.

    Args:
        dataset ([`datasets.Dataset`]): rows.
        size (`int`, *optional*): most rows; `None` for all.
        seed (sequence of `int`): seed of `numpy.random.default_rng`.
    """
    if size is None or size >= len(dataset):
        return dataset
    return dataset.select(np.random.default_rng(seed).permutation(len(dataset))[:size])
