"""Data sets, partitions, schedules, and clients as rows of flat arrays."""
