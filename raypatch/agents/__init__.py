"""Agents: a directory as people have it becomes a network with named layers.

:func:`load_agent` picks the format; each format lives in a file of its own and gives back
an :class:`Agent`. Nothing here executes code from an agent's files unless
``trust_agent_code`` (or a factory named by the user) says so.
"""

from raypatch.agents.agent import Agent, AgentOptions
from raypatch.agents.finding import load_agent, read_layer_structure

__all__ = ["Agent", "AgentOptions", "load_agent", "read_layer_structure"]
