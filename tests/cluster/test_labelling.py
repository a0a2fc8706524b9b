"""How a batch of documents gets its clusters, on an embedding that one can see through: one axis for each word."""

import itertools

import numpy as np
import pytest

from cbtm.cluster.clusterer import Clusterer
from cbtm.cluster.embedder import TfidfSvdEmbedder
from cbtm.cluster.labelling import Labeller

WORDS = ["apple", "bank", "cat"]
BALANCED = ["balanced-documents", "balanced-tokens"]


def clusterer(centers):
    """Texts as unit vectors of their word counts: "apple" is (1, 0, 0)."""
    embedder = TfidfSvdEmbedder.from_arrays(WORDS, np.ones(3, dtype=np.float32), np.eye(3, dtype=np.float32))
    return Clusterer(embedder, np.array(centers, dtype=np.float32))


def texts_of(n, seed, words=WORDS):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(words, size=rng.integers(1, 9))) for _ in range(n)]


def label(labeller, texts, tokens=None):
    return labeller.label(texts, np.array([len(text.split()) for text in texts] if tokens is None else tokens))


def costs(found, texts):
    vectors = found.embedder.transform(texts)
    return np.square(vectors[:, None] - found.centers[None]).sum(axis=2)  # (n, k)


def test_nearest_is_the_centre_at_the_least_distance():
    # "apple apple bank" is (2, 1, 0)/sqrt(5): 2 - 4/sqrt(5) = 0.21 from apple's centre, 1.11 from bank's.
    labeller = Labeller(clusterer(np.eye(3)), "nearest")
    found = label(labeller, ["cat", "apple apple bank", "bank bank apple", "Cat, cat & bank!"])
    assert found.tolist() == [2, 0, 1, 2]
    assert found.dtype == np.int32


def test_a_document_of_stop_words_goes_to_the_shortest_centre_every_time():
    labeller = Labeller(clusterer([[1, 0, 0], [0, 0.5, 0], [0, 0, 2]]), "nearest")
    texts = ["the of and", "cat", "", "12 345", "dog"]  # the zero vector but for the cat
    assert label(labeller, texts).tolist() == [1, 2, 1, 1, 1]
    assert label(labeller, texts[:1]).tolist() == [1]
    assert labeller.without_words == 4 + 1


def test_of_two_equal_centres_the_lower_number_takes_a_document():
    labeller = Labeller(clusterer([[2, 0, 0], [0, 0, 1], [0, 0, 1]]), "nearest")
    assert label(labeller, ["the", "cat"]).tolist() == [1, 1]


@pytest.mark.parametrize("n", [7, 8, 9, 100])
def test_balanced_documents_gives_each_cluster_floor_or_ceil_of_a_batch(n):
    labeller = Labeller(clusterer(np.eye(3)), "balanced-documents")
    for seed in range(3):  # every batch by itself
        sizes = np.bincount(label(labeller, texts_of(n, seed, words=["apple", "apple", "bank"])), minlength=3)
        assert sorted(sizes) == [n // 3] * (3 - n % 3) + [n // 3 + 1] * (n % 3)


def test_balanced_documents_costs_the_least_of_all_equal_shares():
    found = clusterer(np.random.default_rng(1).random((3, 3)))
    labeller = Labeller(found, "balanced-documents")
    shares = [s for s in itertools.product(range(3), repeat=6) if sorted(np.bincount(s, minlength=3)) == [2, 2, 2]]
    assert len(shares) == 90  # 6! / 2!^3
    for seed in range(5):  # prices of the batch before change nothing
        texts = texts_of(6, seed)
        cost = costs(found, texts)
        least = min(cost[np.arange(6), list(share)].sum() for share in shares)
        assert cost[np.arange(6), label(labeller, texts)].sum() == pytest.approx(least, abs=1e-5)


def test_balanced_tokens_gives_each_cluster_a_third_to_within_the_longest_document():
    labeller = Labeller(clusterer(np.eye(3)), "balanced-tokens")
    rng = np.random.default_rng(0)
    for seed, n in enumerate((40, 200, 41)):
        tokens = rng.integers(1, 500, size=n)
        found = label(labeller, texts_of(n, seed, words=["apple", "apple", "apple", "bank"]), tokens)
        loads = np.bincount(found, weights=tokens, minlength=3)
        assert loads.sum() == tokens.sum()
        assert np.abs(loads - tokens.sum() / 3).max() < tokens.max()


def test_balanced_tokens_looks_at_tokens_and_not_at_documents():
    # One document of 30 tokens against 30 of one: each cluster holds 30.
    labeller = Labeller(clusterer(np.eye(3)[:2]), "balanced-tokens")
    found = label(labeller, ["apple"] * 31, [30, *[1] * 30])
    assert sorted(np.bincount(found, minlength=2)) == [1, 30]


@pytest.mark.parametrize("method", BALANCED)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_fewer_documents_than_clusters_get_one_each_at_the_least_cost(method, n):
    found = clusterer(np.random.default_rng(2).random((4, 3)))
    for seed in range(5):
        texts = texts_of(n, seed)
        cost = costs(found, texts)
        labels = label(Labeller(found, method), texts)
        assert len(set(labels.tolist())) == n
        least = min(cost[np.arange(n), list(some)].sum() for some in itertools.permutations(range(4), n))
        assert cost[np.arange(n), labels].sum() == pytest.approx(least, abs=1e-5)


@pytest.mark.parametrize("method", BALANCED)
def test_documents_without_words_are_counted_and_balanced_with_the_others(method):
    labeller = Labeller(clusterer([[1, 0, 0], [0, 0.5, 0], [0, 0, 2]]), method)
    assert sorted(np.bincount(label(labeller, ["the"] * 6, [1] * 6), minlength=3)) == [2, 2, 2]
    assert labeller.without_words == 6


@pytest.mark.parametrize("method", BALANCED)
def test_same_batches_give_the_same_clusters(method):
    first, second = (Labeller(clusterer(np.eye(3)), method) for _ in range(2))
    for seed in range(3):
        texts = texts_of(50, seed)
        np.testing.assert_array_equal(label(first, texts), label(second, texts))


def test_a_balanced_batch_has_room_for_every_cluster():
    few, many = clusterer(np.eye(3)), clusterer(np.zeros((1000, 3)))
    assert Labeller(few, "nearest").batch == Labeller(many, "nearest").batch == 1000
    for method in BALANCED:
        assert Labeller(few, method).batch == 5000
        assert Labeller(many, method).batch == 16_000  # 16 documents for each of 1000 clusters
