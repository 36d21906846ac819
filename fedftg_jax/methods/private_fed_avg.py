"""FedAvg with a private sum: differential privacy and secure aggregation.

DP-FedAvg: McMahan, Ramage, Talwar and Zhang, Learning Differentially Private
Recurrent Language Models, ICLR 2018, arXiv:1710.06963, with a fixed
denominator. Each client takes part with probability q = cohort / N (Poisson
sampling). With d_k the change of its model, clip C and noise multiplier z

  w <- w + (sum_k d_k min(1, C / ||d_k||) + N(0, (z C)^2)) / cohort

whoever arrives, and also if no client does. The model is then (epsilon, delta)
differentially private for the presence of one client, see `privacy.epsilon`.

With `quantile` the clip adapts to the clients' norms (Andrew, Thakkar, McMahan
and Ramaswamy, Differentially Private Learning with Adaptive Clipping, NeurIPS
2021, arXiv:1905.03871). Let b be the share of clients with a norm of at most C,
where Gaussian noise of standard deviation sigma_b = cohort / 20 is added to
their number. Then

  C <- C exp(-.2 (b - quantile)),

and the noise multiplier of the sum is raised to (z^-2 - (2 sigma_b)^-2)^(-1/2),
so that both releases together cost as much privacy as z alone.

Secure aggregation (Bonawitz et al., CCS 2017, doi:10.1145/3133956.3133982) is
simulated: clients send their clipped changes in fixed point, modulo 2^32, plus
a mask for every other client of the round. The masks of a pair cancel, so the
server learns only the sum. Masks towards clients that did not arrive are
subtracted. Key agreement and secret sharing are not simulated: a seed that the
server sends stands for them. Rounding to fixed point moves a change by at most
sqrt(P) 2^-17, with P parameters; the privacy accounting ignores that.

Measurements of the simulation are not protected: the training loss, the plain
average, and evaluations of clients.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedftg_jax import distillation
from fedftg_jax.base import Info, Method, Model, PyTree, Variables
from fedftg_jax.methods import fed_avg as fed_avg_lib

SCALE = 2.0**16  # scale of the fixed-point numbers
BOUND = 4.0  # largest magnitude of one value
# Largest number of clients whose sum stays below 2^31.
MOST = int(2**31 / (BOUND * SCALE)) - 1
_CLIP_RATE = 0.2


class Slot(NamedTuple):
  """The server's slot of the private sum."""

  optimizer: PyTree
  clip: jax.Array  # C
  seed: PyTree  # seed of the masks, [2] uint32; () without secure aggregation


def private_fed_avg(
  model: Model,
  cohort: int,
  *,
  clip: float = 0.0,
  noise: float = 0.0,
  quantile: float = 0.0,
  secure: bool = False,
  server_optimizer: optax.GradientTransformation | None = None,
) -> Method:
  """Builds FedAvg with a clipped and noisy mean, or with secure aggregation.

  Args:
    model: the classifier, without BatchNorm.
    cohort: number of clients in a round, on average; the denominator if there
      is noise. Otherwise the sum is divided by the number of clients that
      arrived.
    clip: C, largest norm of a client's change; 0 for no bound.
    noise: z, the noise multiplier: standard deviation of the noise over C.
    quantile: share of clients whose change C should leave unclipped; 0 for a
      fixed C. The argument `clip` is its initial value.
    secure: whether the server sees only the sum.
    server_optimizer: see `fed_avg.aggregate`.

  Returns:
    The method; it aggregates. If there is a bound, Info has 'dp/clip' and
    'dp/clipped', the share of the arrived clients that were clipped.

  Raises:
    ValueError: for a value out of range, noise or a quantile without a bound,
      or a model with BatchNorm; in the first round, for secure aggregation of
      more than `MOST` clients.
  """
  distillation.check_least(
    cohort=(cohort, 1), clip=(clip, 0), noise=(noise, 0), quantile=(quantile, 0)
  )
  if quantile >= 1:
    raise ValueError(f'quantile must be below 1, got {quantile}.')
  if (noise or quantile) and not clip:
    raise ValueError('noise and quantile need a clip above 0.')
  counting = cohort / 20 if quantile and noise else 0.0  # sigma_b
  if quantile and noise and noise >= 2 * counting:
    raise ValueError(
      f'with a quantile, noise must be below cohort / 10 = {2 * counting:g}, '
      f'got {noise}.'
    )
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0)))
  if jax.tree.leaves(shapes.stats):
    raise ValueError(
      'BatchNorm statistics would be sent without protection: use a model '
      'with norm none, group or instance.'
    )
  mean = fed_avg_lib.fed_avg(server_optimizer)
  raised = (noise**-2 - (2 * counting) ** -2) ** -0.5 if counting else noise

  def init(key, variables):
    slot, _ = mean.init(key, variables)
    seed = jax.random.bits(key, (2,), jnp.uint32) if secure else ()
    return Slot(slot, jnp.asarray(float(clip)), seed), ()

  def clipped(delta, bound):
    """Returns the clipped change, and whether clipping left it unchanged."""
    if not clip:
      return delta, jnp.ones(())
    norm = optax.tree.norm(delta)
    return (
      optax.tree.scale(jnp.minimum(1, bound / jnp.maximum(norm, 1e-30)), delta),
      (norm <= bound).astype(float),
    )

  def upload(view, local, objective, key):
    del objective, key
    bound, seed = view.shared
    if not secure:
      return view.own, bound
    delta = optax.tree.sub(local.variables.params, view.variables.params)
    codes = encode(clipped(delta, bound))
    mask = masks(codes, seed, view.round, view.client_id, view.peers)
    return view.own, jax.tree.map(jnp.add, codes, mask)

  def summed(sent):
    if secure:
      return sent.message
    delta, kept = clipped(sent.delta.params, sent.message)
    return delta, jnp.where(sent.weight > 0, kept, 0)

  def update(variables, shared, received, key):
    total, num_kept = received.summed
    if secure:
      if len(received.arrived) > MOST:
        raise ValueError(
          f'secure aggregation can add up at most {MOST} clients, got a round '
          f'of {len(received.arrived)}.'
        )
      missing = unmasked(received, shared.seed)
      total, num_kept = decode(
        jax.tree.map(jnp.subtract, received.summed, missing)
      )
    arrived = jnp.sum(received.arrived)
    key_sum, key_count = jax.random.split(key)
    if noise:
      deviation = raised * shared.clip
      drawn = optax.tree.random_like(key_sum, total, sampler=jax.random.normal)
      total = jax.tree.map(lambda a, n: a + deviation * n, total, drawn)
    denominator = cohort if noise else jnp.maximum(arrived, 1)
    params = jax.tree.map(
      lambda w, d: w + d / denominator, received.broadcast.params, total
    )
    variables, slot, _ = mean.update(
      variables,
      shared.optimizer,
      received._replace(average=Variables(params, variables.stats)),
      key,
    )
    bound = shared.clip
    if quantile:
      count = num_kept + counting * jax.random.normal(key_count)
      share = count / (cohort if noise else jnp.maximum(arrived, 1))
      bound *= jnp.exp(-_CLIP_RATE * (share - quantile))
    metrics = {}
    if clip:
      kept = jnp.where(arrived, num_kept / jnp.maximum(arrived, 1), jnp.nan)
      metrics = {'dp/clip': shared.clip, 'dp/clipped': 1 - kept}
    return variables, Slot(slot, bound, shared.seed), Info(metrics)

  bits = 1 if quantile else 0
  return Method(
    init=init,
    broadcast=lambda shared: (shared.clip, shared.seed),
    upload=upload,
    message_bits=lambda message: (
      32 * sum(a.size for a in jax.tree.leaves(message)) if secure else bits
    ),
    summed=summed,
    update=update,
    aggregates=True,
    sends_model=not secure,
    always=bool(noise),
  )


def encode(tree: PyTree) -> PyTree:
  """Converts values to fixed point, uint32 modulo 2^32, clipped at `BOUND`."""

  def one(a):
    whole = jnp.round(jnp.clip(a, -BOUND, BOUND) * SCALE)
    return jax.lax.bitcast_convert_type(whole.astype(jnp.int32), jnp.uint32)

  return jax.tree.map(one, tree)


def decode(tree: PyTree) -> PyTree:
  """Converts a sum of results of `encode` back to values."""
  return jax.tree.map(
    lambda a: jax.lax.bitcast_convert_type(a, jnp.int32) / SCALE, tree
  )


def masks(
  tree: PyTree,
  seed: jax.Array,
  round_: jax.Array,
  client_id: jax.Array,
  peers: jax.Array,
  towards: jax.Array | bool = True,
) -> PyTree:
  """Adds up the masks of one client, in the structure of `tree`.

  The mask of a pair is added by the client with the lower id and subtracted by
  the other.

  Args:
    tree: uint32 arrays.
    seed: [2] uint32.
    round_: the round of the masks.
    client_id: the client whose masks are added up.
    peers: [S] ids of the round's clients, -1 marks a padding slot.
    towards: [S] whether the mask towards that peer counts.

  Returns:
    The sum of the masks.
  """
  base = jax.random.fold_in(jax.random.wrap_key_data(seed), round_)
  towards = jnp.broadcast_to(towards, peers.shape)

  def add(total, peer):
    other, counts = peer

    def mask():
      pair = jnp.minimum(client_id, other), jnp.maximum(client_id, other)
      key = jax.random.fold_in(jax.random.fold_in(base, pair[0]), pair[1])
      drawn = optax.tree.random_like(key, tree, sampler=jax.random.bits)
      return jax.tree.map(lambda m: jnp.where(client_id < other, m, -m), drawn)

    counts &= (other != client_id) & (other >= 0)
    zero = lambda: jax.tree.map(jnp.zeros_like, tree)
    return jax.tree.map(jnp.add, total, jax.lax.cond(counts, mask, zero)), ()

  zero = jax.tree.map(jnp.zeros_like, tree)
  return jax.lax.scan(add, zero, (peers, towards))[0]


def unmasked(received, seed: jax.Array) -> PyTree:
  """Computes the masks that remain in the sum.

  These are the masks towards clients that did not arrive.
  """
  zero = jax.tree.map(jnp.zeros_like, received.summed)

  def add(total, client):
    client_id, arrived = client
    rest = jax.lax.cond(
      arrived & ~jnp.all(received.arrived),
      lambda: masks(
        zero,
        seed,
        received.round,
        client_id,
        received.client_id,
        ~received.arrived,
      ),
      lambda: zero,
    )
    return jax.tree.map(jnp.add, total, rest), ()

  return jax.lax.scan(add, zero, (received.client_id, received.arrived))[0]
