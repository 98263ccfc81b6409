"""The pool's own dispatch state on clusters we do not have: a discrete-event simulation.

Actors take lognormal times an item, some are stragglers, nodes fail at published rates, and
the driver handles one thing at a time. Time is simulated; decisions are the real code's.

    python benchmarks/simulate.py [--plot docs/scale.png]

Rates. Failures: Llama 3's 16,384 GPUs saw 419 unexpected interruptions in 54 days (Dubey et
al. 2024), one in 50,000 GPU hours. Preemption: spot capacity, one in 20 hours an actor here.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
from dataclasses import dataclass

from raypatch.sweeps.pool import Dispatch

ITEM_S = 1.0
SPREAD = 0.25
STRAGGLERS, SLOWDOWN = 0.01, 5.0
RESTART_S = 8.0
# Driver's time for sending an item, for taking its outcome, and for a flush of manifest lines,
# as benchmarks/driver_cost.py measures them.
HANDLE_S = 0.7e-3
FLUSH_S = 0.35e-3
HOUR = 3600.0


@dataclass(frozen=True)
class Outcome:
    makespan_s: float
    ideal_s: float
    driver_busy: float
    losses: int

    @property
    def efficiency(self) -> float:
        return self.ideal_s / self.makespan_s


def simulate(n_actors: int, n_items: int, mtbf_h: float, seed: int = 0) -> Outcome:
    """Run the real dispatch state in simulated time."""
    draw = random.Random(seed)
    dispatch: Dispatch[int] = Dispatch(iter(range(n_items)))
    numbers = itertools.count()
    # (time, order, actor, kind): an actor is ready, finishes its head, or is lost.
    events: list[tuple[float, int, int, str]] = []
    order = itertools.count()
    speed: dict[int, float] = {}
    finishing: dict[int, float] = {}
    losses, busy, now, work = 0, 0.0, 0.0, 0.0

    def push(at: float, actor: int, kind: str) -> None:
        heapq.heappush(events, (at, next(order), actor, kind))

    def start(at: float) -> None:
        actor = next(numbers)
        speed[actor] = SLOWDOWN if draw.random() < STRAGGLERS else 1.0
        push(at, actor, "ready")
        push(at + draw.expovariate(1 / (mtbf_h * HOUR)), actor, "lost")

    def begin(actor: int, at: float) -> None:
        nonlocal work
        seconds = ITEM_S * draw.lognormvariate(-(SPREAD**2) / 2, SPREAD) * speed[actor]
        work += seconds
        finishing[actor] = at + seconds
        push(at + seconds, actor, "done")

    for _ in range(n_actors):
        start(0.0)
    live: set[int] = set()
    while not dispatch.done:
        # The driver takes all that has happened by now at once, as the real loop does.
        at = max(now, events[0][0])
        batch = []
        while events and events[0][0] <= at:
            batch.append(heapq.heappop(events))
        now = at
        n_done = 0
        for when, _, actor, kind in batch:
            if kind == "ready":
                live.add(actor)
                dispatch.add_actor(actor)
            elif actor not in live:
                continue
            elif kind == "lost":
                live.discard(actor)
                losses += 1
                dispatch.actor_lost(actor)
                start(now + RESTART_S)
            elif finishing.get(actor) == when:
                dispatch.item_completed(actor)
                n_done += 1
                if dispatch.head(actor) is not None:
                    begin(actor, when)  # its next item waited in its queue
        sends = dispatch.sends()
        spent = HANDLE_S * (n_done + len(sends)) + (FLUSH_S if n_done else 0.0)
        busy += spent
        now += spent
        for send in sends:
            if finishing.get(send.actor, -1.0) <= now and dispatch.head(send.actor) == send.item:
                begin(send.actor, now)
    mean_speed = sum(1 / s for s in speed.values()) / len(speed)
    return Outcome(now, n_items * ITEM_S / (n_actors * mean_speed), busy / now, losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items_each", type=int, default=300, help="items an actor")
    parser.add_argument("--plot")
    options = parser.parse_args()
    counts = (1, 2, 8, 32, 128, 256, 512, 1000, 2000, 5000)
    rows = []
    print("actors  failures        makespan    ideal  efficiency  driver busy  losses")
    for name, mtbf_h in (("1 in 50,000 h", 50_000.0), ("1 in 20 h", 20.0)):
        for n in counts:
            found = simulate(n, n * options.items_each, mtbf_h)
            rows.append((name, n, found))
            print(
                f"{n:6}  {name:14} {found.makespan_s:8.0f} s {found.ideal_s:6.0f} s "
                f"{found.efficiency:10.1%} {found.driver_busy:12.1%} {found.losses:7}"
            )
    if options.plot:
        draw_plot(rows, options.plot)


def draw_plot(rows: list[tuple[str, int, Outcome]], path: str) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6))
    for (name, style), colour in zip(
        (("1 in 50,000 h", "o-"), ("1 in 20 h", "s--")), ("#0072B2", "#D55E00")
    ):
        mine = [(n, found) for other, n, found in rows if other == name]
        axes.semilogx([n for n, _ in mine], [100 * f.efficiency for _, f in mine], style,
                      color=colour, label=f"ideal / makespan, failures {name}")  # fmt: skip
    mine = [(n, found) for other, n, found in rows if other == "1 in 50,000 h"]
    axes.semilogx([n for n, _ in mine], [100 * f.driver_busy for _, f in mine], "k:",
                  label="driver busy")  # fmt: skip
    axes.set_xlabel("actors")
    axes.set_ylabel("per cent")
    axes.set_ylim(0, 105)
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()
