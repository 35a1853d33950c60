"""The certificate holds on every family, and every deliberate fault fails it, with the place named."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clt_plugin as cp
from attribution.oracle import clt_of, model_of
from clt_plugin.adapters._frozen import Frozen
from clt_plugin.adapters._norms import FreezeError, FrozenNorm
from clt_plugin.attribution import CertificateError
from clt_plugin.attribution.engine import checks, direct, edges, linear, local, sources
from support.models import FAMILIES, N_LAYERS
from support.reference import blocks_of

IDS = torch.tensor([0, 5, 17, 33, 60, 2, 41])
CLOSE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-2}


def attribute(family: str = "llama", clt: str = "clt", dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    hf = settings.pop("hf", None)
    return cp.attribute(model_of(family, dtype) if hf is None else hf, IDS, clt=clt_of(clt, dtype), **settings)


# ---------------------------------------------------------------- it holds


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_closes(family, dtype):
    """Transformers' norms and softmaxes stay in float32 here, as they are."""
    certificate = attribute(family, dtype=dtype).certificate
    assert certificate.checked_residual < CLOSE[dtype]
    if dtype != torch.bfloat16:  # where a row that reads next to nothing shows how the model rounds
        assert certificate.max_relative_residual < CLOSE[dtype]
    assert certificate.norm_residual < (1e-2 if dtype == torch.bfloat16 else 1e-6)
    assert certificate.embedding_residual < (1e-2 if dtype == torch.bfloat16 else 1e-6)
    assert certificate.median_relative_residual <= certificate.max_relative_residual
    assert certificate.column_residual < 5 * CLOSE[dtype]
    assert certificate.reconstruction_residual < CLOSE[dtype]
    assert len(certificate.layer_residuals) == N_LAYERS + 1
    assert max(certificate.layer_residuals) < CLOSE[dtype]
    assert certificate.holds
    assert certificate.model_dtype == str(dtype).removeprefix("torch.")
    assert certificate.dtype == ("float64" if dtype == torch.float64 else "float32")


@pytest.mark.parametrize("bias_node", [True, False])
@pytest.mark.parametrize("zero_bos", [True, False])
@pytest.mark.parametrize("clt", ["clt", "a far skip", "excludes two, with skips", "before the post-norm, with skips"])
def test_it_closes_whatever_is_asked(clt, zero_bos, bias_node):
    certificate = attribute("gemma2", clt, zero_bos=zero_bos, bias_node=bias_node).certificate
    assert certificate.holds
    assert certificate.max_relative_residual < 1e-10


def test_rows_are_what_the_certificate_says():
    graph = attribute("gemma3")
    rows = graph.of_kind("feature", "target")
    values = torch.tensor(graph.nodes["value"].to_numpy())[rows]
    edges = graph.adjacency[rows]
    residuals = (edges.sum(1) - values).abs() / edges.abs().sum(1)
    assert graph.certificate.max_relative_residual == pytest.approx(float(residuals.max()), abs=1e-14)
    assert len(graph.certificate.columns) == 3
    assert set(graph.certificate.columns) <= set(graph.nodes["id"][graph.nodes["kind"] == "feature"])
    assert attribute("gemma3", check_columns=0).certificate.columns == ()


# ---------------------------------------------------------------- faults

Patch = Callable[[pytest.MonkeyPatch], None]


def after(where: Any, name: str, change: Callable[..., Any]) -> Patch:
    """Change what a function returns: ``change(result, *its arguments)``."""

    def put(monkeypatch: pytest.MonkeyPatch) -> None:
        true = getattr(where, name)
        monkeypatch.setattr(where, name, lambda *args, **kwargs: change(true(*args, **kwargs), *args))

    return put


def in_layer(name: str, change: Callable[[Any], Any], layer: int = 1) -> Patch:
    """Change an attribute of one layer of the frozen map."""

    def fault(found: Any, *_: Any) -> Any:
        layers = list(found.layers)
        layers[layer] = replace(layers[layer], **{name: change(getattr(layers[layer], name))})
        return replace(found, layers=tuple(layers))

    return after(linear.FrozenMap, "of", fault)


def in_attention(name: str, change: Callable[[Tensor], Tensor]) -> Patch:
    """Change what was found of layer 1's attention module."""

    def fault(found: list[Any], *_: Any) -> list[Any]:
        found[1] = replace(found[1], **{name: change(getattr(found[1], name))})
        return found

    return after(linear, "value_outputs", fault)


def in_sources(name: str, change: Callable[[Any], Any]) -> Patch:
    return after(local, "sources_of", lambda found, *_: replace(found, **{name: change(getattr(found, name))}))


def scaled(value: Tensor, index: Any, by: float = 1.01) -> Tensor:
    """Return a copy in which one part is off by a hundredth."""
    value = value.clone()
    value[index] *= by
    return value


def shifted(value: Tensor, index: Any = (...,), by: float = 0.01) -> Tensor:
    value = value.clone()
    value[index] += by
    return value


def a_norm(name: str, index: int) -> Callable[[FrozenNorm], FrozenNorm]:
    def change(norm: FrozenNorm) -> FrozenNorm:
        value = getattr(norm, name)
        return replace(norm, **{name: scaled(value, (0, index) if name == "scale" else index)})

    return change


def a_decoder_row(rows: dict[int, Any]) -> dict[int, Any]:
    return rows | {1: replace(rows[1], rows=scaled(rows[1].rows, 0))}


def moved_between(found: Any, *_: Any) -> Any:
    """Put on the bias what belongs to the errors: sums stay as they are."""
    return replace(found, constants=shifted(found.constants, 1), errors=shifted(found.errors, 1, -0.01))


def a_skip(found: Any, *_: Any) -> Any:
    """Change one skip, and let errors make good for it."""
    skip = found.skips[1]
    wrong = replace(skip, weight=scaled(skip.weight, 0))
    return replace(found, skips=(found.skips[0], wrong, *found.skips[2:]))


def smaller_tokens(found: Any, *_: Any) -> Any:
    """Half of what tokens put in, as if a scale were missed; the rest passes for position embeddings."""
    return replace(found, embeddings=found.embeddings / 2, start=found.start + found.embeddings / 2)


def without_a_feature(found: Any, *_: Any) -> Any:
    """Miss an active feature."""
    names = ("group", "position", "latent", "activation", "pre_activation")
    return replace(found, **{name: torch.cat((getattr(found, name)[:4], getattr(found, name)[5:])) for name in names})


def a_wrong_fit(found: FrozenNorm, norm: nn.Module, *_: Any) -> FrozenNorm:
    """Fit every norm a little wrong."""
    return replace(found, gain=scaled(found.gain, 3))


def exchanged(found: Any, *_: Any) -> Any:
    """Let some features have each other's edges; a pair alone passes where its signs are equal in every run."""
    whole = found.whole.clone()
    whole[:, [3, 5, 8, 2, 11, 17, 20, 14]] = whole[:, [11, 17, 20, 14, 3, 5, 8, 2]]
    return replace(found, whole=whole)


def shuffled(found: Any, *_: Any) -> Any:
    whole, first, n = found.whole.clone(), len(found.nodes), (N_LAYERS + 1) * len(IDS)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    whole[:, first : first + n] = whole[:, first : first + n][:, order]
    return replace(found, whole=whole)


FAULTS: dict[str, tuple[Patch, str]] = {
    "a bias of attention's output": (in_attention("output_bias", shifted), "layer 1's attention"),
    "a bias of values": (in_attention("value_bias", lambda v: shifted(v, (0, 2))), "layer 1's attention"),
    "a head's output": (in_attention("W_O", lambda v: scaled(v, 1)), "layer 1's attention"),
    "a head's values": (in_attention("W_V", lambda v: scaled(v, (slice(None), 0))), "layer 1's attention"),
    "a pattern": (in_layer("pattern", lambda v: scaled(v, (0, 4, 2))), "layer 1's attention"),
    "a denominator before attention": (in_layer("key_scale", lambda v: scaled(v, 2)), "layer 1's attention"),
    "a constant": (in_layer("constant", lambda v: shifted(v, 5)), "layer 1's attention"),
    "a gain before an MLP": (in_layer("mlp_in", a_norm("gain", 3)), "the edges into 1_"),
    "a denominator before an MLP": (in_layer("mlp_in", a_norm("scale", 4)), "the edges into 1_"),
    "the final norm's gain": (
        after(linear.FrozenMap, "of", lambda f, *_: replace(f, final_norm=a_norm("gain", 3)(f.final_norm))),
        "the final norm or the unembedding",
    ),
    "a bias of an encoder": (
        after(local, "of_features", lambda f, *_: replace(f, constants=shifted(f.constants, 7))),
        "the edges into 0_",
    ),
    "a decoder row": (in_sources("rows", a_decoder_row), "what features and biases write is not"),
    "a bias of a decoder": (after(local, "sources_of", moved_between), "what features and biases write is not"),
    "a missed feature": (
        after(sources.ActiveFeatures, "of", without_a_feature),
        "what features and biases write is not",
    ),
    "an activation": (
        after(sources.ActiveFeatures, "of", lambda f, *_: replace(f, activation=scaled(f.activation, 3))),
        "what features and biases write is not",
    ),
    "edges of features exchanged": (after(edges, "all_edges", exchanged), "not what a direct run shows"),
    "edges of errors and embeddings shuffled": (after(edges, "all_edges", shuffled), "not what a direct run shows"),
    "a scale of the embedding": (after(local, "sources_of", smaller_tokens), "embedding"),
    "an error": (in_sources("errors", lambda v: scaled(v, (1, 4))), "the edges into 2_"),
    "an embedding": (in_sources("embeddings", lambda v: scaled(v, 3)), "the edges into 0_"),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_fails_and_is_named(fault, family, dtype, monkeypatch):
    put, place = FAULTS[fault]
    put(monkeypatch)
    with pytest.raises(CertificateError, match=place):
        attribute(family, dtype=dtype)


def test_logits_that_are_scaled_after_the_unembedding_fail():
    hf = model_of("llama")
    hook = hf.register_forward_hook(lambda module, args, out: out.__setitem__("logits", out.logits / 16))
    with pytest.raises(CertificateError, match="the recorded run is not the model's own"):
        attribute(hf=hf)
    hook.remove()


def test_an_attention_that_is_not_the_familys_eager_one_fails():
    """Recorded is the eager attention: a model that is set to another kind is to give the same logits."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    from clt_plugin.adapters._attention import eager

    def doubled(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        return eager(module)(module, query * 2, *args, **kwargs)

    AttentionInterface.register("doubled", doubled)
    AttentionMaskInterface.register("doubled", eager_mask)
    hf = model_of("llama", torch.float32)
    hf.set_attn_implementation("doubled")
    with pytest.raises(CertificateError, match="the recorded run is not the model's own"):
        attribute(hf=hf, dtype=torch.float32)


@pytest.mark.parametrize("clt", ["skips", "a far skip"])
def test_a_wrong_skip_fails(clt, monkeypatch):
    number = 1 if clt == "skips" else 2

    def wrong(found: list[Any], *_: Any) -> list[Any]:
        skip, constant = found[number]
        found[number] = (replace(skip, weight=scaled(skip.weight, 0)), constant)
        return found

    after(sources, "_skips", wrong)(monkeypatch)
    with pytest.raises(CertificateError):
        attribute("gpt2", clt)


def test_norms_that_are_fitted_wrong_fail(monkeypatch):
    """The recorded run goes by the fitted norms: that it is the model's own is to be seen too."""
    true = FrozenNorm.of

    def wrong(norm: nn.Module, *args: Any, **kwargs: Any) -> FrozenNorm:
        return a_wrong_fit(true(norm, *args, **kwargs), norm)

    monkeypatch.setattr(FrozenNorm, "of", wrong)
    with pytest.raises((CertificateError, FreezeError)):
        attribute("llama")


# ---------------------------------------------------------------- freezes


@pytest.mark.parametrize("part", ["_attend", "_normalise"])
def test_a_freeze_that_does_not_hold_fails(part, monkeypatch):
    """The direct run lets patterns, or denominators, follow what is added."""
    if part == "_attend":
        monkeypatch.setattr(
            Frozen, "_attend", lambda self, layer, module, *args, **kwargs: _live(self, layer, module, *args, **kwargs)
        )
    else:
        monkeypatch.setattr(Frozen, "_normalise", lambda self, name, norm, module, args, output: self._used.add(name))
    with pytest.raises(CertificateError, match="are not what a direct run shows"):
        attribute("gpt2")


def _live(frozen: Frozen, layer: int, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    from clt_plugin.adapters._attention import eager

    frozen._used.add(f"layer {layer}'s attention pattern")
    return eager(module)(module, *args, **kwargs)


def test_a_direct_run_without_any_freeze_fails(monkeypatch):
    monkeypatch.setattr(direct, "frozen_run", lambda *args, **kwargs: nullcontext())
    with pytest.raises(CertificateError, match="are not what a direct run shows"):
        attribute("gemma2")


def test_attention_that_does_not_ask_for_an_implementation_is_named():
    hf = model_of("llama")
    module = blocks_of(hf)[1].self_attn
    module.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    with pytest.raises(FreezeError, match="layer 1's attention"):
        attribute(hf=hf)
    del module.forward


QUERIES_AND_KEYS = {
    "gpt2": lambda attention: [attention.c_attn.weight[:, : 2 * 16], attention.c_attn.bias[: 2 * 16]],
    "gemma3": lambda attention: [
        getattr(attention, f"{which}_{what}").weight for which in "qk" for what in ("proj", "norm")
    ],
    "gpt_neox": lambda attention: [attention.query_key_value.weight.view(2, 3, 8, 16)[:, :2]],
    "gemma2": lambda attention: [attention.q_proj.weight, attention.k_proj.weight],
}


@pytest.mark.parametrize("family", QUERIES_AND_KEYS)
def test_queries_and_keys_do_not_matter_once_patterns_are_kept(family, monkeypatch):
    """They are changed as soon as the run is recorded: edges stay, and direct runs still agree."""
    before = attribute(family)
    hf, true, changed = model_of(family), linear.record, []

    def then_change(*args: Any, **kwargs: Any) -> Any:
        recording = true(*args, **kwargs)
        for block in blocks_of(hf):
            attention = getattr(block, {"gpt2": "attn", "gpt_neox": "attention"}.get(family, "self_attn"))
            for weights in QUERIES_AND_KEYS[family](attention):
                weights.add_(torch.randn_like(weights))
                changed.append(weights)
        return recording

    monkeypatch.setattr(linear, "record", then_change)
    # The model is not the recorded one any more, which would be noticed.
    monkeypatch.setattr(checks, "run_residual", lambda *_: 0.0)
    after_change = attribute(hf=hf)
    assert changed
    assert torch.equal(after_change.adjacency, before.adjacency)
    monkeypatch.undo()
    other = attribute(hf=hf)
    assert list(other.nodes["id"]) != list(before.nodes["id"]) or not torch.allclose(other.adjacency, before.adjacency)
