"""Run every benchmark with its quick settings, one after the other, and write what they found: `make bench`.

    python benchmarks/run_all.py [--corpus FOLDER] [--only NAME,…] [--fresh]

Each script of benchmarks/registry.py runs as a child with a deadline. What it found is kept in build/bench until the
code, its arguments, its text or a version changes, so that a run that was interrupted goes on with the next script;
--fresh runs all anew. One that fails, or is stopped, hides no other: the rest runs, and the exit code is 1. When every
benchmark has been tried, benchmarks/results/latest.json and the table in docs/benchmarks.md are written; --page writes
the page anew from the former.

Without --corpus the text is the sample that `cbtm corpus sample` makes of the installed packages. Another corpus is
laid out as the pipeline reads it, its labels below `labels`; --prose and --code then name labels for the router.
"""

import argparse
import hashlib
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from corpora import processor_name, version_of
from registry import BUDGET_S, CORPUS_DEADLINE_S, ENTRIES, Entry, Text
from results_page import DONE, FAILED, SKIPPED, with_results

PROJECT = Path(__file__).resolve().parents[1]
KEPT = PROJECT / "build" / "bench"
RESULT = PROJECT / "benchmarks" / "results" / "latest.json"
PAGE = PROJECT / "docs" / "benchmarks.md"
ALWAYS = ("numpy", "scipy", "scikit-learn", "torch", "transformers")
INSTALL = "pip install -c constraints.txt -r benchmarks/requirements.txt"
# Of these no benchmark depends: they say what is run, and how it is shown.
_NOT_MEASURED = {"registry.py", "results_page.py", "run_all.py"}
_GRACE_S = 5.0


def run_entry(entry: Entry, text: Text, kept: Path, deadline_s: float) -> dict[str, Any]:
    """Run one benchmark; returns what is known of it, what it had found before it failed included."""
    outcome: dict[str, Any] = {
        "name": entry.name,
        "claim": entry.claim,
        "command": shlex.join(["python", f"benchmarks/{entry.script}", *shown(text.arguments(entry))]),
        "commit": commit(),
        "load": os.getloadavg()[0],
        "missing": [peer for peer in entry.peers if version_of(peer) is None],
        "seconds": 0.0,
    }
    if reason := why_not(entry):
        return outcome | {"status": SKIPPED, "reason": reason}
    if deadline_s <= 0:
        return outcome | {
            "status": FAILED,
            "reason": f"the {BUDGET_S / 60:.0f} minutes were over; the same command goes on",
        }
    rows, log = kept / f"{entry.name}.rows.json", kept / f"{entry.name}.log"
    rows.unlink(missing_ok=True)
    command = [sys.executable, str(PROJECT / "benchmarks" / entry.script), *text.arguments(entry)]
    if not entry.as_printed:
        command += ["--json", str(rows)]
    begin = time.monotonic()
    code = run_child(command, log, deadline_s)
    outcome["seconds"] = time.monotonic() - begin
    if entry.as_printed:
        outcome |= {"printed": log.read_text(encoding="utf-8", errors="replace").splitlines(), "goals": []}
    elif rows.is_file():
        outcome |= json.loads(rows.read_text(encoding="utf-8"))
    elif code == 0:
        return outcome | {"status": FAILED, "reason": f"{entry.script} wrote no rows"}
    if code is None:
        return outcome | {"status": FAILED, "reason": f"stopped at its deadline of {deadline_s:.0f} s"}
    if code != 0:
        return outcome | {"status": FAILED, "reason": f"exit code {code}: {last_line(log)}"}
    return outcome | {"status": DONE}


def run_child(command: Sequence[str], log: Path, deadline_s: float) -> int | None:
    """Exit code of a command whose output goes to a file; None if it and its children were stopped at the deadline."""
    with log.open("wb") as out:
        child = subprocess.Popen(command, cwd=PROJECT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return child.wait(deadline_s)
        except subprocess.TimeoutExpired:
            return None
        finally:  # also of one that Ctrl-C leaves behind
            end_group(child)


def end_group(child: "subprocess.Popen[bytes]") -> None:
    """End a child and all that it started: they share its process group."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signum)
        with suppress(subprocess.TimeoutExpired):
            child.wait(_GRACE_S)


def why_not(entry: Entry) -> str:
    """Why an entry cannot run here at all, "" if it can."""
    if unset := [name for name in entry.environment if not os.environ.get(name)]:
        return f"needs {', '.join(unset)} in the environment"
    if missing := [name for name in entry.packages if find_spec(name) is None]:
        return f"needs {', '.join(missing)}: {INSTALL}"
    return ""


def last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "it printed nothing")


def shown(arguments: Sequence[str]) -> list[str]:
    """Arguments as a page shows them: of a folder its name."""
    return [Path(argument).name if os.path.isabs(argument) else argument for argument in arguments]


# --- what is kept ---


def key_of(entry: Entry, text: Text, code: str, corpus: str) -> dict[str, Any]:
    """Everything that another outcome may follow from."""
    versions = {name: version_of(name) for name in (*ALWAYS, *entry.peers)}
    return {"code": code, "corpus": corpus, "arguments": text.arguments(entry), "versions": versions}


def kept_outcome(entry: Entry, key: Mapping[str, Any], kept: Path) -> dict[str, Any] | None:
    """The outcome of a former run with the same key; None if there is none, or it failed."""
    with suppress(FileNotFoundError, json.JSONDecodeError):
        found: dict[str, Any] = json.loads((kept / f"{entry.name}.json").read_text(encoding="utf-8"))
        if found["key"] == key and found["outcome"]["status"] == DONE:
            return dict(found["outcome"])
    return None


def keep(entry: Entry, key: Mapping[str, Any], outcome: Mapping[str, Any], kept: Path) -> None:
    write(kept / f"{entry.name}.json", json.dumps({"key": key, "outcome": outcome}))


def write(file: Path, text: str) -> None:
    """By rename, so that whoever is interrupted leaves the old file or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(file.name + ".part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(file)


def digest_of(files: Iterator[Path], root: Path, *, contents: bool) -> str:
    found = hashlib.sha256()
    for file in sorted(files):
        found.update(f"{file.relative_to(root)} {file.stat().st_size}\n".encode())
        if contents:
            found.update(file.read_bytes())
    return found.hexdigest()


def code_digest() -> str:
    """Of the library and of the scripts."""
    scripts = (file for file in (PROJECT / "benchmarks").glob("*.py") if file.name not in _NOT_MEASURED)
    library = (file for file in (PROJECT / "cbtm").rglob("*") if file.is_file() and file.suffix != ".pyc")
    return digest_of(iter([*scripts, *library]), PROJECT, contents=True)


def commit() -> str:
    """The commit that is checked out, and whether the code has been changed since."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--abbrev=10", "--exclude=*"],
            cwd=PROJECT, check=True, capture_output=True, text=True,
        )  # fmt: skip
        changed = subprocess.run(
            ["git", "diff", "--quiet", "HEAD", "--", "cbtm", "benchmarks/*.py"], cwd=PROJECT
        ).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip() + " with changes" * bool(changed)


# --- the text ---


def text_of(args: argparse.Namespace, kept: Path) -> Text:
    """The corpus that was named, or the sample, which is made where it is not there yet."""
    if args.corpus is not None:
        text = Text(args.corpus.resolve())
    else:
        root = kept / "sample"
        if not (root / "corpus.json").is_file():  # which is written last
            make_sample(root, kept / "sample.log")
        text = Text(root)
    if not (text.root / "train").is_dir():
        raise SystemExit(f"{text.root} has no split train; a corpus has <split>/<shard>/<name>.jsonl, maybe packed")
    return replace(text, **{name: value for name in ("prose", "code") if (value := getattr(args, name)) is not None})


def make_sample(root: Path, log: Path) -> None:
    tell(text="sample", status="is made")
    program = "from cbtm.cli import main; main()"
    code = run_child(
        [sys.executable, "-c", program, "corpus", "sample", str(root), "--replace"], log, CORPUS_DEADLINE_S
    )
    if code != 0:
        raise SystemExit(f"cbtm corpus sample ended with {'its deadline' if code is None else code}: {last_line(log)}")


# --- all of it ---


def gather(outcomes: Sequence[Mapping[str, Any]], text: Text) -> dict[str, Any]:
    """What the page is made of."""
    names = {*ALWAYS, *(peer for entry in ENTRIES for peer in entry.peers)}
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "text": f"Text: {text.root.name}",
        "machine": {
            "processor": processor_name(),
            "cores": os.cpu_count(),
            "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
            "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
        },
        "versions": {name: version_of(name) or "not installed" for name in sorted(names)},
        "entries": list(outcomes),
    }


def run_all(chosen: Sequence[Entry], text: Text, kept: Path, *, until: float, fresh: bool) -> list[dict[str, Any]]:
    """Run or take over each benchmark until `until` of the monotonic clock; returns their outcomes."""
    code, corpus = code_digest(), digest_of(text.root.rglob("*.jsonl*"), text.root, contents=False)
    outcomes = []
    for entry in chosen:
        key = key_of(entry, text, code, corpus)
        outcome = None if fresh else kept_outcome(entry, key, kept)
        if outcome is None:
            deadline_s = min(entry.deadline_s, until - time.monotonic())
            tell(benchmark=entry.name, status="begins", deadline=f"{max(0.0, deadline_s):.0f}s")
            outcome = run_entry(entry, text, kept, deadline_s)
            keep(entry, key, outcome, kept)
            told = {"seconds": f"{outcome['seconds']:.0f}"}
        else:
            told = {"seconds": f"{outcome['seconds']:.0f}", "kept": "yes"}
        if outcome["status"] == DONE and outcome["goals"]:
            told["goals"] = f"{sum(goal['met'] for goal in outcome['goals'])}/{len(outcome['goals'])}"
        if outcome["status"] != DONE:
            told["reason"] = json.dumps(outcome["reason"], ensure_ascii=False)
        tell(benchmark=entry.name, status=outcome["status"], **told)
        outcomes.append(outcome)
    return outcomes


def tell(**facts: str) -> None:
    print(" ".join(f"{name}={value}" for name, value in facts.items()), flush=True)


def write_page(result: Mapping[str, Any]) -> None:
    write(PAGE, with_results(PAGE.read_text(encoding="utf-8"), result))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, metavar="FOLDER", help="another text than the sample")
    parser.add_argument("--prose", metavar="LABEL,…", help="labels of that corpus that are prose")
    parser.add_argument("--code", metavar="LABEL,…", help="labels of that corpus that are code")
    parser.add_argument("--only", metavar="NAME,…", help="these; the page waits until the others have been run too")
    parser.add_argument("--fresh", action="store_true", help="take over nothing of a former run")
    parser.add_argument("--page", action="store_true", help="run nothing, write the page from latest.json")
    return parser.parse_args()


def main() -> int:
    args = parse()
    if args.page:
        write_page(json.loads(RESULT.read_text(encoding="utf-8")))
        return 0
    known = {entry.name: entry for entry in ENTRIES}
    names = list(known) if args.only is None else args.only.split(",")
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"--only {','.join(unknown)}: known are {', '.join(known)}")
    missing = sorted({peer for name in names for peer in known[name].peers if version_of(peer) is None})
    if missing:
        print(f"peers that are not installed: {', '.join(missing)}; they are left out. To have them: {INSTALL}")
    KEPT.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    text = text_of(args, KEPT)
    outcomes = run_all([known[name] for name in names], text, KEPT, until=begin + BUDGET_S, fresh=args.fresh)
    tell(benchmarks=str(len(outcomes)), minutes=f"{(time.monotonic() - begin) / 60:.1f}", budget=f"{BUDGET_S / 60:.0f}")
    if args.only is None:
        result = gather(outcomes, text)
        write(RESULT, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        write_page(result)
        tell(written=f"{RESULT.relative_to(PROJECT)},{PAGE.relative_to(PROJECT)}")
    return int(any(outcome["status"] == FAILED for outcome in outcomes))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with the benchmark that was stopped", file=sys.stderr)
        sys.exit(130)
