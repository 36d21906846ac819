"""Training, and what is written meanwhile."""
