"""What the benchmarks share: the text they run on, and one measurement in a process of its own.

Every contender runs in a fresh process, so that the memory of one does not count for the next. It is the fork of a
server that has imported the packages of the script and done nothing else, since importing torch anew takes longer than
most of what is measured. It first prepares (data, a rehearsal), then works; only the work is measured. Peak memory is
the highest resident size during the work above the size before it, from /proc: ru_maxrss would not do, because a child
begins with the peak of its parent.
"""

import argparse
import gc
import gzip
import multiprocessing
import os
import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from router import docstrings

from cbtm.corpus import ReadCounts, list_split, read_file

PACKAGES = ("numpy", "scipy", "sklearn")  # whose docstrings are the text where no corpus is given
_PREPARE_LIMIT_S = 1800.0
_SLOW_TO_IMPORT = {"numpy", "scipy", "sklearn", "torch", "transformers", "cbtm"}
_IMPORTED_LATE = ("transformers.models.opt.modeling_opt", "transformers.trainer")
_THREAD_SETTINGS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "RAYON_NUM_THREADS",
    "ARROW_NUM_THREADS",
)


@dataclass(frozen=True)
class Text:
    """Documents in reading order: those of a corpus split, or docstrings of installed packages.

    Attributes:
        root: Folder of the corpus, None for docstrings.
        split: Split of the corpus.
        labels_root: Folder with a `{"sp_id", "domain"}` line for each document, at the same paths; None without.
        limit: Documents at most.
    """

    root: str | None
    split: str
    labels_root: str | None
    limit: int | None

    def __str__(self) -> str:
        return f"{Path(self.root).name}/{self.split}" if self.root else f"docstrings of {', '.join(PACKAGES)}"

    def files(self) -> list[str]:
        """Paths of the corpus files below the root."""
        if self.root is None:
            raise SystemExit("this measurement reads the files of a corpus: pass --corpus FOLDER")
        return [file.path for file in list_split(self.root, self.split)]

    def texts(self) -> Iterator[str]:
        return islice(self._all_texts(), self.limit)

    def labels(self) -> np.ndarray | None:
        """Domain number of every document of `texts`, in its order; None where there are no labels."""
        if self.root is None or self.labels_root is None:
            return None
        domains = {key: domain for path in self.files() for key, domain in _domains(Path(self.labels_root), path)}
        found = []
        for sp_id in islice((document.sp_id for document in self._documents()), self.limit):
            if (key := _plain(sp_id)) not in domains:
                raise SystemExit(f"{self.labels_root} has no label for {sp_id}")
            found.append(domains[key])
        return np.unique(found, return_inverse=True)[1]

    def _all_texts(self) -> Iterator[str]:
        if self.root is None:
            texts = [text for package in PACKAGES for text in docstrings(package)]
            np.random.default_rng(0).shuffle(texts)
            yield from texts
        else:
            yield from (document.text for document in self._documents())

    def _documents(self) -> Iterator[Any]:
        for path in self.files():
            yield from read_file(str(self.root), path, max_bad_lines=0, counts=ReadCounts())


def _plain(sp_id: str) -> str:
    return re.sub(r"\.(gz|zst)(?=\|)", "", sp_id)  # labels name the text file, whatever packs it


def _domains(root: Path, path: str) -> Iterator[tuple[str, str]]:
    import zstandard  # labels alone need it

    opener = {".gz": gzip.open, ".zst": zstandard.open}.get(Path(path).suffix, open)
    with opener(root / path, "rb") as lines:
        for line in lines:
            record = orjson.loads(line)
            yield _plain(record["sp_id"]), record["domain"]


def add_text_arguments(parser: argparse.ArgumentParser, *, repeats: int = 3, limit_s: float = 600) -> None:
    """Arguments of every script here; read them with `text_of` and `limit_threads`."""
    parser.add_argument("--corpus", metavar="FOLDER", help="corpus root; without it docstrings of installed packages")
    parser.add_argument("--split", default="train")
    parser.add_argument("--labels", metavar="FOLDER", help="folder of labels, laid out as the corpus")
    parser.add_argument("--documents", type=int, metavar="N", help="only the first N documents")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--limit", type=float, default=limit_s, metavar="SECONDS", help="longest work of one contender")
    parser.add_argument("--threads", type=int, default=1, help="threads of every process; 0 leaves it to the libraries")


def text_of(args: argparse.Namespace) -> Text:
    return Text(args.corpus, args.split, args.labels, args.documents)


def limit_threads(threads: int) -> str:
    """Tell the processes started from now on how many threads to use; returns it in words."""
    if threads == 0:
        return "threads as the libraries choose"
    os.environ.update(dict.fromkeys(_THREAD_SETTINGS, str(threads)))
    os.environ["TOKENIZERS_PARALLELISM"] = "false" if threads == 1 else "true"
    return f"{threads} thread{'s' * (threads > 1)} a process"


def hardware(*packages: str) -> str:
    """Processor, Python and the versions of `packages`, in one line."""
    versions = ", ".join(f"{name} {version_of(name) or 'is not installed'}" for name in packages)
    return f"{processor_name()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, {versions}"


def processor_name() -> str:
    model = ""
    with suppress(OSError):
        model = next((s for s in Path("/proc/cpuinfo").read_text().splitlines() if s.startswith("model name")), "")
    return model.partition(":")[2].strip() or platform.processor() or platform.machine()


def version_of(package: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(package)
    return None


@dataclass(frozen=True)
class Measurement:
    """One piece of work in a process of its own, or the reason why there is none.

    Attributes:
        seconds: Wall time.
        cpu_seconds: Processor time of all threads.
        peak_bytes: Highest resident size during the work above that before it.
        peak_total_bytes: Highest resident size during the work.
        value: What the work returned.
        error: Why it failed, "" where it did not.
    """

    seconds: float = float("nan")
    cpu_seconds: float = float("nan")
    peak_bytes: float = float("nan")
    peak_total_bytes: float = float("nan")
    value: Any = None
    error: str = ""


def measure(prepare: Callable[..., Callable[[], Any]], *args: Any, limit_s: float) -> Measurement:
    """Call `prepare(*args)` in a fresh process and measure the work that it returns."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(packages_of_server())
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, prepare, args))
    process.start()
    sender.close()
    try:
        if not receiver.poll(_PREPARE_LIMIT_S):
            return Measurement(error=f"not prepared after {_PREPARE_LIMIT_S:.0f} s")
        message = receiver.recv()
        if message == "ready":
            if not receiver.poll(limit_s):
                return Measurement(error=f"stopped after {limit_s:g} s")
            message = receiver.recv()
        assert isinstance(message, Measurement)
        return message
    except EOFError:
        process.join()
        return Measurement(error=f"its process ended with exit code {process.exitcode}")
    finally:
        process.kill()  # it has sent all that it had to say, or is late
        process.join()
        receiver.close()


def packages_of_server() -> list[str]:
    """Modules that the server of all processes imports once: those of `_SLOW_TO_IMPORT` that are imported here.

    Named one by one, because the server of Python 3.11 cannot import the script itself.
    """
    found = [name for name in sys.modules if name.split(".")[0] in _SLOW_TO_IMPORT]
    # What the scripts train and score, and their peer: transformers imports it at its first use.
    return [*found, *_IMPORTED_LATE] if "torch" in sys.modules else found


def alternate(
    contenders: Mapping[str, Sequence[Any]], *, repeats: int, limit_s: float
) -> dict[str, tuple[Measurement, ...]]:
    """Measure contenders (name to `prepare` and its arguments) in turns; one that failed is not tried again."""
    found: dict[str, tuple[Measurement, ...]] = dict.fromkeys(contenders, ())
    for _ in range(repeats):
        for name, (prepare, *args) in contenders.items():
            if not (found[name] and found[name][-1].error):
                found[name] += (measure(prepare, *args, limit_s=limit_s),)
    return found


def median(measurements: Sequence[Measurement]) -> Measurement:
    """Median of each number, with the value of the last; the failed one, if one failed."""
    last = measurements[-1]
    if last.error:
        return last
    names = ("seconds", "cpu_seconds", "peak_bytes", "peak_total_bytes")
    return replace(last, **{name: statistics.median(getattr(m, name) for m in measurements) for name in names})


def row(*cells: object) -> None:
    """Print one line of a Markdown table."""
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def header(*names: str) -> None:
    row(*names)
    row(*["--"] * len(names))


def goal(text: str, is_met: bool, found: str = "") -> None:
    """Print one line that says whether a goal is met; a comparison with a number that is missing is not."""
    print(f"goal {text}: {'met' if is_met else 'not met'}{f' ({found})' * bool(found)}", flush=True)


def _work(sender: Connection, prepare: Callable[..., Callable[[], Any]], args: tuple[Any, ...]) -> None:
    try:
        work = prepare(*args)
        gc.collect()
        before = _resident_after_reset()
        sender.send("ready")
        cpu, begin = time.process_time(), time.perf_counter()
        value = work()
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu
        peak = _peak()
        sender.send(Measurement(seconds, cpu_seconds, peak - before, peak, value))
    except Exception as error:  # shown in the table
        message = " ".join(str(error).split())
        sender.send(Measurement(error=f"{type(error).__name__}: {message[:200]}"))


def _resident_after_reset() -> int:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at the present size
    return _peak()


def _peak() -> int:
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError):
        in_bytes = platform.system() == "Darwin"
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if in_bytes else 1024)
