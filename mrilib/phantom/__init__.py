"""Simulated multi-coil brain scans, written in fastMRI's format."""
