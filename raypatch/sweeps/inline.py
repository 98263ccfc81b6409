"""The work of a run in the driver's own process."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raypatch.errors import InputError, NoRoomError, RaypatchError, RunError, gpu_failed, one_line
from raypatch.sweeps.pool import Dispatch
from raypatch.sweeps.work import Item, Outcome, Quarantined, Tick, Work, verdict

if TYPE_CHECKING:
    from raypatch.sweeps.shipping import Shipment


class InlineBackend:
    """The same work in the driver's own process, with no Ray: same code, same bytes."""

    name = "inline"

    def __init__(self, device: str) -> None:
        self._wanted = device
        self.device = "cpu"

    def __enter__(self) -> InlineBackend:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def packed(self, value: Any, folders: Sequence[Path]) -> Shipment:
        """The value for a worker in this very process, which has all code at hand."""
        from raypatch.sweeps.shipping import pack

        return pack(value)

    def wait_started(self) -> None:
        """Settle the device."""
        import torch

        available = torch.cuda.is_available()
        if self._wanted == "cuda" and not available:
            raise InputError("--device cuda: torch sees no GPU; use --device cpu")
        self.device = "cuda" if available and self._wanted != "cpu" else "cpu"

    def outcomes(self, work: Work) -> Generator[Outcome | Quarantined | Tick, None, None]:
        """See :class:`Backend`; one item at a time."""
        import torch

        from raypatch.sweeps.worker import Worker

        n_threads = torch.get_num_threads()
        dispatch = Dispatch(
            work.items, halve=Item.halves, without=Item.without, in_flight_per_actor=1
        )
        dispatch.add_actor(0)
        try:
            worker = Worker(work.spec)
            while not dispatch.done and not work.stopping():
                for send in dispatch.sends():
                    experiments = work.experiments_of(send.item)
                    try:
                        if send.probe:
                            worker.probe(experiments)
                        else:
                            yield worker.compute(send.item, experiments, send.tries)
                    except (Exception, SystemExit) as error:  # a network may raise anything
                        if isinstance(error, RaypatchError) and not isinstance(error, NoRoomError):
                            raise
                        if gpu_failed(error):
                            raise RunError(
                                f"{send.item}: the GPU failed: {one_line(error)}; run the same "
                                "command again to resume"
                            ) from error
                        failed = dispatch.item_failed(0)
                        if failed is not None:
                            yield verdict(failed, one_line(error))
                    else:
                        dispatch.item_completed(0)
                yield Tick(1, dispatch.retries, dispatch.n_in_flight)
        finally:
            torch.set_num_threads(n_threads)
