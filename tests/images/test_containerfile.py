"""What the Containerfile, the bake file and the build context promise; `make test-containers` builds them."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from components import images

PROJECT = Path(__file__).resolve().parents[2]
FOLDER = PROJECT / "images"


def instructions() -> list[str]:
    """Instructions of the Containerfile, continued lines joined, without comments."""
    text = (FOLDER / "Containerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return [line for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line.strip()]


def last_stage() -> list[str]:
    lines = instructions()
    return lines[max(at for at, line in enumerate(lines) if line.startswith("FROM ")) :]


def bake_target(name: str) -> str:
    found = re.search(rf'^target "{name}" {{\n(.*?)^}}', (FOLDER / "docker-bake.hcl").read_text(), re.M | re.S)
    assert found is not None
    return found[1]


def test_base_is_one_public_image_pinned_by_digest():
    froms = [line.split()[1] for line in instructions() if line.startswith("FROM ")]
    assert froms[0] == "${BASE}"
    stages = {line.split()[3] for line in instructions() if line.startswith("FROM ") and " AS " in line}
    assert set(froms[1:]) <= stages
    (base,) = [line.removeprefix("ARG BASE=") for line in instructions() if line.startswith("ARG BASE=")]
    assert re.fullmatch(r"docker\.io/library/python:3\.11-slim-[a-z]+@sha256:[0-9a-f]{64}", base)


def test_last_stage_runs_nothing_and_takes_only_what_was_installed():
    assert not [line for line in last_stage() if line.startswith(("RUN", "ADD"))]
    copies = [line for line in last_stage() if line.startswith("COPY")]
    assert copies == ["COPY --from=pruned /opt/venv /opt/venv", "COPY --from=package /package /opt/venv"]


def test_user_is_a_number_of_group_0_and_writes_below_tmp():
    assert "USER 10001:0" in last_stage()
    (environment,) = [line for line in last_stage() if line.startswith("ENV")]
    for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "MPLCONFIGDIR"):
        assert re.search(rf"\b{name}=/tmp\b", environment), name
    assert not [line for line in last_stage() if line.startswith("ENTRYPOINT")]


def test_secrets_are_mounts_and_never_arguments():
    assert not [line for line in instructions() if re.match(r"ARG .*(TOKEN|SECRET|PASSWORD|KEY)", line)]
    networked = [line for line in instructions() if line.startswith("RUN") and "install.sh" in line]
    assert len(networked) == 2
    for line in networked:
        assert "--mount=type=secret,id=ca" in line
        assert "--mount=type=secret,id=pip.conf,target=/etc/pip.conf" in line


def test_build_context_holds_what_is_copied_and_nothing_else():
    ignored = [line for line in (PROJECT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert ignored[0] == "*"
    taken = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = {
        source
        for line in instructions()
        if line.startswith("COPY") and "--from" not in line
        for source in line.split()[1:-1]
    }
    assert taken == copied | {"images/wheels"}
    assert all((PROJECT / path).exists() for path in taken)


@pytest.mark.parametrize(("target", "device", "image"), [("cpu", "cpu", "CPU"), ("gpu", "cuda", "GPU")])
def test_bake_file_gives_arguments_that_the_containerfile_knows(target, device, image):
    known = {line.split()[1].split("=")[0] for line in instructions() if line.startswith("ARG ")}
    given = set(re.findall(r"\b([A-Z_]+) +=", bake_target("image") + bake_target(target)))
    assert given | {"BASE"} == known - (set() if target == "cpu" else {"TORCH_INDEX"})
    assert f'DEVICE = "{device}"' in bake_target(target)
    assert f"tags      = [CBTM_IMAGE_{image}]" in bake_target(target)
    assert '"linux/amd64"' in bake_target(target)
    assert ('"linux/arm64"' in bake_target(target)) == (target == "cpu")


def test_names_for_a_shell_are_those_of_the_components():
    command = [sys.executable, "-m", "components.images"]
    written = subprocess.run(command, cwd=PROJECT, check=True, capture_output=True, text=True).stdout
    assert dict(line.split("=", 1) for line in written.splitlines()) == {
        "CBTM_IMAGE_CPU": images.CPU,
        "CBTM_IMAGE_GPU": images.GPU,
        "VERSION": images.VERSION,
    }


def test_requirements_of_the_images_are_those_of_the_project_and_have_kfp_without_a_server():
    command = [sys.executable, "images/requirements.py"]
    lines = subprocess.run(command, cwd=PROJECT, check=True, capture_output=True, text=True).stdout.splitlines()
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    assert set(project["dependencies"]) < set(lines)
    names = {re.split(r"[<>=\[]", line)[0] for line in lines}
    assert {"kfp", "torch", "mlflow-skinny"} <= names
    assert "mlflow" not in names
    pinned = {line.split("==")[0] for line in (PROJECT / "constraints.txt").read_text().splitlines()}
    assert names <= pinned
