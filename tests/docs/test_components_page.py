"""docs/components.md is what the components and the compiled pipelines say."""

import shutil

import generate_components
import pytest
from pipeline_files import PipelineFile


def test_components_page_is_what_components_and_pipelines_say():
    assert generate_components.main(["--check"]) == 0


def test_stale_components_page_is_noticed_and_written_anew(tmp_path, capsys):
    page = tmp_path / "components.md"
    assert generate_components.main(["--check"], page) == 1
    assert "is stale: run python docs/generate_components.py" in capsys.readouterr().err
    assert generate_components.main([], page) == 0
    assert generate_components.main(["--check"], page) == 0
    page.write_text(page.read_text().replace('| `gpu_count` | text | `"1"` |', '| `gpu_count` | text | `"2"` |'))
    assert generate_components.main(["--check"], page) == 1


def test_every_task_and_parameter_of_every_pipeline_is_on_the_page():
    page = generate_components.render()
    files = sorted(generate_components.COMPILED.glob("*.yaml"))
    assert files
    for path in files:
        section = page.partition(f"`cbtm/compiled/{path.name}`")[2].partition("\n## ")[0]
        compiled = PipelineFile.read(path)
        for place in compiled.leaves().values():
            assert f"| `{place.name}` |" in section, f"{path.name}: {place.path}"
        for name in compiled.spec["root"]["inputDefinitions"]["parameters"]:
            assert f"| `{name}` |" in section, f"{path.name}: {name}"


def test_a_task_inside_of_a_loop_comes_after_what_its_loop_waits_for():
    lines = generate_components.render().splitlines()
    expert = next(line for line in lines if line.startswith("| `train-expert` |"))
    assert expert == "| `train-expert` | `train_expert` | members | 3 | `check-cluster`, `plan-run`, `train-seed` |"
    seed = next(line for line in lines if line.startswith("| `train-seed` |"))
    assert seed.endswith("| `assign-shards`, `check-cluster` |")


def test_several_pipelines_have_a_section_each(tmp_path, monkeypatch):
    [first, *_] = sorted(generate_components.COMPILED.glob("*.yaml"))
    for name in ("one.yaml", "two.yaml"):
        shutil.copy(first, tmp_path / name)
    monkeypatch.setattr(generate_components, "COMPILED", tmp_path)
    page = generate_components.render()
    assert page.index("`cbtm/compiled/one.yaml`") < page.index("`cbtm/compiled/two.yaml`")


def test_a_parameter_without_a_meaning_is_an_error(tmp_path, monkeypatch):
    text = (generate_components.COMPILED / "cbtm.yaml").read_text()
    (tmp_path / "cbtm.yaml").write_text(text.replace("description: CPUs that it may use at most.", "description: ''"))
    monkeypatch.setattr(generate_components, "COMPILED", tmp_path)
    with pytest.raises(LookupError, match=r"cbtm\.yaml: parameter cpu_limit has no meaning"):
        generate_components.render()
