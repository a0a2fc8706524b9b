"""The compiled pipeline that comes with cbtm: read, fitted to a cluster, or made ready for this machine.

`pipelines/` is not in the wheel, so whoever has installed cbtm cannot compile anew. What a cluster may want otherwise
is little and has a fixed place in the file (images, tasks of a loop at once, size of /dev/shm, queue), so it is set
there; `tests/kubeflow/test_pipeline_file.py` compares every option with the pipeline compiled anew, byte by byte.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from cbtm.errors import ConfigError

PIPELINES = ("cbtm", "compare")
"""Names of the pipelines that come with cbtm: one run, and a comparison of several."""
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"

Role = Literal["cpu", "gpu"]
# Under which names a file of digests may speak of an image: the target of the build, or what it is for.
_NAMES: dict[str, Role] = {"cpu": "cpu", "gpu": "gpu", "cuda": "gpu"}

_QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?([KMGTPE]i|[mkMGTPE])?")
_QUEUE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_IMAGE = re.compile(r"[a-z0-9][\w.:/@-]*", re.IGNORECASE)


@dataclass(frozen=True)
class CompileOptions:
    """What is settled in the file and not by a parameter of a run; None keeps what the file has.

    Attributes:
        cpu_image: Image of the tasks without GPUs.
        gpu_image: Image of the tasks with GPUs.
        parallelism: Tasks of one loop that run at once; 0 is all of them.
        shm_size: Size of /dev/shm of a pod with GPUs, a quantity of Kubernetes.
        queue: Kueue's queue for all pods.

    Raises:
        ConfigError: If a value is none that Kubernetes takes.
    """

    cpu_image: str | None = None
    gpu_image: str | None = None
    parallelism: int | None = None
    shm_size: str | None = None
    queue: str | None = None

    def __post_init__(self) -> None:
        if self.parallelism is not None and self.parallelism < 0:
            raise ConfigError(f"parallelism={self.parallelism}: give the tasks that run at once, or 0 for all of them")
        if self.shm_size is not None:
            check_quantity("shm-size", self.shm_size)
        if self.queue is not None and not _QUEUE.fullmatch(self.queue):
            raise ConfigError(
                f"queue={self.queue!r} is no name of a queue; such as gpu-queue: a-z, 0-9 and -, at most 63"
            )
        for name, image in (("cpu-image", self.cpu_image), ("gpu-image", self.gpu_image)):
            if image is not None and not _IMAGE.fullmatch(image):
                raise ConfigError(f"{name}={image!r} is no image; expected registry/name:tag or registry/name@sha256:…")

    def image(self, role: Role) -> str | None:
        """The image of one kind of task."""
        return self.cpu_image if role == "cpu" else self.gpu_image


def check_quantity(name: str, text: str) -> None:
    """Check a quantity of Kubernetes, such as 500m, 16 or 8Gi.

    Raises:
        ConfigError: If it is none.
    """
    if not _QUANTITY.fullmatch(text):
        raise ConfigError(f"{name}={text!r} is no quantity of Kubernetes; expected such as 500m, 16 or 8Gi")


def shipped_pipeline(name: str = "cbtm") -> str:
    """Text of one of the pipelines that come with this cbtm.

    Raises:
        ConfigError: If none has that name.
    """
    if name not in PIPELINES:
        raise ConfigError(f"no pipeline {name!r} comes with cbtm; there are {' and '.join(PIPELINES)}")
    return resources.files("cbtm").joinpath(f"compiled/{name}.yaml").read_text(encoding="utf-8")


def with_options(text: str, options: CompileOptions) -> str:
    """The pipeline as it compiles with these options."""

    def change(spec: dict[str, Any], kubernetes: dict[str, Any]) -> None:
        for executor in spec["deploymentSpec"]["executors"].values():
            container = executor["container"]
            container["image"] = options.image(_role(container)) or container["image"]
        if options.parallelism is not None:
            for task in _tasks(spec):
                if "parameterIterator" in task:
                    _set_parallelism(task, options.parallelism)
        for pod in kubernetes.values():
            for mount in pod.get("emptyDirMounts", []):
                mount["sizeLimit"] = options.shm_size or mount["sizeLimit"]
            if options.queue is not None:
                pod.setdefault("podMetadata", {}).setdefault("labels", {})[QUEUE_LABEL] = options.queue

    return _changed(text, change)


def for_this_machine(text: str) -> str:
    """The pipeline without retries, and of loops that hold loops two turns at once.

    kfp.local keeps to retries, with their pauses, and here somebody waits for the message: what fails at once on one
    machine fails again, and the same command goes on from where it stopped. Tasks of loops within loops would be as
    many as the product of what runs at once; with two, one works where the other waits for its last task.
    """

    def change(spec: dict[str, Any], kubernetes: dict[str, Any]) -> None:
        for task in _tasks(spec):
            task.pop("retryPolicy", None)
            if "parameterIterator" in task and _has_loop(spec, task["componentRef"]["name"]):
                _set_parallelism(task, 2)

    return _changed(text, change)


def images_of(text: str) -> dict[Role, str]:
    """The images that a pipeline runs in."""
    spec = next(iter(yaml.load_all(text, Loader=_LOADER)))
    containers = [executor["container"] for executor in spec["deploymentSpec"]["executors"].values()]
    return {_role(container): container["image"] for container in containers}


def pinned_images(path: Path, images: dict[Role, str]) -> dict[Role, str]:
    """The images by digest, as a file says: `{"cpu": "registry/name@sha256:…", "gpu": …}`.

    Args:
        path: JSON file. A value is an image with its digest; or a digest alone, or the object that `docker buildx bake
            --metadata-file` writes for a target, which then belong to the image of that role.
        images: The images by name; a tag or digest of theirs is left out.

    Raises:
        ConfigError: If the file is no such file, or has no digest for one of the images.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"image digests {path} cannot be read: {error}") from None
    values: dict[Role, str] = {}
    for name, value in found.items() if isinstance(found, dict) else ():
        digest = value.get("containerimage.digest") if isinstance(value, dict) else value
        if name in _NAMES and isinstance(digest, str):
            values[_NAMES[name]] = digest
    pinned: dict[Role, str] = {}
    for role, image in images.items():
        repository, _, digest = values.get(role, "").rpartition("@")
        if not _DIGEST.fullmatch(digest):
            raise ConfigError(
                f'image digests {path}: expected {{"cpu": "registry/name@sha256:…", "gpu": …}}; {role} is '
                f"{values.get(role) or 'missing'}"
            )
        pinned[role] = f"{repository or _repository(image)}@{digest}"
    return pinned


def _repository(image: str) -> str:
    name = image.partition("@")[0]
    head, slash, last = name.rpartition("/")  # a colon before the last slash is that of a registry's port
    return head + slash + last.partition(":")[0]


def _role(container: dict[str, Any]) -> Role:
    return "gpu" if "accelerator" in container.get("resources", {}) else "cpu"


def _set_parallelism(loop: dict[str, Any], parallelism: int) -> None:
    if parallelism:
        loop["iteratorPolicy"] = {"parallelismLimit": parallelism}
    else:
        loop.pop("iteratorPolicy", None)


def _has_loop(spec: dict[str, Any], component: str) -> bool:
    """Tell whether a component is a pipeline that has a loop in it."""
    tasks = spec["components"][component].get("dag", {}).get("tasks", {}).values()
    return any("parameterIterator" in task or _has_loop(spec, task["componentRef"]["name"]) for task in tasks)


def _tasks(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for component in (spec["root"], *spec["components"].values()):
        yield from component.get("dag", {}).get("tasks", {}).values()


def _changed(text: str, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> str:
    """The text after a change to the specification and to what is asked of Kubernetes for each executor."""
    head = [line for line in text.splitlines(keepends=True) if line.startswith("#")]
    spec, platform = yaml.load_all(text, Loader=_LOADER)
    change(spec, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"])
    # As KFP's compiler writes, so that a file that was changed and changed back is the same again.
    return "".join(head) + "---\n".join(yaml.dump(document, sort_keys=True) for document in (spec, platform))


_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
