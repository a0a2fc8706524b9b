"""One balanced assignment step against min-cost flow: OR-tools, k-means-constrained, scipy for a small size.

    python benchmarks/assignment.py [--corpus FOLDER] [--sizes 50000x8,50000x128] [--repeats 3]

Costs: squared distances, float32, of document vectors (TfidfSvdEmbedder) to the centres after three plain Lloyd steps
from random points, so that the nearest centres are still far from balanced. A size above the number of documents
repeats documents with a little seeded noise; the table marks it. All contenders get the same matrix, choose sizes
floor(n/k) or ceil(n/k), and work in a process of their own, in turns. Their time holds what they need from matrix to
labels: for the flows the building of the graph, costs rounded to whole millionths (OR-tools here) or thousandths
(k-means-constrained, whose own `minimum_cost_flow_problem_graph` and `solve_min_cost_flow_graph` are called; its
distances are not counted). "Above the optimum" is measured against the dual bound of our prices, in float64: the bound
holds for any prices, so a zero proves the optimum, also that of the peers.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from corpora import (
    Measurement,
    add_text_arguments,
    alternate,
    hardware,
    header,
    limit_threads,
    median,
    row,
    text_of,
)
from numpy.typing import NDArray
from records import Records, add_json_argument
from sklearn.cluster import KMeans
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.preprocessing import normalize

from cbtm.cluster.assignment import balanced_assignment
from cbtm.cluster.embedder import TfidfSvdEmbedder

SIZES = "2000x8,10000x8,50000x8,50000x32,50000x128,100000x128"
FLOW_UNIT = 1e-6  # of the costs that OR-tools gets; those are at most 4
SMALL = 3000  # points at most for scipy: its matrix has n columns
NOISE = 0.05  # length of the noise on repeated documents, whose vectors have length 1
OURS, FLOW, CONSTRAINED, SCIPY = "cbtm", "OR-tools flow", "k-means-constrained", "scipy linear_sum_assignment"


def vectors_of(vectors: NDArray[np.float32], n: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """`n` of the vectors; where they do not suffice, all of them and noisy copies."""
    if n <= len(vectors):
        return vectors[rng.choice(len(vectors), n, replace=False)]
    copies = vectors[rng.integers(len(vectors), size=n - len(vectors))]
    noise = rng.standard_normal(copies.shape, dtype=np.float32) * np.float32(NOISE / copies.shape[1] ** 0.5)
    return np.concatenate([vectors, normalize(copies + noise)])


def cost_matrix(x: NDArray[np.float32], k: int) -> NDArray[np.float32]:
    centers = KMeans(k, init="random", n_init=1, max_iter=3, random_state=0).fit(x).cluster_centers_
    return euclidean_distances(x.astype(np.float64), centers, squared=True).astype(np.float32)


def ours(file: Path) -> Callable[[], Any]:
    cost = np.load(file)
    balanced_assignment(cost[: cost.shape[1]])  # the search through the loaded libraries, once a process

    def work() -> Any:
        found = balanced_assignment(cost)
        return found.labels, found.prices, 0.0

    return work


def flow(file: Path) -> Callable[[], Any]:
    from ortools.graph.python.min_cost_flow import SimpleMinCostFlow

    cost = np.load(file)
    n, k = cost.shape

    def work() -> Any:
        # Every cluster takes n // k points; one more passes on to the pool, which takes n % k in all.
        clusters, pool = np.arange(n, n + k, dtype=np.int32), n + k
        solver = SimpleMinCostFlow()
        whole = np.rint(cost.ravel() * np.float64(1 / FLOW_UNIT)).astype(np.int64)
        tails, heads = np.repeat(np.arange(n, dtype=np.int32), k), np.tile(clusters, n)
        arcs = solver.add_arcs_with_capacity_and_unit_cost(tails, heads, np.ones(n * k, dtype=np.int64), whole)
        ones, zeros = np.ones(k, dtype=np.int64), np.zeros(k, dtype=np.int64)
        solver.add_arcs_with_capacity_and_unit_cost(clusters, np.full(k, pool, dtype=np.int32), ones, zeros)
        supplies = np.concatenate([np.ones(n, dtype=np.int64), np.full(k, -(n // k)), [-(n % k)]])
        solver.set_nodes_supplies(np.arange(n + k + 1, dtype=np.int32), supplies)
        begin = time.perf_counter()
        if solver.solve() != solver.OPTIMAL:
            raise RuntimeError("OR-tools found no optimum")
        solving = time.perf_counter() - begin
        return solver.flows(arcs).reshape(n, k).argmax(axis=1), None, solving

    return work


def constrained(file: Path) -> Callable[[], Any]:
    from k_means_constrained import k_means_constrained_ as package

    cost = np.load(file)
    n, k = cost.shape
    points, centers = np.empty((n, 1)), np.empty((k, 1))  # it reads their lengths only

    def work() -> Any:
        graph = package.minimum_cost_flow_problem_graph(points, centers, cost, n // k, -(-n // k))
        begin = time.perf_counter()
        labels = package.solve_min_cost_flow_graph(*graph)
        return labels, None, time.perf_counter() - begin

    return work


def scipy_assignment(file: Path) -> Callable[[], Any]:
    from scipy.optimize import linear_sum_assignment

    cost = np.load(file)
    n, k = cost.shape
    floor, n_extra = divmod(n, k)

    def work() -> Any:
        if n_extra == 0:
            places = np.repeat(cost, floor, axis=1)
        else:  # one place more in each cluster; k - n_extra dummies take those that stay free
            places = np.concatenate([np.repeat(cost, floor, axis=1), cost], axis=1)
            dummies = np.full((k - n_extra, places.shape[1]), 1e6, dtype=np.float32)
            dummies[:, k * floor :] = 0
            places = np.concatenate([places, dummies])
        begin = time.perf_counter()
        columns = linear_sum_assignment(places)[1][:n]
        solving = time.perf_counter() - begin
        return np.where(columns < k * floor, columns // max(floor, 1), columns - k * floor), None, solving

    return work


def dual_bound(cost: NDArray[np.float32], prices: NDArray[np.float64]) -> float:
    """No balanced assignment costs less, whatever the prices: sum_i min_j (cost + price) - dearest sizes . prices."""
    n, k = cost.shape
    floor, n_extra = divmod(n, k)
    least = sum(float((block + prices).min(axis=1).sum()) for block in np.array_split(cost, 1 + cost.size // 10**6))
    return least - floor * prices.sum() - np.sort(prices)[k - n_extra :].sum()


def above_optimum(cost: NDArray[np.float32], labels: NDArray[Any], bound: float) -> float:
    """Part of the bound by which the labels cost more; NaN if their sizes are not balanced."""
    n, k = cost.shape
    sizes = np.bincount(labels, minlength=k)
    if not set(sizes.tolist()) <= {n // k, -(-n // k)}:
        return float("nan")
    return float(cost[np.arange(n), labels].sum(dtype=np.float64)) / bound - 1


def compare(
    name: str, cost: NDArray[np.float32], file: Path, args: argparse.Namespace, records: Records
) -> tuple[dict[str, Measurement], dict[str, float]]:
    """Print the rows of one size; returns the median of each contender and its cost above the optimum."""
    n, k = cost.shape
    contenders = {OURS: (ours, file), FLOW: (flow, file), CONSTRAINED: (constrained, file)}
    if n <= SMALL:
        contenders[SCIPY] = (scipy_assignment, file)
    found = alternate(contenders, repeats=args.repeats, limit_s=args.limit)
    medians: dict[str, Measurement] = {contender: median(runs) for contender, runs in found.items()}
    own = medians[OURS]
    if own.error:
        raise SystemExit(f"cbtm failed at {name}: {own.error}")
    bound = dual_bound(cost, own.value[1])
    nearest = np.bincount(cost.argmin(axis=1), minlength=k)
    gaps = {}
    for contender, run in medians.items():
        first = (name, f"{nearest.min()}-{nearest.max()}") if contender == OURS else ("", "")
        if run.error:
            row(*first, contender, run.error, "", "", "", "", "")
            records.measured(name, contender, found[contender])
            continue
        gaps[contender] = above_optimum(cost, run.value[0], bound)
        gap = "not balanced" if np.isnan(gaps[contender]) else f"{gaps[contender]:.1e}"
        solving = f"{run.value[2]:.3f}" if run.value[2] else ""
        ratio = f"{run.seconds / own.seconds:.2f}"
        row(*first, contender, f"{run.seconds:.3f}", solving, f"{run.cpu_seconds:.3f}", ratio,
            f"{run.peak_bytes / 1e6:.1f}", gap)  # fmt: skip
        above = gap if np.isnan(gaps[contender]) else f"{gap} above the optimum"
        records.measured(name, contender, found[contender], is_ours=contender == OURS, note=above)
    return medians, gaps


def print_goals(results: dict[tuple[int, int], Any], records: Records) -> None:
    for (n, k), (medians, gaps) in results.items():
        own = medians[OURS]
        records.goal(f"{n} x {k}, cost no more than 1e-9 above the optimum", gaps[OURS] <= 1e-9, f"{gaps[OURS]:.1e}")
        for peer in (FLOW, CONSTRAINED):
            ratio = medians[peer].seconds / own.seconds
            least = 5 if k == 8 and n >= 50_000 else 1
            if n >= 50_000 and k in (8, 128):
                records.goal(f"{n} x {k}, >= {least}x {peer}", ratio >= least, medians[peer].error or f"{ratio:.2f}x")
        if n >= 50_000 and k == 128:
            part = own.peak_bytes / medians[FLOW].peak_bytes
            records.goal(f"{n} x {k}, <= 0.1 of the flow's memory", part <= 0.1, f"{part:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=SIZES, help=f"points x clusters, default {SIZES}")
    add_text_arguments(parser)
    add_json_argument(parser)
    args = parser.parse_args()
    sizes = [tuple(map(int, size.split("x"))) for size in args.sizes.split(",")]
    threads = limit_threads(args.threads)
    text = text_of(args)
    vectors = TfidfSvdEmbedder(random_state=0).fit_transform(text.texts())
    print(
        f"{hardware('numpy', 'scipy', 'ortools', 'k-means-constrained')}; {threads}; {len(vectors)} documents of "
        f"{text}, d={vectors.shape[1]}; median of {args.repeats}; peak memory is above that before the step\n"
    )
    header("n x k", "nearest-centre sizes", "contender", "s", "of it solving", "CPU s", "ratio to cbtm", "peak MB",
           "above the optimum")  # fmt: skip
    results, records = {}, Records(args.json)
    with tempfile.TemporaryDirectory() as folder:
        for n, k in sizes:
            file = Path(folder) / "cost.npy"
            cost = cost_matrix(vectors_of(vectors, n, np.random.default_rng(0)), k)
            np.save(file, cost)
            n_copies = max(0, n - len(vectors))
            name = f"{n} x {k}" + f" ({n_copies} noisy copies)" * bool(n_copies)
            results[n, k] = compare(name, cost, file, args, records)
    print()
    print_goals(results, records)


if __name__ == "__main__":
    main()
