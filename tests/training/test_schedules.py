"""Schedules at their corners."""

from __future__ import annotations

import pytest

from clt_plugin.training.schedules import learning_rate, rising


def test_rising():
    assert [rising(step, 5) for step in range(5)] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert rising(0, 5, over=0) == 1
    assert rising(70, 100, over=0.7) == 1


def test_the_learning_rate_falls_over_the_last_fifth():
    rates = [learning_rate(step, 100, warm_up=4) for step in range(100)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert set(rates[4:81]) == {1.0}
    assert rates[81:] == pytest.approx([(100 - step) / 20 for step in range(81, 100)])
    assert learning_rate(9, 10, last=0) == 1


def test_refusals():
    with pytest.raises(ValueError, match="a run of 10 steps has no step 10"):
        rising(10, 10)
    with pytest.raises(ValueError, match="last is a share of the run, from 0 to 1, not 20"):
        learning_rate(0, 100, last=20)
