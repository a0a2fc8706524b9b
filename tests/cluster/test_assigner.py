import gzip
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from small import write_corpus as write_real_corpus

from cbtm.branch.tokenizer import TextTokenizer
from cbtm.cluster.assigner import (
    CLUSTERS,
    AssignConfig,
    assign_group,
    assignment_path,
    held_out_shard,
    token_shard,
)
from cbtm.cluster.clusterer import Clusterer
from cbtm.cluster.config import ClusterConfig
from cbtm.cluster.embedder import TfidfSvdEmbedder
from cbtm.cluster.fit import fit_clusterer
from cbtm.cluster.fixed import FixedAssignments
from cbtm.cluster.held_out import label_held_out
from cbtm.corpus import CorpusConfig, ReadCounts, read_files
from cbtm.errors import CbtmError, DataError, ManifestError, StorageError
from cbtm.plan import make_plan
from cbtm.stages.prepare import _open_tools
from cbtm.tokens import DocumentRecord, TokenDocuments, TokenShardWriter

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


def assign_files(parts, corpus, group, folder):
    """Assign a group of another corpus than that of `parts`."""
    *_, clusterer, tokenizer = parts
    scratch = folder.with_name(f"{folder.name}-parts")
    return assign_group(AssignConfig(), corpus, group, lambda: (clusterer, tokenizer), folder, scratch=scratch)


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
    assert max(learned) > max(random)  # 0.6 of 46 in one domain, and clusters that are balanced in the sample alone
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
    assert [path.name for path in (tmp_path / "tokens").iterdir()] == ["held-out"]


def test_held_out_documents_stay_in_the_order_of_the_corpus_with_their_clusters_beside_them(parts, tmp_path):
    corpus, _, validation, _, tokenizer = parts
    facts = assign(parts, tmp_path, part="validation")
    below, stem = held_out_shard("valid", "validation-00000")
    found = TokenDocuments([(tmp_path / below, stem)])
    clusters = np.load(tmp_path / below / f"{stem}{CLUSTERS}")
    documents = read(corpus, validation.paths)
    assert [record.sp_id for record in found.records()] == [document.sp_id for document in documents]
    assert clusters.tolist() == [line["cluster"] for line in lines_of(tmp_path, validation.paths[0])]
    expected = tokenizer.encode_batch([document.text for document in documents])
    for tokens, its_text in zip(found.documents(), expected, strict=True):
        np.testing.assert_array_equal(tokens, its_text)
    for cluster in range(K):
        own = np.flatnonzero(clusters == cluster)
        assert facts["clusters"]["learned"][cluster] == {
            "documents": len(own),
            "tokens": sum(len(expected[place]) for place in own),
            "bytes": sum(len(documents[place].text.encode()) for place in own),
        }


def test_tokens_that_are_there_get_the_clusters_of_another_clusterer(parts, tmp_path):
    corpus, train, validation, *_ = parts
    fit_clusterer(ClusterConfig(n_clusters=2, n_components=5), read(corpus, train.paths), tmp_path / "other")
    other = Clusterer.load(tmp_path / "other")
    below, stem = held_out_shard("valid", "validation-00000")
    assign(parts, tmp_path / "made", part="validation")
    tokens = TokenDocuments([(tmp_path / "made" / below, stem)])
    facts = label_held_out(corpus, validation, other, tokens, tmp_path / "labelled")
    whole = assign((corpus, train, validation, other, parts[-1]), tmp_path / "whole", part="validation")
    assert facts == whole
    assert {path.name for path in (tmp_path / "labelled" / below).iterdir()} == {f"{stem}{CLUSTERS}"}
    for name in (f"{below}/{stem}{CLUSTERS}", assignment_path(validation.paths[0])):
        assert (tmp_path / "labelled" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_tokens_of_another_text_are_refused(parts, tmp_path):
    corpus, _, validation, clusterer, tokenizer = parts
    writer = TokenShardWriter(tmp_path, "few", vocab_size=tokenizer.vocab_size)
    writer.add(DocumentRecord("valid/00000/a.jsonl|0", 3), np.array([0, 1]))
    writer.close()
    with pytest.raises(DataError, match="validation-00000 has 11 documents, and tokens of 1: the corpus has changed"):
        label_held_out(corpus, validation, clusterer, TokenDocuments([(tmp_path, "few")]), tmp_path / "out")


def test_random_clusters_may_be_left_out(parts, tmp_path):
    facts = assign(parts, tmp_path, random_clusters=False)
    assert list(facts["clusters"]) == ["learned"]
    assert [path.name for path in (tmp_path / "tokens").iterdir()] == ["learned"]


def test_clusters_without_a_document_have_an_empty_shard(parts, tmp_path):
    root = tmp_path / "corpus"
    for split in ("train", "valid"):
        (root / split / "00000").mkdir(parents=True)
        (root / split / "00000/a.jsonl").write_text('{"text": "cat dog horse cat fox"}\n')
    alone = CorpusConfig(root=str(root))
    (group,) = make_plan(alone, max_groups=1).part("train")
    facts = assign_files(parts, alone, group, tmp_path / "out")
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
    lines = [
        '{"text": "cat dog"}',
        "no json",
        '{"text": "  "}',
        '{"title": "x"}',
        '{"text": "bank loan"}',
        '{"text": ""}',
    ]
    corpus, group = with_bad_lines(tmp_path, lines)
    facts = assign_files(parts, corpus, group, tmp_path / "out")
    assert facts["documents"] == 2
    assert facts["skipped"] == {"not JSON with a text": 2, "empty text": 2}
    assert facts["documents"] + sum(facts["skipped"].values()) == len(lines)
    for counts in facts["clusters"].values():
        assert sum(row["documents"] for row in counts) == 2
    # Lines keep their number in the file, so an id still finds its text.
    assert [line["sp_id"].split("|")[1] for line in lines_of(tmp_path / "out", "train/00000/a.jsonl")] == ["0", "4"]


def test_too_many_bad_lines_stop_the_group(parts, tmp_path):
    corpus, group = with_bad_lines(tmp_path, ['{"text": "cat dog"}', "x", "y", "z"])
    with pytest.raises(DataError, match=r"a\.jsonl, line 4: not JSON .*; 3 bad lines are more than"):
        assign_files(parts, corpus, group, tmp_path / "out")


def test_group_without_a_document_is_refused(parts, tmp_path):
    corpus, group = with_bad_lines(tmp_path, ['{"text": ""}'])
    with pytest.raises(
        DataError, match=r"files of shard group train-00000 hold no document \(1 x empty text\): train/00000/a\.jsonl"
    ):
        assign_files(parts, corpus, group, tmp_path / "out")


def test_batches_do_not_show_in_the_result(parts, tmp_path, monkeypatch):
    whole = assign(parts, tmp_path / "whole")
    monkeypatch.setattr("cbtm.cluster.labelling._BATCH", 4)
    assert assign(parts, tmp_path / "parts") == whole
    names = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file())
    assert len(names) == 3 + 2 * K * 3  # lines of 3 files; 3 files for each cluster of either partition
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


# --- several processes, and an assigner that is killed ---


def contents(folder):
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def folders(parts, tmp_path_factory):
    """Clusterer and tokenizer as folders, for tools that other processes open; and the output of one process."""
    folder = tmp_path_factory.mktemp("tools")
    parts[3].save(folder / "clusterer")
    parts[4].save(folder / "tokenizer")
    assign(parts, folder / "whole")
    return folder / "clusterer", folder / "tokenizer", folder / "whole"


def assign_by_two(parts, folders, folder, corpus=None, group=None, **settings):
    clusterer, tokenizer, _ = folders
    return assign_group(
        AssignConfig(processes=2, **settings),
        corpus or parts[0],
        group or parts[1],
        partial(_open_tools, clusterer, tokenizer),
        folder,
        scratch=folder.with_name(f"{folder.name}-parts"),
    )


def test_two_processes_write_what_one_writes(parts, folders, tmp_path):
    alone = assign(parts, tmp_path / "alone")
    assert assign_by_two(parts, folders, tmp_path / "shared") == alone
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")
    assert multiprocessing.active_children() == []


def test_an_error_of_one_of_two_processes_is_raised_and_finished_files_stay(parts, folders, tmp_path):
    corpus = write_corpus(tmp_path / "corpus").model_copy(update={"max_bad_lines": 0})
    last = tmp_path / "corpus/train/00001/a.jsonl"
    right = last.read_bytes()
    last.write_bytes(right + b"no json\n")
    group = make_plan(corpus, max_groups=1).part("train")[0]
    with pytest.raises(DataError, match=r"train/00001/a\.jsonl, line 24: not JSON .* corpus\.max_bad_lines=0"):
        assign_by_two(parts, folders, tmp_path / "out", corpus, group)
    assert multiprocessing.active_children() == []
    finished = sorted(path.parent.name for path in (tmp_path / "out-parts").rglob("counts.json"))
    assert finished == ["00000", "00001"]
    # Mended, the last file alone is read: the others are gone.
    last.write_bytes(right)
    for path in group.paths[:2]:
        (tmp_path / "corpus" / path).unlink()
    assign_group(AssignConfig(), corpus, group, lambda: parts[3:], tmp_path / "out", scratch=tmp_path / "out-parts")
    assert contents(tmp_path / "out") == contents(folders[2])


def test_a_clusterer_that_another_process_cannot_open_is_an_error_of_its_own(parts, tmp_path):
    with pytest.raises(ManifestError, match="no-such is no clusterer folder"):
        assign_by_two(parts, (tmp_path / "no-such", tmp_path, None), tmp_path / "out")


ASSIGNER = """
import json, os, sys, time
from functools import partial
from pathlib import Path

from cbtm.branch.tokenizer import TextTokenizer
from cbtm.cluster import labelling
from cbtm.cluster.assigner import AssignConfig, assign_group
from cbtm.cluster.clusterer import Clusterer
from cbtm.corpus import CorpusConfig
from cbtm.plan import ShardGroup

labelling._BATCH = 4  # several batches in a file


class Halting:
    def __init__(self, tokenizer):
        self.tokenizer, self.vocab_size = tokenizer, tokenizer.vocab_size

    def encode_batch(self, texts):
        if os.environ["HALT_AT"] in texts:
            print(os.getpid(), flush=True)
            time.sleep(600)
        return self.tokenizer.encode_batch(texts)


def tools(clusterer, tokenizer):
    return Clusterer.load(clusterer), Halting(TextTokenizer.load(tokenizer))


if __name__ == "__main__":
    processes, corpus, group, clusterer, tokenizer, out = sys.argv[1:]
    assign_group(
        AssignConfig(processes=int(processes)),
        CorpusConfig(root=corpus),
        ShardGroup.model_validate_json(group),
        partial(tools, Path(clusterer), Path(tokenizer)),
        Path(out),
        scratch=Path(out + "-parts"),
    )
"""


def wait_for(fact, seconds=30):
    until = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.02)


def has_ended(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="processes of a killed one end with it on Linux")
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_assigner_goes_on_at_the_last_finished_file(parts, folders, tmp_path, processes):
    corpus = write_corpus(tmp_path / "corpus")
    group = make_plan(corpus, max_groups=1).part("train")[0]
    (tmp_path / "assigner.py").write_text(ASSIGNER)
    halt_at = read(corpus, group.paths[2:])[13].text  # the middle of the last file
    out, scratch = tmp_path / "out", tmp_path / "out-parts"
    values = [str(processes), corpus.root, group.model_dump_json(), str(folders[0]), str(folders[1]), str(out)]
    with subprocess.Popen(
        [sys.executable, tmp_path / "assigner.py", *values],
        env={**os.environ, "HALT_AT": halt_at},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        halted = int(process.stdout.readline())
        wait_for(lambda: len(list(scratch.rglob("counts.json"))) == 2)
        process.send_signal(signal.SIGKILL)
    wait_for(lambda: has_ended(halted))
    assert (halted == process.pid) == (processes == 1)
    assert sorted(path.parent.name for path in scratch.rglob("counts.json")) == ["00000", "00001"]
    assert (scratch / "00002/part.tokens.npy").exists()  # begun
    assert not (out / "tokens").exists()

    for path in group.paths[:2]:  # a finished file is not read again: it may be gone
        (tmp_path / "corpus" / path).unlink()
    facts = assign_group(AssignConfig(), corpus, group, lambda: parts[3:], out, scratch=scratch)
    assert contents(out) == contents(folders[2])
    assert facts == assign(parts, tmp_path / "again")


def test_a_finished_group_needs_no_clusterer_to_be_dealt_again(parts, tmp_path):
    def no_tools():
        raise AssertionError("nothing is left to assign")

    facts = assign(parts, tmp_path / "out")
    before = contents(tmp_path / "out")
    again = assign_group(AssignConfig(), parts[0], parts[1], no_tools, tmp_path / "out", scratch=tmp_path / "out-parts")
    assert again == facts
    assert contents(tmp_path / "out") == before


def test_a_part_of_another_content_is_done_again_and_no_other(parts, tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    out, scratch = tmp_path / "out", tmp_path / "parts"

    def run():
        group = make_plan(corpus, max_groups=1).part("train")[0]
        return assign_group(AssignConfig(), corpus, group, lambda: parts[3:], out, scratch=scratch)

    run()
    counts = [scratch / f"{number:05d}/counts.json" for number in range(3)]
    before = [path.stat().st_mtime_ns for path in counts]
    changed = tmp_path / "corpus/train/00000/b.jsonl"
    changed.write_text('{"text": "bank loan"}\n{"text": "goat fox"}\n')
    facts = run()
    assert [path.stat().st_mtime_ns == time for path, time in zip(counts, before, strict=True)] == [True, False, True]
    assert facts["documents"] == 16 + 2 + 23
    assert len(lines_of(out, "train/00000/b.jsonl")) == 2
    fresh = tmp_path / "fresh"
    group = make_plan(corpus, max_groups=1).part("train")[0]
    assign_group(AssignConfig(), corpus, group, lambda: parts[3:], fresh, scratch=tmp_path / "fresh-parts")
    assert contents(out) == contents(fresh)


def test_lines_that_were_moved_away_are_written_again(parts, tmp_path):
    # A stage that is killed while it publishes has moved some files to where they belong, and starts again.
    facts = assign(parts, tmp_path / "out")
    whole = contents(tmp_path / "out")
    (tmp_path / "out" / assignment_path("train/00000/b.jsonl")).unlink()
    assert assign(parts, tmp_path / "out") == facts
    assert contents(tmp_path / "out") == whole


def test_more_shards_than_files_may_be_open_are_written_in_turns(parts, tmp_path, monkeypatch):
    whole = assign(parts, tmp_path / "whole")
    for at_once in (1, 2, 4, 6):  # of 3 clusters in 2 partitions
        monkeypatch.setattr("cbtm.cluster.assigner._OPEN_SHARDS", at_once)
        assert assign(parts, tmp_path / str(at_once)) == whole
        assert contents(tmp_path / str(at_once)) == contents(tmp_path / "whole")


def test_a_file_that_vanishes_is_named_and_those_before_it_stay(parts, tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    group = make_plan(corpus, max_groups=1).part("train")[0]
    gone = tmp_path / "corpus/train/00000/b.jsonl"
    gone.rename(tmp_path / "elsewhere")
    out, scratch = tmp_path / "out", tmp_path / "parts"
    with pytest.raises(StorageError, match=str(gone)):
        assign_group(AssignConfig(), corpus, group, lambda: parts[3:], out, scratch=scratch)
    assert [path.parent.name for path in scratch.rglob("counts.json")] == ["00000"]
    (tmp_path / "elsewhere").rename(gone)
    (tmp_path / "corpus/train/00000/a.jsonl").unlink()
    facts = assign_group(AssignConfig(), corpus, group, lambda: parts[3:], out, scratch=scratch)
    assert facts["documents"] == 46


# --- every shard and file, in every form ---


def test_every_file_of_a_nested_split_is_assigned_the_same_in_every_form(parts, tmp_path):
    texts = ["cat dog fox", "bank loan", "brød 東京", "the of", "goat sheep"]
    rows = [{"text": text, "id": number} for number, text in enumerate(texts)]
    plain = "".join(json.dumps(row) + "\n" for row in rows).encode()
    root = tmp_path / "corpus"
    forms = {
        "train/C4_small/00000/a.jsonl": plain,
        "train/C4_small/00000/b.jsonl.gz": gzip.compress(plain),
        "train/C4_small/00001/a.jsonl.zst": zstandard.compress(plain),
        "train/C4_small/00001/deep/er/b.jsonl": plain,
        "valid/C4_small/00000/a.jsonl": plain,
    }
    for path, content in forms.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    (root / "train/C4_small/00007").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), root / "train/C4_small/00007/a.parquet")
    corpus = CorpusConfig(root=str(root), train_split="train/C4_small", validation_split="valid/C4_small")
    (group,) = make_plan(corpus, max_groups=1).part("train")
    facts = assign_group(AssignConfig(), corpus, group, lambda: parts[3:], tmp_path / "out", scratch=tmp_path / "parts")
    assert facts["documents"] == 5 * len(texts)
    assert facts["without_words"] == 5
    assert len(group.paths) == 5
    expected = parts[3].predict(texts).tolist()
    for path in group.paths:
        lines = lines_of(tmp_path / "out", path)
        assert [line["cluster"] for line in lines] == expected
        assert [line["sp_id"] for line in lines] == [f"{path}|{number}" for number in range(5)]
    for cluster in range(K):
        found = shard(tmp_path / "out", "learned", cluster, split="train/C4_small")
        assert found.n_documents == 5 * expected.count(cluster)


def test_an_empty_file_beside_a_filled_one_gives_no_lines(parts, tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    (tmp_path / "corpus/train/00000/aa.jsonl").write_bytes(b"")
    (tmp_path / "corpus/train/00001/b.jsonl.gz").write_bytes(gzip.compress(b""))
    group = make_plan(corpus, max_groups=1).part("train")[0]
    assert len(group.paths) == 5
    facts = assign_group(AssignConfig(), corpus, group, lambda: parts[3:], tmp_path / "out", scratch=tmp_path / "parts")
    assert facts == assign(parts, tmp_path / "without")
    assert lines_of(tmp_path / "out", "train/00000/aa.jsonl") == lines_of(tmp_path / "out", "train/00001/b.jsonl") == []
    for name, content in contents(tmp_path / "without").items():
        assert contents(tmp_path / "out")[name] == content


def test_documents_of_stop_words_go_to_the_shortest_centre_and_are_counted(parts, tmp_path):
    clusterer = parts[3]
    shortest = int(np.linalg.norm(clusterer.centers, axis=1).argmin())
    lines = [json.dumps({"text": text}) for text in ("the of and", "cat dog", "12 34", "xyzzy", "of")]
    corpus, group = with_bad_lines(tmp_path, [*lines, "no json", '{"text": " "}'])
    for name in ("first", "second"):
        facts = assign_group(
            AssignConfig(), corpus, group, lambda: parts[3:], tmp_path / name, scratch=tmp_path / f"{name}-parts"
        )
        assert facts["without_words"] == 4
        found = [line["cluster"] for line in lines_of(tmp_path / name, "train/00000/a.jsonl")]
        assert [found[number] for number in (0, 2, 3, 4)] == [shortest] * 4
        # 7 lines in: 5 documents, without words or not, and 2 skipped.
        assert (facts["documents"], facts["skipped"]) == (5, {"not JSON with a text": 1, "empty text": 1})


def test_clusters_are_those_of_scikit_learn_document_by_document(parts, tmp_path):
    from sklearn.cluster import KMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import Normalizer

    corpus = CorpusConfig(root=str(write_real_corpus(tmp_path / "corpus")), validation_split="valid/small")
    groups = make_plan(corpus, max_groups=1).groups
    texts = [document.text for document in read(corpus, groups[0].paths)]
    # Words of two or more characters that begin with no digit, as the embedder takes them.
    vectoriser = TfidfVectorizer(token_pattern=r"(?u)\b(?!\d)\w\w+\b", stop_words="english")
    svd = TruncatedSVD(16, random_state=0)
    kmeans = KMeans(5, n_init=1, random_state=0)
    pipeline = make_pipeline(vectoriser, svd, Normalizer(), kmeans).fit(texts)
    embedder = TfidfSvdEmbedder.from_arrays(
        vectoriser.get_feature_names_out().tolist(), vectoriser.idf_, svd.components_
    )
    clusterer = Clusterer(embedder, kmeans.cluster_centers_.astype(np.float32))
    for group, n in zip(groups, (160, 40), strict=True):
        out = tmp_path / group.name
        assign_group(
            AssignConfig(), corpus, group, lambda: (clusterer, parts[4]), out, scratch=tmp_path / "p" / out.name
        )
        expected = pipeline.predict([document.text for document in read(corpus, group.paths)])
        found = [line["cluster"] for path in group.paths for line in lines_of(out, path)]
        assert len(found) == n
        np.testing.assert_array_equal(found, expected)
    assert len(set(expected.tolist())) > 1


# --- balanced assignment ---


@pytest.fixture
def batches_of_eight(monkeypatch):
    monkeypatch.setattr("cbtm.cluster.labelling._BALANCED_BATCH", 8)
    monkeypatch.setattr("cbtm.cluster.labelling._BALANCED_PER_CLUSTER", 1)


def batches(folder, path):
    """Clusters of a file, eight at a time."""
    found = [line["cluster"] for line in lines_of(folder, path)]
    return [found[start : start + 8] for start in range(0, len(found), 8)]


def test_balanced_documents_gives_each_cluster_its_share_of_each_batch(parts, batches_of_eight, tmp_path):
    facts = assign(parts, tmp_path / "out", method="balanced-documents")
    for path in parts[1].paths:  # 16 = 8 + 8, 7, 23 = 8 + 8 + 7: of 8, 3 + 3 + 2; of 7, 3 + 2 + 2
        for batch in batches(tmp_path / "out", path):
            assert sorted(np.bincount(batch, minlength=K)) == ([2, 3, 3] if len(batch) == 8 else [2, 2, 3])
    sizes = [row["documents"] for row in facts["clusters"]["learned"]]
    assert sum(sizes) == 46
    assert max(sizes) - min(sizes) <= 6  # six batches


def test_balanced_tokens_gives_each_cluster_its_share_of_tokens(parts, batches_of_eight, tmp_path):
    assign(parts, tmp_path / "out", method="balanced-tokens")
    for path in parts[1].paths:
        tokens = [len(row) for row in parts[4].encode_batch([d.text for d in read(parts[0], [path])])]
        for number, batch in enumerate(batches(tmp_path / "out", path)):
            own = np.array(tokens[8 * number : 8 * number + 8])
            loads = np.bincount(batch, weights=own, minlength=K)
            assert np.abs(loads - own.sum() / K).max() < own.max()


@pytest.mark.parametrize("method", ["balanced-documents", "balanced-tokens"])
def test_validation_documents_go_to_the_nearest_centre_whatever_the_method(parts, batches_of_eight, tmp_path, method):
    assign(parts, tmp_path / "out", part="validation", method=method)
    assign(parts, tmp_path / "nearest", part="validation")
    assert contents(tmp_path / "out") == contents(tmp_path / "nearest")


@pytest.mark.parametrize("method", ["balanced-documents", "balanced-tokens"])
def test_a_last_batch_of_fewer_documents_than_clusters_gets_one_each(parts, monkeypatch, tmp_path, method):
    monkeypatch.setattr("cbtm.cluster.labelling._BALANCED_BATCH", 7)
    monkeypatch.setattr("cbtm.cluster.labelling._BALANCED_PER_CLUSTER", 1)
    assign(parts, tmp_path / "out", method=method)
    last = [line["cluster"] for line in lines_of(tmp_path / "out", "train/00000/a.jsonl")][14:]  # 16 = 7 + 7 + 2
    assert len(last) == len(set(last)) == 2


def test_balance_changes_clusters_and_nothing_else(parts, batches_of_eight, tmp_path):
    nearest, balanced = (
        assign(parts, tmp_path / method, method=method) for method in ("nearest", "balanced-documents")
    )
    assert nearest["clusters"]["random"] == balanced["clusters"]["random"]
    assert nearest["clusters"]["learned"] != balanced["clusters"]["learned"]

    def ids(folder):
        return sorted(record.sp_id for cluster in range(K) for record in shard(folder, "learned", cluster).records())

    assert ids(tmp_path / "nearest") == ids(tmp_path / "balanced-documents")


# --- given clusters ---


def write_fixed(folder, corpus, paths, *, without=()):
    """The clusters 0, 1, 2 in turn, in another file for each corpus file; a few documents have none."""
    given = {}
    for path in paths:
        own = {
            document.sp_id: number % K
            for number, document in enumerate(read(corpus, [path]))
            if document.sp_id not in without
        }
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"sp_id": sp_id, "cluster": cluster}) + "\n" for sp_id, cluster in own.items()]
        (folder / path).write_text("".join(lines))
        given |= own
    return given


def test_given_clusters_are_kept_and_documents_without_one_are_counted(parts, tmp_path):
    corpus, train, *_ = parts
    without = {"train/00000/a.jsonl|3", "train/00001/a.jsonl|0"}
    given = write_fixed(tmp_path / "given", corpus, train.paths, without=without)
    facts = assign_group(
        AssignConfig(method="balanced-documents"),
        corpus,
        train,
        lambda: parts[3:],
        tmp_path / "out",
        scratch=tmp_path / "parts",
        fixed=FixedAssignments(str(tmp_path / "given"), n_clusters=K),
    )
    lines = [line for path in train.paths for line in lines_of(tmp_path / "out", path)]
    assert {line["sp_id"]: line["cluster"] for line in lines} == given
    assert (facts["documents"], facts["skipped"]) == (44, {"no fixed assignment": 2})
    sizes = Counter(given.values())
    assert [row["documents"] for row in facts["clusters"]["learned"]] == [sizes[cluster] for cluster in range(K)]
    # The control experiment has the same documents.
    assert sum(row["documents"] for row in facts["clusters"]["random"]) == 44


def test_given_clusters_are_for_training_and_validation_takes_the_nearest(parts, tmp_path):
    corpus, train, validation, *_ = parts
    write_fixed(tmp_path / "given", corpus, train.paths)  # none for the validation split
    assign_group(
        AssignConfig(),
        corpus,
        validation,
        lambda: parts[3:],
        tmp_path / "out",
        scratch=tmp_path / "parts",
        fixed=FixedAssignments(str(tmp_path / "given"), n_clusters=K),
    )
    assign(parts, tmp_path / "nearest", part="validation")
    assert contents(tmp_path / "out") == contents(tmp_path / "nearest")


def test_processes_that_the_system_ends_are_one_readable_error(parts, tmp_path):
    corpus, train, *_ = parts
    die = partial(os._exit, 9)  # instead of opening clusterer and tokenizer
    with pytest.raises(CbtmError, match=r"a process of the assigner was ended .* lower assign\.processes=2"):
        assign_group(AssignConfig(processes=2), corpus, train, die, tmp_path / "out", scratch=tmp_path / "parts")
