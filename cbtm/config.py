"""Configuration: frozen, validated before any work, with the nearest name for every unknown key.

Config classes sit beside the stage that reads them and derive from `Config`. One YAML file holds a whole
run; `--set train.learning_rate=1e-4` overrides one value. Absence is None, never -1 or "".
"""

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from cbtm.errors import ConfigError


class Config(BaseModel):
    """Base of all configuration classes: immutable, and closed to keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, validate_default=True, allow_inf_nan=False)

    @classmethod
    def parse(cls, values: Mapping[str, Any], *, source: str = "configuration") -> Self:
        """Build from plain values.

        Raises:
            ConfigError: Naming every wrong key and value at once, with the nearest name for unknown keys.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            problems = [_describe(problem, cls) for problem in error.errors()]
            raise ConfigError(f"{source}: " + "; ".join(problems)) from None

    def digest(self) -> str:
        """Hex sha256 of the canonical JSON of all values."""
        return digest_of(self.model_dump(mode="json"))


ConfigT = TypeVar("ConfigT", bound=Config)


def digest_of(value: object) -> str:
    """Hex sha256 of the canonical JSON (sorted keys, no spaces) of plain data."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def parse_text(text: str, *, source: str) -> dict[str, Any]:
    """Read YAML (or JSON, which is YAML) into a mapping.

    Raises:
        ConfigError: If it is not YAML, a key is doubled, or the top level is not a mapping.
    """
    try:
        values = yaml.load(text, Loader=_Loader)  # noqa: S506 - derives from SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: expected a mapping of sections, got {type(values).__name__}")
    return values


def read_file(path: str | Path) -> dict[str, Any]:
    """Read a YAML file into a mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"the configuration {path} is not UTF-8 text") from None
    return parse_text(text, source=str(path))


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str], *, option: str = "--set") -> dict[str, Any]:
    """Return a copy of nested `values` with each `a.b=c` of `overrides` set; c is read as YAML.

    A section that is not there, or is empty, is made. `option` is what errors call an override.

    Raises:
        ConfigError: If an override has no `=` or goes through something that is not a section.
    """
    result: dict[str, Any] = json.loads(json.dumps(values, default=str))
    for override in overrides:
        key, separator, text = override.partition("=")
        path = key.strip().split(".")
        if not separator or not all(path):
            raise ConfigError(f"{option} {override!r}: expected section.key=value")
        section = result
        for part in path[:-1]:
            if section.get(part) is None:
                section[part] = {}
            section = section[part]
            if not isinstance(section, dict):
                raise ConfigError(f"{option} {override!r}: {part!r} is a value, not a section")
        section[path[-1]] = _override_value(text, f"{option} {override!r}")
    return result


def _override_value(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - derives from SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: the value is not YAML: {error}") from None


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a doubled key, of which YAML would silently keep the last, and reads 1e-4 as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


# YAML 1.1 reads 1e-4 and 2.5e3 as text, for want of a dot or a sign; people mean the number, and quote what is text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def _describe(problem: Any, model: type[BaseModel]) -> str:
    location = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        names = sorted(_fields_at(model, problem["loc"][:-1]))
        unknown = str(problem["loc"][-1])
        nearest = difflib.get_close_matches(unknown, names, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are: {', '.join(names)}"
        return f"unknown key {location!r}; {hint}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"{location!r} is missing"
    value = "" if problem["type"] == "value_error" else f" (got {problem['input']!r})"
    return f"{location or 'configuration'}: {message}{value}"


def _fields_at(model: type[BaseModel], path: Sequence[str | int]) -> set[str]:
    current: Any = model
    for part in path:
        field = current.model_fields.get(str(part)) if _is_model(current) else None
        if field is None:
            return set()
        options = (field.annotation, *get_args(field.annotation))
        current = next((option for option in options if _is_model(option)), None)
    return set(current.model_fields) if _is_model(current) else set()


def _is_model(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseModel)
