"""Pictures and words under one root: does a picture show what its caption names, with HSA along nested signals (2509.15448).

Data of two modalities, made of CIFAR-10 (ours): the pixels of a grey picture, row by row, then a caption that names one of eight
of its classes, four animals and four vehicles; pictures of the other two animals are left out. The label is whether both are of
animals or both of vehicles, each half of the time, so that neither modality alone tells anything. The trees differ, the model
and the data do not.
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

VEHICLES = ("airplane", "automobile", "ship", "truck")
ANIMALS = ("cat", "deer", "dog", "horse")
CAPTIONS = ("a picture of one {}", "here you see one {}", "this shows one {}", "one {}")
LONGEST_CAPTION = 5
NUM_PIXEL_VALUES = 256
PAD = 0
WORDS = sorted({word for caption in CAPTIONS for word in caption.split()} - {"{}"} | {*VEHICLES, *ANIMALS})
"""A pixel of brightness `v` is the token `1 + v`; then come the words."""
VOCABULARY = {word: 1 + NUM_PIXEL_VALUES + index for index, word in enumerate(WORDS)}


def _flat(side: int, lengths: torch.Tensor) -> SignalTree:
    return SignalTree.regular(side**2 + lengths, (None,), size=side**2 + LONGEST_CAPTION)


def _caption(lengths: torch.Tensor) -> SignalTree:
    return SignalTree.regular(lengths, (None,), size=LONGEST_CAPTION)


def _modalities(side: int, lengths: torch.Tensor) -> SignalTree:
    pixels = torch.full_like(lengths, side**2)
    return SignalTree.join([SignalTree.regular(pixels, (None,)), _caption(lengths)])


def _quadtree(side: int, lengths: torch.Tensor) -> SignalTree:
    return SignalTree.join([SignalTree.from_grid(side, side, 2, batch_size=len(lengths)), _caption(lengths)])


def _line(side: int, lengths: torch.Tensor) -> SignalTree:
    pixels = torch.full_like(lengths, side**2)
    return SignalTree.join([SignalTree.regular(pixels, 4), _caption(lengths)])


ARMS: dict[str, Callable[[int, torch.Tensor], SignalTree]] = {
    "flat": _flat,
    "modalities": _modalities,
    "quadtree": _quadtree,
    "line": _line,
}
"""Trees by name: all tokens under the root; two modalities under it; the picture also in blocks of 2 by 2, and of 4 pixels in
line."""


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
        num_train, num_validation, num_test (`int`): pictures of all ten classes, of which those of eight are used.
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Captions for pictures, drawn anew.

    Args:
        pixels (`torch.Tensor`): int64 `(n, side^2)`, 0 to 255.
        classes (`torch.Tensor`): int64 `(n,)`, in the order of `CIFAR10_NAMES`, of vehicles and of animals in `ANIMALS`.
        generator (`torch.Generator`): draws labels, names and captions.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: token ids `(n, side^2 + LONGEST_CAPTION)`, words of each caption
        `(n,)`, and labels `(n,)`: 1 where caption and picture are of one kind.
    """
    is_vehicle = torch.tensor([name in VEHICLES for name in CIFAR10_NAMES])
    count = len(pixels)
    labels = torch.randint(2, (count,), generator=generator)
    wants_vehicle = is_vehicle[classes] == (labels == 1)
    kinds = [torch.tensor([CIFAR10_NAMES.index(name) for name in names]) for names in (ANIMALS, VEHICLES)]
    draws = torch.randint(2**30, (count,), generator=generator)
    captions = torch.randint(len(CAPTIONS), (count,), generator=generator)
    words = torch.full((count, LONGEST_CAPTION), PAD)
    lengths = torch.empty(count, dtype=torch.long)
    for row in range(count):
        names = kinds[int(wants_vehicle[row])]
        name = CIFAR10_NAMES[int(names[draws[row] % len(names)])]
        caption = CAPTIONS[int(captions[row])].format(name).split()
        lengths[row] = len(caption)
        words[row, : len(caption)] = torch.tensor([VOCABULARY[word] for word in caption])
    return torch.cat([1 + pixels, words], dim=1), lengths, labels


def _read(protocol: Protocol, data_path: str | None) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Pixels and classes of each split, of the eight classes."""
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
    is_used = torch.tensor([name in (*VEHICLES, *ANIMALS) for name in CIFAR10_NAMES])
    found = {}
    for name, split in task.splits.items():
        classes = torch.tensor(split["label"][:])
        pixels = torch.tensor([[int(value) for value in text.split()] for text in split["text"][:]])
        found[name] = pixels[is_used[classes]], classes[is_used[classes]]
    return found


def _fingerprint(splits: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for tensors in splits.values():
        for tensor in tensors:
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _train(protocol: Protocol, arm: str, seed: int, rate: float, splits, measured: str) -> dict[str, float]:
    longest = protocol.side**2 + LONGEST_CAPTION
    config = HSAConfig(
        vocab_size=1 + NUM_PIXEL_VALUES + len(WORDS),
        pad_token_id=PAD,
        max_position_embeddings=longest,
        num_labels=2,
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
        input_ids, lengths, labels = examples(pixels[picked], classes[picked], generator)
        loss = model(**_inputs(arm, protocol.side, input_ids, lengths), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return _measure(model.eval(), protocol, arm, *splits[measured])


@torch.no_grad()
def _measure(model, protocol: Protocol, arm: str, pixels: torch.Tensor, classes: torch.Tensor) -> dict[str, float]:
    """Loss and accuracy on pictures with captions that are the same for all."""
    input_ids, lengths, labels = examples(pixels, classes, torch.Generator().manual_seed(0))
    loss, correct = 0.0, 0
    for part in torch.arange(len(labels)).split(protocol.batch_size):
        inputs = _inputs(arm, protocol.side, input_ids[part], lengths[part])
        output = model(**inputs, labels=labels[part])
        loss += output.loss.item() * len(part)
        correct += int((output.logits.argmax(-1) == labels[part]).sum())
    return {"loss": loss / len(labels), "accuracy": correct / len(labels), "examples": len(labels)}


def _inputs(arm: str, side: int, input_ids: torch.Tensor, lengths: torch.Tensor) -> dict[str, Any]:
    mask = torch.arange(input_ids.shape[1]) < (side**2 + lengths)[:, None]
    return {"input_ids": input_ids, "attention_mask": mask.long(), "tree": ARMS[arm](side, lengths)}


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
