"""Measures federations of many clients: time, memory and disk.

  python -m experiments.large
  python -m experiments.large --clients=20000 --rounds=20
  python -m experiments.large --partitions --clients=10000,100000

For each number of clients it trains FedAvg with an MLP, and SCAFFOLD with a
linear classifier and its slots in files (docs/large.md), each in a process of
its own, with the flags of experiments/presets/million_clients.flags. Runs that
are finished are not repeated. Writes large.json and table.md into --workdir.

With --partitions it draws partitions instead, each in a process of its own, and
writes their CPU seconds into partitions.md.
"""

from collections.abc import Sequence
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from typing import Any, NamedTuple

from absl import flags

from fedftg_jax.system import cli

PRESET = pathlib.Path(__file__).parent / 'presets' / 'million_clients.flags'
RUNS = {
  'fed_avg': ['--method=fed_avg', '--model=mlp'],
  'scaffold': ['--method=scaffold', '--model=softmax', '--client_state=disk'],
}
# Draws a federation as a run does, and prints the seconds of each step.
DRAW = """
import json, sys, time
import jax
from fedftg_jax.data import clients, datasets, partition, schedules
num, rounds, cohort = map(int, sys.argv[1:])
seconds, begin = {}, time.perf_counter()
def lap(name):
  global begin
  seconds[name], begin = time.perf_counter() - begin, time.perf_counter()
dataset = datasets.load(f'synthetic:clients={num}')
lap('data')
parts = partition.natural(dataset.train_clients, num)
lap('partition')
partition.like(dataset.test_y, dataset.train_y, parts)
lap('test_partition')
schedules.exact(rounds, num, cohort, 0)
lap('schedule')
data = clients.from_partition(dataset.train_x, dataset.train_y, parts)
jax.block_until_ready(data)
lap('index_table')
print(json.dumps({'examples': len(dataset.train_y), 'seconds': seconds}))
"""
# Draws a partition of random labels; prints CPU seconds and bytes of memory.
DRAW_PARTITION = """
import json, resource, sys, time
import numpy as np
from fedftg_jax.data import partition
name, num, total, shares, options = json.loads(sys.argv[1])
labels = np.random.RandomState(0).choice(len(shares), size=total, p=shares)
begin = time.process_time()
getattr(partition, name)(labels, num, **options)
seconds = time.process_time() - begin
memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([seconds, memory]))
"""
EVEN, UNEVEN = [0.1] * 10, [0.55] + [0.05] * 9  # shares of the classes


class Rule(NamedTuple):
  """Describes how a partition is drawn."""

  name: str  # of a function in `partition`
  options: dict[str, Any] = {}
  shares: Sequence[float] = EVEN
  more: float = 0  # further examples for each client, besides 20
  most: int = 10**6  # clients; with more it takes too long


# By what is printed.
RULES = {
  '`iid`': Rule('iid'),
  '`quantity`, `--size_power=1`': Rule('quantity', {'power': 1}),
  '`shards`': Rule('shards'),
  '`classes`': Rule('classes'),
  '`classes`, `--niid_bench`': Rule('classes', {'niid_bench': True}),
  '`dirichlet_class`, alpha .3': Rule('dirichlet_class', {'alpha': 0.3}),
  '`dirichlet_class`, alpha .05, `--min_size=10`': Rule(
    'dirichlet_class', {'alpha': 0.05, 'min_size': 10}
  ),
  '`dirichlet`, alpha .3': Rule('dirichlet', {'alpha': 0.3}),
  '`dirichlet`, alpha .05': Rule('dirichlet', {'alpha': 0.05}),
  '`dirichlet`, alpha .3, one class has 55 %': Rule(
    'dirichlet', {'alpha': 0.3}, UNEVEN, most=10**5
  ),
  '`dirichlet`, alpha .3, 20.25 examples a client': Rule(
    'dirichlet', {'alpha': 0.3}, more=0.25, most=10**5
  ),
}

_CLIENTS = flags.DEFINE_list(
  'clients', ['100000', '1000000'], 'Numbers of clients.'
)
flags.register_validator(
  'clients',
  lambda values: all(value.isdigit() and int(value) for value in values),
  'must be positive integers',
)
_ROUNDS = flags.DEFINE_integer(
  'rounds', 100, 'Rounds of each run, a multiple of 10.', lower_bound=20
)
_COHORT = flags.DEFINE_integer('cohort', 1000, 'Clients per round.')
_WORKDIR = flags.DEFINE_string('workdir', 'runs/large', 'Where to write.')
_PARTITIONS = flags.DEFINE_bool(
  'partitions', False, 'Draw partitions instead of training.'
)


def main() -> None:
  folder = pathlib.Path(_WORKDIR.value)
  folder.mkdir(parents=True, exist_ok=True)
  if _PARTITIONS.value:
    _partitions(folder / 'partitions.md')
    return
  path = folder / 'large.json'
  found = json.loads(path.read_text()) if path.exists() else {}
  for num in map(int, _CLIENTS.value):
    keys = [f'{num} {name} {_ROUNDS.value} {_COHORT.value}' for name in RUNS]
    if any(key not in found for key in keys):
      drawn = _draw(num)
    for key, (name, changes) in zip(keys, RUNS.items()):
      if key not in found:
        work = folder / key.replace(' ', '_')
        found[key] = {
          'method': name,
          'clients': num,
          **drawn,
          **_train(num, changes, work),
        }
        path.write_text(json.dumps(found, indent=2) + '\n')
        (folder / 'table.md').write_text(_table(found.values()))
  print(_table(found.values()))


def _partitions(path) -> None:
  """Times each rule with each number of clients, from few to many."""
  numbers = sorted(map(int, _CLIENTS.value))
  head = [
    'partition',
    *(f'{n:,} clients, s' for n in numbers),
    'peak memory, GB',
  ]
  lines = [head, ['---'] * len(head)]
  for text, rule in RULES.items():
    cells, peak = [], 0
    for num in numbers:
      if num > rule.most:
        cells.append('')
        continue
      total = 20 * num + int(rule.more * num)
      task = [rule.name, num, total, rule.shares, rule.options]
      seconds, peak = _python(DRAW_PARTITION, json.dumps(task))
      cells.append(f'{seconds:.2g}' if seconds < 10 else f'{seconds:.0f}')
    lines.append([text, *cells, f'{peak / 1e9:.1f}'])
    path.write_text(''.join(f'| {" | ".join(line)} |\n' for line in lines))
  print(path.read_text())


def _python(code, *arguments):
  """Runs code in a process of its own, and returns what it prints as JSON."""
  words = [sys.executable, '-c', code, *arguments]
  out = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
  return json.loads(out.stdout)


def _draw(num) -> dict:
  """Times the steps before training, once."""
  return _python(DRAW, *map(str, (num, _ROUNDS.value, _COHORT.value)))


def _train(num, changes, work) -> dict:
  """Trains in a process of its own, and looks at its folder meanwhile."""
  command = [
    *(sys.executable, '-m', 'experiments.train', f'--flagfile={PRESET}'),
    f'--dataset=synthetic:clients={num}',
    *(f'--rounds={_ROUNDS.value}', f'--cohort={_COHORT.value}'),
    f'--workdir={work}',
    *changes,
  ]
  print(' '.join(command), flush=True)
  begin = time.perf_counter()
  process = subprocess.Popen(command)
  apparent = used = 0
  while True:
    pid, status, usage = os.wait4(process.pid, os.WNOHANG)
    if pid:
      break
    slots = [s for s in map(_stat, work.glob('.clients*/*')) if s]
    apparent = max(apparent, sum(s.st_size for s in slots))
    used = max(used, sum(512 * s.st_blocks for s in slots))
    time.sleep(1)
  if status:
    raise SystemExit(f'{work}: ended with status {status}')
  timings = [json.loads(line) for line in (work / 'timings.jsonl').open()]
  per_round = [
    (b['train_seconds'] / (b['round'] - a['round']))
    for a, b in zip(timings, timings[1:])
  ]
  last = max((work / 'checkpoints').iterdir(), key=lambda p: int(p.name))
  row = json.loads((work / 'metrics.jsonl').read_text().splitlines()[-1])
  return {
    'seconds_per_round': statistics.median(per_round),
    'seconds_per_round_range': [min(per_round), max(per_round)],
    'seconds_in_all': time.perf_counter() - begin,
    'compile_seconds': sum(t['compile_seconds'] for t in timings),
    'checkpoint_seconds': max(t['checkpoint_seconds'] for t in timings),
    'peak_memory_bytes': 1024 * usage.ru_maxrss,
    'slots_apparent_bytes': apparent,
    'slots_used_bytes': used,
    'checkpoint_bytes': sum(
      p.stat().st_size for p in last.rglob('*') if p.is_file()
    ),
    'folder_bytes': sum(
      p.stat().st_size for p in work.iterdir() if p.is_file()
    ),
    'rounds': row['round'],
    'test_accuracy': row['test_accuracy'],
    'machine': f'{platform.machine()}, {os.cpu_count()} cores',
    'date': time.strftime('%Y-%m-%d'),
  }


def _stat(path):
  try:
    return path.stat()
  except FileNotFoundError:  # the run has ended meanwhile
    return None


def _table(rows) -> str:
  """A Markdown table of all runs."""
  columns = {
    'clients': lambda r: f'{r["clients"]:,}',
    'method': lambda r: f'`{r["method"]}`',
    'examples, millions': lambda r: f'{r["examples"] / 1e6:.1f}',
    's, data': lambda r: f'{r["seconds"]["data"]:.0f}',
    's, partition and tables': lambda r: '{:.1f}'.format(
      sum(
        r['seconds'][k] for k in ('partition', 'test_partition', 'index_table')
      )
    ),
    's, schedule': lambda r: f'{r["seconds"]["schedule"]:.1f}',
    's per round': lambda r: f'{r["seconds_per_round"]:.2f}',
    'peak memory, GB': lambda r: f'{r["peak_memory_bytes"] / 1e9:.1f}',
    'slots, GB apparent': lambda r: f'{r["slots_apparent_bytes"] / 1e9:.2f}',
    'slots, GB used': lambda r: f'{r["slots_used_bytes"] / 1e9:.2f}',
    'checkpoint, GB': lambda r: f'{r["checkpoint_bytes"] / 1e9:.3f}',
    'accuracy, percent': lambda r: f'{100 * r["test_accuracy"]:.1f}',
  }
  lines = [list(columns), ['---'] * len(columns)]
  lines += [[cell(row) for cell in columns.values()] for row in rows]
  return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


if __name__ == '__main__':
  cli.launch(sys.modules[__name__], shared=False)
