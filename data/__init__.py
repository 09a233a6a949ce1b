"""Files on disk become batches. Knows nothing of the model: encoders and geometry are handed in."""
