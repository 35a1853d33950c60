"""The demo: the bundled model and its CLT, through nnsight and through TransformerLens."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from clt_plugin.adapters import add_clt
from clt_plugin.attribution import attribute, top_examples
from clt_plugin.core import Crosscoder
from clt_plugin.demo.bundled import MIT_PROMPT, load_bridge, load_clt, load_corpus, load_nnsight
from clt_plugin.report import plot_features

MODES = ("replace", "replace_with_error")


@dataclass
class DemoResult:
    """What the demo measured.

    Attributes:
        prompt: The prompt.
        answer: The token that the plain model predicts.
        l0: For each layer, the mean number of active features over the prompt without BOS.
        largest_difference: Between the features that the two libraries read, over all layers and positions.
        predictions: For each library and mode, the top token and the answer's probability.
        feature: The (layer, position, feature) found, whose effect on the answer is the largest by gradient.
        edits: For each edit of that feature, the answer's probability and logit in each library.
        graph: The attribution graph's nodes, scores and certificate.
        seconds: How long it took.
    """

    prompt: str
    answer: str = ""
    l0: list[float] = field(default_factory=list)
    largest_difference: float = 0.0
    predictions: list[dict[str, Any]] = field(default_factory=list)
    feature: tuple[int, int, int] = (0, 0, 0)
    edits: list[dict[str, Any]] = field(default_factory=list)
    graph: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def run_demo(output: str | PathLike[str] = "demo-report", console: Console | None = None) -> DemoResult:
    """Run the demo, print what it finds, and write a report folder.

    Args:
        output: The folder to write ``features.png``, ``results.json`` and the attribution graph (``graph.html``,
            ``graph.json``, ``graph.safetensors``, ``graph-scores.json``) into; made if missing.
        console: Where to print.
    """
    started, console = time.perf_counter(), console or Console()
    torch.manual_seed(0)
    console.print("[bold]A cross-layer transcoder inside your own model[/bold]")
    with console.status("loading the model in both libraries"):
        model, bridge, clt = load_nnsight(), load_bridge(), load_clt()
    console.print(f"{clt.wiring.draw()}\n\nprompt: [italic]{MIT_PROMPT}[/italic]\n", highlight=False)
    result = DemoResult(MIT_PROMPT)
    tokens = [model.tokenizer.decode([i]) for i in model.tokenizer(MIT_PROMPT)["input_ids"]]

    features = _compare_features(model, bridge, clt, result, console)
    _compare_predictions(model, bridge, clt, result, console)
    result.feature = _most_effective_feature(model, clt, result)
    _edit_feature(model, bridge, clt, result, tokens, console)

    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    graph = _trace(model, clt, result, folder, console)
    title = "Active features of the demo CLT, by layer and position; ringed: the one edited"
    plot_features(features, tokens, title, result.feature).savefig(folder / "features.png", dpi=130)
    result.seconds = round(time.perf_counter() - started, 1)
    (folder / "results.json").write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")
    console.print(f"\nwrote {folder}/features.png and {folder}/results.json in {result.seconds} s", highlight=False)
    console.print(f"open {graph} in a browser: the attribution graph of {result.answer!r}", highlight=False)
    return result


def _compare_features(
    model: Any, bridge: Any, clt: Crosscoder, result: DemoResult, console: Console
) -> dict[int, Tensor]:
    """Read the features in both libraries; return those of nnsight by layer, (position, n_latents)."""
    with model.add_clt(clt, mode="observe"), torch.no_grad():
        with model.trace(MIT_PROMPT):
            ours: Any = [model.clt.layers[layer].features.output for layer in range(clt.n_layers)]
            ours.save()  # a method that nnsight gives to every object
    with bridge.add_clt(clt, mode="observe"), torch.no_grad():
        _, cache = bridge.run_with_cache(MIT_PROMPT)
    theirs = [cache[f"blocks.{layer}.clt.hook_features"] for layer in range(clt.n_layers)]
    result.largest_difference = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    result.l0 = [round(float((acts[0, 1:] > 0).sum(-1).float().mean()), 1) for acts in ours]

    table = Table("layer", "active features a token", "strongest feature", title="The same features in both libraries")
    for layer, acts in enumerate(ours):
        position, feature = divmod(int(acts[0].argmax()), acts.shape[-1])
        here, there = acts[0, position, feature], theirs[layer][0, position, feature]
        found = f"{feature} at position {position}: nnsight {here:.4f}, TransformerLens {there:.4f}"
        table.add_row(str(layer), str(result.l0[layer]), found)
    console.print(table)
    console.print(f"largest difference between the two libraries: {result.largest_difference:.1e}\n", highlight=False)
    return {layer: acts[0] for layer, acts in enumerate(ours)}


def _compare_predictions(model: Any, bridge: Any, clt: Crosscoder, result: DemoResult, console: Console) -> None:
    """Show the next token of the plain model and under both modes."""
    table = Table("", "nnsight", "TransformerLens")
    for mode in (None, *MODES):
        row: dict[str, Any] = {"mode": mode or "plain model"}
        for library, host in (("nnsight", model), ("TransformerLens", bridge)):
            handle = add_clt(host, clt, mode=mode) if mode else None
            probabilities = _last_logits(host).softmax(-1)
            if handle:
                handle.remove()
            top = int(probabilities.argmax())
            result.answer = result.answer or model.tokenizer.decode([top])
            answer = float(probabilities[_token(model, result.answer)])
            row[library] = {"top": model.tokenizer.decode([top]), "probability": answer}
        result.predictions.append(row)
        cells = (f"{row[lib]['top']!r} {row[lib]['probability']:.4f}" for lib in list(row)[1:])
        table.add_row(row["mode"], *cells)
    table.title = f"The next token, and the probability of {result.answer!r}"
    console.print(table)


def _most_effective_feature(model: Any, clt: Crosscoder, result: DemoResult) -> tuple[int, int, int]:
    """Find the (layer, position, feature) with the largest gradient times activation on the answer's logit."""
    answer = _token(model, result.answer)
    handle = model.add_clt(clt, mode="replace_with_error")
    with model.trace(MIT_PROMPT):
        acts = [model.clt.layers[layer].features.output.requires_grad_() for layer in range(clt.n_layers)]
        logits = model.output.logits[0, -1]
        margin = logits[answer] - logits.mean()
        grads = torch.autograd.grad(margin, acts)
        effects: Any = [(a * g).detach() for a, g in zip(acts, grads, strict=True)]
        effects.save()
    handle.remove()
    best = max(range(clt.n_layers), key=lambda layer: float(effects[layer].max()))
    position, feature = divmod(int(effects[best][0].argmax()), effects[best].shape[-1])
    return best, position, feature


def _edit_feature(
    model: Any, bridge: Any, clt: Crosscoder, result: DemoResult, tokens: list[str], console: Console
) -> None:
    """Scale and ablate the feature found, each library in its own idiom."""
    layer, position, feature = result.feature
    answer = _token(model, result.answer)
    title = f"Feature {feature} of layer {layer} at {tokens[position]!r} (position {position}), scaled"
    table = Table("times", "nnsight", "TransformerLens", title=title)
    for factor in (1.0, 0.0, -1.0, -3.0):
        handle = model.add_clt(clt, mode="replace_with_error")
        with torch.no_grad():
            with model.trace(MIT_PROMPT):
                model.clt.layers[layer].features.output[:, position, feature] *= factor
                ours = model.output.logits[0, -1].save()
        handle.remove()

        def scale(acts: Tensor, hook: Any, factor: float = factor) -> Tensor:
            acts[:, position, feature] *= factor
            return acts

        handle = bridge.add_clt(clt, mode="replace_with_error")
        with torch.no_grad():
            hooks = [(f"blocks.{layer}.clt.hook_features", scale)]
            theirs = bridge.run_with_hooks(MIT_PROMPT, fwd_hooks=hooks)[0, -1]
        handle.remove()
        row: dict[str, Any] = {"factor": factor}
        for library, logits in (("nnsight", ours), ("TransformerLens", theirs)):
            row[library] = {"probability": float(logits.softmax(-1)[answer]), "logit": float(logits[answer])}
        result.edits.append(row)
        cells = (f"p = {row[lib]['probability']:.4f}, logit {row[lib]['logit']:.2f}" for lib in list(row)[1:])
        table.add_row(f"{factor:g}" + {1.0: " (unchanged)", 0.0: " (ablated)"}.get(factor, ""), *cells)
    console.print(table)


def _trace(model: Any, clt: Crosscoder, result: DemoResult, folder: Path, console: Console) -> Path:
    """Trace the answer back to features and tokens, and write the graph; return the page."""
    graph = attribute(model, MIT_PROMPT, clt=clt, bar=False)
    pruned = graph.prune()
    scores = graph.scores()
    # A part of the corpus: all of it would take a minute.
    known = top_examples(model, pruned, load_corpus()[::6], clt=clt, bar=False)
    _, _, page, _ = graph.write(folder, feature_info=known)
    result.graph = {"nodes": len(graph), "pruned": len(pruned), "scores": asdict(scores)}
    result.graph["largest_residual"] = graph.certificate.max_relative_residual
    answer = pruned.nodes["id"].iloc[-1]
    console.print(f"\nAttribution graph: {len(graph)} nodes, {len(pruned)} once pruned; {scores}", highlight=False)
    console.print(str(graph.certificate), highlight=False)
    inputs = graph.inputs(answer, 5)
    strongest = [f"{graph.label(i)} {weight:+.2f}" for i, weight in zip(inputs["id"], inputs["weight"], strict=True)]
    console.print(f"strongest inputs of {result.answer!r}: {'; '.join(strongest)}", highlight=False, markup=False)
    return page


def _last_logits(host: Any) -> Tensor:
    """Return the logits at the last position, (vocabulary,), from a model of either library."""
    with torch.no_grad():
        if not hasattr(host, "trace"):
            return host(MIT_PROMPT)[0, -1]
        with host.trace(MIT_PROMPT):
            logits = host.output.logits[0, -1].save()
    return logits


def _token(model: Any, text: str) -> int:
    return model.tokenizer(text, add_special_tokens=False)["input_ids"][0]
