"""Arrows between modules point one way: pipelines → components → cbtm, and within cbtm along `LAYERS`."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module may import those of its own layer and of the layers above it in this list.
LAYERS = [
    {
        *("errors", "config", "storage", "s3", "s3_errors", "outage", "manifest", "manifest_cache", "corpus"),
        *("parquet", "kubernetes", "plan", "tokens", "progress", "process", "tracking"),
    },
    {"cluster"},
    {"branch"},
    {"train"},
    {"merge"},
    {"run", "run_config", "compare_config", "comparison", "planned"},
    {"stages"},
    {"kubeflow"},
    {"local", "cli", "cli_cluster", "cli_corpus", "cli_extend", "cli_compare"},
]
# Makes corpora; no stage needs it, so it stands beside the others and sees little of them.
CORPORA_MAY_IMPORT = {"corpora", "errors", "corpus", "config", "storage"}
MAY_IMPORT_CORPORA = {"cli", "cli_compare", "cli_corpus"}
HEAVY = {"kfp", "kubernetes", "mlflow", "torch", "transformers"}


@dataclass(frozen=True)
class Import:
    """One import: who, what (dotted), in which line, and whether it runs when the module is imported."""

    path: Path
    target: str
    line: int
    at_import: bool

    def __str__(self) -> str:
        return f"{self.path}:{self.line} imports {self.target}"


def sources(*folders: str) -> list[Path]:
    found = [path.relative_to(ROOT) for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert found, folders
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def walk(node: ast.AST, at_import: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    """Every node below `node`, and whether it runs when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            runs = False
        else:
            runs = at_import and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield child, runs
        yield from walk(child, runs)


def imports(path: Path) -> list[Import]:
    """All imports of a file, those within functions and for type checkers included."""
    found = []
    for node, at_import in walk(tree(path)):
        if isinstance(node, ast.Import):
            found += [Import(path, alias.name, node.lineno, at_import) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are written in full"
            for alias in node.names:
                # `from cbtm import storage` takes the module, `from cbtm.storage import join` a name of it.
                target = f"{node.module}.{alias.name}"
                found.append(Import(path, target if is_module(target) else str(node.module), node.lineno, at_import))
    return found


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def top(target: str) -> str:
    return target.split(".")[0]


def part(dotted: str) -> str:
    """`cbtm.train.config` → `train`; `cbtm` itself → ``."""
    return dotted.partition(".")[2].split(".")[0]


def part_of(path: Path) -> str:
    """`cbtm/train/config.py` → `train`; `cbtm/run.py` → `run`; `cbtm/__init__.py` → ``."""
    return "" if path == Path("cbtm/__init__.py") else path.parts[1].removesuffix(".py")


def layer(name: str) -> int:
    return next(number for number, names in enumerate(LAYERS) if name in names)


CBTM = sources("cbtm")


def violations(found: list[Import]) -> list[str]:
    return [str(one) for one in found]


# --- the walk itself ---


def test_the_walk_sees_imports_in_functions_and_tells_when_they_run():
    found = {one.target: one.at_import for one in imports(Path("cbtm/s3.py"))}
    assert found["boto3"] is False
    assert found["mypy_boto3_s3"] is False  # for type checkers
    assert found["cbtm.errors"] is True


def test_every_part_of_cbtm_has_its_layer():
    known = set().union(*LAYERS) | {"", "corpora"}
    assert {part_of(path) for path in CBTM} == known


# --- within cbtm ---


@pytest.mark.parametrize("path", CBTM, ids=str)
def test_arrows_within_cbtm_point_down(path: Path):
    own = part_of(path)
    wrong = []
    for one in imports(path):
        target = part(one.target)
        if top(one.target) != "cbtm" or target == "":  # `import cbtm` is its version
            continue
        if own == "":
            allowed = False
        elif own == "corpora":
            allowed = target in CORPORA_MAY_IMPORT
        elif target == "corpora":
            allowed = own in MAY_IMPORT_CORPORA
        else:
            allowed = layer(target) <= layer(own)
        if not allowed:
            wrong.append(one)
    assert violations(wrong) == []


def test_no_module_of_cbtm_needs_itself_to_be_imported():
    graph: dict[str, set[str]] = {}
    for path in CBTM:
        name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        graph[name] = {one.target for one in imports(path) if one.at_import and top(one.target) == "cbtm"} - {"cbtm"}
    assert set(TopologicalSorter(graph).static_order()) >= set(graph)  # raises CycleError on a cycle


def test_cbtm_imports_neither_components_nor_pipelines():
    found = [one for path in CBTM for one in imports(path) if top(one.target) in {"components", "pipelines", "tests"}]
    assert violations(found) == []


@pytest.mark.parametrize(
    ("package", "where"),
    [
        ("kfp", {"cbtm/local.py", "cbtm/kubeflow/api.py"}),
        ("mlflow", {"cbtm/tracking"}),
        ("boto3", {"cbtm/s3.py"}),
        ("botocore", {"cbtm/s3.py", "cbtm/s3_errors.py"}),
        ("s3transfer", set()),
        ("huggingface_hub", {"cbtm/branch/source.py", "cbtm/branch/seed.py"}),
        ("fairscale", {"cbtm/train/fairscale_sharding.py"}),
        ("kubernetes", {"cbtm/kubernetes.py"}),
        ("kubeflow", set()),
        ("kubeflow_trainer_api", set()),
        ("moto", set()),
        ("pytest", set()),
    ],
)
def test_an_outside_service_is_spoken_to_in_one_place(package: str, where: set[str]):
    found = [one for path in CBTM for one in imports(path) if top(one.target) == package]
    assert violations([one for one in found if not any(one.path.is_relative_to(place) for place in where)]) == []
    assert bool(found) == bool(where)


@pytest.mark.parametrize(
    ("module", "where"),
    [("cbtm.s3", {"cbtm/storage.py"}), ("cbtm.outage", {"cbtm/storage.py", "cbtm/s3.py", "cbtm/kubernetes.py"})],
)
def test_what_lies_below_the_services_is_used_by_them_alone(module: str, where: set[str]):
    files = sources("cbtm", "components", "pipelines")
    assert {str(one.path) for path in files for one in imports(path) if one.target == module} == where


# --- components and pipelines ---


def test_components_import_kfp_and_cbtm_alone_and_cbtm_in_their_bodies():
    allowed = {"kfp", "components"} | set(sys.stdlib_module_names)
    wrong = []
    for path in sources("components"):
        if path.name == "images.py":  # holds no component; the names of the images end in cbtm's version
            continue
        for one in imports(path):
            if top(one.target) == "cbtm":
                wrong += [one] if one.at_import else []
            elif top(one.target) not in allowed:
                wrong.append(one)
    assert violations(wrong) == []
    assert {one.target for one in imports(Path("components/images.py"))} == {"os", "sys", "cbtm"}


def test_pipelines_import_components_and_kfp_and_not_the_library():
    allowed = {"kfp", "components", "pipelines"} | set(sys.stdlib_module_names)
    found = [one for path in sources("pipelines") for one in imports(path)]
    assert violations([one for one in found if top(one.target) not in allowed]) == []
    assert any(top(one.target) == "components" for one in found)


def test_components_do_not_import_pipelines():
    found = [one for path in sources("components") for one in imports(path)]
    assert violations([one for one in found if top(one.target) == "pipelines"]) == []


# --- what is never done ---


@pytest.mark.parametrize("path", sources("cbtm", "components", "pipelines"), ids=str)
def test_nothing_is_pickled(path: Path):
    wrong = [
        str(one)
        for one in imports(path)
        if top(one.target) in {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    ]
    for node, _ in walk(tree(path)):
        if not isinstance(node, ast.Call):
            continue
        call, arguments = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        if call == "torch.save" or (call == "torch.load" and arguments.get("weights_only") != "True"):
            wrong.append(f"{path}:{node.lineno} calls {call}")
        if arguments.get("allow_pickle", "False") != "False":
            wrong.append(f"{path}:{node.lineno} allows pickle")
    assert wrong == []


# --- what is light ---


@pytest.mark.parametrize("module", ["cbtm", "cbtm.cli", "cbtm.run", "cbtm.stages", "cbtm.local", "cbtm.storage"])
def test_importing_a_light_module_loads_nothing_heavy(module: str):
    script = f"import sys, {module}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == []


def test_importing_cbtm_alone_loads_nothing_from_outside_the_standard_library():
    script = "import sys; before = set(sys.modules); import cbtm; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert {top(name) for name in done.stdout.split()} - set(sys.stdlib_module_names) == {"cbtm"}
