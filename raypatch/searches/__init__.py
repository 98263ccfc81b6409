"""Searches that patch in this process: coalitions, and guesses by gradients."""
