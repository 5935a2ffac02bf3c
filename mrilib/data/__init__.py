"""fastMRI brain files: reading, checking, splitting, annotations, and batches of slices."""
