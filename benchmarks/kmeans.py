"""Balanced k-means against k-means-constrained, plain scikit-learn and the PyPI package balanced-kmeans.

    python benchmarks/kmeans.py [--corpus FOLDER --labels FOLDER] [--clusters 8,32] [--large] [--repeats 3]

Every method gets the same document vectors (TfidfSvdEmbedder), one start, at most 20 iterations and otherwise its own
defaults, in a process of its own, in turns; run r has random state r for all. The table has medians over the runs, and
the range of the inertia, which is measured the same way for all: squared distances of the points to the means of their
clusters, in float64. scikit-learn's KMeans does not balance and stands there for reference. balanced-kmeans is called
as documented first; if that fails, with the same points twice (its `kmeans_equal` needs a batch), and the table says
so. Then our method runs from ten random states at the smallest k.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from corpora import Measurement, add_text_arguments, hardware, header, limit_threads, measure, row, text_of
from numpy.typing import NDArray
from records import Records, add_json_argument
from sklearn.metrics import normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix

from cbtm.cluster.embedder import TfidfSvdEmbedder
from cbtm.cluster.kmeans import balanced_kmeans

ITERATIONS = 20
STATES = 10
OURS, CONSTRAINED, PLAIN, PYPI = "cbtm", "k-means-constrained", "scikit-learn (unbalanced)", "balanced-kmeans"


def ours(file: Path, k: int, random_state: int) -> Callable[[], Any]:
    x = np.load(file)
    balanced_kmeans(x[: 2 * k], k, random_state=0, max_iterations=1)  # imports

    def work() -> Any:
        found = balanced_kmeans(x, k, random_state=random_state, max_iterations=ITERATIONS)
        return found.labels_, found.n_iter_, ""

    return work


def constrained(file: Path, k: int, random_state: int) -> Callable[[], Any]:
    from k_means_constrained import KMeansConstrained

    x = np.load(file)
    floor, ceil = len(x) // k, -(-len(x) // k)

    def work() -> Any:
        model = KMeansConstrained(
            k, size_min=floor, size_max=ceil, n_init=1, max_iter=ITERATIONS, random_state=random_state
        ).fit(x)
        return model.labels_, model.n_iter_, ""

    return work


def plain(file: Path, k: int, random_state: int) -> Callable[[], Any]:
    from sklearn.cluster import KMeans

    x = np.load(file)

    def work() -> Any:
        model = KMeans(k, n_init=1, max_iter=ITERATIONS, random_state=random_state).fit(x)
        return model.labels_, model.n_iter_, ""

    return work


def pypi(file: Path, k: int, random_state: int, copies: int) -> Callable[[], Any]:
    import torch
    from balanced_kmeans import kmeans_equal

    x = torch.from_numpy(np.load(file)).repeat(copies, 1, 1)
    torch.manual_seed(random_state)

    def work() -> Any:
        labels, _ = kmeans_equal(x, num_clusters=k, cluster_size=x.shape[1] // k, max_iters=ITERATIONS)
        return labels[0].numpy(), "", f"{copies} copies at once" if copies > 1 else ""

    return work


def many_states(file: Path, k: int) -> Callable[[], Any]:
    x = np.load(file)

    def work() -> Any:
        return [balanced_kmeans(x, k, random_state=state, max_iterations=ITERATIONS).labels_ for state in range(STATES)]

    return work


def inertia(x: NDArray[np.float32], labels: NDArray[Any]) -> float:
    """Sum of squared distances to the mean of each cluster."""
    total = 0.0
    for cluster in np.unique(labels):
        members = x[labels == cluster].astype(np.float64)
        total += float(np.square(members - members.mean(axis=0)).sum())
    return total


def purity(domains: NDArray[Any], labels: NDArray[Any]) -> float:
    return float(contingency_matrix(domains, labels).max(axis=0).sum() / len(labels))


def run_in_turns(file: Path, k: int, args: argparse.Namespace) -> dict[str, list[Measurement]]:
    """Runs of every method; one that failed is not tried again."""
    methods: dict[str, tuple[Any, ...]] = {OURS: (ours,), CONSTRAINED: (constrained,), PLAIN: (plain,), PYPI: (pypi, 1)}
    found: dict[str, list[Measurement]] = {name: [] for name in methods}
    for random_state in range(args.repeats):
        for name in list(methods):
            prepare, *more = methods[name]
            if found[name] and found[name][-1].error:
                continue
            found[name].append(measure(prepare, file, k, random_state, *more, limit_s=args.limit))
            if methods[name] == (pypi, 1) and found[name][-1].error:
                row(k, f"{PYPI}, one batch", "failed: " + found[name].pop().error, *[""] * 7)
                methods[name] = (pypi, 2)
                found[name].append(measure(pypi, file, k, random_state, 2, limit_s=args.limit))
    return found


def print_method(
    name: str,
    runs: list[Measurement],
    x: NDArray[np.float32],
    domains: NDArray[Any] | None,
    k: int,
    ours_s: float,
    records: Records,
) -> float:
    """Print the row of one method; returns its median inertia."""
    case = f"k = {k}, {len(x):,} documents"
    if runs[-1].error:
        row(k, name, "failed: " + runs[-1].error, *[""] * 7)
        records.measured(case, name, runs)
        return float("nan")
    seconds = statistics.median(run.seconds for run in runs)
    inertias = [inertia(x, run.value[0]) for run in runs]
    sizes = [np.bincount(run.value[0], minlength=k) for run in runs]
    quality = ["", ""]
    if domains is not None:
        quality = [
            f"{statistics.median(score(domains, run.value[0]) for run in runs):.3f}"
            for score in (normalized_mutual_info_score, purity)
        ]
    note = f" ({runs[-1].value[2]})" if runs[-1].value[2] else ""
    row(k, name + note, f"{seconds:.3f}", f"{statistics.median(run.cpu_seconds for run in runs):.3f}",
        f"{seconds / ours_s:.2f}", "/".join(str(run.value[1]) for run in runs),
        f"{statistics.median(inertias):.2f} ({min(inertias):.2f}-{max(inertias):.2f})",
        f"{min(size.min() for size in sizes)}-{max(size.max() for size in sizes)}", *quality)  # fmt: skip
    facts = [f"inertia {statistics.median(inertias):.2f}"]
    facts += [f"sizes {min(size.min() for size in sizes):,} to {max(size.max() for size in sizes):,}"]
    facts += [f"NMI {quality[0]}"] * bool(quality[0])
    records.measured(case, name + note, runs, is_ours=name == OURS, note=", ".join(facts))
    return statistics.median(inertias)


def compare(
    file: Path, x: NDArray[np.float32], domains: NDArray[Any] | None, k: int, args: Any, records: Records
) -> list[Any]:
    """Print the rows of one k; returns the goals: what, whether it is met, what was found."""
    found = run_in_turns(file, k, args)
    if found[OURS][-1].error:
        raise SystemExit(f"cbtm failed at k={k}: {found[OURS][-1].error}")
    seconds = {name: statistics.median(run.seconds for run in runs) for name, runs in found.items()}
    inertias = {name: print_method(name, runs, x, domains, k, seconds[OURS], records) for name, runs in found.items()}
    ratio, growth = seconds[CONSTRAINED] / seconds[OURS], inertias[OURS] / inertias[CONSTRAINED]
    return [
        (f"k={k}, >= 3x {CONSTRAINED}", ratio >= 3, found[CONSTRAINED][-1].error or f"{ratio:.2f}x"),
        (f"k={k}, median inertia <= 1.002 of {CONSTRAINED}'s", growth <= 1.002, f"{growth:.5f}"),
    ]


def print_states(
    file: Path,
    x: NDArray[np.float32],
    domains: NDArray[Any] | None,
    k: int,
    args: argparse.Namespace,
    records: Records,
) -> None:
    run = measure(many_states, file, k, limit_s=STATES * args.limit)
    if run.error:
        raise SystemExit(f"cbtm failed from one of {STATES} random states: {run.error}")
    inertias = [inertia(x, labels) for labels in run.value]
    print(
        f"\ncbtm, k={k}, random states 0 to {STATES - 1}: {run.seconds / STATES:.3f} s each, inertia min/median/max "
        f"{min(inertias):.2f}/{statistics.median(inertias):.2f}/{max(inertias):.2f}"
    )
    if domains is not None:
        scores = [normalized_mutual_info_score(domains, labels) for labels in run.value]
        numbers = f"{min(scores):.3f}/{statistics.median(scores):.3f}/{max(scores):.3f}"
        if args.least_nmi is not None:
            text = f"k={k}, NMI >= {args.least_nmi:g} from any of {STATES} random states"
            records.goal(text, min(scores) >= args.least_nmi, numbers)
        else:
            print(f"NMI min/median/max {numbers}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clusters", default="8,32", help="numbers of clusters, default 8,32")
    parser.add_argument("--least-nmi", type=float, metavar="X", help="goal of the ten states; .93 on c8")
    parser.add_argument("--large", action="store_true", help="also 128 clusters")
    add_text_arguments(parser)
    add_json_argument(parser)
    args = parser.parse_args()
    numbers = sorted({int(k) for k in args.clusters.split(",")} | ({128} if args.large else set()))
    threads = limit_threads(args.threads)
    text = text_of(args)
    x = TfidfSvdEmbedder(random_state=0).fit_transform(text.texts())
    domains = text.labels()
    packages = ("numpy", "scikit-learn", "k-means-constrained", "ortools", "balanced-kmeans", "torch")
    print(
        f"{hardware(*packages)}; {threads}; {len(x)} documents of {text}, d={x.shape[1]}; at most {ITERATIONS} "
        f"iterations, one start, {args.repeats} random states\n"
    )
    header("k", "method", "s", "CPU s", "ratio to cbtm", "iterations", "inertia (range)", "sizes", "NMI", "purity")
    records = Records(args.json)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vectors.npy"
        np.save(file, x)
        goals = [line for k in numbers for line in compare(file, x, domains, k, args, records)]
        print()
        for line in goals:
            records.goal(*line)
        print_states(file, x, domains, numbers[0], args, records)


if __name__ == "__main__":
    main()
