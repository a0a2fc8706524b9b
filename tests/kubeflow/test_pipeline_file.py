"""The compiled pipeline with options equals the pipeline compiled with them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pipeline_files import PipelineFile

from cbtm.errors import ConfigError
from cbtm.kubeflow.pipeline_file import (
    CompileOptions,
    check_quantity,
    for_this_machine,
    images_of,
    pinned_images,
    shipped_pipeline,
    with_options,
)

ROOT = Path(__file__).parents[2]
DIGESTS = {"cpu": "sha256:" + "a1" * 32, "gpu": "sha256:" + "b2" * 32}


def compiled_anew(folder: Path, options: CompileOptions) -> str:
    arguments = {
        "--parallelism": options.parallelism,
        "--shm-size": options.shm_size,
        "--queue": options.queue,
    }
    given = [str(word) for pair in arguments.items() if pair[1] is not None for word in pair]
    images = {"CBTM_IMAGE_CPU": options.cpu_image, "CBTM_IMAGE_GPU": options.gpu_image}
    environment = os.environ | {name: image for name, image in images.items() if image}
    command = [sys.executable, "-m", "pipelines.compile", "--target", str(folder), *given]
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    return (folder / "cbtm.yaml").read_text()


@pytest.mark.parametrize(
    "options",
    [
        CompileOptions(),
        CompileOptions(parallelism=4),
        CompileOptions(shm_size="512Mi", queue="team-a"),
        CompileOptions(
            cpu_image="registry.local:5000/python-cpu:1", gpu_image="registry.local:5000/python-cuda@sha256:0"
        ),
        CompileOptions("a/python", "b/python", parallelism=2, shm_size="1Gi", queue="q"),
    ],
    ids=["nothing", "parallelism", "shm and queue", "images", "everything"],
)
def test_every_option_gives_the_bytes_that_a_fresh_compilation_gives(tmp_path, options):
    assert with_options(shipped_pipeline(), options) == compiled_anew(tmp_path, options)


def test_options_can_be_taken_back():
    limited = with_options(shipped_pipeline(), CompileOptions(parallelism=4, shm_size="1Gi"))
    assert limited != shipped_pipeline()
    assert with_options(limited, CompileOptions(parallelism=0, shm_size="8Gi")) == shipped_pipeline()


def test_the_pipeline_of_this_machine_tries_no_task_again_and_is_otherwise_the_same():
    shipped, local = PipelineFile(shipped_pipeline()), PipelineFile(for_this_machine(shipped_pipeline()))
    assert any("retryPolicy" in place.task for place in shipped.places())
    for place in shipped.places():
        place.task.pop("retryPolicy", None)
    assert (local.spec, local.platform) == (shipped.spec, shipped.platform)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parallelism": -1}, "parallelism=-1: give the tasks that run at once"),
        ({"shm_size": "8 GB"}, "shm-size='8 GB' is no quantity of Kubernetes; expected such as 500m, 16 or 8Gi"),
        ({"queue": "Team A"}, "queue='Team A' is no name of a queue"),
        ({"cpu_image": "two words"}, "cpu-image='two words' is no image"),
    ],
)
def test_an_option_that_kubernetes_would_refuse_is_refused_here(options, message):
    with pytest.raises(ConfigError, match=message):
        CompileOptions(**options)


@pytest.mark.parametrize("text", ["1", "0.5", "500m", "16Gi", "2G"])
def test_quantities_of_kubernetes(text):
    check_quantity("cpu_limit", text)


@pytest.mark.parametrize("text", ["", "16GB", "-1", "8 Gi", "many"])
def test_what_is_no_quantity_is_refused_with_its_name(text):
    with pytest.raises(ConfigError, match=f"memory_limit='{text}' is no quantity"):
        check_quantity("memory_limit", text)


def test_an_image_with_its_digest_stands_for_itself(tmp_path):
    (tmp_path / "digests.json").write_text(json.dumps(DIGESTS | {"cpu": f"mirror:5000/cpu@{DIGESTS['cpu']}"}))
    images = {"cpu": "ghcr.io/a/cpu:1.0", "gpu": "ghcr.io/a/gpu:1.0"}
    assert pinned_images(tmp_path / "digests.json", images) == {
        "cpu": f"mirror:5000/cpu@{DIGESTS['cpu']}",
        "gpu": f"ghcr.io/a/gpu@{DIGESTS['gpu']}",
    }


@pytest.mark.parametrize(
    "content",
    [
        DIGESTS,
        {"cpu": {"containerimage.digest": DIGESTS["cpu"]}, "cuda": {"containerimage.digest": DIGESTS["gpu"]}},
    ],
    ids=["digests", "metadata of bake"],
)
def test_digests_replace_tags_and_keep_the_registry_with_its_port(tmp_path, content):
    (tmp_path / "digests.json").write_text(json.dumps(content))
    images = {"cpu": "registry:5000/a/cpu:1.0", "gpu": f"registry:5000/a/gpu@sha256:{'0' * 64}"}
    assert pinned_images(tmp_path / "digests.json", images) == {
        "cpu": f"registry:5000/a/cpu@{DIGESTS['cpu']}",
        "gpu": f"registry:5000/a/gpu@{DIGESTS['gpu']}",
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no JSON", "cannot be read"),
        ("[]", "cpu is missing"),
        (json.dumps({"cpu": DIGESTS["cpu"]}), "gpu is missing"),
        (json.dumps(DIGESTS | {"gpu": "latest"}), "gpu is latest"),
    ],
)
def test_a_file_without_both_digests_is_refused(tmp_path, content, message):
    (tmp_path / "digests.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        pinned_images(tmp_path / "digests.json", images_of(shipped_pipeline()))


def test_images_of_a_pipeline_are_found_by_the_gpus_that_a_task_asks_for():
    options = CompileOptions(cpu_image="small", gpu_image="large")
    assert images_of(with_options(shipped_pipeline(), options)) == {"cpu": "small", "gpu": "large"}
