"""What heads and neurons read, found by asking modules, against the formulas of their families."""

import pytest
import torch

from clt_plugin.adapters.huggingface import HostModel
from clt_plugin.analysis import weights
from clt_plugin.analysis.weights import _readers
from clt_plugin.core import Site
from support.models import D_MODEL, make_model, nnsight_model

LAYER = 1


def found(family, what, *args, **kwargs):
    model = make_model(family, torch.float64)
    host = HostModel.of(model)
    block = model.get_submodule(host.blocks)[LAYER]
    return block, getattr(_readers, what)(model, host, *args, **kwargs)


def centred(rows):
    return rows - rows.mean(1, keepdim=True)


def close(a, b):
    # Some families compute their norms in float32 whatever they are given.
    return torch.allclose(a, b, rtol=0, atol=1e-6)


def test_grouped_queries_and_their_gains():
    block, units = found("llama", "heads", "q")
    assert (units.count(LAYER), units.width) == (2, 8)
    assert close(units.weights[LAYER], block.self_attn.q_proj.weight * block.input_layernorm.weight)
    _, keys = found("llama", "heads", "k")
    assert keys.count(LAYER) == 1
    assert close(keys.weights[LAYER], block.self_attn.k_proj.weight * block.input_layernorm.weight)
    _, plain = found("llama", "heads", "v", gains=False)
    assert close(plain.weights[LAYER], block.self_attn.v_proj.weight)


def test_fused_projection_with_centring_and_bias():
    block, units = found("gpt2", "heads", "k")
    projection = block.attn.c_attn.weight.T[D_MODEL : 2 * D_MODEL]
    assert close(units.weights[LAYER], centred(projection * block.ln_1.weight))
    assert close(units.biases[LAYER], block.attn.c_attn.bias[D_MODEL : 2 * D_MODEL])


def test_projection_interleaved_by_head():
    block, units = found("gpt_neox", "heads", "q")
    projection = block.attention.query_key_value.weight.view(2, 3, 8, D_MODEL)[:, 0].flatten(0, 1)
    assert close(units.weights[LAYER], centred(projection * block.input_layernorm.weight))


def test_norms_of_queries():
    block, units = found("qwen3", "heads", "q")
    gain = block.self_attn.q_norm.weight.repeat(2)[:, None]
    assert close(units.weights[LAYER], gain * block.self_attn.q_proj.weight * block.input_layernorm.weight)
    _, units = found("gemma3", "heads", "q", gains=False)
    assert units.weights[LAYER].shape == (16, D_MODEL)
    block, units = found("olmo2", "heads", "q")
    gain = block.self_attn.q_norm.weight[:, None]
    assert close(units.weights[LAYER], gain * block.self_attn.q_proj.weight)


def test_strengths_are_norms_of_queries():
    block, units = found("gemma2", "heads", "q")
    vectors = torch.randn(5, D_MODEL, dtype=torch.float64)
    queries = block.self_attn.q_proj((1 + block.input_layernorm.weight) * vectors)
    assert close(units.strengths(LAYER, vectors), queries.view(5, 2, 8).norm(dim=2))


def test_gate_rows_and_plain_rows():
    block, units = found("gemma2", "neurons", normalised=False)
    assert close(units.weights[LAYER], block.mlp.gate_proj.weight * (1 + block.pre_feedforward_layernorm.weight))
    block, units = found("gpt2", "neurons")
    rows = centred(block.mlp.c_fc.weight.T * block.ln_2.weight)
    assert close(units.weights[LAYER], rows / rows.norm(dim=1, keepdim=True))
    _, plain = found("gpt2", "neurons", gains=False, normalised=False)
    assert close(plain.weights[LAYER], block.mlp.c_fc.weight.T)
    assert close(plain.biases[LAYER], block.mlp.c_fc.bias)


def test_what_neurons_write():
    block, writes = found("gpt2", "neuron_writes")
    assert close(list(writes)[LAYER], block.mlp.c_proj.weight)
    block, writes = found("gemma2", "neuron_writes")
    expected = block.mlp.down_proj.weight.T * (1 + block.post_feedforward_layernorm.weight)
    assert close(list(writes)[LAYER], expected)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gpt_neox"])
def test_projections_of_other_kinds_are_asked(family, monkeypatch):
    _, rows = found(family, "neurons")
    _, writes = found(family, "neuron_writes")
    writes = list(writes)
    monkeypatch.setattr(_readers, "_matrix", lambda module: None)
    _, asked = found(family, "neurons")
    assert close(asked.weights[LAYER], rows.weights[LAYER])
    assert close(asked.biases[LAYER], rows.biases[LAYER])
    _, made = found(family, "neuron_writes")
    assert close(list(made)[LAYER], writes[LAYER])


def test_unembedding():
    model = make_model("gpt2", torch.float64)
    weight = _readers.unembedding(model, HostModel.of(model))
    expected = centred(model.lm_head.weight * model.transformer.ln_f.weight)
    assert close(weight, expected - expected.mean(0))


def test_nothing_stays_in_the_model():
    model = make_model("qwen3")
    host = HostModel.of(model)
    before = model.config._attn_implementation
    _readers.heads(model, host)
    list(_readers.neuron_writes(model, host))
    assert model.config._attn_implementation == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_who_sees_a_write_first():
    heads, neurons = _readers.Units("head", (), 1, ()), _readers.Units("neuron", (), 1, ())
    after_mlp, after_attention = Site("model", "mlp_out", 2), Site("model", "attn_out", 2)
    assert (heads.first_after(after_mlp, False), neurons.first_after(after_mlp, False)) == (3, 3)
    assert (heads.first_after(after_attention, False), neurons.first_after(after_attention, False)) == (3, 2)
    assert neurons.first_after(after_attention, True) == 3


def test_own_writes_are_a_plt_of_the_model():
    clt = weights.own_writes(nnsight_model("gpt2"))
    model = make_model("gpt2")
    assert clt.group_sizes == (64,) * 3
    assert torch.allclose(clt.W_dec[LAYER], model.transformer.h[LAYER].mlp.c_proj.weight, atol=1e-6)
    assert torch.allclose(clt.W_enc[LAYER], model.transformer.h[LAYER].mlp.c_fc.weight, atol=1e-6)


def test_other_parts_are_refused():
    with pytest.raises(ValueError, match="one of q, k, v, not 'o'"):
        found("llama", "heads", "o")
