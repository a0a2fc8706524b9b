"""docs/kubeflow.md says what the compiled pipeline has."""

import json
import re
from pathlib import Path

import yaml

from cbtm.kubeflow.pipeline_file import shipped_pipeline

PAGE = (Path(__file__).parents[2] / "docs/kubeflow.md").read_text(encoding="utf-8")


def test_every_parameter_is_listed_with_its_default():
    section = PAGE.partition("### Parameters")[2].partition("\n## ")[0]
    listed = {}
    for names, defaults in re.findall(r"^\| (`[^|]+`) \| ([^|]+) \|", section, re.MULTILINE):
        values = [value.strip("` ") for value in defaults.split(",")]
        listed |= dict(zip((name.strip("` ") for name in names.split(",")), values, strict=True))
    inputs = next(iter(yaml.safe_load_all(shipped_pipeline())))["root"]["inputDefinitions"]["parameters"]
    defaults = {name: one["defaultValue"] for name, one in inputs.items() if name != "config"}
    written = {name: value if isinstance(value, str) else json.dumps(value) for name, value in defaults.items()}
    assert listed == {name: value or "empty" for name, value in written.items()}


def test_every_task_is_in_the_table_of_what_runs():
    section = PAGE.partition("## What runs")[2].partition("\n## ")[0]
    spec = next(iter(yaml.safe_load_all(shipped_pipeline())))
    executors = {label.removeprefix("exec-") for label in spec["deploymentSpec"]["executors"]}
    assert set(re.findall(r"`([a-z]+(?:-[a-z]+)+)`", section.partition("`check-cluster` reads")[0])) == executors
