"""Rows of tokens against rows worked out by hand, and every cursor: what comes after it is the same."""

from __future__ import annotations

import pytest
import torch

from clt_plugin.training.data import Cursor, DataError, Texts, Tokens
from support.models import make_tokenizer

TEXTS = ["w2 w3 w4", "", "w5", "w6 w7 w8 w9 w10 w11"]
IDS = [[2, 3, 4], [], [5], [6, 7, 8, 9, 10, 11]]
BOS, EOS = 0, 1


def _rows(tokens, batch_size=2, start=None):
    """Every row, as the tokens that are no padding, and which of them count."""
    rows = []
    for batch in tokens.batches(batch_size, start):
        assert batch.ids.shape == batch.counted.shape
        rows += [(ids.tolist(), counted.tolist()) for ids, counted in zip(batch.ids, batch.counted, strict=True)]
    return rows


def _shown(tokens, batch_size=1):
    """One row a batch, so that nothing is padded."""
    return [ids for ids, _ in _rows(tokens, batch_size)]


@pytest.mark.parametrize("texts", [TEXTS, IDS, [[BOS, *ids] for ids in IDS], list(map(torch.tensor, IDS))])
def test_rows_are_packed_or_hold_one_text_each(texts):
    tokenizer = make_tokenizer()  # it prepends BOS
    packed = [[BOS, 2, 3, 4, BOS], [BOS, 5, BOS, 6, 7], [BOS, 8, 9, 10, 11]]
    single = [[BOS, 2, 3, 4], [BOS, 5], [BOS, 6, 7, 8, 9], [BOS, 10, 11]]
    assert _shown(Tokens(texts, tokenizer, length=5)) == packed
    assert _shown(Tokens(texts, tokenizer, length=5, pack=False)) == single


def test_without_bos_packed_texts_end_with_eos():
    tokenizer = make_tokenizer()
    assert _shown(Tokens(TEXTS, tokenizer, length=5, bos=False)) == [
        [2, 3, 4, EOS, 5],
        [EOS, 6, 7, 8, 9],
        [10, 11, EOS],
    ]
    assert _shown(Tokens(TEXTS, tokenizer, length=5, bos=False, pack=False)) == [[2, 3, 4], [5], [6, 7, 8, 9, 10], [11]]
    # Without a tokenizer nobody knows of BOS or EOS.
    assert _shown(Tokens(IDS, length=5)) == [[2, 3, 4, 5, 6], [7, 8, 9, 10, 11]]


def test_padding_first_and_special_tokens_do_not_count():
    tokenizer = make_tokenizer()
    tokens = Tokens(TEXTS, tokenizer, length=5, exclude_first=2)
    (ids, counted), *_ = _rows(tokens, 3)
    assert ids == [BOS, 2, 3, 4, BOS]
    assert counted == [False, False, True, True, False]
    unpacked = _rows(Tokens(TEXTS, tokenizer, length=5, pack=False), 4)
    assert [sum(counted) for _, counted in unpacked] == [3, 1, 4, 2]
    assert [counted for _, counted in unpacked][1] == [False, True, False, False, False]
    kept = _rows(Tokens(TEXTS, tokenizer, length=5, exclude_first=0, skip_special=False), 3)
    assert all(all(counted) for _, counted in kept)


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("shuffle", [None, 5])
def test_after_every_cursor_comes_the_same(pack, bos, shuffle):
    def make():
        texts = Texts.of([*TEXTS, "w12 w13 w14 w15", "w16"], shuffle=shuffle)
        return Tokens(texts, make_tokenizer(), length=4, pack=pack, bos=bos, epochs=3)

    batches = list(make().batches(2))
    assert batches[-1].after.epoch >= 2
    for number, batch in enumerate(batches):
        again = list(make().batches(2, batch.after))
        assert [rows.ids.tolist() for rows in again] == [rows.ids.tolist() for rows in batches[number + 1 :]]
        assert [rows.after for rows in again] == [rows.after for rows in batches[number + 1 :]]


def test_every_epoch_has_every_token_once():
    for epochs in (1, 3):
        rows = _shown(Tokens(TEXTS, make_tokenizer(), length=4, epochs=epochs))
        flat = [token for row in rows for token in row if token > EOS]
        assert flat == [token for ids in IDS for token in ids] * epochs
    endless = Tokens(TEXTS, make_tokenizer(), length=4, epochs=None).batches(2)
    assert max(next(endless).after.epoch for _ in range(20)) > 5


def test_what_decides_the_rows_is_in_their_identity():
    def identity(texts=TEXTS, tokenizer=None, **settings):
        return Tokens(texts, tokenizer or make_tokenizer(), **settings).identity()

    assert identity() == identity(epochs=None)
    others = [{"length": 9}, {"pack": False}, {"bos": False}, {"exclude_first": 2}, {"skip_special": False}]
    assert all(identity(**other) != identity() for other in others)
    assert identity([*TEXTS[:-1], "w9"]) != identity()


def test_what_makes_no_rows_is_refused():
    tokenizer = make_tokenizer()
    refused = [
        (lambda: Tokens(TEXTS, tokenizer, length=1), "length is a whole number of at least 2"),
        (lambda: Tokens(TEXTS, tokenizer, length=4, exclude_first=4), "no token of a row of 4 counts"),
        (lambda: Tokens(IDS, bos=True), "there is no BOS token"),
        (lambda: _rows(Tokens(TEXTS)), "texts need a tokenizer"),
        (lambda: _rows(Tokens([[0.5, 1.0]])), "a text is a string, or token ids"),
        (lambda: _rows(Tokens([[[1, 2]]])), "a text is a string, or token ids"),
        (lambda: _rows(Tokens([""], tokenizer, epochs=None)), "the texts have no tokens"),
        (lambda: _rows(Tokens(TEXTS, tokenizer), 0), "batch_size is a whole number of at least 1"),
    ]
    for call, message in refused:
        with pytest.raises(DataError, match=message):
            call()
    assert _rows(Tokens(TEXTS, tokenizer), start=Cursor(1)) == []
