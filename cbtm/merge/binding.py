"""Which expert belongs to which cluster: read from what each expert says of itself, never from an order of files.

The router's weights are for clusters of one clusterer. An expert of another cluster, of another clusterer or of another
tokenizer would take weights that are not its own, and nothing in its scores would show it: the evaluation of the code
released with c-BTM sorts checkpoints by name, so that from eleven experts on most of them get another one's weights.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cbtm import storage
from cbtm.cluster.clusterer import Ancestor
from cbtm.errors import ManifestError
from cbtm.train.job import EXPERT_FILE

_FORMAT = 1


def read_expert(root: str) -> dict[str, Any]:
    """Read what a trained model says of itself.

    Args:
        root: Its folder or s3:// prefix.

    Returns:
        The content of expert.json.

    Raises:
        ManifestError: If it is not there, or is no such file of this version.
        StorageError: If it cannot be read.
    """
    uri = storage.join(root, EXPERT_FILE)
    if (text := storage.read_if_there(uri)) is None:
        raise ManifestError(f"{uri} is not there: {root} is no trained expert, or its training has not finished")
    try:
        found = json.loads(text)
    except ValueError:
        raise ManifestError(f"{uri} is damaged; train that expert again") from None
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        given = found.get("format") if isinstance(found, dict) else None
        raise ManifestError(f"{uri} has format {given!r}, this cbtm reads {_FORMAT}; train that expert again")
    return found


def check_experts(
    roots: Mapping[int, str], *, clusterer_digest: str, ancestors: Sequence[Ancestor] = (), kind: str = "expert"
) -> None:
    """Refuse experts that are not what the router's weights are for.

    Args:
        roots: Folder or s3:// prefix of the expert that is to take each cluster's weight.
        clusterer_digest: Identity of the router's clusterer.
        ancestors: The clusterers that it extends. Their centres are its first ones, so an expert of one of them is
            right for a cluster that was there already.
        kind: What they are to be: experts of the clusters that were found, or of "random" ones.

    Raises:
        ManifestError: If an expert is not there, was trained on clusters of another clusterer or for another cluster
            (as one of two folders with the same expert was), or has another tokenizer than the others.
        StorageError: If one cannot be read.
    """
    first: tuple[str, Any] | None = None
    for cluster, root in roots.items():
        found = read_expert(root)
        accepted = {clusterer_digest, *(one.digest for one in ancestors if cluster < one.n_clusters)}
        if found.get("clusterer_digest") not in accepted:
            raise ManifestError(
                f"{root} was trained under clusterer {_short(found.get('clusterer_digest'))}, the router has "
                f"{_short(clusterer_digest)}: weights would go to the wrong experts; train it again"
            )
        if found.get("kind") != kind:
            raise ManifestError(
                f"{root} is of kind {found.get('kind')}, not {kind}: its folder holds another model's files"
            )
        if found.get("cluster") != cluster:
            raise ManifestError(
                f"{root} is the expert of cluster {found.get('cluster')}, not of {cluster}: weights would go to the "
                "wrong expert; put its files back, or train it again"
            )
        first = first or (root, found.get("tokenizer_digest"))
        if found.get("tokenizer_digest") != first[1]:
            raise ManifestError(
                f"{first[0]} and {root} have different tokenizers: probabilities of their tokens cannot be mixed"
            )


def _short(digest: Any) -> str:
    return digest[:12] if isinstance(digest, str) else "unknown"
