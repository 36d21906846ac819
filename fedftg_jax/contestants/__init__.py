"""Simulators that `fedftg benchmark` times side by side.

A module here has `PACKAGES`, the distributions that it needs, and
`prepare(workload) -> Callable[[], None]`: the data on the device, and a
function that trains one round and returns when it is done. It runs in a process
of its own. What it cannot do it refuses with NotImplementedError.
"""
