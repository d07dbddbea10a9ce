# SPDX-License-Identifier: Apache-2.0
"""Command line: `onevision-encoder convert SRC DST`."""

from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """OneVision encoder tools."""
    if show_version:
        typer.echo(f"onevision-encoder {version('onevision-encoder')}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Weight file (.pt, .safetensors) or folder.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    config: Annotated[Path | None, typer.Option(help="config.json; default: beside the weights, or inferred.")] = None,
    preset: Annotated[str | None, typer.Option(help="base, large or huge, in place of a config.")] = None,
    num_attention_heads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Heads, where no config says it: weights do not show them.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: the source's.")] = None,
) -> None:
    """Convert a checkpoint into a folder that AutoModel and the Auto processors load."""
    from .conversion import NOT_IN_WEIGHTS, ConversionError, find_config
    from .conversion import convert as convert_checkpoint

    try:
        has_config = preset is None and find_config(source, config) is not None
        model = convert_checkpoint(source, target, config, preset, dtype, num_attention_heads)
    except ConversionError as error:
        message = " ".join(str(error).split())
        is_named = message.startswith((str(source), str(target), str(config)))
        typer.echo(f"error: {message if is_named else f'{source}: {message}'}", err=True)
        raise typer.Exit(1) from error
    num_parameters, heads = sum(x.numel() for x in model.parameters()), model.config.num_attention_heads
    typer.echo(
        f"{target}: {num_parameters:,} parameters, {model.dtype}, {heads} heads of {model.config.head_dim} channels"
    )
    if not has_config:
        taken = ", ".join(f"{name}={getattr(model.config, name)}" for name in NOT_IN_WEIGHTS)
        typer.echo(f"assumed, because weights do not show it: {taken}")


if __name__ == "__main__":
    app()
