"""docs/formats.md has every file that a small run writes, finished or on the way, and every key of its JSON files."""

import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from shell_blocks import PROJECT
from small import settings, write_corpus

from cbtm import stages
from cbtm.run import Run
from cbtm.run_config import parse_config
from cbtm.stages import result

PAGE = (PROJECT / "docs/formats.md").read_text(encoding="utf-8")
MEMBER = r"(?:seed|dense|cluster-\d{5}|random-\d{5}|average-[a-z]+)"

DOCUMENTED = [
    (r"config\.json", "`config.json`", "checked configuration"),
    (r"plan\.json", "`plan.json`", "corpus_root"),
    (r"(?:(?:tokenizer|clusterer|seed|(?:experts|averages|scores|tasks)/{member})/)?manifest\.json",
     "Manifests", "manifest.json"),
    (r"manifests/assign/(?:train|validation)-\d{5}\.json", "Manifests", "manifests/assign/<group>.json"),
    (r"tokenizer/tokenizer\.json", "`tokenizer/`", "tokenizer.json"),
    (r"tokenizer/tokenizer_config\.json", "`tokenizer/`", '"tokenizer_class"'),
    *((rf"clusterer/{re.escape(name)}", "`clusterer/`", name) for name in (
        "clusterer.json", "centers.safetensors", "embedder.safetensors", "embedder.json", "profile.json",
        "domains.json",
    )),
    *((rf"tokens/held-out/.+/validation-\d{{5}}\.{name}", "`tokens/<partition>/<split>/cluster-NNNNN/`",
       f"<group>.{name}") for name in ("tokens.npy", "offsets.npy", "documents.jsonl", "clusters.npy")),
    (r"documents\.csv", "`documents.csv`", "A row"),
    (r"assignments/.+\.jsonl", "`assignments/<split>/<shard>/<name>.jsonl`", "sp_id"),
    *((rf"tokens/(?:learned|random)/.+/cluster-\d{{5}}/train-\d{{5}}\.{name}",
       "`tokens/<partition>/<split>/cluster-NNNNN/`", f"<group>.{name}") for name in (
        "tokens.npy", "offsets.npy", "documents.jsonl", "prompts.npy",
    )),
    (r"checkpoints/{member}/step-\d{8}/shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors",
     "`checkpoints/<member>/step-NNNNNNNN/`", "shard-RRRRR-model-NNNNN-of-NNNNN.safetensors"),
    *((rf"checkpoints/{{member}}/step-\d{{8}}/{re.escape(name)}", "`checkpoints/<member>/step-NNNNNNNN/`", name)
      for name in ("state.json", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
                   "expert.json", "manifest.json")),
    *((rf"(?:seed|experts/{{member}})/{re.escape(name)}", "`seed/` and `experts/<member>/`", name) for name in (
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "expert.json", "training.jsonl",
    )),
    (r"averages/{member}/(?:config|generation_config|tokenizer|tokenizer_config|expert)\.json|averages/{member}/model\.safetensors",
     "`averages/<member>/`", "plain Hugging Face folder"),
    *((rf"scores/{{member}}/{re.escape(name)}", "`scores/<member>/`", name) for name in (
        "log_probs.npy", "offsets.npy", "scores.json",
    )),
    (r"checkpoints/scores-{member}/block-\d{6}", "`checkpoints/scores-<member>/block-NNNNNN`", "block"),
    *((rf"tasks/{{member}}/{name}", "`tasks/<member>/`", shown) for name, shown in (
        (r"kinds\.npy", "<task>.npy"), (r"kinds\.neutral\.npy", "<task>.neutral.npy"), (r"tasks\.json", "tasks.json"),
    )),
    (r"result\.json", "`result.json`", "`format`"),
    (r"settings\.csv", "`settings.csv`", "table"),
    (r"report\.html", "`report.html`", "page"),
    (r"tracking/[0-9a-f]{16}/[a-z0-9_-]+\.jsonl", "`tracking/<key>/<run>.jsonl`", "journal"),
    (r"tracking/[0-9a-f]{16}/[a-z0-9_-]+\.files/.+", "`tracking/<key>/<run>.jsonl`", "<run>.files/"),
]  # fmt: skip
"""Pattern of a path below the root, heading of its section, and what stands there for it."""

KINDS = ("clustering", "product_of_experts", "bayes", "posterior", "uniform", "prior", "oracle")
BY_DATA = {"inputs", "seconds", "skipped", "tasks", "cached", "words", "values", "tags", "losses", "files", "curve"}
"""Objects whose keys are names of the run's own: stages, members, labels, metrics."""


def section(heading: str) -> str:
    """Text under a heading of the second level."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found, f"docs/formats.md has no heading {heading}"
    return found[1]


class Watched:
    """Paths below `root` that Python opened or renamed to while this was on; an audit hook cannot be taken away."""

    def __init__(self, root: Path) -> None:
        self.root, self.on, self.paths = str(root), True, set[str]()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and event in ("open", "os.rename"):
            path = arguments[1] if event == "os.rename" else arguments[0]
            if isinstance(path, str | Path) and str(path).startswith(self.root):
                self.paths.add(str(path)[len(self.root) + 1 :])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """The root of a run with all that one machine can have, and every path that was there at some time."""
    folder = tmp_path_factory.mktemp("formats")
    corpus, root = write_corpus(folder / "corpus"), folder / "run"
    with (corpus / "train/00000/text.jsonl").open("a") as file:
        file.write(
            json.dumps({"src": "Which module reads archives?", "tgt": "The module tarfile reads archives."}) + "\n"
        )
    task = folder / "kinds"
    task.mkdir()
    examples = [{"text": f"value {number}", "label": ("code", "prose")[number % 2]} for number in range(8)]
    for name in ("train", "test"):
        (task / f"{name}.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    values = settings(str(corpus), str(root), f"sqlite:///{folder}/mlflow.db")
    values["average"] = {"averages": ["uniform", "weighted", "greedy"]}
    values["tasks"] = [{"name": "kinds", "path": str(task), "template": "topic", "shots": 0, "seeds": [0]}]
    values["train"] |= {"validate_every": 5}
    values["train"] |= {"steps": 10}
    values["seed_model"]["training"] |= {"steps": 10, "checkpoint_every": 5}
    run = Run(parse_config(json.dumps(values)))
    watched = Watched(root)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(result, "render_report", lambda *_: "<p>figures take their time</p>")
        stages.plan(run)
        for each in stages.tasks(run):
            each.run()
    watched.on = False
    left = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    return root, {path for path in watched.paths | left if (root / path).suffix or "block-" in path}


def plain(paths: set[str]) -> set[str]:
    """Paths as readers see them: without unfinished writes, locks and work folders."""
    return {path for path in paths if ".cbtm" not in path and "/best" not in path and ".tmp" not in path}


def test_every_file_of_a_run_is_on_the_page(written):
    patterns = [(re.compile(pattern.replace("{member}", MEMBER)), *rest) for pattern, *rest in DOCUMENTED]
    hits = dict.fromkeys((pattern for pattern, *_ in patterns), 0)
    unknown = []
    for path in sorted(plain(written[1])):
        found = [entry for entry in patterns if entry[0].fullmatch(path)]
        if not found:
            unknown.append(path)
            continue
        for pattern, heading, shown in found:
            hits[pattern] += 1
            assert shown in section(heading), f"{path}: docs/formats.md does not say {shown} under {heading}"
    assert unknown == []
    # An entry that no file has is of a format that is no longer written.
    assert [pattern.pattern for pattern, count in hits.items() if count == 0] == []


def test_files_on_the_way_are_seen(written):
    seen = plain(written[1])
    assert any(re.fullmatch(r"checkpoints/dense/step-\d{8}/state\.json", path) for path in seen)
    assert any(path.startswith("checkpoints/scores-") for path in seen)
    assert not list(written[0].glob("checkpoints/*/*"))


def keys(value: Any) -> Iterator[str]:
    """Keys of an object and of those in it, unless they are names of the run's own."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield name
            if name not in BY_DATA:
                yield from keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys(inner)


def undocumented(value: Any, text: str) -> list[str]:
    return sorted({name for name in keys(value) if f"`{name}`" not in text and f'"{name}"' not in text})


def test_every_key_of_the_result_is_on_the_page(written):
    content = json.loads((written[0] / "result.json").read_text())
    text = section("`result.json`")
    first_cells = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| ([^|]*) \|", text, re.MULTILINE))))
    assert sorted(set(content) - first_cells) == []
    assert undocumented(content, text + section("`clusterer/`") + section("`seed/` and `experts/<member>/`")) == []


@pytest.mark.parametrize(
    ("path", "heading"),
    [
        ("plan.json", "`plan.json`"),
        ("scores/dense/scores.json", "`scores/<member>/`"),
        ("tasks/dense/tasks.json", "`tasks/<member>/`"),
        ("clusterer/clusterer.json", "`clusterer/`"),
        ("clusterer/embedder.json", "`clusterer/`"),
        ("clusterer/profile.json", "`clusterer/`"),
        ("clusterer/domains.json", "`clusterer/`"),
        ("tokenizer/tokenizer_config.json", "`tokenizer/`"),
        ("experts/cluster-00000/expert.json", "`seed/` and `experts/<member>/`"),
        ("averages/average-greedy/expert.json", "`averages/<member>/`"),
        ("averages/average-uniform/expert.json", "`averages/<member>/`"),
    ],
)
def test_every_key_of_a_json_file_is_in_its_section(written, path, heading):
    assert undocumented(json.loads((written[0] / path).read_text()), section(heading)) == []


def test_every_key_of_every_manifest_is_on_the_page(written):
    found = [
        path for path in written[0].rglob("*.json") if path.name == "manifest.json" or path.parent.name == "assign"
    ]
    assert len(found) > 10
    missing = set[str]()
    for path in found:
        manifest = json.loads(path.read_text())
        metadata = manifest.pop("metadata")
        assert undocumented(manifest, section("Manifests")) == [], path
        missing |= {f"{manifest['stage']}: {name}" for name in undocumented(metadata, PAGE)}
    assert missing == set()


def test_every_key_of_the_lines_is_on_the_page(written):
    root = written[0]
    for pattern, heading in (
        ("experts/*/training.jsonl", "`seed/` and `experts/<member>/`"),
        ("tokens/**/*.documents.jsonl", "`tokens/<partition>/<split>/cluster-NNNNN/`"),
        ("tracking/*/*.jsonl", "`tracking/<key>/<run>.jsonl`"),
    ):
        lines = [json.loads(line) for path in root.glob(pattern) for line in path.read_text().splitlines()]
        assert lines
        assert undocumented(lines, section(heading)) == [], pattern


def test_operations_of_the_journal_are_those_of_the_page(written):
    lines = [
        json.loads(line) for path in written[0].glob("tracking/*/*.jsonl") for line in path.read_text().splitlines()
    ]
    listed = re.search(r"`op` is (.*?);", section("`tracking/<key>/<run>.jsonl`"), re.DOTALL)
    assert listed
    assert {line["op"] for line in lines if "op" in line} <= set(re.findall(r"`(\w+)`", listed[1]))


def test_columns_of_the_settings_are_the_fields_of_an_ensemble(written):
    with (written[0] / "settings.csv").open() as file:
        columns = next(csv.reader(file))
    row = json.loads((written[0] / "result.json").read_text())["ensemble"][0]
    ends = [f"{name}_{end}" for name in row if name.endswith("interval") for end in ("low", "high")]
    assert set(columns) == {name for name in row if not name.endswith("interval")} | set(ends)
    assert all(f"`{name}`" in section("`settings.csv`") for name in ends)


def test_columns_of_the_documents_are_on_the_page(written):
    with (written[0] / "documents.csv").open() as file:
        columns = next(csv.reader(file))
    text = section("`documents.csv`")
    fixed = [name for name in columns if not name.startswith(("average-", *KINDS))]
    assert {"sp_id", "half", "dense"} <= set(fixed)
    assert [name for name in fixed if f"`{name}`" not in text] == []
