"""What is in the images that were built; `images/smoke` has run in them before."""

import json
import re
from typing import Any

import pytest

from components import images

pytestmark = pytest.mark.containers

CPU_BYTES = 1_700_000_000  # with torch, kfp and everything else


def test_cpu_image_has_less_than_its_bound(engine: Any):
    assert engine.images.get(images.CPU).attrs["Size"] < CPU_BYTES


@pytest.mark.parametrize("name", [images.CPU, images.GPU])
def test_image_says_what_it_is_and_runs_as_a_number_of_group_0(engine: Any, name: str):
    config = engine.images.get(name).attrs["Config"]
    assert config["User"] == "10001:0"
    assert not config.get("Entrypoint")
    labels = config["Labels"]
    assert labels["org.opencontainers.image.version"] == images.VERSION
    assert re.fullmatch(r"[0-9a-f]{40}", labels["org.opencontainers.image.revision"])
    assert labels["org.opencontainers.image.base.name"]


@pytest.mark.parametrize("name", [images.CPU, images.GPU])
def test_history_and_environment_of_an_image_hold_no_credential(engine: Any, name: str):
    image = engine.images.get(name)
    told = json.dumps([image.history(), image.attrs["Config"]["Env"]])
    assert not re.findall(
        r"(?i)password|secret_access_key|token=|BEGIN [A-Z ]*PRIVATE KEY|://[^/\s\"]+:[^/\s\"]+@", told
    )
