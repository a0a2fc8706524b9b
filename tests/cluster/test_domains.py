"""The description of domains, against arithmetic on a line, brute force, and scikit-learn."""

import json

import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score

from cbtm.cluster import domains as module
from cbtm.cluster.domains import Snippet, agreement_of, balance, describe_domains
from cbtm.cluster.kmeans import nearest_centers
from cbtm.errors import DataError


def snippet(row):
    return Snippet(f"train/a.jsonl|{row}", f"text {row}")


def describe(centers, vectors, labels, **options):
    k = len(centers)
    terms = options.pop("top_terms", [[f"term{cluster}"] for cluster in range(k)])
    labels = np.asarray(labels, dtype=np.int32)
    arrays = np.asarray(centers, dtype=np.float32), np.asarray(vectors, dtype=np.float32)
    return describe_domains(*arrays, labels, options.pop("snippet", snippet), terms, **options)


def random_case(n, k, d, seed=0):
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((n, d)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    labels = (np.arange(n) % k).astype(np.int32)
    centers = np.stack([vectors[labels == cluster].mean(axis=0) for cluster in range(k)])
    return centers, vectors, labels


def shown(domain, kind):
    return [int(one["sp_id"].split("|")[1]) for one in domain[kind]]


# Three centres on a line at 0, 1 and 10; documents at 0.1, 0.3, 0.4, 0.8, 1.2, 9 and 12. The middle between the
# first two centres is 0.5, between the last two 5.5.
CENTERS = [[0.0], [1.0], [10.0]]
VECTORS = [[0.1], [0.3], [0.4], [0.8], [1.2], [9.0], [12.0]]
LABELS = [0, 0, 1, 1, 2, 2, 2]  # two of them not to the nearest centre: 0.4 and 1.2


def test_sizes_are_those_of_the_fit_and_of_the_nearest_centre():
    made = describe(CENTERS, VECTORS, LABELS)
    assert [domain["fit_documents"] for domain in made["domains"]] == [2, 2, 3]
    # 0.1, 0.3, 0.4 | 0.8, 1.2 | 9, 12
    assert [domain["nearest_documents"] for domain in made["domains"]] == [3, 2, 2]
    assert (made["documents"], made["without_words"]) == (7, 0)
    assert made["balance"] == {
        "fit": {"smallest": 2, "largest": 3, "ratio": 1.5},
        "nearest": {"smallest": 2, "largest": 3, "ratio": 1.5},
    }
    assert made["format"] == 2
    assert made["agreement"] is None


def test_typical_documents_are_the_closest_of_their_cluster():
    made = describe(CENTERS, VECTORS, LABELS, n_examples=2)["domains"]
    assert [shown(domain, "examples") for domain in made] == [[0, 1], [3, 2], [5, 6]]  # 4, at 1.2, is 8.8 from 10
    assert [one["distance"] for one in made[1]["examples"]] == [pytest.approx(0.2), pytest.approx(0.6)]
    assert made[0]["examples"][0]["text"] == "text 0"
    # (0.1 + 0.3) / 2, (0.2 + 0.6) / 2, (8.8 + 1 + 2) / 3
    assert [domain["radius"] for domain in made] == pytest.approx([0.2, 0.4, 3.9333], abs=1e-4)


def test_borderline_documents_have_two_centres_almost_equally_near():
    made = describe(CENTERS, VECTORS, LABELS, n_examples=2)["domains"]
    # At 0.4: 0.6 - 0.4 = 0.2. At 0.3: 0.7 - 0.3 = 0.4. At 0.8: 0.8 - 0.2 = 0.6. At 1.2: 1.2 - 0.2 = 1.
    assert [shown(domain, "borderline") for domain in made] == [[2, 1], [3, 4], [5, 6]]
    assert [one["margin"] for one in made[0]["borderline"]] == pytest.approx([0.2, 0.4], abs=1e-4)
    assert [one["margin"] for one in made[1]["borderline"]] == pytest.approx([0.6, 1.0], abs=1e-4)
    assert [one["margin"] for one in made[2]["borderline"]] == pytest.approx([7.0, 9.0], abs=1e-4)  # 8 - 1, 11 - 2
    assert [[one["other"] for one in domain["borderline"]] for domain in made] == [[1, 1], [0, 0], [1, 1]]


def test_neighbours_are_the_other_centres_in_order_of_distance():
    made = describe(CENTERS, VECTORS, LABELS)["domains"]
    assert made[1]["neighbours"] == [{"cluster": 0, "distance": 1.0}, {"cluster": 2, "distance": 9.0}]
    five = describe([[0.0], [1.0], [2.0], [3.0], [4.0]], VECTORS[:1], [0])["domains"]
    # Ties go to the lower number, and three are kept.
    assert [one["cluster"] for one in five[2]["neighbours"]] == [1, 3, 0]


def test_map_of_centres_in_a_plane_keeps_their_distances():
    rng = np.random.default_rng(1)
    plane = rng.standard_normal((6, 2)) * [3, 1]
    axes = np.linalg.qr(rng.standard_normal((20, 2)))[0]
    made = describe(plane @ axes.T, np.eye(20)[:1], [0])
    positions = np.array([domain["position"] for domain in made["domains"]])
    assert made["map"]["distance_error"] == pytest.approx(0, abs=1e-4)
    assert np.abs(positions).max() == 1.0
    np.testing.assert_allclose(positions.mean(axis=0), 0, atol=1e-3)

    def distances(points):
        return np.linalg.norm(points[:, None] - points[None], axis=2)

    scale = distances(plane)[0, 1] / distances(positions)[0, 1]
    np.testing.assert_allclose(distances(positions) * scale, distances(plane), atol=2e-3)


def test_map_axes_point_to_their_positive_loading():
    # Four centres at +-3 and +-2 on two axes: the first lies right, the third above.
    made = describe([[3, 0], [-3, 0], [0, 2], [0, -2]], [[1.0, 0]], [0])
    positions = [domain["position"] for domain in made["domains"]]
    assert positions[0] == [1.0, 0.0]
    assert positions[2] == pytest.approx([0.0, 2 / 3], abs=1e-4)


def test_map_keeps_near_domains_together_where_principal_components_do_not():
    # Twelve pairs: 10 from each other and 1 apart. Two axes cannot show twelve directions.
    centers = np.zeros((24, 24))
    for pair in range(12):
        centers[2 * pair : 2 * pair + 2, pair] = 10 / np.sqrt(2)
        centers[2 * pair + 1, 12 + pair] = 1
    made = describe(centers, np.eye(24)[:1], [0])
    positions = np.array([domain["position"] for domain in made["domains"]])
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    assert distances.argmin(axis=1).tolist() == [cluster ^ 1 for cluster in range(24)]
    assert 0.05 < made["map"]["distance_error"] < 0.4
    assert len(np.unique(positions, axis=0)) == 24
    again = describe(centers, np.eye(24)[:1], [0])
    assert [domain["position"] for domain in again["domains"]] == positions.tolist()


def test_error_of_the_map_is_the_mean_relative_one_of_its_distances():
    rng = np.random.default_rng(5)
    centers = rng.standard_normal((9, 7)).astype(np.float32)
    made = describe(centers, np.eye(7)[:1], [0])
    positions = np.array([domain["position"] for domain in made["domains"]])
    pairs = [(a, b) for a in range(9) for b in range(a)]
    ratios = [np.linalg.norm(positions[a] - positions[b]) / np.linalg.norm(centers[a] - centers[b]) for a, b in pairs]
    expected = np.mean([abs(ratio / np.median(ratios) - 1) for ratio in ratios])
    assert made["map"]["distance_error"] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("block", [7, 64, 4096])
def test_blocks_memmaps_and_brute_force_agree(block, tmp_path, monkeypatch):
    centers, vectors, labels = random_case(n=300, k=5, d=8)
    monkeypatch.setattr(module, "_BLOCK_ROWS", block)
    made = describe(centers, vectors, labels, n_examples=4)
    parts = [vectors[:100], vectors[100:101], vectors[101:]]
    assert describe_domains(centers, parts, labels, snippet, [[]] * 5, n_examples=4)["balance"] == made["balance"]
    stored = np.memmap(tmp_path / "vectors", dtype=np.float32, mode="w+", shape=vectors.shape)
    stored[:] = vectors
    terms = [[f"term{cluster}"] for cluster in range(5)]
    assert describe_domains(centers, stored, labels, snippet, terms, n_examples=4) == made

    distances = np.linalg.norm(vectors[:, None].astype(float) - centers[None], axis=2)
    nearest, ordered = distances.argmin(axis=1), np.sort(distances, axis=1)
    np.testing.assert_array_equal(nearest, nearest_centers(vectors, centers))
    for cluster, domain in enumerate(made["domains"]):
        own = [row for row in range(300) if labels[row] == cluster]
        assert shown(domain, "examples") == sorted(own, key=lambda row: distances[row, cluster])[:4]
        near = [row for row in range(300) if nearest[row] == cluster]
        edge = sorted(near, key=lambda row: ordered[row, 1] - ordered[row, 0])[:4]
        assert shown(domain, "borderline") == edge
        assert [one["other"] for one in domain["borderline"]] == [int(distances[row].argsort()[1]) for row in edge]
        assert domain["radius"] == pytest.approx(distances[own, cluster].mean(), abs=1e-4)
        assert domain["nearest_documents"] == len(near)


def test_only_the_documents_that_are_shown_are_read():
    centers, vectors, labels = random_case(n=500, k=4, d=6)
    read = []

    def counted(row):
        read.append(row)
        return snippet(row)

    describe(centers, vectors, labels, snippet=counted, n_examples=2)
    assert len(read) == 4 * 2 * 2  # clusters, documents, typical and borderline


def test_ties_go_to_the_earlier_document():
    made = describe([[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0]] * 5 + [[0.0, 1.0]] * 5, [0] * 5 + [1] * 5)
    assert [shown(domain, "examples") for domain in made["domains"]] == [[0, 1, 2], [5, 6, 7]]


def test_documents_without_words_are_counted_and_not_shown():
    # The zero vector is 0.5 from the first centre, nearer than the documents that made it.
    vectors = [[0.0, 0.0], [0.5, 0.8660254], [0.5, -0.8660254], [-1.0, 0.0]]
    made = describe([[0.5, 0.0], [-1.0, 0.0]], vectors, [0, 0, 0, 1])
    assert made["without_words"] == 1
    assert made["domains"][0]["fit_documents"] == 3
    assert made["domains"][0]["nearest_documents"] == 3
    assert shown(made["domains"][0], "examples") == [1, 2]
    assert 0 not in shown(made["domains"][0], "borderline")
    assert made["domains"][0]["radius"] == pytest.approx(0.866, abs=1e-4)


def test_a_cluster_of_nothing_but_zero_vectors_shows_nothing():
    made = describe([[0.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [1.0, 0.0]], [0, 1])
    empty = made["domains"][0]
    assert (empty["examples"], empty["borderline"], empty["radius"]) == ([], [], None)
    assert empty["nearest_documents"] == 1


def test_a_cluster_to_which_no_document_is_nearest_leaves_no_ratio():
    made = describe([[0.0], [0.1], [5.0]], [[0.0], [0.01], [0.02], [5.0]], [0, 0, 1, 2])
    assert [domain["nearest_documents"] for domain in made["domains"]] == [3, 0, 1]
    assert made["balance"]["nearest"] == {"smallest": 0, "largest": 3, "ratio": None}
    assert made["domains"][1]["borderline"] == []
    assert shown(made["domains"][1], "examples") == [2]


def test_one_cluster_has_no_neighbour_and_no_border():
    made = describe([[0.6, 0.0]], [[1.0, 0.0], [0.0, 1.0]], [0, 0])
    (domain,) = made["domains"]
    assert (domain["neighbours"], domain["borderline"], domain["position"]) == ([], [], [0.0, 0.0])
    assert shown(domain, "examples") == [0, 1]
    assert made["map"]["distance_error"] == 0.0
    json.dumps(made, allow_nan=False)


def test_two_clusters_lie_on_one_axis():
    made = describe([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], np.eye(3)[:2], [0, 1])
    positions = [domain["position"] for domain in made["domains"]]
    assert sorted(position[0] for position in positions) == [-1.0, 1.0]
    assert [position[1] for position in positions] == [0.0, 0.0]
    assert made["map"]["distance_error"] == 0.0


def test_centres_in_one_place_give_a_map_of_one_point():
    made = describe([[0.6, 0.8]] * 3, [[0.6, 0.8]] * 3, [0, 1, 2])
    assert [domain["position"] for domain in made["domains"]] == [[0.0, 0.0]] * 3
    assert made["map"]["distance_error"] == 0.0


def test_result_is_json_and_shows_none_where_none_are_asked_for():
    centers, vectors, labels = random_case(n=50, k=3, d=4)
    made = describe(centers, vectors, labels, n_examples=0, true_labels=["a", "b"] * 25)
    json.dumps(made, allow_nan=False)
    assert [(domain["examples"], domain["borderline"]) for domain in made["domains"]] == [([], [])] * 3


def test_agreement_equals_scikit_learn_and_a_count_by_hand():
    centers, vectors, labels = random_case(n=200, k=4, d=6, seed=3)
    rng = np.random.default_rng(0)
    true = ["abcde"[label if rng.random() < 0.7 else 4] for label in labels]
    made = describe(centers, vectors, labels, true_labels=true)["agreement"]
    assert made["nmi"] == pytest.approx(normalized_mutual_info_score(true, labels), abs=1e-12)
    nearest = nearest_centers(vectors, centers)
    assert made["nearest"]["nmi"] == pytest.approx(normalized_mutual_info_score(true, nearest), abs=1e-12)
    by_hand = sum(max(np.count_nonzero((labels == c) & (np.array(true) == t)) for t in "abcde") for c in range(4))
    assert made["purity"] == pytest.approx(by_hand / 200)
    assert (made["n_labelled"], made["n_labels"]) == (200, 5)


def test_documents_without_a_label_do_not_count():
    # Of the labelled, cluster 0 has a, a, b and cluster 1 has b: purity (2 + 1) / 4.
    vectors = [[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 2
    true = ["a", "a", "b", None, "b", None]
    made = describe([[1.0, 0.0], [0.0, 1.0]], vectors, [0] * 4 + [1] * 2, true_labels=true)
    assert made["agreement"]["purity"] == 0.75
    assert made["agreement"]["n_labelled"] == 4
    assert made["domains"][0]["labels"] == [{"label": "a", "share": 0.6667}, {"label": "b", "share": 0.3333}]
    assert made["domains"][1]["labels"] == [{"label": "b", "share": 1.0}]


@pytest.mark.parametrize(
    ("counts", "nmi", "purity"),
    [
        ([[5, 0], [0, 3]], 1.0, 1.0),
        ([[2, 2], [3, 3]], 0.0, 0.5),
        ([[7]], 1.0, 1.0),  # nothing to tell apart, as in scikit-learn
        ([[4, 4]], 0.0, 0.5),
        ([[0, 0], [6, 2]], 0.0, 0.75),  # an empty cluster
    ],
)
def test_agreement_of_extreme_partitions(counts, nmi, purity):
    assert agreement_of(np.array(counts)) == {"nmi": pytest.approx(nmi, abs=1e-12), "purity": pytest.approx(purity)}


def test_balance_is_largest_over_smallest():
    assert balance([4, 2, 6]) == {"smallest": 2, "largest": 6, "ratio": 3.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": [0] * 6}, "more vectors than the 6 labels"),
        ({"labels": [0] * 8}, "7 vectors and 8 labels"),
        ({"labels": [0] * 6 + [3]}, "labels run from 0 to 3; expected 0 to 2"),
        ({"labels": [-1] + [0] * 6}, "labels run from -1 to 0; expected 0 to 2"),
        ({"top_terms": [["a"]]}, "top terms of 1 clusters were given with 3 centres"),
        ({"true_labels": ["a"]}, "1 true labels and 7 documents"),
        ({"true_labels": [None] * 7}, "none of the 7 documents has a label"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes, message):
    labels = changes.pop("labels", LABELS)
    with pytest.raises(DataError, match=message):
        describe(CENTERS, VECTORS, labels, **changes)
