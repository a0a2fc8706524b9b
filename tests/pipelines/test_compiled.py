"""The compiled pipeline: what it says must be complete, and be what the source says."""

import subprocess
import sys
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

from cbtm.kubeflow.pipeline_file import shipped_pipeline
from components import images


@pytest.fixture(scope="module", params=["cbtm", "compare"])
def pipeline(request: pytest.FixtureRequest) -> str:
    """Name of a pipeline that comes with cbtm."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def spec(pipeline: str) -> dict[str, Any]:
    documents = list(yaml.safe_load_all(shipped_pipeline(pipeline)))
    return documents[0]


def dags(spec: dict[str, Any]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Name to (component, dag) of the root and of every component that is a DAG."""
    found = {"root": (spec["root"], spec["root"]["dag"])}
    for name, component in spec["components"].items():
        if "dag" in component:
            found[name] = (component, component["dag"])
    return found


def parameters(component: dict[str, Any]) -> set[str]:
    return set(component.get("inputDefinitions", {}).get("parameters", {}))


def test_committed_file_is_what_the_source_compiles_to():
    done = subprocess.run([sys.executable, "-m", "pipelines.compile", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_field_is_known_to_the_pipeline_spec(pipeline, spec):
    parsed = json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())
    assert parsed.pipeline_info.name == pipeline


def test_every_component_reference_and_executor_exists(spec):
    executors = spec["deploymentSpec"]["executors"]
    for _, dag in dags(spec).values():
        for task in dag["tasks"].values():
            assert task["componentRef"]["name"] in spec["components"]
    used = {component["executorLabel"] for component in spec["components"].values() if "executorLabel" in component}
    assert used == set(executors)


def test_every_input_of_every_task_comes_from_somewhere(spec):
    for name, (component, dag) in dags(spec).items():
        own = parameters(component)
        for task_name, task in dag["tasks"].items():
            own_items = {task["parameterIterator"]["itemInput"]} if "parameterIterator" in task else set()
            wanted = spec["components"][task["componentRef"]["name"]]
            given = task.get("inputs", {}).get("parameters", {})
            for parameter, source in given.items():
                if "componentInputParameter" in source:
                    assert source["componentInputParameter"] in own | own_items, f"{name}/{task_name}/{parameter}"
                if "taskOutputParameter" in source:
                    producer = dag["tasks"][source["taskOutputParameter"]["producerTask"]]
                    outputs = spec["components"][producer["componentRef"]["name"]]["outputDefinitions"]["parameters"]
                    assert source["taskOutputParameter"]["outputParameterKey"] in outputs
            missing = parameters(wanted) - set(given) - own_items
            optional = {
                key
                for key, value in wanted.get("inputDefinitions", {}).get("parameters", {}).items()
                if value.get("isOptional")
            }
            assert missing <= optional, f"{name}/{task_name} lacks {missing}"


def test_every_dependency_is_a_task_of_the_same_dag(spec):
    for _, dag in dags(spec).values():
        for task in dag["tasks"].values():
            assert set(task.get("dependentTasks", [])) <= set(dag["tasks"])


def test_loops_are_over_shard_groups_over_clusters_and_over_arms(pipeline, spec):
    loops = [
        task["parameterIterator"]["items"]["inputParameter"]
        for _, dag in dags(spec).values()
        for task in dag["tasks"].values()
        if "parameterIterator" in task
    ]
    groups, members = "pipelinechannel--groups", "pipelinechannel--members"
    arms = [] if pipeline == "cbtm" else ["pipelinechannel--arms", groups]
    assert sorted(loops) == sorted([groups, members, *arms])


def test_training_and_scoring_run_on_the_gpu_image_and_the_rest_on_the_cpu_image(pipeline, spec):
    by_executor = {
        name.removeprefix("exec-").rstrip("-0123456789"): executor["container"]["image"]
        for name, executor in spec["deploymentSpec"]["executors"].items()
    }
    gpu = {name for name, image in by_executor.items() if image == images.GPU}
    averaging = {"average-experts"} if pipeline == "cbtm" else set()
    assert gpu == {"check-gpus", "train-seed", "score-seed", "train-expert", "score-expert"} | averaging
    assert {image for name, image in by_executor.items() if name not in gpu} == {images.CPU}


def test_nothing_is_installed_when_a_task_starts(spec):
    for executor in spec["deploymentSpec"]["executors"].values():
        assert "pip install" not in " ".join(executor["container"]["command"])


def test_no_task_is_cached_by_kubeflow(spec):
    # Kubeflow's cache knows parameters, not the content behind a URI; cbtm's manifests know both.
    for _, dag in dags(spec).values():
        for name, task in dag["tasks"].items():
            if "executorLabel" in spec["components"][task["componentRef"]["name"]]:
                assert not task.get("cachingOptions", {}).get("enableCache", False), name


def test_checks_come_first_and_the_seed_before_experts_and_experts_before_the_evaluation(pipeline, spec):
    tasks = spec["root"]["dag"]["tasks"]
    assert [name for name, task in tasks.items() if "dependentTasks" not in task] == ["check-cluster"]
    assert tasks["check-gpus"]["dependentTasks"] == ["check-cluster"]
    assert "build-tokenizer" in tasks["fit-clusterer"]["dependentTasks"]  # clusters may be balanced by tokens
    assert "fit-clusterer" in tasks["assign"]["dependentTasks"]
    if pipeline == "cbtm":
        assert "check-gpus" in tasks["plan-run"]["dependentTasks"]
        assert "train-seed" in tasks["experts"]["dependentTasks"]
        assert "experts" in tasks["average-experts"]["dependentTasks"]
        assert {"average-experts", "score-seed"} <= set(tasks["evaluate-ensembles"]["dependentTasks"])
    else:
        assert "check-gpus" in tasks["plan-comparison"]["dependentTasks"]
        assert "score-seed" in tasks["arms"]["dependentTasks"]
        assert "arms" in tasks["compare-arms"]["dependentTasks"]
        arm = next(dag for name, (_, dag) in dags(spec).items() if "configure-arm" in dag["tasks"])["tasks"]
        assert {"fit-arm"} <= set(arm["assign-arm"]["dependentTasks"])
        assert {"assign-arm"} <= set(arm["experts"]["dependentTasks"])
        assert {"experts"} <= set(arm["evaluate-ensembles"]["dependentTasks"])
