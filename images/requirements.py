"""Print what the images install besides cbtm: its requirements and those of EXTRAS, as `pyproject.toml` has them.

An image installs these before the source is there, so that a change of the source does not install them again. Not
among the extras: `local`, whose MLflow server no stage needs, and `balanced-kmeans`, a backend that few choose.
"""

import sys
import tomllib
from pathlib import Path

EXTRAS = ("train", "tracking", "report", "parquet", "pipelines")


def requirements(pyproject: str) -> list[str]:
    """Requirement specifiers in the text of a `pyproject.toml`."""
    project = tomllib.loads(pyproject)["project"]
    optional = project["optional-dependencies"]
    return [*project["dependencies"], *(line for extra in EXTRAS for line in optional[extra])]


if __name__ == "__main__":
    sys.stdout.write("\n".join(requirements(Path("pyproject.toml").read_text(encoding="utf-8"))) + "\n")
