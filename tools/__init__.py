"""Programs around the training, each started with `python -m tools.NAME`."""
