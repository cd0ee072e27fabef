"""Work on the chunks of a stream in several processes, with the results in order and a bounded number under way."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import TypeVar

from serving.errors import GPT2BundleError

Chunk = TypeVar("Chunk")
Result = TypeVar("Result")

# Starting processes takes longer than this few chunks.
_CHUNKS_ALONE = 8


def map_in_order(function: Callable[[Chunk], Result], chunks: Iterable[Chunk], workers: int) -> Iterator[Result]:
    """Yield `function` of each chunk, in order; it, the chunks and the results are pickled.

    With one worker, or up to eight chunks, all runs in this process. Of the chunks, two a worker and two more are held
    at a time. Raises what `function` or the stream of chunks raises, and GPT2BundleError if a worker is killed.
    """
    stream = iter(chunks)
    first = list(islice(stream, _CHUNKS_ALONE + 1)) if workers > 1 else []
    if len(first) <= _CHUNKS_ALONE:
        yield from map(function, chain(first, stream))
        return
    # Not forked: this process may have threads (the tokenizers library's, a progress bar's).
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin)
    under_way: deque[Future[Result]] = deque()
    try:
        for chunk in chain(first, stream):
            under_way.append(pool.submit(function, chunk))
            if len(under_way) >= 2 * workers + 2:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool:
        raise GPT2BundleError(
            "a worker process was killed, most likely for want of memory; give fewer --workers, or cut long documents"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """Leave interrupts to the parent, and end with it, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch(sentinel: int) -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()
