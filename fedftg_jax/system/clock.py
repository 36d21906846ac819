"""Seconds of training, evaluation, checkpoints and compilation."""

import functools
import time

import jax

_COMPILE_EVENT = '/jax/core/compile/'
_compiling = [0.0]  # seconds of compilation, of the whole process


def _count(event: str, duration_secs: float, **_) -> None:
  if event.startswith(_COMPILE_EVENT):
    _compiling[0] += duration_secs


STAGES = ('train', 'evaluate', 'checkpoint', 'compile')


@functools.cache
def _listen() -> None:
  """Has JAX report its compilations from here on."""
  jax.monitoring.register_event_duration_secs_listener(_count)


class Clock:
  """Seconds of training, evaluation, checkpoints (in the row after them) and
  compilation, each by itself."""

  def __init__(self, done: int = 0):
    """`done`: rounds that are done already."""
    _listen()
    self._seconds = dict.fromkeys(STAGES, 0.0)
    self._first = self._previous = done
    self._last = dict(self._seconds)
    self._start, self._compiled = time.perf_counter(), _compiling[0]

  def lap(self, name: str) -> None:
    """Books the time since the last lap under `name`, compilation apart."""
    now, compiled = time.perf_counter(), _compiling[0]
    compiling = min(compiled - self._compiled, now - self._start)
    self._seconds['compile'] += compiling
    self._seconds[name] += now - self._start - compiling
    self._start, self._compiled = now, compiled

  def rate(self, done: int) -> float:
    """Rounds per second of training so far."""
    return (done - self._first) / max(self._seconds['train'], 1e-9)

  def row(self, done: int) -> dict[str, float]:
    """Seconds since the last row, and rounds per second in them."""
    new = {k: v - self._last[k] for k, v in self._seconds.items()}
    rounds, self._previous = done - self._previous, done
    self._last = dict(self._seconds)
    return {
      'round': done,
      **{f'{k}_seconds': round(v, 4) for k, v in new.items()},
      'rounds_per_second': round(rounds / max(new['train'], 1e-9), 4),
    }
