"""Calls in processes of their own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

Result = TypeVar("Result")


def in_processes(jobs: int, calls: Sequence[Callable[[], Result]]) -> Iterator[Result]:
    """Results as they come, of so many calls at a time."""
    fresh = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(jobs, mp_context=fresh) as pool:
        for future in as_completed([pool.submit(call) for call in calls]):
            yield future.result()
