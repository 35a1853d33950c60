"""The faithfulness report as one page of HTML that opens from disk: figures are inside it, and nothing is fetched."""

from __future__ import annotations

import base64
import html
import io
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clt_plugin.core.aside import written_aside

if TYPE_CHECKING:
    from clt_plugin.analysis.faithfulness.report import FaithfulnessReport

WHAT = {
    "Replacement": "How near the reconstruction is to what each MLP puts out: computed from the model's own run "
    "(local), and with every MLP replaced at once, where errors add up (global).",
    "Ablations against influence": "Features set to 0 one at a time in the model itself, everything after them free to "
    "respond. A graph that may be believed ranks them as the model does, and better than the baselines.",
    "Knock-on effects": "What ablating one feature does to others, against the graph's influence between them. Pairs "
    "that are mainly indirect are the hard test: direct edges are nearly forced to be confirmed.",
    "Hop-skip": "Which layers' latents write each layer's reconstruction. Where early layers write late ones, steps of "
    "the model may be skipped. Of per-layer transcoders it is 0.",
    "L0 by layer": "Late layers that are nearly silent, beside per-layer transcoders that are not, are the sign of "
    "depth collapse.",
    "Cumulative contribution": "How much of the likeliest token's circuit the features of the first layers do. A curve "
    "that is steeper than the PLT's is a warning.",
    "Handoffs": "What a layer's MLP wrote, taken out of what a later MLP reads and of nothing else. A replacement "
    "model that depends on fewer handoffs than the model skips steps.",
}

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .3rem; } p { max-width: 46rem; }
img { max-width: 100%; display: block; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .85rem; }
th, td { padding: .12rem .7rem; text-align: right; border-bottom: 1px solid #e4e4e4; }
th { font-weight: 600; } td:first-child, th:first-child { text-align: left; }
dt { font-weight: 600; } dd { margin: 0 0 .5rem; overflow-wrap: anywhere; } summary { cursor: pointer; color: #345; }
"""


def write_page(report: FaithfulnessReport, path: str | PathLike[str]) -> Path:
    """Write a report as one self-contained page.

    Args:
        report: The report.
        path: Of the page, which is replaced if it is there.

    Returns:
        The path.
    """
    about = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in report.about.items())
    findings = "".join(f"<li>{html.escape(each)}</li>" for each in report.findings())
    parts = "".join(_part(title, result) for title, result in report.parts().items())
    # Nothing may be fetched or run: figures are data, and there is no script.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    text = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>Faithfulness report</title><style>{STYLE}</style></head>\n"
        f"<body><h1>Faithfulness report</h1>\n<ul>{findings}</ul>\n<dl>{about}</dl>\n{parts}</body></html>\n"
    )
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")
    return Path(path)


def _part(title: str, result: Any) -> str:
    table = result.table.to_html(index=False, border=0, float_format="{:.4g}".format, na_rep="", escape=True)
    alt = html.escape(WHAT[title], quote=True)
    return (
        f"<section><h2>{html.escape(title)}</h2><p>{html.escape(WHAT[title])}</p>\n"
        f'<img alt="{alt}" src="data:image/svg+xml;base64,{_svg(result)}">\n'
        f"<details><summary>Numbers</summary>{table}</details></section>\n"
    )


def _svg(result: Any) -> str:
    """Return a result's figure as SVG in base64, the same bytes every time."""
    import matplotlib as mpl

    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "clt_plugin", "svg.fonttype": "path"}):
        result.plot().savefig(buffer, format="svg", metadata={"Date": None})
    return base64.b64encode(buffer.getvalue()).decode("ascii")
