"""Pools of threads, made while others compute."""

from __future__ import annotations

import threading

import pytest
import torch

from limner.generation import lanes
from limner.threads import pool_of


def test_who_asks_for_the_first_time_while_a_pool_is_made_hears_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    there, own, told = torch.get_num_threads(), 29, []
    asking = threading.Thread(target=lambda: told.append(lanes.lanes(1)))
    set_threads = torch.set_num_threads

    def slowly(number: int) -> None:
        set_threads(number)
        if number == own:
            asking.start()
            asking.join(0.2)

    monkeypatch.setattr(torch, "set_num_threads", slowly)
    pool = pool_of(1, own)
    asking.join()
    assert told == [there]
    assert pool.submit(torch.get_num_threads).result() == own
    assert pool_of(1, own) is pool
