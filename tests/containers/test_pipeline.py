"""The compiled pipeline in its images: everything in a bucket, tracked by a server; killed, cut off, and refused."""

import hashlib
import json
import re
import time
from typing import Any

import mlflow
import pytest
from container_servers import ObjectStore, TrackingServer, wait_until
from in_containers import ARTIFACTS, BUCKET, Containers, Running

pytestmark = [pytest.mark.containers, pytest.mark.timeout(600)]

MEMBERS = ("dense", "cluster-00000", "cluster-00001")
OTHER_USER = "123456:0"  # as OpenShift gives a namespace: no line in /etc/passwd, group 0


@pytest.fixture(scope="module")
def finished(containers: Containers) -> Running:
    """A run that nothing happened to."""
    return containers.run(containers.config("undisturbed"), "first")


def result_of(store: ObjectStore, root: str) -> dict[str, Any]:
    body = store.client().get_object(Bucket=BUCKET, Key=f"{root}/result.json")["Body"].read()
    result: dict[str, Any] = json.loads(body)
    del result["run"]
    return result


def has(store: ObjectStore, key: str) -> bool:
    found = store.client().list_objects_v2(Bucket=BUCKET, Prefix=key, MaxKeys=1)
    return bool(found.get("KeyCount"))


def versions(store: ObjectStore, root: str) -> dict[str, Any]:
    """When each object below a root was written."""
    pages = store.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{root}/")
    return {item["Key"]: item["LastModified"] for page in pages for item in page["Contents"]}


def newest_checkpoint(store: ObjectStore, root: str, member: str) -> int:
    """Step of a member's newest complete checkpoint; 0 where there is none."""
    prefix = f"{root}/checkpoints/{member}/step-"
    found = store.client().list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", ())
    steps = [int(item["Key"].removeprefix(prefix).split("/")[0]) for item in found if "manifest.json" in item["Key"]]
    return max(steps, default=0)


def test_manifests_tell_the_truth_about_every_object(finished, store):
    objects = store.objects(BUCKET, "undisturbed/")
    spoken_of = set()
    for key in (key for key in objects if key.rpartition("/")[2] == "manifest.json"):
        folder = key.removesuffix("manifest.json")
        for file in json.loads(objects[key])["files"]:
            body = objects[folder + file["path"]]
            assert (len(body), hashlib.sha256(body).hexdigest()) == (file["size"], file["sha256"]), file
            spoken_of.add(folder + file["path"])
    for member in MEMBERS:
        assert {f"experts/{member}/model.safetensors", f"scores/{member}/log_probs.npy"} <= spoken_of
    assert {"result.json", "report.html", "clusterer/domains.json"} <= spoken_of
    perplexities = [result_of(store, "undisturbed")[arm]["perplexity"] for arm in ("seed", "dense")]
    assert 1 < perplexities[1] < perplexities[0] < 500


def test_tracking_server_has_a_parent_with_a_child_for_each_model(finished, tracking, store):
    client = mlflow.MlflowClient(tracking.uri)
    experiment = client.get_experiment_by_name("cbtm")
    runs = client.search_runs([experiment.experiment_id], filter_string="tags.`mlflow.runName` LIKE 'undisturbed%'")
    by_name = {run.info.run_name: run for run in runs}
    parent = by_name.pop("undisturbed")
    assert {f"undisturbed/{name}" for name in ("seed", *MEMBERS, "ensemble")} <= set(by_name)
    for run in by_name.values():
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.info.status == "FINISHED"
    assert parent.info.status == "FINISHED"
    dense, ensemble = by_name["undisturbed/dense"], by_name["undisturbed/ensemble"]
    assert dense.data.metrics["eval/perplexity"] == pytest.approx(
        result_of(store, "undisturbed")["dense"]["perplexity"]
    )
    steps = [point.step for point in client.get_metric_history(dense.info.run_id, "train/loss")]
    assert steps == list(range(100, 1300, 100))
    # Through the server for those who look, and in the bucket where it keeps artifacts.
    report = store.objects(BUCKET, "undisturbed/report.html")[""]
    path = mlflow.artifacts.download_artifacts(
        run_id=ensemble.info.run_id, artifact_path="report.html", tracking_uri=tracking.uri
    )
    with open(path, "rb") as file:
        assert file.read() == report
    assert report in store.objects(ARTIFACTS).values()


def test_run_with_nothing_left_to_do_writes_nothing_and_takes_two_seconds_a_task(finished, containers, store):
    before = versions(store, "undisturbed")
    again = containers.run(containers.config("undisturbed"), "again", user=OTHER_USER)
    text = again.text()
    assert not re.findall(r"stage=\S+ root=\S+ files=\d+ done", text)
    after = versions(store, "undisturbed")
    assert {key for key in before | after if before.get(key) != after.get(key)} <= {"undisturbed/config.json"}
    n_tasks = len(re.findall(r"Executing task", text))
    assert n_tasks >= 14
    assert again.seconds / n_tasks < 2, (again.seconds, n_tasks)


def test_killed_expert_goes_on_from_its_checkpoint_and_an_outage_of_the_store_loses_nothing(
    finished, containers, store
):
    values = containers.config("disturbed")
    first = containers.start(values, "killed")
    wait_until(lambda: newest_checkpoint(store, "disturbed", "cluster-00000") > 0, 200, "a checkpoint", 0.05)
    victim = first.container("train_expert", "cluster-00000")
    assert victim is not None, first.tail()
    victim.kill()
    first.finish()
    # kfp may take a container that is gone for one that succeeded; what was written does not.
    assert not has(store, "disturbed/experts/cluster-00000/manifest.json")
    assert not has(store, "disturbed/manifest.json")
    assert first.process.returncode != 0, first.tail()

    killed_at = newest_checkpoint(store, "disturbed", "cluster-00000")

    # Another user and the same files: nothing in the bucket or the images belongs to one user.
    second = containers.start(values, "resumed", user=OTHER_USER, CBTM_S3_PATIENCE="120")
    wait_until(
        lambda: newest_checkpoint(store, "disturbed", "cluster-00000") > killed_at, 200, "a further checkpoint", 0.05
    )
    assert second.container("train_expert", "cluster-00000") is not None, second.tail()
    with store.stopped():
        time.sleep(20)
    second.finish()
    text = second.text()
    assert second.process.returncode == 0, second.tail()
    assert f"resumed at step={killed_at}/1200 from s3://{BUCKET}/disturbed/checkpoints/cluster-00000" in text
    assert re.search(r"warning: \S+ does not answer", text)
    assert re.search(r"answers again after [0-9.]+ s", text)
    assert result_of(store, "disturbed") == result_of(store, "undisturbed")
    assert not has(store, "disturbed/checkpoints/")


@pytest.mark.parametrize(
    ("bucket", "variables", "message"),
    [
        (BUCKET, {"AWS_SECRET_ACCESS_KEY": "0" * 40}, "error: .*the secret is wrong; check AWS_SECRET_ACCESS_KEY"),
        ("cbtm-nowhere", {}, "error: .*the bucket is not there; create it or correct the URI"),
    ],
    ids=["wrong secret", "missing bucket"],
)
def test_what_is_wrong_before_the_work_is_said_in_seconds(containers, bucket, variables, message):
    running = containers.start(containers.config("refused", bucket), f"on-{bucket}-{len(variables)}", **variables)
    running.finish()
    assert running.process.returncode != 0
    assert running.seconds < 30
    assert re.search(message, running.text()), running.tail()
    assert running.text().count("Executing task") == 1


def test_no_credential_is_written_anywhere(finished, containers, store: ObjectStore, tracking: TrackingServer):
    client = mlflow.MlflowClient(tracking.uri)
    runs = client.search_runs([client.get_experiment_by_name("cbtm").experiment_id])
    written = {
        "store's log": store.running.logs(),
        "MLflow's log": tracking.log.read_bytes(),
        "MLflow's runs": json.dumps([run.to_dictionary() for run in runs]).encode(),
        **{
            f"s3://{bucket}/{key}": body
            for bucket in (BUCKET, ARTIFACTS)
            for key, body in store.objects(bucket).items()
        },
        **{str(path): path.read_bytes() for path in containers.folder.rglob("*") if path.is_file()},
    }
    assert len(written) > 100
    secret = store.secret_key.encode()
    assert [name for name, content in written.items() if secret in content] == []
