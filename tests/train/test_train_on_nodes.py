"""A launch and its TrainJob: found again, followed, restarted and removed, with machines that only say so."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from cbtm import storage
from cbtm.errors import DataError, Interrupted
from cbtm.kubernetes import KubernetesError, connect
from cbtm.train import nodes, trainjob
from cbtm.train.config import OptimizationConfig
from cbtm.train.exchange import Exchange, NodeTask
from cbtm.train.nodes import Launch, MachineLost, retire, train_on_nodes
from cbtm.train.outcome import WorkerFailedError

SCRIPT = str(Path(__file__).parents[1] / "fixtures/stand_in_node.py")
NAME = trainjob.job_name("s3://bucket/run", "cluster-00001")


@pytest.fixture(autouse=True)
def _often(monkeypatch):
    for name, seconds in (("_POLL_SECONDS", 0.1), ("_SETTLE_SECONDS", 1.0), ("_LAST_WORDS_SECONDS", 5.0)):
        monkeypatch.setattr(nodes, name, seconds)


@pytest.fixture
def launch(kubernetes, tmp_path):
    """Makes launches of one training: `launch([[what, ...] of the first machine, [...] of the second])`."""

    def make(*plan, key="key", restarts=3, memory="4Gi"):
        shared = Exchange(str(tmp_path / "exchange"))
        node = {"image": "cbtm:test", "memory": memory}
        config = OptimizationConfig(
            steps=10, sequences_per_step=2, learning_rate=1e-3, nodes=2, device="cpu", node=node
        )
        manifest = trainjob.manifest(
            config,
            trainjob.OwnPod(),
            root="s3://bucket/run",
            member="cluster-00001",
            key=key,
            run_key="r" * 64,
            task_uri=shared.task_uri,
        )
        manifest["spec"]["trainer"]["command"] = ["python3", SCRIPT]
        manifest["spec"]["trainer"]["args"] = [shared.task_uri, str(tmp_path), json.dumps(plan)]
        return Launch(
            api=connect(None),
            exchange=shared,
            task=NodeTask(config="{}", member="cluster-00001", key=key),
            manifest=manifest,
            root=str(tmp_path / "model"),
            n_ranks=2,
            restarts=restarts,
        )

    return make


class Metrics(list):
    """What was reported."""

    def __call__(self, metrics, step):
        self.append((step, metrics))


def wait_for(condition, seconds=20):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def soon(condition, action):
    """Do something once a condition holds, beside the test."""

    def act():
        wait_for(condition)
        action()

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def stop_this_process():
    os.kill(os.getpid(), signal.SIGTERM)


# --- to the result ---


def test_what_the_machines_write_is_passed_on_and_their_result_returned(launch, kubernetes, caplog):
    caplog.set_level("INFO")
    metrics = Metrics()
    placed = train_on_nodes(launch(["train"], ["train"]), metrics)
    assert [file.path for file in placed.files] == ["weights"]
    assert placed.metadata == {"steps": 10}
    assert metrics == [(step, {"train/loss": 1 / step}) for step in range(1, 11)]
    assert sorted(caplog.messages) == sorted(
        [
            f"TrainJob=team/{NAME} nodes=2 devices=1 made",
            *("begins train", "ends", "node 1: begins train", "node 1: ends"),
        ]
    )


def test_log_that_breaks_off_loses_and_doubles_nothing(launch, kubernetes, monkeypatch):
    kubernetes.breaks_logs = 4
    monkeypatch.setattr("cbtm.train.pod_logs._AGAIN_SECONDS", 0.1)
    metrics = Metrics()
    train_on_nodes(launch(["train"], ["train"]), metrics)
    assert kubernetes.breaks_logs == 0
    assert [step for step, _ in metrics] == list(range(1, 11))


def test_second_launch_follows_the_trainjob_of_one_that_was_killed(launch, kubernetes, caplog):
    caplog.set_level("INFO")
    first = launch(["train"], ["train"])
    first.exchange.write_task(first.task)  # what the first launch did before it was killed
    assert first.api.create(first.manifest)
    wait_for(lambda: any("metrics" in line for _, line in kubernetes.pods[0].lines))
    metrics = Metrics()
    placed = train_on_nodes(launch(["train"], ["train"]), metrics)
    assert f"TrainJob=team/{NAME} nodes=2 devices=1 found, following it" in caplog.messages
    assert len(kubernetes.posted) == 1
    assert [step for step, _ in metrics] == list(range(1, 11))  # from the beginning of the log
    assert placed.metadata == {"steps": 10}


def test_result_that_came_while_no_launch_was_there_is_taken(launch, kubernetes):
    first = launch(["train"], ["train"])
    train_on_nodes(first, Metrics())
    retire_quietly(kubernetes)
    assert train_on_nodes(launch(["train"], ["train"]), Metrics()).metadata == {"steps": 10}
    assert len(kubernetes.posted) == 1
    # Of another training, or with a file that is not there any more, it is none.
    assert first.exchange.result("another") is None
    storage.delete(first.root, ["weights"])
    assert nodes._result(first) is None


def retire_quietly(kubernetes):
    kubernetes.jobs.clear()


def test_trainjob_of_other_settings_or_another_training_is_removed_first(launch, kubernetes, caplog):
    caplog.set_level("INFO")
    for changes in ({"memory": "8Gi"}, {"key": "another"}):
        old = launch(["wait"], ["wait"])
        old.exchange.write_task(old.task)
        old.api.create(old.manifest)
        pods = kubernetes.of(NAME)
        wait_for(lambda pods=pods: all(pod.lines for pod in pods))
        new = launch(["wait", "train"], ["wait", "train"], **changes)
        assert train_on_nodes(new, Metrics()).metadata == {"steps": 10}
        assert f"TrainJob=team/{NAME} of an earlier try is removed first" in caplog.messages
        assert [pod.ended["exitCode"] for pod in pods] == [75, 75]  # they had time to save
        for path in Path(new.root).parent.glob("attempts-*"):
            path.unlink()
        retire(new.api, new.exchange, NAME)
        caplog.clear()


def test_failed_trainjob_of_an_earlier_try_is_made_anew(launch, kubernetes):
    old = launch(["data", "train"], ["gone", "train"])
    old.exchange.write_task(old.task)
    old.api.create(old.manifest)
    wait_for(lambda: "status" in old.api.read(NAME))
    assert train_on_nodes(launch(["data", "train"], ["gone", "train"]), Metrics()).metadata == {"steps": 10}
    assert len(kubernetes.posted) == 2


# --- to an error ---


def test_error_of_a_machine_is_the_users_and_ends_the_trainjob(launch, kubernetes):
    with pytest.raises(DataError) as error:
        train_on_nodes(launch(["wait"], ["data"]), Metrics())
    assert str(error.value) == "rank 1 of 2: cluster-00001 has no tokens"
    wait_for(lambda: not kubernetes.jobs)
    assert len(kubernetes.posted) == 1


def test_defect_shows_the_last_lines_of_the_rank_that_failed_first(launch, kubernetes):
    with pytest.raises(WorkerFailedError) as error:
        train_on_nodes(launch(["gone"], ["defect"]), Metrics())
    first, *lines = str(error.value).splitlines()
    assert first == "rank 1 of 2 failed: ZeroDivisionError: odd; its log: "
    assert lines == [f"line {number} of rank 1" for number in range(25, 40)]


def test_lost_machine_is_answered_by_another_attempt(launch, kubernetes, caplog):
    metrics = Metrics()
    placed = train_on_nodes(launch(["gone", "train"], ["lost", "train"]), metrics)
    assert placed.metadata == {"steps": 10}
    assert len(kubernetes.posted) == 2
    assert [step for step, _ in metrics] == list(range(1, 11))  # those of the second attempt
    (said,) = [text for text in caplog.messages if "all machines are started again (1)" in text]
    assert "ended with code" in said


def test_machines_that_are_lost_again_and_again_are_given_up(launch, kubernetes):
    with pytest.raises(MachineLost) as error:
        train_on_nodes(launch(["wait"], ["lost"], restarts=1), Metrics())
    assert str(error.value) == (
        "node 1 ended with code 137 (Error) and named no error; that is 2 times without having come further, and "
        "train.node.restarts=1"
    )
    assert len(kubernetes.posted) == 2
    wait_for(lambda: not kubernetes.jobs)


def test_want_of_memory_is_not_tried_again(launch, kubernetes):
    made = launch(["wait"], ["wait"])
    ended = {"exitCode": 137, "reason": "OOMKilled"}
    soon(lambda: len(kubernetes.pods) == 2, lambda: setattr(kubernetes.pods[1], "ended", ended))
    with pytest.raises(WorkerFailedError, match=r"node 1 was ended for want of memory \(OOMKilled, its limit is 4Gi\)"):
        train_on_nodes(made, Metrics())
    assert len(kubernetes.posted) == 1


def test_pod_that_is_gone_is_a_machine_lost(launch, kubernetes):
    made = launch(["wait"], ["wait"], restarts=0)

    def remove():
        kubernetes.pods[1].kill(signal.SIGKILL)
        kubernetes.pods[:] = kubernetes.pods[:1]

    soon(lambda: len(kubernetes.pods) == 2 and all(pod.lines for pod in kubernetes.pods), remove)
    with pytest.raises(MachineLost, match=rf"pod {NAME}-node-0-1-\w+ of node 1 is gone"):
        train_on_nodes(made, Metrics())


def test_machine_that_is_emptied_is_lost_though_its_pod_still_saves(launch, kubernetes):
    made = launch(["wait", "train"], ["wait", "train"])

    def evict():
        kubernetes.pods[1].leaves = True
        kubernetes.pods[1].kill(signal.SIGTERM)

    soon(lambda: len(kubernetes.pods) == 2 and all(pod.lines for pod in kubernetes.pods), evict)
    assert train_on_nodes(made, Metrics()).metadata == {"steps": 10}
    assert len(kubernetes.posted) == 2
    assert [pod.ended["exitCode"] for pod in kubernetes.pods[:2]] == [75, 75]


def test_trainjob_that_somebody_removes_is_not_made_again_behind_his_back(launch, kubernetes):
    made = launch(["wait"], ["wait"])
    soon(lambda: kubernetes.pods and kubernetes.pods[0].lines, lambda: kubernetes.delete(NAME))
    with pytest.raises((KubernetesError, MachineLost)) as error:
        train_on_nodes(made, Metrics())
    assert "removed by somebody else" in str(error.value)
    assert len(kubernetes.posted) == 1


# --- a cluster that is away, pods that wait ---


def test_training_outlives_a_launch_that_cannot_reach_the_cluster(launch, kubernetes):
    made = launch(["wait"], ["wait"])
    soon(lambda: kubernetes.pods and kubernetes.pods[0].lines, lambda: setattr(kubernetes, "is_away", True))
    with pytest.raises(KubernetesError, match="the server is currently unable"):
        train_on_nodes(made, Metrics())
    kubernetes.is_away = False
    assert list(kubernetes.jobs) == [NAME]
    assert all(pod.lives for pod in kubernetes.pods)


def test_what_pods_wait_for_is_said_once(launch, kubernetes, caplog):
    kubernetes.waiting = {"reason": "ContainerCreating", "message": ""}

    def let_go():
        time.sleep(1.0)
        for pod in kubernetes.pods:
            pod.start()

    def warn():
        for pod in kubernetes.pods:
            kubernetes.events[pod.name] = [
                ("FailedScheduling", "0/3 nodes are available: 3 Insufficient nvidia.com/gpu")
            ]
        let_go()

    soon(lambda: len(kubernetes.pods) == 2, warn)
    train_on_nodes(launch(["train"], ["train"]), Metrics())
    waits = [text for text in caplog.messages if "waits" in text]
    assert waits == [
        f"node {node} waits: FailedScheduling: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu"
        for node in (0, 1)
    ]


def test_image_that_cannot_be_had_ends_it_after_a_while(launch, kubernetes, monkeypatch):
    monkeypatch.setattr(nodes, "_WAITING_SECONDS", 0.5)
    kubernetes.waiting = {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "cbtm:test"'}
    with pytest.raises(KubernetesError, match=r"of node \d cannot start: ImagePullBackOff: Back-off pulling image"):
        train_on_nodes(launch(["train"], ["train"]), Metrics())


# --- cancelled ---


def test_cancelled_launch_has_its_machines_save_and_removes_the_trainjob(launch, kubernetes, caplog):
    caplog.set_level("INFO")
    made = launch(["wait"], ["wait"])
    soon(lambda: kubernetes.pods and all(pod.lines for pod in kubernetes.pods), stop_this_process)
    with pytest.raises(Interrupted) as stopped:
        train_on_nodes(made, Metrics())
    assert str(stopped.value) == "stopped at step 3 of 10"
    assert stopped.value.exit_code == 75
    assert kubernetes.jobs == {}
    assert "error: stopped at step 3 of 10" in caplog.messages  # the machines' last words


def test_cancelled_before_its_pods_run(launch, kubernetes):
    kubernetes.waiting = {"reason": "ContainerCreating", "message": ""}
    made = launch(["wait"], ["wait"])
    soon(lambda: len(kubernetes.pods) == 2, stop_this_process)
    with pytest.raises(Interrupted, match="stopped before its machines trained"):
        train_on_nodes(made, Metrics())
    assert kubernetes.jobs == {}


def test_retired_trainjob_leaves_nothing(launch, kubernetes, tmp_path):
    made = launch(["wait"], ["wait"])
    made.exchange.write_task(made.task)
    made.api.create(made.manifest)
    wait_for(lambda: all(pod.lines for pod in kubernetes.pods))
    retire(made.api, made.exchange, NAME)
    assert kubernetes.jobs == {}
    assert storage.list_files(made.exchange.uri) == []
    retire(made.api, made.exchange, NAME)  # and once more
