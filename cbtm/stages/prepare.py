"""Stages on text: tokenizer, clusterer, assigner."""

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cbtm.branch.tokenizer import TextTokenizer, build_tokenizer
from cbtm.cluster.assigner import assign_group
from cbtm.cluster.clusterer import Clusterer
from cbtm.cluster.extension import OneCluster
from cbtm.cluster.fit import fit_clusterer
from cbtm.cluster.fixed import NO_ASSIGNMENT
from cbtm.cluster.held_out import label_held_out
from cbtm.cluster.labels import read_labels
from cbtm.cluster.sample import CountTokens
from cbtm.corpus import Document, ReadCounts
from cbtm.progress import progress
from cbtm.run import Run
from cbtm.tokens import TokenDocuments


def tokenizer(run: Run, work: Path) -> dict[str, Any]:
    """Build the tokenizer stage's output in `work`."""
    config = run.config.tokenizer
    counts = ReadCounts()
    documents = itertools.islice(run.documents("train", counts), config.max_documents)
    texts = (document.text for document in _counted(documents, "tokenizer"))
    if given := config.path or run.config.seed_model.path:
        config = config.model_copy(update={"path": run.given(given)})
    made = build_tokenizer(config, None, texts, work)
    return {"vocab_size": made.vocab_size, "separator": made.separator, "documents": counts.documents}


def cluster(run: Run, work: Path) -> dict[str, Any]:
    """Build the clusterer stage's output in `work`: fit a clusterer, or take over and measure a given one."""
    config, scratch = run.config.cluster, work.parent
    counts = ReadCounts()
    facts = fit_clusterer(
        config,
        TrainDocuments(run, counts),
        work,
        given=Clusterer.fetch(config.path, scratch / "given") if config.path is not None else None,
        fixed=run.fixed_assignments,
        labels=read_labels(config.labels, run.paths("train")) if config.labels is not None else None,
        count_tokens=_token_counter(_encoder(run, scratch)) if config.needs_tokens else None,
    )
    if unassigned := facts.pop("unassigned", 0):
        counts.skipped[NO_ASSIGNMENT] = unassigned
    return {**facts, "skipped": counts.skipped}


def assign(run: Run, name: str, work: Path) -> dict[str, Any]:
    """Build one shard group's output in `work`."""
    scratch, group = work.parent, run.plan_made.group(name)
    if run.shared is not None and group.part == "validation":
        shard, _ = run.shared.held_out_tokens(name, scratch)
        clusterer = Clusterer.load(run.fetch(run.cluster_spec(), scratch))
        return label_held_out(run.config.corpus, group, clusterer, TokenDocuments([shard]), work)
    folders = (run.fetch(run.cluster_spec(), scratch), run.fetch(run.tokenizer_spec(), scratch))
    return assign_group(
        run.config.assign,
        run.corpus_of(group),
        group,
        partial(_open_tools, *folders),
        work,
        scratch=scratch / "parts",
        fixed=run.fixed_assignments if run.base is None else OneCluster(run.base.config.cluster.n_clusters),
    )


def _open_tools(clusterer: Path, tokenizer: Path) -> tuple[Clusterer, TextTokenizer]:
    return Clusterer.load(clusterer), TextTokenizer.load(tokenizer)


def _encoder(run: Run, scratch: Path) -> TextTokenizer:
    return TextTokenizer.load(run.fetch(run.tokenizer_spec(), scratch))


def _token_counter(encoder: TextTokenizer) -> CountTokens:
    return lambda texts: np.array([len(row) for row in encoder.encode_batch(texts)], dtype=np.int64)


class TrainDocuments:
    """The training documents, as often as one likes; `counts` are those of the first time."""

    def __init__(self, run: Run, counts: ReadCounts) -> None:
        self._run, self._counts = run, counts

    def __iter__(self) -> Iterator[Document]:
        counts, self._counts = self._counts, ReadCounts()
        return _counted(self._run.documents("train", counts), "cluster")


def _counted(documents: Iterator[Document], task: str) -> Iterator[Document]:
    with progress(task, "documents") as shown:
        for number, document in enumerate(documents, start=1):
            shown.update(number, None)
            yield document
