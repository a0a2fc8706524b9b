"""What is made of the API's answers about a run."""

import kfp_server_api as api
import pytest
import yaml
from kubeflow_server import item, node, pod_tasks, task
from small import settings

from cbtm.errors import ConfigError
from cbtm.kubeflow.pipeline_file import shipped_pipeline
from cbtm.kubeflow.run_status import PodStatus, member_pods, node_id, task_pods, task_statuses
from cbtm.train.member import Member


def run_of(*nodes: object, root: str = "s3://bucket/run", **parameters: object) -> api.V2beta1Run:
    config = yaml.safe_dump(settings("s3://bucket/corpus", root, None))
    return api.V2beta1Run(
        run_id="run-1",
        state="RUNNING",
        pipeline_spec={"pipeline_spec": next(iter(yaml.safe_load_all(shipped_pipeline())))},
        runtime_config=api.V2beta1RuntimeConfig(parameters={"config": config, **parameters}),
        run_details=api.V2beta1RunDetails(task_details=list(nodes)),
    )


def test_id_of_a_node_is_that_of_argo():
    # As a server of KFP 2.16 gave it for the first try of the task workspace-name.
    path = "root.workspace-name.executor(0)"
    assert node_id("general-cpu-rnggt", path) == "general-cpu-rnggt-1467617326"


def test_tasks_stand_in_the_order_in_which_they_run():
    names = [status.name for status in task_statuses(run_of())]
    assert names[:5] == ["check-cluster", "check-gpus", "plan-run", "build-tokenizer", "fit-clusterer"]
    assert names[5:7] == ["assign-shards", "train-seed"]
    assert names.index("train-expert") < names.index("score-expert") < names.index("average-experts")
    assert names[-1] == "evaluate-ensembles"
    assert {status.state for status in task_statuses(run_of())} == {"WAITING"}


def test_items_of_a_loop_are_counted_together():
    # 2 clusters: dense, two experts, two random experts
    nodes = [
        *pod_tasks("root.check-cluster", "SUCCEEDED"),
        *pod_tasks(f"{item('experts', 0)}.train-expert", "SUCCEEDED"),
        *pod_tasks(f"{item('experts', 1)}.train-expert", "RUNNING"),
        *pod_tasks(f"{item('experts', 2)}.train-expert", "FAILED", error="exit code 2"),
        task("root.evaluate-ensembles", None),
    ]
    by_name = {status.name: status for status in task_statuses(run_of(*nodes))}
    assert str(by_name["check-cluster"]) == "check-cluster succeeded (0:05:00)"
    assert str(by_name["train-expert"]).startswith("train-expert 1 of 5 succeeded, 1 failed, 1 running (")
    assert by_name["train-expert"].state == "FAILED"
    assert by_name["train-expert"].errors == ["exit code 2"]
    assert str(by_name["evaluate-ensembles"]) == "evaluate-ensembles omitted"
    assert str(by_name["score-expert"]) == "score-expert 0 of 5 succeeded"


def test_a_loop_that_has_begun_is_done_only_when_all_of_its_items_are():
    def state(n_done: int) -> str:
        nodes = [pod_tasks(f"{item('experts', number)}.train-expert", "SUCCEEDED") for number in range(n_done)]
        statuses = task_statuses(run_of(*(one for some in nodes for one in some)))
        return next(status.state for status in statuses if status.name == "train-expert")

    assert [state(4), state(5)] == ["RUNNING", "SUCCEEDED"]


def test_the_pod_of_a_cluster_is_found_by_its_place_in_the_loop():
    # dense is item 0, so cluster 1 is item 2; shard groups have items of the same numbers.
    nodes = [
        *pod_tasks(f"{item('assign', 2)}.assign-shards", "SUCCEEDED"),
        *(one for n in range(5) for one in pod_tasks(f"{item('experts', n)}.train-expert", "RUNNING")),
    ]
    [pod] = member_pods(run_of(*nodes), Member("expert", 1))
    expected = node(f"{item('experts', 2)}.train-expert.executor(0)")
    assert pod == PodStatus("train-expert", expected, "RUNNING", 0)
    workflow, number = expected.rsplit("-", 1)
    assert pod.pod_names[0] == f"{workflow}-retry-system-container-impl-{number}"


def test_every_try_of_a_task_has_a_pod_of_its_own():
    path = f"{item('experts', 0)}.train-expert"
    pods = member_pods(run_of(*pod_tasks(path, "SUCCEEDED", attempts=3)), Member("dense"))
    assert [(pod.attempt, pod.state) for pod in pods] == [(0, "FAILED"), (1, "FAILED"), (2, "SUCCEEDED")]
    assert [pod.node for pod in pods] == [node(f"{path}.executor({attempt})") for attempt in range(3)]


def test_training_comes_before_scoring():
    nodes = [pod_tasks(f"{item('experts', 1)}.{name}", "SUCCEEDED") for name in ("score-expert", "train-expert")]
    pods = member_pods(run_of(*(one for some in nodes for one in some)), Member("expert", 0))
    assert [pod.task for pod in pods] == ["train-expert", "score-expert"]


def test_the_seed_and_single_tasks_have_pods_too():
    check = "root.check-cluster"
    nodes = [
        *pod_tasks("root.train-seed", "RUNNING"),
        # a check is not tried again, so there is no node over the tries
        task(check, "FAILED", f"{check}.executor"),
        task(f"{check}.executor", "FAILED"),
    ]
    run = run_of(*nodes)
    assert [pod.node for pod in member_pods(run, Member("seed"))] == [node("root.train-seed.executor(0)")]
    assert task_pods(run, "check-cluster") == [PodStatus("check-cluster", node(f"{check}.executor"), "FAILED")]


def test_all_pods_of_a_loop_are_found_where_no_item_is_named():
    nodes = [pod_tasks(f"{item('experts', number)}.train-expert", "RUNNING") for number in range(3)]
    assert len(task_pods(run_of(*(one for some in nodes for one in some)), "train-expert")) == 3


def test_a_member_that_has_not_begun_has_no_pod():
    assert member_pods(run_of(), Member("expert", 1)) == []
    first = pod_tasks(f"{item('experts', 0)}.train-expert", "RUNNING")
    assert member_pods(run_of(*first), Member("expert", 1)) == []


def test_what_a_run_does_not_have_is_named():
    with pytest.raises(ConfigError, match="trains no cluster-00007; it trains seed, dense, cluster-00000"):
        member_pods(run_of(), Member("expert", 7))
    with pytest.raises(ConfigError, match="the pipeline has no task training; it has check-cluster"):
        task_pods(run_of(), "training")


def test_members_follow_the_overrides_of_the_run():
    # without the dense model cluster 0 is item 0
    nodes = pod_tasks(f"{item('experts', 0)}.train-expert", "RUNNING")
    run = run_of(*nodes, overrides=["train.dense=false"])
    assert len(member_pods(run, Member("expert", 0))) == 1


def test_a_run_of_another_pipeline_is_shown_as_far_as_it_is_known():
    run = api.V2beta1Run(run_id="run-9", state="RUNNING")
    assert all(not status.states for status in task_statuses(run))
    with pytest.raises(ConfigError, match="run run-9 has no configuration of this cbtm; give a task"):
        member_pods(run, Member("expert", 0))
