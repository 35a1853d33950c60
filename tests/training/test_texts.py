"""Texts from everything that holds texts: the same ones, from any number on, and errors that say what to do."""

from __future__ import annotations

import gzip
import json
import sys

import pytest

from clt_plugin.training.data import DataError, Texts, texts_from_hub

WORDS = [f"w{i} w{i + 1}\r\n" for i in range(7)]


def _folder(path, names=("b.txt", "a.txt", "deep/c.txt")):
    for name, text in zip(names, WORDS, strict=False):
        (path / name).parent.mkdir(exist_ok=True, parents=True)
        (path / name).write_text(text, encoding="utf-8", newline="")
    (path / "README.md").write_text("not a text", encoding="utf-8")
    return path


def _lines(path):
    with gzip.open(path / "x.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(json.dumps({"n": i, "body": text}) for i, text in enumerate(WORDS)) + "\n\n")
    return path / "x.jsonl.gz"


def _separated(path):
    (path / "x.txt").write_text("<|end|>".join(WORDS), encoding="utf-8", newline="")
    return path / "x.txt"


def _data_set(stream):
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_dict({"body": WORDS, "n": list(range(7))})
    return whole.to_iterable_dataset() if stream else whole


SOURCES = {
    "list": lambda path: Texts.of(WORDS),
    "rows": lambda path: Texts.of([{"body": text} for text in WORDS], column="body"),
    "iterable": lambda path: Texts.of(dict.fromkeys(WORDS).keys()),
    "function": lambda path: Texts.of(lambda: iter(WORDS)),
    "lines": lambda path: Texts.of(_lines(path), column="body"),
    "separated": lambda path: Texts.of(str(_separated(path)), separator="<|end|>"),
    "data set": lambda path: Texts.of(_data_set(False), column="body"),
    "streamed data set": lambda path: Texts.of(_data_set(True), column="body"),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_its_texts_from_any_number_on_again_and_again(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("clt_plugin.training.data.texts.PIECE", 5)  # separators lie across pieces
    texts = SOURCES[kind](tmp_path)
    assert list(texts.iterate()) == WORDS
    assert list(texts.iterate(3)) == list(texts.iterate(3, epoch=2)) == WORDS[3:]
    assert list(texts.iterate(7)) == []
    assert texts.fingerprint == SOURCES[kind](tmp_path).fingerprint


def test_a_folder_gives_its_text_files_sorted_at_any_depth(tmp_path):
    texts = Texts.of(_folder(tmp_path / "a"))
    assert list(texts.iterate()) == [WORDS[1], WORDS[0], WORDS[2]]
    paths = [tmp_path / "a" / "b.txt", tmp_path / "a" / "README.md"]  # files that are named are read whatever they are
    assert list(Texts.of(paths).iterate()) == [WORDS[0], "not a text"]


def test_files_are_known_by_what_they_hold_not_by_where_they_lie(tmp_path):
    here, there = Texts.of(_folder(tmp_path / "a")), Texts.of(_folder(tmp_path / "b"))
    assert here.fingerprint == there.fingerprint
    (tmp_path / "b" / "deep" / "c.txt").write_text("W2 w3\r\n", encoding="utf-8", newline="")
    assert here.fingerprint != Texts.of(tmp_path / "b").fingerprint


def test_shuffled_texts_have_an_order_for_every_epoch(tmp_path):
    texts = Texts.of(WORDS, shuffle=3)
    orders = [list(texts.iterate(epoch=epoch)) for epoch in range(4)]
    assert all(sorted(order) == sorted(WORDS) for order in orders)
    assert len({tuple(order) for order in [*orders, WORDS]}) == 5
    assert list(texts.iterate(2, epoch=1)) == orders[1][2:] == list(Texts.of(WORDS, shuffle=3).iterate(2, 1))
    assert texts.fingerprint != Texts.of(WORDS, shuffle=4).fingerprint
    with pytest.raises(DataError, match="cannot be shuffled"):
        Texts.of(lambda: iter(WORDS), shuffle=0)
    assert Texts.of(_folder(tmp_path), shuffle=1).count == 3


def test_what_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "bad.jsonl").write_text('{"text": "w2"}\n{"text": \n', encoding="utf-8")
    (tmp_path / "empty").mkdir()
    refused = [
        (lambda: Texts.of("w2 w3"), "there is no file or folder w2 w3"),
        (lambda: Texts.of(tmp_path / "empty"), "no files that end in .txt"),
        (lambda: Texts.of(iter(WORDS)), "can be read only once"),
        (lambda: Texts.of({"train": WORDS, "test": WORDS}), "choose one of 'train', 'test'"),
        (lambda: Texts.of(3), "not from int"),
        (lambda: list(Texts.of(tmp_path / "latin.txt").iterate()), "latin.txt is no text in UTF-8"),
        (lambda: list(Texts.of(tmp_path / "bad.jsonl").iterate()), "bad.jsonl, line 2, is no JSON"),
        (lambda: list(Texts.of([{"body": "w2"}]).iterate()), "no 'text': give column=, one of body"),
        (lambda: Texts.of(_data_set(False)), "no column 'text': give column=, one of body, n"),
    ]
    for call, message in refused:
        with pytest.raises(DataError, match=message):
            call()


def test_without_the_library_data_sets_of_the_hub_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        texts_from_hub("owner/name")


def test_a_data_set_of_the_hub_is_read_by_its_name(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = {}

    def load(name, **settings):
        asked.update(settings, name=name)
        return _data_set(settings["streaming"])

    monkeypatch.setattr(datasets, "load_dataset", load)
    texts = texts_from_hub("owner/name", "test", column="body", revision="abc")
    assert asked == {"name": "owner/name", "split": "test", "streaming": True, "revision": "abc"}
    assert list(texts.iterate(5)) == WORDS[5:]
