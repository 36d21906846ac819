"""From flags to all parts of a run."""
