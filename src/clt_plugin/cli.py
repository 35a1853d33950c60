"""The command ``clt``: thin, each command calls one public function."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

T = TypeVar("T")
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


Reference = Annotated[str, typer.Argument(help="A folder, hf://owner/name[/folder][@revision], or a short name.")]


class Dtype(StrEnum):
    """What weights may be converted to."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.command()
def inspect(
    reference: Reference,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say what lies at a reference, from configs and headers alone."""
    from clt_plugin.formats import inspect as inspect_reference

    found = _or_exit(lambda: inspect_reference(reference))
    typer.echo(json.dumps(found.to_dict(), indent=1) if as_json else str(found))
    raise typer.Exit(0 if found.is_complete else 1)


@app.command()
def convert(
    source: Reference,
    target: Annotated[Path, typer.Argument(help="The folder to make.")],
    format: Annotated[str, typer.Option("--format", "-f", help="native or circuit-tracer.")] = "native",
    dtype: Annotated[Dtype | None, typer.Option(help="Convert to it.")] = None,
    layers: Annotated[list[int] | None, typer.Option("--layer", "-l", help="Keep this layer; may be repeated.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a folder that holds something.")] = False,
) -> None:
    """Write a crosscoder in another format, some rows at a time, and verify it."""
    import torch

    from clt_plugin.formats import convert as convert_crosscoder

    kept = getattr(torch, dtype.value) if dtype else None
    _or_exit(lambda: convert_crosscoder(source, target, format, dtype=kept, layers=layers or None, overwrite=overwrite))
    typer.echo(f"wrote {target} ({format}); every value was read back and compared")


@app.command("list")
def list_known(
    containing: Annotated[str, typer.Argument(help="Show those whose name or model contains this.")] = "",
) -> None:
    """List the known crosscoders and their short names, which `cp.load` and `add_clt` take."""
    from rich.console import Console

    from clt_plugin.hub import CATALOGUE

    Console().print(_or_exit(lambda: CATALOGUE.table(containing)))


@app.command()
def attribute(
    model: Annotated[str, typer.Argument(help="A model's name on the Hub, a folder, or demo.")],
    clt: Reference,
    prompt: Annotated[str, typer.Argument(help="The text whose next token is to be explained.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write into.")] = Path("graph"),
    target: Annotated[
        list[str] | None, typer.Option("--target", "-t", help="A token to explain; may be repeated. Default: the top.")
    ] = None,
    max_n_logits: Annotated[int, typer.Option(help="At most so many of the likeliest tokens.")] = 10,
    desired_logit_prob: Annotated[float, typer.Option(help="As few of them as have this probability.")] = 0.95,
    max_feature_nodes: Annotated[int | None, typer.Option(help="Keep the most influential features only.")] = None,
    zero_bos: Annotated[bool, typer.Option(help="Count features and errors at the first position as 0.")] = False,
    node_threshold: Annotated[float, typer.Option(help="Of pruning, for the JSON and the page.")] = 0.8,
    edge_threshold: Annotated[float, typer.Option(help="Of pruning, for the JSON and the page.")] = 0.98,
    dtype: Annotated[Dtype | None, typer.Option(help="Load the model and the crosscoder in it.")] = None,
    source_set: Annotated[str | None, typer.Option(help="The features' set on Neuronpedia, such as clt-hp.")] = None,
) -> None:
    """Trace which features and tokens make a prediction: the graph, its JSON, its page and its scores."""
    from clt_plugin import attribute as attribute_prompt

    def run() -> list[Path]:
        host, crosscoder = _model_and_clt(model, clt, dtype)
        graph = attribute_prompt(
            host,
            prompt,
            target or None,
            clt=crosscoder,
            max_n_logits=max_n_logits,
            desired_logit_prob=desired_logit_prob,
            max_feature_nodes=max_feature_nodes,
            zero_bos=zero_bos,
        )
        typer.echo(f"{graph}\n{graph.certificate}\n{graph.scores()}")
        thresholds: dict[str, Any] = {"node_threshold": node_threshold, "edge_threshold": edge_threshold}
        return graph.write(output, source_set=source_set, **thresholds)

    for path in _or_exit(run):
        typer.echo(f"wrote {path}")


def _model_and_clt(model: str, clt: str, dtype: Dtype | None) -> tuple[Any, Any]:
    """Load a model into nnsight, and a crosscoder; ``demo`` is the bundled one of either."""
    import torch

    from clt_plugin import demo as bundled
    from clt_plugin import load

    kept = getattr(torch, dtype.value) if dtype else None
    crosscoder = bundled.load_clt(kept or torch.float32) if clt == "demo" else load(clt, dtype=kept)
    if model == "demo":
        return bundled.load_nnsight(), crosscoder
    from nnsight.modeling.transformers import TransformersModel

    return TransformersModel(model, dispatch=True, **({"dtype": kept} if kept else {})), crosscoder


def _or_exit(call: Callable[[], T]) -> T:
    """Call; print an error of ours as one line, without a traceback."""
    from clt_plugin.core import RegistryError

    try:
        return call()
    except (OSError, ValueError, ArithmeticError, RegistryError) as error:  # the others of ours are kinds of these
        typer.secho(f"clt: {error}", err=True, fg="red")
        raise typer.Exit(2) from error


if __name__ == "__main__":
    app()
