"""A domain is added to a finished run: the experts that are there stay as they are, and one more is trained."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from small import settings, write_third_kind

from cbtm import stages, storage
from cbtm.cluster.clusterer import Ancestor, Clusterer, read_ancestors
from cbtm.corpus import CorpusConfig
from cbtm.errors import ConfigError, DataError, ManifestError
from cbtm.merge.average import AverageConfig
from cbtm.run import Run
from cbtm.run_config import parse_config
from cbtm.stages.extension import extending
from cbtm.stages.generate import open_mixture
from cbtm.train.member import Member


def run_all(run: Run) -> list[str]:
    stages.plan(run)
    return [task.run().digest for task in stages.tasks(run)]


def digests(root: str | Path) -> dict[str, str]:
    """sha256 of every file below a folder."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(root).rglob("*"))
        if path.is_file()
    }


def values_of(base: Run, corpus: Path, root: Path, **changes: object) -> dict[str, object]:
    text = extending(base.config, CorpusConfig(root=str(corpus)), str(root))
    return yaml.safe_load(text) | changes


def opened(values: dict[str, object]) -> Run:
    return Run(parse_config(json.dumps(values)))


@pytest.fixture(scope="module")
def two(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run with two domains, without random clusters."""
    values = settings(str(corpus), str(tmp_path_factory.mktemp("two") / "out"), None)
    values["train"]["random_clusters"] = False
    values["assign"] = {"random_clusters": False}
    run = opened(values)
    run_all(run)
    return run


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text of a third domain."""
    return write_third_kind(tmp_path_factory.mktemp("letters"))


@pytest.fixture(scope="module")
def before(two: Run) -> dict[str, str]:
    """Every file of the run with two domains, before anything is added to it."""
    return digests(two.config.root)


@pytest.fixture(scope="module")
def three(two: Run, letters: Path, before: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that adds a third domain, finished."""
    run = opened(values_of(two, letters, tmp_path_factory.mktemp("three") / "out"))
    run_all(run)
    return run


def test_nothing_of_the_extended_run_is_touched(two, three, before):
    assert digests(two.config.root) == before


def test_one_expert_is_trained_and_the_others_are_read_where_they_lie(two, three):
    assert [path.name for path in Path(three.uri("experts")).iterdir()] == ["cluster-00002"]
    assert not Path(three.uri("seed")).exists()
    assert not Path(three.uri("tokenizer")).exists()
    for cluster in (0, 1):
        expert = Member("expert", cluster)
        assert three.train_spec(expert) == two.train_spec(expert)
        assert three.member_root(expert) == two.uri("experts", expert.name)


def test_old_centres_are_equal_to_the_bit_and_the_new_one_is_the_mean(two, three):
    old, new = (Clusterer.load(Path(run.uri("clusterer"))) for run in (two, three))
    assert new.centers[:2].tobytes() == old.centers.tobytes()
    texts = [document.text for document in three.documents("train")]
    assert len(texts) == 40
    by_hand = sum(old.embedder.transform([text])[0].astype(np.float64) for text in texts) / 40
    np.testing.assert_allclose(new.centers[2], by_hand, rtol=1e-5, atol=1e-7)
    for name in ("embedder.json", "embedder.safetensors"):
        assert Path(three.uri("clusterer", name)).read_bytes() == Path(two.uri("clusterer", name)).read_bytes()
    assert read_ancestors(three.uri("clusterer")) == (Ancestor(2, two.clusterer_digest),)


def test_all_of_the_added_text_trains_the_new_expert(three):
    lines = Path(three.uri("assignments/train/00000/letters.jsonl")).read_text().splitlines()
    assert [json.loads(line)["cluster"] for line in lines] == [2] * 40
    facts = json.loads(Path(three.uri("experts/cluster-00002/expert.json")).read_text())
    assert facts["documents"] == 40


def test_every_expert_has_seen_equally_many_tokens(three):
    # Three experts take 2 sequences each: the batch of the run is 6, and that of the two that were there was 4.
    assert three.config.train.sequences_per_step == 6
    assert [row["tokens_seen"] for row in three.result()["experts"]] == [20 * 2 * 48] * 3


def test_validation_is_on_the_text_of_both_runs(two, three):
    result = three.result()
    assert result["corpus"]["validation_documents"] == 40 + 20
    assert result["corpus"]["train_documents"] == 160 + 40
    assert result["run"]["extends"] == two.config.root
    assert [domain["documents"] for domain in result["domains"]][2] == 40
    assert sum(row["n_documents"] for row in result["by_domain"]) == result["n_documents"]
    # The letters are told from prose and code: nearly all of their held-out documents are nearest to the new centre.
    by_cluster = {row["cluster"]: row for row in result["by_domain"]}
    assert by_cluster[2]["n_documents"] >= 8


def test_added_expert_is_the_best_on_its_own_domain(three):
    row = next(row for row in three.result()["by_domain"] if row["cluster"] == 2)
    assert row["own_expert"] < row["dense"]


def test_second_run_does_nothing(three, caplog):
    assert stages.finished(three)
    caplog.set_level("INFO")
    run_all(Run(three.config))
    assert "done" not in caplog.text


def test_extended_run_generates_with_all_three(three, tmp_path):
    mixture = open_mixture(three, tmp_path)
    assert mixture.clusters == [0, 1, 2]


def test_domains_that_were_there_are_described_as_before(two, three):
    old, new = (json.loads(Path(run.uri("clusterer/domains.json")).read_text()) for run in (two, three))
    for before, after in zip(old["domains"], new["domains"], strict=False):
        assert {name: after[name] for name in ("top_terms", "examples", "fit_documents", "radius")} == {
            name: before[name] for name in ("top_terms", "examples", "fit_documents", "radius")
        }
    assert new["domains"][2]["fit_documents"] == 40
    assert new["documents"] == old["documents"] + 40
    # Most of the added documents, by brute force, and none of the others, whose vectors are not looked at again.
    nearest = Clusterer.load(Path(three.uri("clusterer"))).predict(doc.text for doc in three.documents("train"))
    assert new["domains"][2]["nearest_documents"] == np.count_nonzero(nearest == 2) > 30


def test_domain_is_added_behind_an_added_one(three, tmp_path):
    more = write_third_kind(tmp_path / "more", name="more")
    for path in more.rglob("*.jsonl"):
        path.write_text(path.read_text().replace("LATIN", "GREEK"))
    four = opened(values_of(three, more, tmp_path / "four"))
    stages.plan(four)
    assert [group.split for group in four.plan_made.part("validation")] == ["valid/small", "valid", "valid"]
    stages.cluster(four)
    assert read_ancestors(four.uri("clusterer")) == (
        Ancestor(2, three.base.clusterer_digest),
        Ancestor(3, three.clusterer_digest),
    )
    centers = Clusterer.load(Path(four.uri("clusterer"))).centers
    assert centers[:3].tobytes() == Clusterer.load(Path(three.uri("clusterer"))).centers.tobytes()
    # Each expert where it was trained: in the first run, in the second, and the one that is missing in this one.
    roots = [four.member_root(Member("expert", cluster)) for cluster in range(4)]
    assert [Path(root).parents[1] for root in roots] == [
        *[Path(three.base.config.root)] * 2, Path(three.config.root), Path(four.config.root)
    ]  # fmt: skip


def test_average_is_of_all_experts(three):
    run = Run(three.config.model_copy(update={"average": AverageConfig(averages=("uniform",))}))
    made = stages.train(run, run.config.averages[0])
    assert made.metadata["experts"] == [0, 1, 2]
    assert made.metadata["weights"] == [1 / 3] * 3


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("cluster", "n_clusters", 4, "cluster.n_clusters=4 with extends={two}, which has 2 clusters: one domain is "
                                     "added at a time; use 3"),
        ("tokenizer", "vocab_size", 600, "tokenizer is another than that of extends={two}"),
        ("train", "steps", 30, "train.steps=30, but the experts of extends={two} were trained with 20"),
        ("train", "sequences_per_step", 12, "train.sequences_per_step=12 gives an expert 4 sequences a step, and those "
                                            "of extends={two} had 2; use 6"),
    ],
)  # fmt: skip
def test_another_configuration_than_that_of_the_extended_run_is_refused(
    two, letters, tmp_path, section, key, value, message
):
    values = values_of(two, letters, tmp_path / "out")
    values[section][key] = value
    if section == "cluster":
        values["train"]["sequences_per_step"] = 8
    with pytest.raises(ConfigError, match=re.escape(message.format(two=two.config.root))):
        stages.plan(opened(values))
    assert not (tmp_path / "out").exists()


def test_other_seed_model_is_refused(two, letters, tmp_path):
    values = values_of(two, letters, tmp_path / "out")
    values["seed_model"]["training"]["steps"] = 41
    with pytest.raises(ConfigError, match=f"seed_model is another than that of extends={two.config.root}"):
        stages.plan(opened(values))


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("train", {"random_clusters": True}, "the added text was not dealt to random clusters"),
        ("train", {"steps_by": "tokens"}, "use steps_by=equal"),
        ("train", {"cluster_token": True}, "has no token for another cluster"),
        ("cluster", {"path": "elsewhere"}, "cluster.path with extends="),
    ],
)
def test_what_cannot_be_extended_is_refused(two, letters, tmp_path, section, change, message):
    values = values_of(two, letters, tmp_path / "out", assign={"random_clusters": True})
    values[section] |= change
    with pytest.raises(ConfigError, match=message):
        opened(values)


def test_root_within_the_extended_run_is_refused(two, letters):
    with pytest.raises(ConfigError, match="nothing is written there; give the extended run a root of its own"):
        values_of(two, letters, Path(two.config.root) / "more")


def test_run_that_has_not_finished_is_refused(two, letters, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(two.config.root, copy)
    values = values_of(two, letters, tmp_path / "out", extends=str(copy))
    stages.plan(opened(values))  # a copy is as good, wherever it lies
    (copy / "experts/cluster-00001/manifest.json").unlink()
    with pytest.raises(ManifestError, match=f"extends={copy} has not finished: .*cluster-00001/manifest.json is not"):
        stages.plan(opened(values))


def test_expert_that_is_gone_is_not_trained_here(two, letters, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(two.config.root, copy)
    run = opened(values_of(two, letters, tmp_path / "out", extends=str(copy)))
    stages.plan(run)
    (copy / "experts/cluster-00001/model.safetensors").unlink()
    with pytest.raises(ManifestError, match=f"cluster-00001 is not there or not whole, and {run.config.root} takes it"):
        stages.train(run, Member("expert", 1))
    assert not (copy / "experts/cluster-00001/model.safetensors").exists()


def test_text_whose_files_have_the_names_of_the_others_is_refused(two, tmp_path):
    corpus = write_third_kind(tmp_path / "corpus", name="text")
    (corpus / "valid/small").mkdir()
    (corpus / "valid/00000").rename(corpus / "valid/small/00000")
    message = "valid/small/00000/text.jsonl has the same path as a file that the extended run validates on"
    with pytest.raises(DataError, match=message):
        stages.plan(opened(values_of(two, corpus, tmp_path / "out")))


def test_text_that_was_validated_on_is_not_trained_on(two, corpus, tmp_path):
    added = write_third_kind(tmp_path / "corpus")
    shutil.copyfile(corpus / "valid/small/00000/text.jsonl", added / "train/00000/again.jsonl")
    with pytest.raises(
        DataError, match=r"train/00000/again\.jsonl is training text here and has the content of valid/"
    ):
        stages.plan(opened(values_of(two, added, tmp_path / "out")))


def test_validation_text_that_has_changed_is_refused(two, corpus, letters, tmp_path):
    copy = tmp_path / "corpus"
    shutil.copytree(corpus, copy)
    base = Run(two.config.model_copy(update={"root": str(tmp_path / "copy"), "corpus": CorpusConfig(
        root=str(copy), validation_split="valid/small")}))  # fmt: skip
    shutil.copytree(two.config.root, base.config.root)
    stages.plan(base)  # the corpus has moved, its text is the same
    values = values_of(base, letters, tmp_path / "out")
    stages.plan(opened(values))
    with (copy / "valid/small/00000/text.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(DataError, match="which the extended run validated on, has changed since"):
        stages.plan(opened(values))


def test_whole_way_in_an_object_store(two, letters, bucket, tmp_path):
    for name, folder in (("two", two.config.root), ("letters", letters)):
        paths = [file.path for file in storage.list_files(str(folder)) if not file.path.startswith("logs/")]
        storage.upload(Path(folder), f"{bucket}/{name}", paths)
    values = values_of(two, letters, tmp_path) | {"extends": f"{bucket}/two", "root": f"{bucket}/three"}
    values["corpus"]["root"] = f"{bucket}/letters"
    run = opened(values)
    listed = [(file.path, file.version) for file in storage.list_files(f"{bucket}/two")]
    run_all(run)
    assert [(file.path, file.version) for file in storage.list_files(f"{bucket}/two")] == listed
    assert [row["cluster"] for row in run.result()["experts"]] == [0, 1, 2]
