# SPDX-License-Identifier: Apache-2.0
"""Command line: `onevision-encoder convert SRC DST`."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.callback()
def main() -> None:
    """OneVision encoder tools."""


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Weight file (.pt, .safetensors) or folder.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    config: Annotated[Path | None, typer.Option(help="config.json; default: the source's, or inferred.")] = None,
    preset: Annotated[str | None, typer.Option(help="base, large or huge, in place of a config.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: the source's.")] = None,
) -> None:
    """Convert a checkpoint into a folder that AutoModel and the Auto processors load."""
    from .conversion import ConversionError
    from .conversion import convert as convert_checkpoint  # here: --help must not wait for torch

    try:
        model = convert_checkpoint(source, target, config, preset, dtype)
    except ConversionError as error:
        message = str(error)
        typer.echo(message if str(source) in message else f"{source}: {message}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"{target}: {sum(x.numel() for x in model.parameters()):,} parameters, {model.dtype}")


if __name__ == "__main__":
    app()
