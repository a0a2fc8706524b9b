"""Fixed assignments: the clusters that somebody else gave to the documents of a corpus.

One file of assignments for each corpus file, `<root>/<split>/<shard>/<name>.jsonl[.gz|.zst]`, with a line
`{"sp_id": "<path>|<line>", "cluster": int}` for each document, in any order. That is what the assigner writes below
`assignments/`, and what the reference implementation writes, whose `sp_id` holds the absolute path of a machine long
gone: a path counts as the corpus file's when it ends in the path relative to the corpus root. So a corpus may be
moved, and may be compressed since; a Parquet file made of JSON lines is another file, for its rows need not be lines.

A document without an assignment is no error here, for a given assignment may cover a part of a corpus on purpose.
`LineClusters` has no key for it; whoever reads counts it as "no fixed assignment". A corpus file without its file of
assignments is an error: it is far more often a wrong root than a purpose.
"""

from array import array
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from cbtm import storage
from cbtm.config import digest_of
from cbtm.corpus import plain_name, read_lines
from cbtm.errors import DataError

NO_ASSIGNMENT = "no fixed assignment"
_PACKED = ("", ".gz", ".zst")
_LINE_DIGITS = 18  # what an int64 holds for certain


class LineClusters(Mapping[int, int]):
    """Cluster by line (row) number of one corpus file, 12 bytes each; a line without assignment is no key.

    Attributes:
        lines: Line numbers from 0, int64, increasing, shape (n,).
        clusters: Their clusters, int32, shape (n,).
    """

    def __init__(self, lines: NDArray[np.int64], clusters: NDArray[np.int32]) -> None:
        self.lines, self.clusters = lines, clusters

    def __getitem__(self, line: int) -> int:
        place = int(self.lines.searchsorted(line))
        if place == len(self.lines) or self.lines[place] != line:
            raise KeyError(line)
        return int(self.clusters[place])

    def __iter__(self) -> Iterator[int]:
        return iter(self.lines.tolist())

    def __len__(self) -> int:
        return len(self.lines)


class FixedAssignments:
    """Assignments as given, by corpus file.

    Args:
        root: Folder or s3:// prefix that holds `<split>/<shard>/<name>.jsonl[.gz|.zst]`.
        n_clusters: Clusters are 0 to n_clusters - 1.
    """

    def __init__(self, root: str, *, n_clusters: int) -> None:
        self.root, self.n_clusters = root, n_clusters

    def of_file(self, corpus_path: str) -> LineClusters:
        """Read the assignments of one corpus file, given by its path relative to the corpus root.

        Raises:
            DataError: With file and line: if a line is no such object, speaks of another file, gives a cluster that
                there is not, or a document a second time. If the file is not there, there in two forms, or damaged.
            StorageError: If it cannot be read.
        """
        plain = plain_name(corpus_path)
        sizes = storage.sizes(self.root, [plain + suffix for suffix in _PACKED])
        uri = storage.join(
            self.root, self._one(corpus_path, [path for path, size in sizes.items() if size is not None])
        )
        lines, clusters = array("q"), array("i")
        for number, data in enumerate(read_lines(uri), 1):
            sp_id, cluster = self._parsed(data, f"{uri}, line {number}")
            path, _, line = sp_id.rpartition("|")
            if not _is_same(path, corpus_path):
                raise DataError(f"{uri}, line {number}: {sp_id!r} is no document of {corpus_path}")
            if not (line.isascii() and line.isdigit() and len(line) <= _LINE_DIGITS):
                raise DataError(f"{uri}, line {number}: {sp_id!r} does not end in |<line number>")
            lines.append(int(line))
            clusters.append(cluster)
        return _sorted(np.array(lines, dtype=np.int64), np.array(clusters, dtype=np.int32), corpus_path, uri)

    def digest(self, corpus_paths: Iterable[str]) -> str:
        """Identity of the assignments of these corpus files: sha256 of local files, ETags in S3.

        It does not depend on where the root lies, nor on what else is there.

        Raises:
            DataError: If a corpus file has no file of assignments, or one in two forms.
            StorageError: If the root cannot be listed or a file not be read.
        """
        found = {file.path: file for file in storage.list_files(self.root)}
        content = []
        for corpus_path in sorted(set(corpus_paths)):
            forms = [plain_name(corpus_path) + suffix for suffix in _PACKED]
            file = found[self._one(corpus_path, [path for path in forms if path in found])]
            local = not storage.is_s3(self.root)
            version = storage.sha256(storage.join(self.root, file.path)) if local else file.version
            content.append([corpus_path, file.path, version])
        return digest_of(content)

    def _one(self, corpus_path: str, found: list[str]) -> str:
        if not found:
            raise DataError(
                f"{corpus_path} has no fixed assignments: {storage.join(self.root, plain_name(corpus_path))}[.gz|.zst] "
                "is not there; give the folder that holds <split>/<shard>, or take the file out of the corpus"
            )
        if len(found) > 1:
            raise DataError(f"{self.root}: {' and '.join(found)} are one file in two forms; remove one of them")
        return found[0]

    def _parsed(self, data: bytes, where: str) -> tuple[str, int]:
        try:
            record: Any = orjson.loads(data)
        except orjson.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON ({error})") from error
        sp_id, cluster = (record.get("sp_id"), record.get("cluster")) if isinstance(record, dict) else (None, None)
        if not isinstance(sp_id, str) or type(cluster) is not int:  # True is an int as well
            raise DataError(f'{where}: expected {{"sp_id": "<path>|<line>", "cluster": <int>}}')
        if not 0 <= cluster < self.n_clusters:
            raise DataError(f"{where}: cluster {cluster} of {sp_id!r} is not one of 0 to {self.n_clusters - 1}")
        return sp_id, cluster


def _is_same(path: str, corpus_path: str) -> bool:
    given, wanted = (name.removesuffix(".gz").removesuffix(".zst") for name in (path, corpus_path))
    return given == wanted or given.endswith(f"/{wanted}")


def _sorted(lines: NDArray[np.int64], clusters: NDArray[np.int32], corpus_path: str, uri: str) -> LineClusters:
    order = np.argsort(lines, kind="stable")
    lines, clusters = lines[order], clusters[order]
    again = np.flatnonzero(lines[1:] == lines[:-1])
    if len(again):
        # Of all repeats the one that comes first in the file; every line of it is one assignment.
        place = int(again[np.argmin(order[again + 1])])
        first, second = (int(order[i]) + 1 for i in (place, place + 1))
        raise DataError(
            f"{uri}, line {second}: document {corpus_path}|{lines[place]} is assigned a second time, to cluster "
            f"{clusters[place + 1]}; line {first} gives it cluster {clusters[place]}"
        )
    return LineClusters(lines, clusters)
