# SPDX-License-Identifier: Apache-2.0
"""Isolated workers: outcomes in the order of the items, a poisoned item costs only itself, nothing stays behind.

What workers run must be importable by name, which a test module isn't; it lies in a module of its own (`POISONS`).
"""

import importlib
import logging
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import count, islice
from pathlib import Path

import pytest

from codec_datasets import workers
from codec_datasets.errors import VideoError
from codec_datasets.workers import run_isolated

POISONS = '''
import itertools, os, signal, threading, time
from pathlib import Path

def act(order):
    """Carry out `(verb, argument)`."""
    verb, argument = order
    return globals()[verb](argument)

def give(value):
    return value

def wait(seconds):
    time.sleep(seconds)

def fail(error):
    raise error

def fail_for_memory(error):
    raise error from MemoryError()

def spin(_):
    sum(itertools.repeat(0))  # in C, without a chance for Python's signal handlers

def abort(_):
    os.abort()

def leave(status):
    os._exit(status)

def kill(number):
    os.kill(os.getpid(), number)

def allocate(megabytes):
    return len(bytearray(megabytes << 20))

def lock(_):
    return threading.Lock()

def value_that_cannot_be_read(_):
    return Unreadable()

def crash_at_first(path):
    """Die when called for the first time."""
    if not Path(path).exists():
        Path(path).touch()
        os.abort()
    return "survived"

def note(path):
    with open(path, "a") as file:
        file.write(f"{os.getpid()}\\n")

class Unreadable:
    def __reduce__(self):
        return int, ("no number",)
'''
SCRIPT = """
import multiprocessing
import signal
from codec_datasets.workers import run_isolated
from poisons import act

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background starts with it ignored
    orders = [("give", 1), ("give", 2), ("spin", None)]
    outcomes = run_isolated(act, orders, num_workers=2, time_limit_seconds={limit})
    next(outcomes), next(outcomes)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    {then}
"""

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc or limits memory")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where `poisons` can be imported from, here and in workers, which inherit the path."""
    folder = tmp_path_factory.mktemp("importable")
    (folder / "poisons.py").write_text(POISONS, encoding="utf-8")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("poisons", None)


@pytest.fixture(scope="module")
def poisons(folder):
    return importlib.import_module("poisons")


@pytest.fixture(autouse=True)
def nothing_stays_behind():
    yield
    assert multiprocessing.active_children() == []


def results(outcomes):
    """All of the outcomes but the time they took."""
    return [(each.item, each.value, each.error, each.error_kind, each.attempts) for each in outcomes]


def kinds(outcomes):
    return [outcome.error_kind for outcome in outcomes]


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # a zombie has ended, only nobody asked how


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_outcomes_come_in_the_order_of_the_items_whatever_the_number_of_workers(poisons, num_workers):
    orders = [("wait", 0.2), *(("give", number) for number in range(20)), ("fail", ValueError("no")), ("wait", 0.0)]
    values = [None, *range(20), None, None]
    expected = [(order, value, None, None, 1) for order, value in zip(orders, values)]
    expected[21] = (orders[21], None, "ValueError: no", "exception", 1)
    assert results(run_isolated(poisons.act, orders, num_workers=num_workers)) == expected


def test_endless_items_are_taken_as_they_are_needed():
    taken = []
    items = (taken.append(number) or number for number in count())
    outcomes = run_isolated(math.sqrt, items, num_workers=2)
    assert not taken
    assert [outcome.value for outcome in islice(outcomes, 10)] == [math.sqrt(number) for number in range(10)]
    outcomes.close()
    assert len(taken) <= 10 + 2 * 4


def test_few_outcomes_wait_for_an_earlier_one(poisons):
    taken = []
    items = (taken.append(number) or (("give", number) if number else ("wait", 0.5)) for number in count())
    outcomes = run_isolated(poisons.act, items, num_workers=2)
    next(outcomes)
    outcomes.close()
    assert len(taken) <= 2 * 4 + 2  # the workers get new items before the first outcome is handed over


def test_many_small_items_and_a_large_one():
    items = [*(b"%d" % number for number in range(2000)), bytes(5_000_000)]
    assert [outcome.value for outcome in run_isolated(bytes.hex, items, num_workers=2)] == [x.hex() for x in items]


def test_no_items_start_no_worker():
    assert list(run_isolated(math.sqrt, [], num_workers=2, setup=os.abort)) == []


def test_a_crash_costs_one_item(poisons):
    orders = [("give", 1), ("abort", None), ("leave", 3), ("kill", signal.SIGKILL), ("give", 2)]
    done = list(run_isolated(poisons.act, orders))
    assert kinds(done) == [None, "crash", "crash", "crash", None]
    assert [outcome.error for outcome in done[1:4]] == [
        "worker was killed by SIGABRT",
        "worker ended with exit status 3",
        "worker was killed by SIGKILL",
    ]
    assert (done[0].value, done[4].value) == (1, 2)


def test_an_endless_loop_costs_one_item(poisons):
    slow, fast = run_isolated(poisons.act, [("spin", None), ("give", 1)], time_limit_seconds=1)
    assert (slow.error, slow.error_kind, slow.attempts) == ("not done after 1 s", "time limit", 1)
    assert slow.seconds >= 1
    assert (fast.value, fast.error) == (1, None)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers of a process")
def test_an_endless_loop_ends_while_the_consumer_is_busy(poisons):
    outcomes = run_isolated(poisons.act, [("give", 1), ("spin", None)], time_limit_seconds=0.5)
    next(outcomes)
    while multiprocessing.active_children():
        time.sleep(0.05)
    assert kinds(outcomes) == ["time limit"]


@needs_linux
def test_an_allocation_beyond_the_limit_costs_one_item(poisons):
    orders = [("allocate", 100), ("allocate", 400), ("allocate", 1 << 30), ("allocate", 100)]
    done = list(run_isolated(poisons.act, orders, memory_limit_mb=300))
    assert kinds(done) == [None, "memory limit", "memory limit", None]
    assert done[1].error == "MemoryError"


def test_an_error_that_memory_caused_counts_as_memory(poisons):
    order = ("fail_for_memory", VideoError("a.mp4", "open", "no memory", "Buy some"))
    assert kinds(run_isolated(poisons.act, [order], num_workers=0)) == ["memory limit"]


def test_a_memory_limit_is_ignored_with_a_warning_where_it_does_not_work(monkeypatch, caplog):
    monkeypatch.setattr(workers.sys, "platform", "darwin")
    with caplog.at_level(logging.WARNING):
        run_isolated(math.sqrt, [], memory_limit_mb=300)
    assert "memory_limit_mb=300 is ignored" in caplog.text


def test_failed_items_are_tried_again(poisons, tmp_path):
    orders = [("crash_at_first", tmp_path / "mark"), ("fail", ValueError("no")), ("give", 1)]
    crashed, failed, sound = run_isolated(poisons.act, orders, num_workers=1, attempts=3)
    assert (crashed.value, crashed.error, crashed.attempts) == ("survived", None, 2)
    assert (failed.error, failed.error_kind, failed.attempts) == ("ValueError: no", "exception", 3)
    assert sound.attempts == 1


def test_items_are_tried_again_in_this_process(poisons):
    (outcome,) = run_isolated(poisons.fail, [ValueError("no")], num_workers=0, attempts=3)
    assert (outcome.error, outcome.attempts) == ("ValueError: no", 3)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_exceptions_become_one_line(poisons, num_workers):
    video_error = VideoError("a.mp4", "decode", "3 of 8 frames were lost", "Re-encode it")
    errors = [ValueError("two\nlines"), ValueError(), video_error, SystemExit(3), ValueError("x" * 1_000_000)]
    done = list(run_isolated(poisons.fail, errors, num_workers=num_workers))
    assert [outcome.error for outcome in done[:4]] == [
        "ValueError: two lines",
        "ValueError",
        "VideoError: a.mp4: decode: 3 of 8 frames were lost. Re-encode it",
        "SystemExit: 3",
    ]
    assert len(done[4].error) == 2000
    assert set(kinds(done)) == {"exception"}


def test_what_cannot_be_sent_is_an_exception(poisons):
    items = [
        ("lock", None),
        ("value_that_cannot_be_read", None),
        ("give", lambda: 0),
        poisons.Unreadable(),
        ("give", 1),
    ]
    done = list(run_isolated(poisons.act, items))
    assert kinds(done) == ["exception"] * 4 + [None]
    for outcome, text in zip(done, ["cannot pickle", "invalid literal for int", "pickle", "invalid literal for int"]):
        assert text in outcome.error
    assert [outcome.attempts for outcome in done] == [1, 1, 0, 1, 1]


def test_a_worker_that_dies_idle_costs_nothing(poisons):
    def items():
        yield 1
        for child in multiprocessing.active_children():  # an item is taken when the only worker is idle
            child.kill()
            child.join()
        yield 2

    assert results(run_isolated(poisons.give, items())) == [(1, 1, None, None, 1), (2, 2, None, None, 1)]


def test_set_up_runs_once_in_each_worker(poisons, tmp_path):
    path = tmp_path / "notes"
    orders = [("give", 1), ("abort", None), ("give", 2)]
    assert kinds(run_isolated(poisons.act, orders, setup=partial(poisons.note, path))) == [None, "crash", None]
    pids = path.read_text().split()
    assert len(set(pids)) == len(pids) == 2


def test_set_up_runs_once_in_this_process(poisons, tmp_path):
    path = tmp_path / "notes"
    list(run_isolated(poisons.give, [1, 2], num_workers=0, setup=partial(poisons.note, path)))
    assert path.read_text().split() == [str(os.getpid())]


def test_a_set_up_that_fails_ends_the_run(poisons):
    with pytest.raises(RuntimeError, match="could not be set up: ValueError: no model"):
        list(run_isolated(poisons.give, [1], setup=partial(poisons.fail, ValueError("no model"))))


def test_workers_that_never_start_end_the_run(poisons):
    with pytest.raises(RuntimeError, match=r"SIGABRT while it started, 3 times in a row; does the script"):
        list(run_isolated(poisons.give, [1], setup=os.abort))


def test_a_start_may_fail_once(poisons, tmp_path):
    setup = partial(poisons.crash_at_first, tmp_path / "mark")
    assert results(run_isolated(poisons.give, [1], setup=setup)) == [(1, 1, None, None, 1)]


def test_closing_early_ends_busy_workers(poisons):
    outcomes = run_isolated(poisons.act, [("give", 1), ("spin", None), ("spin", None)], num_workers=2)
    next(outcomes)
    pids = [child.pid for child in multiprocessing.active_children()]
    assert len(pids) == 2
    outcomes.close()
    assert multiprocessing.active_children() == []
    assert not any(map(is_running, pids))


def test_a_consumer_that_fails_ends_the_workers(poisons):
    def consume():
        for outcome in run_isolated(poisons.act, [("give", 1), ("spin", None)]):
            raise KeyError(outcome.value)

    with pytest.raises(KeyError):
        consume()
    assert multiprocessing.active_children() == []


def test_items_that_fail_end_the_workers():
    def items():
        yield 1
        raise OSError("the manifest is gone")

    with pytest.raises(OSError, match="the manifest is gone"):
        list(run_isolated(math.sqrt, items()))
    assert multiprocessing.active_children() == []


def start_script(folder, tmp_path, limit, then):
    """A run in a process group of its own, with its workers' ids."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(limit=limit, then=then), encoding="utf-8")
    run = subprocess.Popen(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    return run, [int(pid) for pid in run.stdout.readline().split()]


def wait_for_end(pids):
    for _ in range(600):
        if not any(map(is_running, pids)):
            return
        time.sleep(0.05)
    raise AssertionError(f"still running: {[pid for pid in pids if is_running(pid)]}")


@needs_linux
def test_a_killed_parent_leaves_neither_idle_nor_endless_workers(folder, tmp_path):
    run, pids = start_script(folder, tmp_path, limit=1, then="import time; time.sleep(60)")
    assert len(pids) == 2
    run.kill()
    run.wait()
    wait_for_end(pids)
    run.stdout.close()
    run.stderr.close()


@needs_linux
def test_ctrl_c_ends_the_workers_without_a_word_from_them(folder, tmp_path):
    run, pids = start_script(folder, tmp_path, limit=1000, then="next(outcomes)")
    os.killpg(run.pid, signal.SIGINT)
    _, stderr = run.communicate(timeout=60)
    assert stderr.count("Traceback") == stderr.count("KeyboardInterrupt\n") == 1
    wait_for_end(pids)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"attempts": 0}, "attempts must be at least 1, got 0"),
        ({"time_limit_seconds": 0}, "time_limit_seconds must be None or more than 0, got 0"),
        ({"memory_limit_mb": -5}, "memory_limit_mb must be None or more than 0, got -5"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        run_isolated(math.sqrt, [], **arguments)
