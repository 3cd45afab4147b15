# Copyright 2026 The hkt-hf authors. Licensed under the Apache License, Version 2.0.
"""Where the sequences of a batch lie: left padding and packing (ours).

Blocks of the coarser levels are counted from the first token of a sequence, not from the first column of a row. So the
attention works on *sequences*, `(S, M)`, each beginning at column 0 and padded on the right; everything else works on
the *rows* of the batch, `(B, T)`. A left-padded row is one sequence, rolled to the left; a packed row holds several.
"""

from typing import NamedTuple

import torch

from .checks_common import values_can_be_read


class SequenceLayout(NamedTuple):
    """How `B` rows of `T` columns hold `S` sequences of at most `M` tokens.

    Args:
        gather_index (`torch.Tensor`): int64 `(S, M)`, the entry of the flattened rows that each token comes from.
        scatter_index (`torch.Tensor`): int64 `(B, T)`, the entry of the flattened sequences that each column takes.
        mask (`torch.Tensor`): bool `(S, M)`, True = real.
    """

    gather_index: torch.Tensor
    scatter_index: torch.Tensor
    mask: torch.Tensor

    def to_sequences(self, rows: torch.Tensor) -> torch.Tensor:
        """`(B, T, ...)` to `(S, M, ...)`."""
        return rows.flatten(0, 1)[self.gather_index]

    def to_rows(self, sequences: torch.Tensor) -> torch.Tensor:
        """`(S, M, ...)` to `(B, T, ...)`; what padded columns hold is finite and means nothing."""
        return sequences.flatten(0, 1)[self.scatter_index]

    def positions(self) -> torch.Tensor:
        """Position of each column in its sequence, int64 `(B, T)`."""
        return self.scatter_index % self.mask.shape[1]

    def weights_to_rows(self, weights: torch.Tensor) -> torch.Tensor:
        """Attention weights `(S, H, M, M)` to `(B, H, T, T)`, zero between sequences and for padded keys.

        What flex attention returns in their place on a GPU, `(S, H, M)`, becomes `(B, H, T)`.
        """
        if weights.dim() == 3:
            return self.to_rows(weights.transpose(1, 2)).transpose(1, 2)
        sequence, column = self.scatter_index // self.mask.shape[1], self.positions()
        picked = weights.permute(0, 2, 3, 1)[sequence[:, :, None], column[:, :, None], column[:, None, :]]
        together = sequence[:, :, None] == sequence[:, None, :]
        real = self.gather_index[sequence, column] == torch.arange(column.numel(), device=column.device).view_as(
            column
        )
        visible = together & (real & self.mask[sequence, column])[:, None, :]
        return picked.masked_fill(~visible.unsqueeze(-1), 0.0).permute(0, 3, 1, 2)


def rolled_layout(real: torch.Tensor) -> SequenceLayout:
    """One sequence a row, rolled so that its first real token comes first; no shape depends on values.

    Args:
        real (`torch.Tensor`): bool `(B, T)`; the real tokens of a row are contiguous.
    """
    batch_size, length = real.shape
    columns = torch.arange(length, device=real.device)
    first = real.long().argmax(dim=1, keepdim=True)
    rows = torch.arange(batch_size, device=real.device)[:, None] * length
    behind, ahead = columns + first, columns - first
    # Not modulo `length`: ONNX has no remainder by a dynamic size.
    return SequenceLayout(
        gather_index=rows + torch.where(behind < length, behind, behind - length),
        scatter_index=rows + torch.where(ahead >= 0, ahead, ahead + length),
        mask=columns < real.sum(dim=1, keepdim=True),
    )


def packed_layout(real: torch.Tensor, position_ids: torch.Tensor) -> SequenceLayout:
    """Several sequences a row, each beginning where `position_ids` is 0. `S` and `M` depend on values.

    Args:
        real (`torch.Tensor`): bool `(B, T)`.
        position_ids (`torch.Tensor`): int64 `(B, T)`; real tokens of a sequence count 0, 1, 2, ...
    """
    real_entries = real.flatten().nonzero().squeeze(1)
    positions = position_ids.flatten()[real_entries]
    sequences = (positions == 0).cumsum(0) - 1
    num_sequences, length = int(sequences[-1]) + 1, int(positions.max()) + 1
    gather_index = torch.zeros(num_sequences, length, dtype=torch.long, device=real.device)
    gather_index[sequences, positions] = real_entries
    mask = torch.zeros(num_sequences, length, dtype=torch.bool, device=real.device)
    mask[sequences, positions] = True
    scatter_index = torch.zeros(real.numel(), dtype=torch.long, device=real.device)
    scatter_index[real_entries] = sequences * length + positions
    return SequenceLayout(gather_index, scatter_index.view(real.shape), mask)


def find_layout(
    attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None, batch_size: int, length: int
) -> SequenceLayout | None:
    """The layout of a batch, or `None` where every row is one sequence that begins at column 0.

    While a graph is recorded or on the meta device no value can be read: then every batch with a mask counts as
    left-padded, which is right for right padding too, and packing is refused when the recorded code runs.

    Args:
        attention_mask (`torch.Tensor`, *optional*): `(B, T)`, nonzero = real.
        position_ids (`torch.Tensor`, *optional*): `(B, T)` or `(1, T)`; values at padded tokens are not read.
        batch_size, length (`int`): `B` and `T`.

    Raises:
        ValueError: real tokens with gaps between them, some rows padded on the left and some on the right, or
            positions that neither count on nor restart at 0.
    """
    if attention_mask is None and position_ids is None:
        return None
    given = attention_mask if attention_mask is not None else position_ids
    if attention_mask is None:
        real = torch.ones(batch_size, length, dtype=torch.bool, device=given.device)
    else:
        real = attention_mask != 0
    contiguous = _is_contiguous(real)
    first = real.long().argmax(dim=1, keepdim=True)
    counted = torch.arange(length, device=real.device) - first
    counts_on = None if position_ids is None else ((position_ids.to(real.device) == counted) | ~real).all()

    if not values_can_be_read(given):
        if torch.compiler.is_compiling():
            torch._assert_async(contiguous.all(), "`attention_mask` must have the ones of a row side by side")
            if counts_on is not None:
                torch._assert_async(counts_on, "`position_ids` must count 0, 1, 2, ... in compiled code")
        return None if attention_mask is None else rolled_layout(real)

    if counts_on is None or counts_on:
        check_contiguous(real)
        left, right = bool((~real[:, 0] & real.any(dim=1)).any()), bool((~real[:, -1] & real.any(dim=1)).any())
        if left and right:
            raise ValueError(
                "`attention_mask` must be padded on one side, got padding on the left and on the right: set "
                "`tokenizer.padding_side`"
            )
        return rolled_layout(real) if left else None

    position_ids = position_ids.to(real.device).expand(batch_size, length)
    counted_on = torch.zeros_like(real)
    counted_on[:, 1:] = real[:, :-1] & (position_ids[:, 1:] == position_ids[:, :-1] + 1)
    if (real & ~counted_on & (position_ids != 0)).any():
        raise ValueError(
            "`position_ids` must count 0, 1, 2, ... in every sequence and restart at 0 where the next one begins: "
            "blocks of the coarser levels are counted from the first token of a sequence"
        )
    return packed_layout(real, position_ids)


def check_contiguous(real: torch.Tensor) -> None:
    """Raise a ValueError where the real tokens of a row, `real (B, T)` bool, have a gap between them."""
    if not _is_contiguous(real).all():
        raise ValueError(
            "`attention_mask` must have the ones of a row side by side, got a row with a gap; packed sequences need "
            "`position_ids` that restart at 0"
        )


def _is_contiguous(real: torch.Tensor) -> torch.Tensor:
    first = real.long().argmax(dim=1, keepdim=True)
    counted = torch.arange(real.shape[1], device=real.device) - first
    return real == ((counted >= 0) & (counted < real.sum(dim=1, keepdim=True)))
