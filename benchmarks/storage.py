"""Folders to and from an object store: `cbtm.storage` against `aws s3 cp --recursive` and boto3.

    python benchmarks/storage.py --bucket BUCKET [--workloads 4x64000000,2000x100000] [--repeats 3] [--folder FOLDER]

The store is where AWS_ENDPOINT_URL says, with the credentials of the environment; the bucket is made if it is not
there, and what the script writes lies below a name of its own and is removed. benchmarks/README.md says how to start a
store that checks signatures; an emulator written in Python measures itself.

cbtm copies with `storage.upload` and `storage.download`, which check lengths; as a stage it also takes the sha256 of
every file, writes the manifest behind them, and on the way back reads it and checks every file by it. boto3 copies one
file after the other with `upload_file` and `download_file` and its defaults, as most scripts do, and the same in as
many threads as its client has connections. The command is told nothing but --quiet, and is measured with its start,
which the first line tells. Each contender begins in a fresh process, with one small request made before the clock
starts, which the command cannot have; it downloads what it uploaded itself into an empty folder, and every byte that
came back is then compared. CPU time is that of the contender with its children, not that of the store.
--small copies a few short files; its figures mean nothing.
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import numpy as np
from corpora import Measurement, goal, hardware, header, measure, row

from cbtm import manifest, storage
from cbtm.manifest import StageSpec

OURS, STAGE = "cbtm", "cbtm, as a stage"
COMMAND, LOOP, POOL = "aws s3 cp", "boto3, a loop", "boto3, 10 threads"
UP, DOWN = "up", "down"
SHORT = ("cbtm", "stage", "aws", "loop", "pool")  # in this order, for --contenders
PEERS = (COMMAND, LOOP)  # of the goals
FEW, MANY = 1.0, 2.0  # times as fast as each peer: up to as many files as a pool has threads, and above
CONNECTIONS = 10  # of a boto3 client by default
MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Workload:
    """So many files of so many random bytes.

    Attributes:
        size: Bytes of each file.
    """

    files: int
    size: int

    @classmethod
    def parse(cls, text: str) -> "Workload":
        files, _, size = text.partition("x")
        return cls(int(files), int(size))

    def __str__(self) -> str:
        unit, name = (MEGABYTE, "MB") if self.size >= MEGABYTE else (1000, "kB")
        return f"{self.files:,} x {self.size / unit:g} {name}"

    @property
    def paths(self) -> list[str]:
        """A tree of folders of at most 100 files."""
        return [f"{number // 100:03d}/{number:06d}.bin" for number in range(self.files)]

    @property
    def goal(self) -> float:
        return FEW if self.files <= CONNECTIONS else MANY

    def write(self, folder: Path) -> None:
        rng = np.random.default_rng(0)
        for path in self.paths:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(rng.bytes(self.size))


def spec(uri: str) -> StageSpec:
    return StageSpec("benchmark", uri, "any")


# --- contenders: each gives the work of one direction, ready to start ---


def ours(direction: str, folder: Path, uri: str, paths: Sequence[str]) -> Callable[[], object]:
    storage.exists(f"{uri}/absent")
    if direction == UP:
        return partial(storage.upload, folder, uri, paths)
    return partial(storage.download, uri, folder, paths)


def stage(direction: str, folder: Path, uri: str, paths: Sequence[str]) -> Callable[[], object]:
    storage.exists(f"{uri}/absent")
    if direction == UP:
        return partial(manifest.publish, spec(uri), folder, {})
    return lambda: manifest.fetch(uri, manifest.load(spec(uri).manifest_uri), paths, folder)


def command(direction: str, folder: Path, uri: str, paths: Sequence[str]) -> Callable[[], object]:
    ends = (f"{folder}", uri) if direction == UP else (uri, f"{folder}")
    return partial(subprocess.run, ["aws", "s3", "cp", "--recursive", "--quiet", *ends], check=True)


def loop(direction: str, folder: Path, uri: str, paths: Sequence[str]) -> Callable[[], object]:
    copy = copied_by_boto3(direction, folder, uri)
    return lambda: [copy(path) for path in paths]


def pool(direction: str, folder: Path, uri: str, paths: Sequence[str]) -> Callable[[], object]:
    copy = copied_by_boto3(direction, folder, uri)

    def work() -> None:
        with ThreadPoolExecutor(CONNECTIONS) as threads:
            list(threads.map(copy, paths))

    return work


def copied_by_boto3(direction: str, folder: Path, uri: str) -> Callable[[str], None]:
    client = boto3.client("s3")
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/absent")

    def up(path: str) -> None:
        client.upload_file(str(folder / path), bucket, f"{prefix}/{path}")

    def down(path: str) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        client.download_file(bucket, f"{prefix}/{path}", str(folder / path))

    return up if direction == UP else down


CONTENDERS = {OURS: ours, STAGE: stage, COMMAND: command, LOOP: loop, POOL: pool}


def prepared(name: str, direction: str, folder: Path, uri: str, paths: Sequence[str]) -> Callable[[], Any]:
    """The work of one contender; it returns the CPU seconds of its children."""
    work = CONTENDERS[name](direction, folder, uri, paths)

    def counted() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        work()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return counted


# --- in turns ---


def compare(workload: Workload, names: Sequence[str], args: argparse.Namespace) -> dict[tuple[str, str], float]:
    """Rows of one workload; the median seconds of each contender and direction that did not fail."""
    found: dict[tuple[str, str], list[Measurement]] = {(name, way): [] for way in (UP, DOWN) for name in names}
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch, below(args.bucket) as root:
        source = Path(scratch, "source")
        workload.write(source)
        for repeat in range(args.repeats):
            for place in range(len(names)):
                name = names[(place + repeat) % len(names)]  # nobody is always first
                uri, target = f"{root}/{repeat}-{place}", Path(scratch, "target")
                target.mkdir()
                for direction, folder in ((UP, source), (DOWN, target)):
                    one = measure(prepared, name, direction, folder, uri, workload.paths, limit_s=args.limit)
                    found[name, direction].append(one)
                failed = any(found[name, way][-1].error for way in (UP, DOWN))
                if not failed and (wrong := differing(source, target, workload.paths)):
                    raise SystemExit(f"{name}: {wrong[0]} and {len(wrong) - 1} more came back otherwise than they went")
                shutil.rmtree(target)
                empty(uri)
    return {key: seconds for key, runs in found.items() if (seconds := show(workload, key, runs, found)) is not None}


def differing(source: Path, target: Path, paths: Sequence[str]) -> list[str]:
    def is_same(path: str) -> bool:
        return (target / path).is_file() and (source / path).read_bytes() == (target / path).read_bytes()

    return [path for path in paths if not is_same(path)]


def show(
    workload: Workload,
    key: tuple[str, str],
    runs: Sequence[Measurement],
    found: Mapping[tuple[str, str], Sequence[Measurement]],
) -> float | None:
    """Print one row; the median seconds, None where a run failed."""
    name, direction = key
    if errors := [run.error for run in runs if run.error]:
        row(workload, direction, name, errors[0], "", "", "", "")
        return None
    seconds = [run.seconds for run in runs]
    median = statistics.median(seconds)
    cpu = statistics.median(run.cpu_seconds + run.value for run in runs)
    ratio = median / statistics.median(run.seconds for run in found[OURS, direction])
    spread = f"{min(seconds):.2f}–{max(seconds):.2f}"
    rate, files = workload.files * workload.size / median / MEGABYTE, workload.files / median
    row(workload, direction, name, f"{median:.2f} ({spread})", f"{ratio:.2f}", f"{rate:.0f}", f"{files:,.0f}",
        f"{cpu:.2f}")  # fmt: skip
    return median


@contextmanager
def below(bucket: str) -> Iterator[str]:
    """A URI of its own, empty again at the end; the bucket is made if need be."""
    client = boto3.client("s3")
    if bucket not in [each["Name"] for each in client.list_buckets()["Buckets"]]:
        client.create_bucket(Bucket=bucket)
    root = f"s3://{bucket}/benchmark-{uuid.uuid4().hex}"
    try:
        yield root
    finally:
        empty(root)


def empty(uri: str) -> None:
    storage.delete(uri, [file.path for file in storage.list_files(uri)])


def version_of_command() -> str:
    """Version of the command, and how long it takes to say so, which is its start."""
    begin = time.perf_counter()
    said = subprocess.run(["aws", "--version"], check=True, capture_output=True, text=True).stdout.split()
    return f"{said[0]} (starts in {time.perf_counter() - begin:.2f} s)"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bucket", required=True)
    parser.add_argument("--workloads", default="4x64000000,2000x100000", metavar="FILESxBYTES,…")
    parser.add_argument("--contenders", default=",".join(SHORT), metavar="NAME,…")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=300, metavar="SECONDS", help="longest copy of one contender")
    parser.add_argument("--folder", metavar="FOLDER", help="where the files lie; the temporary folder by default")
    parser.add_argument("--small", action="store_true", help="few short files")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if "AWS_ENDPOINT_URL" not in os.environ:
        raise SystemExit("set AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY: see benchmarks/README.md")
    if args.small:
        args.workloads, args.repeats = "2x200000,20x1000", 1
    short = dict(zip(SHORT, CONTENDERS, strict=True))
    names = [OURS, *(short[name] for name in args.contenders.split(",") if short[name] != OURS)]
    has_command = shutil.which("aws") is not None
    if not has_command:
        names = [name for name in names if name != COMMAND]
        print("no aws on the PATH: pip install awscli, in an environment of its own; it is left out\n")
    print(f"{hardware('boto3', 'botocore', 's3transfer')}{f', {version_of_command()}' if has_command else ''}; "
          f"median and range of {args.repeats}\n")  # fmt: skip
    if args.small:
        print("few short files, figures mean nothing\n")
    header("files", "", "contender", "s", "ratio", "MB/s", "files/s", "CPU s")
    workloads = [Workload.parse(text) for text in args.workloads.split(",")]
    medians = {workload: compare(workload, names, args) for workload in workloads}
    print()
    if args.small:
        return
    for workload, seconds in medians.items():
        for peer in [name for name in PEERS if name in names]:
            for direction in (UP, DOWN):
                ratio = seconds.get((peer, direction), 0) / seconds.get((OURS, direction), float("nan"))
                goal(f"{workload} {direction}: >= {workload.goal:g}x {peer}", ratio >= workload.goal, f"{ratio:.2f}x")


if __name__ == "__main__":
    main()
