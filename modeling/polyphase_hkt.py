# Copyright 2026 The hkt-hf authors. Licensed under the Apache License, Version 2.0.
"""Exact hierarchical attention in tiles, with PyTorch alone: no score matrix, no upsampling (ours).

Let `R = 2 ** (L - 1)`. Position `i = R * c + r` is stored in phase `r` at index `c`. A block of level `l` is `2 ** l`
neighbouring positions, so a level has `R / 2 ** l` phases over the *same* indices, and for every pair of phases

    S[(r, c), (r', c')] = sum_l < queries[l][r // 2 ** l, c], keys[l][r' // 2 ** l, c'] >

is a plain sum of tiles over the same `(c, c')`. To upsample a tile is to add it once for each pair of phases that it
serves. The softmax does not ask for the order of keys, so only queries, keys, value and output change their order, once.

Score tiles are made, used and dropped; the backward pass makes them again from the saved log-sum-exp: memory is linear
in `T`. Exponentials have base 2, which PyTorch computes faster on a CPU (results/cpu_choices.json); the queries carry the
factor `log2(e)`.
"""

import functools
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from .memory_common import keep_freed_memory


# Rows and columns of a score tile at level 0. Smaller tiles spend their time in calls, larger ones gain nothing: measured
# with two cores, results/cpu_choices.json.
TILE = 1024

# The score of a masked key: no real score comes near, and sums of two stay finite in float32.
MASKED = -1e30


def polyphase_attention(
    queries: Sequence[torch.Tensor],
    keys: Sequence[torch.Tensor],
    value: torch.Tensor,
    key_padding_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Attention with the combined scores of all levels, tile by tile. Any number of levels, any length, any device.

    Opaque to `torch.compile` and `torch.export` (one operator each way). Arithmetic is in float32, in float64 for
    float64. The same seed of PyTorch's default generator drops the same weights.

    Args:
        queries (sequence of `torch.Tensor`): `L` tensors `(B, H, ceil(T / 2**l), p)`, already multiplied by the scale
            and the level weights.
        keys (sequence of `torch.Tensor`): likewise, as they are.
        value (`torch.Tensor`): `(B, H, T, p)`.
        key_padding_mask (`torch.Tensor`, *optional*): `(B, T)` bool, True = real, in any pattern.
        is_causal (`bool`, *optional*, defaults to `False`): a query sees no later key.
        dropout_p (`float`, *optional*, defaults to 0.0): dropout of the attention weights.

    Returns:
        `torch.Tensor`: `(B, H, T, p)`, dtype of `value`; finite but without meaning in rows that see no real key.
    """
    seed = torch.randint(2**62, (1,)) if dropout_p > 0.0 else None
    return _forward(list(queries), list(keys), value, key_padding_mask, is_causal, dropout_p, seed)[0]


def _tile_size(length: int, is_causal: bool) -> int:
    # One or two tiles along a causal sequence would compute much that is masked.
    return TILE // 4 if is_causal and length < 2 * TILE else TILE


class _Layout:
    """Where the positions of a call lie: phases, indices, spans of indices, groups of heads, and what is masked."""

    def __init__(self, num_levels: int, value: torch.Tensor, key_padding_mask: torch.Tensor | None, is_causal: bool):
        batch_size, self.num_heads, self.length, _ = value.shape
        self.phases = 2 ** (num_levels - 1)
        self.indices = -(-self.length // self.phases)
        self.is_causal = is_causal
        self.dtype = torch.promote_types(value.dtype, torch.float32)
        tile = _tile_size(self.length, is_causal)
        step = max(1, tile // self.phases)
        self.spans = [(start, min(start + step, self.indices)) for start in range(0, self.indices, step)]
        # Short sequences: the tiles of several heads are one batch.
        size = max(1, (TILE // max(1, min(tile, self.indices * self.phases))) ** 2)
        heads = batch_size * self.num_heads
        self.groups = [slice(start, min(start + size, heads)) for start in range(0, heads, size)]
        self._later_tiles: dict[int, torch.Tensor] = {}
        self.mask = self._padding(key_padding_mask, value)
        if self.mask is not None:
            tiles = [self.mask[:, :, start:stop] for start, stop in self.spans]
            self.is_full = torch.stack([tile.all(dim=(1, 2)) for tile in tiles], dim=1).cpu()
            self.is_empty = torch.stack([~tile.any(dim=2).any(dim=1) for tile in tiles], dim=1).cpu()

    def _padding(self, mask: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor | None:
        """`(B, R, n)` bool, True = real, or `None` if all are."""
        missing = self.indices * self.phases - self.length
        if mask is None and missing == 0:
            return None
        if mask is None:
            mask = torch.ones(value.shape[0], self.length, dtype=torch.bool, device=value.device)
        return self._split(F.pad(mask, (0, missing))[..., None], self.phases)[..., 0]

    def _split(self, states: torch.Tensor, phases: int) -> torch.Tensor:
        """`(..., n * phases, p)` to `(..., phases, n, p)`, a view."""
        return states.unflatten(-2, (self.indices, phases)).transpose(-2, -3)

    def to_phases(self, states: torch.Tensor, level: int = 0, factor: float = 1.0) -> torch.Tensor:
        """`(B, H, T_l, p)` to contiguous `(B * H, R / 2**l, n, p)`, zeros after the end, times `factor`."""
        phases = self.phases >> level
        missing = self.indices * phases - states.shape[-2]
        if missing:
            states = F.pad(states, (0, 0, 0, missing))
        states = self._split(states.flatten(0, 1), phases)
        result = torch.empty(states.shape, dtype=self.dtype, device=states.device)
        return result.copy_(states) if factor == 1.0 else torch.mul(states.to(self.dtype), factor, out=result)

    def inputs(self, queries: Sequence[torch.Tensor], keys: Sequence[torch.Tensor], value: torch.Tensor):
        """Queries (times `log2(e)`), keys and value in phases."""
        return (
            [self.to_phases(query, level, math.log2(math.e)) for level, query in enumerate(queries)],
            [self.to_phases(key, level) for level, key in enumerate(keys)],
            self.to_phases(value),
        )

    def from_phases(self, states: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The inverse of `to_phases`, in shape and dtype of `like`."""
        states = states.transpose(1, 2).flatten(1, 2)[:, : like.shape[-2]]
        result = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        return result.copy_(states.unflatten(0, like.shape[:2]))

    def visible(self, group: slice, rows: tuple[int, int]) -> Iterator[int]:
        """The numbers of the spans of keys that some query of the span `rows` may see."""
        for number, (start, _) in enumerate(self.spans):
            if self.is_causal and start >= rows[1]:
                return
            if self.mask is None or not bool(self.is_empty[self._batch_rows(group), number].all()):
                yield number

    def mask_(self, scores: torch.Tensor, group: slice, rows: tuple[int, int], number: int) -> None:
        """Mask combined tiles `(G, R * rows, R * columns)` in place: padded keys, and later keys if causal."""
        columns = self.spans[number]
        batch_rows = self._batch_rows(group)
        if self.mask is not None and not bool(self.is_full[batch_rows, number].all()):
            real = self.mask[batch_rows, :, columns[0] : columns[1]].flatten(1)[:, None, :]
            scores.masked_fill_(~real, MASKED)
        if self.is_causal and columns == rows:
            scores.masked_fill_(self._later(rows[1] - rows[0], scores.device), MASKED)

    def _batch_rows(self, group: slice) -> torch.Tensor:
        return torch.arange(group.start, group.stop) // self.num_heads

    def _later(self, indices: int, device: torch.device) -> torch.Tensor:
        """`(R * indices, R * indices)` bool: the key comes after the query. Only tiles on the diagonal have any."""
        if indices not in self._later_tiles:
            position = torch.arange(self.phases, device=device)[:, None] + self.phases * torch.arange(
                indices, device=device
            )
            position = position.flatten()
            self._later_tiles[indices] = position > position[:, None]
        return self._later_tiles[indices]


def _tile(states: torch.Tensor, span: tuple[int, int]) -> torch.Tensor:
    """The positions of a span, `(G, phases, n, p)` to `(G, phases * indices of the span, p)`, phase by phase."""
    return states[:, :, span[0] : span[1]].flatten(1, 2)


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`left @ right.mT` of batches of matrices, by the faster library.

    In float32 that is oneDNN: PyTorch's own choice, MKL, does not use the AVX-512 of every maker's CPUs
    (results/cpu_choices.json).
    """
    if len(left) == 1 and left.dtype == torch.float32 and left.device.type == "cpu" and _has_onednn():
        return torch.ops.mkldnn._linear_pointwise(left[0], right[0], None, "none", [], "")[None]
    return torch.bmm(left, right.mT)


@functools.cache
def _has_onednn() -> bool:
    """Whether this PyTorch has oneDNN's product as an operator, which `torch.compile` uses too, and it works."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        result = torch.ops.mkldnn._linear_pointwise(torch.ones(2, 3), torch.ones(2, 3), None, "none", [], "")
    except (RuntimeError, TypeError):
        return False
    return bool((result == 3.0).all())


def _scores(queries, keys, phases: int) -> torch.Tensor:
    """Combined scores of one tile: level tiles from coarse to fine, each added to those that it serves."""
    combined = None
    for level in reversed(range(len(queries))):
        scores = _product(queries[level], keys[level])
        if combined is not None:
            count = phases >> (level + 1)
            group, rows, columns = combined.shape
            rows, columns = rows // count, columns // count
            scores.view(group, count, 2, rows, count, 2, columns).add_(
                combined.view(group, count, 1, rows, count, 1, columns)
            )
        combined = scores
    return combined


def _pool(tile: torch.Tensor, phases: int) -> torch.Tensor:
    """Sum a tile of `phases` by `phases` over neighbouring phases: the transpose of upsampling.

    Contiguous slices are added; one sum over both strided dimensions is several times slower.
    """
    count = phases // 2
    group, rows, columns = tile.shape
    tile = tile.view(group, count, 2, rows // phases, count, 2, columns // phases)
    tile = tile[:, :, 0] + tile[:, :, 1]
    return (tile[:, :, :, :, 0] + tile[:, :, :, :, 1]).view(group, rows // 2, columns // 2)


def _keep(like: torch.Tensor, dropout_p: float, *seed: int) -> torch.Tensor:
    """Zeros and ones of a tile, the same in both passes."""
    generator = torch.Generator(device=like.device).manual_seed(hash(seed) & (2**63 - 1))
    return torch.empty_like(like).bernoulli_(1.0 - dropout_p, generator=generator)


@torch.library.custom_op(f"{__name__.replace('.', '_')}::forward", mutates_args=())
def _forward(
    queries: list[torch.Tensor],
    keys: list[torch.Tensor],
    value: torch.Tensor,
    key_padding_mask: torch.Tensor | None,
    is_causal: bool,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `(B, H, T, p)`, and the log-sum-exp to the base 2 of the scores, `(B * H, R, n)`."""
    keep_freed_memory()
    with torch.autocast(value.device.type, enabled=False):
        layout = _Layout(len(queries), value, key_padding_mask, is_causal)
        query_phases, key_phases, value_phases = layout.inputs(queries, keys, value)
        output = torch.empty_like(value_phases)
        log_sums = value_phases.new_empty(value_phases.shape[:-1])
        for group in layout.groups:
            _forward_group(
                layout,
                group,
                [query[group] for query in query_phases],
                [key[group] for key in key_phases],
                value_phases[group],
                output[group],
                log_sums[group],
                dropout_p,
                seed,
            )
        return layout.from_phases(output, value), log_sums


def _forward_group(layout, group, queries, keys, value, output, log_sums, dropout_p, seed) -> None:
    """Fills `output` and `log_sums` of a group of heads."""
    key_tiles = [[_tile(key, span) for key in keys] for span in layout.spans]
    value_tiles = [_tile(value, span).mT for span in layout.spans]
    for row, rows in enumerate(layout.spans):
        query_tiles = [_tile(query, rows) for query in queries]
        top = total = attended = None
        for column in layout.visible(group, rows):
            scores = _scores(query_tiles, key_tiles[column], layout.phases)
            layout.mask_(scores, group, rows, column)
            tile_top = scores.amax(dim=-1, keepdim=True)
            new_top = tile_top if top is None else torch.maximum(top, tile_top)
            weights = scores.sub_(new_top).exp2_()
            tile_total = weights.sum(dim=-1, keepdim=True)
            if seed is not None:
                weights.mul_(_keep(weights, dropout_p, int(seed), group.start, row, column))
            tile_attended = _product(weights, value_tiles[column])
            if top is None:
                total, attended = tile_total, tile_attended
            else:
                decay = top.sub_(new_top).exp2_()
                total = total.mul_(decay).add_(tile_total)
                attended = attended.mul_(decay).add_(tile_attended)
            top = new_top
        if top is None:  # no real key at all
            output[:, :, rows[0] : rows[1]] = 0.0
            log_sums[:, :, rows[0] : rows[1]] = 0.0
            continue
        attended.div_(total * (1.0 - dropout_p))
        output[:, :, rows[0] : rows[1]] = attended.unflatten(1, (layout.phases, -1))
        log_sums[:, :, rows[0] : rows[1]] = total.log2_().add_(top)[..., 0].unflatten(1, (layout.phases, -1))


@_forward.register_fake
def _(queries, keys, value, key_padding_mask, is_causal, dropout_p, seed):
    batch_size, num_heads, length, _ = value.shape
    phases = 2 ** (len(queries) - 1)
    shape = (batch_size * num_heads, phases, (length + phases - 1) // phases)
    return torch.empty_like(value, memory_format=torch.contiguous_format), value.new_empty(
        shape, dtype=torch.promote_types(value.dtype, torch.float32)
    )


@torch.library.custom_op(f"{__name__.replace('.', '_')}::backward", mutates_args=())
def _backward(
    gradient: torch.Tensor,
    output: torch.Tensor,
    log_sums: torch.Tensor,
    queries: list[torch.Tensor],
    keys: list[torch.Tensor],
    value: torch.Tensor,
    key_padding_mask: torch.Tensor | None,
    is_causal: bool,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Gradients of the queries, the keys and the value, in this order."""
    with torch.autocast(value.device.type, enabled=False):
        layout = _Layout(len(queries), value, key_padding_mask, is_causal)
        query_phases, key_phases, value_phases = layout.inputs(queries, keys, value)
        gradient_phases = layout.to_phases(gradient)
        # The softmax's own term: sum_j P_ij dP_ij is the product of the output with its gradient.
        means = (layout.to_phases(output) * gradient_phases).sum(dim=-1)
        if seed is not None:
            gradient_phases /= 1.0 - dropout_p
        for group in layout.groups:
            _backward_group(
                layout,
                group,
                [query[group] for query in query_phases],
                [key[group] for key in key_phases],
                value_phases[group],
                gradient_phases[group],
                log_sums[group],
                means[group],
                dropout_p,
                seed,
            )
        return [
            *(layout.from_phases(phases, query) for phases, query in zip(query_phases, queries, strict=True)),
            *(layout.from_phases(phases, key) for phases, key in zip(key_phases, keys, strict=True)),
            layout.from_phases(value_phases, value),
        ]


def _backward_group(layout, group, queries, keys, value, gradient, log_sums, means, dropout_p, seed) -> None:
    """Replaces `queries`, `keys` and `value` of a group of heads by their gradients, in place."""
    key_tiles = [[_tile(key, span) for key in keys] for span in layout.spans]
    value_tiles = [_tile(value, span) for span in layout.spans]
    # Transposed: `weights.mT` as the right factor of a product needs no copy.
    key_gradients: list[list[torch.Tensor | None]] = [[None] * len(keys) for _ in layout.spans]
    value_gradients: list[torch.Tensor | None] = [None] * len(layout.spans)
    for row, rows in enumerate(layout.spans):
        query_tiles = [_tile(query, rows) for query in queries]
        transposed_queries = [tile.mT.contiguous() for tile in query_tiles]
        query_gradients: list[torch.Tensor | None] = [None] * len(queries)
        gradients = _tile(gradient, rows)
        transposed_gradients = gradients.mT.contiguous()
        row_log_sums, row_means = (
            states[:, :, rows[0] : rows[1]].flatten(1)[..., None] for states in (log_sums, means)
        )
        for column in layout.visible(group, rows):
            weights = _scores(query_tiles, key_tiles[column], layout.phases)
            layout.mask_(weights, group, rows, column)
            weights.sub_(row_log_sums).exp2_()
            weight_gradients = _product(gradients, value_tiles[column])
            dropped = weights
            if seed is not None:
                dropped = _keep(weights, dropout_p, int(seed), group.start, row, column)
                weight_gradients.mul_(dropped)
                dropped.mul_(weights)
            _accumulate(value_gradients, column, _product(transposed_gradients, dropped.mT))
            score_gradients = weight_gradients.sub_(row_means).mul_(weights)
            for level in range(len(queries)):
                if level > 0:
                    score_gradients = _pool(score_gradients, layout.phases >> (level - 1))
                _accumulate(query_gradients, level, _product(score_gradients, key_tiles[column][level].mT))
                _accumulate(key_gradients[column], level, _product(transposed_queries[level], score_gradients.mT))
        for query, tile in zip(queries, query_gradients, strict=True):
            query[:, :, rows[0] : rows[1]] = 0.0 if tile is None else tile.unflatten(1, (query.shape[1], -1))
    for (start, stop), tiles, value_tile in zip(layout.spans, key_gradients, value_gradients, strict=True):
        for key, tile in zip(keys, tiles, strict=True):
            # The queries carry log2(e), which the gradient of the keys must not.
            key[:, :, start:stop] = (
                0.0 if tile is None else tile.mul_(math.log(2.0)).mT.unflatten(1, (key.shape[1], -1))
            )
        value[:, :, start:stop] = 0.0 if value_tile is None else value_tile.mT.unflatten(1, (value.shape[1], -1))


def _accumulate(sums: list[torch.Tensor | None], number: int, term: torch.Tensor) -> None:
    sums[number] = term if sums[number] is None else sums[number].add_(term)


@_backward.register_fake
def _(gradient, output, log_sums, queries, keys, value, key_padding_mask, is_causal, dropout_p, seed):
    return [torch.empty_like(states, memory_format=torch.contiguous_format) for states in (*queries, *keys, value)]


def _save_for_backward(ctx, inputs, output):
    queries, keys, value, key_padding_mask, is_causal, dropout_p, seed = inputs
    ctx.num_levels, ctx.is_causal, ctx.dropout_p = len(queries), is_causal, dropout_p
    ctx.save_for_backward(*output, key_padding_mask, seed, value, *queries, *keys)


def _run_backward(ctx, gradient, _):
    output, log_sums, key_padding_mask, seed, value, *levels = ctx.saved_tensors
    queries, keys = levels[: ctx.num_levels], levels[ctx.num_levels :]
    gradients = _backward(
        gradient, output, log_sums, queries, keys, value, key_padding_mask, ctx.is_causal, ctx.dropout_p, seed
    )
    return gradients[: ctx.num_levels], gradients[ctx.num_levels : -1], gradients[-1], None, None, None, None


_forward.register_autograd(_run_backward, setup_context=_save_for_backward)
