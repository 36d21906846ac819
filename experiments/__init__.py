"""The programs as scripts: `python -m experiments.NAME` is `fedftg NAME`."""
