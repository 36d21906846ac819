"""Runs one contestant in a process of its own, for `fedftg benchmark`.

  python -m fedftg_jax.contestants.worker NAME[:OPTION=VALUE] WORKLOAD COHORT \
    PRECISION

It prints a line of JSON when it is ready (device, versions, seconds of the
first round, which compiles, and what the contestant's own `cost` counts, if it
has any). Then, for every line that it reads, it trains a
round and prints a line with the seconds it took and the peak memory so far. It
ends when its input ends, or with a line that says why it cannot go on.
"""

from collections.abc import Iterator
import importlib
import importlib.metadata
import json
import resource
import sys
import time
from typing import Any

from fedftg_jax.contestants import workloads


def main(name: str, workload: str, cohort: str, precision: str) -> None:
  """Prepares the contestant, and times a round for every line read."""
  # Only answers go to the real stdout; all other output goes to stderr.
  where, sys.stdout = sys.stdout, sys.stderr
  try:
    work = workloads.WORKLOADS[workload]._replace(
      cohort=int(cohort), bfloat16=precision == 'bfloat16'
    )
    for answer in answers(name, work):
      print(json.dumps(answer), file=where, flush=True)
  except Exception as error:
    # Whatever the error is, the others can still be timed.
    text = ' '.join(str(error).split())
    if not isinstance(error, (ImportError, NotImplementedError)):
      text = f'{type(error).__name__}: {text}'
    print(json.dumps({'left_out': text}), file=where, flush=True)


def answers(name: str, work: workloads.Workload) -> Iterator[dict[str, Any]]:
  """Yields what is printed: when the contestant is ready, and of each round."""
  contestant = importlib.import_module(
    'fedftg_jax.contestants.' + name.split(':')[0]
  )
  chosen = _options(name)
  start = time.perf_counter()
  round_ = contestant.prepare(work, **chosen)
  round_()
  first_seconds = time.perf_counter() - start
  cost = contestant.cost(work, **chosen) if hasattr(contestant, 'cost') else {}
  yield {
    'first_seconds': first_seconds,
    'cost': cost,
    'device': device(),
    'versions': {p: importlib.metadata.version(p) for p in contestant.PACKAGES},
  }
  for _ in sys.stdin:
    start = time.perf_counter()
    round_()
    seconds = time.perf_counter() - start
    yield {'seconds': seconds, 'peak_bytes': peak_bytes()}


def _options(name: str) -> dict[str, str | int]:
  if ':' not in name:  # as a peer, whose environment need not have JAX
    return {}
  from fedftg_jax.contestants import options

  return options.parse(name)


def peak_bytes() -> int:
  """Returns the peak memory of the accelerator, or else of this process."""
  if 'torch' in sys.modules and sys.modules['torch'].cuda.is_available():
    return sys.modules['torch'].cuda.max_memory_allocated()
  stats = (
    'jax' in sys.modules and sys.modules['jax'].devices()[0].memory_stats()
  )
  if stats:
    return stats['peak_bytes_in_use']
  return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def device() -> str:
  """Returns the name of the device in use: that of an accelerator, or 'cpu'."""
  if 'torch' in sys.modules and sys.modules['torch'].cuda.is_available():
    return sys.modules['torch'].cuda.get_device_name()
  if 'jax' in sys.modules:
    return sys.modules['jax'].devices()[0].device_kind
  return 'cpu'


if __name__ == '__main__':
  main(*sys.argv[1:])
