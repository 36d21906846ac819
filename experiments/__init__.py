"""Programs: `train` and `compare`."""
