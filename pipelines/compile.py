"""Compile the pipelines into `cbtm/compiled`, or check that what is there is what they compile to.

python -m pipelines.compile            write
python -m pipelines.compile --check    exit 1 if a committed file differs

With options the result is for a cluster and goes elsewhere (`--target`); `cbtm compile` makes the same of the
committed file, where there is no checkout.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from kfp import compiler

from pipelines import cbtm, compare
from pipelines.pods import Options

_PROTOBUF = "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"
TARGET = Path(__file__).resolve().parent.parent / "cbtm" / "compiled"
PIPELINES = {"cbtm.yaml": cbtm.build, "compare.yaml": compare.build}


def main() -> None:
    """Compile, or compare."""
    if os.environ.get(_PROTOBUF) != "python":
        # KFP numbers nested loops in the order of a protobuf map, which in its C implementation differs each time.
        command = [sys.executable, "-m", "pipelines.compile", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, _PROTOBUF: "python"})  # noqa: S606 - no shell, ourselves
    given = _arguments()
    options = Options(given.parallelism, given.shm_size, given.queue)
    for name, pipeline in PIPELINES.items():
        compiled = compile_pipeline(pipeline(options))
        if not given.check:
            given.target.mkdir(exist_ok=True)
            (given.target / name).write_bytes(compiled)
        elif not (given.target / name).is_file() or (given.target / name).read_bytes() != compiled:
            sys.exit(f"cbtm/compiled/{name} is not what pipelines/ compiles to: run make compile and commit it")


def compile_pipeline(pipeline: Any) -> bytes:
    """The compiled file of a pipeline."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pipeline.yaml")
        compiler.Compiler().compile(pipeline, str(path))
        return path.read_bytes()


def _arguments() -> argparse.Namespace:
    default = Options()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--target", type=Path, default=TARGET)
    parser.add_argument("--parallelism", type=int, default=default.parallelism)
    parser.add_argument("--shm-size", default=default.shm_size)
    parser.add_argument("--queue", default=default.queue)
    return parser.parse_args()


if __name__ == "__main__":
    main()
