"""Every line of docs/results.md that reads a run elsewhere, and the notebook, really run."""

from __future__ import annotations

import glob
import re
import subprocess
import sys

import duckdb
import numpy as np
import pandas
import polars
import pyarrow.dataset
import pytest
from conftest import LAVA, ROOT

import raypatch

TABLE = re.findall(r"^\| ([\w ]+) \| `(.+out.+)` \|$", (ROOT / "docs/results.md").read_text(), re.M)


def test_the_page_has_a_line_for_each_tool():
    assert [name for name, _ in TABLE] == ["pyarrow", "polars", "duckdb", "pandas", "Hugging Face"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("tool", "line"), TABLE)
def test_the_line_reads_every_row(run_inline, single_neurons, tool, line):
    out = run_inline(LAVA, single_neurons(LAVA))
    names = {"out": out, "pyarrow": pyarrow, "polars": polars, "duckdb": duckdb, "glob": glob,
             "pandas": pandas}  # fmt: skip
    if tool == "Hugging Face":
        names["datasets"] = pytest.importorskip("datasets")
    found = eval(line, names)
    if tool == "duckdb" and hasattr(found, "read_all"):
        found = found.read_all()
    expected = raypatch.open_results(out).dataset().to_table()
    assert len(found) == len(expected)
    column = np.sort(np.asarray(found["kl_divergence"], np.float64))
    np.testing.assert_array_equal(column, np.sort(expected["kl_divergence"].to_numpy()))


def test_the_python_lines_of_the_page_run(run_inline, single_neurons):
    out = run_inline(LAVA, single_neurons(LAVA))
    code = re.search(r"```python\n(.+?)```", (ROOT / "docs/results.md").read_text(), re.S)[1]
    names: dict = {}
    exec(code.replace("results/lavacrossing_dqn", str(out)), names)
    assert names["results"].complete and len(names["results"].to_pandas()) == 195 * 2 * 48


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    pytest.importorskip("nbclient")
    done = subprocess.run(
        [sys.executable, "-c",
         "import sys, nbformat, nbclient\n"
         "book = nbformat.read(sys.argv[1], 4)\n"
         "nbclient.NotebookClient(book, timeout=250, resources={'metadata': {'path': sys.argv[2]}})"
         ".execute()\n"
         "print(sum(len(c.outputs) for c in book.cells if c.cell_type == 'code'))",
         str(ROOT / "examples" / "from_sweep_to_circuit.ipynb"), str(ROOT / "examples")],
        capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) >= 5
