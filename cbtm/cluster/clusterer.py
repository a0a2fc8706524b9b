"""A clusterer: what is needed to say to which domain a text belongs, as a folder of JSON and safetensors.

`clusterer.json` is written last and holds the sha256 of the other files, so that a folder which was cut short or
changed by hand is told from one that is whole, wherever it was copied to.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbtm import storage
from cbtm.cluster import embedder as embedders
from cbtm.cluster.drift import DistanceProfile
from cbtm.cluster.embedder import TfidfSvdEmbedder
from cbtm.cluster.kmeans import nearest_centers
from cbtm.errors import ManifestError, StorageError

CENTERS_FILE, SETTINGS_FILE, DOMAINS_FILE = "centers.safetensors", "clusterer.json", "domains.json"
PROFILE_FILE = "profile.json"
# What decides to which cluster a text belongs; the other files describe it.
DECIDING_FILES = (embedders.SETTINGS_FILE, embedders.ARRAYS_FILE, CENTERS_FILE)
CLUSTERER_FORMAT = 2


@dataclass(frozen=True)
class Ancestor:
    """A clusterer that another one extends: its centres are the first ones of the other, bit for bit.

    Attributes:
        n_clusters: How many it has.
        digest: Its identity, which the experts of its clusters are bound to.
    """

    n_clusters: int
    digest: str


class Clusterer:
    """Embedder and centres.

    Attributes:
        embedder: Maps texts to unit vectors.
        centers: Cluster centres, float32, shape (k, d).
        profile: How far the documents of the fit lie from the centres; None if nobody measured it.
        ancestors: The clusterers that it extends, the first one first.
    """

    def __init__(
        self,
        embedder: TfidfSvdEmbedder,
        centers: NDArray[np.float32],
        profile: DistanceProfile | None = None,
        ancestors: Sequence[Ancestor] = (),
    ) -> None:
        self.embedder, self.centers, self.profile = embedder, centers, profile
        self.ancestors = tuple(ancestors)

    @property
    def n_clusters(self) -> int:
        """Number of domains, k."""
        return len(self.centers)

    def predict(self, texts: Iterable[str]) -> NDArray[np.int32]:
        """Cluster of the nearest centre for each text; ties go to the lower number. Shape (n,).

        A text without a known word is the zero vector, whose nearest centre is the shortest one.
        """
        blocks = [nearest_centers(vectors, self.centers) for vectors in self.embedder.transform_blocks(texts)]
        return np.concatenate(blocks) if blocks else np.empty(0, dtype=np.int32)

    def save(self, folder: Path, domains: Mapping[str, Any] | None = None) -> None:
        """Write the folder.

        Args:
            folder: Folder to write; what it holds of another clusterer goes.
            domains: Description of the domains (`cbtm.cluster.domains`), if there is one.
        """
        from safetensors.numpy import save_file

        folder.mkdir(parents=True, exist_ok=True)
        for name in (SETTINGS_FILE, PROFILE_FILE, DOMAINS_FILE):
            (folder / name).unlink(missing_ok=True)
        self.embedder.save(folder)
        save_file({"centers": np.ascontiguousarray(self.centers)}, folder / CENTERS_FILE)
        if self.profile is not None:
            _write_json(folder / PROFILE_FILE, self.profile.to_json())
        if domains is not None:
            _write_json(folder / DOMAINS_FILE, domains)
        names = (*DECIDING_FILES, PROFILE_FILE, DOMAINS_FILE)
        settings = {
            "format": CLUSTERER_FORMAT,
            "n_clusters": self.n_clusters,
            "n_components": int(self.centers.shape[1]),
            **({"ancestors": [asdict(one) for one in self.ancestors]} if self.ancestors else {}),
            "files": {name: storage.sha256_file(folder / name) for name in names if (folder / name).is_file()},
        }
        _write_json(folder / SETTINGS_FILE, settings)

    @classmethod
    def load(cls, folder: Path) -> "Clusterer":
        """Open a folder written by `save`.

        Raises:
            ManifestError: If the folder is incomplete, was changed, is of another format, or its parts do not fit
                together.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        settings = read_settings(str(folder))
        _check_files(folder, settings.get("files"))
        try:
            centers = load_file(folder / CENTERS_FILE)["centers"]
        except (OSError, KeyError, SafetensorError) as error:
            raise ManifestError(f"{folder} is no clusterer folder: {error}; fit the clusterer again") from error
        embedder = TfidfSvdEmbedder.load(folder)
        if centers.shape != (settings["n_clusters"], embedder.n_components_):
            raise ManifestError(
                f"{folder}: centres of shape {centers.shape} do not fit {settings.get('n_clusters')} clusters and an "
                f"embedder of length {embedder.n_components_}; fit the clusterer again"
            )
        path, profile = folder / PROFILE_FILE, None
        if PROFILE_FILE in settings["files"]:
            profile = DistanceProfile.from_json(json.loads(path.read_text()), source=str(path))
        return cls(embedder, centers, profile, _ancestors(settings, str(folder)))

    @classmethod
    def fetch(cls, uri: str, scratch: Path) -> "Clusterer":
        """Open a folder, local or s3://, which is brought to `scratch`.

        Raises:
            ManifestError: As for `load`.
        """
        if not storage.is_s3(uri):
            return cls.load(storage.local_path(uri))
        storage.download(uri, scratch, [file.path for file in storage.list_files(uri)])
        return cls.load(scratch)


def read_settings(uri: str) -> dict[str, Any]:
    """What `clusterer.json` of a folder or s3:// prefix says; it costs one small read.

    Raises:
        ManifestError: If there is no clusterer, or one of another format.
    """
    try:
        settings: dict[str, Any] = json.loads(storage.read_bytes(storage.join(uri, SETTINGS_FILE)))
        found, _ = settings["format"], settings["n_clusters"]
    except (StorageError, ValueError, KeyError, TypeError) as error:
        raise ManifestError(f"{uri} is no clusterer folder: {error}; fit the clusterer again") from error
    if found != CLUSTERER_FORMAT:
        raise ManifestError(
            f"{uri}: clusterer format {found!r}, this cbtm reads {CLUSTERER_FORMAT}; fit the clusterer again"
        )
    return settings


def read_ancestors(uri: str) -> tuple[Ancestor, ...]:
    """The clusterers that the one in a folder or s3:// prefix extends; it costs one small read.

    Raises:
        ManifestError: If there is no clusterer, or its ancestors are none.
    """
    return _ancestors(read_settings(uri), uri)


def _ancestors(settings: Mapping[str, Any], uri: str) -> tuple[Ancestor, ...]:
    try:
        return tuple(Ancestor(int(one["n_clusters"]), str(one["digest"])) for one in settings.get("ancestors", ()))
    except (KeyError, TypeError, ValueError) as error:
        raise ManifestError(f"{uri}: {SETTINGS_FILE} names ancestors that are none: {error!r}; make it again") from None


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_files(folder: Path, digests: Any) -> None:
    if not isinstance(digests, dict) or CENTERS_FILE not in digests:
        raise ManifestError(f"{folder / SETTINGS_FILE} does not name the files; fit the clusterer again")
    for name, digest in _named_files(digests):
        path = folder / name
        if not path.is_file():
            raise ManifestError(f"{folder} lacks {name}; copy the folder again, or fit the clusterer again")
        if storage.sha256_file(path) != digest:
            raise ManifestError(
                f"{path} was changed or cut short after the clusterer was written: its sha256 is not the one in "
                f"{SETTINGS_FILE}; copy the folder again, or fit the clusterer again"
            )


def _named_files(digests: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, digest in digests.items():
        if Path(name).name != name:
            raise ManifestError(f"{SETTINGS_FILE} names {name!r}, which lies outside the folder")
        yield name, digest
