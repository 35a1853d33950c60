"""The shuffle buffer: every token once, mixed, the same again from any point, and a thread that always ends."""

from __future__ import annotations

import gc
import json
import threading
import time

import pytest
import torch

from clt_plugin import Wiring
from clt_plugin.training.data import ActivationCache, Buffer, DataError, harvest, mixing, write_cache
from support.models import make_model
from training.sources import SITES, WIDTHS, Numbers

THREAD = "clt_plugin-data"


@pytest.fixture(autouse=True)
def _nothing_left_running():
    yield
    gc.collect()
    assert not _running()


def _running():
    return [thread for thread in threading.enumerate() if thread.name == THREAD]


def _draw(buffer, sizes):
    """Tokens drawn with these batch sizes in turn, to the end; checks that every value is the token's own."""
    drawn = []
    for number in range(10_000):
        batch = buffer.draw(sizes[number % len(sizes)])
        assert torch.equal(batch.flat, batch.origins[:, None] + torch.arange(5) / 8)
        drawn.append(batch.origins)
        if len(batch) < sizes[number % len(sizes)]:
            return torch.cat(drawn)
    raise AssertionError


@pytest.mark.parametrize("capacity", [1, 2, 10, 33, 100, 250])
@pytest.mark.parametrize("sizes", [(1,), (8,), (3, 17, 60)])
def test_every_token_is_drawn_once_in_blocks(capacity, sizes):
    with Buffer(Numbers(), capacity) as buffer:
        drawn = _draw(buffer, sizes)
        assert buffer.nbytes == capacity * sum(WIDTHS) * 4
        assert len(buffer.draw(5)) == 0
    for block, tokens in enumerate(drawn.split(capacity)):
        first = block * capacity
        assert sorted(tokens.tolist()) == list(range(first, min(first + capacity, 100)))


def test_the_order_depends_on_the_seed_alone():
    slow = threading.Event()
    threading.Timer(0.05, slow.set).start()
    orders = []
    for settings, source, sizes in [
        ({}, Numbers(), (8,)),
        ({"ahead": 7}, Numbers(sizes=(2, 50)), (3, 60)),
        ({}, Numbers(gate=slow), (1,)),
        ({"seed": 1}, Numbers(), (8,)),
    ]:
        with Buffer(source, 30, **settings) as buffer:
            orders.append(_draw(buffer, sizes).tolist())
    assert orders[0] == orders[1] == orders[2] != orders[3]
    within = [[origin - block * 30 for origin in orders[0][block * 30 : block * 30 + 30]] for block in range(3)]
    assert within[0] != within[1] != within[2]


def test_mixing_is_one_for_a_random_order_and_nothing_for_the_sources_own():
    n = 20_000
    assert mixing(torch.arange(n)) < 2e-4
    assert mixing(torch.randperm(n)) == pytest.approx(1, abs=0.02)
    some = torch.randperm(n)[:3000] * 7 + 5  # from wherever tokens come
    assert mixing(some) == pytest.approx(1, abs=0.05)
    x = torch.tensor([4, 9, 1, 30])
    pairs = [abs(a - b) for i, a in enumerate(x.tolist()) for b in x.tolist()[:i]]
    assert mixing(x) == pytest.approx((5 + 8 + 29) / 3 / (sum(pairs) / 6))
    with Buffer(Numbers(n, (500,)), 4000) as buffer:
        drawn = _draw(buffer, (256,))
    assert [round(mixing(block), 1) for block in drawn.split(4000)] == [1.0] * 5
    assert mixing(drawn) == pytest.approx(4000 / n, rel=0.05)


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4, 7, 12, 13])
def test_a_run_goes_on_at_the_same_tokens(after):
    with Buffer(Numbers(), 21) as buffer:
        for _ in range(after):
            buffer.draw(8)
        state = json.loads(json.dumps(buffer.state_dict()))
        expected = [batch.origins.tolist() for batch in buffer.batches(8, drop_last=False)]
    source = Numbers()
    with Buffer(source, 21) as buffer:
        buffer.load_state_dict(state)
        assert buffer.state_dict() == state
        assert [batch.origins.tolist() for batch in buffer.batches(8, drop_last=False)] == expected
    assert source.made <= len(list(Numbers().chunks())) - after * 8 // 21 * 3  # what came before is not made again
    with Buffer(Numbers(), 21) as buffer:  # one that was in use forgets where it stood
        buffer.draw(50)
        buffer.load_state_dict(state)
        assert [batch.origins.tolist() for batch in buffer.batches(8, drop_last=False)] == expected


def test_a_run_on_a_model_or_a_cache_goes_on_bit_by_bit(tmp_path):
    texts = torch.randint(2, 61, (40, 9), generator=torch.Generator().manual_seed(0))

    def live():
        return harvest(make_model("gpt2"), texts, Wiring.plt(2), length=16, batch_size=3, epochs=None)

    cache = tmp_path / "cache"
    write_cache(live(), cache, max_tokens=400, shard_bytes=5000, bar=False)
    for make in (live, lambda: ActivationCache(cache, chunk_tokens=20, shuffle=1, epochs=None)):
        with Buffer(make(), 128) as buffer:
            for _ in range(9):
                buffer.draw(64)
            state = buffer.state_dict()
            expected = [buffer.draw(64) for _ in range(6)]
        with Buffer(make(), 128) as buffer:
            buffer.load_state_dict(state)
            for batch in expected:
                again = buffer.draw(64)
                assert torch.equal(again.flat, batch.flat)
                assert torch.equal(again.origins, batch.origins)


def test_a_state_of_something_else_is_refused():
    with Buffer(Numbers(), 21) as buffer:
        buffer.draw(50)
        state = buffer.state_dict()
    for other, message in [
        (Buffer(Numbers(), 22), "had capacity 21, not 22"),
        (Buffer(Numbers(), 21, seed=2), "had seed 0, not 2"),
        (Buffer(Numbers(name="others"), 21), "had another source"),
    ]:
        with other, pytest.raises(DataError, match=message):
            other.load_state_dict(state)
    short = Numbers()
    short.chunks = lambda start=None: iter(())
    with Buffer(short, 21) as buffer, pytest.raises(DataError, match="fewer tokens than when the run was stopped"):
        buffer.load_state_dict(state)


def test_no_more_is_held_than_is_said():
    source = Numbers(5000, (10,))
    with Buffer(source, 100, ahead=3) as buffer:
        for _ in range(40):
            buffer.draw(25)
            time.sleep(0.002)  # the thread gets as far ahead as it may
            drawn = (buffer._block * 100 + buffer._at) / 10
            # The block, chunks that wait, one being used, one that is made.
            assert source.made <= drawn + 10 + 3 + 2
        assert buffer._rows.shape == (100, 5)
    assert source.threads.isdisjoint({threading.current_thread()})


def test_harvest_goes_on_while_nothing_is_drawn():
    source = Numbers(5000, (10,))
    with Buffer(source, 100, ahead=3) as buffer:
        buffer.draw(10)
        deadline = time.monotonic() + 5
        while source.made < 14 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert source.made == 14  # the block, three that wait, one for which there is no room


@pytest.mark.parametrize("error", [RuntimeError("the disk is gone"), DataError("no"), KeyboardInterrupt()])
def test_what_the_source_raises_is_raised_where_tokens_are_drawn(error):
    source = Numbers(fail=9, error=error)
    with Buffer(source, 20) as buffer:
        drawn = []
        with pytest.raises(type(error)) as raised:
            drawn.extend(len(buffer.draw(4)) for _ in range(100))
        assert raised.value is error
        assert sum(drawn) >= 20  # what was whole before is not lost
        with pytest.raises(type(error)):
            buffer.draw(4)
    assert source.closed == 1


def test_the_thread_ends_however_the_buffer_does():
    sources = [Numbers(10**6) for _ in range(4)]
    for source in sources[:2]:
        with Buffer(source, 20) as buffer:
            buffer.draw(5)
        assert source.closed == 1  # though the buffer is still known
        assert not _running()
        with pytest.raises(DataError, match="closed: make a new one"):
            buffer.draw(5)
    buffer.close()
    with pytest.raises(ZeroDivisionError), Buffer(sources[2], 20) as buffer:
        1 / (len(buffer.draw(5)) - 5)
    buffer = Buffer(sources[3], 20)
    buffer.draw(5)
    del buffer  # forgotten, not closed
    gc.collect()
    deadline = time.monotonic() + 5
    while not all(source.closed for source in sources) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [source.closed for source in sources] == [1] * 4


def test_paused_the_harvest_stands_still():
    source = Numbers(10**6, (10,))
    with Buffer(source, 50) as buffer:
        with buffer.paused():  # before the thread was started
            pass
        buffer.draw(10)
        with buffer.paused():
            made = source.made
            with pytest.raises(DataError, match="paused"):
                buffer.draw(10)
            time.sleep(0.05)
            assert source.made == made
        assert len(buffer.draw(100)) == 100
        assert source.made > made


def test_batches_are_given_by_site_and_stacked():
    with Buffer(Numbers(10, (10,)), 10) as buffer:
        batch = buffer.draw(4)
    found = batch.by_site()
    assert list(found) == list(SITES)
    assert [tuple(value.shape) for value in found.values()] == [(4, 3), (4, 2)]
    with pytest.raises(DataError, match=r"widths \[3, 2\] cannot be stacked"):
        batch.stacked()
    assert torch.equal(batch.stacked([SITES[1]])[0], found[SITES[1]])
    assert batch.to(dtype=torch.float64).flat.dtype == torch.float64
