"""The assigner on instructions: which tokens are given goes with each document into every shard it lands in."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small import settings as small_settings
from small import write_corpus

from cbtm import stages
from cbtm.branch.tokenizer import TextTokenizer
from cbtm.cluster.assigner import AssignConfig, assign_group, assignment_path, token_shard
from cbtm.cluster.clusterer import Clusterer
from cbtm.cluster.config import ClusterConfig
from cbtm.cluster.fit import fit_clusterer
from cbtm.corpus import CorpusConfig, Document, ReadCounts, read_files
from cbtm.plan import ShardGroup, make_plan
from cbtm.run import Run
from cbtm.run_config import parse_config
from cbtm.stages.prepare import _open_tools
from cbtm.tokens import PROMPTS, Encoder, TokenDocuments
from cbtm.train.member import Member

K = 3
PREPARING = ("tokenizer", "cluster", "assign")
QUESTIONS = {"cat dog horse mouse:": "fox goat", "bank stock market price:": "loan share", "brød cheese 東京": "apple"}


def records(n: int, every: int) -> list[dict[str, str]]:
    """Every so many a plain text, the others instructions of three subjects in turn."""
    rows = []
    for number in range(n):
        src, tgt = list(QUESTIONS.items())[number % 3]
        src, tgt = f"{src}{' ' * (number % 2)}", f"{tgt} {number}"
        rows.append({"text": f"{src} {tgt}"} if number % every == 0 else {"src": src, "tgt": tgt})
    return rows


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Tools:
    """Corpus, training group, clusterer and tokenizer; files a and c have instructions, file b has none."""

    def __init__(self, folder: Path) -> None:
        for name, n, every in (("a", 14, 4), ("b", 9, 1), ("c", 8, 100)):
            write(folder / f"corpus/train/00000/{name}.jsonl", records(n, every))
        write(folder / "corpus/valid/00000/a.jsonl", records(6, 1))
        self.corpus = CorpusConfig(root=str(folder / "corpus"))
        self.train, self.validation = make_plan(self.corpus, max_groups=1).groups
        self.folder = folder
        fit_clusterer(ClusterConfig(n_clusters=K, n_components=4), self.documents(self.train), folder / "clusterer")
        self.clusterer = Clusterer.load(folder / "clusterer")
        self.tokenizer = TextTokenizer.train([document.text for document in self.documents(self.train)], 300)
        self.tokenizer.save(folder / "tokenizer")

    def documents(self, group: ShardGroup) -> list[Document]:
        return list(read_files(self.corpus.root, group.paths, max_bad_lines=0, counts=ReadCounts()))

    def assign(self, folder: Path, group: ShardGroup | None = None, encoder: Encoder | None = None) -> dict[str, Any]:
        return assign_group(
            AssignConfig(),
            self.corpus,
            group or self.train,
            lambda: (self.clusterer, encoder or self.tokenizer),
            folder,
            scratch=folder.with_name(f"{folder.name}-parts"),
        )


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Tools:
    return Tools(tmp_path_factory.mktemp("instructions"))


def shard(folder: Path, partition: str, cluster: int) -> TokenDocuments:
    below, stem = token_shard(partition, "train", cluster, "train-00000")
    return TokenDocuments([(folder / below, stem)])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("partition", ["learned", "random"])
def test_every_document_lands_with_its_prompt(tools: Tools, tmp_path: Path, partition: str) -> None:
    assert tools.assign(tmp_path / "out")["documents"] == 14 + 9 + 8
    of = {document.sp_id: document for document in tools.documents(tools.train)}
    found = {}
    for cluster in range(K):
        stream = shard(tmp_path / "out", partition, cluster)
        for record, tokens, prompt in zip(stream.records(), stream.documents(), stream.prompts(), strict=True):
            document = of[record.sp_id]
            assert tokens.tolist() == tools.tokenizer.encode_batch([document.text])[0].tolist()
            assert [prompt] == tools.tokenizer.prompt_tokens([document.text], [document.prompt])
            assert (prompt > 0) == (document.prompt > 0)
            found[record.sp_id] = prompt
    assert found.keys() == of.keys()
    # 14 - 4, 0 and 8 - 1: numbers 0, 4, 8, 12 of the first file are plain, and 0 of the last.
    assert sum(prompt > 0 for prompt in found.values()) == 10 + 0 + 7


def test_clusters_are_those_of_the_whole_text(tools: Tools, tmp_path: Path) -> None:
    tools.assign(tmp_path / "out")
    documents = tools.documents(tools.train)
    lines = [line for path in tools.train.paths for line in (tmp_path / "out" / assignment_path(path)).open()]
    assert [json.loads(line)["cluster"] for line in lines] == tools.clusterer.predict(
        [document.text for document in documents]
    ).tolist()


def test_parts_and_batches_do_not_show_in_the_prompts(
    tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tools.assign(tmp_path / "whole")
    assert sum(name.endswith(PROMPTS) for name in contents(tmp_path / "whole")) == 2 * K
    monkeypatch.setattr("cbtm.cluster.labelling._BATCH", 3)
    monkeypatch.setattr("cbtm.cluster.assigner._OPEN_SHARDS", 1)
    assert tools.assign(tmp_path / "pieces") == whole
    assert contents(tmp_path / "pieces") == contents(tmp_path / "whole")


def test_two_processes_write_the_prompts_that_one_writes(tools: Tools, tmp_path: Path) -> None:
    alone = tools.assign(tmp_path / "alone")
    opened = partial(_open_tools, tools.folder / "clusterer", tools.folder / "tokenizer")
    settings, scratch = AssignConfig(processes=2), tmp_path / "parts"
    shared = assign_group(settings, tools.corpus, tools.train, opened, tmp_path / "shared", scratch=scratch)
    assert shared == alone
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")


class Plain:
    """An encoder that knows of no prompts."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.vocab_size, self.encode_batch = tokenizer.vocab_size, tokenizer.encode_batch

    def prompt_tokens(self, texts: Sequence[str], prompts: Sequence[int]) -> list[int]:
        raise AssertionError("there are no prompts")


def test_plain_text_has_no_file_of_prompts_and_asks_no_encoder_for_them(tools: Tools, tmp_path: Path) -> None:
    tools.assign(tmp_path / "out", tools.validation, Plain(tools.tokenizer))
    assert not [name for name in contents(tmp_path / "out") if name.endswith(PROMPTS)]
    assert not [name for name in contents(tmp_path / "out-parts") if name.endswith(PROMPTS)]


def test_a_part_of_a_format_before_prompts_is_done_again(tools: Tools, tmp_path: Path) -> None:
    out, parts = tmp_path / "out", tmp_path / "out-parts"
    tools.assign(out)
    before = contents(out)
    counts = parts / "00000/counts.json"
    values = json.loads(counts.read_text())
    del values["format"]
    counts.write_text(json.dumps(values))
    (parts / f"00000/part{PROMPTS}").unlink()
    kept = (parts / "00002/counts.json").stat().st_mtime_ns
    tools.assign(out)
    assert contents(out) == before
    assert json.loads(counts.read_text())["format"] == 2
    assert (parts / "00002/counts.json").stat().st_mtime_ns == kept


def test_instructions_that_became_plain_text_leave_no_prompts(tools: Tools, tmp_path: Path) -> None:
    corpus = CorpusConfig(root=str(tmp_path / "corpus"))
    write(tmp_path / "corpus/valid/00000/a.jsonl", records(2, 1))
    path = tmp_path / "corpus/train/00000/a.jsonl"
    for every, there in ((100, True), (1, False)):
        write(path, records(6, every))
        (group,) = make_plan(corpus, max_groups=1).part("train")
        opened = (tools.clusterer, tools.tokenizer)
        out, scratch = tmp_path / "out", tmp_path / "parts"
        assign_group(AssignConfig(), corpus, group, lambda opened=opened: opened, out, scratch=scratch)
        assert any(name.endswith(PROMPTS) for name in contents(tmp_path / "out")) == there


# --- the stages ---


def write_instructions(folder: Path) -> Path:
    """The small corpus; in its second training shard and its validation split every second line is an instruction."""
    write_corpus(folder)
    for path in ("train/00001/text.jsonl", "valid/small/00000/text.jsonl"):
        rows = [json.loads(line) for line in (folder / path).read_text().splitlines()]
        for row in rows[::2]:
            text = row.pop("text")
            row["src"], row["tgt"] = text[: len(text) // 3].rstrip(), text[len(text) // 3 :].strip()
        (folder / path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_stages_publish_and_fetch_prompts_with_their_shards(root: str, tmp_path: Path):
    corpus = write_instructions(tmp_path / "corpus")
    run = Run(parse_config(json.dumps(small_settings(str(corpus), root, None))))
    stages.plan(run)
    made = {task.name: task.run() for task in stages.tasks(run) if task.name.split(":")[0] in PREPARING}
    with_prompts = {name for name, manifest in made.items() for path in manifest.paths() if path.endswith(PROMPTS)}
    assert with_prompts == {"assign:train-00001", "assign:validation-00000"}

    texts = {document.sp_id: document for part in ("train", "validation") for document in run.documents(part)}
    tokenizer = TextTokenizer.load(run.fetch(run.tokenizer_spec(), tmp_path / "fetched"))
    validation, _ = run.validation_documents(tmp_path / "fetched")
    members = (Member("dense"), Member("expert", 0), Member("random", 1))
    trained = [TokenDocuments(run.train_shards(member, tmp_path / "fetched")) for member in members]
    for stream in (*trained, validation):
        assert stream.has_prompts
        prompted = 0
        for record, prompt, learned in zip(stream.records(), stream.prompts(), stream.learned_targets(), strict=True):
            document = texts[record.sp_id]
            (expected,) = tokenizer.prompt_tokens([document.text], [document.prompt])
            assert prompt == expected == np.count_nonzero(~learned)
            assert len(learned) > prompt
            prompted += prompt > 0
        assert 0 < prompted < stream.n_documents
        np.testing.assert_array_equal(
            stream.learned(0, stream.n_tokens),
            np.concatenate([[True, *learned] for learned in stream.learned_targets()]),
        )
    assert [task.run().digest for task in stages.tasks(run) if task.name in made] == [m.digest for m in made.values()]
