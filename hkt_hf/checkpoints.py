"""Strict loading of checkpoints, and the last one that a run wrote completely.

Plain `from_pretrained` only warns when weights are missing, left over or of another shape, and goes on with random
numbers in their place. Everything here refuses instead, and says which file or weight is at fault.
"""

import json
import logging
import os
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


logger = logging.getLogger(__name__)

TOKENIZER_ENTRY_FILES = ("tokenizer_config.json", "tokenizer.json")
# What a resumed run reads besides the model; each is a zip archive written by `torch.save`.
RESUME_FILES = ("optimizer.pt", "scheduler.pt", "rng_state*.pth")
OPTIONAL_RESUME_FILES = ("scaler.pt",)
TRAINER_STATE_NAME = "trainer_state.json"
# Arguments of `from_pretrained` that say where files come from: they hold for the model and for the tokenizer.
SOURCE_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


def load_model(
    checkpoint: str | os.PathLike, auto_class: type = AutoModelForSequenceClassification, **kwargs
) -> PreTrainedModel:
    """Load a model whose weights are exactly those of the checkpoint.

    Args:
        checkpoint (`str` or `os.PathLike`): a folder written by `save_pretrained`, or the id of a model on the Hub.
        auto_class (`type`, *optional*, defaults to `AutoModelForSequenceClassification`): the Auto class to load with.
        kwargs: handed on to `auto_class.from_pretrained`.

    Returns:
        [`PreTrainedModel`]: the model in evaluation mode.

    Raises:
        FileNotFoundError: no such folder, or a folder without `config.json` or without safetensors weights.
        ValueError: a file that is broken (the message names it), or weights that are missing, left over or of another
            shape (the message names the first of them); a checkpoint without a trained head says so.
    """
    for name in ("ignore_mismatched_sizes", "output_loading_info"):
        if name in kwargs:
            raise ValueError(f"`{name}` cannot be given, got {kwargs[name]!r}: loading is always strict here")
    folder = local_folder(checkpoint)
    if folder is not None:
        folder = folder / (kwargs.get("subfolder") or "")
        if kwargs.get("config") is None:
            read_config(folder)
        check_weights(folder)
    try:
        # With `ignore_mismatched_sizes` other shapes are reported like missing weights instead of raising on their own.
        model, info = auto_class.from_pretrained(
            checkpoint, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    except (SafetensorError, StrictDataclassError) as error:
        raise ValueError(f"`checkpoint` {str(checkpoint)!r} cannot be loaded: {error}") from error
    problems = _loading_problems(model, info)
    if problems:
        raise ValueError(
            f"`checkpoint` {str(checkpoint)!r} does not fit {type(model).__name__}: " + "; ".join(problems)
        )
    return model


def load_checkpoint(
    checkpoint: str | os.PathLike, auto_class: type = AutoModelForSequenceClassification, **kwargs
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model as [`load_model`] does, and the tokenizer that lies beside it.

    Args:
        checkpoint (`str` or `os.PathLike`): a folder with a model and a tokenizer, or the id of a model on the Hub.
        auto_class (`type`, *optional*, defaults to `AutoModelForSequenceClassification`): the Auto class to load with.
        kwargs: handed on to `auto_class.from_pretrained`; those that say where files come from (`revision`, `token`,
            `trust_remote_code`, ...) also to `AutoTokenizer.from_pretrained`.

    Returns:
        `tuple[PreTrainedModel, PreTrainedTokenizerBase]`: the model in evaluation mode and its tokenizer.

    Raises:
        FileNotFoundError: as [`load_model`], or a folder without a tokenizer.
        ValueError: as [`load_model`], a broken tokenizer, or one that knows more tokens than the model has embeddings.
    """
    folder = local_folder(checkpoint)
    if folder is not None:
        _check_has_tokenizer(folder / (kwargs.get("subfolder") or ""))
    model = load_model(checkpoint, auto_class, **kwargs)
    source = {name: kwargs[name] for name in SOURCE_ARGUMENTS if name in kwargs}
    return model, load_tokenizer(checkpoint, model.config, **source)


def load_tokenizer(checkpoint: str | os.PathLike, config: PreTrainedConfig, **source) -> PreTrainedTokenizerBase:
    """Load the tokenizer that lies beside a model with the configuration `config`.

    Args:
        checkpoint (`str` or `os.PathLike`): a folder with a tokenizer, or the id of a model on the Hub.
        config (`PreTrainedConfig`): says how many tokens the model has embeddings for.
        source: handed on to `AutoTokenizer.from_pretrained`.

    Raises:
        FileNotFoundError: no such folder, or a folder without a tokenizer.
        ValueError: a broken tokenizer, or one that knows more tokens than the model has embeddings.
    """
    folder = local_folder(checkpoint)
    if folder is not None:
        _check_has_tokenizer(folder / (source.get("subfolder") or ""))
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, **source)
    except Exception as error:  # `tokenizers` raises bare `Exception` for a broken file.
        raise ValueError(f"the tokenizer of `checkpoint` {str(checkpoint)!r} cannot be loaded: {error}") from error
    vocab_size = getattr(config, "vocab_size", None)
    if vocab_size is not None and len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer of `checkpoint` {str(checkpoint)!r} knows {len(tokenizer)} tokens, but the model has "
            f"embeddings for {vocab_size} (`vocab_size`): they do not belong together"
        )
    return tokenizer


def last_complete_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """The newest `checkpoint-N` of a Trainer output folder that training can be resumed from.

    The Trainer writes a checkpoint file by file under its final name, so a run that was killed may leave a partial
    folder behind. A checkpoint counts as complete when its config, weights and Trainer state are whole and the states
    of optimizer, scheduler and random numbers are whole archives. Partial ones are skipped with a warning.

    Args:
        output_dir (`str` or `os.PathLike`): the `output_dir` of the run. It need not exist.

    Returns:
        `Path`, *optional*: the folder, or `None` when there is no complete checkpoint.

    Raises:
        ValueError: `output_dir` is a file.
    """
    output_dir = Path(output_dir)
    if not output_dir.exists():
        return None
    if not output_dir.is_dir():
        raise ValueError(f"`output_dir` must be a folder, got the file {str(output_dir)!r}")
    for step, folder in sorted(_checkpoint_folders(output_dir), reverse=True):
        try:
            _check_resumable(folder, step)
        except (OSError, ValueError) as error:
            logger.warning("Skipping %s, which was not written completely: %s", folder, error)
        else:
            return folder
    return None


def local_folder(checkpoint: str | os.PathLike) -> Path | None:
    """The folder that `checkpoint` names, or `None` when it can only be the id of a model on the Hub.

    Raises:
        FileNotFoundError: neither an existing folder nor a well-formed id.
        ValueError: empty, a file, or not a path at all.
    """
    if not isinstance(checkpoint, (str, os.PathLike)) or not str(checkpoint):
        raise ValueError(f"`checkpoint` must be a folder or the id of a model on the Hub, got {checkpoint!r}")
    path = Path(checkpoint)
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"`checkpoint` must be a folder, got the file {str(checkpoint)!r}")
    if isinstance(checkpoint, os.PathLike) or not _is_repo_id(checkpoint):
        raise FileNotFoundError(f"`checkpoint` {str(checkpoint)!r} does not exist: it must be an existing folder")
    return None


def read_config(folder: Path) -> dict:
    """The `config.json` of a checkpoint folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not a JSON object or has no `model_type`.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} does not exist: a checkpoint folder must have a {CONFIG_NAME}")
    config = _read_json(path)
    if not isinstance(config.get("model_type"), str):
        raise ValueError(f"{str(path)!r} has no `model_type`: it is not the configuration of a model")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that `from_pretrained` reads from a checkpoint folder, one or the shards of its index.

    Raises:
        FileNotFoundError: no weights, or a shard that the index names is missing.
        ValueError: the index is not a valid one.
    """
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} has no weights: neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}"
        )
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{str(index)!r} is broken: `weight_map` must map weights to file names")
    shards = [folder / name for name in sorted(set(weight_map.values()))]
    for shard in shards:
        if shard.parent != folder or not shard.is_file():
            raise FileNotFoundError(f"{str(shard)!r} does not exist beside {SAFE_WEIGHTS_INDEX_NAME}, which names it")
    return shards


def check_weights(folder: Path) -> None:
    """Check that a checkpoint folder has its weights, whole; errors as in [`weight_files`] and [`check_safetensors`]."""
    for path in weight_files(folder):
        check_safetensors(path)


def check_safetensors(path: Path) -> None:
    """Check that a safetensors file has a valid header and the length that the header tells; weights are not read.

    Raises:
        ValueError: it is truncated or not a safetensors file.
    """
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is truncated or not a safetensors file: {error}") from error


def _is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object, got {type(content).__name__}")
    return content


def _check_has_tokenizer(folder: Path) -> None:
    if not any((folder / name).is_file() for name in TOKENIZER_ENTRY_FILES):
        raise FileNotFoundError(
            f"{str(folder)!r} has no tokenizer ({' or '.join(TOKENIZER_ENTRY_FILES)}): "
            "save it there with `tokenizer.save_pretrained`"
        )


def _loading_problems(model: PreTrainedModel, info: dict) -> list[str]:
    missing, unexpected = info["missing_keys"], info["unexpected_keys"]
    prefix = f"{model.base_model_prefix}."
    head = [key for key in missing if model.base_model is not model and not key.startswith(prefix)]
    problems = []
    if head and len(head) == len(missing):
        problems.append(f"the checkpoint has no trained head, missing weights {_first(head)}")
    elif missing:
        problems.append(f"missing weights {_first(missing)}")
    if unexpected:
        problems.append(f"unexpected weights {_first(unexpected)}")
    if info["mismatched_keys"]:
        shapes = (
            f"{key} {tuple(found)} instead of {tuple(expected)}" for key, found, expected in info["mismatched_keys"]
        )
        problems.append(f"weights of another shape {_first(shapes)}")
    if info["error_msgs"]:
        problems.append(f"errors {_first(info['error_msgs'])}")
    return problems


def _first(items: Iterable[str], limit: int = 5) -> str:
    items = sorted(items)
    more = f", ... ({len(items)} in all)" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def _checkpoint_folders(output_dir: Path) -> list[tuple[int, Path]]:
    matches = ((re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name), path) for path in output_dir.iterdir())
    return [(int(match[1]), path) for match, path in matches if match and path.is_dir()]


def _check_resumable(folder: Path, step: int) -> None:
    read_config(folder)
    check_weights(folder)
    for pattern in RESUME_FILES:
        if not any(folder.glob(pattern)):
            raise FileNotFoundError(f"{pattern} is missing")
    for pattern in RESUME_FILES + OPTIONAL_RESUME_FILES:
        for path in folder.glob(pattern):
            _check_archive(path)
    path = folder / TRAINER_STATE_NAME
    saved_step = _read_json(path).get("global_step")
    if saved_step != step:
        raise ValueError(f"{str(path)!r} has `global_step` {saved_step!r} instead of {step}")


def _check_archive(path: Path) -> None:
    try:
        # The table of contents lies at the end of an archive: opening one that was cut off fails.
        zipfile.ZipFile(path).close()
    except zipfile.BadZipFile as error:
        raise ValueError(f"{str(path)!r} is truncated or not written by `torch.save`: {error}") from error
