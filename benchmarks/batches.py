"""Balanced k-means over batches that are read in turn, against all points in memory: time, memory, inertia.

    python benchmarks/batches.py [--points 100000] [--clusters 32] [--batches 8] [--repeats 3]

Points are drawn around random centres with a seed and lie in files, one for each batch, dealt so that each batch is
the whole in small. Both contenders make the same number of rounds; the inertia, in float64, is that of the labels to
the means of their clusters, and sizes may differ by one for each batch.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from corpora import alternate, hardware, header, limit_threads, median, row
from numpy.typing import NDArray
from records import Records, add_json_argument

from cbtm.cluster.kmeans import balanced_kmeans

DIMENSIONS, CENTRES, SPREAD = 100, 64, 0.1  # of the points; as many columns as the embedder has by default
ROUNDS = 6
WHOLE, IN_BATCHES = "cbtm, all points at once", "cbtm, in batches"


class Files(Sequence[NDArray[np.float32]]):
    """Batches, each read when its turn comes."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, place: Any) -> Any:
        return np.load(self._files[place])


def write_points(folder: Path, n_points: int, n_batches: int) -> list[Path]:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((CENTRES, DIMENSIONS), dtype=np.float32)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    weights = rng.dirichlet(np.ones(CENTRES))
    files = [folder / f"{number}.npy" for number in range(n_batches)]
    for number, file in enumerate(files):
        size = n_points // n_batches + (number < n_points % n_batches)
        noise = SPREAD * rng.standard_normal((size, DIMENSIONS), dtype=np.float32)
        np.save(file, centres[rng.choice(CENTRES, size, p=weights)] + noise)
    return files


def whole(files: Sequence[Path], k: int) -> Callable[[], Any]:
    return fitted(k, lambda: np.concatenate([np.load(file) for file in files]))


def in_batches(files: Sequence[Path], k: int) -> Callable[[], Any]:
    return fitted(k, lambda: Files(files))


def fitted(k: int, read: Callable[[], Any]) -> Callable[[], Any]:
    balanced_kmeans(np.eye(2 * k, dtype=np.float32), k, random_state=0, max_iterations=1)  # imports

    def work() -> NDArray[np.int32]:
        # No tolerance: both make all rounds.
        return balanced_kmeans(read(), k, random_state=0, max_iterations=ROUNDS, tolerance=0).labels_

    return work


def inertia(points: NDArray[np.float32], labels: NDArray[Any]) -> float:
    clusters = (points[labels == cluster].astype(np.float64) for cluster in np.unique(labels))
    return sum(float(np.square(members - members.mean(axis=0)).sum()) for members in clusters)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=100_000, metavar="N")
    parser.add_argument("--clusters", type=int, default=32, metavar="K")
    parser.add_argument("--batches", type=int, default=8, metavar="N")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=300, metavar="SECONDS", help="longest work of one contender")
    add_json_argument(parser)
    args = parser.parse_args()
    threads = limit_threads(1)
    print(f"{hardware('numpy')}; {threads}; median of {args.repeats}\n")
    header("", "s", "CPU s", "peak MB", "inertia", "sizes")
    records = Records(args.json)
    case = f"{args.points:,} x {DIMENSIONS}, k = {args.clusters}, {args.batches} batches"
    with tempfile.TemporaryDirectory() as folder:
        files = write_points(Path(folder), args.points, args.batches)
        settings = (files, args.clusters)
        contenders = {IN_BATCHES: (in_batches, *settings), WHOLE: (whole, *settings)}
        runs = alternate(contenders, repeats=args.repeats, limit_s=args.limit)
        points = np.concatenate([np.load(file) for file in files])
    found = {name: median(of_one) for name, of_one in runs.items()}
    inertias = {}
    for name, run in found.items():
        if run.error:
            raise SystemExit(f"{name} failed: {run.error}")
        inertias[name], sizes = inertia(points, run.value), np.bincount(run.value, minlength=args.clusters)
        between = f"{sizes.min():,}-{sizes.max():,}"
        row(name, f"{run.seconds:.2f}", f"{run.cpu_seconds:.2f}", f"{run.peak_bytes / 1e6:.1f}",
            f"{inertias[name]:.1f}", between)  # fmt: skip
        note = f"inertia {inertias[name]:.1f}, sizes {between}"
        records.measured(case, name, runs[name], is_ours=name == IN_BATCHES, note=note)
    print()
    share = found[IN_BATCHES].peak_bytes / found[WHOLE].peak_bytes
    records.goal(
        f"batches take less than {2 / args.batches:.0%} of the memory", share < 2 / args.batches, f"{share:.2f}"
    )
    growth = inertias[IN_BATCHES] / inertias[WHOLE]
    records.goal("batches raise the inertia by at most 1 %", growth <= 1.01, f"{growth:.4f}")


if __name__ == "__main__":
    main()
