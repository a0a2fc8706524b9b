"""Parameters of a pipeline run: what people give, checked and brought to the types that the pipeline takes.

What is wrong with them would show on the cluster in minutes, and partly not at all: KFP reads a number in the place of
a GPU count as no GPU (`pipelines/pods.py`). So names, types, quantities and what contradicts the configuration are
refused before anything is sent.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cbtm import storage
from cbtm.config import parse_text, read_file
from cbtm.errors import ConfigError
from cbtm.kubeflow.pipeline_file import check_quantity
from cbtm.run_config import PlaceOverrides, RunConfig, parse_config

_QUANTITIES = ("cpu_request", "cpu_limit", "memory_request", "memory_limit")
_KINDS: dict[str, tuple[type, str]] = {"LIST": (list, "a list"), "STRUCT": (dict, "an object")}
CONFIG = "config"


def parameter_types(pipeline: str) -> dict[str, str]:
    """Name to type (STRING, LIST, STRUCT …) of every parameter of a compiled pipeline."""
    spec = next(iter(yaml.safe_load_all(pipeline)))
    inputs = spec["root"].get("inputDefinitions", {}).get("parameters", {})
    return {name: one["parameterType"] for name, one in inputs.items()}


def read_parameters(file: Path | None, assignments: Sequence[str], types: Mapping[str, str]) -> dict[str, Any]:
    """Parameters of a YAML file, and of `name=value` assignments, which go before those of the file.

    Args:
        file: YAML mapping of names to values.
        assignments: `name=value`; the value of a list or an object is YAML, any other is taken as it is written.
        types: Types of the pipeline's parameters.

    Raises:
        ConfigError: If a name is not known, a value is of another type or no quantity, or the configuration is among
            them.
    """
    values: dict[str, Any] = read_file(file) if file is not None else {}
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not separator or not name.strip():
            raise ConfigError(f"--param {assignment!r}: expected name=value")
        structured = types.get(name.strip()) in _KINDS
        values[name.strip()] = parse_text(f"value: {text}", source=f"--param {name}")["value"] if structured else text
    return {name: _checked(name, value, types) for name, value in values.items()}


def _checked(name: str, value: Any, types: Mapping[str, str]) -> Any:
    if name == CONFIG:
        raise ConfigError("config is no parameter of its own here: it is the configuration file that is submitted")
    if name not in types:
        nearest = difflib.get_close_matches(name, types, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are: {', '.join(sorted(set(types) - {CONFIG}))}"
        raise ConfigError(f"parameter {name!r} is not known; {hint}")
    if types[name] in _KINDS:
        kind, words = _KINDS[types[name]]
        if not isinstance(value, kind):
            raise ConfigError(f"parameter {name}={value!r} is to be {words}, as JSON or YAML")
        return value
    if value is None or isinstance(value, bool | list | dict):
        raise ConfigError(f"parameter {name}={value!r} is to be text or a number")
    if name.removeprefix("gpu_") in _QUANTITIES:
        check_quantity(name, str(value))
    return str(value)


def with_configuration(config: RunConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters of a run: those given, the configuration, and as many GPUs as it trains on.

    Raises:
        ConfigError: If results would go to a folder of a pod, the configuration and the parameters are not valid
            together, or a training takes more devices than a pod has GPUs.
    """
    # What differs from the defaults: Kubeflow's page shows it, and its MLflow plugin logs it as one parameter.
    text = config.model_dump_json(exclude_defaults=True)
    place = PlaceOverrides(
        root=given.get("root") or None,
        tracking_uri=given.get("tracking_uri") or None,
        price_per_hour=given.get("price_per_hour") or None,
        more=tuple(given.get("overrides") or ()),
    )
    effective = parse_config(text, place)
    if not storage.is_s3(effective.root):
        raise ConfigError(
            f"root={effective.root} is a folder, and the pods of a cluster share none; give an s3:// prefix with "
            "--set root=s3://… or --param root=s3://…"
        )
    needed = gpus_needed(effective)
    gpus = str(given.get("gpu_count") or needed)
    if not gpus.isdecimal() or int(gpus) < needed:
        raise ConfigError(
            f"gpu_count={gpus}, but the configuration trains a model on {needed}; leave gpu_count out to get as many"
        )
    return {**given, CONFIG: text, "gpu_count": gpus}


def gpus_needed(config: RunConfig) -> int:
    """Most GPUs that one task of the pipeline uses; 0 where all is on processors.

    A training on several machines has their GPUs, which a TrainJob asks for; its models are scored on one.
    """
    trainings = [config.train, *([config.seed_model.training] if config.seed_model.training is not None else [])]
    on_gpus = [training for training in trainings if training.device != "cpu"]
    return max((training.devices if training.nodes == 1 else 1 for training in on_gpus), default=0)
