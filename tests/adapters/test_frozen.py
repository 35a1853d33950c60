"""Recording a run and freezing parts of it later: against the model's own eager run, formulas and identities."""

from __future__ import annotations

import copy
import types
from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.testing import assert_close

from clt_plugin.adapters import _attention
from clt_plugin.adapters._frozen import frozen, record
from clt_plugin.adapters._norms import FreezeError, FrozenNorm
from clt_plugin.adapters.huggingface import HostModel, plain_model
from clt_plugin.core.errors import AttachError
from clt_plugin.core.wiring import MODEL, Site
from support.crosscoders import make_clt
from support.models import CONFIGS, D_MODEL, FAMILIES, N_LAYERS, bridge_model, make_model, nnsight_model

# Longer than the sliding windows of 4, the second row padded.
IDS = torch.tensor([[0, 5, 17, 33, 60, 2, 41, 8, 22], [1, 1, 0, 9, 9, 58, 3, 30, 12]])
MASK = (torch.arange(9) >= torch.tensor([[0], [2]])).long()
INPUTS = {"input_ids": IDS}
PADDED = {"input_ids": IDS, "attention_mask": MASK}
EXACT = {"rtol": 0, "atol": 1e-12}


@pytest.fixture(params=FAMILIES)
def hf(request):
    return make_model(request.param, torch.float64)


def eager(hf: nn.Module) -> nn.Module:
    """A copy of a model that runs eagerly by its own means."""
    hf = copy.deepcopy(hf)
    hf.set_attn_implementation("eager")
    return hf


def parts(hf: nn.Module) -> tuple[nn.Module, HostModel]:
    return hf, HostModel.of(hf)


def blocks(hf: nn.Module) -> nn.ModuleList:
    return hf.get_submodule(HostModel.of(hf).blocks)


def attention(hf: nn.Module, layer: int) -> nn.Module:
    return blocks(hf)[layer].get_submodule(HostModel.of(hf).architecture.attention)


def configs(hf: nn.Module) -> dict[int, str]:
    return {id(m.config): m.config._attn_implementation for m in hf.modules() if hasattr(m, "config")}


def hooks(hf: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in hf.modules())


def centred(hf: nn.Module) -> bool:
    return hf.config.model_type in ("gpt2", "gpt_neox", "olmo")


def epsilon(hf: nn.Module) -> float:
    names = ("layer_norm_epsilon", "layer_norm_eps", "rms_norm_eps")
    config = hf.config.get_text_config()
    # OLMo's has no setting.
    return next((getattr(config, name) for name in names if hasattr(config, name)), 1e-5)


def logits_of(hf: nn.Module, inputs=INPUTS) -> Tensor:
    """What the unembedding returns, before a final softcap."""
    seen = []
    hook = hf.get_output_embeddings().register_forward_hook(lambda m, args, output: seen.append(output))
    hf(**inputs, use_cache=False)
    hook.remove()
    return seen[0]


def test_a_recording_is_the_eager_run(hf):
    hf, host = parts(hf)
    places = host.architecture.places(host.parallel)
    sites = [Site(MODEL, name, layer) for layer in range(N_LAYERS) for name in places]
    run = record(hf, host, INPUTS, sites)
    expected = eager(hf)(**INPUTS, use_cache=False, output_attentions=True, output_hidden_states=True)
    assert torch.equal(run.logits, expected.logits)
    assert torch.equal(run.unembedded, logits_of(eager(hf)))
    assert torch.equal(run.embeddings, hf.get_input_embeddings()(IDS))
    assert not run.logits.requires_grad
    assert list(run.patterns) == list(range(N_LAYERS))
    assert set(run.sites) == set(sites)
    for layer in range(N_LAYERS):
        assert torch.equal(run.patterns[layer], expected.attentions[layer])
        assert run.patterns[layer].shape == (2, 2, 9, 9)
        at = {name: run.sites[Site(MODEL, name, layer)] for name in places}
        assert torch.equal(at["resid_pre"], expected.hidden_states[layer])
        assert_close(at["resid_post"], at["resid_pre"] + at["attn_out"] + at["mlp_out"], **EXACT)
        assert torch.equal(at["mlp_out"], run.mlp_out[layer])
        block = blocks(hf)[layer]
        assert_close(block.mlp(at["mlp_in"]), at["mlp_out_before_norm"], **EXACT)
        if "mlp_in_before_gain" in at:
            x = at["resid_pre"] if host.parallel else at["resid_mid"]
            function = F.layer_norm if centred(hf) else F.rms_norm
            assert_close(at["mlp_in_before_gain"], function(x, (D_MODEL,), eps=epsilon(hf)), rtol=1e-6, atol=1e-6)


def test_norms_are_their_formula(hf):
    hf, host = parts(hf)
    run = record(hf, host, INPUTS)
    assert set(run.norms) == {(layer, name) for layer in range(N_LAYERS) for name in host.architecture.norms}
    modules = {key: blocks(hf)[key[0]].get_submodule(key[1]) for key in run.norms}
    # RMSNorms of transformers compute in float32, whatever they are given.
    close = EXACT if hf.config.model_type in ("gpt2", "gpt_neox") else {"rtol": 1e-6, "atol": 1e-6}
    final = hf.get_submodule(host.final_norm)
    for norm, module in [*((run.norms[key], modules[key]) for key in modules), (run.final_norm, final)]:
        x = norm.x - norm.x.mean(-1, keepdim=True) if centred(hf) else norm.x
        weight = getattr(module, "weight", None)
        gain = torch.ones(D_MODEL).double() if weight is None else weight + ("Gemma" in type(module).__name__)
        bias = getattr(module, "bias", None)
        assert norm.centred == centred(hf)
        assert_close(norm.scale, torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon(hf)), **close)
        assert_close(norm.gain, gain, **close)
        assert_close(norm.bias, torch.zeros_like(gain) if bias is None else bias, **close)
        assert_close(norm.linear(norm.x) + norm.bias, norm.y, **close)
        assert torch.equal(norm.y, module(norm.x))
        assert torch.equal(norm(norm.x), norm.y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_and_unchanged_is_the_plain_run(family, dtype):
    hf, host = parts(make_model(family, dtype))
    # In float64, transformers' own masks make padding NaN.
    inputs = INPUTS if dtype == torch.float64 else PADDED
    plain = eager(hf)(**inputs, use_cache=False).logits
    run = record(hf, host, inputs)
    for patterns, norms in [(True, True), ([1], False), (False, [0, 2]), (False, False)]:
        with frozen(hf, host, run, patterns, norms):
            assert torch.equal(hf(**inputs, use_cache=False).logits, plain)
            # The prompt's pass of a generation has a cache, which changes nothing.
            assert torch.equal(hf(**inputs, use_cache=True).logits, plain)
    assert torch.equal(eager(hf)(**inputs).logits, plain)


def disturb_queries_and_keys(module: nn.Module) -> None:
    """Change all that goes into an attention's patterns and nothing that goes into its values."""
    heads = 2
    with torch.no_grad():
        if hasattr(module, "c_attn"):
            for tensor in (module.c_attn.weight, module.c_attn.bias):
                tensor[..., : 2 * D_MODEL] += torch.randn_like(tensor[..., : 2 * D_MODEL])
        elif hasattr(module, "query_key_value"):
            for tensor in (module.query_key_value.weight, module.query_key_value.bias):
                by_head = tensor.view(heads, 3, D_MODEL // heads, *tensor.shape[1:])
                by_head[:, :2] += torch.randn_like(by_head[:, :2])
        else:
            for name in ("q_proj", "k_proj", "q_norm", "k_norm"):
                if hasattr(module, name):
                    weight = getattr(module, name).weight
                    weight += torch.randn_like(weight)


def test_with_patterns_frozen_queries_and_keys_do_not_matter(hf):
    hf, host = parts(hf)
    run = record(hf, host, INPUTS)
    for layer in range(N_LAYERS):
        disturb_queries_and_keys(attention(hf, layer))
    with frozen(hf, host, run, norms=False):
        assert_close(hf(**INPUTS).logits, run.logits, **EXACT)
    with frozen(hf, host, run, patterns=[0, 2], norms=False):
        assert not torch.allclose(hf(**INPUTS).logits, run.logits, atol=1e-3)
    assert not torch.allclose(hf(**INPUTS).logits, run.logits, atol=1e-3)


def perturbed(hf: nn.Module, run, v: Tensor, mlps: bool = True) -> Tensor:
    """The unembedding's output with v added to what the first block reads, and MLPs' outputs put back by hand."""
    host = HostModel.of(hf)
    place = host.architecture.places(host.parallel)["mlp_out"]
    with ExitStack() as stack:
        first = blocks(hf)[0].register_forward_pre_hook(lambda m, args: (args[0] + v, *args[1:]))
        stack.callback(first.remove)
        for layer, block in enumerate(blocks(hf) if mlps else ()):
            hook = block.get_submodule(place.module).register_forward_hook(lambda *_, layer=layer: run.mlp_out[layer])
            stack.callback(hook.remove)
        return logits_of(hf)


def curvature(f, v: Tensor) -> float:
    """How far a function is from affine along v, beside how much it changes."""
    zero, one, two = f(torch.zeros_like(v)), f(v), f(2 * v)
    assert (one - zero).abs().max() > 1e-2
    return float((two - zero - 2 * (one - zero)).abs().max() / (one - zero).abs().max())


def test_what_is_left_is_affine(hf):
    hf, host = parts(hf)
    run = record(hf, host, INPUTS)
    v = torch.randn(2, 9, D_MODEL).double()
    with frozen(hf, host, run):
        assert curvature(lambda v: perturbed(hf, run, v), v) < 1e-10
        assert_close(perturbed(hf, run, 0 * v), run.unembedded, **EXACT)
        assert curvature(lambda v: perturbed(hf, run, v, mlps=False), v) > 1e-3
        # Gradients are of this map.
        v.requires_grad_()
        changed, weight = perturbed(hf, run, v), torch.randn(1, 9, 61).double()
        (grad,) = torch.autograd.grad((changed * weight).sum(), v)
        assert_close((grad * v).sum(), ((changed - run.unembedded) * weight).sum())
        v.requires_grad_(False)
    # Each freeze is needed.
    for patterns, norms, final in [([0, 1], True, True), (True, [1, 2], True), (True, True, False)]:
        with frozen(hf, host, run, patterns, norms, final):
            assert curvature(lambda v: perturbed(hf, run, v), v) > 1e-4


def test_one_recorded_row_serves_many(hf):
    """As many perturbations at once as fit, each as by itself."""
    hf, host = parts(hf)
    one = {"input_ids": IDS[:1]}
    run = record(hf, host, one)
    v = torch.randn(3, 9, D_MODEL).double()

    def f(v: Tensor) -> Tensor:
        hook = blocks(hf)[1].register_forward_pre_hook(lambda m, args: (args[0] + v, *args[1:]))
        logits = logits_of(hf, {"input_ids": IDS[:1].expand(len(v), -1)})
        hook.remove()
        return logits

    with frozen(hf, host, run):
        together = f(v)
        for row in range(3):
            assert_close(together[row : row + 1], f(v[row : row + 1]), **EXACT)


@pytest.mark.parametrize("early", [True, False])
def test_edits_of_a_norms_output_stay(early):
    """A hook on a norm sees and edits what the frozen norm returns, whenever it was added."""
    hf, host = parts(make_model("gemma2", torch.float64))
    run, block, seen = record(hf, host, INPUTS), blocks(hf)[1], {}
    block.register_forward_pre_hook(lambda m, args: seen.update(before=args[0]))
    block.pre_feedforward_layernorm.register_forward_pre_hook(lambda m, args: seen.update(after=args[0]))

    def edit(module, args, output):
        seen.update(x=args[0])
        return output + 1

    context = frozen(hf, host, run)
    with ExitStack() as stack:
        if not early:
            stack.enter_context(context)
        block.post_attention_layernorm.register_forward_hook(edit)
        if early:
            stack.enter_context(context)
        perturbed(hf, run, torch.randn(2, 9, D_MODEL).double())
    expected = run.norms[1, "post_attention_layernorm"](seen["x"])
    assert not torch.allclose(expected, block.post_attention_layernorm.forward(seen["x"]), atol=1e-3)
    assert_close(seen["after"], seen["before"] + expected + 1, **EXACT)


def test_grouped_queries():
    """A frozen layer's output, written out: each head of values serves two of queries."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, attention_bias=True,
    )  # fmt: skip
    hf = transformers.LlamaForCausalLM(config).eval().double().requires_grad_(False)
    for p in hf.parameters():
        p += 0.3 * torch.randn_like(p)
    host = HostModel.of(hf)
    run = record(hf, host, INPUTS)
    module, seen = hf.model.layers[1].self_attn, {}
    module.register_forward_hook(
        lambda m, args, kwargs, output: seen.update(x=kwargs["hidden_states"], y=output[0]), with_kwargs=True
    )
    with frozen(hf, host, run):
        perturbed(hf, run, torch.randn(2, 9, 16).double())
    v = module.v_proj(seen["x"]).view(2, 9, 2, 4)
    heads = [torch.einsum("bqk,bkd->bqd", run.patterns[1][:, h], v[:, :, h // 2]) for h in range(4)]
    assert_close(seen["y"], module.o_proj(torch.cat(heads, -1)), **EXACT)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "mistral", "llama"])
def test_windows(family):
    """Recorded patterns keep to each layer's window, or reach the beginning."""
    config = CONFIGS[family]()
    if family.startswith("gemma"):
        config.layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    local = {"gemma2": {0, 2}, "gemma3": {0, 2}, "mistral": {0, 1, 2}, "llama": set()}[family]
    config.architectures, config.name_or_path = [type(make_model(family)).__name__], "tiny/windows"
    hf = getattr(transformers, config.architectures[0])(config).eval().double().requires_grad_(False)
    host = HostModel.of(hf)
    run = record(hf, host, IDS[:1])
    for layer in range(N_LAYERS):
        reach = 4 if layer in local else 9
        expected = torch.ones(9, 9).tril().triu(1 - reach).bool().expand(1, 2, -1, -1)
        assert torch.equal(run.patterns[layer] > 0, expected)
    with frozen(hf, host, run):
        assert torch.equal(hf(IDS[:1], use_cache=False).logits, run.logits)


def test_left_padding(hf):
    """Padding is not looked at, and a padded row is what it is alone."""
    hf, host = parts(hf)
    positions = (MASK.cumsum(-1) - 1).clamp(min=0)
    padded = {**PADDED, "position_ids": positions}
    run = record(hf, host, padded)
    with frozen(hf, host, run):
        assert torch.equal(hf(**padded, use_cache=False).logits, run.logits)
    alone = record(hf, host, {"input_ids": IDS[1:, 2:], "attention_mask": MASK[1:, 2:]})
    assert_close(run.logits[1:, 2:], alone.logits, rtol=0, atol=1e-6)
    for layer in range(N_LAYERS):
        assert not run.patterns[layer][1, :, 2:, :2].any()
        assert_close(run.patterns[layer][1:, :, 2:, 2:], alone.patterns[layer], rtol=0, atol=1e-6)
        assert_close(run.mlp_out[layer][1:, 2:], alone.mlp_out[layer], rtol=0, atol=1e-6)


def test_differentiable_recordings():
    hf, host = parts(make_model("gemma2"))
    hf.get_input_embeddings().requires_grad_(True)
    assert not record(hf, host, IDS).patterns[1].requires_grad
    run = record(hf, host, IDS, grad=True)
    for tensor in (run.patterns[1], run.norms[1, "input_layernorm"].scale, run.mlp_out[1], run.logits):
        assert tensor.requires_grad
    assert torch.is_grad_enabled()


def test_output_attentions():
    """They are what is used: recorded patterns in a frozen run."""
    hf, host = parts(make_model("llama"))
    run = record(hf, host, {**INPUTS, "output_attentions": True})
    disturb_queries_and_keys(attention(hf, 1))
    with frozen(hf, host, run, patterns=[1], norms=False):
        seen = hf(**INPUTS, output_attentions=True).attentions
    assert all(torch.equal(seen[layer], run.patterns[layer]) for layer in range(N_LAYERS))


# ---------------------------------------------------------------- norms alone


def norm_of(norm: nn.Module, d: int = 6, dtype: torch.dtype = torch.float64) -> tuple[FrozenNorm, Tensor]:
    for parameter in norm.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    norm.requires_grad_(False).to(dtype)
    x = (torch.randn(2, 4, d) + 0.5).to(dtype)
    return FrozenNorm.of(norm, x, norm(x)), x


@pytest.mark.parametrize(
    "make",
    [
        lambda d: nn.LayerNorm(d),
        lambda d: nn.LayerNorm(d, bias=False),
        lambda d: nn.LayerNorm(d, elementwise_affine=False),
        lambda d: nn.RMSNorm(d),
        lambda d: nn.Identity(),
    ],
    ids=["layer", "layer without bias", "layer without parameters", "rms", "identity"],
)
@pytest.mark.parametrize("d", [6, 7])
def test_kinds_of_norm(make, d):
    module = make(d)
    norm, x = norm_of(module, d)
    assert_close(norm.linear(x) + norm.bias, module(x), rtol=0, atol=1e-9)
    v = torch.randn_like(x)
    # Along the recorded scale, a change of input counts in proportion.
    assert_close(norm(x + 2 * v) - norm(x), 2 * (norm(x + v) - norm(x)), **EXACT)
    if isinstance(module, nn.Identity):
        assert_close(norm(x + v), x + v, rtol=0, atol=1e-9)


def test_hooks_on_a_norm_are_not_asked():
    module = nn.LayerNorm(6).double()
    module.register_forward_hook(lambda m, args, output: output[:, 3] * 0 + 7)
    x = torch.randn(1, 4, 6).double()
    assert_close(FrozenNorm.of(module, x, x).bias, torch.zeros(6).double(), **EXACT)


def test_half_precision_norms_are_asked_in_float32():
    wide = nn.LayerNorm(6)
    for parameter in wide.parameters():
        parameter.data = (parameter.data + torch.randn(6)).bfloat16().float()
    half = copy.deepcopy(wide).bfloat16().requires_grad_(False)
    x = torch.randn(2, 4, 6).bfloat16()
    norm = FrozenNorm.of(half, x, half(x))
    assert norm.gain.dtype == norm.scale.dtype == torch.float32
    assert_close(norm.gain, wide.weight.data, rtol=1e-5, atol=1e-5)
    assert_close(norm.linear(x.float()) + norm.bias, wide(x.float()).detach(), rtol=1e-5, atol=1e-5)
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), half(x))
    far = 100 * torch.randn(2, 4, 6).bfloat16()
    expected = norm.y.float() + norm.linear(far.float() - x.float())
    assert torch.equal(norm(far), expected.bfloat16())


@pytest.mark.parametrize("make", [lambda: nn.LayerNorm(6, eps=1e-5), lambda: nn.RMSNorm(6, eps=1e-5)])
def test_silence_has_epsilons_scale(make):
    module = make().double()
    x = torch.randn(1, 3, 6).double()
    x[0, 1] = 0
    norm = FrozenNorm.of(module, x, module(x).detach())
    assert_close(norm.scale[0, 1], torch.tensor([1e-5**-0.5]).double(), rtol=1e-6, atol=0)


def test_a_gain_of_zero():
    module = nn.LayerNorm(6).requires_grad_(False)
    module.weight.zero_()
    norm = FrozenNorm.of(module, torch.randn(1, 3, 6), module.bias.expand(1, 3, 6))
    assert torch.equal(norm(torch.randn(1, 3, 6)), module.bias.expand(1, 3, 6))


def test_what_is_no_norm():
    with pytest.raises(FreezeError, match="layer 3's norm f, a Tanh, is not gain"):
        FrozenNorm.of(nn.Tanh(), torch.randn(1, 3, 6), torch.randn(1, 3, 6), "layer 3's norm f")
    with pytest.raises(FreezeError, match="not finite"):
        FrozenNorm.of(nn.LayerNorm(6), torch.full((1, 3, 6), torch.nan), torch.randn(1, 3, 6))


# ---------------------------------------------------------------- freezes that do not act


def test_a_pattern_that_is_not_used_is_an_error():
    hf, host = parts(make_model("llama"))
    run = record(hf, host, IDS)
    module = attention(hf, 1)
    module.forward = lambda hidden_states, **kwargs: (0 * hidden_states, None)
    with frozen(hf, host, run), pytest.raises(FreezeError, match="layer 1's attention pattern was not used: the pass"):
        hf(IDS)
    # Nothing was promised of that layer.
    with frozen(hf, host, run, patterns=[0, 2]):
        hf(IDS)
    with pytest.raises(FreezeError, match="layer 1's attention pattern was not seen"):
        record(hf, host, IDS)


def test_a_norm_that_is_not_used_is_an_error():
    hf, host = parts(make_model("gemma2"))
    run = record(hf, host, IDS)
    block = blocks(hf)[2]
    original = block.post_attention_layernorm
    block.forward = types.MethodType(_without_post_attention_norm, block)
    with frozen(hf, host, run), pytest.raises(FreezeError, match="layer 2's norm post_attention_layernorm was not use"):
        hf(IDS)
    with frozen(hf, host, run, norms=[0, 1]):
        hf(IDS)
    with pytest.raises(FreezeError, match="layer 2's norm post_attention_layernorm was not seen"):
        record(hf, host, IDS)
    assert block.post_attention_layernorm is original


def _without_post_attention_norm(self, hidden_states, **kwargs):
    x = hidden_states + self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
    return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


def test_another_implementation_set_meanwhile_is_an_error():
    hf, host = parts(make_model("qwen3"))
    run = record(hf, host, IDS)
    with frozen(hf, host, run):
        hf(IDS)
        # What one run has used counts for that run.
        hf.config._attn_implementation = "sdpa"
        with pytest.raises(FreezeError, match="layer 0's attention pattern was not used"):
            hf(IDS)
    # An error of the pass itself is not covered up.
    with frozen(hf, host, run), pytest.raises(IndexError):
        hf(IDS + 1000)


def test_other_shapes_are_errors():
    hf, host = parts(make_model("gpt2"))
    run = record(hf, host, IDS)
    with frozen(hf, host, run):
        with pytest.raises(FreezeError, match=r"ln_1 was recorded with shape \(2, 9, 16\), but this run has \(2, 8, 1"):
            hf(IDS[:, 1:])
        with pytest.raises(FreezeError, match="with as many rows"):
            hf(IDS[:1])
    with frozen(hf, host, run, norms=False):
        with pytest.raises(
            FreezeError, match=r"pattern was recorded with shape \(2, 2, 9, 9\), but this run has \(2, 2, "
        ):
            hf(IDS[:, 1:])
        past = hf(IDS, use_cache=True).past_key_values
        with pytest.raises(FreezeError, match=r"has \(2, 2, 1, 10\)"):
            hf(IDS[:, :1], past_key_values=past)


# ---------------------------------------------------------------- refusals


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_refusals():
    hf, host = parts(make_model("llama"))
    run = record(hf, host, IDS)
    with pytest.raises(FreezeError, match="layer 3 cannot be frozen: the model has layers 0-2"):
        frozen(hf, host, run, patterns=[3])
    with pytest.raises(FreezeError, match="layer -1"):
        frozen(hf, host, run, norms=[-1])
    with pytest.raises(FreezeError, match="whole texts"):
        record(hf, host, {"input_ids": IDS, "use_cache": True})
    with pytest.raises(FreezeError, match="the model has layers 0-2"):
        record(hf, host, IDS, [Site(MODEL, "mlp_in", 3)])
    with pytest.raises(AttachError, match="no site 'resid_mid'"):
        record(*parts(make_model("gpt_neox")), IDS, [Site(MODEL, "resid_mid", 0)])
    with frozen(hf, host, run), pytest.raises(FreezeError, match="already"):
        record(hf, host, IDS)
    with frozen(hf, host, run), pytest.raises(FreezeError, match="already"), frozen(hf, host, run):
        pass
    hf.train()
    with pytest.raises(FreezeError, match="call eval"):
        record(hf, host, IDS)
    with pytest.raises(FreezeError, match="call eval"), frozen(hf, host, run):
        pass
    hf.eval().gradient_checkpointing_enable()
    with pytest.raises(AttachError, match="checkpointing"):
        record(hf, host, IDS)
    with pytest.raises(AttachError, match="checkpointing"), frozen(hf, host, run):
        pass


def test_attention_that_cannot_be_exchanged(monkeypatch):
    """As of models that run with flash attention alone, and of a bridge's own components."""
    hf, host = parts(make_model("llama"))
    monkeypatch.delattr("transformers.models.llama.modeling_llama.eager_attention_forward")
    before = configs(hf), hooks(hf)
    with pytest.raises(FreezeError, match="LlamaAttention does not run through transformers' AttentionInterface"):
        record(hf, host, IDS)
    bridge = bridge_model("gpt2")
    with pytest.raises(FreezeError, match=r"plain_model\(model\) first"):
        record(bridge.original_model, HostModel.of(bridge.original_model), IDS)
    assert (configs(hf), hooks(hf)) == before
    assert not _attention._ACTING


# ---------------------------------------------------------------- no traces


class Stop(Exception):  # noqa: N818
    pass


def stop(*_: object) -> None:
    raise Stop


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gemma3_multimodal"])
def test_nothing_stays(family):
    hf, host = parts(make_model(family))
    if family == "gemma3_multimodal":
        hf.config._attn_implementation = "sdpa"
        hf.config.text_config._attn_implementation = "eager"
        hf.config.vision_config._attn_implementation = "sdpa"
        assert len(set(configs(hf).values())) == 2
    keys = list(hf.state_dict())
    before, alone = (configs(hf), hooks(hf)), hf(**PADDED).logits
    run = record(hf, host, PADDED)

    def as_it_was() -> bool:
        return (configs(hf), hooks(hf)) == before and not _attention._ACTING

    assert as_it_was()
    with frozen(hf, host, run):
        assert set(configs(hf).values()) == {"clt_plugin"}
        hf(**PADDED)
    assert as_it_was()
    with pytest.raises(Stop), frozen(hf, host, run):
        raise Stop
    assert as_it_was()
    hook = blocks(hf)[1].register_forward_hook(stop)
    with pytest.raises(Stop):
        record(hf, host, PADDED)
    with pytest.raises(Stop), frozen(hf, host, run):
        hf(**PADDED)
    hook.remove()
    assert as_it_was()
    assert torch.equal(hf(**PADDED).logits, alone)
    assert list(hf.state_dict()) == keys
    # Entering fails halfway.
    broken = frozen(hf, host, run)
    blocks(hf)[2].register_module(host.architecture.attention, nn.Linear(2, 2))
    with pytest.raises(FreezeError, match="Linear"), broken:
        pass
    assert as_it_was()


def test_two_models_at_once():
    """Even two that share a config: each its own recording, and one that is not frozen none."""
    one, host = parts(make_model("llama"))
    two, three = copy.deepcopy(one), copy.deepcopy(one)
    for module in (*two.modules(), *three.modules()):
        if hasattr(module, "config"):
            module.config = one.config
    first, second = record(one, host, IDS), record(two, host, IDS.flip(1))
    with frozen(one, host, first):
        with frozen(two, host, second):
            assert torch.equal(two(IDS.flip(1), use_cache=False).logits, second.logits)
            assert torch.equal(one(IDS, use_cache=False).logits, first.logits)
            assert torch.equal(three(IDS, use_cache=False).logits, first.logits)
        assert torch.equal(one(IDS, use_cache=False).logits, first.logits)


# ---------------------------------------------------------------- the plain model


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_model(family):
    """Inside a bridge and inside nnsight is the model that went in, to the last bit; both are as before afterwards."""
    expected = eager(make_model(family))(**PADDED, use_cache=False).logits
    hf = make_model(family)
    with plain_model(hf) as plain:
        assert plain is hf
    model = nnsight_model(hf)
    with plain_model(model) as plain:
        assert torch.equal(record(plain, HostModel.of(plain), PADDED).logits, expected)
    bridge = bridge_model(family)
    tree = dict(bridge.original_model.named_modules())
    logits = bridge(IDS)
    calls = []
    for block in bridge.blocks:
        block.hook_in.add_hook(lambda x, hook: calls.append(hook.name))
    with plain_model(bridge) as plain:
        assert not any("transformer_lens" in type(m).__module__ for m in plain.modules())
        run = record(plain, HostModel.of(plain), PADDED)
        assert torch.equal(run.logits, expected)
        with frozen(plain, HostModel.of(plain), run):
            assert torch.equal(plain(**PADDED, use_cache=False).logits, expected)
    assert not calls
    assert dict(bridge.original_model.named_modules()) == tree
    assert torch.equal(bridge(IDS), logits)
    assert len(calls) == N_LAYERS


def test_plain_model_after_an_exception():
    bridge = bridge_model("gemma2")
    tree, logits = dict(bridge.original_model.named_modules()), bridge(IDS)
    with pytest.raises(Stop), plain_model(bridge):
        raise Stop
    assert dict(bridge.original_model.named_modules()) == tree
    assert torch.equal(bridge(IDS), logits)


def test_plain_model_under_a_crosscoder():
    """What is attached to the library's object does not reach the plain model."""
    expected = eager(make_model("gemma2"))(IDS, use_cache=False).logits
    for model in (bridge_model("gemma2"), nnsight_model("gemma2")):
        handle = model.add_clt(make_clt(read="mlp_in"))
        with plain_model(model) as plain:
            assert torch.equal(record(plain, HostModel.of(plain), IDS).logits, expected)
        handle.remove()


def test_plain_model_refuses():
    bridge = bridge_model("gpt2")
    bridge.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(AttachError, match="processed"), plain_model(bridge):
        pass
    model = nnsight_model("gpt2")
    with pytest.raises(Exception, match="leave the trace"), model.trace(IDS):
        with plain_model(model):
            pass
