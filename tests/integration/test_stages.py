"""All stages in one process: what they write, that they are idempotent, and what they refuse."""

import gzip
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from small import settings

from cbtm import s3, stages, storage
from cbtm.cluster.clusterer import Clusterer
from cbtm.errors import ConfigError, DataError, ManifestError, StorageError
from cbtm.manifest import run_stage
from cbtm.merge.validation_set import selection_documents
from cbtm.plan import Part
from cbtm.run import Run
from cbtm.run_config import RunConfig, parse_config
from cbtm.stages import prepare
from cbtm.tokens import TokenDocuments
from cbtm.train.member import Member


def make_run(values: dict[str, Any]) -> Run:
    return Run(parse_config(json.dumps(values)))


def run_all(run: Run) -> list[str]:
    stages.plan(run)
    return [task.run().digest for task in stages.tasks(run)]


@pytest.fixture(scope="module")
def made(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run."""
    run = make_run(settings(str(corpus), str(tmp_path_factory.mktemp("run") / "out"), None))
    run_all(run)
    return run


@pytest.fixture
def copy(made: Run, tmp_path: Path) -> Run:
    """A copy of the finished run, to be damaged."""
    root = tmp_path / "copy"
    shutil.copytree(made.config.root, root)
    return Run(made.config.model_copy(update={"root": str(root)}))


def test_result_has_the_contract(made):
    result = made.result()
    assert set(result) >= {
        "corpus", "n_clusters", "tokens_per_arm", "n_documents", "n_tokens", "dense", "random", "seed", "ensemble",
        "experts",
    }  # fmt: skip
    assert result["n_clusters"] == 2
    assert result["tokens_per_arm"] == 20 * 4 * 48
    assert result["corpus"]["train_documents"] == 160
    assert result["n_documents"] + result["selection"]["n_documents"] == 40
    for row in result["ensemble"]:
        assert set(row) >= {
            "ensemble", "distance_power", "temperature", "top_k", "perplexity", "bits_per_byte"
        }  # fmt: skip
    # Two exponents, two temperatures, top-2 and top-1 by distance and by distance and probability; top-2 and top-1 by
    # probability, by the last token or by all; the uniform mean, the prior, and the oracle.
    assert len(result["ensemble"]) == 2 * (2 * 2 * 2) + 2 * 2 + 3
    assert [expert["cluster"] for expert in result["experts"]] == [0, 1]
    assert sum(expert["documents"] for expert in result["experts"]) == 160


def test_every_arm_sees_the_same_tokens(made):
    facts = {
        member.name: json.loads((Path(made.member_root(member)) / "expert.json").read_text())
        for member in made.config.members
    }
    budget = made.result()["tokens_per_arm"]
    assert facts["dense"]["tokens_seen"] == budget
    assert facts["cluster-00000"]["tokens_seen"] + facts["cluster-00001"]["tokens_seen"] == budget
    assert facts["random-00000"]["tokens_seen"] + facts["random-00001"]["tokens_seen"] == budget
    assert {fact["steps"] for fact in facts.values()} == {20}


def test_dense_and_both_partitions_hold_the_same_documents(made, tmp_path):
    def ids(member: Member) -> list[str]:
        return [record.sp_id for record in TokenDocuments(made.train_shards(member, tmp_path)).records()]

    dense = sorted(ids(Member("dense")))
    assert len(dense) == len(set(dense)) == 160
    assert sorted(ids(Member("expert", 0)) + ids(Member("expert", 1))) == dense
    assert sorted(ids(Member("random", 0)) + ids(Member("random", 1))) == dense
    assert abs(len(ids(Member("random", 0))) - 80) <= 1


def test_assignment_lines_name_every_document_once(made, corpus):
    for shard in ("train/00000", "train/00001", "valid/small/00000"):
        lines = (Path(made.config.root) / "assignments" / shard / "text.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        n_documents = len((corpus / shard / "text.jsonl").read_text().splitlines())
        assert [record["sp_id"] for record in records] == [f"{shard}/text.jsonl|{i}" for i in range(n_documents)]
        assert {record["cluster"] for record in records} <= {0, 1}


def test_single_expert_perplexity_is_that_of_its_scores(made):
    offsets = np.load(made.uri("scores/cluster-00001/offsets.npy"))
    scores = np.load(made.uri("scores/cluster-00001/log_probs.npy"))
    reported = np.concatenate([scores[offsets[i] : offsets[i + 1]] for i in np.flatnonzero(~selection_documents(40))])
    expected = np.exp(-reported.mean(dtype=np.float64))
    assert made.result()["experts"][1]["perplexity"] == pytest.approx(expected, rel=1e-6)


def test_experts_open_with_transformers(made):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = made.member_root(Member("expert", 1))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.vocab_size == 500
    assert tokenizer.decode(tokenizer("def f(x):")["input_ids"]).endswith("def f(x):")


def test_report_is_one_page_with_the_figures(made):
    page = Path(made.uri("report.html")).read_text()
    assert "<svg" in page
    assert f"{made.result()['dense']['perplexity']:.1f}" in page


def test_second_run_builds_nothing(made):
    before = {path: path.stat().st_mtime_ns for path in Path(made.config.root).rglob("*") if path.is_file()}
    assert stages.finished(made)
    run_all(make_run(made.config.model_dump(mode="json")))
    after = {path: path.stat().st_mtime_ns for path in before}
    assert {path.name for path in before if before[path] != after[path]} <= {"config.json", "lock"}


def test_same_configuration_gives_the_same_result_elsewhere(made, corpus, tmp_path):
    again = make_run(settings(str(corpus), str(tmp_path / "again"), None))
    run_all(again)
    first, second = made.result(), again.result()
    for result in (first, second):
        del result["run"]
    assert first == second


def test_changed_setting_rebuilds_what_depends_on_it_and_nothing_else(copy):
    changed = Run(copy.config.model_copy(update={"evaluate": copy.config.evaluate.model_copy(update={"top_k": (1,)})}))
    assert not stages.finished(changed)
    scores = Path(copy.uri("scores/dense/manifest.json")).stat().st_mtime_ns
    run_all(changed)
    assert Path(copy.uri("scores/dense/manifest.json")).stat().st_mtime_ns == scores
    assert {row["top_k"] for row in changed.result()["ensemble"] if row["ensemble"] == "clustering"} == {1}


def test_changed_text_is_noticed(made, corpus, tmp_path):
    moved = tmp_path / "corpus"
    shutil.copytree(corpus, moved)
    root = tmp_path / "run"
    shutil.copytree(made.config.root, root)
    values = settings(str(moved), str(root), None)
    assert stages.finished(make_run(values))  # the corpus may move
    lines = (moved / "train/00000/text.jsonl").read_text().splitlines()
    (moved / "train/00000/text.jsonl").write_text("\n".join(lines[1:]) + "\n")
    assert not stages.finished(make_run(values))


# --- clusters that are given ---


def prepare_text(values: dict[str, Any]) -> Run:
    """Tokenizer, clusterer and assignment of a run; no model is trained."""
    run = make_run(values)
    stages.plan(run)
    stages.tokenizer(run)
    stages.cluster(run)
    for group in run.plan_made.groups:
        stages.assign(run, group.name)
    return run


def files_below(root: str, *folders: str) -> dict[str, bytes]:
    paths = [path for folder in folders for path in (Path(root) / folder).rglob("*") if path.is_file()]
    assert paths
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


def assigned(run: Run, part: Part) -> list[int]:
    """Clusters of all documents in reading order."""
    texts = [Path(run.uri("assignments", path)).read_text() for path in run.paths(part)]
    return [json.loads(line)["cluster"] for text in texts for line in text.splitlines()]


def with_clusters(values: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return values | {"cluster": values["cluster"] | changes}


def test_assignments_of_another_run_give_its_training_shards_again(made, corpus, tmp_path):
    values = settings(str(corpus), str(tmp_path / "out"), None)
    run = prepare_text(with_clusters(values, assignments=made.uri("assignments")))
    training = ("assignments/train", "tokens/learned/train", "tokens/random/train")
    assert files_below(run.config.root, *training) == files_below(made.config.root, *training)
    facts = run.load(run.cluster_spec()).metadata
    assert facts["sizes"] == [expert["documents"] for expert in made.result()["experts"]]
    # The centres are the means of these clusters, and a validation document goes to the nearest.
    clusterer = Clusterer.load(Path(run.uri("clusterer")))
    texts = [document.text for document in run.documents("train")]
    vectors, own = clusterer.embedder.transform(texts), np.array(assigned(run, "train"))
    means = np.stack([vectors[own == cluster].mean(axis=0) for cluster in (0, 1)])
    np.testing.assert_allclose(clusterer.centers, means, atol=1e-5)
    nearest = clusterer.predict(document.text for document in run.documents("validation"))
    assert assigned(run, "validation") == nearest.tolist()


def test_labels_describe_the_domains_and_build_nothing_else_again(corpus, tmp_path):
    def write_labels(name: str) -> None:
        for path in run.paths("train"):
            target = tmp_path / "labels" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps({"sp_id": f"{path}|{i}", "domain": ("prose", name)[i % 2]}) + "\n" for i in range(80)]
            target.write_text("".join(lines))

    values = settings(str(corpus), str(tmp_path / "out"), None)
    run = prepare_text(values)
    assigned_at = {path: path.stat().st_mtime_ns for path in Path(run.uri("manifests/assign")).iterdir()}
    write_labels("code")
    labelled = prepare_text(with_clusters(values, labels=str(tmp_path / "labels"), examples=1))
    first = labelled.load(labelled.cluster_spec())
    assert first.metadata["purity"] > 0.8
    assert {path: path.stat().st_mtime_ns for path in assigned_at} == assigned_at
    assert labelled.clusterer_digest == run.clusterer_digest
    # Labels are known by their content.
    write_labels("prose")
    with pytest.raises(DataError, match="label"):
        prepare_text(with_clusters(values, labels=str(tmp_path / "nowhere")))
    second = prepare_text(with_clusters(values, labels=str(tmp_path / "labels"), examples=1))
    assert second.load(second.cluster_spec()).metadata["purity"] == 1
    assert {path: path.stat().st_mtime_ns for path in assigned_at} == assigned_at


def test_one_changed_assignment_makes_the_clusterer_again(made, corpus, tmp_path):
    given = tmp_path / "given"
    shutil.copytree(made.uri("assignments"), given)
    values = with_clusters(settings(str(corpus), str(tmp_path / "out"), None), assignments=str(given))
    run = prepare_text(values)
    before = run.load(run.cluster_spec())
    first = given / "train/00001/text.jsonl"
    lines = first.read_text().splitlines(keepends=True)
    record = json.loads(lines[7])
    lines[7] = json.dumps(record | {"cluster": 1 - record["cluster"]}) + "\n"
    first.write_text("".join(lines))
    again = make_run(values)
    with pytest.raises(ManifestError, match=r"clusterer/manifest\.json belongs to another .* run stage cluster again"):
        again.load(again.cluster_spec())
    run = prepare_text(values)
    after = run.load(run.cluster_spec())
    assert after.inputs["assignments"] != before.inputs["assignments"]
    sizes = before.metadata["sizes"]
    moved = 1 if record["cluster"] == 0 else -1
    assert after.metadata["sizes"] == [sizes[0] - moved, sizes[1] + moved]
    assert (Path(run.uri("assignments/train/00001/text.jsonl"))).read_text() == "".join(
        json.dumps(json.loads(line), separators=(",", ":")) + "\n" for line in lines
    )
    # What was there before is taken over: nothing is built a third time.
    built = Path(run.uri("clusterer/manifest.json")).stat().st_mtime_ns
    prepare_text(values)
    assert Path(run.uri("clusterer/manifest.json")).stat().st_mtime_ns == built


def test_documents_without_given_cluster_are_left_out_and_counted(made, corpus, tmp_path):
    given = tmp_path / "given"
    shutil.copytree(made.uri("assignments"), given)
    first = given / "train/00000/text.jsonl"
    first.write_text("".join(first.read_text().splitlines(keepends=True)[5:]))
    values = with_clusters(settings(str(corpus), str(tmp_path / "out"), None), assignments=str(given))
    run = prepare_text(values)
    facts = [run.load(run.assign_spec(group.name)).metadata for group in run.plan_made.part("train")]
    assert sum(fact["documents"] for fact in facts) == 155
    assert [fact["skipped"] for fact in facts if fact["skipped"]] == [{"no fixed assignment": 5}]
    assert run.load(run.cluster_spec()).metadata["documents"] == 155


def test_clusterer_of_another_run_gives_its_clusters_again(made, corpus, tmp_path):
    values = with_clusters(settings(str(corpus), str(tmp_path / "out"), None), path=made.uri("clusterer"))
    run = prepare_text(values)
    for name in ("centers.safetensors", "embedder.json", "embedder.safetensors"):
        assert Path(run.uri("clusterer", name)).read_bytes() == Path(made.uri("clusterer", name)).read_bytes()
    assert files_below(run.config.root, "assignments", "tokens") == files_below(
        made.config.root, "assignments", "tokens"
    )
    facts = run.load(run.cluster_spec()).metadata
    assert facts["sizes"] == [expert["documents"] for expert in made.result()["experts"]]  # nearest, as assigned


def test_clusterer_of_another_number_of_clusters_is_refused(made, corpus, tmp_path):
    values = with_clusters(settings(str(corpus), str(tmp_path / "out"), None), path=made.uri("clusterer"), n_clusters=4)
    run = make_run(values)
    with pytest.raises(ConfigError, match=r"cluster\.n_clusters=4, but the .*clusterer .*has 2"):
        prepare_text(values)
    assert not Path(run.uri("clusterer/manifest.json")).exists()


def test_changed_clusterer_is_refused(made, corpus, tmp_path):
    given = tmp_path / "given"
    shutil.copytree(made.uri("clusterer"), given)
    text = (given / "embedder.json").read_text()
    (given / "embedder.json").write_text(text.replace('"argument"', '"argumenu"'))
    with pytest.raises(ManifestError, match=r"embedder\.json was changed or cut short"):
        prepare_text(with_clusters(settings(str(corpus), str(tmp_path / "out"), None), path=str(given)))


def test_clusters_of_equal_tokens_are_fitted_with_the_tokens_of_the_run(made, corpus, tmp_path):
    run = prepare_text(with_clusters(settings(str(corpus), str(tmp_path / "out"), None), balance="tokens"))
    facts = run.load(run.cluster_spec()).metadata
    lengths = TokenDocuments(made.train_shards(Member("dense"), tmp_path)).lengths()
    assert sum(facts["tokens"]) == lengths.sum()
    assert abs(facts["tokens"][0] - lengths.sum() / 2) < lengths.max()


def test_assigner_that_is_killed_while_it_publishes_loses_no_file(made, corpus, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    write = storage.write_bytes

    def write_no_manifest(uri: str, data: bytes) -> None:
        if "manifests/assign" in uri:
            raise Killed
        write(uri, data)

    values = settings(str(corpus), str(tmp_path / "out"), None)
    monkeypatch.setattr(storage, "write_bytes", write_no_manifest)
    with pytest.raises(Killed):
        prepare_text(values)
    monkeypatch.undo()
    assert Path(values["root"], "assignments/train/00000/text.jsonl").exists()  # moved to where it belongs
    run = prepare_text(values)
    for group in run.plan_made.groups:
        found, whole = run.load(run.assign_spec(group.name)), made.load(made.assign_spec(group.name))
        assert found.files == whole.files


# --- bad input ---


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"corpus": {"root": "/nowhere/at/all"}}, DataError, "no corpus files below /nowhere/at/all/train"),
        (
            {"cluster": {"n_clusters": 161}, "train": {"sequences_per_step": 161}},
            ConfigError,
            "number of documents 160",
        ),
        ({"train": {"sequences_per_step": 3}}, ConfigError, "use 4 or 2"),
        ({"score": {"stride": 49}}, ConfigError, "score.stride=49 is larger than train.context_length=48"),
        ({"train": {"context_length": 32}}, ConfigError, "context_length=48 differs from train.context_length=32"),
        ({"seed_model": {"path": "/no/such/model"}}, ConfigError, "/no/such/model"),
        ({"root": "/proc/cbtm"}, StorageError, "/proc/cbtm"),
    ],
)
def test_refused_before_any_model_is_trained(corpus, tmp_path, change, error, message):
    values = settings(str(corpus), str(tmp_path / "out"), None)
    for section, fields in change.items():
        if section == "root":
            values["root"] = fields
        elif section == "seed_model":
            values[section] = fields
        else:
            values[section] = values[section] | fields
    with pytest.raises(error, match=message):
        run_all(make_run(values))
    assert not list(tmp_path.rglob("seed/manifest.json"))
    assert not list(tmp_path.rglob("clusterer/manifest.json"))


def test_typo_in_a_key_is_refused_with_the_nearest_name(corpus, tmp_path):
    values = settings(str(corpus), str(tmp_path), None)
    values["train"]["lerning_rate"] = 1e-3
    with pytest.raises(ConfigError, match=r"unknown key 'train.lerning_rate'; did you mean 'learning_rate'"):
        parse_config(json.dumps(values))


def test_bad_lines_are_counted_and_beyond_the_limit_refused(corpus, tmp_path):
    bad = tmp_path / "corpus"
    shutil.copytree(corpus, bad)
    with (bad / "train/00001/text.jsonl").open("a") as file:
        file.write('not json\n{"no": "text"}\n{"text": ""}\n')
    values = settings(str(bad), str(tmp_path / "out"), None)
    run = make_run(values)
    stages.plan(run)
    stages.tokenizer(run)
    facts = stages.cluster(run).metadata
    assert facts["documents"] == 160
    assert facts["skipped"] == {"not JSON with a text": 2, "empty text": 1}
    values["corpus"]["max_bad_lines"] = 1
    values["root"] = str(tmp_path / "strict")
    strict = make_run(values)
    stages.plan(strict)
    with pytest.raises(DataError, match=r"text\.jsonl, line 82: .* more than corpus\.max_bad_lines=1"):
        stages.cluster(strict)


def test_a_file_beside_its_compressed_self_is_refused(corpus, tmp_path):
    doubled = tmp_path / "corpus"
    shutil.copytree(corpus, doubled)
    (doubled / "train/00000/text.jsonl.gz").write_bytes(gzip.compress(b'{"text": "again"}\n'))
    with pytest.raises(DataError, match=r"text\.jsonl\.gz and .*text\.jsonl are one file in two forms"):
        stages.plan(make_run(settings(str(doubled), str(tmp_path / "out"), None)))


def test_tokenizer_that_does_not_fit_the_seed_model_is_refused(made, corpus, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(made.member_root(Member("seed")), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 400}))
    values = settings(str(corpus), str(tmp_path / "out"), None) | {"seed_model": {"path": str(folder)}}
    with pytest.raises(ConfigError, match=r"tokenizer has 500 entries but the seed model's vocabulary is 400"):
        stages.plan(make_run(values))


def test_given_seed_model_is_taken_over_with_its_tokenizer(made, corpus, tmp_path):
    values = settings(str(corpus), str(tmp_path / "out"), None)
    values["seed_model"] = {"path": made.member_root(Member("seed"))}
    run = make_run(values)
    run_all(run)
    assert run.result()["seed"]["perplexity"] == pytest.approx(made.result()["seed"]["perplexity"], rel=1e-6)


def test_cluster_without_documents_is_refused_and_never_trained_on_everything(corpus, tmp_path):
    def far_centre(work: Path) -> dict[str, Any]:
        facts = prepare.cluster(run, work)
        clusterer = Clusterer.load(work)
        clusterer.centers[1] = 100.0  # nothing on the unit sphere is near
        clusterer.save(work, json.loads((work / "domains.json").read_text()))
        return facts

    run = make_run(settings(str(corpus), str(tmp_path / "out"), None))
    stages.plan(run)
    stages.tokenizer(run)
    run_stage(run.cluster_spec(), far_centre)
    for group in run.plan_made.groups:
        stages.assign(run, group.name)
    stages.train(run, Member("seed"))
    with pytest.raises(DataError, match="0 documents with 0 tokens are less than one block of context_length=48"):
        stages.train(run, Member("expert", 1))
    assert not Path(run.member_root(Member("expert", 1)), "manifest.json").exists()


def test_expert_of_another_clusterer_is_refused(copy):
    path = Path(copy.member_root(Member("expert", 1)), "expert.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"clusterer_digest": "0" * 64}))
    Path(copy.uri("manifest.json")).unlink()
    with pytest.raises(ManifestError, match="weights would go to the wrong experts"):
        stages.evaluate(copy)
    assert not Path(copy.uri("manifest.json")).exists()


def test_experts_in_the_wrong_folders_are_refused(copy):
    first, second = (Path(copy.member_root(Member("expert", cluster)), "expert.json") for cluster in (0, 1))
    texts = first.read_text(), second.read_text()
    first.write_text(texts[1])
    second.write_text(texts[0])
    Path(copy.uri("manifest.json")).unlink()
    with pytest.raises(ManifestError, match="is the expert of cluster 1, not of 0"):
        stages.evaluate(copy)


def test_scores_that_were_changed_are_refused(copy):
    path = Path(copy.uri("scores/dense/log_probs.npy"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    Path(copy.uri("manifest.json")).unlink()
    with pytest.raises(ManifestError, match="changed or cut short"):
        stages.evaluate(copy)


# --- the same through S3 ---


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "testkey")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testsecret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3.client.cache_clear()
        boto3.client("s3").create_bucket(Bucket="cbtm-test")
        yield "s3://cbtm-test"
    s3.client.cache_clear()
    server.stop()


def test_run_in_a_bucket_gives_the_same_result(made, corpus, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("CBTM_SCRATCH", str(tmp_path / "scratch"))
    paths = [file.path for file in storage.list_files(str(corpus))]
    storage.upload(corpus, f"{bucket}/corpus", paths)
    run = make_run(settings(f"{bucket}/corpus", f"{bucket}/runs/small", None))
    run_all(run)
    assert stages.finished(run)
    local, remote = made.result(), run.result()
    for name in ("seed", "dense", "random"):
        assert remote[name]["perplexity"] == local[name]["perplexity"]
    assert storage.exists(f"{bucket}/runs/small/report.html")
    assert not any("checkpoints" in file.path for file in storage.list_files(f"{bucket}/runs/small"))
    assert not list((tmp_path / "scratch").rglob("*.safetensors"))  # nothing stays on the pod's disk


def test_missing_bucket_fails_at_once_and_says_so(corpus, bucket):
    run = make_run(settings(str(corpus), "s3://no-such-bucket/run", None))
    with pytest.raises(StorageError, match="the bucket is not there"):
        stages.plan(run)


def test_configuration_is_closed():
    with pytest.raises(ConfigError, match=r"'root' is missing.*'corpus' is missing|'root' is missing"):
        RunConfig.parse({})
