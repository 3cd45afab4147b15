"""Settings of a dataset, checked before anything is read."""

import difflib
from dataclasses import dataclass, field, fields
from pathlib import Path

import datasets

from .images import CIFAR10_NAMES, IMAGE_SIZE, IMAGE_SIZES, is_image_size
from .listops import ListOpsConfig


@dataclass(frozen=True)
class TaskSpec:
    """What is known of a task before its data are read.

    Args:
        title (`str`): name for people.
        hub_id (`str`, *optional*): dataset on the Hub; `None` where there is no default one.
        text_columns (tuple of `str`): columns that may hold the input; the first one present is read.
        label_column (`str`): column that holds the label.
        label_names (tuple of `str`, *optional*): class names in the order of ids; `None` where the data tell.
        tokenizer_kind (`str`): `kind` for [`~hkt_hf.tokenization.build_tokenizer`].
    """

    title: str
    hub_id: str | None = None
    text_columns: tuple[str, ...] = ("text",)
    label_column: str = "label"
    label_names: tuple[str, ...] | None = None
    tokenizer_kind: str = "bytes"


TASKS = {
    "listops": TaskSpec("ListOps", tokenizer_kind="listops"),
    "imdb": TaskSpec("IMDB", "stanfordnlp/imdb", label_names=("neg", "pos")),
    "sst2": TaskSpec(
        "SST-2", "stanfordnlp/sst2", text_columns=("sentence", "text"), label_names=("negative", "positive")
    ),
    "cifar10": TaskSpec(
        "CIFAR-10 in grey",
        "uoft-cs/cifar10",
        text_columns=("pixels", "img", "image"),
        label_names=tuple(CIFAR10_NAMES),
        tokenizer_kind="pixels",
    ),
    "text": TaskSpec("Text"),
}


@dataclass
class DataConfig:
    """Which data to read, and how to split them.

    Args:
        task (`str`, *optional*, defaults to `"listops"`): `"listops"` (generated), `"imdb"`, `"sst2"`, `"cifar10"`, or
            `"text"` for other classification or regression data.
        path (`str`, *optional*): a dataset on the Hub, a local folder with files named after the splits
            (`train.parquet`, `validation.parquet`, `test.parquet`), or one local file to train on; by default the
            task's dataset on the Hub. Files are CSV, TSV, JSON, JSON lines or parquet.
        subset (`str`, *optional*): name of a configuration of the Hub dataset, or of a folder in `path`.
        train_file (`str`, *optional*): local file or URL to train on; then `path` is not read.
        validation_file (`str`, *optional*): local file or URL to validate on, whatever `path` holds.
        test_file (`str`, *optional*): local file or URL to test on, whatever `path` holds.
        text_column (`str`, *optional*): column of the input; by default `text`, for SST-2 `sentence` or `text`, for
            CIFAR-10 `pixels`, `img` or `image`.
        label_column (`str`, *optional*): column of the label; by default `label`.
        validation_fraction (`float`, *optional*, defaults to 0.1): part of train to validate on where there is no
            validation split.
        test_fraction (`float`, *optional*, defaults to 0.1): part of train to test on where there is no test split;
            for the task `"text"` only.
        seed (`int`, *optional*, defaults to 0): seed of the splits and of the choice of examples.
        max_train_samples (`int`, *optional*): train on at most so many examples, chosen at random.
        max_validation_samples (`int`, *optional*): the same for validation.
        max_test_samples (`int`, *optional*): the same for the test.
        image_size (`int`, *optional*, defaults to 32): height and width of the images of the task `"cifar10"`, a divisor
            of 32; smaller ones are means over square blocks, so that 16 gives sequences of 256 pixels.
        listops ([`ListOpsConfig`], *optional*): expressions of the task `"listops"`.

    Raises:
        ValueError: an unknown task, a value out of range, or fields that contradict each other.
    """

    task: str = "listops"
    path: str | None = None
    subset: str | None = None
    train_file: str | None = None
    validation_file: str | None = None
    test_file: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    validation_fraction: float = 0.1
    test_fraction: float = 0.1
    seed: int = 0
    max_train_samples: int | None = None
    max_validation_samples: int | None = None
    max_test_samples: int | None = None
    image_size: int = IMAGE_SIZE
    listops: ListOpsConfig = field(default_factory=ListOpsConfig)

    def __post_init__(self):
        if self.task not in TASKS:
            nearest = difflib.get_close_matches(str(self.task), TASKS, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"`data.task` must be one of {list(TASKS)}, got {self.task!r}; the nearest one is {nearest!r}"
            )
        self._check_types()
        if self.task == "listops":
            for name in (
                "path",
                "subset",
                "train_file",
                "validation_file",
                "test_file",
                "text_column",
                "label_column",
            ):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"`data.{name}`={getattr(self, name)!r} can't be used with the task 'listops', which is "
                        "generated: leave it out, or choose another `data.task`"
                    )
        if self.image_size != IMAGE_SIZE and self.task != "cifar10":
            raise ValueError(
                f"`data.image_size`={self.image_size} is for the task 'cifar10', it can't be used with {self.task!r}"
            )
        if self.task == "text" and self.path is None and self.train_file is None:
            raise ValueError("the task 'text' needs `data.path` (Hub id, folder or file) or `data.train_file`")
        if self.train_file is not None and self.subset is not None:
            raise ValueError(f"`data.subset`={self.subset!r} belongs to `data.path`: it can't be used with files")
        if self.text_column is not None and self.text_column == self.label_column:
            raise ValueError(f"`data.text_column` and `data.label_column` are both {self.text_column!r}")

    def _check_types(self) -> None:
        for f in fields(self):
            value, name = getattr(self, f.name), f"`data.{f.name}`"
            if f.type == (str | None):
                if value is not None and (not isinstance(value, str) or not value):
                    raise ValueError(f"{name} must be a non-empty string or null, got {value!r}")
            elif f.name.endswith("_fraction"):
                if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
                    raise ValueError(f"{name} must be between 0 and 1 (exclusive), got {value!r}")
            elif f.name.startswith("max_") or f.name == "seed":
                least = 0 if f.name == "seed" else 1
                if value is None and f.name != "seed":
                    continue
                if not isinstance(value, int) or isinstance(value, bool) or value < least:
                    raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if not is_image_size(self.image_size):
            raise ValueError(
                f"`data.image_size` must be one of {IMAGE_SIZES}, the divisors of {IMAGE_SIZE}, got {self.image_size!r}"
            )
        if not isinstance(self.listops, ListOpsConfig):
            raise ValueError(f"`data.listops` must be a ListOpsConfig, got {type(self.listops).__name__}")

    @property
    def files(self) -> dict[str, str]:
        """Files given by name, by split (`train`, `validation`, `test`)."""
        files = {
            "train": self.train_file,
            "validation": self.validation_file,
            "test": self.test_file,
        }
        return {
            split: str(Path(file).expanduser()) if "://" not in file else file for split, file in files.items() if file
        }


@dataclass
class TaskData:
    """A dataset, ready to be tokenized.

    Args:
        splits ([`datasets.DatasetDict`]): `train`, `validation` and `test` with the columns `text` (`str`) and, where
            there are labels, `label` (a class label, a `float32`, or a list of one `float32` per label).
        problem_type (`str`, *optional*): `"single_label_classification"`, `"multi_label_classification"` or
            `"regression"`; `None` without labels.
        label_names (`list[str]`): names of the labels in the order of ids; `["value"]` for regression.
        tokenizer_kind (`str`): `kind` that suits [`~hkt_hf.tokenization.build_tokenizer`].
        description (`str`): one line: name, source, sizes, and how the splits were made.
    """

    splits: datasets.DatasetDict
    problem_type: str | None
    label_names: list[str]
    tokenizer_kind: str
    description: str
