# Copyright 2026 The hkt-hf authors. Licensed under the Apache License, Version 2.0.
"""The hierarchy of nested signals that Hierarchical Self-Attention works along (arXiv 2509.15448).

A tree has the tokens of one sequence as leaves. A batch of trees is kept level by level: leaves are level 0, children lie one
level below their parent, and the last level is the roots, one a sequence. Leaves at different depths are brought to one depth
by nodes with a single child, which change nothing in the attention (ours: such nodes are transparent).
"""

import math
import operator
from collections.abc import Callable, Sequence
from functools import cached_property, wraps
from typing import Any, NamedTuple

import torch


MAX_OUTLINE_LINES = 60


class TreeLevel(NamedTuple):
    """How the nodes of one level form families (the children of one node), in groups of families of about one size.

    Args:
        children (tuple of `torch.Tensor`): a group int64 `(F, c)`: the node in each slot of each family, the number of nodes
            where a family has fewer.
        slots (`torch.Tensor`): int64 `(nodes,)`: where a node is in the groups, flattened, one after the other.
        families (`torch.Tensor`): int64 `(parents,)`: where each parent is in the groups, one after the other.
    """

    children: tuple[torch.Tensor, ...]
    slots: torch.Tensor
    families: torch.Tensor


def _for_training(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of one that was made in inference mode, which autograd refuses."""
    if torch.compiler.is_compiling() or not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


def _computed_once(compute: Callable) -> cached_property:
    """A `cached_property` of tensors that autograd takes although they are first read in inference mode."""

    @wraps(compute)
    def outside_inference_mode(tree):
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return compute(tree)
        with torch.inference_mode(False):
            return compute(tree)

    return cached_property(outside_inference_mode)


class SignalTree:
    """The hierarchies of a batch of sequences.

    Made by [`SignalTree.regular`], [`~SignalTree.from_segments`], [`~SignalTree.from_nested`], [`~SignalTree.from_grid`] and
    [`~SignalTree.join`], which check what they are given.

    Args:
        lengths (`torch.Tensor`): int64 `(B,)`, leaves of each sequence.
        size (`int`): `N`, the length that sequences are padded to.
        branching (tuple, *optional*): of a regular tree, children of a node at each level from the leaves up; the last may be
            `None`, all that is left.
        root_tokens (`torch.Tensor`, *optional*): of a regular tree, positions of leaves that are children of the root
            themselves, int64 `(B, r)`, different ones in a row; `size` where a sequence has none.
        parents (sequence of `torch.Tensor`, *optional*): of any other tree, for each level below the roots the parent of each
            node, int64 `(nodes,)`, ascending.
        order (`torch.Tensor`, *optional*): of any other tree, the position `b * N + i` in the padded batch of each leaf, int64
            `(leaves,)`.
        unsplit_levels (sequence of `int`, *optional*): for each level below the roots its index before large families were
            split, ascending: a level that a split has put in has the index of the level whose families it splits, so that
            the large families of one sequence do not move the levels of the others. By default no family was split.
    """

    def __init__(
        self,
        lengths: torch.Tensor,
        size: int,
        *,
        branching: Sequence[int | None] | None = None,
        root_tokens: torch.Tensor | None = None,
        parents: Sequence[torch.Tensor] | None = None,
        order: torch.Tensor | None = None,
        unsplit_levels: Sequence[int] | None = None,
    ):
        self.lengths = _for_training(lengths)
        self.size = size
        self.branching = None if branching is None else tuple(branching)
        self.root_tokens = None if root_tokens is None else _for_training(root_tokens)
        self._parents = None if parents is None else tuple(map(_for_training, parents))
        self._order = None if order is None else _for_training(order)
        depth = len(self.branching or self._parents)
        self.unsplit_levels = tuple(range(depth) if unsplit_levels is None else unsplit_levels)

    @classmethod
    def regular(
        cls,
        lengths: torch.Tensor | Sequence[int],
        branching: int | Sequence[int | None],
        *,
        size: int | None = None,
        root_tokens: Sequence[int] = (),
    ) -> "SignalTree":
        """Groups of neighbours, by the same rule in all sequences: the fastest trees.

        Args:
            lengths (`torch.Tensor` or sequence of `int`): leaves of each sequence, at least 0; an empty batch is a tensor.
            branching (`int` or sequence of `int` and `None`): children of a node at each level, from the leaves up, at least 2
                each; the last group of a level may be smaller. The last entry may be `None`: one family of all that is left.
                An `int` holds at every level, up to the root. `(None,)` gives flat attention.
            size (`int`, *optional*): length that sequences are padded to; the longest by default.
            root_tokens (sequence of `int`, *optional*): positions, counted from the end where negative, of leaves that are
                children of the root themselves, such as `[CLS]` and `[SEP]` (ours). Their places in the groups stay empty;
                sequences that are too short to have one go without it.

        Raises:
            ValueError: no list of lengths or negative ones, a size below the longest, a branching below 2, `None` below the last
                level, levels that leave more than one root, or root tokens that are no integers.
        """
        lengths = torch.as_tensor(lengths)
        if lengths.dim() != 1 or lengths.is_floating_point() or bool((lengths < 0).any()):
            raise ValueError(
                f"`lengths` must be a list of at least one length, each at least 0, got {lengths.tolist()}"
            )
        longest = int(lengths.max()) if len(lengths) else 0
        if size is None:
            size = longest
        elif size < longest:
            raise ValueError(f"`size` must be at least the longest length, {longest}, got {size}")
        lengths, branching = lengths.long(), _check_branching(branching, size)
        places = [_root_places(lengths, token, size) for token in root_tokens]
        if not places or len(branching) == 1:  # where all leaves are children of the root, so are these
            return cls(lengths, size, branching=branching)
        found = torch.stack(places, dim=1)
        repeated = (found[:, :, None] == found[:, None, :]).tril(-1).any(2)
        tree = cls(lengths, size, branching=branching, root_tokens=found.masked_fill(repeated, size))
        # The root of a short sequence lies below the last level, where its length and no other says: not one rule for all.
        is_short = (lengths > 0) & (lengths <= math.prod(branching[:-1]))
        return tree._in_segments if bool(is_short.any()) else tree

    @classmethod
    def from_segments(
        cls,
        segment_ids: torch.Tensor | Sequence[torch.Tensor],
        mask: torch.Tensor | None = None,
        *,
        max_family_size: int | None = None,
    ) -> "SignalTree":
        """From the segments that tokens are in, such as sentences and paragraphs.

        Args:
            segment_ids (`torch.Tensor` or sequence of them): one integer tensor `(B, N)` a level, from fine to coarse. Tokens
                of a row with one id are one segment, wherever they stand; a segment that lies in several coarser ones is
                split between them. Siblings are in the order of their first tokens. No tensor at all is flat attention, which
                needs a `mask`.
            mask (`torch.Tensor`, *optional*): `(B, N)`, nonzero = real; ids of padding are not read.
            max_family_size (`int`, *optional*): larger families are split into runs of about one size, with nodes of their own.

        Raises:
            ValueError: tensors of other shapes, ids that are no integers, neither ids nor a mask, or `max_family_size` below 2.
        """
        levels = [segment_ids] if isinstance(segment_ids, torch.Tensor) else list(segment_ids)
        if not levels and mask is None:
            raise ValueError("`segment_ids` must hold at least one level, or `mask` be given, got neither")
        shape = tuple((levels[0] if levels else mask).shape)
        for name, tensor in [*(("segment_ids", ids) for ids in levels), *([] if mask is None else [("mask", mask)])]:
            if len(shape) != 2 or tuple(tensor.shape) != shape:
                raise ValueError(f"`{name}` must be (batch, length), the same for all, got {tuple(tensor.shape)}")
        for ids in levels:
            if ids.is_floating_point() or ids.is_complex():
                raise ValueError(f"`segment_ids` must be integers, got {ids.dtype}")
        batch_size, size = shape
        device = (levels[0] if levels else mask).device
        real = torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask != 0
        positions = real.flatten().nonzero().squeeze(1)
        # A segment is known by the position of its first token.
        firsts, key = [], positions // size
        for ids in reversed(levels):
            key = _first_of_each(key, ids.flatten()[positions], positions)
            firsts.append(key)
        return cls._assemble(*_in_tree_order(positions, firsts[::-1]), batch_size, size, max_family_size)

    @classmethod
    def from_nested(
        cls, nested: Sequence[Any], *, size: int | None = None, max_family_size: int | None = None
    ) -> "SignalTree":
        """From nested lists of token positions, one list a sequence: `[[[0, 1, 2], [3, 4]], [0, [1, [2]]]]` has two.

        Args:
            nested (sequence): for each sequence of `n` tokens a list that holds the integers `0 .. n - 1`, each once, in any
                order, and further such lists, to any depth.
            size (`int`, *optional*): length that sequences are padded to; the longest by default.
            max_family_size (`int`, *optional*): as in [`SignalTree.from_segments`].

        Raises:
            ValueError: no sequence, a list without entries, one that holds itself, an entry that is neither list nor integer,
                a position that is missing, repeated or negative (the message names it), a size below the longest sequence,
                or `max_family_size` below 2.
        """
        if isinstance(nested, str) or not isinstance(nested, Sequence) or not nested:
            raise ValueError(f"`nested` must be a list of at least one nested list, got {nested!r}")
        parents, leaves, rows, depths = _levels_of(nested)
        if min(depths) < max(depths):
            # Nodes with one child above the shallower roots, so that a level is as far from the leaves as in a batch of its own.
            roots = []
            for root, depth in zip(nested, depths, strict=True):
                for _ in range(max(depths) - depth):
                    root = [root]
                roots.append(root)
            parents, leaves, rows, _ = _levels_of(roots)
        lengths = torch.bincount(torch.tensor(rows), minlength=len(nested))
        leaves_of: list[list[int]] = [[] for _ in nested]
        for leaf, row in zip(leaves, rows, strict=True):
            leaves_of[row].append(leaf)
        for row, its_leaves in enumerate(leaves_of):
            _check_positions(row, its_leaves)
        longest = int(lengths.max())
        size = longest if size is None else size
        if size < longest:
            raise ValueError(f"`size` must be at least the longest sequence, {longest}, got {size}")
        order = torch.tensor(rows) * size + torch.tensor(leaves)
        parents, levels = _split_families(parents, max_family_size)
        return cls(lengths, size, parents=parents, order=order, unsplit_levels=levels)

    @classmethod
    def from_grid(
        cls,
        height: int,
        width: int,
        branching: int | Sequence[int | tuple[int, int] | None],
        *,
        batch_size: int = 1,
    ) -> "SignalTree":
        """Blocks of an image whose pixels (or patches) are the tokens, row by row: 2 gives a quadtree.

        Args:
            height, width (`int`): of the image, at least 1.
            branching (`int` or sequence of `int`, pairs and `None`): rows and columns of blocks that a node has at each level,
                from the pixels up, an `int` for both; blocks at the right and lower edge may be smaller. The last entry may be
                `None`: one family of all that is left. An `int`, at least 2, holds at every level, up to the root.
            batch_size (`int`, *optional*, defaults to 1): images, all alike.

        Raises:
            ValueError: sizes below 1, a branching below 1 or of 1 by 1, `None` below the last level, or levels that leave more
                than one root.
        """
        for name, value in (("height", height), ("width", width), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        steps = _check_grid_branching(branching, height, width)
        rows = torch.arange(height).repeat_interleave(width)
        columns = torch.arange(width).repeat(height)
        keys, block_height, block_width = [], 1, 1
        for step in steps[:-1]:  # the last one is the root
            block_height, block_width = block_height * step[0], block_width * step[1]
            keys.append(rows // block_height * width + columns // block_width)
        area = height * width
        positions, keys = _in_tree_order(torch.arange(area), keys)
        positions = (torch.arange(batch_size)[:, None] * area + positions).flatten()
        return cls._assemble(positions, [key.repeat(batch_size) for key in keys], batch_size, area, None)

    @classmethod
    def join(cls, trees: Sequence["SignalTree"]) -> "SignalTree":
        """One tree of several, such as modalities, which become the children of a common root.

        Args:
            trees (sequence of [`SignalTree`]): of one batch size. The sequences of the result are those of the trees one after
                the other, each padded to its tree's size: what `torch.cat` makes of the padded batches.

        Raises:
            ValueError: no tree, or trees of different batch sizes or devices.
        """
        trees = list(trees)
        if not trees:
            raise ValueError("`trees` must hold at least one tree, got none")
        sizes = {(tree.batch_size, tree.lengths.device) for tree in trees}
        if len(sizes) > 1:
            raise ValueError(f"`trees` must be of one batch size and device, got {sorted(map(str, sizes))}")
        batch_size, size = trees[0].batch_size, sum(tree.size for tree in trees)
        # What was split is beside what was not: each level has as many as the tree that split it most often.
        levels = sorted(set().union(*(tree.unsplit_levels for tree in trees)))
        levels = [level for level in levels for _ in range(max(tree.unsplit_levels.count(level) for tree in trees))]
        positions, tables, offset = [], [], 0
        is_single = torch.ones(len(levels), batch_size, dtype=torch.bool, device=trees[0].device)
        for index, tree in enumerate(trees):
            rows = tree.order // max(tree.size, 1)
            positions.append(rows * size + offset + tree.order % max(tree.size, 1))
            ancestors = tree._ancestors_at(levels)
            is_single &= torch.stack([_is_one_a_row(column, rows, batch_size) for column in ancestors])
            # Roots become nodes; above those of the shallower trees stand nodes with one child.
            tables.append([column * len(trees) + index for column in ancestors])
            offset += tree.size
        positions = torch.cat(positions)
        columns = [torch.cat(parts) for parts in zip(*tables, strict=True)]
        rows = positions // max(size, 1)
        index = rows.argsort(stable=True)
        # A sequence's trees meet one level above the deepest of them, whatever the other sequences of the batch need.
        names = torch.tensor(levels, device=rows.device)
        meet = names[:, None] > names[is_single.long().argmax(0)]
        columns = [torch.where(here[rows], 0, column)[index] for column, here in zip(columns, meet, strict=True)]
        return cls._assemble(positions[index], columns, batch_size, size, None, [*levels, levels[-1] + 1])

    @classmethod
    def _assemble(
        cls,
        positions: torch.Tensor,
        columns: Sequence[torch.Tensor],
        batch_size: int,
        size: int,
        max_family_size: int | None,
        unsplit_levels: Sequence[int] | None = None,
    ) -> "SignalTree":
        """A tree of leaves in tree order.

        Args:
            positions (`torch.Tensor`): of the leaves in the padded batch, row by row.
            columns (sequence of `torch.Tensor`): from fine to coarse, without the roots, a name of the node that each leaf is
                in; neighbours with different names, or in different coarser nodes, are in different nodes.
            batch_size, size, max_family_size (`int`): as above.
            unsplit_levels (sequence of `int`, *optional*): as above, where there is no `max_family_size`.
        """
        rows = positions // size if size else positions
        starts = _changes(rows)
        nodes = []
        for column in reversed(columns):
            starts = starts | _changes(column)
            nodes.append((starts.cumsum(0) - 1, starts.nonzero().squeeze(1)))
        parents, first_leaves = [], torch.arange(len(positions), device=positions.device)
        for names, firsts in reversed(nodes):
            parents.append(names[first_leaves])
            first_leaves = firsts
        parents.append(rows[first_leaves])
        lengths = torch.bincount(rows, minlength=batch_size)
        if max_family_size is not None:
            parents, unsplit_levels = _split_families(parents, max_family_size)
        return cls(lengths, size, parents=parents, order=positions, unsplit_levels=unsplit_levels)

    @property
    def batch_size(self) -> int:
        """`B`, the number of sequences."""
        return len(self.lengths)

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.lengths.device

    @_computed_once
    def mask(self) -> torch.Tensor:
        """Which positions are leaves: bool `(B, N)`."""
        if self._order is None:
            return torch.arange(self.size, device=self.device) < self.lengths[:, None]
        mask = torch.zeros(self.batch_size * self.size, dtype=torch.bool, device=self.device)
        mask[self._order] = True
        return mask.view(self.batch_size, self.size)

    @_computed_once
    def is_root_token(self) -> torch.Tensor:
        """Which positions are root tokens of a regular tree that has some: bool `(B, N)`."""
        found = torch.zeros(self.batch_size, self.size + 1, dtype=torch.bool, device=self.device)
        return found.scatter(1, self.root_tokens, True)[:, : self.size]

    @_computed_once
    def _in_segments(self) -> "SignalTree":
        """A regular tree with root tokens as one that is not regular: each of those is a segment of its own, up to the root."""
        positions = torch.arange(self.size, device=self.device)
        groups, width = [], 1
        for factor in self.branching[:-1]:
            width *= factor
            is_apart = self.is_root_token & (self.lengths > width)[:, None]
            groups.append(torch.where(is_apart, self.size + positions, positions // width))
        return self.from_segments(groups, self.mask)

    @_computed_once
    def order(self) -> torch.Tensor:
        """Position `b * N + i` in the padded batch of each leaf, in tree order: int64 `(leaves,)`."""
        if self.root_tokens is not None:
            return self._in_segments.order
        return self.mask.flatten().nonzero().squeeze(1) if self._order is None else self._order

    @_computed_once
    def is_in_order(self) -> bool:
        """Whether the leaves of every sequence stand in tree order."""
        regular = self._order is None and self.root_tokens is None
        return regular or bool((self.order.diff() > 0).all())

    @_computed_once
    def parents(self) -> tuple[torch.Tensor, ...]:
        """For each level below the roots, from the leaves up, the parent of each node: int64 `(nodes,)`, ascending."""
        if self._parents is not None:
            return self._parents
        if self.root_tokens is not None:
            return self._in_segments.parents
        parents, counts = [], self.lengths
        for branching in self.branching:
            groups = (counts > 0).long() if branching is None else -(-counts // branching)
            rows = torch.arange(self.batch_size, device=self.device).repeat_interleave(counts)
            within = torch.arange(len(rows), device=self.device) - (counts.cumsum(0) - counts)[rows]
            first_group = groups.cumsum(0) - groups
            parents.append(first_group[rows] + (0 if branching is None else within // branching))
            counts = groups
        # The nodes of the last level are the roots of the sequences that have tokens.
        parents[-1] = (counts > 0).nonzero().squeeze(1)[parents[-1]]
        return tuple(parents)

    @_computed_once
    def levels(self) -> tuple[TreeLevel, ...]:
        """The families of each level below the roots, from the leaves up."""
        counts = [*(len(parents) for parents in self.parents[1:]), self.batch_size]
        return tuple(_group(parents, count) for parents, count in zip(self.parents, counts, strict=True))

    def ancestors(self) -> list[torch.Tensor]:
        """The node that each leaf is in, at each level above the leaves: int64 `(leaves,)` each, the roots last."""
        found, nodes = [], None
        for parents in self.parents:
            nodes = parents if nodes is None else parents[nodes]
            found.append(nodes)
        return found

    def _ancestors_at(self, levels: Sequence[int]) -> list[torch.Tensor]:
        """[`SignalTree.ancestors`] at levels that have each of `unsplit_levels` at least as often as the tree, ascending."""
        found, ancestors, below = [], self.ancestors(), -1
        for level in levels:
            if below + 1 < len(ancestors) and self.unsplit_levels[below + 1] <= level:
                below += 1
            found.append(ancestors[below])
        return found

    def family_sizes(self) -> list[torch.Tensor]:
        """Number of children of each node that has some, at each level from the leaves up."""
        return [torch.unique_consecutive(parents, return_counts=True)[1] for parents in self.parents]

    def to(self, device: torch.device | str) -> "SignalTree":
        """The tree on a device; itself if it is there."""
        if torch.device(device) == self.device:
            return self
        move = lambda tensor: None if tensor is None else tensor.to(device)  # noqa: E731
        return type(self)(
            self.lengths.to(device),
            self.size,
            branching=self.branching,
            root_tokens=move(self.root_tokens),
            parents=None if self._parents is None else tuple(map(move, self._parents)),
            order=move(self._order),
            unsplit_levels=self.unsplit_levels,
        )

    def nested(self) -> list[Any]:
        """Nested lists of positions, without nodes that have a single child.

        [`SignalTree.from_nested`] takes them where every sequence has tokens, and these stand from position 0 on.
        """
        nodes: list[Any] = (self.order % self.size).tolist() if self.size else []
        for level, parents in enumerate(self.parents):
            above = self.batch_size if level + 1 == len(self.parents) else len(self.parents[level + 1])
            families: list[list] = [[] for _ in range(above)]
            for node, parent in zip(nodes, parents.tolist(), strict=True):
                families[parent].append(node)
            is_root = level + 1 == len(self.parents)
            nodes = [family[0] if len(family) == 1 and not is_root else family for family in families]
        return [_without_single(root) for root in nodes]

    def outline(self, tokens: Sequence[Sequence[str]] | None = None, sequence: int = 0) -> str:
        """One sequence's tree as indented lines, for people.

        Args:
            tokens (sequence of sequences of `str`, *optional*): tokens of each sequence; by default their positions.
            sequence (`int`, *optional*, defaults to 0): which one.

        Raises:
            ValueError: a sequence that is not there.
        """
        if not 0 <= sequence < self.batch_size:
            raise ValueError(f"`sequence` must lie in [0, {self.batch_size}), got {sequence}")
        lines: list[str] = []

        def name(leaf: int) -> str:
            return str(leaf) if tokens is None else tokens[sequence][leaf]

        def add(node: Any, depth: int) -> None:
            if all(isinstance(child, int) for child in node):
                lines.append("  " * depth + " ".join(map(name, node)))
                return
            lines.append("  " * depth + f"({len(node)} children)")
            for child in node:
                add([child] if isinstance(child, int) else child, depth + 1)

        add(self.nested()[sequence], 0)
        hidden = len(lines) - MAX_OUTLINE_LINES
        return "\n".join(lines if hidden <= 0 else [*lines[:MAX_OUTLINE_LINES], f"... {hidden} more lines"])

    def __repr__(self) -> str:
        shape = f"branching={self.branching}" if self.branching is not None else f"{len(self.parents)} levels"
        if self.root_tokens is not None:
            shape += f", {self.root_tokens.shape[1]} root tokens"
        lengths = self.lengths.tolist()
        shown = lengths if len(lengths) <= 8 else f"[{', '.join(map(str, lengths[:8]))}, ...]"
        return f"{type(self).__name__}({shape}, lengths={shown}, size={self.size})"


def _root_places(lengths: torch.Tensor, token: int, size: int) -> torch.Tensor:
    """Where a root token is in each sequence, `size` where it has none: int64 `(B,)`."""
    if isinstance(token, bool) or not isinstance(token, int):
        raise ValueError(f"`root_tokens` must be integers, got {token!r}")
    places = lengths + token if token < 0 else torch.full_like(lengths, token)
    return torch.where((places >= 0) & (places < lengths), places, size)


def _check_branching(branching: int | Sequence[int | None], size: int) -> tuple[int | None, ...]:
    if isinstance(branching, int) and not isinstance(branching, bool):
        _check_factor(branching)
        factors, left = [], size
        while left > 1 or not factors:
            factors.append(branching)
            left = -(-left // branching)
        return tuple(factors)
    factors, left = list(branching), size
    if not factors:
        raise ValueError("`branching` must have at least one level, got none")
    for level, factor in enumerate(factors):
        if factor is None:
            if level + 1 < len(factors):
                raise ValueError(f"`branching` must have None at the last level only, got {tuple(factors)}")
            left = min(left, 1)
        else:
            _check_factor(factor)
            left = -(-left // factor)
    if left > 1:
        raise ValueError(
            f"`branching` {tuple(factors)} leaves {left} roots for {size} tokens: add a level, or None for all that is left"
        )
    return tuple(factors)


def _check_factor(factor: Any) -> None:
    if isinstance(factor, bool) or not isinstance(factor, int) or factor < 2:
        raise ValueError(f"`branching` must be integers of at least 2, or None at the last level, got {factor!r}")


def _check_grid_branching(branching: Any, height: int, width: int) -> list[tuple[int, int]]:
    """Rows and columns of blocks that a node has at each level, the root last."""
    steps, left = [], (height, width)
    if isinstance(branching, int) and not isinstance(branching, bool):
        _check_factor(branching)
        branching = [branching] * max(1, len(_check_branching(branching, max(height, width))))
    entries = list(branching)
    for level, entry in enumerate(entries):
        if entry is None and level + 1 < len(entries):
            raise ValueError(f"`branching` must have None at the last level only, got {entries}")
        step = left if entry is None else _pair(entry)
        steps.append(step)
        left = tuple(-(-extent // factor) for extent, factor in zip(left, step, strict=True))
    if not steps or left != (1, 1):
        raise ValueError(f"`branching` {entries} leaves {left[0]} by {left[1]} roots: add a level, or None")
    return steps


def _pair(entry: Any) -> tuple[int, int]:
    pair = (entry, entry) if isinstance(entry, int) else tuple(entry)
    if len(pair) != 2 or not all(isinstance(each, int) and each >= 1 for each in pair) or pair == (1, 1):
        raise ValueError(f"`branching` must be integers or pairs of at least 1, not both 1, got {entry!r}")
    return pair


def _first_of_each(outer: torch.Tensor, inner: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The least of `positions (n,)` among those with the same pair of `outer` (not negative) and `inner`."""
    names, inner = torch.unique(inner, return_inverse=True)
    pairs, group = torch.unique(outer * len(names) + inner, return_inverse=True)
    return torch.full_like(pairs, torch.iinfo(torch.long).max).scatter_reduce(0, group, positions, "amin")[group]


def _in_tree_order(
    positions: torch.Tensor, columns: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Sort leaves by the columns, the last one (the coarsest) first; equal ones stay in their order."""
    columns = list(columns)
    for level in range(len(columns)):
        index = columns[level].argsort(stable=True)
        positions, columns = positions[index], [column[index] for column in columns]
    return positions, columns


def _is_one_a_row(column: torch.Tensor, rows: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Whether the entries of each row, `(leaves,)` with their rows likewise, are all the same: bool `(B,)`."""
    least = torch.full((batch_size,), torch.iinfo(torch.long).max, device=column.device)
    most = torch.full((batch_size,), -1, device=column.device)
    return most.scatter_reduce(0, rows, column, "amax") <= least.scatter_reduce(0, rows, column, "amin")


def _changes(column: torch.Tensor) -> torch.Tensor:
    """Whether an entry differs from the one before it; the first one does."""
    changes = torch.ones_like(column, dtype=torch.bool)
    changes[1:] = column[1:] != column[:-1]
    return changes


def _levels_of(nested: Sequence[Any]) -> tuple[list[torch.Tensor], list[int], list[int], list[int]]:
    """Parents of each level from the leaves up, position and row of each leaf, and depth of each row, of nested lists."""
    # From the roots down; a leaf above the last level goes down with it, by nodes with one child.
    entries: list[tuple[Any, int, Any]] = []
    for row, root in enumerate(nested):
        if not isinstance(root, list | tuple):
            raise ValueError(f"`nested` must hold one list a sequence, got {root!r} for sequence {row}")
        entries.append((root, row, None))
    parents, depths = [], [0] * len(entries)
    while any(isinstance(entry, list | tuple) for entry, _, _ in entries):
        below: list[tuple[Any, int, Any]] = []
        above: list[int] = []
        for index, (entry, row, path) in enumerate(entries):
            if not isinstance(entry, list | tuple):
                below.append((entry, row, path))
                above.append(index)
                continue
            if len(entry) == 0:
                raise ValueError(f"`nested` must not hold a list without entries, got one in sequence {row}")
            on_path = path
            while on_path is not None:
                if on_path[0] is entry:
                    raise ValueError(f"`nested` must not hold a list that holds itself, got one in sequence {row}")
                on_path = on_path[1]
            depths[row] = len(parents) + 1
            below += [(child, row, (entry, path)) for child in entry]
            above += [index] * len(entry)
        parents.append(torch.tensor(above))
        entries = below
    leaves, rows = [], []
    for entry, row, _ in entries:
        try:
            leaves.append(operator.index(entry))
        except TypeError:
            raise ValueError(f"`nested` must hold lists and integers, got {entry!r} in sequence {row}") from None
        rows.append(row)
    return parents[::-1], leaves, rows, depths


def _check_positions(row: int, leaves: list[int]) -> None:
    seen, length = set(), len(leaves)
    for leaf in leaves:
        if leaf in seen:
            raise ValueError(f"`nested` must hold every token once, got token {leaf} twice in sequence {row}")
        seen.add(leaf)
    for leaf in range(length):
        if leaf not in seen:
            raise ValueError(
                f"`nested` must hold the tokens 0 to {length - 1} of sequence {row}, which has {length} leaves: token "
                f"{leaf} is missing"
            )


def _split_families(
    parents: Sequence[torch.Tensor], max_family_size: int | None
) -> tuple[list[torch.Tensor], list[int]]:
    """Put nodes of their own between families that are too large and their parent; also the `unsplit_levels`."""
    if max_family_size is None:
        return list(parents), list(range(len(parents)))
    if max_family_size < 2:
        raise ValueError(f"`max_family_size` must be at least 2, got {max_family_size}")
    result, levels = [], []
    for level, current in enumerate(parents):
        while len(current):
            nodes, node, counts = torch.unique_consecutive(current, return_inverse=True, return_counts=True)
            if int(counts.max()) <= max_family_size:
                break
            runs = -(-counts // max_family_size)
            slot = torch.arange(len(current), device=current.device) - (counts.cumsum(0) - counts)[node]
            run = slot * runs[node] // counts[node]
            names = (runs.cumsum(0) - runs)[node] + run
            result.append(names)
            levels.append(level)
            current = nodes.repeat_interleave(runs)
        result.append(current)
        levels.append(level)
    return result, levels


def _group(parents: torch.Tensor, num_parents: int) -> TreeLevel:
    """The families of a level; those of similar size together where one width for all would waste much."""
    num_nodes, device = len(parents), parents.device
    if num_parents == 0:
        return TreeLevel((parents.view(0, 1),), parents, parents)
    counts = torch.bincount(parents, minlength=num_parents)
    slot = torch.arange(num_nodes, device=device) - (counts.cumsum(0) - counts)[parents]
    size_class = counts.clamp_min(1).double().log2().ceil().long()
    together = num_parents * int(counts.max()) ** 2
    if together <= 2 * int((4**size_class).sum()):
        size_class = torch.zeros_like(size_class)
    children, slots = [], torch.empty(num_nodes, dtype=torch.long, device=device)
    families, num_slots, num_families = torch.empty(num_parents, dtype=torch.long, device=device), 0, 0
    for each in torch.unique(size_class).tolist():
        members = (size_class == each).nonzero().squeeze(1)
        width = max(int(counts[members].max()), 1)
        place = torch.full((num_parents,), -1, dtype=torch.long, device=device)
        place[members] = torch.arange(len(members), device=device)
        nodes = (place[parents] >= 0).nonzero().squeeze(1)
        index = place[parents[nodes]] * width + slot[nodes]
        group = torch.full((len(members) * width,), num_nodes, dtype=torch.long, device=device)
        group[index] = nodes
        children.append(group.view(-1, width))
        slots[nodes] = num_slots + index
        families[members] = num_families + torch.arange(len(members), device=device)
        num_slots += group.numel()
        num_families += len(members)
    return TreeLevel(tuple(children), slots, families)


def _without_single(node: Any) -> Any:
    """Nested lists without lists of one entry, but for the outermost."""
    while isinstance(node, list) and len(node) == 1 and isinstance(node[0], list):
        node = node[0]
    return node
