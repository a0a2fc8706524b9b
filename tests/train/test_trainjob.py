"""The TrainJob of a training: what is in it, that it is one, and that the Kubeflow SDK would make and read the same."""

import json
import time

import pytest
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob
from kubernetes_server import unknown_fields

from cbtm.errors import ConfigError
from cbtm.kubernetes import connect
from cbtm.train.config import OptimizationConfig
from cbtm.train.trainjob import OwnPod, is_of, job_name, manifest

ROOT, KEY, RUN = "s3://bucket/run", "k" * 64, "r" * 64
TASK = "s3://bucket/run/nodes/cluster-00003/task.json"


def secret(name, key, of="cbtm-s3"):
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": of, "key": key, "optional": True}}}


OWN = {
    "metadata": {"name": "task-1", "labels": {"kueue.x-k8s.io/queue-name": "team-queue"}},
    "spec": {
        "containers": [
            {"name": "wait", "image": "argoexec"},
            {
                "name": "main",
                "image": "registry/cbtm@sha256:abc",
                "env": [
                    secret("AWS_ACCESS_KEY_ID", "AWS_ACCESS_KEY_ID"),
                    secret("MLFLOW_TRACKING_TOKEN", "token", "cbtm-tracking"),
                    {"name": "AWS_ENDPOINT_URL", "value": "http://store:9000"},
                    {"name": "AWS_SECRET_ACCESS_KEY", "value": "in plain text"},
                    {"name": "NCCL_DEBUG", "value": "INFO"},
                    {"name": "PET_NNODES", "value": "7"},
                    {"name": "AWS_WEB_IDENTITY_TOKEN_FILE", "value": "/var/run/secrets/token"},
                    {"name": "AWS_ROLE_ARN", "value": "arn:role"},
                    {"name": "KFP_POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
                ],
                "resources": {
                    "requests": {"cpu": "4", "memory": "32Gi", "nvidia.com/gpu": "1"},
                    "limits": {"cpu": "16", "memory": "64Gi", "nvidia.com/gpu": "1"},
                },
                "securityContext": {"runAsNonRoot": True},
            },
        ],
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "nodeSelector": {"pool": "a100"},
        "serviceAccountName": "pipeline-runner",
        "priority": 0,
    },
    "status": {},
}


def settings(**changes):
    values = {"steps": 10, "sequences_per_step": 8, "learning_rate": 1e-3, "nodes": 2, "devices": 4}
    return OptimizationConfig(**(values | changes))


def made(own=None, **changes):
    pod = OwnPod.of(own)
    return manifest(settings(**changes), pod, root=ROOT, member="cluster-00003", key=KEY, run_key=RUN, task_uri=TASK)


def pod_of(found):
    (patch,) = found["spec"]["runtimePatches"]
    (job,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    assert job["name"] == "node"
    return job["template"]["spec"]["template"]


@pytest.mark.parametrize(
    "changes",
    [
        {"node": {"image": "i"}},
        {
            "node": {
                "image": "i",
                "cpu": "8",
                "memory": "64Gi",
                "secret": "s",
                "queue": "q",
                "service_account": "a",
                "node_selector": {"pool": "h100"},
                "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
            }
        },
    ],
)
@pytest.mark.parametrize("own", [None, OWN])
def test_manifest_is_a_trainjob_of_the_api(own, changes):
    found = made(own, **changes)
    parsed = TrainerV1alpha1TrainJob.from_dict(found)
    assert unknown_fields(found, parsed.to_dict()) == []
    assert parsed.spec.trainer.num_nodes == 2
    assert parsed.spec.trainer.num_proc_per_node == 4


def test_a_field_that_the_api_does_not_have_would_be_seen():
    found = made(node={"image": "i"})
    pod_of(found)["spec"]["terminationGraceSeconds"] = 1
    assert unknown_fields(found, TrainerV1alpha1TrainJob.from_dict(found).to_dict()) == [
        "spec.runtimePatches[0].trainingRuntimeSpec.template.spec.replicatedJobs[0].template.spec.template.spec."
        "terminationGraceSeconds"
    ]


def test_machines_run_the_node_module_on_the_task():
    trainer = made(node={"image": "i"})["spec"]["trainer"]
    assert [*trainer["command"], *trainer["args"]] == ["python3", "-m", "cbtm.stages.node", TASK]
    assert trainer["resourcesPerNode"] == {
        "requests": {"nvidia.com/gpu": "4"},
        "limits": {"nvidia.com/gpu": "4"},
    }
    # On SIGTERM a machine has the ten minutes that a checkpoint may take, and one more.
    assert pod_of(made(node={"image": "i"}))["spec"]["terminationGracePeriodSeconds"] == 660


def test_machines_get_what_the_tasks_own_pod_has(caplog):
    found = made(OWN)
    trainer, pod = found["spec"]["trainer"], pod_of(found)["spec"]
    assert trainer["image"] == "registry/cbtm@sha256:abc"
    assert trainer["env"] == [
        secret("AWS_ACCESS_KEY_ID", "AWS_ACCESS_KEY_ID"),
        {"name": "AWS_ENDPOINT_URL", "value": "http://store:9000"},
        {"name": "NCCL_DEBUG", "value": "INFO"},
        {"name": "PYTHONUNBUFFERED", "value": "1"},
    ]
    assert trainer["resourcesPerNode"]["requests"] == {"cpu": "4", "memory": "32Gi", "nvidia.com/gpu": "4"}
    assert trainer["resourcesPerNode"]["limits"] == {"cpu": "16", "memory": "64Gi", "nvidia.com/gpu": "4"}
    assert pod["tolerations"] == [{"key": "gpu", "operator": "Exists"}]
    assert pod["nodeSelector"] == {"pool": "a100"}
    assert pod["serviceAccountName"] == "pipeline-runner"
    assert pod["containers"][0]["securityContext"] == {"runAsNonRoot": True}
    assert found["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-queue"
    assert "kueue.x-k8s.io/queue-name" not in pod_of(found)["metadata"]["labels"]
    assert "in plain text" not in json.dumps(found)
    assert caplog.messages == [
        "AWS_SECRET_ACCESS_KEY stands in this pod as plain text, and is not given to its machines; use a secret"
    ]


def test_settings_of_the_node_come_before_those_of_the_own_pod():
    node = {
        "image": "mine",
        "memory": "128Gi",
        "gpu_type": "amd.com/gpu",
        "shm_size": "16Gi",
        "tolerations": [],
        "node_selector": {"pool": "h100"},
        "service_account": "trainer",
        "secret": "mine",
        "queue": "other",
    }
    found = made(OWN, node=node)
    trainer, pod = found["spec"]["trainer"], pod_of(found)["spec"]
    assert trainer["image"] == "mine"
    assert trainer["resourcesPerNode"]["limits"] == {"cpu": "16", "memory": "128Gi", "amd.com/gpu": "4"}
    by_name = {one["name"]: one for one in trainer["env"]}
    assert by_name["AWS_ACCESS_KEY_ID"] == secret("AWS_ACCESS_KEY_ID", "AWS_ACCESS_KEY_ID", "mine")
    assert by_name["AWS_ENDPOINT_URL"] == secret("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL", "mine")
    assert pod["tolerations"] == []
    assert pod["nodeSelector"] == {"pool": "h100"}
    assert pod["serviceAccountName"] == "trainer"
    assert pod["volumes"] == [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}}]
    assert found["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "other"


def test_no_gpu_is_asked_for_on_the_cpu():
    assert made(OWN, device="cpu")["spec"]["trainer"]["resourcesPerNode"]["limits"] == {"cpu": "16", "memory": "64Gi"}


def test_image_has_to_come_from_somewhere():
    with pytest.raises(ConfigError, match=r"train\.node\.image is needed where the training is not started from a pod"):
        made()


def test_name_is_that_of_the_place_and_fits_the_names_of_its_pods():
    assert job_name(ROOT, "cluster-00003") == job_name(ROOT, "cluster-00003")
    assert (
        len({job_name(ROOT, "cluster-00003"), job_name(ROOT, "cluster-00004"), job_name("s3://b", "cluster-00003")})
        == 3
    )
    # A pod's host name has at most 63 characters: its own, and `-node-0-99999` behind it.
    assert len(job_name(ROOT, "cluster-00003") + "-node-0-99999") <= 63


def test_trainjob_of_another_training_or_other_settings_is_another():
    one = made(node={"image": "i"})
    assert is_of(json.loads(json.dumps(one)), one)
    assert not is_of(made(node={"image": "j"}), one)
    assert not is_of(made(node={"image": "i"}, nodes=4), one)
    other = manifest(
        settings(node={"image": "i"}),
        OwnPod(),
        root=ROOT,
        member="cluster-00003",
        key="l" * 64,
        run_key=RUN,
        task_uri=TASK,
    )
    assert not is_of(other, one)
    assert not is_of({"metadata": {"name": "somebody's"}}, one)


# --- the Kubeflow SDK as a peer ---


@pytest.fixture
def sdk(kubernetes, monkeypatch):
    from kubeflow.common.types import KubernetesBackendConfig
    from kubeflow.trainer import TrainerClient

    container = {"name": "node", "image": "pytorch", "resources": {}}
    labels = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    job = {"name": "node", "template": {"metadata": {"labels": labels}}}
    job["template"]["spec"] = {"template": {"spec": {"containers": [container]}}}
    kubernetes.others["/apis/trainer.kubeflow.org/v1alpha1/clustertrainingruntimes/torch-distributed"] = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "ClusterTrainingRuntime",
        "metadata": {"name": "torch-distributed", "labels": {"trainer.kubeflow.org/framework": "torch"}},
        "spec": {"mlPolicy": {"numNodes": 1, "torch": {}}, "template": {"spec": {"replicatedJobs": [job]}}},
    }
    settings = connect(None)._core.api_client.configuration
    return TrainerClient(KubernetesBackendConfig(namespace="team", client_configuration=settings))


def test_sdk_makes_the_same_of_what_it_can_say(sdk, kubernetes):
    from kubeflow.trainer import CustomTrainerContainer
    from kubeflow.trainer.options import Name
    from kubeflow.trainer.options.kubernetes import (
        ContainerPatch,
        JobSetSpecPatch,
        JobSetTemplatePatch,
        JobSpecPatch,
        JobTemplatePatch,
        Labels,
        PodSpecPatch,
        PodTemplatePatch,
        ReplicatedJobPatch,
        RuntimePatch,
        TrainerArgs,
        TrainerCommand,
        TrainingRuntimeSpecPatch,
    )

    node = {"image": "i", "cpu": "8", "memory": "64Gi", "node_selector": {"pool": "h100"}, "service_account": "a"}
    ours = made(node=node)
    pod = pod_of(ours)
    spec = PodSpecPatch(
        service_account_name="a",
        node_selector={"pool": "h100"},
        volumes=pod["spec"]["volumes"],
        containers=[ContainerPatch("node", volume_mounts=pod["spec"]["containers"][0]["volumeMounts"])],
    )
    template = PodTemplatePatch(metadata=pod["metadata"], spec=spec)
    job = ReplicatedJobPatch("node", JobTemplatePatch(spec=JobSpecPatch(template=template)))
    patch = RuntimePatch(TrainingRuntimeSpecPatch(JobSetTemplatePatch(spec=JobSetSpecPatch([job]))))
    trainer = ours["spec"]["trainer"]
    kubernetes.waiting = {"reason": "ContainerCreating", "message": ""}
    sdk.train(
        runtime="torch-distributed",
        trainer=CustomTrainerContainer(
            image="i",
            num_nodes=2,
            resources_per_node={"cpu": "8", "memory": "64Gi", "gpu": "4"},
            env={"PYTHONUNBUFFERED": "1"},
        ),
        options=[
            Name(ours["metadata"]["name"]),
            Labels(ours["metadata"]["labels"]),
            TrainerCommand(trainer["command"]),
            TrainerArgs(trainer["args"]),
            patch,
        ],
    )
    (theirs,) = kubernetes.posted
    # What it cannot say: how many processes, how long a pod has to save, to whom the patch belongs, and what for.
    del trainer["numProcPerNode"]
    del pod["spec"]["terminationGracePeriodSeconds"]
    del ours["spec"]["runtimeRef"]["apiGroup"]  # its default
    ours["spec"]["runtimePatches"][0]["manager"] = theirs["spec"]["runtimePatches"][0]["manager"]
    del ours["metadata"]["annotations"]
    for kind in ("requests", "limits"):
        mine, yours = (one["spec"]["trainer"]["resourcesPerNode"][kind] for one in (ours, theirs))
        assert {name: str(amount) for name, amount in yours.items()} == mine
        theirs["spec"]["trainer"]["resourcesPerNode"][kind] = mine
    assert theirs == ours


def test_sdk_reads_our_trainjob_and_its_log(sdk, kubernetes):
    found = made(node={"image": "i"}, devices=1)
    found["spec"]["trainer"] |= {"command": ["python3", "-c", "print('trained')"], "args": []}
    assert connect(None).create(found)
    name = found["metadata"]["name"]
    until = time.monotonic() + 20
    while not all(pod.ended for pod in kubernetes.pods):
        assert time.monotonic() < until
        time.sleep(0.05)
    job = sdk.get_job(name)
    assert (job.name, job.num_nodes, job.status) == (name, 2, "Complete")
    assert sorted(step.name for step in job.steps) == ["node-0", "node-1"]
    assert list(sdk.get_job_logs(name, step="node-1")) == ["trained"]
