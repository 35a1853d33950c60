"""What is known of every latent of a crosscoder: one file with random access by feature, and its readers.

The readers are `FeatureBrowser.card`, the graph page (`FeatureBrowser.info`), a static page (``to_html``) and the files
in which circuit-tracer's viewer finds local features (``to_circuit_tracer``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clt_plugin.analysis.activations._collect import PADDING
from clt_plugin.core import FormatError
from clt_plugin.core.aside import written_aside
from clt_plugin.core.files import File
from clt_plugin.training.evaluation import DENSE_ABOVE

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

KIND, VERSION = "clt_plugin feature browser", 1


@dataclass(frozen=True)
class FeatureCard:
    """What is known of one latent.

    Attributes:
        group: Its group's label: the layer at which it is read.
        latent: Its number there.
        tokens: On how many tokens it was active.
        density: On which share of them.
        mean: Its mean activation where active.
        largest: Its largest activation.
        histogram: How many activations lie in each of equally wide bins from 0 to ``range``.
        range: Where the histogram ends.
        examples: ``{"tokens": [...], "activations": [...], "peak": place of the most active token}``, the best first.
        promoted: (token, logit) of the tokens it promotes most, at unit activation; see `feature_browser`.
        suppressed: Likewise of those it suppresses.
    """

    group: str
    latent: int
    tokens: int
    density: float
    mean: float
    largest: float
    histogram: tuple[int, ...]
    range: float
    examples: tuple[Mapping[str, Any], ...]
    promoted: tuple[tuple[str, float], ...]
    suppressed: tuple[tuple[str, float], ...]

    @property
    def name(self) -> str:
        """``"{group}_{latent}"``, as graphs and top examples name it."""
        return f"{self.group}_{self.latent}"

    @property
    def top_tokens(self) -> list[tuple[str, float]]:
        """The tokens of its examples and the largest activation on each, the largest first."""
        best: dict[str, float] = {}
        for example in self.examples:
            for token, value in zip(example["tokens"], example["activations"], strict=True):
                if value > best.get(token, 0.0):
                    best[token] = value
        return sorted(best.items(), key=lambda item: -item[1])

    def __str__(self) -> str:
        lines = [f"{self.name}: active on {self.tokens} tokens ({self.density:.3%}), largest {self.largest:.3g}"]
        for what, pairs in (("promotes", self.promoted), ("suppresses", self.suppressed)):
            lines.append(f"  {what} {', '.join(repr(token) for token, _ in pairs) or 'nothing known'}")
        for example in self.examples:
            parts = [f"«{t}»" if i == example["peak"] else t for i, t in enumerate(example["tokens"])]
            lines.append("    " + "".join(parts).replace("\n", "⏎"))
        return "\n".join(lines)


class FeatureBrowser:
    """What is known of every latent of a crosscoder; made by `feature_browser` or `FeatureBrowser.load`.

    Attributes:
        about: Plain data: the groups with their sizes, how many tokens were read, and the settings.
    """

    def __init__(self, about: Mapping[str, Any], tensors: Mapping[str, Tensor] | File) -> None:
        self.about = about
        self._tensors = tensors
        self._mapped: dict[str, Tensor] = {}

    # ---------------------------------------------------------------- files

    @classmethod
    def load(cls, path: str | PathLike[str]) -> FeatureBrowser:
        """Open a file of `save`; only the features that are asked for are read.

        Raises:
            FormatError: It is no such file, or damaged.
        """
        from safetensors import SafetensorError, safe_open

        file = File(str(path))
        file.header()
        try:
            with safe_open(str(path), framework="pt") as opened:
                metadata = opened.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise FormatError(f"{file} cannot be read ({error}): make it again") from error
        if metadata.get("kind") != KIND:
            raise FormatError(f"{file} is no feature browser's file: make one with feature_browser(...).save(path)")
        about = json.loads(metadata["about"])
        if about["version"] != VERSION:
            raise FormatError(f"{file} is of version {about['version']}, but this is version {VERSION}: make it again")
        return cls(about, file)

    def save(self, path: str | PathLike[str]) -> Path:
        """Write all of it into one safetensors file, which replaces what is there; return its path."""
        from safetensors.torch import save_file

        if isinstance(self._tensors, File):
            raise FormatError(f"these features are in {self._tensors} already: copy the file")
        tensors = {name: tensor.contiguous() for name, tensor in self._tensors.items()}
        with written_aside(path) as aside:
            save_file(tensors, aside, metadata={"kind": KIND, "about": json.dumps(self.about)})
        return Path(path)

    # ---------------------------------------------------------------- features

    @property
    def groups(self) -> dict[str, int]:
        """How many latents each group has, by label."""
        return dict(self.about["groups"])

    def card(self, group: int | str, latent: int) -> FeatureCard:
        """Return what is known of one latent.

        Args:
            group: Its group's label, or its layer.
            latent: Its number.

        Raises:
            FormatError: There is no such latent.
        """
        label, size = str(group), self.groups.get(str(group))
        if size is None or not 0 <= latent < size:
            raise FormatError(f"there is no feature {label}.{latent}: the groups are {self.groups}")
        one = {name: self._all(f"{label}.{name}")[latent] for name in TENSORS if self._has(f"{label}.{name}")}
        tokens = int(one["tokens"])
        words = {
            name: tuple((self.token(int(i)), float(v)) for i, v in zip(one[name], one[f"{name}_logits"], strict=True))
            if name in one
            else ()
            for name in ("promoted", "suppressed")
        }
        return FeatureCard(
            group=label,
            latent=latent,
            tokens=tokens,
            density=tokens / self.about["n_tokens"],
            mean=float(one["total"]) / tokens if tokens else 0.0,
            largest=float(one["largest"]),
            histogram=tuple(one["histogram"].tolist()),
            range=float(one["range"]),
            examples=tuple(
                self._example(*each) for each in zip(one["peaks"], one["windows"], one["activations"], strict=True)
                if float(each[0]) > 0
            ),
            **words,
        )  # fmt: skip

    def token(self, number: int) -> str:
        """Return a token as text; its number where the model had no tokenizer."""
        return self._vocabulary[number] if self._vocabulary else str(number)

    def info(self, features: Any) -> dict[str, dict[str, Any]]:
        """Return what the graph page shows of features: ``graph.to_html(path, feature_info=browser.info(graph))``.

        Args:
            features: A `Graph`, for all of its features, or (group, latent) pairs.
        """
        cards = [self.card(group, latent) for group, latent in _pairs(features)]
        return {
            card.name: {
                "top_tokens": [[token, value] for token, value in card.top_tokens[:10]],
                "examples": [
                    {"tokens": example["tokens"], "activations": example["activations"]} for example in card.examples
                ],
            }
            for card in cards
        }

    def density(self, group: int | str) -> Tensor:
        """Return the share of tokens on which each latent of a group was active, (F,)."""
        return self._all(f"{group}.tokens").double() / self.about["n_tokens"]

    @property
    def table(self) -> pd.DataFrame:
        """One row for each group: latents, the shares that are dead and dense, the median density of the others."""
        import pandas

        rows = []
        for group, size in self.groups.items():
            density = self.density(group)
            alive = density[density > 0]
            rows.append(
                {
                    "group": group,
                    "latents": size,
                    "dead": float((density == 0).double().mean()),
                    "dense": float((density > DENSE_ABOVE).double().mean()),
                    "median_density": float(alive.median()) if len(alive) else float("nan"),
                    "l0": float(density.sum()),
                }
            )
        return pandas.DataFrame(rows)

    def plot(self) -> Figure:
        """Draw how densities are distributed, one line a group."""
        from clt_plugin.report.densities import plot_densities

        return plot_densities({group: self.density(group) for group in self.groups}, self.about["n_tokens"])

    # ---------------------------------------------------------------- for other readers

    def to_html(
        self, path: str | PathLike[str], features: Any = None, *, n: int = 50, seed: int = 0, title: str | None = None
    ) -> Path:
        """Write a static page of some features: examples, histogram, tokens promoted and suppressed.

        Args:
            path: Of the page, which is replaced if it is there.
            features: A `Graph`, or (group, latent) pairs; by default some of those that are alive, drawn at random.
            n: How many are drawn.
            seed: Of the drawing.
            title: Of the page.

        Returns:
            The path.
        """
        from clt_plugin.report.browser_page import write_browser_page

        pairs = self.drawn(n, seed) if features is None else _pairs(features)
        return write_browser_page([self.card(*pair) for pair in pairs], self.about, path, title)

    def to_circuit_tracer(self, folder: str | PathLike[str], features: Any = None) -> Path:
        """Write the files that circuit-tracer's viewer reads for local features.

        Args:
            folder: Made if it is not there; hand it to circuit-tracer's ``serve`` as ``features_dir``.
            features: A `Graph` or (group, latent) pairs, each then a JSON file named by its number in graph files, as
                older viewers and other tools want it; by default all features, in one file a layer and an index.

        Returns:
            The folder.

        Raises:
            FormatError: A layer has several groups, for which the viewer has no names.
        """
        from clt_plugin.analysis.activations._local_features import write_local_features

        return write_local_features(self, Path(folder), None if features is None else list(_pairs(features)))

    def drawn(self, n: int, seed: int = 0) -> list[tuple[str, int]]:
        """Return some features that are alive, drawn at random from all alike, in order."""
        alive = [(group, i) for group in self.groups for i in (self.density(group) > 0).nonzero()[:, 0].tolist()]
        order = torch.randperm(len(alive), generator=torch.Generator().manual_seed(seed))[:n].sort().values
        return [alive[i] for i in order.tolist()]

    # ---------------------------------------------------------------- inside

    def _has(self, name: str) -> bool:
        return name in self.about["tensors"]

    def _all(self, name: str) -> Tensor:
        """Return a tensor; of a file it is mapped into memory, and only what is looked at is read."""
        if not isinstance(self._tensors, File):
            return self._tensors[name]
        if name not in self._mapped:
            self._mapped[name] = self._tensors.tensor(name)
        return self._mapped[name]

    @cached_property
    def _vocabulary(self) -> list[str]:
        if not self._has("vocabulary.ends"):
            return []
        data, ends = bytes(self._all("vocabulary.bytes").tolist()), self._all("vocabulary.ends").tolist()
        return [data[start:end].decode("utf-8") for start, end in pairwise([0, *ends])]

    def _example(self, peak: Tensor, window: Tensor, activations: Tensor) -> dict[str, Any]:
        there = (window != PADDING).nonzero()[:, 0]
        values = (activations.float() * float(peak))[there].tolist()
        centre = int((there == len(window) // 2).nonzero()[0, 0])
        # What is stored has three digits; the peak itself has all.
        values[centre] = float(peak)
        return {"tokens": [self.token(int(i)) for i in window[there]], "activations": values, "peak": centre}

    def __repr__(self) -> str:
        return f"<FeatureBrowser of {sum(self.groups.values())} features, {self.about['n_tokens']} tokens>"


TENSORS = (
    "tokens", "total", "largest", "range", "histogram", "peaks", "windows", "activations",
    "promoted", "promoted_logits", "suppressed", "suppressed_logits",
)  # fmt: skip
"""What is kept of each group, one row a latent, under ``{label}.{name}``; the last four where they are known."""


def _pairs(features: Any) -> Iterable[tuple[str, int]]:
    nodes = getattr(features, "nodes", None)
    if nodes is None:
        return [(str(group), int(latent)) for group, latent in features]
    rows = nodes[nodes["kind"] == "feature"]
    return list(dict.fromkeys(zip(rows["group"], rows["feature"].tolist(), strict=True)))
