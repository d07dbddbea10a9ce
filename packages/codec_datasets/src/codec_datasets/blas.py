# SPDX-License-Identifier: Apache-2.0
"""One thread for matrix products that are small and many: more of them slow each other down up to a hundredfold."""

from functools import cache, wraps

from threadpoolctl import ThreadpoolController


@cache
def _controller() -> ThreadpoolController:
    """Finding the loaded libraries takes milliseconds, so it is done once."""
    return ThreadpoolController()


def single_threaded_blas(function):
    """Decorator: run a function with BLAS limited to one thread; the previous limit returns afterwards."""

    @wraps(function)
    def limited(*args, **kwargs):
        with _controller().limit(limits=1, user_api="blas"):
            return function(*args, **kwargs)

    return limited
