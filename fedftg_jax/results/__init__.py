"""What is in a folder of results, and how it is shown."""
