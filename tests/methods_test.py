"""The contract that every method and combination keeps, one row each.

A new method is tested by adding a row to `ROWS`. Everything that a row checks
runs through one compiled program, except the plain loop it is compared with.
"""

import functools
import types
from typing import NamedTuple

from absl.testing import absltest, parameterized
import chex
import jax
from jax import enable_x64
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedftg_jax import (
  base,
  distillation,
  evaluation,
  federation,
  keys,
  losses,
  recipes,
  solvers,
  trees,
)
from fedftg_jax.methods import (
  batch_norm,
  fed_align,
  fed_avg,
  fed_df,
  fed_dm,
  fed_dyn,
  fed_gen,
  fed_mr,
  fed_nova,
  fed_zda,
  moon,
  q_fed_avg,
  running_average,
  scaffold,
)
from fedftg_jax.models import classifiers
from fedftg_jax.results import flow, glossary
from tests import problems

KEY = jax.random.key(5)
EVERY = 4  # rounds in the compiled chunk; shorter ones are padded to it
GENERATOR = problems.GENERATOR
# Adam amplifies rounding errors, and rows are compared with a loop that adds up
# in another order. A small rate keeps the difference small.
FTG = dict(iterations=1, student_steps=2, batch_size=6, generator_lr=1e-4)
DF = dict(
  generator_steps=2,
  student_steps=2,
  batch_size=6,
  student_lr=1.0,
  generator_lr=1e-4,
)
ME = dict(lam=5.0, lr_p=0.1, prox_steps=2)
LWOF = dict(models='softmax,resnet20')
PUBLIC = problems.make_data((9,), seed=4).x
# A model whose features depend on its parameters, as MOON's contrast needs.
MODEL = problems.from_flax(classifiers.MLP(problems.NUM_CLASSES, (6,)))
# Architectures by the names that options use.
ARCHITECTURES = {'softmax': problems.LINEAR, 'resnet20': problems.NORMED}
WORDS = 64 * 6 + 6 + 6 * 3 + 3  # size of this model
NET_WORDS = 64 * 6 + 6 + 2 * 6 + 6 * 3 + 3  # linear, BatchNorm, linear
CLASSES = problems.NUM_CLASSES


GEN = dict(
  alpha=0.5, beta=0.7, steps=3, batch_size=6, hidden=5, noise_dim=2, lr=0.01
)
# Linear, BatchNorm with statistics, linear: of noise and label to features.
GEN_WORDS = (2 + CLASSES) * 5 + 5 + 4 * 5 + 5 * 6 + 6


ZDAC = dict(per_class=2, steps=3, lr=0.01, syn_batch_size=4)
ZDAS = dict(
  images=4, steps=3, lr=0.01, tune_steps=2, tune_batch_size=5, tune_lr=0.1
)


DM = dict(
  ipc=2, iterations=3, real_batch=4, server_epochs=2, server_batch_size=5
)


class Row(NamedTuple):
  """One combination, and what it sends besides the model, in 32-bit words."""

  method: str
  down: int = 0
  up: float = 0
  options: dict = {}
  server: optax.GradientTransformation | None = None
  policy: str = 'aggregate'  # for others, the model has BatchNorm
  model: base.Model | None = None
  sends_model: bool = True


PLAIN = {
  'fed_avg': Row('fed_avg'),
  'fed_adam': Row('fed_avg', server=optax.adam(0.01, eps=1e-3)),
  'fed_yogi': Row('fed_avg', server=optax.yogi(0.01)),
  'fed_adagrad': Row('fed_avg', server=optax.adagrad(0.1)),
  'fed_avg_m': Row('fed_avg', server=optax.sgd(1.0, momentum=0.9)),
  'fed_nova': Row('fed_nova', up=1),
  'q_fed_avg': Row('q_fed_avg', up=2),
  'fed_prox': Row('fed_prox', options={'fed_prox': dict(mu=0.5)}),
  'fed_prox_to_zero': Row(
    'fed_prox', options={'fed_prox': dict(mu=0.5, to_zero=True)}
  ),
  'fed_dyn': Row('fed_dyn', options={'fed_dyn': dict(alpha=0.1)}),
  'scaffold': Row('scaffold', WORDS, WORDS),
  'scaffold_option_1': Row(
    'scaffold', WORDS, WORDS, {'scaffold': dict(option=1, batch_size=4)}
  ),
  'scaffold_paper': Row(
    'scaffold', WORDS, WORDS, {'scaffold': dict(paper=True)}
  ),
  'scaffold_untuned': Row(
    'scaffold', 2 * WORDS, WORDS, {'scaffold': dict(ref_untuned=True, lr0=True)}
  ),
  'moon': Row('moon', options={'moon': dict(mu=1.0, tau=0.5)}),
}
WITH_FTG = {
  name + '+fed_ftg': row._replace(
    method=row.method + '+fed_ftg', up=row.up + CLASSES
  )
  for name, row in PLAIN.items()
  if name not in ('fed_yogi', 'fed_adagrad', 'fed_prox_to_zero')
}
ROWS = {
  **PLAIN,
  'fed_df': Row('fed_df', up=CLASSES),
  'fed_df_public': Row(
    'fed_df_public', options={'fed_df_public': {**DF, 'ensemble': 'logit'}}
  ),
  'scaffold+fed_df': Row('scaffold+fed_df', WORDS, WORDS + CLASSES),
  'fed_dyn+fed_nova+fed_prox': Row('fed_dyn+fed_nova+fed_prox', up=1),
  **WITH_FTG,
  'fed_ftg_robust': Row(
    'fed_ftg', up=CLASSES, options={'fed_ftg': {**FTG, 'preset': 'robust'}}
  ),
  'local': Row('fed_avg', policy='local'),
  'reset': Row('fed_avg', policy='reset'),
  'fed_ntd': Row('fed_ntd', options={'fed_ntd': dict(tau=2.0)}),
  'fed_lsd': Row('fed_lsd', options={'fed_lsd': dict(beta=0.3, mix='convex')}),
  'fed_align': Row('fed_align', model=problems.STAGED),
  'fed_align+fed_ftg': Row(
    'fed_align+fed_ftg', up=CLASSES, model=problems.STAGED
  ),
  'fed_zdac': Row(
    'fed_zdac', model=problems.NORMED, options={'fed_zdac': ZDAC}
  ),
  'fed_zdac_own_pools': Row(
    'fed_zdac+scaffold',
    NET_WORDS,
    NET_WORDS,
    model=problems.NORMED,
    options={
      'fed_zdac': dict(ZDAC, shared_pool=False, target='max', bn_term='kl')
    },
  ),
  'fed_zdas': Row(
    'fed_zdas', up=CLASSES, model=problems.NORMED, options={'fed_zdas': ZDAS}
  ),
  'fed_zdac+fed_zdas+fed_ftg': Row(
    'fed_zdac+fed_zdas+fed_ftg',
    up=2 * CLASSES,
    model=problems.NORMED,
    options={'fed_zdac': ZDAC, 'fed_zdas': dict(ZDAS, source='clients')},
  ),
  # Client 0 has all three classes: two images of 64 pixels of each, and as many
  # bits as there are classes.
  'fed_dm': Row(
    'fed_dm', up=3 * 2 * 64 + 3 / 32, options={'fed_dm': DM}, sends_model=False
  ),
  'fed_gen': Row('fed_gen', GEN_WORDS, CLASSES, {'fed_gen': GEN}),
  'fed_gen+fed_ftg': Row(
    'fed_gen+fed_ftg', GEN_WORDS, 2 * CLASSES, {'fed_gen': GEN}
  ),
  'fed_mr': Row('fed_mr'),
  'running_average': Row('running_average', server=optax.sgd(0.5)),
  'fed_mr_by_modules': Row(
    'fed_mr+fed_ntd+scaffold',
    WORDS,
    WORDS,
    options={'fed_mr': dict(first_rounds=1, unit='module', segment=0.5)},
  ),
  'fed_mr+fed_ftg': Row('fed_mr+fed_ftg', up=CLASSES),
  'fed_ntd+fed_ftg': Row('fed_ntd+fed_ftg', up=CLASSES),
  'fed_lsd+fed_ftg': Row('fed_lsd+fed_ftg', up=CLASSES),
  'p_fed_me': Row('p_fed_me', options={'p_fed_me': ME}),
  'p_fed_bred_lg': Row('p_fed_bred', options={'p_fed_bred': ME}),
  'p_fed_bred_meg': Row(
    'p_fed_bred+fed_prox',
    options={'p_fed_bred': {**ME, 'kind': 'meg', 'family': 'diagonal'}},
    server=optax.sgd(2.0),
  ),
  'p_fed_bred_mh': Row(
    'p_fed_bred', options={'p_fed_bred': {**ME, 'kind': 'mh'}}, policy='local'
  ),
  'p_fed_bred+fed_ftg': Row(
    'p_fed_bred+fed_ftg', up=CLASSES, options={'p_fed_bred': ME}
  ),
  'ditto': Row('ditto'),
  'kd_lwof': Row('kd_lwof'),
  'kd_lwof+fed_ftg': Row(
    'kd_lwof+fed_ftg',
    up=CLASSES,
    options={'kd_lwof': {**LWOF, 'phases': 'b_a', 'terms': 'kd_only'}},
  ),
  'local+fed_ftg': Row('fed_ftg', up=CLASSES, policy='local'),
  'reset+scaffold': Row('scaffold', NET_WORDS, NET_WORDS, policy='reset'),
}

# Their parts are in other rows; they are checked together in `make test-all`.
SLOW = (
  'p_fed_bred_lg',
  'kd_lwof+fed_ftg',
  'p_fed_bred_meg',
  'p_fed_bred+fed_ftg',
  'fed_lsd',
  'fed_mr_by_modules',
  'fed_mr+fed_ftg',
  'fed_ntd+fed_ftg',
  'fed_lsd+fed_ftg',
  'fed_align+fed_ftg',
  'fed_zdac_own_pools',
  'fed_zdac+fed_zdas+fed_ftg',
  'fed_gen+fed_ftg',
  'fed_adam+fed_ftg',
  'fed_dyn+fed_ftg',
  'moon+fed_ftg',
  'fed_adam',
  'scaffold_option_1',
  'fed_prox_to_zero',
  'fed_avg_m+fed_ftg',
  'fed_nova+fed_ftg',
  'q_fed_avg+fed_ftg',
  'fed_prox+fed_ftg',
  'scaffold_option_1+fed_ftg',
  'scaffold_untuned+fed_ftg',
  'scaffold+fed_df',
  'fed_yogi',
  'fed_adagrad',
  'reset+scaffold',
  'local+fed_ftg',
  'scaffold_untuned',
  'scaffold+fed_ftg',
  'fed_avg_m',
  'fed_df_public',
  'reset',
)


def build(row, model=None, generator=GENERATOR):
  """Builds the model, the method and the federation of a row."""
  if model is None:
    plain = MODEL if row.policy == 'aggregate' else problems.NORMED
    model = row.model or plain
  options = {
    'fed_ftg': FTG,
    'fed_df': DF,
    'fed_df_public': DF,
    'q_fed_avg': dict(batch_size=4),
    'kd_lwof': LWOF,
    **row.options,
  }
  method = recipes.build(
    row.method,
    recipes.Settings(
      model,
      CLASSES,
      row.server,
      generator,
      options,
      len(Contract.IDS[0]),
      build_model=ARCHITECTURES.__getitem__,
      image_shape=problems.IMAGE_SHAPE,
    ),
    *batch_norm.policy_parts(row.policy, model, 4),
  )
  fed = problems.make(model, method, weighting=recipes.weighting(row.method))
  return model, method, fed


def plain_batches(data, rows, key, epochs):
  """Yields a client's batches, without padding."""
  batches = []
  for epoch in range(epochs):
    key_epoch = jax.random.fold_in(key, epoch)
    draws = jax.random.uniform(key_epoch, data.index.shape[1:], jnp.float32)
    order = np.argsort(np.asarray(draws)[: len(rows)])
    for first in range(0, len(rows), problems.BATCH):
      some = rows[order[first : first + problems.BATCH]]
      batches.append(
        base.Batch(data.x[some], data.y[some], jnp.ones(len(some), bool))
      )
  return batches


def sequential_round(model, method, weighting, state, data, cohort, key):
  """Runs a round as Python loops over clients and steps, without padding."""
  shared = method.broadcast(state.shared)
  common = method.common(
    state.variables, shared, state.round, keys.common_key(key, state.round)
  )
  num_clients, total = len(data.count), int(data.count.sum())
  places = np.flatnonzero(cohort.arrived)
  ids = [int(cohort.client_id[place]) for place in places]
  mass = np.array(
    [int(data.count[k]) if weighting == 'examples' else 1 for k in ids]
  )
  uploads, clients = [], state.clients[0]

  def loss(variables, batch, key, view):
    output = model.apply(variables, batch.x, mask=batch.mask, train=True)
    ce = losses.cross_entropy(output.logits, batch.y, batch.mask)
    penalty = method.penalty(variables, output, batch, view, key)
    return ce + penalty, base.LossAux(output.stats, ce, output.logits)

  @jax.jit  # data are no part of a penalty; the view comes without them
  def gradient(variables, batch, key, view):
    return jax.grad(
      lambda p: loss(variables._replace(params=p), batch, key, view),
      has_aux=True,
    )(variables.params)

  def descend(direction, variables, memory, batches, rate, key):
    grads, aux = direction(variables, *batches, key)
    params = jax.tree.map(lambda p, g: p - rate * g, variables.params, grads)
    return base.Variables(params, aux.stats), memory, aux.cross_entropy

  for slot, (place, k) in enumerate(zip(places, ids)):
    count = int(data.count[k])
    rows = data.index[k][:count]
    client_keys = keys.client_keys(key, state.round, k)
    own = jax.tree.map(lambda a, k=k: a[k], state.clients[0])
    sent = method.send(state.variables, state.shared, place, client_keys.send)
    view = base.View(
      sent,
      sent,
      shared,
      common,
      own,
      data._replace(index=rows, count=jnp.int32(count)),
      jnp.int32(k),
      jnp.asarray(num_clients * count / total),
      state.round,
      jnp.int32(base.NO_LIMIT),
    )
    start = method.start(view, client_keys.start)
    view = view._replace(variables=start)
    objective = base.Objective(
      functools.partial(loss, view=view), method.decay(view)
    )

    key_order, key_loss = jax.random.split(client_keys.solve)
    batches = plain_batches(data, rows, key_order, epochs=4)

    def train(asked, view, batches=batches, key_loss=key_loss):
      rule = asked.rule or base.Rule((), descend)

      @jax.jit
      def gradient_of_another(variables, batch, key):
        return jax.grad(
          lambda p: asked.loss(variables._replace(params=p), batch, key),
          has_aux=True,
        )(variables.params)

      def direction(variables, batch, key):
        if asked.loss is objective.loss:
          seen_by = view._replace(data=None)
          grads, aux = gradient(variables, batch, key, seen_by)
        else:
          grads, aux = gradient_of_another(variables, batch, key)
        scale = jnp.minimum(1.0, 10.0 / optax.tree.norm(grads))
        decay = 1e-3 + asked.decay
        grads = jax.tree.map(
          lambda p, g: scale * g + decay * p, variables.params, grads
        )
        return grads, aux

      local, memory = view.variables, rule.memory
      rate = jnp.asarray(0.1 * 0.9 ** int(state.round))
      num, steps = rule.num_batches, len(batches) // 2
      for i in range(steps):
        some = tuple(batches[num * i : num * (i + 1)])
        local, memory, _ = rule.step(
          direction, local, memory, some, rate, jax.random.fold_in(key_loss, i)
        )
      return base.Local(local, jnp.int32(steps), rate, {}, memory=memory)

    local, own = method.train(train, objective, view, client_keys.train)
    own, message = method.upload(
      view._replace(own=own), local, objective, client_keys.upload
    )
    clients = jax.tree.map(lambda a, b, k=k: a.at[k].set(b), clients, own)
    uploads.append(
      base.Sent(
        start,
        optax.tree.sub(local.variables, start),
        message,
        jnp.asarray(mass[slot] / mass.sum()),
        view.share,
      )
    )
  add = lambda trees_: jax.tree.map(lambda *a: sum(a), *trees_)
  received = base.Received(
    state.variables,
    add([optax.tree.scale(s.weight, s.model) for s in uploads]),
    add([method.summed(s) for s in uploads]),
    jax.tree.map(  # nothing of who did not arrive
      lambda *a: (
        jnp.zeros((len(cohort.arrived), *a[0].shape), a[0].dtype)
        .at[places]
        .set(jnp.stack(a))
      ),
      *[method.stacked(s) for s in uploads],
    ),
    jnp.asarray(cohort.arrived),
    state.round,
    num_clients,
    data.public,
    common=common,
  )
  variables, shared, _ = jax.jit(method.update)(
    state.variables, state.shared, received, keys.server_key(key, state.round)
  )
  return variables, shared, clients


class Contract(parameterized.TestCase):
  """The checks of one row."""

  IDS = [[0, 1, 4, -1], [1, 2, 3, 4], [0, 2, -1, -1]]

  def check(self, row):
    model, method, fed = build(row)
    data = problems.make_data()._replace(public=PUBLIC)
    rows = problems.schedule(self.IDS)
    scan = federation._scan_rounds.on(jax.default_backend())
    programs = scan._cache_size()

    def run(state, rows):
      state = jax.tree.map(jnp.copy, state)  # since it is donated
      return federation.run(fed, state, data, rows, KEY, every=EVERY)[0]

    def part(first, last):
      return jax.tree.map(lambda a: a[first:last], rows)

    start = fed.init(KEY)
    whole = run(start, rows)
    with self.subTest('scan, loop and resume agree bitwise'):
      state, states = start, []
      for t in range(3):
        state = run(state, part(t, t + 1))
        states.append(state)
      chex.assert_trees_all_equal(state, whole)
    with self.subTest('finite, and of the same shapes'):
      chex.assert_tree_all_finite(whole)
      chex.assert_trees_all_equal_shapes_and_dtypes(whole, start)
    with self.subTest('who does not take part keeps its slot'):
      absent = lambda s: jax.tree.map(
        lambda a: np.asarray(a)[[1, 3, 4]], s.clients
      )
      chex.assert_trees_all_equal(absent(states[2]), absent(states[1]))
    with self.subTest('a round in which nobody arrives changes nothing'):
      nobody = part(1, 2)._replace(arrived=np.zeros((1, 4), bool))
      chex.assert_trees_all_equal(
        run(whole, nobody)._replace(round=whole.round), whole
      )
    with self.subTest('a straggler without a step'):
      lazy = part(1, 2)._replace(num_steps=np.array([[0, 9, 0, 9]], np.int32))
      chex.assert_tree_all_finite(run(whole, lazy))
      chex.assert_tree_all_finite(
        run(whole, lazy._replace(num_steps=np.zeros((1, 4), np.int32)))
      )
    with self.subTest('one trace'):
      self.assertEqual(scan._cache_size(), programs + 1)
    with self.subTest('a plain loop gives the same'):
      cohort = jax.tree.map(lambda a: a[1], rows)
      variables, shared, clients = sequential_round(
        model,
        method,
        recipes.weighting(row.method),
        states[0],
        data,
        cohort,
        KEY,
      )
      chex.assert_trees_all_close(states[1].variables, variables, atol=1e-9)
      chex.assert_trees_all_close(states[1].shared, shared, atol=1e-9)
      chex.assert_trees_all_close(states[1].clients[0], clients, atol=1e-9)


class ContractTest(Contract):
  @parameterized.named_parameters(
    (name, row) for name, row in ROWS.items() if name not in SLOW
  )
  def test_row(self, row):
    with enable_x64(True):
      self.check(row)

  @parameterized.named_parameters((name, row) for name, row in ROWS.items())
  def test_bits_down_and_up(self, row):
    """Bits are those of selected and arrived clients; the last has no
    examples."""
    _, _, fed = build(row)
    state = fed.init(KEY)
    size = trees.num_bits(state.variables)
    data = problems.DATA._replace(
      public=PUBLIC, count=problems.DATA.count.at[4].set(0)
    )
    cohort = jax.tree.map(
      lambda a: a[0], problems.schedule([[0, 1, 4, -1]])
    )._replace(arrived=np.array([True, False, True, False]))
    _, info = fed.round(state, data, cohort, KEY)
    down, up = size + 32 * row.down, row.sends_model * size + 32 * row.up
    self.assertEqual(info.metrics['bits_down'].tolist(), [down] * 3 + [0])
    self.assertEqual(info.metrics['bits_up'].tolist(), [up] + [0] * 3)
    with self.subTest('what is measured is described'):
      of_engine = {'bits_down', 'bits_up', 'num_selected', 'num_arrived'}
      measured = info.metrics.keys() - of_engine
      self.assertEmpty(
        measured - glossary.METRICS.keys(), 'not in results/glossary.py'
      )
    with self.subTest('what is sent is drawn'):
      steps = flow.of_config({'method': row.method})
      # Beside a title, the model, and the change of the model.
      self.assertEqual(len(steps.down) > 2, row.down > 0, steps.down)
      self.assertEqual(len(steps.up) - row.sends_model > 1, row.up > 0)


@pytest.mark.slow
class FurtherContractTest(Contract):
  @parameterized.named_parameters((name, ROWS[name]) for name in SLOW)
  def test_row(self, row):
    with enable_x64(True):
      self.check(row)


def after(name, local_steps=None, model=MODEL, **options):
  """Returns the variables after three rounds of a method with these options."""
  settings = recipes.Settings(
    model,
    CLASSES,
    generator=GENERATOR,
    options={name: options} if options else {},
    build_model=ARCHITECTURES.__getitem__,
    image_shape=problems.IMAGE_SHAPE,
  )
  fed = problems.make(model, recipes.build(name, settings))
  rows = problems.schedule([[0, 1, 4], [2, 3, -1], [0, 2, 3]])
  if local_steps:
    rows = rows._replace(num_steps=np.full((3, 3), local_steps, np.int32))
  data = problems.DATA._replace(public=PUBLIC)
  return federation.run(fed, fed.init(KEY), data, rows, KEY, every=EVERY)[
    0
  ].variables


@functools.cache
def after_fed_avg(local_steps=None, model=MODEL):
  return after('fed_avg', local_steps, model)


class RunningAverageTest(absltest.TestCase):
  def test_weights_of_the_rounds(self):
    """Training is that of FedAvg; a round without clients does not count."""
    method = base.chain(fed_avg.fed_avg(), running_average.running_average(0.5))
    rows = problems.schedule([[0, 1, 4], [2, 3, -1], [-1, -1, -1], [0, 2, 3]])
    models, averages = [], []

    def keep(done, state, info):
      del done
      models.append(jax.device_get(state.variables))
      averages.append(jax.device_get(info.models['running_average']))

    fed = problems.make(MODEL, method)
    args = fed.init(KEY), problems.DATA, rows, KEY
    federation.run(fed, *args, every=1, callback=keep)
    plain, _ = federation.run(
      (fed := problems.make(MODEL)), fed.init(KEY), *args[1:], every=1
    )
    chex.assert_trees_all_equal(models[-1], jax.device_get(plain.variables))
    chex.assert_trees_all_close(averages[0], models[0], rtol=1e-6)
    chex.assert_trees_all_equal(averages[2], averages[1])  # nobody arrived
    first, second, _, last = models
    want = jax.tree.map(
      lambda a, b, c: (a + 2 * b + 4 * c) / 7, first, second, last
    )
    chex.assert_trees_all_close(averages[-1], want, rtol=1e-6, atol=1e-7)

  def test_refuses(self):
    for decay in (-0.1, 1.0):
      with self.assertRaisesRegex(ValueError, f'decay must be.*got {decay}'):
        running_average.running_average(decay)


class NeutralTest(parameterized.TestCase):
  """Options that switch a method off give FedAvg."""

  @parameterized.parameters(
    ('fed_dyn', dict(alpha=0.0)),
    ('q_fed_avg', dict(q=0.0, batch_size=4)),
    ('p_fed_me', dict(lam=16.0, lr_p=1 / 16, prox_steps=1, warm=False)),
  )
  def test_switched_off(self, name, options):
    self.check(name, options)

  @parameterized.parameters(
    ('fed_ntd', dict(beta=0.0)),
    ('fed_lsd', dict(beta=0.0, mix='convex')),
    ('fed_gen', dict(GEN, alpha=0.0, beta=0.0)),
    ('fed_zdac', dict(ZDAC, per_class=0, bn_term='none')),
    ('fed_zdac', dict(ZDAC, ratio=0.0, bn_term='none')),
    ('fed_zdas', dict(ZDAS, tune_steps=0, bn_term='none')),
    ('fed_zdas', dict(ZDAS, tune_lr=0.0, bn_term='none')),
  )
  def test_switched_off_bit_by_bit(self, name, options):
    chex.assert_trees_all_equal(after(name, **options), after_fed_avg())

  @parameterized.parameters(
    ('fed_zdac', dict(ZDAC, per_class=0)),
    ('fed_zdas', dict(ZDAS, images=0)),
    ('fed_zdas', dict(ZDAS, tune_steps=0)),
  )
  def test_switched_off_with_batch_norm(self, name, options):
    chex.assert_trees_all_equal(
      after(name, model=problems.NORMED, **options),
      after_fed_avg(model=problems.NORMED),
    )

  @parameterized.parameters(
    ('fed_prox', dict(mu=0.0)),
    ('fed_prox', dict(mu=0.0, to_zero=True)),
    ('moon', dict(mu=0.0)),
    ('fed_df', {**DF, 'student_steps': 0}),
    ('fed_df_public', {**DF, 'student_steps': 0}),
  )
  @pytest.mark.slow  # below `parameters`: applies to all cases
  def test_others_switched_off(self, name, options):
    self.check(name, options)

  def check(self, name, options):
    chex.assert_trees_all_close(
      after(name, **options), after_fed_avg(), atol=1e-6
    )

  def test_fed_nova_with_equal_steps(self):
    chex.assert_trees_all_close(
      after('fed_nova', local_steps=1), after_fed_avg(local_steps=1), atol=1e-6
    )


class FedAlignTest(absltest.TestCase):
  MODEL = problems.STAGED

  def penalty(self, part, x):
    """Computes the term, its gradient on the images `x`, and its target value.

    The model is in training mode.
    """
    variables = self.MODEL.init(KEY)
    y = jnp.arange(len(x)) % CLASSES
    batch = base.Batch(x, y, jnp.arange(len(x)) < len(x) - 1)

    def term(params):
      now = variables._replace(params=params)
      output = self.MODEL.apply(now, x, batch.mask, train=True)
      value = part.penalty(now, output, batch, None, None)
      return value, losses.cross_entropy(output.logits, y, batch.mask)

    return jax.jit(jax.value_and_grad(term, has_aux=True))(variables.params)

  def test_value_and_what_it_reaches(self):
    """The slim stage has 1 of 4 input channels and all 6 output channels.

    The last example is padding.
    """
    x = jax.random.normal(KEY, (4, *problems.IMAGE_SHAPE))
    part = fed_align.fed_align(self.MODEL, mu=0.3)
    (value, cross_entropy), grads = self.penalty(part, x)
    np.testing.assert_allclose(value, 0.3 * cross_entropy, rtol=1e-5)
    used = jax.tree.map(jnp.count_nonzero, grads)
    for name in ('stem', 'block0_0', 'head'):
      self.assertEqual(set(map(int, jax.tree.leaves(used[name]))), {0}, name)
    kernel = grads['block1_0']['conv0']['conv']['kernel']
    self.assertEqual(jnp.count_nonzero(kernel[:, :, :1]), 9 * 6)
    self.assertEqual(jnp.count_nonzero(kernel[:, :, 1:]), 0)
    # Padding has no effect.
    _, again = self.penalty(part, x.at[-1].set(7.0))
    chex.assert_trees_all_close(grads, again, atol=1e-5)

  def test_full_width_is_aligned(self):
    x = jax.random.normal(KEY, (4, *problems.IMAGE_SHAPE))
    part = fed_align.fed_align(self.MODEL, width=1.0)
    (value, _), grads = self.penalty(part, x)
    self.assertEqual(value, 0)
    self.assertEqual(optax.tree.norm(grads), 0)

  def test_nothing_to_align(self):
    """The output of the stage is zero."""
    zero = jnp.zeros((2, 3, 4))
    norm = jax.value_and_grad(lambda m: jnp.sum(fed_align.spectral_norm(m)))
    (value, slope), (_, tangent) = jax.jvp(norm, (zero,), (zero + 1,))
    self.assertEqual(value, 0)
    np.testing.assert_array_equal([slope, tangent], 0)
    target = jnp.zeros(2)
    self.assertEqual(fed_align.alignment(target, target, 1.0), 0)

  def test_spectral_norm(self):
    """It is exact for matrices of rank one, and otherwise a lower bound."""
    a, b = (jax.random.uniform(jax.random.key(i), (3, 5)) for i in (0, 1))
    one = jnp.einsum('bc,bd->bcd', a, b)
    want = jnp.linalg.norm(a, axis=1) * jnp.linalg.norm(b, axis=1)
    np.testing.assert_allclose(fed_align.spectral_norm(one, 2), want, rtol=1e-6)
    several = jax.random.normal(KEY, (20, 4, 7))
    exact = jnp.linalg.svd(several, compute_uv=False)[:, 0]
    before = jnp.zeros(20)
    for iterations in (1, 3, 10):
      found = fed_align.spectral_norm(several, iterations)
      self.assertTrue((found > before - 1e-6).all())
      before = found
    self.assertTrue((found < exact * (1 + 1e-6)).all())

  def test_pooling_of_sizes_that_do_not_divide(self):
    """The windows of PyTorch's adaptive pooling are 0-1, 1-3 and 3-4 of
    five."""
    x = jnp.arange(5.0).reshape(1, 5, 1, 1)
    got = fed_align.transmitting_matrix(x, jnp.ones((1, 3, 1, 1)))
    np.testing.assert_allclose(got, np.mean([0.5, 2, 3.5]), rtol=1e-6)

  def test_switched_off(self):
    model = problems.LINEAR._replace(last_stage=lambda *args: 1 / 0)
    after_round = []
    for parts in ((), (fed_align.fed_align(model, mu=0.0),)):
      fed = problems.make(method=base.chain(fed_avg.fed_avg(), *parts))
      row = problems.row([1, 3])
      state, _ = fed.round(fed.init(KEY), problems.DATA, row, KEY)
      after_round.append(state.variables)
    chex.assert_trees_all_equal(*after_round)

  def test_errors(self):
    with self.assertRaisesRegex(ValueError, 'fed_align needs .* has stages'):
      fed_align.fed_align(MODEL)
    with self.assertRaisesRegex(ValueError, 'mu must be at least 0, got -1'):
      fed_align.fed_align(self.MODEL, mu=-1)
    for width in (0, 1.5):
      with self.assertRaisesRegex(ValueError, f'at most 1, got {width}'):
        fed_align.fed_align(self.MODEL, width=width)


class FedGenTest(absltest.TestCase):
  def heads(self, num=3):
    key = jax.random.key(5)
    return {
      'kernel': jax.random.normal(key, (num, 4, CLASSES)),
      'bias': jnp.zeros((num, CLASSES)),
    }

  def teacher(self, weighting, weight, labels):
    """Computes the teachers' term of one step on features [6, 4]."""
    generator = base.Generator(
      None, lambda variables, z, labels, train: (variables.params * z, ()), 4
    )
    head = base.Head(None, lambda p, x: x @ p['kernel'] + p['bias'])
    terms = fed_gen.Terms(weighting)
    slot = fed_gen.new_slot(base.Variables(jnp.ones(4), ()), terms)
    z = jax.random.normal(KEY, (6, 4))
    _, values = fed_gen.generator_step(
      generator, head, terms, slot, self.heads(), weight, (), z, labels, 0.1
    )
    each = [
      losses.cross_entropy(z @ kernel, labels)
      for kernel in self.heads()['kernel']
    ]
    return float(values['teacher']), each

  def test_equal_counts_weigh_alike(self):
    counts = jnp.full((3, CLASSES), 4)
    labels = jnp.array([0, 1, 2, 0, 1, 2])
    weight = fed_gen.label_weights(counts)[:, labels]
    for weighting in ('official', 'intended'):
      got, each = self.teacher(weighting, weight, labels)
      self.assertAlmostEqual(got, np.mean(each), places=5)

  def test_one_class_in_the_batch(self):
    """If all weights of a client are equal, the code is right."""
    counts = jnp.array([[1, 7, 2], [5, 1, 1], [1, 2, 9]])
    labels = jnp.full(6, 1)
    weight = fed_gen.label_weights(counts)[:, labels]
    np.testing.assert_allclose(weight[:, 0], np.array([7, 1, 2]) / 10)
    official, each = self.teacher('official', weight, labels)
    intended, _ = self.teacher('intended', weight, labels)
    self.assertAlmostEqual(official, intended, places=5)
    self.assertAlmostEqual(
      official, np.dot([0.7, 0.1, 0.2], np.array(each)), places=5
    )

  def test_absent_clients_teach_nothing(self):
    counts = jnp.array([[1, 7, 2], [5, 1, 1], [1, 2, 9]])
    weight = fed_gen.label_weights(counts * jnp.array([[1], [0], [1]]))
    np.testing.assert_allclose(weight[1], 0)
    np.testing.assert_allclose(weight.sum(0), 1, rtol=1e-6)

  def test_the_generator_does_not_ask_absent_clients(self):
    method = fed_gen.fed_gen(MODEL, CLASSES, **GEN)
    variables = MODEL.init(KEY)
    shared, _ = method.init(KEY, variables)
    head = MODEL.head.params(variables)

    def learnt(absent):
      heads = jax.tree.map(lambda a: jnp.stack([a, absent * a]), head)
      counts = jnp.array([[3, 1, 2], [0, 0, 0]])
      received = base.Received(
        variables,
        variables,
        (),
        (heads, counts),
        jnp.array([True, False]),
        jnp.int32(1),
        2,
        (),
      )
      return method.update(variables, shared, received, KEY)[1]

    chex.assert_trees_all_equal(learnt(1.0), learnt(-5.0))

  def test_first_round_is_fed_avg_s_and_the_generator_learns(self):
    method = recipes.build(
      'fed_gen', recipes.Settings(MODEL, CLASSES, options={'fed_gen': GEN})
    )
    fed = problems.make(MODEL, method)
    start = fed.init(KEY)
    state, info = fed.round(start, problems.DATA, problems.row([1, 3]), KEY)
    plain = problems.make(MODEL, base.chain(fed_avg.fed_avg()))
    want, _ = plain.round(
      plain.init(KEY), problems.DATA, problems.row([1, 3]), KEY
    )
    chex.assert_trees_all_equal(state.variables, want.variables)
    slots = start.shared[0], state.shared[0]
    before, after_ = (slot.generator.params['dense1'] for slot in slots)
    self.assertGreater(optax.tree.norm(optax.tree.sub(after_, before)), 0.001)
    self.assertEqual(optax.tree.get(slots[1].moments, 'count'), 3)
    for name in ('fed_gen/teacher', 'fed_gen/diversity'):
      self.assertTrue(np.isfinite(info.metrics[name]), name)
    two, _ = fed.round(state, problems.DATA, problems.row([1, 3]), KEY)
    want, _ = plain.round(want, problems.DATA, problems.row([1, 3]), KEY)
    gap = optax.tree.norm(optax.tree.sub(two.variables, want.variables))
    self.assertGreater(gap, 0.001)

  def test_all_options(self):
    for weighting in ('intended', 'ensemble'):
      options = dict(GEN, weighting=weighting, lambda_student=0.5)
      variables = after('fed_gen', **options)
      chex.assert_tree_all_finite(variables)

  def test_errors(self):
    model = MODEL._replace(head=None)
    with self.assertRaisesRegex(ValueError, 'fed_gen needs a model that has a'):
      fed_gen.fed_gen(model, CLASSES)
    with self.assertRaisesRegex(ValueError, 'weighting must be one of'):
      fed_gen.fed_gen(MODEL, CLASSES, weighting='none')
    with self.assertRaisesRegex(ValueError, 'alpha must be at least 0, got -1'):
      fed_gen.fed_gen(MODEL, CLASSES, alpha=-1)


class FedDmTest(parameterized.TestCase):
  def images(self, per_class, seed=1):
    shape = CLASSES, per_class, *problems.IMAGE_SHAPE
    return jax.random.normal(jax.random.key(seed), shape)

  def test_equal_images_match(self):
    real, variables = self.images(4), MODEL.init(KEY)
    value, slope = jax.value_and_grad(fed_dm.matching_loss, 3)(
      MODEL, variables, real, real
    )
    np.testing.assert_allclose(value, 0, atol=1e-12)
    np.testing.assert_allclose(slope, 0, atol=1e-6)

  def test_one_step_with_the_identity(self):
    """Features are pixels and logits vanish, so the step is known.

    Each image of a class moves by -lr 2 / I (mean S - mean X), and the error
    shrinks by 1 - 2 lr / I.
    """
    model = base.Model(
      None,
      lambda variables, x: base.Output(
        jnp.zeros((len(x), 2)), x.reshape(len(x), -1), ()
      ),
    )
    real, images, rate = self.images(5), self.images(2, 2), 0.3
    slope = jax.grad(fed_dm.matching_loss, 3)(model, (), real, images)
    error = images.mean(1) - real.mean(1)
    moved = images - rate * slope
    np.testing.assert_allclose(
      moved - images, -rate * (2 / 2) * error[:, None].repeat(2, 1), atol=1e-6
    )
    np.testing.assert_allclose(
      moved.mean(1) - real.mean(1), (1 - 2 * rate / 2) * error, atol=1e-6
    )

  def test_value_and_gradient_against_numpy(self):
    """Equation 8 of a model with one tanh layer, in float64.

    The gradient of the images is derived by hand.
    """
    rng = np.random.RandomState(0)
    real, images = rng.randn(3, 5, 2, 2, 1), rng.randn(3, 2, 2, 2, 1)
    w, v, owned = rng.randn(4, 6), rng.randn(6, 3), np.array([1, 0, 1])

    def outputs(x):
      features = np.tanh(x.reshape(*x.shape[:2], 4) @ w)  # [C, I, 6]
      return features, features @ v

    (h_x, z_x), (h_s, z_s) = outputs(real), outputs(images)
    d_h, d_z = h_s.mean(1) - h_x.mean(1), z_s.mean(1) - z_x.mean(1)
    value = np.sum(owned * (np.sum(d_h**2, 1) + np.sum(d_z**2, 1)))
    of_features = 2 / images.shape[1] * (d_h + d_z @ v.T) * owned[:, None]
    slope = (of_features[:, None] * (1 - h_s**2)) @ w.T

    def forward(variables, x):
      features = jnp.tanh(x.reshape(len(x), 4) @ variables[0])
      return base.Output(features @ variables[1], features, ())

    with enable_x64(True):
      found, gradient = jax.value_and_grad(fed_dm.matching_loss, 3)(
        base.Model(None, forward), (w, v), real, images, owned > 0
      )
      np.testing.assert_allclose(found, value, rtol=1e-12)
      np.testing.assert_allclose(
        gradient, slope.reshape(images.shape), rtol=1e-10, atol=1e-13
      )

  def test_momentum_of_the_pixels(self):
    """Two steps by hand, of a client whose only example is always drawn."""
    options = dict(
      init='noise', iterations=2, rho=0.0, image_lr=0.2, image_momentum=0.6
    )
    _, _, message, data = self.sent(2, **options)
    example = MODEL.normalise(data.x[data.index[:1]])
    real = jnp.broadcast_to(
      example, (CLASSES, DM['real_batch'], *problems.IMAGE_SHAPE)
    )
    start = jax.random.normal(
      jax.random.split(KEY)[0], (CLASSES, DM['ipc'], *problems.IMAGE_SHAPE)
    )
    slope = jax.grad(fed_dm.matching_loss, 3)
    first = slope(MODEL, MODEL.init(KEY), real, start)
    once = start - 0.2 * first
    second = slope(MODEL, MODEL.init(KEY), real, once)
    twice = once - 0.2 * (0.6 * first + second)
    label = int(data.y[data.index[0]])
    np.testing.assert_allclose(message.x[label], twice[label], atol=1e-5)

  def test_classes_that_are_not_owned_count_in_nothing(self):
    variables, owned = MODEL.init(KEY), jnp.array([True, False, True])
    real, images = self.images(4), self.images(2, 2)
    loss = lambda real, images: fed_dm.matching_loss(
      MODEL, variables, real, images, owned
    )
    value = loss(real, images)
    self.assertEqual(loss(real.at[1].set(9.0), images.at[1].set(7.0)), value)
    slope = jax.grad(loss, 1)(real, images)
    self.assertFalse(jnp.any(slope[1]))
    self.assertTrue(jnp.all(jnp.any(slope[::2], (1, 2, 3, 4))))

  @parameterized.parameters(0.0, 0.5, 1e6)
  def test_perturbed(self, rho):
    params = MODEL.init(KEY).params
    xi = optax.tree.random_like(KEY, params, jax.random.normal)
    moved = optax.tree.sub(fed_dm.perturbed(KEY, params, rho), params)
    want = min(rho, float(optax.tree.norm(xi)))
    np.testing.assert_allclose(optax.tree.norm(moved), want, rtol=1e-4)
    if not rho:
      chex.assert_trees_all_equal(fed_dm.perturbed(KEY, params, rho), params)

  def test_by_class(self):
    data = problems.DATA._replace(
      index=problems.DATA.index[0], count=problems.DATA.count[0]
    )
    rows, counts = fed_dm.by_class(data, CLASSES)
    count = problems.SIZES[0]
    labels = np.asarray(data.y)[rows[:count]]
    np.testing.assert_array_equal(np.sort(labels), labels)
    self.assertCountEqual(rows[:count].tolist(), data.index[:count].tolist())
    np.testing.assert_array_equal(
      counts, np.bincount(labels, minlength=CLASSES)
    )

  def sent(self, client, num_steps=base.NO_LIMIT, **options):
    """Returns what a client sends, and its data."""
    part = fed_dm.fed_dm(
      MODEL, CLASSES, problems.IMAGE_SHAPE, **{**DM, **options}
    )
    model = MODEL.init(KEY)
    data = problems.DATA._replace(
      index=problems.DATA.index[client], count=problems.DATA.count[client]
    )
    view = base.View(*[None] * 10)._replace(
      variables=model, data=data, num_steps=jnp.int32(num_steps)
    )
    local, own = jax.jit(lambda view: part.train(None, None, view, KEY))(view)
    chex.assert_trees_all_equal(local.variables, model)
    _, message = part.upload(view._replace(own=own), local, None, KEY)
    return part, local, message, data

  def test_a_client_with_one_example(self):
    """It sends one class; as a straggler without a step it sends none.

    The bits count only that class. The images start as, and remain, its only
    example.
    """
    part, _, message, data = self.sent(2)
    (label,) = {int(data.y[data.index[0]])}
    self.assertEqual(message.owned.tolist(), [c == label for c in range(3)])
    self.assertEqual(part.message_bits(message), 2 * 64 * 32 + CLASSES)
    others = np.delete(message.x, label, axis=0)
    np.testing.assert_array_equal(others, 0)
    example = MODEL.normalise(data.x[data.index[0]])
    for image in message.x[label]:
      np.testing.assert_allclose(image, example, atol=1e-4)
    part, local, message, _ = self.sent(2, num_steps=0)
    self.assertFalse(jnp.any(message.owned) | jnp.any(message.x))
    self.assertEqual(part.message_bits(message), CLASSES)
    self.assertEqual(local.num_steps, 0)

  @parameterized.parameters('real', 'noise')
  def test_images_come_to_match(self, init):
    _, before, *_ = self.sent(1, iterations=1, init=init)
    _, after_, *_ = self.sent(1, iterations=60, init=init, rho=0.0, ipc=1)
    name = 'fed_dm/matching'
    self.assertLess(after_.metrics[name], before.metrics[name])
    self.assertEqual(after_.num_steps, 60)
    self.assertGreater(after_.metrics['train_loss'], 0)

  def test_server_trains_on_what_arrived(self):
    part = fed_dm.fed_dm(
      MODEL, CLASSES, problems.IMAGE_SHAPE, **dict(DM, server_epochs=20)
    )
    variables = MODEL.init(KEY)
    kept, _ = part.init(KEY, variables)
    x = jnp.stack([self.images(2, seed) for seed in (1, 2)])
    owned = jnp.array([[True, False, True], [True, True, True]])

    @jax.jit
    def update(x, owned, arrived):
      received = base.Received(*[None] * 8)._replace(
        stacked=fed_dm.Images(x, owned),
        arrived=jnp.array(arrived),
        round=jnp.int32(0),
      )
      return part.update(variables, kept, received, KEY)

    trained, kept_then, info = update(x, owned, [True, False])
    self.assertEqual(info.metrics['fed_dm/images'], 4)
    # Images of an absent client, and of a class that is not owned.
    other = x.at[1].set(5.0).at[0, 1].set(-3.0)
    chex.assert_trees_all_equal(
      update(other, owned, [True, False])[:2], (trained, kept_then)
    )
    logits = lambda variables: (
      MODEL.apply(variables, x[0, ::2].reshape(4, *problems.IMAGE_SHAPE)).logits
    )
    labels = jnp.array([0, 0, 2, 2])
    before, after_ = (
      losses.cross_entropy(logits(v), labels) for v in (variables, trained)
    )
    self.assertLess(after_, before)
    chex.assert_trees_all_equal(kept_then[0, :2], x[0, 0])
    self.assertFalse(jnp.any(kept_then[1]))
    nothing, *_ = update(x, owned, [False, False])
    chex.assert_trees_all_equal(nothing, variables)

  def test_steps_of_the_server(self):
    """Two epochs of one batch by hand: SGD with decay and momentum."""
    lr, decay, momentum = 0.1, 0.3, 0.7
    part = fed_dm.fed_dm(
      MODEL,
      CLASSES,
      problems.IMAGE_SHAPE,
      ipc=2,
      server_epochs=2,
      server_batch_size=20,
      server_lr=lr,
      server_momentum=momentum,
      server_weight_decay=decay,
    )
    variables = MODEL.init(KEY)
    received = base.Received(*[None] * 8)._replace(
      stacked=fed_dm.Images(self.images(2)[None], jnp.ones((1, CLASSES), bool)),
      arrived=jnp.array([True]),
      round=jnp.int32(0),
    )
    kept, _ = part.init(KEY, variables)
    trained, *_ = part.update(variables, kept, received, KEY)

    def loss(params):
      x = self.images(2).reshape(-1, *problems.IMAGE_SHAPE)
      logits = MODEL.apply(variables._replace(params=params), x).logits
      return losses.cross_entropy(logits, jnp.repeat(jnp.arange(CLASSES), 2))

    params = variables.params
    velocity = jax.tree.map(jnp.zeros_like, params)
    for _ in range(2):
      velocity = jax.tree.map(
        lambda v, g, p: momentum * v + g + decay * p,
        velocity,
        jax.grad(loss)(params),
        params,
      )
      params = jax.tree.map(lambda p, v: p - lr * v, params, velocity)
    chex.assert_trees_all_close(trained.params, params, rtol=1e-4, atol=1e-5)

  def test_errors(self):
    make = functools.partial(
      fed_dm.fed_dm, MODEL, CLASSES, problems.IMAGE_SHAPE
    )
    for wrong, message in (
      (dict(init='zeros'), 'init must be one of'),
      (dict(ipc=0), 'ipc must be at least 1, got 0'),
      (dict(server_epochs=0), 'server_epochs must be at least 1'),
    ):
      with self.assertRaisesRegex(ValueError, message):
        make(**wrong)
    for name in ('fed_dm+fed_ftg', 'scaffold+fed_dm', 'fed_dm+fed_prox'):
      with self.assertRaisesRegex(
        ValueError, 'fed_dm goes with no other part, got .*: its clients train'
      ):
        recipes.parse(name)
    with self.assertRaisesRegex(ValueError, 'leave the uplink out'):
      problems.make(MODEL, base.chain(make()), uplink=optax.identity())


class FedZdaTest(parameterized.TestCase):
  NET = problems.NORMED

  def test_label_plan(self):
    counts = jnp.array([0, 4, 12, 0])
    plan = lambda target, ratio=9.0: fed_zda.label_plan(
      counts, target, 3, ratio
    ).tolist()
    self.assertEqual(plan('missing'), [3, 0, 0, 3])
    self.assertEqual(plan('mean'), [4, 0, 0, 4])
    self.assertEqual(plan('max'), [12, 8, 0, 12])  # a uniform prior
    self.assertEqual(plan('max', 0.5), [3, 2, 0, 3])  # 8 of 32 for 16 examples
    self.assertEqual(plan('missing', 0.0), [0, 0, 0, 0])
    balanced = fed_zda.label_plan(jnp.full(3, 5), 'max', 3, 1.0)
    self.assertEqual(balanced.tolist(), [0, 0, 0])

  @parameterized.parameters(*fed_zda.GAPS)
  def test_gap_is_zero_where_moments_are_equal(self, name):
    stats = {'a': {'batch': {'mean': jnp.ones(2), 'var': jnp.array([1.0, 4])}}}
    gap = lambda moments: float(
      fed_zda.statistics_gap(moments, stats, fed_zda.GAPS[name])
    )
    self.assertEqual(gap(stats), 0)
    for leaf in ('mean', 'var'):
      moved = {**stats['a']['batch'], leaf: jnp.array([1.5, 1.0])}
      self.assertGreater(gap({'a': {'batch': moved}}), 0.1)

  @parameterized.parameters('l2', 'kl', 'none')
  def test_images(self, bn_term):
    """The model recognises them, and their statistics fit better than noise."""
    variables = self.NET.init(KEY)
    variables = variables._replace(
      stats=jax.tree.map(lambda a: a + 0.5, variables.stats)
    )
    labels = jnp.arange(8) % CLASSES
    made = functools.partial(
      fed_zda.zero_shot_images,
      self.NET,
      variables,
      labels,
      KEY,
      problems.IMAGE_SHAPE,
      bn_term=bn_term,
    )
    noise, _ = made(steps=0)
    np.testing.assert_array_equal(
      noise, jax.random.normal(KEY, (8, *problems.IMAGE_SHAPE))
    )
    x, terms = jax.jit(made)(steps=100)
    cross_entropy, gap = {}, {}
    for name, images in (('noise', noise), ('made', x)):
      output = self.NET.apply(variables, images)
      cross_entropy[name] = losses.cross_entropy(output.logits, labels)
      gap[name] = fed_zda.statistics_gap(
        output.moments, variables.stats, fed_zda.kl_gap
      )
    self.assertLess(cross_entropy['made'], 0.5 * cross_entropy['noise'])
    if bn_term != 'none':
      self.assertLess(gap['made'], 0.5 * gap['noise'])
    np.testing.assert_allclose(
      terms['cross_entropy'], cross_entropy['made'], rtol=0.2
    )
    self.assertEqual('gap' in terms, bn_term != 'none')

  def test_images_that_nobody_needs_count_in_nothing(self):
    variables, mask = self.NET.init(KEY), jnp.arange(6) < 4
    labels = jnp.arange(6) % CLASSES
    made = [
      fed_zda.zero_shot_images(
        self.NET,
        variables,
        jnp.where(mask, labels, other),
        KEY,
        problems.IMAGE_SHAPE,
        mask=mask,
        steps=3,
      )[0]
      for other in (0, 1)
    ]
    np.testing.assert_array_equal(*made)

  def test_a_client_s_loss(self):
    """It is (n real + r pool) / (n + r), with r for two classes client 2
    lacks."""
    part = fed_zda.fed_zdac(
      self.NET, CLASSES, problems.IMAGE_SHAPE, **dict(ZDAC, ratio=9.0)
    )
    variables = self.NET.init(KEY)
    pool = part.common(variables, (), jnp.int32(1), KEY)
    index, count = problems.DATA.index[2], problems.DATA.count[2]
    view = base.View(*[None] * 10)._replace(
      common=pool,
      data=problems.DATA._replace(index=index, count=count),
      round=jnp.int32(1),
    )
    objective = base.Objective(
      lambda variables, batch, key: (5.0, base.LossAux((), jnp.float32(3.0))), 0
    )
    seen = []
    part.train(
      lambda objective, view: seen.append(objective), objective, view, KEY
    )
    value, aux = seen[0].loss(variables, None, KEY)
    self.assertEqual(aux.cross_entropy, 3)
    (own,) = {int(problems.DATA.y[index[0]])}
    images, _ = pool
    key_y, key_x = jax.random.split(jax.random.fold_in(KEY, fed_zda._OF_IMAGES))
    added = jnp.array([0 if c == own else 2 for c in range(CLASSES)])
    y = distillation.iid_labels(key_y, added, 4)
    self.assertNotIn(own, y.tolist())
    x = images[2 * y + jax.random.randint(key_x, (4,), 0, 2)]
    logits = self.NET.apply(variables, x, train=True).logits
    of_pool = losses.cross_entropy(logits, y)
    np.testing.assert_allclose(value, 5 + 4 / 5 * (of_pool - 3), rtol=1e-5)
    # Before `first_round` nothing is added.
    part.train(
      lambda objective, view: seen.append(objective),
      objective,
      view._replace(round=jnp.int32(0)),
      KEY,
    )
    self.assertEqual(seen[1].loss(variables, None, KEY)[0], 5)

  def test_server_tunes_on_what_arrived(self):
    """Images of absent clients are neither used nor kept."""
    part = fed_zda.fed_zdas(
      self.NET,
      CLASSES,
      problems.IMAGE_SHAPE,
      **dict(ZDAS, tune_steps=30, first_round=1),
    )
    models = jax.vmap(self.NET.init)(jax.random.split(KEY, 2))
    student = self.NET.init(jax.random.key(9))
    kept, _ = part.init(KEY, student)

    @jax.jit
    def update(models, counts, round_):
      received = base.Received(
        *[None] * 3,
        (models, counts),
        jnp.array([True, False]),
        round_,
        *[None] * 3,
      )
      return part.update(student, kept, received, KEY)

    counts = jnp.array([[3, 0, 5], [0, 0, 0]])
    tuned, images, info = update(models, counts, 1)
    other = jax.tree.map(lambda a: a.at[1].add(1.0), models)
    chex.assert_trees_all_equal(update(other, counts, 1)[:2], (tuned, images))
    chex.assert_trees_all_equal(tuned.stats, student.stats)
    self.assertEqual(
      [bool(jnp.any(of_class)) for of_class in images], [True, False, True]
    )
    before, after_ = (
      losses.cross_entropy(
        self.NET.apply(model, images[:, 0]).logits[::2], jnp.array([0, 2])
      )
      for model in (student, tuned)
    )
    self.assertLess(after_, before)
    self.assertTrue(np.isfinite([*info.metrics.values()]).all())
    same, _, info = update(models, counts, 0)
    chex.assert_trees_all_equal(same, student)
    self.assertTrue(np.isnan([*info.metrics.values()]).all())

  def test_first_round_never_comes(self):
    got = after('fed_zdac', **dict(ZDAC, bn_term='none', first_round=9))
    chex.assert_trees_all_close(got, after_fed_avg(), atol=1e-6)

  def test_source_mean(self):
    options = dict(ZDAS, bn_term='none', source='mean')
    got = after('fed_zdas', **options)
    gap = optax.tree.norm(optax.tree.sub(got, after_fed_avg()))
    self.assertGreater(gap, 1e-4)
    chex.assert_tree_all_finite(got)

  def test_errors(self):
    for make in (fed_zda.fed_zdac, fed_zda.fed_zdas):
      make = functools.partial(make, MODEL, CLASSES, problems.IMAGE_SHAPE)
      with self.assertRaisesRegex(
        ValueError, "needs a model with BatchNorm.*or bn_term='none'"
      ):
        make()
      make(bn_term='none')
      for wrong, message in (
        (dict(bn_term='l1'), 'bn_term must be one of'),
        (dict(lam=-1), 'lam must be at least 0, got -1'),
        (dict(steps=-1), 'steps must be at least 0'),
      ):
        with self.assertRaisesRegex(ValueError, message):
          make(**wrong)
    make = functools.partial(
      fed_zda.fed_zdac, self.NET, CLASSES, problems.IMAGE_SHAPE
    )
    with self.assertRaisesRegex(ValueError, 'target must be one of'):
      make(target='all')


class KeptImagesTest(absltest.TestCase):
  def test_by_class(self):
    kept = distillation.no_images(3, (1,))
    images, labels = jnp.arange(1.0, 7)[:, None], jnp.array([0, 2, 0, 2, 2, 0])
    valid = jnp.array([True, True, True, True, False, True])
    kept = distillation.keep_images(kept, images, labels, valid)
    self.assertEqual(
      kept[..., 0].tolist(),
      [[1, 3, 6, 1, 3, 6, 1, 3], [0] * 8, [2, 4, 2, 4, 2, 4, 2, 4]],
    )
    kept = distillation.keep_images(kept, images + 10, labels, labels == 2)
    self.assertEqual(kept[0, :3, 0].tolist(), [1, 3, 6])
    drawn = distillation.draw_kept(kept, jnp.array([0, 0, 2, 2]), KEY)
    self.assertEqual(drawn[:, 0].tolist(), [1, 3, 15, 12])


class FedMrTest(absltest.TestCase):
  """Recombination through the engine, in float64."""

  SHIFT = base.Method(  # refines the mean
    update=lambda v, shared, received, key: (
      jax.tree.map(lambda a: a + 1.0, v),
      shared,
      base.Info(),
    )
  )

  def run_rounds(self, method, rows, arrived=None, **kwargs):
    fed = problems.make(MODEL, method, **kwargs)
    rows = problems.schedule(rows)
    if arrived is not None:
      rows = rows._replace(arrived=np.array(arrived))
    return federation.run(fed, fed.init(KEY), problems.DATA, rows, KEY)

  def test_first_rounds_for_ever_are_uniform_averaging(self):
    rows = [[0, 1, 4], [1, 2, 3], [0, 2, 3]]
    with enable_x64(True):
      got, metrics = self.run_rounds(
        base.chain(fed_mr.fed_mr(3, first_rounds=9)), rows, weighting='uniform'
      )
      want, _ = self.run_rounds(
        base.chain(fed_avg.fed_avg()), rows, weighting='uniform'
      )
    chex.assert_trees_all_equal(got.variables, want.variables)
    self.assertGreater(metrics['fed_mr/spread'].min(), 0)

  def test_a_single_model_goes_from_client_to_client(self):
    rows = [[0], [1], [2]]
    with enable_x64(True):
      got, metrics = self.run_rounds(base.chain(fed_mr.fed_mr(1)), rows)
      want, _ = self.run_rounds(base.chain(fed_avg.fed_avg()), rows)
    chex.assert_trees_all_close(got.variables, want.variables, atol=1e-12)
    np.testing.assert_array_equal(metrics['fed_mr/spread'], 0)

  def test_the_model_of_who_is_absent_stays_and_counts(self):
    with enable_x64(True):
      state, _ = self.run_rounds(
        base.chain(fed_mr.fed_mr(3, segment=1.0)),
        [[0, 1, 4]],
        [[True, False, True]],
      )
      initial = problems.make(MODEL).init(KEY).variables
    models, mean = jax.device_get(state.shared[0])
    chex.assert_trees_all_equal(mean, jax.device_get(state.variables))
    unchanged = [
      all(
        np.array_equal(a[i], b)
        for a, b in zip(jax.tree.leaves(models), jax.tree.leaves(initial))
      )
      for i in range(3)
    ]
    self.assertEqual(sum(unchanged), 1)  # whole models were exchanged
    chex.assert_trees_all_close(
      jax.tree.map(lambda a: a.mean(0), models), mean, atol=1e-12
    )

  def test_what_refines_the_mean_moves_every_model(self):
    seen = base.Method(
      upload=lambda view, local, objective, key: (view.received, ()),
      init=lambda key, variables: ((), variables),
    )
    with enable_x64(True):
      state, _ = self.run_rounds(
        base.chain(fed_mr.fed_mr(2), self.SHIFT, seen), [[0, 1], [0, 1]]
      )
      one, _ = self.run_rounds(
        base.chain(fed_mr.fed_mr(2), self.SHIFT, seen), [[0, 1]]
      )
    sent, models = jax.device_get((state.clients[0][2], one.shared[0].models))
    chex.assert_trees_all_close(
      jax.tree.map(lambda a: a[:2], sent),
      jax.tree.map(lambda a: a + 1.0, models),
      atol=1e-12,
    )

  def test_what_refines_the_mean_moves_absent_models_too(self):
    with enable_x64(True):
      state, _ = self.run_rounds(
        base.chain(fed_mr.fed_mr(2), self.SHIFT),
        3 * [[0, 1]],
        3 * [[True, False]],
        solve=solvers.local_sgd(0.0, batch_size=5, epochs=1),
      )
      first = problems.make(MODEL).init(KEY).variables.params
      chex.assert_trees_all_close(
        state.variables.params,
        jax.tree.map(lambda a: a + 3.0, first),
        rtol=1e-12,
      )

  def test_evaluation_is_of_the_mean(self):
    """A client receives another model, but is evaluated with the mean."""
    method = base.chain(fed_mr.fed_mr(3))
    fed = problems.make(MODEL, method)
    state, _ = self.run_rounds(method, [[0, 1, 4]])
    before, _ = fed.personalise(
      state, problems.DATA, jnp.int32(0), jnp.int32(0), KEY
    )
    chex.assert_trees_all_equal(before['broadcast'].variables, state.variables)

  def test_a_cohort_of_another_width(self):
    with self.assertRaisesRegex(ValueError, 'keeps 4 models and .* got 3'):
      self.run_rounds(base.chain(fed_mr.fed_mr(4)), [[0, 1, 4]])


class ErrorsTest(parameterized.TestCase):
  @parameterized.parameters(
    ('fed_prox', dict(mu=-1.0), 'mu must be at least 0, got -1'),
    ('fed_dyn', dict(alpha=-1.0), 'alpha must be at least 0, got -1'),
    ('scaffold', dict(option=3), r'option must be one of \(1, 2\), got 3'),
    ('scaffold', dict(lr0=True, learning_rate=0.0), 'rate must be above 0'),
    ('moon', dict(mu=-1.0), 'mu must be at least 0'),
    ('moon', dict(tau=0.0), 'tau must be above 0, got 0'),
    ('q_fed_avg', dict(q=-0.5), 'q must be at least 0, got -0.5'),
    ('fed_ntd', dict(beta=-1.0), 'beta must be at least 0, got -1'),
    ('fed_ntd', dict(tau=0.0), 'tau must be above 0, got 0'),
    ('fed_lsd', dict(mix='both'), "got 'both'"),
    ('fed_lsd', dict(beta=2.0, mix='convex'), 'beta must be at most 1'),
    ('fed_mr', {}, 'cohort must be at least 1'),
    ('fed_df', dict(batch_size=0), 'batch_size'),
    ('fed_df', dict(ensemble='vote'), "got 'vote'"),
  )
  def test_options(self, name, options, message):
    settings = recipes.Settings(
      MODEL, CLASSES, generator=GENERATOR, options={name: options}
    )
    with self.assertRaisesRegex(ValueError, message):
      recipes.build(name, settings)

  def test_public_images_are_missing(self):
    fed = problems.make(
      MODEL, recipes.build('fed_df_public', recipes.Settings(MODEL, CLASSES))
    )
    with self.assertRaisesRegex(ValueError, 'images in Data.public'):
      jax.eval_shape(
        fed.round,
        jax.eval_shape(fed.init, KEY),
        problems.DATA,
        problems.row([0, 1]),
        KEY,
      )

  def test_policy(self):
    with self.assertRaisesRegex(ValueError, "got 'global'"):
      batch_norm.policy_parts('global', MODEL)


@jax.jit
def cross_entropy(params, rows):
  """Computes the cross-entropy of `MODEL` on these examples."""
  logits = MODEL.apply(base.Variables(params, {}), problems.DATA.x[rows]).logits
  return losses.cross_entropy(logits, problems.DATA.y[rows])


class ByHandTest(parameterized.TestCase):
  """Combines the results of two clients by hand."""

  def ends(self, state, ids, num_steps=None, **changes):
    """Returns each client's model after its own local training."""
    fed = problems.make(MODEL, weighting='uniform', **changes)
    num_steps = num_steps or {k: base.NO_LIMIT for k in ids}
    return [
      fed.round(
        state, problems.DATA, problems.row([k], num_steps=[num_steps[k]]), KEY
      )[0].variables.params
      for k in ids
    ]

  def step(self, method, ids, num_steps=None, **changes):
    fed = problems.make(MODEL, base.chain(method), **changes)
    plain = problems.make(MODEL).init(KEY)
    state = fed.init(KEY)._replace(variables=plain.variables)
    num_steps = num_steps or {k: base.NO_LIMIT for k in ids}
    cohort = problems.row(ids, num_steps=[num_steps[k] for k in ids])
    after, _ = fed.round(state, problems.DATA, cohort, KEY)
    return plain, after.variables.params

  @parameterized.parameters(
    (optax.identity(), 4, 2),
    (optax.trace(0.5), 1 + 1.5 + 1.75 + 1.875, 1 + 1.5),
  )
  def test_fed_nova(self, optimizer, first, second):
    """Clients 1 (12 examples) and 3 (5) take 4 and 2 steps.

    `first` and `second` are ||a_k||_1: with momentum the last gradient moves a
    model by 1, the one before it by 1 + 0.5, and so on.
    """
    steps, solve = {1: 4, 3: 2}, problems.solver(optimizer=optimizer)
    plain, got = self.step(fed_nova.fed_nova(), [1, 3], steps, solve=solve)
    w = plain.variables.params
    a, b = self.ends(plain, [1, 3], steps, solve=solve)
    effective = 12 / 17 * first + 5 / 17 * second
    want = jax.tree.map(
      lambda w, a, b: (
        w + effective * (12 / 17 * (a - w) / first + 5 / 17 * (b - w) / second)
      ),
      w,
      a,
      b,
    )
    chex.assert_trees_all_close(got, want, atol=1e-6)

  def test_q_fed_avg(self):
    """Follows algorithm 2 with q = 2 and weights by examples."""
    q, lipschitz = 2.0, 1 / 0.1
    plain, got = self.step(q_fed_avg.q_fed_avg(q, batch_size=5), [1, 3])
    w = plain.variables.params
    top, bottom = jax.tree.map(jnp.zeros_like, w), 0.0
    for k, share, end in zip(
      (1, 3), (12 / 17, 5 / 17), self.ends(plain, [1, 3])
    ):
      rows = problems.DATA.index[k][: problems.DATA.count[k]]
      loss = float(cross_entropy(w, rows))
      change = jax.tree.map(lambda w, e: lipschitz * (w - e), w, end)
      top = jax.tree.map(
        lambda t, c, f=loss, p=share: t + p * f**q * c, top, change
      )
      norm = float(optax.tree.norm(change))
      bottom += share * (q * loss ** (q - 1) * norm**2 + lipschitz * loss**q)
    want = jax.tree.map(lambda w, t: w - t / bottom, w, top)
    chex.assert_trees_all_close(got, want, atol=1e-6)

  def test_scaffold_option_1(self):
    """c_k becomes the gradient of the cross-entropy over all data of client
    1."""
    fed = problems.make(
      MODEL,
      base.chain(fed_avg.fed_avg(), scaffold.scaffold(option=1, batch_size=5)),
    )
    state = fed.init(KEY)
    after, _ = fed.round(state, problems.DATA, problems.row([1, -1]), KEY)
    rows = problems.DATA.index[1][:12]
    want = jax.jit(jax.grad(cross_entropy))(state.variables.params, rows)
    (_, own), _ = after.clients
    chex.assert_trees_all_close(
      jax.tree.map(lambda a: a[1], own), want, atol=1e-6
    )
    _, (server, _) = after.shared  # share 12 * 5 / 40, N = 5
    chex.assert_trees_all_close(
      server, jax.tree.map(lambda a: a * 12 / 40, want), atol=1e-6
    )

  def test_scaffold_with_momentum(self):
    """A control variate is never larger than the gradients that it averages.

    Were the steps counted as plain ones, it would grow from round to round.
    """
    solve = problems.solver(
      epochs=20, clip_norm=None, optimizer=optax.trace(0.9)
    )
    method = base.chain(fed_avg.fed_avg(), scaffold.scaffold())
    fed = problems.make(problems.LINEAR, method, solve=solve)
    rows = problems.schedule([range(5)] * 8)
    state, _ = federation.run(fed, fed.init(KEY), problems.DATA, rows, KEY)
    (_, own), _ = state.clients
    # A gradient of softmax regression is at most sqrt(2) |x|, with the bias.
    longest = jnp.sqrt(1 + jnp.sum(problems.DATA.x**2, (1, 2, 3))).max()
    for norm in jax.vmap(optax.tree.norm)(own):
      self.assertBetween(float(norm), 1e-3, float(2**0.5 * longest))

  @parameterized.parameters(
    ('uniform', (1 / 2, 1 / 2)), ('examples', (12 / 17, 5 / 17))
  )
  def test_scaffold_without_shares(self, weighting, weights):
    """c is averaged as the models are, and corrects clients as it is."""
    part = scaffold.scaffold(by_share=False)
    fed = problems.make(
      MODEL, base.chain(fed_avg.fed_avg(), part), weighting=weighting
    )
    state, _ = fed.round(
      fed.init(KEY), problems.DATA, problems.row([1, 3]), KEY
    )
    (_, own), _ = state.clients
    _, (server, _) = state.shared
    chex.assert_trees_all_close(
      server,
      jax.tree.map(
        lambda c: 2 / 5 * (weights[0] * c[1] + weights[1] * c[3]), own
      ),
      atol=1e-6,
    )
    c_k = jax.tree.map(lambda c: c[1], own)
    view = types.SimpleNamespace(shared=(server, ()), own=c_k, share=12 / 8)
    slope = jax.grad(lambda v: part.penalty(v, None, None, view, None))(
      state.variables
    )
    chex.assert_trees_all_close(
      slope.params, optax.tree.sub(server, c_k), atol=1e-6
    )

  def test_moon_keeps_what_was_trained(self):
    fed = problems.make(
      MODEL, base.chain(fed_avg.fed_avg(), moon.moon(MODEL, 1.0, 0.5))
    )
    start = fed.init(KEY)
    _, personal = jax.jit(fed.personalise)(
      start, problems.DATA, jnp.int32(1), jnp.int32(1), KEY
    )
    trained = personal['personalised'].variables
    after, _ = fed.round(start, problems.DATA, problems.row([1, 3]), KEY)
    (_, (last, seen)), _ = after.clients
    chex.assert_trees_all_close(
      jax.tree.map(lambda a: a[1], last), trained, atol=1e-6
    )
    np.testing.assert_array_equal(seen, [False, True, False, True, False])

  def test_fed_dyn_s_duals_add_up(self):
    """A client's duals add up over rounds; the server has their mean."""
    fed = problems.make(
      MODEL, base.chain(fed_avg.fed_avg(), fed_dyn.fed_dyn(0.1))
    )
    one, _ = fed.round(fed.init(KEY), problems.DATA, problems.row([1, 3]), KEY)
    _, personal = jax.jit(fed.personalise)(
      one, problems.DATA, jnp.int32(1), jnp.int32(1), KEY
    )
    trained = personal['personalised'].variables
    two, _ = fed.round(one, problems.DATA, problems.row([0, 1]), KEY)
    (_, before), _ = one.clients
    (_, after), _ = two.clients
    chex.assert_trees_all_close(
      jax.tree.map(lambda a: a[1], after),
      jax.tree.map(
        lambda a, new, old: a[1] + new - old,
        before,
        trained.params,
        one.variables.params,
      ),
      atol=1e-6,
    )
    chex.assert_trees_all_close(
      two.shared[1], jax.tree.map(lambda a: a.mean(0), after), atol=1e-6
    )

  def test_scaffold_without_a_step_keeps_the_variate(self):
    fed = problems.make(
      MODEL, base.chain(fed_avg.fed_avg(), scaffold.scaffold())
    )
    before, _ = fed.round(
      fed.init(KEY), problems.DATA, problems.row([1, 3]), KEY
    )
    after, _ = fed.round(
      before, problems.DATA, problems.row([1, 3], num_steps=[0, 9]), KEY
    )
    (_, old), _ = before.clients
    (_, new), _ = after.clients
    same = jax.tree.map(
      lambda a, b: [np.array_equal(a[k], b[k]) for k in (1, 3)], old, new
    )
    self.assertEqual(same, jax.tree.map(lambda _: [True, False], old))

  def test_scaffold_compares_with_the_untuned_mean_on_request(self):
    """The reference becomes the aggregate, before any refinement."""
    shift = base.Method(
      update=lambda v, shared, received, key: (
        jax.tree.map(lambda a: a + 1.0, v),
        shared,
        base.Info(),
      )
    )
    fed = problems.make(
      MODEL,
      base.chain(
        fed_avg.fed_avg(), scaffold.scaffold(untuned_reference=True), shift
      ),
    )
    after, info = fed.round(
      fed.init(KEY), problems.DATA, problems.row([1, 3]), KEY
    )
    chex.assert_trees_all_close(
      after.shared[1][1], info.models['average'].params, atol=1e-6
    )


class FedDfTest(parameterized.TestCase):
  """The server step against plain loops that follow the spec."""

  def received(self):
    teachers = jax.vmap(MODEL.init)(jax.random.split(KEY, 3))
    arrived = jnp.array([True, False, True])
    counts = jnp.array([[4, 0, 2], [0, 0, 0], [2, 2, 0]])
    return base.Received(
      None,
      None,
      (),
      (teachers, counts),
      arrived,
      jnp.int32(0),
      5,
      jnp.asarray(PUBLIC),
    )

  def student_steps(self, student, teachers, images, combine):
    @jax.jit
    def step(params, x):
      target = combine([MODEL.apply(t, x).logits for t in teachers])
      grads = jax.grad(
        lambda p: jnp.mean(
          jnp.sum(
            target
            * (
              jnp.log(target)
              - jax.nn.log_softmax(MODEL.apply(base.Variables(p, {}), x).logits)
            ),
            -1,
          )
        )
      )(params)
      return jax.tree.map(
        lambda p, g: p - DF['student_lr'] * (g + 1e-3 * p), params, grads
      )

    for x in images:
      student = base.Variables(step(student.params, x), {})
    return student

  def test_generated_images(self):
    with enable_x64(True):
      received = self.received()
      student, made = MODEL.init(KEY), GENERATOR.init(KEY)
      options = fed_df.Options(**DF)
      method = fed_df.fed_df(MODEL, GENERATOR, CLASSES, options)
      got, got_made, _ = jax.jit(
        lambda v, s: method.update(v, s, received, KEY)
      )(student, made)
      stacked, counts = received.stacked
      z, labels = fed_df.draw(KEY, counts.sum(0), 4, options)
      self.assertEqual(z.shape, (4, 6, 4))
      teachers = [jax.tree.map(lambda a, k=k: a[k], stacked) for k in (0, 2)]
      adam = optax.adam(DF['generator_lr'])
      opt_state = adam.init(made.params)

      @jax.jit
      def step(made, opt_state, z, y):
        def loss(params):
          stats, total = made.stats, 0.0
          for teacher in teachers:
            x, stats = GENERATOR.apply(
              base.Variables(params, stats), z, y, train=True
            )
            log = jax.nn.log_softmax(MODEL.apply(teacher, x).logits)
            total += -log[jnp.arange(len(y)), y].mean() / 2
          x, stats = GENERATOR.apply(
            base.Variables(params, stats), z, y, train=True
          )
          return total + losses.diversity(z, x), stats

        grads, stats = jax.grad(loss, has_aux=True)(made.params)
        grads = jax.tree.map(lambda g, p: g + 1e-3 * p, grads, made.params)
        updates, opt_state = adam.update(grads, opt_state)
        return base.Variables(
          optax.apply_updates(made.params, updates), stats
        ), opt_state

      for i in range(2):
        made, opt_state = step(made, opt_state, z[i], labels[i])
      chex.assert_trees_all_close(got_made, made, atol=1e-8)
      draw = jax.jit(GENERATOR.apply)
      images = [draw(made, z[i], labels[i])[0] for i in (2, 3)]
      want = self.student_steps(
        student,
        teachers,
        images,
        lambda logits: sum(map(jax.nn.softmax, logits)) / 2,
      )
      chex.assert_trees_all_close(got, want, atol=1e-8)

  def test_public_images(self):
    with enable_x64(True):
      received, student = self.received(), MODEL.init(KEY)
      received = received._replace(stacked=received.stacked[0])
      method = fed_df.fed_df_public(
        MODEL, fed_df.Options(**DF, ensemble=distillation.mean_of_logits)
      )
      got, _, _ = jax.jit(lambda v: method.update(v, (), received, KEY))(
        student
      )
      teachers = [
        jax.tree.map(lambda a, k=k: a[k], received.stacked) for k in (0, 2)
      ]
      images = [
        received.public[
          jax.random.randint(jax.random.fold_in(KEY, i), (6,), 0, 9)
        ]
        for i in range(2)
      ]
      want = self.student_steps(
        student,
        teachers,
        images,
        lambda logits: jax.nn.softmax(sum(logits) / 2),
      )
      chex.assert_trees_all_close(got, want, atol=1e-8)


class BatchNormPolicyTest(absltest.TestCase):
  """The effect of each policy on the running statistics."""

  NET = problems.NORMED

  def rounds(self, policy, ids):
    method = recipes.build(
      'fed_avg',
      recipes.Settings(self.NET, CLASSES),
      *batch_norm.policy_parts(policy, self.NET, 4),
    )
    fed = problems.make(self.NET, method)
    states = [fed.init(KEY)]
    for row in ids:
      states.append(
        fed.round(states[-1], problems.DATA, problems.row(row), KEY)[0]
      )
    return states

  def test_local_begins_with_its_own(self):
    """A client that returns starts where it stopped, not at the mean."""
    part = batch_norm.local_stats()
    _, own = part.init(KEY, base.Variables((), jnp.zeros(2)))
    view = base.View(*[None] * 10)._replace(
      variables=base.Variables((), jnp.full(2, 5.0)), own=own
    )
    first = part.start(view, KEY)
    np.testing.assert_array_equal(
      first.stats, [5.0, 5.0]
    )  # it has no statistics of its own yet
    local = base.Local(base.Variables((), jnp.full(2, 7.0)), 1, 1.0, {})
    own, message = part.upload(view, local, None, KEY)
    self.assertEqual(message, ())
    second = part.start(view._replace(own=own), KEY)
    np.testing.assert_array_equal(second.stats, [7.0, 7.0])

  def test_local_in_rounds(self):
    """Slots differ between clients and stay while others train."""
    _, one, two = self.rounds('local', [[1, 4], [1, 3]])
    *_, (stats, seen) = one.clients[0]
    *_, (later, _) = two.clients[0]
    np.testing.assert_array_equal(seen, [False, True, False, False, True])
    for a, b in zip(jax.tree.leaves(stats), jax.tree.leaves(later)):
      self.assertFalse(np.array_equal(a[1], a[4]))
      self.assertFalse(np.array_equal(a[1], b[1]))
      np.testing.assert_array_equal(a[4], b[4])

  def test_aggregate_is_the_weighted_mean(self):
    """Clients 1 (12 examples) and 3 (5) train each alone and together."""
    both = self.rounds('aggregate', [[1, 3]])[1].variables.stats
    one, three = (
      self.rounds('aggregate', [[k, -1]])[1].variables.stats for k in (1, 3)
    )
    want = jax.tree.map(lambda a, b: (12 * a + 5 * b) / 17, one, three)
    chex.assert_trees_all_close(both, want, atol=1e-6)

  def test_reset_estimates_from_the_client_s_data(self):
    """Client 1 has 3 batches of 4 images; the estimate is their mean."""
    part = batch_norm.reset_stats(self.NET, 4)
    variables = self.NET.init(KEY)
    rows = problems.DATA.index[1]
    view = base.View(*[None] * 10)._replace(
      variables=variables._replace(
        stats=jax.tree.map(lambda a: a + 3.0, variables.stats)
      ),  # must have no effect
      data=problems.DATA._replace(index=rows, count=jnp.int32(12)),
    )
    got = jax.jit(lambda view: part.start(view, KEY))(view).stats
    apply = jax.jit(self.NET.apply, static_argnames='train')
    moved = [
      apply(variables, problems.DATA.x[rows[i : i + 4]], train=True).stats
      for i in (0, 4, 8)
    ]
    want = jax.tree.map(
      lambda old, *new: old + sum(n - old for n in new) / 3 / 0.1,
      variables.stats,
      *moved,
    )
    chex.assert_trees_all_close(got, want, atol=1e-4)

  def test_reset_ignores_padding(self):
    """Covers a partial last batch, and a client without examples."""
    part = batch_norm.reset_stats(self.NET, 5)
    variables = self.NET.init(KEY)
    view = base.View(*[None] * 10)._replace(
      variables=variables,
      data=problems.DATA._replace(
        index=problems.DATA.index[0], count=jnp.int32(7)
      ),
    )
    short = view._replace(data=view.data._replace(index=view.data.index[:7]))
    start = jax.jit(lambda view: part.start(view, KEY))
    chex.assert_trees_all_close(start(view), start(short), atol=1e-5)
    nobody = view._replace(data=view.data._replace(count=jnp.int32(0)))
    chex.assert_trees_all_equal(start(nobody), variables)

  def test_evaluation_with_each_client_s_statistics(self):
    _, state = self.rounds('local', [[0, 1, 2, 3, 4]])
    *_, (stats, _) = jax.device_get(state.clients[0])
    structure = jax.tree.structure(stats)
    fed = problems.make(
      self.NET, base.chain(fed_avg.fed_avg(), batch_norm.local_stats())
    )
    got = evaluation.evaluate_clients(
      fed, state, problems.DATA, problems.DATA, KEY
    )['broadcast']
    apply = jax.jit(self.NET.apply)
    for k, own in enumerate(zip(*jax.tree.leaves(stats))):
      rows = np.asarray(problems.DATA.index[k])[: int(problems.DATA.count[k])]
      variables = state.variables._replace(
        stats=jax.tree.unflatten(structure, own)
      )
      logits = np.asarray(apply(variables, problems.DATA.x).logits)[rows]
      np.testing.assert_allclose(
        got['accuracy'][k],
        np.mean(np.argmax(logits, -1) == np.asarray(problems.DATA.y)[rows]),
        rtol=1e-6,
      )

  def test_evaluation_with_batch_statistics(self):
    """The running statistics have no effect."""
    variables = self.NET.init(KEY)
    other = variables._replace(
      stats=jax.tree.map(lambda a: a + 9.0, variables.stats)
    )
    x, y = problems.DATA.x, problems.DATA.y
    a, b = (
      evaluation.evaluate(self.NET, v, x, y, 16, True)
      for v in (variables, other)
    )
    chex.assert_trees_all_close(a, b, rtol=1e-6)


if __name__ == '__main__':
  absltest.main()
