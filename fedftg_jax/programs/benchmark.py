"""Times a round of this package and of alternatives, side by side.

  fedftg benchmark --workloads=W1,W3 --repeat=5
  fedftg benchmark --peer_python=bench/bin/python
  fedftg benchmark --workloads=W2 --cohorts=1,2,4,8 --against=torch

Each contestant runs in a process of its own. They take turns, round by round,
while the others wait, so that a change in the machine's load affects all of
them. The table shows medians, the ratio of each to ours, and the peak memory of
the process (on an accelerator, of its device). A contestant whose package is
missing, or that cannot do a workload, is named and left out.

The peers are separate packages (requirements-bench.txt), some of which need
other versions than this package; --peer_python names the interpreter of an
environment that has them. To compare per core, pin the program: taskset -c 0
python -m ...

It writes --out (JSON) and, beside it, a picture of the same name.
"""

import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
from typing import Any

from absl import flags as absl_flags
import numpy as np
from rich import console as rich_console

from fedftg_jax.contestants import workloads
from fedftg_jax.results import plots
from fedftg_jax.system import cli, devices, files, progress

GROUPS = ()  # of common flags in --help
OURS = 'ours'
# Contestants that run in our environment; the others use --peer_python.
HOME = (OURS, 'plain_jax', 'centralised')
PEERS = ('torch', 'torch_vmap', 'fedjax', 'pfl', 'plain_jax', 'centralised')

_WORKLOADS = absl_flags.DEFINE_list(
  'workloads',
  ['W1', 'W2', 'W3', 'W4', 'W5'],
  'Workloads to time. They are '
  + '; '.join(f'{k}: {w.help}' for k, w in workloads.WORKLOADS.items())
  + '.',
)
_AGAINST = absl_flags.DEFINE_list(
  'against',
  list(PEERS),
  'Contestants to compare with. They are ' + ', '.join(PEERS) + '.',
)
_REPEAT = absl_flags.DEFINE_integer(
  'repeat', 5, 'Number of timed rounds. A first one compiles.', lower_bound=1
)
_COHORTS = absl_flags.DEFINE_list(
  'cohorts',
  [],
  'Numbers of clients to time with. They replace those of the workloads.',
)
_PEER_PYTHON = absl_flags.DEFINE_string(
  'peer_python',
  '',
  "Python interpreter with the peers' packages; empty for the one that runs "
  'this program.',
)
_OUT = absl_flags.DEFINE_string(
  'out', 'runs/benchmark.json', 'Where to write the figures.'
)


def main() -> None:
  for flag, known in ((_WORKLOADS, workloads.WORKLOADS), (_AGAINST, PEERS)):
    for name in flag.value:
      if name not in known:
        raise cli.UsageError(
          flag.name, name, 'must be one of ' + ', '.join(known)
        )
  if shutil.which(_PEER_PYTHON.value or sys.executable) is None:
    raise cli.UsageError(
      'peer_python', _PEER_PYTHON.value, 'must be a Python interpreter'
    )
  for cohort in _COHORTS.value:
    if not (cohort.isdigit() and int(cohort)):
      raise cli.UsageError('cohorts', cohort, 'must be positive integers')
  out = pathlib.Path(_OUT.value)
  if out.suffix != '.json':
    raise cli.UsageError('out', out, 'must end in .json')
  console = rich_console.Console(stderr=True)
  rows = []
  for name in _WORKLOADS.value:
    own = workloads.WORKLOADS[name]
    console.print(f'{name}: {own.help}')
    for cohort in map(int, _COHORTS.value or [own.cohort]):  # type: ignore[arg-type,list-item]
      if _COHORTS.value:
        console.print(f' {cohort} clients')
      rows += time_side_by_side(
        name, cohort, [OURS, *_AGAINST.value], _REPEAT.value, console
      )
      write_results(rows, out)  # so that results survive an interruption
  progress.show(*result_table(rows))
  print(f'figures: {out}, {out.with_suffix(".png")}')


class Contestant:
  """A process that trains a round on request."""

  def __init__(self, name: str, workload: str, cohort: int):
    peer_python = _PEER_PYTHON.value or sys.executable
    python = sys.executable if name in HOME else peer_python
    self.name, self.seconds, self.peak_bytes = name, [], 0
    self._errors = tempfile.TemporaryFile('w+')
    # The other environment should find this package, but no package that is
    # installed next to it.
    self._place = tempfile.TemporaryDirectory()
    package = pathlib.Path(__file__).parents[1]
    pathlib.Path(self._place.name, package.name).symlink_to(package)
    self._process = subprocess.Popen(
      [
        python,
        '-m',
        'fedftg_jax.contestants.worker',
        name,
        workload,
        str(cohort),
      ],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._errors,
      text=True,
      cwd=self._place.name,
      env={**os.environ, 'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'},
    )

  def answer(self) -> dict[str, Any]:
    """Reads an answer; 'left_out' has the reason if the process has ended."""
    line = self._process.stdout.readline()  # type: ignore[union-attr]
    if line:
      return json.loads(line)
    self._process.wait()
    self._errors.seek(0)
    last = [line for line in self._errors if line.strip()][-1:]
    return {
      'left_out': ''.join(last).strip()
      or (f'ended with status {self._process.returncode}')
    }

  def run(self) -> None:
    """Trains a round and records its time and the peak memory."""
    self._process.stdin.write('\n')  # type: ignore[union-attr]
    self._process.stdin.flush()  # type: ignore[union-attr]
    answer = self.answer()
    if 'seconds' not in answer:
      raise cli.RunError(f'{self.name}: {answer["left_out"]}')
    self.seconds.append(answer['seconds'])
    self.peak_bytes = answer['peak_bytes']

  def close(self) -> None:
    """Ends the process."""
    self._process.kill()
    self._process.communicate()
    self._errors.close()
    self._place.cleanup()


def time_side_by_side(
  workload, cohort, names, repeat, console
) -> list[dict[str, Any]]:
  """Times one workload; returns its rows, ours first."""
  here, about = [], {}
  try:
    for name in names:
      contestant = Contestant(name, workload, cohort)
      here.append(contestant)
      about[name] = contestant.answer()
      if 'left_out' in about[name]:
        console.print(f'  {name} left out: {about[name]["left_out"]}')
        here.pop().close()
    for _ in range(repeat):
      for contestant in here:
        contestant.run()
  finally:
    for contestant in here:
      contestant.close()
  rows = []
  for contestant in here:
    median = float(np.median(contestant.seconds))
    first = about[contestant.name]
    rows.append(
      {
        'workload': workload,
        'cohort': cohort,
        'who': contestant.name,
        'device': first['device'],
        'peak_bytes': contestant.peak_bytes,
        'seconds': median,
        'all_seconds': contestant.seconds,
        'compile_seconds': max(first['first_seconds'] - median, 0.0),
        'versions': first['versions'],
      }
    )
    console.print(f'  {contestant.name}: {median:.3g} s')
  return rows


def result_table(
  rows: list[dict[str, Any]],
) -> tuple[list[str], list[list[str]]]:
  """Formats the results: header and rows, as text."""
  ours = {_title(r): r['seconds'] for r in rows if r['who'] == OURS}
  lines = []
  for r in rows:
    own = workloads.WORKLOADS[r['workload']]
    gflop = own.gflop and own.gflop * r['cohort'] / own.cohort
    lines.append(
      [
        _title(r),
        r['who'],
        r['device'],
        f'{r["seconds"]:.3g}',
        f'{min(r["all_seconds"]):.3g} - {max(r["all_seconds"]):.3g}',
        f'{r["seconds"] / ours[_title(r)]:.2f}' if _title(r) in ours else '',
        f'{gflop / r["seconds"]:.0f}' if gflop else '',
        f'{r["peak_bytes"] / 1e9:.2f}',
        f'{r["compile_seconds"]:.1f}',
      ]
    )
  return [
    'workload',
    'who',
    'device',
    's per round',
    'range',
    'times ours',
    'GFLOP/s',
    'peak GB',
    'compile s',
  ], lines


def _title(row: dict[str, Any]) -> str:
  name, cohort = row['workload'], row['cohort']
  return (
    name if cohort == workloads.WORKLOADS[name].cohort else f'{name} x {cohort}'
  )


def write_results(rows: list[dict[str, Any]], out: pathlib.Path) -> None:
  """Writes the figures and the picture."""
  files.write_json(out, {'machine': machine(), 'rows': rows})
  groups = {}
  for r in rows:
    groups.setdefault(_title(r), {})[r['who']] = r['seconds']
  with files.replacing(out.with_suffix('.png')) as temporary:
    plots.bars(temporary, groups, 'seconds per round')


def machine() -> dict[str, Any]:
  """Describes the machine."""
  return {
    'platform': platform.platform(),
    'processor': devices.processor(),
    'cores': len(os.sched_getaffinity(0)),
  }
