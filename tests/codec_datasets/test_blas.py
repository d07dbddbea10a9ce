# SPDX-License-Identifier: Apache-2.0
"""The limit on matrix threads is lifted again, whoever else is selecting at the same time."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Thread

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController

from codec_datasets.blas import single_threaded_blas


def _threads() -> set[int]:
    np.ones((2, 2)) @ np.ones((2, 2))  # loads the library
    return {entry["num_threads"] for entry in ThreadpoolController().info() if entry["user_api"] == "blas"}


def _set_threads(count: int) -> None:
    """From a thread that ends, as threadpoolctl lets a living one keep OpenBLAS to itself."""
    thread = Thread(target=lambda: ThreadpoolController().limit(limits=count, user_api="blas"))
    thread.start()
    thread.join()


@pytest.fixture
def two_threads():
    before = _threads()
    _set_threads(2)
    if _threads() != {2}:
        pytest.skip("this BLAS can't run on two threads")
    yield
    _set_threads(*before)


def test_one_thread_inside_and_the_old_limit_afterwards(two_threads):
    with single_threaded_blas:
        assert _threads() == {1}
        with single_threaded_blas:
            assert _threads() == {1}
        assert _threads() == {1}
    assert _threads() == {2}


def test_overlapping_users_restore_the_old_limit(two_threads):
    both_inside, first_left = Barrier(2), Barrier(2)

    def first() -> None:
        with single_threaded_blas:
            both_inside.wait()
        first_left.wait()

    def second() -> set[int]:
        with single_threaded_blas:
            both_inside.wait()
            first_left.wait()
            return _threads()

    with ThreadPoolExecutor(2) as pool:
        done = pool.submit(first), pool.submit(second)
        assert done[1].result() == {1}
        done[0].result()
    assert _threads() == {2}


def test_an_error_restores_the_old_limit(two_threads):
    with pytest.raises(ZeroDivisionError), single_threaded_blas:
        _ = 1 / 0
    assert _threads() == {2}
