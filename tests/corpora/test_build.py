"""The writing of a corpus: layout, held-out sources, determinism, atomicity."""

import hashlib
import json
import os
import random
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from cbtm.corpora.build import CorpusSummary, write_corpus
from cbtm.corpora.documents import CutLimits, RawDocument
from cbtm.errors import ConfigError, DataError, ManifestError

LIMITS = CutLimits(min_words=5, max_words=100, max_chars=2000)


def text_of(seed: str, n_words: int = 30) -> str:
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("abcdefghij", k=6)) for _ in range(n_words))


def documents(n_sources: int = 60, per_source: int = 5, kinds: tuple[str, ...] = ("law", "code")) -> list[RawDocument]:
    return [
        RawDocument(text_of(f"{kind}/{s}/{i}"), kind, f"{kind}/{s}")
        for kind in kinds
        for s in range(n_sources)
        for i in range(per_source)
    ]


def build(root: Path, raw: list[RawDocument] | None = None, **options: object) -> CorpusSummary:
    raw = documents() if raw is None else raw
    return write_corpus(root, raw, name="mini", settings={}, limits=LIMITS, **options)  # type: ignore[arg-type]


def files(root: Path) -> dict[str, str]:
    return {
        p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }


def texts(root: Path, split: str) -> list[str]:
    paths = sorted((root / split).rglob("*.jsonl"))
    return [json.loads(line)["text"] for path in paths for line in path.read_text().splitlines()]


def test_layout_records_and_labels(tmp_path: Path):
    summary = build(tmp_path / "corpus", n_shards=3)
    expected = {f"{s}/mini.jsonl" for s in ("train/00000", "train/00001", "train/00002", "valid/00000")}
    assert set(files(tmp_path / "corpus")) == expected | {f"labels/{p}" for p in expected} | {"corpus.json"}
    n_lines = 0
    for path in expected:
        records = [json.loads(line) for line in (tmp_path / "corpus" / path).read_text().splitlines()]
        labels = [json.loads(line) for line in (tmp_path / "corpus/labels" / path).read_text().splitlines()]
        assert all(set(r) == {"text", "id"} for r in records)
        assert [label["sp_id"] for label in labels] == [f"{path}|{i}" for i in range(len(records))]
        n_lines += len(records)
    # 2 kinds x 60 sources x 5
    assert n_lines == 600 == summary.n_train + summary.n_valid


def test_shards_differ_by_at_most_one_and_hold_every_kind(tmp_path: Path):
    root = build(tmp_path / "corpus", n_shards=4).root
    sizes = []
    for path in sorted((root / "labels/train").rglob("*.jsonl")):
        kinds = Counter(json.loads(line)["domain"] for line in path.read_text().splitlines())
        assert set(kinds) == {"law", "code"}
        sizes.append(sum(kinds.values()))
    assert max(sizes) - min(sizes) <= 1


def test_pieces_of_one_source_stay_on_one_side(tmp_path: Path):
    raw = documents()
    source_of = {d.text: d.source for d in raw}
    root = build(tmp_path / "corpus", raw).root
    train, valid = ({source_of[t] for t in texts(root, s)} for s in ("train", "valid"))
    assert not train & valid
    assert len(train) + len(valid) == 120


def test_a_small_corpus_holds_out_a_fifth_and_each_kind_in_proportion(tmp_path: Path):
    summary = build(tmp_path / "corpus")
    # 600 documents: 6 % and the floor of 400 are bounded by 20 % = 120, 60 a kind.
    assert summary.documents["valid"] == {"code": 60, "law": 60}


def test_a_kind_of_one_source_holds_out_its_tail_as_one_block_and_says_so(tmp_path: Path):
    book = "\n\n".join(text_of(f"p{i}", 80) for i in range(40))
    root = build(tmp_path / "corpus", [RawDocument(book, "book", "book.txt")]).root
    paragraphs = book.split("\n\n")
    # 40 documents of one paragraph, a fifth is 8, below a quarter of the source.
    assert set(texts(root, "valid")) == set(paragraphs[-8:])
    assert set(texts(root, "train")) == set(paragraphs[:-8])
    assert json.loads((root / "corpus.json").read_text())["held_out_tails"] == ["book.txt"]


def test_the_card_lists_counts_bytes_and_digests(tmp_path: Path):
    summary = build(tmp_path / "corpus", packages={"b": "2", "a": "1"})
    card = json.loads((summary.root / "corpus.json").read_text())
    on_disk = files(summary.root)
    assert {f["path"]: f["sha256"] for f in card["files"]} == {p: d for p, d in on_disk.items() if p != "corpus.json"}
    assert card["documents"] == summary.documents
    assert sum(card["bytes"]["valid"].values()) == sum(len(t.encode()) for t in texts(summary.root, "valid"))
    assert card["packages"] == {"a": "1", "b": "2"}


def test_two_builds_are_equal_to_the_byte(tmp_path: Path):
    assert files(build(tmp_path / "a").root) == files(build(tmp_path / "b").root)


def test_short_equal_and_near_equal_documents_are_dropped_and_counted(tmp_path: Path):
    raw = documents()
    text = raw[0].text
    extra = [
        RawDocument("too short", "law", "x"),
        RawDocument(text.upper().replace(" ", "  "), "law", "y"),
        RawDocument(f"{text} and {text_of('z', 4)}", "code", "z"),
    ]
    summary = build(tmp_path / "corpus", [*raw, *extra])
    assert summary.dropped == {"too_short": 1, "duplicate": 1, "near_duplicate": 1}
    assert summary.n_train + summary.n_valid == len(raw)


def test_the_cap_holds_for_every_kind_and_is_even_over_sources(tmp_path: Path):
    raw = documents()
    source_of = {d.text: d.source for d in raw}
    summary = build(tmp_path / "corpus", raw, max_per_kind=100)
    total = Counter(summary.documents["train"]) + Counter(summary.documents["valid"])
    assert total == {"law": 100, "code": 100}
    assert summary.dropped == {"over_max_per_kind": 400}
    chosen = {source_of[t] for split in ("train", "valid") for t in texts(summary.root, split)}
    assert len(chosen) > 100  # a third of 300 documents from 60 sources each: nearly all sources are left


def test_an_equal_corpus_is_returned_and_the_documents_are_not_touched(tmp_path: Path):
    first = build(tmp_path / "corpus")

    def untouchable() -> Iterator[RawDocument]:
        raise AssertionError("read")
        yield

    again = write_corpus(tmp_path / "corpus", untouchable(), name="mini", settings={}, limits=LIMITS)
    assert again.reused
    assert again.documents == first.documents


def test_other_settings_are_refused_or_replace_on_demand(tmp_path: Path):
    build(tmp_path / "corpus", n_shards=4)
    with pytest.raises(ConfigError, match="n_shards: 4 there, 2 asked"):
        build(tmp_path / "corpus", n_shards=2)
    assert not build(tmp_path / "corpus", n_shards=2, replace=True).reused
    assert len(list((tmp_path / "corpus/train").iterdir())) == 2


def test_a_folder_that_is_not_a_corpus_is_never_overwritten(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(DataError, match=r"holds no corpus\.json"):
        build(tmp_path, replace=True)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_a_shard_of_another_size_than_the_card_says_is_refused(tmp_path: Path):
    build(tmp_path / "corpus")
    shard = tmp_path / "corpus/train/00001/mini.jsonl"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ManifestError, match=r"00001/mini\.jsonl is missing or not"):
        build(tmp_path / "corpus")


def test_too_few_documents_are_refused_and_nothing_is_left(tmp_path: Path):
    with pytest.raises(DataError, match="9 usable documents are too few for 4 shards"):
        build(tmp_path / "corpus", documents()[:9])
    assert list(tmp_path.iterdir()) == []


def test_fewer_than_one_shard_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="n_shards=0"):
        build(tmp_path / "corpus", n_shards=0)


def test_a_failing_reader_leaves_nothing_behind(tmp_path: Path):
    def failing() -> Iterator[RawDocument]:
        yield from documents()
        raise DataError("line 7")

    with pytest.raises(DataError, match="line 7"):
        write_corpus(tmp_path / "corpus", failing(), name="mini", settings={}, limits=LIMITS)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from cbtm.corpora.build import write_corpus
from cbtm.corpora.documents import RawDocument

def documents():
    yield RawDocument("a text of some words " * 20, "kind", "source")
    os.kill(os.getpid(), signal.SIGKILL)

write_corpus(Path(sys.argv[1]), documents(), name="mini", settings={})
"""


def test_a_killed_build_leaves_no_corpus_and_the_next_one_cleans_up(tmp_path: Path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "corpus")], check=False)
    assert done.returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(f".corpus.partial-{socket.gethostname()}-")
    assert not (tmp_path / "corpus").exists()
    foreign = tmp_path / ".corpus.partial-another-machine-1"
    own = tmp_path / f".corpus.partial-{socket.gethostname()}-{os.getppid()}"
    foreign.mkdir()
    own.mkdir()
    build(tmp_path / "corpus")
    # Those of another machine and of a running process stay: nobody here can tell that they are dead.
    assert {p.name for p in tmp_path.iterdir()} == {"corpus", foreign.name, own.name}
