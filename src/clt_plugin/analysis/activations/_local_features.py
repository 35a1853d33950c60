"""The files in which circuit-tracer's viewer finds local features.

Two layouts, as its viewer of 2025 reads them:

- one file a layer, ``layer_{i}.bin``, of the features one after another, each as its length (four bytes, little-endian)
  and its JSON, gzipped; ``index.json.gz`` says for each layer the file's name and where each feature begins (and, last,
  where the file ends);
- one JSON file a feature, named by Cantor's pairing of layer and feature, the number that ``feature`` has in graph
  files.

A feature's JSON has ``top_logits`` and ``bottom_logits`` (texts), ``act_min`` and ``act_max``, and
``examples_quantiles``: named lists of examples with ``tokens``, ``tokens_acts_list``, ``train_token_ind`` (the most
active token's place) and ``is_repeated_datapoint``.
"""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clt_plugin.core import FormatError
from clt_plugin.core.aside import written_aside

if TYPE_CHECKING:
    from clt_plugin.analysis.activations.cards import FeatureBrowser, FeatureCard


def write_local_features(browser: FeatureBrowser, folder: Path, features: list[tuple[str, int]] | None) -> Path:
    """Write features for circuit-tracer's viewer; see the module for the two layouts.

    Args:
        browser: Where they are known.
        folder: Where to write.
        features: (group, latent) pairs, one JSON file each; None for all features, one file a layer.

    Raises:
        FormatError: A layer has several groups.
    """
    layers = browser.about["layers"]
    if len(set(layers.values())) < len(layers):
        raise FormatError("several groups are at home in one layer, and circuit-tracer names features by layer alone")
    if features is not None:
        for group, latent in features:
            layer = layers[str(group)]
            paired = (layer + latent) * (layer + latent + 1) // 2 + latent
            with written_aside(folder / f"{paired}.json") as aside:
                aside.write_text(json.dumps(_as_json(browser.card(group, latent))), encoding="utf-8")
        return folder
    index: dict[str, Any] = {}
    for group, size in browser.groups.items():
        name, offsets = f"layer_{layers[group]}.bin", [0]
        with written_aside(folder / name) as aside, open(aside, "wb") as file:
            for latent in range(size):
                data = gzip.compress(json.dumps(_as_json(browser.card(group, latent))).encode(), mtime=0)
                file.write(struct.pack("<I", len(data)) + data)
                offsets.append(file.tell())
        index[str(layers[group])] = {"filename": name, "offsets": offsets}
    with written_aside(folder / "index.json.gz") as aside:
        aside.write_bytes(gzip.compress(json.dumps(index).encode(), mtime=0))
    return folder


def _as_json(card: FeatureCard) -> dict[str, Any]:
    examples = [
        {
            "tokens": example["tokens"],
            "tokens_acts_list": [float(f"{value:.5g}") for value in example["activations"]],
            "train_token_ind": example["peak"],
            "is_repeated_datapoint": False,
        }
        for example in card.examples
    ]
    return {
        "index": card.latent,
        "top_logits": [token for token, _ in card.promoted],
        "bottom_logits": [token for token, _ in card.suppressed],
        "act_min": 0.0,
        "act_max": card.largest,
        "activation_frequency": card.density,
        "histogram": list(card.histogram),
        "examples_quantiles": [{"quantile_name": "Top activations", "examples": examples}],
    }
