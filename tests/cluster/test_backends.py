"""Backends of k-means: each does what it says, refuses what it cannot, and is the same twice."""

import logging
import sys

import numpy as np
import pytest
from numpy.typing import NDArray

from cbtm.cluster.backends import fit_kmeans
from cbtm.cluster.kmeans import balanced_kmeans, nearest_centers
from cbtm.errors import ConfigError, DataError


@pytest.fixture
def package() -> None:
    pytest.importorskip("balanced_kmeans")


def groups(sizes: list[int], seed: int = 0) -> NDArray[np.float32]:
    """Tight groups of these sizes, far apart, shuffled."""
    rng = np.random.default_rng(seed)
    x = np.repeat(10 * rng.normal(size=(len(sizes), 4)), sizes, axis=0)
    return rng.permutation(x + 0.1 * rng.normal(size=x.shape)).astype(np.float32)


def test_the_default_is_our_balanced_kmeans():
    x = groups([30, 10, 20])
    expected, result = balanced_kmeans(x, 3, random_state=1), fit_kmeans(x, 3, random_state=1)
    assert np.array_equal(result.labels_, expected.labels_)
    assert np.array_equal(result.cluster_centers_, expected.cluster_centers_)
    assert np.bincount(result.labels_).tolist() == [20, 20, 20]


def test_every_setting_reaches_our_balanced_kmeans():
    x = groups([30, 10, 20])
    seen: list[int] = []
    settings = {"n_init": 2, "max_iterations": 1, "tolerance": 0.5, "weights": np.arange(60)}
    result = fit_kmeans([x[:25], x[25:]], 3, random_state=1, progress=lambda step, _: seen.append(step), **settings)
    expected = balanced_kmeans([x[:25], x[25:]], 3, random_state=1, **settings)
    assert np.array_equal(result.labels_, expected.labels_)
    assert seen == [1, 1]


def test_sklearn_finds_groups_of_unequal_size_with_greedy_labels():
    x = groups([300, 100, 20])
    result = fit_kmeans(x, 3, backend="sklearn", random_state=0, n_init=4)
    assert sorted(np.bincount(result.labels_)) == [20, 100, 300]
    assert np.array_equal(result.labels_, nearest_centers(x, result.cluster_centers_))
    assert result.inertia_ == pytest.approx(np.square(x - result.cluster_centers_[result.labels_]).sum(), rel=1e-4)
    assert result.history_ == (result.inertia_,)
    assert result.labels_.dtype == np.int32
    assert result.cluster_centers_.dtype == np.float32


def test_sklearn_tells_its_last_iteration():
    seen: list[tuple[int, float]] = []
    result = fit_kmeans(
        groups([9, 9]), 2, backend="sklearn", random_state=0, progress=lambda *step: seen.append(step), device="auto"
    )
    assert seen == [(result.n_iter_, result.inertia_)]


@pytest.mark.usefixtures("package")
def test_the_package_clusters_and_says_how_far_from_balanced_it_is(caplog):
    x = np.random.default_rng(2).normal(size=(1000, 10)).astype(np.float32)
    with caplog.at_level(logging.WARNING):
        result = fit_kmeans(x, 8, backend="balanced-kmeans", random_state=0)
    sizes = np.bincount(result.labels_, minlength=8)
    assert sizes.sum() == 1000
    assert np.ptp(sizes) > 100  # not one of 125 each: the defect that the documentation names
    assert f"its clusters hold {sizes.min()} to {sizes.max()} documents, where 125 each" in caplog.text
    assert result.cluster_centers_.shape == (8, 10)
    assert result.inertia_ == pytest.approx(np.square(x - result.cluster_centers_[result.labels_]).sum(), rel=1e-5)


@pytest.mark.usefixtures("package")
def test_the_package_stepped_one_by_one_is_the_package():
    import torch
    from balanced_kmeans import kmeans_equal

    x = np.random.default_rng(3).normal(size=(400, 5)).astype(np.float32)
    result = fit_kmeans(x, 4, backend="balanced-kmeans", random_state=7, max_iterations=6, tolerance=0)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        labels, centers = kmeans_equal(
            torch.tensor(x).expand(2, -1, -1), num_clusters=4, cluster_size=100, max_iters=result.n_iter_, tol=0
        )
    assert any(
        np.array_equal(result.labels_, labels[copy]) and np.array_equal(result.cluster_centers_, centers[copy])
        for copy in range(2)
    )


@pytest.mark.usefixtures("package")
def test_the_package_is_seeded_and_leaves_the_global_generator_alone():
    import torch

    x = np.random.default_rng(4).normal(size=(300, 5)).astype(np.float32)
    before = torch.random.get_rng_state()
    first, second, other = (
        fit_kmeans(x, 3, backend="balanced-kmeans", random_state=state, max_iterations=3) for state in (0, 0, 1)
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert np.array_equal(first.cluster_centers_, second.cluster_centers_)
    assert not np.array_equal(first.cluster_centers_, other.cluster_centers_)


@pytest.mark.usefixtures("package")
def test_the_package_makes_starts_in_pairs_and_tells_each_iteration():
    x = np.random.default_rng(5).normal(size=(300, 5)).astype(np.float32)
    seen: list[int] = []
    fit_kmeans(
        x,
        3,
        backend="balanced-kmeans",
        random_state=0,
        n_init=3,
        max_iterations=2,
        tolerance=0,
        progress=lambda step, _: seen.append(step),
    )
    assert seen in ([1, 2, 1, 2], [1, 2])  # two pairs for three starts


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("n_points", "n_clusters", "message"),
    [
        (103, 4, "103 is not a multiple of 4; use 100 documents, or backend='balanced'"),
        (100, 1, "fails for n_clusters=1; use at least 2"),
        # Per document 2 tensors * 2 copies * 1000 clusters * 1000 numbers * 4 bytes = 16 MB, times 2000.
        (2000, 1000, "tensors of 29.8 GiB from 2000 documents, 1000 clusters and 1000 dimensions, more than 8 GiB"),
    ],
)
def test_what_the_package_cannot_is_refused(n_points, n_clusters, message):
    x = np.zeros((n_points, 1000 if n_clusters == 1000 else 3), dtype=np.float32)
    with pytest.raises(ConfigError, match=message):
        fit_kmeans(x, n_clusters, backend="balanced-kmeans", random_state=0)


def test_a_missing_package_is_named_with_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "balanced_kmeans", None)
    with pytest.raises(ConfigError, match=r"pip install 'cbtm\[balanced-kmeans\]', or use backend='balanced'"):
        fit_kmeans(groups([4, 4]), 2, backend="balanced-kmeans", random_state=0)


@pytest.mark.parametrize("backend", ["sklearn", "balanced-kmeans"])
def test_weights_and_batches_are_ours_alone(backend):
    x = groups([4, 4])
    with pytest.raises(ConfigError, match=f"backend='{backend}' cannot balance by weights; use backend='balanced'"):
        fit_kmeans(x, 2, backend=backend, random_state=0, weights=np.ones(8))
    with pytest.raises(ConfigError, match=f"backend='{backend}' takes one matrix, not 2 batches"):
        fit_kmeans([x, x], 2, backend=backend, random_state=0)


def test_one_batch_will_do_for_all():
    x = groups([30, 10])
    matrix, batch = (fit_kmeans(points, 2, backend="sklearn", random_state=0) for points in (x, [x]))
    assert np.array_equal(matrix.labels_, batch.labels_)


def test_sklearn_runs_on_no_other_device():
    torch = pytest.importorskip("torch")
    with pytest.raises(ConfigError, match="backend='sklearn' runs on the processor only, not on device='cpu'"):
        fit_kmeans(groups([4, 4]), 2, backend="sklearn", random_state=0, device=torch.device("cpu"))


def test_an_unknown_backend_is_refused_with_those_there_are():
    message = "backend='faiss' is unknown; use one of balanced, sklearn, balanced-kmeans"
    with pytest.raises(ConfigError, match=message):
        fit_kmeans(groups([4, 4]), 2, backend="faiss", random_state=0)


@pytest.mark.parametrize("backend", ["balanced", "sklearn", "balanced-kmeans"])
def test_bad_points_and_settings_are_refused_by_all(backend):
    x = groups([4, 4])
    with pytest.raises(ConfigError, match="max_iterations=0 is too small; use at least 1"):
        fit_kmeans(x, 2, backend=backend, random_state=0, max_iterations=0)
    with pytest.raises(ConfigError, match="n_clusters=9 is larger than the number of documents 8"):
        fit_kmeans(x, 9, backend=backend, random_state=0)
    x[3, 1] = np.nan
    with pytest.raises(DataError, match="row 3 of x is not finite"):
        fit_kmeans(x, 2, backend=backend, random_state=0)
