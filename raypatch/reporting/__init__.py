"""Plots of a run: what they show (gather), as a page (page), as figures (figures)."""
