"""The training loop against transformers' Trainer; what checkpoints, tracking and data cost it; and a GPU.

    python benchmarks/training.py [--vocabularies 8192,50272] [--repeats 3]
    python benchmarks/training.py --overheads [--corpus FOLDER] [--vocabularies 8192] [--repeats 3]
    python benchmarks/training.py --device cuda [--models 125m,1.3b,llama-1b] [--compile] [--profile FOLDER]

The peer needs `pip install transformers accelerate`. On a GPU no more than that and cbtm's own pydantic, orjson and
scikit-learn are needed, and no network: PYTHONPATH=. takes cbtm from the source tree.

Both contenders get the same random weights, the same blocks in the same order (of one BlockOrder over token shards; the
Trainer has them in memory, cbtm reads them from disk), the same AdamW, clipping, constant learning rate, threads and
type. The Trainer runs as fast as its settings allow: fused AdamW, sdpa, data loaded in its own process, nothing
logged, saved or evaluated, no look at each loss for NaN, no cache. Each trains in a process of its own, in turns; the
first steps of each are not timed. Losses are compared step by step, so that nobody does less. Peak memory is above the
interpreter with its imports, the model included; on a GPU it is that of the tensors. What does not fit on a GPU is
tried again with half the micro-batch, for each contender alone; the batch of a step stays.

--overheads trains with checkpoints every 200 steps and points every 20 in an MLflow sqlite file, and without both, in
turns; then it reads from the trainer how long it waits for data, on the text of --corpus in a BPE of 4,096.
--small runs the same code with tiny shapes, on the CPU where there is no GPU; its figures mean nothing.
"""

import argparse
import json
import math
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

try:
    import torch
    from corpora import Measurement, add_text_arguments, hardware, header, limit_threads, measure, row, text_of
    from records import Records, add_json_argument
    from trainings import WARM_UP, Case, ours, peer, write_random_tokens, write_text_tokens

    from cbtm.branch.seed import ScratchModelConfig
    from cbtm.train.checkpoint import Checkpoints
    from cbtm.train.trainer import train
except ModuleNotFoundError as missing:
    raise SystemExit(f"this benchmark needs {missing.name}: install it (for cbtm, PYTHONPATH=. will do)") from missing

OURS, PEER = "cbtm", "transformers Trainer"
PREPARE = {OURS: ours, PEER: peer}
BARE, FULL = "bare", "checkpoints and tracking"
TEXT_VOCABULARY = 4096
GPU_TOKENS = 1 << 16  # in one step
# The shape of Llama 3.2 1B: 1.24 billion weights, the tied embeddings counted once.
LLAMA = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
LLAMA_VOCABULARY, OPT_VOCABULARY = 128_256, 50_272
LLAMA_SMALL = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8,
               "num_key_value_heads": 2}  # fmt: skip
MICRO = {"125m": 16, "1.3b": 8, "llama-1b": 8}


def cpu_cases(folder: Path, args: argparse.Namespace) -> list[Case]:
    """The OPT of 4 layers x 256 with each vocabulary."""
    width, n_layers = (32, 2) if args.small else (256, 4)
    shape = ScratchModelConfig(hidden_size=width, n_layers=n_layers, n_heads=4)
    context = args.context or (32 if args.small else 256)
    sequences = args.sequences or 4
    steps = args.steps or (4 if args.small else 20)
    vocabularies = [300, 700] if args.small else [int(size) for size in args.vocabularies.split(",")]
    return [
        Case(
            name=f"OPT {n_layers} x {width}, V={size}",
            shape=shape,
            vocabulary=size,
            context=context,
            sequences=sequences,
            micro=args.micro_batch or sequences,
            steps=steps,
            tokens=write_random_tokens(folder / str(size), vocabulary=size, count=64 * sequences * context),
            compile=args.compile,
        )
        for size in vocabularies
    ]


def gpu_cases(folder: Path, args: argparse.Namespace) -> list[Case]:
    """OPT and Llama shapes in bfloat16; tiny ones with --small."""
    context = args.context or (32 if args.small else 2048)
    sequences = args.sequences or (4 if args.small else max(1, GPU_TOKENS // context))
    cases = []
    for name in args.models.split(","):
        if name not in MICRO:
            raise SystemExit(f"--models knows {', '.join(MICRO)}, not {name!r}")
        is_llama = name == "llama-1b"
        vocabulary = 700 if args.small else LLAMA_VOCABULARY if is_llama else OPT_VOCABULARY
        if is_llama:
            settings = folder / "llama.json"
            settings.write_text(
                json.dumps(LLAMA | (LLAMA_SMALL if args.small else {}) | {"max_position_embeddings": context})
            )
            shape = ScratchModelConfig(config=str(settings))
        else:
            shape = ScratchModelConfig(hidden_size=64, n_layers=2) if args.small else ScratchModelConfig(size=name)
        cases.append(
            Case(
                name=f"{'small ' * args.small}{'' if is_llama else 'OPT-'}{name}",
                shape=shape,
                vocabulary=vocabulary,
                context=context,
                sequences=sequences,
                micro=min(args.micro_batch or MICRO[name], sequences),
                steps=args.steps or (4 if args.small else 10),
                tokens=write_random_tokens(folder / name, vocabulary=vocabulary, count=16 * sequences * context),
                precision="bfloat16",
                device="cuda" if torch.cuda.is_available() else "cpu",
                compile=args.compile,
            )
        )
    return cases


def take_turns(case: Case, args: argparse.Namespace) -> dict[str, tuple[Case, list[Measurement]]]:
    """Measure both; a contender that does not fit goes on with half the micro-batch."""
    found: dict[str, tuple[Case, list[Measurement]]] = {name: (case, []) for name in PREPARE}
    for _ in range(args.repeats):
        for name, prepare in PREPARE.items():
            own, runs = found[name]
            if runs and runs[-1].error:
                continue
            run = measure(prepare, own, limit_s=args.limit)
            while run.error.startswith("OutOfMemoryError") and own.micro > 1:
                own = replace(own, micro=own.micro // 2)
                run = measure(prepare, own, limit_s=args.limit)
            found[name] = own, [*runs, run]
    return found


def facts_of(own: Case, runs: Sequence[Measurement]) -> dict[str, Any]:
    """Medians of the runs of one contender, or why there are none."""
    if runs[-1].error:
        return {"error": runs[-1].error}
    speeds = [run.value["tokens_per_second"] for run in runs]
    facts = runs[-1].value | {"speeds": speeds, "tokens_per_second": statistics.median(speeds), "micro": own.micro}
    facts["peak_bytes"] = statistics.median(run.value["gpu_peak_bytes"] or run.peak_bytes for run in runs)
    at_most = facts["peak_flops"]
    facts["utilisation"] = at_most and facts["tokens_per_second"] * facts["flops_per_token"] / at_most
    return facts


def compare(case: Case, args: argparse.Namespace, records: Records) -> dict[str, Any]:
    """Print the rows of one model; returns what was found."""
    rows: dict[str, Any] = {}
    for name, (own, runs) in take_turns(case, args).items():
        facts = rows[name] = facts_of(own, runs)
        if "error" in facts:
            row(case.name, name, "failed: " + facts["error"], *[""] * 5)
            records.measured(case.name, name, runs, unit="tokens/s")
            continue
        speed, speeds = facts["tokens_per_second"], facts["speeds"]
        row(case.name, name, f"{speed:,.0f}", f"{min(speeds):,.0f}-{max(speeds):,.0f}",
            f"{speed / rows[OURS].get('tokens_per_second', math.nan):.3f}",
            "" if facts["utilisation"] is None else f"{100 * facts['utilisation']:.1f} %",
            f"{facts['peak_bytes'] / 1e6:,.0f}", own.micro)  # fmt: skip
        peak, used = facts["peak_bytes"], facts["utilisation"]
        note = "" if used is None else f"{100 * used:.1f} % of the device's FLOPs"
        records.add(case.name, name, "tokens/s", speeds, peak_bytes=peak, is_ours=name == OURS, note=note)
        if args.profile is not None:
            file = args.profile / f"{case.name}-{name}.txt".replace(" ", "-").replace(",", "")
            run = measure(PREPARE[name], replace(own, steps=min(own.steps, 3), profile=file), limit_s=args.limit)
            facts["profile"] = run.error or str(file)
    return {"case": case.name, "context": case.context, "sequences": case.sequences, "rows": rows}


def goals_of(case: Case, own: Mapping[str, Any], other: Mapping[str, Any], records: Records, *, small: bool) -> None:
    """Print whether the goals of one model are met."""
    if "error" in own or "error" in other:
        records.goal(f"{case.name}, both train", False, own.get("error", "") or other.get("error", ""))
        return
    pairs = list(zip(own["losses"], other["losses"], strict=True))
    apart = max(abs(a - b) / b for a, b in pairs)
    tolerance = 1e-4 if case.precision == "float32" else 1e-2  # rounding, which grows with the steps
    records.goal(
        f"{case.name}, equal losses to {tolerance:g} in all of {len(pairs)} steps", apart <= tolerance, f"{apart:.1e}"
    )
    if small:
        return
    ratio, memory = (own[figure] / other[figure] for figure in ("tokens_per_second", "peak_bytes"))
    least = 1.3 if case.device == "cuda" else 1.25
    records.goal(f"{case.name}, >= {least}x the tokens/s of the {PEER}", ratio >= least, f"{ratio:.3f}x")
    records.goal(f"{case.name}, a peak of memory below its own", memory < 1, f"{memory:.2f} of it")
    if case.device == "cuda":
        share = own["utilisation"] or math.nan
        records.goal(f"{case.name}, >= 50 % of the GPU's FLOPs", share >= 0.5, f"{100 * share:.1f} %")


def print_comparison(cases: Sequence[Case], args: argparse.Namespace, records: Records) -> list[dict[str, Any]]:
    header("model", "", "tokens/s", "range", "ratio to cbtm", "MFU", "peak MB", "micro-batch")
    found = [compare(case, args, records) for case in cases]
    print()
    for case, one in zip(cases, found, strict=True):
        goals_of(case, one["rows"][OURS], one["rows"][PEER], records, small=args.small)
    for one in found:
        known = next((facts for facts in one["rows"].values() if "error" not in facts), None)
        if known:
            print(f"{one['case']}: {known['parameters']:,} weights, {known['attention']}, {known['device']}")
    return found


def whole_run(case: Case, database: Path | None, often: Mapping[str, int]) -> Callable[[], Any]:
    """A training from its model to its closed tracker, with as many checkpoints and points as `often` says."""
    from cbtm.tracking import TrackingConfig, open_run, start_parent_run

    ours(case)  # which rehearses
    folder = Path(tempfile.mkdtemp(dir=case.tokens))
    tracking = TrackingConfig(uri=f"sqlite:///{database}" if database else None, enabled=database is not None)
    # The first run in a file waits for its tables, once.
    start_parent_run(tracking, name="benchmark", run_key="parent", journal=folder / "parent.jsonl")
    waits = {"checkpoints": 0.0, "tracking": 0.0}

    def timed(what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            found = call(*args, **kwargs)
            waits[what] += time.perf_counter() - begin
            return found

        return run

    def work() -> Any:
        begin, own, all_threads = time.perf_counter(), time.thread_time(), time.process_time()
        tracker = timed("tracking", open_run)(
            tracking, name="expert", kind="expert", run_key=folder.name, journal=folder / "expert.jsonl",
            parent_run_key="parent",
        )  # fmt: skip
        checkpoints: Any = Checkpoints(str(folder / "checkpoints"), key="benchmark", scratch=folder / "scratch", keep=2)
        for name in ("save", "settle"):
            setattr(checkpoints, name, timed("checkpoints", getattr(checkpoints, name)))
        result = train(
            case.model(),
            case.order(),
            case.config(**often),
            sequences_per_step=case.sequences,
            checkpoints=checkpoints,
            report=timed("tracking", tracker.log_metrics),
        )
        timed("tracking", tracker.close)()
        seconds = time.perf_counter() - begin
        beside = time.process_time() - all_threads - (time.thread_time() - own)
        shares = {name: spent / seconds for name, spent in waits.items()}
        return shares | {"beside": beside / seconds, "data": result.waited["data"]}

    return work


def overheads_of(case: Case, folder: Path, args: argparse.Namespace, records: Records) -> dict[str, Any]:
    """Print the rows of one model with and without checkpoints and tracking; returns what was found."""
    often = {"checkpoint_every": 10, "log_every": 2} if args.small else {"checkpoint_every": 200, "log_every": 20}
    contenders: dict[str, tuple[Path | None, dict[str, int]]] = {BARE: (None, {}), FULL: (folder / "mlflow.db", often)}
    runs: dict[str, list[Measurement]] = {name: [] for name in contenders}
    for _ in range(args.repeats):
        for name, settings in contenders.items():
            run = measure(whole_run, case, *settings, limit_s=args.limit)
            if run.error:
                raise SystemExit(f"{case.name}, {name}, failed: {run.error}")
            runs[name].append(run)
    found: dict[str, Any] = {"case": case.name, "steps": case.all_steps, "often": often, "rows": {}}
    for name, measured in runs.items():
        facts = {what: statistics.median(run.value[what] for run in measured) for what in measured[0].value}
        facts |= {
            what: statistics.median(getattr(run, what) for run in measured) for what in ("seconds", "cpu_seconds")
        }
        found["rows"][name] = facts | {"all_seconds": [run.seconds for run in measured]}
        inside = f"{100 * (facts['checkpoints'] + facts['tracking']):.2f} % in checkpoints and tracking"
        note = f"{inside}, waits for data {100 * facts['data']:.3f} %"
        records.measured(case.name, name, measured, is_ours=name == BARE, note=note)
        ratios = [facts[what] / found["rows"][BARE][what] for what in ("seconds", "cpu_seconds")]
        row(case.name, name, f"{facts['seconds']:.2f}", f"{facts['cpu_seconds']:.2f}", *(f"{r:.4f}" for r in ratios),
            *(f"{100 * facts[what]:.3f} %" for what in ("checkpoints", "tracking", "beside", "data")))  # fmt: skip
    return found


def print_overheads(folder: Path, args: argparse.Namespace, records: Records) -> list[dict[str, Any]]:
    """Rows and goals of all models: the vocabularies on random tokens, then the text."""
    args.steps = args.steps or (20 if args.small else 600)
    cases = cpu_cases(folder, args)
    text = text_of(args)
    tokens, size = write_text_tokens(folder / "text", text.texts, vocabulary=300 if args.small else TEXT_VOCABULARY)
    vocabulary = 300 if args.small else TEXT_VOCABULARY
    name = f"OPT {cases[0].shape.n_layers} x {cases[0].shape.hidden_size}, {text}"
    cases.append(replace(cases[0], name=name, vocabulary=vocabulary, tokens=tokens))
    print(f"{text}: {size}\n")
    header("model", "", "s", "CPU s", "s to bare", "CPU s to bare", "in checkpoints", "in tracking",
           "CPU of other threads", "waits for data")  # fmt: skip
    found = [overheads_of(case, folder, args, records) for case in cases]
    print()
    for one in found if not args.small else ():
        facts, bare = one["rows"][FULL], one["rows"][BARE]
        more, inside = facts["seconds"] / bare["seconds"] - 1, facts["checkpoints"] + facts["tracking"]
        records.goal(
            f"{one['case']}, < 3 % of the time in checkpoints and tracking", inside < 0.03, f"{100 * inside:.2f} %"
        )
        records.goal(f"{one['case']}, < 3 % more time than without", more < 0.03, f"{100 * more:.2f} %")
        records.goal(f"{one['case']}, waits for data < 1 %", facts["data"] < 0.01, f"{100 * facts['data']:.3f} %")
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--overheads", action="store_true", help="checkpoints, tracking and data instead of the peer")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: large models in bfloat16")
    parser.add_argument("--small", action="store_true", help="tiny shapes, and --device cuda works without a GPU")
    parser.add_argument("--vocabularies", default="8192,50272", help="on the CPU, default 8192,50272")
    parser.add_argument("--models", default=",".join(MICRO), help=f"on a GPU, default {','.join(MICRO)}")
    parser.add_argument("--context", type=int, metavar="N", help="default 256, on a GPU 2048")
    parser.add_argument("--sequences", type=int, metavar="N", help="of a step; default 4, on a GPU 65,536 tokens")
    parser.add_argument("--micro-batch", type=int, metavar="N", help="default all of a step, on a GPU 8 or 16")
    parser.add_argument("--steps", type=int, metavar="N", help="default 20, on a GPU 10, for --overheads 600")
    parser.add_argument("--compile", action="store_true", help="torch.compile for both")
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="profile each contender in a run of its own")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all figures as JSON")
    add_text_arguments(parser, limit_s=1800)
    add_json_argument(parser)
    return parser.parse_args()


def main() -> None:
    args = parse()
    peers = () if args.overheads else ("accelerate",)
    for name in ("transformers", *peers, *(("mlflow",) if args.overheads else ())):
        if find_spec(name) is None:
            raise SystemExit(f"this measurement needs {name}: pip install {name}")
    on_gpu = torch.cuda.is_available()
    if args.device == "cuda" and not on_gpu and not args.small:
        raise SystemExit("--device cuda: PyTorch sees no GPU here; with --small the same code runs on the CPU")
    threads = limit_threads(args.threads)
    machine = hardware("numpy", "torch", "transformers", *peers, *(("mlflow",) if args.overheads else ()))
    if args.device == "cuda" and on_gpu:
        properties = torch.cuda.get_device_properties(0)
        machine = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}; {machine}"
    command = shlex.join(["python", *sys.argv])
    print(f"{machine}; {threads}; median of {args.repeats}\n\n    {command}\n")
    if args.small:
        where = "" if args.device == "cpu" or on_gpu else "no GPU: "
        print(f"{where}small shapes, figures mean nothing\n")
    if args.profile is not None:
        args.profile.mkdir(parents=True, exist_ok=True)
    records = Records(args.json)
    with tempfile.TemporaryDirectory() as folder:
        if args.overheads:
            found = print_overheads(Path(folder), args, records)
        else:
            cases = gpu_cases if args.device == "cuda" else cpu_cases
            found = print_comparison(cases(Path(folder), args), args, records)
    if args.output is not None:
        settings = {"hardware": machine, "threads": args.threads, "command": command, "small": args.small,
                    "warm_up_steps": WARM_UP, "repeats": args.repeats}  # fmt: skip
        args.output.write_text(json.dumps(settings | {"results": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
