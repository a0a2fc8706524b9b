import gzip
import json

import pytest
import zstandard

from cbtm.cluster.labels import read_labels
from cbtm.errors import DataError

PATH = "train/00000/C8.jsonl.gz"


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def label(number, domain, path=PATH):
    return {"sp_id": f"{path}|{number}", "domain": domain}


@pytest.fixture
def write(tmp_path):
    def write(path, data):
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(target.suffix, bytes)
        target.write_bytes(pack(data))
        return str(tmp_path)

    return write


def test_labels_of_several_files_are_read_by_sp_id(write):
    other = "train/00001/C8.jsonl.gz"
    write(PATH, lines(label(0, "law"), label(3, "code")))
    root = write(other, lines(label(0, "law", other)))
    assert read_labels(root, [PATH, other]) == {f"{PATH}|0": "law", f"{PATH}|3": "code", f"{other}|0": "law"}
    assert read_labels(root, [other]) == {f"{other}|0": "law"}
    assert read_labels(root, []) == {}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("corpus_suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_packing_of_the_corpus_and_of_its_labels_may_differ(write, suffix, corpus_suffix):
    root = write(f"train/a/x{suffix}", lines(label(7, "law", f"train/a/x{suffix}")))
    assert read_labels(root, [f"train/a/x{corpus_suffix}"]) == {f"train/a/x{corpus_suffix}|7": "law"}


def test_a_file_without_labels_is_named_with_where_they_should_lie(write):
    root = write(PATH, lines(label(0, "law")))
    with pytest.raises(
        DataError, match=rf"corpus file train/9/x\.jsonl\.zst has no labels: {root}/train/9/x\.jsonl \(or \.gz"
    ):
        read_labels(root, [PATH, "train/9/x.jsonl.zst"])


def test_two_files_of_labels_for_one_file_are_refused(write):
    write("train/a/x.jsonl", lines(label(0, "law")))
    root = write("train/a/x.jsonl.gz", lines(label(0, "code")))
    with pytest.raises(DataError, match=r"train/a/x\.jsonl and train/a/x\.jsonl\.gz below .* remove one"):
        read_labels(root, ["train/a/x.jsonl"])


@pytest.mark.parametrize(
    "bad", [b"{\n", b"\n", b"[]\n", b'{"sp_id": "a|0"}\n', b'{"domain": "law"}\n', b'{"sp_id": "a|0", "domain": 3}\n']
)
def test_a_line_without_the_fields_is_named(write, bad):
    root = write(PATH, lines(label(0, "law")) + bad)
    with pytest.raises(DataError, match=rf'{PATH}, line 2: not JSON with "sp_id" and "domain"'):
        read_labels(root, [PATH])


def test_one_document_with_two_domains_is_refused_and_with_one_twice_is_not(write):
    root = write(PATH, lines(label(0, "law"), label(0, "law")))
    assert read_labels(root, [PATH]) == {f"{PATH}|0": "law"}
    write(PATH, lines(label(0, "law"), label(1, "law"), label(0, "code")))
    with pytest.raises(
        DataError, match=r"C8\.jsonl\.gz, line 3: .*\|0 has the domain 'code', an earlier line has 'law'"
    ):
        read_labels(root, [PATH])
