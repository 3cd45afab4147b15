"""Pushing a checkpoint to the Hugging Face Hub: checked first, then sent in one commit."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

import transformers
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.utils import validate_repo_id
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .architectures import ARCHITECTURES
from .checkpoints import load_checkpoint, local_folder, read_config, weight_files


TOKENIZER_PATTERNS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)
# What describes a checkpoint without being needed to load it: its card, its configs, its measured results.
DESCRIPTION_PATTERNS = ("README.md", "LICENSE", "*.yaml", "*.png", "*curve*.json", "*metrics*.json", "*_results.json")
# Files of an older push that `from_pretrained` would still read, or prefer, beside the new ones.
STALE_PATTERNS = ("model*.safetensors", SAFE_WEIGHTS_INDEX_NAME, *TOKENIZER_PATTERNS)


def push_checkpoint(
    checkpoint: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> str:
    """Push a checkpoint folder to the Hub, so that it loads there with every Auto class that the model serves.

    The checkpoint is loaded strictly first: a broken one is never sent. Only the config, weights, tokenizer, model
    code, card, configs and results travel; optimizer states and `checkpoint-N` folders stay. Everything goes in one
    commit, which also removes weights and tokenizer files of an older push that the new ones do not replace: until it
    is made, the repository keeps serving its old revision, and a push that breaks off changes nothing.

    Args:
        checkpoint (`str` or `os.PathLike`): a folder with a model and its tokenizer, written by `save_pretrained`.
        repo_id (`str`): `"name"` or `"namespace/name"`. The repository is made when it does not exist.
        private (`bool`, *optional*): visibility of a new repository; by default that of the account.
        revision (`str`, *optional*): branch to commit to, made when it does not exist; the main branch by default.
        commit_message (`str`, *optional*): names the model class by default.
        token (`str` or `bool`, *optional*): access token; the stored one by default.

    Returns:
        `str`: URL of the commit.

    Raises:
        FileNotFoundError: no such folder, or one without a config, weights or a tokenizer.
        ValueError: a malformed `repo_id`, or a checkpoint that [`load_checkpoint`] refuses.
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses, for instance because it does not know the token or
            because somebody else committed to the branch during the push.
        RuntimeError: an upload broke off.
    """
    if not isinstance(repo_id, str) or not repo_id:
        raise ValueError(f"`repo_id` must be 'name' or 'namespace/name', got {repo_id!r}")
    validate_repo_id(repo_id)
    folder = local_folder(checkpoint)
    if folder is None:
        raise FileNotFoundError(f"`checkpoint` {str(checkpoint)!r} does not exist: it must be an existing folder")
    config = read_config(folder)
    model, tokenizer = load_checkpoint(folder, _auto_class(config))

    api = HfApi(token=token)
    with _release_folder(folder, config, model, tokenizer) as release:
        files = release_files(release)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        head = api.model_info(repo_id, revision=revision)
        remote_names = [sibling.rfilename for sibling in head.siblings or []]
        # `upload_folder` may split a push into several commits; `create_commit` makes exactly one.
        commit = api.create_commit(
            repo_id,
            operations=[
                *(CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path) for path in files),
                *(CommitOperationDelete(path_in_repo=name) for name in _stale_names(remote_names, files)),
            ],
            commit_message=commit_message or f"Upload {type(model).__name__}",
            revision=revision,
            # Unchanged files are left out of a commit: two pushes at once must not end in a mixture.
            parent_commit=head.sha,
        )
    return commit.commit_url


def release_files(folder: Path) -> list[Path]:
    """The files of a checkpoint folder that a user of the model needs, in alphabetical order.

    Args:
        folder (`Path`): a checkpoint folder.

    Returns:
        `list[Path]`: config, weights, tokenizer, the code that the config's `auto_map` names, card, configs, results.

    Raises:
        FileNotFoundError: no config, weights or code where there must be.
        ValueError: a broken config or index.
    """
    names = {CONFIG_NAME}
    weights = weight_files(folder)
    names.update(path.name for path in weights)
    if weights != [folder / SAFE_WEIGHTS_NAME]:
        names.add(SAFE_WEIGHTS_INDEX_NAME)
    names.update(_code_names(folder, read_config(folder)))
    names.update(_matching_names(folder, TOKENIZER_PATTERNS + DESCRIPTION_PATTERNS))
    return [folder / name for name in sorted(names)]


def _auto_class(config: dict) -> type:
    """The Auto class that fits what the checkpoint was saved from."""
    architecture = next(iter(config.get("architectures") or []), None)
    for found in ARCHITECTURES.values():
        for auto_class, name in found.module.AUTO_CLASSES.items():
            if name == architecture:
                return getattr(transformers, auto_class)
    return AutoModelForSequenceClassification


@contextmanager
def _release_folder(
    folder: Path, config: dict, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Path]:
    """The folder itself when it holds all the code it needs, else a temporary copy that does."""
    if config["model_type"] not in ARCHITECTURES or _has_code(folder, config):
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for name in _matching_names(folder, DESCRIPTION_PATTERNS):
            shutil.copyfile(folder / name, Path(temporary, name))
        yield Path(temporary)


def _has_code(folder: Path, config: dict) -> bool:
    auto_map = config.get("auto_map") or {}
    expected = ARCHITECTURES[config["model_type"]].module.AUTO_MAP
    if any(auto_map.get(auto_class) != name for auto_class, name in expected.items()):
        return False
    try:
        _code_names(folder, config)
    except FileNotFoundError:
        return False
    return True


def _code_names(folder: Path, config: dict) -> set[str]:
    """Names of the modules in the config's `auto_map` and of their relative imports."""
    # "other/repository--module.Class" names code that lies elsewhere.
    local = (name for name in (config.get("auto_map") or {}).values() if isinstance(name, str) and "--" not in name)
    files = {folder / f"{name.split('.')[0]}.py" for name in local}
    imported = {Path(path) for file in files for path in get_relative_import_files(file)}
    return {path.name for path in files | imported}


def _matching_names(folder: Path, patterns: tuple[str, ...]) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file() and _matches(path.name, patterns)}


def _stale_names(remote_names: list[str], files: list[Path]) -> list[str]:
    kept = {path.name for path in files}
    return sorted(
        name for name in remote_names if name not in kept and "/" not in name and _matches(name, STALE_PATTERNS)
    )


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return not name.startswith(".") and any(fnmatchcase(name, pattern) for pattern in patterns)
