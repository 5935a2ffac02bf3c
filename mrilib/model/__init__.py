"""Networks: k-space encoder, image decoder, baselines, and the two-stage model."""
