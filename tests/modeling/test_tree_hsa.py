"""`SignalTree`: what its constructors build, and what they refuse."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from signal_trees import random_nested

from hkt_hf.modeling.tree_hsa import SignalTree


def without_single(node):
    """Nested lists without those of one entry, but for the outermost."""

    def inner(node):
        if isinstance(node, int):
            return node
        children = [inner(child) for child in node]
        return children[0] if len(children) == 1 else children

    found = inner(node)
    return found if isinstance(found, list) else [found]


@given(seed=st.integers(0, 2**32 - 1), lengths=st.lists(st.integers(1, 24), min_size=1, max_size=4))
def test_nested_lists_come_back(seed, lengths):
    generator = np.random.default_rng(seed)
    nested = [random_nested(generator, length) for length in lengths]
    tree = SignalTree.from_nested(nested)
    assert tree.nested() == [without_single(each) for each in nested]
    assert tree.lengths.tolist() == lengths and tree.size == max(lengths)
    assert SignalTree.from_nested(tree.nested()).nested() == tree.nested()


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    branching=st.one_of(
        st.integers(2, 5), st.lists(st.integers(2, 5), max_size=3).map(lambda factors: (*factors, None))
    ),
)
def test_regular_trees_group_neighbours(lengths, branching):
    tree = SignalTree.regular(lengths, branching)
    for nested, length in zip(tree.nested(), lengths, strict=True):
        nodes = list(range(length))
        for factor in tree.branching:
            width = factor or max(len(nodes), 1)
            nodes = [nodes[start : start + width] for start in range(0, len(nodes), width)]
            nodes = [node[0] if len(node) == 1 else node for node in nodes]
        expected = without_single(nodes) if length else []
        assert nested == expected
    assert tree.mask.sum(1).tolist() == lengths
    assert all((parents.diff() >= 0).all() for parents in tree.parents)


def test_root_tokens_are_children_of_the_root():
    """By themselves, in order; the others are in the groups that they are in without."""
    tree = SignalTree.regular([18, 5, 2, 1, 0], 4, root_tokens=(0, -1), size=20)
    groups = [[1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert tree.nested() == [[0, groups, 16, 17], [0, [1, 2, 3], 4], [0, 1], [0], []]
    assert tree.mask.sum(1).tolist() == [18, 5, 2, 1, 0] and tree.is_in_order
    assert (
        SignalTree.regular([5], 4, root_tokens=(0, -1)).nested() == tree.nested()[1:2]
    )  # whatever else is in the batch
    assert SignalTree.regular([18], (4, None), root_tokens=(0, -1)).nested() == [[0, *groups, 16, 17]]
    inside = SignalTree.regular([6], (3, None), root_tokens=[1])
    assert inside.nested() == [[[0, 2], 1, [3, 4, 5]]] and not inside.is_in_order
    assert SignalTree.regular([4], (None,), root_tokens=(0,)).root_tokens is None  # all are children of the root


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    branching=st.sampled_from([2, 3, (4, None), (2, 3, None)]),
    tokens=st.lists(st.integers(-5, 5), max_size=3),
)
def test_root_tokens_leave_the_groups_of_the_others(lengths, branching, tokens):
    lengths[0] = max(lengths[0], 30)
    tree, plain = (SignalTree.regular(lengths, branching, root_tokens=roots) for roots in (tokens, ()))
    for length, root, other in zip(lengths, tree.nested(), plain.nested(), strict=True):
        apart = {token % length for token in tokens if -length <= token < length}
        assert apart <= {child for child in root if isinstance(child, int)}
        found, expected = pairs_in_groups(root), pairs_in_groups(other)
        assert found == {pair for pair in expected if not apart & set(pair)}


def pairs_in_groups(root):
    """Pairs of leaves that have a node in common below the root."""
    found = set()
    for child in root:
        leaves = sorted(leaves_of(child))
        found |= {(a, b) for a in leaves for b in leaves if a < b}
    return found


def leaves_of(node):
    return [node] if isinstance(node, int) else [leaf for child in node for leaf in leaves_of(child)]


def test_segments_become_nodes():
    sentences = torch.tensor([[0, 0, 1, 1, 1, 2, 2, -1], [5, 5, 3, 3, 5, 0, 0, 0]])
    paragraphs = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 9], [0, 0, 0, 0, 0, 1, 1, 1]])
    mask = torch.tensor([[1] * 7 + [0], [1] * 6 + [0] * 2])
    tree = SignalTree.from_segments([sentences, paragraphs], mask)
    # Sentence 1 lies in both paragraphs of the first row and is split; sentence 5 of the second row has a gap.
    assert tree.nested() == [[[[0, 1], [2, 3]], [4, [5, 6]]], [[[0, 1, 4], [2, 3]], 5]]
    assert tree.lengths.tolist() == [7, 6] and tree.size == 8
    assert SignalTree.from_segments([], mask).nested() == [list(range(7)), list(range(6))]
    assert SignalTree.from_segments(sentences[:1], mask[:1]).nested() == [[[0, 1], [2, 3, 4], [5, 6]]]


def test_a_grid_is_a_quadtree():
    tree = SignalTree.from_grid(4, 4, 2, batch_size=2)
    assert tree.nested() == [[[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]] * 2
    assert not tree.is_in_order
    assert SignalTree.from_grid(2, 6, [(1, 3), None]).nested() == [[[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]]
    assert SignalTree.from_grid(3, 3, [2, None]).nested() == [[[0, 1, 3, 4], [2, 5], [6, 7], 8]]
    assert SignalTree.from_grid(1, 1, 2).nested() == [[0]]


def test_joined_trees_are_children_of_one_root():
    text = SignalTree.from_nested([[[0, 1], 2], [0, 1]])
    image = SignalTree.from_grid(2, 2, 2, batch_size=2)
    joined = SignalTree.join([text, image])
    assert joined.size == 7 and joined.lengths.tolist() == [7, 6]
    assert joined.nested() == [[[[0, 1], 2], [3, 4, 5, 6]], [[0, 1], [3, 4, 5, 6]]]
    assert SignalTree.join([SignalTree.regular([0, 2], 2), image]).nested() == [[2, 3, 4, 5], [[0, 1], [2, 3, 4, 5]]]


@given(seed=st.integers(0, 2**32 - 1), length=st.integers(2, 60), cap=st.integers(2, 7))
def test_large_families_are_split(seed, length, cap):
    nested = [random_nested(np.random.default_rng(seed), length), list(range(3))]
    tree = SignalTree.from_nested(nested, max_family_size=cap)
    assert max(int(sizes.max()) for sizes in tree.family_sizes()) <= cap
    assert sorted((tree.order % tree.size)[tree.order < tree.size].tolist()) == list(range(length))
    whole = SignalTree.from_nested(nested)
    assert torch.equal(tree.order, whole.order)
    if max(int(sizes.max()) for sizes in whole.family_sizes()) <= cap:
        assert tree.nested() == whole.nested()
    runs = SignalTree.from_nested([list(range(11))], max_family_size=3).family_sizes()
    assert runs[0].tolist() == [3, 3, 3, 2]  # of about one size


@given(seed=st.integers(0, 2**32 - 1), lengths=st.lists(st.integers(1, 24), min_size=2, max_size=4))
def test_a_level_is_as_far_from_the_leaves_as_in_a_batch_of_its_own(seed, lengths):
    """The deeper trees of others add nodes with one child above, and none below."""
    generator = np.random.default_rng(seed)
    nested = [random_nested(generator, length) for length in lengths]
    together = SignalTree.from_nested(nested)
    rows = together.order // together.size
    for row, each in enumerate(nested):
        alone = SignalTree.from_nested([each])
        for level, expected in enumerate(alone.ancestors()):
            nodes = together.ancestors()[level][rows == row]
            assert torch.equal(nodes - nodes.min(), expected)
        assert all((nodes[rows == row].diff() == 0).all() for nodes in together.ancestors()[len(alone.parents) - 1 :])


def families_by_level(tree, row):
    """The families of two or more in one sequence, as sets of leaves, with the level that each is of."""
    found = []
    nodes = [[leaf] for leaf in (tree.order % tree.size).tolist()]
    rows = (tree.order // tree.size).tolist()
    for level, parents in zip(tree.unsplit_levels, tree.parents, strict=True):
        above = [[] for _ in range(max(parents.tolist()) + 1)]
        rows_above = [None] * len(above)
        for node, parent, at in zip(nodes, parents.tolist(), rows, strict=True):
            above[parent].append(node)
            rows_above[parent] = at
        found += [
            (level, family) for family, at in zip(above, rows_above, strict=True) if len(family) > 1 and at == row
        ]
        nodes, rows = [[leaf for node in family for leaf in node] for family in above], rows_above
    return found


@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.integers(1, 12), min_size=2, max_size=3),
    cap=st.sampled_from([None, 2, 3]),
)
def test_a_joined_tree_is_in_a_batch_what_it_is_alone(seed, lengths, cap):
    generator = np.random.default_rng(seed)
    first = [random_nested(generator, length) for length in lengths]
    second = [random_nested(generator, length) for length in reversed(lengths)]

    def join(rows):
        sizes = max(lengths), max(lengths) + 1  # the same positions alone and in the batch
        return SignalTree.join(
            [
                SignalTree.from_nested([each[row] for row in rows], size=size, max_family_size=cap)
                for each, size in zip((first, second), sizes, strict=True)
            ]
        )

    together = join(range(len(lengths)))
    for row in range(len(lengths)):
        alone = join([row])
        assert together.nested()[row] == alone.nested()[0]
        assert families_by_level(together, row) == families_by_level(alone, 0)


def test_padding_does_not_move_the_common_root():
    picture = SignalTree.from_grid(2, 2, 2, batch_size=2)
    narrow, wide = (SignalTree.join([SignalTree.regular([4, 4], 4, size=size), picture]) for size in (4, 5))
    assert narrow.unsplit_levels == (0, 1) and wide.unsplit_levels == (0, 1, 2)
    levels = [level for level, _ in families_by_level(narrow, 1)]
    assert [level for level, _ in families_by_level(wide, 1)] == levels == [0, 0, 1]


def test_levels_that_a_split_puts_in_are_of_the_level_they_split():
    wide, narrow = [[list(range(9)), [9]]], [[[0, 1], [2]]]
    assert SignalTree.regular([9], (3, None)).unsplit_levels == (0, 1)
    assert SignalTree.from_nested(narrow, max_family_size=2).unsplit_levels == (0, 1)
    split = SignalTree.from_nested(wide, max_family_size=2)
    assert split.unsplit_levels == (0, 0, 0, 0, 1)  # 9 tokens in 5 runs, in 3, in 2
    assert split.to("meta").unsplit_levels == split.unsplit_levels
    segments = torch.tensor([[0] * 9 + [1]])
    assert SignalTree.from_segments(segments, max_family_size=2).unsplit_levels == split.unsplit_levels
    other = SignalTree.from_nested(narrow)
    for trees in ([split, other], [other, split]):
        joined = SignalTree.join(trees)
        assert joined.unsplit_levels == (0, 0, 0, 0, 1, 2)
        # The families of the tree that was not split are at the levels they had.
        sizes = [counts.tolist() for counts in joined.family_sizes()]
        assert sizes[0].count(2) == 5 and sizes[4] == [2, 2] and sizes[5] == [2]


@given(seed=st.integers(0, 2**32 - 1), length=st.integers(1, 200))
def test_families_hold_every_node_once(seed, length):
    tree = SignalTree.from_nested([random_nested(np.random.default_rng(seed), length), [0]])
    for level, parents in zip(tree.levels, tree.parents, strict=True):
        flat = torch.cat([children.flatten() for children in level.children])
        assert torch.equal(flat[level.slots], torch.arange(len(parents)))
        assert (flat < len(parents)).sum() == len(parents)
        rows = torch.cat([torch.arange(len(group)).repeat_interleave(group.shape[1]) + sum(
            len(other) for other in level.children[:index]
        ) for index, group in enumerate(level.children)])  # fmt: skip
        assert torch.equal(level.families[parents], rows[level.slots])


def test_families_of_very_different_sizes_do_not_pad_each_other():
    nested = [[list(range(2 * i, 2 * i + 2)) for i in range(500)] + [list(range(1000, 2000))]]
    level = SignalTree.from_nested(nested).levels[0]
    assert sum(children.numel() * children.shape[1] for children in level.children) < 3 * (500 * 4 + 1000**2)


def test_what_is_read_in_inference_mode_can_be_trained_with():
    with torch.inference_mode():
        made = SignalTree.from_segments(torch.tensor([[0, 0, 1, 1, 1]]))
    with_roots = SignalTree.regular([5, 3], (2, None), root_tokens=(0, -1))
    read = [SignalTree.regular([5, 3], (2, None)), with_roots, SignalTree.from_nested([[[0, 1, 2], [3, 4]]]), made]
    for tree in read:
        with torch.inference_mode():
            tree.nested(), tree.mask, tree.levels, tree.is_in_order
        tensors = [tree.lengths, tree.mask, tree.order, *tree.parents]
        tensors += [each for level in tree.levels for each in (*level.children, level.slots, level.families)]
        assert not any(tensor.is_inference() for tensor in tensors)


def test_an_empty_batch():
    tree = SignalTree.regular(torch.zeros(0).long(), 4, size=9)
    assert tree.batch_size == 0 and tree.mask.shape == (0, 9) and tree.nested() == []


def test_outline_and_repr():
    tree = SignalTree.from_nested([[[0, 1], [2, [3, 4]]], [0]])
    assert tree.outline([["a", "b", "c", "d", "e"], []]) == "(2 children)\n  a b\n  (2 children)\n    c\n    d e"
    assert tree.outline(sequence=1) == "0"
    assert "lengths=[5, 1]" in repr(tree) and "branching=(2, 2)" in repr(SignalTree.regular([3], 2))
    assert "root tokens" in repr(SignalTree.regular([3], 2, root_tokens=(0,)))
    long = SignalTree.from_nested([[[i, i + 1] for i in range(0, 400, 2)]]).outline().splitlines()
    assert len(long) == 61 and long[-1] == "... 141 more lines"
    with pytest.raises(ValueError, match="`sequence` must lie in"):
        tree.outline(sequence=2)


def test_trees_move_between_devices():
    with_roots = SignalTree.regular([4, 3], (2, None), root_tokens=(0,))
    for tree in (SignalTree.regular([3, 2], 2), with_roots, SignalTree.from_nested([[0, [1, 2]]])):
        assert tree.to("cpu") is tree
        moved = tree.to("meta")
        assert (moved.root_tokens is None) == (tree is not with_roots)
        assert moved.device.type == "meta" and moved.size == tree.size and moved.branching == tree.branching


ITSELF: list = [0, 1]
ITSELF.append(ITSELF)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: SignalTree.from_nested([[0, [1, 3]]]), "token 2 is missing"),
        (lambda: SignalTree.from_nested([[0], [0, [1, 1]]]), "token 1 twice in sequence 1"),
        (lambda: SignalTree.from_nested([[0, -1]]), "token 1 is missing"),
        (lambda: SignalTree.from_nested([[0, []]]), "without entries"),
        (lambda: SignalTree.from_nested([[]]), "without entries"),
        (lambda: SignalTree.from_nested([ITSELF]), "holds itself"),
        (lambda: SignalTree.from_nested([]), "at least one nested list"),
        (lambda: SignalTree.from_nested([0, 1]), "one list a sequence"),
        (lambda: SignalTree.from_nested("text"), "at least one nested list"),
        (lambda: SignalTree.from_nested([[0, "a"]]), "lists and integers, got 'a'"),
        (lambda: SignalTree.from_nested([[0, 0.5]]), "lists and integers, got 0.5"),
        (lambda: SignalTree.from_nested([[0, 1]], size=1), "`size` must be at least the longest"),
        (lambda: SignalTree.from_nested([[0, 1]], max_family_size=1), "`max_family_size` must be at least 2"),
        (lambda: SignalTree.regular([], 2), "`lengths`"),
        (lambda: SignalTree.regular([2, -1], 2), "`lengths`"),
        (lambda: SignalTree.regular([2.5], 2), "`lengths`"),
        (lambda: SignalTree.regular([9], 1), "at least 2"),
        (lambda: SignalTree.regular([9], True), "at least 2|at least one level|not iterable"),
        (lambda: SignalTree.regular([9], ()), "at least one level"),
        (lambda: SignalTree.regular([9], (None, 2)), "None at the last level only"),
        (lambda: SignalTree.regular([9], (2, 2)), "leaves 3 roots for 9 tokens"),
        (lambda: SignalTree.regular([9], 2, size=8), "`size` must be at least the longest length, 9"),
        (lambda: SignalTree.regular([9], 2, root_tokens=(0.5,)), "`root_tokens` must be integers, got 0.5"),
        (lambda: SignalTree.from_segments([]), "at least one level"),
        (lambda: SignalTree.from_segments(torch.zeros(3)), r"must be \(batch, length\)"),
        (lambda: SignalTree.from_segments(torch.zeros(2, 3)), "must be integers"),
        (lambda: SignalTree.from_segments(torch.zeros(2, 3).long(), torch.ones(2, 4)), "`mask` must be"),
        (lambda: SignalTree.from_grid(0, 3, 2), "`height` must be at least 1"),
        (lambda: SignalTree.from_grid(4, 4, [(1, 1), None]), "not both 1"),
        (lambda: SignalTree.from_grid(4, 4, [2]), "leaves 2 by 2 roots"),
        (lambda: SignalTree.from_grid(4, 4, [None, 2]), "None at the last level only"),
        (lambda: SignalTree.join([]), "at least one tree"),
        (lambda: SignalTree.join([SignalTree.regular([2], 2), SignalTree.regular([2, 2], 2)]), "one batch size"),
    ],
)
def test_bad_input_is_refused(build, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build()
