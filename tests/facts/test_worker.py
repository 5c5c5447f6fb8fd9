"""A thread that does jobs in order: failures reach who waits, and nothing outlives its owner."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch

from shardwise.zero.worker import Worker


class MishapError(Exception):
    """The fault on purpose."""


def fail() -> None:
    raise MishapError("in a job")


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "tested"]


def test_jobs_are_done_in_order_in_one_thread() -> None:
    worker, done = Worker("tested", nullcontext), []
    assert threads() == []
    for number in range(100):
        worker.put(lambda number=number: done.append((number, threading.get_ident(), torch.is_grad_enabled())))
    worker.finish()
    assert [number for number, *_ in done] == list(range(100))
    ((ident, grad),) = {(ident, grad) for _, ident, grad in done}
    assert ident != threading.get_ident()
    assert not grad
    worker.close()
    worker.close()
    assert threads() == []


@pytest.mark.parametrize("error", [MishapError, SystemExit])
def test_a_failure_reaches_all_who_wait_and_no_other_job_is_done(error: type[BaseException]) -> None:
    worker, done, begins = Worker("tested", nullcontext), [], threading.Event()

    def fail_later() -> None:
        begins.wait()
        raise error("in a job")

    worker.put(fail_later)
    worker.put(lambda: done.append(1))
    begins.set()
    for wait in (lambda: worker.wait_until(lambda: False), lambda: worker.put(fail), worker.finish):
        with pytest.raises(error):
            wait()
    worker.drop()
    worker.put(lambda: done.append(2))
    worker.finish()
    assert done == [2]
    worker.close()


def test_what_has_not_begun_is_dropped() -> None:
    worker, done, begun, goes_on = Worker("tested", nullcontext), [], threading.Event(), threading.Event()

    def first() -> None:
        begun.set()
        goes_on.wait()
        done.append("first")
        fail()

    worker.put(first)
    worker.put(lambda: done.append("second"))
    begun.wait()
    threading.Timer(0.05, goes_on.set).start()
    worker.drop()
    assert done == ["first"]
    worker.finish()  # its failure was dropped, too
    worker.close()


def test_a_thread_that_cannot_begin_is_told() -> None:
    @contextmanager
    def around() -> Iterator[None]:
        raise MishapError("no stream")
        yield

    worker = Worker("tested", around)
    for _ in range(2):
        with pytest.raises(MishapError):
            worker.put(lambda: None)
            worker.wait_until(lambda: False)
        worker.drop()
    worker.close()


def test_the_thread_ends_with_its_owner() -> None:
    worker = Worker("tested", nullcontext)
    worker.put(lambda: None)
    worker.finish()
    (thread,) = [each for each in threading.enumerate() if each.name == "tested"]
    del worker
    gc.collect()
    thread.join(timeout=30)
    assert not thread.is_alive()
