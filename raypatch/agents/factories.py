"""Networks built by the user's own function, and code imported from an agent's directory.

Everything here runs code, so it is reached only where the user named the function or gave
``--trust_agent_code``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from raypatch.errors import AgentError, InputError, few


@contextmanager
def importable(*directories: Path, last: Path | None = None) -> Iterator[None]:
    """Directories at the front of ``sys.path`` for the time of a load; ``last`` behind all
    others, so that nothing there takes the place of a module that is found elsewhere."""
    folders = [directory.resolve() for directory in (*directories, *([last] if last else []))]
    for name, file in _imported.items():
        for found in (d / f for d in folders for f in (f"{name}.py", f"{name}/__init__.py")):
            if found.is_file() and found != file:
                raise AgentError(
                    f"{found}: {name!r} was already imported from {file}, and Python keeps one "
                    "module per name; rename one, or load the two agents in separate processes"
                )
    before, known = list(sys.path), set(sys.modules)
    after = [] if last is None else [str(last.resolve())]
    sys.path[:] = [str(directory.resolve()) for directory in directories] + before + after
    try:
        yield
    finally:
        sys.path[:] = before
        for name in sys.modules.keys() - known:
            file = Path(getattr(sys.modules[name], "__file__", None) or "").resolve()
            home = file.parent.parent if file.name == "__init__.py" else file.parent
            if "." not in name and home in folders:
                _imported[name] = file


# Top-level modules that were imported from agents' directories, for good.
_imported: dict[str, Path] = {}


def build_with_factory(factory: str, directory: Path) -> nn.Module:
    """Call ``module:function``, found in the agent's or the working directory, for a module."""
    module_name, _, function_name = factory.partition(":")
    if not module_name or not function_name:
        raise InputError(f"--agent_factory {factory!r}: write module:function")
    with importable(directory, Path.cwd()):
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # whatever the user's module raises
            raise InputError(
                f"--agent_factory {factory}: importing {module_name!r} from {directory} or the "
                f"working directory failed: {type(error).__name__}: {error}"
            ) from None
        function = getattr(module, function_name, None)
        if not callable(function):
            raise InputError(
                f"--agent_factory {factory}: {getattr(module, '__file__', module_name)} has no "
                f"function {function_name!r}"
            )
        try:
            network = function()
        except Exception as error:
            raise InputError(
                f"--agent_factory {factory}: calling it without arguments failed: "
                f"{type(error).__name__}: {error}; name a function that needs none and returns the "
                "module"
            ) from None
    if not isinstance(network, nn.Module):
        raise InputError(
            f"--agent_factory {factory}: gave {type(network).__name__}, not a torch module"
        )
    return network


def action_network(module: nn.Module, output: str | None, origin: str) -> nn.Module:
    """The submodule that is the action network, the module itself where none is named."""
    if output is None:
        if type(module).forward is nn.Module.forward:
            children = ", ".join(name for name, _ in module.named_children())
            raise AgentError(
                f"{origin}: {type(module).__name__} has no forward of its own; name the action "
                f"network with --agent_output, one of: {children}"
            )
        return module
    try:
        return module.get_submodule(output)
    except AttributeError:
        names = [name for name, _ in module.named_modules() if name]
        raise InputError(
            f"{origin}: --agent_output {output!r} is no submodule; there are: {few(names, 12)}"
        ) from None
