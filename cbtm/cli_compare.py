"""The command line's comparison of several runs."""

from pathlib import Path
from typing import Annotated

import typer

from cbtm.cli_corpus import say

compare_app = typer.Typer()


@compare_app.command()
def compare(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="YAML file; default the one that comes with cbtm.")
    ] = None,
    override: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one value; repeatable.")
    ] = None,
    root: Annotated[Path, typer.Option(help="Folder of the results, where no CONFIG is given.")] = Path("runs/compare"),
    corpus: Annotated[
        Path | None, typer.Option(help="Folder of own text, where no CONFIG is given; default a sample of real text.")
    ] = None,
) -> None:
    """Compare dense models, random clusters and several numbers of experts at equal tokens; resumes."""
    from cbtm import local
    from cbtm.comparison import COMPARISON_REPORT_FILE, Comparison
    from cbtm.corpora.folder import demo_corpus
    from cbtm.merge.arms_report import format_comparison
    from cbtm.run_config import demo_config, load_config
    from cbtm.stages.comparison import result

    if config is not None:
        found = load_config(config, override)
    else:
        text = demo_corpus(corpus, root.parent / "corpora", progress=say)
        splits = (str(text.root), text.train_split, text.validation_split)
        found = demo_config(str(root), *splits, override or [], name="compare")
    this = Comparison(found)
    local.run_comparison(this)
    typer.echo(format_comparison(result(this)))
    typer.echo(f"report: {this.shared.uri(COMPARISON_REPORT_FILE)}")
