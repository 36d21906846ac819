"""`jax.jit` with compiler options for a CPU, whose user waits most for
compiling."""

from collections.abc import Callable
import functools
import os
from typing import Any

import jax

# LLVM's further passes take a third of the compile time; rounds were as fast
# without them (docs/speed.md).
OFTEN = {'xla_backend_optimization_level': 1}
# For what runs seldom: a program of many random draws compiles in a quarter of
# the time, to the same bytes. Rounds of small models would take a quarter
# longer.
ONCE = {
  **OFTEN,
  'xla_cpu_use_fusion_emitters': False,
  'xla_cpu_parallel_codegen_split_count': 1,
}


def jit(
  function: Callable, cpu_options: dict[str, Any], **kwargs: Any
) -> Callable:
  """Makes `jax.jit` of a function, with compiler options where it runs on a
  CPU.

  An option that the environment variable XLA_FLAGS names keeps the value from
  there. Called within another program, the function is compiled with that
  program's options.

  Args:
    function: to be compiled.
    cpu_options: of XLA, by name.
    **kwargs: of `jax.jit`.

  Returns:
    The compiled function. Its attribute `on` gives, for the name of a backend,
    what `jax.jit` made for it.
  """

  @functools.cache
  def on(backend: str) -> Callable:
    asked = os.environ.get('XLA_FLAGS', '')
    options = {k: v for k, v in cpu_options.items() if k not in asked}
    return jax.jit(
      function, compiler_options=options if backend == 'cpu' else None, **kwargs
    )

  @functools.wraps(function)
  def call(*args, **named):
    traced = any(
      isinstance(a, jax.core.Tracer) for a in jax.tree.leaves((args, named))
    )
    return on('' if traced else jax.default_backend())(*args, **named)

  call.on = on  # type: ignore[attr-defined]
  return call
