"""Pretraining of the small Nirvana model in models/tiny_backbone."""
