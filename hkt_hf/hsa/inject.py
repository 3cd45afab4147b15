"""HSA in place of the attention of a pretrained encoder, without training (arXiv 2509.15448, section 4; the mechanics are ours).

The energies that make HSA closest to `softmax(scale * q . k)` need nothing but the model's own queries and keys (ours), so an
encoder whose attention goes through transformers' `AttentionInterface` can be told to use it, in some layers or in all.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

from ..modeling.attention_hsa import hierarchical_self_attention
from ..modeling.tree_hsa import SignalTree


ATTENTION_NAME = "hsa"
CONFIG_KEY = "hsa"
DEFAULT_BRANCHING = (16, None)
TreeBuilder = Callable[[torch.Tensor], SignalTree]


@dataclass(frozen=True)
class Injection:
    """What is injected: written into the model's configuration as `hsa`.

    Args:
        branching (list of `int` and `None`, *optional*): as in [`~hkt_hf.modeling.tree_hsa.SignalTree.regular`]; `None` where
            trees come from a function, which no configuration can hold.
        layers (list of `int`): layers that use HSA; the others stay as they were.
        exact_tokens (list of `int`): positions in each sequence whose rows are those of flat attention.
    """

    branching: list[int | None] | int | None
    layers: list[int]
    exact_tokens: list[int]


def inject(
    model: PreTrainedModel,
    *,
    tree: int | Sequence[int | None] | TreeBuilder = DEFAULT_BRANCHING,
    layers: str | Sequence[int] = "auto",
    exact_tokens: Sequence[int] = (0,),
    batch: Mapping[str, torch.Tensor] | None = None,
    budget: float = 0.05,
) -> PreTrainedModel:
    """Let a pretrained encoder attend along trees. [`restore`] takes it back.

    Args:
        model (`PreTrainedModel`): an encoder whose attention goes through transformers' `AttentionInterface`, e.g. BERT, RoBERTa,
            DistilBERT, ELECTRA or ModernBERT (its layers without a window), with or without a head. Changed in place: weights
            stay as they are.
        tree (`int`, sequence of `int` and `None`, or `Callable`, *optional*, defaults to `(16, None)`): branching of regular
            trees, as in [`SignalTree.regular`]: windows of 16 tokens under a flat root. Or a function from the mask of a
            batch, bool `(B, N)`, to its [`SignalTree`]; such a choice is not saved.
        layers (`str` or sequence of `int`, *optional*, defaults to `"auto"`): `"all"`, indices, or `"auto"`: the most layers whose
            gaps on `batch` ([`~hkt_hf.hsa.gap.gap_report`]) add up to no more than `budget`.
        exact_tokens (sequence of `int`, *optional*, defaults to `(0,)`): positions, counted from the first real token, whose rows
            are computed by flat attention, e.g. the `[CLS]` that a classifier reads. They have no say in the ties of the others.
        batch (mapping, *optional*): inputs as the model takes them, for `layers="auto"`.
        budget (`float`, *optional*, defaults to 0.05): nats, for `layers="auto"`.

    Returns:
        `PreTrainedModel`: the model itself.

    Raises:
        ValueError: a decoder or another model that can't be served (the message says why), one that is injected already, a bad
            branching, a layer out of range or with a sliding window, or `layers="auto"` without a batch. The model is then as it was.
        TypeError: `model` is no `PreTrainedModel`.
    """
    modules = attention_modules(model)
    if is_injected(model):
        raise ValueError("`model` is injected already: `restore(model)` takes it back first")
    exact_tokens = [int(position) for position in exact_tokens]
    if any(position < 0 for position in exact_tokens) or len(set(exact_tokens)) < len(exact_tokens):
        raise ValueError(f"`exact_tokens` must be different positions of at least 0, got {exact_tokens}")
    branching = None
    if not callable(tree):
        branching = tree if isinstance(tree, int) else list(tree)
        SignalTree.regular([2], branching if isinstance(branching, int) else [*branching])
    if isinstance(layers, str):
        chosen = _layers_by_name(layers, model, modules, tree, exact_tokens, batch, budget)
    else:
        chosen = _check_layers(layers, modules)
    _apply(model, modules, Injection(branching, chosen, exact_tokens), tree if callable(tree) else None)
    return model


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Take HSA out of a model: what it was before [`inject`].

    Args:
        model (`PreTrainedModel`): an injected model; changed in place.

    Returns:
        `PreTrainedModel`: the model itself.

    Raises:
        ValueError: a model that is not injected.
    """
    if not is_injected(model):
        raise ValueError("`model` is not injected: there is nothing to restore")
    before = model.__dict__.pop("_attention_before_hsa")
    for module in model.modules():
        module.__dict__.pop("_hsa", None)
    delattr(model.config, CONFIG_KEY)
    model.set_attn_implementation(before)
    return model


def is_injected(model: PreTrainedModel) -> bool:
    """Whether [`inject`] has changed a model."""
    return "_attention_before_hsa" in model.__dict__


def load(path: str | os.PathLike, auto_class: type = AutoModelForSequenceClassification, **kwargs) -> PreTrainedModel:
    """Load a checkpoint of an injected model and inject it again, as its configuration says.

    Plain `from_pretrained` gives the model with its own attention.

    Args:
        path (`str` or `os.PathLike`): folder or Hub id.
        auto_class (`type`, *optional*, defaults to `AutoModelForSequenceClassification`): the Auto class to load with.
        kwargs: of `from_pretrained`.

    Raises:
        ValueError: a checkpoint of a model that was not injected, or whose trees came from a function.
    """
    model = auto_class.from_pretrained(path, **kwargs)
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
    return inject(model, tree=choice["branching"], layers=choice["layers"], exact_tokens=choice["exact_tokens"])


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The self-attention modules of an encoder by the index of their layer.

    Raises:
        TypeError: no `PreTrainedModel`.
        ValueError: a model that can't be served; the message says why.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"`model` must be a PreTrainedModel, got {type(model).__name__}")
    name, config = type(model).__name__, model.config
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False):
        raise ValueError(f"`model` must be an encoder, got {name}, which is or has a decoder")
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(f"`model` ({name}) can't be served: its attention does not go through `AttentionInterface`")
    recorded = (getattr(model, "_can_record_outputs", None) or {}).get("attentions")
    recorded = recorded[0] if isinstance(recorded, list | tuple) else recorded
    target = getattr(recorded, "target_class", recorded)
    found = [module for module in model.modules() if target is not None and isinstance(module, target)]
    if not found:
        raise ValueError(f"`model` ({name}) can't be served: it does not say which of its modules attend")
    if any(getattr(module, "is_causal", False) for module in found):
        raise ValueError(f"`model` must be an encoder, got {name}, whose attention is causal")
    return dict(enumerate(found))


def hsa_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """The attention function of the name `"hsa"`: HSA where the module has been chosen, PyTorch's attention elsewhere.

    Args:
        module (`nn.Module`): the attention module; where nothing was injected, all layers of a model with
            `attn_implementation="hsa"` use the default trees.
        query, key, value (`torch.Tensor`): `(B, H, N, d)`.
        attention_mask (`torch.Tensor`, *optional*): `(B, 1, 1, N)` bool, True = real, from [`hsa_mask`].
        scaling (`float`, *optional*): factor of the scores.
        dropout (`float`, *optional*, defaults to 0.0): of the output of HSA (ours; the paper has none).

    Returns:
        `tuple[torch.Tensor, None]`: `(B, N, H, d)`; HSA has no attention weights to give.
    """
    choice = module.__dict__.get("_hsa")
    if choice is None and getattr(module.config, CONFIG_KEY, None) is None:
        choice = _ModuleChoice(DEFAULT_BRANCHING, None, ())
    if choice is None or (attention_mask is not None and attention_mask.shape[-2] != 1):
        kwargs.pop("is_causal", None)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, is_causal=False, **kwargs
        )
    mask = None if attention_mask is None else attention_mask[:, 0, 0]
    output = choice.attend(query, key, value, mask, scaling)
    return F.dropout(output, dropout, module.training).transpose(1, 2), None


def hsa_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *args,
    mask_function: Callable = bidirectional_mask_function,
    attention_mask: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor | None:
    """The mask for [`hsa_attention`]: `(B, 1, 1, N)` where nothing but padding is masked, transformers' own elsewhere.

    A sequence without any real token attends everywhere, so that no kernel divides by zero.
    """
    if mask_function is not bidirectional_mask_function:
        return sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            *args,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **kwargs,
        )
    if attention_mask is None or bool(attention_mask.all()):
        return None
    real = attention_mask.bool()
    return (real | ~real.any(1, keepdim=True))[:, None, None, :]


@dataclass(frozen=True)
class _ModuleChoice:
    """How one attention module attends."""

    branching: int | Sequence[int | None] | None
    builder: TreeBuilder | None
    exact_tokens: Sequence[int]

    def tree(self, query: torch.Tensor, mask: torch.Tensor | None) -> SignalTree:
        """Trees of a batch whose real tokens come first."""
        batch_size, _, length, _ = query.shape
        if self.builder is not None:
            real = torch.ones(batch_size, length, dtype=torch.bool, device=query.device) if mask is None else mask
            return self.builder(real)
        if mask is None:
            lengths = torch.full((batch_size,), length, device=query.device)
        else:
            lengths = mask.sum(1)
        return SignalTree.regular(lengths, self.branching, size=length)

    def attend(self, query, key, value, mask, scaling) -> torch.Tensor:
        """HSA, with the exact rows: `(B, H, N, e)`."""
        shift = None if mask is None else _left_padding(mask)
        if shift is not None:
            query, key, value = (_roll(states, shift) for states in (query, key, value))
            mask = _roll(mask[:, None, :, None], shift)[:, 0, :, 0]
        exact = [position for position in self.exact_tokens if position < query.shape[2]]
        row_weights = None
        if exact:
            row_weights = torch.ones(query.shape[0], query.shape[2], device=query.device)
            row_weights[:, exact] = 0.0
        tree = self.tree(query, mask)
        output = hierarchical_self_attention(query, key, value, tree, scale=scaling, row_weights=row_weights)
        if exact:
            key_mask = None if mask is None else mask[:, None, None, :]
            rows = F.scaled_dot_product_attention(query[:, :, exact], key, value, attn_mask=key_mask, scale=scaling)
            output = output.index_copy(2, torch.tensor(exact, device=output.device), rows)
        return output if shift is None else _roll(output, -shift)


def _left_padding(mask: torch.Tensor) -> torch.Tensor | None:
    """Padded columns before the first real one, `(B,)`, or `None` where no sequence has any."""
    first = mask.long().argmax(1)
    return first if bool(first.any()) else None


def _roll(states: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Roll the third dimension of `(B, H, N, e)` by `-shift (B,)`."""
    length = states.shape[2]
    index = (torch.arange(length, device=states.device) + shift[:, None]) % length
    return states.gather(2, index[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))


def _check_layers(layers: Sequence[int], modules: Mapping[int, nn.Module]) -> list[int]:
    chosen = sorted(int(layer) for layer in layers)
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"`layers` must be different indices, at least one, got {list(layers)}")
    for layer in chosen:
        if layer not in modules:
            raise ValueError(f"`layers` must lie in [0, {len(modules)}), got {layer}")
        if _has_window(modules[layer]):
            raise ValueError(f"`layers` can't have layer {layer}: its attention has a sliding window")
    return chosen


def _has_window(module: nn.Module) -> bool:
    return getattr(module, "sliding_window", None) is not None


def _layers_by_name(name, model, modules, tree, exact_tokens, batch, budget) -> list[int]:
    possible = [layer for layer, module in modules.items() if not _has_window(module)]
    if name == "all":
        return possible
    if name != "auto":
        raise ValueError(f"`layers` must be 'auto', 'all' or indices, got {name!r}")
    if batch is None:
        raise ValueError("`layers='auto'` needs a `batch` to measure gaps on, or name the layers")
    from .gap import gap_report

    gaps = sorted(
        (entry["gap"], entry["layer"]) for entry in gap_report(model, batch, tree=tree, exact_tokens=exact_tokens)
    )
    chosen, total = [], 0.0
    for gap, layer in gaps:
        total += max(gap, 0.0)
        if total > budget:
            break
        chosen.append(layer)
    if not chosen:
        raise ValueError(
            f"`budget` ({budget} nats) admits no layer: the smallest gap is {gaps[0][0]:.3g} (layer {gaps[0][1]})"
        )
    return sorted(chosen)


def _apply(model, modules, injection: Injection, builder: TreeBuilder | None) -> None:
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION_NAME)
    model.__dict__["_attention_before_hsa"] = before
    setattr(model.config, CONFIG_KEY, asdict(injection))
    choice = _ModuleChoice(injection.branching, builder, tuple(injection.exact_tokens))
    for layer in injection.layers:
        modules[layer].__dict__["_hsa"] = choice


AttentionInterface.register(ATTENTION_NAME, hsa_attention)
AttentionMaskInterface.register(ATTENTION_NAME, hsa_mask)
