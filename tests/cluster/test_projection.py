"""The truncated SVD against numpy's full one and scikit-learn's randomised one."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix, random_array
from sklearn.utils.extmath import randomized_svd

from cbtm.cluster.projection import leading_directions


def sparse(n: int, m: int, density: float = 0.02, seed: int = 0) -> csr_matrix:
    rng = np.random.default_rng(seed)
    matrix = csr_matrix(random_array((n, m), density=density, rng=rng, dtype=np.float32))
    # Columns of very different weight, as words have.
    return csr_matrix(matrix.multiply(1 / (1 + np.arange(m, dtype=np.float32)) ** 0.5), dtype=np.float32)


def energy(matrix: csr_matrix, directions: np.ndarray) -> float:
    return float(np.square(matrix @ directions.astype(np.float64)).sum() / np.square(matrix.toarray()).sum())


@pytest.mark.parametrize("shape", [(60, 300), (300, 60), (512, 900)])
def test_few_rows_are_decomposed_exactly(shape: tuple[int, int]):
    matrix = sparse(*shape, density=0.1)
    strengths, directions = leading_directions(matrix, 10, iterations=0, random_state=0)
    _, expected, rows = np.linalg.svd(matrix.toarray().astype(np.float64), full_matrices=False)
    np.testing.assert_allclose(strengths, expected[:10], rtol=1e-4)
    np.testing.assert_allclose(np.abs((directions.T * rows[:10]).sum(axis=1)), 1, atol=1e-3)


def test_directions_are_orthonormal_with_a_positive_largest_entry():
    _, directions = leading_directions(sparse(1500, 2000), 20, iterations=8, random_state=0)
    np.testing.assert_allclose(directions.T @ directions, np.eye(20), atol=1e-4)
    assert (directions[np.abs(directions).argmax(axis=0), np.arange(20)] > 0).all()


def test_energy_is_that_of_the_full_decomposition_and_above_the_randomised_one():
    matrix = sparse(800, 1000)
    strengths, directions = leading_directions(matrix, 50, iterations=11, random_state=0)
    best = np.square(np.linalg.svd(matrix.toarray(), compute_uv=False)[:50]).sum() / np.square(matrix.toarray()).sum()
    _, _, rows = randomized_svd(matrix, 50, n_iter=5, random_state=0)
    assert 0.995 * best < energy(matrix, directions) <= best + 1e-6
    assert energy(matrix, directions) > energy(matrix, rows.T)
    assert np.square(strengths).sum() == pytest.approx(energy(matrix, directions) * np.square(matrix.data).sum(), 1e-4)


def test_more_iterations_find_more_energy():
    matrix = sparse(2000, 3000)
    energies = [
        energy(matrix, leading_directions(matrix, 40, iterations=n, random_state=0)[1]) for n in (4, 6, 8, 12, 16)
    ]
    assert energies == sorted(energies)


@pytest.mark.parametrize("n_rows", [40, 2000])
def test_repeated_rows_give_no_more_directions_than_there_are(n_rows: int):
    five = sparse(5, 400, density=0.2)
    matrix = csr_matrix(five.toarray()[np.arange(n_rows) % 5])
    strengths, directions = leading_directions(matrix, 20, iterations=11, random_state=0)
    assert len(strengths) == directions.shape[1] == 5
    assert energy(matrix, directions) == pytest.approx(1, abs=1e-5)


def test_narrow_matrix_of_many_rows():
    matrix = sparse(3000, 7, density=0.4)
    strengths, directions = leading_directions(matrix, 20, iterations=11, random_state=0)
    assert directions.shape == (7, 7)
    np.testing.assert_allclose(strengths, np.linalg.svd(matrix.toarray(), compute_uv=False), rtol=1e-4)


def test_same_seed_same_directions():
    matrix = sparse(1000, 1500)
    first, second, other = (leading_directions(matrix, 10, iterations=5, random_state=seed)[1] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, other)
