"""A folder that several machines have written, published as one.

The ranks of a training write a checkpoint each to its own machine's disk. Each machine uploads what it has and leaves
a list of it; the first one waits for the lists of the others and writes the manifest, over all files. The lists of one
save have a token in their names, so that what an earlier try has left is never taken for a part of this one.
"""

import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

from cbtm import manifest, storage
from cbtm.errors import CbtmError, StorageError
from cbtm.manifest import FileEntry, StageSpec

# Machines begin to upload at the same time, parts of about one size: one that is lost is not waited for much longer.
_SECONDS, _TIMES = 60.0, 3.0


def place_part(spec: StageSpec, folder: Path, *, node: int, token: str) -> None:
    """Upload the part of a machine other than the first, and leave its list.

    Raises:
        CbtmError: If it could not be uploaded; the first machine hears of it, where that is possible.
    """
    try:
        files = manifest.describe(folder)
        storage.upload(folder, spec.root, [file.path for file in files])
        _leave(spec, node, token, {"files": [file.model_dump() for file in files]})
    except (CbtmError, OSError) as error:
        with contextlib.suppress(CbtmError, OSError):
            _leave(spec, node, token, {"error": str(error)})
        raise


def publish_parts(
    spec: StageSpec, folder: Path, metadata: dict[str, int], *, n_nodes: int, token: str, seconds: float = _SECONDS
) -> None:
    """Upload the first machine's part and, once all others are there, write the manifest over them.

    Raises:
        StorageError: If another machine could not upload its part, or has not within `seconds` and some times more
            than the first machine has taken.
    """
    began = time.monotonic()
    own = manifest.describe(folder)
    manifest.place(spec, folder, own)
    taken = time.monotonic() - began
    others = _wait_for_lists(spec, range(1, n_nodes), token, seconds + _TIMES * taken)
    manifest.conclude(spec, sorted([*own, *others], key=lambda file: file.path), metadata)
    storage.delete(spec.root, [_name(node, token) for node in range(1, n_nodes)])


def _wait_for_lists(spec: StageSpec, nodes: Sequence[int], token: str, seconds: float) -> list[FileEntry]:
    until = time.monotonic() + seconds
    found: list[FileEntry] = []
    for node in nodes:
        uri = storage.join(spec.root, _name(node, token))
        if not storage.wait_for(uri, until - time.monotonic()):
            raise StorageError(f"node {node} has not uploaded its part of {spec.root} within {seconds:.0f} s")
        told = json.loads(storage.read_bytes(uri))
        if "error" in told:
            raise StorageError(f"node {node} could not upload its part: {told['error']}")
        found += [FileEntry.model_validate(file) for file in told["files"]]
    return found


def _leave(spec: StageSpec, node: int, token: str, told: dict[str, object]) -> None:
    storage.write_bytes(storage.join(spec.root, _name(node, token)), json.dumps(told).encode())


def _name(node: int, token: str) -> str:
    return f"part-{node:05d}-{token}.json"
