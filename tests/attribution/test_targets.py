"""What a graph can explain: tokens, differences, directions and features, against brute force."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

import clt_plugin as cp
from attribution.oracle import Oracle, Read, agree, clt_of, exact, model_of
from clt_plugin import AttachError, Wiring
from clt_plugin.attribution import targets as to
from clt_plugin.attribution.graph import GraphError
from support.crosscoders import make_clt
from support.models import D_MODEL, N_LAYERS, make_tokenizer, nnsight_model

IDS = torch.tensor([0, 5, 17, 33, 60, 2, 41])
LAST = len(IDS) - 1
CASES = [
    ("gpt2", "clt"),
    ("gemma2", "before the post-norm, with skips"),
    ("gpt_neox", "a sum"),
    ("olmo2", "two reads"),
]


def vector(seed: int) -> torch.Tensor:
    return torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed)).double()


def check(family: str, clt: str, asked: Any, reads: dict[str, Read], direction: str) -> Any:
    """Compare with the oracle; reads are by the nodes' ids, in their order."""
    hf, crosscoder = model_of(family), clt_of(clt)
    with exact(hf):
        graph = cp.attribute(hf, IDS, asked, clt=crosscoder, direction=direction)
    agree(graph, Oracle(hf, crosscoder, IDS), reads, 1e-9)
    return graph


@pytest.mark.parametrize("direction", ["push", "pull"])
@pytest.mark.parametrize(("family", "clt"), CASES)
def test_all_kinds_at_once(family, clt, direction):
    oracle = Oracle(model_of(family), clt_of(clt), IDS)
    probabilities = oracle.model.logits.softmax(-1)
    logits = sorted([(7, LAST), (60, LAST), (3, 2)], key=lambda at: -float(probabilities[at[1], at[0]]))
    sites = [
        ("resid_post", None),
        ("resid_pre", 1),
        ("attn_out", 2),
        ("mlp_in", 1),
        ("mlp_out", 1),
        ("final_norm", None),
    ]
    if family not in ("gpt_neox", "olmo2"):
        sites += [("resid_mid", 0), ("mlp_in_before_gain", 2)]
    home = oracle.labels.index("1")
    active = oracle.features[home][4].nonzero()[0].item()
    silent = (oracle.features[home][4] == 0).nonzero()[0].item()
    asked: list[Any] = [to.logit(7), 60, to.logit(3, position=2), to.difference(9, 4), to.difference(9, 4, position=-3)]
    asked += [to.feature(1, active, 4), to.feature("1", silent, 4)]
    reads = {f"{N_LAYERS + 1}_{token}_{at}": oracle.logit(token, at) for token, at in logits}
    others: dict[str, Read] = {
        f"target_logits_9_4_{LAST}": oracle.difference(9, 4),
        f"target_logits_9_4_{LAST - 2}": oracle.difference(9, 4, LAST - 2),
        f"target_1_{active}_4": oracle.feature(home, 4, active),
        f"target_1_{silent}_4": oracle.feature(home, 4, silent),
    }
    for number, (site, layer) in enumerate(sites):
        asked.append(to.direction(vector(number), layer, site, position=5, name=f"d{number}"))
        at = N_LAYERS - 1 if layer is None else layer
        key = ("final", -1) if site == "final_norm" else (site, at)
        others[f"target_d{number}_{site}_{at}_5"] = oracle.direction(vector(number), key, 5)
    graph = check(family, clt, asked, {**reads, **others}, direction)
    targets = graph.nodes[graph.nodes["kind"] == "target"].set_index("id")
    # A feature that is active is explained alike as a node and as a target.
    node, target = graph.index(f"1_{active}_4"), graph.index(f"target_1_{active}_4")
    assert_close(graph.adjacency[target], graph.adjacency[node], rtol=1e-12, atol=1e-12)
    for token, at in logits:
        assert_close(
            targets["weight"][f"{N_LAYERS + 1}_{token}_{at}"], float(probabilities[at, token]), rtol=1e-9, atol=0
        )
    assert set(targets["weight"][list(others)]) == {1.0}
    assert graph.certificate.holds


def test_a_difference_is_the_difference_of_the_logits_edges():
    hf, clt = model_of("gemma3"), clt_of("clt")
    graph = cp.attribute(hf, IDS, [9, 4, to.difference(9, 4)], clt=clt)
    nine, four, apart = (graph.adjacency[graph.index(f"{name}_{LAST}")] for name in ("4_9", "4_4", "target_logits_9_4"))
    assert_close(nine - four, apart, rtol=1e-10, atol=1e-10)


def test_weights_that_are_given_are_kept():
    asked = [to.logit(9, weight=0.3), to.difference(9, 4, weight=0.2), to.feature(1, 2, 3, weight=0.7)]
    graph = cp.attribute(model_of("llama"), IDS, asked, clt=clt_of("clt"))
    assert sorted(graph.nodes["weight"][graph.nodes["kind"] == "target"]) == [0.2, 0.3, 0.7]


def test_tokens_as_text():
    model = nnsight_model(model_of("llama", torch.float32))
    graph = cp.attribute(model, "w5 w17", ["w9", to.difference("w9", "w4")], clt=clt_of("clt", torch.float32))
    assert set(graph.nodes["id"][graph.nodes["kind"] == "target"]) == {"4_9_2", "target_logits_9_4_2"}
    assert graph.nodes["token"].iloc[-2] == make_tokenizer().decode([9])
    with pytest.raises(GraphError, match="is 2 tokens"):
        cp.attribute(model, "w5 w17", "w9 w4", clt=clt_of("clt", torch.float32))


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (lambda: [], "leave it out"),
        (lambda: 61, "no token 61"),
        (lambda: "w9", "tokenizer"),
        (lambda: to.logit(3, position=7), "no position 7"),
        (lambda: to.difference(3, 3), "two different tokens"),
        (lambda: to.feature(3, 0), "no features at layer 3"),
        (lambda: to.feature(1, 12), "features 0-11"),
        (lambda: to.direction(vector(0), layer=3), "layers 0-2"),
        (lambda: to.direction(vector(0), site="nowhere"), "no site 'nowhere'"),
        (lambda: to.direction(torch.ones(3)), r"shape \(16,\)"),
        (lambda: [3, 3], "two targets are the same"),
        (lambda: [object()], "object"),
    ],
)
def test_targets_that_cannot_be(asked, reason):
    with pytest.raises(GraphError, match=reason):
        cp.attribute(model_of("llama", torch.float32), IDS, asked(), clt=clt_of("clt", torch.float32))


def test_what_a_frozen_mlp_held_within_is_not_to_be_read():
    """Where a crosscoder writes after a post-norm, what the MLP put into that norm is a function of nothing here."""
    asked = to.direction(vector(0), layer=1, site="mlp_out_before_norm")
    reader = make_clt(Wiring.strictly_causal(N_LAYERS, read="mlp_out_before_norm"), dtype=torch.float64)
    for targets, clt in [(asked, clt_of("clt")), (None, reader)]:
        with pytest.raises((GraphError, AttachError), match="mlp_out_before_norm"):
            cp.attribute(model_of("gemma2"), IDS, targets, clt=clt)
    # Without a post-norm the two sites are one.
    assert cp.attribute(model_of("llama"), IDS, asked, clt=clt_of("clt")).certificate.holds
