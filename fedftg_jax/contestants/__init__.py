"""Simulators that `fedftg benchmark` times side by side.

A module here has `PACKAGES`, the distributions that it needs, and
`prepare(workload) -> Callable[[], None]`, which puts the data on the device and
returns a function that trains one round and waits for it. Those in
`options.OPTIONS` take options besides. It runs in a process of its own. It
raises NotImplementedError for a workload that it cannot do.
"""
