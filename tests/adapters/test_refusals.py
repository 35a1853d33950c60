"""What cannot be attached, in both libraries: an error that says why, and a model that is as it was."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from torch.testing import assert_close

import clt_plugin as cp
from clt_plugin import AttachError, Crosscoder, FormatError, Host, Wiring
from clt_plugin.adapters import huggingface
from clt_plugin.core.activations import TopK
from support.crosscoders import make_clt
from support.models import (
    D_MODEL,
    N_LAYERS,
    VOCABULARY,
    bridge_model,
    make_model,
    make_tokenizer,
    nnsight_model,
)

IDS = torch.tensor([[0, 5, 17, 33, 60, 2, 41], [0, 9, 9, 58, 3, 30, 12]])
LIBRARIES = {"nnsight": nnsight_model, "transformer_lens": bridge_model}
MODES = ("replace", "replace_with_error", "observe")


def is_bridge(model) -> bool:
    return type(model).__name__ == "TransformerBridge"


def torch_model(model) -> torch.nn.Module:
    return model.original_model if is_bridge(model) else model._module


def logits_of(model) -> torch.Tensor:
    if is_bridge(model):
        return model(IDS)
    with model.trace(IDS):
        logits = model.output.logits.save()
    return logits


def state_of(model) -> dict:
    """Everything that attaching could change, but for what a run computes."""
    hf = torch_model(model)
    modules = dict(hf.named_modules())
    state = {
        "modules": {name: id(module) for name, module in modules.items()},
        "state": list(hf.state_dict()),
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in modules.items()},
        "forwards": {name: id(m.__dict__["forward"]) for name, m in modules.items() if "forward" in m.__dict__},
        "attributes": sorted(model.__dict__),
    }
    if is_bridge(model):
        state |= {"points": list(model.hook_dict), "blocks": [sorted(block.__dict__) for block in model.blocks]}
        state |= {"bridge": {name: id(module) for name, module in model.named_modules()}}
    else:
        state |= {"children": [id(child) for child in model._children], "edits": list(model._edits)}
    return state


@cache
def shared(library: str, family: str):
    model = LIBRARIES[library](family)
    return model, logits_of(model), state_of(model)


@pytest.fixture(params=LIBRARIES)
def make(request):
    """Models in the library under test, made once, since a refusal changes nothing; nor does what a test removes."""
    used = {}
    yield lambda family: used.setdefault(family, shared(request.param, family))[0]
    for model, logits, state in used.values():
        assert state_of(model) == state
        assert torch.equal(logits_of(model), logits)


@pytest.fixture
def model(make):
    return make("gpt2")


def assert_refused(model, clt, message: str, error: type[Exception] = AttachError, **settings) -> None:
    """Attach, see the error, and see that nothing has changed."""
    before = state_of(model)
    with pytest.raises(error, match=message):
        model.add_clt(clt, **settings)
    assert state_of(model) == before


def crosscoder(wiring: Wiring, d_model: int = D_MODEL, activation: str = "relu", host: Host | None = None, **settings):
    return Crosscoder(wiring, d_model, 24, activation, host=host, **settings).eval().requires_grad_(False)


# ---------------------------------------------------------------- it is not what it should be


def test_what_is_no_crosscoder(model):
    for other, kind in [(42, "int"), (None, "NoneType"), (torch.nn.Linear(2, 2), "Linear")]:
        assert_refused(model, other, f"takes a Crosscoder, a folder or an hf:// reference, not {kind}")


def test_a_folder_that_does_not_exist(model, tmp_path):
    for folder in (tmp_path / "nowhere", str(tmp_path / "nowhere")):
        assert_refused(model, folder, "there is no folder .*nowhere", FormatError)


def test_a_model_of_no_library():
    with pytest.raises(AttachError, match="takes an nnsight model or a TransformerBridge, not GPT2LMHeadModel: wrap"):
        cp.add_clt(make_model("gpt2"), make_clt())


def test_an_unknown_mode(model):
    assert_refused(
        model, make_clt(), "mode must be one of replace, replace_with_error, observe, not 'swap'", mode="swap"
    )


# ---------------------------------------------------------------- it does not fit


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("clt", "message"),
    [
        (crosscoder(Wiring.clt(N_LAYERS), 8), "has width 8 at mlp_in.0, but the model's d_model is 16"),
        (crosscoder(Wiring.clt(2)), "for a model of 2 layers, but the model has 3"),
        (crosscoder(Wiring.plt(4)), "for a model of 4 layers, but the model has 3"),
        (crosscoder(Wiring.plt(3), host=Host(n_layers=12)), "for a model of 12 layers, but the model has 3"),
        (crosscoder(Wiring.sae(("resid_post", 1)), host=Host(n_layers=5)), "for a model of 5 layers"),
        (crosscoder(Wiring.sae(("resid_post", 7))), "uses layer 7, but the model has layers 0-2"),
        (crosscoder(Wiring.model_diff(["base", "chat"], 1)), "spans the models base, chat"),
    ],
)
def test_dimensions(model, clt, message, mode):
    assert_refused(model, clt, message, mode=mode)


def test_a_transcoder_of_one_layer_fits_any_number_of_layers(model):
    for layer in range(N_LAYERS):
        site = [cp.Site("model", name, layer) for name in ("mlp_in", "mlp_out")]
        model.add_clt(crosscoder(Wiring(((site[0],),), ((site[1],),)))).remove()


def test_another_models_name_alone_is_a_warning(model):
    clt = crosscoder(Wiring.clt(N_LAYERS), host=Host(model_name="someone/other-model"))
    with pytest.warns(UserWarning, match="trained for someone/other-model, but the model is tiny/gpt2"):
        handle = model.add_clt(clt)
    handle.remove()
    too_wide = crosscoder(Wiring.clt(N_LAYERS), 8, host=Host(model_name="someone/other-model"))
    assert_refused(model, too_wide, "has width 8")


@pytest.mark.parametrize("name", ["tiny/gpt2", "elsewhere/GPT2", "gpt2", "some/folder/gpt2/", None])
def test_the_same_models_name_is_no_warning(model, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.add_clt(crosscoder(Wiring.clt(N_LAYERS), host=Host(model_name=name))).remove()


@pytest.mark.parametrize(
    ("family", "read", "possible"),
    [
        (
            "gpt_neox",
            "resid_mid",
            "GPT-NeoX, Pythia models with parallel blocks have no site 'resid_mid': possible are resid_pre, attn_out, "
            "mlp_in_before_gain, mlp_in, mlp_out_before_norm, mlp_out, resid_post",
        ),
        (
            "olmo2",
            "mlp_in_before_gain",
            "OLMo 2 models have no site 'mlp_in_before_gain': possible are resid_pre, attn_out, resid_mid, mlp_in, "
            "mlp_out_before_norm, mlp_out, resid_post",
        ),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_sites_that_the_family_lacks(make, family, read, possible, mode):
    assert_refused(make(family), make_clt(read=read), possible, mode=mode)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_family_that_is_not_known(library):
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=16, ffn_dim=24, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=64, word_embed_proj_dim=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    config.architectures, config.name_or_path = ["OPTForCausalLM"], "tiny/opt"
    model = LIBRARIES[library](transformers.OPTForCausalLM(config).eval())
    logits = logits_of(model)
    known = r"known are gpt2, llama, mistral, .*gpt_neox.* add a row to clt_plugin\.adapters\.sites\.ARCHITECTURES"
    assert_refused(model, make_clt(), f"models of type 'opt' are not supported: {known}")
    assert torch.equal(logits_of(model), logits)


# ---------------------------------------------------------------- it cannot be attached so


@pytest.mark.parametrize("mode", ["replace", "replace_with_error"])
@pytest.mark.parametrize(
    ("wiring", "reason"),
    [
        (Wiring.sae(("resid_post", 1)), "it writes resid_post, not MLP outputs alone"),
        (Wiring.weakly_causal(range(N_LAYERS)), "it writes resid_post"),
        (Wiring.pre_post_mlp(1), "it writes mlp_in, not MLP outputs alone"),
        (Wiring.acausal([("mlp_out", 0), ("mlp_out", 1)]), "reaches before mlp_out.1 is read"),
        (Wiring.plt(N_LAYERS, read="resid_post"), "which a forward pass reaches before resid_post.0 is read"),
        (Wiring.plt(3) + Wiring.plt(3, write="mlp_out_before_norm"), "both before and after its post-norm"),
    ],
    ids=str,
)
def test_wirings_that_cannot_replace(model, wiring, reason, mode):
    clt = crosscoder(wiring, host=Host(n_layers=N_LAYERS))
    assert_refused(model, clt, f"only be attached with mode='observe': .*{reason}", mode=mode)
    model.add_clt(clt, mode="observe").remove()


@pytest.mark.parametrize("mode", MODES)
def test_a_jointly_selected_topk(model, mode):
    clt = crosscoder(Wiring.clt(N_LAYERS), activation=TopK(4, scope="joint"))
    assert_refused(model, clt, r"selects over all layers together.* use encode\(\) on recorded activations", mode=mode)


@pytest.mark.parametrize("scope", ["group", "joint"])
def test_batchtopk_needs_its_threshold_and_eval(model, scope):
    clt = crosscoder(Wiring.clt(N_LAYERS), activation="batchtopk", k=4, scope=scope)
    for mode in MODES:
        assert_refused(model, clt, r"call estimate_threshold\(x\) on typical inputs and eval\(\) first", mode=mode)
    clt.estimate_threshold(torch.randn(N_LAYERS, 50, D_MODEL))
    assert_refused(model, clt.train(), r"in training mode.* eval\(\) first")
    model.add_clt(clt.eval()).remove()


def test_a_selection_cannot_replace(model):
    clt = make_clt()
    for part in (clt.select([0]), clt.select(features={1: [3]})):
        assert_refused(model, part, "a selection of layers or features.* use mode='replace_with_error'")
    assert_refused(model, clt, "a selection of layers or features", layers=[0, 1, 2])
    model.add_clt(clt, mode="observe", layers=[2]).remove()


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_gradient_checkpointing(library):
    model = LIBRARIES[library]("gpt2")
    torch_model(model).gradient_checkpointing_enable()
    assert_refused(model, make_clt(), r"runs each block twice.* model\.gradient_checkpointing_disable\(\)")
    torch_model(model).gradient_checkpointing_disable()
    model.add_clt(make_clt()).remove()


# ---------------------------------------------------------------- names, and others that are attached


@pytest.mark.parametrize("name", ["my clt", "1st", "", "_private", "a.b"])
def test_names_that_are_no_identifiers(model, name):
    assert_refused(model, make_clt(), "choose a plain identifier", name=name)


@pytest.mark.parametrize(
    ("library", "name"),
    [("nnsight", name) for name in ("transformer", "trace", "output", "lm_head")]
    + [("transformer_lens", name) for name in ("mlp", "ln2", "hook_in", "hook_mlp_out", "forward")],
)
def test_names_that_are_taken(library, name):
    assert_refused(
        shared(library, "gpt2")[0], make_clt(), f"the name '{name}' is taken .* pass another name=", name=name
    )


def test_a_name_that_another_crosscoder_has(model):
    handle = model.add_clt(make_clt())
    assert_refused(model, make_clt(), "the name 'clt' is taken", mode="observe")
    handle.remove()
    model.add_clt(make_clt()).remove()


def test_a_name_that_a_second_group_would_have():
    bridge, two_groups = bridge_model("gpt2"), make_clt(Wiring.clt(N_LAYERS) + Wiring.plt(N_LAYERS))
    bridge.add_clt(make_clt(), mode="observe", name="clt_1")
    assert_refused(bridge, two_groups, "the name 'clt_1' is taken")


def test_two_that_replace_the_same_layers(model):
    with model.add_clt(make_clt()):
        for mode in ("replace", "replace_with_error"):
            message = "replaced already|writes the MLP outputs of layers .0, 1, 2. already"
            assert_refused(model, make_clt(seed=1), message, mode=mode, name="other")


def test_two_that_replace_different_layers(model):
    alone, clt = logits_of(model), make_clt(Wiring.plt(N_LAYERS))
    handles = [model.add_clt(clt, mode="replace_with_error", layers=[layer], name=f"at_{layer}") for layer in range(2)]
    assert_close(logits_of(model), alone, rtol=1e-5, atol=1e-5)
    for handle in handles:
        handle.remove()


# ---------------------------------------------------------------- weights that come later


def test_weights_that_do_not_fit_what_the_config_promised(tmp_path):
    """nnsight reads the config first and the weights at the first trace: what is refused late says so as clearly."""
    from nnsight.modeling.transformers import TransformersModel

    make_model("gpt2").save_pretrained(tmp_path)
    model = TransformersModel(str(tmp_path), task="text-generation", tokenizer=make_tokenizer())
    assert not model.dispatched
    handle = model.add_clt(make_clt())
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=24, n_layer=N_LAYERS, n_head=2, n_positions=64)
    other = transformers.GPT2LMHeadModel(config).eval()
    other.save_pretrained(tmp_path)
    with pytest.raises(AttachError, match=r"mlp_in\.0 has width 24 in the model, but 16 in the crosscoder"):
        logits_of(model)
    handle.remove()
    assert_close(logits_of(model), other(IDS).logits)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("google/gemma-2-2b", "gemma-2-2b"),
        ("Google/Gemma-2-2B", "gemma-2-2b"),
        ("/cache/hub/models--google--gemma-2-2b/snapshots/0123abc", "gemma-2-2b"),
        (str(Path(__file__).parent), ""),
        ("", ""),
    ],
)
def test_a_models_own_name(name, own):
    assert huggingface._own_name(name) == own
