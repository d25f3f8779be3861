"""Measurements: what the documents state, and the scripts that anyone can repeat it with."""
