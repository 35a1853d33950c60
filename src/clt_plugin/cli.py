"""The command ``clt``: thin, each command calls one public function."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)


@app.callback()
def main() -> None:
    """Cross-layer transcoders as a hookable part of your nnsight or TransformerLens model."""


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write the report into.")] = Path(
        "demo-report"
    ),
) -> None:
    """Run the bundled model and its CLT through nnsight and TransformerLens, offline."""
    from clt_plugin.demo.run import run_demo

    run_demo(output)


if __name__ == "__main__":
    app()
