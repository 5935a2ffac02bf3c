"""Baselines, distribution shifts and speed measurements."""
