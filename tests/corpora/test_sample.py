"""The sample: on a small made-up folder of packages, and on those that are installed."""

import gzip
import hashlib
import json
import random
import sys
from pathlib import Path

import pytest

from cbtm.corpora.sample import KINDS, gather_sample, package_folder
from cbtm.errors import DataError


def sentence(seed: str, n: int = 60) -> str:
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("abcdefghijklmnop", k=5)) for _ in range(n))


def service(name: str) -> dict[str, object]:
    operations = {
        f"Do{i}": {"documentation": f"<p>{sentence(f'{name} op {i}')}</p>", "input": {"shape": f"In{i}"}}
        for i in range(6)
    }
    shapes = {
        f"In{i}": {
            "type": "structure",
            "members": {f"M{sentence(f'{name}{i}{j}', 1)}": {"shape": sentence(f"{name}{i}{j}", 1)} for j in range(9)},
        }
        for i in range(6)
    }
    return {"documentation": f"<p>{sentence(name)}</p>", "operations": operations, "shapes": shapes}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    site = tmp_path / "site-packages"
    for name in ("boxes", "queues", "mail", "maps"):
        for version in ("2010-01-01", "2020-01-01"):
            path = site / f"botocore/data/{name}/{version}/service-2.json.gz"
            path.parent.mkdir(parents=True)
            path.write_bytes(gzip.compress(json.dumps(service(f"{name} {version}")).encode(), mtime=0))
    for package in ("botocore", "numpy", "sympy", "torch", "transformers"):
        # An import would raise: packages are only read.
        write(site / package / "__init__.py", "raise ImportError('imported')\n")
    for i in range(12):
        write(site / f"numpy/m{i}.py", f'def f():\n    """{sentence(f"numpy {i}")}"""\n')
        code = "\n".join(f"a{i}_{j} = call({sentence(f'{i}{j}', 3).replace(' ', ', ')})" for j in range(30))
        write(site / f"transformers/m{i}.py", f"# not this comment\n{code}\n")
        write(site / f"transformers/tests/test_m{i}.py", f"forbidden = {i}\n" * 60)
        write(site / f"sympy/core/tests/test_m{i}.py", code.replace("call", "assert_"))
        header = "\n".join(f"int {sentence(f'h{i}{j}', 2).replace(' ', '(')});" for j in range(60))
        write(site / f"torch/include/h{i}.h", f"// Copyright of forbidden\n#pragma once\n{header}\n")
        info = site / f"dist{i}-1.{i}.dist-info"
        write(info / "METADATA", f"Metadata-Version: 2.1\nName: dist{i}\nVersion: 1.{i}\n\n{sentence(f'readme {i}')}\n")
        write(info / "LICENSE", f"{sentence(f'licence {i}')}\n")
        write(info / "RECORD", f"dist{i}-1.{i}.dist-info/LICENSE,,\ndist{i}-1.{i}.dist-info/METADATA,,\n")
    return site


def corpus_texts(root: Path, split: str) -> list[str]:
    return [json.loads(line)["text"] for p in sorted((root / split).rglob("*.jsonl")) for line in p.open()]


def digests(root: Path) -> dict[str, str]:
    return {
        p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }


def test_every_kind_is_found_in_a_folder_of_packages_and_nothing_is_imported(site: Path, tmp_path: Path):
    before = set(sys.modules)
    summary = gather_sample(tmp_path / "c", max_per_kind=20, search_paths=[str(site)])
    kinds = {k: n + summary.documents["valid"].get(k, 0) for k, n in summary.documents["train"].items()}
    assert set(kinds) == set(KINDS) - {"type_stubs"}
    assert all(n <= 20 for n in kinds.values())
    # 12 numpy modules with a docstring each
    assert kinds["python_docstrings"] == 12
    assert not {"sympy", "torch", "transformers"} & (set(sys.modules) - before)
    assert not any("forbidden" in t for split in ("train", "valid") for t in corpus_texts(tmp_path / "c", split))


def test_only_the_newest_version_of_a_service_counts(site: Path, tmp_path: Path):
    gather_sample(tmp_path / "c", max_per_kind=100, min_kinds=0, search_paths=[str(site)])
    text = "\n".join(corpus_texts(tmp_path / "c", "train") + corpus_texts(tmp_path / "c", "valid"))
    assert sentence("boxes 2020-01-01 op 3") in text
    assert sentence("boxes 2010-01-01 op 3") not in text


def test_versions_of_the_packages_are_on_record(site: Path, tmp_path: Path):
    gather_sample(tmp_path / "c", max_per_kind=20, search_paths=[str(site)])
    packages = json.loads((tmp_path / "c/corpus.json").read_text())["packages"]
    assert packages == {f"dist{i}": f"1.{i}" for i in range(12)}


def test_too_few_kinds_are_refused_with_what_was_found_and_what_to_install(site: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"kinds, at least 5.*api_schemas: 0.*Install some of .*botocore, ") as error:
        gather_sample(tmp_path / "c", search_paths=[str(tmp_path / "nothing")])
    assert "torch" in str(error.value)
    assert not (tmp_path / "c").exists()


def test_a_package_is_found_without_import_and_a_missing_one_is_none(site: Path):
    assert package_folder("numpy", [str(site)]) == site / "numpy"
    assert package_folder("no_such_package", [str(site)]) is None


def test_progress_names_every_step(site: Path, tmp_path: Path):
    lines: list[str] = []
    gather_sample(tmp_path / "c", max_per_kind=20, search_paths=[str(site)], progress=lines.append)
    assert lines[0].startswith("read AWS services: ")
    assert any(line.startswith("python_docstrings: 12 of 12") for line in lines)


def test_the_installed_packages_give_at_least_five_kinds_equal_to_the_byte(tmp_path: Path):
    pytest.importorskip("botocore")
    first = gather_sample(tmp_path / "a", max_per_kind=30)
    gather_sample(tmp_path / "b", max_per_kind=30)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert len(first.documents["train"]) >= 5
    train, valid = set(corpus_texts(tmp_path / "a", "train")), set(corpus_texts(tmp_path / "a", "valid"))
    assert valid
    assert not train & valid
    assert len(train) == first.n_train
