"""A call's time on a GPU: so many of them in a CUDA graph, between two events."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .cells import Call

# Calls in a graph: the clock shows a fraction of a microsecond of a kernel of two. In place they go on from each
# other's results; which values are added does not change how long it takes.
CALLS = 20


def graph_timer(call: Call) -> Callable[[], float]:
    """What measures ``call``, in seconds, as it is launched under the tuning in force now.

    In a graph because Python takes longer to launch a small kernel than it runs. The L2 is warm, as after the
    block before.
    """
    call.run()  # compiles: nothing may while a graph is captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call.run()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def measure() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / CALLS

    measure()  # the first replay uploads the graph
    return measure
