"""Lattices for quantisation: nearest points, and dither on their cells.

Conway and Sloane, Fast Quantizing and Decoding Algorithms for Lattice
Quantizers and Codes, IEEE Transactions on Information Theory 28(2), 1982. Z and
A2 (hexagonal) are in UVeQFed's paper, D4 and E8 are not.

A lattice has n dimensions. Its points are written as integer codes along
orthogonal axes, point = code * unit. Not every tuple of integers is a point:
code j is known modulo `modulus[j]` from the codes before it, see `residues`. A
coder that uses this loses next to nothing against a joint table of all n codes.
"""

from collections.abc import Callable
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedftg_jax import base


class Lattice(NamedTuple):
  """A lattice, at its canonical scale."""

  nearest: Callable[[jax.Array], jax.Array]  # [..., n] -> codes [..., n] int32
  unit: tuple[float, ...]  # [n], a point is codes * unit
  basis: tuple[tuple[float, ...], ...]  # n vectors
  second_moment: float  # G, of the cell, per dimension and normalised
  modulus: tuple[int, ...]  # [n], 1 where nothing is known
  check: tuple[tuple[int, ...], ...]  # [n, n], below the diagonal
  table: tuple[int, ...]  # [n], axes with equal numbers share a distribution

  @property
  def dim(self) -> int:
    """The number of dimensions n."""
    return len(self.unit)

  @property
  def volume(self) -> float:
    """The volume of a cell."""
    return float(abs(np.linalg.det(np.array(self.basis))))

  @property
  def variance(self) -> float:
    """The variance per dimension of a uniform point on a cell: G V^(2 / n)."""
    return self.second_moment * self.volume ** (2 / self.dim)

  def points(self, codes: jax.Array) -> jax.Array:
    """Converts codes [..., n] to points."""
    return codes * jnp.array(self.unit)

  def residue(self, codes: base.Array, j: int) -> jax.Array:
    """Computes what the codes before code j of [..., n] tell about it.

    Code j is congruent to sum_i check[j, i] code_i modulo `modulus[j]`.
    """
    known = jnp.zeros(codes.shape[:-1], codes.dtype)
    for i, factor in enumerate(self.check[j]):
      if factor:
        known += factor * codes[..., i]
    return jnp.remainder(known, self.modulus[j])

  def residues(self, codes: base.Array) -> jax.Array:
    """Computes `residue` for all codes, [..., n]."""
    each = [self.residue(codes, j) for j in range(self.dim)]
    return jnp.stack(each, axis=-1)

  def dither(self, key: jax.Array, num: int) -> jax.Array:
    """Draws [num, n] uniformly on the cell around 0.

    A point p drawn from the parallelepiped of the basis, minus the nearest
    lattice point, is uniform on the cell, because p runs through every coset of
    the lattice once.
    """
    uniform = jax.random.uniform(key, (num, self.dim), jnp.result_type(float))
    inside = uniform @ jnp.array(self.basis)
    return inside - self.points(self.nearest(inside))


def _round(x):
  return jnp.round(x).astype(jnp.int32)


def _nearest_hexagonal(x):
  """Finds the nearest point of A2, the union of two rectangular lattices."""
  # Works on one axis at a time: an array axis of length 2 is slow.
  scaled = 2 * x[..., 0], 2 / math.sqrt(3) * x[..., 1]
  even = [2 * _round(a / 2) for a in scaled]
  odd = [2 * _round((a - 1) / 2) + 1 for a in scaled]
  far, near = (
    jnp.square(scaled[0] - a) + 3 * jnp.square(scaled[1] - b)
    for a, b in (even, odd)
  )
  return jnp.stack(
    [jnp.where(far <= near, *pair) for pair in zip(even, odd)], axis=-1
  )


def _nearest_even_sum(x):
  """Finds the nearest point of D_n, the integers with an even sum.

  If rounding gives an odd sum, the coordinate with the largest error is rounded
  the other way.
  """
  rounded = jnp.round(x)
  error = x - rounded
  worst = jnp.argmax(jnp.abs(error), axis=-1, keepdims=True)
  odd = jnp.sum(rounded, axis=-1, keepdims=True) % 2 == 1
  other = rounded + jnp.where(error < 0, -1, 1)
  turned = odd & (jnp.arange(x.shape[-1]) == worst)
  return jnp.where(turned, other, rounded).astype(jnp.int32)


def _nearest_e8(x):
  """Finds the nearest point of E8, the union of D8 and D8 + 1/2."""
  whole = 2 * _nearest_even_sum(x)
  half = 2 * _nearest_even_sum(x - 0.5) + 1
  far, near = (
    jnp.sum(jnp.square(2 * x - codes), axis=-1, keepdims=True)
    for codes in (whole, half)
  )
  return jnp.where(far <= near, whole, half)


def _last_row(*last):
  """Makes a check matrix in which all rows but the last are 0."""
  n = len(last)
  return (*(((0,) * n,) * (n - 1)), last)


_HALF = (0.5,) * 8
LATTICES = {
  'z': Lattice(_round, (1.0,), ((1.0,),), 1 / 12, (1,), ((0,),), (0,)),
  # Codes (a, b) with a + b even stand for (a / 2, b sqrt(3) / 2).
  'a2': Lattice(
    _nearest_hexagonal,
    (0.5, math.sqrt(3) / 2),
    ((1.0, 0.0), (0.5, math.sqrt(3) / 2)),
    5 / (36 * math.sqrt(3)),
    (1, 2),
    _last_row(1, 0),
    (0, 1),
  ),
  'd4': Lattice(
    _nearest_even_sum,
    (1.0,) * 4,
    (
      (-1.0, -1.0, 0.0, 0.0),
      (1.0, -1.0, 0.0, 0.0),
      (0.0, 1.0, -1.0, 0.0),
      (0.0, 0.0, 1.0, -1.0),
    ),
    13 / (120 * math.sqrt(2)),
    (1, 1, 1, 2),
    _last_row(1, 1, 1, 0),
    (0,) * 4,
  ),
  # The codes of a point are all even or all odd, and their sum is divisible by
  # 4; each stands for half of itself.
  'e8': Lattice(
    _nearest_e8,
    _HALF,
    (
      (2.0, *(0.0,) * 7),
      *((*(0.0,) * i, -1.0, 1.0, *(0.0,) * (6 - i)) for i in range(6)),
      _HALF,
    ),
    929 / 12960,
    (1, *(2,) * 6, 4),
    ((0,) * 8, *((1, *(0,) * 7),) * 6, (*(-1,) * 7, 0)),
    (0,) * 8,
  ),
}
