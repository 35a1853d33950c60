"""QK attribution against brute force: every source's own query and key, projected, normalised and rotated by hand."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from attribution.oracle import _BLOCK, Oracle, _norm, clt_of, exact, model_of
from clt_plugin import interventions as iv
from clt_plugin.attribution import CertificateError, GraphError
from clt_plugin.attribution.attention import _parts, _queries, qk
from clt_plugin.attribution.attention.qk import qk_attribution
from clt_plugin.attribution.engine import pull
from interventions.oracle_modes import Hand, _linear, _norm_parts
from support.models import bridge_model, make_model, nnsight_model

IDS = torch.tensor([0, 5, 17, 33, 60, 2, 41])
QUERY, KEY = 5, 3
FAMILIES = ("gpt2", "llama", "qwen3", "mistral", "olmo2", "gemma2", "gemma3", "gpt_neox")


def attending_model(family, dtype=torch.float64):
    """A model whose scores are of size, and capped where the family caps them."""
    hf = model_of(family)
    for name, weight in hf.named_parameters():
        if any(part in name for part in ("c_attn", "query_key_value", "q_proj", "k_proj")) and weight.ndim == 2:
            weight.data *= 3
    if family == "gemma2":
        for module in hf.modules():
            if hasattr(module, "attn_logit_softcapping"):
                module.attn_logit_softcapping = 0.7
    return hf.to(dtype)


def by_hand(oracle, layer, head, x, biases, at):
    """The query and key of a head for residual streams x, (rows, d), at a position; ``biases``: which rows have any.

    Norms have the denominators of the model's own run, the row that ``oracle.true`` holds.
    """
    model, hand = oracle.model, Hand(oracle.model.hf)
    attention, before, *_ = _BLOCK[model.kind]
    module = model.blocks[layer].get_submodule(attention)
    own = oracle.true.sites["resid_pre", layer][:, at]
    rows, on = torch.cat((x, own)), torch.cat((biases, torch.ones(1).bool()))[:, None]
    if before is not None:
        gain, bias, _, centred = _norm(model.blocks[layer].get_submodule(before))
        centre = rows - rows.mean(-1, keepdim=True) if centred else rows
        rows = gain * centre * oracle.true.scales[before, layer][0, at] + bias * on
    heads, zero = model.config.num_attention_heads, torch.zeros_like(rows[:1])

    def project(of):
        return of(rows) - ~on * of(zero)

    if model.kind == "gpt2":
        both = [project(lambda x, i=i: (x @ module.c_attn.weight + module.c_attn.bias).chunk(3, -1)[i]) for i in (0, 1)]
    elif model.kind == "gpt_neox":
        each = project(lambda x: _linear(module.query_key_value, x)).unflatten(-1, (heads, -1))
        both = [part.flatten(1) for part in each.chunk(3, dim=-1)[:2]]
    else:
        both = [project(lambda x, part=part: _linear(getattr(module, f"{part}_proj"), x)) for part in "qk"]
    found = []
    for vectors, name in zip(both, ("q_norm", "k_norm"), strict=True):
        norm = getattr(module, name, None)
        if model.kind == "olmo2":
            vectors = _normed(norm, vectors)
        width = getattr(model.config, "head_dim", None) or model.config.hidden_size // heads
        vectors = vectors.unflatten(-1, (-1, width))
        if norm is not None and model.kind != "olmo2":
            vectors = _normed(norm, vectors)
        vectors = vectors[:, head // (heads // vectors.shape[1]) if name == "k_norm" else head]
        if model.kind != "gpt2":
            place = SimpleNamespace(positions=torch.tensor([[at]]))
            vectors = hand._rotate(layer, vectors[:, None, None], place)[:, 0, 0]
        found.append(vectors[:-1])
    return found


def _normed(norm, vectors):
    """Linear, with the last row's denominators."""
    gain, _, eps, _ = _norm_parts(norm)
    return gain * vectors * (vectors[-1:].pow(2).mean(-1, keepdim=True) + eps).rsqrt()


def pairs_by_hand(oracle, layer, head, query, key):
    """Every pair of sources, (S, S), and the score of the run."""
    n = len(oracle.nodes)
    parts = []
    for side, at in ((0, query), (1, key)):
        seen = oracle.run.sites["resid_pre", layer][:, at]
        contributions = torch.cat((seen[:-1] - seen[-1], seen[-1:]))
        parts.append(by_hand(oracle, layer, head, contributions, torch.arange(n) == n - 1, at)[side])
    config = oracle.model.config
    scaling = getattr(config, "query_pre_attn_scalar", parts[0].shape[-1]) ** -0.5
    own = [
        by_hand(oracle, layer, head, oracle.true.sites["resid_pre", layer][:, at], torch.ones(1).bool(), at)[side][0]
        for side, at in ((0, query), (1, key))
    ]
    return scaling * parts[0] @ parts[1].T, float(scaling * own[0] @ own[1])


def whole(result, ids):
    """The matrix of pairs over all sources of the oracle."""
    matrix = torch.zeros(len(ids), len(ids), dtype=torch.float64)
    rows, columns = ([ids.index(name) for name in nodes["id"]] for nodes in (result.query_nodes, result.key_nodes))
    matrix[torch.tensor(rows)[:, None], torch.tensor(columns)] = result.matrix.double()
    return matrix


def agrees(hf, clt, layer, head, query=QUERY, key=KEY, zero_bos=False):
    oracle = Oracle(hf, clt, IDS, zero_bos=zero_bos)
    with exact(hf):
        found = qk_attribution(hf, IDS, layer, head, query, key, clt=clt, zero_bos=zero_bos)
    pairs, score = pairs_by_hand(oracle, layer, head, query, key)
    assert float(pairs.abs().max()) > 0.05
    assert_close(whole(found, oracle.ids_of_sources), pairs, rtol=0, atol=1e-6 * float(pairs.abs().max()))
    assert found.score == pytest.approx(score, rel=1e-6, abs=1e-6 * float(pairs.abs().max()))
    assert found.residual < 1e-12
    assert found.weight == pytest.approx(float(oracle.model.patterns[layer][0, head, query, key]), rel=1e-9)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_pair(family):
    hf, clt = attending_model(family), clt_of("clt")
    found = agrees(hf, clt, layer=2, head=1)
    assert_close(found.by_query, found.matrix.sum(1))
    assert_close(found.by_key, found.matrix.sum(0))
    assert float(found.matrix.sum()) == pytest.approx(found.score)
    assert found.softcap == (0.7 if family == "gemma2" else None)
    assert {"feature", "error", "embedding"} < {*found.query_nodes["kind"], *found.key_nodes["kind"]}
    assert (found.query_nodes["position"] <= QUERY).all()
    assert (found.key_nodes["position"] <= KEY).all()
    agrees(hf, clt, layer=0, head=0, query=2, key=2)  # a position with itself; embeddings and the bias alone


@pytest.mark.parametrize(
    ("family", "clt", "zero_bos"),
    [
        ("gpt_neox", "excludes two, with skips", False),
        ("gemma2", "before the post-norm, with skips", True),
        ("gpt2", "two reads", True),
    ],
)
def test_other_crosscoders(family, clt, zero_bos):
    # What is written at the first position reaches others in layer 2 at the earliest.
    agrees(attending_model(family), clt_of(clt), layer=2, head=1, zero_bos=zero_bos)


def test_the_score_is_the_one_before_the_softcap():
    hf, clt = attending_model("gemma2"), clt_of("clt")
    scores = [qk_attribution(hf, IDS, 1, 1, QUERY, key, clt=clt) for key in (3, 4, 5)]
    capped = [0.7 * math.tanh(each.score / 0.7) for each in scores]
    for value, each in zip(capped, scores, strict=True):
        ratio = math.exp(value - capped[0])
        assert each.weight / scores[0].weight == pytest.approx(ratio, rel=1e-5)
    assert max(abs(each.score - value) for each, value in zip(scores, capped, strict=True)) > 0.1


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_other_dtypes(dtype, close):
    reference = qk_attribution(attending_model("qwen3"), IDS, 2, 1, QUERY, KEY, clt=clt_of("clt"))
    found = qk_attribution(attending_model("qwen3", dtype), IDS, 2, 1, QUERY, KEY, clt=clt_of("clt", dtype))
    assert found.query_parts.dtype == torch.float32
    assert found.score == pytest.approx(reference.score, rel=close)
    wide = qk_attribution(attending_model("qwen3"), IDS, 2, 1, QUERY, KEY, clt=clt_of("clt"), dtype=torch.float32)
    assert wide.query_parts.dtype == torch.float32


def test_work_in_pieces_is_the_same(monkeypatch):
    hf, clt = attending_model("gpt2"), clt_of("clt")
    whole = qk_attribution(hf, IDS, 2, 1, QUERY, KEY, clt=clt)
    top = whole.top(9)
    monkeypatch.setattr(qk, "ROWS", 5)
    monkeypatch.setattr(_parts, "chunks", partial(pull.chunks, elements=300))
    pieces = qk_attribution(hf, IDS, 2, 1, QUERY, KEY, clt=clt)
    assert_close(pieces.matrix, whole.matrix)
    assert pieces.top(9)[["query", "key"]].equals(top[["query", "key"]])
    assert_close(qk._absolute_sum(whole.query_parts, whole.key_parts), whole.matrix.abs().sum())


def test_what_is_wrong_is_found(monkeypatch):
    hf, clt = attending_model("qwen3"), clt_of("clt")

    def trace():
        return qk_attribution(hf, IDS, 2, 1, QUERY, KEY, clt=clt)

    jacobian, attend = _queries._jacobian, _queries._Asked._attend
    with monkeypatch.context() as patched:
        patched.setattr(_queries, "_jacobian", lambda *args: 1.001 * jacobian(*args))
        with pytest.raises(CertificateError, match="parts of the query or key"):
            trace()
    with monkeypatch.context() as patched:
        # Their norms are left live, so that nothing is linear.
        patched.setattr(_queries._Asked, "_normalise", lambda self, name, module, args, output: output)
        with pytest.raises(CertificateError, match="parts of the query or key"):
            trace()

    def doubled(self, *args, scaling, **kwargs):
        return attend(self, *args, scaling=2 * scaling, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(_queries._Asked, "_attend", doubled)
        with pytest.raises(CertificateError, match="the pattern of these scores"):
            trace()
    trace()


def test_what_cannot_be_is_said():
    hf, clt = make_model("mistral"), clt_of("clt", torch.float32)
    for where, error in (
        ((3, 0, 2, 1), "layers 0-2"),
        ((0, 2, 2, 1), "heads 0-1"),
        ((0, 0, 7, 1), "7 tokens"),
        ((0, 0, 2, 3), "its mask hides it"),
        ((0, 0, 6, 1), "its mask hides it"),  # out of the sliding window
    ):
        with pytest.raises(GraphError, match=error):
            qk_attribution(hf, IDS, *where, clt=clt)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in hf.modules())
    assert hf.config._attn_implementation != "clt_plugin"


def test_tables_plots_and_either_library():
    clt, text = clt_of("clt", torch.float32), "w5 w17 w33 w60 w2 w41"
    plain = qk_attribution(make_model("gemma2"), IDS, 2, 1, -2, KEY, clt=clt)
    for model in (nnsight_model("gemma2"), bridge_model("gemma2")):
        model.add_clt(clt)
        found = qk_attribution(model, text, 2, 1, -2, KEY)
        assert (found.query, found.query_nodes["id"].tolist()) == (5, plain.query_nodes["id"].tolist())
        assert_close(found.matrix, plain.matrix, rtol=1e-4, atol=1e-5)
        assert found.query_nodes["token"].iloc[-2].strip() == "w2"
    top = plain.top(7)
    strongest = plain.matrix.abs().flatten().sort(descending=True).values[:7]
    assert top["score"].abs().tolist() == pytest.approx(strongest.tolist())
    for row in top.itertuples():
        place = [
            list(nodes["id"]).index(name)
            for nodes, name in zip((plain.query_nodes, plain.key_nodes), (row.query, row.key), strict=True)
        ]
        assert row.score == pytest.approx(float(plain.matrix[place[0], place[1]]))
    for side, scores in (("query", plain.by_query), ("key", plain.by_key)):
        best = plain.top_sources(side, 3)
        assert best["score"].abs().tolist() == scores.abs().sort(descending=True).values[:3].tolist()
    assert plain.plot(k=5).axes[0].images[0].get_array().shape == (5, 5)
    assert "score" in str(plain)
    with pytest.raises(GraphError, match="'query' and 'key'"):
        plain.top_sources("value")
    edited = iv.scale(layer=0, feature=3, by=2.0)  # what is attached or edited takes no part
    model = nnsight_model("gemma2")
    model.add_clt(clt, edits=edited)
    assert qk_attribution(model, text, 2, 1, 5, KEY).score == pytest.approx(plain.score, rel=1e-5)
