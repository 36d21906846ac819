"""Data sets, partitions, schedules, and clients as an index table."""
