"""The report in a real browser: it draws, it loads nothing, and it scales."""

from __future__ import annotations

import json
import re
import shutil
import time

import numpy as np
import pytest
from conftest import LAVA

import raypatch
from raypatch.reporting.page import write_report
from raypatch.sweeps.worker import Worker

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture
def browser(tmp_path):
    """Headless Chromium that keeps its console and network log."""
    webdriver = pytest.importorskip("selenium.webdriver")
    if not CHROMIUM or not DRIVER:
        pytest.skip("chromium and chromium-driver (Debian packages) are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,2600",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(run_inline, single_neurons, tmp_path):
    results = raypatch.open_results(run_inline(LAVA, single_neurons(LAVA)))
    return results, write_report(results, str(tmp_path / "report.html"))


def drawn(driver) -> None:
    deadline = time.monotonic() + 30
    while not driver.execute_script("return !!document.querySelector('#heat .hm, #heat image')"):
        assert time.monotonic() < deadline, "no heat map was drawn"
        time.sleep(0.1)


@pytest.mark.slow
def test_the_page_draws_without_errors_or_requests_and_a_hover_names_the_neuron(
    browser, page, tmp_path
):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    results, path = page
    browser.get(path.as_uri())
    drawn(browser)
    console = [e for e in browser.get_log("browser") if e["level"] in ("SEVERE", "WARNING")]
    assert console == []
    requests = [
        message["params"]["request"]["url"]
        for entry in browser.get_log("performance")
        if (message := json.loads(entry["message"])["message"])["method"]
        == "Network.requestWillBeSent"
    ]
    # The browser's own first tab is chrome:// and chrome-untrusted://.
    assert [u for u in requests if not u.startswith(("data:", "blob:", "chrome"))] == [
        path.as_uri()
    ]
    top = results.rank("kl_divergence", top=1)[0]["name"]
    assert top in browser.find_element(By.ID, "top").text
    area = browser.find_element(By.CSS_SELECTOR, "#heat .nsewdrag")
    ActionChains(browser).move_to_element_with_offset(area, 0, -40).perform()
    deadline = time.monotonic() + 10
    while not (found := browser.find_elements(By.CSS_SELECTOR, "#heat .hoverlayer .hovertext")):
        assert time.monotonic() < deadline, "nothing to read under the pointer"
        time.sleep(0.1)
    text = found[0].text
    assert re.search(r"_neuron_\d+", text) and "rank" in text and "kl divergence" in text
    browser.execute_script(
        "const m = document.getElementById('metric'); m.value = 'logit_difference_norm';"
        "m.dispatchEvent(new Event('change'))"
    )
    strongest = results.rank("logit_difference_norm", top=1)[0]
    assert strongest["name"] in browser.find_element(By.ID, "top").text
    browser.save_screenshot(str(tmp_path / "report.png"))
    assert (tmp_path / "report.png").stat().st_size > 50_000


def test_the_page_holds_no_address_to_load_from_and_no_text_can_leave_its_script(page):
    _, path = page
    text = path.read_text()
    own = text[: text.index("<script>")] + text[text.index("const DATA") :]
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", own)
    assert path.stat().st_size < 10 << 20


@pytest.mark.parametrize("save", ["metrics", "summary"])
def test_runs_without_outputs_or_rows_still_have_a_report(
    run_inline, single_neurons, tmp_path, save
):
    results = raypatch.open_results(run_inline(LAVA, single_neurons(LAVA), "--save", save))
    assert write_report(results, str(tmp_path / "r.html")).stat().st_size > 1 << 20


def test_experiments_of_several_neurons_have_a_report(run_inline, tmp_path):
    definition = tmp_path / "d.json"
    definition.write_text(json.dumps([{"q_net.0": [1, 2], "q_net.2": "all"}, {"q_net.2": [1, 5]}]))
    results = raypatch.open_results(run_inline(LAVA, definition, "--direction", "noising"))
    assert write_report(results, str(tmp_path / "r.html")).exists()


@pytest.mark.slow
def test_a_report_of_200_000_experiments_stays_small_and_its_size_does_not_grow(
    run_inline, tmp_path
):
    import pyarrow as pa

    sizes = {}
    for n in (20_000, 200_000):
        rng = np.random.default_rng(0)
        layers = np.array(["q_net.0", "q_net.2", "features_extractor.mlp.0"])[
            rng.integers(3, size=n)
        ]
        table = pa.table(
            {"layers": pa.array([[x] for x in layers.tolist()]),
             "neurons": pa.array([[[x]] for x in rng.integers(64, size=n).tolist()],
                                 pa.list_(pa.list_(pa.int32())))}
        )  # fmt: skip
        definition = tmp_path / f"{n}.arrow"
        with pa.ipc.new_file(definition, table.schema) as writer:
            writer.write_table(table)
        out = run_inline(
            LAVA, definition, "--save", "metrics", "--input_ids", "lava_ahead_03,lava_ahead_04",
            "--verify", 0, out=tmp_path / f"out{n}",
        )  # fmt: skip
        path = write_report(raypatch.open_results(out), str(tmp_path / f"{n}.html"))
        sizes[n] = path.stat().st_size
    assert sizes[200_000] < 10 << 20 and sizes[200_000] < 1.1 * sizes[20_000]


@pytest.mark.filterwarnings("ignore")
def test_figures_are_written_in_the_format_asked_for(command, run_inline, single_neurons, tmp_path):
    out = run_inline(LAVA, single_neurons(LAVA))
    ended = command("plot", out, "--output", tmp_path / "p", "--format", "svg")
    assert ended.code == 0, ended.err
    names = sorted(p.name for p in (tmp_path / "p").iterdir())
    assert names == [
        "kl_divergence_distributions.svg", "kl_divergence_heatmap_denoising.svg",
        "kl_divergence_heatmap_noising.svg", "kl_divergence_scatter.svg",
    ]  # fmt: skip
    assert command("plot", out, "--metric", "nonsense").code == 2


def test_no_name_can_break_the_page(run_inline, tmp_path, lava_copy):
    ids = ["{{plotly}}", "<!--<script>", "{{data}}", "</script>"]
    for side in ("clean", "corrupted"):
        path = lava_copy / "activation_inputs" / f"{side}_inputs.json"
        rows = list(json.loads(path.read_text()).values())
        path.write_text(json.dumps(dict(zip(ids, rows))))
    definition = tmp_path / "d.json"
    definition.write_text('[{"q_net.0": [1]}, {"q_net.0": [2]}]')
    results = raypatch.open_results(run_inline(lava_copy, definition))
    text = write_report(results, str(tmp_path / "r.html")).read_text()
    data = text[text.index("const DATA") :]
    data = data[data.index("{") : data.index("</script>")]
    assert "<" not in data[: data.index("\n")] and "{{plotly}}" in data
    assert len(text) < 6 << 20


def test_where_every_experiment_was_quarantined_each_command_says_so(
    command, tmp_path, monkeypatch, single_neurons
):
    computed = Worker._outputs

    def fails(self, experiments):
        if len(experiments):
            raise ValueError("no")
        return computed(self, experiments)

    monkeypatch.setattr(Worker, "_outputs", fails)
    definition, out = tmp_path / "d.json", tmp_path / "out"
    definition.write_text('[{"q_net.0": [1]}, {"q_net.0": [2]}]')
    ended = command(
        "run", "--agent_path", LAVA, "--definition_file", definition, "--output_dir", out,
        "--backend", "inline", "--quiet",
    )  # fmt: skip
    assert ended.code == 3
    for words in (
        ("report", out, "--output", tmp_path / "r.html"),
        ("plot", out, "--output", tmp_path / "p"),
        ("export", out, "--format", "json", "--output", tmp_path / "e"),
    ):
        ended = command(*words)
        assert ended.code == 2 and "no experiment has results" in ended.err
