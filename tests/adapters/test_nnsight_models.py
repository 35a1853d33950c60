"""Every way to have a model in nnsight, and every way to hold a crosscoder: dtypes, lazy weights, late dispatch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

import clt_plugin as cp
from support.crosscoders import make_clt
from support.models import FAMILIES, N_LAYERS, make_model, make_tokenizer, nnsight_model
from support.reference import reference_run
from support.tracing import POINTS, Fingerprint, assert_close, assert_points, read_points, token_ids

REPLACING = ["replace", "replace_with_error"]


# ---------------------------------------------------------------- wrappers and families


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str) -> None:
    clt, model, ids = make_clt(), nnsight_model(family), token_ids()
    edit = lambda layer, acts: acts * 2 if layer == 1 else acts  # noqa: E731
    expected = reference_run(make_model(family), ids, clt, "replace_with_error", edit=edit)
    with model.trace(ids):
        model.add_clt(clt, "replace_with_error")
        model.clt.layers[1].features.output *= 2
        logits = model.output.logits.save()
    assert_close(logits, expected["logits"])


@pytest.mark.parametrize("mode", REPLACING)
def test_a_plain_nnsight_model(mode: str) -> None:
    from nnsight import NNsight

    clt, ids = make_clt(), token_ids()
    model = NNsight(make_model("gpt2"))
    expected = reference_run(make_model("gpt2"), ids, clt, mode)
    before = Fingerprint(model)
    handle = model.add_clt(clt, mode)
    with model.trace(ids):
        seen = read_points(model.clt, mode).save()
        logits = model.output.logits.save()
    assert_points(seen, expected)
    assert_close(logits, expected["logits"])
    handle.remove()
    before.assert_unchanged()


@pytest.mark.filterwarnings("ignore:LanguageModel is deprecated")
def test_a_language_model() -> None:
    from nnsight import LanguageModel

    clt, ids = make_clt(), token_ids()
    model = LanguageModel(make_model("gpt2"), tokenizer=make_tokenizer())
    expected = reference_run(make_model("gpt2"), ids, clt)
    model.add_clt(clt)
    with model.trace(ids):
        seen = read_points(model.clt, "replace").save()
        logits = model.output.logits.save()
    assert_points(seen, expected)
    assert_close(logits, expected["logits"])


@pytest.mark.parametrize("mode", REPLACING)
@pytest.mark.parametrize("wrapper", ["NNsight", "TransformersModel"])
def test_a_base_model_without_a_head(wrapper: str, mode: str) -> None:
    import nnsight

    clt, ids, plain = make_clt(exclude_first=1), token_ids(), make_model("gpt2").transformer
    expected = reference_run(plain, ids, clt, mode)
    base = make_model("gpt2").transformer
    if wrapper == "NNsight":
        model = nnsight.NNsight(base)
    else:
        model = nnsight.TransformersModel(base, tokenizer=make_tokenizer(), task="feature-extraction")
    model.add_clt(clt, mode)
    with model.trace(ids):
        seen = read_points(model.clt, mode).save()
        hidden = model.output.last_hidden_state.save()
    assert_points(seen, expected)
    assert_close(hidden, expected["logits"])


def test_under_names_of_the_users_own() -> None:
    from nnsight.modeling.transformers import TransformersModel

    clt, ids = make_clt(), token_ids()
    rename = {"transformer.h": "layers", "mlp": "feed_forward"}
    model = TransformersModel(make_model("gpt2"), tokenizer=make_tokenizer(), rename=rename)
    expected = reference_run(make_model("gpt2"), ids, clt)
    model.add_clt(clt, name="crosscoder")
    with model.trace(ids):
        acts = model.crosscoder.layers[1].features.output.save()
        y = model.layers[1].feed_forward.output.save()
        logits = model.output.logits.save()
    assert_close(acts, expected["features"][1])
    assert_close(y, expected["recon"][1])
    assert_close(logits, expected["logits"])


@pytest.mark.parametrize("text", ["w2 w3 w4", ["w2 w3 w4", "w5 w6 w7"]])
def test_text_and_lists_of_text(text: str | list[str]) -> None:
    clt, model = make_clt(), nnsight_model("llama")
    ids = make_tokenizer()(text if isinstance(text, list) else [text], return_tensors="pt")["input_ids"]
    model.add_clt(clt)
    with model.trace(text):
        logits = model.output.logits.save()
    assert_close(logits, reference_run(make_model("llama"), ids, clt)["logits"])


# ---------------------------------------------------------------- late dispatch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model saved as from_pretrained reads it."""
    path = tmp_path_factory.mktemp("tiny-gpt2")
    make_model("gpt2").save_pretrained(path)
    return path


def undispatched(folder: Path):
    from nnsight.modeling.transformers import TransformersModel

    return TransformersModel(str(folder), task="text-generation", tokenizer=make_tokenizer())


@pytest.mark.parametrize("how", ["a trace", "dispatch()"])
def test_added_before_dispatch(folder: Path, how: str) -> None:
    clt, ids, model = make_clt(), token_ids(), undispatched(folder)
    expected = reference_run(make_model("gpt2"), ids, clt)
    handle = model.add_clt(clt)
    assert not model.dispatched
    if how == "dispatch()":
        model.dispatch()
    for _ in range(2):
        with model.trace(ids):
            seen = read_points(model.clt, "replace").save()
            logits = model.output.logits.save()
        assert_points(seen, expected)
        assert_close(logits, expected["logits"])
    assert model.dispatched
    handle.remove()
    with model.trace(ids):
        logits = model.output.logits.save()
    assert_close(logits, make_model("gpt2")(ids).logits)
    assert not hasattr(model, "clt")


def test_the_first_line_of_the_trace_that_dispatches(folder: Path) -> None:
    clt, ids, model = make_clt(), token_ids(), undispatched(folder)
    with model.trace(ids):
        model.add_clt(clt)
        logits = model.output.logits.save()
    assert_close(logits, reference_run(make_model("gpt2"), ids, clt)["logits"])


@pytest.mark.parametrize("mode", POINTS)
def test_a_scan_shows_the_shapes_of_points(folder: Path, mode: str) -> None:
    clt, ids, model = make_clt(exclude_first=1), token_ids(), undispatched(folder)
    model.add_clt(clt, mode)
    with model.scan(ids):
        shape = model.clt.layers[N_LAYERS - 1].features.output.shape.save()
        logits = model.output.logits.shape.save()
    assert tuple(shape) == (*ids.shape, clt.n_latents)
    assert logits[:2] == ids.shape
    assert not model.dispatched


# ---------------------------------------------------------------- dtypes


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_a_float32_crosscoder_in_a_bfloat16_model(family: str) -> None:
    clt, ids, hf = make_clt(), token_ids(), make_model(family, torch.bfloat16)
    model = nnsight_model(make_model(family, torch.bfloat16))
    plain = hf(ids).logits
    for mode in REPLACING:
        expected = reference_run(hf, ids, clt, mode)
        with model.trace(ids):
            model.add_clt(clt, mode)
            seen = read_points(model.clt, mode).save()
            logits = model.output.logits.save()
        assert logits.dtype == torch.bfloat16
        assert seen["enc_in"][0].dtype == torch.bfloat16
        assert {seen[point][0].dtype for point in seen if point != "enc_in"} == {torch.float32}
        assert_close(seen["features"][0], expected["features"][0])
        assert_close(logits, expected["logits"], mode, tolerance=2e-2)
    assert_close(logits, plain, "without an edit", tolerance=1e-2)


@pytest.mark.parametrize("mode", REPLACING)
def test_a_bfloat16_crosscoder_in_a_float32_model(mode: str) -> None:
    clt, ids, model = make_clt(dtype=torch.bfloat16), token_ids(), nnsight_model("gpt2")
    expected = reference_run(make_model("gpt2"), ids, clt, mode)
    model.add_clt(clt, mode)
    with model.trace(ids):
        acts = model.clt.layers[1].features.output.save()
        logits = model.output.logits.save()
    assert acts.dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    assert_close(logits, expected["logits"], tolerance=5e-2)
    if mode == "replace_with_error":
        assert_close(logits, make_model("gpt2")(ids).logits, "the error is exact in float32")


def test_a_float64_model_stays_exact() -> None:
    clt, ids = make_clt(), token_ids()
    hf, model = make_model("gpt2", torch.float64), nnsight_model(make_model("gpt2", torch.float64))
    model.add_clt(clt, "replace_with_error")
    with model.trace(ids):
        logits = model.output.logits.save()
    assert logits.dtype == torch.float64
    assert_close(logits, hf(ids).logits)


# ---------------------------------------------------------------- where the weights are


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clt")
    make_clt(activation="jumprelu").save(path / "clt")
    return path / "clt"


@pytest.mark.parametrize("mode", POINTS)
def test_lazily_read_weights(saved: Path, mode: str) -> None:
    clt, ids, model = make_clt(activation="jumprelu"), token_ids(), nnsight_model("gpt2")
    expected = reference_run(make_model("gpt2"), ids, clt, mode)
    lazy = cp.load(saved, lazy=True)
    assert lazy.is_lazy
    model.add_clt(lazy, mode)
    with model.trace(ids):
        seen = read_points(model.clt, mode).save()
        logits = model.output.logits.save()
    assert_points(seen, expected)
    assert_close(logits, expected["logits"])


def test_gradients_through_lazily_read_weights(saved: Path) -> None:
    gradients: list[Tensor] = []
    for lazy in (False, True):
        ids, model = token_ids(), nnsight_model("gpt2")
        model.add_clt(cp.load(saved, lazy=lazy).requires_grad_(False))
        with model.trace(ids):
            acts = model.clt.layers[0].features.output.requires_grad_()
            loss = model.output.logits[:, -1, 5].sum()
            with loss.backward():
                gradient = acts.grad.save()
        gradients.append(gradient)
    assert gradients[0].any()
    assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("where", ["before", "first line"])
def test_a_folder_instead_of_a_crosscoder(saved: Path, where: str) -> None:
    clt, ids, model = make_clt(activation="jumprelu"), token_ids(), nnsight_model("gpt2")
    if where == "before":
        model.add_clt(str(saved))
    with model.trace(ids):
        if where == "first line":
            model.add_clt(saved)
        logits = model.output.logits.save()
    assert_close(logits, reference_run(make_model("gpt2"), ids, clt)["logits"])


def test_a_crosscoder_in_training_with_dropout_free_model() -> None:
    # Nothing of the crosscoder's mode leaks into the model: a TopK in training is the same TopK.
    clt, ids = make_clt(activation="topk", k=4).train(), token_ids()
    model = nnsight_model("gpt2")
    model.add_clt(clt)
    with model.trace(ids):
        logits = model.output.logits.save()
    assert_close(logits, reference_run(make_model("gpt2"), ids, clt)["logits"])
    assert not model._module.training
    assert clt.training


def test_the_model_needs_a_config() -> None:
    from nnsight import NNsight

    with pytest.raises(cp.AttachError, match="config"):
        NNsight(torch.nn.Sequential(torch.nn.Linear(3, 3))).add_clt(make_clt())
    assert transformers.__version__
