"""Caches: what comes back, after every way in which a run or a file can break."""

from __future__ import annotations

import resource
import shutil
import signal
import warnings

import pytest
import torch
from safetensors import safe_open

from clt_plugin.training.data import ActivationCache, Activations, Chunk, Cursor, DataError, write_cache
from training.sources import SITES, WIDTHS, Numbers

SHARD = 12 * sum(WIDTHS) * 4  # bytes: shards of 12 tokens or a few more


def _write(folder, source=None, **settings):
    return write_cache(
        source or Numbers(), folder, **{"dtype": "float32", "shard_bytes": SHARD, "bar": False, **settings}
    )


def _read(cache):
    chunks = list(cache)
    return torch.cat([chunk.activations.flat for chunk in chunks]), torch.cat([chunk.ids for chunk in chunks])


def _files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Normal:
    """Random values, of which one site's are a thousand times the other's, and some tokens have none."""

    sites, widths = SITES, WIDTHS

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.flat = torch.randn(300, 5, generator=generator) * torch.tensor([1e3, 1e3, 1e3, 1, 1])
        self.flat[::7, :3] = 0

    def identity(self):
        return {"name": "normal"}

    def chunks(self, start=None):
        begin = start.item if start else 0
        for number, flat in enumerate(self.flat.split(50)[begin:], begin):
            yield Chunk(Activations(flat, SITES, WIDTHS), torch.arange(50), Cursor(0, number + 1))


def test_float32_comes_back_as_it_was_and_bfloat16_rounded(tmp_path):
    source = Normal()
    for dtype in ("float32", "bfloat16"):
        cache = _write(tmp_path / dtype, source, dtype=dtype)
        expected = source.flat.to(getattr(torch, dtype)).float()
        assert torch.equal(_read(cache)[0], expected)
        error = (expected - source.flat).double()
        for site, columns in zip(SITES, (slice(3), slice(3, 5)), strict=True):
            relative = float(error[:, columns].norm() / source.flat[:, columns].double().norm())
            assert cache.relative_error[site] == pytest.approx(relative, rel=1e-9)
    assert _read(ActivationCache(tmp_path / "bfloat16", dtype=torch.bfloat16))[0].dtype == torch.bfloat16


def test_int8_is_off_by_half_a_step_of_its_token_and_site(tmp_path):
    source = Normal()
    cache = _write(tmp_path / "a", source, dtype="int8")
    found, _ = _read(cache)
    for site, columns in zip(SITES, (slice(3), slice(3, 5)), strict=True):
        x, back = source.flat[:, columns], found[:, columns]
        step = x.abs().amax(1, keepdim=True) / 127
        assert bool(((x - back).abs() <= step / 2 * (1 + 1e-5)).all())
        relative = float((x - back).double().norm() / x.double().norm())
        assert 1e-4 < relative < 5e-3
        assert cache.relative_error[site] == pytest.approx(relative, rel=1e-6)
    shard = cache.manifest.shards[0]
    assert shard.bytes < 50 * (5 + 2 * 4 + 4) + 400  # values, scales, ids, header
    with safe_open(cache.folder / shard.file, framework="pt") as file:
        assert bool((file.get_tensor("scales") > 0).all())  # of tokens that are 0 too


def test_what_is_read_says_which_tokens_and_where_from(tmp_path):
    cache = _write(tmp_path / "a")
    flat, ids = _read(cache)
    assert torch.equal(ids, torch.arange(100))
    assert torch.equal(flat[:, 0], ids.float())
    assert (cache.sites, cache.widths, len(cache), cache.manifest.complete) == (SITES, WIDTHS, 100, True)
    chunk = next(iter(ActivationCache(tmp_path / "a", chunk_tokens=5)))
    assert chunk.activations[SITES[1]].shape == (5, 2)
    assert torch.equal(chunk.activations[SITES[1]], chunk.activations.flat[:, 3:])


@pytest.mark.parametrize("shuffle", [None, 4])
def test_chunks_go_on_from_every_cursor_and_come_once_an_epoch(shuffle, tmp_path):
    _write(tmp_path / "a")
    settings = {"chunk_tokens": 5, "shuffle": shuffle, "epochs": 2}
    chunks = list(ActivationCache(tmp_path / "a", **settings))
    for number, chunk in enumerate(chunks):
        again = list(ActivationCache(tmp_path / "a", **settings).chunks(chunk.after))
        assert [each.ids.tolist() for each in again] == [each.ids.tolist() for each in chunks[number + 1 :]]
    epochs = [
        [int(i) for chunk in half for i in chunk.ids]
        for half in (chunks[: len(chunks) // 2], chunks[len(chunks) // 2 :])
    ]
    assert [sorted(epoch) for epoch in epochs] == [list(range(100))] * 2
    assert (epochs[0] == list(range(100))) == (epochs[0] == epochs[1]) == (shuffle is None)


@pytest.mark.parametrize("fail", range(0, 20, 3))
def test_a_run_that_fails_anywhere_is_gone_on_with(fail, tmp_path):
    whole = _files(_write(tmp_path / "whole").folder)
    error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        _write(tmp_path / "a", Numbers(fail=fail, error=error))
    with pytest.warns(UserWarning, match="is not complete: it has"):
        begun = ActivationCache(tmp_path / "a")
    n = len(begun)
    kept = _read(begun)[1].tolist() if n else []
    assert kept == list(range(n))
    (tmp_path / "a" / ".shard-00001.safetensors.x1").write_bytes(b"what a killed run leaves")
    source = Numbers()
    _write(tmp_path / "a", source)
    assert _files(tmp_path / "a") == whole
    assert source.made <= len(list(Numbers().chunks(begun.manifest.shards[-1].after if n else None)))
    source = Numbers()
    _write(tmp_path / "a", source)
    assert source.made == 0  # a cache that is complete stays as it is


@pytest.mark.parametrize("call", range(1, 9))
def test_a_run_that_ends_at_any_rename_is_gone_on_with(call, tmp_path, monkeypatch):
    import os

    whole, calls, replace = _files(_write(tmp_path / "whole").folder), [], os.replace

    def ends(*paths):
        calls.append(paths)
        if len(calls) == call:
            raise SystemExit
        replace(*paths)

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", ends)
        with pytest.raises(SystemExit):
            _write(tmp_path / "a")
    assert not [name for name in _files(tmp_path / "a") if name.startswith(".")]
    _write(tmp_path / "a")
    assert _files(tmp_path / "a") == whole


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs a limit on the size of files")
def test_a_full_disk_leaves_whole_shards_and_no_half_one(tmp_path):
    whole = _files(_write(tmp_path / "whole", dtype="float32", shard_bytes=20_000, source=Numbers(3000, (50,))).folder)
    settings = {"source": Numbers(3000, (50,)), "shard_bytes": 20_000}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, hard))  # the manifest fits, a shard does not
    try:
        with pytest.raises(DataError, match=r"shard-00000.safetensors cannot be written .*goes on from there"):
            _write(tmp_path / "a", **settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(_files(tmp_path / "a")) == ["manifest.json"]
    _write(tmp_path / "a", **settings)
    assert _files(tmp_path / "a") == whole


DAMAGE = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-3]), "bytes, not"),
    "changed": (lambda path: path.write_bytes(path.read_bytes()[:-3] + b"xyz"), "its checksum differs"),
    "missing": (lambda path: path.unlink(), "is missing"),
    "empty": (lambda path: path.write_bytes(b""), "has 0 bytes, not"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_shard_is_named_and_refused_or_skipped_and_written_again(damage, tmp_path):
    folder = _write(tmp_path / "a").folder
    whole, name = _files(folder), "shard-00002.safetensors"
    broke, message = DAMAGE[damage]
    broke(folder / name)
    assert list(ActivationCache(folder).broken()) == [name]
    with pytest.raises(DataError, match=f"{name} .*{message}"):
        _read(ActivationCache(folder))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        _, ids = _read(ActivationCache(folder, on_broken="skip", epochs=2, chunk_tokens=4))
    shards = ActivationCache(folder).manifest.shards
    lost = range(sum(s.tokens for s in shards[:2]), sum(s.tokens for s in shards[:3]))
    assert ids.tolist() == [i for i in range(100) if i not in lost] * 2
    assert len(said) == 1
    assert f"{name} " in str(said[0].message)
    assert f"its {len(lost)} tokens are left out" in str(said[0].message)
    source = Numbers()
    _write(folder, source)
    assert _files(folder) == whole
    assert source.made <= 6  # of the chunks of that shard alone


def test_a_cache_may_be_limited(tmp_path):
    cache = _write(tmp_path / "a", max_tokens=30)
    assert 30 <= len(cache) < 40
    assert _read(cache)[1].tolist() == list(range(len(cache)))


def test_what_is_no_such_cache_is_refused(tmp_path):
    folder = _write(tmp_path / "a").folder
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    shutil.copytree(folder, tmp_path / "old")
    (tmp_path / "old" / "manifest.json").write_text('{"format": "clt_plugin.activations", "schema_version": 9}')
    shutil.copytree(folder, tmp_path / "bad")
    (tmp_path / "bad" / "manifest.json").write_text('{"format": "clt_plugin.acti')
    refused = [
        (lambda: _write(folder, Numbers(99)), r"something else \(n differ\)"),
        (lambda: _write(folder, dtype="int8"), r"something else \(dtype differ\)"),
        (lambda: _write(folder, shard_bytes=9), r"something else \(shard_bytes differ\)"),
        (lambda: _write(tmp_path / "full"), "holds something that is no cache"),
        (lambda: _write(tmp_path / "b", dtype="float16"), "not as 'float16'"),
        (lambda: _write(tmp_path / "c", Numbers(0)), "no tokens that count"),
        (lambda: ActivationCache(tmp_path / "none"), "no cache of activations, as it has no manifest.json"),
        (lambda: ActivationCache(tmp_path / "old"), "version 9; this release reads"),
        (lambda: ActivationCache(tmp_path / "bad"), "manifest.json is damaged"),
        (lambda: ActivationCache(folder, on_broken="ignore"), "'refuse' or 'skip'"),
    ]
    for call, message in refused:
        with pytest.raises(DataError, match=message):
            call()
    assert _files(tmp_path / "full") == {"thesis.txt": b"mine"}
