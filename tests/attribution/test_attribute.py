"""`attribute` against brute force in float64, entry by entry, and what follows from its being exact."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.testing import assert_close

import clt_plugin as cp
from attribution.oracle import CLTS, Oracle, agree, clt_of, exact, model_of
from clt_plugin import AttachError, Wiring
from clt_plugin import interventions as iv
from clt_plugin.attribution import logit
from clt_plugin.attribution.engine import pull, push, sources
from interventions.oracle_modes import FAMILIES as BY_HAND
from interventions.oracle_modes import Batch, Change, Hand, run_mode
from support.crosscoders import make_clt
from support.models import CONFIGS, FAMILIES, N_LAYERS, bridge_model, make_tokenizer, nnsight_model

# Longer than the sliding windows of 4.
IDS = torch.tensor([0, 5, 17, 33, 60, 2, 41])
TEXT = "w5 w17 w33 w60 w2 w41"
CASES = [
    *((family, "clt") for family in FAMILIES),
    *(("gemma2", name) for name in CLTS if name != "clt"),
    *(
        ("gpt2", name)
        for name in ("reads MLPs", "reads resid_pre", "two reads", "skips before gain", "a far skip", "topk")
    ),
    *(("gpt_neox", name) for name in ("a sum", "reads before gain", "skips", "excludes two, with skips")),
    *(("olmo2", name) for name in ("before the post-norm, with skips", "reads resid_mid")),
    *(("gemma3_multimodal", name) for name in ("before the post-norm", "strictly causal")),
]


def attribute(hf: Any, clt: Any = None, prompt: Any = IDS, **settings: Any) -> Any:
    """The call, in float64 throughout where the model is."""
    if not isinstance(hf, nn.Module) or next(hf.parameters()).dtype != torch.float64:
        return cp.attribute(hf, prompt, clt=clt, **settings)
    with exact(hf):
        return cp.attribute(hf, prompt, clt=clt, **settings)


# ---------------------------------------------------------------- the oracle itself


@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_is_the_model(family):
    hf, seen = model_of(family), []
    oracle = Oracle(hf, clt_of("clt"), IDS)
    hf.get_output_embeddings().register_forward_hook(lambda module, args, output: seen.append(output))
    with exact(hf):
        hf(input_ids=IDS[None], use_cache=False)
    assert_close(oracle.true.unembedded, seen[0], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("zero_bos", [False, True])
@pytest.mark.parametrize("clt", CLTS)
def test_the_oracle_adds_up(clt, zero_bos):
    oracle = Oracle(model_of("gemma2"), clt_of(clt), IDS, zero_bos=zero_bos)
    for read in {**oracle.reads_of_features(), **oracle.logits(oracle.likeliest())}.values():
        assert_close(float(oracle.edges(read).sum()), oracle.value(read), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", BY_HAND)
@pytest.mark.parametrize("clt", ["clt", "a far skip"])
def test_the_oracles_columns_are_direct_interventions(family, clt):
    hf, clt = model_of(family), clt_of(clt)
    oracle = Oracle(hf, clt, IDS)
    group, position, latent = 0, 2, int(oracle.features[0][2].argmax())
    gone = [Change(group, latent, lambda x: 0.0, lambda row, at, n, natural: at == position)]
    batch = Batch(IDS[None], torch.ones(1, len(IDS)).bool())
    outcome = run_mode(Hand(hf), clt, batch, gone, "direct")
    column = oracle.ids_of_sources.index(f"{group}_{latent}_{position}")
    effect = (outcome.before.unembedded - outcome.after.unembedded)[0, -1]
    edges = torch.stack([oracle.edges(oracle.logit(token))[column] for token in range(len(effect))])
    assert_close(edges, effect - effect.mean(), rtol=1e-9, atol=1e-12)
    assert float(edges.abs().max()) > 1e-2
    lost = outcome.before.sites["mlp_in", 2] - outcome.after.sites["mlp_in", 2]
    edge = oracle.edges(oracle.feature(2, 6, 5))[column]
    assert_close(edge, lost[0, 6] @ clt.W_enc[2][:, 5], rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- every entry


@pytest.mark.parametrize(("family", "clt"), CASES)
def test_edges_are_those_of_brute_force(family, clt):
    hf, crosscoder = model_of(family), clt_of(clt)
    oracle = Oracle(hf, crosscoder, IDS)
    targets = oracle.logits(oracle.likeliest())
    pushed = attribute(hf, crosscoder, direction="push")
    agree(pushed, oracle, targets, 1e-9)
    pulled = attribute(hf, crosscoder, direction="pull")
    assert list(pulled.nodes["id"]) == list(pushed.nodes["id"])
    largest = float(pushed.adjacency.abs().max())
    assert_close(pulled.adjacency, pushed.adjacency, rtol=0, atol=1e-12 * largest)
    single = attribute(hf.float(), clt_of(clt, torch.float32))
    assert single.adjacency.dtype == torch.float32
    agree(single, oracle, targets, 1e-5)


@pytest.mark.parametrize("direction", ["push", "pull"])
@pytest.mark.parametrize(
    ("family", "clt"),
    [("gpt2", "clt"), ("gemma2", "before the post-norm, with skips"), ("gpt_neox", "excludes two, with skips")],
)
def test_a_zeroed_first_position_is_carried_by_the_bias(family, clt, direction):
    hf, crosscoder = model_of(family), clt_of(clt)
    oracle = Oracle(hf, crosscoder, IDS, zero_bos=True)
    targets = oracle.logits(oracle.likeliest())
    graph = attribute(hf, crosscoder, zero_bos=True, direction=direction)
    agree(graph, oracle, targets, 1e-9)
    assert 0 not in set(graph.nodes["position"][graph.nodes["kind"] == "feature"])
    without = attribute(hf, crosscoder, zero_bos=True, bias_node=False, direction=direction)
    kept = ~graph.of_kind("bias")
    assert list(without.nodes["id"]) == list(graph.nodes["id"][kept.numpy()])
    assert torch.equal(without.adjacency, graph.adjacency[kept][:, kept])


def test_a_bias_of_the_unembedding_counts_less_its_mean():
    hf = model_of("gpt2")
    hf.lm_head = nn.Linear(hf.config.n_embd, hf.config.vocab_size).double().requires_grad_(False)
    oracle = Oracle(hf, clt_of("clt"), IDS)
    agree(attribute(hf, clt_of("clt")), oracle, oracle.logits(oracle.likeliest()), 1e-9)


@pytest.mark.parametrize("direction", ["push", "pull"])
def test_a_prompt_of_one_token_and_one_without_features(direction):
    hf = model_of("llama")
    one = Oracle(hf, clt_of("clt"), IDS[:1])
    agree(attribute(hf, clt_of("clt"), IDS[:1], direction=direction), one, one.logits(one.likeliest()), 1e-9)
    silent = make_clt(dtype=torch.float64)
    for bias in silent.b_enc:
        bias.fill_(-1e3)
    oracle = Oracle(hf, silent, IDS)
    graph = attribute(hf, silent, direction=direction)
    assert not graph.of_kind("feature").any()
    agree(graph, oracle, oracle.logits(oracle.likeliest()), 1e-9)


# ---------------------------------------------------------------- which logits


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_the_likeliest_tokens_are_the_targets(family):
    hf, clt = model_of(family), clt_of("clt")
    oracle = Oracle(hf, clt, IDS)
    probabilities = oracle.model.logits[-1].softmax(-1)
    for most, share in [(10, 0.95), (3, 0.95), (10, 0.3), (10, 1e-6)]:
        graph = attribute(hf, clt, max_n_logits=most, desired_logit_prob=share)
        targets = graph.nodes[graph.nodes["kind"] == "target"]
        likeliest = oracle.likeliest(most, share)
        assert targets["token_id"].tolist() == likeliest
        assert list(targets["id"]) == list(oracle.logits(likeliest))
        assert targets["layer"].tolist() == [N_LAYERS] * len(likeliest)
        assert targets["position"].tolist() == [len(IDS) - 1] * len(likeliest)
        # After a softcap, which the values are not.
        assert_close(torch.tensor(targets["weight"].to_numpy()), probabilities[likeliest], rtol=1e-9, atol=0)


# ---------------------------------------------------------------- the libraries


def hooks(hf: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in hf.modules())


def found(hf: nn.Module) -> dict[str, Any]:
    """All that a call could leave changed."""
    return {
        "hooks": hooks(hf),
        "training": [m.training for m in hf.modules()],
        "attention": {id(m.config): m.config._attn_implementation for m in hf.modules() if hasattr(m, "config")},
        "config": hf.config.to_dict(),
        "gradients": [(p.requires_grad, p.grad) for p in hf.parameters()],
        "own": [sorted(k for k in vars(m) if not k.startswith("_")) for m in hf.modules()],
    }


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "olmo2"])
@pytest.mark.parametrize("direction", ["push", "pull"])
def test_the_model_is_left_as_it_was(family, direction):
    hf = model_of(family, torch.float32)
    hf.requires_grad_(True)
    before, weights = found(hf), copy.deepcopy(hf.state_dict())
    cp.attribute(hf, IDS, clt=clt_of("clt", torch.float32), direction=direction)
    assert found(hf) == before
    with pytest.raises(cp.attribution.CertificateError):
        cp.attribute(hf, IDS, clt=clt_of("clt", torch.float32), direction=direction, tolerance=1e-30)
    assert found(hf) == before
    for name, value in hf.state_dict().items():
        assert torch.equal(value, weights[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_either_library_gives_the_plain_models_graph(family):
    clt = clt_of("clt", torch.float32)
    plain = cp.attribute(model_of(family, torch.float32), make_tokenizer()(TEXT)["input_ids"], clt=clt)
    for make in (nnsight_model, bridge_model):
        model = make(model_of(family, torch.float32))
        handle = model.add_clt(clt, mode="observe")
        graph = cp.attribute(model, TEXT)
        assert list(graph.nodes["id"]) == list(plain.nodes["id"])
        assert_close(graph.adjacency, plain.adjacency, rtol=0, atol=1e-5 * float(plain.adjacency.abs().max()))
        assert graph.info.prompt == TEXT
        assert graph.info.tokens[1] == "w5"
        handle.remove()
        with pytest.raises(AttachError, match="add_clt"):
            cp.attribute(model, TEXT)


@pytest.mark.parametrize("make", [nnsight_model, bridge_model])
def test_an_attached_crosscoder_is_found_by_its_name_and_does_not_act(make):
    model = make(model_of("llama", torch.float32))
    first, second = clt_of("clt", torch.float32), clt_of("jumprelu", torch.float32)
    model.add_clt(first, mode="replace")
    model.add_clt(second, mode="observe", name="other")
    plain = model_of("llama", torch.float32)
    for name, clt in [("clt", first), ("other", second)]:
        graph, alone = cp.attribute(model, IDS, name=name), cp.attribute(plain, IDS, clt=clt)
        assert_close(graph.adjacency, alone.adjacency, rtol=0, atol=1e-5 * float(alone.adjacency.abs().max()))
    with pytest.raises(AttachError, match="third"):
        cp.attribute(model, IDS, name="third")


# ---------------------------------------------------------------- what follows from exactness


def before_softcap(hf: Any, logits: Tensor) -> Tensor:
    cap = getattr(hf.config, "final_logit_softcapping", None)
    return cap * torch.atanh(logits / cap) if cap else logits


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("clt", ["clt", "a far skip"])
def test_a_direct_ablation_is_a_column(family, clt):
    hf, crosscoder = model_of(family), clt_of(clt)
    graph = attribute(hf, crosscoder)
    features = graph.nodes[graph.nodes["kind"] == "feature"]
    targets = graph.nodes[graph.nodes["kind"] == "target"]
    for layer in range(N_LAYERS):
        node = features[features["layer"] == layer].iloc[-1]
        gone = iv.only(iv.ablate(layer=layer, feature=int(node["feature"])), position=int(node["position"]))
        with exact(hf):
            run = cp.intervene(hf, IDS, gone, mode="direct", clt=crosscoder)
        lost = (before_softcap(hf, run.baseline) - before_softcap(hf, run.logits))[0, -1]
        edges = graph.adjacency[targets.index, graph.index(node["id"])]
        assert_close(edges, lost[targets["token_id"].tolist()] - lost.mean(), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("wiring", [Wiring.plt, Wiring.clt])
def test_a_perfect_dictionary_leaves_no_error(wiring):
    """One latent a neuron of a model whose MLPs are ReLU ones."""
    config = CONFIGS["gpt2"]()
    config.activation_function, config.n_inner = "relu", 24
    torch.manual_seed(0)
    hf = transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)
    for parameter in hf.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    clt = make_clt(wiring(N_LAYERS))
    for parameter in clt.parameters():
        parameter.zero_()
    for layer, block in enumerate(hf.transformer.h):
        clt.W_enc[layer].copy_(block.mlp.c_fc.weight)
        clt.b_enc[layer].copy_(block.mlp.c_fc.bias)
        clt.W_dec[layer][:, : config.n_embd] = block.mlp.c_proj.weight
        clt.b_dec[layer].copy_(block.mlp.c_proj.bias)
    hf, clt = hf.double(), clt.double()
    graph = attribute(hf, clt)
    largest = float(graph.adjacency.abs().max())
    assert float(graph.adjacency[:, graph.of_kind("error")].abs().max()) < 1e-12 * largest
    assert int(graph.of_kind("feature").sum()) > 50
    scores = graph.scores()
    assert_close((scores.replacement, scores.completeness), (1.0, 1.0), rtol=0, atol=1e-10)


# ---------------------------------------------------------------- refusals


def test_refusals():
    hf, clt = model_of("llama", torch.float32), clt_of("clt", torch.float32)
    with pytest.raises(ValueError, match="one prompt"):
        cp.attribute(hf, torch.stack((IDS, IDS)), clt=clt)
    with pytest.raises(ValueError, match="tokenizer"):
        cp.attribute(hf, TEXT, clt=clt)
    with pytest.raises(AttachError, match="none is attached"):
        cp.attribute(hf, IDS)
    for wiring, reason in [
        (Wiring.weakly_causal(range(N_LAYERS)), "writes resid_post, not MLP outputs alone"),
        (Wiring.pre_post_mlp(1), "writes mlp_in"),
        (Wiring.model_diff(["a", "b"], 1), "a, b"),
    ]:
        with pytest.raises(AttachError, match=reason):
            cp.attribute(hf, IDS, clt=make_clt(wiring))
    with pytest.raises(AttachError, match="estimate_threshold"):
        cp.attribute(hf, IDS, clt=make_clt(activation="batchtopk", k=3).train())
    with pytest.raises(ValueError, match="direction"):
        cp.attribute(hf, IDS, clt=clt, direction="sideways")


# ---------------------------------------------------------------- budgets and chunks


def influence_of(oracle: Oracle, adjacency: Tensor, weights: Tensor) -> Tensor:
    """Each node's influence on the targets, by the definition: the bias stands outside."""
    inputs = adjacency.abs()
    inputs[:, oracle.ids_of_sources.index("bias")] = 0
    inputs = inputs / inputs.sum(1, keepdim=True).clamp(min=1e-300)
    eye = torch.eye(len(inputs)).double()
    n = len(weights)
    start = torch.cat((torch.zeros(len(inputs) - n).double(), weights / weights.sum()))
    return start @ (torch.linalg.inv(eye - inputs) - eye)


@pytest.mark.parametrize(
    ("family", "clt", "budget", "chunk"),
    [
        ("gemma2", "clt", 1, None),
        ("gpt_neox", "a sum", 20, 1000),
        # About half of the features, of which more than that have influence.
        ("gemma2", "clt", 66, None),
        ("gpt_neox", "a sum", 107, 1000),
        ("gemma2", "topk", 32, 1),
    ],
)
def test_a_budget_keeps_the_most_influential_features(family, clt, budget, chunk, monkeypatch):
    if chunk is not None:
        in_chunks(monkeypatch, chunk)
    hf, crosscoder = model_of(family), clt_of(clt)
    oracle = Oracle(hf, crosscoder, IDS)
    likeliest = oracle.likeliest()
    whole = oracle.adjacency(oracle.logits(likeliest))
    weights = oracle.model.logits[-1].softmax(-1)[likeliest]
    graph = attribute(hf, crosscoder, max_feature_nodes=budget)
    kept = graph.of_kind("feature").sum()
    assert kept == budget
    ids = [*oracle.ids_of_sources, *oracle.logits(likeliest)]
    places = torch.tensor([ids.index(node) for node in graph.nodes["id"]])
    assert places.tolist() == sorted(places.tolist())
    largest = float(whole.abs().max())
    assert_close(graph.adjacency, whole[places][:, places], rtol=0, atol=1e-9 * largest)
    left = torch.ones(len(ids)).bool()
    left[places] = False
    rows = graph.of_kind("feature", "target")
    omitted = torch.tensor(graph.nodes["omitted"].to_numpy())[rows]
    assert_close(omitted, whole[places[rows]][:, left].sum(1), rtol=0, atol=1e-9 * largest)
    assert graph.certificate.holds
    features = [index for index, (_, kind, _) in enumerate(oracle.nodes) if kind == "feature"]
    if len(features) <= 2 * budget:
        # So few that all were pulled: the choice is that of the whole graph, but for which of equals are taken.
        influence = influence_of(oracle, whole, weights)[: len(features)]
        chosen = torch.zeros(len(features)).bool()
        chosen[places[: int(kept)]] = True
        assert influence[chosen].min() >= influence[~chosen].max() - 1e-12


def in_chunks(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    for module in (push, pull):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", elements)
    monkeypatch.setattr(sources, "BLOCK_BYTES", elements)


@pytest.mark.parametrize("direction", ["push", "pull"])
@pytest.mark.parametrize(("family", "clt"), [("gemma2", "before the post-norm, with skips"), ("gpt_neox", "a sum")])
def test_chunks_and_devices_change_nothing(family, clt, direction, monkeypatch):
    hf, crosscoder = model_of(family), clt_of(clt)
    whole = attribute(hf, crosscoder, direction=direction)
    in_chunks(monkeypatch, 1000)
    for settings in ({}, {"devices": ["cpu", "cpu", "cpu"]}):
        parts = attribute(hf, crosscoder, direction=direction, **settings)
        assert_close(parts.adjacency, whole.adjacency, rtol=1e-12, atol=1e-12)


def test_any_number_of_rows_is_summed():
    """Rows are summed in parts of 256."""
    hf, clt = model_of("llama", torch.float32), clt_of("clt", torch.float32)
    n = int(cp.attribute(hf, IDS, [0], clt=clt).of_kind("feature").sum())
    asked = [logit(token, position=at) for at in range(len(IDS)) for token in range(61)]
    for rows in (255, 256, 257):
        graph = cp.attribute(hf, IDS, asked[: rows - n], clt=clt)
        assert int(graph.of_kind("feature", "target").sum()) == rows
        assert graph.certificate.holds
