"""The command line's way from a finished run to one with another domain."""

from pathlib import Path
from typing import Annotated

import typer

from cbtm import storage

extend_app = typer.Typer()


@extend_app.command()
def extend(
    run: Annotated[str, typer.Argument(help="Folder or s3:// prefix of a finished run.")],
    corpus: Annotated[str, typer.Argument(help="Root of the corpus of the added domain.")],
    root: Annotated[str, typer.Option(help="Folder or s3:// prefix that is to receive the extended run.")],
    train_split: Annotated[str, typer.Option(help="Training split of the corpus.")] = "train",
    validation_split: Annotated[str, typer.Option(help="Validation split of the corpus.")] = "valid",
    name: Annotated[str | None, typer.Option(help="Name of the extended run in the tracker.")] = None,
    output: Annotated[Path | None, typer.Option(help="YAML file to write; default the terminal.")] = None,
) -> None:
    """Write the configuration of a run that adds a domain to a finished one, whose experts stay as they are."""
    from cbtm.corpus import CorpusConfig
    from cbtm.run_config import recorded_config
    from cbtm.stages.extension import extending

    base = recorded_config(run).model_copy(update={"root": run.rstrip("/")})
    values = {"root": corpus, "train_split": train_split, "validation_split": validation_split}
    text = extending(base, CorpusConfig.parse(values, source="corpus"), root, name=name)
    if output is None:
        typer.echo(text, nl=False)
        return
    storage.write_bytes(str(output), text.encode())
    typer.echo(f"{output}: edit it, then cbtm run {output}")
