"""What cbtm asks of the Kubernetes API, against a server that answers as it does."""

import copy
import threading
import time

import pytest

from cbtm import kubernetes as module
from cbtm import storage
from cbtm.errors import ConfigError
from cbtm.kubernetes import Ended, KubernetesError, NodePod, connect

JOB = {
    "apiVersion": "trainer.kubeflow.org/v1alpha1",
    "kind": "TrainJob",
    "metadata": {"name": "one"},
    "spec": {
        "runtimeRef": {"name": "torch-distributed"},
        "trainer": {"image": "i", "command": ["sleep", "60"], "args": [], "numNodes": 2, "numProcPerNode": 1},
    },
}


def job(command=("sleep", "60"), name="one", nodes=2):
    made = copy.deepcopy(JOB)
    made["metadata"]["name"] = name
    made["spec"]["trainer"] |= {"command": list(command), "numNodes": nodes}
    return made


def python(code):
    return ["python3", "-c", code]


def noted(lines, seen):
    """Append each line as it comes, so that what came before an error is there."""
    for line in lines:
        seen.append(line)
    return []


def wait_for(condition, seconds=15):
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until
        time.sleep(0.02)
    return found


@pytest.fixture
def api(kubernetes):
    return connect(None)


def test_namespace_is_that_of_the_context_unless_another_is_named(kubernetes):
    assert connect(None).namespace == "team"
    assert connect("other").namespace == "other"


def test_no_cluster_to_be_found_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(
        ConfigError, match=r"train.nodes above 1 needs a Kubernetes cluster, and none is found: .*KUBEC"
    ):
        connect(None)
    monkeypatch.delenv("KUBECONFIG")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    with pytest.raises(ConfigError, match=r"this pod has no access to Kubernetes .*; give it a service account"):
        connect(None)


# --- TrainJobs ---


def test_a_trainjob_is_made_once_and_read(api):
    assert api.read("one") is None
    assert api.create(job())
    assert not api.create(job())
    found = api.read("one")
    assert found["spec"]["trainer"]["numNodes"] == 2
    assert found["metadata"]["uid"]


def test_deletion_asks_the_pods_to_end_and_waits_for_them(api, kubernetes):
    code = "import signal, sys, time\nsignal.signal(15, lambda *_: (time.sleep(0.5), sys.exit(75)))\n"
    code += "print(1, flush=True)\n"
    api.create(job(python(code + "while True: time.sleep(0.1)")))
    wait_for(lambda: all(pod.lines for pod in kubernetes.pods))
    uid = api.read("one")["metadata"]["uid"]
    api.delete("one", "another-uid")  # of an earlier TrainJob with this name: nothing happens
    assert "deletionTimestamp" not in api.read("one")["metadata"]
    api.delete("one", uid)
    assert "deletionTimestamp" in api.read("one")["metadata"]
    wait_for(lambda: api.read("one") is None)
    assert [pod.ended["exitCode"] for pod in kubernetes.pods] == [75, 75]
    api.delete("one", uid)  # gone already


def test_cluster_without_trainer_is_said(api, kubernetes):
    kubernetes.has_trainer = False
    message = "in namespace team: it has no TrainJobs; install Kubeflow Trainer 2.3 or newer"
    with pytest.raises(KubernetesError, match=f"cannot create a TrainJob {message}"):
        api.create(job())
    with pytest.raises(KubernetesError, match=f"cannot read TrainJob one {message}"):
        api.read("one")


def test_refusal_names_what_and_why(api, kubernetes):
    kubernetes.refuse = ("POST", "trainjobs")
    with pytest.raises(KubernetesError) as refused:
        api.create(job())
    assert str(refused.value) == (
        'cannot create a TrainJob in namespace team: trainjobs is forbidden: User "system:serviceaccount:team:runner" '
        "cannot; give the service account the rights in deploy/trainjobs"
    )


def test_field_that_the_cluster_does_not_know_is_not_left_out_silently(api):
    made = job()
    made["spec"]["trainer"]["numMachines"] = 3
    with pytest.raises(KubernetesError, match=r'unknown field "spec.trainer.numMachines"; Kubeflow Trainer 2.3 or new'):
        api.create(made)
    assert api.read("one") is None


def test_cluster_that_is_away_is_waited_for(api, kubernetes, caplog):
    kubernetes.is_away = True
    with pytest.raises(KubernetesError, match="cannot read TrainJob one in namespace team: the server is currently"):
        api.read("one")
    storage.be_patient(20)
    threading.Timer(0.8, lambda: setattr(kubernetes, "is_away", False)).start()
    assert api.read("one") is None
    assert "Kubernetes does not answer" in caplog.text


def test_address_where_nothing_is_fails_at_once(kubernetes, monkeypatch, tmp_path):
    text = (tmp_path / "kubernetes/kubeconfig").read_text()
    port = text.split("127.0.0.1:")[1].split('"')[0]
    (tmp_path / "config").write_text(text.replace(port, "9"))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    with pytest.raises(KubernetesError, match=r"cannot read TrainJob one in namespace team: .*refused"):
        connect(None).read("one")


# --- pods ---


def test_pods_are_described_by_their_machines(api, kubernetes):
    api.create(job(python("import os, sys; sys.exit(3 if os.environ['PET_NODE_RANK'] == '1' else 0)"), nodes=3))
    wait_for(lambda: all(pod.ended for pod in kubernetes.pods))
    found = api.pods("one")
    assert [pod.node for pod in found] == [0, 1, 2]
    assert [pod.ended for pod in found] == [Ended(0, "Completed"), Ended(3, "Error"), Ended(0, "Completed")]
    assert not any(pod.runs for pod in found)
    assert api.pods("other") == []


def test_pod_that_waits_says_why(api, kubernetes):
    kubernetes.waiting = {"reason": "ImagePullBackOff", "message": "Back-off pulling image i"}
    api.create(job())
    found = api.pods("one")[0]
    assert (found.runs, found.ended, found.waiting) == (False, None, ("ImagePullBackOff", "Back-off pulling image i"))
    kubernetes.events[found.name] = [("FailedScheduling", "0/3 nodes"), ("FailedScheduling", "0/4 nodes"), ("Odd", "b")]
    assert api.warnings(found.name) == ["FailedScheduling: 0/4 nodes", "Odd: b"]


def test_container_that_was_started_again_shows_its_last_end(api, kubernetes):
    kubernetes.restarts = 1
    code = "import os, time, pathlib; p = pathlib.Path(os.environ['HOME'], 'was'); n = p.exists(); p.touch()\n"
    api.create(job(python(code + "time.sleep(60) if n else os._exit(9)"), nodes=1))
    found = wait_for(lambda: next((pod for pod in api.pods("one") if pod.restarts), None))
    assert (found.runs, found.restarts, found.ended) == (True, 1, Ended(9, "Error"))


def test_pod_that_was_evicted_has_ended_without_an_exit_code():
    pod = {"metadata": {"name": "p", "uid": "u"}, "status": {"phase": "Failed", "reason": "Evicted"}}
    assert NodePod.of(pod).ended == Ended(-1, "Evicted")
    pod["status"] = {"phase": "Pending"}
    assert NodePod.of(pod) == NodePod("p", "u", 0, 0, False, None, None)
    pod["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"  # its machine is being emptied
    assert NodePod.of(pod).leaves


def test_own_pod_is_that_of_the_task(kubernetes, monkeypatch, caplog):
    kubernetes.others["/api/v1/namespaces/team/pods/task-1"] = {"metadata": {"name": "task-1"}, "spec": {}}
    monkeypatch.setenv("KFP_POD_NAME", "task-1")
    api = connect(None)
    assert api.own_pod() is None  # this process is in none: kubeconfig has led it to the cluster
    api._own_namespace = "team"
    assert api.own_pod()["metadata"]["name"] == "task-1"
    kubernetes.others.clear()
    kubernetes.refuse = ("GET", "pods")
    assert api.own_pod() is None
    assert "cannot read pod task-1 in namespace team: pods is forbidden" in caplog.text


# --- logs ---


def test_log_is_followed_to_the_end_of_the_container(api, kubernetes):
    api.create(job(python("import time\nfor n in range(3): print(f'line {n}é', flush=True); time.sleep(0.2)"), nodes=1))
    pod = kubernetes.pods[0]
    lines = list(api.log(pod.name, None))
    assert [text for _, text in lines] == ["line 0é", "line 1é", "line 2é"]
    assert list(api.log(pod.name, lines[1][0])) == lines[2:]  # behind a time


def test_log_that_breaks_off_is_a_connection_error_and_goes_on_behind_the_last_line(api, kubernetes):
    api.create(job(python("import time\nfor n in range(4): print(n, flush=True); time.sleep(0.2)"), nodes=1))
    pod = kubernetes.pods[0]
    wait_for(lambda: len(pod.lines) == 2)
    kubernetes.breaks_logs = 1
    seen = []
    with pytest.raises(ConnectionError):
        seen.extend(noted(api.log(pod.name, None), seen))
    assert 2 <= len(seen) < 4
    seen += api.log(pod.name, seen[-1][0])
    assert [text for _, text in seen] == ["0", "1", "2", "3"]


def test_log_of_a_pod_that_is_not_there_is_refused(api):
    with pytest.raises(KubernetesError, match='cannot read the log of pod p in namespace team: pods "p" not found'):
        list(api.log("p", None))


def test_lines_are_put_together_from_pieces():
    assert list(module._lines(iter([b"a", b"b\nc\xc3", b"\xa9\n", b"d"]))) == ["ab", "cé", "d"]
