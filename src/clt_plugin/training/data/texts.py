"""Texts from files, folders, sequences, functions and data sets, which can be read again from any of them."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from clt_plugin.training.data.activations import DataError, digest, permutation

SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
"""The files of a folder that hold texts."""

LOOKED_AT = 64
"""How many first texts a fingerprint looks at."""

PIECE = 2**20
"""How many characters of a file are read at a time."""


@dataclass(frozen=True, eq=False)
class Texts:
    """Texts in an order. Make one with `Texts.of`, or with `texts_from_hub`.

    Attributes:
        read: Gives the texts from a number on, each time afresh; a text is a string, or token ids (position,).
        about: Plain data that says where they come from.
        item: Gives one text by its number, where that is possible.
        count: How many there are, where that is known.
        shuffle: A seed: every epoch has an order of its own, drawn from it. Needs `item`.
    """

    read: Callable[[int], Iterator[Any]]
    about: Mapping[str, Any] = field(default_factory=dict)
    item: Callable[[int], Any] | None = None
    count: int | None = None
    shuffle: int | None = None

    def __post_init__(self) -> None:
        if self.shuffle is not None and (self.item is None or self.count is None):
            raise DataError(
                "texts that are read one after another cannot be shuffled: give a list, a folder of text files or a "
                "data set that is not streamed, or shuffle them beforehand (streamed data sets have .shuffle)"
            )

    @classmethod
    def of(
        cls, source: Any, *, column: str = "text", separator: str | None = None, shuffle: int | None = None
    ) -> Texts:
        """Read texts from whatever holds them.

        Args:
            source: A file, a folder (its ``.txt`` and ``.jsonl`` files, also with ``.gz``, at any depth) or a list of
                paths; a sequence of texts, or of token ids; a data set of the library ``datasets``, streamed or not;
                any iterable that can be iterated again; or a function that returns an iterator. A text file is one
                text, a line of a ``.jsonl`` file another.
            column: Where an item is a mapping (a row of a data set, a line of ``.jsonl``), its entry with the text.
            separator: What separates texts within text files, such as ``"<|endoftext|>"``; such files are read piece
                by piece, and may be larger than memory.
            shuffle: A seed to draw every epoch's order from; for sources whose texts are numbered.

        Raises:
            DataError: The source is none of these, or can be read only once.
        """
        if isinstance(source, Texts):
            return source
        if isinstance(source, str | os.PathLike):
            return _from_files(source, column, separator, shuffle)
        if isinstance(source, Mapping):
            raise DataError(f"a mapping is no source of texts: choose one of {', '.join(map(repr, source))}")
        if isinstance(source, Sequence) and source and all(isinstance(entry, os.PathLike) for entry in source):
            return _from_files(source, column, separator, shuffle)
        get = partial(_text_of, column=column)
        about = {"kind": type(source).__name__, "column": column}
        if hasattr(source, "column_names"):
            _check_column(source, column)
            # Both kinds of data set of the library `datasets` know what they are.
            about["fingerprint"] = str(getattr(source, "_fingerprint", getattr(source, "info", "")))
        if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
            item = lambda n: get(source[n])  # noqa: E731
            return cls(lambda start: map(item, range(start, len(source))), about, item, len(source), shuffle)
        if hasattr(source, "skip"):
            return cls(lambda start: map(get, source.skip(start) if start else source), about, shuffle=shuffle)
        if isinstance(source, Iterator):
            raise DataError(
                "an iterator can be read only once, but training may read texts again (a second epoch, a run that is "
                "resumed): give a list, or a function that returns the iterator"
            )
        if callable(source) or isinstance(source, Iterable):
            fresh = source if callable(source) else lambda: source
            return cls(lambda start: map(get, islice(iter(fresh()), start, None)), about, shuffle=shuffle)
        raise DataError(f"texts come from paths, sequences, iterables or functions, not from {type(source).__name__}")

    def iterate(self, start: int = 0, epoch: int = 0) -> Iterator[Any]:
        """Give the texts of an epoch from one on.

        Args:
            start: How many texts to leave out at the beginning.
            epoch: Which epoch; it matters to shuffled texts alone.
        """
        if self.shuffle is None or self.item is None or self.count is None:
            yield from self.read(start)
            return
        for number in permutation(self.count, "texts", self.shuffle, epoch)[start:].tolist():
            yield self.item(number)

    @cached_property
    def fingerprint(self) -> str:
        """A digest of where the texts come from, how many they are, and the first of them."""
        first = hashlib.sha256()
        for text in islice(self.read(0), LOOKED_AT):
            data = text.encode() if isinstance(text, str) else torch.as_tensor(text).long().numpy().tobytes()
            first.update(len(data).to_bytes(8, "little") + data)
        return digest([dict(self.about), self.count, self.shuffle, first.hexdigest()])


def texts_from_hub(
    name: str,
    split: str = "train",
    *,
    config: str | None = None,
    column: str = "text",
    stream: bool = True,
    **more: Any,
) -> Texts:
    """Read texts from a data set on the Hugging Face Hub, by the library ``datasets``.

    Args:
        name: The data set, ``owner/name``.
        split: Which split.
        config: Which configuration, of a data set that has several.
        column: The column with the text.
        stream: Whether to read it as it is used, and not to download it first.
        **more: Further arguments of ``datasets.load_dataset``: give ``revision=``, a commit, so that a run that is
            resumed finds the same texts.

    Raises:
        DataError: The library is not installed.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError("data sets of the Hub need the library datasets: pip install datasets") from error
    which = (name,) if config is None else (name, config)
    texts = Texts.of(load_dataset(*which, split=split, streaming=stream, **more), column=column)
    return Texts(texts.read, {**texts.about, "name": "/".join(which), "split": split}, texts.item, texts.count)


def _check_column(source: Any, column: str) -> None:
    names = source.column_names
    if isinstance(names, list) and column not in names:
        raise DataError(f"the data set has no column {column!r}: give column=, one of {', '.join(names)}")


def _text_of(item: Any, column: str) -> Any:
    """Return the text, or the token ids, of whatever a source holds."""
    if not isinstance(item, Mapping):
        return item
    if column not in item:
        raise DataError(f"an item has no {column!r}: give column=, one of {', '.join(map(str, item))}")
    return item[column]


# ---------------------------------------------------------------- files


def _from_files(source: Any, column: str, separator: str | None, shuffle: int | None) -> Texts:
    given = [Path(path) for path in ([source] if isinstance(source, str | os.PathLike) else source)]
    files: list[tuple[str, Path]] = []
    for path in given:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
            files += [(file.relative_to(path).as_posix(), file) for file in found if not file.name.startswith(".")]
        elif path.is_file():
            files.append((path.name, path))
        else:
            raise DataError(
                f"there is no file or folder {path}: give a path that is there; a text itself goes into a list, and a "
                "data set of the Hub through texts_from_hub"
            )
    if not files:
        raise DataError(f"{', '.join(map(str, given))} has no files that end in {', '.join(SUFFIXES)}")
    # Not the folder's own path: the same files elsewhere are the same texts.
    listed = [[name, file.stat().st_size] for name, file in files]
    about = {"kind": "files", "files": listed, "column": column, "separator": separator}
    paths = [file for _, file in files]
    if separator is None and not any(".jsonl" in file.suffixes for file in paths):
        item = lambda n: _whole(paths[n])  # noqa: E731
        return Texts(lambda start: map(item, range(start, len(paths))), about, item, len(paths), shuffle)

    def read(start: int) -> Iterator[Any]:
        return islice((text for path in paths for text in _texts_in(path, column, separator)), start, None)

    return Texts(read, about, shuffle=shuffle)


def _open(path: Path) -> Any:
    # Line ends stay as they are: a text is what is in the file.
    opener: Any = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding="utf-8", newline="")


def _whole(path: Path) -> str:
    with _open(path) as file, _readable(path):
        return str(file.read())


def _texts_in(path: Path, column: str, separator: str | None) -> Iterator[Any]:
    """Give the texts of one file, one after another."""
    if ".jsonl" in path.suffixes:
        with _open(path) as file, _readable(path):
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _text_of(_parsed(line, path, number), column)
    elif separator is None:
        yield _whole(path)
    else:
        with _open(path) as file, _readable(path):
            rest = ""
            while piece := file.read(PIECE):
                *whole, rest = (rest + piece).split(separator)
                yield from whole
            yield rest


def _parsed(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}, line {number}, is no JSON ({error}): mend or remove it") from error


class _readable:
    """Turns what Python says of a file that holds no text into an error that names it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, UnicodeDecodeError | gzip.BadGzipFile | EOFError):
            raise DataError(
                f"{self.path} is no text in UTF-8, or damaged ({error}): convert it, or leave it out"
            ) from error
