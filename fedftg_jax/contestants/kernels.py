"""Counts the kernels of a program that is compiled for a GPU.

Small kernels may wait for their launches, and others for the memory. The counts
tell which, and where to look.
"""

import math
import re
from typing import NamedTuple


class Counts(NamedTuple):
  """Counts of a program, or of a part of it."""

  kernels: int = 0
  bytes: int = 0


class Instruction(NamedTuple):
  """Describes an instruction of a program in XLA's text form."""

  name: str
  shape: str
  operation: str
  operands: list[str]
  attributes: str


_FREE = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast'}
_SLICES = {'slice', 'dynamic-slice'}
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.-]+) \(.*\{$')
_INSTRUCTION = re.compile(
  r' +(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([a-z][\w-]*)\((.*?)\)(.*)'
)
_CALLED = re.compile(
  r'\b(?:calls|to_apply|body|(?:true|false)_computation)=%?([\w.-]+)'
  r'|\bbranch_computations=\{(.*?)\}'
)


def count(text: str) -> Counts:
  """Counts the kernels of a compiled program and the bytes that they move.

  A loop counts as often as it runs; of the branches of a condition the one with
  most kernels counts. Each kernel reads its operands and writes its results
  once. Of an operand that it only slices it reads the slices, and it writes an
  update in place as far as the update goes. So bytes are too few for a kernel
  that reads an operand several times, as those of Pallas and cuDNN do, and too
  many where a cache keeps them. A call of a library counts as one kernel. That
  a condition may wait for the host is not counted.

  Args:
    text: the program, as `as_text()` of a compiled function gives it.

  Raises:
    ValueError: for a text that is none of XLA's, or a loop of which XLA does
      not know how often it runs.
  """
  computations: dict[str, list[Instruction]] = {}
  entry = ''
  for line in re.sub(r'/\*.*?\*/', '', text).splitlines():
    if start := _COMPUTATION.match(line):
      name = start[2]
      computations[name] = []
      entry = name if start[1] else entry
    elif found := _INSTRUCTION.match(line):
      operands = re.findall(r'%([\w.-]+)', found[4])
      if found[3] == 'parameter':
        operands = [found[4]]  # its number
      computations[name].append(
        Instruction(found[1], found[2], found[3], operands, found[5])
      )
  if not entry:
    raise ValueError('no entry: not the text of a compiled program')
  return _count(computations, entry)


def _count(computations, name) -> Counts:
  """Counts a computation, and those that it calls."""
  total = Counts()
  shapes = {one.name: one.shape for one in computations[name]}
  for one in computations[name]:
    called = [
      inner
      for single, several in _CALLED.findall(one.attributes)
      for inner in re.findall(r'[\w.-]+', single or several)
    ]
    if one.operation == 'while':
      times = re.search(r'"known_trip_count":\{"n":"(\d+)"', one.attributes)
      if not times:
        raise ValueError(f'{one.name}: runs an unknown number of times')
      more = Counts(*(int(times[1]) * n for n in _count(computations, *called)))
    elif one.operation == 'conditional':
      more = max(_count(computations, branch) for branch in called)
    elif one.operation == 'call':
      more = _count(computations, *called)
    elif one.operation in _FREE:
      continue
    else:
      inner = computations[called[0]] if one.operation == 'fusion' else []
      more = Counts(1, _moved(one, shapes, inner))
    total = Counts(*map(sum, zip(total, more)))
  return total


def _moved(one, shapes, inner) -> int:
  """Returns the bytes that a kernel reads and writes.

  `inner` are the instructions of a fusion.
  """
  shape_of = {i.name: i.shape for i in inner}
  total = _size(one.shape)
  parameters = {
    int(i.operands[0]): i.name for i in inner if i.operation == 'parameter'
  }
  for index, operand in enumerate(one.operands):
    whole = _size(shapes[operand])
    users = [i for i in inner if parameters.get(index) in i.operands]
    if one.operation in _SLICES and index == 0:
      total += _size(one.shape)
    elif users and all(i.operation in _SLICES for i in users):
      total += min(whole, sum(_size(i.shape) for i in users))
    elif users and all(
      i.operation == 'dynamic-update-slice'
      and i.operands[0] == parameters[index]
      for i in users
    ):  # in place: only the slice is written
      parts = sum(_size(shape_of[i.operands[1]]) for i in users)
      total += parts - whole
    else:
      total += whole
  return total


def _size(shape) -> int:
  """Returns the bytes of a shape, as 'f32[2,3]{1,0}', or of a tuple of them."""
  total = 0
  for kind, sizes in re.findall(r'\b([a-z]\w*)\[([\d,]*)\]', shape):
    bits = 8 if kind == 'pred' else int(re.search(r'\d+|$', kind)[0] or 0)
    total += bits * math.prod(int(n) for n in sizes.split(',') if n) // 8
  return total
