"""Fourier transforms, sampling masks, coils and SENSE. Complex tensors have axes (..., coil, readout, phase)."""
