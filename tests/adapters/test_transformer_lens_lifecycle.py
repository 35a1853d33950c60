"""What attaching to a TransformerBridge changes, and what removal, stops and errors leave behind: nothing."""

from __future__ import annotations

import gc
import inspect
import weakref

import pytest
import torch
from torch.testing import assert_close
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.normalization import NormalizationBridge

from clt_plugin import AttachError
from clt_plugin.adapters.huggingface import HostModel
from clt_plugin.adapters.transformer_lens import HOOKS, REFUSED
from support.crosscoders import make_clt
from support.models import FAMILIES, bridge_model, make_model
from support.reference import reference_run

IDS = torch.tensor([[0, 5, 17, 33, 60, 2, 41], [0, 9, 9, 58, 3, 30, 12]])
MODES = ("replace", "replace_with_error", "observe")
NAME = "blocks.1.clt.hook_features"
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def bridge():
    return bridge_model("gpt2")


def tree_of(bridge) -> dict:
    """The bridge's modules, by identity, and the keys of its state."""
    return {
        "modules": {name: id(module) for name, module in bridge.named_modules()},
        "model": {name: id(module) for name, module in bridge.original_model.named_modules()},
        "state": list(bridge.state_dict()),
        "parameters": {name: id(parameter) for name, parameter in bridge.named_parameters()},
    }


def traces_in(bridge) -> dict:
    """Everything in which attaching could leave a trace."""
    modules = [*bridge.named_modules(), *(("hf." + n, m) for n, m in bridge.original_model.named_modules())]
    return {
        "hooks": {name: id(point) for name, point in bridge.hook_dict.items()},
        "forwards": [name for name, module in modules if "forward" in module.__dict__],
        "dictionaries": {name: sorted(set(module.__dict__) - {"_fired_hook_out"}) for name, module in modules},
        "torch hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in modules},
        "training": bridge.training,
    }


# ---------------------------------------------------------------- coming and going


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_attaching_changes_no_module_and_removal_restores_all(family, mode):
    bridge = bridge_model(family)
    logits = bridge(IDS)
    tree, traces = tree_of(bridge), traces_in(bridge)
    handle = bridge.add_clt(make_clt(read="mlp_in"), mode=mode)
    assert tree_of(bridge) == tree
    assert NAME in bridge.hook_dict
    bridge.run_with_hooks(IDS, fwd_hooks=[(NAME, lambda acts, hook: acts * 2)])
    assert tree_of(bridge) == tree
    handle.remove()
    assert tree_of(bridge) == tree
    assert traces_in(bridge) == traces
    assert torch.equal(bridge(IDS), logits)
    handle.remove()
    assert traces_in(bridge) == traces


def test_a_handle_is_a_context_and_says_what_it_is(bridge):
    clt = make_clt()
    traces = traces_in(bridge)
    with bridge.add_clt(clt, mode="observe", name="mine") as handle:
        assert (handle.crosscoder, handle.name, handle.mode) == (clt, "mine", "observe")
        assert handle.layers[1] is bridge.blocks[1].mine
        assert repr(handle) == "<Crosscoder attached as 'mine', mode='observe'>"
    assert repr(handle) == "<Crosscoder attached as 'mine', mode='observe', removed>"
    assert traces_in(bridge) == traces


def test_attaching_again_and_again(bridge):
    """Each time anew: no hook, shadow or name is left from the time before."""
    expected = reference_run(make_model("gpt2"), IDS, make_clt(seed=3))["logits"]
    for seed in (1, 2, 3):
        handle = bridge.add_clt(make_clt(seed=seed))
        logits = bridge(IDS)
        handle.remove()
    assert_close(logits, expected, **CLOSE)


def test_the_original_mlp_does_not_run_where_it_is_replaced(bridge):
    ran = []
    bridge.blocks[1].mlp.original_component.c_fc.register_forward_hook(lambda *_: ran.append(1))
    for mode, count in [("replace", 0), ("replace_with_error", 1), ("observe", 1)]:
        ran.clear()
        with bridge.add_clt(make_clt(), mode=mode):
            bridge(IDS)
        assert len(ran) == count


def boom(*args, **kwargs):
    raise RuntimeError("mine")


FAILING = ("blocks.1.mlp.hook_in", NAME, "blocks.1.clt.hook_recon", "blocks.2.hook_out")


@pytest.mark.parametrize("ends", [*FAILING, "at layer 2", "well"])
def test_a_run_leaves_nothing_behind(bridge, ends):
    clt = make_clt(read="resid_mid")
    bridge.add_clt(clt)
    alive = []
    bridge.add_perma_hook(
        lambda name: ".clt." in name or name.endswith("ln2.hook_in"),
        lambda value, hook: alive.append(weakref.ref(value)),
    )
    if ends in FAILING:
        with pytest.raises(RuntimeError, match="mine"):
            bridge.run_with_hooks(IDS, fwd_hooks=[(ends, boom)])
    else:
        bridge.run_with_hooks(IDS, stop_at_layer=2 if ends == "at layer 2" else None)
    gc.collect()  # an exception holds its frames, and they the tensors
    assert len(alive) > 2
    assert not [value for value in alive if value() is not None]
    assert_close(bridge(IDS), reference_run(make_model("gpt2"), IDS, clt)["logits"], **CLOSE)
    # Another shape than the run that was broken off.
    assert_close(bridge(IDS[:1, :3]), reference_run(make_model("gpt2"), IDS[:1, :3], clt)["logits"], **CLOSE)


def test_what_fails_while_attaching_is_undone(bridge, monkeypatch):
    logits = bridge(IDS)
    tree, traces = tree_of(bridge), traces_in(bridge)
    monkeypatch.setattr("clt_plugin.adapters.transformer_lens._Attached._write", boom)
    with pytest.raises(RuntimeError, match="mine"):
        bridge.add_clt(make_clt())
    assert (tree_of(bridge), traces_in(bridge)) == (tree, traces)
    assert torch.equal(bridge(IDS), logits)


# ---------------------------------------------------------------- processed weights


@pytest.mark.parametrize("method", REFUSED)
def test_processing_is_refused_while_a_crosscoder_is_attached(bridge, method):
    logits = bridge(IDS)
    first = bridge.add_clt(make_clt())
    second = bridge.add_clt(make_clt(seed=1), mode="observe", name="other")
    with pytest.raises(AttachError, match=f"{method}.. would change the weights that 'clt', 'other' reads and writes"):
        getattr(bridge, method)()
    first.remove()
    # As long as one is left, and whichever of them came first.
    with pytest.raises(AttachError, match=f"{method}.. .*'other'"):
        getattr(bridge, method)()
    second.remove()
    assert torch.equal(bridge(IDS), logits)
    getattr(bridge, method)()
    assert bridge._weights_processed
    # Folding keeps the probabilities.
    assert_close(bridge(IDS).softmax(-1), logits.softmax(-1), **CLOSE)


@pytest.mark.parametrize("method", REFUSED)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_a_bridge_with_processed_weights_is_refused(family, method):
    bridge = bridge_model(family)
    getattr(bridge, method)()
    traces = traces_in(bridge)
    with pytest.raises(AttachError, match=r"weights were processed .* boot the model again"):
        bridge.add_clt(make_clt())
    assert traces_in(bridge) == traces


def test_compatibility_mode_without_processing_is_welcome(bridge):
    bridge.enable_compatibility_mode(no_processing=True)
    clt = make_clt()
    bridge.add_clt(clt)
    logits, seen = bridge.run_with_cache(IDS, names_filter=NAME)
    run = reference_run(make_model("gpt2"), IDS, clt)
    assert_close(logits, run["logits"], **CLOSE)
    assert_close(seen[NAME], run["features"][1], **CLOSE)


# ---------------------------------------------------------------- what is used of TransformerLens's private side


@pytest.mark.parametrize("family", FAMILIES)
def test_components_stand_in_the_place_of_transformers_modules(family):
    """The adapter finds a component under transformers' name, and the module that it wraps is called through it."""
    bridge = bridge_model(family)
    host = HostModel.of(bridge.original_model)
    row = host.architecture
    block = bridge.blocks[1]
    assert bridge.original_model.get_submodule(host.blocks)[1] is block
    names = (row.attention, row.post_attention_norm, row.pre_mlp_norm, row.mlp, row.post_mlp_norm)
    called = []
    for name in filter(None, names):
        component = block.original_component.get_submodule(name)
        assert component in list(block.children()), name
        assert isinstance(component.hook_in, HookPoint)
        assert isinstance(component.hook_out, HookPoint)
        component.register_forward_pre_hook(lambda module, args, name=name: called.append(name))
    bridge(IDS)
    assert called == [name for name in dict.fromkeys(names) if name]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shadowed_forward_is_what_the_bridge_calls(family):
    bridge = bridge_model(family)
    host = HostModel.of(bridge.original_model)
    seen = []
    for name in filter(None, (host.architecture.mlp, host.architecture.post_mlp_norm)):
        module = bridge.blocks[1].original_component.get_submodule(name).original_component

        def shadow(x, own=module.forward, name=name):
            seen.append(name)
            return own(x) * 0

        module.__dict__["forward"] = shadow
    _, cache = bridge.run_with_cache(IDS, names_filter="blocks.1.hook_mlp_out")
    assert seen == [name for name in (host.architecture.mlp, host.architecture.post_mlp_norm) if name]
    assert not cache["blocks.1.hook_mlp_out"].any()


@pytest.mark.filterwarnings("ignore:Backward hooks on hook_scale/hook_normalized:UserWarning")
@pytest.mark.parametrize("hooked", [False, True])
def test_a_norm_ends_in_its_own_module_or_in_apply_weight_and_bias(hooked):
    norm = bridge_model("gemma2").blocks[1].ln2_post
    assert isinstance(norm, NormalizationBridge)
    assert list(inspect.signature(norm._apply_weight_and_bias).parameters) == ["hidden_states", "input_dtype"]
    ended = []
    own, module = norm._apply_weight_and_bias, norm.original_component
    forward = module.forward
    norm.__dict__["_apply_weight_and_bias"] = lambda x, dtype: (ended.append("bridge"), own(x, dtype))[1]
    module.__dict__["forward"] = lambda x: (ended.append("module"), forward(x))[1]
    if hooked:
        norm.hook_scale.add_hook(lambda grad, hook: None, dir="bwd")
    norm(torch.randn(1, 2, 16))
    assert ended == (["bridge"] if hooked else ["module"])


def test_hook_points_know_whether_they_are_hooked():
    norm = bridge_model("llama").blocks[1].ln2
    for point in (norm.hook_scale, norm.hook_normalized):
        assert not point.has_hooks()
        point.add_hook(lambda value, hook: None, dir="bwd")
        assert point.has_hooks()


def test_the_bridge_says_whether_weights_were_processed_and_where_a_run_starts(bridge):
    assert bridge._weights_processed is False
    starts = []
    bridge.blocks[0].register_forward_pre_hook(lambda *_: starts.append(bridge.blocks[0]._start_at_layer_idx))
    bridge(torch.randn(1, 3, 16), start_at_layer=2)
    assert starts == [2]
    assert bridge.blocks[0]._start_at_layer_idx is None


def test_the_registry_is_where_hook_points_are_looked_up(bridge):
    point = HookPoint()
    point.name = "blocks.1.mine.hook_mine"
    bridge._hook_registry[point.name] = point
    assert bridge.hook_dict[point.name] is point
    bridge.add_hook(point.name, lambda value, hook: value)
    assert point.has_hooks()
    bridge.reset_hooks()
    assert not point.has_hooks()


def test_refused_methods_exist():
    for method in REFUSED:
        assert inspect.isfunction(getattr(TransformerBridge, method))
    assert set(HOOKS.values()) == {"hook_in", "hook_pre", "hook_features", "hook_recon", "hook_error"}
