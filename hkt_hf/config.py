"""Experiment configuration: YAML files with bases and overrides, checked before any work starts."""

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

from huggingface_hub.dataclasses import type_validator
from huggingface_hub.errors import StrictDataclassError
from transformers import TrainingArguments

from .architectures import DEFAULT as DEFAULT_ARCHITECTURE
from .architectures import architecture
from .data import DataConfig
from .modeling import HSAConfig
from .objectives import OBJECTIVES, MaskedLM, SequenceClassification
from .presets import check_keys, field_names, packaged_config, parse_yaml, read_yaml
from .tokenization import TOKENIZER_KINDS


# Set by the experiment itself, with the reason; a second place for them could only contradict it.
MANAGED_TRAINING_KEYS = {
    "output_dir": "it follows from `output_dir`",
    "seed": "it follows from `seed`",
    "data_seed": "it follows from `seed`",
    "length_column_name": "the data are tokenised here",
    "resume_from_checkpoint": "a run continues from its own last checkpoint",
    "push_to_hub": "use the command `hkt push`",
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "the command says what is done"),
}
# `TrainingArguments` checks neither these nor any type: the Trainer would fail with them in the middle of the work.
POSITIVE_TRAINING_KEYS = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "logging_steps",
    "eval_steps",
    "save_steps",
    "save_total_limit",
)
NOT_NEGATIVE_TRAINING_KEYS = ("learning_rate", "weight_decay", "max_grad_norm", "dataloader_num_workers")
DEFAULT_MLM_PROBABILITY = 0.15  # Devlin et al. 2019
MANAGED_MODEL_KEYS = {
    **dict.fromkeys(("num_labels", "id2label", "label2id", "problem_type"), "it follows from the data"),
    **dict.fromkeys(("vocab_size", "pad_token_id"), "it follows from the tokenizer"),
}


@dataclass
class TokenizerConfig:
    """How text becomes token ids.

    Args:
        kind (`str`, *optional*): `"listops"`, `"bytes"` or `"pixels"`; by default what suits the data.
        max_length (`int`, *optional*, defaults to 512): longer inputs are truncated.
        add_cls_token (`bool`, *optional*, defaults to `False`): begin every sequence with `[CLS]`.
        path (`str`, *optional*): folder or Hub id of a tokenizer to use instead of one of these kinds, e.g. of a pretrained
            model whose words are wanted and whose weights are not.
        segments (`bool`, *optional*, defaults to `False`): tell the model which sentence and paragraph a token is in
            (`segment_ids`), for models that attend along a tree; needs a fast tokenizer.
    """

    kind: str | None = None
    max_length: int = 512
    add_cls_token: bool = False
    path: str | None = None
    segments: bool = False

    def __post_init__(self):
        if self.path is not None and (self.kind is not None or self.add_cls_token):
            raise ValueError(
                f"`tokenizer.path` ({self.path!r}) can't be given with `tokenizer.kind` or `add_cls_token`"
            )
        if self.kind is not None and self.kind not in TOKENIZER_KINDS:
            raise ValueError(f"`tokenizer.kind` must be one of {TOKENIZER_KINDS}, got {self.kind!r}")
        if not isinstance(self.max_length, int) or self.max_length < 1:
            raise ValueError(f"`tokenizer.max_length` must be an integer of at least 1, got {self.max_length!r}")


@dataclass
class ExperimentConfig:
    """One training run.

    Args:
        output_dir (`str`): folder of the run: Trainer checkpoints, and in the end the model, its card and its curves.
        objective (`str`, *optional*, defaults to `"sequence_classification"`): what is learned: to tell the label of a
            text (one class, several, or a number), or with `"masked_lm"` the tokens of a text that were masked; labels
            are then not needed.
        mlm_probability (`float`, *optional*): share of tokens to mask, 0.15 by default; for `"masked_lm"` only.
        seed (`int`, *optional*, defaults to 0): seed of initial weights, data order, dropout and masks.
        model (`dict`, *optional*): fields of [`HKTConfig`], with `model_type: hsa` of [`HSAConfig`], or `checkpoint`: a local
            folder or Hub id to fine-tune, whose configuration the other fields change.
        tokenizer ([`TokenizerConfig`], *optional*): tokenizer; not used with `model.checkpoint`, which brings its own.
        data ([`~hkt_hf.data.DataConfig`], *optional*): dataset, columns and splits.
        training (`dict`, *optional*): fields of `transformers.TrainingArguments`.
    """

    output_dir: str
    objective: str = SequenceClassification.name
    mlm_probability: float | None = None
    seed: int = 0
    model: dict[str, Any] = field(default_factory=dict)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as they are written to YAML."""
        return dataclasses.asdict(self)


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read an experiment from YAML.

    A file may name others under `base` (a name of this package's `configs/`, or a path relative to the file); they
    are merged in order, then the file itself, then the overrides.

    Args:
        path (`str` or `Path`): a YAML file, or the name of a packaged one (`"listops-hkt-tiny"`).
        overrides (sequence of `str`): command-line words: `["--training.learning_rate", "1e-3"]`, or with `=`.

    Returns:
        [`ExperimentConfig`]

    Raises:
        FileNotFoundError: no such file or packaged configuration.
        ValueError: YAML that can't be read, an unknown key (with the nearest valid one), or a bad value.
    """
    values = merge(read_with_bases(path), parse_overrides(overrides))
    return build_experiment(values)


def build_experiment(values: Mapping[str, Any]) -> ExperimentConfig:
    """Check nested plain values and turn them into an [`ExperimentConfig`]; errors as in [`load_experiment`]."""
    check_keys(values, field_names(ExperimentConfig))
    if not values.get("output_dir"):
        raise ValueError("`output_dir` must be given: the folder that the run is written to")
    seed = values.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"`seed` must be an integer of at least 0, got {seed!r}")
    objective = values.get("objective", SequenceClassification.name)
    mlm_probability = values.get("mlm_probability")
    _check_objective(objective, mlm_probability)
    if objective == MaskedLM.name and mlm_probability is None:
        mlm_probability = DEFAULT_MLM_PROBABILITY
    model = dict(_section(values, "model"))
    _check_not_managed(model, MANAGED_MODEL_KEYS, prefix="model.")
    config_class = architecture(model.get("model_type", DEFAULT_ARCHITECTURE)).config_class
    check_keys(model, ["checkpoint", "model_type", *field_names(config_class)], prefix="model.")
    tokenizer = _build_dataclass(TokenizerConfig, _section(values, "tokenizer"), prefix="tokenizer.")
    data = _build_dataclass(DataConfig, _section(values, "data"), prefix="data.")
    _check_segments(tokenizer, model, config_class)
    checkpoint = model.pop("checkpoint", None)
    if checkpoint is None:
        _check_model(model, tokenizer.max_length)
        _check_tokenizer(tokenizer, data)
    elif not isinstance(checkpoint, str) or not checkpoint:
        raise ValueError(f"`model.checkpoint` must be a folder or a Hub id, got {checkpoint!r}")
    else:
        model["checkpoint"] = str(Path(checkpoint).expanduser()) if checkpoint.startswith("~") else checkpoint
    training = dict(_section(values, "training"))
    _check_not_managed(training, MANAGED_TRAINING_KEYS, prefix="training.")
    check_keys(training, field_names(TrainingArguments), prefix="training.")
    _check_training(training)
    return ExperimentConfig(
        output_dir=str(Path(str(values["output_dir"])).expanduser()),
        objective=objective,
        mlm_probability=mlm_probability,
        seed=seed,
        model=model,
        tokenizer=tokenizer,
        data=data,
        training=training,
    )


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Turn `--section.key value` words (or `--section.key=value`) into nested values; values are read as YAML.

    Raises:
        ValueError: a word that is no option, or an option without a value.
    """
    values: dict[str, Any] = {}
    words = list(words)
    while words:
        word = words.pop(0)
        if not re.match(r"--[A-Za-z_]", word):
            raise ValueError(f"expected an option of the form --section.key, got {word!r}")
        option, equals, text = word[2:].partition("=")
        if not equals:
            if not words:
                raise ValueError(f"option --{option} needs a value")
            text = words.pop(0)
        *sections, key = option.split(".")
        target = values
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ValueError(
                    f"option --{option} needs a section {section!r}, which another option sets to a value"
                )
        target[key] = parse_yaml(text, source=f"the value of --{option}")
    return values


def differences(left: Mapping[str, Any], right: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the keys whose values differ between two nested mappings."""
    names = []
    for key in sorted({*left, *right}, key=str):
        old, new = left.get(key), right.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            names += differences(old, new, prefix=f"{prefix}{key}.")
        elif old != new:
            names.append(f"{prefix}{key}")
    return names


def read_with_bases(path: str | Path, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """Nested values of a YAML file, or the name of a packaged one, over those of its bases.

    Errors are those of [`load_experiment`].
    """
    file = _find(path)
    if str(file) in seen:
        raise ValueError(f"`base` goes round in circles: {' -> '.join((*seen, str(file)))}")
    values = read_yaml(file)
    bases = values.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ValueError(f"`base` of {file} must be a name or a list of names, got {bases!r}")
    merged: dict[str, Any] = {}
    for base in bases:
        beside = Path(str(file)).parent / base
        found = next((candidate for candidate in (beside, Path(f"{beside}.yaml")) if candidate.is_file()), base)
        merged = merge(merged, read_with_bases(found, (*seen, str(file))))
    return merge(merged, values)


def _find(path: str | Path):
    if Path(path).is_file():
        return Path(path)
    if Path(path).suffix in (".yaml", ".yml"):
        raise FileNotFoundError(f"no configuration file {str(path)!r}")
    return packaged_config(str(path))


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values of `base`, with those of `changes` in their place where there are any."""
    merged = dict(base)
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = values.get(name) or {}
    if not isinstance(section, Mapping):
        raise ValueError(f"`{name}` must be a mapping of keys to values, got {section!r}")
    return section


def _check_not_managed(values: Mapping[str, Any], managed: Mapping[str, str], prefix: str) -> None:
    for key in values:
        if key in managed:
            raise ValueError(f"`{prefix}{key}` can't be set: {managed[key]}")


def _check_objective(objective: Any, mlm_probability: Any) -> None:
    if objective not in OBJECTIVES:
        nearest = difflib.get_close_matches(str(objective), OBJECTIVES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"`objective` must be one of {list(OBJECTIVES)}, got {objective!r}; the nearest one is {nearest!r}"
        )
    if mlm_probability is None:
        return
    if objective != MaskedLM.name:
        raise ValueError(
            f"`mlm_probability` ({mlm_probability!r}) is for the objective {MaskedLM.name!r}, not for {objective!r}"
        )
    if (
        isinstance(mlm_probability, bool)
        or not isinstance(mlm_probability, int | float)
        or not 0 < mlm_probability < 1
    ):
        raise ValueError(f"`mlm_probability` must be between 0 and 1 (exclusive), got {mlm_probability!r}")


def _check_segments(tokenizer: TokenizerConfig, model: Mapping[str, Any], config_class: type) -> None:
    if not isinstance(tokenizer.segments, bool):
        raise ValueError(f"`tokenizer.segments` must be true or false, got {tokenizer.segments!r}")
    if tokenizer.segments and "checkpoint" not in model and config_class is not HSAConfig:
        raise ValueError(
            "`tokenizer.segments` is for models that attend along a tree: set `model.model_type` to 'hsa'"
        )


def _check_model(model: Mapping[str, Any], max_length: int) -> None:
    try:
        fields = {name: value for name, value in model.items() if name != "model_type"}
        config_class = architecture(model.get("model_type", DEFAULT_ARCHITECTURE)).config_class
        config = config_class(**{"max_position_embeddings": max_length, **fields})
    except StrictDataclassError as error:
        raise ValueError(f"section `model` is not valid: {error}") from error
    if config.max_position_embeddings < max_length:
        raise ValueError(
            f"`model.max_position_embeddings` ({config.max_position_embeddings}) must be at least "
            f"`tokenizer.max_length` ({max_length})"
        )


def _check_tokenizer(tokenizer: TokenizerConfig, data: DataConfig) -> None:
    """Refuse what would cut off or not know part of the generated expressions or of the images."""
    pixels = data.task == "cifar10"
    if tokenizer.kind is not None and (tokenizer.kind == "pixels") != pixels:
        kinds = [kind for kind in TOKENIZER_KINDS if (kind == "pixels") == pixels]
        raise ValueError(f"`tokenizer.kind` must be one of {kinds} for the task {data.task!r}, got {tokenizer.kind!r}")
    if pixels:
        longest = data.image_size**2
    elif data.task == "listops" and tokenizer.kind in (None, "listops"):
        longest = data.listops.max_length
    else:
        return
    longest += tokenizer.add_cls_token
    if tokenizer.max_length < longest:
        raise ValueError(
            f"`tokenizer.max_length` must be at least {longest}, the length of the inputs of {data.task!r}, got "
            f"{tokenizer.max_length}: a shortened input would not have its label"
        )


def _check_training(training: Mapping[str, Any]) -> None:
    types = get_type_hints(TrainingArguments)
    metadata = {f.name: f.metadata for f in dataclasses.fields(TrainingArguments)}
    for key, value in training.items():
        expected = types[key]
        if float in (expected, *get_args(expected)):
            expected = expected | int
        try:
            type_validator(key, value, expected)
        except TypeError as error:
            name = expected.__name__ if isinstance(expected, type) else expected
            raise ValueError(f"`training.{key}` must be of type {name}, got {value!r}") from error
        if key == "max_steps" and value < 1 and value != -1:
            raise ValueError(f"`training.max_steps` must be at least 1, or -1 to count epochs, got {value!r}")
        if key in POSITIVE_TRAINING_KEYS and value is not None and not value > 0:
            raise ValueError(f"`training.{key}` must be greater than 0, got {value!r}")
        if key in NOT_NEGATIVE_TRAINING_KEYS and not value >= 0:
            raise ValueError(f"`training.{key}` must be at least 0, got {value!r}")
        choices = metadata[key].get("choices")
        if choices and value is not None and value not in choices:
            raise ValueError(f"`training.{key}` must be one of {list(choices)}, got {value!r}")


def _build_dataclass(cls, values: Mapping[str, Any], prefix: str):
    fields = {f.name: f for f in dataclasses.fields(cls)}
    check_keys(values, fields, prefix)
    kwargs = {}
    for key, value in values.items():
        nested = fields[key].default_factory
        if dataclasses.is_dataclass(nested):
            value = _build_dataclass(nested, _section(values, key), prefix=f"{prefix}{key}.")
        kwargs[key] = value
    return cls(**kwargs)
