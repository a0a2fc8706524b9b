import hashlib
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from cbtm.cluster.clusterer import Clusterer
from cbtm.cluster.config import ClusterConfig
from cbtm.cluster.fit import fit_clusterer
from cbtm.cluster.kmeans import balanced_kmeans
from cbtm.corpus import Document
from cbtm.errors import ConfigError, DataError, ManifestError

DOMAINS = {
    "animals": ["cat", "dog", "horse", "mouse", "sheep", "goat", "rabbit", "fox"],
    "money": ["bank", "stock", "market", "price", "interest", "share", "trade", "loan"],
    "food": ["bread", "cheese", "butter", "apple", "soup", "pasta", "salad", "rice"],
}


def corpus(n, seed=0):
    """Documents of six words from one domain each, the domains in turn."""
    rng = np.random.default_rng(seed)
    names = list(DOMAINS)
    texts = [" ".join(rng.choice(DOMAINS[names[number % 3]], size=6)) for number in range(n)]
    return [Document(f"train/00000/text.jsonl|{number}", text) for number, text in enumerate(texts)]


def config(**changes):
    return ClusterConfig(**{"n_clusters": 3, "n_components": 8} | changes)


@pytest.fixture
def fitted(tmp_path):
    facts = fit_clusterer(config(), corpus(60), tmp_path / "clusterer")
    return tmp_path / "clusterer", facts


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_domains_are_found(fitted):
    folder, facts = fitted
    labels = Clusterer.load(folder).predict(document.text for document in corpus(60))
    assert len(set(labels[:3])) == 3
    np.testing.assert_array_equal(labels, np.tile(labels[:3], 20))
    assert facts["sizes"] == [20, 20, 20]
    assert facts["documents"] == 60
    assert facts["n_clusters"] == 3
    assert 0 < facts["explained_energy"] <= 1


def test_facts_are_those_of_balanced_kmeans_on_the_embedding(fitted):
    folder, facts = fitted
    vectors = Clusterer.load(folder).embedder.transform(document.text for document in corpus(60))
    found = balanced_kmeans(vectors, 3, random_state=0)
    assert facts["inertia"] == pytest.approx(found.inertia_, rel=1e-4)
    assert facts["iterations"] == found.n_iter_
    json.dumps(facts)  # they go into a manifest


def test_saved_clusterer_predicts_the_same_to_the_bit(fitted, tmp_path):
    first = Clusterer.load(fitted[0])
    first.save(tmp_path / "again")
    second = Clusterer.load(tmp_path / "again")
    texts = [*(document.text for document in corpus(40, seed=1)), "", "words that nobody has seen"]
    np.testing.assert_array_equal(first.centers, second.centers)
    np.testing.assert_array_equal(first.embedder.transform(texts), second.embedder.transform(texts))
    labels = first.predict(texts)
    np.testing.assert_array_equal(labels, second.predict(texts))
    assert labels.dtype == np.int32
    assert second.n_clusters == 3


def test_prediction_is_the_nearest_centre_with_ties_to_the_lower_number(fitted):
    clusterer = Clusterer.load(fitted[0])
    texts = [document.text for document in corpus(30, seed=2)]
    vectors = clusterer.embedder.transform(texts)
    distances = np.linalg.norm(vectors[:, None] - clusterer.centers[None], axis=2)
    np.testing.assert_array_equal(clusterer.predict(texts), distances.argmin(axis=1))
    twice = Clusterer(clusterer.embedder, np.repeat(clusterer.centers, 2, axis=0))
    np.testing.assert_array_equal(twice.predict(texts), 2 * clusterer.predict(texts))


def test_prediction_is_greedy_and_does_not_balance(fitted):
    clusterer = Clusterer.load(fitted[0])
    texts = [document.text for document in corpus(60) if "cat" in document.text]
    assert len(set(clusterer.predict(texts).tolist())) == 1


def test_same_random_state_gives_the_same_files(tmp_path):
    # Overlapping texts, so that the start of k-means and the sample matter.
    rng = np.random.default_rng(3)
    words = [word for domain in DOMAINS.values() for word in domain]
    documents = [Document(str(number), " ".join(rng.choice(words, size=8))) for number in range(80)]
    for name, state in (("a", 5), ("b", 5), ("c", 6)):
        fit_clusterer(config(random_state=state, max_documents=50), documents, tmp_path / name)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a").keys() == files(tmp_path / "c").keys()
    assert files(tmp_path / "a")["centers.safetensors"] != files(tmp_path / "c")["centers.safetensors"]


@pytest.mark.parametrize(("n", "k"), [(60, 7), (61, 3), (20, 8), (9, 9), (10, 1), (31, 16)])
def test_sizes_are_within_one_document_of_each_other(tmp_path, n, k):
    sizes = fit_clusterer(config(n_clusters=k), corpus(n), tmp_path)["sizes"]
    # n = k * floor(n / k) + remainder, and the remainder is spread.
    assert sorted(sizes) == sorted([n // k] * (k - n % k) + [n // k + 1] * (n % k))
    domains = json.loads((tmp_path / "domains.json").read_text())["domains"]
    assert [domain["fit_documents"] for domain in domains] == sizes


def test_domains_are_described_by_their_words_and_most_typical_documents(fitted):
    folder, _ = fitted
    clusterer = Clusterer.load(folder)
    texts = {document.sp_id: document.text for document in corpus(60)}
    domains = json.loads((folder / "domains.json").read_text(encoding="utf-8"))["domains"]
    assert [domain["cluster"] for domain in domains] == [0, 1, 2]
    found = []
    for domain in domains:
        (name,) = (name for name, words in DOMAINS.items() if set(domain["top_terms"][:5]) <= set(words))
        found.append(name)
        assert len(domain["examples"]) == 3
        examples = [example["text"] for example in domain["examples"]]
        assert examples == [texts[example["sp_id"]] for example in domain["examples"]]
        assert set(clusterer.predict(examples)) == {domain["cluster"]}
        # Nearest first, and no member is nearer than the last one shown.
        members = [text for text in texts.values() if clusterer.predict([text])[0] == domain["cluster"]]
        center = clusterer.centers[domain["cluster"]]
        near = np.sort(np.linalg.norm(clusterer.embedder.transform(members) - center, axis=1))[:3]
        shown = np.linalg.norm(clusterer.embedder.transform(examples) - center, axis=1)
        np.testing.assert_allclose(shown, near, atol=1e-5)
    assert sorted(found) == sorted(DOMAINS)


def test_examples_are_cut_and_may_be_left_out(tmp_path):
    long = [Document(document.sp_id, f"{document.text} " * 40) for document in corpus(12)]
    fit_clusterer(config(examples=1), long, tmp_path / "one")
    domains = json.loads((tmp_path / "one/domains.json").read_text())["domains"]
    assert [len(domain["examples"][0]["text"]) for domain in domains] == [600] * 3
    fit_clusterer(config(examples=0), long, tmp_path / "none")
    assert [domain["examples"] for domain in json.loads((tmp_path / "none/domains.json").read_text())["domains"]] == [
        []
    ] * 3


def test_fit_looks_at_the_sample_only(tmp_path):
    facts = fit_clusterer(config(max_documents=30), corpus(90), tmp_path)
    assert facts["documents"] == sum(facts["sizes"]) == 30
    assert Clusterer.load(tmp_path).embedder.n_documents_ == 30


# --- errors ---


def test_more_clusters_than_documents_are_refused_with_both_numbers(tmp_path):
    with pytest.raises(ConfigError, match="n_clusters=8 is larger than the number of documents 5; use at most 5"):
        fit_clusterer(config(n_clusters=8), corpus(5), tmp_path)


def test_more_clusters_than_the_sample_are_refused_before_any_work():
    with pytest.raises(ConfigError, match="n_clusters=8 is larger than max_documents=5"):
        ClusterConfig.parse({"n_clusters": 8, "max_documents": 5})


def test_no_documents_are_refused(tmp_path):
    with pytest.raises(DataError, match="the training split holds no document with text"):
        fit_clusterer(config(), iter([]), tmp_path)


def test_documents_without_countable_words_are_refused(tmp_path):
    with pytest.raises(DataError, match="no word is left in 4 documents"):
        fit_clusterer(config(), [Document(str(number), "the 12 of 7") for number in range(4)], tmp_path)


@pytest.mark.parametrize("name", ["clusterer.json", "centers.safetensors", "embedder.json", "embedder.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut short"])
def test_damaged_folder_is_refused(fitted, name, damage):
    folder, _ = fitted
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage != "missing":
        (folder / name).write_bytes(b"" if damage == "empty" else content[: len(content) // 2])
    with pytest.raises(
        ManifestError, match=f"{folder} (is no clusterer folder|lacks {name})|{name} was changed or cut short"
    ):
        Clusterer.load(folder)


def test_a_file_changed_by_hand_is_refused(fitted):
    folder, _ = fitted
    text = (folder / "embedder.json").read_text()
    (folder / "embedder.json").write_text(text.replace("apple", "appie"))
    with pytest.raises(ManifestError, match=r"embedder\.json was changed or cut short after the clusterer was written"):
        Clusterer.load(folder)


def seal(folder):
    """Have clusterer.json speak of the files as they are."""
    settings = json.loads((folder / "clusterer.json").read_text())
    settings["files"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in settings["files"]}
    (folder / "clusterer.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("shape", [(3, 7), (2, 8), (4, 8), (24,), (0, 8)])
def test_centres_of_another_shape_are_refused(fitted, shape):
    folder, _ = fitted
    save_file({"centers": np.zeros(shape, dtype=np.float32)}, folder / "centers.safetensors")
    seal(folder)
    with pytest.raises(ManifestError, match=r"centres of shape .* do not fit 3 clusters and an embedder of length 8"):
        Clusterer.load(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format": 1, "n_clusters": 3}', "clusterer format 1, this cbtm reads 2"),
        ('{"format": 2, "n_clusters": 3}', "does not name the files"),
        ('{"format": 3, "n_clusters": 3}', "clusterer format 3, this cbtm reads 2"),
        ('{"format": 2, "n_clusters": 3, "files": ["centers.safetensors"]}', "does not name the files"),
        ('{"format": 2, "n_clusters": 3, "files": {"embedder.json": "00"}}', "does not name the files"),
        ('{"n_clusters": 3}', "is no clusterer folder: 'format'"),
        ('{"format": 2}', "is no clusterer folder: 'n_clusters'"),
        ("[]", "is no clusterer folder"),
    ],
)
def test_settings_of_another_form_are_refused(fitted, content, message):
    (fitted[0] / "clusterer.json").write_text(content)
    with pytest.raises(ManifestError, match=message):
        Clusterer.load(fitted[0])


@pytest.mark.parametrize("name", ["../outside.json", "/etc/hostname", "deep/file.json", "./centers.safetensors"])
def test_a_file_name_that_leaves_the_folder_is_refused(fitted, name):
    folder, _ = fitted
    (folder.parent / "outside.json").write_text("{}")
    settings = json.loads((folder / "clusterer.json").read_text())
    digest = hashlib.sha256(b"{}").hexdigest()
    (folder / "clusterer.json").write_text(json.dumps(settings | {"files": settings["files"] | {name: digest}}))
    with pytest.raises(ManifestError, match=f"clusterer.json names '{name}', which lies outside the folder"):
        Clusterer.load(folder)


@pytest.mark.parametrize("name", [".", "..", ""])
def test_a_file_name_that_is_a_folder_is_refused(fitted, name):
    folder, _ = fitted
    settings = json.loads((folder / "clusterer.json").read_text())
    (folder / "clusterer.json").write_text(json.dumps(settings | {"files": settings["files"] | {name: ""}}))
    with pytest.raises(ManifestError, match=r"outside the folder|lacks "):
        Clusterer.load(folder)


@pytest.mark.parametrize("name", ["profile.json", "domains.json"])
@pytest.mark.parametrize("damage", ["missing", "one byte"])
def test_what_is_kept_for_people_is_sealed_as_well(fitted, name, damage):
    folder, _ = fitted
    content = bytearray((folder / name).read_bytes())
    (folder / name).unlink()
    if damage == "one byte":
        content[-2] ^= 1
        (folder / name).write_bytes(content)
    message = f"lacks {name}; copy the folder again" if damage == "missing" else f"{name} was changed or cut short"
    with pytest.raises(ManifestError, match=message):
        Clusterer.load(folder)


# --- what the folder holds ---


def test_folder_names_every_file_with_its_sha256(fitted):
    folder, _ = fitted
    settings = json.loads((folder / "clusterer.json").read_text())
    names = {path.name for path in folder.iterdir()} - {"clusterer.json"}
    assert names == {"embedder.json", "embedder.safetensors", "centers.safetensors", "profile.json", "domains.json"}
    assert settings["files"] == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    assert (settings["format"], settings["n_clusters"], settings["n_components"]) == (2, 3, 8)


def test_folder_may_be_copied_and_hold_other_files(fitted, tmp_path):
    shutil.copytree(fitted[0], tmp_path / "copy")
    (tmp_path / "copy/manifest.json").write_text("{}")
    texts = [document.text for document in corpus(9)]
    np.testing.assert_array_equal(
        Clusterer.load(tmp_path / "copy").predict(texts), Clusterer.load(fitted[0]).predict(texts)
    )


def test_profile_comes_back_with_the_clusterer(fitted):
    clusterer = Clusterer.load(fitted[0])
    assert clusterer.profile.n_documents == 60
    assert clusterer.profile.cluster_documents == (20, 20, 20)
    vectors = clusterer.embedder.transform(document.text for document in corpus(60))
    nearest = np.linalg.norm(vectors[:, None] - clusterer.centers[None], axis=2).min(axis=1)
    assert clusterer.profile.quantiles[100] == pytest.approx(nearest.max(), abs=1e-5)
    assert clusterer.profile.quantiles[50] == pytest.approx(np.median(nearest), abs=1e-5)


def test_folder_written_over_keeps_nothing_of_the_clusterer_before(fitted):
    folder, _ = fitted
    loaded = Clusterer.load(folder)
    Clusterer(loaded.embedder, loaded.centers[:2]).save(folder)  # measured by nobody, described by nobody
    again = Clusterer.load(folder)
    assert again.n_clusters == 2
    assert again.profile is None
    assert not (folder / "domains.json").exists()


def test_profile_that_the_folder_does_not_name_is_not_read(fitted, tmp_path):
    loaded = Clusterer.load(fitted[0])
    Clusterer(loaded.embedder, loaded.centers).save(tmp_path / "bare")
    shutil.copy(fitted[0] / "profile.json", tmp_path / "bare")
    assert Clusterer.load(tmp_path / "bare").profile is None
