"""The engine: exact patched outputs of any torch network. Knows torch, not Ray."""
