"""Write docs/components.md from the components and the compiled pipelines, so that the page has one source.

python docs/generate_components.py            write
python docs/generate_components.py --check    exit 1 if the file is not what they say

Inputs, outputs, images and meanings of a component come from the objects in `components/` and the docstrings of their
functions; tasks and parameters of a pipeline from its file in `cbtm/compiled/`. An input or an artifact without a
meaning is an error.
"""

import importlib
import inspect
import json
import pkgutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from generated_page import cell, docstring_entries, summary, write_or_compare
from kfp.dsl.base_component import BaseComponent

PROJECT = Path(__file__).resolve().parents[1]
TARGET = PROJECT / "docs/components.md"
COMPILED = PROJECT / "cbtm/compiled"

_HEAD = """\
# Components and pipelines

This file is generated: `python docs/generate_components.py` writes it from `components/` and from the compiled
pipelines in `cbtm/compiled/`, and `tests/docs/test_components_page.py` fails where it is stale.

A component is a doorway: its body calls one function of `cbtm.stages`, which the command line calls as well. Every
artifact is small: models, tokens and scores stay below the run's root, and an artifact holds the manifest that names
them. How the pipelines are submitted is in [kubeflow.md](kubeflow.md).
"""

_KINDS = {
    "STRING": "text",
    "LIST": "list",
    "STRUCT": "mapping",
    "NUMBER_INTEGER": "integer",
    "NUMBER_DOUBLE": "number",
    "BOOLEAN": "true or false",
}


def render() -> str:
    """The whole page."""
    found = list(_components())
    parts = [_HEAD, "## Components\n", *(_component(one) for one in found)]
    functions = {one.python_func.__name__ for one in found}
    for path in sorted(COMPILED.glob("*.yaml")):
        parts.append(_pipeline(path, functions))
    return "\n".join(parts)


def _components() -> Iterator[Any]:
    """Every component of `components/`, by module and then as they stand in it."""
    sys.path.insert(0, str(PROJECT))
    try:
        package = importlib.import_module("components")
        for module in sorted(each.name for each in pkgutil.iter_modules(package.__path__)):
            here = importlib.import_module(f"components.{module}")
            yield from (value for value in vars(here).values() if isinstance(value, BaseComponent))
    finally:
        sys.path.remove(str(PROJECT))


def _component(component: Any) -> str:
    function, spec = component.python_func, component.component_spec
    text = inspect.getdoc(function) or ""
    meanings = dict(docstring_entries(text, "Args")) | dict(docstring_entries(text, "Returns"))
    rows = [
        *(("input", name, _KINDS[_parameter_type(one.type)]) for name, one in (spec.inputs or {}).items()),
        *(("output", name, _output_type(one.type)) for name, one in (spec.outputs or {}).items()),
    ]
    missing = [name for _, name, _ in rows if name not in meanings]
    if missing:
        raise LookupError(f"{function.__module__}.{function.__name__} does not document {', '.join(missing)}")
    table = [f"| {way} | `{name}` | {kind} | {cell(meanings[name])} |" for way, name, kind in rows]
    head = f"### `{function.__module__}.{function.__name__}`\n\n{summary(text)}\n\nImage: `{_image(component)}`\n"
    return "\n".join([head, "| | name | type | meaning |\n|---|---|---|---|", *table, ""])


def _image(component: Any) -> str:
    return str(component.component_spec.implementation.container.image)


def _parameter_type(name: str) -> str:
    """Name of a parameter's type in a compiled pipeline; a component has it as typing.List[str], String or LIST."""
    plain = name.removeprefix("typing.").partition("[")[0].upper()
    return {"DICT": "STRUCT", "INTEGER": "NUMBER_INTEGER", "FLOAT": "NUMBER_DOUBLE", "BOOL": "BOOLEAN"}.get(
        plain, plain
    )


def _output_type(name: str) -> str:
    kind = _parameter_type(name)
    return _KINDS[kind] if kind in _KINDS else f"artifact `{name.partition('@')[0]}`"


def _pipeline(path: Path, functions: set[str]) -> str:
    spec = next(iter(yaml.safe_load_all(path.read_text(encoding="utf-8"))))
    info = spec["pipelineInfo"]
    lines = [f"## Pipeline `{info['name']}`\n", f"{info.get('description', '')} File: `cbtm/compiled/{path.name}`.\n"]
    lines.append("| task | component | loop over | tried again | after |\n|---|---|---|---|---|")
    for task in _tasks(spec, spec["root"]["dag"], ""):
        if task["function"] not in functions:
            raise LookupError(f"{path.name}: task {task['name']} runs {task['function']}, which components/ lacks")
        after = ", ".join(f"`{name}`" for name in task["after"])
        lines.append(
            f"| `{task['name']}` | `{task['function']}` | {task['loop']} | {task['tries'] or 'no'} | {after} |"
        )
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    lines.append("\n| parameter | type | default | meaning |\n|---|---|---|---|")
    for name, one in parameters.items():
        if not one.get("description"):
            raise LookupError(f"{path.name}: parameter {name} has no meaning in the pipeline's docstring")
        default = f"`{json.dumps(one['defaultValue'])}`" if "defaultValue" in one else "required"
        lines.append(f"| `{name}` | {_KINDS[one['parameterType']]} | {default} | {cell(one['description'])} |")
    return "\n".join([*lines, ""])


def _tasks(spec: dict[str, Any], dag: dict[str, Any], loop: str) -> Iterator[dict[str, Any]]:
    """The tasks that are pods, each after those that it waits for; `loop` names the items of the loops around it."""
    for name in _in_order(dag["tasks"]):
        task = dag["tasks"][name]
        component = spec["components"][task["componentRef"]["name"]]
        after = sorted(one for before in task.get("dependentTasks", []) for one in _pods(spec, dag, before))
        items = task.get("parameterIterator", {}).get("items", {}).get("inputParameter", "")
        inner = ", ".join(part for part in (loop, items.removeprefix("pipelinechannel--").replace("_", " ")) if part)
        if "dag" in component:
            for one in _tasks(spec, component["dag"], inner):
                yield one | {"after": one["after"] or after}
            continue
        container = spec["deploymentSpec"]["executors"][component["executorLabel"]]["container"]
        yield {
            "name": name,
            "function": container["args"][container["args"].index("--function_to_execute") + 1],
            "loop": inner,
            "tries": task.get("retryPolicy", {}).get("maxRetryCount", 0),
            "after": after,
        }


def _pods(spec: dict[str, Any], dag: dict[str, Any], name: str) -> Iterator[str]:
    """Names of the tasks that are pods within a task of `dag`."""
    component = spec["components"][dag["tasks"][name]["componentRef"]["name"]]
    if "dag" not in component:
        yield name
        return
    for inner in component["dag"]["tasks"]:
        yield from _pods(spec, component["dag"], inner)


def _in_order(tasks: dict[str, Any]) -> list[str]:
    """Names of tasks such that each comes after those that it depends on; otherwise by name."""
    done: list[str] = []
    while len(done) < len(tasks):
        ready = (name for name, task in sorted(tasks.items()) if name not in done)
        done.append(next(name for name in ready if set(tasks[name].get("dependentTasks", [])) <= set(done)))
    return done


def main(arguments: Sequence[str] | None = None, target: Path = TARGET) -> int:
    """Write, or compare; returns the exit code."""
    return write_or_compare("generate_components.py", __doc__, render, target, arguments)


if __name__ == "__main__":
    sys.exit(main())
