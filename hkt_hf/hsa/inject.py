"""HSA in place of the attention of a pretrained encoder, without training (arXiv 2509.15448, section 4; the mechanics are ours).

The energies that make HSA closest to `softmax(scale * q . k)` need nothing but the model's own queries and keys (ours), so an
encoder whose attention goes through transformers' `AttentionInterface` can be told to use it, in some layers or in all.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from .attention import (
    ATTENTION_NAME,
    CONFIG_KEY,
    DEFAULT_BRANCHING,
    INSIDE,
    LayerChoice,
    TreeBuilder,
    attention_by_configuration,
    attention_modules,
    checked_exact_tokens,
    checked_integers,
    checked_root_tokens,
    choice_of_tree,
    has_window,
    set_attention_back,
)
from .gap import gap_report


@dataclass(frozen=True)
class Injection:
    """What is injected: written into the model's configuration as `hsa`.

    Args:
        branching (list of `int` and `None`, *optional*): as in [`~hkt_hf.modeling.tree_hsa.SignalTree.regular`]; `None` where
            trees come from a function, which no configuration can hold.
        layers (list of `int`): layers that use HSA; the others stay as they were.
        exact_tokens (list of `int`): positions in each sequence whose rows are those of flat attention.
        root_tokens (list of `int`): positions in each sequence of children of the root; none with a function.
    """

    branching: list[int | None] | int | None
    layers: list[int]
    exact_tokens: list[int]
    root_tokens: list[int]


def inject(
    model: PreTrainedModel,
    *,
    tree: int | Sequence[int | None] | TreeBuilder = DEFAULT_BRANCHING,
    layers: str | Sequence[int] = "auto",
    exact_tokens: Sequence[int] = (0,),
    root_tokens: Sequence[int] | None = None,
    batch: Mapping[str, torch.Tensor] | None = None,
    budget: float = 0.25,
) -> PreTrainedModel:
    """Let a pretrained encoder attend along trees. [`restore`] takes it back.

    Args:
        model (`PreTrainedModel`): an encoder whose attention goes through transformers' `AttentionInterface`, e.g. BERT, RoBERTa,
            DistilBERT, ELECTRA or ModernBERT (its layers without a window), with or without a head. Changed in place: weights
            stay as they are.
        tree (`int`, sequence of `int` and `None`, or `Callable`, *optional*, defaults to `(16, None)`): branching of regular
            trees, as in [`SignalTree.regular`]: windows of 16 tokens under a flat root. Or a function from the mask of a
            batch, bool `(B, N)`, to its [`SignalTree`]; such a choice is not saved. Trees are over the real tokens, which come
            first in that mask, wherever padding is: [`SignalTree.from_text`] needs a tokenizer that pads on the right.
        layers (`str` or sequence of `int`, *optional*, defaults to `"auto"`): `"all"`, indices, or `"auto"`: the most layers whose
            gaps on `batch` ([`~hkt_hf.hsa.gap.gap_report`]) add up to no more than `budget`. Layers that share their weights
            (ALBERT) are one layer.
        exact_tokens (sequence of `int`, *optional*, defaults to `(0,)`): positions, counted from the first real token, whose rows
            are computed by flat attention, e.g. the `[CLS]` that a classifier reads. They have no say in the ties of the others.
        root_tokens (sequence of `int`, *optional*): positions, counted from the first real token, or from the last where negative,
            of tokens that are children of the root themselves, beside the groups of the others: each group weighs them apart. By
            default `(0, -1)`, in BERT `[CLS]` and `[SEP]`, which draw much attention: on IMDB three layers lose 2.3 points
            instead of 4.2 (`results/hsa_zero_shot_imdb.json`). `()` for none. A function for `tree` makes its own.
        batch (mapping, *optional*): inputs as the model takes them, for `layers="auto"`.
        budget (`float`, *optional*, defaults to 0.25): nats, for `layers="auto"`. On SST-2 what the default chooses, one to four
            of MiniLM's six layers, loses at most 0.3 points of accuracy (`results/hsa_zero_shot_sst2.json`); texts of hundreds of
            tokens have larger gaps and may need more.

    Returns:
        `PreTrainedModel`: the model itself.

    Raises:
        ValueError: a decoder or another model that can't be served (the message says why), one that is injected already, as a
            whole, in a part or as a part, or that has its configuration object in common with an injected model, a bad
            branching, a layer out of range or with a sliding window, or `layers="auto"` without a batch or with a budget that
            admits no layer. The model is then as it was. What only shows when the model runs is refused by the forward pass,
            in `layers="auto"` and later: causal attention (the text model of CLIP), soft-capped scores, sinks, keys that are no
            queries, a mask that hides more than padding or adds to the scores, `segment_ids`, and a tree of a function that is
            not over the real tokens.
        TypeError: `model` is no `PreTrainedModel`.
    """
    modules = attention_modules(model)
    _check_not_injected(model)
    exact_tokens = checked_exact_tokens(exact_tokens)
    branching, builder = choice_of_tree(tree)
    at_root = checked_root_tokens(root_tokens, builder)
    if isinstance(layers, str):
        options = {"tree": tree, "exact_tokens": exact_tokens, "root_tokens": root_tokens}
        chosen = _layers_by_name(layers, model, modules, batch, budget, options)
    else:
        chosen = _check_layers(layers, modules)
    _apply(model, modules, Injection(branching, chosen, exact_tokens, at_root), builder)
    return model


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Take HSA out of a model: what it was before [`inject`].

    Args:
        model (`PreTrainedModel`): an injected model; changed in place.

    Returns:
        `PreTrainedModel`: the model itself.

    Raises:
        ValueError: a model that is not injected, though a part of it may be, or it may be a part of one.
    """
    if not is_injected(model):
        raise ValueError(
            "`model` is not injected: there is nothing to restore. What was given to `inject` is what `restore` takes"
        )
    before, choice = model.__dict__.pop("_before_hsa")
    for module in model.modules():
        module.__dict__.pop("_hsa", None)
    model.config.__dict__.pop(CONFIG_KEY, None)
    if choice is not None:  # of a checkpoint that was saved with an injection
        setattr(model.config, CONFIG_KEY, choice)
    set_attention_back(before)
    return model


def is_injected(model: PreTrainedModel) -> bool:
    """Whether [`inject`] has changed a model."""
    return "_before_hsa" in model.__dict__


def load(path: str | os.PathLike, auto_class: type = AutoModelForSequenceClassification, **kwargs) -> PreTrainedModel:
    """Load a checkpoint of an injected model and inject it again, as its configuration says.

    Plain `from_pretrained` gives the model with its own attention.

    Args:
        path (`str` or `os.PathLike`): folder or Hub id.
        auto_class (`type`, *optional*, defaults to `AutoModelForSequenceClassification`): the Auto class to load with.
        kwargs: of `from_pretrained`.

    Returns:
        `PreTrainedModel`: the model; with `output_loading_info=True` a tuple of it and the information.

    Raises:
        ValueError: a checkpoint of a model that was not injected, or whose trees came from a function.
    """
    loaded = auto_class.from_pretrained(path, **kwargs)
    model, *information = loaded if isinstance(loaded, tuple) else (loaded,)
    choice = getattr(model.config, CONFIG_KEY, None)
    if not choice:
        raise ValueError(
            f"`path` {str(path)!r} has no `{CONFIG_KEY}` in its configuration: it was saved without injection"
        )
    if choice["branching"] is None:
        raise ValueError(
            f"`path` {str(path)!r} was injected with a function for `tree`: load it and inject it with that"
        )
    delattr(model.config, CONFIG_KEY)
    inject(
        model,
        tree=choice["branching"],
        layers=choice["layers"],
        exact_tokens=choice["exact_tokens"],
        root_tokens=choice.get("root_tokens", ()),  # of a checkpoint from before there were any
    )
    return (model, *information) if information else model


def layers_within(gaps: Mapping[int, float], budget: float) -> list[int]:
    """The most layers whose gaps, by layer in nats, add up to no more than a budget: those with the smallest, ascending."""
    chosen, total = [], 0.0
    for layer in sorted(gaps, key=gaps.get):
        total += max(gaps[layer], 0.0)
        if total > budget:
            break
        chosen.append(layer)
    return sorted(chosen)


def _check_not_injected(model: PreTrainedModel) -> None:
    if is_injected(model):
        raise ValueError("`model` is injected already: `restore(model)` takes it back first")
    told = {name: module.__dict__["_hsa"] for name, module in model.named_modules() if "_hsa" in module.__dict__}
    if told:
        name = next((name for name, choice in told.items() if isinstance(choice, LayerChoice)), next(iter(told)))
        raise ValueError(
            f"`model` has a part that is injected already ({name!r}): `restore` what it was injected into first, the part, the "
            "whole, or another model that has the part in common"
        )
    if model.config._attn_implementation == ATTENTION_NAME and getattr(model.config, CONFIG_KEY, None) is not None:
        raise ValueError(
            "`model` has its configuration object in common with an injected model, or was read with "
            "`attn_implementation='hsa'` from a checkpoint that was saved with an injection: read that with "
            f"`hkt_hf.hsa.load`, or make the model with a copy of the configuration without `{CONFIG_KEY}` (`del "
            f"copy.{CONFIG_KEY}`) and with another `attn_implementation`"
        )


def _check_layers(layers: Sequence[int], modules: Mapping[int, nn.Module]) -> list[int]:
    chosen = sorted(checked_integers("layers", layers))
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"`layers` must be different indices, at least one, got {list(layers)}")
    for layer in chosen:
        if layer not in modules:
            raise ValueError(f"`layers` must lie in [0, {len(modules)}), got {layer}")
        if has_window(modules[layer]):
            raise ValueError(f"`layers` can't have layer {layer}: its attention has a sliding window")
    return chosen


def _layers_by_name(name, model, modules, batch, budget, options: Mapping[str, Any]) -> list[int]:
    possible = [layer for layer, module in modules.items() if not has_window(module)]
    if not possible:
        raise ValueError("`model` can't be served: the attention of each of its layers has a sliding window")
    if name == "all":
        return possible
    if name != "auto":
        raise ValueError(f"`layers` must be 'auto', 'all' or indices, got {name!r}")
    if batch is None:
        raise ValueError("`layers='auto'` needs a `batch` to measure gaps on, or name the layers")
    if not budget >= 0:
        raise ValueError(f"`budget` must be at least 0 nats, got {budget}")
    gaps = {entry["layer"]: entry["gap"] for entry in gap_report(model, batch, **options)}
    chosen = layers_within(gaps, budget)
    if not chosen:
        layer = min(gaps, key=gaps.get)
        raise ValueError(
            f"`budget` ({budget} nats) admits no layer: the smallest gap is {gaps[layer]:.3g} (layer {layer})"
        )
    return chosen


def _apply(model, modules, injection: Injection, builder: TreeBuilder | None) -> None:
    before = attention_by_configuration(model)
    model.__dict__["_before_hsa"] = before, getattr(model.config, CONFIG_KEY, None)
    model.set_attn_implementation(ATTENTION_NAME)
    setattr(model.config, CONFIG_KEY, asdict(injection))
    choice = LayerChoice(injection.branching, builder, tuple(injection.exact_tokens), tuple(injection.root_tokens))
    # Every module is told, so that other attention in the model, such as that of a second tower, stays as it was.
    for module in model.modules():
        module.__dict__["_hsa"] = None
    for attention in modules.values():
        for part in attention.modules():
            part.__dict__["_hsa"] = INSIDE
    for layer, module in modules.items():
        module.__dict__["_hsa"] = choice if layer in injection.layers else None
