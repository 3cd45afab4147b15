"""Hierarchical Self-Attention against its definition, its optimality, and flat attention (the tests of its specification)."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from signal_trees import random_nested

from hkt_hf.modeling.attention_hsa import hierarchical_self_attention, hsa_energy, hsa_matrix
from hkt_hf.modeling.tree_hsa import SignalTree


SEEDS = st.integers(0, 2**32 - 1)


def states(tree, heads=2, width=4, value_width=3, scale=1.0, dtype=torch.double, requires_grad=False):
    """Random queries, keys and values for a tree."""
    shape = tree.batch_size, heads, tree.size
    tensors = [scale * torch.randn(*shape, width, dtype=dtype) for _ in range(2)]
    tensors.append(torch.randn(*shape, value_width, dtype=dtype))
    return [tensor.requires_grad_(requires_grad) for tensor in tensors]


def random_eps(tree, heads=2):
    """Position vectors wide enough for every family."""
    largest = max(
        [*(int(sizes.max()) for sizes in tree.family_sizes() if len(sizes)), *(tree.branching or (0,))],
        key=lambda b: b or 0,
    )
    largest = max(largest, tree.size)
    return [0.5 * torch.randn(heads, largest, 3, dtype=torch.double) for _ in (tree.branching or tree.parents)]


def random_tree(seed, lengths, in_order=False):
    generator = np.random.default_rng(seed)
    return SignalTree.from_nested([random_nested(generator, length, in_order=in_order) for length in lengths])


trees = st.one_of(
    st.builds(random_tree, SEEDS, st.lists(st.integers(2, 24), min_size=1, max_size=2)),
    st.builds(
        SignalTree.regular,
        st.lists(st.integers(1, 24), min_size=1, max_size=2),
        st.sampled_from([2, 3, (None,), (4, None), (2, 3, None)]),
        root_tokens=st.sampled_from([(), (0, -1), (5, -2, 1)]),
    ),
)
in_order_trees = st.one_of(
    st.builds(
        lambda seed, lengths: random_tree(seed, lengths, True),
        SEEDS,
        st.lists(st.integers(2, 20), min_size=1, max_size=2),
    ),
    st.builds(
        SignalTree.regular,
        st.lists(st.integers(1, 20), min_size=1, max_size=2),
        st.sampled_from([2, (4, None)]),
        root_tokens=st.sampled_from([(), (0, -1)]),
    ),
)


@settings(max_examples=60)
@given(tree=trees, has_eps=st.booleans(), self_loop=st.booleans(), has_mask=st.booleans(), seed=SEEDS)
def test_fast_equals_the_definition(tree, has_eps, self_loop, has_mask, seed):
    torch.manual_seed(seed)
    query, key, value = states(tree)
    mask = (torch.rand(tree.batch_size, tree.size) < 0.7).long() if has_mask else None
    options = {"eps": random_eps(tree) if has_eps else None, "self_loop": self_loop, "mask": mask}
    matrix = hsa_matrix(query, key, tree, **options)
    output = hierarchical_self_attention(query, key, value, tree, **options)
    torch.testing.assert_close(output, matrix @ value, rtol=0, atol=1e-10)
    real = tree.mask if mask is None else tree.mask & (mask != 0)
    torch.testing.assert_close(matrix.sum(-1), real[:, None].double().expand(-1, 2, -1), rtol=0, atol=1e-12)
    assert (output * ~real[:, None, :, None] == 0).all()
    assert (matrix * ~real[:, None, None, :] == 0).all()


@given(length=st.integers(1, 24), is_ragged=st.booleans(), seed=SEEDS)
def test_a_flat_tree_is_softmax_attention(length, is_ragged, seed):
    """Also with nodes that have a single child."""
    torch.manual_seed(seed)
    tree = SignalTree.from_nested([[[[leaf] if leaf % 2 else leaf for leaf in range(length)]]]) if is_ragged else None
    tree = SignalTree.regular([length], (None,)) if tree is None else tree
    query, key, value = states(tree)
    expected = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(hierarchical_self_attention(query, key, value, tree), expected, rtol=0, atol=1e-12)
    causal = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    found = hierarchical_self_attention(query, key, value, tree, is_causal=True)
    torch.testing.assert_close(found, causal, rtol=0, atol=1e-12)


@given(seed=SEEDS, lengths=st.lists(st.integers(2, 20), min_size=2, max_size=4))
def test_a_batch_of_unequal_lengths_is_each_alone(seed, lengths):
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    nested = [random_nested(generator, length) for length in lengths]
    for batch, alone in (
        (SignalTree.from_nested(nested), [SignalTree.from_nested([each]) for each in nested]),
        *(
            (
                SignalTree.regular(lengths, (3, None), root_tokens=tokens),
                [SignalTree.regular([length], (3, None), root_tokens=tokens) for length in lengths],
            )
            for tokens in ((), (0, -1))
        ),
        (
            SignalTree.regular([40, *lengths[1:]], 2, root_tokens=(0, -1)),
            [SignalTree.regular([length], 2, root_tokens=(0, -1)) for length in [40, *lengths[1:]]],
        ),
    ):
        tensors = states(batch)
        output = hierarchical_self_attention(*tensors, batch)
        for row, (tree, length) in enumerate(zip(alone, batch.lengths.tolist(), strict=True)):
            single = hierarchical_self_attention(*(each[row : row + 1, :, :length] for each in tensors), tree)
            torch.testing.assert_close(output[row : row + 1, :, :length], single, rtol=0, atol=1e-12)
            assert (output[row, :, length:] == 0).all()


@pytest.mark.parametrize("is_causal", [False, True])
def test_positions_are_needed_of_as_many_siblings_as_there_are(is_causal):
    """Not of the padding, which takes places in the last family of a regular tree."""
    tree, short = SignalTree.regular([9, 5], (3, None), size=20), SignalTree.regular([9, 5], (3, None))
    tensors = states(tree)
    eps = [torch.randn(2, 3, 3, dtype=torch.double) for _ in range(2)]
    found = hierarchical_self_attention(*tensors, tree, eps=eps, is_causal=is_causal)
    expected = hierarchical_self_attention(*(each[:, :, :9] for each in tensors), short, eps=eps, is_causal=is_causal)
    torch.testing.assert_close(found[:, :, :9], expected, rtol=0, atol=1e-12)
    assert (found[:, :, 9:] == 0).all()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", [(2, 6), (0, 6), (2, 0)])
def test_trees_without_a_leaf_give_zeros(shape, is_causal):
    tree = SignalTree.from_segments(torch.zeros(shape).long(), torch.zeros(shape))
    output = hierarchical_self_attention(*states(tree), tree, is_causal=is_causal)
    assert output.shape == (shape[0], 2, shape[1], 3) and (output == 0).all()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "tree",
    [SignalTree.regular([5, 3], (2, None), size=6), SignalTree.from_nested([[[4, 0], [1, 2, 3]], [0, 1]], size=6)],
)
def test_what_stands_where_there_is_no_leaf_is_not_read(tree, is_causal):
    if is_causal:
        tree = SignalTree.from_nested([[[0, 1], [2, 3, 4]], [0, 1]], size=6)
    mask = torch.ones(2, 6)
    mask[0, 1] = mask[1, 1] = 0
    clean = states(tree)
    hidden = ~tree.mask | (mask == 0)
    dirty = [
        torch.where(hidden[:, None, :, None], torch.tensor(value).double(), tensor)
        for tensor, value in zip(clean, (math.nan, math.inf, math.nan), strict=True)
    ]
    clean, dirty = ([tensor.requires_grad_() for tensor in tensors] for tensors in (clean, dirty))
    outputs = [
        hierarchical_self_attention(*tensors, tree, mask=mask, is_causal=is_causal) for tensors in (clean, dirty)
    ]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for first, second in zip(clean, dirty, strict=True):
        assert torch.equal(first.grad, second.grad)


def test_positions_of_one_head_serve_all():
    tree = SignalTree.regular([5], (16, None))
    query, key, value = states(tree)
    eps = [torch.randn(5, 3).double(), torch.randn(1, 3).double()]
    expected = hierarchical_self_attention(query, key, value, tree, eps=eps)
    for each in (hierarchical_self_attention(query, key, value, tree, eps=[e[None] for e in eps]),
                 hsa_matrix(query, key, tree, eps=[e[None] for e in eps]) @ value):  # fmt: skip
        torch.testing.assert_close(each, expected)


def test_the_energy_without_any_leaf():
    tree = SignalTree.regular([0, 0], 2)
    assert torch.equal(hsa_energy(*states(tree)[:2], tree), torch.zeros(2, 2).double())


def flat_log_sums(query, key, scale):
    """`log Z_i` of flat attention, and its scores."""
    scores = scale * query @ key.transpose(-1, -2)
    return scores.logsumexp(-1), scores


@settings(max_examples=25)
@given(tree=st.builds(lambda seed, length: random_tree(seed, [length]), SEEDS, st.integers(2, 16)), seed=SEEDS)
def test_hsa_is_the_closest_matrix_with_its_ties(tree, seed):
    """KKT: on blocks of size c and mean energy psi, c (log x + 1 + psi) is in the row space of the row sums."""
    torch.manual_seed(seed)
    query, key, _ = states(tree, heads=1)
    matrix = hsa_matrix(query, key, tree)[0, 0]
    length = tree.size
    log_sums, scores = flat_log_sums(query[0, 0], key[0, 0], 0.5)
    blocks = blocks_of(tree)
    weights = torch.stack([matrix[block].mean() for block in blocks])
    for block in blocks:
        assert (matrix[block] - matrix[block].mean()).abs().max() < 1e-14  # tied
    sizes = torch.tensor([float(block.sum()) for block in blocks], dtype=torch.double)
    energies = torch.stack([-scores[block].mean() for block in blocks])
    row_sums = torch.stack([block.sum(1).double() for block in blocks], dim=1)  # (rows, blocks)
    assert (row_sums @ weights - 1).abs().max() < 1e-12
    gradient = sizes * (weights.log() + 1 + energies)
    solution = torch.linalg.lstsq(row_sums.T, gradient[:, None], driver="gelsd").solution
    assert (row_sums.T @ solution - gradient[:, None]).abs().max() < 1e-10 * max(1.0, gradient.abs().max().item())

    def objective(values):
        full = torch.zeros(length, length, dtype=torch.double)
        for block, each in zip(blocks, values, strict=True):
            full[block] = each
        return (full * (full.log() - scores + log_sums[:, None])).sum()

    best = objective(weights)
    # Feasible directions: those that leave all row sums alone.
    null = torch.linalg.svd(row_sums, full_matrices=True)[2][torch.linalg.matrix_rank(row_sums) :]
    for direction in null[:8]:
        for sign in (1, -1):
            step = 0.1 * (weights / direction.abs().clamp_min(1e-12)).min()
            assert objective(weights + sign * step * direction) >= best - 1e-12


def blocks_of(tree):
    """The ties of one sequence: bool `(N, N)` a block, for ordered pairs of siblings, and each leaf's own entry."""
    found = []

    def leaves(node):
        return [node] if isinstance(node, int) else [leaf for child in node for leaf in leaves(child)]

    def visit(node):
        if isinstance(node, int):
            block = torch.zeros(tree.size, tree.size, dtype=torch.bool)
            block[node, node] = True
            found.append(block)
            return
        for first in node:
            for second in node:
                if first is not second:
                    block = torch.zeros(tree.size, tree.size, dtype=torch.bool)
                    block[torch.tensor(leaves(first))[:, None], torch.tensor(leaves(second))] = True
                    found.append(block)
            visit(first)

    visit(tree.nested()[0])
    return found


def energy_of_root(query, key, tree, scale=0.5):
    """`phi(root)` of one sequence and head, by the free energy (identity 1), from the matrix."""
    matrix = hsa_matrix(query, key, tree, scale=scale)[0, 0]
    scores = scale * query[0, 0] @ key[0, 0].T
    entropy = torch.special.entr(matrix).sum()
    return (-(matrix * scores).sum() - entropy) / tree.size, matrix


@given(tree=st.builds(lambda seed, length: random_tree(seed, [length]), SEEDS, st.integers(2, 20)), seed=SEEDS)
def test_the_gap_is_the_difference_of_energies(tree, seed):
    torch.manual_seed(seed)
    query, key, _ = states(tree, heads=1)
    phi, matrix = energy_of_root(query, key, tree)
    log_sums, scores = flat_log_sums(query[0, 0], key[0, 0], 0.5)
    divergence = (torch.xlogy(matrix, matrix) - matrix * (scores - log_sums[:, None])).sum()
    torch.testing.assert_close(divergence, tree.size * phi + log_sums.sum(), rtol=0, atol=1e-10)
    assert divergence >= -1e-12


@given(tree=st.builds(lambda seed, length: random_tree(seed, [length]), SEEDS, st.integers(2, 12)), seed=SEEDS)
def test_the_update_is_the_gradient_of_the_energy(tree, seed):
    """`-sqrt(d) d(N phi) / d q_i = sum_j theta_ij k_j`, by finite differences of the energy."""
    torch.manual_seed(seed)
    query, key, _ = states(tree, heads=1)
    update = hierarchical_self_attention(query, key, key, tree)[0, 0]
    step = 1e-5
    leaf, feature = torch.randint(tree.size, ()).item(), torch.randint(query.shape[-1], ()).item()
    energies = []
    for sign in (1, -1):
        moved = query.clone()
        moved[0, 0, leaf, feature] += sign * step
        energies.append(tree.size * energy_of_root(moved, key, tree)[0])
    slope = (energies[0] - energies[1]) / (2 * step)
    torch.testing.assert_close(-2.0 * slope, update[leaf, feature], rtol=1e-5, atol=1e-7)


@given(tree=trees, seed=SEEDS)
def test_a_shift_of_a_row_changes_nothing(tree, seed):
    """Adding to the scores of a query what does not depend on the key: a feature in which all keys are one."""
    torch.manual_seed(seed)
    query, key, value = states(tree)
    shifted_query = torch.cat([query, torch.randn(*query.shape[:-1], 1, dtype=torch.double)], -1)
    shifted_key = torch.cat([key, torch.ones(*key.shape[:-1], 1, dtype=torch.double)], -1)
    expected = hierarchical_self_attention(query, key, value, tree, scale=0.5)
    found = hierarchical_self_attention(shifted_query, shifted_key, value, tree, scale=0.5)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@given(length=st.integers(4, 24), seed=SEEDS)
def test_a_coarser_tree_is_never_farther_from_flat_attention(length, seed):
    torch.manual_seed(seed)
    fine = SignalTree.regular([length], 2)
    query, key, _ = states(fine, heads=1)
    gaps = []
    for branching in (2, (2, 2, None), (4, None), (None,)):
        phi, _ = energy_of_root(query, key, SignalTree.regular([length], branching))
        gaps.append(length * phi + flat_log_sums(query[0, 0], key[0, 0], 0.5)[0].sum())
    assert gaps[0] >= gaps[1] - 1e-10 and gaps[1] >= gaps[2] - 1e-10 and gaps[2] >= gaps[3] - 1e-10
    assert abs(gaps[3]) < 1e-10


@given(seed=SEEDS, length=st.integers(2, 16))
def test_permuted_siblings_permute_the_output(seed, length):
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    nested = random_nested(generator, length)

    def shuffled(node):
        return node if isinstance(node, int) else [shuffled(node[index]) for index in generator.permutation(len(node))]

    tree = SignalTree.from_nested([nested])
    tensors = states(tree)
    expected = hierarchical_self_attention(*tensors, tree)
    found = hierarchical_self_attention(*tensors, SignalTree.from_nested([shuffled(nested)]))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)  # the leaves keep their positions
    permutation = torch.randperm(length)
    renamed = SignalTree.from_nested([renamed_leaves(nested, permutation.argsort().tolist())])
    moved = hierarchical_self_attention(*(each[:, :, permutation] for each in tensors), renamed)
    torch.testing.assert_close(moved, expected[:, :, permutation], rtol=0, atol=1e-12)


def test_permuted_siblings_and_their_positions_permute_the_output():
    """Places within the families of a level and the rows of `eps` by one permutation."""
    tree = SignalTree.regular([12], (4, None))
    query, key, value = states(tree)
    eps = [torch.randn(2, size, 3, dtype=torch.double) for size in (4, 3)]
    expected = hierarchical_self_attention(query, key, value, tree, eps=eps)
    inner, outer = torch.tensor([2, 0, 3, 1]), torch.tensor([1, 2, 0])
    leaves = (4 * outer[:, None] + inner).flatten()
    moved = [tensor[:, :, leaves] for tensor in (query, key, value)]
    found = hierarchical_self_attention(*moved, tree, eps=[eps[0][:, inner], eps[1][:, outer]])
    torch.testing.assert_close(found, expected[:, :, leaves], rtol=0, atol=1e-12)
    other = hierarchical_self_attention(*moved, tree, eps=eps)
    assert (other - expected[:, :, leaves]).abs().max() > 1e-3


def renamed_leaves(node, names):
    return names[node] if isinstance(node, int) else [renamed_leaves(child, names) for child in node]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("self_loop", [False, True])
def test_gradients(self_loop, is_causal):
    for tree in (SignalTree.from_nested([[[0, 1, 2], [[3], 4]], [0, [1, 2]]]), SignalTree.regular([5, 3], (2, None))):
        inputs = states(tree, width=3, value_width=2, requires_grad=True)
        eps = [each.requires_grad_() for each in random_eps(tree)]

        def attend(query, key, value, *eps, tree=tree):
            return hierarchical_self_attention(
                query, key, value, tree, eps=eps, self_loop=self_loop, is_causal=is_causal
            )

        torch.autograd.gradcheck(attend, (*inputs, *eps))


@pytest.mark.parametrize("is_causal", [False, True])
def test_large_scores_and_empty_families_have_finite_gradients(is_causal):
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4], mask[1] = 0, 0  # whole families, and a whole sequence
    for tree in (
        SignalTree.regular([9, 9], (2, 2, None)),
        SignalTree.from_nested([[[0, 1], [2, 3], [4, [5, 6, 7, 8]]], list(range(9))]),
    ):
        query, key, value = states(tree, scale=60.0, dtype=torch.float32, requires_grad=True)
        assert (query @ key.transpose(-1, -2)).abs().max() > 1e3
        output = hierarchical_self_attention(query, key, value, tree, mask=mask, is_causal=is_causal)
        output.square().sum().backward()
        assert output.isfinite().all() and all(each.grad.isfinite().all() for each in (query, key, value))
        assert (output[1] == 0).all() and (output[0, :, :4] == 0).all()


@settings(max_examples=40)
@given(tree=in_order_trees, has_eps=st.booleans(), self_loop=st.booleans(), seed=SEEDS)
def test_causal_equals_its_definition_and_sees_no_later_leaf(tree, has_eps, self_loop, seed):
    torch.manual_seed(seed)
    query, key, value = states(tree, requires_grad=True)
    options = {"eps": random_eps(tree) if has_eps else None, "self_loop": self_loop, "is_causal": True}
    matrix = hsa_matrix(query.detach(), key.detach(), tree, **options)
    output = hierarchical_self_attention(query, key, value, tree, **options)
    torch.testing.assert_close(output.detach(), matrix @ value.detach(), rtol=0, atol=1e-10)
    assert (matrix.triu(1) == 0).all()
    row = int(torch.randint(tree.size, ()))
    for gradient in torch.autograd.grad(output[:, :, row].sum(), (query, key, value)):
        assert (gradient[:, :, row + 1 :] == 0).all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_working_precisions(dtype, tolerance):
    for tree in (SignalTree.regular([700, 433], 8), SignalTree.from_segments(torch.arange(700).expand(2, -1) // 13)):
        tensors = [each.to(dtype) for each in states(tree, width=16, value_width=16)]
        output = hierarchical_self_attention(*tensors, tree)
        expected = hierarchical_self_attention(*(each.double() for each in tensors), tree)
        assert output.dtype == dtype
        torch.testing.assert_close(output.double(), expected, rtol=0, atol=tolerance)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = hierarchical_self_attention(*(each.float() for each in tensors), tree)
        torch.testing.assert_close(inside.double(), expected, rtol=0, atol=2e-6)


def test_a_million_leaves_take_memory_by_the_leaf():
    """By count: no tensor is larger than the input times the family size over the width."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            nonlocal largest
            result = function(*arguments, **(options or {}))
            for each in result if isinstance(result, list | tuple) else [result]:
                if isinstance(each, torch.Tensor):
                    largest = max(largest, each.numel())
            return result

    tree = SignalTree.regular([20_000], 16)
    tensors = states(tree, heads=1, width=8, value_width=8, dtype=torch.float32)
    with Watch(), torch.no_grad():
        hierarchical_self_attention(*tensors, tree)
    assert largest <= 1.1 * 20_000 * 16


@pytest.mark.parametrize(
    "tree",
    [
        pytest.param(SignalTree.regular([40, 23], (4, None)), marks=pytest.mark.slow),
        SignalTree.regular([40, 23], (4, None), root_tokens=(0, -1)),
        SignalTree.from_nested([[[0, 1], [2, [3]]]]),
    ],
)
def test_compiled_code_gives_the_same(tree):
    query, key, value = states(tree, dtype=torch.float32)
    compiled = torch.compile(hierarchical_self_attention, backend="aot_eager")
    torch.testing.assert_close(
        compiled(query, key, value, tree), hierarchical_self_attention(query, key, value, tree), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"query": torch.zeros(2, 5, 4)}, "`query` must be"),
        ({"key": torch.zeros(1, 2, 5, 3)}, "must agree"),
        ({"value": torch.zeros(1, 2, 6, 4)}, "must agree"),
        ({"value": torch.zeros(1, 2, 5, 4).long()}, "`value` must be of a floating-point type"),
        ({"tree": [0, 1]}, "`tree` must be a .*tree_hsa.SignalTree, got a .*list"),
        ({"tree": SignalTree.regular([6], 2)}, "`tree` is of 1 sequences padded to 6 tokens"),
        ({"tree": SignalTree.regular([5, 5], 2)}, "`tree` is of 2 sequences"),
        ({"tree": SignalTree.regular([5], 2).to("meta")}, "`tree` is on meta"),
        ({"mask": torch.ones(1, 4)}, "`mask` must be"),
        ({"eps": [torch.zeros(2, 3)]}, "`eps` must have an entry for each of the 3 levels, got 1"),
        ({"eps": [torch.zeros(1, 3)] * 3}, "at least 2 siblings at level 0"),
        ({"eps": [torch.zeros(3, 2, 3)] * 3}, r"`eps` must be of 2 heads at level 0, got \(3, 2, 3\)"),
        ({"eps": [torch.zeros(2, 3, device="meta")] * 3}, "`eps` must be on cpu, as `query`, got one on meta"),
        ({"value": torch.zeros(1, 2, 5, 4, device="meta")}, "`value` must be on cpu"),
        ({"mask": torch.ones(1, 5, device="meta")}, "`mask` must be on cpu"),
        ({"row_weights": torch.tensor([[1, 1, -0.5, 1, 1]])}, "`row_weights` must be finite and at least 0, got -0.5"),
        ({"row_weights": torch.full((1, 5), math.inf)}, "`row_weights` must be finite and at least 0, got inf"),
        ({"tree": SignalTree.from_nested([[0, 2, [1, 3, 4]]]), "is_causal": True}, "`is_causal` needs a tree"),
    ],
)
def test_bad_input_is_refused(change, message):
    arguments = {name: torch.zeros(1, 2, 5, 4) for name in ("query", "key", "value")}
    arguments |= {"tree": SignalTree.regular([5], 2)} | change
    with pytest.raises(ValueError, match=message):
        hierarchical_self_attention(**arguments)


def test_math_of_the_paper_on_two_leaves_and_one():
    """A tree of two families, worked out by hand."""
    tree = SignalTree.from_nested([[[0, 1], 2]])
    query = torch.tensor([1.0, 0.0, 2.0], dtype=torch.double)[None, None, :, None]
    key = torch.tensor([1.0, 2.0, -1.0], dtype=torch.double)[None, None, :, None]
    matrix = hsa_matrix(query, key, tree, scale=1.0)[0, 0]
    first, second = math.log(math.exp(1) + math.exp(2)), math.log(2)  # log Z of leaves 0 and 1
    phi = -(first + second) / 2
    across = 0.5 * -1.0  # mean query 0.5, key -1
    total = math.exp(-phi) + math.exp(across)
    assert matrix[0, 2].item() == pytest.approx(math.exp(across) / total)
    assert matrix[0, 0].item() == pytest.approx(math.exp(-phi) / total * math.exp(1 - first))
    back = math.exp(-2.0) + 2 * math.exp(2.0 * 1.5)
    assert matrix[2, 0].item() == matrix[2, 1].item() == pytest.approx(math.exp(3.0) / back)


@settings(max_examples=25)
@given(tree=trees, has_eps=st.booleans(), seed=SEEDS)
def test_the_energy_of_the_root_is_the_gap(tree, has_eps, seed):
    """The mean over rows of `phi + log Z_i` is the mean divergence from flat attention with the same scores."""
    torch.manual_seed(seed)
    query, key, _ = states(tree)
    eps = random_eps(tree) if has_eps else None
    energy = hsa_energy(query, key, tree, eps=eps)
    matrix = hsa_matrix(query, key, tree, eps=eps)
    assert energy.shape == (tree.batch_size, 2)
    if not has_eps:
        real = tree.mask[:, None].double()
        log_sums, scores = flat_log_sums(query, key, 0.5)
        scores = scores.masked_fill(~tree.mask[:, None, None, :], -1e30)
        log_sums = scores.logsumexp(-1)
        divergence = torch.xlogy(matrix, matrix) - matrix * (scores - log_sums[..., None])
        mean = (divergence.sum(-1) * real).sum(-1) / real.sum(-1)
        torch.testing.assert_close(energy + (log_sums * real).sum(-1) / real.sum(-1), mean, rtol=0, atol=1e-10)


@settings(max_examples=25)
@given(tree=st.builds(lambda seed, length: random_tree(seed, [length]), SEEDS, st.integers(2, 14)), seed=SEEDS)
def test_row_weights_give_the_closest_matrix_by_these_weights(tree, seed):
    """KKT of the weighted sum of divergences; weights of ones change nothing."""
    torch.manual_seed(seed)
    query, key, _ = states(tree, heads=1)
    identity = torch.eye(tree.size, dtype=torch.double)[None, None]
    plain = hierarchical_self_attention(query, key, identity, tree)
    ones = torch.ones(1, tree.size, dtype=torch.double)
    torch.testing.assert_close(hierarchical_self_attention(query, key, identity, tree, row_weights=ones), plain)
    weights = torch.rand(tree.size, dtype=torch.double) + 0.1
    matrix = hierarchical_self_attention(query, key, identity, tree, row_weights=weights[None])[0, 0]
    scores = 0.5 * query[0, 0] @ key[0, 0].T
    blocks = blocks_of(tree)
    values = torch.stack([matrix[block].mean() for block in blocks])
    rows = torch.stack([block.sum(1).double() for block in blocks], dim=1)
    gradient = torch.stack(
        [
            (weights[:, None] * (value.log() + 1 - scores))[block].sum()
            for block, value in zip(blocks, values, strict=True)
        ]
    )
    solution = torch.linalg.lstsq(rows.T, gradient[:, None], driver="gelsd").solution
    assert (rows.T @ solution - gradient[:, None]).abs().max() < 1e-9 * max(1.0, gradient.abs().max().item())


def test_rows_of_weight_zero_have_no_say():
    for tree in (SignalTree.regular([9], (3, None)), SignalTree.from_nested([[[0, 1, 2], [3, [4, 5]], [6, 7, 8]]])):
        query, key, value = states(tree)
        weights = torch.ones(1, 9)
        weights[0, [0, 6, 7, 8]] = 0.0
        expected = hierarchical_self_attention(query, key, value, tree, row_weights=weights)
        query[:, :, [0, 7]] += 5.0
        found = hierarchical_self_attention(query, key, value, tree, row_weights=weights)
        torch.testing.assert_close(found[:, :, 1:6], expected[:, :, 1:6], rtol=0, atol=1e-12)
        assert found.isfinite().all() and not torch.allclose(found[:, :, 0], expected[:, :, 0])
