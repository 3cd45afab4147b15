"""How far HSA is from a model's own attention, layer by layer, before it is put there (ours)."""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from ..modeling.attention_hsa import hsa_energy
from .attention import (
    DEFAULT_BRANCHING,
    LayerChoice,
    TreeBuilder,
    attention_by_configuration,
    attention_modules,
    check_chosen,
    check_scores,
    checked_exact_tokens,
    checked_root_tokens,
    choice_of_tree,
    for_each_head,
    has_window,
    hsa_mask,
    key_mask,
    own_attention,
    real_first,
    refusal_of_part,
    reorder,
    set_attention_back,
)


PROBE_NAME = "hsa_gap"
SCORES_AT_ONCE = 2**22
"""Entries of float64: 32 MiB."""


def gap_report(
    model: PreTrainedModel,
    batch: Mapping[str, torch.Tensor],
    *,
    tree: int | Sequence[int | None] | TreeBuilder = DEFAULT_BRANCHING,
    exact_tokens: Sequence[int] = (0,),
    root_tokens: Sequence[int] | None = None,
    num_rows: int | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Mean KL divergence, a row, of HSA from the attention of each layer, with the hidden states of the model as it is.

    The divergence of all rows is `phi + log Z_i` in the mean (identity 2 of the theory). `log Z_i` of all rows takes as many
    operations as the model's own attention, in parts, so that no matrix of all pairs is kept.

    Args:
        model (`PreTrainedModel`): an encoder that [`~hkt_hf.hsa.inject.inject`] can serve, not injected. It is left as it was.
        batch (mapping): inputs as the model takes them.
        tree, exact_tokens, root_tokens: as in [`~hkt_hf.hsa.inject.inject`].
        num_rows (`int`, *optional*): take `log Z_i` from this many rows of each sequence, at least 1, for very long ones. All by
            default: `log Z_i` differs from row to row by more than small gaps, and a mean over some may even be negative.
        seed (`int`, *optional*, defaults to 0): for which rows.

    Returns:
        `list[dict]`: one for each layer without a sliding window: `layer`, `gap` (nats, mean over sequences and heads) and `by_head`.
            A layer whose weights are used in several passes (ALBERT) is one layer, with the sum of the gaps of its passes.

    Raises:
        TypeError, ValueError: as [`~hkt_hf.hsa.inject.inject`], or `num_rows` below 1.
    """
    if num_rows is not None and num_rows < 1:
        raise ValueError(f"`num_rows` must be at least 1, got {num_rows}")
    modules = attention_modules(model)
    branching, builder = choice_of_tree(tree)
    exact, at_root = checked_exact_tokens(exact_tokens), checked_root_tokens(root_tokens, builder)
    choice = LayerChoice(branching, builder, tuple(exact), tuple(at_root))
    generator = torch.Generator().manual_seed(seed)
    found: dict[int, torch.Tensor] = {}
    layer_of = {id(module): layer for layer, module in modules.items()}
    parts = {id(part) for module in modules.values() for part in module.modules()} - layer_of.keys()

    def probe(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        check_scores(module, kwargs)
        layer, is_causal = layer_of.get(id(module)), kwargs.pop("is_causal", None)
        if id(module) in parts:
            raise refusal_of_part(module)
        if layer is not None and not has_window(module):
            check_chosen(module, query, key, kwargs)
            mask = key_mask(module, attention_mask, is_causal, len(query))
            gaps = _gaps(choice, query, for_each_head(key, query), mask, scaling, num_rows, generator)
            found[layer] = found.get(layer, 0.0) + gaps
        return own_attention(module, query, key, value, attention_mask, scaling, dropout, is_causal, **kwargs)

    with _attending_by(model, probe), torch.no_grad():
        model(**batch)
    return [
        {"layer": layer, "gap": by_head.mean().item(), "by_head": by_head.tolist()}
        for layer, by_head in sorted(found.items())
    ]


@contextmanager
def _attending_by(model: PreTrainedModel, function):
    before = attention_by_configuration(model)
    was_training = {module: module.training for module in model.modules()}
    AttentionInterface.register(PROBE_NAME, function)
    AttentionMaskInterface.register(PROBE_NAME, hsa_mask)
    model.set_attn_implementation(PROBE_NAME)
    model.eval()
    try:
        yield
    finally:
        set_attention_back(before)
        for module, training in was_training.items():
            module.training = training


def _gaps(choice, query, key, mask, scaling, num_rows: int | None, generator) -> torch.Tensor:
    """Mean gap of each head, `(H,)` float64."""
    query, key = query.double(), key.double()
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    batch_size, heads, length, _ = query.shape
    order = None if mask is None else real_first(mask)
    if order is not None:
        query, key = reorder(query, order), reorder(key, order)
        mask = mask.gather(1, order)
    tree = choice.tree(query, mask)
    weights = tree.mask.double()
    weights[:, [position for position in choice.exact_tokens if position < length]] = 0.0
    energy = hsa_energy(query, key, tree, scale=scaling, row_weights=weights)
    gaps = []
    for row in range(batch_size):
        counted = weights[row].nonzero().squeeze(1)
        if len(counted) == 0:
            continue
        if num_rows is not None and len(counted) > num_rows:
            picked = torch.randperm(len(counted), generator=generator)[:num_rows].to(counted.device)
            counted = counted[picked]
        log_sums = torch.zeros(heads, dtype=torch.double, device=query.device)
        for part in counted.split(max(SCORES_AT_ONCE // (heads * length), 1)):
            scores = scaling * query[row][:, part] @ key[row].transpose(-1, -2)
            if mask is not None:
                scores = scores.masked_fill(~mask[row], -torch.inf)
            log_sums += scores.logsumexp(-1).sum(-1)
        gaps.append(energy[row] + log_sums / len(counted))
    return torch.stack(gaps).mean(0) if gaps else torch.zeros(heads, dtype=torch.double)
