"""Head loadings against brute force: each head switched on alone above all earlier attention, and below none."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from attribution.oracle import Oracle, clt_of, exact, model_of
from clt_plugin.attribution import CertificateError, GraphError, direction, feature, logit
from clt_plugin.attribution.attention import _by_head
from clt_plugin.attribution.attention.heads import head_loadings
from clt_plugin.attribution.engine import pull
from clt_plugin.attribution.trace import attribute
from support.models import N_LAYERS, bridge_model, make_model, nnsight_model

IDS = torch.tensor([0, 5, 17, 33, 60, 2, 41])
HEADS = 2


class ByHand:
    """The parts of edges, by runs in which some heads are off.

    With attention whole below a layer, only one of its heads on, and none above, edges hold the paths whose last head
    is this one, and those that end below; without that head, the latter alone.
    """

    def __init__(self, oracle):
        whole, self.runs = oracle.model.patterns, {}
        for layer, head in itertools.product(range(len(whole)), (None, *range(HEADS))):
            patterns = [pattern if at < layer else torch.zeros_like(pattern) for at, pattern in enumerate(whole)]
            if head is not None:
                patterns[layer][:, head] = whole[layer][:, head]
            oracle.model.patterns = patterns
            with torch.no_grad():
                self.runs[layer, head] = oracle._run()
        oracle.model.patterns = whole

    def parts(self, read):
        """The part of each edge that passes no head, (S,), and those by last head, (layer, head, S)."""
        seen = {key: read(run) for key, run in self.runs.items()}
        edges = {key: torch.cat((each[:-1] - each[-1], each[-1:])) for key, each in seen.items()}
        by_head = [[edges[at, head] - edges[at, None] for head in range(HEADS)] for at in range(N_LAYERS)]
        return edges[0, None], torch.stack([torch.stack(row) for row in by_head])


@pytest.mark.parametrize(
    ("family", "clt", "zero_bos"),
    [
        ("gpt2", "clt", False),
        ("llama", "a far skip", False),
        ("qwen3", "plt", False),
        ("olmo2", "before the post-norm, with skips", True),
        ("gemma2", "two reads", False),
        ("gemma3", "excludes two", False),
        ("gpt_neox", "skips", False),
    ],
)
def test_every_part_of_every_edge(family, clt, zero_bos):
    hf, clt = model_of(family), clt_of(clt)
    oracle = Oracle(hf, clt, IDS, zero_bos=zero_bos)
    by_hand, (group, position, latent) = ByHand(oracle), (2, 5, 3)
    vector = torch.randn(16, dtype=torch.float64)
    for target, read in (
        (logit(9), oracle.logit(9)),
        (feature(group, latent, position), oracle.feature(group, position, latent)),
        (direction(vector, 1, "attn_out", 4), oracle.direction(vector, ("attn_out", 1), 4)),
    ):
        with exact(hf):
            found = head_loadings(hf, IDS, target, clt=clt, zero_bos=zero_bos, bar=False)
        assert found.nodes["id"].tolist() == oracle.ids_of_sources
        expected, close = oracle.edges(read), 1e-9 * float(oracle.edges(read).abs().max())
        assert_close(found.edges, expected, rtol=0, atol=close)
        direct, loadings = by_hand.parts(read)
        # All but the bias's, whose parts count what attention's own biases write as past no head.
        assert_close(found.direct[:-1], direct[:-1], rtol=0, atol=close)
        assert_close(found.loadings[:, :, :-1], loadings[:, :, :-1], rtol=0, atol=close)
        assert_close(found.direct + found.loadings.sum((0, 1)), expected, rtol=0, atol=close)
        assert float(loadings[:, :, :-1].abs().max()) > 0.01 * float(expected.abs().max())
        assert found.value == pytest.approx(oracle.value(read), rel=1e-9)
        assert found.residual < 1e-12


def test_a_path_through_two_heads_counts_for_the_last():
    hf, clt = model_of("llama"), clt_of("plt")
    for layer, block in enumerate(hf.model.layers):
        heads = block.self_attn.o_proj.weight.data.view(16, HEADS, 8)
        heads[:, [head for head in range(HEADS) if (layer, head) not in ((0, 1), (2, 0))]] = 0
    found = head_loadings(hf, IDS, 9, clt=clt, bar=False)
    on = found.loadings.abs().amax(-1) > 0
    assert on.nonzero().tolist() == [[0, 1], [2, 0]]
    # The first token's embedding reaches the last position through one of them, or through both; the errors of layer
    # 1 come after the first, and go through the second alone.
    assert float(found.loadings[0, 1, found.index("E_0_0")].abs()) > 0
    assert float(found.loadings[0, 1, found.index("1_-1_0")]) == 0
    assert float(found.loadings[2, 0, found.index("1_-1_0")]) == pytest.approx(
        float(found.edges[found.index("1_-1_0")])
    )


def test_the_whole_is_the_graphs_row():
    hf, clt = make_model("gemma3"), clt_of("clt", torch.float32)
    graph = attribute(hf, IDS, [9], clt=clt)
    found = head_loadings(hf, IDS, 9, clt=clt, bar=False)
    n = len(found.nodes)
    assert found.nodes["id"].tolist() == graph.nodes["id"].tolist()[:n]
    row = graph.adjacency[graph.index(found.target), :n]
    assert_close(found.edges, row, rtol=1e-4, atol=1e-5 * float(row.abs().max()))


def test_work_in_pieces_is_the_same(monkeypatch):
    hf, clt = model_of("llama"), clt_of("clt")
    whole = head_loadings(hf, IDS, 9, clt=clt, bar=False)
    monkeypatch.setattr(_by_head, "chunks", partial(pull.chunks, elements=1))  # a head at a time
    assert_close(head_loadings(hf, IDS, 9, clt=clt, bar=False).loadings, whole.loadings)


def test_what_is_wrong_is_found(monkeypatch):
    hf, clt = make_model("gemma2"), clt_of("clt", torch.float32)
    back = _by_head._EachHead.attend_from_transposed

    def first_head_too_large(self, g, at, out):
        before = out.clone()
        back(self, g, at, out)
        out[:, self.heads.index(0)] += 0.01 * (out - before)[:, self.heads.index(0)]

    with monkeypatch.context() as patched:
        patched.setattr(_by_head._EachHead, "attend_from_transposed", first_head_too_large)
        with pytest.raises(CertificateError, match=r"layer 1's heads.*the parts of an edge"):
            head_loadings(hf, IDS, 9, clt=clt, bar=False)
    head_loadings(hf, IDS, 9, clt=clt, bar=False)


def test_tables_plots_and_either_library():
    clt, text = clt_of("clt", torch.float32), "w5 w17 w33 w60 w2 w41"
    plain = head_loadings(make_model("gpt2"), IDS, feature(2, 3, 5), clt=clt, bar=False)
    for model in (nnsight_model("gpt2"), bridge_model("gpt2")):
        model.add_clt(clt)
        found = head_loadings(model, text, feature(2, 3, 5), bar=False)
        assert found.nodes["id"].tolist() == plain.nodes["id"].tolist()
        assert_close(found.loadings, plain.loadings, rtol=1e-3, atol=1e-5)
    top = plain.top(6)
    parts = torch.cat((plain.loadings.flatten(0, 1), plain.direct[None]))
    assert top["part"].abs().tolist() == parts.abs().flatten().sort(descending=True).values[:6].tolist()
    for row in plain.top(200).itertuples():
        source = plain.index(row.source)
        part = plain.direct[source] if row.layer < 0 else plain.of(row.source)[row.layer, row.head]
        assert (row.part, row.edge) == (float(part), float(plain.edges[source]))
        assert (row.layer < 0) == (row.head < 0)
    of_one = plain.top(100, source="E_0_0")
    assert set(of_one["source"]) == {"E_0_0"}
    assert len(of_one) == N_LAYERS * HEADS + 1
    assert of_one["part"].sum() == pytest.approx(float(plain.edges[plain.index("E_0_0")]), abs=1e-5)
    drawn = plain.plot("E_0_0").axes[0].images[0].get_array()
    assert torch.equal(torch.tensor(drawn.data), plain.of("E_0_0"))
    assert plain.plot().axes[0].images[0].get_array().shape == (N_LAYERS, HEADS)
    assert "last head" in str(plain)
    with pytest.raises(GraphError, match="no source"):
        plain.of("E_9_9")
    with pytest.raises(GraphError, match="no source 999"):
        plain.of(999)
