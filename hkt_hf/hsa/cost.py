"""Operations of attention, counted as in the paper (arXiv 2509.15448): 2 a multiply-add of scores and values, 1 a softmax entry."""

from ..modeling.tree_hsa import SignalTree


def attention_operations(length: int, num_heads: int, head_dim: int) -> int:
    """Operations of flat attention on one sequence in one layer, without its projections.

    Args:
        length (`int`): `N`.
        num_heads (`int`): `H`.
        head_dim (`int`): `d`.

    Returns:
        `int`: `4 N^2 H d + H N^2`.
    """
    return num_heads * length**2 * (4 * head_dim + 1)


def hsa_operations(tree: SignalTree, num_heads: int, head_dim: int, *, with_means: bool = False) -> int:
    """Operations of HSA on a batch in one layer, without its projections; padding not counted.

    Args:
        tree ([`SignalTree`]): of the batch.
        num_heads (`int`): `H`.
        head_dim (`int`): `d`.
        with_means (`bool`, *optional*, defaults to `False`): also count the means of queries, keys and values on the way up
            (2 a multiply-add) and the sums of values on the way down, which the paper's figures leave out (inferred).

    Returns:
        `int`: `(4 d + 1) H` times the sum of squared family sizes; with means, `8 d H` more for each of their nodes. Families
        of one are not counted: they have nothing to share out.
    """
    sizes = [size for level in tree.family_sizes() for size in level.tolist() if size > 1]
    operations = num_heads * sum(size**2 for size in sizes) * (4 * head_dim + 1)
    if with_means:
        operations += 8 * head_dim * num_heads * sum(sizes)
    return operations
