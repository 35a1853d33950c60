"""`attribute`: the attribution graph of one prompt.

The model runs once. Its attention patterns and norm denominators are kept, and what they leave is a linear map from
sources (features, errors, embeddings, biases) to targets (pre-activations, logits). Edges are found by pushing sources
forward or by pulling targets back through that map, whichever costs less. Sources: Ameisen et al. 2025, "Circuit
Tracing: Revealing Computational Graphs in Language Models" (the local replacement model and its graph).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from clt_plugin.attribution.graph import Graph, GraphError, GraphInfo
from clt_plugin.attribution.targets import Target


def attribute(
    model: Any,
    prompt: Any,
    targets: Target | int | str | Sequence[Target | int | str] | None = None,
    *,
    clt: Any = None,
    max_n_logits: int = 10,
    desired_logit_prob: float = 0.95,
    max_feature_nodes: int | None = None,
    zero_bos: bool = False,
    bias_node: bool = True,
    direction: str = "auto",
    dtype: torch.dtype | None = None,
    devices: Sequence[str | torch.device] | None = None,
    check_columns: int = 3,
    tolerance: float | None = None,
    bar: bool | None = None,
    name: str = "clt",
) -> Graph:
    """Trace which features, errors and tokens make which features and logits, on one prompt.

    The model itself is not changed: what is attached to it, and the hooks and edits of its library, take no part.

    Args:
        model: An nnsight model, a TransformerBridge, or a transformers model.
        prompt: Text, or token ids (position,) or (1, position).
        targets: What to explain: tokens (as text or ids) or what `clt_plugin.attribution.targets` makes, one or
            several; by default the likeliest next tokens.
        clt: The crosscoder, or a reference; by default the one that is attached to the model.
        max_n_logits: At most so many of the likeliest next tokens.
        desired_logit_prob: As few of them as have this probability together.
        max_feature_nodes: Keep so many features, those of most influence as it is found from the targets backwards:
            nearly those of the whole graph. What the others do to each node is in the column ``omitted`` of the table
            of nodes, and in the certificate; memory is bounded by this budget.
        zero_bos: Count features and errors at the first position as 0, as other tools do; the bias node carries what
            the MLPs wrote there.
        bias_node: Whether the graph has the bias node. It is computed, and the certificate checked, in any case.
        direction: ``"push"``, ``"pull"``, or ``"auto"`` for the cheaper one. Both give the same edges. With a budget
            targets are pulled in any case.
        dtype: In which to compute edges; by default the model's, float32 at least.
        devices: Share the work among these; by default the model's own.
        check_columns: How many random features to compare alone with a direct run through the model's own modules, in
            which all sources together are compared as well; 0 for no such run.
        tolerance: What the certificate's checks must stay below; by default what suits the coarsest dtype.
        bar: Whether to show progress; by default for long work.
        name: The name under which the crosscoder is attached.

    Returns:
        The graph, on the CPU.

    Raises:
        CertificateError: The graph does not add up; says where.
        FreezeError: The model cannot be recorded or frozen.
        AttachError: The crosscoder does not fit the model, or cannot stand for its MLPs.
        GraphError: The prompt or a target cannot be.
    """
    # Not above: all of this needs transformers, which `import clt_plugin` does not load.
    from clt_plugin.adapters.huggingface import plain_model
    from clt_plugin.attribution._given import check_host, in_short
    from clt_plugin.attribution.engine.checks import certify
    from clt_plugin.attribution.engine.edges import all_edges, chosen_edges
    from clt_plugin.attribution.engine.local import LocalReplacement
    from clt_plugin.attribution.engine.readings import Readings
    from clt_plugin.attribution.engine.resolve import Resolver
    from clt_plugin.attribution.engine.table import table_of
    from clt_plugin.interventions.modes import find_crosscoder, read_prompt

    places = _checked(direction, max_n_logits, desired_logit_prob, max_feature_nodes, check_columns, dtype, devices)
    crosscoder = find_crosscoder(model, clt, name, None, "attribute")
    assert crosscoder is not None
    inputs, tokenizer = read_prompt(model, prompt)
    asked: list[Any] | None = None
    if targets is not None:
        several = isinstance(targets, Iterable) and not isinstance(targets, str)
        asked = list(targets) if several else [targets]  # type: ignore[arg-type]
        if not asked:
            raise GraphError("targets= is empty: leave it out for the likeliest next tokens")
    settings = {
        "max_n_logits": max_n_logits,
        "desired_logit_prob": desired_logit_prob,
        "max_feature_nodes": max_feature_nodes,
        "zero_bos": zero_bos,
    }
    # What runs around this call must not change what is computed in it.
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    with plain_model(model) as hf, torch.no_grad(), torch.autocast(device_type, enabled=False):
        check_host(hf)
        local = LocalReplacement.of(hf, crosscoder, inputs, zero_bos=zero_bos, sites_for=asked or (), dtype=dtype)
        resolver = Resolver(local.frozen, crosscoder, local.sources.features, tokenizer)
        resolved = resolver.resolve(resolver.top_logits(max_n_logits, desired_logit_prob) if asked is None else asked)
        readings = [one.readings for one in resolved]
        weights = [one.node["weight"] for one in resolved]
        joined = Readings.join(readings)
        if max_feature_nodes is None or max_feature_nodes >= len(local.sources.features):
            edges = all_edges(local, joined, bias_node=bias_node, direction=direction, devices=places, bar=bar)
        else:
            edges = chosen_edges(
                local, joined, weights, max_feature_nodes, bias_node=bias_node, devices=places, bar=bar
            )
        nodes = table_of(local, edges, resolved, tokenizer, bias_node)
        certificate = certify(hf, local, edges, resolved, nodes["id"].tolist(), check_columns, tolerance)
        certificate.check()
    ids = tuple(inputs["input_ids"][0].tolist())
    tokens = tuple(str(i) if tokenizer is None else tokenizer.decode([i]) for i in ids)
    info = GraphInfo(
        prompt=prompt if isinstance(prompt, str) else "" if tokenizer is None else tokenizer.decode(list(ids)),
        tokens=tokens,
        token_ids=ids,
        n_layers=local.frozen.n_layers,
        model_name=local.frozen.host.name,
        crosscoder=in_short(crosscoder),
        source=str(crosscoder.metadata.get("source", "")),
        settings=settings,
    )
    adjacency, kept = edges.adjacency(len(resolved), bias_node)
    return Graph(adjacency, nodes[kept.numpy()].reset_index(drop=True), certificate, info)


def _checked(
    direction: str,
    max_n_logits: int,
    desired_logit_prob: float,
    max_feature_nodes: int | None,
    check_columns: int,
    dtype: torch.dtype | None,
    devices: Any,
) -> list[torch.device] | None:
    """Refuse settings that cannot be, before anything runs; return the devices."""
    if direction not in ("auto", "push", "pull"):
        raise GraphError(f"direction must be 'auto', 'push' or 'pull', not {direction!r}")
    if max_feature_nodes is not None and direction == "push":
        raise GraphError("max_feature_nodes pulls the features it keeps: leave out direction='push', or the budget")
    counts = {"max_n_logits": (max_n_logits, 1), "check_columns": (check_columns, 0)}
    if max_feature_nodes is not None:
        counts["max_feature_nodes"] = (max_feature_nodes, 1)
    for name, (value, least) in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise GraphError(f"{name} is a whole number of at least {least}, not {value!r}")
    if not 0 < desired_logit_prob <= 1:
        raise GraphError(f"desired_logit_prob is a probability above 0, not {desired_logit_prob!r}")
    if dtype is not None and dtype not in (torch.float32, torch.float64):
        raise GraphError(f"edges are computed in torch.float32 or torch.float64, not {dtype!r}")
    if devices is None:
        return None
    try:
        return [torch.device(each) for each in ([devices] if isinstance(devices, str | torch.device) else devices)]
    except (RuntimeError, TypeError) as error:
        raise GraphError(f"devices are such as 'cpu' or 'cuda:0', not {devices!r}") from error
