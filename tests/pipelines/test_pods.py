"""What the compiled pipeline asks of a cluster, read from both of its documents as KFP's driver reads them."""

from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format
from kfp import compiler, dsl, kubernetes
from kfp.kubernetes import kubernetes_executor_config_pb2
from kfp.pipeline_spec import pipeline_spec_pb2
from pipeline_files import FROM_A_TASK, PipelineFile, Place

from cbtm.kubeflow.pipeline_file import shipped_pipeline
from pipelines import cbtm, compare
from pipelines.pods import Options, named

GPU_TASKS = {
    "cbtm": {
        "check-gpus",
        "train-seed",
        "score-seed",
        "experts/for-loop-1/train-expert",
        "experts/for-loop-1/score-expert",
        "average-experts",
    },
    "compare": {
        "check-gpus",
        "train-seed",
        "score-seed",
        "arms/for-loop-1/experts/for-loop-1/train-expert",
        "arms/for-loop-1/experts/for-loop-1/score-expert",
    },
}
CPU_TASKS = {
    "cbtm": {
        "check-cluster",
        "plan-run",
        "build-tokenizer",
        "fit-clusterer",
        "assign/for-loop-1/assign-shards",
        "evaluate-ensembles",
    },
    "compare": {
        "check-cluster",
        "plan-comparison",
        "plan-run",
        "build-tokenizer",
        "fit-clusterer",
        "assign/for-loop-1/assign-shards",
        "arms/for-loop-1/configure-arm",
        "arms/for-loop-1/plan-arm",
        "arms/for-loop-1/fit-arm",
        "arms/for-loop-1/assign-arm/for-loop-1/assign-arm-shards",
        "arms/for-loop-1/evaluate-ensembles",
        "compare-arms",
    },
}
RESOURCES = {
    "resourceCpuRequest": "cpu_request",
    "resourceCpuLimit": "cpu_limit",
    "resourceMemoryRequest": "memory_request",
    "resourceMemoryLimit": "memory_limit",
}
S3 = {
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_ENDPOINT_URL",
    "AWS_DEFAULT_REGION",
}
TRACKING = {"MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"}
HUB = {"HF_TOKEN"}
TRACKED = {"check-cluster", "plan-run", "plan-arm", "train-seed", "train-expert", "evaluate-ensembles", "compare-arms"}
FETCH_FROM_THE_HUB = {"plan-run", "plan-arm", "build-tokenizer", "train-seed"}
LOOPS = {"cbtm": 2, "compare": 4}


@pytest.fixture(scope="module", params=["cbtm", "compare"])
def pipeline(request: pytest.FixtureRequest) -> str:
    """Name of a pipeline that comes with cbtm."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def file(pipeline: str) -> PipelineFile:
    return PipelineFile(shipped_pipeline(pipeline))


@pytest.fixture(scope="module")
def other(pipeline: str, tmp_path_factory: pytest.TempPathFactory) -> PipelineFile:
    """The pipeline compiled with every option set."""
    options = Options(parallelism=3, shm_size="2Gi", queue="gpu-queue")
    return compiled({"cbtm": cbtm, "compare": compare}[pipeline].build(options), tmp_path_factory.mktemp("other"))


@pytest.fixture(scope="module")
def gpu_tasks(pipeline: str) -> set[str]:
    """Paths of the tasks whose pods have GPUs."""
    return GPU_TASKS[pipeline]


@pytest.fixture(scope="module")
def cpu_tasks(pipeline: str) -> set[str]:
    """Paths of the others."""
    return CPU_TASKS[pipeline]


def compiled(pipeline: Any, folder: Path) -> PipelineFile:
    compiler.Compiler().compile(pipeline, str(folder / "pipeline.yaml"))
    return PipelineFile.read(folder / "pipeline.yaml")


def each(file: PipelineFile, names: set[str]) -> list[Place]:
    leaves = file.leaves()
    return [leaves[name] for name in sorted(names)]


def name_of(path: str) -> str:
    return path.rpartition("/")[2]


def test_these_are_all_the_pods(file, gpu_tasks, cpu_tasks):
    assert set(file.leaves()) == gpu_tasks | cpu_tasks


def test_every_field_is_known_to_kubeflow_in_both_documents(file):
    json_format.ParseDict(file.spec, pipeline_spec_pb2.PipelineSpec())
    json_format.ParseDict(file.platform, pipeline_spec_pb2.PlatformSpec())
    executors = file.platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for config in executors.values():
        json_format.ParseDict(config, kubernetes_executor_config_pb2.KubernetesExecutorConfig())
    assert set(executors) == set(file.spec["deploymentSpec"]["executors"])


def test_every_parameter_of_a_dag_is_among_its_inputs(file, other):
    assert file.dangling() == []
    assert other.dangling() == []


def test_kfp_loses_a_parameter_that_only_a_resource_setting_names(tmp_path):
    """The defect of KFP 2.17.0 that `pods.fit` works round; where this fails it is mended."""

    @dsl.component(base_image="python", install_kfp_package=False)
    def work(item: str) -> None: ...

    def pipeline_with(register: bool) -> Any:
        @dsl.pipeline(name="loop")
        def loop(items: list[str], memory: str) -> None:
            with dsl.ParallelFor(items) as item:
                task = work(item=item).set_memory_limit(memory)
                if register:
                    task.register_pipeline_channels([memory])

        return loop

    lost = compiled(pipeline_with(register=False), tmp_path).dangling()
    assert lost == ["comp-for-loop-1/work: pipelinechannel--memory from pipelinechannel--memory"]
    assert compiled(pipeline_with(register=True), tmp_path).dangling() == []


def test_kfp_mixes_up_tasks_of_one_name_within_a_pipeline_and_outside_of_it(tmp_path):
    """The defect of KFP 2.17.0 that `pods.named` works round; where this fails it is mended."""

    @dsl.component(base_image="python", install_kfp_package=False)
    def first() -> None: ...

    @dsl.component(base_image="python", install_kfp_package=False)
    def second() -> None: ...

    def pipeline_with(outer: tuple[Any, Any]) -> Any:
        @dsl.pipeline(name="inner")
        def inner() -> None:
            for component in (first, second):
                kubernetes.add_pod_label(component(), "place", "inside")

        @dsl.pipeline(name="outer")
        def whole() -> None:
            for component in outer:
                kubernetes.add_pod_label(component(), "place", "outside")
            inner()

        return whole

    def labels(pipeline: Any) -> dict[str, str]:
        file = compiled(pipeline, tmp_path)
        return {path: file.kubernetes(place)["podMetadata"]["labels"]["place"] for path, place in file.leaves().items()}

    mixed = labels(pipeline_with((first, second)))
    assert "inside" in {place for path, place in mixed.items() if "/" not in path}
    apart = labels(pipeline_with((named(first, "one"), named(second, "two"))))
    assert apart == {"one": "outside", "two": "outside", "inner/first": "inside", "inner/second": "inside"}


@pytest.mark.parametrize(("tasks", "prefix"), [("gpu_tasks", "gpu_"), ("cpu_tasks", "")])
def test_cpu_and_memory_of_every_pod_come_from_the_parameters_of_its_kind(request, file, tasks, prefix):
    for place in each(file, request.getfixturevalue(tasks)):
        asked = file.container(place)["resources"]
        found = {key: file.resource(place, asked[key]) for key in RESOURCES}
        assert found == {key: prefix + name for key, name in RESOURCES.items()}, place.path


def test_pods_that_train_score_or_average_ask_for_gpus_and_no_others_do(file, gpu_tasks, cpu_tasks):
    for place in each(file, gpu_tasks):
        accelerator = file.container(place)["resources"]["accelerator"]
        assert file.resource(place, accelerator["resourceType"]) == "gpu_type", place.path
        assert file.resource(place, accelerator["resourceCount"]) == "gpu_count", place.path
    for place in each(file, cpu_tasks):
        assert "accelerator" not in file.container(place)["resources"], place.path


def test_every_parameter_behind_a_resource_is_text(file):
    # KFP's driver takes val.GetStringValue(): a number becomes "", and an empty GPU count asks for no GPU at all.
    root = file.spec["root"]["inputDefinitions"]["parameters"]
    names = {"gpu_type", "gpu_count", *RESOURCES.values(), *(f"gpu_{name}" for name in RESOURCES.values())}
    assert {name: root[name]["parameterType"] for name in names} == dict.fromkeys(names, "STRING")
    assert all(root[name]["defaultValue"] for name in names)  # nor does it take an empty quantity


@pytest.mark.parametrize(("tasks", "prefix"), [("gpu_tasks", "gpu_"), ("cpu_tasks", "")])
def test_tolerations_and_node_selector_come_from_the_parameters_of_the_pods_kind(request, file, tasks, prefix):
    for place in each(file, request.getfixturevalue(tasks)):
        config = file.kubernetes(place)
        [toleration] = config["tolerations"]
        assert file.source(place, toleration["tolerationJson"]) == f"{prefix}tolerations", place.path
        selector = config["nodeSelector"]["nodeSelectorJson"]
        assert file.source(place, selector) == f"{prefix}node_selector", place.path


def test_a_pod_gets_the_secrets_that_it_needs_and_no_others(file):
    for path, place in file.leaves().items():
        expected = {"s3_secret": S3}
        if name_of(path) in TRACKED:
            expected["tracking_secret"] = TRACKING
        if name_of(path) in FETCH_FROM_THE_HUB:
            expected["hub_secret"] = HUB
        found = {}
        for secret in file.kubernetes(place)["secretAsEnv"]:
            assert secret["optional"] is True, path  # the service account may have a role instead
            assert all(pair["secretKey"] == pair["envVar"] for pair in secret["keyToEnv"]), path
            variables = {pair["envVar"] for pair in secret["keyToEnv"]}
            found[file.source(place, secret["secretNameParameter"])] = variables
        assert found == expected, path


def test_pods_with_gpus_have_shared_memory_and_the_size_is_an_option(file, other, gpu_tasks):
    for compiled_file, size in ((file, "8Gi"), (other, "2Gi")):
        for path, place in compiled_file.leaves().items():
            mounts = compiled_file.kubernetes(place).get("emptyDirMounts", [])
            shared = {"volumeName": "shm", "mountPath": "/dev/shm", "medium": "Memory", "sizeLimit": size}
            assert mounts == ([shared] if path in gpu_tasks else []), path


def test_every_pod_has_a_deadline_and_all_but_the_checks_are_tried_again(file, gpu_tasks):
    hour = 3600
    for path, place in file.leaves().items():
        check = path.startswith("check-")
        deadline = hour if check else 7 * 24 * hour if path in gpu_tasks else 2 * 24 * hour
        assert int(file.kubernetes(place)["activeDeadlineSeconds"]) == deadline, path
        tries = {
            "maxRetryCount": 3,
            "backoffDuration": "60s",
            "backoffFactor": 2.0,
            "backoffMaxDuration": "900s",
        }
        assert place.task.get("retryPolicy") == (None if check else tries), path


def test_every_pod_is_in_the_queue_where_one_is_named(file, other):
    for place in other.leaves().values():
        assert other.kubernetes(place)["podMetadata"] == {"labels": {"kueue.x-k8s.io/queue-name": "gpu-queue"}}
    assert not any("podMetadata" in file.kubernetes(place) for place in file.leaves().values())


def test_loops_run_as_many_tasks_at_once_as_the_option_says(pipeline, file, other):
    def limits(compiled_file: PipelineFile) -> list[int | None]:
        loops = [place.task for place in compiled_file.places() if "parameterIterator" in place.task]
        return [loop.get("iteratorPolicy", {}).get("parallelismLimit") for loop in loops]

    assert limits(file) == [None] * LOOPS[pipeline]
    assert limits(other) == [3] * LOOPS[pipeline]


def test_every_task_but_the_first_gets_the_configuration_that_the_first_has_checked(file):
    for path, place in file.leaves().items():
        given = file.source(place, place.task["inputs"]["parameters"]["config"])
        assert given == ("config" if path == "check-cluster" else FROM_A_TASK), path
    overrides = file.leaves()["check-cluster"].task["inputs"]["parameters"]
    names = {"root", "tracking_uri", "price_per_hour", "overrides"}
    assert {name: overrides[name] for name in names} == {name: {"componentInputParameter": name} for name in names}


def test_configuration_is_all_that_a_run_must_be_given_and_no_default_is_null(file):
    # kfp.local refuses a default that is null, and KFP's backend does not bring one into a loop.
    root = file.spec["root"]["inputDefinitions"]["parameters"]
    assert [name for name, one in root.items() if not one.get("isOptional")] == ["config"]
    assert all(one.get("defaultValue") is not None for name, one in root.items() if name != "config")
    assert all(one.get("description") for one in root.values())
