"""Which file of a directory is the agent, and which format reads it (design 3)."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from raypatch.agents.agent import Agent, AgentOptions
from raypatch.agents.archives import DAMAGE
from raypatch.definitions import OUTPUT_LOGITS
from raypatch.errors import AgentError, InputError, few
from raypatch.whole_files import whole_file

MANIFEST = "agent.json"
MANIFEST_KEYS = ("file", "activation", "factory", "output", "actions")
ACTIONS = ("discrete", "continuous")
# File patterns in the order of the contract.
PATTERNS = (("*.zip",), ("*.pt2",), ("*.ts",), ("*.safetensors",), ("*.pt", "*.pth"))

ONE_OUTPUT = (
    "one output: as the logit of a discrete action it always picks the same one, and most metrics "
    "are 0; if it is a continuous action, pass --actions continuous"
)


def load_agent(path: str | Path, options: AgentOptions | None = None, **fields: Any) -> Agent:
    """Load the agent in a directory; ``fields`` are those of :class:`AgentOptions`, and go before
    ``options``.

    Raises AgentError, in one line, where the directory holds no agent that can be read
    with what the options allow.
    """
    options = replace(options or AgentOptions(), **fields)
    directory = _existing_directory(path)
    if (module := _rl_module(directory, options)) is not None:
        _refuse_unused(module, options)
        from raypatch.agents.rllib import load_rl_module

        return load_rl_module(module, options)
    file, options = _choose(directory, options)
    if options.actions not in (None, *ACTIONS):
        raise InputError(
            f"{directory}: actions {options.actions!r} is not one of {', '.join(ACTIONS)}"
        )
    is_script = file.suffix not in (".zip", ".pt2") and _is_script(file)
    if file.suffix in (".zip", ".pt2") or is_script:
        _refuse_unused(file, options, taken=("agent_output",) if is_script else ())
    elif options.agent_factory is not None:
        _refuse_unused(file, options, taken=("agent_output", "agent_factory"))
    if file.suffix == ".zip":
        if options.actions is not None:
            raise AgentError(
                f"{directory}: leave out 'actions' (--actions): {file.name} says what they are"
            )
        from raypatch.agents.stable_baselines import load_zip

        return load_zip(file, options)
    agent = _load(file, options, is_script)
    if options.actions != "continuous":
        only = agent.output_size == 1 and options.actions is None
        return replace(agent, notes=(*agent.notes, ONE_OUTPUT)) if only else agent
    # A manifest that says so decides what is computed, as the weights do.
    manifest = directory / (options.agent_file or MANIFEST)
    says_so = manifest.name == MANIFEST and manifest.is_file()
    files = (*agent.files, manifest) if says_so else agent.files
    return replace(agent, discrete=False, output_kind="mean", files=files)


def _refuse_unused(file: Path, options: AgentOptions, taken: tuple[str, ...] = ()) -> None:
    """What a file or its factory says cannot be said otherwise; nothing that is given is passed
    over but what is ``taken``."""
    for name in ("activation", "agent_output", "agent_factory"):
        if name not in taken and getattr(options, name) is not None:
            says = "its factory" if "agent_factory" in taken else "this kind of file itself"
            raise InputError(
                f"{file}: leave out {name.removeprefix('agent_')!r} (--{name}): {says} defines it"
            )


def _load(file: Path, options: AgentOptions, is_script: bool) -> Agent:
    """The agent in a file that does not tell what its actions are."""
    if file.suffix == ".pt2":
        from raypatch.agents.exported import load_exported

        return load_exported(file)
    if is_script:
        from raypatch.agents.torchscript import load_script

        return load_script(file, options)
    from raypatch.agents.state_dict import load_state_dict_agent

    return load_state_dict_agent(file, options)


def _rl_module(directory: Path, options: AgentOptions) -> Path | None:
    """An RLlib checkpoint, where neither the user nor a manifest names another file."""
    if options.agent_file or (directory / MANIFEST).is_file():
        return None
    from raypatch.agents.rllib import find_rl_module

    return find_rl_module(directory)


def write_manifest(directory: Path, file: Path, options: AgentOptions) -> Path:
    """Write ``agent.json`` for a file and the options it was loaded with.

    Raises AgentError where there is one already, or the file needs none.
    """
    path = directory / MANIFEST
    if path.exists():
        raise AgentError(f"{path}: exists already; it is left as it is")
    content = {
        "file": str(file.relative_to(directory)),
        "activation": options.activation,
        "factory": options.agent_factory,
        "output": options.agent_output,
        "actions": options.actions,
    }
    text = json.dumps({key: value for key, value in content.items() if value is not None})
    with whole_file(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")
    return path


def _is_script(file: Path) -> bool:
    """TorchScript goes by ``.ts``, and by ``.pt`` too: its archive holds code."""
    if file.suffix == ".ts":
        return True
    try:
        with zipfile.ZipFile(file) as archive:
            return any("/code/" in name for name in archive.namelist())
    except DAMAGE:
        return False


def read_layer_structure(
    path: str | Path, options: AgentOptions
) -> tuple[dict[str, int], int, str | None]:
    """Layers with their neuron counts, the number of logits, and what is doubtful about them.

    Where the network cannot be built but its weights can be read, the structure comes from
    the weights: every ``*.weight`` of more than one dimension, and its first dimension.
    """
    try:
        counts = dict(load_agent(path, options).neuron_counts)
        return counts, counts.pop(OUTPUT_LOGITS), None
    except AgentError as error:
        directory = _existing_directory(path)
        if _rl_module(directory, options) is not None:
            raise
        file, _ = _choose(directory, options)
        if file.suffix in (".zip", ".pt2", ".ts"):
            raise
        from raypatch.agents.state_dict import read_state_dict, weight_layers

        state = read_state_dict(file)
        layers = {name: w.shape[0] for name, w in weight_layers(state).items()}
        if not layers:
            raise
        left = [
            n for n, t in state.items() if t.ndim > 1 and n.removesuffix(".weight") not in layers
        ]
        unread = f"; left out: {few(left)}" if left else ""
        doubt = f"layers are those of the weights alone, because: {error}{unread}"
        return layers, list(layers.values())[-1], doubt


def _existing_directory(path: str | Path) -> Path:
    directory = Path(path)
    if directory.is_file():
        raise AgentError(
            f"--agent_path {path}: this is a file; give its directory, and --agent_file "
            f"{directory.name} if there are several"
        )
    if not directory.is_dir():
        raise AgentError(f"--agent_path {path}: no such directory")
    return directory


def _choose(directory: Path, options: AgentOptions) -> tuple[Path, AgentOptions]:
    """The agent's file and the options with what a manifest adds."""
    if options.agent_file:
        file = directory / options.agent_file
        if not file.is_file():
            raise InputError(f"--agent_file {options.agent_file}: no such file in {directory}")
        return (file, options) if file.name != MANIFEST else _manifest(file, options)
    manifest = directory / MANIFEST
    if manifest.is_file():
        return _manifest(manifest, options)
    if (directory / "agent.zip").is_file():
        return directory / "agent.zip", options
    for patterns in PATTERNS:
        found = sorted(file for pattern in patterns for file in directory.glob(pattern))
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise AgentError(f"{directory}: several agents: {names}; choose with --agent_file")
        if found:
            return found[0], options
    others = sorted(file.name for file in directory.iterdir() if file.is_file())
    raise AgentError(
        f"{directory}: no agent here; expected agent.json, a Stable-Baselines3 *.zip, an "
        "exported *.pt2, a TorchScript *.ts, or weights as *.safetensors, *.pt or *.pth"
        + (f"; if it is one of {few(others)}, name it with --agent_file" if others else "")
    )


def _manifest(path: Path, options: AgentOptions) -> tuple[Path, AgentOptions]:
    """Read ``agent.json``; what the command line says goes before what the manifest says."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError, RecursionError) as error:
        raise AgentError(f"{path}: not a readable JSON manifest: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("file"), str):
        raise AgentError(
            f'{path}: a manifest is an object with "file", like {{"file": "policy.pt"}}'
        )
    unknown = sorted(set(content) - set(MANIFEST_KEYS))
    if unknown:
        raise AgentError(f"{path}: unknown key {unknown[0]!r}; valid: {', '.join(MANIFEST_KEYS)}")
    if any(not isinstance(value, str) or "\0" in value for value in content.values()):
        raise AgentError(f"{path}: every value of a manifest is a text, without null characters")
    file = path.parent / content["file"]
    if path.parent.resolve() not in file.resolve().parents:
        raise AgentError(f"{path}: file {content['file']!r} lies outside the agent's directory")
    if not file.is_file():
        raise AgentError(f"{path}: file {content['file']!r} does not exist beside the manifest")
    if content.get("factory") and not (options.trust_agent_code or options.agent_factory):
        raise AgentError(
            f"{path}: factory {content['factory']!r} runs code from this directory; "
            "allow it with --trust_agent_code"
        )
    # A factory on the command line takes the place of what the manifest says for it.
    activation = None if options.agent_factory else content.get("activation")
    return file, replace(
        options,
        agent_factory=options.agent_factory or content.get("factory"),
        agent_output=options.agent_output or content.get("output"),
        activation=options.activation or activation,
        actions=options.actions or content.get("actions"),
    )
