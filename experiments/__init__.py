"""Programs: `train`, `compare`, `partition` and `benchmark`."""
