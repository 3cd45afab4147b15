"""What a pretrained encoder loses, and saves, when HSA takes the place of its attention without training (arXiv 2509.15448, 4).

An encoder is fine-tuned as a classifier with its own attention. Then every combination of a length, a set of layers and a tree is
measured on the same test examples: accuracy, operations of attention, and seconds. Some are fine-tuned a little further.
"""

import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..config import ExperimentConfig
from ..data import TaskData, load_data
from ..environment import environment
from ..files import replacing, write_json
from ..hsa.attention import DEFAULT_ROOT_TOKENS, attention_modules
from ..hsa.cost import attention_operations, hsa_operations
from ..hsa.gap import gap_report
from ..hsa.inject import inject, layers_within, load, restore
from ..hsa.tree import SignalTree
from ..tokenization import encode_texts
from ..training import build_model_and_tokenizer, train
from . import statistics


matplotlib.use("Agg")
from matplotlib import pyplot as plt


logger = logging.getLogger(__name__)

GAP_EXAMPLES = 32
EXACT_TOKENS = (0,)
DEFAULTS = (EXACT_TOKENS, DEFAULT_ROOT_TOKENS)
OF_ALL_ROWS = ("num_test", "min_tokens", "batch_size", "budgets")
"""Fields of [`Protocol`] that every measurement depends on; the others list what to measure, and may grow."""


@dataclass(frozen=True)
class Protocol:
    """What is measured.

    Args:
        lengths (sequence of `int`): longest inputs; longer texts are cut.
        layer_sets (sequence of sequences of `int`): layers to replace, each set with every tree.
        trees (sequence): branchings, as in [`~hkt_hf.hsa.inject.inject`].
        num_test (`int`): test examples, drawn once.
        min_tokens (`int`): only test examples of at least so many tokens, drawn from the whole test split; 0 for any of
            those that the configuration keeps.
        batch_size (`int`): of evaluation.
        without_exact (sequence of pairs): layers and tree of injections that are also measured without any exact row; all
            others have that of the first token, which the classifier reads.
        without_root (sequence of pairs): layers and tree of injections that are also measured without any root token; all
            others have the first and the last one.
        budgets (sequence of `float`): nats, of `layers="auto"`: what it chooses by the gaps on validation examples is measured, too.
        further_steps (`int`): of fine-tuning after injection; 0 for none.
        further (sequence of pairs): layers and tree of each injection to fine-tune further, at the first length; the model
            with its own attention is fine-tuned as much, to compare them with.

    Raises:
        ValueError: a number out of range, or nothing to measure.
    """

    lengths: Sequence[int]
    layer_sets: Sequence[Sequence[int]]
    trees: Sequence[int | Sequence[int | None]]
    num_test: int
    min_tokens: int = 0
    batch_size: int = 32
    without_exact: Sequence[tuple[Sequence[int], int | Sequence[int | None]]] = ()
    without_root: Sequence[tuple[Sequence[int], int | Sequence[int | None]]] = ()
    budgets: Sequence[float] = ()
    further_steps: int = 0
    further: Sequence[tuple[Sequence[int], int | Sequence[int | None]]] = ()

    def __post_init__(self):
        for name in ("num_test", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        if self.min_tokens < 0:
            raise ValueError(f"`min_tokens` must be at least 0, got {self.min_tokens}")
        if not self.lengths or not self.layer_sets or not self.trees:
            raise ValueError("`lengths`, `layer_sets` and `trees` must each have at least one entry")


def zero_shot(
    config: ExperimentConfig, protocol: Protocol, path: str | Path, command: str | None = None
) -> dict[str, Any]:
    """Fine-tune, inject, measure; what is in the file at `path` already is kept, and a longer protocol adds to it.

    Args:
        config ([`~hkt_hf.config.ExperimentConfig`]): the classifier; its `model.checkpoint` names the encoder.
        protocol ([`Protocol`]): what to measure.
        path (`str` or `Path`): the JSON file, written after each measurement.
        command (`str`, *optional*): the command line that asked for it, for the file.

    Returns:
        `dict`: the file's content: `rows`, one a measurement, with its `difference` to the model's own attention at that
        length and after as many steps (percentage points of accuracy, paired by test example, as
        [`~.statistics.paired_difference`] has it); `gaps` in nats
        of each length and tree; and where they come from.

    Raises:
        ValueError: a file of another configuration, test examples, batch size or budgets, or what [`~hkt_hf.training.train`] and
            [`~hkt_hf.hsa.inject.inject`] refuse.
    """
    path = Path(path)
    task = load_data(config.data)
    header = {"config": config.to_dict(), "protocol": json.loads(json.dumps(asdict(protocol)))}
    result: dict[str, Any] = {**header, "rows": [], "gaps": [], "auto": []}
    if path.is_file():
        result = json.loads(path.read_text(encoding="utf-8"))
        found = {name: result["protocol"].get(name, getattr(Protocol, name, None)) for name in OF_ALL_ROWS}
        if result["config"] != header["config"] or found != {name: header["protocol"][name] for name in OF_ALL_ROWS}:
            raise ValueError(f"{path} was measured with another configuration, or with {found}: choose another file")
        result.update(header)
    train(config)
    model = AutoModelForSequenceClassification.from_pretrained(config.output_dir).eval()
    tokenizer = build_model_and_tokenizer(config, task)[1]
    examples = draw_examples(tokenizer, config, task, protocol)
    done = {_key(row) for row in result["rows"]}

    def keep(row: dict[str, Any]) -> None:
        alike = ("length", "further_steps")
        own = next(
            (
                kept
                for kept in result["rows"]
                if kept["tree"] is None and all(kept[name] == row[name] for name in alike)
            ),
            None,
        )
        if own is not None:
            row["difference"] = statistics.paired_difference(_points(row), _points(own))
        result["rows"].append(row)
        result.update(command=command, **environment())
        write_json(path, result)

    _measure_gaps(model, tokenizer, task, protocol, result)
    write_json(path, result)
    injections = [
        ((), None, (), ()),
        *((chosen, tree, *DEFAULTS) for chosen in protocol.layer_sets for tree in protocol.trees),
        *((chosen, tree, (), DEFAULT_ROOT_TOKENS) for chosen, tree in protocol.without_exact),
        *((chosen, tree, EXACT_TOKENS, ()) for chosen, tree in protocol.without_root),
    ]
    cases = [(length, *injection) for length in protocol.lengths for injection in injections]
    cases += [(auto["length"], auto["layers"], auto["tree"], *DEFAULTS) for auto in result["auto"] if auto["layers"]]
    for length, chosen, tree, exact, at_root in tqdm(cases, desc="zero-shot", unit="case"):
        case = {
            "length": length,
            "layers": list(chosen),
            "tree": tree,
            "exact_tokens": list(exact),
            "root_tokens": list(at_root),
            "further_steps": 0,
        }
        if _key(case) in done:
            continue
        if tree is not None:
            inject(model, tree=tree, layers=chosen, exact_tokens=exact, root_tokens=at_root)
        keep({**case, **measure(model, tokenizer, examples, length, protocol.batch_size)})
        done.add(_key(case))  # `layers="auto"` may choose what was chosen by hand
        if tree is not None:
            restore(model)
    for chosen, tree in [((), None), *protocol.further] if protocol.further else []:
        case = {
            "length": protocol.lengths[0],
            "layers": list(chosen),
            "tree": tree,
            "exact_tokens": [] if tree is None else list(EXACT_TOKENS),
            "root_tokens": [] if tree is None else list(DEFAULT_ROOT_TOKENS),
            "further_steps": protocol.further_steps,
        }
        if protocol.further_steps and _key(case) not in done:
            further = _train_further(config, task, chosen, tree, protocol.further_steps)
            keep({**case, **measure(further, tokenizer, examples, protocol.lengths[0], protocol.batch_size)})
    return result


def _measure_gaps(model, tokenizer, task: TaskData, protocol: Protocol, result: dict[str, Any]) -> None:
    """Add the gaps of each length and tree, and the layers that each budget admits, where they are missing."""
    for length in protocol.lengths:
        for tree in json.loads(json.dumps(protocol.trees)):
            if any((gap["length"], gap["tree"]) == (length, tree) for gap in result["gaps"]):
                continue
            batch = _batch(tokenizer, task.splits["validation"]["text"][:GAP_EXAMPLES], length)
            gaps = {
                entry["layer"]: entry["gap"]
                for entry in gap_report(model, batch, tree=tree, exact_tokens=EXACT_TOKENS)
            }
            result["gaps"].append(
                {"length": length, "tree": tree, "by_layer": [round(gap, 5) for gap in gaps.values()]}
            )
            result["auto"] += [
                {"length": length, "tree": tree, "budget": budget, "layers": layers_within(gaps, budget)}
                for budget in protocol.budgets
            ]


def draw_examples(
    tokenizer: PreTrainedTokenizerBase, config: ExperimentConfig, task: TaskData, protocol: Protocol
) -> Dataset:
    """The test examples of a protocol, or all where there are fewer.

    Raises:
        ValueError: none is long enough.
    """
    whole = load_data(replace(config.data, max_test_samples=None)) if protocol.min_tokens else task
    split = whole.splits["test"]
    eligible = torch.arange(len(split))
    if protocol.min_tokens:
        texts = encode_texts(tokenizer, split["text"][:], protocol.min_tokens)
        eligible = eligible[torch.tensor([len(ids) for ids in texts]) >= protocol.min_tokens]
        if not len(eligible):
            raise ValueError(f"no test example has `min_tokens` ({protocol.min_tokens}) tokens: choose fewer")
    drawn = torch.randperm(len(eligible), generator=torch.Generator().manual_seed(0))[: protocol.num_test]
    return split.select(eligible[drawn].sort().values.tolist())


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Dataset, length: int, batch_size: int
) -> dict[str, Any]:
    """Accuracy, operations of attention by the paper's count, and processor seconds, on the test examples.

    Returns:
        `dict`: `accuracy` and `wrong`, the indices of the test examples that it misses; `operations` and `operations_flat`,
        means an example over all layers; `saved_in_replaced_layers`, the share of the replaced layers' operations that is
        saved, `None` without any; `seconds`, an example.
    """
    texts, labels = examples["text"][:], torch.tensor(examples["label"][:])
    lengths = torch.tensor([len(ids) for ids in encode_texts(tokenizer, texts, length)])
    order = lengths.argsort(descending=True)
    wrong, seconds = [], 0.0
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            index = order[start : start + batch_size]
            batch = _batch(tokenizer, [texts[i] for i in index.tolist()], length)
            began = time.process_time()
            logits = model(**batch).logits
            seconds += time.process_time() - began
            wrong += index[logits.argmax(-1) != labels[index]].tolist()
    heads = model.config.num_attention_heads
    head_dim = model.config.hidden_size // heads
    layers = len(attention_modules(model))
    flat = sum(attention_operations(each, heads, head_dim) for each in lengths.tolist())
    choice = getattr(model.config, "hsa", None)
    replaced, hierarchical = 0, 0
    if choice:
        replaced = len(choice["layers"])
        trees = SignalTree.regular(lengths, choice["branching"], root_tokens=choice["root_tokens"])
        exact = sum(len(choice["exact_tokens"]) * each * heads * (4 * head_dim + 1) for each in lengths.tolist())
        hierarchical = hsa_operations(trees, heads, head_dim) + exact
    count = len(texts)
    return {
        "accuracy": 1 - len(wrong) / count,
        "wrong": sorted(wrong),
        "examples": count,
        "mean_length": lengths.float().mean().item(),
        "operations": ((layers - replaced) * flat + replaced * hierarchical) / count,
        "operations_flat": layers * flat / count,
        "saved_in_replaced_layers": 1 - hierarchical / flat if choice else None,
        "seconds": seconds / count,
    }


def add_positions(checkpoint: str | Path, target: str | Path, max_positions: int) -> None:
    """Write a copy of a BERT classifier with a longer table of positions: its own, repeated.

    So Longformer began (Beltagy et al. 2020, section 5).

    Args:
        checkpoint (`str` or `Path`): folder of the classifier and its tokenizer.
        target (`str` or `Path`): folder to write; one that exists is kept.
        max_positions (`int`): tokens that the copy takes.
    """
    target = Path(target)
    if target.is_dir():
        return
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    embeddings = model.base_model.embeddings
    table = embeddings.position_embeddings.weight.data
    repeated = table.repeat(math.ceil(max_positions / len(table)), 1)[:max_positions]
    embeddings.position_embeddings = nn.Embedding.from_pretrained(repeated, freeze=False)
    model.config.max_position_embeddings = max_positions
    partial = target.with_name(f"{target.name}.partial")
    AutoTokenizer.from_pretrained(checkpoint, model_max_length=max_positions).save_pretrained(partial)
    model.save_pretrained(partial)
    partial.rename(target)


def plot(result: dict[str, Any], path: str | Path) -> None:
    """The frontier: accuracy against the operations of attention that are left, and against seconds; a row a length."""
    lengths = sorted({row["length"] for row in result["rows"]})
    figure, panels = plt.subplots(
        len(lengths), 2, figsize=(11, 4.2 * len(lengths)), layout="constrained", squeeze=False
    )
    kinds = list(dict.fromkeys(map(_kind, result["rows"])))
    for length, pair in zip(lengths, panels, strict=True):
        rows = [row for row in result["rows"] if row["length"] == length]
        for axes, (label, value) in zip(pair, FRONTIERS.items(), strict=True):
            for number, kind in enumerate(kinds):
                found = [row for row in rows if _kind(row) == kind]
                if not found:
                    continue
                points = [value(row) for row in found], [100 * row["accuracy"] for row in found]
                axes.plot(*points, "^" if found[0]["further_steps"] else "o", color=f"C{number}", label=kind)
            axes.set(title=f"up to {length} tokens", xlabel=label, ylabel="test accuracy, %")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)


FRONTIERS = {
    "operations of attention, share": lambda row: row["operations"] / row["operations_flat"],
    "processor milliseconds a text": lambda row: 1000 * row["seconds"],
}


def _kind(row: dict[str, Any]) -> str:
    """What a point is, for the legend."""
    details = ["fine-tuned further"] * bool(row["further_steps"])
    if row["tree"] is None:
        return ", ".join(["its own attention", *details])
    without = ["no exact row"] * (not row["exact_tokens"]) + ["no root tokens"] * (not row["root_tokens"])
    return ", ".join([f"tree {row['tree']}", *details, *without])


def _train_further(config, task, chosen, tree, steps: int) -> PreTrainedModel:
    """The classifier, injected where there is a tree, after more steps on the same data, at a tenth of the learning rate."""
    name = "own" if tree is None else f"{'-'.join(map(str, chosen))}-{str(tree).replace(' ', '')}"
    rate = config.training["learning_rate"] / 10
    further = replace(
        config,
        output_dir=f"{config.output_dir}-further-{name}",
        model={"checkpoint": config.output_dir},
        training={**config.training, "max_steps": steps, "learning_rate": rate},
    )

    def build(config, task):
        model, tokenizer = build_model_and_tokenizer(config, task)
        return model if tree is None else inject(model, tree=tree, layers=chosen), tokenizer

    train(further, build=build)
    auto_class = AutoModelForSequenceClassification
    return (
        auto_class.from_pretrained(further.output_dir) if tree is None else load(further.output_dir, auto_class)
    ).eval()


def _points(row: dict[str, Any]) -> list[float]:
    """100 for each test example that is classified right, 0 for each other."""
    wrong = set(row["wrong"])
    return [0.0 if index in wrong else 100.0 for index in range(row["examples"])]


def _batch(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int) -> dict[str, torch.Tensor]:
    return dict(tokenizer(list(texts), truncation=True, max_length=length, padding=True, return_tensors="pt"))


def _key(row: dict[str, Any]) -> str:
    fields = ("length", "layers", "tree", "exact_tokens", "root_tokens", "further_steps")
    return json.dumps([row[name] for name in fields])
