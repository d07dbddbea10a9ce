# SPDX-License-Identifier: Apache-2.0
"""One thread for matrix products that are small and many: more of them slow each other down up to a hundredfold."""

import os
import threading
from collections.abc import Callable
from contextlib import ContextDecorator
from functools import cache

from threadpoolctl import ThreadpoolController


@cache
def _controller() -> ThreadpoolController:
    """Finding the loaded libraries takes milliseconds, so it is done once."""
    return ThreadpoolController()


def _in_passing_thread(function: Callable[[], object]) -> None:
    """Run a function in a thread that ends at once.

    threadpoolctl lets the first thread that sets a limit keep OpenBLAS to itself while it lives; a thread that is gone
    stands in nobody's way, so whoever leaves last can restore what somebody else set.
    """
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


class _SingleThreadedBlas(ContextDecorator):
    """Limits BLAS to one thread while anyone is inside.

    The limit is the process's, so concurrent users share it: the first one in sets it, the last one out restores what
    was there before.
    """

    def __init__(self) -> None:
        self._lock, self._users, self._limit = threading.Lock(), 0, None

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                _in_passing_thread(self._set)
            self._users += 1

    def __exit__(self, *exception) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                _in_passing_thread(self._limit.restore_original_limits)

    def _set(self) -> None:
        self._limit = _controller().limit(limits=1, user_api="blas")


single_threaded_blas = _SingleThreadedBlas()
"""Decorator and context manager."""

if hasattr(os, "register_at_fork"):  # a child may be forked while another thread is inside
    os.register_at_fork(after_in_child=single_threaded_blas.__init__)
