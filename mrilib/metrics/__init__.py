"""Scores of images, lesions and texts."""
