"""A static page of features: where each is active, how its activations are distributed, and what it promotes.

Plain HTML without scripts: it opens from disk, with no network and no server.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from itertools import groupby
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clt_plugin.core.aside import written_aside

if TYPE_CHECKING:
    from clt_plugin.analysis.activations.cards import FeatureCard

_STYLE = """
:root { color-scheme: light; font: 14px/1.45 system-ui, sans-serif; color: #222; background: #fff; }
body { max-width: 72rem; margin: 1.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.3rem; margin: 0 0 .2rem; }
nav { font-size: .85rem; margin: .6rem 0 1rem; }
nav a { margin-right: .5rem; }
article { border-top: 1px solid #ddd; padding: .8rem 0; display: grid; grid-template-columns: 15rem 1fr; gap: 1rem; }
article h2 { font-size: 1rem; margin: 0 0 .3rem; }
.about, .words { font-size: .8rem; color: #555; }
.words b { font-weight: 600; color: #333; }
.words span { background: #eef3fb; border-radius: 3px; padding: 0 .2rem; white-space: pre; display: inline-block; }
.words .down span { background: #fbeeee; }
.passage { font: 12px/1.6 ui-monospace, monospace; white-space: pre-wrap; margin: .15rem 0; }
.passage i { font-style: normal; color: #888; margin-right: .5rem; }
.passage mark { color: inherit; border-radius: 2px; }
.passage .peak { outline: 1px solid #b35a00; }
svg { display: block; margin-top: .4rem; }
@media (max-width: 45rem) { article { grid-template-columns: 1fr; } }
"""


def write_browser_page(
    cards: Sequence[FeatureCard], about: Mapping[str, Any], path: str | PathLike[str], title: str | None = None
) -> Path:
    """Write features as one self-contained HTML page.

    Args:
        cards: What to show, in this order.
        about: What the browser says of itself.
        path: Of the page, which is replaced if it is there.
        title: Of the page.

    Returns:
        The path.
    """
    shown = html.escape(title or f"Features of {about['crosscoder']}")
    total = sum(about["groups"].values())
    of = f" of {html.escape(about['model'])}" if about["model"] else ""
    links = []
    for group, members in groupby(cards, key=lambda card: card.group):
        names = " ".join(f'<a href="#f{c.name}">{c.latent}</a>' for c in members)
        links.append(f"<div>group {html.escape(group)}: {names}</div>")
    body = "\n".join(_article(card) for card in cards)
    text = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{shown}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{shown}</h1>\n"
        f'<div class="about">{len(cards):,} of {total:,} features{of}, over {about["n_tokens"]:,} tokens</div>\n'
        f"<nav>{''.join(links)}</nav>\n{body}\n</body>\n</html>\n"
    )
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")
    return Path(path)


def _article(card: FeatureCard) -> str:
    passages = "\n".join(_passage(example, card.largest) for example in card.examples)
    words = "".join(
        f'<div class="{side}"><b>{what}</b> {_words(pairs)}</div>'
        for side, what, pairs in (("up", "promotes", card.promoted), ("down", "suppresses", card.suppressed))
        if pairs
    )
    return (
        f'<article id="f{html.escape(card.name)}"><div><h2>{html.escape(card.group)}.{card.latent}</h2>'
        f'<div class="about">active on {card.tokens:,} tokens ({card.density:.3%})<br>'
        f"largest {card.largest:.3g}, mean {card.mean:.3g}</div>{_histogram(card)}"
        f'<div class="words">{words}</div></div><div>{passages or "never active"}</div></article>'
    )


def _words(pairs: Sequence[tuple[str, float]]) -> str:
    return " ".join(f'<span title="{value:+.3g}">{_visible(token)}</span>' for token, value in pairs)


def _passage(example: Mapping[str, Any], largest: float) -> str:
    parts = []
    for place, (token, value) in enumerate(zip(example["tokens"], example["activations"], strict=True)):
        text = _visible(token)
        if value > 0:
            shade = f"background:rgba(255,140,0,{0.85 * value / largest:.2f})"
            peak = ' class="peak"' if place == example["peak"] else ""
            text = f'<mark{peak} style="{shade}" title="{value:.3g}">{text}</mark>'
        parts.append(text)
    return f'<div class="passage"><i>{example["activations"][example["peak"]]:.3g}</i>{"".join(parts)}</div>'


def _visible(token: str) -> str:
    return html.escape(token).replace("\n", "↵").replace("\t", "→")


def _histogram(card: FeatureCard) -> str:
    """Return the histogram as a picture: bars of equal width up to its range, heights by the square root of counts."""
    largest, width, height = max(card.histogram, default=0), 160, 36
    if not largest:
        return ""
    step = width / len(card.histogram)
    bars = "".join(
        f'<rect x="{i * step:.1f}" y="{height - bar:.1f}" width="{step - 0.5:.1f}" height="{bar:.1f}"/>'
        for i, count in enumerate(card.histogram)
        if (bar := height * (count / largest) ** 0.5) > 0
    )
    return (
        f'<svg width="{width}" height="{height + 12}" role="img" aria-label="histogram of activations" fill="#4c78a8">'
        f'{bars}<text x="0" y="{height + 11}" font-size="9" fill="#777">0</text>'
        f'<text x="{width}" y="{height + 11}" font-size="9" fill="#777" text-anchor="end">{card.range:g}</text></svg>'
    )
