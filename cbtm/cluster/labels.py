"""Labels that a corpus carries: which domain people say each document is from. They measure, and train nothing.

They lie apart from the text, so that no stage reads them by accident: below a root of their own, in a file of the
corpus file's name, one `{"sp_id": …, "domain": …}` a line. A corpus that was packed again (.gz to .zst) keeps its
labels: a file is found whatever its packing, and a document by its place in the file.
"""

from collections.abc import Iterator, Sequence

import orjson

from cbtm import storage
from cbtm.config import digest_of
from cbtm.corpus import SUFFIXES, read_lines
from cbtm.errors import DataError

_LABEL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


def read_labels(root: str, paths: Sequence[str]) -> dict[str, str]:
    """Read the labels of corpus files.

    Args:
        root: Folder or s3:// prefix of the labels.
        paths: Corpus files, relative to the corpus root, such as train/00000/C8.jsonl.gz.

    Returns:
        Domain by sp_id, the sp_id as the corpus files of `paths` give it. A document need not have a label.

    Raises:
        DataError: If a corpus file has no file of labels or two, a line lacks a field, or a document is given two
            domains.
        StorageError: If a file cannot be read.
    """
    labels: dict[str, str] = {}
    for path, uri in label_files(root, paths):
        for number, (sp_id, domain) in enumerate(_read(uri), start=1):
            name = _as_in_corpus(sp_id, path)
            if labels.setdefault(name, domain) != domain:
                raise DataError(
                    f"{uri}, line {number}: {sp_id} has the domain {domain!r}, an earlier line has "
                    f"{labels[name]!r}; remove one of them"
                )
    return labels


def label_files(root: str, paths: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each corpus file with the URI of its labels.

    Raises:
        DataError: If a corpus file has no labels, or labels in two forms.
    """
    candidates = [_stem(path) + suffix for path in paths for suffix in _LABEL_SUFFIXES]
    sizes = storage.sizes(root, candidates)
    for path in paths:
        found = [_stem(path) + suffix for suffix in _LABEL_SUFFIXES if sizes[_stem(path) + suffix] is not None]
        if not found:
            expected = storage.join(root, _stem(path) + _LABEL_SUFFIXES[0])
            raise DataError(f"corpus file {path} has no labels: {expected} (or .gz, .zst) is not there")
        if len(found) > 1:
            raise DataError(f"{' and '.join(found)} below {root} are the labels of one file, {path}; remove one")
        yield path, storage.join(root, found[0])


def has_labels(root: str, paths: Sequence[str]) -> bool:
    """Tell whether some of the corpus files have labels; `read_labels` then wants them for all."""
    candidates = [_stem(path) + suffix for path in paths for suffix in _LABEL_SUFFIXES]
    return any(size is not None for size in storage.sizes(root, candidates).values())


def labels_digest(root: str, paths: Sequence[str]) -> str:
    """Identity of the labels of corpus files: sha256 of local files, ETags in S3.

    Raises:
        DataError: As for `label_files`.
    """
    if not storage.is_s3(root):
        return digest_of([[path, storage.sha256(uri)] for path, uri in label_files(root, paths)])
    versions = {storage.join(root, file.path): file.version for file in storage.list_files(root)}
    return digest_of([[path, versions[uri]] for path, uri in label_files(root, paths)])


def _read(uri: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(read_lines(uri), start=1):
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError:
            record = None
        record = record if isinstance(record, dict) else {}
        sp_id, domain = record.get("sp_id"), record.get("domain")
        if not isinstance(sp_id, str) or not isinstance(domain, str):
            raise DataError(f'{uri}, line {number}: not JSON with "sp_id" and "domain", both text')
        yield sp_id, domain


def _stem(path: str) -> str:
    """A path without the suffix of a corpus file."""
    suffix = next((suffix for suffix in sorted(SUFFIXES, key=len, reverse=True) if path.endswith(suffix)), "")
    return path.removesuffix(suffix)


def _as_in_corpus(sp_id: str, path: str) -> str:
    """The sp_id of a label as that of the corpus file `path`, where the two differ in packing alone."""
    file, bar, line = sp_id.rpartition("|")
    return f"{path}|{line}" if bar and _stem(file) == _stem(path) else sp_id
