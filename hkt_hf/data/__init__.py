"""Datasets: ListOps, IMDB, SST-2, grey CIFAR-10, and labelled text of your own."""

from collections.abc import Mapping
from pathlib import Path

import datasets

from .config import TASKS, DataConfig, TaskData, TaskSpec
from .images import check_pixel_column, images_to_text
from .listops import LABEL_NAMES, ListOpsConfig, evaluate, load_listops
from .text import (
    SINGLE_LABEL,
    SPLITS,
    check_several_classes,
    check_text_column,
    cut_split,
    encode_labels,
    find_column,
    labels_are_hidden,
    read_files,
    read_path,
    sample,
    with_labels,
)


__all__ = [
    "TASKS",
    "DataConfig",
    "ListOpsConfig",
    "TaskData",
    "evaluate",
    "load_data",
    "load_listops",
]

# With `DataConfig.seed`, seeds of independent random choices.
_TEST_STREAM, _VALIDATION_STREAM, _SAMPLE_STREAM = range(3)


def load_data(config: DataConfig, cache_dir: str | Path | None = None, need_labels: bool = True) -> TaskData:
    """Read a dataset, encode its labels and make its splits.

    Where there is no validation split, as in IMDB and CIFAR-10, one is cut from train (seeded, stratified where each
    row has one class); for the task `"text"` so is a test split. A test split whose labels are all -1 is hidden, as
    in GLUE on the Hub, and isn't used: for SST-2 the validation split of GLUE is then the test split, and validation is
    cut from train, so that no choice is made on the data that are reported.

    CIFAR-10 becomes grey (8-bit luma): a sequence of 1024 pixels, row by row, or fewer with `DataConfig.image_size`.

    Args:
        config ([`DataConfig`]): which data, and how to split them.
        cache_dir (`str` or `Path`, *optional*): cache of `datasets`; by default its own.
        need_labels (`bool`, *optional*, defaults to `True`): with `False`, data without labels, or with labels that can't
            be used, are read as texts alone. Where there are labels, the splits are the same as with `True`: what is
            pretrained on train has not seen the test split of a classifier.

    Returns:
        [`TaskData`]

    Raises:
        FileNotFoundError: a file, folder or Hub dataset that doesn't exist or can't be reached.
        ValueError: data that can't be used as they are; the message names split, column, value and row.
    """
    if config.task == "listops":
        return _load_listops(config, cache_dir, need_labels)
    spec = TASKS[config.task]
    splits, source = _read(config, spec, cache_dir)
    label_column = config.label_column or spec.label_column
    for split, dataset in splits.items():
        if len(dataset) == 0:
            raise ValueError(f"{split} of {source} holds no examples")
        if need_labels or config.label_column is not None:
            find_column(dataset, [label_column], "data.label_column", split)
    splits, notes = _assign_splits(splits, label_column, config)
    inputs = {split: _input_column(dataset, split, config) for split, dataset in splits.items()}
    try:
        labels = encode_labels(splits, label_column, spec.label_names)
    except ValueError:
        if need_labels:
            raise
        labels = None
        notes.append("without labels")
    splits = {split: with_labels(dataset, inputs[split], labels, split) for split, dataset in splits.items()}
    if "test" not in splits:
        splits["train"], splits["test"] = cut_split(
            splits["train"], config.test_fraction, (config.seed, _TEST_STREAM), "data.test_fraction"
        )
        notes.append(f"test cut from train ({100 * config.test_fraction:g}%, seed {config.seed})")
    if "validation" not in splits:
        splits["train"], splits["validation"] = cut_split(
            splits["train"], config.validation_fraction, (config.seed, _VALIDATION_STREAM), "data.validation_fraction"
        )
        notes.append(f"validation cut from train ({100 * config.validation_fraction:g}%, seed {config.seed})")
    splits = _sample(splits, config, notes)
    if need_labels:
        check_several_classes(splits["train"])
    if spec.tokenizer_kind == "pixels":
        splits = datasets.DatasetDict(
            {split: images_to_text(dataset, split, config.image_size) for split, dataset in splits.items()}
        )
        notes.append(f"{config.image_size} by {config.image_size} pixels")
    return TaskData(
        splits=splits,
        problem_type=labels.problem_type if labels else None,
        label_names=labels.names if labels else [],
        tokenizer_kind=spec.tokenizer_kind,
        description=_describe(spec.title, source, splits, notes),
    )


def _load_listops(config: DataConfig, cache_dir: str | Path | None, need_labels: bool) -> TaskData:
    notes: list[str] = []
    splits = _sample(load_listops(config.listops, cache_dir), config, notes)
    if need_labels:
        check_several_classes(splits["train"])
    lengths = f"{config.listops.min_length} to {config.listops.max_length} tokens"
    source = f"generated, {lengths}, depth at most {config.listops.max_depth}, seed {config.listops.seed}"
    return TaskData(
        splits=splits,
        problem_type=SINGLE_LABEL,
        label_names=list(LABEL_NAMES),
        tokenizer_kind=TASKS["listops"].tokenizer_kind,
        description=_describe(TASKS["listops"].title, source, splits, notes),
    )


def _read(config: DataConfig, spec: TaskSpec, cache_dir: str | Path | None) -> tuple[dict[str, datasets.Dataset], str]:
    cache_dir = None if cache_dir is None else str(cache_dir)
    splits, sources = {}, []
    if config.train_file is None:
        splits, source = read_path(config.path or spec.hub_id, config.subset, cache_dir)
        sources.append(source)
    if config.files:
        splits |= read_files(config.files, cache_dir)
        sources.append(
            "files " + ", ".join(file if "://" in file else Path(file).name for file in config.files.values())
        )
    return splits, ", ".join(sources)


def _assign_splits(
    splits: dict[str, datasets.Dataset], label_column: str, config: DataConfig
) -> tuple[dict[str, datasets.Dataset], list[str]]:
    """Leave out a test split without labels, and find the one to test on; notes say what was done."""
    splits, notes = dict(splits), []
    if "test" in splits and labels_are_hidden(splits["test"], label_column):
        del splits["test"]
        notes.append("the test labels are hidden")
    if "test" not in splits and config.task == "sst2" and "validation" in splits:
        splits["test"] = splits.pop("validation")
        notes.append("test is the validation split of GLUE")
    if "test" not in splits and config.task != "text":
        raise ValueError(f"the task {config.task!r} needs a test split, there is only {list(splits)}")
    return splits, notes


def _input_column(dataset: datasets.Dataset, split: str, config: DataConfig) -> str:
    """Name of the column of texts or images, after a check of what it holds."""
    spec = TASKS[config.task]
    candidates = [config.text_column] if config.text_column else spec.text_columns
    column = find_column(dataset, candidates, "data.text_column", split)
    if column == (config.label_column or spec.label_column):
        raise ValueError(f"`data.text_column` and `data.label_column` are both {column!r}")
    check = check_pixel_column if spec.tokenizer_kind == "pixels" else check_text_column
    check(dataset, column, split)
    return column


def _sample(splits: Mapping[str, datasets.Dataset], config: DataConfig, notes: list[str]) -> datasets.DatasetDict:
    sampled = datasets.DatasetDict()
    for number, split in enumerate(SPLITS):
        most = getattr(config, f"max_{split}_samples")
        sampled[split] = sample(splits[split], most, (config.seed, _SAMPLE_STREAM, number))
        if len(sampled[split]) < len(splits[split]):
            notes.append(f"{split} sampled from {len(splits[split]):,} (seed {config.seed})")
    return sampled


def _describe(title: str, source: str, splits: Mapping[str, datasets.Dataset], notes: list[str]) -> str:
    sizes = ", ".join(f"{len(splits[split]):,} {split}" for split in SPLITS)
    return "; ".join([f"{title} ({source}): {sizes} examples", *notes])
