"""Texts as rows of token ids: tokenised, packed or one text a row, and which of the tokens count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from clt_plugin.training.data.activations import Cursor, DataError, check_whole, digest
from clt_plugin.training.data.texts import Texts


@dataclass(frozen=True, eq=False)
class Rows:
    """What a model runs on at a time.

    Attributes:
        ids: (rows, positions), with padding after each row's tokens.
        counted: Which tokens count, (rows, positions) of bool.
        after: Where the next rows begin.
    """

    ids: Tensor
    counted: Tensor
    after: Cursor


@dataclass(frozen=True, eq=False)
class Tokens:
    """Texts as rows of tokens.

    A row begins with the BOS token where BOS tokens are used. Packed rows hold text after text, each of which begins
    with BOS (where none is used, each ends with EOS, if the tokenizer has one), and attention sees across; a text that
    does not fit goes on in the next row. A token counts unless it is padding, among a row's first ones, or special.

    Attributes:
        texts: A `Texts`, or anything that `Texts.of` reads.
        tokenizer: A transformers tokenizer; None where texts are token ids.
        length: How many tokens a row has at most.
        pack: Whether rows are filled with text after text; else each row holds one text, or a piece of one.
        bos: Whether rows begin with BOS; None for: as the tokenizer itself does it.
        exclude_first: How many first tokens of each row do not count, as `Host.exclude_first` of a crosscoder.
        skip_special: Whether the tokenizer's special tokens (BOS, EOS, padding, ...) do not count, wherever they are.
        epochs: How often the texts are read; None for: without end.
    """

    texts: Any
    tokenizer: Any = None
    length: int = 256
    pack: bool = True
    bos: bool | None = None
    exclude_first: int = 1
    skip_special: bool = True
    epochs: int | None = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "texts", Texts.of(self.texts))
        check_whole("length", self.length, 2)
        check_whole("exclude_first", self.exclude_first, 0)
        if self.epochs is not None:
            check_whole("epochs", self.epochs, 1)
        if self.exclude_first >= self.length:
            raise DataError(f"with exclude_first={self.exclude_first}, no token of a row of {self.length} counts")
        if self.bos and getattr(self.tokenizer, "bos_token_id", None) is None:
            raise DataError("there is no BOS token: give a tokenizer that has one, or bos=False")

    def batches(self, batch_size: int, start: Cursor | None = None) -> Iterator[Rows]:
        """Give rows, so many at a time, from a cursor on; the last ones may be fewer.

        Args:
            batch_size: How many rows at a time.
            start: Where to begin: `Rows.after` of the rows before; at the beginning by default.

        Raises:
            DataError: There are no tokens, or a text is neither a string nor token ids.
        """
        check_whole("batch_size", batch_size, 1)
        skip = self.skip_special and self.tokenizer is not None
        special = torch.tensor(self.tokenizer.all_special_ids if skip else [])
        rows = self._rows(start or Cursor())
        while batch := list(islice(rows, batch_size)):
            ids = pad_sequence([torch.tensor(row) for row, _ in batch], batch_first=True)
            index, lengths = torch.arange(ids.shape[1]), torch.tensor([[len(row)] for row, _ in batch])
            counted = (index < lengths) & (index >= self.exclude_first) & ~torch.isin(ids, special)
            yield Rows(ids, counted, batch[-1][1])

    def identity(self) -> dict[str, Any]:
        """Say by plain data what decides which rows come; how many epochs does not."""
        settings = {name: getattr(self, name) for name in ("length", "pack", "exclude_first", "skip_special")}
        return {**settings, "bos": self._bos, "texts": self.texts.fingerprint, "tokenizer": self._tokenizer_print}

    # ---------------------------------------------------------------- rows

    @cached_property
    def _bos(self) -> int | None:
        """The token that each row begins with, or None."""
        token: int | None = getattr(self.tokenizer, "bos_token_id", None)
        if self.bos is None and token is not None:
            return token if self.tokenizer("a")["input_ids"][:1] == [token] else None
        return token if self.bos else None

    @cached_property
    def _end(self) -> int | None:
        """The token that ends each packed text, or None."""
        return getattr(self.tokenizer, "eos_token_id", None) if self.pack and self._bos is None else None

    @cached_property
    def _tokenizer_print(self) -> str | None:
        if self.tokenizer is None:
            return None
        return digest([sorted(self.tokenizer.get_vocab().items()), sorted(self.tokenizer.all_special_ids)])

    def _rows(self, start: Cursor) -> Iterator[tuple[list[int], Cursor]]:
        """Give each row with the cursor of the next one."""
        for epoch in count(start.epoch):
            if self.epochs is not None and epoch >= self.epochs:
                return
            begin = start if epoch == start.epoch else Cursor(epoch)
            empty = True
            for row in self._epoch(begin):
                empty = False
                yield row
            if empty and begin == Cursor(epoch):
                raise DataError("the texts have no tokens: see where they come from")

    def _epoch(self, start: Cursor) -> Iterator[tuple[list[int], Cursor]]:
        row: list[int] = []
        for number, text in enumerate(self.texts.iterate(start.item, start.epoch), start.item):
            ids = self._ids(text)
            at = start.offset if number == start.item else 0
            while at < len(ids):
                if not row and at and self._bos is not None:
                    row.append(self._bos)
                piece = ids[at : at + self.length - len(row)]
                row += piece
                at += len(piece)
                if len(row) == self.length or (not self.pack and at == len(ids)):
                    yield row, Cursor(start.epoch, number, at)
                    row = []
        if row:
            yield row, Cursor(start.epoch + 1)

    def _ids(self, text: Any) -> list[int]:
        """Return a text's tokens, with the tokens that mark its beginning or end; of an empty text none."""
        if isinstance(text, str):
            if self.tokenizer is None:
                raise DataError("texts need a tokenizer: give tokenizer=, or token ids instead of text")
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
        else:
            given = torch.as_tensor(text)
            if given.ndim != 1 or (len(given) and (given.is_floating_point() or given.dtype == torch.bool)):
                raise DataError(f"a text is a string, or token ids (position,), not {text!r:.60}")
            ids = given.tolist()
        if self._bos is not None and ids[:1] == [self._bos]:
            ids = ids[1:]
        if not ids:
            return []
        return [*([] if self._bos is None else [self._bos]), *ids, *([] if self._end is None else [self._end])]
