"""The documentation: what it links to, what it commands and what it lists must be there."""

import re
from pathlib import Path

import generate_configuration
import pytest
import typer
from shell_blocks import FENCE, NAMES, PROJECT, fenced, shell_blocks
from typer.testing import CliRunner

from cbtm.cli import app
from cbtm.run_config import parse_config

_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Anchors that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(program: str) -> list[tuple[str, list[str]]]:
    """Page and arguments of each call of a program."""
    lines = (line for block in shell_blocks() for line in block.lines if f"{program} " in line.text)
    return [(line.page, line.words[1:]) for line in lines if line.words[0] == program]


def test_configuration_page_is_what_the_classes_say():
    assert generate_configuration.main(["--check"]) == 0


def test_stale_configuration_page_is_noticed_and_written_anew(tmp_path, capsys):
    page, generate = tmp_path / "configuration.md", generate_configuration
    assert generate.main(["--check"], page) == 1
    assert "is stale: run python docs/generate_configuration.py" in capsys.readouterr().err
    assert generate.main([], page) == 0
    assert generate.main(["--check"], page) == 0
    page.write_text(page.read_text().replace("| `n_clusters` | integer, ≥ 1 | `8` |", "| `n_clusters` | integer |"))
    assert generate.main(["--check"], page) == 1


def test_configuration_page_has_bounds_inherited_fields_and_nested_sections():
    lines = generate_configuration.render().splitlines()
    assert "| `n_clusters` | integer, ≥ 1 | `8` | Number of domains, and of experts. |" in lines
    # learning_rate is documented by OptimizationConfig; TrainConfig gives it a default.
    assert "| `learning_rate` | number, > 0 | `0.0002` | Peak of the schedule. |" in lines
    assert "| `learning_rate` | number, > 0 | required | Peak of the schedule. |" in lines
    assert "## `seed_model.training`" in lines


@pytest.mark.parametrize("name", NAMES)
def test_every_relative_link_resolves(name):
    page = PROJECT / name
    for target in _LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{name} links to {target}, which is not there"
        if anchor and linked.suffix == ".md":
            assert anchor in anchors(linked), f"{name} links to {target}; {linked.name} has no such heading"


def test_pages_name_commands_to_check():
    # Guards the two tests below against finding nothing.
    assert {arguments[0] for _, arguments in commands("cbtm")} >= {
        "run",
        "plan",
        "cluster",
        "assign",
        "train",
        "corpus",
    }
    assert {arguments[0] for _, arguments in commands("make")} >= {"demo", "ui", "check"}


@pytest.mark.parametrize(("name", "arguments"), commands("cbtm"), ids=lambda value: str(value)[:60])
def test_every_cbtm_command_and_its_options_exist(name, arguments):
    group = typer.main.get_command(app)
    subcommands: list[str] = []
    while hasattr(group, "commands") and len(subcommands) < len(arguments):
        word = arguments[len(subcommands)]
        if word.startswith("-"):
            break
        assert word in group.commands, f"{name}: cbtm has no command {' '.join([*subcommands, word])}"
        group = group.commands[word]
        subcommands.append(word)
    helped = CliRunner().invoke(app, [*subcommands, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert helped.exit_code == 0, helped.output
    known = set(re.findall(r"(?<![\w-])--[a-z0-9-]+", helped.output))
    for argument in arguments[len(subcommands) :]:
        if argument.startswith("-"):
            assert argument.partition("=")[0] in known, f"{name}: cbtm {' '.join(subcommands)} has no {argument}"


@pytest.mark.parametrize(("name", "arguments"), commands("make"), ids=lambda value: str(value)[:60])
def test_every_make_target_exists(name, arguments):
    targets = set(re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE))
    for argument in arguments:
        assert "=" in argument or argument in targets, f"{name}: the Makefile has no target {argument}"


@pytest.mark.parametrize("name", NAMES)
def test_every_whole_configuration_shown_is_valid(name):
    for _, language, block in fenced(name):
        if language == "yaml" and "root:" in block and "seed_model:" in block:
            parse_config(block)


def test_decisions_are_numbered_without_a_gap_and_have_three_parts():
    pages = sorted((PROJECT / "docs/decisions").glob("*.md"))
    assert [int(page.name[:4]) for page in pages] == list(range(1, len(pages) + 1))
    for page in pages:
        headings = re.findall(r"^## (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert headings[:3] == ["Context", "Decision", "Consequence"], page.name
