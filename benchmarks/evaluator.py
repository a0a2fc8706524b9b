"""A grid of ensemble settings over stored scores, against one setting at a time; and how often the experts run for it.

    python benchmarks/evaluator.py [--tokens 1000000] [--experts 128] [--threads 2] [--repeats 3]

Scores and distances are random float32 files in a temporary folder, read as memory maps, as an evaluation has them:
each expert is worse than a common base by an exponential draw, and distances are uniform in [0.5, 1), drawn anew for
each token and distinct within it, so that sorts find no order to exploit and no tie can be broken in two ways.

`mix_grid` is the grid alone. `evaluate` is the whole evaluation: the grid, a seed and a dense model, every expert by
itself, each domain, and a bootstrap over documents of each figure and of its ratio to the dense model. The peers take
one setting at a time, as one writes it down: softmax of -distance^power / T, the largest top-k of it, renormalised, and
a logsumexp over the experts in float64. They get what they need in blocks that are read and converted outside of the
measured time, keep nothing but the sums of each document, and see a slice of the tokens; their time for all tokens is
scaled from it. Every sum of theirs is compared with that of the grid.

Resident memory is the peak of all of the process, interpreter and pages of mapped files included; the kernel drops
those when it needs room. Anonymous memory is what it cannot drop, sampled every few milliseconds.

The last table scores documents under tiny experts, and counts by a hook what passes through their layers, whatever
calls it: scoring, and then an evaluation of one setting and of all of them.
--small runs the same code on few tokens; its figures mean nothing.
"""

import argparse
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

try:
    import numpy as np
    import torch
    from corpora import Measurement, alternate, hardware, header, limit_threads, median, row
    from numpy.typing import NDArray
    from records import Records, add_json_argument

    from cbtm.branch.seed import ScratchModelConfig, create_model
    from cbtm.merge.config import EvaluateConfig
    from cbtm.merge.evaluator import evaluate
    from cbtm.merge.grid import Setting, mix_grid
    from cbtm.merge.scorer import LOG_PROBS_FILE, ScoreConfig, score_documents
    from cbtm.merge.validation_set import Scores, ValidationSet, selection_documents
    from cbtm.train.loss import CausalLoss
except ModuleNotFoundError as missing:
    raise SystemExit(f"this benchmark needs {missing.name}: install it (for cbtm, PYTHONPATH=. will do)") from missing

GRID, WHOLE = "cbtm mix_grid", "cbtm evaluate"
NUMPY, TORCH = "numpy, a setting at a time", "torch, a setting at a time"
LIMIT_S, LIMIT_BYTES, AGREE = 60, 2e9, 1e-9
MADE_ROWS = 50_000  # tokens whose distances are made at once
PEER_ROWS = 4096  # tokens of a peer's block; the quickest of 1024 to 16384 for numpy
SAMPLED_EVERY_S = 0.005


@dataclass(frozen=True)
class Data:
    """Scores and distances of documents, in files of a folder.

    Attributes:
        peer_tokens: Tokens that the peers see, at least; whole documents from the first on.
    """

    folder: Path
    tokens: int
    experts: int
    peer_tokens: int

    def make(self) -> None:
        rng = np.random.default_rng(0)
        mean = min(1000, max(2, self.tokens // 8))
        ends = np.cumsum(rng.integers(mean // 2, mean + mean // 2, size=2 * self.tokens // mean))
        np.save(self.folder / "offsets.npy", np.concatenate([[0], ends[ends < self.tokens - mean // 2], [self.tokens]]))
        base = rng.exponential(3, self.tokens)
        for name in ("seed", "dense", *range(self.experts)):
            log_probs = -(base + rng.exponential(1, self.tokens))
            np.save(self.folder / f"{name}.npy", log_probs.astype(np.float32))
        shape = (self.tokens, self.experts)
        distances = np.lib.format.open_memmap(self.folder / "distances.npy", "w+", np.float32, shape)
        # Multiples of 2^-24, which float32 has all of in [0.5, 1); in their last digits stands the expert.
        steps = 2**23 // self.experts
        for begin in range(0, self.tokens, MADE_ROWS):
            block = distances[begin : begin + MADE_ROWS]
            drawn = rng.integers(steps, size=block.shape) * self.experts + np.arange(self.experts)
            block[:] = 0.5 + drawn * 2.0**-24
        distances.flush()

    def array(self, name: object) -> NDArray[Any]:
        """A memory map."""
        found: NDArray[Any] = np.load(self.folder / f"{name}.npy", mmap_mode="r")
        return found

    def scores(self) -> list[NDArray[Any]]:
        return [self.array(number) for number in range(self.experts)]

    def offsets(self) -> NDArray[np.int64]:
        offsets: NDArray[np.int64] = np.array(self.array("offsets"))
        return offsets

    def peer_documents(self) -> int:
        return int(np.searchsorted(self.offsets(), self.peer_tokens, side="left"))


class AnonymousPeak:
    """Highest anonymous resident memory in bytes while the `with` lasts, read from /proc every few milliseconds."""

    def __enter__(self) -> "AnonymousPeak":
        self.bytes = self.mapped_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        with suppress(OSError, IndexError):  # elsewhere than on Linux there is no such file
            while not self._stop.wait(SAMPLED_EVERY_S):
                status = Path("/proc/self/status").read_text()
                sizes = [1024 * int(status.partition(name)[2].split()[0]) for name in ("RssAnon:", "RssFile:")]
                self.bytes, self.mapped_bytes = map(max, (self.bytes, self.mapped_bytes), sizes)


# --- contenders: each gives sums of each document, shape (settings, documents) ---


def watched(work: Callable[[], Any]) -> Callable[[], Any]:
    def measured() -> dict[str, Any]:
        with AnonymousPeak() as peak:
            value = work()
        return {"value": value, "anonymous": peak.bytes, "mapped": peak.mapped_bytes}

    return measured


def grid(data: Data, settings: Sequence[Setting], threads: int) -> Callable[[], Any]:
    offsets, prior = data.offsets(), np.full(data.experts, 1 / data.experts)

    def work() -> NDArray[np.float64]:
        sums = mix_grid(data.scores(), data.array("distances"), offsets, settings, prior=prior, threads=threads)
        return np.stack([one.nll for one in sums])

    return watched(work)


def whole(data: Data, config: EvaluateConfig) -> Callable[[], Any]:
    offsets = data.offsets()
    lengths = np.diff(offsets)
    clusters = np.arange(len(lengths)) * data.experts // len(lengths)
    tokens = [np.zeros(1 + length, dtype=np.int64) for length in lengths.tolist()]
    choosing = selection_documents(len(lengths))
    validation = ValidationSet([""] * len(lengths), tokens, clusters, 4 * lengths, choosing=choosing)

    def work() -> list[dict[str, Any]]:
        scores = Scores(data.array("seed"), data.scores(), data.array("dense"))
        return list(evaluate(config, validation, scores, data.array("distances"))["ensemble"])

    return watched(work)


def peer(data: Data, settings: Sequence[Setting], mixed: Callable[..., Any], threads: int) -> Callable[[], Any]:
    """`mixed(scores (n, k), distances (n, k), setting)` gives log-probabilities (n,)."""
    torch.set_num_threads(threads)
    n_documents = data.peer_documents()
    offsets = data.offsets()[: n_documents + 1]
    n_tokens = int(offsets[-1])
    scores = np.stack([row[:n_tokens] for row in data.scores()], axis=1).astype(np.float64)
    distances = data.array("distances")[:n_tokens].astype(np.float64)

    def work() -> NDArray[np.float64]:
        out = np.empty((len(settings), n_documents))
        for sums, setting in zip(out, settings, strict=True):
            blocks = [slice(begin, begin + PEER_ROWS) for begin in range(0, n_tokens, PEER_ROWS)]
            log_probs = np.concatenate([mixed(scores[block], distances[block], setting) for block in blocks])
            sums[:] = -np.add.reduceat(log_probs, offsets[:-1])
        return out

    return watched(work)


def mixed_by_numpy(scores: NDArray[Any], distances: NDArray[Any], setting: Setting) -> NDArray[np.float64]:
    logits = -(distances**setting.distance_power) / setting.temperature
    logits -= logits.max(axis=1, keepdims=True)
    weights = np.exp(logits)
    if setting.top_k < weights.shape[1]:
        kept = np.argpartition(distances, setting.top_k - 1, axis=1)[:, : setting.top_k]
        weights, scores = np.take_along_axis(weights, kept, axis=1), np.take_along_axis(scores, kept, axis=1)
    weights /= weights.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore"):
        terms = np.log(weights) + scores
    highest = terms.max(axis=1, keepdims=True)
    found: NDArray[np.float64] = highest[:, 0] + np.log(np.exp(terms - highest).sum(axis=1))
    return found


@torch.inference_mode()
def mixed_by_torch(scores: NDArray[Any], distances: NDArray[Any], setting: Setting) -> NDArray[np.float64]:
    near, log_probs = torch.from_numpy(distances), torch.from_numpy(scores)
    logits = -(near**setting.distance_power) / setting.temperature
    if setting.top_k < logits.shape[1]:
        logits, kept = logits.topk(setting.top_k, dim=1, sorted=False)
        log_probs = log_probs.gather(1, kept)
    found: NDArray[np.float64] = torch.logsumexp(logits.log_softmax(dim=1) + log_probs, dim=1).numpy()
    return found


# --- tables ---


def compare(data: Data, config: EvaluateConfig, args: argparse.Namespace, records: Records) -> None:
    settings = config.settings(data.experts)
    single = [setting for setting in settings if setting.ensemble == "clustering"]
    contenders: dict[str, tuple[Any, ...]] = {
        GRID: (grid, data, settings, args.threads),
        WHOLE: (whole, data, config),
        NUMPY: (peer, data, single, mixed_by_numpy, args.threads),
        TORCH: (peer, data, single, mixed_by_torch, args.threads),
    }
    runs = alternate(contenders, repeats=args.repeats, limit_s=args.limit)
    found = {name: median(some) for name, some in runs.items()}
    seen = int(data.offsets()[data.peer_documents()])
    print(f"{len(settings)} settings, {len(single)} of them clustering, of which the peers see {seen:,} tokens\n")
    header("", "settings", "tokens", "s", "range", "CPU s", "s for all tokens", "million tokens x settings / s",
           "ratio to mix_grid", "resident MB", "mapped MB", "anonymous MB")  # fmt: skip
    rates, case = {}, f"{data.tokens:,} tokens x {data.experts} experts, {len(single)} settings"
    for name, run in found.items():
        if run.error:
            row(name, "failed: " + run.error, *[""] * 10)
            records.measured(case, name, runs[name])
            continue
        counts = (len(single), seen) if name in (NUMPY, TORCH) else (len(settings), data.tokens)
        rates[name] = counts[0] * counts[1] / run.seconds
        seconds = [one.seconds for one in runs[name]]
        row(name, counts[0], f"{counts[1]:,}", f"{run.seconds:.2f}", f"{min(seconds):.2f}-{max(seconds):.2f}",
            f"{run.cpu_seconds:.2f}", f"{run.seconds * data.tokens / counts[1]:.0f}", f"{rates[name] / 1e6:.2f}",
            f"{rates[GRID] / rates[name]:.1f}" if GRID in rates else "", f"{run.peak_total_bytes / 1e6:,.0f}",
            f"{run.value['mapped'] / 1e6:,.0f}", f"{run.value['anonymous'] / 1e6:,.0f}")  # fmt: skip
        part = data.tokens / counts[1]
        part_seen = f"in proportion, from {counts[1]:,} tokens"
        note = part_seen if part > 1 else f"{run.value['mapped'] / 1e6:,.0f} MB of it mapped"
        records.measured(case, name, runs[name], is_ours=name == GRID, note=note,
                         value=partial(seconds_for_all, part), peak=lambda one: one.peak_total_bytes)  # fmt: skip
    print()
    goals_of(data, settings, found, records, small=args.small)


def seconds_for_all(part: float, run: Measurement) -> float:
    return part * run.seconds


def goals_of(
    data: Data, settings: Sequence[Setting], found: Mapping[str, Measurement], records: Records, *, small: bool
) -> None:
    failed = "; ".join(f"{name}: {run.error}" for name, run in found.items() if run.error)
    if failed:
        records.goal("all contenders run", False, failed)
        return
    sums = found[GRID].value["value"]
    alike = [number for number, setting in enumerate(settings) if setting.ensemble == "clustering"]
    for name in (NUMPY, TORCH):
        theirs = found[name].value["value"]
        apart = np.abs(sums[alike, : theirs.shape[1]] / theirs - 1).max()
        records.goal(
            f"sums of {theirs.size} documents and settings equal to {AGREE:g} ({name})", apart <= AGREE, f"{apart:.1e}"
        )
    reported = ~selection_documents(sums.shape[1])
    expected = np.exp(sums[:, reported].sum(axis=1) / np.diff(data.offsets())[reported].sum())
    given = np.array([one["perplexity"] for one in found[WHOLE].value["value"]])
    apart = np.abs(given / expected - 1).max()
    records.goal(
        f"{len(given)} perplexities of evaluate equal to {AGREE:g} to those of the sums", apart <= AGREE, f"{apart:.1e}"
    )
    for name in (GRID, WHOLE) if not small else ():
        run = found[name]
        text = f"{name}, {len(settings)} settings of {data.tokens:,} tokens x {data.experts} experts"
        records.goal(f"{text} < {LIMIT_S} s", run.seconds < LIMIT_S, f"{run.seconds:.1f} s")
        resident = run.peak_total_bytes
        records.goal(f"{text} < {LIMIT_BYTES / 1e9:g} GB resident", resident < LIMIT_BYTES, f"{resident / 1e9:.2f} GB")


class Fed:
    """Counts the tokens that pass through the first layers of models, whoever calls them."""

    def __init__(self) -> None:
        self.tokens = 0

    def watch(self, model: Any) -> None:
        def count(module: Any, inputs: tuple[Any, ...]) -> None:
            self.tokens += inputs[0].numel()

        model.get_input_embeddings().register_forward_pre_hook(count)


def count_passes(config: EvaluateConfig, n_experts: int, records: Records) -> None:
    """Print how often the text goes through the experts, for one setting and for all.

    Raises:
        SystemExit: If it is more than once through each.
    """
    n_documents, length, vocabulary = 12, 32, 64
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, vocabulary, size=length + 1) for _ in range(n_documents)]
    lengths = np.full(n_documents, length)
    validation = ValidationSet([""] * n_documents, rows, np.arange(n_documents) * n_experts // n_documents, 4 * lengths)
    distances = rng.random((n_documents * length, n_experts), dtype=np.float32)
    every = config.settings(n_experts)
    grids = {len(every): config}
    one = every[0]
    few = {"ensembles": ("clustering",), "temperatures": (one.temperature,), "distance_powers": (one.distance_power,)}
    grids = {1: config.model_copy(update={**few, "top_k": (one.top_k,)})} | grids
    header("settings", "experts", "tokens of the text", "tokens fed", "of them to look at the models",
           "passes over the text")  # fmt: skip
    for n_settings, chosen in grids.items():
        fed, looked = Fed(), Fed()
        experts = []
        for number in range(n_experts):
            shape = ScratchModelConfig(hidden_size=16, n_layers=1, n_heads=2, random_state=number)
            made = partial(create_model, shape, vocab_size=vocabulary, separator_id=0, context_length=length)
            probed = made()
            looked.watch(probed)
            CausalLoss(probed)  # tries the head on a few tokens, once for each model
            model = made()
            fed.watch(model)
            experts.append(_scores_of(model, rows, length))
        result = evaluate(chosen, validation, Scores(experts[0], experts), distances)
        if len(result["ensemble"]) != n_settings:
            raise SystemExit(f"{len(result['ensemble'])} settings were evaluated instead of {n_settings}")
        n_tokens = n_documents * length
        passes = (fed.tokens - looked.tokens) / n_tokens
        row(n_settings, n_experts, n_tokens, fed.tokens, looked.tokens, f"{passes:g}")
        if passes != n_experts:
            raise SystemExit(f"{n_settings} settings of {n_experts} experts took {passes:g} passes over the text")
    print()
    records.goal(f"{n_experts} experts take {n_experts} forward passes over the text, whatever the settings", True)


def _scores_of(model: Any, rows: list[NDArray[np.int64]], length: int) -> NDArray[np.float32]:
    with tempfile.TemporaryDirectory() as folder:
        score_documents(model, rows, ScoreConfig(), context_length=length, facts={}, folder=Path(folder))
        scores: NDArray[np.float32] = np.load(Path(folder) / LOG_PROBS_FILE)
    return scores


def numbers(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split(","))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="few tokens and experts")
    parser.add_argument("--tokens", type=int, default=1_000_000, metavar="N")
    parser.add_argument("--experts", type=int, default=128, metavar="N")
    parser.add_argument("--peer-tokens", type=int, default=8192, metavar="N", help="for the peers, at least")
    parser.add_argument("--ensembles", default="clustering", metavar="KIND,…", help='kinds; "all" takes every one')
    parser.add_argument("--temperatures", type=numbers, default=(0.02, 0.05, 0.1, 0.2, 0.5), metavar="T,…")
    parser.add_argument("--powers", type=numbers, default=(2.0, 4.0), metavar="P,…")
    parser.add_argument("--top-k", type=numbers, default=(128, 32, 8, 4, 2, 1), metavar="N,…")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=600, metavar="SECONDS", help="longest work of one contender")
    parser.add_argument("--threads", type=int, default=2, help="threads of every process")
    parser.add_argument("--folder", type=Path, help="where the files are made, and removed; 1 GB")
    add_json_argument(parser)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.small:
        args.tokens, args.experts, args.peer_tokens, args.top_k, args.repeats = 4000, 8, 1000, (8, 2, 1), 1
    threads = limit_threads(args.threads)
    config = EvaluateConfig(
        ensembles=None if args.ensembles == "all" else args.ensembles.split(","),
        temperatures=args.temperatures,
        distance_powers=args.powers,
        top_k=sorted({min(args.experts, int(count)) for count in args.top_k}),
        threads=args.threads,
    )
    print(f"{hardware('numpy', 'torch')}; {threads}; median of {args.repeats}\n")
    if args.small:
        print("few tokens, figures mean nothing\n")
    records = Records(args.json)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        data = Data(Path(name), args.tokens, args.experts, args.peer_tokens)
        data.make()
        sizes = [file.stat().st_size for file in Path(name).iterdir()]
        print(f"{args.tokens:,} tokens x {args.experts} experts, {sum(sizes) / 1e6:,.0f} MB of files, "
              f"{len(data.offsets()) - 1} documents")  # fmt: skip
        compare(data, config, args, records)
    print()
    few = 8
    count_passes(config.model_copy(update={"top_k": tuple(sorted({min(few, count) for count in config.top_k or ()}))}),
                 few, records)  # fmt: skip


if __name__ == "__main__":
    main()
