"""Random trees of nested signals, for property tests."""

import numpy as np


def random_nested(generator: np.random.Generator, length: int, *, in_order: bool = False):
    """A nested list of `0 .. length - 1`: uneven depth, nodes with one child, any order of the leaves unless `in_order`."""
    leaves = list(range(length)) if in_order else generator.permutation(length).tolist()
    return _nest(generator, leaves, depth=0)


def _nest(generator, leaves, depth):
    if len(leaves) == 1 and (depth > 0 or generator.random() < 0.5) and generator.random() < 0.6:
        return leaves if depth == 0 else [leaves[0]]
    if depth >= 4 or generator.random() < 0.25:
        return list(leaves)
    cuts = np.sort(
        generator.choice(len(leaves) + 1, size=int(generator.integers(0, min(len(leaves), 4))), replace=True)
    )
    parts = [part for part in np.split(np.array(leaves), cuts) if len(part)]
    children = []
    for part in parts:
        if len(part) == 1 and generator.random() < 0.5:
            children.append(int(part[0]))
        else:
            children.append(_nest(generator, part.tolist(), depth + 1))
    return children
