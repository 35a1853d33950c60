"""The table of sites: against a hand-written one, against what blocks compute, and with a row added."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close

from clt_plugin.adapters.huggingface import HostModel
from clt_plugin.adapters.sites import ARCHITECTURES, Architecture, Place, normalise
from clt_plugin.core.wiring import SITE_NAMES
from support import reference
from support.crosscoders import make_clt
from support.models import D_MODEL, FAMILIES, N_LAYERS, VOCABULARY, bridge_model, make_model, nnsight_model

IDS = torch.tensor([[0, 5, 17, 33, 60, 2, 41], [0, 9, 9, 58, 3, 30, 12]])
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

# Where a forward pass keeps each site: attn_out, resid_mid, mlp_in_before_gain, mlp_out.
INPUT, POST = "input_layernorm", "post_attention_layernorm"
LLAMA = ("self_attn.output", f"{POST}.input", f"{POST}.input, normalised", "mlp.output")
FEED = "pre_feedforward_layernorm"
GEMMA = (f"{POST}.output", f"{FEED}.input", f"{FEED}.input, normalised", "post_feedforward_layernorm.output")
NEOX = ("attention.output", f"{POST}.input", f"{POST}.input, normalised", "mlp.output")
EXPECTED = {
    "gpt2": ("attn.output", "ln_2.input", "ln_2.input, normalised", "mlp.output"),
    "llama": LLAMA,
    "qwen3": LLAMA,
    "mistral": LLAMA,
    "olmo": LLAMA,
    "olmo2": (f"{POST}.output", "mlp.input", None, "post_feedforward_layernorm.output"),
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "gemma3_multimodal": GEMMA,
    "gpt_neox": (NEOX[0], None, *NEOX[2:]),
    "gpt_neox_sequential": NEOX,
}
BLOCKS = {
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "gpt_neox_sequential": "gpt_neox.layers",
    "gemma3_multimodal": "model.language_model.layers",
}

# The norms in a block, and the final one.
NORMS = {
    "gpt2": (("ln_1", "ln_2"), "transformer.ln_f"),
    "olmo2": ((POST, "post_feedforward_layernorm"), "model.norm"),
    "gemma2": ((INPUT, POST, FEED, "post_feedforward_layernorm"), "model.norm"),
    "gemma3": ((INPUT, POST, FEED, "post_feedforward_layernorm"), "model.norm"),
    "gemma3_multimodal": ((INPUT, POST, FEED, "post_feedforward_layernorm"), "model.language_model.norm"),
    "gpt_neox": ((INPUT, POST), "gpt_neox.final_layer_norm"),
    "gpt_neox_sequential": ((INPUT, POST), "gpt_neox.final_layer_norm"),
}


def written(place: Place) -> str:
    return f"{place.module}.{place.side}{', normalised' if place.before_gain else ''}"


@pytest.mark.parametrize("family", FAMILIES)
def test_places(family):
    host = HostModel.of(make_model(family))
    attn_out, resid_mid, before_gain, mlp_out = EXPECTED[family]
    expected = {
        "resid_pre": ".input",
        "attn_out": attn_out,
        "resid_mid": resid_mid,
        "mlp_in_before_gain": before_gain,
        "mlp_in": "mlp.input",
        "mlp_out_before_norm": "mlp.output",
        "mlp_out": mlp_out,
        "resid_post": ".output",
    }
    assert tuple(expected) == SITE_NAMES
    places = host.architecture.places(host.parallel)
    assert {name: written(place) for name, place in places.items()} == {k: v for k, v in expected.items() if v}
    assert list(places) == [name for name in SITE_NAMES if name in places]
    assert host.parallel == (family == "gpt_neox")
    assert host.blocks == BLOCKS.get(family, "model.layers")
    assert (host.n_layers, host.d_model, host.name) == (N_LAYERS, D_MODEL, f"tiny/{family}")


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_are_all_the_norms_there_are(family):
    hf = make_model(family)
    host = HostModel.of(hf)
    norms, final = NORMS.get(family, ((INPUT, POST), "model.norm"))
    assert (host.architecture.norms, host.final_norm) == (norms, final)
    for block in hf.get_submodule(host.blocks):
        assert {name for name, m in block.named_children() if "Norm" in type(m).__name__} == set(norms)
    assert "Norm" in type(hf.get_submodule(final)).__name__
    # A model without a head keeps it beside its blocks too.
    assert hf.base_model.get_submodule(HostModel.of(hf.base_model).final_norm) is hf.get_submodule(final)


def record(hf: nn.Module, layer: int) -> dict[str, Tensor]:
    """What a block's sites hold in a forward pass, where the table says that they are."""
    host = HostModel.of(hf)
    block, seen = hf.get_submodule(host.blocks)[layer], {}

    def note(name, value):
        seen[name] = value[0] if isinstance(value, tuple) else value

    for name, place in host.architecture.places(host.parallel).items():
        module = block.get_submodule(place.module)
        if place.side == "input":
            module.register_forward_pre_hook(
                lambda m, args, kwargs, name=name: note(name, args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            )
        else:
            module.register_forward_hook(lambda m, args, output, name=name: note(name, output))
        if place.before_gain:
            norm = module
    hf(IDS)
    if "mlp_in_before_gain" in seen:
        seen["mlp_in_before_gain"] = normalise(norm, host.architecture.centred, seen["mlp_in_before_gain"])
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_hold_what_their_names_say(family):
    """The residual stream is the sum of what attention and MLP add to it; the MLP reads what its norm returns."""
    hf = make_model(family)
    host, seen = HostModel.of(hf), record(hf, 1)
    block, row = hf.get_submodule(host.blocks)[1], host.architecture
    before_mlp = seen["resid_pre"] + seen["attn_out"]
    if host.parallel:
        assert "resid_mid" not in seen
    else:
        assert_close(seen["resid_mid"], before_mlp, **CLOSE)
    assert_close(seen["resid_post"], before_mlp + seen["mlp_out"], **CLOSE)
    assert_close(getattr(block, row.mlp)(seen["mlp_in"]), seen["mlp_out_before_norm"], **CLOSE)
    if row.post_mlp_norm:
        assert_close(getattr(block, row.post_mlp_norm)(seen["mlp_out_before_norm"]), seen["mlp_out"], **CLOSE)
    else:
        assert torch.equal(seen["mlp_out_before_norm"], seen["mlp_out"])
    if row.pre_mlp_norm:
        norm = getattr(block, row.pre_mlp_norm)
        gain = gain_of(norm, norm.weight) if hasattr(norm, "weight") else 1.0
        affine = seen["mlp_in_before_gain"] * gain + getattr(norm, "bias", 0.0)
        assert_close(affine, seen["mlp_in"], **CLOSE)
    assert_close(record(hf, 2)["resid_pre"], seen["resid_post"])


# ---------------------------------------------------------------- normalise


def gain_of(norm: nn.Module, weight: Tensor) -> Tensor:
    """Gemma stores its gain as what is added to 1."""
    return 1 + weight if "Gemma" in type(norm).__name__ else weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "olmo2"])
def test_normalise_is_the_norm_without_gain_and_bias(family, dtype):
    hf = make_model(family)
    host = HostModel.of(hf)
    norm = getattr(hf.get_submodule(host.blocks)[1], host.architecture.pre_mlp_norm)
    # Small, so that epsilon counts, and off centre, so that it shows whether the mean is subtracted.
    x = (0.01 * torch.randn(3, 5, D_MODEL) + 0.005).to(dtype)
    plain = {}
    for name, parameter in norm.named_parameters():
        gain_is_1 = name == "weight" and "Gemma" not in type(norm).__name__
        plain[name] = torch.full_like(parameter, float(gain_is_1)).to(dtype)
    value = normalise(norm, host.architecture.centred, x)
    assert value.dtype == dtype
    expected = functional_call(norm, plain, (x,))
    # Norms of transformers' own compute in float32 whatever they are given.
    narrow = dtype == torch.float64 and not isinstance(norm, nn.LayerNorm)
    assert_close(value, expected, **({"rtol": 1e-5, "atol": 1e-6} if narrow else {}), check_dtype=False)
    assert not torch.allclose(norm(x.float()).to(dtype), value) or family == "olmo"
    if dtype == torch.float64:
        wide = x - x.mean(-1, keepdim=True) if host.architecture.centred else x
        assert_close(
            value / value.norm(dim=-1, keepdim=True), wide / wide.norm(dim=-1, keepdim=True), rtol=1e-12, atol=0
        )


# ---------------------------------------------------------------- another row

_SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": D_MODEL, "intermediate_size": 24, "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
_LAYERS = ("model.layers",)

# A family that the table lacks: its config, its class, and the row that somebody would add for it.
NEW = {
    "gemma": (
        lambda: transformers.GemmaConfig(**_SMALL, head_dim=8),
        "GemmaForCausalLM",
        Architecture("Gemma", ("gemma",), _LAYERS, "self_attn", "mlp", INPUT, POST, "norm"),
    ),
    "olmo3": (
        lambda: transformers.Olmo3Config(**_SMALL, sliding_window=4),
        "Olmo3ForCausalLM",
        Architecture(
            "OLMo 3", ("olmo3",), _LAYERS, "self_attn", "mlp", None, None, "norm", POST, "post_feedforward_layernorm"
        ),
    ),
    # One norm for both, before attention and MLP side by side.
    "phi": (
        lambda: transformers.PhiConfig(**_SMALL),
        "PhiForCausalLM",
        Architecture(
            "Phi", ("phi",), _LAYERS, "self_attn", "mlp", INPUT, INPUT, "final_layernorm", centred=True, parallel=True
        ),
    ),
}


def new_model(family: str) -> nn.Module:
    make, cls, _ = NEW[family]
    config = make()
    config.architectures, config.name_or_path = [cls], f"tiny/{family}"
    torch.manual_seed(0)
    model = getattr(transformers, cls)(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture
def row(request):
    """The row of a new family in the table, as long as the test runs."""
    row = NEW[request.param][2]
    ARCHITECTURES.append(row)
    yield row
    ARCHITECTURES.remove(row)


@pytest.mark.parametrize("row", NEW, indirect=True)
def test_a_row_makes_a_family(row, request, monkeypatch):
    family = request.node.callspec.params["row"]
    plain = (row.pre_mlp_norm, "mlp", row.post_mlp_norm, row.post_attention_norm or row.attention, row.centred)
    monkeypatch.setitem(reference._BLOCKS, family, plain)
    hf, model, bridge = new_model(family), nnsight_model(new_model(family)), bridge_model(new_model(family))
    alone = hf(IDS).logits
    for read in ("mlp_in", "mlp_in_before_gain" if row.pre_mlp_norm else "resid_mid"):
        clt = make_clt(read=read)
        for mode in ("replace", "replace_with_error"):
            expected = reference.reference_run(hf, IDS, clt, mode)
            with bridge.add_clt(clt, mode=mode):
                logits, seen = bridge.run_with_cache(IDS, names_filter="blocks.1.clt.hook_features")
            assert_close(logits, expected["logits"], **CLOSE)
            assert_close(seen["blocks.1.clt.hook_features"], expected["features"][1], **CLOSE)
            with model.add_clt(clt, mode=mode), model.trace(IDS):
                features = model.clt.layers[1].features.output.save()
                logits = model.output.logits.save()
            assert_close(logits, expected["logits"], **CLOSE)
            assert_close(features, expected["features"][1], **CLOSE)
            changed = (expected["logits"] - alone).abs().max()
            assert changed > 0.05 if mode == "replace" else changed < 1e-4


def test_rows_are_for_different_models():
    kinds = [kind for row in ARCHITECTURES for kind in row.model_types]
    assert len(kinds) == len(set(kinds))
    assert not {"gemma", "olmo3", "phi"} & set(kinds)
