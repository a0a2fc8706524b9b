"""Own text: what is read, what is refused, and how a corpus layout is told."""

import gzip
import json
import random
from collections import Counter
from pathlib import Path

import pytest
import zstandard

from cbtm.corpora.documents import CutLimits
from cbtm.corpora.folder import find_validation_split, import_folder, is_corpus
from cbtm.errors import ConfigError, DataError


def text_of(seed: str, n: int = 40) -> str:
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("abcdefghij", k=6)) for _ in range(n))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def lines(kind: str, n: int) -> str:
    return "".join(json.dumps({"text": text_of(f"{kind} {i}"), "id": i}) + "\n" for i in range(n))


def texts(root: Path, split: str) -> list[str]:
    return [json.loads(line)["text"] for p in sorted((root / split).rglob("*.jsonl")) for line in p.open()]


def kinds(root: Path) -> Counter[str]:
    labels = (root / "labels").rglob("*.jsonl")
    return Counter(json.loads(line)["domain"] for path in labels for line in path.open())


def test_text_files_and_records_are_read_and_the_first_folder_names_the_kind(tmp_path: Path):
    source = tmp_path / "mine"
    for i in range(10):
        write(source / f"letters/2020/{i}.txt", text_of(f"letter {i}"))
        write(source / f"code/{i}.PY", text_of(f"code {i}"))
    write(source / "top.md", text_of("top"))
    write(source / "mail/a.jsonl", lines("mail", 6))
    (source / "mail/b.jsonl.gz").write_bytes(gzip.compress(lines("gz", 5).encode()))
    two_frames = zstandard.compress(lines("zst", 3).encode()) + zstandard.compress(lines("zst2", 1).encode())
    (source / "mail/c.jsonl.zst").write_bytes(two_frames)
    write(source / ".git/config.txt", text_of("hidden"))
    (source / "photo.jpg").write_bytes(b"\xff\xd8")
    summary = import_folder(source, tmp_path / "out", n_shards=2)
    # 6 + 5 + 4 records of mail
    assert kinds(tmp_path / "out") == {"letters": 10, "code": 10, "mail": 15, "text": 1}
    assert summary.dropped == {"other_files": 1}
    assert is_corpus(tmp_path / "out")
    assert find_validation_split(tmp_path / "out") == "valid"


def test_pieces_of_a_file_stay_together_and_records_are_sources_of_their_own(tmp_path: Path):
    for i in range(20):
        write(tmp_path / f"mine/{i}.txt", "\n\n".join(f"file{i} {text_of(f'{i} {j}', 60)}" for j in range(4)))
    limits = CutLimits(min_words=10, max_words=80, max_chars=4000)
    import_folder(tmp_path / "mine", tmp_path / "out", limits=limits)
    sides = [{t.split()[0] for t in texts(tmp_path / "out", s)} for s in ("train", "valid")]
    assert sides[1]
    assert not sides[0] & sides[1]

    write(tmp_path / "records/all.jsonl", lines("record", 100))
    assert import_folder(tmp_path / "records", tmp_path / "out2").n_valid == 20  # a fifth of one file


def test_the_output_lies_inside_of_the_source_and_is_not_read_again(tmp_path: Path):
    write(tmp_path / "a.jsonl", lines("a", 50))
    first = import_folder(tmp_path, tmp_path / "corpus")
    assert import_folder(tmp_path, tmp_path / "corpus").reused
    assert first.n_train == 40


def test_a_changed_file_is_noticed(tmp_path: Path):
    write(tmp_path / "mine/a.jsonl", lines("a", 50))
    import_folder(tmp_path / "mine", tmp_path / "out")
    write(tmp_path / "mine/a.jsonl", lines("b", 50))
    with pytest.raises(ConfigError, match="files_sha256"):
        import_folder(tmp_path / "mine", tmp_path / "out")
    assert not import_folder(tmp_path / "mine", tmp_path / "out", replace=True).reused


def test_bad_lines_are_counted_up_to_the_limit_and_then_named(tmp_path: Path):
    bad = 'not json\n{"txt": "x"}\n["text"]\n{"text": 5}\n'
    write(tmp_path / "mine/a.jsonl", lines("a", 50) + "\n" + bad)
    (tmp_path / "mine/latin.txt").write_bytes("Größe".encode("latin-1"))
    assert import_folder(tmp_path / "mine", tmp_path / "out").dropped == {"bad_lines": 4, "files_not_utf8": 1}
    # Line 51 is blank, 52 to 55 are bad; the third bad one is line 54.
    with pytest.raises(DataError, match=r"max_bad_lines=2 .*a\.jsonl line 54: not a JSON object with a string"):
        import_folder(tmp_path / "mine", tmp_path / "out2", max_bad_lines=2)
    assert not (tmp_path / "out2").exists()


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_damaged_file_is_named(tmp_path: Path, suffix: str):
    data = lines("a", 500).encode()
    packed = gzip.compress(data) if suffix == ".gz" else zstandard.compress(data)
    (tmp_path / "mine").mkdir()
    (tmp_path / f"mine/a.jsonl{suffix}").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match=rf"a\.jsonl\{suffix} is damaged"):
        import_folder(tmp_path / "mine", tmp_path / "out")


def test_missing_empty_and_unusable_folders_are_named(tmp_path: Path):
    with pytest.raises(DataError, match=f"{tmp_path}/none is not there"):
        import_folder(tmp_path / "none", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=rf"{tmp_path}/empty holds no text \(0 files of other kinds\)"):
        import_folder(tmp_path / "empty", tmp_path / "out")
    write(tmp_path / "empty/a.txt", "few words")
    with pytest.raises(DataError, match=rf"cannot make a corpus of {tmp_path}/empty: 0 usable documents .*too_short"):
        import_folder(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(DataError, match=r"a\.txt is a file, not a folder"):
        import_folder(tmp_path / "empty/a.txt", tmp_path / "out")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_corpus_is_told_by_the_shards_of_its_train_folder(tmp_path: Path, name: str):
    assert not is_corpus(tmp_path)
    write(tmp_path / "train" / name, "")
    assert not is_corpus(tmp_path)  # not in a shard folder
    write(tmp_path / "train/00000" / name, "")
    assert is_corpus(tmp_path)


def test_a_folder_of_what_cbtm_cannot_read_is_no_corpus(tmp_path: Path):
    write(tmp_path / "train/00000/a.parquet", "")
    assert not is_corpus(tmp_path)


def test_the_validation_split_is_found_by_name_and_then_below_it(tmp_path: Path):
    assert find_validation_split(tmp_path) is None
    write(tmp_path / "test/00000/a.jsonl", "")
    assert find_validation_split(tmp_path) == "test"
    write(tmp_path / "validation/00000/a.jsonl", "")
    assert find_validation_split(tmp_path) == "validation"
    write(tmp_path / "valid/C8_small/00000/C8.jsonl.gz", "")
    write(tmp_path / "valid/C8_large/readme.txt", "")
    assert find_validation_split(tmp_path) == "valid/C8_small"


def test_a_corpus_without_validation_gets_one_from_its_train_files_only(tmp_path: Path):
    write(tmp_path / "c/train/00000/a.jsonl", lines("a", 50))
    write(tmp_path / "c/train/00001/a.jsonl", lines("b", 50))
    write(tmp_path / "c/labels/train/00000/a.jsonl", lines("not text", 50))
    summary = import_folder(tmp_path / "c", tmp_path / "out")
    assert (summary.n_train, summary.n_valid) == (80, 20)
    assert kinds(tmp_path / "out") == {"text": 100}


def test_a_complete_corpus_is_refused_since_it_can_be_used_as_it_is(tmp_path: Path):
    for split in ("train", "valid"):
        write(tmp_path / f"c/{split}/00000/a.jsonl", lines(split, 50))
    with pytest.raises(ConfigError, match="the validation split valid already"):
        import_folder(tmp_path / "c", tmp_path / "out")
