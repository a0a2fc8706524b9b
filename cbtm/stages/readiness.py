"""Whether a cluster is ready for a run: checked in its pods, before anything expensive, and all faults at once.

Each pod says what it sees: the first one the configuration, its image, the bucket and the tracking server; a pod with
GPUs its own image, the GPUs, and the bucket from where they are. In a pod of Kubernetes files of the pod itself are
refused as a place for anything, for every task has a pod of its own; elsewhere (`cbtm run`) they are what is meant.
"""

import logging
import os
from collections.abc import Iterator

import cbtm
from cbtm import storage
from cbtm.errors import CbtmError, ConfigError
from cbtm.kubernetes import connect
from cbtm.process import in_kubernetes
from cbtm.run_config import PlaceOverrides, RunConfig, parse_config
from cbtm.tracking import tracking_problem
from cbtm.train.compiler import check_compiler
from cbtm.train.config import OptimizationConfig

logger = logging.getLogger(__name__)

# What the AWS libraries take credentials from besides a key: roles of service accounts, of pods, and of tasks.
_ROLE_VARIABLES = (
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_PROFILE",
)


MOST_GROUPS = 500


class NotReadyError(CbtmError):
    """What a run needs is not there; the message lists all that is missing."""


def check_cluster(text: str, place: PlaceOverrides, *, compiled_by: str) -> RunConfig:
    """Check configuration, image, bucket and tracking server.

    Args:
        text: The run's configuration, YAML or JSON.
        place: What this place knows better than the configuration.
        compiled_by: Version of cbtm that compiled the pipeline.

    Returns:
        The configuration of this place.

    Raises:
        NotReadyError: With everything that is wrong.
    """
    problems = list(_version_problems(compiled_by))
    try:
        config = parse_config(text, place)
    except ConfigError as error:
        raise _not_ready([*problems, str(error)]) from None  # without it there is nothing more to look at
    problems += _root_problems(config.root)
    problems += _extension_problems(config.extends)
    problems += _tracking_problems(config)
    problems += _trainjob_problems(config)
    problems += _loop_problems(config)
    if problems:
        raise _not_ready(problems)
    logger.info("root=%s tracking=%s ready", config.root, config.tracking.uri if config.tracking.enabled else "off")
    return config


def check_gpus(text: str, gpu_count: str, *, compiled_by: str) -> None:
    """Check the image of a pod with GPUs, what it sees of them, and the bucket.

    Args:
        text: The run's configuration as `check_cluster` returned it.
        gpu_count: GPUs that the pod asks for. Only Kubernetes keeps what it says; elsewhere the configuration alone
            tells whether there must be GPUs.
        compiled_by: Version of cbtm that compiled the pipeline.

    Raises:
        ConfigError: If `gpu_count` is no number.
        NotReadyError: With everything that is wrong.
    """
    if not (gpu_count or "0").isdecimal():
        raise ConfigError(f"gpu_count={gpu_count!r} is no number of GPUs; give it as text, such as '2'")
    config = parse_config(text)
    promised = int(gpu_count or "0") if in_kubernetes() else None
    problems = [
        *_version_problems(compiled_by),
        *_gpu_problems(config, promised),
        *_root_problems(config.root),
    ]
    if problems:
        raise _not_ready(problems)


def _not_ready(problems: list[str]) -> NotReadyError:
    if len(problems) == 1:
        return NotReadyError(f"not ready: {problems[0]}")
    listed = "; ".join(f"({number}) {problem}" for number, problem in enumerate(problems, 1))
    return NotReadyError(f"not ready, {len(problems)} problems: {listed}")


def _version_problems(compiled_by: str) -> Iterator[str]:
    if cbtm.__version__ != compiled_by:
        yield (
            f"this image has cbtm {cbtm.__version__}, and the pipeline was compiled by cbtm {compiled_by}; use the "
            f"image of {compiled_by}, or the pipeline that comes with {cbtm.__version__}"
        )


def _root_problems(root: str) -> Iterator[str]:
    if in_kubernetes() and not storage.is_s3(root):
        yield (
            f"root={root} is a folder of this pod, and every task has a pod of its own; give an s3:// prefix, in the "
            "configuration or as the parameter root"
        )
        return
    try:
        storage.check_writable(root)
    except CbtmError as error:
        yield f"{error}{_credentials_hint(root)}"


def _extension_problems(extends: str | None) -> Iterator[str]:
    if extends is not None and in_kubernetes() and not storage.is_s3(extends):
        yield f"extends={extends} is a folder of this pod; give the s3:// prefix of the run that is extended"


def _credentials_hint(root: str) -> str:
    """What the environment has of S3 credentials, where that may be the reason; names, never values."""
    if not storage.is_s3(root) or not in_kubernetes():
        return ""
    pair = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    missing = [name for name in pair if not os.environ.get(name)]
    if not missing or any(os.environ.get(name) for name in _ROLE_VARIABLES):
        return ""
    return (
        f" (this pod has no {' and no '.join(missing)} and no role: the secret that the parameter s3_secret names is "
        "not in this namespace, or has no such key)"
    )


def _tracking_problems(config: RunConfig) -> Iterator[str]:
    tracking = config.tracking
    if not tracking.enabled:
        return
    if in_kubernetes() and tracking.resolved_uri().startswith("sqlite"):
        yield (
            "tracking goes to a file of this pod, which is lost with it; give the server's address as tracking.uri or "
            "as the parameter tracking_uri, or set tracking.enabled=false"
        )
        return
    try:
        problem = tracking_problem(tracking)
    except CbtmError as error:
        problem = str(error)
    if problem is not None:
        yield f"tracking server {problem}{_tracking_hint(problem)}"


def _tracking_hint(problem: str) -> str:
    if "Invalid Host header" in problem:
        return "; start the server with --allowed-hosts that names the host as it stands in this address, with its port"
    if "error code 401" in problem or "error code 403" in problem:
        return (
            "; check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, in the secret "
            + ("that the parameter tracking_secret names")
        )
    return "; check the address, or set tracking.enabled=false"


def _trainjob_problems(config: RunConfig) -> Iterator[str]:
    """Whether TrainJobs can be had, where some training is on several machines."""
    trainings = [one for one in (config.train, config.seed_model.training) if one is not None and one.nodes > 1]
    for namespace in sorted({one.node.namespace for one in trainings}, key=str):
        try:
            with storage.patience(0):
                connect(namespace).read("cbtm-check")  # there is none: it is the answer that counts
        except CbtmError as error:
            yield f"train.nodes above 1: {error}"


def _loop_problems(config: RunConfig) -> Iterator[str]:
    """Whether the loop over groups fits into what Argo and Kubernetes hold of a workflow (docs/scaling.md)."""
    groups = config.assign.max_groups
    if in_kubernetes() and groups > MOST_GROUPS:
        yield (
            f"assign.max_groups={groups} is more than the {MOST_GROUPS} tasks that a loop of a pipeline holds; lower "
            "it, and each task takes more shards"
        )


def _gpu_problems(config: RunConfig, promised: int | None) -> Iterator[str]:
    training = config.seed_model.training
    sections = {"train": config.train} | ({"seed_model.training": training} if training is not None else {})
    on_gpus = {name: one for name, one in sections.items() if one.device != "cpu" and one.nodes == 1}
    wanted = {name: section.devices for name, section in on_gpus.items() if promised or section.device == "cuda"}
    if promised is not None:
        for name, devices in wanted.items():
            if devices > promised:
                yield f"{name}.devices={devices}, but the parameter gpu_count={promised}; make them equal"
    expected = promised if promised is not None else max(wanted.values(), default=0)
    for name, section in sections.items():
        if section.compile:
            yield from _compiler_problems(name, section, promised)
    if expected:
        yield from _visible_gpu_problems(expected, config)


def _compiler_problems(name: str, section: OptimizationConfig, promised: int | None) -> Iterator[str]:
    if section.device == "auto" and section.nodes == 1:
        # As the trainer will find it; the pods of a TrainJob have GPUs and this image.
        on_gpu = _sees_gpus() if promised is None else promised > 0
    else:
        on_gpu = section.device != "cpu"
    try:
        check_compiler("cuda" if on_gpu else "cpu")
    except ConfigError as error:
        yield f"{name}: {error}"


def _sees_gpus() -> bool:
    import torch

    return torch.cuda.is_available()


def _visible_gpu_problems(expected: int, config: RunConfig) -> Iterator[str]:
    try:
        import torch
    except ImportError as error:
        yield f"this image has no PyTorch ({error}); use the GPU image"
        return
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found < expected:
        built = torch.version.cuda or "none: this PyTorch is for the CPU"
        yield (
            f"GPUs: {expected} expected, {found} visible (PyTorch {torch.__version__}, CUDA {built}); check "
            "the GPU image, gpu_type, and the device plugin of the nodes"
        )
        return
    for number in range(expected):
        try:
            # A driver too old, or a GPU that this PyTorch has no code for, shows at the first computation.
            total = torch.ones(1024, device=f"cuda:{number}").sum().item()
        except RuntimeError as error:
            yield f"GPU {number} ({torch.cuda.get_device_name(number)}) does not compute: {str(error).splitlines()[0]}"
            continue
        assert total == 1024
        logger.info("gpu=%d name=%s", number, torch.cuda.get_device_name(number))
    if config.train.precision == "bfloat16" and not torch.cuda.is_bf16_supported():
        yield f"train.precision=bfloat16, which {torch.cuda.get_device_name(0)} does not compute in; use float16"
