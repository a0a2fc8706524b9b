"""Cheapest paths between clusters: how surplus moves to where it is wanting at the least growth of the cost."""

import numpy as np
from numpy.typing import NDArray


def cheapest_path(
    edges: NDArray[np.float64], prices: NDArray[np.float64], surplus: NDArray[np.integer] | NDArray[np.floating]
) -> list[int]:
    """Nodes from one with a surplus to one in want.

    Lengths are measured at the current prices, so that moves which cost nothing more, as between clusters that a point
    ties for, come first.

    Args:
        edges: Least growth of the cost if something of a goes to b, infinite where nothing can, shape (m, m).
        prices: Dual prices, shape (m,); changed in place, so that the edges of the path become tight.
        surplus: Above 0 where there is too much, below 0 where there is too little, shape (m,).

    Returns:
        The path; of several that are equally cheap, one of fewest edges.
    """
    lengths, parents = _shortest_paths(edges, np.where(surplus > 0, -prices, np.inf))
    excess = lengths + prices
    wanting = np.flatnonzero(surplus < 0)
    target = int(wanting[excess[wanting].argmin()])
    prices -= np.minimum(excess, excess[target])
    path = [target]
    while (parent := int(parents[path[-1]])) >= 0:
        path.append(parent)
    return path[::-1]


def _shortest_paths(
    edges: NDArray[np.float64], start: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Bellman-Ford from every node at once, each with its own start length (infinite: not a start).

    There are no negative cycles, so m rounds suffice for m nodes, and the parents form a forest.

    Returns:
        Length of the shortest path to each node (m,), and the node before it, -1 at a start.
    """
    lengths = start
    parents = np.full(len(start), -1, dtype=np.intp)
    for _ in start:
        through = lengths[:, None] + edges  # (from, to)
        before, reached = through.argmin(axis=0), through.min(axis=0)
        is_shorter = reached < lengths
        if not is_shorter.any():
            break
        lengths = np.where(is_shorter, reached, lengths)
        parents = np.where(is_shorter, before, parents)
    return lengths, parents
