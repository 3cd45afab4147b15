"""ListOps (Nangia & Bowman 2018, arXiv 1804.06028): nested list operations, generated from a seed and cached on disk.

The distribution of what is drawn is that of the authors' generator, in the long variant of Long Range Arena (Tay et al. 2021,
arXiv 2011.04006); repeated expressions are left out. The expressions are drawn with our own stream of random numbers, so they are not the published files.
"""

import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
from tqdm.auto import tqdm


# Part of the cache key: to be raised with any change of what a configuration generates.
GENERATOR_VERSION = 1
OPERATOR_PROBABILITY = 0.25
MAX_REJECTIONS = 1_000_000

DIGITS = tuple("0123456789")
CLOSE = "]"
LABEL_NAMES = list(DIGITS)


def _minimum(values: list[int]) -> int:
    return min(values)


def _maximum(values: list[int]) -> int:
    return max(values)


def _median(values: list[int]) -> int:
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) // 2


def _sum_modulo_10(values: list[int]) -> int:
    return sum(values) % 10


_OPERATIONS = {"[MIN": _minimum, "[MAX": _maximum, "[MED": _median, "[SM": _sum_modulo_10}
_DIGIT_VALUES = {digit: value for value, digit in enumerate(DIGITS)}
OPERATORS = tuple(_OPERATIONS)


@dataclass
class ListOpsConfig:
    """What ListOps expressions to generate.

    Args:
        seed (`int`, *optional*, defaults to 0): seed of the one random stream that all splits come from.
        min_length (`int`, *optional*, defaults to 32): fewest tokens of an expression; `[MAX` is one token, `]` is one.
        max_length (`int`, *optional*, defaults to 128): most tokens of an expression (inclusive).
        max_depth (`int`, *optional*, defaults to 10): deepest nesting, counting the digits: the root is at depth 1, and
            a node at `max_depth` is always a digit.
        max_args (`int`, *optional*, defaults to 10): most arguments of an operator; the fewest are 2.
        num_train (`int`, *optional*, defaults to 20000): expressions to train on.
        num_validation (`int`, *optional*, defaults to 2000): expressions to validate on.
        num_test (`int`, *optional*, defaults to 2000): expressions to test on.

    Raises:
        ValueError: a value out of range, or lengths that `max_depth` and `max_args` can't reach.
    """

    seed: int = 0
    min_length: int = 32
    max_length: int = 128
    max_depth: int = 10
    max_args: int = 10
    num_train: int = 20_000
    num_validation: int = 2_000
    num_test: int = 2_000

    def __post_init__(self):
        for name, value in asdict(self).items():
            least = {"seed": 0, "max_args": 2}.get(name, 1)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"`data.listops.{name}` must be an integer of at least {least}, got {value!r}")
        if self.min_length > self.max_length:
            raise ValueError(
                f"`data.listops.min_length` must be at most max_length={self.max_length}, got {self.min_length}"
            )
        longest = self._longest()
        if self.min_length > longest:
            raise ValueError(
                f"`data.listops.min_length`={self.min_length} can't be reached with max_depth={self.max_depth} and "
                f"max_args={self.max_args}: the longest such expression has {longest} tokens"
            )

    def _longest(self) -> int:
        length = 1
        for _ in range(self.max_depth - 1):
            length = self.max_args * length + 2
            if length >= self.min_length:
                break
        return length


def evaluate(expression: str) -> int:
    """Value of a ListOps expression.

    Args:
        expression (`str`): tokens separated by blanks, as in `"[MAX 2 9 [MIN 4 7 ] 0 ]"`. `[MIN`, `[MAX`, `[MED`
            (median, truncated to an integer) and `[SM` (sum modulo 10) open a list, `]` closes it.

    Returns:
        `int`: a digit, 0 to 9.

    Raises:
        ValueError: the expression is malformed; the message names the token and its position (from 0).
    """
    open_lists: list[tuple[str, list[int]]] = []
    result = None
    position = -1
    for position, token in enumerate(expression.split()):
        if result is not None:
            raise ValueError(f"unexpected token {token!r} at position {position}: the expression has already ended")
        if token in _OPERATIONS:
            open_lists.append((token, []))
            continue
        value = _DIGIT_VALUES.get(token)
        if value is None:
            value = _close_list(open_lists, token, position)
        if open_lists:
            open_lists[-1][1].append(value)
        else:
            result = value
    if result is None:
        where = f"{open_lists[-1][0]!r} is not closed" if open_lists else "it is empty"
        raise ValueError(f"the expression ends too early, after position {position}: {where}")
    return result


def _close_list(open_lists: list[tuple[str, list[int]]], token: str, position: int) -> int:
    if token != CLOSE:
        raise ValueError(
            f"unknown token {token!r} at position {position}: a token is a digit, {CLOSE!r} or one of {list(OPERATORS)}"
        )
    if not open_lists:
        raise ValueError(f"{CLOSE!r} at position {position} closes nothing")
    operator, arguments = open_lists.pop()
    if not arguments:
        raise ValueError(f"{CLOSE!r} at position {position} closes {operator!r}, which has no arguments")
    return _OPERATIONS[operator](arguments)


def generate(config: ListOpsConfig) -> Iterator[tuple[str, int]]:
    """Draw distinct expressions without end.

    Trees are drawn as in Nangia & Bowman (2018): a node above `max_depth` is an operator with probability 0.25 and
    otherwise a digit, an operator has 2 to `max_args` arguments, all choices are uniform; expressions of unwanted
    length, and repeated ones, are rejected. The stream is the same on any machine: it uses only `random.Random.random`.

    Args:
        config ([`ListOpsConfig`]): seed and sizes; the numbers of examples are not used.

    Yields:
        (`str`, `int`): an expression, tokens separated by blanks, and its value, 0 to 9.

    Raises:
        ValueError: a million trees in a row were rejected.
    """
    draw = random.Random(config.seed).random
    seen: set[bytes] = set()
    while True:
        for _ in range(MAX_REJECTIONS):
            tokens = _draw_tree(draw, config.min_length, config.max_length, config.max_depth, config.max_args)
            if tokens is None:
                continue
            expression = " ".join(tokens)
            digest = hashlib.blake2b(expression.encode(), digest_size=16).digest()
            if digest not in seen:
                break
        else:
            raise ValueError(
                f"no new ListOps expression of {config.min_length} to {config.max_length} tokens in {MAX_REJECTIONS:,} "
                f"draws, after {len(seen):,} expressions: widen `data.listops.min_length` and `max_length`, raise "
                f"`max_depth`={config.max_depth} or `max_args`={config.max_args}, or ask for fewer examples"
            )
        seen.add(digest)
        yield expression, evaluate(expression)


def _draw_tree(draw, min_length: int, max_length: int, max_depth: int, max_args: int) -> list[str] | None:
    """Tokens of one random tree, or `None` where its length is out of range."""
    tokens: list[str] = []
    missing: list[int] = []  # arguments still to come, for every open operator
    length = 1  # of the shortest tree that begins with `tokens`
    while True:
        if len(missing) < max_depth - 1 and draw() < OPERATOR_PROBABILITY:
            tokens.append(OPERATORS[int(draw() * 4)])
            num_args = 2 + int(draw() * (max_args - 1))
            length += num_args + 1
            if length > max_length:
                return None
            missing.append(num_args)
            continue
        tokens.append(DIGITS[int(draw() * 10)])
        while missing:
            missing[-1] -= 1
            if missing[-1]:
                break
            missing.pop()
            tokens.append(CLOSE)
        if not missing:
            return tokens if length >= min_length else None


def load_listops(config: ListOpsConfig, cache_dir: str | Path | None = None) -> datasets.DatasetDict:
    """ListOps as a dataset; generated on the first call, read from the cache later.

    No expression occurs twice, within or across splits. The test split is drawn first, then validation, then train:
    with the same seed and lengths, the test split does not depend on the sizes of the others. Where there are few expressions
    of the shortest lengths (400 of 4 tokens), test takes more of them than its share; from about 16 tokens on, the splits are
    alike.

    Args:
        config ([`ListOpsConfig`]): seed, lengths and sizes.
        cache_dir (`str` or `Path`, *optional*): folder of the cache; by default `hkt_hf` in that of `datasets`. A
            configuration's JSON-lines files are the same, byte for byte, on any machine.

    Returns:
        [`datasets.DatasetDict`]: splits `train`, `validation`, `test` with the columns `text` (`str`) and `label`
        (class label `"0"` to `"9"`).

    Raises:
        ValueError: there are too few distinct expressions of the lengths asked for.
    """
    root = Path(cache_dir) if cache_dir is not None else Path(datasets.config.HF_DATASETS_CACHE) / "hkt_hf"
    folder = root / f"listops-{_fingerprint(config)}"
    if not folder.is_dir():
        _build(config, folder)
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=LABEL_NAMES)})
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")}
    return datasets.load_dataset("json", data_files=files, features=features, cache_dir=str(root))


def _fingerprint(config: ListOpsConfig) -> str:
    parameters = {"version": GENERATOR_VERSION, **asdict(config)}
    return hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()[:16]


def _build(config: ListOpsConfig, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write_splits(config, unfinished)
        unfinished.chmod(0o755)
        try:
            os.replace(unfinished, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process has built the same files meanwhile
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_splits(config: ListOpsConfig, folder: Path) -> None:
    sizes = {"test": config.num_test, "validation": config.num_validation, "train": config.num_train}
    examples = generate(config)
    with tqdm(total=sum(sizes.values()), desc="Generating ListOps", unit="expression", disable=None) as progress:
        for split, size in sizes.items():
            with open(folder / f"{split}.jsonl", "w", encoding="utf-8", newline="\n") as file:
                for _ in range(size):
                    text, label = next(examples)
                    file.write(json.dumps({"text": text, "label": label}) + "\n")
                    progress.update()
