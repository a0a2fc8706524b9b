"""Names of the images that components run in; the one place that spells them.

CBTM_IMAGE_CPU and CBTM_IMAGE_GPU override them when pipelines are compiled: another registry, or a digest instead of a
tag. `python` in the name keeps kfp.local's SubprocessRunner, which runs no image at all, from warning at every task.

    python -m components.images                     names and version, as assignments for a shell
    python -m components.images --digests METADATA  digests, as `read_digests` takes them, of what `buildx bake` pushed
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cbtm
from cbtm.errors import ConfigError

# Role of an image, which the bake file calls its targets by, and the variable that overrides its name.
VARIABLES = {"cpu": "CBTM_IMAGE_CPU", "gpu": "CBTM_IMAGE_GPU"}

CPU = os.environ.get(VARIABLES["cpu"]) or f"ghcr.io/cbtm/cbtm-python-cpu:{cbtm.__version__}"
GPU = os.environ.get(VARIABLES["gpu"]) or f"ghcr.io/cbtm/cbtm-python-cuda:{cbtm.__version__}"

_PINNED = re.compile(r"[^\s@]+@sha256:[0-9a-f]{64}")


def read_digests(path: Path) -> dict[str, str]:
    """Images by digest, from a file such as the workflow `images` makes: `{"cpu": "repository@sha256:…", "gpu": …}`.

    Returns:
        The image of each role in `VARIABLES`.

    Raises:
        ConfigError: If the file is not there or no JSON object, a role is missing or unknown, or an image is not
            pinned by a digest.
    """
    try:
        images = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; the workflow `images` attaches it to a release") from None
    except ValueError:
        raise ConfigError(f"{path} is not JSON") from None
    if not isinstance(images, dict) or set(images) != set(VARIABLES):
        found = sorted(images) if isinstance(images, dict) else type(images).__name__
        raise ConfigError(f"{path} has {found}; it is to have an image for each of {sorted(VARIABLES)}")
    for role, image in images.items():
        if not isinstance(image, str) or not _PINNED.fullmatch(image):
            raise ConfigError(f"{path}: {role}={image!r} is not pinned; expected repository@sha256:<64 hex digits>")
    return images


def environment(images: Mapping[str, str]) -> dict[str, str]:
    """Variables under which pipelines compile with `images`, given by role."""
    return {VARIABLES[role]: image for role, image in images.items()}


def pushed(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Images by digest, from what `docker buildx bake --metadata-file` writes about the targets it pushed."""
    repositories = {"cpu": CPU.partition("@")[0], "gpu": GPU.partition("@")[0]}
    return {
        role: f"{_without_tag(name)}@{metadata[role]['containerimage.digest']}" for role, name in repositories.items()
    }


def _without_tag(name: str) -> str:
    # A colon before the last slash is that of a port.
    repository, _, last = name.rpartition("/")
    return f"{repository}/{last.partition(':')[0]}".removeprefix("/")


def main() -> None:
    """Write what a shell asks for."""
    parser = argparse.ArgumentParser(description="Names and digests of the images.")
    parser.add_argument("--digests", metavar="METADATA", type=Path, help="file that docker buildx bake wrote")
    metadata = parser.parse_args().digests
    if metadata is not None:
        sys.stdout.write(json.dumps(pushed(json.loads(metadata.read_text(encoding="utf-8"))), indent=1) + "\n")
        return
    for name, value in {**environment({"cpu": CPU, "gpu": GPU}), "VERSION": cbtm.__version__}.items():
        sys.stdout.write(f"{name}={value}\n")


if __name__ == "__main__":
    main()
