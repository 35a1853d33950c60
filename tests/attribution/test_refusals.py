"""What cannot be is refused in a line; what can be is taken in whatever form it comes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers

import clt_plugin as cp
from clt_plugin import AttachError
from clt_plugin.attribution import GraphError, difference, direction, feature, logit
from clt_plugin.interventions import EditError
from support.crosscoders import make_clt
from support.models import CONFIGS, D_MODEL, make_model, nnsight_model

IDS = [0, 5, 17, 33, 60]


@pytest.fixture(scope="module")
def hf():
    return make_model("gpt2")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"direction": "both"}, "direction must be"),
        ({"direction": "push", "max_feature_nodes": 5}, "leave out direction='push'"),
        ({"max_feature_nodes": 0}, "max_feature_nodes is a whole number of at least 1"),
        ({"max_n_logits": 0}, "max_n_logits is a whole number of at least 1"),
        ({"max_n_logits": 2.5}, "max_n_logits is a whole number"),
        ({"desired_logit_prob": math.nan}, "desired_logit_prob is a probability"),
        ({"desired_logit_prob": 2}, "desired_logit_prob is a probability"),
        ({"check_columns": -1}, "check_columns is a whole number of at least 0"),
        ({"dtype": torch.bfloat16}, "edges are computed in torch.float32 or torch.float64"),
        ({"devices": "nowhere"}, "devices are such as"),
        ({"targets": []}, "targets= is empty"),
        ({"targets": 1000}, "there is no token 1000"),
        ({"targets": True}, "a target is a token, or made by"),
        ({"targets": "w5"}, "there is no tokenizer"),
        ({"targets": [5, 5]}, "two targets are the same"),
        ({"targets": logit(5, weight=-1.0)}, "weight is a number above 0"),
        ({"targets": logit(5, position=9)}, "there is no position 9"),
        ({"targets": logit(5, position=0.5)}, "a position is a whole number"),
        ({"targets": difference(5, 5)}, "two different tokens"),
        ({"targets": direction(torch.ones(3))}, "a direction has shape"),
        ({"targets": direction(torch.ones(D_MODEL), layer=7)}, "there is no layer 7"),
        ({"targets": direction(torch.ones(D_MODEL), site="nowhere")}, "has no site 'nowhere'"),
        ({"targets": feature(9, 0)}, "no features at layer 9"),
        ({"targets": feature(0, 99)}, "layer 0 has features 0-23"),
    ],
)
def test_settings_and_targets(hf, settings, words):
    with pytest.raises(GraphError, match=words):
        cp.attribute(hf, IDS, clt=make_clt(), **settings)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (None, "a prompt is text, or token ids"),
        ({1, 2}, "a prompt is text, or token ids"),
        (b"text", "a prompt is text, or token ids"),
        ([True, False], "a prompt is text, or token ids"),
        ([[0, 5], [0, 6]], "a graph is of one prompt"),
        ([0, 99], "there is no token 99"),
        ([0] * 65, "the model has 64 positions"),
        ("w5 w6", "no tokenizer"),
    ],
)
def test_prompts(hf, prompt, words):
    with pytest.raises((GraphError, EditError), match=words):
        cp.attribute(hf, prompt, clt=make_clt())


def test_crosscoders(hf):
    with pytest.raises(AttachError, match="pass clt="):
        cp.attribute(hf, IDS)
    with pytest.raises(GraphError, match="a selection of layers or features"):
        cp.attribute(hf, IDS, clt=make_clt().select(features={0: [1, 2]}))


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification"])
def test_heads_for_something_else(head):
    config = CONFIGS["llama"]()
    model = getattr(transformers, f"LlamaFor{head}")(config).eval()
    with pytest.raises(GraphError, match=f"this LlamaFor{head} has a head .*: load the model as a causal language"):
        cp.attribute(model, IDS, clt=make_clt())


def test_layers_that_round_what_they_read():
    model = make_model("llama")
    weight = model.model.layers[1].mlp.up_proj.weight
    model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with pytest.raises(GraphError, match=r"quantised to int8 \(model\.layers\.1\.mlp\.up_proj\).*; load"):
        cp.attribute(model, IDS, clt=make_clt())


def test_padding_is_refused():
    model = nnsight_model("llama")
    mask = torch.tensor([[0, 1, 1]])
    with pytest.raises(GraphError, match="no padding"):
        cp.attribute(model, {"input_ids": torch.tensor([[1, 0, 5]]), "attention_mask": mask}, clt=make_clt())


@pytest.mark.parametrize(
    "targets", [[5, 7], (5, 7), np.array([5, 7]), torch.tensor([5, 7]), iter([5, 7]), {5: 1, 7: 2}]
)
def test_targets_in_any_form(hf, targets):
    graph = cp.attribute(hf, IDS, targets, clt=make_clt())
    assert set(graph.nodes["token_id"][graph.nodes["kind"] == "target"]) == {5, 7}


def test_autocast_around_it_changes_nothing(hf):
    expected = cp.attribute(hf, IDS, clt=make_clt()).adjacency
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = cp.attribute(hf, IDS, clt=make_clt()).adjacency
    assert torch.equal(found, expected)


@pytest.mark.parametrize("settings", [{}, {"max_feature_nodes": 20}, {"zero_bos": True}])
def test_without_the_bias_node_its_edges_count_as_omitted(hf, settings):
    graph = cp.attribute(hf, IDS, clt=make_clt(), bias_node=False, **settings)
    rows = graph.of_kind("feature", "target")
    sums = graph.adjacency.double().sum(1)[rows] + torch.tensor(graph.nodes["omitted"].to_numpy())[rows]
    values = torch.tensor(graph.nodes["value"].to_numpy())[rows]
    torch.testing.assert_close(sums, values, rtol=1e-4, atol=1e-4)
