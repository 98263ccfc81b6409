"""Agents' files for tests, good ones and such as are made to harm."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import raypatch
from raypatch.engine.reference import reference_outputs
from raypatch.errors import AgentError


class Dueling(nn.Module):
    """A convolution, then a value and advantages."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten())
        self.value, self.advantage = nn.Linear(12, 1), nn.Linear(12, 3)

    def forward(self, obs):
        x = self.body(obs)
        a = self.advantage(x)
        return self.value(x) + a - a.mean(1, keepdim=True)


def assert_same_outputs(agent, module, shape, n=9):
    x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(agent.network(x), module(x), rtol=1e-5, atol=1e-6)
    experiments = [{layer: [0]} for layer in agent.layers] + [{"output_logits": [1]}]
    found = raypatch.patch(agent.network, experiments, x[:4], x[4:8])
    truth = reference_outputs(agent.network, experiments, x[:4], x[4:8])
    np.testing.assert_allclose(found, truth, atol=1e-5)
    return found, x


def exported(module, obs, path):
    free = ({0: torch.export.Dim.AUTO},)
    torch.export.save(torch.export.export(module, (obs,), dynamic_shapes=free), path)


def small_program(path):
    module = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    exported(module, torch.randn(2, 4), path)


class Payload:
    """Unpickling this makes a file."""

    def __init__(self, flag):
        self.flag = str(flag)

    def __reduce__(self):
        return os.system, (f"touch {self.flag}",)


def repacked(source: Path, target: Path, changes: dict[str, bytes], **kwargs) -> Path:
    """A copy of an archive with some members replaced or added."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", **kwargs) as new:
        for name in old.namelist():
            new.writestr(name, changes.pop(name, old.read(name)))
        for name, content in changes.items():
            new.writestr(name, content)
    return target


def options_of(suffix: str) -> dict[str, str]:
    """What must be said of a file with this suffix: weights alone name no activation."""
    return {"activation": "relu"} if suffix in ("pt", "pth", "safetensors") else {}


def assert_refused(folder, match="", **options) -> str:
    with pytest.raises(AgentError, match=match) as caught:
        raypatch.load_agent(folder, **options)
    text = str(caught.value)
    assert text and len(text.splitlines()) == 1 and len(text) < 1500
    return text
