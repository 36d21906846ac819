"""Wraps `jax.jit` with options that make programs compile faster on a CPU."""

from collections.abc import Callable
import functools
import os
from typing import Any

import jax

# For programs that run often. LLVM's further passes take a third of the compile
# time; rounds were as fast without them (docs/speed.md).
OFTEN = {'xla_backend_optimization_level': 1}
# For programs that run once or seldom. A program of many random draws compiles
# in a quarter of the time and gives the same bytes; rounds of small models
# would take a quarter longer.
ONCE = {
  **OFTEN,
  'xla_cpu_use_fusion_emitters': False,
  'xla_cpu_parallel_codegen_split_count': 1,
}


def jit(
  function: Callable, cpu_options: dict[str, Any], **kwargs: Any
) -> Callable:
  """Jits a function, with compiler options if it runs on a CPU.

  An option that the environment variable XLA_FLAGS names keeps the value given
  there. If the function is called within another compiled program, it is
  compiled with that program's options.

  Args:
    function: the function to compile.
    cpu_options: XLA's options by name.
    **kwargs: arguments of `jax.jit`.

  Returns:
    The compiled function. Its attribute `on` maps the name of a backend to the
    result of `jax.jit` for it.
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
