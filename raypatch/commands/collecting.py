"""``raypatch collect``: pairs of inputs from an agent playing in a gymnasium environment.

The agent acts greedily from seeded starts; of the states it visits, some are drawn as clean
inputs, and each gets a corrupted partner.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raypatch.agents import Agent, AgentOptions, load_agent
from raypatch.agents.factories import importable
from raypatch.engine.layers import forward
from raypatch.errors import InputError, missing_package, one_line
from raypatch.inputs import INPUTS_FOLDER, SIDES
from raypatch.sweeps.progress import counted
from raypatch.terminal import say
from raypatch.whole_files import whole_file

CORRUPTIONS = ("other_state", "shuffle", "noise", "zero", "mean")
# States visited for each pair that is kept, so that pairs are not neighbours in time.
STATES_PER_PAIR = 10
# With --differing: rounds of new states before giving up on having enough pairs.
MAX_ROUNDS = 20
JSON_VALUES = 1000

Corruption = Callable[[np.ndarray, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class Collected:
    """What was written, and how often corruption changes the greedy action.

    ``differing`` is None where actions are continuous.
    """

    files: tuple[Path, ...]
    n_pairs: int
    n_drawn: int
    differing: int | None
    episodes: int


def collect_pairs(
    env: str,
    agent_path: str,
    pairs: int,
    corruption: str,
    seed: int,
    differing: bool,
    output_dir: str | None,
    overwrite: bool,
    **agent_options: Any,
) -> Collected:
    """Roll the agent out and write clean and corrupted inputs.

    Raises InputError where the environment and the agent do not fit, or files are in the way.
    """
    if seed < 0:
        raise InputError(f"--seed: {seed} is below 0")
    if pairs < 2:
        raise InputError(f"--pairs: {pairs} is below 2")
    agent = load_agent(agent_path, AgentOptions(**agent_options))
    if differing and not agent.discrete:
        raise InputError(
            f"--differing: needs one discrete action; this agent's are {agent.actions}"
        )
    corrupt = _corruption(corruption, Path(agent_path))
    folder = Path(output_dir) if output_dir else Path(agent_path) / INPUTS_FOLDER
    large = int(np.prod(agent.observation_shape)) > JSON_VALUES
    files = tuple(folder / f"{side}_inputs.{'npz' if large else 'json'}" for side in SIDES)
    there = next((f for f in files if f.exists()), None)
    if there is not None and not overwrite:
        raise InputError(f"{there}: exists; give --overwrite, or another --output_dir")
    with closing(_Player(env, agent, seed)) as player:
        drawn = _drawn(player, agent, pairs, corrupt, corruption, seed, differing)
    if not drawn.ids:
        raise InputError(
            f"--differing: none of {drawn.n_drawn} pairs changes the greedy action; choose another "
            "--corruption"
        )
    _write(files, drawn.ids, drawn.kept)
    return Collected(
        files, len(drawn.ids), drawn.n_drawn, drawn.n_differing if agent.discrete else None,
        player.episode + 1,
    )  # fmt: skip


@dataclass
class _Drawn:
    """Pairs that are kept, of those drawn: ids, and by side one observation each."""

    ids: list[str]
    kept: dict[str, list[np.ndarray]]
    n_drawn: int = 0
    n_differing: int = 0


def _drawn(
    player: _Player,
    agent: Agent,
    pairs: int,
    corrupt: Corruption,
    corruption: str,
    seed: int,
    differing: bool,
) -> _Drawn:
    """Pairs from the states that a player visits; with ``differing`` only those whose greedy
    actions do, fewer than asked for where these are too rare."""
    rng, drawn = np.random.default_rng(seed), _Drawn([], {side: [] for side in SIDES})
    for _ in range(MAX_ROUNDS):
        ids, states = player.visit(STATES_PER_PAIR * pairs)
        chosen = np.sort(rng.choice(len(states), min(pairs, len(states)), replace=False))
        # Corrupted from all states that were visited, so that partners are not few.
        corrupted = _checked(corrupt(states, rng), states, corruption)[chosen]
        clean = states[chosen]
        changes = _actions(agent, clean) != _actions(agent, corrupted)
        drawn.n_drawn += len(chosen)
        drawn.n_differing += int(changes.sum())
        wanted = np.flatnonzero(changes) if differing else np.arange(len(chosen))
        for at in wanted[: pairs - len(drawn.ids)]:
            drawn.ids.append(ids[chosen[at]])
            drawn.kept["clean"].append(clean[at])
            drawn.kept["corrupted"].append(corrupted[at])
        if len(drawn.ids) == pairs:
            break
    return drawn


class _Player:
    """The agent in its environment, episode after episode."""

    def __init__(self, env: str, agent: Agent, seed: int) -> None:
        try:
            import gymnasium
        except ImportError:
            raise InputError(missing_package("raypatch collect", "gymnasium", "collect")) from None
        try:
            self.env: Any = gymnasium.make(env)
        except Exception as error:  # unknown names, missing extras, faults of the environment
            raise InputError(f"--env {env}: {one_line(error)}") from None
        self.agent, self.seed, self.episode, self.step = agent, seed, -1, 0
        self._obs: Any = None
        self._done = True

    def visit(self, n_states: int) -> tuple[list[str], np.ndarray]:
        """Ids and states ``[n, *observation]`` of the next steps."""
        ids, states = [], []
        for _ in range(n_states):
            if self._done:
                self.episode, self.step, self._done = self.episode + 1, 0, False
                self._obs, _ = self.env.reset(seed=self.seed + self.episode)
            state = self._state(self._obs)
            ids.append(f"episode_{self.episode:04d}_step_{self.step:05d}")
            states.append(state)
            with torch.no_grad():
                output = forward(self.agent.network, (torch.from_numpy(state[None]),))[0].numpy()
            self._obs, _, terminated, truncated, _ = self.env.step(
                greedy_action(output, self.env.action_space, squashed=self.agent.squashed)
            )
            self._done = bool(terminated or truncated)
            self.step += 1
        return ids, np.stack(states)

    def close(self) -> None:
        self.env.close()

    def _state(self, obs: Any) -> np.ndarray:
        from raypatch.inputs import ObservationShape, check_observation

        shape = ObservationShape(self.agent.observation_shape, self.agent.observation_parts)
        return check_observation(obs, shape, f"--env {self.env.spec and self.env.spec.id}")


def greedy_action(output: np.ndarray, space: Any, *, squashed: bool) -> Any:
    """The action of an output: argmax of logits or Q-values, the mean of continuous actions.

    ``squashed`` means go through tanh onto the space's range; others are cut at its bounds.
    """
    kind = type(space).__name__
    if kind == "Discrete":
        return int(output.argmax()) + int(space.start)
    if kind == "MultiDiscrete":
        ends = np.cumsum(space.nvec)[:-1]
        return np.array([part.argmax() for part in np.split(output, ends)]) + space.start
    if kind == "MultiBinary":
        return (output > 0).astype(space.dtype)
    if squashed:
        return (space.low + (np.tanh(output) + 1) / 2 * (space.high - space.low)).astype(
            space.dtype
        )
    return np.clip(output.reshape(space.shape), space.low, space.high).astype(space.dtype)


def _actions(agent: Agent, states: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return forward(agent.network, (torch.from_numpy(states),)).argmax(1).numpy()


# -------------------------------------------------------------------------- corruptions


def _corruption(name: str, directory: Path) -> Corruption:
    if name in _CORRUPTIONS:
        return _CORRUPTIONS[name]
    module_name, _, function_name = name.partition(":")
    if not function_name:
        raise InputError(
            f"--corruption: {name!r} is not one of {', '.join(CORRUPTIONS)} or module:function"
        )
    with importable(Path.cwd(), last=directory):
        try:
            function = getattr(importlib.import_module(module_name), function_name)
        except Exception as error:  # whatever the user's module raises
            raise InputError(f"--corruption {name}: {one_line(error)}") from None
    corruption: Corruption = function
    return corruption


def _other_state(states: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each state becomes another one that was visited."""
    order = rng.permutation(len(states))
    others = np.empty(len(states), np.int64)
    others[order] = np.roll(order, 1)
    return states[others]


def _shuffle(states: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each number comes from another state: believable one by one, not together."""
    flat = states.reshape(len(states), -1)
    return rng.permuted(flat, axis=0).reshape(states.shape)


def _noise(states: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise as wide as each number's standard deviation over the states."""
    return states + rng.normal(size=states.shape) * states.std(0, keepdims=True)


_CORRUPTIONS: dict[str, Corruption] = {
    "other_state": _other_state,
    "shuffle": _shuffle,
    "noise": _noise,
    "zero": lambda states, _: np.zeros_like(states),
    "mean": lambda states, _: np.broadcast_to(states.mean(0), states.shape),
}


def _checked(corrupted: Any, states: np.ndarray, name: str) -> np.ndarray:
    found = np.asarray(corrupted, np.float32)
    if found.shape != states.shape or not np.isfinite(found).all():
        raise InputError(
            f"--corruption {name}: gave shape {list(found.shape)} for states of "
            f"{list(states.shape)}, or values that are not finite"
        )
    return found


# ------------------------------------------------------------------------------ writing


def _write(files: tuple[Path, ...], ids: list[str], kept: dict[str, list[np.ndarray]]) -> None:
    """Both files, each whole or not at all."""
    for side, file in zip(SIDES, files):
        with whole_file(file) as partial:
            if file.suffix == ".npz":
                np.savez(partial, ids=np.array(ids), inputs=np.stack(kept[side]))
            else:
                rows = {key: {"input": _listed(row)} for key, row in zip(ids, kept[side])}
                partial.write_text(json.dumps(rows), encoding="utf-8")


def _listed(row: np.ndarray) -> Any:
    """Numbers short enough to read that give the same float32 again."""
    if row.ndim > 1:
        return [_listed(part) for part in row]
    return [float(str(value)) for value in row]


def show_collected(found: Collected) -> None:
    """Say what was written, and how strong the corruption is."""
    if found.differing is not None:
        share = found.differing / found.n_drawn
        say(
            f"the greedy action differs on {found.differing} of {found.n_drawn} pairs "
            f"({share:.0%}), from {counted(found.episodes, 'episode')}"
        )
    print(f"{counted(found.n_pairs, 'pair')} written to {' and '.join(map(str, found.files))}")
