import json
from collections import Counter

import numpy as np
import pytest

from cbtm.branch.tokenizer import TextTokenizer
from cbtm.cluster.assigner import AssignConfig, assign_group, assignment_path, token_shard
from cbtm.cluster.clusterer import Clusterer
from cbtm.cluster.config import ClusterConfig
from cbtm.cluster.fit import fit_clusterer
from cbtm.corpus import CorpusConfig, ReadCounts, read_files
from cbtm.errors import DataError
from cbtm.plan import make_plan
from cbtm.tokens import TokenDocuments

K = 3
WORDS = [
    ["cat", "dog", "horse", "mouse", "sheep", "goat", "rabbit", "fox"],
    ["bank", "stock", "market", "price", "interest", "share", "trade", "loan"],
    ["brød", "cheese", "butter", "apple", "crème", "pasta", "salad", "東京"],
]
# Documents of each file; two files of one shard, and a second shard.
FILES = {"train/00000/a.jsonl": 16, "train/00000/b.jsonl": 7, "train/00001/a.jsonl": 23, "valid/00000/a.jsonl": 11}


def write_corpus(root):
    rng = np.random.default_rng(0)
    for path, n in FILES.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        # One domain more often than the others, so that greedy clusters are of unequal size.
        texts = [
            " ".join(rng.choice(WORDS[rng.choice(3, p=[0.6, 0.2, 0.2])], size=rng.integers(3, 12))) for _ in range(n)
        ]
        (root / path).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return CorpusConfig(root=str(root))


def read(corpus, paths):
    return list(read_files(corpus.root, paths, max_bad_lines=10, counts=ReadCounts()))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Corpus, its one training group, its validation group, clusterer and tokenizer."""
    folder = tmp_path_factory.mktemp("assigner")
    corpus = write_corpus(folder / "corpus")
    train, validation = make_plan(corpus, max_groups=1).groups
    documents = read(corpus, train.paths)
    fit_clusterer(ClusterConfig(n_clusters=K, n_components=6), documents, folder / "clusterer")
    tokenizer = TextTokenizer.train([document.text for document in documents], 320)
    return corpus, train, validation, Clusterer.load(folder / "clusterer"), tokenizer


def assign(parts, folder, part="train", **settings):
    corpus, train, validation, clusterer, tokenizer = parts
    group = train if part == "train" else validation
    return assign_group(
        AssignConfig(**settings),
        corpus,
        group,
        lambda: (clusterer, tokenizer),
        folder,
        scratch=folder.with_name(f"{folder.name}-parts"),
    )


def lines_of(folder, path):
    return [json.loads(line) for line in (folder / assignment_path(path)).read_text().splitlines()]


def shard(folder, partition, cluster, split="train", group="train-00000"):
    below, stem = token_shard(partition, split, cluster, group)
    return TokenDocuments([(folder / below, stem)])


def dealt(folder):
    """Random cluster of each document."""
    return {record.sp_id: cluster for cluster in range(K) for record in shard(folder, "random", cluster).records()}


def test_every_document_has_a_line_with_its_nearest_cluster(parts, tmp_path):
    corpus, train, _, clusterer, _ = parts
    assign(parts, tmp_path)
    for path in train.paths:
        documents = read(corpus, [path])
        assert len(documents) == FILES[path]
        assert lines_of(tmp_path, path) == [
            {"sp_id": document.sp_id, "cluster": int(clusterer.predict([document.text])[0])} for document in documents
        ]
    lines = [line for path in train.paths for line in lines_of(tmp_path, path)]
    assert lines[0]["sp_id"] == "train/00000/a.jsonl|0"  # relative to the corpus, which may be moved
    assert {line["cluster"] for line in lines} == {0, 1, 2}


def test_lines_lie_where_their_file_lies():
    assert assignment_path("train/00000/a.jsonl") == "assignments/train/00000/a.jsonl"
    assert assignment_path("train/00000/a.jsonl.gz") == "assignments/train/00000/a.jsonl"
    assert assignment_path("valid/C8_small/00000/a.jsonl.zst") == "assignments/valid/C8_small/00000/a.jsonl"


def test_token_shards_hold_exactly_the_documents_of_their_cluster(parts, tmp_path):
    corpus, train, _, _, tokenizer = parts
    facts = assign(parts, tmp_path)
    texts = {document.sp_id: document.text for document in read(corpus, train.paths)}
    lines = [line for path in train.paths for line in lines_of(tmp_path, path)]
    for cluster in range(K):
        found = shard(tmp_path, "learned", cluster)
        records = list(found.records())
        assert [record.sp_id for record in records] == [line["sp_id"] for line in lines if line["cluster"] == cluster]
        assert [record.n_bytes for record in records] == [len(texts[record.sp_id].encode()) for record in records]
        expected = tokenizer.encode_batch([texts[record.sp_id] for record in records])
        for tokens, its_text in zip(found.documents(), expected, strict=True):
            np.testing.assert_array_equal(tokens, its_text)
            assert tokens[0] == tokenizer.separator_id
        assert facts["clusters"]["learned"][cluster] == {
            "documents": len(records),
            "tokens": sum(map(len, expected)),
            "bytes": sum(record.n_bytes for record in records),
        }


def test_learned_assignment_is_greedy_and_the_random_one_is_even(parts, tmp_path):
    facts = assign(parts, tmp_path)
    learned, random = ([row["documents"] for row in facts["clusters"][name]] for name in ("learned", "random"))
    assert sum(learned) == sum(random) == 46
    assert max(learned) > 20  # 0.6 of 46 in one domain
    # Within one document a file, 3 files: at most 3 between the largest and the smallest.
    assert max(random) - min(random) <= 3
    totals = [[sum(row[key] for row in rows) for key in ("tokens", "bytes")] for rows in facts["clusters"].values()]
    assert totals[0] == totals[1]


def test_random_partition_deals_each_document_of_each_file_once_and_evenly(parts, tmp_path):
    corpus, train, *_ = parts
    assign(parts, tmp_path)
    of = dealt(tmp_path)
    total = sum(shard(tmp_path, "random", cluster).n_documents for cluster in range(K))
    assert total == len(of) == 46
    for path in train.paths:
        sizes = Counter(of[document.sp_id] for document in read(corpus, [path]))
        n = FILES[path]  # 16 = 5 + 5 + 6, 7 = 2 + 2 + 3, 23 = 7 + 8 + 8
        assert sorted(sizes.values()) == sorted([n // K] * (K - n % K) + [n // K + 1] * (n % K))


def test_random_partition_holds_the_same_tokens(parts, tmp_path):
    assign(parts, tmp_path)

    def by_document(partition):
        shards = [shard(tmp_path, partition, cluster) for cluster in range(K)]
        return {
            record.sp_id: tokens.tolist()
            for found in shards
            for record, tokens in zip(found.records(), found.documents(), strict=True)
        }

    assert by_document("random") == by_document("learned")


def test_random_partition_depends_on_its_seed_alone(parts, tmp_path):
    np.random.seed(0)
    assign(parts, tmp_path / "a", random_state=5)
    np.random.seed(1)
    assign(parts, tmp_path / "b", random_state=5)
    assign(parts, tmp_path / "c", random_state=6)
    first, second, third = (dealt(tmp_path / name) for name in "abc")
    assert first == second
    assert first != third
    assert lines_of(tmp_path / "a", "train/00000/a.jsonl") == lines_of(tmp_path / "c", "train/00000/a.jsonl")


def test_random_partition_does_not_depend_on_how_shards_are_grouped(parts, tmp_path):
    corpus, _, _, clusterer, tokenizer = parts
    assign(parts, tmp_path / "one")
    of = {}
    for group in make_plan(corpus, max_groups=2).part("train"):
        assign_group(
            AssignConfig(),
            corpus,
            group,
            lambda: (clusterer, tokenizer),
            tmp_path / "two",
            scratch=tmp_path / "parts" / group.name,
        )
        for cluster in range(K):
            records = list(shard(tmp_path / "two", "random", cluster, group=group.name).records())
            of |= {record.sp_id: cluster for record in records}
    assert of == dealt(tmp_path / "one")


def test_random_clusters_follow_neither_the_text_nor_the_line_number(parts, tmp_path):
    # The deck of each three documents is shuffled: i mod 3 would give the same order in every file.
    corpus, train, *_ = parts
    assign(parts, tmp_path)
    of = dealt(tmp_path)
    orders = [[of[document.sp_id] for document in read(corpus, [path])] for path in train.paths]
    decks = {tuple(order[start : start + K]) for order in orders for start in range(0, len(order) - 2, K)}
    assert all(sorted(deck) == [0, 1, 2] for deck in decks)
    assert len(decks) > 3
    assert orders[0][:7] != orders[1][:7]


def test_validation_documents_get_no_random_cluster(parts, tmp_path):
    facts = assign(parts, tmp_path, part="validation")
    assert list(facts["clusters"]) == ["learned"]
    assert sum(row["documents"] for row in facts["clusters"]["learned"]) == 11
    assert [path.name for path in (tmp_path / "tokens").iterdir()] == ["learned"]


def test_random_clusters_may_be_left_out(parts, tmp_path):
    facts = assign(parts, tmp_path, random_clusters=False)
    assert list(facts["clusters"]) == ["learned"]
    assert [path.name for path in (tmp_path / "tokens").iterdir()] == ["learned"]


def test_clusters_without_a_document_have_an_empty_shard(parts, tmp_path):
    *_, clusterer, tokenizer = parts
    root = tmp_path / "corpus"
    for split in ("train", "valid"):
        (root / split / "00000").mkdir(parents=True)
        (root / split / "00000/a.jsonl").write_text('{"text": "cat dog horse cat fox"}\n')
    alone = CorpusConfig(root=str(root))
    (group,) = make_plan(alone, max_groups=1).part("train")
    facts = assign_group(
        AssignConfig(),
        alone,
        group,
        lambda: (clusterer, tokenizer),
        tmp_path / "out",
        scratch=tmp_path / "parts" / group.name,
    )
    counts = [row["documents"] for row in facts["clusters"]["learned"]]
    assert sorted(counts) == [0, 0, 1]
    for cluster in range(K):
        found = shard(tmp_path / "out", "learned", cluster)
        assert found.n_documents == len(list(found.documents())) == counts[cluster]


def with_bad_lines(tmp_path, lines):
    root = tmp_path / "corpus"
    for split in ("train", "valid"):
        (root / split / "00000").mkdir(parents=True)
        (root / split / "00000/a.jsonl").write_text("".join(line + "\n" for line in lines))
    corpus = CorpusConfig(root=str(root), max_bad_lines=2)
    (group,) = make_plan(corpus, max_groups=1).part("train")
    return corpus, group


def test_what_is_read_is_assigned_or_skipped_with_its_reason(parts, tmp_path):
    *_, clusterer, tokenizer = parts
    lines = [
        '{"text": "cat dog"}',
        "no json",
        '{"text": "  "}',
        '{"title": "x"}',
        '{"text": "bank loan"}',
        '{"text": ""}',
    ]
    corpus, group = with_bad_lines(tmp_path, lines)
    facts = assign_group(
        AssignConfig(),
        corpus,
        group,
        lambda: (clusterer, tokenizer),
        tmp_path / "out",
        scratch=tmp_path / "parts" / group.name,
    )
    assert facts["documents"] == 2
    assert facts["skipped"] == {"not JSON with a text": 2, "empty text": 2}
    assert facts["documents"] + sum(facts["skipped"].values()) == len(lines)
    for counts in facts["clusters"].values():
        assert sum(row["documents"] for row in counts) == 2
    # Lines keep their number in the file, so an id still finds its text.
    assert [line["sp_id"].split("|")[1] for line in lines_of(tmp_path / "out", "train/00000/a.jsonl")] == ["0", "4"]


def test_too_many_bad_lines_stop_the_group(parts, tmp_path):
    *_, clusterer, tokenizer = parts
    corpus, group = with_bad_lines(tmp_path, ['{"text": "cat dog"}', "x", "y", "z"])
    with pytest.raises(DataError, match=r"a\.jsonl, line 4: not JSON .*; 3 bad lines are more than"):
        assign_group(
            AssignConfig(),
            corpus,
            group,
            lambda: (clusterer, tokenizer),
            tmp_path / "out",
            scratch=tmp_path / "parts" / group.name,
        )


def test_group_without_a_document_is_refused(parts, tmp_path):
    *_, clusterer, tokenizer = parts
    corpus, group = with_bad_lines(tmp_path, ['{"text": ""}'])
    with pytest.raises(
        DataError, match=r"files of shard group train-00000 hold no document \(1 x empty text\): train/00000/a\.jsonl"
    ):
        assign_group(
            AssignConfig(),
            corpus,
            group,
            lambda: (clusterer, tokenizer),
            tmp_path / "out",
            scratch=tmp_path / "parts" / group.name,
        )


def test_batches_do_not_show_in_the_result(parts, tmp_path, monkeypatch):
    whole = assign(parts, tmp_path / "whole")
    monkeypatch.setattr("cbtm.cluster.labelling._BATCH", 4)
    assert assign(parts, tmp_path / "parts") == whole
    names = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file())
    assert len(names) == 3 + 2 * K * 3  # lines of 3 files; 3 files for each cluster of either partition
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
