# Copyright 2026 The hkt-hf authors. Licensed under the Apache License, Version 2.0.
"""Hierarchical attention in fused Triton kernels: exact, memory linear in the length, forward and backward.

The order of positions is polyphase (ours). With `R = 2**(L - 1)`, position `i = R * c + r` has *column* `c` and *phase*
`r`, and its block at level `l` has the same column and phase `r >> l` of `R >> l`. So the score tile of two phases is
the sum of one tile a level, all over the same columns: upsampling is the reuse of a coarse tile, and every tile is an
ordinary matrix product. Rows are read with stride `R`; nothing is permuted in memory.

A program *holds* the tiles of one block of columns (of queries in the forward pass and for their gradients, of keys for
theirs) in `HELD` phases, and *walks* over the columns of the other side, `WALKED` phases at a time. Several phases of a
tile lie below each other, phase-major. At level `l` the same tile has `max(HELD >> l, 1)` phases: the first products
of a step are those of the coarsest level, and each product is added to all finer tiles it belongs to. The coarse score
gradient is the sum of the fine ones over the phases, and takes one small product.

Softmax is online (Milakov and Gimelshein, arXiv 1805.02867), with recomputation in the backward pass (FlashAttention,
arXiv 2205.14135), in base 2. The weights of the levels are applied to the scores in float32.
"""

from __future__ import annotations  # the kernels' annotations name Triton, which may be missing

import contextlib
import functools
from collections.abc import Sequence

import torch
from torch.autograd.function import once_differentiable


try:
    import triton
    import triton.language as tl
except ImportError:  # a GPU's package: importing this module, and a checkpoint that carries it, must not need it
    triton = None


MAX_LEVELS = 4
MAX_WIDTH = 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LOG2_E = 1.4426950408889634
ROWS = 64  # that a program of the small kernels before and after the gradients takes


def _jit(function):
    return function if triton is None else triton.jit(function)


# ---------------------------------------------------------------------------------------------------- tiles
#
# Sizes every kernel takes: `H` heads, `T` length, and as constants `L` levels, `P` width, `BLOCK_P` the power of two at
# or above it, `TOKEN_MAJOR` whether tensors lie in memory as (B, T, H, P) or as (B, H, T, P).


@_jit
def _rows(first, phase, LEVEL: tl.constexpr, L: tl.constexpr, PHASES: tl.constexpr, BLOCK: tl.constexpr):
    """Blocks at `LEVEL` of a tile of columns from `first` and fine phases from `phase`."""
    TILE: tl.constexpr = ((PHASES + (1 << LEVEL) - 1) >> LEVEL) * BLOCK
    index = tl.arange(0, TILE)
    return (first + index % BLOCK) * (1 << (L - 1 - LEVEL)) + (phase >> LEVEL) + index // BLOCK


@_jit
def _pointers(base, batch, head, rows, length, H, P: tl.constexpr, BLOCK_P: tl.constexpr, TOKEN_MAJOR: tl.constexpr):
    columns = tl.arange(0, BLOCK_P)
    if TOKEN_MAJOR:
        base += (batch * length * H + head) * P
        return base + rows[:, None] * (H * P) + columns[None, :]
    base += (batch * H + head) * length * P
    return base + rows[:, None] * P + columns[None, :]


@_jit
def _mask(rows, length, P: tl.constexpr, BLOCK_P: tl.constexpr):
    return (rows < length)[:, None] & (tl.arange(0, BLOCK_P) < P)[None, :]


@_jit
def _load(
    base,
    batch,
    head,
    first,
    phase,
    H,
    T,
    LEVEL: tl.constexpr,
    L: tl.constexpr,
    PHASES: tl.constexpr,
    BLOCK: tl.constexpr,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TOKEN_MAJOR: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The tile of `LEVEL`, phases below each other; zeros past the length where `MASKED`."""
    length = (T + (1 << LEVEL) - 1) >> LEVEL
    rows = _rows(first, phase, LEVEL, L, PHASES, BLOCK)
    pointers = _pointers(base, batch, head, rows, length, H, P, BLOCK_P, TOKEN_MAJOR)
    if MASKED or P != BLOCK_P:
        return tl.load(pointers, mask=_mask(rows, length, P, BLOCK_P), other=0.0)
    return tl.load(pointers)


@_jit
def _dot(a, b, PRECISION: tl.constexpr):
    if PRECISION == "interpreter":  # which holds bfloat16 as integers and does not multiply them
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, input_precision=PRECISION)


@_jit
def _finer(
    tile,
    LEVEL: tl.constexpr,
    HELD: tl.constexpr,
    BLOCK_HELD: tl.constexpr,
    WALKED: tl.constexpr,
    BLOCK_WALKED: tl.constexpr,
):
    """A score tile of `LEVEL + 1` as one of `LEVEL`: each phase twice where `LEVEL` has twice the phases.

    The copies are made along new register dimensions, so that they cost no exchange between threads.
    """
    if WALKED >> LEVEL > 1:
        PHASES: tl.constexpr = WALKED >> (LEVEL + 1)
        ROWS: tl.constexpr = tile.shape[0]
        tile = tl.reshape(tl.join(tile, tile), (ROWS, PHASES, BLOCK_WALKED, 2))
        tile = tl.reshape(tl.permute(tile, (0, 1, 3, 2)), (ROWS, PHASES * 2 * BLOCK_WALKED))
    if HELD >> LEVEL > 1:
        HELD_PHASES: tl.constexpr = HELD >> (LEVEL + 1)
        COLUMNS: tl.constexpr = tile.shape[1]
        tile = tl.reshape(tl.join(tile, tile), (HELD_PHASES, BLOCK_HELD, COLUMNS, 2))
        tile = tl.reshape(tl.permute(tile, (0, 3, 1, 2)), (HELD_PHASES * 2 * BLOCK_HELD, COLUMNS))
    return tile


@_jit
def _coarser(
    tile,
    LEVEL: tl.constexpr,
    HELD: tl.constexpr,
    BLOCK_HELD: tl.constexpr,
    WALKED: tl.constexpr,
    BLOCK_WALKED: tl.constexpr,
):
    """The transpose of `_finer`: a gradient tile of `LEVEL` as one of `LEVEL + 1`, summed over pairs of phases."""
    if HELD >> LEVEL > 1:
        HELD_PHASES: tl.constexpr = HELD >> (LEVEL + 1)
        COLUMNS: tl.constexpr = tile.shape[1]
        tile = tl.permute(tl.reshape(tile, (HELD_PHASES, 2, BLOCK_HELD, COLUMNS)), (0, 2, 3, 1))
        even, odd = tl.split(tile)
        tile = tl.reshape(even + odd, (HELD_PHASES * BLOCK_HELD, COLUMNS))
    if WALKED >> LEVEL > 1:
        PHASES: tl.constexpr = WALKED >> (LEVEL + 1)
        ROWS: tl.constexpr = tile.shape[0]
        tile = tl.permute(tl.reshape(tile, (ROWS, PHASES, 2, BLOCK_WALKED)), (0, 1, 3, 2))
        even, odd = tl.split(tile)
        tile = tl.reshape(even + odd, (ROWS, PHASES * BLOCK_WALKED))
    return tile


@_jit
def _keep(seed, bh, i, j, dropout_p):
    """Which attention weights dropout keeps: a function of the seed, the head and the two positions alone."""
    zero = i * 0 + j * 0
    bits, _, _, _ = tl.philox(
        seed, (zero + j).to(tl.uint32), (zero + i).to(tl.uint32), (zero + bh).to(tl.uint32), zero.to(tl.uint32)
    )
    return (bits >> 8).to(tl.float32) * (1.0 / (1 << 24)) >= dropout_p


# ---------------------------------------------------------------------------------------------------- forward


@_jit
def _forward_kernel(
    q0,
    q1,
    q2,
    q3,
    k0,
    k1,
    k2,
    k3,
    v,
    weights,
    padding,
    seed,
    out,
    lse,
    dropout_p,
    B,
    H,
    T,
    L: tl.constexpr,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TOKEN_MAJOR: tl.constexpr,
    CAUSAL: tl.constexpr,
    PADDED: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    HELD: tl.constexpr,
    WALKED: tl.constexpr,
    BLOCK_HELD: tl.constexpr,
    BLOCK_WALKED: tl.constexpr,
):
    """Output and the logarithm (base 2) of the sum of a row; holds queries, walks over keys."""
    R: tl.constexpr = 1 << (L - 1)
    GROUPS: tl.constexpr = R // HELD
    num_columns = tl.cdiv(T, R)
    num_blocks = tl.cdiv(num_columns, BLOCK_HELD)
    program = tl.program_id(0)
    held_phase = (program % GROUPS) * HELD
    # Later blocks first: in causal attention they take longer.
    first = (num_blocks - 1 - (program // GROUPS) % num_blocks) * BLOCK_HELD
    bh = program // (GROUPS * num_blocks)
    bh = bh.to(tl.int64)
    batch, head = bh // H, bh % H

    query0 = _load(q0, batch, head, first, held_phase, H, T, 0, L, HELD, BLOCK_HELD, P, BLOCK_P, TOKEN_MAJOR, True)
    weight0 = tl.load(weights + head * L)
    if L > 1:
        query1 = _load(q1, batch, head, first, held_phase, H, T, 1, L, HELD, BLOCK_HELD, P, BLOCK_P, TOKEN_MAJOR, True)
        weight1 = tl.load(weights + head * L + 1)
    if L > 2:
        query2 = _load(q2, batch, head, first, held_phase, H, T, 2, L, HELD, BLOCK_HELD, P, BLOCK_P, TOKEN_MAJOR, True)
        weight2 = tl.load(weights + head * L + 2)
    if L > 3:
        query3 = _load(q3, batch, head, first, held_phase, H, T, 3, L, HELD, BLOCK_HELD, P, BLOCK_P, TOKEN_MAJOR, True)
        weight3 = tl.load(weights + head * L + 3)
    i = _rows(first, held_phase, 0, L, HELD, BLOCK_HELD)

    accumulator = tl.zeros((HELD * BLOCK_HELD, BLOCK_P), tl.float32)
    row_sum = tl.zeros((HELD * BLOCK_HELD,), tl.float32)
    # Finite, so that a row whose keys are all masked meets no infinity minus infinity.
    row_max = tl.full((HELD * BLOCK_HELD,), -1.0e30, tl.float32)
    if DROPOUT:
        dropout_seed = tl.load(seed)
        kept_factor = 1.0 / (1.0 - dropout_p)

    # Columns before `full` need no mask: they lie before all held ones, or no position of them is past the length.
    full = (T // R) // BLOCK_WALKED * BLOCK_WALKED
    end = num_columns
    if CAUSAL:
        full = tl.minimum(full, first // BLOCK_WALKED * BLOCK_WALKED)
        end = tl.minimum(end, first + BLOCK_HELD)
    for MASKED in tl.static_range(2):
        begin = 0 if MASKED == 0 else full
        stop = full if MASKED == 0 else end
        for walked in range(begin, stop, BLOCK_WALKED):
            for phase in tl.static_range(0, R, WALKED):
                if L > 3:
                    if phase % 8 == 0:
                        key3 = _load(
                            k3,
                            batch,
                            head,
                            walked,
                            phase,
                            H,
                            T,
                            3,
                            L,
                            WALKED,
                            BLOCK_WALKED,
                            P,
                            BLOCK_P,
                            TOKEN_MAJOR,
                            MASKED,
                        )
                        scores3 = _dot(query3, tl.trans(key3), PRECISION) * weight3
                if L > 2:
                    if phase % 4 == 0:
                        key2 = _load(
                            k2,
                            batch,
                            head,
                            walked,
                            phase,
                            H,
                            T,
                            2,
                            L,
                            WALKED,
                            BLOCK_WALKED,
                            P,
                            BLOCK_P,
                            TOKEN_MAJOR,
                            MASKED,
                        )
                        scores2 = _dot(query2, tl.trans(key2), PRECISION) * weight2
                        if L > 3:
                            scores2 += _finer(scores3, 2, HELD, BLOCK_HELD, WALKED, BLOCK_WALKED)
                if L > 1:
                    if phase % 2 == 0:
                        key1 = _load(
                            k1,
                            batch,
                            head,
                            walked,
                            phase,
                            H,
                            T,
                            1,
                            L,
                            WALKED,
                            BLOCK_WALKED,
                            P,
                            BLOCK_P,
                            TOKEN_MAJOR,
                            MASKED,
                        )
                        scores1 = _dot(query1, tl.trans(key1), PRECISION) * weight1
                        if L > 2:
                            scores1 += _finer(scores2, 1, HELD, BLOCK_HELD, WALKED, BLOCK_WALKED)
                key0 = _load(
                    k0, batch, head, walked, phase, H, T, 0, L, WALKED, BLOCK_WALKED, P, BLOCK_P, TOKEN_MAJOR, MASKED
                )
                scores = _dot(query0, tl.trans(key0), PRECISION) * weight0
                if L > 1:
                    scores += _finer(scores1, 0, HELD, BLOCK_HELD, WALKED, BLOCK_WALKED)

                j = _rows(walked, phase, 0, L, WALKED, BLOCK_WALKED)
                if MASKED or PADDED:
                    visible = (j < T)[None, :]
                    if PADDED:
                        visible = (tl.load(padding + batch * T + j, mask=j < T, other=0) != 0)[None, :]
                    if CAUSAL and MASKED:
                        visible = visible & (j[None, :] <= i[:, None])
                    scores = tl.where(visible, scores, float("-inf"))
                new_max = tl.maximum(row_max, tl.max(scores, 1))
                decay = tl.exp2(row_max - new_max)
                exponentials = tl.exp2(scores - new_max[:, None])
                row_sum = row_sum * decay + tl.sum(exponentials, 1)
                row_max = new_max
                if DROPOUT:
                    kept = _keep(dropout_seed, bh, i[:, None], j[None, :], dropout_p)
                    exponentials = tl.where(kept, exponentials * kept_factor, 0.0)
                value = _load(
                    v, batch, head, walked, phase, H, T, 0, L, WALKED, BLOCK_WALKED, P, BLOCK_P, TOKEN_MAJOR, MASKED
                )
                accumulator = accumulator * decay[:, None] + _dot(exponentials.to(value.dtype), value, PRECISION)

    # A row that sees no key: zeros, and an infinite sum, so that its weights are zeros in the backward pass.
    seen = row_sum > 0.0
    row_sum = tl.where(seen, row_sum, 1.0)
    accumulator = accumulator / row_sum[:, None]
    tl.store(lse + bh * T + i, tl.where(seen, row_max + tl.log2(row_sum), float("inf")), mask=i < T)
    pointers = _pointers(out, batch, head, i, T, H, P, BLOCK_P, TOKEN_MAJOR)
    tl.store(pointers, accumulator.to(out.dtype.element_ty), mask=_mask(i, T, P, BLOCK_P))


# ---------------------------------------------------------------------------------------------------- backward


@_jit
def _delta_kernel(
    out, dout, delta, H, T, P: tl.constexpr, BLOCK_P: tl.constexpr, TOKEN_MAJOR: tl.constexpr, BLOCK: tl.constexpr
):
    """`delta[b, h, i] = sum_p out * dout`, what softmax subtracts from the gradient of its row."""
    num_blocks = tl.cdiv(T, BLOCK)
    bh = tl.program_id(0) // num_blocks
    bh = bh.to(tl.int64)
    batch, head = bh // H, bh % H
    rows = tl.program_id(0) % num_blocks * BLOCK + tl.arange(0, BLOCK)
    mask = _mask(rows, T, P, BLOCK_P)
    output = tl.load(_pointers(out, batch, head, rows, T, H, P, BLOCK_P, TOKEN_MAJOR), mask=mask, other=0.0)
    gradient = tl.load(_pointers(dout, batch, head, rows, T, H, P, BLOCK_P, TOKEN_MAJOR), mask=mask, other=0.0)
    sums = tl.sum(output.to(tl.float32) * gradient.to(tl.float32), 1)
    tl.store(delta + bh * T + rows, sums, mask=rows < T)


@_jit
def _store_partial(
    base,
    tile,
    batch,
    head,
    first,
    phase,
    B,
    H,
    T,
    LEVEL: tl.constexpr,
    L: tl.constexpr,
    PHASES: tl.constexpr,
    BLOCK: tl.constexpr,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Store a held gradient tile into `(partials, B, H, T_l, P)`: programs that share blocks write one partial each."""
    length = (T + (1 << LEVEL) - 1) >> LEVEL
    partial = (phase % (1 << LEVEL)) // PHASES
    rows = _rows(first, phase, LEVEL, L, PHASES, BLOCK)
    pointers = _pointers(base, partial * B + batch, head, rows, length, H, P, BLOCK_P, False)
    tl.store(pointers, tile, mask=_mask(rows, length, P, BLOCK_P))


@_jit
def _key_gradient_kernel(
    q0,
    q1,
    q2,
    q3,
    k0,
    k1,
    k2,
    k3,
    v,
    weights,
    padding,
    seed,
    dout,
    lse,
    delta,
    dk0,
    dk1,
    dk2,
    dk3,
    dv,
    dropout_p,
    B,
    H,
    T,
    L: tl.constexpr,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TOKEN_MAJOR: tl.constexpr,
    CAUSAL: tl.constexpr,
    PADDED: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    HELD: tl.constexpr,
    WALKED: tl.constexpr,
    BLOCK_HELD: tl.constexpr,
    BLOCK_WALKED: tl.constexpr,
):
    """Gradients of values and, before the level weights, of keys; holds keys, walks over queries; tiles transposed."""
    R: tl.constexpr = 1 << (L - 1)
    GROUPS: tl.constexpr = R // HELD
    num_columns = tl.cdiv(T, R)
    num_blocks = tl.cdiv(num_columns, BLOCK_HELD)
    program = tl.program_id(0)
    held_phase = (program % GROUPS) * HELD
    first = (program // GROUPS) % num_blocks * BLOCK_HELD  # the first keys take longest in causal attention
    bh = program // (GROUPS * num_blocks)
    bh = bh.to(tl.int64)
    batch, head = bh // H, bh % H

    key0 = _load(k0, batch, head, first, held_phase, H, T, 0, L, HELD, BLOCK_HELD, P, BLOCK_P, TOKEN_MAJOR, True)
    value = _load(v, batch, head, first, held_phase, H, T, 0, L, HELD, BLOCK_HELD, P, BLOCK_P, TOKEN_MAJOR, True)
    weight0 = tl.load(weights + head * L)
    key0_gradient = tl.zeros((HELD * BLOCK_HELD, BLOCK_P), tl.float32)
    value_gradient = tl.zeros((HELD * BLOCK_HELD, BLOCK_P), tl.float32)
    if L > 1:
        key1 = _load(k1, batch, head, first, held_phase, H, T, 1, L, HELD, BLOCK_HELD, P, BLOCK_P, TOKEN_MAJOR, True)
        weight1 = tl.load(weights + head * L + 1)
        key1_gradient = tl.zeros(key1.shape, tl.float32)
    if L > 2:
        key2 = _load(k2, batch, head, first, held_phase, H, T, 2, L, HELD, BLOCK_HELD, P, BLOCK_P, TOKEN_MAJOR, True)
        weight2 = tl.load(weights + head * L + 2)
        key2_gradient = tl.zeros(key2.shape, tl.float32)
    if L > 3:
        key3 = _load(k3, batch, head, first, held_phase, H, T, 3, L, HELD, BLOCK_HELD, P, BLOCK_P, TOKEN_MAJOR, True)
        weight3 = tl.load(weights + head * L + 3)
        key3_gradient = tl.zeros(key3.shape, tl.float32)
    j = _rows(first, held_phase, 0, L, HELD, BLOCK_HELD)
    real = j < T
    if PADDED:
        real = tl.load(padding + batch * T + j, mask=real, other=0) != 0
    if DROPOUT:
        dropout_seed = tl.load(seed)
        kept_factor = 1.0 / (1.0 - dropout_p)

    # Columns between `diagonal` and `full` need no mask: they lie after all held ones, and no position of them or of
    # the held ones is past the length.
    start = 0
    diagonal = 0
    full = (T // R) // BLOCK_WALKED * BLOCK_WALKED
    if CAUSAL:
        start = first // BLOCK_WALKED * BLOCK_WALKED
        diagonal = tl.cdiv(first + BLOCK_HELD, BLOCK_WALKED) * BLOCK_WALKED
    if first + BLOCK_HELD > T // R:
        diagonal = tl.cdiv(num_columns, BLOCK_WALKED) * BLOCK_WALKED
    full = tl.maximum(full, diagonal)
    num_diagonal = (diagonal - start) // BLOCK_WALKED
    for MASKED in tl.static_range(2):
        if MASKED == 0:
            num_steps = (full - diagonal) // BLOCK_WALKED
        else:
            num_steps = num_diagonal + tl.maximum(tl.cdiv(num_columns - full, BLOCK_WALKED), 0)
        for index in range(0, num_steps):
            if MASKED == 0:
                walked = diagonal + index * BLOCK_WALKED
            else:
                walked = (
                    tl.where(index < num_diagonal, start, full - num_diagonal * BLOCK_WALKED) + index * BLOCK_WALKED
                )
            for phase in tl.static_range(0, R, WALKED):
                if L > 3:
                    if phase % 8 == 0:
                        query3 = _load(
                            q3,
                            batch,
                            head,
                            walked,
                            phase,
                            H,
                            T,
                            3,
                            L,
                            WALKED,
                            BLOCK_WALKED,
                            P,
                            BLOCK_P,
                            TOKEN_MAJOR,
                            MASKED,
                        )
                        scores3 = _dot(key3, tl.trans(query3), PRECISION) * weight3
                if L > 2:
                    if phase % 4 == 0:
                        query2 = _load(
                            q2,
                            batch,
                            head,
                            walked,
                            phase,
                            H,
                            T,
                            2,
                            L,
                            WALKED,
                            BLOCK_WALKED,
                            P,
                            BLOCK_P,
                            TOKEN_MAJOR,
                            MASKED,
                        )
                        scores2 = _dot(key2, tl.trans(query2), PRECISION) * weight2
                        if L > 3:
                            scores2 += _finer(scores3, 2, HELD, BLOCK_HELD, WALKED, BLOCK_WALKED)
                if L > 1:
                    if phase % 2 == 0:
                        query1 = _load(
                            q1,
                            batch,
                            head,
                            walked,
                            phase,
                            H,
                            T,
                            1,
                            L,
                            WALKED,
                            BLOCK_WALKED,
                            P,
                            BLOCK_P,
                            TOKEN_MAJOR,
                            MASKED,
                        )
                        scores1 = _dot(key1, tl.trans(query1), PRECISION) * weight1
                        if L > 2:
                            scores1 += _finer(scores2, 1, HELD, BLOCK_HELD, WALKED, BLOCK_WALKED)
                query0 = _load(
                    q0, batch, head, walked, phase, H, T, 0, L, WALKED, BLOCK_WALKED, P, BLOCK_P, TOKEN_MAJOR, MASKED
                )
                scores = _dot(key0, tl.trans(query0), PRECISION) * weight0
                if L > 1:
                    scores += _finer(scores1, 0, HELD, BLOCK_HELD, WALKED, BLOCK_WALKED)

                i = _rows(walked, phase, 0, L, WALKED, BLOCK_WALKED)
                if MASKED:
                    row_lse = tl.load(lse + bh * T + i, mask=i < T, other=float("inf"))
                    row_delta = tl.load(delta + bh * T + i, mask=i < T, other=0.0)
                else:
                    row_lse = tl.load(lse + bh * T + i)
                    row_delta = tl.load(delta + bh * T + i)
                attention = tl.exp2(scores - row_lse[None, :])
                if MASKED or PADDED:
                    visible = real[:, None]
                    if CAUSAL and MASKED:
                        visible = visible & (j[:, None] <= i[None, :])
                    attention = tl.where(visible, attention, 0.0)
                gradient = _load(
                    dout, batch, head, walked, phase, H, T, 0, L, WALKED, BLOCK_WALKED, P, BLOCK_P, TOKEN_MAJOR, MASKED
                )
                attention_gradient = _dot(value, tl.trans(gradient), PRECISION)
                dropped = attention
                if DROPOUT:
                    kept = _keep(dropout_seed, bh, i[None, :], j[:, None], dropout_p)
                    dropped = tl.where(kept, attention * kept_factor, 0.0)
                    attention_gradient = tl.where(kept, attention_gradient * kept_factor, 0.0)
                value_gradient += _dot(dropped.to(gradient.dtype), gradient, PRECISION)
                dscores = attention * (attention_gradient - row_delta[None, :])
                cast = dscores.to(key0.dtype)
                key0_gradient += _dot(cast, query0, PRECISION)

                if L > 1:
                    coarse = _coarser(dscores, 0, HELD, BLOCK_HELD, WALKED, BLOCK_WALKED)
                    if phase % 2 < 1:
                        dscores1 = coarse
                    else:
                        dscores1 += coarse
                    if (phase + WALKED) % 2 == 0:
                        cast = dscores1.to(key0.dtype)
                        key1_gradient += _dot(cast, query1, PRECISION)
                        if L > 2:
                            coarse = _coarser(dscores1, 1, HELD, BLOCK_HELD, WALKED, BLOCK_WALKED)
                            if phase % 4 < 2:
                                dscores2 = coarse
                            else:
                                dscores2 += coarse
                            if (phase + WALKED) % 4 == 0:
                                cast = dscores2.to(key0.dtype)
                                key2_gradient += _dot(cast, query2, PRECISION)
                                if L > 3:
                                    coarse = _coarser(dscores2, 2, HELD, BLOCK_HELD, WALKED, BLOCK_WALKED)
                                    if phase % 8 < 4:
                                        dscores3 = coarse
                                    else:
                                        dscores3 += coarse
                                    if (phase + WALKED) % 8 == 0:
                                        cast = dscores3.to(key0.dtype)
                                        key3_gradient += _dot(cast, query3, PRECISION)

    pointers = _pointers(dv, batch, head, j, T, H, P, BLOCK_P, TOKEN_MAJOR)
    tl.store(pointers, value_gradient.to(dv.dtype.element_ty), mask=_mask(j, T, P, BLOCK_P))
    _store_partial(dk0, key0_gradient, batch, head, first, held_phase, B, H, T, 0, L, HELD, BLOCK_HELD, P, BLOCK_P)
    if L > 1:
        _store_partial(dk1, key1_gradient, batch, head, first, held_phase, B, H, T, 1, L, HELD, BLOCK_HELD, P, BLOCK_P)
    if L > 2:
        _store_partial(dk2, key2_gradient, batch, head, first, held_phase, B, H, T, 2, L, HELD, BLOCK_HELD, P, BLOCK_P)
    if L > 3:
        _store_partial(dk3, key3_gradient, batch, head, first, held_phase, B, H, T, 3, L, HELD, BLOCK_HELD, P, BLOCK_P)


@_jit
def _query_gradient_kernel(
    q0,
    q1,
    q2,
    q3,
    k0,
    k1,
    k2,
    k3,
    v,
    weights,
    padding,
    seed,
    dout,
    lse,
    delta,
    exact_delta,
    dq0,
    dq1,
    dq2,
    dq3,
    dropout_p,
    B,
    H,
    T,
    L: tl.constexpr,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TOKEN_MAJOR: tl.constexpr,
    CAUSAL: tl.constexpr,
    PADDED: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    HELD: tl.constexpr,
    WALKED: tl.constexpr,
    BLOCK_HELD: tl.constexpr,
    BLOCK_WALKED: tl.constexpr,
):
    """Gradients of queries before the level weights, and `delta` as the key gradients need it; holds queries.

    The score gradients of a row sum to zero. They do not with a `delta` from the rounded output, and the gradients of the
    level weights would add up that error times the mean score of a row. The sum itself is what `delta` lacks.
    """
    R: tl.constexpr = 1 << (L - 1)
    GROUPS: tl.constexpr = R // HELD
    num_columns = tl.cdiv(T, R)
    num_blocks = tl.cdiv(num_columns, BLOCK_HELD)
    program = tl.program_id(0)
    held_phase = (program % GROUPS) * HELD
    # Later blocks first: in causal attention they take longer.
    first = (num_blocks - 1 - (program // GROUPS) % num_blocks) * BLOCK_HELD
    bh = program // (GROUPS * num_blocks)
    bh = bh.to(tl.int64)
    batch, head = bh // H, bh % H

    query0 = _load(q0, batch, head, first, held_phase, H, T, 0, L, HELD, BLOCK_HELD, P, BLOCK_P, TOKEN_MAJOR, True)
    query0_gradient = tl.zeros((HELD * BLOCK_HELD, BLOCK_P), tl.float32)
    weight0 = tl.load(weights + head * L)
    if L > 1:
        query1 = _load(q1, batch, head, first, held_phase, H, T, 1, L, HELD, BLOCK_HELD, P, BLOCK_P, TOKEN_MAJOR, True)
        query1_gradient = tl.zeros(query1.shape, tl.float32)
        weight1 = tl.load(weights + head * L + 1)
    if L > 2:
        query2 = _load(q2, batch, head, first, held_phase, H, T, 2, L, HELD, BLOCK_HELD, P, BLOCK_P, TOKEN_MAJOR, True)
        query2_gradient = tl.zeros(query2.shape, tl.float32)
        weight2 = tl.load(weights + head * L + 2)
    if L > 3:
        query3 = _load(q3, batch, head, first, held_phase, H, T, 3, L, HELD, BLOCK_HELD, P, BLOCK_P, TOKEN_MAJOR, True)
        query3_gradient = tl.zeros(query3.shape, tl.float32)
        weight3 = tl.load(weights + head * L + 3)
    i = _rows(first, held_phase, 0, L, HELD, BLOCK_HELD)

    gradient = _load(dout, batch, head, first, held_phase, H, T, 0, L, HELD, BLOCK_HELD, P, BLOCK_P, TOKEN_MAJOR, True)
    row_lse = tl.load(lse + bh * T + i, mask=i < T, other=float("inf"))
    row_delta = tl.load(delta + bh * T + i, mask=i < T, other=0.0)
    row_excess = tl.zeros((HELD * BLOCK_HELD,), tl.float32)
    if DROPOUT:
        dropout_seed = tl.load(seed)
        kept_factor = 1.0 / (1.0 - dropout_p)

    # Columns before `full` need no mask: they lie before all held ones, or no position of them is past the length.
    full = (T // R) // BLOCK_WALKED * BLOCK_WALKED
    end = num_columns
    if CAUSAL:
        full = tl.minimum(full, first // BLOCK_WALKED * BLOCK_WALKED)
        end = tl.minimum(end, first + BLOCK_HELD)
    for MASKED in tl.static_range(2):
        begin = 0 if MASKED == 0 else full
        stop = full if MASKED == 0 else end
        for walked in range(begin, stop, BLOCK_WALKED):
            for phase in tl.static_range(0, R, WALKED):
                if L > 3:
                    if phase % 8 == 0:
                        key3 = _load(
                            k3,
                            batch,
                            head,
                            walked,
                            phase,
                            H,
                            T,
                            3,
                            L,
                            WALKED,
                            BLOCK_WALKED,
                            P,
                            BLOCK_P,
                            TOKEN_MAJOR,
                            MASKED,
                        )
                        scores3 = _dot(query3, tl.trans(key3), PRECISION) * weight3
                if L > 2:
                    if phase % 4 == 0:
                        key2 = _load(
                            k2,
                            batch,
                            head,
                            walked,
                            phase,
                            H,
                            T,
                            2,
                            L,
                            WALKED,
                            BLOCK_WALKED,
                            P,
                            BLOCK_P,
                            TOKEN_MAJOR,
                            MASKED,
                        )
                        scores2 = _dot(query2, tl.trans(key2), PRECISION) * weight2
                        if L > 3:
                            scores2 += _finer(scores3, 2, HELD, BLOCK_HELD, WALKED, BLOCK_WALKED)
                if L > 1:
                    if phase % 2 == 0:
                        key1 = _load(
                            k1,
                            batch,
                            head,
                            walked,
                            phase,
                            H,
                            T,
                            1,
                            L,
                            WALKED,
                            BLOCK_WALKED,
                            P,
                            BLOCK_P,
                            TOKEN_MAJOR,
                            MASKED,
                        )
                        scores1 = _dot(query1, tl.trans(key1), PRECISION) * weight1
                        if L > 2:
                            scores1 += _finer(scores2, 1, HELD, BLOCK_HELD, WALKED, BLOCK_WALKED)
                key0 = _load(
                    k0, batch, head, walked, phase, H, T, 0, L, WALKED, BLOCK_WALKED, P, BLOCK_P, TOKEN_MAJOR, MASKED
                )
                scores = _dot(query0, tl.trans(key0), PRECISION) * weight0
                if L > 1:
                    scores += _finer(scores1, 0, HELD, BLOCK_HELD, WALKED, BLOCK_WALKED)

                j = _rows(walked, phase, 0, L, WALKED, BLOCK_WALKED)
                if MASKED or PADDED:
                    visible = (j < T)[None, :]
                    if PADDED:
                        visible = (tl.load(padding + batch * T + j, mask=j < T, other=0) != 0)[None, :]
                    if CAUSAL and MASKED:
                        visible = visible & (j[None, :] <= i[:, None])
                    scores = tl.where(visible, scores, float("-inf"))
                attention = tl.exp2(scores - row_lse[:, None])
                value = _load(
                    v, batch, head, walked, phase, H, T, 0, L, WALKED, BLOCK_WALKED, P, BLOCK_P, TOKEN_MAJOR, MASKED
                )
                attention_gradient = _dot(gradient, tl.trans(value), PRECISION)
                if DROPOUT:
                    kept = _keep(dropout_seed, bh, i[:, None], j[None, :], dropout_p)
                    attention_gradient = tl.where(kept, attention_gradient * kept_factor, 0.0)
                dscores = attention * (attention_gradient - row_delta[:, None])
                row_excess += tl.sum(dscores, 1)
                query0_gradient += _dot(dscores.to(key0.dtype), key0, PRECISION)
                if L > 1:
                    coarse = _coarser(dscores, 0, HELD, BLOCK_HELD, WALKED, BLOCK_WALKED)
                    if phase % 2 < 1:
                        dscores1 = coarse
                    else:
                        dscores1 += coarse
                    if (phase + WALKED) % 2 == 0:
                        cast = dscores1.to(key0.dtype)
                        query1_gradient += _dot(cast, key1, PRECISION)
                        if L > 2:
                            coarse = _coarser(dscores1, 1, HELD, BLOCK_HELD, WALKED, BLOCK_WALKED)
                            if phase % 4 < 2:
                                dscores2 = coarse
                            else:
                                dscores2 += coarse
                            if (phase + WALKED) % 4 == 0:
                                cast = dscores2.to(key0.dtype)
                                query2_gradient += _dot(cast, key2, PRECISION)
                                if L > 3:
                                    coarse = _coarser(dscores2, 2, HELD, BLOCK_HELD, WALKED, BLOCK_WALKED)
                                    if phase % 8 < 4:
                                        dscores3 = coarse
                                    else:
                                        dscores3 += coarse
                                    if (phase + WALKED) % 8 == 0:
                                        cast = dscores3.to(key0.dtype)
                                        query3_gradient += _dot(cast, key3, PRECISION)

    tl.store(exact_delta + bh * T + i, row_delta + row_excess, mask=i < T)
    _store_partial(dq0, query0_gradient, batch, head, first, held_phase, B, H, T, 0, L, HELD, BLOCK_HELD, P, BLOCK_P)
    if L > 1:
        _store_partial(
            dq1, query1_gradient, batch, head, first, held_phase, B, H, T, 1, L, HELD, BLOCK_HELD, P, BLOCK_P
        )
    if L > 2:
        _store_partial(
            dq2, query2_gradient, batch, head, first, held_phase, B, H, T, 2, L, HELD, BLOCK_HELD, P, BLOCK_P
        )
    if L > 3:
        _store_partial(
            dq3, query3_gradient, batch, head, first, held_phase, B, H, T, 3, L, HELD, BLOCK_HELD, P, BLOCK_P
        )


@_jit
def _finish_kernel(
    partials,
    features,
    weights,
    gradient,
    products,
    B,
    H,
    length,
    L: tl.constexpr,
    LEVEL: tl.constexpr,
    PARTIALS: tl.constexpr,
    PRODUCTS: tl.constexpr,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TOKEN_MAJOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum of the partials times the level weight; with `PRODUCTS`, also what each row adds to the weight's gradient."""
    num_blocks = tl.cdiv(length, BLOCK)
    bh = tl.program_id(0) // num_blocks
    bh = bh.to(tl.int64)
    batch, head = bh // H, bh % H
    rows = tl.program_id(0) % num_blocks * BLOCK + tl.arange(0, BLOCK)
    mask = _mask(rows, length, P, BLOCK_P)
    total = tl.zeros((BLOCK, BLOCK_P), tl.float32)
    for partial in tl.static_range(PARTIALS):
        pointers = _pointers(partials, partial * B + batch, head, rows, length, H, P, BLOCK_P, False)
        total += tl.load(pointers, mask=mask, other=0.0)
    if PRODUCTS:
        feature = tl.load(
            _pointers(features, batch, head, rows, length, H, P, BLOCK_P, TOKEN_MAJOR), mask=mask, other=0.0
        )
        row_products = tl.sum(total * feature.to(tl.float32), 1)
        tl.store(products + bh * length + rows, row_products, mask=rows < length)
    total *= tl.load(weights + head * L + LEVEL)
    pointers = _pointers(gradient, batch, head, rows, length, H, P, BLOCK_P, TOKEN_MAJOR)
    tl.store(pointers, total.to(gradient.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------------------------------------------- launch

KERNELS = {
    "forward": _forward_kernel,
    "query_gradient": _query_gradient_kernel,
    "key_gradient": _key_gradient_kernel,
}

# How many phases a program holds at most. Two share their coarse scores; for gradients that would cost more registers
# than it saves products.
HELD_PHASES = {"forward": 2, "query_gradient": 1, "key_gradient": 1}

INTERPRETED_TILE = {"BLOCK_HELD": 16, "WALKED": 2, "BLOCK_WALKED": 16}  # the smallest: the interpreter does not tune


# Held rows, walked rows, walked phases, warps, pipeline stages: what the autotuner tries, by the bytes of an element and
# the largest width. No tile has been timed. Compiled for compute capability 9.0, causal without padding and dropout:
# bfloat16 at width 64 with 1 to 4 levels, 32 and 16 with 3, 128 with 1, 3 and 4; float32 with 3 levels at widths 32 and
# 64. Up to 3 levels bfloat16 spills at most 136 bytes a thread up to width 64. Gradients spill up to 1 KB in float32 at
# width 64, and in bfloat16 at width 128 up to 1.5 KB with 3 levels and 3.5 KB with 4: slow. The autotuner leaves out
# what does not fit into shared memory (227 KiB).
_TILES = {
    (2, 64): {
        "forward": [
            (128, 64, 4, 4, 2),
            (128, 64, 4, 4, 3),
            (128, 64, 2, 4, 2),
            (256, 64, 4, 8, 2),
            (256, 64, 4, 8, 3),
        ],
        "query_gradient": [
            (64, 32, 2, 4, 2),
            (64, 64, 4, 4, 2),
            (64, 64, 2, 4, 2),
            (128, 64, 4, 8, 2),
            (128, 64, 2, 8, 2),
        ],
        "key_gradient": [
            (64, 32, 2, 4, 2),
            (64, 32, 2, 4, 3),
            (64, 64, 4, 4, 2),
            (128, 32, 2, 8, 2),
            (128, 64, 4, 8, 2),
        ],
    },
    (2, 128): {
        "forward": [(128, 32, 2, 8, 2), (128, 32, 2, 8, 1)],
        "query_gradient": [(128, 32, 2, 8, 2), (64, 32, 2, 8, 1)],
        "key_gradient": [(64, 32, 2, 8, 2), (64, 16, 1, 8, 2), (64, 16, 1, 8, 1)],
    },
    (4, 64): {
        "forward": [(64, 32, 2, 4, 2), (128, 32, 2, 8, 1)],
        "query_gradient": [(64, 16, 1, 8, 1)],
        "key_gradient": [(64, 32, 2, 8, 1), (32, 32, 2, 4, 2)],
    },
    (4, 128): {
        "forward": [(64, 16, 1, 4, 1)],
        "query_gradient": [(32, 16, 1, 4, 1)],
        "key_gradient": [(32, 16, 1, 4, 1)],
    },
}


def tiles(name: str, num_levels: int, block_width: int, itemsize: int) -> list[dict[str, int]]:
    """The tiles among which the autotuner chooses: arguments of [`triton.Config`] and of the kernel.

    Args:
        name (`str`): a key of `KERNELS`.
        num_levels (`int`): `L`.
        block_width (`int`): the head width, rounded up to a power of two, at most 128.
        itemsize (`int`): bytes of an element of the inputs, 2 or 4.
    """
    result = []
    for held_rows, walked_rows, walked, num_warps, num_stages in _TILES[itemsize, max(64, block_width)][name]:
        walked = min(walked, 2 ** (num_levels - 1))
        tile = {"BLOCK_HELD": held_rows // held_phases(name, num_levels), "WALKED": walked}
        tile |= {"BLOCK_WALKED": walked_rows // walked, "num_warps": num_warps, "num_stages": num_stages}
        if tile not in result:
            result.append(tile)
    return result


def held_phases(name: str, num_levels: int) -> int:
    """Phases that a program of this kernel holds."""
    return min(HELD_PHASES[name], 2 ** (num_levels - 1))


def is_interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels (`TRITON_INTERPRET=1` when Triton was imported), on any device."""
    return triton is not None and not isinstance(_forward_kernel, triton.runtime.JITFunction)


@functools.cache
def _tuned_kernel(name: str, num_levels: int, block_width: int, itemsize: int, bucket: tuple):
    """The kernel with its tiles to choose from; each `bucket`, what else the choice depends on, chooses anew."""
    configs = []
    for tile in tiles(name, num_levels, block_width, itemsize):
        sizes = {key: value for key, value in tile.items() if key not in ("num_warps", "num_stages")}
        configs.append(triton.Config(sizes, num_warps=tile["num_warps"], num_stages=tile["num_stages"]))
    return triton.autotune(configs, key=[])(KERNELS[name])


def _launch(name: str, call: _Call, tensors: Sequence[torch.Tensor]) -> None:
    num_columns = -(-call.length // call.num_phases)
    held = held_phases(name, call.num_levels)

    def grid(tile):
        num_blocks = triton.cdiv(num_columns, tile["BLOCK_HELD"])
        return (num_blocks * (call.num_phases // held) * call.batch_size * call.num_heads,)

    arguments = (*tensors, call.dropout_p, call.batch_size, call.num_heads, call.length)
    constants = {
        "L": call.num_levels,
        **call.width_constants,
        "CAUSAL": call.is_causal,
        "PADDED": call.padding is not None,
        "DROPOUT": call.dropout_p > 0.0,
        "PRECISION": call.precision,
        "HELD": held,
    }
    if is_interpreting():
        walked = min(INTERPRETED_TILE["WALKED"], call.num_phases)
        KERNELS[name][grid](*arguments, **constants, **{**INTERPRETED_TILE, "WALKED": walked})
        return
    bucket = (call.value.dtype, call.length.bit_length(), *constants.values())
    kernel = _tuned_kernel(name, call.num_levels, constants["BLOCK_P"], call.value.element_size(), bucket)
    kernel[grid](*arguments, **constants)


class _Call:
    """Inputs of one call in the memory order of the kernels, and what every kernel is told about them."""

    def __init__(self, queries, keys, value, weights, padding, is_causal, dropout_p):
        self.batch_size, self.num_heads, self.length, width = value.shape
        self.num_levels = len(queries)
        self.num_phases = 2 ** (self.num_levels - 1)
        self.is_causal, self.dropout_p = is_causal, dropout_p
        # Heads are often cut out of (B, T, H, p): then the kernels read and write that order, and nothing is copied.
        self.token_major = not value.is_contiguous() and value.transpose(1, 2).is_contiguous()
        self.width_constants = {
            "P": width,
            "BLOCK_P": max(16, triton.next_power_of_2(width)),
            "TOKEN_MAJOR": self.token_major,
        }
        # Of three products of TensorFloat32 float32 keeps what the tensor cores can give it.
        self.precision = "interpreter" if is_interpreting() else "tf32x3"
        self.queries = [self.arrange(query) for query in queries]
        self.keys = [self.arrange(key) for key in keys]
        self.value = self.arrange(value)
        self.weights = weights.contiguous()
        self.padding = None if padding is None else padding.to(torch.uint8).contiguous()
        # On the device: no synchronization, and checkpointing, which restores the generator, repeats it.
        self.seed = torch.randint(2**62, (1,), device=value.device) if dropout_p > 0.0 else None

    def arrange(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` `(B, H, T_l, p)` itself, or a copy in the memory order of this call."""
        return tensor.transpose(1, 2).contiguous().transpose(1, 2) if self.token_major else tensor.contiguous()

    def inputs(self) -> list[torch.Tensor | None]:
        """The first arguments of every attention kernel."""
        missing = [None] * (MAX_LEVELS - self.num_levels)
        weights = self.weights * LOG2_E
        return [*self.queries, *missing, *self.keys, *missing, self.value, weights, self.padding, self.seed]

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        output = torch.empty_like(self.value)
        lse = torch.empty(self.value.shape[:3], dtype=torch.float32, device=output.device)
        _launch("forward", self, [*self.inputs(), output, lse])
        return output, lse

    def backward(self, output, lse, gradient) -> list[torch.Tensor]:
        """Gradients of the queries, the keys, the value and the weights."""
        gradient = self.arrange(gradient)
        delta = torch.empty_like(lse)
        heads = self.batch_size * self.num_heads
        grid = (triton.cdiv(self.length, ROWS) * heads,)
        _delta_kernel[grid](output, gradient, delta, self.num_heads, self.length, **self.width_constants, BLOCK=ROWS)
        inputs = [*self.inputs(), gradient, lse]
        # Not in place: the autotuner runs a kernel many times.
        query_partials, exact_delta = self._partials("query_gradient"), torch.empty_like(delta)
        _launch("query_gradient", self, [*inputs, delta, exact_delta, *query_partials])
        query_gradients, _ = self._finish(query_partials, self.queries, products=False)
        del query_partials
        key_partials, value_gradient = self._partials("key_gradient"), torch.empty_like(self.value)
        _launch("key_gradient", self, [*inputs, exact_delta, *key_partials, value_gradient])
        key_gradients, weight_gradient = self._finish(key_partials, self.keys, products=True)
        return [*query_gradients, *key_gradients, value_gradient, weight_gradient]

    def _partials(self, name: str) -> list[torch.Tensor | None]:
        """Gradients of the held features before weights, a leading entry for each program that adds to a row."""
        held = held_phases(name, self.num_levels)
        partials = [
            torch.empty(max(2**level // held, 1), *query.shape, dtype=torch.float32, device=query.device)
            for level, query in enumerate(self.queries)
        ]
        return partials + [None] * (MAX_LEVELS - self.num_levels)

    def _finish(self, partials, features, products: bool) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        gradients, level_products = [], []
        for level, feature in enumerate(features):
            length = feature.shape[2]
            gradient = torch.empty_like(feature)
            # A level weight's gradient: the products of keys and their gradients before that weight, summed over rows.
            row_products = (
                torch.empty(feature.shape[:3], dtype=torch.float32, device=feature.device) if products else None
            )
            _finish_kernel[(triton.cdiv(length, ROWS) * self.batch_size * self.num_heads,)](
                partials[level],
                feature,
                self.weights,
                gradient,
                row_products,
                self.batch_size,
                self.num_heads,
                length,
                L=self.num_levels,
                LEVEL=level,
                PARTIALS=partials[level].shape[0],
                PRODUCTS=products,
                **self.width_constants,
                BLOCK=ROWS,
            )
            gradients.append(gradient)
            if products:
                level_products.append(row_products.sum(dim=(0, 2)))
        return gradients, torch.stack(level_products, dim=1) if products else None


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, padding, is_causal, dropout_p, num_levels, weights, value, *features):
        queries, keys = features[:num_levels], features[num_levels:]
        call = _Call(queries, keys, value, weights, padding, is_causal, dropout_p)
        output, lse = call.forward()
        ctx.options = is_causal, dropout_p, num_levels
        ctx.save_for_backward(
            output, lse, call.padding, call.seed, call.weights, call.value, *call.queries, *call.keys
        )
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        is_causal, dropout_p, num_levels = ctx.options
        output, lse, padding, seed, weights, value, *features = ctx.saved_tensors
        call = _Call(features[:num_levels], features[num_levels:], value, weights, padding, is_causal, 0.0)
        call.dropout_p, call.seed = dropout_p, seed
        *feature_gradients, value_gradient, weight_gradient = call.backward(output, lse, gradient)
        return None, None, None, None, weight_gradient, value_gradient, *feature_gradients


@torch.compiler.disable
def triton_attention(
    queries: Sequence[torch.Tensor],
    keys: Sequence[torch.Tensor],
    value: torch.Tensor,
    level_weights: torch.Tensor,
    key_padding_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float = 1.0,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Hierarchical attention by fused kernels. Arguments as in `hierarchical_attention`, which has checked them.

    Two runs give the same bits: no kernel adds atomically. Under `torch.compile` the call is a graph break.

    Returns:
        `torch.Tensor`: `(B, H, T, p)`. A query that sees no real key gets zeros.

    Raises:
        ImportError: Triton is not installed.
        ValueError: tensors that are not on a GPU (unless Triton interprets), more than 4 levels, heads wider than 128,
            a dtype that the kernels do not know, or a sequence of 2**31 elements or more.
    """
    _check_support(queries, value)
    if value.numel() == 0:
        return value * 0.0
    weights = level_weights.float() * scale
    with torch.cuda.device(value.device) if value.is_cuda else contextlib.nullcontext():
        return _TritonAttention.apply(
            key_padding_mask, is_causal, dropout_p, len(queries), weights, value, *queries, *keys
        )


def _check_support(queries, value) -> None:
    if triton is None:
        raise ImportError(
            '`backend="triton"` needs the package `triton`, which is not installed; use `backend="lifted"`'
        )
    if not value.is_cuda and not is_interpreting():
        raise ValueError(
            f'`backend="triton"` needs tensors on an NVIDIA GPU, got `value` on {value.device}; use `backend="lifted"`'
        )
    if value.dtype not in DTYPES:
        raise ValueError(f'`backend="triton"` takes {DTYPES}, got `value` of {value.dtype}; use `backend="lifted"`')
    if len(queries) > MAX_LEVELS:
        raise ValueError(
            f'`backend="triton"` takes at most {MAX_LEVELS} levels, got {len(queries)}; use `backend="lifted"`'
        )
    if value.shape[-1] > MAX_WIDTH:
        raise ValueError(
            f'`backend="triton"` takes heads at most {MAX_WIDTH} wide, got {value.shape[-1]}; use `backend="lifted"`'
        )
    if value.dtype == torch.float32 and len(queries) == MAX_LEVELS and value.shape[-1] > MAX_WIDTH // 2:
        raise ValueError(
            f'`backend="triton"` takes float32 heads at most {MAX_WIDTH // 2} wide with {MAX_LEVELS} levels (the kernels '
            f'would compile for minutes and be slow), got {value.shape[-1]}; use `backend="lifted"`'
        )
    if value.shape[1:].numel() >= 2**31:
        raise ValueError(
            f'`backend="triton"` counts the elements of a sequence in 32 bits, got `value` {tuple(value.shape)}; '
            'use `backend="lifted"`'
        )
