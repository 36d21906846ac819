"""Reproduces numbers of the official PyTorch code.

`golden/fedftg.npz` holds inputs and what the official code computed from them,
in PyTorch's layouts: images NCHW, convolutions OIHW, linear weights (out, in).
"""

import functools
import pathlib

from absl.testing import absltest, parameterized
import chex
import jax
from jax import enable_x64
import jax.numpy as jnp
import numpy as np
import optax

from fedftg_jax import (
  base,
  distillation,
  evaluation,
  federation,
  losses,
  models,
  second_order,
  solvers,
)
from fedftg_jax.data import clients, partition, schedules
from fedftg_jax.methods import (
  fed_align,
  fed_avg,
  fed_dyn,
  fed_ftg,
  fed_gen,
  fed_mr,
  fed_prox,
  fed_zda,
  moon,
  scaffold,
)
from fedftg_jax.models import classifiers, layers

_FILE = np.load(pathlib.Path(__file__).parent / 'golden' / 'fedftg.npz')


def golden(prefix):
  """Returns all arrays under `prefix/`, by the rest of their names."""
  return {
    k[len(prefix) + 1 :]: _FILE[k]
    for k in _FILE.files
    if k.startswith(prefix + '/')
  }


_KD = np.load(pathlib.Path(__file__).parent / 'golden' / 'kd.npz')
_GEN = np.load(pathlib.Path(__file__).parent / 'golden' / 'fedgen.npz')
_ZOO = np.load(pathlib.Path(__file__).parent / 'golden' / 'zoo.npz')


def images(x):
  """Converts NCHW to NHWC."""
  return jnp.asarray(np.moveaxis(x, 1, -1))


def linear_model():
  """Builds softmax regression on channel-major pixels, parameters (out, in)."""

  def apply(variables, x, mask=None, train=False):
    del mask, train
    flat = jnp.moveaxis(x, -1, 1).reshape(len(x), -1) if x.ndim == 4 else x
    logits = flat @ variables.params['W'].T + variables.params['b']
    return base.Output(logits, flat, {})

  return base.Model(lambda key: None, apply)


def linear(weight, bias):
  return base.Variables(
    {'W': jnp.asarray(weight, float), 'b': jnp.asarray(bias, float)}, {}
  )


def generator_variables(tree, width, size):
  """Converts the official generator's state_dict to our variables."""

  def channel_last(a):  # rows are (width, size, size), ours (size, size, width)
    return np.moveaxis(a.reshape(width, size, size, -1), 0, 2).reshape(
      a.shape[0], -1
    )

  conv = lambda name: {
    'kernel': tree[name + '.weight'].transpose(2, 3, 1, 0),
    'bias': tree[name + '.bias'],
  }
  affine = lambda name: {
    'scale': tree[name + '.weight'],
    'bias': tree[name + '.bias'],
  }
  dense = lambda name: {
    'linear': {
      'kernel': channel_last(tree[name + '.weight']).T,
      'bias': channel_last(tree[name + '.bias'])[:, 0],
    }
  }
  stats = lambda name: {
    'mean': tree[name + '.running_mean'],
    'var': tree[name + '.running_var'],
  }
  norms = {
    'norm0': 'conv_blocks0.0',
    'norm1': 'conv_blocks1.1',
    'norm2': 'conv_blocks2.1',
  }
  params = {
    'from_noise': dense('l1.0'),
    'from_label': dense('l2.0'),
    'conv1': conv('conv_blocks1.0'),
    'conv2': conv('conv_blocks2.0'),
    'conv3': conv('conv_blocks2.3'),
    **{ours: affine(theirs) for ours, theirs in norms.items()},
  }
  norms['norm3'] = 'conv_blocks2.5'
  return jax.tree.map(
    jnp.asarray,
    base.Variables(
      params, {ours: stats(theirs) for ours, theirs in norms.items()}
    ),
  )


class LossesTest(parameterized.TestCase):
  @parameterized.parameters('a', 'a2')
  def test_diversity(self, prefix):
    with enable_x64(True):
      g = golden(prefix)
      z, fake = jnp.asarray(g['z'], float), jnp.asarray(g['fake'], float)
      loss, grad = jax.jit(jax.value_and_grad(losses.diversity, 1))(z, fake)
      np.testing.assert_allclose(loss, g['loss'], rtol=1e-10)
      if prefix == 'a':
        np.testing.assert_allclose(grad, g['grad_fake'], atol=1e-10)

  def test_generator_loss(self):
    with enable_x64(True):
      g = golden('b')
      z, fake, student, teacher, alpha = (
        jnp.asarray(g[k], float)
        for k in ('z', 'fake', 's_logit', 't_logit', 'weight')
      )

      @functools.partial(jax.jit, static_argnames='fidelity')
      def terms(fake, student, teacher, fidelity=fed_ftg.mean_times_mean):
        ce = optax.softmax_cross_entropy_with_integer_labels(
          teacher, jnp.asarray(g['labels'])
        )
        md = -jnp.mean(fed_ftg.l1(student, teacher) * alpha)
        return md, fidelity(ce, alpha), losses.diversity(z, fake)

      md, cls, dis = terms(fake, student, teacher)
      np.testing.assert_allclose(md, g['loss_md'], rtol=1e-10)
      np.testing.assert_allclose(cls, g['loss_cls'], rtol=1e-10)
      np.testing.assert_allclose(dis, g['loss_ap'], rtol=1e-10)

      @jax.jit
      def total(*leaves):
        md, cls, dis = terms(*leaves)
        return md + cls + dis / g['num_clients']

      np.testing.assert_allclose(
        total(fake, student, teacher), g['loss'], rtol=1e-10
      )
      grads = jax.jit(jax.grad(total, (0, 1, 2)))(fake, student, teacher)
      for grad, name in zip(grads, ('fake', 's_logit', 't_logit')):
        np.testing.assert_allclose(grad, g['grad_' + name], atol=1e-10)

      per_sample = lambda t: terms(fake, student, t, fed_ftg.per_sample)[1]
      np.testing.assert_allclose(
        per_sample(teacher), g['alt_loss_cls_persample'], rtol=1e-10
      )
      np.testing.assert_allclose(
        jax.jit(jax.grad(per_sample))(teacher),
        g['alt_grad_t_logit_persample'],
        atol=1e-10,
      )

  def test_generator_loss_through_the_classifiers(self):
    with enable_x64(True):
      g, b = golden('b2'), golden('b')
      model = linear_model()
      z, alpha = (jnp.asarray(b[k], float) for k in ('z', 'weight'))

      student, teacher = (linear(g['W' + k], g['b' + k]) for k in 'st')
      # A generator whose parameters are its images.
      generator = base.Generator(
        None, lambda made, z, labels, train: (made.params, ()), z.shape[1]
      )

      def total(fake):
        return fed_ftg.generator_loss(
          model,
          generator,
          fed_ftg.CODE,
          student,
          jax.tree.map(lambda a: a[None], teacher),
          alpha[None],
          1 / b['num_clients'],
          z,
          jnp.asarray(b['labels']),
          fake,
          (),
        )

      (loss, (_, parts)), grad = jax.jit(
        jax.value_and_grad(total, has_aux=True)
      )(images(b['fake']).astype(float))
      np.testing.assert_allclose(loss, g['loss'], rtol=1e-10)
      for part, name in (('md', 'md'), ('cls', 'cls'), ('dis', 'ap')):
        np.testing.assert_allclose(
          parts[part][0], g['loss_' + name], rtol=1e-10
        )
      np.testing.assert_allclose(
        np.moveaxis(grad, -1, 1), g['grad_fake'], atol=1e-10
      )

  def test_class_weights(self):
    g = golden('c')
    alpha = fed_ftg.class_weights(
      jnp.asarray(g['counts']), jnp.ones(len(g['counts']), bool)
    )
    np.testing.assert_allclose(alpha.T, g['cls_clnt_weight'], atol=1e-6)
    np.testing.assert_allclose(
      alpha[:, g['labels']].T, g['batch_weight'], atol=1e-6
    )

  def test_label_quotas(self):
    g = golden('c')
    for counts, prefix in (
      (g['counts'].sum(0), 'gl'),
      (g['gl2_cls_num'], 'gl2'),
    ):
      labels = distillation.quota_labels(
        jax.random.key(0),
        jnp.asarray(counts, jnp.int32),
        int(g[prefix + '_number']),
      )
      np.testing.assert_array_equal(
        np.bincount(labels, minlength=4), g[prefix + '_counts_per_class']
      )
    self.assertCountEqual(
      distillation.quota_labels(
        jax.random.key(1),
        jnp.asarray(g['counts'].sum(0), jnp.int32),
        int(g['gl_number']),
      ).tolist(),
      g['gl_labels_seed3'].tolist(),
    )

  def test_student_loss(self):
    with enable_x64(True):
      g = golden('d')
      counts = jnp.asarray(g['counts'])
      alpha = fed_ftg.class_weights(counts, jnp.ones(len(counts), bool))
      target = distillation.mean_of_probabilities(
        jnp.asarray(g['t_logits'], float), alpha[:, g['labels']]
      )
      np.testing.assert_allclose(target, g['t_merge'], atol=1e-10)
      loss, grad = jax.jit(jax.value_and_grad(fed_ftg.over_classes))(
        jnp.asarray(g['s_logit'], float), target
      )
      np.testing.assert_allclose(loss, g['loss'], rtol=1e-10)
      np.testing.assert_allclose(grad, g['grad_s_logit'], atol=1e-10)


class GeneratorTest(absltest.TestCase):
  def test_forward_and_statistics(self):
    with enable_x64(True):
      g = golden('e')
      noise, width, channels, size, num_classes = map(
        int, g['cfg_nz_ngf_nc_img_ncls']
      )
      generator = models.image_generator(
        (size, size, channels), num_classes, noise_dim=noise, width=width
      )
      tree = {
        k[len('param/') :]: v for k, v in g.items() if k.startswith('param/')
      }
      variables = generator_variables(tree, width, size // 4)
      z, labels = jnp.asarray(g['z'], float), jnp.asarray(g['labels'])
      apply = jax.jit(generator.apply, static_argnames='train')
      out, stats = apply(variables, z, labels)
      np.testing.assert_allclose(out, images(g['out_eval']), atol=1e-10)
      chex.assert_trees_all_equal(stats, variables.stats)
      out, stats = apply(variables, z, labels, train=True)
      np.testing.assert_allclose(out, images(g['out_train']), atol=1e-10)
      after = {
        k[len('after_train_fwd/') :]: v
        for k, v in g.items()
        if k.startswith('after_train_fwd/')
      }
      want = generator_variables({**tree, **after}, width, size // 4).stats
      chex.assert_trees_all_close(stats, want, atol=1e-10)


def local_problem():
  """Returns the linear problem that the local-training arrays share."""
  g = golden('ghij')
  data = clients.from_partition(g['X'], g['Y'], [np.arange(len(g['Y']))])
  return data, linear(g['W_start'], g['b_start'])


def flat(vector):
  """Flattens parameters of the linear problem to [W.ravel(), b]."""
  return {
    'W': jnp.asarray(vector[:15], float).reshape(3, 5),
    'b': jnp.asarray(vector[15:], float),
  }


def start_at(variables):
  """Makes a part with which clients start from other variables."""
  return base.Method(start=lambda view, key: variables)


class NotTrueTest(parameterized.TestCase):
  """FedNTD's official loss, and the loss of all classes derived from it."""

  @parameterized.parameters(
    (1.0, 1.0, 4.8874500887), (3.0, 1.0, 5.9730347153), (2.0, 0.5, 4.3804273736)
  )
  def test_losses(self, tau, beta, want):
    with enable_x64(True):
      own, teacher, labels = (
        jnp.asarray(_KD[f'ntd/{name}'])
        for name in ('logits', 'global_logits', 'targets')
      )
      cross_entropy = losses.cross_entropy(own, labels)
      not_true = losses.not_true_divergence(own, teacher, labels, tau)
      total = cross_entropy + beta * jnp.mean(not_true)
      np.testing.assert_allclose(total, want, atol=1e-9)
      # A constant added to the true class changes nothing. With two classes
      # there is no pair left to compare.
      shifted = own + 7 * jax.nn.one_hot(labels, 10)
      np.testing.assert_allclose(
        losses.not_true_divergence(shifted, teacher, labels, tau),
        not_true,
        atol=1e-12,
      )
      two = losses.not_true_divergence(
        own[:, :2], teacher[:, :2], labels % 2, tau
      )
      np.testing.assert_allclose(two, 0, atol=1e-12)
      # KL = KL of (own class, others) + (1 - q_y) KL of the others.
      p, q = (
        jax.nn.softmax(a / tau)[jnp.arange(6), labels] for a in (own, teacher)
      )
      of_two = q * jnp.log(q / p) + (1 - q) * jnp.log((1 - q) / (1 - p))
      np.testing.assert_allclose(
        losses.tempered_divergence(own, teacher, tau),
        tau**2 * of_two + (1 - q) * not_true,
        atol=1e-10,
      )

  def test_gradients(self):
    with enable_x64(True):
      own, teacher, labels = (
        jnp.asarray(_KD[f'ntd/{name}'])
        for name in ('logits', 'global_logits', 'targets')
      )
      got = jax.grad(
        lambda own: jnp.mean(
          losses.not_true_divergence(own, teacher, labels, 1.0)
        )
      )(own)
      np.testing.assert_allclose(got, _KD['ntd/t1b1/ntd_only_grad'], atol=1e-10)
      np.testing.assert_array_equal(got[jnp.arange(6), labels], 0)
      got = jax.grad(
        lambda own: jnp.mean(losses.tempered_divergence(own, teacher, 1.0))
      )(own)
      np.testing.assert_allclose(
        got, _KD['ntd/t1b1/lsd_kl_grad_derived'], atol=1e-10
      )


def feature_generator(prefix):
  """Converts a state_dict under `prefix` to FedGen's generator.

  Returns (params, stats).
  """
  get = lambda name: jnp.asarray(_GEN[f'fedgen/{prefix}/{name}'], float)
  stats = {}
  if f'fedgen/{prefix}/fc_layers.1.running_mean' in _GEN.files:
    stats = {
      'norm0': {
        'mean': get('fc_layers.1.running_mean'),
        'var': get('fc_layers.1.running_var'),
      }
    }
  params = {
    'dense0': linear_layer(get, 'fc_layers.0'),
    'norm0': {
      'scale': get('fc_layers.1.weight'),
      'bias': get('fc_layers.1.bias'),
    },
    'dense1': linear_layer(get, 'representation_layer'),
  }
  return base.Variables(params, stats)


def fedgen_net(prefix):
  """Converts a state_dict under `prefix` to the official client's network."""
  get = lambda name: jnp.asarray(_GEN[f'fedgen/{prefix}/{name}'], float)
  params, stats = {}, {}
  for i, conv, norm in ((0, 0, 1), (1, 4, 5)):
    params[f'conv{i}'] = {
      'kernel': jnp.transpose(get(f'layers.{conv}.weight'), (2, 3, 1, 0)),
      'bias': get(f'layers.{conv}.bias'),
    }
    params[f'norm{i}'] = {
      'batch': {
        'scale': get(f'layers.{norm}.weight'),
        'bias': get(f'layers.{norm}.bias'),
      }
    }
    stats[f'norm{i}'] = {
      'batch': {
        'mean': get(f'layers.{norm}.running_mean'),
        'var': get(f'layers.{norm}.running_var'),
      }
    }
  # Our features are (2, 2, 16) with channels last, theirs (16, 2, 2).
  first = linear_layer(get, 'layers.9')
  kernel = first['linear']['kernel'].reshape(16, 2, 2, 32)
  first['linear']['kernel'] = jnp.moveaxis(kernel, 0, 2).reshape(64, 32)
  params |= {'dense0': first, 'head': linear_layer(get, 'layers.10')}
  return base.Variables(params, stats)


def linear_layer(get, name):
  return {
    'linear': {'kernel': get(f'{name}.weight').T, 'bias': get(f'{name}.bias')}
  }


class FedGenTest(parameterized.TestCase):
  """The official server and client steps.

  The arrays are those of its float32 run, and gradients derived in float64.
  """

  HEAD = base.Head(
    lambda variables: variables.params,
    lambda params, x: x @ params['kernel'] + params['bias'],
  )

  def heads(self, *names):
    return jax.tree.map(
      lambda *a: jnp.stack(a),
      *[
        {
          'kernel': jnp.asarray(_GEN[f'fedgen/gen/{name}_W'].T, float),
          'bias': jnp.asarray(_GEN[f'fedgen/gen/{name}_b'], float),
        }
        for name in names
      ],
    )

  @parameterized.parameters('official', 'intended')
  def test_server_steps(self, weighting):
    with enable_x64(True):
      generator = models.feature_generator(32, 10, hidden=64, noise_dim=16)
      terms = fed_gen.Terms(weighting)
      made = feature_generator('gen/init')
      slot = fed_gen.new_slot(made, terms)
      heads = self.heads('user0', 'user1', 'user2')
      counts = jnp.asarray(_GEN['fedgen/gen/label_counts'])
      alpha = fed_gen.label_weights(counts)  # [K, C]
      np.testing.assert_allclose(
        alpha.T, _GEN['fedgen/gen/label_weights'], atol=1e-12
      )
      student = jax.tree.map(lambda a: a[0], self.heads('global'))
      for i, (z, y) in enumerate(
        zip(_GEN['fedgen/gen/eps'], _GEN['fedgen/gen/y'])
      ):
        before = slot
        slot, values = fed_gen.generator_step(
          generator,
          self.HEAD,
          terms,
          slot,
          heads,
          alpha[:, y],
          student,
          jnp.asarray(z, float),
          jnp.asarray(y),
          3e-4,
        )
        if weighting == 'official' or not i:
          np.testing.assert_allclose(
            values['teacher'],
            _GEN[f'fedgen/gen/teacher_loss_{weighting}'][i],
            rtol=1e-6,
          )
          np.testing.assert_allclose(
            values['diversity'], _GEN['fedgen/gen/diversity'][i], rtol=1e-6
          )
        if not i:  # The first moment is .1 of gradient and decay.
          total = values['teacher'] + values['diversity']
          np.testing.assert_allclose(
            total, _GEN[f'fedgen/gen/derived_{weighting}_loss0'], rtol=1e-10
          )
          want = feature_generator(f'gen/derived_{weighting}_grad0').params
          gradient = jax.tree.map(
            lambda m, p: m / 0.1 - 1e-2 * p,
            slot.moments[1].mu,
            before.generator.params,
          )
          chex.assert_trees_all_close(gradient, want, atol=1e-9)
      if weighting == 'official':
        chex.assert_trees_all_close(
          slot.generator, feature_generator('gen/after2'), rtol=1e-5, atol=1e-6
        )

  def test_student_term(self):
    """The released code's KL is a mean over batch and classes."""
    get = lambda name: jnp.asarray(_GEN[f'fedgen/student/{name}'])
    student = jax.tree.map(lambda a: a[0], self.heads('global'))
    divergence = losses.kl_divergence(
      get('teacher_logit'), self.HEAD.apply(student, get('z'))
    )
    np.testing.assert_allclose(
      jnp.mean(divergence), get('kl_batchmean'), rtol=1e-5
    )
    np.testing.assert_allclose(
      fed_gen.student_gap(
        get('teacher_logit'), self.HEAD.apply(student, get('z'))
      ),
      get('kl_elementwise_mean_as_in_code'),
      rtol=1e-5,
    )

  def test_diversity(self):
    with enable_x64(True):
      noise, output = (
        jnp.asarray(_GEN[f'fedgen/div/{name}']) for name in ('noise', 'output')
      )
      value, gradient = jax.value_and_grad(losses.diversity, 1)(noise, output)
      np.testing.assert_allclose(value, _GEN['fedgen/div/l1_loss'], atol=1e-12)
      np.testing.assert_allclose(
        gradient, _GEN['fedgen/div/l1_grad'], atol=1e-12
      )

  def test_client_step(self):
    """One SGD step of the official client, whose network has max pooling."""
    with enable_x64(True):
      get = lambda name: jnp.asarray(_GEN[f'fedgen/client/{name}'], float)
      model = models.from_flax(
        classifiers.FedGenCNN(
          10, options=layers.Variant('batch', 'im2col'), pool=True
        ),
        (28, 28, 1),
      )
      z, z_kl = get('eps')[::-1]
      y, drawn = (
        jnp.asarray(_GEN[f'fedgen/client/{name}'])
        for name in ('y', 'sampled_y')
      )
      x = jnp.moveaxis(get('X'), 1, -1)
      generator = models.feature_generator(32, 10, hidden=64, noise_dim=16)
      made = feature_generator('client/gen')
      generate = lambda z, labels: generator.apply(made, z, labels)[0]

      def loss(params, stats):
        output = model.apply(base.Variables(params, stats), x, train=True)
        terms = fed_gen.client_terms(
          model.head,
          base.Variables(params, stats),
          output.logits,
          jnp.ones(8, bool),
          (generate(z, drawn), generate(z_kl, y)),
          drawn,
        )
        ce = losses.cross_entropy(output.logits, y)
        total = ce + jnp.dot(get('alpha_beta_decayed'), jnp.stack(terms))
        return total, (ce, terms, output.stats)

      before = fedgen_net('client/init')
      gradient, (ce, terms, stats) = jax.grad(loss, has_aux=True)(*before)
      np.testing.assert_allclose(ce, get('predictive_loss'), rtol=1e-6)
      np.testing.assert_allclose(
        terms,
        (get('teacher_nll_unscaled'), get('latent_kl_unscaled')),
        rtol=1e-5,
      )
      params = jax.tree.map(lambda p, g: p - 0.01 * g, before.params, gradient)
      chex.assert_trees_all_close(
        base.Variables(params, stats),
        fedgen_net('client/after'),
        rtol=1e-5,
        atol=1e-6,
      )


class AlignmentTest(absltest.TestCase):
  """FedAlign's official singular values and term, in float64."""

  def test_term_and_gradient(self):
    with enable_x64(True):
      get = lambda name: _ZOO[f'fedalign/{name}']
      slim, full = (
        [images(get(f'{which}_feat_{end}')) for end in ('in', 'out')]
        for which in 's t'.split()
      )
      sigma = lambda *ends: fed_align.spectral_norm(
        fed_align.transmitting_matrix(*ends)
      )
      for which, ends in (('s', slim), ('t', full)):
        np.testing.assert_allclose(
          fed_align.transmitting_matrix(*ends), get(f'fsp_{which}'), atol=1e-14
        )
        found, exact = sigma(*ends), get(f'exact_sigma_max_{which}')
        np.testing.assert_allclose(
          found, get(f'top_{which}').ravel(), atol=1e-14
        )
        np.testing.assert_allclose(found, exact, rtol=1e-3)
        self.assertTrue((found <= exact + 1e-15).all())
      mu, cross_entropy = get('mu_ce')
      target = sigma(*full)
      gap = lambda end: jnp.mean((sigma(slim[0], end) - target) ** 2)
      term = lambda end: fed_align.alignment(
        sigma(slim[0], end), target, mu * cross_entropy
      )
      for function, value, gradient in (
        (gap, 'mse', 'grad_s_feat_out_of_mse'),
        (term, 'scaled_loss_value', 'grad_scaled'),
      ):
        found, slope = jax.value_and_grad(function)(slim[1])
        np.testing.assert_allclose(found, get(value), rtol=1e-12)
        np.testing.assert_allclose(slope, images(get(gradient)), atol=1e-12)


class CurvatureTest(absltest.TestCase):
  """Softmax regression, whose Hessian is known, in float64."""

  def test_hessian(self):
    with enable_x64(True):
      get = lambda name: _ZOO[f'hess/{name}']
      variables = linear(get('W'), get('b'))
      data = base.Data(
        jnp.asarray(get('x')),
        jnp.asarray(get('y')),
        jnp.arange(12),
        jnp.int32(12),
      )
      product = second_order.hessian_product(linear_model(), variables, data, 5)
      units = jnp.eye(15)
      columns = jax.vmap(product)(
        {'W': units[:, :12].reshape(15, 3, 4), 'b': units[:, 12:]}
      )
      matrix = jnp.concatenate(
        [columns['W'].reshape(15, 12), columns['b']], axis=1
      )
      np.testing.assert_allclose(matrix, get('exact_H'), atol=1e-13)
      key, params = jax.random.key(0), variables.params
      top = second_order.top_eigenvalue(
        product, params, key, iterations=500, tolerance=1e-15
      )
      eigenvalues = get('exact_eigs')
      np.testing.assert_allclose(top.value, eigenvalues[-1], rtol=1e-12)
      rough = second_order.top_eigenvalue(product, params, key)
      np.testing.assert_allclose(rough.value, eigenvalues[-1], rtol=1e-2)
      self.assertLess(rough.iterations, 50)
      found = second_order.traces(product, params, key, 400)
      exact = dict(zip('Wb', get('exact_trace_per_tensor')))
      for name, want in exact.items():
        np.testing.assert_allclose(found.per_tensor[name], want, rtol=0.1)
      self.assertLess(abs(found.total - get('exact_trace')), 4 * found.error)
      self.assertBetween(found.error, 0, 0.1)

  def test_across_clients(self):
    with enable_x64(True):
      vectors = _ZOO['hess/client_diag']
      found = second_order.across_clients(jnp.asarray(vectors))
      for name in ('H_N', 'H_D'):
        np.testing.assert_allclose(
          found[name], _ZOO[f'hess/{name}'], rtol=1e-12
        )


class StatisticsGapTest(absltest.TestCase):
  """The gaps that Fed-ZDA minimises, derived from its formulas, in float64."""

  def test_values_and_gradient(self):
    with enable_x64(True):
      get = lambda name: jnp.asarray(_ZOO[f'zda/{name}'])
      stats = {'mean': get('run_mean'), 'var': get('run_var')}

      def gap(x, name):
        axes = 0, 2, 3
        moments = {'mean': x.mean(axes), 'var': x.var(axes)}
        return fed_zda.statistics_gap(moments, stats, fed_zda.GAPS[name])

      x = get('feat')
      for name, want in (
        ('l2', 'bns_l2_mean_std'),
        ('kl', 'bns_kl_batch_to_running'),
      ):
        np.testing.assert_allclose(gap(x, name), get(want), rtol=1e-12)
      np.testing.assert_allclose(
        jax.grad(gap)(x, 'kl'), get('bns_kl_grad'), atol=1e-12
      )


class RecombinationTest(absltest.TestCase):
  def test_official_permutations(self):
    names = [
      f'{layer}.{kind}'
      for layer in ('conv', 'fc1', 'fc2')
      for kind in ('weight', 'bias')
    ]
    models = {name: _KD[f'fedmr/in/{name}'] for name in names}
    orders = dict(zip(names, _KD['fedmr/perm_official_per_key_seed7']))
    got = fed_mr.recombine(models, orders)
    chex.assert_trees_all_equal(
      got, {name: _KD[f'fedmr/out/{name}'] for name in names}
    )
    spread = lambda models: sum(
      np.sum((a - a.mean(0)) ** 2) for a in models.values()
    )
    for some in (models, got):
      np.testing.assert_allclose(spread(some), 231.0934787, atol=1e-6)

  def test_what_goes_by_one_permutation(self):
    variables = jax.eval_shape(
      models.build('resnet20', (8, 8, 1), 3).init, jax.random.key(0)
    )
    key = jax.random.key(1)
    draw = lambda **kwargs: fed_mr.permutations(key, variables, 6, **kwargs)
    different = lambda tree: len(
      {tuple(a.tolist()) for a in jax.tree.leaves(tree)}
    )
    num = len(jax.tree.leaves(variables))
    self.assertGreater(different(draw()), 0.8 * num)
    self.assertEqual(different(draw(segment=1.0)), 1)
    half = jax.tree.leaves(draw(segment=0.5))
    self.assertEqual(different(half), 2)
    np.testing.assert_array_equal(half[0], half[num // 2 - 1])
    by_module = draw(unit='module')
    block = (
      by_module.params['block1_0']['conv1'],
      by_module.stats['block1_0']['conv1'],
    )
    self.assertEqual(different(block), 1)
    self.assertBetween(different(by_module), 18, 23)  # 22 layers with weights
    lenet = jax.eval_shape(
      models.build('lenet', (8, 8, 1), 3, norm='batch').init, jax.random.key(0)
    )
    self.assertEqual(different(fed_mr.permutations(key, lenet, 6, 'module')), 4)
    # Each model gets to each position equally often.
    first = np.array(
      [
        fed_mr.permutations(jax.random.fold_in(key, i), (0.0,), 3)[0]
        for i in range(300)
      ]
    )
    for place in range(3):
      counts = np.bincount(first[:, place], minlength=3)
      self.assertLess(np.sum((counts - 100.0) ** 2 / 100), 13.8)  # p = .001


class LocalTrainingTest(parameterized.TestCase):
  """One client trains from a given start, with given slots."""

  def check(
    self,
    settings,
    steps,
    want,
    part=base.Method(),
    received=None,
    shared=(),
    own=(),
  ):
    data, start = local_problem()
    part = part._replace(update=base.Method().update)  # local training alone
    fed = federation.federation(
      linear_model(),
      base.chain(start_at(start), fed_avg.fed_avg(), part),
      solvers.local_sgd(
        float(settings['lr']),
        batch_size=50,
        steps=int(steps),
        weight_decay=float(settings['weight_decay']),
        clip_norm=10.0,
      ),
      1,
    )
    own = jax.tree.map(lambda a: a[None], own)
    state = base.State(
      received or start, ((), (), shared), (((), (), own), ()), jnp.int32(0)
    )
    state, _ = federation.run(
      fed,
      state,
      data,
      schedules.from_ids(np.zeros((1, 1), int), 1),
      jax.random.key(0),
    )
    chex.assert_trees_all_close(state.variables, linear(*want), atol=1e-9)

  def test_fed_avg(self):
    with enable_x64(True):
      g = golden('avg')
      self.check(g, g['steps'], (g['W_end'], g['b_end']))

  @parameterized.parameters(('prox', False), ('ftg', True))
  def test_fed_prox(self, prefix, to_zero):
    with enable_x64(True):
      g = golden('j')
      self.check(
        g,
        g['steps'],
        (g[prefix + '_W_end'], g[prefix + '_b_end']),
        fed_prox.fed_prox(float(g['mu']), to_zero),
        linear(g['W_ref'], g['b_ref']),
      )

  def test_fed_dyn(self):
    with enable_x64(True):
      g = golden('g')
      zero = jax.tree.map(jnp.zeros_like, flat(g['hist']))
      self.check(
        g,
        g['steps'],
        (g['W_end'], g['b_end']),
        fed_dyn.fed_dyn(float(g['alpha'])),
        linear(g['W_ref'], g['b_ref']),
        zero,
        flat(g['hist']),
      )

  @parameterized.parameters('h', 'h_clip')
  def test_scaffold(self, prefix):
    with enable_x64(True):
      g = golden(prefix)
      server = flat(g['c_minus_ci'])
      zero = jax.tree.map(jnp.zeros_like, server)
      self.check(
        g,
        g['n_minibatch'],
        (g['W_end'], g['b_end']),
        scaffold.scaffold(),
        shared=(server, ()),
        own=zero,
      )

  def test_moon_loss(self):
    with enable_x64(True):
      g = {k: jnp.asarray(v) for k, v in golden('i').items()}
      features, near, far, logits = (
        g[k].astype(float)
        for k in ('embed_cur', 'embed_glb', 'embed_old', 'logits')
      )

      def loss(features, logits, seen=True):
        model = base.Model(None, lambda v, x: base.Output(None, v, ()))
        part = moon.moon(model, float(g['mu']), float(g['tau']))
        view = base.View(*[None] * 10)._replace(
          received=near, own=(far, jnp.bool_(seen))
        )
        batch = base.Batch(None, g['labels'], jnp.ones(len(logits), bool))
        con = part.penalty(
          None, base.Output(None, features, ()), batch, view, None
        )
        return losses.cross_entropy(logits, g['labels']) + con, con

      (total, con), grads = jax.jit(
        jax.value_and_grad(loss, (0, 1), has_aux=True)
      )(features, logits)
      np.testing.assert_allclose(con, g['loss_con_with_mu'], rtol=1e-9)
      np.testing.assert_allclose(total - con, g['loss_ce'], rtol=1e-9)
      np.testing.assert_allclose(grads[0], g['grad_embed_cur'], atol=1e-9)
      np.testing.assert_allclose(grads[1], g['grad_logits'], atol=1e-9)
      first = jax.jit(jax.grad(lambda f: loss(f, logits, seen=False)[0]))(
        features
      )
      np.testing.assert_array_equal(first, g['grad_embed_cur_no_old'])


class RoundsTest(parameterized.TestCase):
  """Three rounds of the official outer loops with unequal clients."""

  def models_after(self, method, weighting, steps=None, model=linear_model()):
    """Returns broadcast, average and all clients' last models after each
    round."""
    g = golden('w')
    num_clients = 4
    x = [g[f'x{k}'] for k in range(num_clients)]
    y = [g[f'y{k}'] for k in range(num_clients)]
    ends = np.cumsum([len(v) for v in y])
    data = clients.from_partition(
      np.concatenate(x),
      np.concatenate(y),
      np.split(np.arange(ends[-1]), ends[:-1]),
    )
    rounds = schedules.bernoulli(
      int(g['hp_rounds']),
      num_clients,
      num_clients * float(g['hp_act_prob']),
      int(g['hp_seed']),
    )
    chosen = np.zeros_like(g['selected'])
    for t, ids in enumerate(rounds.client_id):
      chosen[t, ids[ids < num_clients]] = True
    np.testing.assert_array_equal(chosen, g['selected'])
    lr, decay = float(g['hp_lr']), float(g['hp_lr_decay'])
    start = jax.tree.map(
      lambda a: a.astype(jnp.float32), linear(g['W0'], g['b0'])
    )
    fed = federation.federation(
      model._replace(init=lambda key: start),
      base.chain(method, evaluation.last_models()),
      solvers.local_sgd(
        lambda t: lr * decay**t,
        batch_size=int(g['hp_batch']),
        epochs=None if steps else int(g['hp_epochs']),
        steps=steps,
        weight_decay=float(g['hp_weight_decay']),
        clip_norm=10.0,
      ),
      num_clients,
      weighting=weighting,
    )
    count = data.count if weighting == 'examples' else jnp.ones(num_clients)
    after = []
    federation.run(
      fed,
      fed.init(jax.random.key(0)),
      data,
      rounds,
      jax.random.key(0),
      every=1,
      callback=lambda _, state, info: after.append(
        jax.tree.map(
          np.array,
          {
            'cld': state.variables,
            'sel': info.models['average'],
            'all': evaluation.mean_of_last_models(state.clients[0][-1], count),
          },
        )
      ),
    )
    return after

  def check(self, after, prefix, **names):
    g = golden('w')
    for t, models_ in enumerate(after):
      for ours, theirs in names.items():
        want = linear(
          g[f'{prefix}_{theirs}_W'][t], g[f'{prefix}_{theirs}_b'][t]
        )
        chex.assert_trees_all_close(models_[ours], want, atol=1e-5)

  def test_fed_avg(self):
    after = self.models_after(fed_avg.fed_avg(), 'examples')
    self.check(after, 'fedavg', cld='sel', sel='sel', all='all')

  def test_fed_dyn(self):
    alpha = float(golden('w')['hp_alpha_dyn'])
    after = self.models_after(
      base.chain(fed_avg.fed_avg(), fed_dyn.fed_dyn(alpha)), 'uniform'
    )
    self.check(after, 'feddyn', cld='cld', sel='sel', all='all')

  def test_scaffold(self):
    g = golden('w')
    part = scaffold.scaffold(learning_rate=float(g['hp_lr']))
    after = self.models_after(
      base.chain(fed_avg.fed_avg(), part), 'uniform', int(g['hp_n_minibatch'])
    )
    self.check(after, 'scaffold', cld='sel', sel='sel')

  def test_scaffold_takes_the_rate_of_the_round(self):
    """By default it differs from the official code once the rate decays."""
    g = golden('w')
    after = self.models_after(
      base.chain(fed_avg.fed_avg(), scaffold.scaffold()),
      'uniform',
      int(g['hp_n_minibatch']),
    )
    self.check(after[:2], 'scaffold', cld='sel')
    gap = np.abs(after[2]['cld'].params['W'] - g['scaffold_sel_W'][2]).max()
    self.assertGreater(gap, 1e-4)

  def test_moon(self):
    g = golden('w')
    plain = linear_model()
    embed = lambda v, x, **kwargs: plain.apply(v, x, **kwargs)._replace(
      features=x * v.params['W'].sum(0)
    )
    model = plain._replace(apply=embed)
    part = moon.moon(model, float(g['hp_mu_moon']), float(g['hp_tau_moon']))
    after = self.models_after(
      base.chain(fed_avg.fed_avg(), part), 'examples', model=model
    )
    self.check(after, 'moon', cld='sel', sel='sel')


class PartitionTest(absltest.TestCase):
  def test_dirichlet(self):
    g = golden('p_dir03')
    num, num_classes, num_clients, seed = map(int, g['n_ncls_nclient_seed'])
    alpha, sigma = map(float, g['alpha_sigma'])
    labels = np.arange(num) % num_classes
    parts = partition.dirichlet(
      labels, num_clients, alpha, seed=seed, sigma=sigma
    )
    np.testing.assert_array_equal([len(p) for p in parts], g['sizes'])
    np.testing.assert_array_equal(np.concatenate(parts), g['index_concat'])
    np.testing.assert_array_equal(
      [np.bincount(labels[p], minlength=num_classes) for p in parts],
      g['counts'],
    )


class ServerStepTest(parameterized.TestCase):
  @parameterized.parameters('sgd', 'adam')
  def test_fine_tune(self, optimizer):
    with enable_x64(True):
      g = golden(f'f_lin_{optimizer}')
      part = lambda prefix: {
        k[len(prefix) + 1 :]: v
        for k, v in g.items()
        if k.startswith(prefix + '/')
      }
      width, size = 4, 8
      made = lambda prefix: generator_variables(part(prefix), width, size // 4)
      net = lambda name: linear(g[name + '/fc.weight'], g[name + '/fc.bias'])
      generator = models.image_generator(
        (size, size, 3), 3, noise_dim=4, width=width
      )
      batch = int(g['hp_batch'])
      student, after, terms = fed_ftg.fine_tune(
        linear_model(),
        generator,
        net('student0'),
        made('gen0'),
        jax.tree.map(lambda *a: jnp.stack(a), net('teacher0'), net('teacher1')),
        jnp.asarray(g['counts']),
        jnp.asarray(g['z'], float),
        jnp.asarray(g['labels']).reshape(-1, batch),
        generator_optimizer=getattr(optax, optimizer)(float(g['hp_gen_lr'])),
        student_optimizer=distillation.sgd(
          float(g['hp_glb_lr']), float(g['hp_weight_decay'])
        ),
        generator_steps=int(g['hp_inner_g']),
        student_steps=int(g['hp_inner_d']),
        **fed_ftg.PRESETS['official'],
      )
      chex.assert_trees_all_close(student, net('student1'), atol=1e-9)
      chex.assert_trees_all_close(after, made('gen1'), atol=1e-7)
      parts = [terms[name].reshape(-1) for name in ('md', 'cls', 'dis')]
      want = g['gen_losses_total_md_cls_ap'].T
      np.testing.assert_allclose(parts, want[1:], rtol=1e-8)
      total = parts[0] + parts[1] + parts[2] / len(g['counts'])
      np.testing.assert_allclose(total, want[0], rtol=1e-8)


if __name__ == '__main__':
  absltest.main()
