"""Drift: statistics by hand, no alarm without drift, an alarm for other text, odd inputs, profiles that are broken."""

import copy
import json

import numpy as np
import pytest
from numpy.typing import NDArray

from cbtm.cluster.drift import (
    LEAST_DOCUMENTS,
    THRESHOLDS,
    DistanceProfile,
    DriftReport,
    format_drift,
    measure_drift,
)
from cbtm.cluster.embedder import TfidfSvdEmbedder
from cbtm.cluster.kmeans import balanced_kmeans
from cbtm.errors import DataError, ManifestError

CENTERS = np.array([[0, 0], [10, 0]], dtype=np.float32)


def at_distances(*distances: float, cluster: int = 0) -> NDArray[np.float32]:
    """Points above a centre; none is the zero vector as long as no distance is 0."""
    return np.array([[CENTERS[cluster, 0], distance] for distance in distances], dtype=np.float32)


def hundred_and_one() -> DistanceProfile:
    """Distances 0.01, 0.02, ..., 1.01 in cluster 0: percentile p is (p + 1) / 100."""
    return DistanceProfile.of([at_distances(*(np.arange(1, 102) / 100))], CENTERS)


def measure(report: DriftReport, name: str):
    return next(row for row in report.measures if row.name == name)


def domain_vectors(rng: np.random.Generator, n: int, centers: NDArray[np.float32]) -> NDArray[np.float32]:
    """Unit vectors about random centres, as an embedding has them."""
    x = centers[rng.integers(len(centers), size=n)] + 0.5 * rng.normal(size=(n, centers.shape[1])) / 5
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def domains() -> NDArray[np.float32]:
    return domain_vectors(np.random.default_rng(1), 8, np.random.default_rng(0).normal(size=(8, 25)).astype(np.float32))


@pytest.fixture(scope="module")
def fitted(domains):
    x = domain_vectors(np.random.default_rng(2), 2000, domains)
    centers = balanced_kmeans(x, 8, random_state=0).cluster_centers_
    return DistanceProfile.of([x], centers), centers


def test_the_profile_holds_the_percentiles_and_the_sizes():
    points = np.concatenate([at_distances(*(np.arange(1, 102) / 100)), at_distances(2, 4, cluster=1), np.zeros((3, 2))])
    profile = DistanceProfile.of([points], CENTERS)
    assert (profile.n_documents, profile.n_zero_vectors, profile.cluster_documents) == (106, 3, (101, 2))
    assert profile.cluster_quantiles[0] == pytest.approx(
        (0.01, 0.02, 0.06, 0.11, 0.26, 0.51, 0.76, 0.91, 0.96, 1, 1.01)
    )
    assert profile.cluster_quantiles[1] is not None
    assert profile.cluster_quantiles[1][5] == pytest.approx(3)  # the median of 2 and 4
    assert profile.quantiles[-1] == pytest.approx(4)


def test_blocks_change_nothing(fitted, domains):
    profile, centers = fitted
    x = domain_vectors(np.random.default_rng(3), 500, domains)
    whole = DistanceProfile.of([x], centers)
    blocks = [x[:1], x[1:1], x[1:130], x[130:]]
    assert DistanceProfile.of(iter(blocks), centers) == whole
    assert measure_drift(profile, blocks, centers) == measure_drift(profile, [x], centers)


def test_the_fitted_documents_themselves_have_not_moved():
    report = measure_drift(hundred_and_one(), [at_distances(*(np.arange(1, 102) / 100))], CENTERS)
    assert report.verdict == "none"
    assert report.median == pytest.approx(report.fit_median) == pytest.approx(0.51)
    assert report.share_shift == report.jensen_shannon == 0
    assert report.ks == pytest.approx(0, abs=0.0101)  # the grid of the profile
    # Beyond 0.96: 0.97 to 1.01, five of 101; beyond 1.00: one.
    assert measure(report, "beyond 95 %").value == pytest.approx(5 / 101)
    assert measure(report, "beyond 99 %").value == pytest.approx(1 / 101)


def test_statistics_of_a_known_shift():
    # Fit 0.01 to 1.01, new 0.26 to 1.26: the distribution functions differ by 25 of 101 between 0.25 and 1.01.
    report = measure_drift(hundred_and_one(), [at_distances(*(np.arange(26, 127) / 100))], CENTERS)
    assert report.median == pytest.approx(0.76)
    assert measure(report, "beyond 95 %").value == pytest.approx(30 / 101)  # 0.97 to 1.26
    assert measure(report, "beyond 99 %").value == pytest.approx(26 / 101)
    assert measure(report, "farther (KS)").value == pytest.approx(25 / 101, abs=0.0101)
    assert report.clusters[0].beyond_95 == pytest.approx(30 / 101)
    assert (report.clusters[1].documents, report.clusters[1].median, report.clusters[1].level) == (0, None, "unknown")


def test_kolmogorov_smirnov_agrees_with_scipy_to_the_grid(fitted, domains):
    from scipy.stats import ks_2samp

    profile, centers = fitted
    rng = np.random.default_rng(4)
    fit, new = domain_vectors(np.random.default_rng(2), 2000, domains), domain_vectors(rng, 300, domains)
    new = new + 0.05 * rng.normal(size=new.shape).astype(np.float32)

    def nearest(x):
        return np.linalg.norm(x[:, None] - centers, axis=2).min(axis=1)

    report = measure_drift(profile, [new], centers)
    assert report.ks == pytest.approx(ks_2samp(nearest(fit), nearest(new), method="asymp").statistic, abs=0.011)
    one_sided = ks_2samp(nearest(fit), nearest(new), alternative="greater", method="asymp").statistic
    assert measure(report, "farther (KS)").value == pytest.approx(one_sided, abs=0.011)


def test_equal_distances_are_no_drift_although_every_percentile_is_the_same():
    profile = DistanceProfile.of([at_distances(*[0.5] * 200)], CENTERS)
    report = measure_drift(profile, [at_distances(*[0.5] * 60)], CENTERS)
    assert (report.verdict, report.ks) == ("none", 0)
    assert measure_drift(profile, [at_distances(*[0.6] * 60)], CENTERS).ks == 1


def test_documents_that_lie_nearer_raise_no_alarm():
    report = measure_drift(hundred_and_one(), [at_distances(*[0.1] * 100)], CENTERS)
    assert report.ks == pytest.approx(0.9, abs=0.0101)
    assert measure(report, "farther (KS)").value == pytest.approx(0.1, abs=0.0101)  # below 0.1 lie a tenth of the fit
    assert report.verdict == "none"


def test_other_shares_of_the_same_clusters_are_drift_without_distance():
    fit = np.concatenate([at_distances(*[0.5] * 500), at_distances(*[0.5] * 500, cluster=1)])
    new = np.concatenate([at_distances(*[0.5] * 800), at_distances(*[0.5] * 200, cluster=1)])
    report = measure_drift(DistanceProfile.of([fit], CENTERS), [new], CENTERS)
    assert report.share_shift == pytest.approx(0.3)  # (|0.8 - 0.5| + |0.2 - 0.5|) / 2
    # Entropy of (0.65, 0.35) less the mean of those of (0.8, 0.2) and (0.5, 0.5), in bits.
    assert report.jensen_shannon == pytest.approx(0.9341 - (0.7219 + 1) / 2, abs=1e-4)
    # Mean of |difference of shares| of two samples of the pooled (0.65, 0.35), and the allowance above it.
    shares = measure(report, "shares (TV)")
    assert shares.expected == pytest.approx(np.sqrt(0.65 * 0.35 * (1 / 1000 + 1 / 1000) * 2 / np.pi))
    assert shares.chance == pytest.approx(np.sqrt(np.log(1000) / 2 * (1 / 1000 + 1 / 1000)))
    assert (shares.level, report.verdict) == ("some", "some")  # 0.3 - 0.017 - 0.083 = 0.200
    assert {row.level for row in report.measures if row.name != "shares (TV)"} == {"none"}


def test_documents_without_a_known_word_are_counted_apart_and_alarm():
    new = np.concatenate([at_distances(*(np.arange(1, 102) / 100)), np.zeros((99, 2), dtype=np.float32)])
    report = measure_drift(hundred_and_one(), [new], CENTERS)
    assert (report.documents, report.zero_vectors) == (200, 99)
    assert measure(report, "farther (KS)").level == "none"
    assert measure(report, "zero vectors").value == pytest.approx(99 / 200)
    assert report.verdict == "strong"
    assert "another language" in format_drift(report)


def test_documents_that_all_lack_known_words_are_reported_not_divided_by():
    report = measure_drift(hundred_and_one(), [np.zeros((80, 2), dtype=np.float32)], CENTERS)
    assert (report.verdict, report.median, report.ks, report.share_shift) == ("strong", None, None, None)
    assert {row.level for row in report.measures if row.value is None} == {"unknown"}
    assert "median distance -" in format_drift(report)
    json.dumps(report.to_json(), allow_nan=False)


@pytest.mark.parametrize("size", [LEAST_DOCUMENTS, 200, 1000])
def test_samples_of_the_same_distribution_raise_no_alarm(fitted, domains, size):
    profile, centers = fitted
    for seed in range(30):
        x = domain_vectors(np.random.default_rng([100, seed]), size, domains)
        assert measure_drift(profile, [x], centers).verdict == "none"


def test_two_hundred_documents_of_another_domain_raise_an_alarm(fitted):
    profile, centers = fitted
    elsewhere = np.random.default_rng(9).normal(size=(1, 25)).astype(np.float32)
    for seed in range(5):
        report = measure_drift(profile, [domain_vectors(np.random.default_rng(seed), 200, elsewhere)], centers)
        assert report.verdict == "strong"
        assert measure(report, "farther (KS)").level == "strong"


def test_a_drift_within_one_of_eight_clusters_shows_there(fitted, domains):
    profile, centers = fitted
    rng = np.random.default_rng(5)
    same, moved = domain_vectors(rng, 1400, domains[1:]), domain_vectors(rng, 200, domains[:1])
    moved = moved + 0.1 * rng.normal(size=moved.shape).astype(np.float32)
    report = measure_drift(profile, [same, moved / np.linalg.norm(moved, axis=1, keepdims=True)], centers)
    assert [own.level for own in report.clusters].count("strong") == 1
    assert report.verdict != "none"


def test_few_documents_give_no_verdict():
    report = measure_drift(hundred_and_one(), [at_distances(*[5.0] * (LEAST_DOCUMENTS - 1))], CENTERS)
    assert report.verdict == "unknown"
    assert f"Fewer than {LEAST_DOCUMENTS} documents" in format_drift(report)


_SUBJECTS = {
    "kitchen": "onion garlic butter flour oven pan simmer sauce recipe dough salt pepper stir bake roast spoon",
    "harbour": "ship anchor crew sail tide captain deck harbour mast storm cargo rope pilot lighthouse wave keel",
    "court": "judge jury appeal verdict counsel statute witness plaintiff motion evidence clause ruling oath bail",
    "garden": "soil seed prune rose compost spade hedge tulip lawn weed bulb orchard mulch shrub petal stem",
    "physics": "quark lepton boson hadron spin gauge momentum photon neutrino decay collider muon flavour parity",
}
_COMMON = "morning people small always number house water great under world light place think right long day"


def sentences(subject: str, n: int, rng: np.random.Generator) -> list[str]:
    own = _SUBJECTS[subject].split()
    return [" ".join([*rng.choice(own, 12), *rng.choice(_COMMON.split(), 20)]) for _ in range(n)]


def test_text_of_unseen_subject_is_drift_and_held_out_text_is_not():
    rng = np.random.default_rng(6)
    known = ["kitchen", "harbour", "court", "garden"]
    embedder = TfidfSvdEmbedder(n_components=10)
    x = embedder.fit_transform(text for subject in known for text in sentences(subject, 150, rng))
    centers = balanced_kmeans(x, 4, random_state=0).cluster_centers_
    profile = DistanceProfile.of([x], centers)
    held_out = embedder.transform(text for subject in known for text in sentences(subject, 50, rng))
    assert measure_drift(profile, [held_out], centers).verdict == "none"
    unseen = measure_drift(profile, [embedder.transform(sentences("physics", 200, rng))], centers)
    assert (unseen.verdict, measure(unseen, "farther (KS)").level) == ("strong", "strong")
    other_script = measure_drift(profile, [embedder.transform(["мир и война"] * 200)], centers)
    assert (other_script.zero_vectors, other_script.verdict) == (200, "strong")


def test_the_profile_survives_json(fitted):
    profile, _ = fitted
    assert DistanceProfile.from_json(json.loads(json.dumps(profile.to_json()))) == profile
    one_sided = hundred_and_one()  # with an empty cluster
    assert one_sided.cluster_quantiles[1] is None
    assert DistanceProfile.from_json(json.loads(json.dumps(one_sided.to_json()))) == one_sided


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2, this cbtm reads 1"),
        ({"n_documents": -1}, "-1 is not a count"),
        ({"n_documents": True}, "True is not a count"),
        ({"n_documents": 100}, "contradicts itself: 100 documents, 0 of them without a known word, 101 in clusters"),
        ({"n_zero_vectors": 101}, "contradicts itself"),
        ({"cluster_documents": [100, 1]}, "contradicts itself"),  # but cluster 1 has no quantiles
        ({"cluster_documents": 7}, "holds a wrong one: TypeError"),
        ({"quantiles": [0.5] * 100}, "101 distances in ascending order are wanted"),
        ({"quantiles": [1 - p / 100 for p in range(101)]}, "101 distances in ascending order"),
        ({"quantiles": [float("nan")] * 101}, "101 distances in ascending order"),
        ({"cluster_quantiles": [[0.5] * 10, None]}, "11 distances in ascending order"),
        ({"cluster_quantiles": [None, None]}, "contradicts itself"),
    ],
)
def test_a_broken_profile_is_refused_by_name(change, message):
    data = {**copy.deepcopy(hundred_and_one().to_json()), **change}
    with pytest.raises(ManifestError, match=f"profile.json.*{message}"):
        DistanceProfile.from_json(data, source="profile.json")


def test_a_profile_that_is_no_object_or_lacks_an_entry_is_refused():
    with pytest.raises(ManifestError, match="format 'list'"):
        DistanceProfile.from_json([])
    data = hundred_and_one().to_json()
    del data["quantiles"]
    with pytest.raises(ManifestError, match=r"KeyError\('quantiles'\)"):
        DistanceProfile.from_json(data)


def test_inputs_that_do_not_fit_are_named():
    profile = hundred_and_one()
    with pytest.raises(ManifestError, match="2 clusters, the clusterer 3"):
        measure_drift(profile, [], np.zeros((3, 2), dtype=np.float32))
    with pytest.raises(DataError, match="no new documents"):
        measure_drift(profile, [], CENTERS)
    with pytest.raises(DataError, match=r"vectors of shape \(4, 3\) do not fit centres of shape \(2, 2\)"):
        measure_drift(profile, [np.ones((4, 3), dtype=np.float32)], CENTERS)
    broken = at_distances(1, 2, np.nan)
    with pytest.raises(DataError, match="the vector of document 5 is not finite"):
        measure_drift(profile, [at_distances(1, 1, 1), broken], CENTERS)
    with pytest.raises(DataError, match="none of the 4 documents has a known word"):
        DistanceProfile.of([np.zeros((4, 2), dtype=np.float32)], CENTERS)


def test_the_report_is_plain_data_and_a_table_per_question(fitted, domains):
    profile, centers = fitted
    report = measure_drift(profile, [domain_vectors(np.random.default_rng(7), 200, domains)], centers)
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert [row["name"] for row in data["measures"]] == list(THRESHOLDS)
    assert (len(data["clusters"]), data["verdict"]) == (8, "none")
    text = format_drift(report)
    head, measures, clusters = text.split("\n\n")
    assert head.startswith("Drift: none. 200 new documents against 2000 of the fit")
    assert (len(measures.splitlines()), len(clusters.splitlines())) == (6, 9)
    assert all(len({len(line) for line in table.splitlines()}) == 1 for table in (measures, clusters))
