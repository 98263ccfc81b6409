"""The main job: read, check, plan, compute on a backend, commit, report."""

from __future__ import annotations

import json
import pickle
import platform
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raypatch.agents.agent import Agent, AgentOptions
from raypatch.definitions import Experiments, read_definition
from raypatch.errors import InputError, Interrupted
from raypatch.inputs import SIDES, Inputs, read_inputs
from raypatch.progress import Progress
from raypatch.results import layout
from raypatch.results.schema import COMPRESSIONS, DIRECTIONS, FORMAT_VERSION, SAVE_MODES, Columns

if TYPE_CHECKING:
    from raypatch.actors import InlineBackend, RayBackend
    from raypatch.engine.patcher import Patcher
    from raypatch.results.reader import Results
    from raypatch.sweep import Range
    from raypatch.verification import Verifier
    from raypatch.worker import WorkerSpec

INPUTS_FOLDER = "activation_inputs"
DTYPES = ("float32", "float64")
SOURCES = ("pair", "zero", "mean", "resample")


@dataclass(frozen=True)
class RunConfig:
    """Options of ``raypatch run``, under the names of the command line."""

    agent_path: str
    definition_file: str
    output_dir: str
    start_index: int = 0
    end_index: int | None = None
    clean_inputs: str | None = None
    corrupted_inputs: str | None = None
    input_ids: str | None = None
    agent_file: str | None = None
    agent_factory: str | None = None
    agent_output: str | None = None
    activation: str | None = None
    trust_agent_code: bool = False
    direction: str = "both"
    source: str = "pair"
    seed: int = 0
    metrics: str | None = None
    save: str = "full"
    compression: str = "lz4"
    num_actors: int | None = None
    gpus_per_actor: float = 1.0
    device: str = "auto"
    dtype: str = "float32"
    batch_size: int | None = None
    memory_per_actor: int = 4 << 30
    address: str | None = None
    backend: str = "ray"
    verify: int = 8
    overwrite: bool = False
    quiet: bool = False
    debug: bool = False

    def agent_options(self) -> AgentOptions:
        return AgentOptions(
            self.agent_file,
            self.agent_factory,
            self.agent_output,
            self.activation,
            self.trust_agent_code,
        )


_CHOICES = {
    "direction": ("both", *DIRECTIONS),
    "source": SOURCES,
    "save": SAVE_MODES,
    "compression": COMPRESSIONS,
    "dtype": DTYPES,
    "backend": ("ray", "inline"),
    "device": ("auto", "cpu", "cuda"),
}
_AT_LEAST = {
    "num_actors": 1, "verify": 0, "batch_size": 1, "memory_per_actor": 1 << 20, "start_index": 0,
}  # fmt: skip


def check_config(config: RunConfig) -> None:
    """Everything that can be refused without reading a file."""
    for name, valid in _CHOICES.items():
        value = getattr(config, name)
        if value not in valid:
            raise InputError(f"--{name}: {value!r} is not one of {', '.join(valid)}")
    for name, least in _AT_LEAST.items():
        value = getattr(config, name)
        if value is not None and value < least:
            raise InputError(f"--{name}: {value} is below {least}")
    if not config.gpus_per_actor > 0:
        raise InputError(f"--gpus_per_actor: {config.gpus_per_actor} is not above 0")
    for name in ("definition_file", "agent_path"):
        if not Path(getattr(config, name)).exists():
            raise InputError(f"--{name} {getattr(config, name)}: no such file or directory")


def run_config(config: RunConfig, *, on_start: Callable[[str], None] | None = None) -> Results:
    """Run a sweep, or what is left of it, and open its results.

    Raises InputError before anything is written where an input is wrong, RunError where the
    run fails, Interrupted after a signal; committed work is kept in every case.
    """
    check_config(config)
    from raypatch.actors import InlineBackend, PoolOptions, RayBackend

    backend: RayBackend | InlineBackend
    if config.backend == "inline":
        backend = InlineBackend(config.device)
    else:
        backend = RayBackend(
            PoolOptions(
                config.address,
                config.num_actors,
                config.gpus_per_actor,
                config.device,
                quiet=not config.debug,
            )
        )
    with _signals() as interruption, backend:
        job = _Job(config, backend, interruption)
        job.read()
        job.plan()
        if on_start is not None:
            on_start(job.describe())
        job.compute()
    from raypatch.results.reader import open_results

    return open_results(config.output_dir)


def run(**options: Any) -> Results:
    """Run a sweep from Python; ``options`` are the fields of :class:`RunConfig`.

    ``agent_path``, ``definition_file`` and ``output_dir`` are required.
    """
    return run_config(RunConfig(**{"quiet": True, **options}))


class Interruption:
    """Set by the first SIGINT or SIGTERM; the second one stops at once."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def __bool__(self) -> bool:
        return self.signal_number is not None

    def handle(self, number: int, _: Any) -> None:
        if self.signal_number is not None:
            raise KeyboardInterrupt
        self.signal_number = number


@contextmanager
def _signals() -> Iterator[Interruption]:
    """Turn signals into an orderly end; outside the main thread they stay as they are."""
    interruption = Interruption()
    held: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            held[number] = signal.signal(number, interruption.handle)
    except ValueError:  # not the main thread
        held = {}
    try:
        yield interruption
    finally:
        for held_number, handler in held.items():
            signal.signal(held_number, handler)


class _Job:
    """One run from its config to its last commit."""

    agent: Agent
    inputs: Inputs
    experiments: Experiments
    patcher: Patcher

    def __init__(
        self, config: RunConfig, backend: RayBackend | InlineBackend, interruption: Interruption
    ) -> None:
        from raypatch.results.store import Store

        self.config = config
        self.backend = backend
        self.interruption = interruption
        self.store = Store(config.output_dir)

    # ------------------------------------------------------------------- read and check

    def read(self) -> None:
        """Read and check every input; nothing is written."""
        from raypatch.agents import load_agent
        from raypatch.metrics import choose_metrics

        config = self.config
        self.agent = load_agent(config.agent_path, config.agent_options())
        self.metrics = choose_metrics(config.metrics, discrete=self.agent.discrete)
        self.experiments = read_definition(config.definition_file, self.agent.neuron_counts)
        self.wanted = self._range()
        paths = self._input_paths()
        ids = config.input_ids.split(",") if config.input_ids else None
        self.inputs = read_inputs(paths, self.agent.observation_shape, input_ids=ids)
        self.directions = self._directions()

    def _range(self) -> Range:
        from raypatch.sweep import Range

        n, first = len(self.experiments), self.config.start_index
        last = n if self.config.end_index is None else self.config.end_index
        if first >= n:
            raise InputError(
                f"--start_index {first}: the definition has {n} experiments, 0 to {n - 1}"
            )
        if not first < last <= n:
            raise InputError(f"--end_index {last}: valid are {first + 1} to {n}")
        return Range(first, last)

    def _input_paths(self) -> dict[str, Path]:
        folder = Path(self.config.agent_path) / INPUTS_FOLDER
        given = {side: getattr(self.config, f"{side}_inputs") for side in SIDES}
        paths = {side: Path(given[side] or folder / f"{side}_inputs.json") for side in SIDES}
        if self.config.source == "pair":
            return paths
        found = {side: path for side, path in paths.items() if given[side] or path.is_file()}
        if not found:
            raise InputError(f"{paths['clean']}: no such input file; give --clean_inputs")
        return found

    def _directions(self) -> tuple[str, ...]:
        from raypatch.worker import TARGET_SIDE

        asked = DIRECTIONS if self.config.direction == "both" else (self.config.direction,)
        possible = tuple(d for d in asked if TARGET_SIDE[d] in self.inputs.sides)
        if not possible:
            side = TARGET_SIDE[asked[0]]
            raise InputError(
                f"--direction {asked[0]}: needs the {side} inputs; give --{side}_inputs"
            )
        return possible

    # --------------------------------------------------------------------------- plan

    def plan(self) -> None:
        """Capture the network, settle device and items, and look at the output directory."""
        import torch

        import raypatch.results.tables  # noqa: F401  (loads while Ray still starts)
        from raypatch import sweep
        from raypatch.engine.patcher import Patcher

        config = self.config
        self.patcher = Patcher(
            self.agent.network,
            dtype=getattr(torch, config.dtype),
            device="cpu",
            batch_rows=config.batch_size,
            memory_bytes=config.memory_per_actor,
        )
        self.outputs_by_side = self._baselines()
        self.backend.wait_started()
        self.identity = self._identity()
        self.fingerprint = sweep.fingerprint(self.identity)
        receipts = sweep.open_directory(self.store, self.identity, overwrite=config.overwrite)
        committed = [sweep.Range(r.first, r.last) for r in receipts]
        self.ranges = sweep.remaining(self.wanted, committed)
        self.n_committed = sum(map(len, committed))
        self.passes_each = len(self.directions) * len(self.inputs)
        # One multiplication per weight is the least a forward costs.
        self.item_length = sweep.item_length(
            len(self.experiments),
            self.passes_each,
            2 * sum(self.agent.parameters.values()),
            self.backend.device,
        )

    def _baselines(self) -> dict[str, Any]:
        """Unpatched outputs by side; also settles how the network is captured."""
        import torch

        return {
            side: self.patcher.prepare(
                target=torch.from_numpy(values), kind="zero"
            ).baseline.numpy()
            for side, values in self.inputs.sides.items()
        }

    def _identity(self) -> dict[str, Any]:
        """Everything that decides the numbers and files; no time, machine or actor count."""
        from raypatch import sweep

        config, inputs = self.config, self.inputs
        return {
            "format_version": FORMAT_VERSION,
            "agent": sweep.files_digest(self.agent.files),
            "agent_options": [config.agent_file, config.agent_output, config.activation],
            "inputs": sweep.sha256_of(
                json.dumps(inputs.ids).encode(), *(inputs.sides[s] for s in sorted(inputs.sides))
            ),
            "sides": list(inputs.sides),
            "definition": sweep.definition_digest(self.experiments),
            "n_experiments": len(self.experiments),
            "layers": self.agent.neuron_counts,
            "directions": list(self.directions),
            "source": config.source,
            "seed": config.seed,
            "metrics": list(self.metrics),
            "save": config.save,
            "compression": config.compression,
            "dtype": config.dtype,
            "batch_size": config.batch_size,
            "device_class": self.backend.device,
        }

    def describe(self) -> str:
        """One line on what is about to run."""
        config, left = self.config, sum(map(len, self.ranges))
        resumed = f", {self.n_committed:,} already committed" if self.n_committed else ""
        return (
            f"{self.agent.loaded_as}\n"
            f"{left:,} experiments x {len(self.inputs)} pairs x {len(self.directions)} "
            f"directions = {left * self.passes_each:,} passes{resumed}; "
            f"{self.patcher.path}, {config.dtype} on {self.backend.device}"
        )

    # ------------------------------------------------------------------------- compute

    def compute(self) -> None:
        """Compute what is left, committing item by item."""
        from raypatch import sweep
        from raypatch.worker import Item

        config, started = self.config, time.time()
        n_items = sweep.count_items(self.ranges, self.item_length)
        verifier, spec = self._verifier(), self._spec()
        self._open_output(started)
        items = (Item(*cut) for cut in sweep.cut(self.ranges, self.item_length))
        n_left = sum(map(len, self.ranges))
        with Progress(n_left, self.passes_each, quiet=config.quiet) as progress:
            if n_items:
                self._commit_all(spec, items, n_items, verifier, progress)
        self._finish(verifier, progress)

    def _commit_all(
        self, spec: WorkerSpec, items: Any, n_items: int, verifier: Verifier, progress: Progress
    ) -> None:
        from raypatch.worker import Outcome

        events = self.backend.outcomes(
            spec, items, n_items, self._slice, lambda: bool(self.interruption)
        )
        for event in events:
            if isinstance(event, Outcome):
                verifier.check(event.samples)
                self.store.append_line(layout.MANIFEST, event.receipt.line())
                progress.update(experiments=event.receipt.last - event.receipt.first)
            else:
                progress.update(actors=event.actors, retries=event.retries)
        if self.interruption and progress.done < progress.n_experiments:
            raise Interrupted(
                f"interrupted; {progress.done + self.n_committed:,} experiments are committed in "
                f"{self.store.root}; run the same command again to resume",
                int(self.interruption.signal_number or signal.SIGINT),
            )

    def _slice(self, item: Any) -> Experiments:
        return self.experiments.slice(item.first, item.last)

    def _verifier(self) -> Verifier:
        from raypatch.verification import Verifier

        return Verifier(
            self.agent.network, self.experiments, self.inputs.sides, self.directions,
            self.config.source, self.config.seed, self.config.dtype,
        )  # fmt: skip

    def _spec(self) -> WorkerSpec:
        from raypatch.verification import choose_sample
        from raypatch.worker import WorkerSpec

        config = self.config
        return WorkerSpec(
            patcher=self._pickled_patcher(),
            sides=self.inputs.sides,
            directions=self.directions,
            source_kind=config.source,
            seed=config.seed,
            discrete=self.agent.discrete,
            columns=Columns(self.agent.output_size, self.metrics, config.save),
            metadata={
                "format_version": FORMAT_VERSION,
                "fingerprint": self.fingerprint,
                "layers": self.agent.neuron_counts,
                "units": self._units(),
            },
            compression=config.compression,
            output_dir=str(Path(config.output_dir).resolve()),
            samples=choose_sample(self.ranges, config.verify, config.seed),
            device=self.backend.device,
        )

    def _pickled_patcher(self) -> bytes:
        """The captured network; user classes, if any are left in it, travel by value."""
        try:
            return pickle.dumps(self.patcher)
        except Exception as error:
            raise InputError(
                f"--agent_path {self.config.agent_path}: the network cannot be sent to actors "
                f"({type(error).__name__}: {error}); use --backend inline"
            ) from None

    def _units(self) -> dict[str, str]:
        from raypatch.metrics import METRICS

        return {name: METRICS[name].unit for name in self.metrics}

    def _open_output(self, started: float) -> None:
        """Write what describes the sweep, unless a run before has done so."""
        from raypatch import sweep
        from raypatch.results import tables

        if self.config.overwrite:
            sweep.clear(self.store)
        self.store.make(*([layout.SHARDS] if self.config.save != "summary" else []), layout.SUMMARY)
        sweep.remove_leftovers(self.store)
        sweep.drop_torn_line(self.store)
        if self.store.read(layout.SWEEP) is not None:
            return
        write_experiments(self.store, self.experiments)
        baselines = tables.baseline_table(
            self.outputs_by_side, self.inputs.ids, discrete=self.agent.discrete
        )
        self.store.write(layout.BASELINES, tables.file_bytes(baselines, self.config.compression))
        self.store.write(layout.SWEEP, json.dumps(self._sweep(started), indent=2).encode())

    def _sweep(self, started: float) -> dict[str, Any]:
        import numpy
        import pyarrow
        import torch

        import raypatch

        return {
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "identity": self.identity,
            "agent": {
                "path": str(Path(self.config.agent_path).resolve()),
                "loaded_as": self.agent.loaded_as,
                "output_kind": self.agent.output_kind,
                "discrete": self.agent.discrete,
                "engine": self.patcher.path,
            },
            "definition_file": str(Path(self.config.definition_file).resolve()),
            "input_files": [str(path.resolve()) for path in self.inputs.files],
            "input_ids": list(self.inputs.ids),
            "n_outputs": self.agent.output_size,
            "units": self._units(),
            "device": self.backend.device,
            "precision": f"{self.config.dtype}, TF32 off",
            "backend": self.backend.name,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(started)),
            "versions": {
                "raypatch": raypatch.__version__,
                "torch": torch.__version__,
                "numpy": numpy.__version__,
                "pyarrow": pyarrow.__version__,
                "python": platform.python_version(),
            },
        }

    def _finish(self, verifier: Verifier, progress: Progress) -> None:
        """Record the ending; ``_SUCCESS`` only when the whole definition is done."""
        from raypatch import sweep

        sweep.remove_leftovers(self.store)
        receipts = layout.read_manifest(self.store.read(layout.MANIFEST))
        done = [sweep.Range(r.first, r.last) for r in receipts]
        whole = not sweep.remaining(sweep.Range(0, len(self.experiments)), done)
        ending = {
            "seconds": round(progress.seconds, 3),
            "passes": progress.done * self.passes_each,
            "passes_per_second": round(progress.passes_per_second),
            "actors": progress.actors,
            "retries": progress.retries,
            "verification": verifier.summary(),
        }
        content = self.store.read(layout.SWEEP)
        assert content is not None
        record = json.loads(content)
        record.setdefault("runs", []).append(ending)
        self.store.write(layout.SWEEP, json.dumps(record, indent=2).encode())
        if whole:
            self.store.write(layout.SUCCESS, b"")


def write_experiments(store: Any, experiments: Experiments) -> None:
    """``experiments.arrow``, batch by batch, under a dot-name first."""
    import pyarrow as pa

    from raypatch.results import schema, tables

    target = store.path(layout.EXPERIMENTS)
    partial = target.with_name(f".{target.name}.partial")
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with (
        pa.OSFile(str(partial), "wb") as sink,
        pa.ipc.new_file(sink, schema.EXPERIMENTS, options=options) as writer,
    ):
        for first in range(0, len(experiments), schema.BATCH_ROWS):
            last = min(first + schema.BATCH_ROWS, len(experiments))
            writer.write_table(tables.experiments_table(first, experiments.slice(first, last)))
    shutil.move(partial, target)
