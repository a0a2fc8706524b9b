"""The command line's corpora: a sample of real text, a folder of one's own, a public one."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from cbtm.errors import ConfigError

corpus_app = typer.Typer(no_args_is_help=True, help="Text to run on: a sample, your own, or a public one.")

ReplaceOption = Annotated[bool, typer.Option("--replace", help="Write anew where another corpus lies.")]


@corpus_app.command("sample")
def corpus_sample(
    root: Annotated[Path, typer.Argument(help="Folder to write.")], replace: ReplaceOption = False
) -> None:
    """Gather real text of several kinds from the installed packages, without any download."""
    from cbtm.corpora.sample import gather_sample

    summary = gather_sample(root, replace=replace, progress=say)
    typer.echo(f"{summary.root} train={summary.n_train} valid={summary.n_valid} bytes={summary.n_bytes}")


@corpus_app.command("import")
def corpus_import(
    source: Annotated[Path, typer.Argument(help="Folder of text files, or of JSON lines.")],
    root: Annotated[Path, typer.Argument(help="Folder to write.")],
    name: Annotated[
        str, typer.Option(help="Name of the files, without suffix; two corpora that one run reads need two names.")
    ] = "text",
    replace: ReplaceOption = False,
) -> None:
    """Turn a folder of text into a corpus with a held-out validation split."""
    from cbtm.corpora.folder import import_folder

    if not name or "/" in name or name.startswith("."):
        raise ConfigError(f"--name {name!r} is no name of a file; use letters and digits")
    summary = import_folder(source, root, name=name, replace=replace, progress=say)
    typer.echo(f"{summary.root} train={summary.n_train} valid={summary.n_valid} bytes={summary.n_bytes}")


@corpus_app.command("download")
def corpus_download(
    name: Annotated[str, typer.Argument(help="c4-example: the public C4 sample of the reference code.")],
    root: Annotated[Path, typer.Argument(help="Folder to write.")],
    base_url: Annotated[str | None, typer.Option(help="Mirror to download from.")] = None,
    sha256: Annotated[str | None, typer.Option(help="Digest that the archive must have.")] = None,
) -> None:
    """Download a public corpus; an interrupted download goes on where it stopped."""
    from cbtm.corpora.download import BASE_URL, download_c4_example

    if name != "c4-example":
        raise ConfigError(f"unknown corpus {name!r}; known is c4-example")
    made = download_c4_example(root, base_url=base_url or BASE_URL, expected_sha256=sha256, progress=say)
    typer.echo(f"{made.root} sha256={made.sha256} bytes={made.n_bytes} validation_split={made.validation_split}")


def say(message: str) -> None:
    """Show progress on a terminal, and nothing elsewhere."""
    if sys.stderr.isatty():
        typer.echo(message, err=True)
