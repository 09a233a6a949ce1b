"""Wan 2.2 itself: facts, flow, encoders, experts, sampling, files. Knows nothing of training."""
