"""What importing and asking for help must not load."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "ray", "pyarrow", "pandas", "stable_baselines3"}


def modules_after(code: str) -> set[str]:
    code += "\nimport sys; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.splitlines()}


@pytest.mark.parametrize(
    "code",
    [
        "import raypatch",
        "import raypatch.definitions",
        "import raypatch.sweeps.pool",
        "from raypatch.cli import main; main(['--help'])",
        "from raypatch.cli import main; main(['run', '--help'])",
    ],
)
def test_help_and_light_modules_load_nothing_heavy(code):
    assert not HEAVY & modules_after(code)


def test_this_check_sees_a_heavy_import():
    assert "torch" in HEAVY & modules_after("import raypatch.engine.patcher")


def test_the_engine_does_not_know_ray():
    assert "ray" not in modules_after("import raypatch.sweeps.worker, raypatch.sweeps.verification")


def test_computing_and_ranking_import_neither_pandas_nor_torchs_compiler(tmp_path):
    code = f"""
import raypatch
raypatch.run(
    agent_path={str(ROOT / "examples" / "lavacrossing_dqn")!r},
    definition_file={str(ROOT / "Definitions" / "layer_experiment.json")!r},
    output_dir={str(tmp_path / "out")!r}, backend="inline", verify=0, quiet=True,
).rank("kl_divergence")
import sys
assert "torch._dynamo" not in sys.modules"""
    assert "pandas" not in modules_after(code)


def documented_order() -> list[str]:
    """Packages and files right inside of ``raypatch/``, as docs/structure.md lists them."""
    table = (ROOT / "docs" / "structure.md").read_text().partition("\n\n| file")[2]
    named, package = [], ""
    for line in table.partition("\n\n")[0].splitlines()[2:]:
        for name in re.findall(r"`([\w./]+)`", line.split("|")[1]):
            package = name if name.endswith("/") else package
            if not package or name == package or name.startswith("../") or name == "cli.py":
                named.append(name.removeprefix("../").removesuffix(".py").removesuffix("/"))
    return named


def imported_by(file: Path) -> Iterator[str]:
    """What a file imports of raypatch, anywhere in it but for types alone."""
    nodes: list[ast.AST] = [ast.parse(file.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("raypatch."):
            yield str(node.module).split(".")[1]
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            nodes += ast.iter_child_nodes(node)


def test_imports_run_the_way_that_the_structure_is_documented():
    order = documented_order()
    package = ROOT / "raypatch"
    here = {p.stem for p in package.iterdir() if p.is_dir() or p.suffix == ".py"}
    assert set(order) == here - {"__init__", "__pycache__"}
    back = set()
    for file in package.rglob("*.py"):
        own = file.relative_to(package).parts[0].removesuffix(".py")
        if own != "__init__":
            later = order[order.index(own) + 1 :]
            back |= {(file.name, name) for name in imported_by(file) if name in later}
    assert back == {("driver.py", "actors")}
