"""Cost of each stage against the number of documents and of clusters, with the exponent of its growth.

One run a point, by the stages themselves, on the first documents of one or more corpora: fit, assignment, some training
steps of one expert, its scores, the routing of the validation text, and the evaluation. The scores of the other
experts are made up for the evaluation, whose work does not depend on them. Seconds are of the processor, all threads
together, for wall time says little on a machine that others use; both are printed.

    python benchmarks/scaling.py --corpus C8 --corpus BENCH --tokenizer GPT2 --documents 1000,4000 --clusters 2,8,32
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from corpora import Measurement, Text, hardware, header, limit_threads, measure, row

STAGES = ("fit", "assign", "train", "score", "route", "evaluate")
UNITS = {
    "fit": "document",
    "assign": "document",
    "train": "token trained on",
    "score": "token",
    "route": "token",
    "evaluate": "token",
}
_VALIDATION, _STEPS, _CONTEXT, _SEQUENCES = 40, 4, 256, 4


def write_corpus(corpora: Sequence[str], n_documents: int, folder: Path) -> None:
    """Training documents, the corpora's in turns, in four shards, and the validation documents after them."""
    sources = [Text(root, "train", None, None).texts() for root in corpora]
    texts = list(islice(chain.from_iterable(zip(*sources, strict=False)), n_documents + _VALIDATION))
    if len(texts) < n_documents + _VALIDATION:
        raise SystemExit(f"the corpora have {len(texts)} documents in turns; --documents {n_documents} needs more")
    parts = {f"train/{number:05d}/text.jsonl": texts[number:n_documents:4] for number in range(4)}
    for path, part in {**parts, "valid/00000/text.jsonl": texts[n_documents:]}.items():
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_text("".join(json.dumps({"text": text}) + "\n" for text in part), encoding="utf-8")


def settings(corpus: Path, root: Path, tokenizer: str | None, n_clusters: int) -> dict[str, Any]:
    training = {"context_length": _CONTEXT, "log_every": 1, "learning_rate": 1e-3, "threads": 1}
    return {
        "root": str(root),
        "corpus": {"root": str(corpus)},
        "tokenizer": {"path": tokenizer} if tokenizer else {"vocab_size": 2048},
        "cluster": {"n_clusters": n_clusters, "device": "cpu"},
        "seed_model": {
            "scratch": {"hidden_size": 64, "n_layers": 2, "n_heads": 4},
            "training": {**training, "steps": 1, "sequences_per_step": 4},
        },
        "train": {**training, "steps": _STEPS, "sequences_per_step": _SEQUENCES * n_clusters},
        "score": {"threads": 1},
        "evaluate": {"bootstrap_resamples": 200, "threads": 1},
        "tracking": {"enabled": False},
    }


def point(corpora: Sequence[str], tokenizer: str | None, n_documents: int, n_clusters: int) -> Callable[[], Any]:
    """Prepare one run; its work returns what each stage took: wall and processor seconds, and units of work."""
    from cbtm import stages
    from cbtm.run import Run

    kept = tempfile.TemporaryDirectory(prefix="cbtm-scaling-")
    folder = Path(kept.name)
    write_corpus(corpora, n_documents, folder / "corpus")
    run = Run.parse(json.dumps(settings(folder / "corpus", folder / "run", tokenizer, n_clusters)))
    stages.plan(run)
    stages.tokenizer(run)

    def work() -> dict[str, tuple[float, float, float]]:
        with kept:
            return measured(run, folder, n_documents)

    return work


def measured(run: Any, folder: Path, n_documents: int) -> dict[str, tuple[float, float, float]]:
    from cbtm import stages
    from cbtm.merge.evaluator import evaluate
    from cbtm.merge.validation_set import Scores
    from cbtm.stages.held_out import distances, held_out, open_router_parts, validation_set
    from cbtm.train.member import Member

    found: dict[str, tuple[float, float, float]] = {}

    @contextmanager
    def timed(stage: str, units: float) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        found[stage] = (time.perf_counter() - wall, time.process_time() - cpu, units)

    with timed("fit", n_documents):
        stages.cluster(run)
    stages.assign(run, run.plan_made.part("validation")[0].name)
    with timed("assign", n_documents):
        for group in run.plan_made.part("train"):
            stages.assign(run, group.name)
    seed, expert = Member("seed"), Member("expert", 0)
    stages.train(run, seed)
    with timed("train", _STEPS * _SEQUENCES * _CONTEXT):
        stages.train(run, expert)
    clusterer, tokenizer = open_router_parts(run, folder)
    validation = validation_set(run, held_out(run, folder), tokenizer)
    n_tokens = int(validation.offsets[-1])
    with timed("score", n_tokens):
        stages.score(run, expert)
    with timed("route", n_tokens):
        near = distances(run, clusterer, tokenizer, validation, folder)
    rng = np.random.default_rng(0)
    made_up = [-rng.gamma(2.0, 2.0, n_tokens).astype(np.float32) for _ in range(run.config.cluster.n_clusters + 1)]
    with timed("evaluate", n_tokens):
        evaluate(run.config.evaluate, validation, Scores(seed=made_up[0], experts=made_up[1:]), near)
    return found


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Slope of log cost over log size by least squares: 1 is proportional growth, 0 none.

    Raises:
        ValueError: For fewer than two sizes.
    """
    if len(set(sizes)) < 2:
        raise ValueError(f"an exponent needs two sizes, not {list(sizes)}")
    x, y = np.log(sizes), np.log(costs)
    return float(np.sum((x - x.mean()) * (y - y.mean())) / np.sum((x - x.mean()) ** 2))


def sweep(name: str, sizes: Sequence[int], found: Sequence[Measurement]) -> None:
    """Print one table: a line for each stage, a column for each size, and the exponent."""
    print()
    header("stage", *(f"{name} = {size:,}" for size in sizes), "exponent", "a unit at the largest", "unit")
    done = [(size, one) for size, one in zip(sizes, found, strict=True) if not one.error]
    for size, one in zip(sizes, found, strict=True):
        if one.error:
            print(f"{name}={size}: {one.error}")
    if not done:
        return
    for stage in STAGES:
        costs = [one.value[stage] for _, one in done]
        cells = [f"{cpu:.2f} ({wall:.2f})" for wall, cpu, _ in costs]
        slope = exponent([size for size, _ in done], [cpu for _, cpu, _ in costs]) if len(done) > 1 else math.nan
        _, cpu, units = costs[-1]
        row(stage, *cells, f"{slope:.2f}", f"{1e6 * cpu / units:.1f} µs", UNITS[stage])
    row("peak MB of the process", *(f"{one.peak_total_bytes / 1e6:.0f}" for _, one in done), "", "", "")


def numbers(text: str) -> list[int]:
    return [int(one) for one in text.split(",") if one]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", action="append", required=True, metavar="FOLDER", help="may be given several times")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="of a given tokenizer; default one of 2,048 is trained")
    parser.add_argument("--documents", type=numbers, default="", help="sizes of the first table, with commas")
    parser.add_argument("--clusters", type=numbers, default="", help="sizes of the second table, with commas")
    parser.add_argument("--at-clusters", type=int, default=8, help="clusters of the first table")
    parser.add_argument("--at-documents", type=int, default=4000, help="documents of the second table")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=float, default=600, metavar="SECONDS")
    args = parser.parse_args()
    print(hardware("numpy", "torch", "tokenizers"), limit_threads(args.threads), sep="; ")
    print(f"processor seconds (wall seconds); {_VALIDATION} validation documents")
    for name, sizes in (("documents", args.documents), ("clusters", args.clusters)):
        if sizes:
            points = [(n, args.at_clusters) if name == "documents" else (args.at_documents, n) for n in sizes]
            found = []
            for one in points:
                found.append(measure(point, args.corpus, args.tokenizer, *one, limit_s=args.limit))
                print(f"{one[0]} documents, {one[1]} clusters:", found[-1].error or found[-1].value, flush=True)
            sweep(name, sizes, found)


if __name__ == "__main__":
    main()
