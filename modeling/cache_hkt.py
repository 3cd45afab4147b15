# Copyright 2026 The hkt-hf authors. Licensed under the Apache License, Version 2.0.
"""What a causal HKT decoder keeps between two calls (ours; no paper has it).

The levels are causal, so a block's feature is final from the moment the block has *started*: it reads nothing after its
first token. A layer keeps

- the values and, for each level, one key for each started block. Keys are not lifted: at `L = 3` this is 1.375 times a
  flat cache of the same width, and lifted keys would be 2 times;
- for each level the features of its last started blocks. They give the convolutions their inputs, the query of the block
  that is going on, and, further back, the state before a `crop`.

Everything is indexed by position in the sequence, not by column of the batch: a left-padded row lies in the cache as it
would lie there alone.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from .configuration_hkt import HKTConfig
from .layout_hkt import SequenceLayout, check_contiguous, rolled_layout


ROLLBACK_WINDOW = 64
"""Columns that `crop` can always remove again; more of them after `activate_past_recording`."""


class LevelStep(NamedTuple):
    """Where the blocks that start in a step go, at one level.

    Args:
        starts (`int` or `torch.Tensor` of shape `(B,)`): blocks started before the step.
        counts (`int` or `torch.Tensor` of shape `(B,)`): blocks that start in the step.
        size (`int`): blocks that are computed, `max(counts)` or a little more.
        capacity (`int`): blocks that the cache holds after the step, `max(starts + counts)` and at least 1.
        offset (`int` or `torch.Tensor` of shape `(B,)`): 0 or 1, where among the new blocks of the finer level the first
            new block of this level reads its first tap.
        query_index (`torch.Tensor` of shape `(1 or B, n)`): which of `size + 1` blocks, the last old one and the new
            ones, each new token belongs to.
    """

    starts: int | torch.Tensor
    counts: int | torch.Tensor
    size: int
    capacity: int
    offset: int | torch.Tensor
    query_index: torch.Tensor


class CacheStep(NamedTuple):
    """Where `n` new columns go in the cache; the same for every layer, so it is worked out once a call.

    Args:
        continues (`bool`): whether the cache held columns before.
        positions (`torch.Tensor` of shape `(1 or B, n)`): positions of the new tokens in their sequences. Real tokens
            come first; what follows them belongs to padded columns.
        mask (`torch.Tensor` of shape `(B, n)`, *optional*): real columns, in the order of the batch; `None` = all.
        levels (`tuple` of [`LevelStep`]): the levels, fine to coarse; level 0 has the tokens as its blocks.
    """

    continues: bool
    positions: torch.Tensor
    mask: torch.Tensor | None
    levels: tuple[LevelStep, ...]

    def pick(self, queries: torch.Tensor, level: int) -> torch.Tensor:
        """The query of each new token's block, `(B, H, n, p)`, from `queries (B, H, size + 1, p)` of `level`."""
        index = self.levels[level].query_index[:, None, :, None]
        return queries.gather(2, index.expand(queries.shape[0], queries.shape[1], -1, queries.shape[3]))

    def causal_mask(self) -> torch.Tensor | None:
        """Which cached positions the new tokens see, bool `(1 or B, 1, n, S)`; `None` = every one."""
        if self.positions.numel() == 1:
            return None
        keys = torch.arange(self.levels[0].capacity, device=self.positions.device)
        return (keys <= self.positions[..., None])[:, None]

    def block_positions(self) -> list[torch.Tensor]:
        """Positions, at each level, of the blocks that get a query: `(1 or B, n)`, then `(1 or B, size + 1)`."""
        positions = [self.positions]
        for level, step in enumerate(self.levels[1:], start=1):
            blocks = torch.arange(-1, step.size, device=self.positions.device)
            positions.append((_column(step.starts) + blocks).clamp(min=0).expand(len(self.positions), -1) * 2**level)
        return positions


def plan_step(
    starts: int | torch.Tensor,
    counts: int | torch.Tensor,
    mask: torch.Tensor | None,
    num_columns: int,
    *,
    continues: bool,
    num_levels: int,
    device: torch.device,
) -> CacheStep:
    """Plan a step of `num_columns` columns.

    Args:
        starts (`int` or `torch.Tensor` of shape `(B,)`): tokens cached before.
        counts (`int` or `torch.Tensor` of shape `(B,)`): real tokens among the new columns.
        mask (`torch.Tensor` of shape `(B, n)`, *optional*): real columns among the new ones.
        num_columns (`int`): `n`.
        continues (`bool`): whether the cache held columns before.
        num_levels (`int`): levels `L`.
        device (`torch.device`): where the new tokens are.
    """
    columns = torch.arange(num_columns, device=device)
    positions = (_column(starts) + columns).view(-1, num_columns)
    levels = []
    for level in range(num_levels):
        first = _ceil_divide(starts, 2**level)
        ends = _ceil_divide(starts + counts, 2**level)
        offset = 0 if level == 0 else 2 * first - levels[-1].starts
        if isinstance(ends, int):
            size, capacity = ends - first, ends
        else:
            # A bound instead of the largest count: a count would have to be read from the device for each level.
            smallest_offset = offset if isinstance(offset, int) else 0
            size = num_columns if level == 0 else (levels[-1].size + 1 - smallest_offset) // 2
            # At least one, so that a batch of padding alone has something to attend to.
            capacity = max(int(ends.max()), 1) if level == 0 else (levels[-1].capacity + 1) // 2
        query_index = positions // 2**level - (_column(first) - 1)
        levels.append(LevelStep(first, ends - first, size, capacity, offset, query_index))
    return CacheStep(continues, positions, mask, tuple(levels))


def plan_next_step(
    layer: "HKTCacheLayer",
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    num_columns: int,
    device,
) -> tuple[SequenceLayout | None, CacheStep]:
    """Where the new columns of a batch go that continues what a cache holds.

    Args:
        layer (`HKTCacheLayer`): the first layer's cache, not empty.
        attention_mask (`torch.Tensor`, *optional*): `(B, cached + new)`, nonzero = real.
        position_ids (`torch.Tensor`, *optional*): `(B, n)` or `(1, n)`.
        num_columns (`int`): `n`.
        device (`torch.device`): where the new tokens are.

    Returns:
        `tuple[SequenceLayout | None, CacheStep]`: the layout that brings the real ones of the new columns to the left
        (`None` where nothing moves), and the step.

    Raises:
        ValueError: a mask that differs from the one the cached tokens were fed with, gaps between the new tokens, or
            positions that do not go on from the cached ones.
    """
    layout, counts, mask = None, num_columns, None
    if attention_mask is not None:
        real = attention_mask.to(device) != 0
        past, new = real[:, : layer.num_columns], real[:, layer.num_columns :]
        same = past.all() if layer.mask is None else torch.equal(past, layer.mask)
        if not new.all():
            check_contiguous(new)
            layout, counts, mask = rolled_layout(new), new.sum(1), new
    else:
        same = layer.mask is None or layer.mask.all()
    if not same:
        raise ValueError(
            "`attention_mask` must have, for the cached tokens, the values they were fed with: shape (batch, cached + "
            "new), zeros where they were padded"
        )
    step = plan_step(
        layer.lengths, counts, mask, num_columns, continues=True, num_levels=layer.num_levels, device=device
    )
    if position_ids is not None:
        expected = _column(layer.lengths) + (
            torch.arange(num_columns, device=device)[None] if layout is None else layout.positions()
        )
        wrong = position_ids.to(device) != expected
        if (wrong if mask is None else wrong & mask).any():
            raise ValueError(
                "`position_ids` must go on from the cached tokens: blocks of the coarser levels are counted from the "
                "first token of a sequence"
            )
    return layout, step


class HKTCacheLayer(CacheLayerMixin):
    """Cache of one attention layer; a layer of transformers' `DynamicCache`.

    Args:
        num_levels (`int`): levels `L`.
        kernel_size (`int`): taps `K` of the convolution between two levels.
        rollback_window (`int`, *optional*, defaults to 64): columns that `crop` can always remove.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, num_levels: int, kernel_size: int, rollback_window: int = ROLLBACK_WINDOW):
        super().__init__()
        self.num_levels = num_levels
        self.kernel_size = kernel_size
        self.rollback_window = rollback_window
        # Features that are kept, a level: those that the next step reads, and those that a `crop` brings back.
        self.tail_lengths = [
            max(kernel_size - 1, 1) + -(-rollback_window // 2**level) if num_levels > 1 else 0
            for level in range(num_levels)
        ]
        self.record_past = False
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.keys: torch.Tensor | None = None  # (B, H, S, p), level 0
        self.coarse_keys: list[torch.Tensor] = []  # (B, H, ceil(S / 2**l), p), levels 1 .. L - 1
        self.values: torch.Tensor | None = None  # (B, H, S, p)
        self.tails: list[torch.Tensor] = []  # (B, tail length, d), levels 0 .. L - 1; ends with the last started block
        self.lengths: int | torch.Tensor = 0  # real tokens, of all rows or of each row (B,)
        self.mask: torch.Tensor | None = None  # (B, columns) bool, real columns; None = all
        self.num_columns = 0
        self.can_remove = self.rollback_window
        self.is_initialized = False

    def lazy_initialization(self, key_states, value_states) -> None:
        """Nothing to prepare: the first `update` brings every shape."""

    @property
    def level_keys(self) -> list[torch.Tensor]:
        """Keys of all levels, fine to coarse."""
        return [self.keys, *self.coarse_keys]

    def level_inputs(self, level: int, finer_features: torch.Tensor, step: CacheStep) -> torch.Tensor:
        """What the convolution to `level` reads in a step.

        Args:
            level (`int`): at least 1.
            finer_features (`torch.Tensor`): `(B, N, d)`, the new blocks' features of `level - 1`.
            step (`CacheStep`): the step.

        Returns:
            `torch.Tensor`: `(B, K - 1 + max(2 * size - 1, 0), d)`; the first `K - 1` lie before the first new block.
        """
        tail, size = self.tails[level - 1], step.levels[level].size
        if size == 0:
            return tail[:, : self.kernel_size - 1]
        features = torch.cat([tail.to(finer_features.dtype), finer_features], dim=1)
        history = self.kernel_size - 1
        start = tail.shape[1] - history + step.levels[level].offset
        return _window(features, start, history + max(2 * size - 1, 0))

    def current_block(self, level: int) -> torch.Tensor:
        """Feature of the last started block of `level`, `(B, 1, d)`."""
        return self.tails[level][:, -1:]

    def update(
        self,
        key_states: list[torch.Tensor],
        value_states: torch.Tensor,
        features: list[torch.Tensor],
        step: CacheStep,
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Store what a step computed.

        Args:
            key_states (list of `torch.Tensor`): `L` tensors `(B, H, size, p)`, fine to coarse.
            value_states (`torch.Tensor`): `(B, H, n, p)`.
            features (list of `torch.Tensor`): `L` tensors `(B, size, d)`.
            step (`CacheStep`): where they go.

        Returns:
            `tuple[list[torch.Tensor], torch.Tensor]`: all keys of each level, and all values.
        """
        batch_size = value_states.shape[0]
        old_keys, old_values = self.level_keys, self.values
        if not self.is_initialized:
            old_keys = [key[:, :, :0] for key in key_states]
            old_values = value_states[:, :, :0]
            self.tails = [
                feature.new_zeros(batch_size, length, feature.shape[-1])
                for feature, length in zip(features, self.tail_lengths, strict=True)
            ]
            self.is_initialized = True
        keys = [_append(*pair, level) for *pair, level in zip(old_keys, key_states, step.levels, strict=True)]
        self.keys, self.coarse_keys = keys[0], keys[1:]
        self.values = _append(old_values, value_states, step.levels[0])
        if self.num_levels > 1:
            self.tails = [
                self._shift(tail, feature, level.counts)
                for tail, feature, level in zip(self.tails, features, step.levels, strict=True)
            ]
        num_new = step.positions.shape[1]
        self.lengths = step.levels[0].starts + step.levels[0].counts
        if self.mask is not None or step.mask is not None:
            past, new = self.mask, step.mask
            past = past if past is not None else value_states.new_ones(batch_size, self.num_columns, dtype=torch.bool)
            new = new if new is not None else value_states.new_ones(batch_size, num_new, dtype=torch.bool)
            self.mask = torch.cat([past, new], dim=1)
        self.num_columns += num_new
        self.can_remove += num_new
        if not self.record_past:
            self.can_remove = min(self.can_remove, self.rollback_window)
        return self.level_keys, self.values

    def _shift(self, tail: torch.Tensor, features: torch.Tensor, counts: int | torch.Tensor) -> torch.Tensor:
        """The tail after `counts` of the new `features`; while the past is recorded nothing of it is dropped."""
        if features.shape[1] == 0:
            return tail
        grown = features.shape[1] if self.record_past else 0
        joined = F.pad(torch.cat([tail, features.to(tail.dtype)], dim=1), (0, 0, grown, 0))
        return _window(joined, counts, tail.shape[1] + grown).clone()

    def weights_to_rows(self, weights: torch.Tensor, layout: SequenceLayout | None) -> torch.Tensor:
        """Attention weights of a step, from positions to columns of the batch.

        Args:
            weights (`torch.Tensor`): `(B, H, n, S)`, after `update`.
            layout (`SequenceLayout`, *optional*): how the new columns were brought to the left.

        Returns:
            `torch.Tensor`: `(B, H, n, columns)`, zero at padded columns.
        """
        if layout is not None:
            rows = torch.arange(len(weights), device=weights.device)[:, None]
            weights = weights.transpose(1, 2)[rows, layout.positions()].transpose(1, 2)
        if self.mask is None:
            return weights
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, None, None].expand(*weights.shape[:3], -1)
        return weights.gather(3, positions).masked_fill(~self.mask[:, None, None], 0.0)

    def activate_past_recording(self) -> None:
        """From now on keep what a `crop` of everything fed since needs; the next `crop` lets go of it again."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last columns, exactly.

        Args:
            tokens_to_remove (`int`): minus the number of columns, as everywhere in transformers.

        Raises:
            ValueError: a positive number, more columns than the cache holds, or more than it can restore.
        """
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 counts in a tensor
        if tokens_to_remove > 0:
            raise ValueError(
                f"`tokens_to_remove` must be minus the number of tokens to remove, got {tokens_to_remove}"
            )
        removed = -tokens_to_remove
        if removed > self.num_columns:
            raise ValueError(f"`tokens_to_remove` ({tokens_to_remove}): the cache holds {self.num_columns} tokens")
        if removed > self.can_remove:
            raise ValueError(
                f"`tokens_to_remove` ({tokens_to_remove}): the cache can only go back by {self.can_remove} tokens now; "
                "call `activate_past_recording()` before the tokens are fed"
            )
        if not self.is_initialized:
            return
        lengths = self.lengths - (removed if self.mask is None else self.mask[:, self.num_columns - removed :].sum(1))
        capacity = lengths if isinstance(lengths, int) else int(lengths.max())
        self.keys, self.values = self.keys[:, :, :capacity], self.values[:, :, :capacity]
        self.coarse_keys = [
            keys[:, :, : _ceil_divide(capacity, 2**level)] for level, keys in enumerate(self.coarse_keys, start=1)
        ]
        for level, length in enumerate(self.tail_lengths if self.num_levels > 1 else ()):
            tail = F.pad(self.tails[level], (0, 0, length, 0))
            blocks = _ceil_divide(self.lengths, 2**level) - _ceil_divide(lengths, 2**level)
            self.tails[level] = _window(tail, tail.shape[1] - length - blocks, length).clone()
        self.lengths = lengths
        self.mask = None if self.mask is None else self.mask[:, : self.num_columns - removed]
        self.num_columns -= removed
        self.can_remove = min(self.can_remove - removed, self.rollback_window)

    def get_seq_length(self) -> int:
        """Columns fed so far, padding included."""
        return self.num_columns

    def get_max_length(self) -> int:
        """Minus one: there is no limit."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that `query_length` new columns see."""
        return self.num_columns + query_length, 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Replace row `i` by row `beam_idx[i]`."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, in that order."""
        self._map_rows(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        self._map_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def _map_rows(self, function) -> None:
        if not self.is_initialized:
            return
        self.keys, self.values = function(self.keys), function(self.values)
        self.coarse_keys = [function(keys) for keys in self.coarse_keys]
        self.tails = [function(tail) for tail in self.tails]
        self.mask = None if self.mask is None else function(self.mask)
        self.lengths = self.lengths if isinstance(self.lengths, int) else function(self.lengths)

    def offload(self) -> None:
        """Not supported."""
        raise ValueError("HKT has no offloaded cache: leave `cache_implementation` and `offloading` unset")


def new_layers(config: HKTConfig) -> list[HKTCacheLayer]:
    """One empty layer for each layer of the model."""
    return [HKTCacheLayer(config.num_levels, config.downsample_kernel_size) for _ in range(config.num_hidden_layers)]


def prepare_cache(cache: Cache | None, config: HKTConfig) -> Cache:
    """The cache that a decoder works with: a `DynamicCache` whose layers are [`HKTCacheLayer`].

    Args:
        cache (`Cache`, *optional*): a cache made by this function, or an empty `DynamicCache`, which gets HKT's layers.
        config (`HKTConfig`): the configuration.

    Raises:
        ValueError: a cache of another kind (static, quantized, offloaded), or one that another model has filled.
    """
    if cache is None:
        cache = DynamicCache(config=config)
    layers = getattr(cache, "layers", None)
    if layers and all(isinstance(layer, HKTCacheLayer) for layer in layers):
        if len(layers) != config.num_hidden_layers or layers[0].num_levels != config.num_levels:
            raise ValueError(
                f"`past_key_values` has {len(layers)} layers of {layers[0].num_levels} levels, the model "
                f"{config.num_hidden_layers} of {config.num_levels}"
            )
        return cache
    if type(cache) is not DynamicCache or cache.offloading or cache.get_seq_length() > 0:
        kind = type(cache).__name__
        if isinstance(cache, DynamicCache):
            kind = "offloaded " + kind if cache.offloading else kind + " filled by another model"
        raise ValueError(
            f"`past_key_values` must be an empty `DynamicCache()` or a cache that HKT returned, got {kind}: static, "
            "quantized and offloaded caches can't hold keys of several levels"
        )
    cache.layers[:] = new_layers(config)
    return cache


def _ceil_divide(number: int | torch.Tensor, divisor: int) -> int | torch.Tensor:
    return (number + divisor - 1) // divisor


def _column(number: int | torch.Tensor) -> int | torch.Tensor:
    return number if isinstance(number, int) else number[:, None]


def _window(states: torch.Tensor, start: int | torch.Tensor, length: int) -> torch.Tensor:
    """`length` entries of `states (B, N, d)` from `start` on, which may differ between the rows."""
    if isinstance(start, int):
        return states[:, start : start + length]
    index = start[:, None] + torch.arange(length, device=states.device)
    # A row may begin one block later than another and not need the last entry of its window.
    index = index.clamp(max=states.shape[1] - 1)
    return states[torch.arange(len(states), device=states.device)[:, None], index]


def _append(old: torch.Tensor, new: torch.Tensor, step: LevelStep) -> torch.Tensor:
    """`old (B, H, S, p)` with `new (B, H, size, p)` from `step.starts` on, cut to `step.capacity`."""
    if new.shape[2] == 0:
        return old
    if isinstance(step.starts, int) and isinstance(step.counts, int):
        return torch.cat([old, new[:, :, : step.counts]], dim=2)
    joined = torch.cat([old, torch.zeros_like(new)], dim=2)
    # What lands behind the last token of a row is not visible to any query, and is written over by the next step.
    index = torch.as_tensor(step.starts, device=new.device).view(-1, 1) + torch.arange(new.shape[2], device=new.device)
    index = index.expand(len(new), -1)[:, None, :, None].expand_as(new)
    return joined.scatter(2, index, new)[:, :, : step.capacity]
