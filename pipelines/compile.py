"""Compile the pipelines into `cbtm/compiled`, or check that what is there is what they compile to.

python -m pipelines.compile            write
python -m pipelines.compile --check    exit 1 if a committed file differs
"""

import argparse
import sys
import tempfile
from pathlib import Path

from kfp import compiler

from pipelines.cbtm import cbtm

TARGET = Path(__file__).resolve().parent.parent / "cbtm" / "compiled"
PIPELINES = {"cbtm.yaml": cbtm}


def main() -> None:
    """Compile, or compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for name, pipeline in PIPELINES.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, name)
            compiler.Compiler().compile(pipeline, str(path))
            compiled = path.read_bytes()
        if not check:
            TARGET.mkdir(exist_ok=True)
            (TARGET / name).write_bytes(compiled)
        elif not (TARGET / name).is_file() or (TARGET / name).read_bytes() != compiled:
            sys.exit(f"cbtm/compiled/{name} is not what pipelines/ compiles to: run make compile and commit it")


if __name__ == "__main__":
    main()
