"""How far a patch moves the outputs: formulas in float64, for many rows at once."""
