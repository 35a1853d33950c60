"""A crosscoder's hook points in a TransformerBridge: seen, cached, edited, differentiated, in every kind of run."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch.testing import assert_close
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities import get_act_name

import clt_plugin as cp
from clt_plugin import Wiring
from clt_plugin.adapters.transformer_lens import HOOKS
from support.crosscoders import make_clt
from support.models import N_LAYERS, bridge_model, make_model, make_tokenizer
from support.reference import blocks_of, reference_greedy, reference_run

IDS = torch.tensor([[0, 5, 17, 33, 60, 2, 41], [0, 9, 9, 58, 3, 30, 12]])
POINTS = [f"blocks.{layer}.clt.{hook}" for layer in range(N_LAYERS) for hook in HOOKS.values()]
NAME = "blocks.1.clt.hook_features"
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

BACKWARD_FALLBACK = "ignore:Backward hooks on hook_scale/hook_normalized:UserWarning"
EDIT_FALLBACK = "ignore:A forward hook edited hook_scale/hook_normalized:UserWarning"


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Threads cost more than they save on models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


shared_bridge = cache(bridge_model)


@pytest.fixture
def bridge_of(monkeypatch):
    """A family's bridge, made once: what a test attaches to it or hooks is gone when the test ends."""
    bridges, handles, attach = {}, [], TransformerBridge.add_clt

    def add_clt(*args, **kwargs):
        handles.append(attach(*args, **kwargs))
        return handles[-1]

    monkeypatch.setattr(TransformerBridge, "add_clt", add_clt)
    yield lambda family: bridges.setdefault(family, shared_bridge(family))
    for handle in handles:
        handle.remove()
    for bridge in bridges.values():
        bridge.reset_hooks(including_permanent=True)
        bridge.original_model.requires_grad_(False).zero_grad()


@pytest.fixture
def bridge(bridge_of):
    return bridge_of("gpt2")


@pytest.fixture
def hf():
    return make_model("gpt2")


def double_last(acts, hook=None):
    """An edit that is seen wherever it works: features doubled at the last position, one set everywhere."""
    acts = acts.clone()
    acts[:, -1] *= 2
    acts[..., 3] = 4.0
    return acts


def edit_at(layer, edit=double_last):
    return lambda at, acts: edit(acts) if at == layer else acts


# ---------------------------------------------------------------- points


def test_points_are_hook_points_of_the_bridge(bridge):
    bridge.add_clt(make_clt())
    points = bridge.hook_dict
    assert [name for name in points if ".clt." in name] == POINTS
    assert bridge.mod_dict[NAME] is points[NAME] is bridge.blocks[1].clt.hook_features is bridge.get_hook_point(NAME)
    assert isinstance(points[NAME], HookPoint)
    assert {points[name].name for name in POINTS} == {*POINTS}
    assert points[NAME].layer() == 1
    assert get_act_name("features", 1, "clt") == NAME
    assert points[NAME] in list(bridge.hook_points())


@pytest.mark.parametrize(
    ("names_filter", "found"),
    [
        (None, POINTS),
        (NAME, [NAME]),
        ([NAME, "blocks.0.clt.hook_error"], ["blocks.0.clt.hook_error", NAME]),
        (lambda name: name.endswith("clt.hook_pre"), [name for name in POINTS if name.endswith("hook_pre")]),
    ],
    ids=["all", "string", "list", "function"],
)
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_run_with_cache(bridge_of, family, names_filter, found):
    bridge, hf, clt = bridge_of(family), make_model(family), make_clt(read="resid_mid")
    bridge.add_clt(clt, mode="replace_with_error")
    logits, seen = bridge.run_with_cache(IDS, names_filter=names_filter)
    run = reference_run(hf, IDS, clt, "replace_with_error")
    assert_close(logits, run["logits"], **CLOSE)
    assert sorted(name for name in seen if ".clt." in name) == sorted(found)
    for name in found:
        _, layer, _, hook = name.split(".")
        point = next(point for point, called in HOOKS.items() if called == hook)
        assert_close(seen[name], run[point][int(layer)], **CLOSE)
    if NAME in found:
        assert_close(seen["features", 1, "clt"], run["features"][1], **CLOSE)


def test_there_is_an_error_only_where_it_is_added(bridge):
    bridge.add_clt(make_clt())
    _, seen = bridge.run_with_cache(IDS, names_filter=lambda name: ".clt." in name)
    assert {name.rpartition(".")[2] for name in seen} == {*HOOKS.values()} - {"hook_error"}


def test_cached_slices_and_single_prompts(bridge, hf):
    clt = make_clt()
    bridge.add_clt(clt)
    expected = reference_run(hf, IDS[:1], clt)["features"][1]
    _, seen = bridge.run_with_cache(IDS[:1], names_filter=NAME, pos_slice=-1, remove_batch_dim=True)
    assert_close(seen[NAME], expected[0, -1:], **CLOSE)
    text = make_tokenizer().decode(IDS[0, 1:])
    _, seen = bridge.run_with_cache(text, names_filter=NAME)
    assert_close(seen[NAME], expected, **CLOSE)


# ---------------------------------------------------------------- edits


def by_run_with_hooks(bridge, edit):
    return bridge.run_with_hooks(IDS, fwd_hooks=[(NAME, edit)])


def by_filter(bridge, edit):
    return bridge.run_with_hooks(IDS, fwd_hooks=[(lambda name: name == NAME, edit)])


def by_context(bridge, edit):
    with bridge.hooks(fwd_hooks=[(NAME, edit)]):
        return bridge(IDS)


def by_add_hook(bridge, edit):
    bridge.add_hook(NAME, edit)
    return bridge(IDS)


def by_perma_hook(bridge, edit):
    bridge.add_perma_hook(NAME, edit)
    return bridge(IDS)


def at_the_point(bridge, edit):
    bridge.blocks[1].clt.hook_features.add_hook(edit)
    return bridge(IDS)


def in_place(bridge, edit):
    return bridge.run_with_hooks(IDS, fwd_hooks=[(NAME, lambda acts, hook: acts.copy_(edit(acts)))])


WAYS = [by_run_with_hooks, by_filter, by_context, by_add_hook, by_perma_hook, at_the_point, in_place]


@pytest.mark.parametrize("mode", ["replace", "replace_with_error"])
@pytest.mark.parametrize("way", WAYS)
def test_an_edit_of_features(bridge, hf, way, mode):
    clt = make_clt(activation="jumprelu")
    bridge.add_clt(clt, mode=mode)
    expected = reference_run(hf, IDS, clt, mode, edit_at(1))["logits"]
    assert (expected - reference_run(hf, IDS, clt, mode)["logits"]).abs().max() > 0.01
    assert_close(way(bridge, double_last), expected, **CLOSE)


SHIFT = torch.linspace(-1, 1, 24)


def with_shift(bridge, point):
    """Run with a constant added at a point of layer 1."""
    width = 24 if point == "hook_pre" else 16
    return bridge.run_with_hooks(IDS, fwd_hooks=[(f"blocks.1.clt.{point}", lambda x, hook: x + SHIFT[:width])])


def shifted_clt(point):
    """The crosscoder whose biases of layer 1 do the same."""
    clt = make_clt()
    if point == "hook_recon":
        clt.b_dec[1].data += SHIFT[:16]
    else:
        clt.b_enc[1].data += SHIFT if point == "hook_pre" else SHIFT[:16] @ clt.W_enc[1]
    return clt


@pytest.mark.parametrize("point", ["hook_in", "hook_pre", "hook_recon"])
def test_an_edit_of_another_point(bridge, hf, point):
    bridge.add_clt(make_clt())
    expected = reference_run(hf, IDS, shifted_clt(point))["logits"]
    assert (expected - bridge(IDS)).abs().max() > 0.01
    assert_close(with_shift(bridge, point), expected, **CLOSE)


@pytest.mark.parametrize("point", ["hook_in", "hook_pre", "hook_recon"])
def test_an_edit_of_another_point_where_the_error_is_added_back(bridge, hf, point):
    """The error is that of the crosscoder as it is, so that the change alone acts on the model's own output."""
    clt = make_clt()
    bridge.add_clt(clt, mode="replace_with_error")
    if point == "hook_recon":
        blocks_of(hf)[1].mlp.register_forward_hook(lambda module, args, y: y + SHIFT[:16])
        expected = hf(IDS).logits
    else:
        features = reference_run(hf, IDS, shifted_clt(point), "observe")["features"][1]
        expected = reference_run(hf, IDS, clt, "replace_with_error", edit_at(1, lambda acts: features))["logits"]
    assert (expected - bridge(IDS)).abs().max() > 0.01
    assert_close(with_shift(bridge, point), expected, **CLOSE)


def test_without_the_errors_it_is_a_plain_replacement(bridge, hf):
    clt = make_clt()
    bridge.add_clt(clt, mode="replace_with_error")
    without = [(lambda name: name.endswith("hook_error"), lambda error, hook: error * 0)]
    assert_close(bridge.run_with_hooks(IDS, fwd_hooks=without), reference_run(hf, IDS, clt)["logits"], **CLOSE)


def test_reset_hooks_takes_hooks_and_leaves_the_crosscoder(bridge, hf):
    clt, calls = make_clt(), []
    bridge.add_clt(clt)
    bridge.add_hook(NAME, lambda acts, hook: calls.append("hook"))
    bridge.add_perma_hook(NAME, lambda acts, hook: calls.append("permanent"))
    assert list(bridge.list_hooks()) == [NAME]
    expected = reference_run(hf, IDS, clt)["logits"]
    for including_permanent, seen in [(None, ["hook", "permanent"]), (False, ["permanent"]), (True, [])]:
        if including_permanent is not None:
            bridge.reset_hooks(including_permanent=including_permanent)
        calls.clear()
        assert_close(bridge(IDS), expected, **CLOSE)
        assert calls == seen


# ---------------------------------------------------------------- the user's own hooks


def halve(value, hook=None):
    return value * 0.5


def halve_input(module, args, kwargs):
    return ((halve(args[0]), *args[1:]), kwargs) if args else (args, {"hidden_states": halve(kwargs["hidden_states"])})


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("edited", "read"),
    [
        ("ln2.hook_in", "resid_mid"),
        ("ln2.hook_in", "mlp_in_before_gain"),
        ("ln2.hook_in", "mlp_in"),
        ("mlp.hook_in", "mlp_in"),
        ("hook_in", "resid_pre"),
    ],
)
def test_hooks_that_edit_the_input_reach_the_encoder(bridge, hf, edited, read, when):
    clt = make_clt(read=read)
    if when == "before":
        bridge.add_hook(f"blocks.1.{edited}", halve)
    bridge.add_clt(clt)
    if when == "after":
        bridge.add_hook(f"blocks.1.{edited}", halve)
    block = blocks_of(hf)[1]
    module = {"ln2.hook_in": block.ln_2, "mlp.hook_in": block.mlp, "hook_in": block}[edited]
    module.register_forward_pre_hook(halve_input, with_kwargs=True)
    run = reference_run(hf, IDS, clt)
    logits, seen = bridge.run_with_cache(IDS, names_filter=NAME)
    assert_close(seen[NAME], run["features"][1], **CLOSE)
    assert_close(logits, run["logits"], **CLOSE)


def test_the_optional_hook_before_the_norm_reaches_the_encoder():
    bridge, hf, clt = bridge_model("gpt2"), make_model("gpt2"), make_clt(read="resid_mid")
    bridge.add_clt(clt)
    bridge.set_use_hook_mlp_in(True)
    blocks_of(hf)[1].ln_2.register_forward_pre_hook(halve_input, with_kwargs=True)
    logits = bridge.run_with_hooks(IDS, fwd_hooks=[("blocks.1.hook_mlp_in", halve)])
    assert_close(logits, reference_run(hf, IDS, clt)["logits"], **CLOSE)


@pytest.mark.parametrize("edited", ["hook_in", "hook_normalized", "hook_scale"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.filterwarnings(EDIT_FALLBACK)
def test_hooks_inside_the_norm_reach_the_encoder(bridge_of, family, edited):
    bridge, clt = bridge_of(family), make_clt(read="mlp_in_before_gain")
    bridge.add_clt(clt)
    seen = {}
    bridge.add_hook(f"blocks.1.ln2.{edited}", lambda value, hook: value + 1.5)
    bridge.add_hook("blocks.1.ln2.hook_normalized", lambda value, hook: seen.update(value=value))
    _, cached = bridge.run_with_cache(IDS, names_filter=NAME)
    assert_close(cached[NAME], clt.encode_group(1, seen["value"]), **CLOSE)


def test_observing_the_norm_changes_nothing(bridge_of):
    bridge = bridge_of("llama")
    bridge.add_clt(make_clt(read="mlp_in_before_gain"))
    assert torch.equal(bridge.run_with_cache(IDS)[0], bridge(IDS))


def test_user_hooks_see_and_edit_what_the_crosscoder_writes(bridge, hf):
    """The bridge's hook on an MLP's output means what it meant: what is added to the residual stream."""
    clt = make_clt()
    bridge.add_clt(clt)
    run = reference_run(hf, IDS, clt)
    _, seen = bridge.run_with_cache(IDS, names_filter=["blocks.1.hook_mlp_out", "blocks.1.mlp.hook_out"])
    for value in seen.values():
        assert_close(value, run["recon"][1], **CLOSE)
    logits = bridge.run_with_hooks(IDS, fwd_hooks=[("blocks.1.hook_mlp_out", halve)])
    other = make_clt()
    other.b_dec[1].data.mul_(0.5)
    for group in (0, 1):
        columns = other.layout.write_slices[group][other.wiring.write_sites[1]]
        other.W_dec[group].data[:, columns] *= 0.5
    assert_close(logits, reference_run(hf, IDS, other)["logits"], **CLOSE)


# ---------------------------------------------------------------- gradients


def weighted_sum(logits):
    return (logits * torch.linspace(-1, 1, logits.numel()).reshape(logits.shape)).sum()


def next_token_loss(logits):
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def reference_gradients(hf, clt, mode, loss):
    """The gradient at every layer's features, and the features."""
    hf.requires_grad_(True)
    kept = {}

    def keep(layer, acts):
        acts.retain_grad()
        return kept.setdefault(layer, acts)

    loss(reference_run(hf, IDS, clt, mode, keep)["logits"]).backward()
    return {layer: acts.grad for layer, acts in kept.items()}, kept


@pytest.mark.parametrize("mode", ["replace", "replace_with_error"])
@pytest.mark.parametrize(("family", "activation"), [("gpt2", "relu"), ("gemma2", "jumprelu"), ("gpt_neox", "relu")])
def test_gradients_at_features(bridge_of, family, activation, mode):
    bridge, clt = bridge_of(family), make_clt(activation=activation)
    bridge.original_model.requires_grad_(True)
    bridge.add_clt(clt, mode=mode)
    expected, features = reference_gradients(make_model(family), clt, mode, weighted_sum)
    seen = {}
    names = [name for name in POINTS if name.endswith("hook_features")]
    hooks = [(name, lambda grad, hook: seen.update({hook.layer(): grad.clone()})) for name in names]
    with bridge.hooks(bwd_hooks=hooks):
        weighted_sum(bridge(IDS)).backward()
    for layer, gradient in expected.items():
        inactive = features[layer] == 0
        assert inactive.any()
        assert gradient[inactive].abs().max() > 1e-3
        assert_close(seen[layer], gradient, rtol=1e-4, atol=1e-5)


def test_an_edited_gradient_changes_those_before_it(bridge):
    bridge.original_model.requires_grad_(True)
    bridge.add_clt(make_clt())
    embedding = bridge.original_model.get_input_embeddings().weight

    def gradient(*hooks):
        embedding.grad = None
        with bridge.hooks(bwd_hooks=list(hooks)):
            bridge(IDS).square().sum().backward()
        return embedding.grad

    assert not torch.allclose(gradient(), gradient((NAME, lambda grad, hook: grad * 0)))


@pytest.mark.filterwarnings(BACKWARD_FALLBACK)
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "olmo2"])
@pytest.mark.parametrize("mode", ["replace", "replace_with_error"])
def test_caching_backward(bridge_of, family, mode):
    """`incl_bwd` puts backward hooks everywhere, which makes the bridge compute the post-norms by itself."""
    bridge, clt = bridge_of(family), make_clt()
    bridge.original_model.requires_grad_(True)
    bridge.add_clt(clt, mode=mode)
    loss, seen = bridge.run_with_cache(IDS, incl_bwd=True, return_type="loss")
    expected, _ = reference_gradients(make_model(family), clt, mode, next_token_loss)
    for layer, gradient in expected.items():
        assert_close(seen[f"blocks.{layer}.clt.hook_features_grad"], gradient, rtol=1e-4, atol=1e-5)
    assert_close(loss, next_token_loss(reference_run(make_model(family), IDS, clt, mode)["logits"]), **CLOSE)


# ---------------------------------------------------------------- generation


def generate(bridge, prompt, steps, **settings):
    settings = {"do_sample": False, "stop_at_eos": False, "verbose": False, "return_type": "tokens"} | settings
    return bridge.generate(prompt, max_new_tokens=steps, **settings)


@pytest.mark.parametrize("exclude_first", [0, 1])
@pytest.mark.parametrize("mode", ["replace", "observe"])
@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no_cache"])
@pytest.mark.parametrize("family", ["gpt2", "mistral", "gemma3_multimodal"])
def test_generation_is_replaced_at_every_step(bridge_of, family, cached, mode, exclude_first):
    bridge, hf, clt = bridge_of(family), make_model(family), make_clt(exclude_first=exclude_first)
    bridge.add_clt(clt, mode=mode)
    lengths, features = [], []

    def note(acts, hook):
        lengths.append(acts.shape[1])
        features.append(acts[:, -1])

    bridge.add_hook(NAME, note)
    tokens = generate(bridge, IDS, 5, use_past_kv_cache=cached)
    runs = reference_greedy(hf, IDS, clt, mode, 5)
    assert torch.equal(tokens, runs[-1]["ids"])
    assert lengths == ([7, 1, 1, 1, 1] if cached else [7, 8, 9, 10, 11])
    for seen, run in zip(features, runs, strict=True):
        assert_close(seen, run["features"][1][:, -1], rtol=1e-4, atol=1e-4)
    if mode == "replace":
        assert not torch.equal(tokens, reference_greedy(hf, IDS, clt, "observe", 5)[-1]["ids"])


@pytest.mark.parametrize("exclude_first", [0, 1])
@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no_cache"])
def test_generation_from_left_padded_prompts(bridge, hf, cached, exclude_first):
    clt = make_clt(exclude_first=exclude_first)
    bridge.add_clt(clt)
    prompts = ["w5 w17 w33 w60", "w9", "w58 w3 w30 w12 w6 w7"]
    tokens = generate(bridge, prompts, 4, use_past_kv_cache=cached)
    for row, prompt in zip(tokens, prompts, strict=True):
        ids = torch.tensor([make_tokenizer()(prompt)["input_ids"]])
        expected = reference_greedy(hf, ids, clt, "replace", 4)[-1]["ids"][0]
        assert torch.equal(row[-len(expected) :], expected)


def test_transformers_own_generation(bridge, hf):
    clt = make_clt()
    bridge.add_clt(clt)
    settings = {"do_sample": False, "return_type": "tokens", "min_new_tokens": 4, "eos_token_id": None}
    tokens = bridge.hf_generate(IDS, max_new_tokens=4, **settings)
    assert torch.equal(tokens, reference_greedy(hf, IDS, clt, "replace", 4)[-1]["ids"])


# ---------------------------------------------------------------- parts of a run


def test_stop_at_layer(bridge, hf):
    clt = make_clt(read="resid_mid")
    bridge.add_clt(clt)
    entering = []
    blocks_of(hf)[2].register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    reference_run(hf, IDS, clt)
    names = [name for name in POINTS if name.endswith("hook_features")]
    residual, seen = bridge.run_with_cache(IDS, names_filter=names, stop_at_layer=2)
    assert_close(residual, entering[0], **CLOSE)
    assert list(seen) == names[:2]
    assert_close(bridge(IDS, stop_at_layer=2), entering[0], **CLOSE)
    # And nothing of the half run stays for the next.
    assert_close(bridge(IDS), reference_run(hf, IDS, clt)["logits"], **CLOSE)


def test_start_at_layer_leaves_the_layers_before_silent(bridge, hf):
    clt = make_clt(read="resid_mid")
    bridge.add_clt(clt)
    residual = torch.randn(2, 7, 16)
    names = [name for name in POINTS if name.endswith("hook_features")]
    fired = []
    bridge.add_hook(lambda name: name in names, lambda acts, hook: fired.append(hook.name))
    logits = bridge(residual, start_at_layer=1)
    assert fired == names[1:]
    # The same in plain torch: block 1 is given the residual stream, and layer 0's features are 0.
    blocks_of(hf)[1].register_forward_pre_hook(lambda module, args: (residual, *args[1:]))
    expected = reference_run(hf, IDS, clt, edit=lambda layer, acts: acts * (layer > 0))["logits"]
    assert_close(logits, expected, **CLOSE)
    assert_close(bridge(IDS), reference_run(make_model("gpt2"), IDS, clt)["logits"], **CLOSE)


def test_a_block_called_by_itself_is_plain(bridge, hf):
    """Outside a forward pass of the model there is no run: nothing is replaced, and nothing kept."""
    bridge.add_clt(make_clt())
    fired = []
    bridge.add_hook(NAME, lambda acts, hook: fired.append(hook.name))
    x = torch.randn(1, 4, 16)
    for _ in range(2):
        assert_close(bridge.blocks[1].mlp(x), blocks_of(hf)[1].mlp(x), **CLOSE)
        x = x * 2
    assert not fired


def test_the_hugging_face_model_inside(bridge, hf):
    """What the bridge shadows stands in the model itself, so that calling that is replaced too."""
    clt = make_clt()
    bridge.add_clt(clt)
    assert_close(bridge.original_model(IDS).logits, reference_run(hf, IDS, clt)["logits"], **CLOSE)
    embeds = hf.transformer.wte(IDS)
    assert_close(bridge.original_model(inputs_embeds=embeds).logits, bridge(IDS), **CLOSE)
    assert_close(bridge(embeds), bridge(IDS), **CLOSE)


# ---------------------------------------------------------------- several crosscoders


@pytest.mark.parametrize("order", ["replace first", "observe first"])
def test_several_under_their_own_names(bridge, hf, order):
    replacing, observing = make_clt(seed=1), make_clt(seed=2, read="resid_mid")
    plain = bridge(IDS)
    expected = reference_run(hf, IDS, replacing)
    modes = [("replace", replacing, "clt"), ("observe", observing, "other")]
    for mode, clt, name in modes if order == "replace first" else reversed(modes):
        bridge.add_clt(clt, mode=mode, name=name)
    logits, seen = bridge.run_with_cache(
        IDS, names_filter=[NAME, "blocks.1.ln2.hook_in", "blocks.1.other.hook_features"]
    )
    assert_close(logits, expected["logits"], **CLOSE)
    assert_close(seen[NAME], expected["features"][1], **CLOSE)
    of_other = observing.encode_group(1, seen["blocks.1.ln2.hook_in"])
    assert_close(seen["blocks.1.other.hook_features"], of_other, **CLOSE)
    assert not torch.allclose(logits, plain)


@pytest.mark.parametrize("removed_first", ["clt", "other"])
def test_removal_in_any_order(bridge, hf, removed_first):
    clt = make_clt(seed=1)
    plain = bridge(IDS)
    handles = {"clt": bridge.add_clt(clt), "other": bridge.add_clt(make_clt(seed=2), mode="observe", name="other")}
    handles.pop(removed_first).remove()
    expected = plain if removed_first == "clt" else reference_run(hf, IDS, clt)["logits"]
    assert_close(bridge(IDS), expected, **CLOSE)
    kept = next(iter(handles))
    assert [kept in name for name in bridge.hook_dict if name.endswith("hook_features")] == [True] * N_LAYERS
    handles.pop(kept).remove()
    assert torch.equal(bridge(IDS), plain)


# ---------------------------------------------------------------- other wirings, observed and replaced

RESIDUALS = [("resid_post", layer) for layer in range(N_LAYERS)]
OBSERVED = {
    "sae": Wiring.sae(("resid_post", 1)),
    "sae of attention": Wiring.sae(("attn_out", 2)),
    "sae before": Wiring.sae(("resid_pre", 0)),
    "acausal": Wiring.acausal(RESIDUALS),
    "acausal over an MLP": Wiring.acausal([("resid_mid", 0), ("mlp_out_before_norm", 0), ("resid_pre", 1)]),
    "weakly_causal": Wiring.weakly_causal(RESIDUALS),
    "pre_post_mlp": Wiring.pre_post_mlp(1, "both"),
}


OBSERVED_IN = [
    (family, wiring)
    for family in ("gpt2", "gemma2", "gpt_neox")
    for wiring in OBSERVED
    if (family, wiring) != ("gpt_neox", "acausal over an MLP")  # parallel blocks have no resid_mid
]


@pytest.mark.parametrize(("family", "wiring"), OBSERVED_IN)
def test_observed_wirings_equal_encode_on_recorded_activations(bridge_of, family, wiring):
    bridge, clt = bridge_of(family), make_clt(OBSERVED[wiring])
    plain = bridge(IDS)
    places = {"resid_pre": "hook_in", "attn_out": "hook_attn_out", "resid_mid": "hook_resid_mid"}
    places |= {"mlp_in": "mlp.hook_in", "mlp_out_before_norm": "mlp.hook_out", "mlp_out": "hook_mlp_out"}
    places |= {"resid_post": "hook_out"}
    names = {site: f"blocks.{site.layer}.{places[site.name]}" for site in clt.sites.read}
    handle = bridge.add_clt(clt, mode="observe")
    features = [f"blocks.{layer}.clt.hook_features" for layer in clt.wiring.home]
    logits, seen = bridge.run_with_cache(IDS, names_filter=[*names.values(), *features])
    assert torch.equal(logits, plain)
    expected = clt.encode({site: seen[name] for site, name in names.items()})
    for name, acts in zip(features, expected, strict=True):
        assert_close(seen[name], acts, **CLOSE)
        assert (acts != 0).any()
    handle.remove()
    assert torch.equal(bridge(IDS), plain)


def test_strictly_causal_in_replace(bridge, hf):
    clt = make_clt(Wiring.strictly_causal(N_LAYERS))
    bridge.add_clt(clt)
    run = reference_run(hf, IDS, clt)
    logits, seen = bridge.run_with_cache(IDS, names_filter=lambda name: "clt.hook_" in name)
    assert_close(logits, run["logits"], **CLOSE)
    assert "blocks.0.clt.hook_recon" not in seen
    for layer in (0, 1):
        assert_close(seen[f"blocks.{layer}.clt.hook_features"], run["features"][layer], **CLOSE)
        assert_close(seen[f"blocks.{layer + 1}.clt.hook_recon"], run["recon"][layer + 1], **CLOSE)


def test_two_groups_at_home_in_one_layer(bridge):
    clt = make_clt(Wiring.clt(N_LAYERS) + Wiring.plt(N_LAYERS))
    with bridge.add_clt(clt):
        _, seen = bridge.run_with_cache(IDS, names_filter=lambda name: "hook_features" in name or "mlp.hook_in" in name)
        assert bridge.blocks[1].clt_1.hook_features.name == "blocks.1.clt_1.hook_features"
    x = seen["blocks.1.mlp.hook_in"]
    assert_close(seen[NAME], clt.encode_group(1, x), **CLOSE)
    assert_close(seen["blocks.1.clt_1.hook_features"], clt.encode_group(1 + N_LAYERS, x), **CLOSE)
    assert not hasattr(bridge.blocks[1], "clt_1")


def test_a_selection_with_the_error_added_back(bridge, hf):
    clt = make_clt()
    plain = bridge(IDS)
    bridge.add_clt(clt, mode="replace_with_error", layers=[1], features={1: [3, 7]})
    assert_close(bridge(IDS), plain, **CLOSE)

    def edit(acts, hook=None):
        return acts.index_fill(-1, torch.tensor([0]), 2.0)

    expected = reference_run(
        hf, IDS, clt, "replace_with_error", edit_at(1, lambda acts: acts.index_fill(-1, torch.tensor([3]), 2.0))
    )["logits"]
    assert_close(by_run_with_hooks(bridge, edit), expected, **CLOSE)
    assert (expected - plain).abs().max() > 0.01


# ---------------------------------------------------------------- dtypes, devices, files


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_a_bfloat16_bridge_with_a_float32_crosscoder(family):
    hf = make_model(family, torch.bfloat16)
    hf.set_attn_implementation("eager")
    bridge, clt = bridge_model(make_model(family, torch.bfloat16)), make_clt(read="mlp_in_before_gain")
    plain = bridge(IDS)
    assert plain.dtype == torch.bfloat16
    for mode in ("replace", "replace_with_error", "observe"):
        run = reference_run(hf, IDS, clt, mode)
        with bridge.add_clt(clt, mode=mode):
            logits, seen = bridge.run_with_cache(IDS, names_filter=NAME)
        assert seen[NAME].dtype == torch.float32
        assert logits.dtype == torch.bfloat16
        assert_close(seen[NAME], run["features"][1], rtol=0.05, atol=0.05)
        assert_close(logits, run["logits"], rtol=0.05, atol=0.05)
        if mode != "replace":
            assert torch.equal(logits, plain)
    assert torch.equal(bridge(IDS), plain)


def test_a_lazily_opened_crosscoder(bridge, hf, tmp_path):
    clt = make_clt(Wiring.clt(N_LAYERS).with_skips(), activation="jumprelu")
    clt.save(tmp_path / "clt")
    lazy = cp.load(tmp_path / "clt", lazy=True)
    assert lazy.is_lazy
    run = reference_run(hf, IDS, clt)
    for reference in (lazy, tmp_path / "clt", str(tmp_path / "clt")):
        with bridge.add_clt(reference) as handle:
            assert handle.crosscoder.wiring == clt.wiring
            logits, seen = bridge.run_with_cache(IDS, names_filter=NAME)
        assert_close(seen[NAME], run["features"][1], **CLOSE)
        assert_close(logits, run["logits"], **CLOSE)


def test_hooks_keep_firing_after_moves():
    bridge = bridge_model("gpt2")
    bridge.add_clt(make_clt())
    fired = []
    bridge.add_hook(NAME, lambda acts, hook: fired.append(acts))
    expected = bridge(IDS)
    bridge.to("cpu", print_details=False)
    assert torch.equal(bridge(IDS), expected)
    bridge.to(torch.float64, print_details=False)
    assert bridge(IDS).dtype == torch.float64
    bridge.train().eval()
    bridge(IDS)
    assert [acts.dtype for acts in fired] == [torch.float32] * 4
