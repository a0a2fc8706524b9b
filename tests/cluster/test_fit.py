"""Fitting a clusterer in every mode: in one pass or two, in batches, by tokens, to given clusters or given centres."""

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from cbtm.cluster.clusterer import Clusterer
from cbtm.cluster.config import ClusterConfig
from cbtm.cluster.fit import fit_clusterer
from cbtm.cluster.fixed import FixedAssignments
from cbtm.corpus import Document
from cbtm.errors import ConfigError, DataError

K = 3
PATH = "train/00000/text.jsonl"
DOMAINS = [
    ["cat", "dog", "horse", "mouse", "sheep", "goat", "rabbit", "fox"],
    ["bank", "stock", "market", "price", "interest", "share", "trade", "loan"],
    ["bread", "cheese", "butter", "apple", "soup", "pasta", "salad", "rice"],
]


def corpus(n, seed=0, *, common=0, lengths=(6, 7)):
    """Documents of one domain each, the domains in turn; `common` words of each are of any domain."""
    rng = np.random.default_rng(seed)
    everything = [word for domain in DOMAINS for word in domain]
    return [
        Document(
            f"{PATH}|{number}",
            " ".join(
                [*rng.choice(DOMAINS[number % 3], size=rng.integers(*lengths)), *rng.choice(everything, size=common)]
            ),
        )
        for number in range(n)
    ]


def domains_of(documents):
    """The domain of each document, as the labels of a corpus give it."""
    return {document.sp_id: f"domain {number % 3}" for number, document in enumerate(documents)}


def config(**changes):
    return ClusterConfig(**{"n_clusters": K, "n_components": 8} | changes)


def count_words(texts):
    return np.array([len(text.split()) for text in texts])


def write_assignments(folder, clusters):
    (folder / PATH).parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"sp_id": sp_id, "cluster": cluster}) + "\n" for sp_id, cluster in clusters.items()]
    (folder / PATH).write_text("".join(lines))
    return FixedAssignments(str(folder), n_clusters=K)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def described(folder):
    return json.loads((folder / "domains.json").read_text())


class Counted:
    """Documents, and how often they were read; `later` is what there is from the second time on."""

    def __init__(self, documents, later=None):
        self.first, self.later, self.times = documents, documents if later is None else later, 0

    def __iter__(self):
        self.times += 1
        return iter(self.first if self.times == 1 else self.later)


# --- one pass and two ---


@pytest.mark.parametrize(
    ("settings", "in_vocabulary", "in_sample", "times"),
    [
        ({}, 200, 200, 1),
        ({"max_documents": 200, "vocabulary_documents": 200}, 200, 200, 1),
        ({"max_documents": 70}, 70, 70, 1),
        ({"max_documents": 70, "vocabulary_documents": 70}, 70, 70, 1),
        ({"max_documents": 70, "vocabulary_documents": 40}, 40, 70, 2),
        ({"max_documents": 200, "vocabulary_documents": 199}, 199, 200, 2),
        ({"vocabulary_documents": 40}, 40, 200, 2),
    ],
)
def test_words_and_centres_are_learned_from_as_many_documents_as_asked(
    tmp_path, settings, in_vocabulary, in_sample, times
):
    documents = Counted(corpus(200))
    facts = fit_clusterer(config(**settings), documents, tmp_path / "out")
    assert Clusterer.load(tmp_path / "out").embedder.n_documents_ == in_vocabulary
    assert facts["documents"] == sum(facts["sizes"]) == in_sample
    assert documents.times == times
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # vectors on disk are gone


def test_two_passes_find_the_same_domains_as_one(tmp_path):
    documents = corpus(300, common=2)
    labels = domains_of(documents)
    one = fit_clusterer(config(), documents, tmp_path / "one", labels=labels)
    two = fit_clusterer(config(vocabulary_documents=100), documents, tmp_path / "two", labels=labels)
    assert one["nmi"] > 0.9
    assert two["nmi"] > one["nmi"] - 0.05
    # The same task for both: new documents of the same domains, each to its nearest centre.
    new = [document.text for document in corpus(150, seed=1, common=2)]
    for name in ("one", "two"):
        found = Clusterer.load(tmp_path / name).predict(new)
        commonest = sum(max(Counter(found[start::3].tolist()).values()) for start in range(3))
        assert commonest >= 0.97 * 150


@pytest.mark.parametrize("later", [0, 59, 61])
def test_a_corpus_that_changes_between_the_passes_is_refused(tmp_path, later):
    documents = Counted(corpus(60), later=corpus(later))
    with pytest.raises(DataError, match=f"the corpus changed while it was read: 60 documents at first, then {later}"):
        fit_clusterer(config(vocabulary_documents=30), documents, tmp_path / "out")
    assert not (tmp_path / "out/clusterer.json").exists()


# --- batches ---


def test_batches_find_the_domains_of_a_corpus_that_takes_turns(tmp_path):
    # Three domains in turn and three batches: every third document to one batch would make of each domain a batch.
    documents = corpus(900)
    whole, batched = (
        fit_clusterer(config(batch_documents=size), documents, tmp_path / str(size), labels=domains_of(documents))
        for size in (900, 300)
    )
    assert whole["nmi"] == pytest.approx(1)
    # A batch has 100 documents of each domain, standard deviation 8; what is above is balanced away.
    assert batched["purity"] > 1 - 3 * 8 / 100
    new = [document.text for document in corpus(300, seed=1)]
    found = Clusterer.load(tmp_path / "300").predict(new)
    np.testing.assert_array_equal(found, np.tile(found[:3], 100))  # the nearest centre tells all domains apart
    assert len(set(found[:3].tolist())) == 3


def test_labels_of_batches_belong_to_their_documents(tmp_path):
    # 40 documents for each of 6 batches, sizes 13 or 14 in each: a label on the wrong row would be seen at once,
    # for what is described as most typical of a cluster must be of one domain, and be there in the corpus.
    documents = corpus(240)
    facts = fit_clusterer(config(batch_documents=40), documents, tmp_path / "out", labels=domains_of(documents))
    assert facts["documents"] == 240
    assert all(abs(size - 80) <= 6 for size in facts["sizes"])  # within one document in every batch
    assert facts["purity"] > 0.8  # chance is 1/3
    texts = {document.sp_id: document.text for document in documents}
    for domain in described(tmp_path / "out")["domains"]:
        assert domain["fit_documents"] == facts["sizes"][domain["cluster"]]
        assert len({int(example["sp_id"].split("|")[1]) % 3 for example in domain["examples"]}) == 1
        assert all(texts[example["sp_id"]] == example["text"] for example in domain["examples"])


def test_every_batch_counts(tmp_path):
    # The third domain is in the last tenth alone; its cluster would not be there if the last batch did not count.
    documents = [document for number, document in enumerate(corpus(600)) if number % 3 < 2 or number >= 540]
    fit_clusterer(config(batch_documents=105), documents, tmp_path / "out")
    found = Clusterer.load(tmp_path / "out").predict([" ".join(domain) for domain in DOMAINS])
    assert len(set(found.tolist())) == 3


@pytest.mark.parametrize(("n", "k", "batch"), [(31, 10, 10), (13, 3, 3), (10, 3, 4), (61, 20, 25), (20, 20, 20)])
def test_batches_are_never_smaller_than_the_number_of_clusters(tmp_path, n, k, batch):
    facts = fit_clusterer(config(n_clusters=k, batch_documents=batch), corpus(n), tmp_path / "out")
    assert sum(facts["sizes"]) == n
    assert min(facts["sizes"]) >= max(1, n // batch - 1)


def test_batches_of_vectors_on_disk_are_those_in_memory(tmp_path):
    # One document fewer in the vocabulary makes vectors on disk of what is nearly the same embedding.
    documents = corpus(300)
    memory, disk = (
        fit_clusterer(
            config(batch_documents=100, vocabulary_documents=size),
            documents,
            tmp_path / str(size),
            labels=domains_of(documents),
        )
        for size in (300, 299)
    )
    assert disk["inertia"] == pytest.approx(memory["inertia"], rel=0.02)
    assert disk["purity"] == pytest.approx(memory["purity"], abs=0.02)


def test_only_our_backend_takes_batches():
    with pytest.raises(ConfigError, match="backend='sklearn' takes all documents at once; set max_documents=100000"):
        ClusterConfig.parse({"n_clusters": 3, "backend": "sklearn", "batch_documents": 30})


# --- by tokens ---


def test_clusters_hold_equally_many_tokens_to_within_one_document(tmp_path):
    documents = corpus(150, lengths=(3, 60))
    tokens = count_words([document.text for document in documents])
    facts = fit_clusterer(config(balance="tokens"), documents, tmp_path / "out", count_tokens=count_words)
    assert sum(facts["tokens"]) == tokens.sum()
    assert max(abs(load - tokens.sum() / 3) for load in facts["tokens"]) < tokens.max()


def test_clusters_of_equal_tokens_have_unequal_documents(tmp_path):
    # Documents of the first domain are ten times as long: as many tokens in fewer of them.
    documents = [
        Document(document.sp_id, " ".join([document.text] * 10) if number % 3 == 0 else document.text)
        for number, document in enumerate(corpus(120))
    ]
    by_documents = fit_clusterer(config(), documents, tmp_path / "documents", count_tokens=count_words)
    by_tokens = fit_clusterer(config(balance="tokens"), documents, tmp_path / "tokens", count_tokens=count_words)
    assert by_documents["sizes"] == [40, 40, 40]
    assert sorted(by_documents["tokens"]) == [240, 240, 2400]
    # 2880 tokens, 960 for each: 16 long documents of 60 tokens make up a cluster.
    assert all(abs(load - 960) < 60 for load in by_tokens["tokens"])
    assert min(by_tokens["sizes"]) in (15, 16, 17)


def test_a_balance_by_tokens_that_nothing_counts_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"cluster\.balance='tokens' needs a tokenizer that counts them"):
        fit_clusterer(config(balance="tokens"), corpus(30), tmp_path / "out")


def test_tokens_are_balanced_within_every_batch(tmp_path):
    documents = corpus(300, lengths=(3, 60))
    tokens = count_words([document.text for document in documents])
    facts = fit_clusterer(
        config(balance="tokens", batch_documents=100), documents, tmp_path / "out", count_tokens=count_words
    )
    assert sum(facts["tokens"]) == tokens.sum()
    assert max(abs(load - tokens.sum() / 3) for load in facts["tokens"]) < 3 * tokens.max()  # three batches


# --- what is measured ---


def test_agreement_with_known_domains_is_a_fact(tmp_path):
    documents = corpus(60)
    labels = domains_of(documents)
    facts = fit_clusterer(config(), documents, tmp_path / "right", labels=labels)
    assert (facts["nmi"], facts["purity"]) == (pytest.approx(1), pytest.approx(1))
    for number in range(6):  # two documents of each domain are said to be of another
        labels[documents[number].sp_id] = f"domain {(number + 1) % 3}"
    facts = fit_clusterer(config(), documents, tmp_path / "wrong", labels=labels)
    assert facts["purity"] == pytest.approx(54 / 60)
    # Joint shares of 18/60 and 2/60 in each of three clusters; both partitions are even.
    mutual = 3 * (18 / 60 * np.log(18 / 60 * 9) + 2 / 60 * np.log(2 / 60 * 9))
    assert facts["nmi"] == pytest.approx(mutual / np.log(3))


def test_labels_of_some_documents_are_enough_and_change_no_centre(tmp_path):
    documents = corpus(60)
    some = dict(list(domains_of(documents).items())[:12])
    facts = fit_clusterer(config(), documents, tmp_path / "some", labels=some)
    assert facts["purity"] == pytest.approx(1)
    none = fit_clusterer(config(), documents, tmp_path / "none")
    assert "purity" not in none
    assert files(tmp_path / "some")["centers.safetensors"] == files(tmp_path / "none")["centers.safetensors"]


def test_explained_energy_is_that_of_the_projection(tmp_path):
    from sklearn.feature_extraction.text import TfidfVectorizer

    documents = corpus(60, common=2)
    texts = [document.text for document in documents]
    tfidf = TfidfVectorizer(stop_words="english").fit_transform(texts)  # rows of length 1: ||A||^2 = 60
    for length in (2, 8):
        facts = fit_clusterer(config(n_components=length), documents, tmp_path / str(length))
        components = Clusterer.load(tmp_path / str(length)).embedder.components_
        assert facts["explained_energy"] == pytest.approx(np.square(tfidf @ components.T).sum() / 60, rel=1e-5)
    assert fit_clusterer(config(n_components=23), documents, tmp_path / "all")["explained_energy"] == pytest.approx(1)


@pytest.mark.parametrize(
    "settings", [{}, {"vocabulary_documents": 100}, {"batch_documents": 80}, {"n_init": 3}], ids=str
)
def test_history_falls_to_the_inertia(tmp_path, settings):
    facts = fit_clusterer(config(n_clusters=7, **settings), corpus(240, common=3), tmp_path / "out")
    history = facts["history"]
    assert len(history) == facts["iterations"] > 1
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(history))
    assert history[-1] == facts["inertia"]


def test_documents_without_words_are_counted_apart(tmp_path):
    documents = [*corpus(60), *(Document(f"{PATH}|{number}", "the 12 of and") for number in range(60, 65))]
    facts = fit_clusterer(config(), documents, tmp_path / "out")
    assert facts["documents"] == 65
    assert described(tmp_path / "out")["without_words"] == 5
    assert Clusterer.load(tmp_path / "out").profile.n_zero_vectors == 5


# --- the same every time ---


def fit_in(mode, folder, scratch):
    """Fit on overlapping documents, so that the sample and the start matter."""
    documents = corpus(160, common=4, lengths=(3, 9))
    settings = {
        "one pass": {"max_documents": 100},
        "two passes": {"max_documents": 100, "vocabulary_documents": 50},
        "batches": {"batch_documents": 50},
        "two passes and batches": {"vocabulary_documents": 50, "batch_documents": 50},
        "tokens": {"balance": "tokens", "batch_documents": 80},
        "sklearn": {"backend": "sklearn"},
        "fixed": {"vocabulary_documents": 50},
        "given": {"vocabulary_documents": 50, "max_documents": 100},
    }[mode]
    if mode == "given" and not scratch.exists():
        fit_clusterer(config(), documents[:80], scratch)
    clusters = {document.sp_id: number % K for number, document in enumerate(documents)}
    return fit_clusterer(
        config(random_state=3, **settings),
        documents,
        folder,
        given=Clusterer.load(scratch) if mode == "given" else None,
        fixed=write_assignments(scratch, clusters) if mode == "fixed" else None,
        count_tokens=count_words if mode == "tokens" else None,
        labels=domains_of(documents),
    )


@pytest.mark.parametrize(
    "mode",
    ["one pass", "two passes", "batches", "two passes and batches", "tokens", "sklearn", "fixed", "given"],
)
def test_one_random_state_gives_the_same_files_in_every_mode(tmp_path, mode):
    np.random.seed(0)
    first = fit_in(mode, tmp_path / "a", tmp_path / "scratch")
    np.random.seed(1)
    second = fit_in(mode, tmp_path / "b", tmp_path / "scratch")
    assert first == second
    assert files(tmp_path / "a") == files(tmp_path / "b")
    json.dumps(first)  # it goes into a manifest


# --- given clusters ---


@pytest.mark.parametrize("vocabulary", [60, 20])
def test_centres_of_fixed_clusters_are_the_means_of_their_documents(tmp_path, vocabulary):
    documents = corpus(60, common=1)
    # Clusters that k-means would not find, and of unequal size: by number, not by domain.
    clusters = {document.sp_id: min(number % 4, 2) for number, document in enumerate(documents)}
    fixed = write_assignments(tmp_path / "given", clusters)
    facts = fit_clusterer(config(vocabulary_documents=vocabulary), documents, tmp_path / "out", fixed=fixed)
    found = Clusterer.load(tmp_path / "out")
    vectors = found.embedder.transform(document.text for document in documents)
    own = np.array(list(clusters.values()))
    means = np.stack([vectors[own == cluster].mean(axis=0) for cluster in range(K)])
    np.testing.assert_allclose(found.centers, means, atol=1e-5)
    assert facts["sizes"] == [15, 15, 30]
    assert facts["inertia"] == pytest.approx(np.square(vectors - means[own]).sum(), rel=1e-4)
    assert facts["history"] == [facts["inertia"]]


def test_documents_without_fixed_cluster_are_not_learned_from(tmp_path):
    documents = corpus(60)
    strange = [Document(f"{PATH}|{number}", "quark gluon boson") for number in range(60, 70)]
    clusters = {document.sp_id: number % 3 for number, document in enumerate(documents)}
    fixed = write_assignments(tmp_path / "given", clusters)
    facts = fit_clusterer(config(), documents + strange, tmp_path / "with", fixed=fixed)
    assert facts["documents"] == 60
    assert "quark" not in Clusterer.load(tmp_path / "with").embedder.vocabulary_
    assert facts["unassigned"] == 10
    assert fit_clusterer(config(), documents, tmp_path / "without", fixed=fixed) == facts | {"unassigned": 0}
    assert files(tmp_path / "with") == files(tmp_path / "without")


def test_fixed_cluster_without_a_document_is_refused(tmp_path):
    documents = corpus(30)
    fixed = write_assignments(tmp_path / "given", {document.sp_id: 1 for document in documents})
    with pytest.raises(ConfigError, match=r"cluster 0 \(2 such\) has no document among those of cluster\.assignments"):
        fit_clusterer(config(), documents, tmp_path / "out", fixed=fixed)


def test_fixed_assignments_of_no_document_are_refused(tmp_path):
    fixed = write_assignments(tmp_path / "given", {})
    with pytest.raises(DataError, match="the training split holds no document"):
        fit_clusterer(config(), corpus(30), tmp_path / "out", fixed=fixed)


# --- a given clusterer ---


@pytest.mark.parametrize("vocabulary", [1000, 20])
def test_given_clusterer_is_taken_over_and_measured_on_these_documents(tmp_path, vocabulary):
    fit_clusterer(config(), corpus(60, common=1), tmp_path / "given")
    given = Clusterer.load(tmp_path / "given")
    documents = corpus(90, seed=5, common=1)
    facts = fit_clusterer(
        config(vocabulary_documents=vocabulary),
        documents,
        tmp_path / "out",
        given=given,
        labels=domains_of(documents),
    )
    found = Clusterer.load(tmp_path / "out")
    np.testing.assert_array_equal(found.centers, given.centers)
    for name in ("embedder.json", "embedder.safetensors", "centers.safetensors"):
        assert files(tmp_path / "out")[name] == files(tmp_path / "given")[name]
    texts = [document.text for document in documents]
    labels = given.predict(texts)
    assert facts["sizes"] == np.bincount(labels, minlength=K).tolist()  # nearest, not balanced
    distances = np.linalg.norm(given.embedder.transform(texts) - given.centers[labels], axis=1)
    assert facts["inertia"] == pytest.approx(np.square(distances).sum(), rel=1e-4)
    assert facts["documents"] == found.profile.n_documents == 90
    assert facts["purity"] > 0.9
    assert facts["explained_energy"] == given.embedder.explained_energy_
