"""Stages on text: tokenizer, clusterer, assigner."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cbtm.branch.tokenizer import TextTokenizer, build_tokenizer
from cbtm.cluster.assigner import assign_group
from cbtm.cluster.clusterer import Clusterer, fit_clusterer
from cbtm.corpus import Document, ReadCounts
from cbtm.progress import progress
from cbtm.run import Run


def tokenizer(run: Run, work: Path) -> dict[str, Any]:
    """Build the tokenizer stage's output in `work`."""
    config = run.config.tokenizer
    counts = ReadCounts()
    documents = itertools.islice(run.documents("train", counts), config.max_documents)
    texts = (document.text for document in _counted(documents, "tokenizer"))
    made = build_tokenizer(config, run.config.seed_model.path, texts, work)
    return {"vocab_size": made.vocab_size, "separator": made.separator, "documents": counts.documents}


def cluster(run: Run, work: Path) -> dict[str, Any]:
    """Build the clusterer stage's output in `work`."""
    counts = ReadCounts()
    facts = fit_clusterer(run.config.cluster, _counted(run.documents("train", counts), "cluster"), work)
    return {**facts, "skipped": counts.skipped}


def assign(run: Run, name: str, work: Path) -> dict[str, Any]:
    """Build one shard group's output in `work`."""
    scratch = work.parent
    group = run.plan_made.group(name)
    clusterer = Clusterer.load(run.fetch(run.cluster_spec(), scratch))
    encoder = TextTokenizer.load(run.fetch(run.tokenizer_spec(), scratch))
    return assign_group(run.config.assign, run.config.corpus, group, clusterer, encoder, work)


def _counted(documents: Iterator[Document], task: str) -> Iterator[Document]:
    with progress(task, "documents") as shown:
        for number, document in enumerate(documents, start=1):
            shown.update(number, None)
            yield document
