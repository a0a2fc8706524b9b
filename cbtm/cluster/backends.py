"""K-means by name: ours, scikit-learn's, or the PyPI package balanced-kmeans.

Only `balanced` is balanced, and it alone takes weights and batches. The others are here for comparison, and for those
who ask for them; a setting that a backend cannot honour is an error, because a fit that ignores it looks the same.

The package balanced-kmeans (0.1.0) needs the most care. Its `kmeans` stops in a debugger, so we call `kmeans_equal`.
That fails on a single data set, so we give it two copies of one, which are two starts. It draws these from torch's
global generator, which we seed within a fork. It returns after many iterations without a word, so we call it for one
at a time. What we cannot mend: a later cluster takes points that an earlier one holds, so sizes differ widely, down to
empty clusters. A warning gives them.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from cbtm.cluster.batches import Batches
from cbtm.cluster.devices import NUMPY, Device, find_device
from cbtm.cluster.kmeans import KMeansResult, balanced_kmeans, check_settings, has_settled
from cbtm.errors import ConfigError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

Backend: TypeAlias = Literal["balanced", "sklearn", "balanced-kmeans"]

# The package makes two float32 tensors of (copies, n, k, d) in each iteration. More than this is refused, because
# the system would end the process without a reason.
_LARGEST_TENSORS_GIB = 8
_COPIES = 2  # the fewest that the package can work on


def fit_kmeans(
    x: NDArray[np.float32] | Sequence[NDArray[np.float32]],
    n_clusters: int,
    *,
    backend: Backend = "balanced",
    random_state: int,
    n_init: int = 1,
    max_iterations: int = 50,
    tolerance: float = 1e-4,
    weights: NDArray[np.floating[Any]] | None = None,
    device: str | torch.device | Device | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> KMeansResult:
    """Fit k-means by one of several implementations.

    Args:
        x: Points, float32, shape (n, d); for `balanced` also a sequence of such matrices.
        n_clusters: k, from 1 to n; for `balanced-kmeans` from 2, and a divisor of n.
        backend: `balanced` is `cbtm.cluster.kmeans.balanced_kmeans`. `sklearn` is plain k-means of scikit-learn, whose
            clusters have any size. `balanced-kmeans` is the package of that name on PyPI, whose clusters are not
            balanced in spite of it.
        random_state: Seed; the same input and seed give the same result on one platform and device.
        n_init: Starts, of which the best is returned. `balanced-kmeans` makes them in pairs.
        max_iterations: Assignments per start at most.
        tolerance: A start ends when the inertia falls by less than this part of itself; the `tol` of `sklearn`.
        weights: To balance by, shape (n,); for `balanced` only.
        device: See `cbtm.cluster.devices.find_device`; `sklearn` has only the processor, `auto` included.
        progress: Called with the iteration (from 1) and the inertia after each assignment; by `sklearn` at the end.

    Returns:
        The best start. `labels_` are balanced for `balanced` only; `history_` of `sklearn` has the last inertia alone.

    Raises:
        ConfigError: If a setting is out of its range or beyond the backend, or the backend or device is not there.
        DataError: If `x` or `weights` is not what it should be.
    """
    if backend not in get_args(Backend):
        raise ConfigError(f"backend={backend!r} is unknown; use one of {', '.join(get_args(Backend))}")
    found = find_device(device)
    if backend == "balanced":
        return balanced_kmeans(
            x,
            n_clusters,
            random_state=random_state,
            n_init=n_init,
            max_iterations=max_iterations,
            tolerance=tolerance,
            weights=weights,
            device=found,
            progress=progress,
        )
    check_settings(
        n_clusters, random_state=random_state, n_init=n_init, max_iterations=max_iterations, tolerance=tolerance
    )
    points = _one_matrix(x, n_clusters, weights, backend)
    if backend == "sklearn":
        if found is not NUMPY and device != "auto":
            raise ConfigError(f"backend='sklearn' runs on the processor only, not on device={str(device)!r}")
        return _sklearn(points, n_clusters, random_state, n_init, max_iterations, tolerance, progress)
    return _package(points, n_clusters, random_state, n_init, max_iterations, tolerance, found, progress)


def _one_matrix(
    x: NDArray[np.float32] | Sequence[NDArray[np.float32]],
    n_clusters: int,
    weights: NDArray[np.floating[Any]] | None,
    backend: str,
) -> NDArray[np.float32]:
    if weights is not None:
        raise ConfigError(f"backend={backend!r} cannot balance by weights; use backend='balanced'")
    if not isinstance(x, np.ndarray) and len(x) > 1:
        raise ConfigError(f"backend={backend!r} takes one matrix, not {len(x)} batches; use backend='balanced'")
    return Batches(x, n_clusters, weights=None, device=NUMPY).host_points()


def _sklearn(
    x: NDArray[np.float32],
    n_clusters: int,
    random_state: int,
    n_init: int,
    max_iterations: int,
    tolerance: float,
    progress: Callable[[int, float], None] | None,
) -> KMeansResult:
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    model = KMeans(n_clusters, n_init=n_init, max_iter=max_iterations, tol=tolerance, random_state=random_state)
    # Its threads add up their sums in the order in which they end: with three or more, one random state gives centres
    # that differ in the last digits.
    with threadpool_limits(1, user_api="openmp"):
        model.fit(x)
    inertia = float(model.inertia_)
    if progress is not None:
        progress(model.n_iter_, inertia)
    centers = model.cluster_centers_.astype(np.float32)
    return KMeansResult(centers, model.labels_.astype(np.int32), inertia, model.n_iter_, (inertia,))


def _package(
    x: NDArray[np.float32],
    n_clusters: int,
    random_state: int,
    n_init: int,
    max_iterations: int,
    tolerance: float,
    device: Device,
    progress: Callable[[int, float], None] | None,
) -> KMeansResult:
    """The package on two copies of x at a time, each from its own start."""
    torch, kmeans_equal = _load_package()
    _refuse_what_the_package_cannot(x, n_clusters)
    on_device = torch.tensor(x, device=device.torch_device)
    runs: list[KMeansResult] = []
    with torch.random.fork_rng(devices=[on_device.device] if on_device.is_cuda else []):
        torch.manual_seed(random_state)
        for _ in range(0, n_init, _COPIES):
            runs += _pair_of_starts(on_device, n_clusters, kmeans_equal, max_iterations, tolerance, progress)
    best = min(runs, key=lambda run: run.inertia_)
    sizes = np.bincount(best.labels_, minlength=n_clusters)
    if np.ptp(sizes) > 0:
        logger.warning(
            "backend=balanced-kmeans: its clusters hold %d to %d documents, where %d each would be balanced; "
            "backend=balanced is exact",
            sizes.min(),
            sizes.max(),
            len(x) // n_clusters,
        )
    return best


def check_backend(backend: Backend) -> None:
    """Tell before any work whether a backend is there.

    Raises:
        ConfigError: If its package is not installed.
    """
    if backend == "balanced-kmeans":
        _load_package()


def _load_package() -> tuple[Any, Callable[..., Any]]:
    try:
        return importlib.import_module("torch"), importlib.import_module("balanced_kmeans").kmeans_equal
    except ImportError as error:
        raise ConfigError(
            f"backend='balanced-kmeans' needs PyTorch and the package balanced-kmeans ({error}): "
            "pip install 'cbtm[balanced-kmeans]', or use backend='balanced'"
        ) from error


def _refuse_what_the_package_cannot(x: NDArray[np.float32], n_clusters: int) -> None:
    n_points, n_columns = x.shape
    if n_clusters == 1:
        raise ConfigError("backend='balanced-kmeans' fails for n_clusters=1; use at least 2, or backend='balanced'")
    if remainder := n_points % n_clusters:
        raise ConfigError(
            f"backend='balanced-kmeans' needs a number of documents that n_clusters divides, but {n_points} is not a "
            f"multiple of {n_clusters}; use {n_points - remainder} documents, or backend='balanced'"
        )
    gib = 2 * _COPIES * n_points * n_clusters * n_columns * 4 / 2**30
    if gib > _LARGEST_TENSORS_GIB:
        raise ConfigError(
            f"backend='balanced-kmeans' would make tensors of {gib:.1f} GiB from {n_points} "
            f"documents, {n_clusters} clusters and {n_columns} dimensions, more than {_LARGEST_TENSORS_GIB} GiB; "
            "use fewer, or backend='balanced'"
        )


def _pair_of_starts(
    x: torch.Tensor,
    n_clusters: int,
    kmeans_equal: Callable[..., Any],
    max_iterations: int,
    tolerance: float,
    progress: Callable[[int, float], None] | None,
) -> list[KMeansResult]:
    copies = x.expand(_COPIES, -1, -1)  # (copies, n, d)
    centers = None
    histories: list[list[float]] = [[] for _ in range(_COPIES)]
    while True:
        labels, centers = kmeans_equal(
            copies, num_clusters=n_clusters, cluster_size=len(x) // n_clusters, max_iters=1, initial_state=centers
        )
        for history, own_labels, own_centers in zip(histories, labels, centers, strict=True):
            history.append(float((x - own_centers[own_labels]).double().square().sum()))
        if progress is not None:
            progress(len(histories[0]), min(history[-1] for history in histories))
        if len(histories[0]) == max_iterations or all(has_settled(history, tolerance) for history in histories):
            break
    return [
        KMeansResult(
            centers[copy].cpu().numpy(),
            labels[copy].cpu().numpy().astype(np.int32),
            history[-1],
            len(history),
            tuple(history),
        )
        for copy, history in enumerate(histories)
    ]
