"""What importing and asking for help must not load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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
        "import raypatch.pool",
        "from raypatch.cli import main; main(['--help'])",
        "from raypatch.cli import main; main(['run', '--help'])",
    ],
)
def test_help_and_light_modules_load_nothing_heavy(code):
    assert not HEAVY & modules_after(code)


def test_this_check_sees_a_heavy_import():
    assert "torch" in HEAVY & modules_after("import raypatch.engine.patcher")


def test_the_engine_does_not_know_ray():
    assert "ray" not in modules_after("import raypatch.worker, raypatch.verification")


def test_computing_and_ranking_import_neither_pandas_nor_torchs_compiler(tmp_path):
    root = Path(__file__).parent.parent
    code = f"""
import raypatch
raypatch.run(
    agent_path={str(root / "examples" / "lavacrossing_dqn")!r},
    definition_file={str(root / "Definitions" / "layer_experiment.json")!r},
    output_dir={str(tmp_path / "out")!r}, backend="inline", verify=0, quiet=True,
).rank("kl_divergence")
import sys
assert "torch._dynamo" not in sys.modules"""
    assert "pandas" not in modules_after(code)
