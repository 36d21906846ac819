"""Times a round of this package and of alternatives, side by side.

  fedftg benchmark --workloads=W1,W3 --repeat=5
  fedftg benchmark --peer_python=bench/bin/python
  fedftg benchmark --workloads=W2 --cohorts=1,2,4,8 --against=torch
  fedftg benchmark --precisions=default,bfloat16 --minutes=9 --resume

Each contestant runs in a process of its own. They take turns, round by round,
while the others wait, so that a change in the machine's load affects all of
them. The table shows medians, the ratio of each to ours, and the peak memory of
the process (on an accelerator, of its device). A contestant whose package is
missing, or that cannot do a workload, is named and left out.

The peers are separate packages (requirements-bench.txt), some of which need
other versions than this package; --peer_python names the interpreter of an
environment that has them. To compare per core, pin the program: taskset -c 0
python -m ...

Three contestants tell how near to the limits of the device the others are.
matmul is a large matrix product, and the column "of matmul" is the share of its
speed. copy reads and writes a large array. one_step is one local step of all
clients, with the bytes that XLA counts for it.

Ours has options, as ours:conv=pallas:client_chunk=2, which --against takes like
any other contestant: candidates that may be faster.

It writes --out (JSON) and, beside it, a picture of the same name, after each
workload. A run that was stopped, by --minutes or otherwise, goes on with
--resume.
"""

import contextlib
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import flags as absl_flags
import numpy as np
from rich import console as rich_console

from fedftg_jax.contestants import ours, workloads
from fedftg_jax.results import plots
from fedftg_jax.system import cli, devices, files, progress

GROUPS = ()  # of common flags in --help
OURS = 'ours'
# Contestants that run in our environment; the others use --peer_python.
HOME = (OURS, 'plain_jax', 'centralised', 'one_step', 'matmul', 'copy')
PEERS = (
  'torch',
  'torch_vmap',
  'torch_central',
  'torch_compiled',
  'fedjax',
  'pfl',
  *HOME[1:],
)
LIMITS = HOME[3:]  # no rounds: what the device and a step can do
PRECISIONS = ('default', 'bfloat16')

_WORKLOADS = absl_flags.DEFINE_list(
  'workloads',
  ['W1', 'W2', 'W3', 'W4', 'W5', 'W6'],
  'Workloads to time. They are '
  + '; '.join(f'{k}: {w.help}' for k, w in workloads.WORKLOADS.items())
  + '.',
)
_AGAINST = absl_flags.DEFINE_list(
  'against',
  [peer for peer in PEERS if peer not in LIMITS],
  'Contestants to compare with. They are '
  + ', '.join(PEERS)
  + ', and ours with options: '
  + ', '.join(ours.OPTIONS)
  + '.',
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
_PRECISIONS = absl_flags.DEFINE_list(
  'precisions',
  ['default'],
  'Precisions to time. default is float32 with the fast matrix products of the '
  'device; in bfloat16 layers compute in it, and weights are float32.',
)
_MINUTES = absl_flags.DEFINE_float(
  'minutes',
  0.0,
  'Minutes after which no further workload is begun; 0 for no limit.',
  lower_bound=0,
)
_RESUME = absl_flags.DEFINE_bool(
  'resume', False, 'Keep the figures that are in --out, and add the others.'
)
_OUT = absl_flags.DEFINE_string(
  'out', 'runs/benchmark.json', 'Where to write the figures.'
)


def main() -> None:
  for flag, known in (
    (_WORKLOADS, workloads.WORKLOADS),
    (_AGAINST, PEERS),
    (_PRECISIONS, PRECISIONS),
  ):
    for name in flag.value:
      if flag is _AGAINST and name.startswith(OURS + ':'):
        try:
          ours.options(name.split(':')[1:])
        except ValueError as error:
          raise cli.UsageError(flag.name, name, str(error)) from error
      elif name not in known:
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
  start, longest = time.monotonic(), 0.0
  done = _resumed(out) if _RESUME.value else []
  cells = [
    cell
    for cell in _cells()
    if cell not in [(r['workload'], r['cohort'], r['precision']) for r in done]
  ]
  for i, (name, cohort, precision) in enumerate(cells):
    begun = time.monotonic()
    # A workload takes about as long as the longest one before it.
    if _MINUTES.value and begun + longest > start + 60 * _MINUTES.value:
      console.print(
        f'{len(cells) - i} of {len(cells)} are left: the same command with '
        '--resume goes on'
      )
      break
    console.print(f'{name}: {workloads.WORKLOADS[name].help}')
    console.print(f' {cohort} clients, {precision}')
    done += time_side_by_side(
      (name, cohort, precision), [OURS, *_AGAINST.value], _REPEAT.value, console
    )
    write_results(done, out)  # so that results survive an interruption
    longest = max(longest, time.monotonic() - begun)
  progress.show(*result_table(done))
  print(f'figures: {out}, {out.with_suffix(".png")}')


def _cells() -> list[tuple[str, int, str]]:
  """Lists what is timed: workload, number of clients, precision."""
  return [
    (name, int(cohort), precision)
    for name in _WORKLOADS.value
    for cohort in _COHORTS.value or [str(workloads.WORKLOADS[name].cohort)]
    for precision in _PRECISIONS.value
  ]


def _resumed(out: pathlib.Path) -> list[dict[str, Any]]:
  """Reads the figures of a benchmark that was stopped; [] if there are none.

  Raises:
    cli.UsageError: if the file is damaged, or of another machine.
  """
  if not out.exists():
    return []
  try:
    saved = files.read_json(out)
    rows, where = saved['rows'], {'xla_flags': '', **saved['machine']}
    for row in rows:
      row.setdefault('precision', 'default')
      row.setdefault('cost', {})
    result_table(rows)
  except (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ZeroDivisionError,
  ) as error:
    raise cli.UsageError(
      'out', out, f'is damaged ({type(error).__name__}: {error})'
    ) from error
  if where != machine():
    raise cli.UsageError(
      'out', out, 'has figures of another machine or XLA_FLAGS'
    )
  for flag in (_AGAINST, _REPEAT):
    before = saved.get(flag.name, flag.value)
    if before != flag.value:
      raise cli.UsageError(
        flag.name, flag.value, f'{out} has figures with {before}'
      )
  return rows


class Contestant:
  """A process that trains a round on request."""

  def __init__(self, name: str, workload: str, cohort: int, precision: str):
    peer_python = _PEER_PYTHON.value or sys.executable
    home = name.split(':')[0] in HOME
    python = sys.executable if home else peer_python
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
        precision,
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
    with contextlib.suppress(BrokenPipeError):  # then the answer is the reason
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
  cell: tuple[str, int, str], names, repeat, console
) -> list[dict[str, Any]]:
  """Times one workload; returns its rows, ours first."""
  workload, cohort, precision = cell
  here, about = [], {}
  try:
    for name in names:
      contestant = Contestant(name, *cell)
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
        'precision': precision,
        'who': contestant.name,
        'device': first['device'],
        'peak_bytes': contestant.peak_bytes,
        'seconds': median,
        'all_seconds': contestant.seconds,
        'compile_seconds': max(first['first_seconds'] - median, 0.0),
        'cost': first['cost'],
        'versions': first['versions'],
      }
    )
    console.print(f'  {contestant.name}: {median:.3g} s')
  return rows


def result_table(
  rows: list[dict[str, Any]],
) -> tuple[list[str], list[list[str]]]:
  """Formats the results: header and rows, as text."""
  base, limits = (
    {_title(r): r for r in rows if r['who'] == who} for who in (OURS, 'matmul')
  )
  lines = []
  for r in rows:
    title, speed = _title(r), _gflop_per_second(r)
    is_round = r['who'] not in LIMITS
    moved = r['cost'].get('gbyte')
    lines.append(
      [
        title,
        r['who'],
        r['device'],
        f'{r["seconds"]:.3g}',
        f'{min(r["all_seconds"]):.3g} - {max(r["all_seconds"]):.3g}',
        f'{r["seconds"] / base[title]["seconds"]:.2f}'
        if title in base and is_round
        else '',
        f'{speed:.0f}' if speed else '',
        f'{100 * speed / _gflop_per_second(limits[title]):.1f} %'
        if speed and title in limits
        else '',
        f'{moved / r["seconds"]:.0f}' if moved else '',
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
    'of matmul',
    'GB/s',
    'peak GB',
    'compile s',
  ], lines


def _gflop_per_second(row: dict[str, Any]) -> float:
  """Returns the speed of a row, 0 if its operations are not counted."""
  own = workloads.WORKLOADS[row['workload']]
  gflop = own.gflop and own.gflop * row['cohort'] / own.cohort
  return (row['cost'].get('gflop') or gflop or 0.0) / row['seconds']


def _title(row: dict[str, Any]) -> str:
  name, cohort = row['workload'], row['cohort']
  if cohort != workloads.WORKLOADS[name].cohort:
    name += f' x {cohort}'
  return name if row['precision'] == 'default' else f'{name} {row["precision"]}'


def write_results(rows: list[dict[str, Any]], out: pathlib.Path) -> None:
  """Writes the figures and the picture."""
  files.write_json(
    out,
    {
      'machine': machine(),
      _AGAINST.name: _AGAINST.value,
      _REPEAT.name: _REPEAT.value,
      'rows': rows,
    },
  )
  groups = {}
  for r in rows:
    if r['who'] not in LIMITS:
      groups.setdefault(_title(r), {})[r['who']] = r['seconds']
  with files.replacing(out.with_suffix('.png')) as temporary:
    plots.bars(temporary, groups, 'seconds per round')


def machine() -> dict[str, Any]:
  """Describes the machine."""
  return {
    'platform': platform.platform(),
    'processor': devices.processor(),
    'cores': len(os.sched_getaffinity(0)),
    'xla_flags': os.environ.get('XLA_FLAGS', ''),
  }
