"""Write docs/configuration.md from the configuration classes, so that types and defaults have one source.

python docs/generate_configuration.py            write
python docs/generate_configuration.py --check    exit 1 if the file is not what the classes say

Names, types, bounds and defaults come from the pydantic fields; meanings from the `Attributes:` part of the class's
docstring, those of its base classes included. A field without a meaning is an error.
"""

import inspect
import json
import re
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from generated_page import cell, docstring_entries, summary, write_or_compare
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cbtm.run_config import RunConfig

TARGET = Path(__file__).resolve().parent / "configuration.md"

_HEAD = """\
# Configuration

This file is generated: `python docs/generate_configuration.py` writes it from the configuration classes, and
`tests/test_docs.py` fails where it is stale.

One YAML (or JSON) file holds a run. Keys that are not listed here are refused with the nearest known name, and a key
that stands twice is refused. `1e-4` and `2.5e3` are read as numbers. `null` means absent.

```bash
cbtm config run.yaml                                  # the checked configuration with every default
cbtm run run.yaml --set train.steps=2000 --set cluster.n_clusters=16
```

`--set` takes `section.key=value` with the value as YAML, may be repeated, and is available on every command that
takes a configuration file. The smallest file that runs:

```yaml
root: runs/mine
corpus:
  root: data/mine
seed_model:
  path: models/seed            # a Hugging Face folder
```

Some rules span several fields and are checked before any work:

- `train.sequences_per_step` is a multiple of `cluster.n_clusters`: each expert takes an equal share of the batch.
- `seed_model` has either `path`, or both `scratch` and `training`.
- `seed_model.training.context_length` equals `train.context_length`.
- `evaluate.top_k` lies between 1 and `cluster.n_clusters`, or the number of `train.clusters` or `evaluate.experts`
  where these are given; `evaluate.experts` names clusters that have an expert.
- With `score.top_k`, `evaluate.top_k` is at most that, `evaluate.ensembles` is clustering alone, and neither
  `evaluate.experts` nor `average.averages: [greedy]` is set.
- `evaluate.ensembles` has clustering among them.
- `preset: reference` sets keys of `score`, `routing` and `evaluate`; other values of one's own for these are refused.
- The names of `tasks` differ, and their files are read when the run is planned.
- `train.clusters` names clusters from 0 to `cluster.n_clusters` - 1, none twice.
- The sequences of a model's step are a multiple of `nodes` times `devices`; `nodes` above 1 needs a `root` in S3.
- `train.random_clusters` needs `assign.random_clusters`.
- `cluster.n_clusters` is at most `cluster.max_documents` and `cluster.batch_documents`.
- `cluster.path` and `cluster.assignments` exclude each other.
- `extends` goes with a `root` outside of that run, one cluster more than it has, its tokenizer, seed model, steps,
  context length and share of the batch, and without `cluster.path`, `cluster.assignments`, `cluster.labels`,
  `train.random_clusters`, `train.cluster_token`, `train.steps_by: tokens` and `shared`.
- `cluster.balance: tokens` needs `cluster.backend: balanced`; so does `cluster.max_documents` above
  `cluster.batch_documents`.
- `warmup_steps` is below `steps`; in `train`, `micro_batch_size` is at most `sequences_per_step`.
- `seed_model.scratch.hidden_size` is a multiple of `n_heads`.
- `tracking.uri` holds no credentials.
- `cbtm plan`, with which every run begins, refuses splits that hold each other, a tokenizer with more entries than the
  given seed model, and a `train.context_length` above the given model's number of positions.
"""

_PLAIN = {int: "integer", float: "number", str: "text", bool: "true or false"}
_OR_NULL = ", or null"
_PLURAL = {int: "integers", float: "numbers", str: "texts", dict[str, Any]: "mappings"}
_BOUNDS = (("ge", "≥ {}"), ("gt", "> {}"), ("le", "≤ {}"), ("lt", "< {}"), ("min_length", "at least {} long"))


def render() -> str:
    """The whole page."""
    parts = [_HEAD]
    for path, model in _sections("", RunConfig):
        parts.append(f"## `{path}`\n" if path else "## Top level\n")
        about = summary(inspect.getdoc(model) or "")
        parts.append(f"{about} (`{model.__module__}.{model.__name__}`)\n")
        parts.append("| key | type | default | meaning |\n|---|---|---|---|")
        parts.append("\n".join(_row(path, name, field, model) for name, field in model.model_fields.items()) + "\n")
    return "\n".join(parts)


def _sections(path: str, model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    yield path, model
    for name, field in model.model_fields.items():
        nested = _model_in(field.annotation)
        if nested is not None:
            yield from _sections(f"{path}.{name}" if path else name, nested)


def _row(path: str, name: str, field: FieldInfo, model: type[BaseModel]) -> str:
    nested = _model_in(field.annotation)
    key = f"{path}.{name}" if path else name
    if nested is None:
        kind, absent, _ = _type_text(field.annotation).partition(_OR_NULL)
        kind = ", ".join([kind, *_bounds(field.metadata)]) + absent
    else:
        several = "list of sections" if get_origin(field.annotation) is tuple else "section"
        kind = f"{several} [`{key}`](#{re.sub(r'[^a-z0-9_-]', '', key)})"
    if field.is_required():
        default = "required"
    elif nested is not None and isinstance(field.default, BaseModel):
        default = "as listed there"
    else:
        default = f"`{json.dumps(_plain(field.default))}`"
    meaning = cell(_meanings(model)[name]).replace("None", "null").replace("False", "false")
    return f"| `{name}` | {kind} | {default} | {meaning} |"


def _model_in(annotation: Any) -> type[BaseModel] | None:
    options = (annotation, *get_args(annotation))
    return next((each for each in options if inspect.isclass(each) and issubclass(each, BaseModel)), None)


def _type_text(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return ", ".join([_type_text(arguments[0]), *_bounds(arguments[1].metadata)])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        known = [_type_text(each) for each in arguments if each is not type(None)]
        return " or ".join(known) + (_OR_NULL if type(None) in arguments else "")
    if origin is dict:
        return f"mapping of {_PLURAL[arguments[0]]} to {_PLURAL[arguments[1]]}"
    if origin is tuple:
        first = arguments[0]
        if get_origin(first) is Literal:
            return f"list of {_type_text(first)}"
        bounds = _bounds(get_args(first)[1].metadata) if get_origin(first) is Annotated else []
        plural = _PLURAL[get_args(first)[0] if get_origin(first) is Annotated else first]
        count = "" if arguments[-1] is Ellipsis else f"{len(arguments)} "
        return ", ".join([f"list of {count}{plural}", *(f"each {bound}" for bound in bounds)])
    return _PLAIN[annotation]


def _bounds(metadata: Sequence[Any]) -> list[str]:
    return [text.format(getattr(item, name)) for item in metadata for name, text in _BOUNDS if hasattr(item, name)]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _meanings(model: type[BaseModel]) -> dict[str, str]:
    """Meaning of each field, from the class's docstring and those of its bases."""
    found: dict[str, str] = {}
    for each in reversed(model.__mro__):
        if issubclass(each, BaseModel):
            found |= dict(docstring_entries(inspect.cleandoc(each.__doc__ or ""), "Attributes"))
    missing = sorted(set(model.model_fields) - set(found))
    if missing:
        raise LookupError(f"{model.__name__} does not document {', '.join(missing)} under Attributes:")
    return found


def main(arguments: Sequence[str] | None = None, target: Path = TARGET) -> int:
    """Write, or compare; returns the exit code."""
    return write_or_compare("generate_configuration.py", __doc__, render, target, arguments)


if __name__ == "__main__":
    sys.exit(main())
