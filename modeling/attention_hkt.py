# Copyright 2026 The hkt-hf authors. Licensed under the Apache License, Version 2.0.
"""Hierarchical attention: levels, combined scores, the lifting identity, and the one door to the backends.

Notation: `B` batch, `H` heads, `T` length, `p` head width, `L` levels, `T_l = ceil(T / 2**l)` blocks at level `l`.
Position `i` belongs to block `i // 2**l` of level `l`. The combined score of a query `i` and a key `j` is

    S[i, j] = sum_l  level_weights[l] * scale * < queries[l][i // 2**l], keys[l][j // 2**l] >

Source: the Hierarchical Kernel Transformer (arXiv 2604.08829): trainable causal downsampling, nearest-neighbour
upsampled level scores, learned convex weights under one softmax. Ours: the kernel size and the alignment of a block
with its first token, the lifting identity, and the treatment of padding.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import logging

from .layout_hkt import SequenceLayout
from .polyphase_hkt import polyphase_attention


logger = logging.get_logger(__name__)

DOWNSAMPLE_TYPES = ("depthwise", "dense")

# The longest sequence that forms the score matrix on a CPU. Measured: results/benchmark_short.json.
MAX_EAGER_LENGTH = 160


class CausalDownsample(nn.Module):
    """Trainable causal convolution of stride 2 that makes the next coarser level (arXiv 2604.08829).

    `output[:, m] = sum_t weight[t] * input[:, 2 * m - t]` for `t = 0 .. kernel_size - 1`, with zeros before the start:
    the feature of block `m` sees no position after the first one of the block (alignment and kernel size: ours).

    Args:
        hidden_size (`int`): number of channels `d`.
        kernel_size (`int`, *optional*, defaults to 4): taps `K`, at least 1.
        downsample_type (`str`, *optional*, defaults to `"depthwise"`): `"depthwise"`, weight `(K, d)`, or `"dense"`,
            weight `(K, d, d)` (tap, input channel, output channel).

    Raises:
        ValueError: `kernel_size` or `hidden_size` below 1, or an unknown `downsample_type`.
    """

    def __init__(self, hidden_size: int, kernel_size: int = 4, downsample_type: str = "depthwise"):
        super().__init__()
        if hidden_size < 1:
            raise ValueError(f"`hidden_size` must be at least 1, got {hidden_size}")
        if kernel_size < 1:
            raise ValueError(f"`kernel_size` must be at least 1, got {kernel_size}")
        if downsample_type not in DOWNSAMPLE_TYPES:
            raise ValueError(f"`downsample_type` must be one of {DOWNSAMPLE_TYPES}, got {downsample_type!r}")
        self.hidden_size = hidden_size
        self.kernel_size = kernel_size
        self.downsample_type = downsample_type
        shape = (hidden_size,) if downsample_type == "depthwise" else (hidden_size, hidden_size)
        self.weight = nn.Parameter(torch.empty(kernel_size, *shape))
        self.reset_parameters()

    def mean_weight(self) -> torch.Tensor:
        """The weight of the initial state, the mean over the taps; same shape, dtype and device as `weight`."""
        weight = torch.ones_like(self.weight) / self.kernel_size
        if self.downsample_type == "dense":
            weight = weight * torch.eye(self.hidden_size, dtype=weight.dtype, device=weight.device)
        return weight

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the weight to the mean over the taps."""
        self.weight.copy_(self.mean_weight())

    def forward(self, hidden_states: torch.Tensor, has_history: bool = False) -> torch.Tensor:
        """`(B, T, d)` to `(B, ceil(T / 2), d)`, any `T >= 0`.

        Args:
            hidden_states (`torch.Tensor`): `(B, T, d)`.
            has_history (`bool`, *optional*, defaults to `False`): `hidden_states` is `(B, K - 1 + T, d)`, with the `K - 1`
                inputs before these `T` in front, instead of zeros.
        """
        history = self.kernel_size - 1
        padded = hidden_states if has_history else F.pad(hidden_states, (0, 0, history, 0))
        length = padded.shape[1] - history
        output = None
        for tap in range(self.kernel_size):
            inputs = padded.narrow(1, history - tap, length)[:, ::2]
            term = inputs * self.weight[tap] if self.downsample_type == "depthwise" else inputs @ self.weight[tap]
            output = term if output is None else output + term
        return output

    def extra_repr(self) -> str:
        """Fields shown by `print(module)`."""
        return f"{self.hidden_size}, kernel_size={self.kernel_size}, downsample_type={self.downsample_type!r}"


def upsample(blocks: torch.Tensor, level: int, length: int, dim: int) -> torch.Tensor:
    """Nearest-neighbour upsampling `U_l` along `dim`: entry `i` of the result is entry `i // 2**level` of `blocks`.

    Args:
        blocks (`torch.Tensor`): size `ceil(length / 2**level)` along `dim`.
        level (`int`): 0 returns `blocks` itself.
        length (`int`): `T`, the size along `dim` of the result.
        dim (`int`): the dimension of positions.
    """
    if level == 0:
        return blocks
    if torch.compiler.is_compiling():
        # Repeating and cutting would bind a graph to the lengths that leave the same remainder modulo `2**level`.
        return blocks.index_select(dim, torch.arange(length, device=blocks.device) // 2**level)
    # Without a compiler this is several times faster along the last dimension, and its gradient needs no atomics.
    return blocks.repeat_interleave(2**level, dim=dim).narrow(dim, 0, length)


def hierarchical_scores(
    queries: Sequence[torch.Tensor],
    keys: Sequence[torch.Tensor],
    level_weights: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """Combined scores before any mask, `S = sum_l level_weights[:, l] * U_l (scale * queries[l] keys[l]^T) U_l^T`.

    Args:
        queries (sequence of `torch.Tensor`): `L` tensors `(B, H, T_l, p)`, fine to coarse.
        keys (sequence of `torch.Tensor`): likewise.
        level_weights (`torch.Tensor`): `(H, L)`. Rows are convex in HKT; the values are not checked.
        scale (`float`, *optional*): factor of the scores, `p ** -0.5` by default.

    Returns:
        `torch.Tensor`: `(B, H, T, T)`, in the dtype of `queries`.

    Raises:
        ValueError: shapes or dtypes that do not belong together (the message names the argument).
    """
    _check_levels(queries, keys, level_weights)
    return _scores(queries, keys, level_weights, _default_scale(queries, scale))


def _scores(queries, keys, level_weights, scale: float) -> torch.Tensor:
    length = queries[0].shape[-2]
    weights = _factors(queries, level_weights, scale)
    scores = None
    for level, (weight, query, key) in enumerate(zip(weights, queries, keys, strict=True)):
        level_scores = (weight * query) @ key.transpose(-1, -2)
        level_scores = upsample(upsample(level_scores, level, length, dim=-2), level, length, dim=-1)
        scores = level_scores if scores is None else scores + level_scores
    return scores


def lift(
    queries: Sequence[torch.Tensor],
    keys: Sequence[torch.Tensor],
    level_weights: torch.Tensor,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lifted queries and keys, whose flat attention is hierarchical attention (the lifting identity, ours).

    `query[i] = concat_l(scale * level_weights[:, l] * queries[l][i // 2**l])`,
    `key[j] = concat_l(keys[l][j // 2**l])`, so that `query @ key^T` equals `hierarchical_scores(..., scale)`.

    Args:
        queries (sequence of `torch.Tensor`): `L` tensors `(B, H, T_l, p)`, fine to coarse.
        keys (sequence of `torch.Tensor`): likewise.
        level_weights (`torch.Tensor`): `(H, L)`.
        scale (`float`, *optional*, defaults to 1.0): factor of the queries.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: query and key, each `(B, H, T, L * p)`.

    Raises:
        ValueError: shapes or dtypes that do not belong together (the message names the argument).
    """
    _check_levels(queries, keys, level_weights)
    return _lift(queries, keys, level_weights, scale)


def _lift(queries, keys, level_weights, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    length = queries[0].shape[-2]
    weights = _factors(queries, level_weights, scale)
    weighted = [weight * query for weight, query in zip(weights, queries, strict=True)]
    query = torch.cat([upsample(blocks, level, length, dim=-2) for level, blocks in enumerate(weighted)], dim=-1)
    key = torch.cat([upsample(blocks, level, length, dim=-2) for level, blocks in enumerate(keys)], dim=-1)
    return query, key


def hierarchical_attention(
    queries: Sequence[torch.Tensor],
    keys: Sequence[torch.Tensor],
    value: torch.Tensor,
    level_weights: torch.Tensor,
    *,
    key_padding_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> torch.Tensor:
    """Hierarchical attention, `softmax(S + mask) @ value` with the combined scores `S` of [`hierarchical_scores`].

    Args:
        queries (sequence of `torch.Tensor`): `L` tensors `(B, H, T_l, p)`, `T_l = ceil(T / 2**l)`, fine to coarse.
        keys (sequence of `torch.Tensor`): likewise.
        value (`torch.Tensor`): `(B, H, T, p)`.
        level_weights (`torch.Tensor`): `(H, L)`. Rows are convex in HKT; the values are not checked.
        key_padding_mask (`torch.Tensor`, *optional*): `(B, T)` bool, True = real. Padded keys get no weight; a query
            that sees no real key at all gets zeros.
        is_causal (`bool`, *optional*, defaults to `False`): a query sees no later key.
        scale (`float`, *optional*): factor of the scores, `p ** -0.5` by default.
        dropout_p (`float`, *optional*, defaults to 0.0): dropout of the attention weights, applied whenever positive
            (as in `torch.nn.functional.scaled_dot_product_attention`).
        backend (`str`, *optional*, defaults to `"auto"`): `"eager"` forms the scores and is the reference; `"lifted"`
            runs PyTorch's fused attention on lifted queries and keys and never forms a `T x T` matrix (unless
            PyTorch does: its CPU kernel does not know dropout); `"polyphase"` works tile by tile without upsampling
            and is meant for CPUs; `"triton"` runs fused kernels on an NVIDIA GPU, memory linear in `T`, the same bits in
            every run, float16, bfloat16 or float32, up to 4 levels and heads up to 128 wide; `"auto"` takes what
            [`choose_backend`] says.

    Returns:
        `torch.Tensor`: `(B, H, T, p)`.

    Raises:
        ValueError: unknown backend, `dropout_p` outside [0, 1), or shapes or dtypes that do not belong together (the
            message names the argument), or that the backend does not take.
        ImportError: `backend="triton"` without the package `triton`.
    """
    _check_levels(queries, keys, level_weights)
    _check_value_and_mask(queries, value, key_padding_mask)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"`dropout_p` must lie in [0, 1), got {dropout_p}")
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {('auto', *BACKENDS)}, got {backend!r}")
    if backend == "auto":
        backend = _choose(queries).backend
    scale = _default_scale(queries, scale)
    output = BACKENDS[backend](queries, keys, value, level_weights, key_padding_mask, is_causal, scale, dropout_p)
    if key_padding_mask is None:
        return output
    sees_a_key = key_padding_mask.cummax(dim=1).values if is_causal else key_padding_mask.any(dim=1, keepdim=True)
    return output.masked_fill(~sees_a_key[:, None, :, None], 0.0)


def _eager_backend(queries, keys, value, level_weights, key_padding_mask, is_causal, scale, dropout_p):
    mask = None if key_padding_mask is None else key_padding_mask[:, None, None, :]
    if is_causal:
        length = value.shape[-2]
        causal_mask = torch.ones(length, length, dtype=torch.bool, device=value.device).tril()
        mask = causal_mask if mask is None else mask & causal_mask
    scores = _scores(queries, keys, level_weights, scale)
    return _attend(scores, value, mask, dropout_p)[0]


def _lifted_backend(queries, keys, value, level_weights, key_padding_mask, is_causal, scale, dropout_p):
    query, key = _lift(queries, keys, level_weights, scale)
    mask = None
    if key_padding_mask is not None and is_causal:
        # PyTorch takes a mask or `is_causal`, not both. The mask becomes one more feature of the scores instead of a
        # T x T matrix: large enough that the weight of a padded key underflows to zero, small enough to stay finite.
        penalty = torch.finfo(key.dtype).min / 4.0
        bias = (~key_padding_mask).to(key.dtype)[:, None, :, None] * penalty
        query = F.pad(query, (0, 1), value=1.0)
        key = torch.cat([key, bias.expand(*key.shape[:-1], 1)], dim=-1)
    elif key_padding_mask is not None:
        mask = broadcast_padding_mask(key_padding_mask)  # the caller zeroes the rows without a real key
    output = F.scaled_dot_product_attention(
        query,
        key,
        _widen(value, query.shape[-1]),
        attn_mask=mask,
        is_causal=is_causal,
        scale=1.0,
        dropout_p=dropout_p,
    )
    return output[..., : value.shape[-1]]


def broadcast_padding_mask(key_padding_mask: torch.Tensor) -> torch.Tensor:
    """`(B, T)` bool, True = real, as an attention mask `(B, 1, 1, T)` that no kernel has to expand.

    A row without any real key attends everywhere, so that no kernel divides by zero.
    """
    return (key_padding_mask | ~key_padding_mask.any(dim=1, keepdim=True))[:, None, None, :]


def _polyphase_backend(queries, keys, value, level_weights, key_padding_mask, is_causal, scale, dropout_p):
    weights = _factors(queries, level_weights, scale)
    queries = [weight * query for weight, query in zip(weights, queries, strict=True)]
    return polyphase_attention(queries, keys, value, key_padding_mask, is_causal, dropout_p)


def _triton_backend(queries, keys, value, *others):
    from .triton_hkt import triton_attention  # Triton is a GPU's package: imported when it is asked for

    # Under autocast rotary embeddings leave queries and keys in float32.
    queries, keys = ([states.to(value.dtype) for states in levels] for levels in (queries, keys))
    return triton_attention(queries, keys, value, *others)


BACKENDS: dict[str, Callable[..., torch.Tensor]] = {
    "eager": _eager_backend,
    "lifted": _lifted_backend,
    "polyphase": _polyphase_backend,
    "triton": _triton_backend,
}

# Those that a model can be told to use by `attn_implementation`; it has its own names for the others.
MODEL_BACKENDS = ("polyphase", "triton")


class BackendChoice(NamedTuple):
    """A backend of [`hierarchical_attention`] and why `"auto"` takes it."""

    backend: str
    reason: str


def choose_backend(
    length: int,
    num_levels: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    is_compiling: bool = False,
) -> BackendChoice:
    """What `backend="auto"` takes, an exact backend chosen from measured thresholds, and the reason.

    One threshold in length serves all head widths and batch sizes; docs/speed.md says how far from the fastest that was
    (results/benchmark_short.json).

    Args:
        length (`int`): `T`.
        num_levels (`int`): `L`.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): where the tensors are.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): their dtype.
        is_compiling (`bool`, *optional*, defaults to `False`): `torch.compile` or `torch.export` records the call.

    Returns:
        `BackendChoice`: `backend`, a key of `BACKENDS`, and `reason`, a sentence.
    """
    device = torch.device(device)
    if num_levels == 1:
        return BackendChoice("lifted", "one level is flat attention, PyTorch's own kernel")
    if is_compiling:
        return BackendChoice("lifted", "a recorded graph serves all lengths, and the compiler knows PyTorch's kernel")
    if device.type != "cpu":
        return BackendChoice("lifted", f"no backend was measured against PyTorch's kernels on {device.type!r}")
    if length <= MAX_EAGER_LENGTH:
        if dtype in (torch.float16, torch.bfloat16):
            return BackendChoice("lifted", f"{dtype} scores of a short sequence would be rounded in eager")
        return BackendChoice("eager", f"the score matrix of up to {MAX_EAGER_LENGTH} tokens is small")
    return BackendChoice("polyphase", f"the fastest on a CPU beyond {MAX_EAGER_LENGTH} tokens")


def _choose(queries: Sequence[torch.Tensor]) -> BackendChoice:
    states = queries[0]
    if torch.compiler.is_compiling():
        return choose_backend(0, len(queries), states.device, states.dtype, is_compiling=True)
    device_type = states.device.type
    autocasts = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocasts else states.dtype
    choice = choose_backend(states.shape[-2], len(queries), states.device, dtype)
    _log_choice(choice)
    return choice


@functools.cache
def _log_choice(choice: BackendChoice) -> None:
    logger.info("hierarchical attention uses the backend %r: %s", choice.backend, choice.reason)


def attention_backend(
    implementation: str,
    queries: Sequence[torch.Tensor],
    attention_mask: torch.Tensor | None,
) -> str | None:
    """The backend of [`hierarchical_attention`] that serves a model's call, or `None`: an attention function does.

    Args:
        implementation (`str`): the config's `attn_implementation`: `"auto"`, the name of a backend, or another one.
        queries (sequence of `torch.Tensor`): `L` tensors `(B, H, T_l, p)`.
        attention_mask (`torch.Tensor`, *optional*): as in [`dispatch_attention`]. Backends take what keys are padded,
            `(B, 1, 1, T)` bool; `"auto"` leaves a mask of scores to PyTorch's kernel.
    """
    if implementation in MODEL_BACKENDS:
        return implementation
    if implementation != "auto" or (attention_mask is not None and attention_mask.shape[-2] != 1):
        return None
    backend = _choose(queries).backend
    return None if backend == "lifted" else backend


def dispatch_attention(
    attention_interface: Callable | None,
    module: nn.Module,
    queries: Sequence[torch.Tensor],
    keys: Sequence[torch.Tensor],
    value: torch.Tensor,
    level_weights: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    layout: SequenceLayout | None = None,
    backend: str | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The door from a transformers model: the function that the config's `attn_implementation` names does the work.

    Args:
        attention_interface (`Callable`, *optional*): an attention function of transformers, run on lifted queries and
            keys; `None` means eager, which forms the combined scores and returns the attention weights.
        module (`nn.Module`): the attention module, handed on to `attention_interface`.
        queries, keys, value, level_weights: as in [`hierarchical_attention`].
        attention_mask (`torch.Tensor`, *optional*): as transformers made it for this implementation, broadcastable to
            `(B, H, T, T)`: bool (True = attend) or additive.
        scaling (`float`): factor of the scores.
        dropout (`float`, *optional*, defaults to 0.0): dropout of the attention weights.
        layout (`SequenceLayout`, *optional*): where the sequences lie in rows; then `attention_interface` gets and
            returns rows.
        backend (`str`, *optional*): a backend of [`hierarchical_attention`] instead of `attention_interface`; then
            `attention_mask` says what keys are padded, `(B, 1, 1, T)` bool, and `module.is_causal` the rest.
        kwargs: handed on to `attention_interface`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor | None]`: output `(B, T, H, p)` and, in eager, weights `(B, H, T, T)`.
    """
    if backend is not None:
        key_padding_mask = None if attention_mask is None else attention_mask[:, 0, 0]
        attend = BACKENDS[backend]
        output = attend(queries, keys, value, level_weights, key_padding_mask, module.is_causal, scaling, dropout)
        return output.transpose(1, 2), None
    if attention_interface is None:
        scores = _scores(queries, keys, level_weights, scaling)
        output, weights = _attend(scores, value, attention_mask, dropout)
        return output.transpose(1, 2), weights
    query, key = _lift(queries, keys, level_weights, scaling)
    lifted = [query, key, _widen(value, query.shape[-1])]
    if layout is not None:
        lifted = [layout.to_rows(states.transpose(1, 2)).transpose(1, 2) for states in lifted]
    output, weights = attention_interface(
        module,
        *lifted,
        attention_mask,
        scaling=1.0,
        dropout=dropout,
        **kwargs,
    )
    batch_size, num_heads, length, width = lifted[0].shape
    output = output.reshape(batch_size, length, num_heads, width)  # inference servers return tokens without a batch
    return output[..., : value.shape[-1]], weights


def attend_to_cache(
    queries: Sequence[torch.Tensor],
    keys: Sequence[torch.Tensor],
    value: torch.Tensor,
    level_weights: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    output_weights: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of `n` new tokens over everything that a cache holds, themselves included.

    Few queries take the scores of each level and upsample these; more queries than a lifted key is wide run PyTorch's
    fused attention on lifted keys, which then are smaller than the scores.

    Args:
        queries (sequence of `torch.Tensor`): `L` tensors `(B, H, n, p)`: at each level, for each new token, the query of
            its block.
        keys (sequence of `torch.Tensor`): `L` tensors `(B, H, ceil(S / 2**l), p)`.
        value (`torch.Tensor`): `(B, H, S, p)`.
        level_weights (`torch.Tensor`): `(H, L)`.
        attention_mask (`torch.Tensor`, *optional*): broadcastable to `(B, H, n, S)`, bool (True = attend) or additive.
        scaling (`float`): factor of the scores.
        dropout (`float`, *optional*, defaults to 0.0): dropout of the attention weights.
        output_weights (`bool`, *optional*, defaults to `False`): return the attention weights, which the fused attention
            does not.

    Returns:
        `tuple[torch.Tensor, torch.Tensor | None]`: output `(B, n, H, p)`, and weights `(B, H, n, S)` or `None`.
    """
    length = value.shape[-2]
    weighted = [
        weight * query for weight, query in zip(_factors(queries, level_weights, scaling), queries, strict=True)
    ]
    if output_weights or queries[0].shape[-2] <= len(queries) * queries[0].shape[-1]:
        scores = weighted[0] @ keys[0].transpose(-1, -2)
        for level, (query, key) in enumerate(zip(weighted[1:], keys[1:], strict=True), start=1):
            scores = scores + upsample(query @ key.transpose(-1, -2), level, length, dim=-1)
        output, weights = _attend(scores, value, attention_mask, dropout)
        return output.transpose(1, 2), weights if output_weights else None
    query = torch.cat(weighted, dim=-1)
    key = torch.cat([upsample(blocks, level, length, dim=-2) for level, blocks in enumerate(keys)], dim=-1)
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.to(query.dtype)
    output = F.scaled_dot_product_attention(
        query, key, _widen(value, query.shape[-1]), attn_mask=attention_mask, scale=1.0, dropout_p=dropout
    )
    return output[..., : value.shape[-1]].transpose(1, 2), None


def _attend(
    scores: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, dropout_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax (in float32 or wider) under a bool or an additive mask, dropout, product with the value."""
    dtype = scores.dtype
    scores = scores.to(torch.promote_types(dtype, torch.float32))
    if mask is not None and mask.dtype == torch.bool:
        # The lowest finite number, not minus infinity: a row without any visible key stays finite.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    weights = F.dropout(scores.softmax(dim=-1).to(dtype), p=dropout_p, training=dropout_p > 0.0)
    return weights @ value, weights


def _widen(value: torch.Tensor, width: int) -> torch.Tensor:
    """Zero-pad the value to the width of lifted queries: fused kernels need equal widths."""
    return F.pad(value, (0, width - value.shape[-1]))


def _default_scale(queries: Sequence[torch.Tensor], scale: float | None) -> float:
    return queries[0].shape[-1] ** -0.5 if scale is None else scale


def _factors(queries, level_weights, scale: float) -> tuple[torch.Tensor, ...]:
    """For each level `scale * level_weights[:, l]` as `(H, 1, 1)`: what its queries are multiplied by.

    Queries, not scores: there are fewer of them, and scores in half precision would overflow before they are scaled.
    """
    return (level_weights * scale).to(queries[0].dtype)[:, :, None, None].unbind(dim=1)


def _check_levels(queries, keys, level_weights) -> None:
    num_levels = len(queries)
    if num_levels < 1:
        raise ValueError("`queries` must hold at least one level, got none")
    if len(keys) != num_levels:
        raise ValueError(f"`keys` must hold as many levels as `queries`, got {len(keys)} and {num_levels}")
    if queries[0].dim() != 4:
        raise ValueError(f"`queries[0]` must have shape (batch, heads, length, width), got {tuple(queries[0].shape)}")
    batch_size, num_heads, length, width = queries[0].shape
    for level in range(num_levels):
        blocks = -(-length // 2**level)
        expected = (batch_size, num_heads, blocks, width)
        for name, tensors in (("queries", queries), ("keys", keys)):
            if tuple(tensors[level].shape) != expected:
                raise ValueError(
                    f"`{name}[{level}]` must have shape {expected} (ceil({length} / 2**{level}) = {blocks} blocks), "
                    f"got {tuple(tensors[level].shape)}"
                )
            _check_dtype(f"{name}[{level}]", tensors[level], queries[0].dtype)
    if tuple(level_weights.shape) != (num_heads, num_levels):
        raise ValueError(
            f"`level_weights` must have shape (heads, levels) = {(num_heads, num_levels)}, "
            f"got {tuple(level_weights.shape)}"
        )


def _check_dtype(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise ValueError(f"`{name}` must have the dtype of `queries[0]`, {dtype}, got {tensor.dtype}")


def _check_value_and_mask(queries, value, key_padding_mask) -> None:
    if value.shape != queries[0].shape:
        raise ValueError(f"`value` must have shape {tuple(queries[0].shape)}, got {tuple(value.shape)}")
    _check_dtype("value", value, queries[0].dtype)
    if key_padding_mask is None:
        return
    expected = (value.shape[0], value.shape[2])
    if tuple(key_padding_mask.shape) != expected:
        raise ValueError(
            f"`key_padding_mask` must have shape (batch, length) = {expected}, got {tuple(key_padding_mask.shape)}"
        )
    if key_padding_mask.dtype != torch.bool:
        raise ValueError(f"`key_padding_mask` must be bool (True = real), got {key_padding_mask.dtype}")
