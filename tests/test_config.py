"""Options of a run as a script gives them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import raypatch
from raypatch.commands.running import _typed
from raypatch.commands.running import run as run_command
from raypatch.errors import InputError
from raypatch.sweeps.config import config_of, ids_in, joined
from raypatch.sweeps.progress import duration

ROOT = Path(__file__).parent.parent
LAVA = ROOT / "examples" / "lavacrossing_dqn"
NEEDED = {"agent_path": "a", "definition_file": "d.json", "output_dir": "out"}


def test_a_script_may_give_paths_and_lists_of_names(tmp_path):
    inputs = LAVA / "activation_inputs"
    ids = list(json.loads((inputs / "clean_inputs.json").read_text()))[:2]
    results = raypatch.run(
        agent_path=LAVA, definition_file=ROOT / "Definitions" / "layer_experiment.json",
        output_dir=tmp_path / "out", clean_inputs=inputs / "clean_inputs.json",
        corrupted_inputs=inputs / "corrupted_inputs.json", input_ids=ids,
        metrics=["kl_divergence", "logit_difference_norm"], memory_per_actor="1G",
        batch_size="auto", backend="inline",
    )  # fmt: skip
    assert results.metrics == ("kl_divergence", "logit_difference_norm")
    assert results.sweep["input_ids"] == ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": "x"}, "--seed: 'x' is a str; a whole number is expected"),
        ({"definition_file": [{"a": [0]}]}, "--definition_file: .* is a list; text is expected"),
        ({"overwrite": 1}, "--overwrite: 1 is a int; True or False is expected"),
        ({"verify": True}, "--verify: True is a bool; a whole number is expected"),
        ({"watchdog_s": "1"}, "--watchdog_s: '1' is a str; a number is expected"),
        ({"metrics": 3}, "--metrics: 3 is a int; text is expected"),
        ({"output_dir": None}, "--output_dir is missing"),
        ({"outputs": "x"}, "outputs: unknown option of run; valid: agent_file, "),
        ({"memory_per_actor": "much"}, "'much' is not a size like 512M or 4G"),
        ({"batch_size": "x"}, "'x' is not auto or a number"),
    ],
)
def test_options_of_another_type_are_named_before_anything_is_written(options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        raypatch.run(**{**NEEDED, "output_dir": str(tmp_path / "out"), **options})
    assert not (tmp_path / "out").exists()


def test_sizes_and_numbers_may_be_text():
    config = config_of({**NEEDED, "memory_per_actor": "2GiB", "batch_size": "64"})
    assert (config.memory_per_actor, config.batch_size) == (2 << 30, 64)
    assert config_of({**NEEDED, "num_actors": None}).num_actors is None
    assert type(config_of({**NEEDED, "seed": np.int64(3)}).seed) is int


def test_the_help_names_the_defaults_that_options_have():
    config = config_of(NEEDED)
    named = {
        option.name: found[1]
        for option in run_command.params
        if (found := re.search(r"\[default: ([^\]]+)\]", option.help or ""))
    }
    assert len(named) > 10
    # What is left to a run to decide is said in words.
    in_words = {
        "end_index": "all", "address": "a local Ray", "batch_size": "auto",
        "memory_per_actor": "2G a direction; on a GPU half of what is free",
    }  # fmt: skip
    assert {name: named.pop(name) for name in in_words} == in_words
    assert all(getattr(config, name) is None for name in in_words)
    for name, text in named.items():
        kind = type(getattr(config, name))
        value = text if kind is str else kind(text)
        assert getattr(config_of({**NEEDED, name: value}), name) == getattr(config, name), name


def test_ids_may_be_written_with_spaces_after_the_commas():
    assert ids_in('a, b,"c, d", " e"') == ["a", "b", "c, d", " e"]


@given(st.lists(st.text(), min_size=1))
def test_names_come_out_of_an_option_as_they_went_in(names):
    assert ids_in(joined(names)) == names


def test_dashes_and_underscores_are_the_same_after_submit_too():
    words = ["--num-actors", "2", "--input_ids", "a", "--overwrite"]
    assert _typed(words) == {"num_actors": 2, "input_ids": "a", "overwrite": True}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"), (59.94, "59.9 s"), (59.96, "1 min 00 s"), (119.7, "2 min 00 s"),
        (3599.6, "1 h 00 min"), (3661, "1 h 01 min"),
    ],
)  # fmt: skip
def test_durations_never_show_sixty_seconds_or_minutes(seconds, text):
    assert duration(seconds) == text
