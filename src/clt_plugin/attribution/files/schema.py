"""The schema of the graph files that Neuronpedia and circuit-tracer's viewer read, as far as it is known.

Neuronpedia publishes a JSON schema with its source; what is here was written from its facts and is stricter where the
viewers rely on more than it says: ids have a known form, supernodes are lists of strings, and nothing is infinite.
"""

from __future__ import annotations

from typing import Any

FEATURE, ERROR, EMBEDDING, LOGIT, BIAS = (
    "cross layer transcoder",
    "mlp reconstruction error",
    "embedding",
    "logit",
    "bias",
)
"""The values of a node's ``feature_type``; viewers know the first four and draw others as features."""

_TEXT = {"type": "string"}
_SHARE = {"type": "number", "minimum": 0, "maximum": 1}


def _object(required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required.split()}


def _list(items: Any) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _node(feature_type: str, node_id: str, **more: Any) -> dict[str, Any]:
    """Return what a node of one type has to look like."""
    return {
        "if": _object("feature_type", feature_type={"const": feature_type}),
        "then": {"properties": {"node_id": {"type": "string", "pattern": f"^{node_id}$"}, **more}},
    }


_METADATA = _object(
    "slug scan prompt_tokens prompt",
    slug={"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]*$"},
    scan=_TEXT,
    prompt_tokens=_list(_TEXT),
    prompt=_TEXT,
    node_threshold=_SHARE,
    schema_version={"const": 1},
    transcoder_list=_list(_TEXT),
    info=_object(
        "",
        description=_TEXT,
        creator_name=_TEXT,
        creator_url=_TEXT,
        source_urls=_list(_TEXT),
        generator=_object("", name=_TEXT, version=_TEXT, url=_TEXT, email=_TEXT),
        create_time_ms={"type": "number"},
    ),
    generation_settings=_object(
        "",
        max_n_logits={"type": "integer"},
        desired_logit_prob={"type": "number"},
        batch_size={"type": "integer"},
        max_feature_nodes={"type": "integer"},
    ),
    pruning_settings=_object("", node_threshold=_SHARE, edge_threshold=_SHARE),
    feature_details=_object("", feature_json_base_url=_TEXT, neuronpedia_source_set=_TEXT),
)

_NODE = {
    **_object(
        "node_id feature layer ctx_idx feature_type jsNodeId clerp",
        node_id=_TEXT,
        feature={"type": ["integer", "null"]},
        layer={"type": ["string", "integer"]},
        ctx_idx={"type": "integer", "minimum": 0},
        feature_type={"enum": [FEATURE, ERROR, EMBEDDING, LOGIT, BIAS]},
        jsNodeId=_TEXT,
        clerp=_TEXT,
        influence={"type": ["number", "null"]},
        activation={"type": ["number", "null"]},
        token_prob={"type": "number"},
        is_target_logit={"type": "boolean"},
        run_idx={"type": "integer"},
        reverse_ctx_idx={"type": "integer"},
    ),
    "allOf": [
        _node(FEATURE, r".+_\d+_\d+", feature={"type": "integer", "minimum": 0}, layer={"pattern": r"^\d+$"}),
        _node(ERROR, r"\d+_-1_\d+", feature={"const": -1}, layer={"pattern": r"^\d+$"}),
        _node(EMBEDDING, r"E_\d+_\d+", layer={"const": "E"}),
        # The circuit-tracer viewer splits a logit's clerp at these marks, and stops where they are missing.
        _node(LOGIT, r"(\d+_\d+_\d+|target_.*)", clerp={"type": "string", "pattern": r'^Output ".*" \(p=[0-9.]+\)'}),
        _node(BIAS, "bias"),
    ],
}

GRAPH_SCHEMA: dict[str, Any] = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "title": "An attribution graph for Neuronpedia and circuit-tracer's viewer",
    **_object(
        "metadata qParams nodes links",
        metadata=_METADATA,
        qParams=_object(
            "",
            pinnedIds=_list(_TEXT),
            supernodes=_list({"type": "array", "items": _TEXT, "minItems": 2}),
            linkType=_TEXT,
            clickedId=_TEXT,
            sg_pos=_TEXT,
        ),
        nodes=_list(_NODE),
        links=_list(_object("source target weight", source=_TEXT, target=_TEXT, weight={"type": "number"})),
    ),
}
"""JSON schema (draft 7) of what `to_json` writes."""
