"""The feature browser against dense activations of one text at a time, and the files it writes."""

from __future__ import annotations

import gzip
import json
import math
import struct
from html.parser import HTMLParser

import pytest
import torch

import clt_plugin as cp
from clt_plugin import Wiring
from clt_plugin.analysis import STUDIES
from clt_plugin.analysis.activations import FeatureBrowser, feature_browser
from clt_plugin.analysis.activations._collect import Collector
from clt_plugin.core import FormatError
from clt_plugin.core.features import SparseGroup
from clt_plugin.core.wiring import Site
from clt_plugin.training.data import Rows, Tokens, harvest
from clt_plugin.training.data.activations import Cursor
from support.crosscoders import N_LATENTS, make_clt
from support.models import N_LAYERS, VOCABULARY, make_model, make_tokenizer, nnsight_model

TEXTS = [" ".join(f"w{2 + (7 * i * j + i + 3 * j) % 59}" for j in range(3 + i % 6)) for i in range(12)]
SETTINGS = {"tokenizer": make_tokenizer(), "length": 16, "k": 3, "context": 2, "bins": 8, "n_tokens": 4}


@pytest.fixture(scope="module")
def browser():
    torch.manual_seed(0)
    return feature_browser(make_clt(exclude_first=1), make_model("llama"), TEXTS, batch_size=5, **SETTINGS)


@pytest.fixture(scope="module")
def dense():
    """For each text its token ids, BOS first, and its activations, (layer, position, latent), 0 at BOS."""
    hf, clt, found = make_model("llama"), make_clt(exclude_first=1), []
    for text in TEXTS:
        (chunk,) = harvest(hf, [text], clt.wiring, tokenizer=make_tokenizer(), length=16, pack=False)
        acts = clt.encode(chunk.activations.stacked(clt.wiring.read_sites))
        found.append((make_tokenizer()(text)["input_ids"], torch.nn.functional.pad(acts, (0, 0, 1, 0))))
    return found


def test_every_card_equals_what_dense_activations_say(browser, dense):
    n_tokens = sum(len(ids) - 1 for ids, _ in dense)
    for layer in range(N_LAYERS):
        for latent in range(N_LATENTS):
            card = browser.card(layer, latent)
            each = [acts[layer, :, latent] for _, acts in dense]
            every = torch.cat(each)
            active = every[every > 0]
            assert card.tokens == len(active)
            assert card.density == len(active) / n_tokens
            if not len(active):
                assert card.examples == ()
                assert card.largest == 0.0
                continue
            assert card.mean == pytest.approx(float(active.mean()), rel=1e-5)
            assert card.largest == pytest.approx(float(active.max()), rel=1e-5)
            # The histogram of whoever knows the range from the start.
            assert card.range == 2.0 ** (math.floor(math.log2(float(active.max()))) + 1)
            assert list(card.histogram) == torch.histc(active, 8, 0, card.range).int().tolist()
            best = sorted((-float(values.max()), i) for i, values in enumerate(each) if float(values.max()) > 0)[:3]
            assert [e["activations"][e["peak"]] for e in card.examples] == pytest.approx(
                [-value for value, _ in best], rel=1e-5
            )
            for example, (_, i) in zip(card.examples, best, strict=True):
                ids, acts = dense[i][0], each[i]
                at = int(acts.argmax())
                part = slice(max(0, at - 2), at + 3)
                assert example["tokens"] == [make_tokenizer().decode([token]) for token in ids[part]]
                assert example["activations"] == pytest.approx(acts[part].tolist(), rel=2e-3, abs=1e-6)
                assert example["peak"] == at - part.start


def test_batches_change_nothing(browser):
    other = feature_browser(make_clt(exclude_first=1), nnsight_model("llama"), TEXTS, batch_size=2, **SETTINGS)
    for layer in range(N_LAYERS):
        for latent in range(N_LATENTS):
            one, two = browser.card(layer, latent), other.card(layer, latent)
            assert one.tokens == two.tokens
            assert one.histogram == two.histogram
            assert [e["tokens"] for e in one.examples] == [e["tokens"] for e in two.examples]


def test_histograms_merge_exactly_over_any_range():
    """Activations that grow by many powers of two, in batches: the counts are those of one histogram at the end."""
    collector, every = Collector(2, k=1, context=0, bins=16), []
    for scale in (1e-6, 0.3, 0.31, 1.0, 2.0, 700.0):
        values = scale * torch.rand(40)
        values[0] = scale  # a power of two lies in the bin that begins there, not in the one that ends there
        every.append(values)
        group = SparseGroup(torch.arange(40), torch.zeros(40, dtype=torch.long), values, 2)
        collector.add(Rows(torch.ones(1, 40, dtype=torch.long), torch.ones(1, 40, dtype=torch.bool), Cursor()), group)
    assert float(collector.ranges[0]) == 1024.0
    edges = torch.arange(17) * 64.0
    expected = [int(((v := torch.cat(every)) >= low).logical_and(v < low + 64).sum()) for low in edges[:-1]]
    assert collector.histogram[0].tolist() == expected
    assert collector.histogram[1].sum() == 0


def test_promoted_tokens_are_those_of_the_decoder_through_norm_and_unembedding(browser):
    hf, clt = make_model("llama"), make_clt(exclude_first=1)
    for layer in range(N_LAYERS):
        written = clt.decoder_view(layer).sum(1)
        logits = (written * hf.model.norm.weight) @ hf.lm_head.weight.T
        logits = logits - logits.mean(1, keepdim=True)
        for latent in (0, 7, 23):
            card = browser.card(layer, latent)
            high, low = logits[latent].topk(4), (-logits[latent]).topk(4)
            assert [t for t, _ in card.promoted] == [make_tokenizer().decode([int(i)]) for i in high.indices]
            assert [v for _, v in card.promoted] == pytest.approx(high.values.tolist(), rel=1e-4)
            assert [v for _, v in card.suppressed] == pytest.approx((-low.values).tolist(), rel=1e-4)


def test_a_file_gives_the_same_cards_and_is_refused_when_it_is_another(browser, tmp_path):
    opened = FeatureBrowser.load(browser.save(tmp_path / "features.safetensors"))
    for feature in ((0, 3), (1, 0), (2, 23)):
        assert opened.card(*feature) == browser.card(*feature)
    assert opened.table.equals(browser.table)
    assert opened.plot() is not None
    assert "w" in str(opened.card(0, 3))
    with pytest.raises(FormatError, match="there is no feature 3"):
        opened.card(3, 0)
    with pytest.raises(FormatError, match="is missing"):
        FeatureBrowser.load(tmp_path / "none.safetensors")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(FormatError, match="no feature browser's file"):
        FeatureBrowser.load(tmp_path / "other.safetensors")


def test_the_graph_page_takes_what_it_says(browser, tmp_path):
    graph = cp.attribute(make_model("llama"), torch.tensor([[0, 5, 9, 12]]), clt=make_clt(exclude_first=1))
    info = browser.info(graph)
    features = graph.nodes[graph.nodes["kind"] == "feature"]
    assert set(info) == {f"{g}_{f}" for g, f in zip(features["group"], features["feature"], strict=True)}
    page = graph.to_html(tmp_path / "graph.html", feature_info=info)
    some = next(known for known in info.values() if known["examples"])
    assert json.dumps(some["examples"][0]["tokens"]) in page.read_text(encoding="utf-8")


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text, self.links, self.ids = [], "", [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("href", "src")]
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_data(self, data):
        self.text += data


def test_the_page_is_static_and_whole(browser, tmp_path):
    path = browser.to_html(tmp_path / "features.html", [(0, 3), (2, 7)], title="<b>& more")
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    assert page.ids == ["f0_3", "f2_7"]
    assert page.links == ["#f0_3", "#f2_7"]
    assert "script" not in page.tags
    assert "<b>& more" in page.text
    for example in browser.card(0, 3).examples:
        assert "".join(example["tokens"]) in page.text
    drawn = _Page()
    drawn.feed(browser.to_html(tmp_path / "drawn.html", n=5).read_text(encoding="utf-8"))
    assert len(drawn.ids) == 5


def test_circuit_tracers_viewer_finds_every_feature(browser, tmp_path):
    """Read as the viewer reads: by the index's offsets, and by Cantor's pairing."""
    folder = browser.to_circuit_tracer(tmp_path / "features")
    index = json.loads(gzip.decompress((folder / "index.json.gz").read_bytes()))
    for layer, latent in ((0, 0), (1, 7), (2, 23)):
        known = index[str(layer)]
        start, end = known["offsets"][latent : latent + 2]
        # The viewer asks for one byte too many, and goes by the length.
        chunk = (folder / known["filename"]).read_bytes()[start : end + 1]
        (length,) = struct.unpack("<I", chunk[:4])
        feature = json.loads(gzip.decompress(chunk[4 : 4 + length]))
        card = browser.card(layer, latent)
        assert feature["top_logits"] == [token for token, _ in card.promoted]
        assert feature["act_max"] == card.largest
        (top,) = feature["examples_quantiles"]
        assert [example["tokens"] for example in top["examples"]] == [example["tokens"] for example in card.examples]
        for example in top["examples"]:
            peak = example["tokens_acts_list"][example["train_token_ind"]]
            assert peak == max(example["tokens_acts_list"])
    browser.to_circuit_tracer(tmp_path / "some", [(2, 7)])
    assert [path.name for path in (tmp_path / "some").iterdir()] == [f"{(2 + 7) * (2 + 7 + 1) // 2 + 7}.json"]


def test_other_wirings_and_no_tokenizer():
    sites = [Site("model", "resid_post", layer) for layer in range(N_LAYERS)]
    crosscoder, ids = make_clt(Wiring.acausal(sites)), torch.arange(2, 50).reshape(6, 8)
    found = feature_browser(crosscoder, make_model("gpt2"), ids, length=8, k=2, context=1)
    (group,) = found.groups
    card = max((found.card(group, latent) for latent in range(N_LATENTS)), key=lambda each: each.tokens)
    assert all(token.isdigit() for token in card.examples[0]["tokens"])
    # Of the residual stream at three layers the last one counts.
    assert card.promoted
    models = {"base": make_model("gpt2"), "chat": make_model("gpt2")}
    diff = feature_browser(make_clt(Wiring.model_diff(models, layer=2)), models, Tokens(ids, length=8), k=2, context=1)
    assert diff.table["latents"].tolist() == [N_LATENTS]
    assert 0 <= int(card.promoted[0][0]) < VOCABULARY


def test_refusals():
    with pytest.raises(ValueError, match="power of two"):
        feature_browser(make_clt(), make_model("gpt2"), TEXTS, bins=12)
    with pytest.raises(ValueError, match="k is a whole number"):
        feature_browser(make_clt(), make_model("gpt2"), TEXTS, k=0)
    assert STUDIES["feature-browser"].needs == ("clt", "model", "texts")
