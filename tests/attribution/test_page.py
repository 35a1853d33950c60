"""A graph's page: what is written into it, and what it does in a browser."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from attribution.graphs import make_certificate, make_graph
from clt_plugin.attribution.files.notes import with_notes
from clt_plugin.attribution.graph import Graph, GraphError
from clt_plugin.report.graph_page import write_page
from support.browser import browser, complaints, requests

ENTER, ESCAPE, UP, CONTROL, LET_GO = "\ue007", "\ue00c", "\ue013", "\ue009", "\ue000"
NASTY = (
    "</script><script>window.hit=1</script>",
    "<img src=x onerror='window.hit=1'>",
    " <b>&amp;",
    "\n\u2028",
    "{{data}}",
)


class Parts(HTMLParser):
    """What a browser would find in a page: its scripts, its data and its elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_data(self, text: str) -> None:
        if self.lasttag == "script" and self.scripts:
            attributes, before = self.scripts[-1]
            self.scripts[-1] = (attributes, before + text)


def data_of(path: Path) -> dict[str, Any]:
    (found,) = [text for attributes, text in Parts(path.read_text()).scripts if attributes.get("id") == "graph-data"]
    return json.loads(found, parse_constant=pytest.fail)


def nasty_graph() -> Graph:
    graph = make_graph(4, n_layers=3, n_positions=5, n_logits=3)
    tokens = graph.nodes["position"].map(lambda p: NASTY[p % len(NASTY)])
    info = replace(graph.info, prompt="".join(NASTY), tokens=NASTY, model_name="a/<i>b", settings={"<u>": "</script>"})
    return replace(graph, info=info, nodes=graph.nodes.assign(token=tokens))


# ---------------------------------------------------------------- what is written


def test_the_page_holds_the_graph(tmp_path: Path) -> None:
    graph = make_graph(1, n_layers=4, density=0.5, omitted=0.3)
    data = data_of(write_page(graph, tmp_path / "g.html"))
    pruned = graph.prune()
    ids = [node["id"] for node in data["nodes"]]
    for s, t, weight in zip(data["edges"]["source"], data["edges"]["target"], data["edges"]["weight"], strict=True):
        edge = float(pruned.adjacency[pruned.index(ids[t]), pruned.index(ids[s])])
        assert weight == pytest.approx(edge, rel=1e-6)
    inner = ~pruned.of_kind("bias")
    assert len(data["edges"]["weight"]) == int(pruned.adjacency[inner][:, inner].ne(0).sum())
    whole = float(graph.nodes["weight"].sum())
    influence = dict(zip(graph.nodes["id"], (graph.influence() / whole).tolist(), strict=True))
    sizes = graph.adjacency.abs().sum(1)
    for node in data["nodes"]:
        assert node["influence"] == pytest.approx(influence[node["id"]], rel=1e-6)
        assert node["input"] == pytest.approx(float(sizes[graph.index(node["id"])]), rel=1e-6)
    scores = graph.scores()
    assert [score["value"] for score in data["scores"]] == pytest.approx([scores.replacement, scores.completeness])


@pytest.mark.parametrize(("max_nodes", "max_edges"), [(1000, 50_000), (25, 50_000), (1000, 40), (0, 0)])
def test_what_a_node_says_adds_up_to_its_value(tmp_path: Path, max_nodes: int, max_edges: int) -> None:
    graph = make_graph(2, n_layers=4, omitted=0.3)
    data = data_of(write_page(graph, tmp_path / "g.html", max_nodes=max_nodes, max_edges=max_edges))
    sums = [node["bias"] + (node["omitted"] or 0.0) for node in data["nodes"]]
    for t, weight in zip(data["edges"]["target"], data["edges"]["weight"], strict=True):
        sums[t] += weight
    bias = graph.adjacency[:, graph.of_kind("bias")].sum(1)
    for node, total in zip(data["nodes"], sums, strict=True):
        assert node["bias"] == pytest.approx(float(bias[graph.index(node["id"])]), rel=1e-6)
        if node["kind"] in ("feature", "target"):
            assert total == pytest.approx(node["value"], abs=1e-5)
    kinds = [node["kind"] for node in data["nodes"]]
    assert (kinds.count("embedding"), kinds.count("target")) == (4, 2)
    assert len(kinds) <= max(max_nodes, 6)
    assert len(data["edges"]["weight"]) <= max_edges
    said = f"{len(kinds)} of {len(graph) - 1} nodes and {len(data['edges']['weight'])} of "
    assert said in data["note"]


def test_the_nodes_of_most_influence_are_kept_and_what_is_pinned(tmp_path: Path) -> None:
    graph = make_graph(2, n_layers=4)
    pruned = graph.prune(1.0, 1.0)
    inner = pruned.nodes[pruned.nodes["kind"].isin(["feature", "error"])].sort_values("influence")
    least, most = inner["id"].iloc[0], set(inner["id"].iloc[-13:])
    data = data_of(write_page(pruned, tmp_path / "g.html", max_nodes=20, pinned=[least]))
    kept = {node["id"] for node in data["nodes"] if node["kind"] in ("feature", "error")}
    assert kept == most | {least}
    assert data["pinned"] == [least]


def test_nothing_in_a_graph_is_taken_for_markup(tmp_path: Path) -> None:
    graph = nasty_graph()
    a, b = graph.nodes["id"][:2]
    graph = graph.with_label(a, "</script>").with_supernode("</title><script>", [a, b])
    info = {a: {"top_tokens": ["</script>"], "examples": ["<!--<script>"]}}
    path = write_page(graph, tmp_path / "g.html", feature_info=info, node_threshold=None, edge_threshold=None)
    text = path.read_text()
    parts = Parts(text)
    assert [attributes.get("type") for attributes, _ in parts.scripts] == ["application/json", None, None]
    assert "img" not in [tag for tag, _ in parts.elements]
    data = data_of(path)
    assert data["prompt"] == "".join(NASTY)
    assert data["labels"] == {a: "</script>"}
    assert data["features"][a] == {"top_tokens": ["</script>"], "examples": ["<!--<script>"]}
    # The only addresses that a browser would open are the policy's none at all.
    assert not [attributes for _, attributes in parts.elements if {"src", "href"} & set(attributes)]
    (policy,) = [a["content"] for _, a in parts.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "http" not in policy


def test_features_link_to_neuronpedia_where_the_set_is_known(tmp_path: Path) -> None:
    graph = make_graph(model_name="google/gemma-2-2b")
    path = tmp_path / "g.html"
    assert data_of(write_page(graph, path))["neuronpedia"] is None
    known = data_of(write_page(graph, path, source_set="clt-hp"))["neuronpedia"]
    assert known == {"before": "https://www.neuronpedia.org/gemma-2-2b/", "after": "-clt-hp/"}
    known = data_of(write_page(graph, path, source_set="a/../b", neuronpedia_model='x"y'))["neuronpedia"]
    assert known == {"before": "https://www.neuronpedia.org/x%22y/", "after": "-a%2F..%2Fb/"}


def test_a_certificate_that_fails_is_in_view(tmp_path: Path) -> None:
    graph = replace(make_graph(), certificate=make_certificate(max_relative_residual=0.5, checked_residual=0.5))
    certificate = data_of(write_page(graph, tmp_path / "g.html"))["certificate"]
    assert not certificate["holds"]
    assert certificate["residual"] == "5.0e-01"
    assert "0_1_1 do not add up" in certificate["failures"][0]


def test_what_cannot_be_shown_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    graph = make_graph()
    first = graph.nodes["id"][0]
    endless = graph.adjacency.clone()
    endless[-1, 0] = torch.nan
    cases: list[tuple[Graph, dict[str, Any], str]] = [
        (graph, {"pinned": ["x"]}, "no node 'x'"),
        (replace(graph, adjacency=endless), {}, "not finite"),
        (graph, {"feature_info": [first]}, "is a mapping by id"),
        (graph, {"feature_info": {first: ["a"]}}, "is a mapping with 'top_tokens'"),
        (graph, {"feature_info": {first: {"top_tokens": "abc"}}}, "top_tokens are several, in a list, not str"),
        (graph, {"feature_info": {first: {"top_tokens": [1]}}}, "pair of text and number"),
        (graph, {"feature_info": {first: {"top_tokens": [("a", "b")]}}}, "pair of text and number"),
        (graph, {"feature_info": {first: {"examples": [{"tokens": ["a"]}]}}}, "as many activations"),
        (graph, {"feature_info": {first: {"top_tokens": [("a", 1, 2)]}}}, "pair of text and number"),
        (graph, {"feature_info": {first: {"examples": [{"tokens": ["a"], "activations": []}]}}}, "as many activations"),
    ]
    for case, options, message in cases:
        with pytest.raises(GraphError, match=message):
            write_page(case, tmp_path / "g.html", node_threshold=None, edge_threshold=None, **options)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    scratch = tmp_path_factory.mktemp("browser")
    with browser(scratch) as driver:
        yield driver, scratch


@pytest.fixture
def opened(window: tuple[Any, Path], tmp_path: Path) -> Iterator[Callable[..., Page]]:
    """Give what opens a graph's page; afterwards, nothing may have been asked of any network or complained of."""
    driver, scratch = window
    pages: list[Page] = []

    def open_page(graph: Graph, **options: Any) -> Page:
        path = write_page(graph, tmp_path / "g.html", **{"node_threshold": None, "edge_threshold": None, **options})
        driver.get(path.as_uri())
        pages.append(Page(driver, scratch / "downloads"))
        return pages[-1]

    yield open_page
    assert complaints(driver) == []
    asked = [address for address in requests(driver) if not address.startswith(("blob:", "data:"))]
    assert asked == [(tmp_path / "g.html").as_uri()] * len(pages)
    assert driver.execute_script("return window.hit") is None


class Page:
    """An open page: what people see in it and do."""

    def __init__(self, driver: Any, downloads: Path) -> None:
        self.driver, self.downloads = driver, downloads
        assert self.run("return document.body.dataset.ready") == "yes"

    def run(self, script: str, *values: Any) -> Any:
        return self.driver.execute_script(script, *values)

    def text(self, selector: str) -> str:
        return self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector)

    def drawn(self) -> dict[str, tuple[float, float]]:
        """Return {id or group's name: where it is on the screen}."""
        return {
            key: (x, y)
            for key, x, y in self.run(
                """const trace = plot.data.find((t) => t.customdata);
                const frame = plot.querySelector(".nsewdrag").getBoundingClientRect();
                const [, wide] = plot.layout.xaxis.range, [, high] = plot.layout.yaxis.range;
                return trace.customdata.map((c, i) => [c.node ?? c.group,
                  frame.left + frame.width * trace.x[i] / wide, frame.bottom - frame.height * trace.y[i] / high]);"""
            )
        }

    def click(self, node: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        x, y = self.drawn()[node]
        chain = ActionChains(self.driver, duration=0)
        chain.w3c_actions.pointer_action.move_to_location(round(x), round(y))
        chain.w3c_actions.pointer_action.click()
        chain.perform()
        # Plotly waits for what may become a double click.
        until(lambda: self.text("#panel dd") == node or self.text("#selected-name") == node)

    def keys(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver, duration=0).send_keys(*keys).perform()

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def write(self, selector: str, text: str) -> None:
        """Replace a field's text."""
        self.find(selector).send_keys(CONTROL, "a", LET_GO, text, ENTER)

    def entries(self, name: str) -> list[tuple[str, float]]:
        """Return [(id, weight)] of a list in the panel, all of it."""
        for more in self.driver.find_elements("css selector", f"#{name} button.link"):
            more.click()
        rows = self.run(
            """return [...document.querySelectorAll(`#${arguments[0]} button.entry`)].map((row) =>
            [row.dataset.goesTo, row.querySelector(".weight").innerText]);""",
            name,
        )
        return [(key, float(weight.replace("\u2212", "-"))) for key, weight in rows]


def until(done: Callable[[], bool], seconds: float = 5.0) -> None:
    start = time.monotonic()
    while not done():
        assert time.monotonic() - start < seconds, "the page did not get there"
        time.sleep(0.02)


def told(weight: float) -> float:
    return float(f"{weight:.3g}")


def strongest(graph: Graph, node: str, outputs: bool = False) -> list[tuple[str, float]]:
    """Return [(id, weight)] of a node's edges but that of the bias, the oracle of the panel's lists."""
    row = graph.adjacency[:, graph.index(node)] if outputs else graph.adjacency[graph.index(node)]
    found = [(name, weight) for name, weight in zip(graph.nodes["id"], row.tolist(), strict=True) if weight]
    found = [(name, told(weight)) for name, weight in found if name != "bias"]
    return sorted(found, key=lambda edge: -abs(edge[1]))


def test_a_click_shows_a_nodes_edges_and_an_entry_goes_on(opened: Any) -> None:
    graph = make_graph(6, density=0.6)
    page = opened(graph)
    node = graph.nodes["id"][graph.nodes["layer"] == 1].iloc[0]
    page.click(node)
    assert page.text("#selected-name") == graph.label(node)
    for name, outputs in (("inputs", False), ("outputs", True)):
        assert page.entries(name) == strongest(graph, node, outputs)
    bias = float(graph.adjacency[graph.index(node), graph.of_kind("bias")])
    assert f"{abs(told(bias)):g}" in page.text("#inputs .apart")
    assert page.run("return document.querySelectorAll('#inputs .entry:first-child .stripe')[0].offsetWidth") > 200
    target = strongest(graph, node, outputs=True)[0][0]
    page.find("#outputs button.entry").click()
    assert page.text("#panel dd") == target
    page.keys(ESCAPE)
    assert "Click a node" in page.text("#panel")


def test_the_slider_keeps_the_most_influential_and_all_tokens_and_targets(opened: Any) -> None:
    graph = make_graph(7, n_layers=4).prune(1.0, 1.0)
    page = opened(graph)
    table = graph.nodes.set_index("id")
    always = set(table.index[table["kind"].isin(["embedding", "target"])])
    for threshold in (0.0, 0.3, 0.6):
        page.run(
            """const slider = document.getElementById("threshold");
            slider.value = arguments[0]; slider.dispatchEvent(new Event("input"));""",
            threshold,
        )
        kept = set(table.index[(table["cumulative_influence"] <= threshold) & table["kind"].isin(["feature", "error"])])
        assert set(page.drawn()) == always | kept
        assert page.text("#count") == f"{len(always | kept)} of {len(graph) - 1} nodes"
    page.find("#errors").click()
    assert set(page.drawn()) == always | {name for name in kept if table["kind"][name] == "feature"}


def test_search_keys_and_pins(opened: Any) -> None:
    graph = make_graph(8, n_layers=4, density=0.5)
    page = opened(graph)
    wanted = graph.nodes["id"][5]
    page.keys("/")
    page.keys(wanted)
    assert page.text("#found .where") == wanted
    page.keys(ENTER)
    assert page.text("#panel dd") == wanted
    page.keys("p")
    assert page.text("#pin") == "Pinned"
    start = page.drawn()[wanted]
    page.keys(UP)
    above = page.text("#panel dd")
    assert page.drawn()[above][1] < start[1]
    page.keys(ESCAPE)
    assert graph.label(wanted) in page.text("#pinned")
    page.find("#search").send_keys("no such thing")
    assert page.text("#found") == "nothing found"


def test_groups_fold_to_sums_and_all_is_saved(opened: Any) -> None:
    graph = make_graph(9, n_layers=3, density=0.8)
    features = graph.nodes["id"][graph.nodes["kind"] == "feature"].tolist()
    graph = graph.with_supernode("<b>old</b>", features[:2]).with_label(features[5], "was")
    page = opened(graph, pinned=features[2:4])
    assert page.text("#groups .member .link") == "<b>old</b> (2)"
    page.find("#groups .fold").click()
    assert {"<b>old</b>"} == set(page.drawn()) - set(graph.nodes["id"])
    assert not set(features[:2]) & set(page.drawn())
    rows = graph.adjacency[[graph.index(name) for name in features[:2]]].sum(0)
    sums = {name: weight for name, weight in zip(graph.nodes["id"], rows.tolist(), strict=True) if name != "bias"}
    assert dict(page.entries("inputs")) == {name: told(weight) for name, weight in sums.items() if weight}
    page.keys(ESCAPE)
    page.find("#group").click()
    assert page.text("#selected-name") == "group"
    page.write("#panel input", "new ones")
    page.keys(ESCAPE)
    page.click(features[5])
    page.write("#label", '<i>"is"</i>')
    assert page.text("#selected-name") == '<i>"is"</i>'
    page.find("#save").click()
    saved = page.downloads / "graph-labels.json"
    until(saved.exists)
    noted = with_notes(graph, saved)
    assert noted.labels == {features[5]: '<i>"is"</i>'}
    assert noted.supernodes == {"<b>old</b>": tuple(features[:2]), "new ones": tuple(features[2:4])}


def test_hostile_tokens_are_shown_as_they_are(opened: Any) -> None:
    graph = nasty_graph()
    feature = graph.nodes["id"][0]
    graph = graph.with_label(feature, "<b>bold</b>").with_supernode(NASTY[1], [feature, graph.nodes["id"][1]])
    examples = [NASTY[1], {"tokens": [NASTY[0]], "activations": [1]}]
    info = {feature: {"top_tokens": [(NASTY[0], 2.0)], "examples": examples}}
    page = opened(graph, feature_info=info, source_set="clt-hp", pinned=[feature])
    assert page.run("return document.querySelector('h1').textContent") == "".join(NASTY)
    ticks = page.run("return [...document.querySelectorAll('.xtick text')].map((tick) => tick.textContent)")
    assert [tick.strip() for tick in ticks] == ["</script><scrip…", "<img src=x oner…", "<b>&amp;", "⏎", "{{data}}"]
    page.click(feature)
    assert page.text("#selected-name") == "<b>bold</b>"
    assert page.text("#top-tokens") == NASTY[0]
    assert page.text("#examples").split("\n") == [NASTY[1], NASTY[0]]
    href = page.run("return document.getElementById('neuronpedia').href")
    layer, latent, _ = feature.split("_")
    assert href == f"https://www.neuronpedia.org/%3Ci%3Eb/{layer}-clt-hp/{latent}"
    made = "return document.querySelectorAll('#plot b, #plot img, #panel b, #panel img, #panel i').length"
    assert page.run(made) == 0


def test_a_thousand_nodes_fit_the_window_and_answer(opened: Any) -> None:
    graph = make_graph(3, n_layers=18, n_positions=24, n_features=3, n_logits=10, density=0.1, dtype=torch.float32)
    page = opened(graph, max_nodes=1000)
    assert len(page.drawn()) == 1000
    box = "const box = plot.parentElement;"
    assert page.run(f"{box} return [box.scrollWidth - box.clientWidth, box.scrollHeight - box.clientHeight]") == [0, 0]
    page.click(graph.nodes["id"].iloc[-1])
    assert re.search(r"\d+ edges \(80 drawn\)", page.text("#panel"))
