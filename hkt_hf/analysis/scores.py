"""Scores of a model's attention on real inputs, level by level, in float64: what every instrument here begins with."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from ..modeling.attention_hkt import upsample


ATTENTION_CLASS = "HKTAttention"


@dataclass(frozen=True)
class SequenceScores:
    """Queries and keys of one attention layer on one sequence, padding cut off. All tensors float64, on the CPU.

    Args:
        layer (`int`): index of the layer.
        sequence (`int`): index of the sequence in the batch.
        features (sequence of `torch.Tensor`): of each level, `(T_l, d)`.
        queries, keys (sequence of `torch.Tensor`): of each level, `(H, T_l, p)`, rotated where the model has rotary
            positions.
        level_weights (`torch.Tensor`): `(H, L)`, convex.
        scaling (`float`): factor of the scores.
        is_causal (`bool`): whether a token sees only itself and earlier ones.
    """

    layer: int
    sequence: int
    features: Sequence[torch.Tensor]
    queries: Sequence[torch.Tensor]
    keys: Sequence[torch.Tensor]
    level_weights: torch.Tensor
    scaling: float
    is_causal: bool

    @property
    def length(self) -> int:
        """Number of tokens `T`."""
        return self.queries[0].shape[1]

    @property
    def num_levels(self) -> int:
        """`L`."""
        return len(self.queries)

    def block_scores(self, level: int) -> torch.Tensor:
        """`s(l)`, the scores of a level between its blocks: `(H, T_l, T_l)`, without the level's weight."""
        return self.scaling * self.queries[level] @ self.keys[level].transpose(-1, -2)

    def level_scores(self, level: int) -> torch.Tensor:
        """`U_l s(l) U_l^T`, the scores of a level between tokens: `(H, T, T)`, without the level's weight."""
        return spread(self.block_scores(level), level, self.length)

    def scores(self, num_levels: int | None = None) -> torch.Tensor:
        """Combined scores of the first `num_levels` levels, all by default: `(H, T, T)`. Weights stay as they are."""
        levels = range(self.num_levels if num_levels is None else num_levels)
        return sum(self.level_weights[:, level, None, None] * self.level_scores(level) for level in levels)

    @cached_property
    def visible(self) -> torch.Tensor:
        """Which keys a query sees: bool `(T, T)`."""
        everything = torch.ones(self.length, self.length, dtype=torch.bool)
        return everything.tril() if self.is_causal else everything

    def attention(self, scores: torch.Tensor) -> torch.Tensor:
        """Attention weights `(H, T, T)` of scores."""
        return scores.masked_fill(~self.visible, -torch.inf).softmax(-1)


def spread(blocks: torch.Tensor, level: int, length: int) -> torch.Tensor:
    """`U_l blocks U_l^T`: `(..., T_l, T_l)` between blocks to `(..., T, T)` between tokens."""
    return upsample(upsample(blocks, level, length, dim=-2), level, length, dim=-1)


def attention_layers(model: nn.Module) -> list[nn.Module]:
    """The attention modules of an HKT model, first layer first.

    Raises:
        TypeError: a model without any.
        ValueError: a parameter that is not finite; the message names it.
    """
    layers = [module for module in model.modules() if type(module).__name__ == ATTENTION_CLASS]
    if not layers:
        raise TypeError(f"`model` must be an HKT model, got {type(model).__name__}: it has no {ATTENTION_CLASS}")
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"`model` has values in {name} that are not finite (NaN or infinite)")
    return sorted(layers, key=lambda layer: layer.layer_idx)


def sequence_scores(
    model: nn.Module, batch: Mapping[str, torch.Tensor], *, rotate: bool = True
) -> Iterator[SequenceScores]:
    """Run the model on a batch and give the scores of each layer and sequence, one at a time, the first layer first.

    The hidden states are those of the model in its own precision; from them on everything is float64. The model is left
    as it was.

    Args:
        model (`nn.Module`): an HKT model, with or without a head.
        batch (mapping): what the model takes, e.g. `input_ids` and `attention_mask`, each `(B, T)`. Labels are left out.
        rotate (`bool`, *optional*, defaults to `True`): with `False`, queries and keys are those before rotary positions.

    Raises:
        TypeError: not an HKT model, or a batch that is no mapping.
        ValueError: parameters that are not finite, a batch without real tokens, or what the model itself refuses.
    """
    layers = attention_layers(model)
    mask = _check_batch(batch)
    calls: dict[int, tuple] = {}

    def keep(module, arguments, options):
        hidden_states = arguments[0] if arguments else options["hidden_states"]
        calls[module.layer_idx] = hidden_states, options.get("position_embeddings"), options.get("layout")

    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    was_training, device = model.training, next(model.parameters()).device
    base = getattr(model, "base_model", model)
    try:
        model.eval()
        with torch.no_grad():
            inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
            base(**inputs, **({"use_cache": False} if layers[0].is_causal else {}))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    for layer in layers:
        hidden_states, positions, layout = calls.pop(layer.layer_idx)
        positions = positions if rotate else None
        if layout is not None:
            hidden_states, real = layout.to_sequences(hidden_states), layout.mask
        else:
            real = torch.ones(hidden_states.shape[:2], dtype=torch.bool) if mask is None else mask
        yield from _of_layer(layer, hidden_states, positions, real.sum(1).tolist())


@torch.no_grad()
def _of_layer(layer: nn.Module, hidden_states, positions, lengths: Sequence[int]) -> Iterator[SequenceScores]:
    exact = copy.deepcopy(layer).to("cpu", torch.float64).eval()
    for sequence, length in enumerate(lengths):
        if length == 0:
            continue
        features = exact.levels(hidden_states[sequence, :length].to("cpu", torch.float64)[None])
        queries, keys = [], []
        for level, states in enumerate(features):
            rotation = None
            if positions is not None:
                # One pair of tables for all sequences, or one each.
                rotation = [
                    table[min(sequence, len(table) - 1), : states.shape[1]].to("cpu", torch.float64)[None]
                    for table in positions[level]
                ]
            query, key = exact.queries_and_keys(states, level, rotation)
            queries.append(query[0])
            keys.append(key[0])
        yield SequenceScores(
            layer=layer.layer_idx,
            sequence=sequence,
            features=[states[0] for states in features],
            queries=queries,
            keys=keys,
            level_weights=exact.level_weights(),
            scaling=layer.scaling,
            is_causal=layer.is_causal,
        )


def _check_batch(batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The mask of the batch, bool `(B, T)`, or `None` where all tokens are real."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"`batch` must be a mapping such as a tokenizer returns, got {type(batch).__name__}")
    inputs = batch.get("input_ids", batch.get("inputs_embeds"))
    if inputs is None:
        raise ValueError(f"`batch` must hold `input_ids` or `inputs_embeds`, got {sorted(batch)}")
    mask = batch.get("attention_mask")
    if inputs.shape[0] == 0 or inputs.shape[1] == 0 or (mask is not None and not (mask != 0).any()):
        raise ValueError(f"`batch` must hold real tokens, got none in {tuple(inputs.shape)}")
    if mask is None:
        return None
    if mask.dim() != 2:
        raise ValueError(f"`attention_mask` must be (batch, length) for an analysis, got {tuple(mask.shape)}")
    return mask.cpu() != 0
