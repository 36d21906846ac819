"""Configuration: from flags to all parts of a run."""
