"""Pictures and words under one root: which of two things does a picture show, with HSA along nested signals (2509.15448).

Data of two modalities, made of CIFAR-10 (ours): the pixels of a grey picture, row by row, then a question that names two of its
classes, in either order, of which one is the picture's; that one is the label. Words alone are right half of the time, and what
the picture alone is worth, one of the arms measures. The trees differ, the model and the data do not.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup, set_seed

from ..data import DataConfig, load_data
from ..data.images import CIFAR10_NAMES
from ..environment import environment
from ..files import replacing, write_json
from ..modeling import HSAConfig, HSAForSequenceClassification, SignalTree
from . import statistics
from .arms import initialize_by_name


matplotlib.use("Agg")
from matplotlib import pyplot as plt


logger = logging.getLogger(__name__)

QUESTIONS = ("is it one {} or one {}", "what is it {} or {}", "one {} or one {}", "{} or {}")
LONGEST_QUESTION = 7
NUM_PIXEL_VALUES = 256
PAD = 0
WORDS = sorted({word for question in QUESTIONS for word in question.split()} - {"{}"} | {*CIFAR10_NAMES})
"""A pixel of brightness `v` is the token `1 + v`; then come the words."""
VOCABULARY = {word: 1 + NUM_PIXEL_VALUES + index for index, word in enumerate(WORDS)}


def _flat(side: int, lengths: torch.Tensor) -> SignalTree:
    return SignalTree.regular(side**2 + lengths, (None,), size=side**2 + LONGEST_QUESTION)


def _picture(side: int, lengths: torch.Tensor) -> SignalTree:
    return _flat(side, torch.zeros_like(lengths))


def _question(lengths: torch.Tensor) -> SignalTree:
    return SignalTree.regular(lengths, (None,), size=LONGEST_QUESTION)


def _modalities(side: int, lengths: torch.Tensor) -> SignalTree:
    pixels = torch.full_like(lengths, side**2)
    return SignalTree.join([SignalTree.regular(pixels, (None,)), _question(lengths)])


def _quadtree(side: int, lengths: torch.Tensor) -> SignalTree:
    return SignalTree.join([SignalTree.from_grid(side, side, 2, batch_size=len(lengths)), _question(lengths)])


def _line(side: int, lengths: torch.Tensor) -> SignalTree:
    pixels = torch.full_like(lengths, side**2)
    return SignalTree.join([SignalTree.regular(pixels, 4), _question(lengths)])


ARMS: dict[str, Callable[[int, torch.Tensor], SignalTree]] = {
    "flat": _flat,
    "modalities": _modalities,
    "quadtree": _quadtree,
    "line": _line,
    "picture": _picture,
}
"""Trees by name: all tokens under the root; two modalities under it; the picture also in blocks of 2 by 2, and of 4 pixels in
line; pixels alone, the question hidden. Each is called with the side of the pictures and the words of each question, and has
the lengths that the model is to see."""


@dataclass(frozen=True)
class Protocol:
    """What is trained.

    Args:
        side (`int`): height and width of the pictures, a divisor of 32.
        arms (sequence of `str`): keys of `ARMS`; differences are taken to `"flat"`.
        seeds (sequence of `int`): of the final runs.
        search_seed (`int`): of the runs that choose the learning rate, by their loss on validation data.
        learning_rates (sequence of `float`): each arm tries all, with full runs.
        steps, batch_size (`int`): of every run.
        num_train, num_validation, num_test (`int`): pictures; those of training get a new question each time.
        model (dict): fields of [`HSAConfig`].

    Raises:
        ValueError: an unknown arm, nothing to run, or a search seed that is also a final one.
    """

    side: int
    arms: Sequence[str]
    seeds: Sequence[int]
    search_seed: int
    learning_rates: Sequence[float]
    steps: int
    batch_size: int
    num_train: int
    num_validation: int
    num_test: int
    model: dict[str, Any]

    def __post_init__(self):
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown or not self.arms or not self.seeds or not self.learning_rates:
            raise ValueError(
                f"`arms` must be among {list(ARMS)}, and there must be arms, seeds and rates, got {self.arms}"
            )
        if self.search_seed in self.seeds:
            raise ValueError(f"`search_seed` ({self.search_seed}) must not be one of `seeds` {list(self.seeds)}")


def two_modalities(
    protocol: Protocol, path: str | Path, data_path: str | None = None, command: str | None = None
) -> dict[str, Any]:
    """Train every arm, first to choose its learning rate; what is in the file at `path` already is kept.

    Args:
        protocol ([`Protocol`]): what to train.
        path (`str` or `Path`): the JSON file, written after each run.
        data_path (`str`, *optional*): CIFAR-10, as `data.path` of an experiment; by default that of the Hub.
        command (`str`, *optional*): the command line that asked for it, for the file.

    Returns:
        `dict`: the file's content: `rows`, one a run, and `differences` to the flat tree in percentage points.

    Raises:
        ValueError: a file of another protocol or other data, or an arm that diverges with every learning rate.
    """
    splits = _read(protocol, data_path)
    path = Path(path)
    header = {"protocol": json.loads(json.dumps(asdict(protocol))), "data_fingerprint": _fingerprint(splits)}
    result: dict[str, Any] = {**header, "rows": [], "differences": {}}
    if path.is_file():
        result = json.loads(path.read_text(encoding="utf-8"))
        if {name: result.get(name) for name in header} != header:
            raise ValueError(f"{path} was measured with another protocol or other data: choose another file")

    def run(stage: str, arm: str, seed: int, rate: float) -> dict[str, Any]:
        case = {"stage": stage, "arm": arm, "seed": seed, "learning_rate": rate}
        for row in result["rows"]:
            if case.items() <= row.items():
                return row
        row = {**case, **_train(protocol, arm, seed, rate, splits, "test" if stage == "final" else "validation")}
        result["rows"].append(row)
        result.update(command=command, **environment())
        write_json(path, result)
        return row

    for arm in tqdm(protocol.arms, desc="arms"):
        searched = [run("search", arm, protocol.search_seed, rate) for rate in protocol.learning_rates]
        finite = [row for row in searched if math.isfinite(row["loss"])]
        if not finite:
            raise ValueError(f"`learning_rates` {list(protocol.learning_rates)}: {arm} diverged with each of them")
        rate = min(finite, key=lambda row: row["loss"])["learning_rate"]
        for seed in protocol.seeds:
            run("final", arm, seed, rate)
    accuracies = {
        arm: [100 * row["accuracy"] for row in result["rows"] if (row["stage"], row["arm"]) == ("final", arm)]
        for arm in protocol.arms
    }
    for arm in protocol.arms:
        if arm != "flat" and "flat" in protocol.arms and len(protocol.seeds) > 1:
            result["differences"][arm] = statistics.paired_difference(accuracies[arm], accuracies["flat"])
    write_json(path, result)
    return result


def examples(
    pixels: torch.Tensor, classes: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Questions for pictures, drawn anew.

    Args:
        pixels (`torch.Tensor`): int64 `(n, side^2)`, 0 to 255.
        classes (`torch.Tensor`): int64 `(n,)`, in the order of `CIFAR10_NAMES`.
        generator (`torch.Generator`): draws the class that is named beside the right one, the order, and the wording.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: token ids `(n, side^2 + LONGEST_QUESTION)` and words of each question `(n,)`.
    """
    count = len(pixels)
    others = (classes + torch.randint(1, len(CIFAR10_NAMES), (count,), generator=generator)) % len(CIFAR10_NAMES)
    pairs = torch.stack([classes, others], dim=1)
    is_swapped = torch.randint(2, (count, 1), generator=generator) == 1
    pairs = torch.where(is_swapped, pairs.flip(1), pairs)
    wordings = torch.randint(len(QUESTIONS), (count,), generator=generator)
    words = torch.full((count, LONGEST_QUESTION), PAD)
    lengths = torch.empty(count, dtype=torch.long)
    for row in range(count):
        first, second = (CIFAR10_NAMES[index] for index in pairs[row].tolist())
        question = QUESTIONS[int(wordings[row])].format(first, second).split()
        lengths[row] = len(question)
        words[row, : len(question)] = torch.tensor([VOCABULARY[word] for word in question])
    return torch.cat([1 + pixels, words], dim=1), lengths


def _read(protocol: Protocol, data_path: str | None) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Pixels and classes of each split."""
    task = load_data(
        DataConfig(
            task="cifar10",
            path=data_path,
            image_size=protocol.side,
            max_train_samples=protocol.num_train,
            max_validation_samples=protocol.num_validation,
            max_test_samples=protocol.num_test,
        )
    )
    found = {}
    for name, split in task.splits.items():
        pixels = torch.tensor([[int(value) for value in text.split()] for text in split["text"][:]])
        found[name] = pixels, torch.tensor(split["label"][:])
    return found


def _fingerprint(splits: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for tensors in splits.values():
        for tensor in tensors:
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _train(protocol: Protocol, arm: str, seed: int, rate: float, splits, measured: str) -> dict[str, float]:
    longest = protocol.side**2 + LONGEST_QUESTION
    config = HSAConfig(
        vocab_size=1 + NUM_PIXEL_VALUES + len(WORDS),
        pad_token_id=PAD,
        max_position_embeddings=longest,
        num_labels=len(CIFAR10_NAMES),
        **protocol.model,
    )
    model = HSAForSequenceClassification(config).train()
    initialize_by_name(model, seed)
    set_seed(seed)  # dropout
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, protocol.steps // 10, protocol.steps)
    generator = torch.Generator().manual_seed(seed)
    pixels, classes = splits["train"]
    for _ in tqdm(range(protocol.steps), desc=f"{arm}, rate {rate:g}, seed {seed}", leave=False):
        picked = torch.randint(len(pixels), (protocol.batch_size,), generator=generator)
        input_ids, lengths = examples(pixels[picked], classes[picked], generator)
        loss = model(**_inputs(arm, protocol.side, input_ids, lengths), labels=classes[picked]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return _measure(model.eval(), protocol, arm, *splits[measured])


@torch.no_grad()
def _measure(model, protocol: Protocol, arm: str, pixels: torch.Tensor, classes: torch.Tensor) -> dict[str, float]:
    """Loss and accuracy on pictures with questions that are the same for all."""
    input_ids, lengths = examples(pixels, classes, torch.Generator().manual_seed(0))
    loss, correct = 0.0, 0
    for part in torch.arange(len(classes)).split(protocol.batch_size):
        inputs = _inputs(arm, protocol.side, input_ids[part], lengths[part])
        output = model(**inputs, labels=classes[part])
        loss += output.loss.item() * len(part)
        correct += int((output.logits.argmax(-1) == classes[part]).sum())
    return {"loss": loss / len(classes), "accuracy": correct / len(classes), "examples": len(classes)}


def _inputs(arm: str, side: int, input_ids: torch.Tensor, lengths: torch.Tensor) -> dict[str, Any]:
    tree = ARMS[arm](side, lengths)
    mask = torch.arange(input_ids.shape[1]) < tree.lengths[:, None]
    return {"input_ids": input_ids, "attention_mask": mask.long(), "tree": tree}


def plot(result: dict[str, Any], path: str | Path) -> None:
    """Test accuracy of every seed by arm."""
    arms = result["protocol"]["arms"]
    figure, axes = plt.subplots(figsize=(1.2 + 1.1 * len(arms), 3.6), layout="constrained")
    for place, arm in enumerate(arms):
        values = [100 * row["accuracy"] for row in result["rows"] if (row["stage"], row["arm"]) == ("final", arm)]
        axes.plot([place] * len(values), values, "o", color=f"C{place}", alpha=0.7)
        axes.hlines(sum(values) / len(values), place - 0.25, place + 0.25, color=f"C{place}")
    axes.set_xticks(range(len(arms)), arms)
    axes.set(ylabel="test accuracy, %", xlim=(-0.5, len(arms) - 0.5))
    axes.grid(axis="y", alpha=0.3)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)
