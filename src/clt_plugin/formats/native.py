"""The native format: every wiring and activation, sliced by latent.

A folder with ``config.json`` (the wiring, widths, activation, host and a schema version), one shard a group,
``group_{g}.safetensors``, and ``shared.safetensors``::

    group_{g}        W_enc (F, sum of the widths read)     W_dec (F, sum of the widths written)     b_enc (F,)
                     threshold (F,) or ()                  decoder_norms (F,), where stored
    shared           b_dec.{w} (d,)                        W_skip.{n} (d_read, d_write)

Encoders are stored latents first, so that a few encoder vectors are a few rows.
"""

from __future__ import annotations

import json
import os
from typing import Any

from torch import Tensor

from clt_plugin.core import FORMATS, Activation, Crosscoder, FormatError, Host, Layout, Piece, Wiring, WiringError
from clt_plugin.core.errors import RegistryError
from clt_plugin.formats._description import Description
from clt_plugin.formats._files import Rows, decoder_rows, encoder_rows, plain, save_tensors, whole_folder
from clt_plugin.hub import Folder

SCHEMA_VERSION = 1
CONFIG, SHARED = "config.json", "shared.safetensors"


class Native:
    """Reads and writes the native format."""

    name = "native"

    def sniff(self, folder: Folder) -> bool:
        """Whether a folder is in this format."""
        return CONFIG in folder and folder.json(CONFIG).get("format") == "clt_plugin"

    def describe(self, folder: Folder) -> Description:
        """Say which tensor lies where."""
        config = folder.json(CONFIG)
        version = config.get("schema_version")
        if version != SCHEMA_VERSION:
            raise FormatError(
                f"{folder.label}/{CONFIG} has schema version {version!r}; this release reads version {SCHEMA_VERSION}: "
                "update clt_plugin, or save it again with the release that wrote it"
            )
        try:
            wiring = Wiring.from_dict(config["wiring"])
            sites = list(dict.fromkeys((*wiring.read_sites, *wiring.write_sites)))
            layout = Layout.of(wiring, dict(zip(sites, config["widths"], strict=True)))
            sizes = tuple(config["n_latents"])
            if len(sizes) != wiring.n_groups:
                raise ValueError(f"{wiring.n_groups} groups, but n_latents for {len(sizes)}")
            activation = Activation.make(**config["activation"])
            host = Host(**config["host"])
            extras = [key for key in ("threshold", "decoder_norms") if config[f"has_{key}"]]
        except (KeyError, TypeError, ValueError, WiringError, RegistryError) as error:
            raise FormatError(f"{folder.label}/{CONFIG} is not a crosscoder's config: {error}") from error
        weights: dict[tuple[str, int], tuple[Piece, ...]] = {}
        vectors = {}
        for g, n in enumerate(sizes):
            file = folder.file(_shard(g))
            weights["W_enc", g] = (Piece(file, "W_enc", (n, layout.read_width(g))),)
            weights["W_dec", g] = (Piece(file, "W_dec", (n, layout.write_width(g))),)
            vectors["b_enc", g] = Piece(file, "b_enc", (n,))
            for key in extras:
                shape = () if key == "threshold" and activation.has_batch_threshold else (n,)
                vectors["stored_norms" if key == "decoder_norms" else key, g] = Piece(file, key, shape)
        shared = folder.file(SHARED)
        for w, site in enumerate(wiring.write_sites):
            vectors["b_dec", w] = Piece(shared, f"b_dec.{w}", (layout.width[site],))
        for n, (read, write) in enumerate(wiring.skips):
            weights["W_skip", n] = (Piece(shared, f"W_skip.{n}", (layout.width[read], layout.width[write])),)
        return Description(
            folder.label,
            self.name,
            wiring,
            layout.width,
            sizes,
            activation,
            host,
            weights,
            vectors,
            metadata=config.get("metadata", {}),
            is_partial=bool(config.get("is_partial", False)),
        )

    def save(self, crosscoder: Crosscoder, folder: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write a folder, group by group; see `Crosscoder.save`."""
        threshold = crosscoder.threshold
        measured = threshold is not None and not any(bool(t.isnan().any()) for t in threshold)
        norms = crosscoder.stored_norms
        config = {
            "format": "clt_plugin",
            "schema_version": SCHEMA_VERSION,
            "wiring": crosscoder.wiring.to_dict(),
            "widths": [width for _, width in crosscoder.layout.widths],
            "n_latents": list(crosscoder.group_sizes),
            "activation": _activation(crosscoder),
            "has_threshold": measured,
            "has_decoder_norms": norms is not None,
            "host": crosscoder.host.to_dict(),
            "is_partial": crosscoder.is_partial,
            "metadata": plain(crosscoder.metadata, "metadata"),
        }
        with whole_folder(folder, overwrite) as aside:
            for g in range(crosscoder.wiring.n_groups):
                shard: dict[str, Tensor | Rows] = {
                    "W_enc": encoder_rows(crosscoder, g),
                    "W_dec": decoder_rows(crosscoder, g),
                    "b_enc": crosscoder.b_enc[g],
                }
                if threshold is not None and measured:
                    shard["threshold"] = threshold[g]
                if norms is not None:
                    shard["decoder_norms"] = norms[g]
                save_tensors(aside / _shard(g), shard)
            shared: dict[str, Tensor | Rows] = {f"b_dec.{w}": bias for w, bias in enumerate(crosscoder.b_dec)}
            for n in range(len(crosscoder.wiring.skips)):
                shared[f"W_skip.{n}"] = crosscoder.store.get("W_skip", n)
            save_tensors(aside / SHARED, shared)
            (aside / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _shard(group: int) -> str:
    return f"group_{group}.safetensors"


def _activation(crosscoder: Crosscoder) -> dict[str, Any]:
    data = crosscoder.activation.to_dict()
    return {"activation": data.pop("name"), **data}


FORMATS.add(Native.name, Native())
