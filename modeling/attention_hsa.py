# Copyright 2026 The hkt-hf authors. Licensed under the Apache License, Version 2.0.
"""Hierarchical Self-Attention (arXiv 2509.15448, "HSA"): softmax attention with blocks of equal weights along a tree.

For leaves `i`, `j` in different children `B`, `C` of their lowest common ancestor, the weight of `j` in row `i` is one number for
the whole block. Of all row-stochastic matrices with these ties HSA is the one with the least KL divergence to softmax attention,
summed over rows (Theorem 3.2), and it takes `O(N b)` operations, with `b` the size of a family.

Notation: `B` batch, `H` heads, `N` length, `d` head width; `rho(A)` means over the leaves of a node `A`, `|A|` their number. In
each family the scores of siblings are `S[B, C] = scale * rho_q(B) . rho_k(C) + eps(B) . eps(C) + log |C|`, with `-phi(B)` on the
diagonal; a row softmax gives what a child keeps for itself and gives its siblings, and its log-sum-exp the energy of the parent,
`phi(A) = -sum_B |B| / |A| * logsumexp(S[B])`. The paper has the squared form of the energies; the dot form, the energy of a leaf
(its own score, so that a flat tree is standard attention) and the causal form are ours.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .checks_common import values_can_be_read
from .memory_common import keep_freed_memory
from .tree_hsa import SignalTree, TreeLevel


MASKED = -1e30
"""Stands for minus infinity and stays finite, so that empty families have finite gradients. Float16 can't hold it."""


def hierarchical_self_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tree: SignalTree,
    *,
    mask: torch.Tensor | None = None,
    eps: Sequence[torch.Tensor | None] | None = None,
    self_loop: bool = True,
    is_causal: bool = False,
    scale: float | None = None,
    row_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention along a tree, differentiable in everything but the tree.

    Computed in float32, or in float64 where that is what comes in, and returned in the dtype of `value`.

    Args:
        query (`torch.Tensor`): `(B, H, N, d)`.
        key (`torch.Tensor`): likewise.
        value (`torch.Tensor`): `(B, H, N, e)`, any width.
        tree ([`SignalTree`]): of `B` sequences padded to `N`.
        mask (`torch.Tensor`, *optional*): `(B, N)`, nonzero = real: further leaves to leave out. They get zeros and no weight.
        eps (sequence of `torch.Tensor`, *optional*): for each level below the roots, from the leaves up, position vectors of
            siblings `(c, w)` or `(H, c, w)`, by their place in the family, `c` at least the largest family; their products are
            added to the scores. `None` for a level without.
        self_loop (`bool`, *optional*, defaults to `True`): whether a leaf attends to itself; with `False` it does only where
            it has no one else.
        is_causal (`bool`, *optional*, defaults to `False`): the causal form (ours): a leaf attends to itself and to the
            subtrees that lie wholly before it, each row by its own query; nothing depends on later leaves. `O(N b log N)`.
        scale (`float`, *optional*): factor of the scores, `d ** -0.5` by default.
        row_weights (`torch.Tensor`, *optional*): `(B, N)`, at least 0: how much the divergence of each row counts (ours). A row
            of weight 0 still gets an output, but has no say in the others'. Not with `is_causal`, whose rows are their own.

    Returns:
        `torch.Tensor`: `(B, H, N, e)`, zeros where there is no leaf.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together (the message names the argument), or a causal form with
            row weights or along a tree whose leaves are not in order.
    """
    return _attend(query, key, value, tree, mask, eps, self_loop, is_causal, scale, row_weights)[0]


def hsa_energy(
    query: torch.Tensor,
    key: torch.Tensor,
    tree: SignalTree,
    *,
    mask: torch.Tensor | None = None,
    eps: Sequence[torch.Tensor | None] | None = None,
    self_loop: bool = True,
    scale: float | None = None,
    row_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Energy of the root, `phi`.

    With `log Z_i` the log-sum-exp of a row's scores in flat attention, the mean over rows of `phi + log Z_i` is the mean KL
    divergence of HSA from flat attention (ours).

    Args:
        query, key, tree, mask, eps, self_loop, scale, row_weights: as in [`hierarchical_self_attention`].

    Returns:
        `torch.Tensor`: `(B, H)`, 0 for a sequence without leaves.

    Raises:
        ValueError: as [`hierarchical_self_attention`].
    """
    return _attend(query, key, key[..., :0], tree, mask, eps, self_loop, False, scale, row_weights)[1]


def _attend(query, key, value, tree, mask, eps, self_loop, is_causal, scale, row_weights):
    _check(query, key, value, tree, mask, eps, is_causal, row_weights)
    dtype = torch.promote_types(value.dtype, torch.float32)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if query.device.type == "cpu" and not torch.compiler.is_compiling():
        keep_freed_memory()
    with torch.autocast(query.device.type, enabled=False):
        states = [tensor.to(dtype) for tensor in (query, key, value)]
        eps = [None] * len(tree_levels(tree)) if eps is None else [None if e is None else e.to(dtype) for e in eps]
        if is_causal:
            output, phi = _causal(*states, tree, mask, eps, self_loop, scale), None
        else:
            # The places of root tokens among their siblings are those of a tree that is not regular.
            is_regular = tree.branching is not None and (tree.root_tokens is None or eps[-1] is None)
            along = _regular if is_regular else _ragged
            rows = None if row_weights is None else row_weights.to(dtype)
            output, phi = along(*states, tree, mask, rows, eps, self_loop, scale)
    return output.to(value.dtype), phi


def tree_levels(tree: SignalTree) -> Sequence:
    """Levels below the roots, without building more than the tree has."""
    return tree.branching if tree.branching is not None else tree.parents


def _family_scores(query, key, counts, phi, eps, self_loop: bool, scale: float) -> torch.Tensor:
    """`S` of families, `(..., F, c, c)`, from means `(..., F, c, d)`, leaves of each child `(..., F, c)` and `phi` or `None`."""
    scores = scale * query @ key.transpose(-1, -2)
    if eps is not None:
        positions = eps[..., : scores.shape[-1], :]
        # A family may have more places than any has children: the padding of a regular tree, which gets no weight.
        positions = F.pad(positions, (0, 0, 0, scores.shape[-1] - positions.shape[-2]))
        scores = scores + (positions @ positions.transpose(-1, -2)).unsqueeze(-3)
    bias = torch.where(counts > 0, counts.clamp_min(1).log(), MASKED)
    scores = scores + bias.unsqueeze(-2)
    if phi is None and self_loop:
        return scores
    eye = torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
    if phi is None:
        return scores.masked_fill(eye, MASKED)
    return torch.where(eye, -phi.unsqueeze(-1), scores)


def _up(query, key, value, counts, rows, phi, eps, self_loop: bool, scale: float):
    """One level up: what the way down needs of the families, then means, counts, row weights and `phi` of the parents.

    `rows` are the row weights of the children, or `None` where these are the counts.
    """
    scores = _family_scores(query, key, counts, phi, eps, self_loop, scale)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.unsqueeze(-1)).exp()
    kept = weights.diagonal(dim1=-2, dim2=-1)
    given = (weights - torch.diag_embed(kept)) @ value
    total = counts.sum(-1)
    share = counts / total.clamp_min(1).unsqueeze(-1)
    total_rows, row_share = None, share
    if rows is not None:
        total_rows = rows.sum(-1)
        # Where no row counts, they are alike: what equal weights that go to zero come to.
        counts_here = (total_rows > 0).unsqueeze(-1)
        row_share = torch.where(counts_here, rows / torch.where(counts_here, total_rows.unsqueeze(-1), 1.0), share)
    means = [
        (each.unsqueeze(-2) @ states).squeeze(-2)
        for each, states in ((row_share, query), (share, key), (share, value))
    ]
    return given, kept, means, total, total_rows, -(row_share * lse).sum(-1)


def _regular(query, key, value, tree, mask, rows, eps, self_loop, scale):
    if tree.size == 0:
        return value, value.new_zeros(value.shape[:2])
    at_root = None
    if mask is None and tree.root_tokens is None and bool((tree.lengths == tree.size).all()):
        counts = query.new_ones(tree.size)
        real = None
    else:
        real = grouped = tree.mask if mask is None else tree.mask & (mask != 0)
        if tree.root_tokens is not None:
            at_root = _RootTokens(query, key, value, real, rows, tree, self_loop, scale)
            grouped = real & ~tree.is_root_token
        query, key, value = (_without(states, grouped[:, None]) for states in (query, key, value))
        counts = grouped[:, None].to(query.dtype)  # (B, 1, N): the same for all heads
    if rows is not None:
        rows = rows[:, None] * counts
    leaf_values = value
    phi, saved = None, []
    for level, branching in enumerate(tree.branching):
        length = query.shape[-2]
        width = max(length, 1) if branching is None else branching
        padding = -length % width

        def families(states, width=width, padding=padding, dim=-2):
            if padding:
                states = F.pad(states, (0, 0) * (-dim - 1) + (0, padding))
            return states.unflatten(dim, (-1, width))

        query, key, value = (families(states) for states in (query, key, value))
        counts = families(counts, dim=-1)
        rows, phi = (None if states is None else families(states, dim=-1) for states in (rows, phi))
        is_below_root = at_root is not None and level + 1 == len(tree.branching)
        if is_below_root:
            query, key, value, counts, rows, phi = at_root.join(query, key, value, counts, rows, phi)
        given, kept, (query, key, value), counts, rows, phi = _up(
            query, key, value, counts, rows, phi, eps[level], self_loop, scale
        )
        if is_below_root:
            given, kept = at_root.leave(given, kept)
        saved.append((given, kept, length))
    mass = output = None
    for given, kept, length in reversed(saved):
        if mass is not None:
            given = output.unsqueeze(-2) + mass[..., None, None] * given
            kept = mass.unsqueeze(-1) * kept
        output = given.flatten(-3, -2)[..., :length, :]
        mass = kept.flatten(-2, -1)[..., :length]
    output = output + mass.unsqueeze(-1) * leaf_values
    if at_root is not None:
        output = at_root.put(output)
    return output if real is None else output * real[:, None, :, None], phi.squeeze(-1)


class _RootTokens:
    """The root tokens of a regular tree: apart from the groups on the way up, children of the root at its end."""

    def __init__(self, query, key, value, real, rows, tree: SignalTree, self_loop: bool, scale: float):
        self.places = tree.root_tokens
        found = self.places < tree.size
        here = self.places.clamp(max=tree.size - 1)

        def pick(states):  # (B, H, N, e) to (B, H, r, e)
            return states.gather(2, here[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))

        is_real = found & real.gather(1, here)
        self.counts = is_real[:, None].to(query.dtype)
        self.query, self.key, self.value = (_without(pick(each), is_real[:, None]) for each in (query, key, value))
        self.rows = None if rows is None else rows.gather(1, here)[:, None] * self.counts
        own = scale * (self.query * self.key).sum(-1) if self_loop else torch.full_like(self.query[..., 0], MASKED)
        self.phi = -own

    def join(self, *states):
        """The families of the root `(B, H, 1, c, ...)`, and the root tokens behind their children."""
        own = (self.query, self.key, self.value, self.counts, self.rows, self.phi)
        return (
            None if here is None else torch.cat([here, each.unsqueeze(2)], dim=3)
            for here, each in zip(states, own, strict=True)
        )

    def leave(self, given: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the output of the root tokens; what is left is that of the others."""
        others = given.shape[3] - self.places.shape[1]
        self.output = (given[..., others:, :] + kept[..., others:, None] * self.value.unsqueeze(2)).squeeze(2)
        return given[..., :others, :], kept[..., :others]

    def put(self, output: torch.Tensor) -> torch.Tensor:
        """The output `(B, H, N, e)` with that of the root tokens; what a sequence lacks goes behind its end and is cut off."""
        places = self.places[:, None, :, None].expand_as(self.output)
        return F.pad(output, (0, 0, 0, 1)).scatter(2, places, self.output)[:, :, :-1]


def _ragged(query, key, value, tree, mask, rows, eps, self_loop, scale):
    batch_size, heads, size, width = value.shape
    order = tree.order

    def pack(states):  # (B, H, N, e) to (H, leaves, e)
        return states.transpose(0, 1).flatten(1, 2).index_select(1, order)

    query, key, value = pack(query), pack(key), pack(value)
    counts = query.new_ones(len(order))
    if mask is not None:
        real = (mask != 0).flatten()[order]
        counts = real.to(query.dtype)
        query, key, value = (_without(states, real) for states in (query, key, value))
    leaf_values = value
    if rows is not None:
        rows = rows.flatten()[order] * counts
    phi, saved = None, []
    for index, level in enumerate(tree.levels):
        parts = []
        padded = [F.pad(states, (0, 0, 0, 1)) for states in (query, key, value)]
        padded_counts = F.pad(counts, (0, 1))
        padded_rows, padded_phi = (None if states is None else F.pad(states, (0, 1)) for states in (rows, phi))
        for children in level.children:
            gathered = [_gather(states, children) for states in padded]
            group_rows = None if rows is None else padded_rows[children]
            group_phi = None if phi is None else padded_phi[:, children]
            parts.append(_up(*gathered, padded_counts[children], group_rows, group_phi, eps[index], self_loop, scale))
        given = torch.cat([part[0].flatten(1, 2) for part in parts], dim=1).index_select(1, level.slots)
        kept = torch.cat([part[1].flatten(1, 2) for part in parts], dim=1).index_select(1, level.slots)
        query, key, value = (
            torch.cat([part[2][which] for part in parts], dim=1).index_select(1, level.families) for which in range(3)
        )
        counts = torch.cat([part[3] for part in parts])[level.families]
        rows = None if rows is None else torch.cat([part[4] for part in parts])[level.families]
        phi = torch.cat([part[5] for part in parts], dim=1).index_select(1, level.families)
        saved.append((given, kept))
    output = mass = None
    for index in reversed(range(len(saved))):
        given, kept = saved[index]
        if mass is not None:
            parents = tree.parents[index]
            mass = mass.index_select(1, parents)
            given = output.index_select(1, parents) + mass.unsqueeze(-1) * given
            kept = mass * kept
        output, mass = given, kept
    output = output + mass.unsqueeze(-1) * leaf_values
    if mask is not None:
        output = _without(output, real)
    full = output.new_zeros(heads, batch_size * size, width).index_copy(1, order, output)
    return full.unflatten(1, (batch_size, size)).transpose(0, 1), phi.transpose(0, 1)


def _without(states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """`states (..., n, e)` with zeros where `real (..., n)` is false, whatever stands there: NaN times zero is NaN."""
    return torch.where(real.unsqueeze(-1), states, 0.0)


def _gather(states: torch.Tensor, children: torch.Tensor) -> torch.Tensor:
    """`(H, n, e)` by `(F, c)` to `(H, F, c, e)`."""
    return states.index_select(1, children.flatten()).unflatten(1, children.shape)


def _causal(query, key, value, tree, mask, eps, self_loop, scale):
    batch_size, heads, size, width = value.shape
    order = tree.order

    def pack(states):
        return states.transpose(0, 1).flatten(1, 2).index_select(1, order)

    leaf_query, leaf_key, leaf_value = pack(query), pack(key), pack(value)
    counts = leaf_query.new_ones(len(order))
    if mask is not None:
        real = (mask != 0).flatten()[order]
        counts = real.to(query.dtype)
        leaf_query, leaf_key, leaf_value = (_without(states, real) for states in (leaf_query, leaf_key, leaf_value))
    key, value = leaf_key, leaf_value
    own = scale * (leaf_query * leaf_key).sum(-1)
    scores, values = [], []
    nodes = torch.arange(len(order), device=order.device)  # the ancestor of each leaf at the level
    for index, level in enumerate(tree.levels):
        parents = tree.parents[index]
        place = _places(parents, tree.batch_size if index + 1 == len(tree.parents) else len(tree.parents[index + 1]))
        widest = max(children.shape[1] for children in level.children)
        siblings = _one_table(level, widest)[parents]  # of each node, (nodes, c)
        earlier = (torch.arange(widest, device=order.device) < place[:, None]) & (siblings < len(parents))
        rows = siblings[nodes]
        padded_key, padded_value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
        padded_counts = F.pad(counts, (0, 1))[rows]
        level_scores = scale * (_gather(padded_key, rows) @ leaf_query.unsqueeze(-1)).squeeze(-1)
        if eps[index] is not None:
            positions = eps[index]
            products = positions @ positions.transpose(-1, -2)
            level_scores = level_scores + products[..., place[nodes], :widest]
        visible = earlier[nodes] & (padded_counts > 0)
        level_scores = torch.where(visible, level_scores + padded_counts.clamp_min(1).log(), MASKED)
        scores.append(level_scores)
        values.append((padded_value, rows))
        if index == 0 and eps[0] is not None:
            own = own + (positions.square().sum(-1))[..., place]
        # Means of the parents, of all their leaves: only whole subtrees in the past are looked at.
        total = counts.new_zeros(int(parents.max()) + 1 if len(parents) else 0).index_add(0, parents, counts)
        share = counts / total.clamp_min(1)[parents]
        num_parents = tree.batch_size if index + 1 == len(tree.parents) else len(tree.parents[index + 1])
        key, value = (
            states.new_zeros(heads, num_parents, states.shape[-1]).index_add(1, parents, share.unsqueeze(-1) * states)
            for states in (key, value)
        )
        counts = counts.new_zeros(num_parents).index_add(0, parents, counts)
        nodes = parents[nodes]
    if not self_loop:
        has_past = torch.cat([each > MASKED / 2 for each in scores], dim=-1).any(-1)
        own = torch.where(has_past, MASKED, own)
    weights = torch.cat([own.unsqueeze(-1), *scores], dim=-1).softmax(-1)
    output, start = weights[..., :1] * leaf_value, 1
    for padded_value, rows in values:
        part = weights[..., start : start + rows.shape[1]]
        output = output + (part.unsqueeze(-2) @ _gather(padded_value, rows)).squeeze(-2)
        start += rows.shape[1]
    if mask is not None:
        output = _without(output, real)
    full = output.new_zeros(heads, batch_size * size, width).index_copy(1, order, output)
    return full.unflatten(1, (batch_size, size)).transpose(0, 1)


def _places(parents: torch.Tensor, num_parents: int) -> torch.Tensor:
    """The place of each node among its siblings, from 0."""
    counts = torch.bincount(parents, minlength=num_parents)
    return torch.arange(len(parents), device=parents.device) - (counts.cumsum(0) - counts)[parents]


def _one_table(level: TreeLevel, widest: int) -> torch.Tensor:
    """All families of a level in one table `(parents, widest)`, in the order of the parents."""
    num_nodes = len(level.slots)
    groups = [F.pad(children, (0, widest - children.shape[1]), value=num_nodes) for children in level.children]
    return torch.cat(groups)[level.families]


def hsa_matrix(
    query: torch.Tensor,
    key: torch.Tensor,
    tree: SignalTree,
    *,
    mask: torch.Tensor | None = None,
    eps: Sequence[torch.Tensor | None] | None = None,
    self_loop: bool = True,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """The attention weights as one matrix, computed from the definition node by node: the reference, slow.

    Args:
        query, key, tree, mask, eps, self_loop, is_causal, scale: as in [`hierarchical_self_attention`].

    Returns:
        `torch.Tensor`: `(B, H, N, N)`, float64; rows sum to 1, those without a leaf to 0.

    Raises:
        ValueError: as [`hierarchical_self_attention`].
    """
    _check(query, key, key, tree, mask, eps, is_causal)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    batch_size, heads, size, _ = query.shape
    query, key = query.double(), key.double()
    real = tree.mask if mask is None else tree.mask & (mask != 0)
    matrix = query.new_zeros(batch_size, heads, size, size)
    roots = _as_nodes(tree)
    for row in range(batch_size):
        for head in range(heads):
            positions = None if eps is None else [
                None if each is None else (each if each.dim() == 2 else each[head % len(each)]).double() for each in eps
            ]  # fmt: skip
            reference = _Reference(query[row, head], key[row, head], real[row], positions, self_loop, scale)
            fill = reference.fill_causal if is_causal else reference.fill
            fill(roots[row], matrix[row, head])
    return matrix


class _Node:
    """A node of the reference: its level, its place among its siblings, and children or a leaf."""

    def __init__(self, level: int, place: int, children: list["_Node"], leaf: int | None = None):
        self.level, self.place, self.children, self.leaf = level, place, children, leaf


def _as_nodes(tree: SignalTree) -> list[_Node]:
    nodes = [_Node(0, 0, [], leaf) for leaf in (tree.order % max(tree.size, 1)).tolist()]
    for level, parents in enumerate(tree.parents):
        count = tree.batch_size if level + 1 == len(tree.parents) else len(tree.parents[level + 1])
        above = [_Node(level + 1, 0, []) for _ in range(count)]
        for node, parent in zip(nodes, parents.tolist(), strict=True):
            node.place = len(above[parent].children)
            above[parent].children.append(node)
        nodes = above
    return nodes


class _Reference:
    """The recursion of the paper for one sequence and head, in float64."""

    def __init__(self, query, key, real, eps, self_loop, scale):
        self.query, self.key, self.real, self.eps, self.self_loop, self.scale = query, key, real, eps, self_loop, scale

    def leaves(self, node: _Node) -> list[int]:
        """Real leaves below a node."""
        if node.leaf is not None:
            return [node.leaf] if self.real[node.leaf] else []
        return [leaf for child in node.children for leaf in self.leaves(child)]

    def score(self, first: _Node, second: _Node) -> torch.Tensor:
        """`-psi`, the mean score of a block."""
        query, key = self.query[self.leaves(first)].mean(0), self.key[self.leaves(second)].mean(0)
        return self.scale * query @ key + self.position_product(first, second)

    def position_product(self, first: _Node, second: _Node) -> torch.Tensor | float:
        """`eps . eps` of two siblings."""
        eps = None if self.eps is None else self.eps[first.level]
        return 0.0 if eps is None else eps[first.place] @ eps[second.place]

    def log_sums(self, family: list[_Node]) -> tuple[torch.Tensor, torch.Tensor]:
        """`log Z` of each child with leaves and the scores of the family, with `-phi` on the diagonal."""
        rows = []
        for first in family:
            row = []
            for second in family:
                if first is second:
                    row.append(-self.phi(first))
                else:
                    row.append(
                        self.score(first, second) + torch.tensor(float(len(self.leaves(second)))).double().log()
                    )
            rows.append(torch.stack(row))
        scores = torch.stack(rows)
        return scores.logsumexp(-1), scores

    def phi(self, node: _Node) -> torch.Tensor:
        """The energy of a node."""
        if node.leaf is not None:
            alone = torch.tensor(-MASKED, dtype=torch.double)
            return -self.score(node, node) if self.self_loop else alone
        family = [child for child in node.children if self.leaves(child)]
        sizes = torch.tensor([len(self.leaves(child)) for child in family], dtype=torch.double)
        return -(sizes / sizes.sum() * self.log_sums(family)[0]).sum()

    def fill(self, node: _Node, matrix: torch.Tensor, mass: torch.Tensor | float = 1.0) -> None:
        """Write the weights among the leaves of a node that has `mass` of each of their rows."""
        if node.leaf is not None:
            if self.real[node.leaf]:
                matrix[node.leaf, node.leaf] = mass
            return
        family = [child for child in node.children if self.leaves(child)]
        if not family:
            return
        log_sums, scores = self.log_sums(family)
        for index, first in enumerate(family):
            weights = (scores[index] - log_sums[index]).exp()
            self.fill(first, matrix, mass * weights[index])
            for other, second in enumerate(family):
                if other != index:
                    columns = self.leaves(second)
                    for leaf in self.leaves(first):
                        matrix[leaf, columns] = mass * weights[other] / len(columns)

    def fill_causal(self, root: _Node, matrix: torch.Tensor) -> None:
        """Write the weights of the causal form: a softmax a row."""

        def visit(node: _Node, past: list[tuple[_Node, _Node]]) -> None:
            if node.leaf is None:
                for index, child in enumerate(node.children):
                    visit(
                        child, [*past, *((child, before) for before in node.children[:index] if self.leaves(before))]
                    )
                return
            if not self.real[node.leaf]:
                return
            query = self.query[node.leaf]
            scores = [
                self.scale * query @ self.key[self.leaves(before)].mean(0)
                + self.position_product(child, before)
                + torch.tensor(float(len(self.leaves(before)))).double().log()
                for child, before in past
            ]
            own = self.score(node, node) if self.self_loop or not scores else torch.tensor(MASKED).double()
            weights = torch.stack([own, *scores]).softmax(-1)
            matrix[node.leaf, node.leaf] = weights[0]
            for weight, (_, before) in zip(weights[1:], past, strict=True):
                columns = self.leaves(before)
                matrix[node.leaf, columns] = weight / len(columns)

        visit(root, [])


def check_is_tree(tree: SignalTree) -> None:
    """ValueError for anything else, also for a tree of other code, such as that which came with a checkpoint."""
    if not isinstance(tree, SignalTree):
        wanted, got = (f"{each.__module__}.{each.__qualname__}" for each in (SignalTree, type(tree)))
        raise ValueError(f"`tree` must be a {wanted}, got a {got}")


def _check(query, key, value, tree, mask, eps, is_causal: bool, row_weights=None) -> None:
    for name, states in (("query", query), ("key", key), ("value", value)):
        if states.dim() != 4:
            raise ValueError(f"`{name}` must be (batch, heads, length, width), got {tuple(states.shape)}")
        if not states.is_floating_point():
            raise ValueError(f"`{name}` must be of a floating-point type, got {states.dtype}")
    if query.shape != key.shape or query.shape[:3] != value.shape[:3]:
        raise ValueError(
            "`query`, `key` and `value` must agree in batch, heads and length, and query and key in width, got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    check_is_tree(tree)
    batch_size, heads, size, _ = query.shape
    if (tree.batch_size, tree.size) != (batch_size, size):
        raise ValueError(
            f"`tree` is of {tree.batch_size} sequences padded to {tree.size} tokens, got states of {batch_size} sequences of {size}"
        )
    if tree.device != query.device:
        raise ValueError(f"`tree` is on {tree.device} and `query` on {query.device}: move it with `tree.to(device)`")
    others = {"key": key, "value": value, "mask": mask, "row_weights": row_weights}
    for name, tensor in [*others.items(), *(("eps", positions) for positions in eps or ())]:
        if tensor is not None and tensor.device != query.device:
            raise ValueError(f"`{name}` must be on {query.device}, as `query`, got one on {tensor.device}")
    if mask is not None and tuple(mask.shape) != (batch_size, size):
        raise ValueError(f"`mask` must be {(batch_size, size)}, got {tuple(mask.shape)}")
    if eps is not None:
        levels = tree_levels(tree)
        if len(eps) != len(levels):
            raise ValueError(f"`eps` must have an entry for each of the {len(levels)} levels, got {len(eps)}")
        for level, (positions, sizes) in enumerate(zip(eps, tree.family_sizes(), strict=True)):
            largest = int(sizes.max()) if len(sizes) else 0
            if positions is None:
                continue
            if positions.dim() == 3 and positions.shape[0] not in (1, heads):
                raise ValueError(f"`eps` must be of {heads} heads at level {level}, got {tuple(positions.shape)}")
            if positions.dim() not in (2, 3) or positions.shape[-2] < largest:
                raise ValueError(
                    f"`eps` must be (siblings, width) or (heads, siblings, width) of at least {largest} siblings at level "
                    f"{level}, got {tuple(positions.shape)}"
                )
    if row_weights is not None and tuple(row_weights.shape) != (batch_size, size):
        raise ValueError(f"`row_weights` must be {(batch_size, size)}, got {tuple(row_weights.shape)}")
    if row_weights is not None and values_can_be_read(row_weights):
        refused = ~((row_weights >= 0) & row_weights.isfinite())
        if bool(refused.any()):
            raise ValueError(f"`row_weights` must be finite and at least 0, got {row_weights[refused][0].item()}")
    if row_weights is not None and is_causal:
        raise ValueError("`row_weights` can't be given with `is_causal`: its rows are not tied")
    if is_causal and not tree.is_in_order:
        raise ValueError("`is_causal` needs a tree whose leaves are in the order of their positions")
