"""The command ``clt``: thin, each command calls one public function."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
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
    texts: Annotated[
        str | None,
        typer.Option(help="A file or folder of .txt or .jsonl, or demo: the page shows where features are active."),
    ] = None,
) -> None:
    """Trace which features and tokens make a prediction: the graph, its JSON, its page and its scores."""
    from clt_plugin import attribute as attribute_prompt
    from clt_plugin.attribution import top_examples

    def run() -> list[Path]:
        passages = _texts(texts) if texts else None
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
        known = passages and top_examples(host, graph.prune(**thresholds), passages, clt=crosscoder)
        return graph.write(output, source_set=source_set, feature_info=known, **thresholds)

    for path in _or_exit(run):
        typer.echo(f"wrote {path}")


def _texts(source: str) -> Iterable[Any]:
    """Return the texts of a file or folder; ``demo`` is the bundled corpus."""
    from clt_plugin import demo as bundled
    from clt_plugin.training.data.texts import Texts

    return bundled.load_corpus() if source == "demo" else Texts.of(source).iterate()


Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A setting, as in YAML; may be repeated.")
]


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe in Python or YAML, which is run as a program is.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The run's folder; given again, the run goes on.")
    ] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Say what the run needs, and do not train.")] = False,
    settings: Settings = None,
) -> None:
    """Train a crosscoder as a recipe says, or go on with a run; Ctrl-C stops it with a checkpoint."""
    from clt_plugin.training.recipes import Recipe, parse_setting

    def run() -> str:
        wanted = Recipe.load(recipe).with_settings(dict(map(parse_setting, settings or [])))
        if estimate:
            needed = wanted.estimate()
            return f"{needed}\n{needed.timed()}"
        folder = output or Path(wanted.output or Path("runs", wanted.config.name))
        found = wanted.run(folder).report["evaluation"]
        about = f": FVU {found['mean_fvu']:.4f}, L0 {found['mean_l0']:.1f} a group" if found else ""
        return f"trained {folder / 'crosscoder'}{about}; see {folder / 'run.png'} and {folder / 'report.json'}"

    typer.echo(_or_exit(run))


@app.command()
def analyse(
    name: Annotated[str | None, typer.Argument(help="The study; without one, all are listed.")] = None,
    clt: Annotated[str | None, typer.Option(help="A crosscoder: a reference, or demo.")] = None,
    model: Annotated[str | None, typer.Option(help="A model's name on the Hub, a folder, or demo.")] = None,
    plt: Annotated[str | None, typer.Option(help="Per-layer transcoders: a reference, or demo.")] = None,
    texts: Annotated[str | None, typer.Option(help="A file or folder of texts, or demo.")] = None,
    prompts: Annotated[str | None, typer.Option(help="A file with a prompt on each line.")] = None,
    settings: Settings = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write into.")] = Path("study"),
) -> None:
    """Run a study of a crosscoder: its table as CSV, and its plot."""
    from functools import partial

    import clt_plugin.analysis  # noqa: F401 - registers the studies
    from clt_plugin.analysis.running import listed, run_study
    from clt_plugin.analysis.studies import write

    if name is None:
        typer.echo(listed())
        return
    given = {"clt": clt, "model": model, "plt": plt, "texts": texts, "prompts": prompts}

    def run() -> list[Path]:
        loaders = {need: partial(_loaded, need, where) for need, where in given.items() if where is not None}
        result = run_study(name, loaders, dict(map(_setting, settings or [])))
        typer.echo(result.table.to_string())
        return write(result, output, name)

    for path in _or_exit(run):
        typer.echo(f"wrote {path}")


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"a setting is given as name=value, not {text!r}")
    return name, value


def _loaded(need: str, where: str) -> Any:
    """Load what a study needs from where an option says."""
    if need == "model":
        return _model(where, None)
    if need == "texts":
        return list(_texts(where))
    if need == "prompts":
        return [line for line in Path(where).read_text("utf-8").splitlines() if line.strip()]
    return _crosscoder(where, None, need)


def _model_and_clt(model: str, clt: str, dtype: Dtype | None) -> tuple[Any, Any]:
    """Load a model into nnsight, and a crosscoder; ``demo`` is the bundled one of either."""
    # The crosscoder first: a wrong reference shows at once.
    crosscoder = _crosscoder(clt, dtype)
    return _model(model, dtype), crosscoder


def _model(name: str, dtype: Dtype | None) -> Any:
    import torch
    from nnsight.modeling.transformers import TransformersModel

    from clt_plugin import demo as bundled

    if name == "demo":
        return bundled.load_nnsight()
    return TransformersModel(name, dispatch=True, **({"dtype": getattr(torch, dtype.value)} if dtype else {}))


def _crosscoder(reference: str, dtype: Dtype | None, which: str = "clt") -> Any:
    import torch

    from clt_plugin import demo as bundled
    from clt_plugin import load

    kept = getattr(torch, dtype.value) if dtype else None
    if reference == "demo":
        return (bundled.load_plt if which == "plt" else bundled.load_clt)(kept or torch.float32)
    return load(reference, dtype=kept)


def _or_exit(call: Callable[[], T]) -> T:
    """Call; print an error of ours as one line, without a traceback."""
    try:
        return call()
    except _ours() as error:
        typer.secho(f"clt: {error}", err=True, fg="red")
        raise typer.Exit(2) from error


def _ours() -> tuple[type[Exception], ...]:
    """Return the kinds of errors that are ours, or are as clear; asked for only once there is an error."""
    from clt_plugin.core import RegistryError
    from clt_plugin.training import CheckpointError, TrainError

    return OSError, ValueError, ArithmeticError, RegistryError, TrainError, CheckpointError


if __name__ == "__main__":
    app()
