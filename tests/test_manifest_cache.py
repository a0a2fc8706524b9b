"""Manifests of one root: read once, at once, and again where they are no answer."""

from dataclasses import replace

import pytest

from cbtm import manifest as manifests
from cbtm import storage
from cbtm.errors import ManifestError
from cbtm.manifest import Manifest, StageSpec
from cbtm.manifest_cache import ManifestCache


def spec_of(root: str, name: str, **inputs: str) -> StageSpec:
    return StageSpec("stage", root, "config", inputs, f"{name}/manifest.json")


def write(spec: StageSpec) -> Manifest:
    made = Manifest(stage=spec.stage, config_digest=spec.config_digest, inputs=dict(spec.inputs), files=())
    storage.write_bytes(spec.manifest_uri, made.model_dump_json().encode())
    return made


def test_each_manifest_is_read_once(root: str):
    spec = spec_of(root, "a")
    made, cache = write(spec), ManifestCache(root)
    assert cache.load(spec) == made
    storage.delete(root, [spec.manifest_name])
    assert cache.load(spec) == made


def test_what_is_read_ahead_is_not_read_again(root: str):
    specs = {name: spec_of(root, name, of=name) for name in "abc"}
    digests = {name: write(spec).digest for name, spec in specs.items()}
    cache = ManifestCache(root)
    cache.read_ahead(specs.values())
    storage.delete(root, [spec.manifest_name for spec in specs.values()])
    assert cache.digests(specs) == digests
    assert len(set(digests.values())) == 3


def test_reading_ahead_what_is_not_there_is_no_error_until_it_is_asked_for(root: str):
    cache, spec = ManifestCache(root), spec_of(root, "a")
    cache.read_ahead([spec])
    with pytest.raises(ManifestError, match=f"{spec.manifest_uri} is not there"):
        cache.load(spec)
    made = write(spec)
    assert cache.load(spec) == made


def test_a_manifest_of_other_inputs_is_refused_until_its_stage_has_run_again(root: str):
    old, new = spec_of(root, "a", of="old"), spec_of(root, "a", of="new")
    write(old)
    cache = ManifestCache(root)
    cache.read_ahead([new])
    with pytest.raises(ManifestError, match="belongs to another configuration or other inputs; run stage stage again"):
        cache.load(new)
    made = write(new)
    assert cache.load(new) == made
    with pytest.raises(ManifestError, match="belongs to another configuration"):
        cache.load(replace(new, config_digest="other"))


def test_a_manifest_answers_to_its_configuration_and_inputs():
    spec = spec_of("root", "a", of="x")
    made = Manifest(stage="stage", config_digest="config", inputs={"of": "x"}, files=())
    assert manifests.answers(made, spec)
    assert not manifests.answers(made, replace(spec, config_digest="other"))
    assert not manifests.answers(made, replace(spec, inputs={}))
