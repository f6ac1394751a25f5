"""What a mean in new memory costs, against one with `out=`: `python -m results.ops.new_memory`.

For 5 and 50 clients of ResNet-18's size: ms of a plain sum over the clients ("read"), of the op in new memory and of the op with `out=`,
in turns, and the share of the read's bandwidth that both reach. "at first" are the medians of the first five turns, "then" those of the
last fifteen of thirty. In a virtual machine the host gives memory on its first touch and takes back what was free for a while, so "then"
is the op and what the system's own kernel does, and "at first" includes what the host does. "after N s": the same call after N seconds
in which nothing ran.
"""

import statistics
import time

from bench.ops import Case, resnet18
from bench.timing import print_origin


def milliseconds(call) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


print_origin("results.ops.new_memory", "5 and of 15")
for clients in (5, 50):
    case = Case(resnet18(), clients, "cpu")
    for op in ("aggregate", "weighted_mean"):
        ways = getattr(case, op)()
        calls = {"read": case.clients.sum, "new memory": ways["ours"], "out=": ways["out="]}
        turns = [{name: milliseconds(call) for name, call in calls.items()} for _ in range(30)]
        moved = case.floats(op, "ours") / case.clients.numel()  # in units of what the read moves
        for when, of in (("at first", turns[:5]), ("then", turns[15:])):
            ms = {name: statistics.median(turn[name] for turn in of) for name in calls}
            shares = ", ".join(f"{name} {ms[name]:.1f} ms ({moved * ms['read'] / ms[name]:.0%})" for name in ("new memory", "out="))
            print(f"K = {clients}, {op}, {when}: read {ms['read']:.1f} ms, {shares}", flush=True)
        for seconds in (1, 3):
            time.sleep(seconds)
            print(f"K = {clients}, {op}, after {seconds} s: new memory {milliseconds(ways['ours']):.1f} ms", flush=True)
