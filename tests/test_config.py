"""Configuration: what is refused, what the message says, what an override means."""

import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field, model_validator

from cbtm.config import Config, apply_overrides, digest_of, parse_text, read_file
from cbtm.errors import ConfigError
from cbtm.run_config import RunConfig


class Inner(Config):
    learning_rate: float = Field(default=1e-3, gt=0)
    steps: int = 10


class Outer(Config):
    name: str = "run"
    train: Inner = Inner()
    seed: Inner | None = None


class Pair(Config):
    low: int = 0
    high: int = 1

    @model_validator(mode="after")
    def _ordered(self) -> "Pair":
        if self.low > self.high:
            raise ValueError(f"low={self.low} is above high={self.high}")
        return self


def run_values(**changes: Any) -> dict[str, Any]:
    return {"root": "runs/a", "corpus": {"root": "corpus"}, "seed_model": {"path": "seed"}} | changes


# --- parsing ---


def test_an_unknown_key_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"unknown key 'nane'; did you mean 'name'\?"):
        Outer.parse({"nane": "x"})


def test_an_unknown_key_of_a_section_is_refused_with_the_nearest_name_of_that_section():
    with pytest.raises(ConfigError, match=r"unknown key 'train\.lerning_rate'; did you mean 'learning_rate'\?"):
        RunConfig.parse(run_values(train={"lerning_rate": 1e-4}))


def test_an_unknown_key_of_an_optional_section_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"unknown key 'seed\.step'; did you mean 'steps'\?"):
        Outer.parse({"seed": {"step": 1}})


def test_an_unknown_key_that_is_like_no_other_is_refused_with_all_names():
    with pytest.raises(ConfigError, match="unknown key 'zzz'; known are: name, seed, train"):
        Outer.parse({"zzz": 1})


def test_all_problems_stand_in_one_error():
    with pytest.raises(ConfigError) as caught:
        RunConfig.parse({"corpus": {}, "train": {"steps": 0, "warm": 1}, "seed_model": {"path": "x"}}, source="a.yaml")
    message = str(caught.value)
    assert message.startswith("a.yaml: ")
    assert "'root' is missing" in message
    assert "'corpus.root' is missing" in message
    assert "train.steps: Input should be greater than or equal to 1 (got 0)" in message
    assert "unknown key 'train.warm'" in message


def test_the_message_of_a_rule_between_two_values_stands_without_its_input():
    with pytest.raises(ConfigError) as caught:
        Pair.parse({"low": 3, "high": 2}, source="file")
    assert str(caught.value) == "file: configuration: low=3 is above high=2"


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_number_that_is_not_finite_is_refused_before_the_digest_meets_it(value: float):
    with pytest.raises(ConfigError, match=r"train\.learning_rate: Input should be a finite number"):
        Outer.parse({"train": {"learning_rate": value}})


def test_a_configuration_cannot_be_changed():
    config = Outer()
    with pytest.raises(ValueError, match="frozen"):
        config.name = "other"  # type: ignore[misc]


# --- YAML ---


@pytest.mark.parametrize("text", ["train:\n  steps: 1\n  steps: 2\n", "train: {steps: 1, steps: 2}", "a: 1\na: 1"])
def test_a_doubled_key_is_refused_with_its_place(text: str):
    with pytest.raises(ConfigError, match=r"file is not YAML: the key '(steps|a)' stands twice\n.*line \d"):
        parse_text(text, source="file")


def test_the_same_key_in_two_sections_is_no_double():
    assert parse_text("a: {steps: 1}\nb: {steps: 2}", source="file") == {"a": {"steps": 1}, "b": {"steps": 2}}


def test_a_merge_key_takes_over_a_section_and_may_be_overruled():
    text = "base: &base {steps: 1, lr: 2}\ntrain:\n  <<: *base\n  lr: 3\n"
    assert parse_text(text, source="file")["train"] == {"steps": 1, "lr": 3}


@pytest.mark.parametrize(("text", "kind"), [("- a\n- b", "list"), ("3", "int"), ("text", "str")])
def test_what_is_no_mapping_is_refused(text: str, kind: str):
    with pytest.raises(ConfigError, match=f"file: expected a mapping of sections, got {kind}"):
        parse_text(text, source="file")


@pytest.mark.parametrize("text", ["a: [1", "? [1, 2]\n: 3", "x: !!python/object/apply:os.getcwd []"])
def test_what_is_no_plain_yaml_is_refused(text: str):
    with pytest.raises(ConfigError, match="file is not YAML: "):
        parse_text(text, source="file")


def test_an_empty_file_is_an_empty_configuration():
    assert parse_text("# nothing but a comment\n", source="file") == {}


def test_json_is_read_as_well():
    assert parse_text('{"train": {"learning_rate": 1e-4}}', source="file") == {"train": {"learning_rate": 1e-4}}


def test_a_number_without_a_dot_is_a_number_in_a_file_too():
    values = parse_text('a: [1e-4, -2E3, 2.5e3, .5e1, "1e-4", 1e, e4]', source="file")
    assert values["a"] == [1e-4, -2000.0, 2500.0, 5.0, "1e-4", "1e", "e4"]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*absent\.yaml: No such file"):
        read_file(tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml is not UTF-8 text"):
        read_file(tmp_path / "latin.yaml")


# --- overrides ---


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-3e2", -300.0),
        (" 1e-4 ", 1e-4),
        ("7", 7),
        ("0.5", 0.5),
        ("true", True),
        ("null", None),
        ("", None),
        ("[1e-4, 2]", [1e-4, 2]),
        ("{a: 1}", {"a": 1}),
        ("s3://bucket/key?a=b", "s3://bucket/key?a=b"),
        ('"1e-4"', "1e-4"),
        ("infinity", "infinity"),
        ("nan", "nan"),
    ],
)
def test_an_override_is_read_as_yaml(text: str, value: object):
    found = apply_overrides({}, [f"key={text}"])["key"]
    assert found == value
    assert type(found) is type(value)


def test_an_override_sets_one_value_of_a_section_and_leaves_the_others():
    values = {"train": {"learning_rate": 1.0, "steps": 5}, "name": "a"}
    result = apply_overrides(values, ["train.learning_rate=1e-4", "cluster.n_clusters=3"])
    assert result == {"train": {"learning_rate": 1e-4, "steps": 5}, "name": "a", "cluster": {"n_clusters": 3}}
    assert values == {"train": {"learning_rate": 1.0, "steps": 5}, "name": "a"}


def test_an_override_fills_a_section_that_stands_empty_in_the_file():
    assert apply_overrides(parse_text("train:\n", source="file"), ["train.steps=3"]) == {"train": {"steps": 3}}


def test_of_two_overrides_of_one_key_the_last_holds():
    assert apply_overrides({}, ["a.b=1", "a.b=2"]) == {"a": {"b": 2}}


@pytest.mark.parametrize("override", ["train.steps", "=3", "train..steps=3", ".steps=3", "train.=3", ""])
def test_an_override_of_another_form_is_refused(override: str):
    with pytest.raises(ConfigError) as caught:
        apply_overrides({}, [override])
    assert str(caught.value) == f"--set {override!r}: expected section.key=value"


def test_an_override_through_a_value_is_refused():
    with pytest.raises(ConfigError, match=r"--set 'train\.steps\.x=1': 'steps' is a value, not a section"):
        apply_overrides({"train": {"steps": 5}}, ["train.steps.x=1"])


@pytest.mark.parametrize("override", ["a={b: 1", "a={b: 1, b: 2}"])
def test_an_override_whose_value_is_no_yaml_is_refused(override: str):
    with pytest.raises(ConfigError, match=r"--set 'a=\{b: 1.*': the value is not YAML: "):
        apply_overrides({}, [override])


# --- digest ---


def test_the_digest_is_the_sha256_of_canonical_json():
    # sha256 of {"a":[1,2.5,null],"b":"\u00e9"}
    assert digest_of({"b": "é", "a": [1, 2.5, None]}) == (
        "45584828a616e524473fb887d415f828918fb9676efdaa57c062231771111499"
    )


def test_the_digest_depends_on_values_and_not_on_how_they_were_written():
    spelled = Outer.parse(parse_text("train: {steps: 10, learning_rate: 1e-3}\nname: run", source="file"))
    assert spelled.digest() == Outer().digest()
    assert Outer.parse({"train": {"steps": 11}}).digest() != Outer().digest()
    assert Outer.parse({"seed": {}}).digest() != Outer().digest()


def test_every_value_of_a_run_changes_its_digest():
    base = RunConfig.parse(run_values()).digest()
    changed = [
        RunConfig.parse(run_values(train={"learning_rate": 1e-4})).digest(),
        RunConfig.parse(run_values(corpus={"root": "corpus", "max_bad_lines": 0})).digest(),
        RunConfig.parse(run_values(root="runs/b")).digest(),
    ]
    assert len({base, *changed}) == 4


def test_the_digest_refuses_what_json_cannot_say():
    with pytest.raises(ValueError, match="JSON compliant"):
        digest_of({"a": math.nan})


# --- several machines ---


def test_several_machines_need_a_root_that_all_reach():
    train = {"nodes": 2, "sequences_per_step": 64}
    with pytest.raises(ConfigError) as error:
        RunConfig.parse(run_values(train=train)).check()
    assert str(error.value) == (
        "train.nodes=2 machines share nothing but an object store, and root=runs/a is none; use an s3:// root"
    )
    RunConfig.parse(run_values(train=train, root="s3://bucket/a")).check()


def test_sequences_of_a_step_divide_among_the_devices_of_all_machines():
    # Two clusters share 16 sequences: 8 for each expert, and 2 machines of 8 devices are 16 ranks.
    values = run_values(root="s3://bucket/a", cluster={"n_clusters": 2})
    train = {"nodes": 2, "devices": 8, "sequences_per_step": 16}
    with pytest.raises(ConfigError) as error:
        RunConfig.parse(values | {"train": train}).check()
    assert str(error.value) == (
        "train.devices=8 on each of train.nodes=2: the 8 sequences of a model's step do not divide among them; use a "
        "divisor of 8, or other sequences_per_step"
    )
    RunConfig.parse(values | {"train": train | {"devices": 4}}).check()
