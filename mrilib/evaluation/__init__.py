"""Trained models applied to test data: reconstructions, texts, scores and controls."""
