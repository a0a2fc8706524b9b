import json
from pathlib import Path

import numpy as np
import pytest

from cbtm.cluster.clusterer import Ancestor, Clusterer, read_ancestors
from cbtm.cluster.config import ClusterConfig
from cbtm.cluster.drift import DistanceProfile
from cbtm.cluster.extension import OneCluster, extend_clusterer, joined_domains, joined_profile
from cbtm.cluster.fit import fit_clusterer
from cbtm.corpus import Document
from cbtm.errors import ConfigError, DataError, ManifestError

OLD = ["apple pear plum", "pear plum cherry", "apple cherry", "steel iron copper", "iron copper zinc", "steel zinc"]
ADDED = ["plum zinc ocean", "plum zinc river", "zinc plum"]


def documents(texts, name="a"):
    return [Document(f"train/0/{name}.jsonl|{line}", text) for line, text in enumerate(texts)]


def fitted(folder, texts=OLD, n_clusters=2):
    config = ClusterConfig(n_clusters=n_clusters, n_components=4)
    fit_clusterer(config, documents(texts), folder)
    return Clusterer.load(folder)


def extended(tmp_path, texts=ADDED, n_clusters=3, **settings):
    fitted(tmp_path / "old")
    config = ClusterConfig(n_clusters=n_clusters, **settings)
    return extend_clusterer(config, documents(texts, "b"), tmp_path / "old", tmp_path / "new", digest="d" * 64)


def test_centre_of_the_added_documents_is_their_mean_behind_the_old_ones(tmp_path):
    facts = extended(tmp_path)
    old, new = Clusterer.load(tmp_path / "old"), Clusterer.load(tmp_path / "new")
    assert new.centers[:2].tobytes() == old.centers.tobytes()
    # ocean and river are not known, so all three are the same text: plum and zinc, once each.
    np.testing.assert_allclose(new.centers[2], old.embedder.transform(["plum zinc"])[0], atol=1e-6)
    assert new.predict(["zinc and plum", "apple", "iron"]).tolist()[0] == 2
    assert facts["documents"] == 3
    assert facts["nearest_documents"] == 3
    assert facts["n_clusters"] == 3


def test_words_and_projection_stay_to_the_byte(tmp_path):
    extended(tmp_path)
    for name in ("embedder.json", "embedder.safetensors"):
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "old" / name).read_bytes()


def test_ancestors_are_written_down_in_order(tmp_path):
    extended(tmp_path)
    config = ClusterConfig(n_clusters=4)
    more = documents(["pear iron"], "c")
    extend_clusterer(config, more, tmp_path / "new", tmp_path / "newer", digest="e" * 64)
    assert read_ancestors(str(tmp_path / "old")) == ()
    assert read_ancestors(str(tmp_path / "newer")) == (Ancestor(2, "d" * 64), Ancestor(3, "e" * 64))
    assert Clusterer.load(tmp_path / "newer").ancestors == read_ancestors(str(tmp_path / "newer"))


def test_ancestors_that_are_none_are_refused(tmp_path):
    extended(tmp_path)
    path = tmp_path / "new/clusterer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ancestors": [{"n_clusters": 2}]}))
    with pytest.raises(ManifestError, match=r"names ancestors that are none: KeyError\('digest'\)"):
        read_ancestors(str(tmp_path / "new"))


def test_documents_of_no_known_word_count_as_in_a_fit(tmp_path):
    facts = extended(tmp_path, texts=["plum zinc", "ocean river"])
    half = Clusterer.load(tmp_path / "old").embedder.transform(["plum zinc"])[0] / 2
    np.testing.assert_allclose(Clusterer.load(tmp_path / "new").centers[2], half, atol=1e-6)
    assert facts["without_words"] == 1


def test_text_that_the_clusterer_cannot_read_is_refused(tmp_path):
    with pytest.raises(DataError, match="none of 2 documents has a word that the clusterer knows"):
        extended(tmp_path, texts=["ocean river", "river"])
    assert not (tmp_path / "new/clusterer.json").exists()


@pytest.mark.parametrize("n_clusters", [2, 4])
def test_one_domain_is_added_at_a_time(tmp_path, n_clusters):
    message = f"cluster.n_clusters={n_clusters}, but the clusterer that is extended has 2, .*; use 3"
    with pytest.raises(ConfigError, match=message):
        extended(tmp_path, n_clusters=n_clusters)


def test_sample_of_the_added_documents_is_enough(tmp_path):
    facts = extended(tmp_path, texts=ADDED * 4, max_documents=5, vocabulary_documents=2)
    assert facts["documents"] == 5
    new = Clusterer.load(tmp_path / "new")
    np.testing.assert_allclose(new.centers[2], new.embedder.transform(["plum zinc"])[0], atol=1e-6)


def test_what_is_said_of_the_old_domains_stays_but_for_their_places(tmp_path):
    extended(tmp_path)
    old, new = (json.loads((tmp_path / name / "domains.json").read_text()) for name in ("old", "new"))
    kept = {"cluster", "fit_documents", "nearest_documents", "top_terms", "radius", "labels", "examples", "borderline"}
    for before, after in zip(old["domains"], new["domains"], strict=False):
        assert {name for name in before if before[name] != after[name]} <= {"position", "neighbours"}
        assert kept <= set(after)
    added = new["domains"][2]
    assert added["fit_documents"] == added["nearest_documents"] == 3
    assert added["examples"][0]["sp_id"].startswith("train/0/b.jsonl|")
    assert new["documents"] == 9
    assert new["balance"]["fit"] == {"smallest": 3, "largest": 3, "ratio": 1.0}


def test_added_documents_that_are_nearest_to_old_centres_are_counted_there():
    def entry(cluster, fit, nearest):
        kept = {name: f"{name} of {cluster}" for name in ("top_terms", "radius", "labels", "examples", "borderline")}
        return {"cluster": cluster, "fit_documents": fit, "nearest_documents": nearest, **kept}

    old = {"domains": [entry(0, 6, 7), entry(1, 6, 5)], "documents": 12, "without_words": 1, "agreement": {"nmi": 1.0}}
    new = {"domains": [entry(0, 0, 2), entry(1, 0, 0), entry(2, 9, 7)], "documents": 9, "without_words": 0}
    joined = joined_domains(old, new)
    assert [domain["nearest_documents"] for domain in joined["domains"]] == [9, 5, 7]
    assert [domain["fit_documents"] for domain in joined["domains"]] == [6, 6, 9]
    assert joined["balance"]["nearest"] == {"smallest": 5, "largest": 9, "ratio": 1.8}
    assert (joined["documents"], joined["without_words"], joined["agreement"]) == (21, 1, None)


def test_joined_profile_is_that_of_all_documents_to_the_grid_of_the_profile():
    rng = np.random.default_rng(3)
    centers = np.array([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]], dtype=np.float32)
    first = rng.normal(size=(3000, 2)).astype(np.float32) + centers[rng.integers(2, size=3000)]
    second = (rng.normal(size=(1000, 2)) * 2).astype(np.float32) + centers[2]
    joined = joined_profile(DistanceProfile.of([first], centers[:2]), DistanceProfile.of([second], centers))
    exact = DistanceProfile.of([first, second], centers)
    assert joined.n_documents == exact.n_documents == 4000
    assert joined.cluster_documents == exact.cluster_documents
    np.testing.assert_allclose(joined.quantiles, exact.quantiles, atol=0.1)
    assert (joined.quantiles[0], joined.quantiles[100]) == (exact.quantiles[0], exact.quantiles[100])
    for mine, theirs in zip(joined.cluster_quantiles, exact.cluster_quantiles, strict=True):
        # The last percentile of a tail is taken as straight, which it is not.
        np.testing.assert_allclose(mine[:9], theirs[:9], atol=0.1)
        assert mine[10] == theirs[10]
    assert DistanceProfile.from_json(joined.to_json()) == joined


def test_extended_clusterer_has_a_profile_of_as_many_clusters(tmp_path):
    extended(tmp_path)
    profile = Clusterer.load(tmp_path / "new").profile
    assert profile.n_documents == 9
    assert profile.cluster_documents == (3, 3, 3)


def test_every_line_has_the_one_cluster():
    lines = OneCluster(8).of_file("train/0/a.jsonl")
    assert 0 in lines
    assert 10**12 in lines
    assert lines[5] == 8


def test_folder_that_is_extended_is_read_only(tmp_path):
    fitted(tmp_path / "old")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "old").iterdir()}
    config = ClusterConfig(n_clusters=3)
    extend_clusterer(config, documents(ADDED), Path(tmp_path / "old"), tmp_path / "new", digest="d" * 64)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "old").iterdir()} == before
