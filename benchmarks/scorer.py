"""Scores of validation tokens against a loop over transformers' logits; and the nearest experts against all.

    python benchmarks/scorer.py [--vocabularies 8192,50272] [--documents 64] [--repeats 3]

An OPT of 4 layers x 256 with random weights scores documents of random tokens, each as long as its context: nothing is
padded on either side. The loop takes whole documents in batches, without a cache and in inference mode, and picks the
targets from the log_softmax of all logits, or gets them from cross_entropy; of its batch sizes and the two ways the
fastest is the peer in speed. Memory grows with the batch: the peer in memory is the loop that feeds as many tokens at
once as the scorer. Peak memory is above the interpreter with its imports, the model and the documents. The largest
difference between the log-probabilities of the two is compared, so that nobody does less.

Then so many experts score the same documents: each all tokens, or only those where it is among the nearest of a
token's context, once with distances that keep to a document and once with ones that are drawn anew for each token, the
worst case. In the first each document is near some experts of its own; the text before its first tokens says little,
and distances drift. All experts have the same weights, which does not change their time.
--small runs the same code with tiny shapes; its figures mean nothing.
"""

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

try:
    import numpy as np
    import torch
    from corpora import Measurement, alternate, hardware, header, limit_threads, median, row
    from records import Records, add_json_argument

    from cbtm.branch.seed import ScratchModelConfig, create_model
    from cbtm.merge.scorer import LOG_PROBS_FILE, ScoreConfig, score_documents, top_k_needed
except ModuleNotFoundError as missing:
    raise SystemExit(f"this benchmark needs {missing.name}: install it (for cbtm, PYTHONPATH=. will do)") from missing

OURS = "cbtm"
WAYS = ("log_softmax", "cross_entropy")
ALL, COHERENT, RANDOM = "all experts", "nearest, by document", "nearest, at random"


@dataclass(frozen=True)
class Case:
    """One model and its documents.

    Attributes:
        context: Tokens of a document that are scored, and that are fed at once.
        batch_tokens: Tokens that the scorer feeds at once.
    """

    shape: ScratchModelConfig
    vocabulary: int
    context: int
    documents: int
    batch_tokens: int
    experts: int
    top_k: int

    @property
    def tokens(self) -> int:
        return self.documents * self.context

    def model(self) -> Any:
        made: Any = create_model(
            self.shape, vocab_size=self.vocabulary, separator_id=0, context_length=self.context
        ).eval()
        with torch.no_grad():  # weights as large as trained ones, so that differences show
            for parameter in made.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(4)
        return made

    def rows(self) -> list[np.ndarray]:
        rng = np.random.default_rng(0)
        return [rng.integers(1, self.vocabulary, size=self.context + 1) for _ in range(self.documents)]


def tiny(case: Case) -> Case:
    """What is rehearsed, so that imports and first uses of libraries are not measured."""
    shape = ScratchModelConfig(hidden_size=8, n_layers=1, n_heads=1)
    return replace(case, shape=shape, vocabulary=16, context=8, documents=2)


# --- contenders ---


def ours(case: Case) -> Callable[[], Any]:
    _score(tiny(case), tiny(case).model(), tiny(case).rows())
    return partial(_score, case, case.model(), case.rows())


def _score(case: Case, model: Any, rows: list[np.ndarray], needed: list[np.ndarray] | None = None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        facts = score_documents(
            model,
            rows,
            ScoreConfig(max_batch_tokens=case.batch_tokens),
            context_length=case.context,
            facts={},
            folder=Path(folder),
            needed=needed,
        )
        return facts | {"log_probs": np.load(Path(folder) / LOG_PROBS_FILE)}


def peer(case: Case, batch: int, way: str) -> Callable[[], Any]:
    _loop(tiny(case), tiny(case).model(), tiny(case).rows(), batch, way)
    return partial(_loop, case, case.model(), case.rows(), batch, way)


@torch.inference_mode()
def _loop(case: Case, model: Any, rows: list[np.ndarray], batch: int, way: str) -> dict[str, Any]:
    found = []
    for start in range(0, len(rows), batch):
        tokens = torch.from_numpy(np.stack(rows[start : start + batch]))
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits  # (B, T, V)
        targets = tokens[:, 1:]
        if way == "log_softmax":
            log_probs = logits.log_softmax(dim=-1).gather(2, targets[:, :, None])[:, :, 0]
        else:
            log_probs = -torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        found.append(log_probs.flatten())
    return {"log_probs": torch.cat(found).numpy()}


def experts(case: Case, routing: str) -> Callable[[], Any]:
    """Work of all experts on the same documents."""
    _score_all(tiny(case), tiny(case).model(), tiny(case).rows(), distances_of(tiny(case), routing))
    return partial(_score_all, case, case.model(), case.rows(), distances_of(case, routing))


def _score_all(case: Case, model: Any, rows: list[np.ndarray], distances: np.ndarray | None) -> dict[str, Any]:
    offsets = np.arange(case.documents + 1, dtype=np.int64) * case.context
    found = []
    for expert in range(case.experts):
        needed = None if distances is None else top_k_needed(distances, offsets, expert, case.top_k)
        found.append(_score(case, model, rows, needed))
    return {name: [facts[name] for facts in found] for name in ("compute_share", "tokens_scored", "tokens_fed")}


def distances_of(case: Case, routing: str) -> np.ndarray | None:
    """Distances of each token's context to the experts' centres, float32 (n_tokens, experts)."""
    rng = np.random.default_rng(1)
    if routing == ALL:
        return None
    if routing == RANDOM:
        return rng.random((case.tokens, case.experts), dtype=np.float32)
    out = np.empty((case.documents, case.context, case.experts), dtype=np.float32)
    known = 1 - np.exp(-np.arange(case.context) / 16)  # how much of what the document is about its text has shown
    for document in out:
        own = np.zeros(case.experts)
        own[rng.permutation(case.experts)[: case.top_k]] = 0.4
        document[:] = 1 - known[:, None] * own
        # A drift of standard deviation 0.08 that is forgotten over about 50 tokens.
        drift = rng.normal(0, 0.08, case.experts)
        for row_of_token in document:
            row_of_token += drift
            drift = 0.98 * drift + math.sqrt(1 - 0.98**2) * rng.normal(0, 0.08, case.experts)
    return out.reshape(case.tokens, case.experts)


# --- tables ---


def compare(case: Case, args: argparse.Namespace, records: Records) -> Callable[[], None]:
    """Print the rows of one vocabulary; returns what prints its goals."""
    own_batch = max(1, case.batch_tokens // case.context)
    sizes = sorted({1, own_batch, 8 * own_batch})
    contenders: dict[str, tuple[Any, ...]] = {OURS: (ours, case)}
    contenders |= {f"{way}, {size} x {case.context}": (peer, case, size, way) for way in WAYS for size in sizes}
    runs = alternate(contenders, repeats=args.repeats, limit_s=args.limit)
    found = {name: median(some) for name, some in runs.items()}
    title = f"vocabulary {case.vocabulary:,}"
    for name, run in found.items():
        if run.error:
            row(case.vocabulary, name, "failed: " + run.error, *[""] * 5)
            records.measured(title, name, runs[name], unit="tokens/s")
            continue
        speeds = [case.tokens / one.seconds for one in runs[name]]
        apart = math.nan
        if not found[OURS].error:
            apart = float(np.abs(run.value["log_probs"] - found[OURS].value["log_probs"]).max())
        row(case.vocabulary, name, f"{statistics.median(speeds):,.0f}", f"{min(speeds):,.0f}-{max(speeds):,.0f}",
            f"{run.seconds / found[OURS].seconds:.2f}", f"{run.cpu_seconds:.2f}", f"{run.peak_bytes / 1e6:,.0f}",
            f"{apart:.1e}")  # fmt: skip
        note = "" if name == OURS else f"apart by {apart:.1e}"
        records.add(title, name, "tokens/s", speeds, peak_bytes=run.peak_bytes, is_ours=name == OURS, note=note)
    return partial(goals_of, case, found, own_batch, records, small=args.small)


def goals_of(case: Case, found: Mapping[str, Measurement], own_batch: int, records: Records, *, small: bool) -> None:
    own = found[OURS]
    others = {name: run for name, run in found.items() if name != OURS and not run.error}
    if own.error or not others:
        records.goal(f"V={case.vocabulary}, both score", False, own.error)
        return
    apart = max(float(np.abs(run.value["log_probs"] - own.value["log_probs"]).max()) for run in others.values())
    records.goal(f"V={case.vocabulary}, equal to 1e-4", apart <= 1e-4, f"{apart:.1e}")
    if small:
        return
    name, fastest = min(others.items(), key=lambda item: item[1].seconds)
    ratio = fastest.seconds / own.seconds
    records.goal(
        f"V={case.vocabulary}, >= 1.15x the tokens/s of the fastest loop ({name})", ratio >= 1.15, f"{ratio:.2f}x"
    )
    alike = [run for name, run in others.items() if name.split(", ")[1] == f"{own_batch} x {case.context}"]
    if not alike:
        records.goal(f"V={case.vocabulary}, a fifth of the memory", False, "no loop of as many tokens at once")
        return
    share = own.peak_bytes / min(run.peak_bytes for run in alike)
    records.goal(
        f"V={case.vocabulary}, <= a fifth of the memory of the loop that feeds as much", share <= 0.2, f"{share:.3f}"
    )


def compare_experts(case: Case, args: argparse.Namespace, records: Records) -> Callable[[], None]:
    """Print what all experts cost with each routing; returns what prints the goals."""
    runs = alternate(
        {routing: (experts, case, routing) for routing in (ALL, COHERENT, RANDOM)},
        repeats=args.repeats,
        limit_s=args.limit,
    )
    found = {name: median(some) for name, some in runs.items()}
    title = f"vocabulary {case.vocabulary:,}, top-{case.top_k} of {case.experts} experts"
    for name, run in found.items():
        share = "" if run.error else f"{statistics.mean(run.value['compute_share']):.2f} of the FLOPs"
        records.measured(title, name, runs[name], is_ours=name == ALL, note=share)
        if run.error:
            row(case.vocabulary, name, "failed: " + run.error, *[""] * 5)
            continue
        seconds, all_tokens = [one.seconds for one in runs[name]], case.experts * case.tokens
        row(case.vocabulary, name, f"{run.seconds:.2f}", f"{min(seconds):.2f}-{max(seconds):.2f}",
            f"{found[ALL].seconds / run.seconds:.2f}", f"{statistics.mean(run.value['compute_share']):.3f}",
            f"{sum(run.value['tokens_fed']) / all_tokens:.3f}",
            f"{sum(run.value['tokens_scored']) / all_tokens:.3f}")  # fmt: skip

    def goals() -> None:
        for name in (COHERENT, RANDOM) if not args.small else ():
            ratio = found[ALL].seconds / found[name].seconds
            text = f"V={case.vocabulary}, top-{case.top_k} of {case.experts} {name}, >= 1.5x over all"
            records.goal(text, ratio >= 1.5, found[name].error or found[ALL].error or f"{ratio:.2f}x")

    return goals


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--vocabularies", default="8192,50272")
    parser.add_argument(
        "--documents", type=int, default=64, metavar="N", help="for the scorer against the loop; 0 skips it"
    )
    parser.add_argument("--routed-documents", type=int, default=32, metavar="N", help="for the experts; 0 skips them")
    parser.add_argument("--context", type=int, default=256, metavar="N")
    parser.add_argument("--batch-tokens", type=int, default=1024, metavar="N", help="at most 1024, the limit of a CPU")
    parser.add_argument("--experts", type=int, default=8, metavar="N")
    parser.add_argument("--top-k", type=int, default=2, metavar="N")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=900, metavar="SECONDS", help="longest work of one contender")
    parser.add_argument("--threads", type=int, default=1, help="threads of every process; 0 leaves it to the libraries")
    add_json_argument(parser)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if find_spec("transformers") is None:
        raise SystemExit("this benchmark needs transformers: pip install transformers")
    threads = limit_threads(args.threads)
    width, n_layers = (32, 2) if args.small else (256, 4)
    if args.small:
        args.vocabularies, args.context, args.documents, args.routed_documents = "300,700", 32, 8, 8
        args.batch_tokens, args.repeats = 128, 1
    cases = [
        Case(
            shape=ScratchModelConfig(hidden_size=width, n_layers=n_layers, n_heads=4),
            vocabulary=int(vocabulary),
            context=args.context,
            documents=args.documents,
            batch_tokens=args.batch_tokens,
            experts=args.experts,
            top_k=args.top_k,
        )
        for vocabulary in args.vocabularies.split(",")
    ]
    print(
        f"{hardware('numpy', 'torch', 'transformers')}; {threads}; OPT {n_layers} x {width}, context {args.context}, "
        f"float32, {args.batch_tokens} tokens at once; median of {args.repeats}\n"
    )
    if args.small:
        print("small shapes, figures mean nothing\n")
    goals, records = [], Records(args.json)
    if args.documents:
        print(f"one model, {args.documents} documents\n")
        header("vocabulary", "", "tokens/s", "range", "s to cbtm", "CPU s", "peak MB", "apart by")
        goals += [compare(case, args, records) for case in cases]
        print()
    if args.routed_documents:
        print(f"top-{args.top_k} of {args.experts} experts, {args.routed_documents} documents\n")
        header("vocabulary", "", "s", "range", "ratio to all", "share of compute", "fed", "scored")
        goals += [compare_experts(replace(case, documents=args.routed_documents), args, records) for case in cases]
        print()
    for tell in goals:
        tell()


if __name__ == "__main__":
    main()
