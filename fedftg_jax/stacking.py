"""Maps one client's function over a cohort: stacked, in chunks, over devices.

The engine is written for one client; the client axis appears here and only
here. Clients are stacked with `vmap`, at most `chunk` at a time, and divided
among a 1-D mesh of devices with `shard_map`. Sums over clients are accumulated
as chunks finish, first on each device and then once between devices. Per client
only what was asked for is kept.
"""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fedftg_jax.base import PyTree

AXIS = 'clients'


def default_chunk() -> int:
  """Returns the default number of clients to stack at once on this device.

  It is 1 on a CPU, whose caches hold the weights and images of one client but
  not those of a cohort, and 0 (all) elsewhere.
  """
  return 1 if jax.default_backend() == 'cpu' else 0


def memory_limit() -> int | None:
  """Returns how many bytes of the first device JAX may use.

  It is None if the device does not say.
  """
  return (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit')


def chunk_that_fits(free: float, each: float, rows: int) -> int:
  """Returns how many clients to stack at once so that they fit the memory.

  The chunks of a cohort are about equal: of 10 clients of which 8 would fit, 5
  are stacked.

  Args:
    free: bytes that there are.
    each: bytes that a client needs while it is trained.
    rows: number of clients of a round on a device.

  Returns:
    1 to `rows`.
  """
  most = max(1, min(rows, int(free // max(each, 1))))
  return -(-rows // -(-rows // most))


def make_mesh(num_devices: int = 0) -> Mesh:
  """Makes a mesh over the first `num_devices` devices of all processes.

  Args:
    num_devices: 0 for all devices.

  Returns:
    The mesh, with one axis.

  Raises:
    ValueError: if there are fewer devices.
  """
  devices = jax.devices()
  if not 0 <= num_devices <= len(devices):
    raise ValueError(
      f'num_devices must be 0 (all) to {len(devices)}, the devices that there '
      f'are, got {num_devices}.'
    )
  return jax.make_mesh(
    (num_devices or len(devices),),
    (AXIS,),
    axis_types=(AxisType.Auto,),
    devices=devices[: num_devices or None],
  )


def put(tree: PyTree, mesh: Mesh | None) -> PyTree:
  """Puts `tree` on the device, or replicates it on every device of `mesh`.

  If the mesh spans several processes, all of them must call this with equal
  values.
  """
  if mesh is None:
    return jax.device_put(tree)
  whole = NamedSharding(mesh, PartitionSpec())

  def put_one(a):
    if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key) or a.sharding == whole:
      return jax.device_put(a, whole)
    return jax.random.wrap_key_data(  # keys cannot move between processes
      jax.device_put(jax.random.key_data(a), whole), impl=jax.random.key_impl(a)
    )

  return jax.tree.map(put_one, tree)


def everywhere(tree: PyTree, mesh: Mesh | None) -> PyTree:
  """Replicates `tree` as `put` does, within a compiled function."""
  if mesh is None:
    return tree
  return jax.lax.with_sharding_constraint(
    tree, NamedSharding(mesh, PartitionSpec())
  )


def shard(tree: PyTree, mesh: Mesh | None) -> PyTree:
  """Shards the leading axis over the devices, within a compiled function.

  The number of rows need not be a multiple of the number of devices.
  """
  if mesh is None:
    return tree
  return jax.lax.with_sharding_constraint(
    tree, NamedSharding(mesh, PartitionSpec(AXIS))
  )


def num_rows(cohort: int, chunk: int, mesh: Mesh | None = None) -> int:
  """Returns the number of rows that `over_clients` needs for a cohort.

  Every device gets the same number of rows, and chunks divide them evenly.
  """
  devices = 1 if mesh is None else mesh.size
  each = -(-cohort // devices)
  if chunk:
    each += -each % min(chunk, each)
  return devices * each


def over_clients(
  function: Callable,
  shared: PyTree,
  rows: PyTree,
  chunk: int,
  mesh: Mesh | None = None,
) -> tuple[PyTree, PyTree]:
  """Maps a function of one client over the rows of a cohort.

  Args:
    function: (shared, row) -> (summed, stacked).
    shared: what all clients see; it is not copied along the client axis.
    rows: every leaf [R, ...], with R from `num_rows`.
    chunk: number of rows that are stacked at once; 0 for all rows of a device.
    mesh: devices that share the rows; None for one device.

  Returns:
    The sum of `summed` over the rows, and `stacked` with every leaf [R, ...].
  """
  local = functools.partial(_on_one_device, jax.jit(function), chunk)
  if mesh is None:
    return local(shared, rows)

  def on_each(shared, rows):
    summed, stacked = local(shared, rows)
    return jax.lax.psum(summed, AXIS), stacked

  whole, split = PartitionSpec(), PartitionSpec(AXIS)
  return jax.shard_map(
    on_each,
    mesh=mesh,
    in_specs=(whole, split),
    out_specs=(whole, split),
    check_vma=False,
  )(shared, rows)


def _on_one_device(function, chunk, shared, rows):
  num = len(jax.tree.leaves(rows)[0])
  chunk = min(chunk or num, num)

  def of_block(block):
    if chunk == 1:  # without a client axis
      summed, stacked = function(shared, jax.tree.map(lambda a: a[0], block))
      return summed, jax.tree.map(lambda a: a[None], stacked)
    summed, stacked = jax.vmap(functools.partial(function, shared))(block)
    return jax.tree.map(lambda a: jnp.sum(a, axis=0), summed), stacked

  if chunk == num:
    return of_block(rows)
  blocks = jax.tree.map(lambda a: a.reshape(-1, chunk, *a.shape[1:]), rows)
  # `function` is jitted, so the scan reuses this trace.
  zero = jax.tree.map(
    lambda a: jnp.zeros(a.shape, a.dtype),
    jax.eval_shape(of_block, jax.tree.map(lambda a: a[0], blocks))[0],
  )

  def step(total, block):
    summed, stacked = of_block(block)
    return jax.tree.map(jnp.add, total, summed), stacked

  summed, stacked = jax.lax.scan(step, zero, blocks)
  return summed, jax.tree.map(lambda a: a.reshape(num, *a.shape[2:]), stacked)
