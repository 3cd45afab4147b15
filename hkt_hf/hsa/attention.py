"""HSA as an attention function of transformers: which modules it can serve, its mask, and how one module attends (ours)."""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

from ..modeling.attention_hsa import hierarchical_self_attention
from ..modeling.tree_hsa import SignalTree


ATTENTION_NAME = "hsa"
CONFIG_KEY = "hsa"
DEFAULT_BRANCHING = (16, None)
DEFAULT_ROOT_TOKENS = (0, -1)
"""The first and the last token, in BERT `[CLS]` and `[SEP]`: much attention goes to them, from all others alike."""
ADDITIVE_MASKED = -1e4
"""An additive mask hides a token by this or less: models and users write -10000, the least number of a dtype or minus infinity."""
TreeBuilder = Callable[[torch.Tensor], SignalTree]
INSIDE = "inside"
"""Stands, as a module's choice, for being a part of a module that the model names as its attention."""


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
    if isinstance(target, str):
        found = [module for module in model.modules() if type(module).__name__ == target]
    else:
        found = [module for module in model.modules() if target is not None and isinstance(module, target)]
    if not found:
        raise ValueError(f"`model` ({name}) can't be served: it does not say which of its modules attend")
    if any(getattr(module, "is_causal", False) for module in found):
        raise ValueError(f"`model` must be an encoder, got {name}, whose attention is causal")
    return dict(enumerate(found))


def attention_by_configuration(model: PreTrainedModel) -> list[tuple[PreTrainedConfig, str]]:
    """Each configuration in a model, one of a part after that of the whole, with the name of its attention."""
    found: dict[int, PreTrainedConfig] = {}
    waiting = [model.config, *(module.config for module in model.modules() if isinstance(module, PreTrainedModel))]
    while waiting:
        config = waiting.pop(0)
        if id(config) not in found:
            found[id(config)] = config
            parts = [getattr(config, name, None) for name in config.sub_configs]
            waiting += [part for part in parts if part is not None]
    return [(config, config._attn_implementation) for config in found.values()]


def set_attention_back(before: Sequence[tuple[PreTrainedConfig, str]]) -> None:
    """Give every configuration the attention that [`attention_by_configuration`] found."""
    for config, name in before:
        config._attn_implementation = name


def choice_of_tree(
    tree: int | Sequence[int | None] | TreeBuilder,
) -> tuple[int | list[int | None] | None, TreeBuilder | None]:
    """Branching and builder, of which one is `None`; ValueError for what is neither."""
    if callable(tree):
        return None, tree
    try:
        branching = operator.index(tree)
    except TypeError:
        try:
            branching = [None if factor is None else operator.index(factor) for factor in tree]
        except TypeError:
            raise ValueError(
                "`tree` must be an integer, a sequence of integers that ends in None, or a function from a mask to its "
                f"trees, got {tree!r}"
            ) from None
    SignalTree.regular([2], branching)  # refuses other factors
    if isinstance(branching, list) and branching[-1] is not None:
        raise ValueError(f"`tree` must end in None, the root of texts of any length, got {tuple(branching)}")
    return branching, None


def checked_integers(name: str, values: Sequence[int]) -> list[int]:
    """The values of the argument `name`; ValueError where they are no integers."""
    try:
        return [operator.index(value) for value in values]
    except TypeError:
        raise ValueError(f"`{name}` must be integers, got {values!r}") from None


def checked_root_tokens(root_tokens: Sequence[int] | None, builder: TreeBuilder | None) -> list[int]:
    """The positions, by default [`DEFAULT_ROOT_TOKENS`]; ValueError where they are no integers, repeated, or can't be had."""
    if builder is not None:
        if root_tokens is not None:
            raise ValueError(
                f"`root_tokens` can't be given with a function for `tree`, which makes them, got {root_tokens}"
            )
        return []
    positions = checked_integers("root_tokens", DEFAULT_ROOT_TOKENS if root_tokens is None else root_tokens)
    if len(set(positions)) < len(positions):
        raise ValueError(f"`root_tokens` must be different positions, got {positions}")
    return positions


def checked_exact_tokens(exact_tokens: Sequence[int]) -> list[int]:
    """The positions; ValueError where they are no integers, negative or repeated."""
    positions = checked_integers("exact_tokens", exact_tokens)
    if any(position < 0 for position in positions) or len(set(positions)) < len(positions):
        raise ValueError(f"`exact_tokens` must be different positions of at least 0, got {positions}")
    return positions


def refusal_of_part(module: nn.Module) -> ValueError:
    """The error for a module that attends, and is a part of one that the model names as its attention."""
    return ValueError(
        f"`model` can't be served: {type(module).__name__} attends inside of the module that the model names as its attention"
    )


def check_scores(module: nn.Module, arguments: Mapping[str, Any]) -> None:
    """ValueError where a model asks for more than softmax attention: PyTorch's would leave it out without a word."""
    for name in ("softcap", "s_aux", "sinks"):
        if arguments.get(name) is not None:
            raise ValueError(f"`model` can't be served: the attention of {type(module).__name__} has `{name}`")


def check_chosen(module: nn.Module, query: torch.Tensor, key: torch.Tensor, arguments: Mapping[str, Any]) -> None:
    """ValueError where a call of a chosen module is not self-attention along the trees that were chosen."""
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"`model` can't be served: {type(module).__name__} has {key.shape[2]} keys for {query.shape[2]} queries, as with "
            "a prefix or a cache"
        )
    if arguments.get("segment_ids") is not None:
        raise ValueError(
            "`segment_ids` are not read by a pretrained model: its trees are what `inject` was given as `tree`, for instance "
            "a function that knows the segments of the batch"
        )


def has_window(module: nn.Module) -> bool:
    """Whether a module attends to a sliding window only."""
    return getattr(module, "sliding_window", None) is not None


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
        module (`nn.Module`): the attention module; where nothing was injected, all layers without a window of a model with
            `attn_implementation="hsa"` use the default trees.
        query, key, value (`torch.Tensor`): `(B, H, N, d)`; key and value may have fewer heads, of which each serves a group.
        attention_mask (`torch.Tensor`, *optional*): `(B, 1, 1, N)` bool, True = real, from [`hsa_mask`], or what a caller of the
            model gave instead, as [`key_mask`] takes it.
        scaling (`float`, *optional*): factor of the scores.
        dropout (`float`, *optional*, defaults to 0.0): of the output of HSA (ours; the paper has none).

    Returns:
        `tuple[torch.Tensor, None]`: `(B, N, H, d)`; HSA has no attention weights to give.

    Raises:
        ValueError: a model that was not injected, though its configuration says that it was, attention with soft-capped scores
            or sinks, or a chosen module whose attention is causal, has keys that are no queries, or has a mask that hides more
            than padding.
    """
    check_scores(module, kwargs)
    is_causal = kwargs.pop("is_causal", None)
    if "_hsa" in module.__dict__:
        choice = module.__dict__["_hsa"]
    elif getattr(module.config, CONFIG_KEY, None) is None:
        choice = None if has_window(module) else LayerChoice(DEFAULT_BRANCHING, None, (), DEFAULT_ROOT_TOKENS)
    else:
        raise ValueError(
            f"`config.{CONFIG_KEY}` says that HSA was injected, but this model was not: either it comes from a checkpoint that "
            "was saved with an injection, by `attn_implementation='hsa'`, where `hkt_hf.hsa.load` reads it, or it was made with "
            f"the configuration of an injected model, and needs a copy without `{CONFIG_KEY}` and with another attention"
        )
    if choice == INSIDE:
        raise refusal_of_part(module)
    if choice is None:
        return own_attention(module, query, key, value, attention_mask, scaling, dropout, is_causal, **kwargs)
    check_chosen(module, query, key, kwargs)
    mask = key_mask(module, attention_mask, is_causal, len(query))
    key, value = for_each_head(key, query), for_each_head(value, query)
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

    A sequence without any real token attends everywhere, so that no kernel divides by zero. `None` says that nothing is masked,
    never that a kernel is to be causal or that a window is wide enough: both are written out.
    """
    if mask_function is not bidirectional_mask_function:
        kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
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
    return _or_everywhere(attention_mask.bool())[:, None, None, :]


def own_attention(
    module, query, key, value, attention_mask, scaling, dropout, is_causal: bool | None, **kwargs
) -> tuple[torch.Tensor, None]:
    """The attention of a module without HSA, by PyTorch: as [`hsa_attention`], with the mask of [`hsa_mask`]."""
    return sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=scaling,
        dropout=dropout,
        is_causal=bool(is_causal),
        **kwargs,
    )


def for_each_head(states: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Keys or values `(B, K, N, e)` of groups of heads as those of each of the `H` heads of a query: `(B, H, N, e)`."""
    return repeat_kv(states, query.shape[1] // states.shape[1])


def key_mask(
    module: nn.Module, attention_mask: torch.Tensor | None, is_causal: bool | None, batch_size: int
) -> torch.Tensor | None:
    """Which tokens are real, for HSA.

    Args:
        module (`nn.Module`): the attention module.
        attention_mask (`torch.Tensor`, *optional*): `(B or 1, H or 1, N or 1, N)`: bool, True = seen, or additive, of 0 and of
            numbers of at most -10000. Rows of tokens that no row sees are not read.
        is_causal (`bool`, *optional*): what the model says of this call; by default what the module says of itself.
        batch_size (`int`): `B`.

    Returns:
        `torch.Tensor` or `None`: bool `(B, N)`, all True for a sequence without a real token; `None` where nothing is masked.

    Raises:
        ValueError: causal attention, a mask of another dtype or with other numbers, or one that hides more than padding.
    """
    name = type(module).__name__
    if getattr(module, "is_causal", False) if is_causal is None else is_causal:
        raise ValueError(f"`model` must be an encoder: the attention of {name} is causal, which HSA can't serve")
    if attention_mask is None:
        return None
    if attention_mask.is_floating_point():
        seen = attention_mask == 0
        if bool((~seen & (attention_mask > ADDITIVE_MASKED)).any()):
            raise ValueError(
                "`attention_mask` must be bool, or additive of 0 and numbers of at most -10000, got others: HSA can't add "
                f"to the scores of {name}"
            )
    elif attention_mask.dtype == torch.bool:
        seen = attention_mask
    else:
        raise ValueError(
            f"`attention_mask` with 4 dimensions must be bool or floating-point, got {attention_mask.dtype}"
        )
    real = seen.any(2).any(1)
    if seen.shape[1] * seen.shape[2] > 1:
        differ = seen != real[:, None, None, :]
        if seen.shape[2] == seen.shape[3]:
            differ = differ & real[:, None, :, None]
        if bool(differ.any()):
            raise ValueError(
                f"`attention_mask` must hide the same tokens from every token (padding), got one for {name} with rows that "
                "differ, as those of causal attention do: HSA can't serve it"
            )
    return _or_everywhere(real).expand(batch_size, -1)


def _or_everywhere(real: torch.Tensor) -> torch.Tensor:
    """A mask `(B, N)`, all True for a sequence without a real token."""
    return real | ~real.any(1, keepdim=True)


@dataclass(frozen=True)
class LayerChoice:
    """How one attention module attends.

    Args:
        branching (`int` or sequence of `int` and `None`, *optional*): of regular trees; `None` where there is a builder.
        builder (`Callable`, *optional*): from the mask of a batch, bool `(B, N)`, to its trees.
        exact_tokens (sequence of `int`): positions whose rows are those of flat attention.
        root_tokens (sequence of `int`): positions of children of the root in regular trees.
    """

    branching: int | Sequence[int | None] | None
    builder: TreeBuilder | None
    exact_tokens: Sequence[int]
    root_tokens: Sequence[int]

    def tree(self, query: torch.Tensor, mask: torch.Tensor | None) -> SignalTree:
        """Trees of a batch whose real tokens come first; ValueError where a builder's are not over these."""
        batch_size, _, length, _ = query.shape
        if self.builder is not None:
            real = torch.ones(batch_size, length, dtype=torch.bool, device=query.device) if mask is None else mask
            tree = self.builder(real)
            _check_leaves(tree, real)
            return tree
        if mask is None:
            lengths = torch.full((batch_size,), length, device=query.device)
        else:
            lengths = mask.sum(1)
        return SignalTree.regular(lengths, self.branching, size=length, root_tokens=self.root_tokens)

    def attend(self, query, key, value, mask, scaling) -> torch.Tensor:
        """HSA, with the exact rows: `(B, H, N, e)`."""
        order = None if mask is None else real_first(mask)
        if order is not None:
            query, key, value = (reorder(states, order) for states in (query, key, value))
            mask = mask.gather(1, order)
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
        return output if order is None else reorder(output, order.argsort(1))


def _check_leaves(tree: SignalTree, real: torch.Tensor) -> None:
    """That a tree of a function is over the real tokens; the operator refuses what is no tree of the batch at all."""
    if (
        not isinstance(tree, SignalTree)
        or (tree.batch_size, tree.size) != tuple(real.shape)
        or tree.device != real.device
    ):
        return
    differ = (tree.mask != real).nonzero()
    if len(differ):
        row, token = differ[0].tolist()
        raise ValueError(
            "`tree` must give trees over the real tokens of the mask that it is called with, which come first whatever the "
            f"side of padding, got one of sequence {row} {'without' if real[row, token] else 'with'} token {token}, where "
            f"{int(real[row].sum())} tokens are real"
        )


def real_first(mask: torch.Tensor) -> torch.Tensor | None:
    """Columns of a mask `(B, N)`, the real ones first: padding in front and gaps go to the end. `None` where they do already."""
    order = mask.long().argsort(dim=1, descending=True, stable=True)
    return None if bool((order == torch.arange(mask.shape[1], device=mask.device)).all()) else order


def reorder(states: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The third dimension of `(B, H, N, e)` in the order `(B, N)`."""
    return states.gather(2, order[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))


AttentionInterface.register(ATTENTION_NAME, hsa_attention)
AttentionMaskInterface.register(ATTENTION_NAME, hsa_mask)
