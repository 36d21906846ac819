"""Plants one fault at a time in a copy of the repository, and tests the copy.

By hand: .venv/bin/python tests/mutations.py [--only NAME] [--list] [--jobs N]

A fault replaces a text that occurs once in its file; the changed code still
imports and trains. The faults were chosen from the sources, without looking at
the tests. The tests are those of `make test`, up to the first that fails.
Before any fault (except with --only) the unchanged copy is tested, and must
pass.

Exit status: 0 if the tests catch every fault; 1 if they miss one; 2 if a fault
does not fit its file, or a run gives no answer (see UNCLEAR).
"""

import argparse
from concurrent import futures
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

REPO = pathlib.Path(__file__).resolve().parent.parent
PYTEST = (
  sys.executable,
  '-m',
  'pytest',
  '-x',
  '-q',
  '--color=no',
  '-m',
  'not slow and not browser',
)
WHOLE = '-n', '2', '--dist', 'worksteal', 'tests'
LIMIT = 3600  # seconds that one call of pytest may take
# Pytest's exit status; with -n, -x ends in STOPPED.
PASSED, FAILED, STOPPED, NO_TESTS = 0, 1, 2, 5
CAUGHT, MISSED, UNCLEAR = 'caught by', 'MISSED', 'UNCLEAR:'


class Fault(NamedTuple):
  """A text in a file, its replacement, and the tests to run first."""

  name: str
  path: str
  old: str
  new: str
  tests: tuple[str, ...] = ()


CONTROL = Fault('none', '', '', '')

ENGINE = 'fedftg_jax/federation.py'
SOLVER = 'fedftg_jax/solvers.py'
FED_FTG = 'fedftg_jax/methods/fed_ftg.py'
DISTILLATION = 'fedftg_jax/distillation.py'
FED_DM = 'fedftg_jax/methods/fed_dm.py'
SCAFFOLD = 'fedftg_jax/methods/scaffold.py'
FED_DYN = 'fedftg_jax/methods/fed_dyn.py'
MOON = 'fedftg_jax/methods/moon.py'
PARTITION = 'fedftg_jax/data/partition.py'
DRAWS = 'fedftg_jax/data/draws.py'
CHECKPOINT = 'fedftg_jax/checkpoint.py'
PRIVATE = 'fedftg_jax/methods/private_fed_avg.py'
LATTICES = 'fedftg_jax/uplinks/lattices.py'
UVEQFED = 'fedftg_jax/uplinks/uveqfed.py'
ENTROPY = 'fedftg_jax/uplinks/entropy.py'

OF_ENGINE = 'federation_test.py', 'methods_test.py'
OF_SOLVER = ('solvers_test.py',)
OF_FED_FTG = ('fed_ftg_test.py',)
OF_METHODS = ('methods_test.py',)
OF_LOSSES = 'golden_test.py', 'methods_test.py'
OF_PRIVATE = ('privacy_test.py',)
OF_PARTITION = ('partition_test.py',)
OF_CHECKPOINT = 'checkpoint_test.py', 'resume_test.py'
OF_UPLINKS = ('uplinks_test.py',)

FAULTS = (
  # The engine.
  Fault(
    'engine_weight_counts_absent',
    ENGINE,  # not renormalised
    'weight = mass / jnp.maximum(jnp.sum(mass), 1)',
    "all_of_them = count if weighting == 'examples' else count > 0\n"
    '  weight = mass / jnp.maximum(jnp.sum(all_of_them), 1)',
    OF_ENGINE,
  ),
  Fault(
    'engine_absent_slot_written',
    ENGINE,
    'written = jnp.where(rows.worked, rows.place, num_clients)',
    'written = rows.place',
    OF_ENGINE,
  ),
  Fault(
    'engine_absent_client_sends',
    ENGINE,
    '  sent = trees.where(row.arrived, sent, jax.tree.map(jnp.zeros_like, sent))',
    '',
    OF_ENGINE,
  ),
  Fault(
    'engine_empty_client_arrives',
    ENGINE,
    'arrived = cohort.arrived & (count > 0)',
    'arrived = cohort.arrived & (cohort.client_id < num_clients)',
    OF_ENGINE,
  ),
  Fault(
    'engine_client_key_by_slot',
    ENGINE,
    'keys.client_keys(seen.key, seen.round, row.client_id)',
    'keys.client_keys(seen.key, seen.round, row.position)',
    OF_ENGINE,
  ),
  Fault(
    'engine_server_key_repeats',
    ENGINE,
    '      state.variables, state.shared, received, keys.server_key(key, state.round)',
    '      state.variables,\n'
    '      state.shared,\n'
    '      received,\n'
    '      keys.server_key(key, jnp.int32(0)),',
    OF_ENGINE,
  ),
  Fault(
    'engine_nobody_arrives_yet_updates',
    ENGINE,
    'acts = jnp.any(arrived) | method.always',
    'acts = jnp.any(rows.client_id < num_clients) | method.always',
    OF_ENGINE,
  ),
  Fault(
    'engine_start_wrong_sign',
    ENGINE,
    'delta + (start - old)',
    'delta + (old - start)',
    OF_ENGINE,
  ),
  Fault(
    'engine_batch_norm_unmasked',
    ENGINE,
    'model.apply(variables, batch.x, mask=batch.mask, train=True)',
    'model.apply(variables, batch.x, train=True)',
    OF_ENGINE,
  ),
  Fault(
    'engine_batch_norm_stale',
    ENGINE,
    'LossAux(output.stats, cross_entropy, output.logits)',
    'LossAux(variables.stats, cross_entropy, output.logits)',
    OF_ENGINE,
  ),
  Fault(
    'engine_num_steps_not_sorted',
    ENGINE,
    '  ids, arrived, num_steps = (\n'
    '    np.take_along_axis(a, order, 1) for a in (ids, arrived, num_steps)\n'
    '  )',
    '  ids, arrived = (np.take_along_axis(a, order, 1) for a in (ids, arrived))',
    OF_ENGINE,
  ),
  Fault(
    'engine_blank_row_is_a_round',
    ENGINE,
    'is_round = jnp.all(cohort.num_steps >= 0)',
    'is_round = jnp.all(cohort.num_steps >= -1)',
    OF_ENGINE,
  ),
  # The solver.
  Fault(
    'solver_partial_batch_dropped',
    SOLVER,
    'per_epoch = -(-count // batch_size)',
    'per_epoch = jnp.maximum(count // batch_size, 1)',
    OF_SOLVER,
  ),
  Fault(
    'solver_padding_is_an_example',
    SOLVER,  # off by one
    'first + jnp.arange(batch_size) < data.count',
    'first + jnp.arange(batch_size) <= data.count',
    OF_SOLVER,
  ),
  Fault(
    'solver_same_order_each_epoch',
    SOLVER,
    '    draw = jax.random.uniform(\n'
    '      jax.random.fold_in(key, epoch), (cap,), jnp.float32\n'
    '    )',
    '    draw = jax.random.uniform(jax.random.fold_in(key, 0), (cap,), jnp.float32)',
    OF_SOLVER,
  ),
  Fault(
    'solver_momentum_is_no_longer_way',
    SOLVER,
    'step_size=step_size * per_step',
    'step_size=step_size',
    OF_SOLVER,
  ),
  Fault(
    'solver_decay_is_clipped',
    SOLVER,
    '      grads, _ = clip.update(grads, clip.init(params))\n'
    '      return jax.tree.map(lambda g, p: g + decay * p, grads, params), aux\n'
    '',
    '      grads = jax.tree.map(lambda g, p: g + decay * p, grads, params)\n'
    '      return clip.update(grads, clip.init(params))[0], aux\n'
    '',
    OF_SOLVER,
  ),
  Fault(
    'solver_decay_of_method_lost',
    SOLVER,
    'decay = weight_decay + objective.decay',
    'decay = weight_decay',
    OF_SOLVER,
  ),
  Fault(
    'solver_same_augmentation_each_step',
    SOLVER,
    'augment(jax.random.fold_in(key_augment, i), drawn.x)',
    'augment(key_augment, drawn.x)',
    ('augment_test.py', 'solvers_test.py'),
  ),
  Fault(
    'solver_loss_by_batches',
    SOLVER,  # a partial batch counts as a whole
    'total[0] + seen * cross_entropy, total[1] + seen',
    'total[0] + cross_entropy, total[1] + 1',
    OF_SOLVER,
  ),
  # FedFTG.
  Fault(
    'fed_ftg_class_weights_axis',
    FED_FTG,
    'jnp.sum(counts, axis=0)',
    'jnp.sum(counts, axis=1, keepdims=True)',
    OF_FED_FTG,
  ),
  Fault(
    'fed_ftg_uniform_weights_unmasked',
    FED_FTG,
    'jnp.ones(counts.shape) * distillation.present(arrived)[:, None]',
    'jnp.ones(counts.shape) / len(counts)',
    OF_FED_FTG,
  ),
  Fault(
    'fed_ftg_hard_samples_sign',
    FED_FTG,
    "by_name['md'] = -jnp.mean(gap * alpha, axis=1)",
    "by_name['md'] = jnp.mean(gap * alpha, axis=1)",
    OF_FED_FTG,
  ),
  Fault(
    'fed_ftg_kl_arguments',
    FED_FTG,
    'losses.kl_divergence(teacher, student)',
    'losses.kl_divergence(student, teacher)',
    OF_FED_FTG,
  ),
  Fault(
    'fed_ftg_diversity_counts_absent',
    FED_FTG,
    'num_teachers = jnp.maximum(jnp.sum(arrived), 1)',
    'num_teachers = len(counts)',
    OF_FED_FTG,
  ),
  Fault(
    'fed_ftg_stale_generator',
    FED_FTG,  # the student's images
    'generator.apply(made, z, labels)[0], generating[0]',
    'generator.apply(made, z, labels)[0], carry[1]',
    OF_FED_FTG,
  ),
  Fault(
    'fed_ftg_generator_statistics_stale',
    FED_FTG,
    '(Variables(params, stats), opt_state), by_name',
    '(Variables(params, made.stats), opt_state), by_name',
    OF_FED_FTG,
  ),
  Fault(
    'fed_ftg_key_drawn_from_twice',
    FED_FTG,
    'draw_labels(key_labels, counts',
    'draw_labels(key_noise, counts',
    OF_FED_FTG,
  ),
  Fault(
    'fed_ftg_labels_off_by_one',
    DISTILLATION,
    "jnp.arange(num, dtype=jnp.uint32), 'right')",
    "jnp.arange(num, dtype=jnp.uint32), 'left')",
    OF_FED_FTG,
  ),
  Fault(
    'fed_ftg_batch_statistics_kept',
    DISTILLATION,
    'train=True)._replace(stats=variables.stats)',
    'train=True)',
    OF_FED_FTG,
  ),
  # SCAFFOLD.
  Fault(
    'scaffold_slope_sign',
    SCAFFOLD,
    'lambda c, c_k: c / share - c_k',
    'lambda c, c_k: c_k - c / share',
    OF_METHODS,
  ),
  Fault(
    'scaffold_share_not_in_slope',
    SCAFFOLD,
    'lambda c, c_k: c / share - c_k',
    'lambda c, c_k: c - c_k',
    OF_METHODS,
  ),
  Fault(
    'scaffold_rate_ignored',
    SCAFFOLD,
    'local.step_size if learning_rate is None else learning_rate',
    'local.step_size',
    OF_METHODS,
  ),
  Fault(
    'scaffold_server_divides_by_cohort',
    SCAFFOLD,
    'arrived / received.num_clients',
    'arrived / len(received.arrived)',
    OF_METHODS,
  ),
  Fault(
    'scaffold_idle_client_renews',
    SCAFFOLD,
    '    own = trees.where(local.num_steps > 0, own, view.own)\n',
    '',
    OF_METHODS,
  ),
  # FedDyn.
  Fault(
    'fed_dyn_strength_times_share',
    FED_DYN,
    'alpha / jnp.where(',
    'alpha * jnp.where(',
    OF_METHODS,
  ),
  Fault(
    'fed_dyn_slope_sign',
    FED_DYN,
    'optax.tree.sub(view.own, view.received.params)',
    'optax.tree.sub(view.received.params, view.own)',
    OF_METHODS,
  ),
  Fault(
    'fed_dyn_dual_forgets',
    FED_DYN,
    'return optax.tree.add(view.own, change), ()',
    'return change, ()',
    OF_METHODS,
  ),
  Fault(
    'fed_dyn_server_divides_by_cohort',
    FED_DYN,
    '1 / received.num_clients',
    '1 / len(received.arrived)',
    OF_METHODS,
  ),
  Fault(
    'fed_dyn_corrects_without_regulariser',
    FED_DYN,
    'if not alpha:',
    'if alpha is None:',
    OF_METHODS,
  ),
  # MOON.
  Fault(
    'moon_near_and_far',
    MOON,
    'losses.contrast(output.features, near, far, tau)',
    'losses.contrast(output.features, far, near, tau)',
    OF_METHODS,
  ),
  Fault(
    'moon_first_round_counts',
    MOON,
    'mu * seen * losses',
    'mu * losses',
    OF_METHODS,
  ),
  Fault(
    'moon_unmasked',
    MOON,
    'losses.masked_mean(contrast, batch.mask)',
    'jnp.mean(contrast)',
    OF_METHODS,
  ),
  Fault(
    'moon_keeps_received_model',
    MOON,
    'del view, objective, key\n    return (local.variables,',
    'del objective, key\n    return (view.received,',
    OF_METHODS,
  ),
  Fault(
    'moon_references_in_train_mode',
    MOON,
    'model.apply(v, batch.x).features',
    'model.apply(v, batch.x, train=True).features',
    OF_METHODS,
  ),
  # FedNTD, FedMR, FedGen.
  Fault(
    'ntd_own_class_counts',
    'fedftg_jax/losses.py',
    'others = ~jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)',
    'others = jnp.ones(logits.shape, bool)',
    OF_LOSSES,
  ),
  Fault(
    'ntd_teacher_is_the_start',
    'fedftg_jax/methods/fed_ntd.py',
    'lambda v: model.apply(v, batch.x).logits, view.received',
    'lambda v: model.apply(v, batch.x).logits, variables',
    OF_METHODS,
  ),
  Fault(
    'mr_one_permutation_for_all',
    'fedftg_jax/methods/fed_mr.py',
    'jax.random.permutation(jax.random.fold_in(key, i), num_models)',
    'jax.random.permutation(jax.random.fold_in(key, 0), num_models)',
    OF_LOSSES,
  ),
  Fault(
    'mr_mean_of_the_arrived',
    'fedftg_jax/methods/fed_mr.py',
    'jax.tree.map(lambda a: jnp.mean(a, axis=0), models),',
    'received.average,',
    OF_METHODS,
  ),
  Fault(
    'gen_target_moves',
    'fedftg_jax/methods/fed_gen.py',
    'losses.kl_divergence(losses.held_fixed(target), logits)',
    'losses.kl_divergence(target, logits)',
    OF_LOSSES,
  ),
  Fault(
    'gen_from_the_first_round',
    'fedftg_jax/methods/fed_gen.py',
    'view.round > 0,',
    'view.round >= 0,',
    OF_METHODS,
  ),
  Fault(
    'gen_absent_clients_teach',
    'fedftg_jax/methods/fed_gen.py',
    'counts = counts * received.arrived[:, None]',
    'counts = jnp.maximum(counts, 1)',
    OF_METHODS,
  ),
  Fault(
    'gen_moments_begin_anew',
    'fedftg_jax/methods/fed_gen.py',
    'return Slot(Variables(params, stats), moments), values',
    'return new_slot(Variables(params, stats), terms), values',
    OF_METHODS,
  ),
  # Private sums.
  Fault(
    'private_noise_without_the_clip',
    PRIVATE,
    'deviation = raised * shared.clip',
    'deviation = raised',
    OF_PRIVATE,
  ),
  Fault(
    'private_denominator_follows_who_came',
    PRIVATE,
    'denominator = cohort if noise else jnp.maximum(arrived, 1)',
    'denominator = jnp.maximum(arrived, 1)',
    OF_PRIVATE,
  ),
  Fault(
    'private_no_noise_without_clients',
    PRIVATE,
    'always=bool(noise)',
    'always=False',
    OF_PRIVATE,
  ),
  Fault(
    'private_short_changes_are_stretched',
    PRIVATE,
    'jnp.minimum(1, bound / jnp.maximum(norm, 1e-30))',
    'bound / jnp.maximum(norm, 1e-30)',
    OF_PRIVATE,
  ),
  Fault(
    'private_masks_add_up',
    PRIVATE,
    'jnp.where(client_id < other, m, -m)',
    'jnp.where(client_id != other, m, -m)',
    OF_PRIVATE,
  ),
  Fault(
    'private_lost_masks_stay',
    PRIVATE,
    'arrived & ~jnp.all(received.arrived),',
    'arrived & jnp.all(received.arrived),',
    OF_PRIVATE,
  ),
  # Personal models.
  Fault(
    'personal_slot_before_is_after',
    ENGINE,
    'method.personal(view._replace(variables=sent.start)),',
    'method.personal(view._replace(variables=sent.start, own=own)),',
    ('evaluation_test.py',),
  ),
  # Partitions.
  Fault(
    'partition_dirichlet_axis',
    DRAWS,
    'cumulative = np.cumsum(priors, axis=1)',
    'cumulative = np.cumsum(priors, axis=0)',
    OF_PARTITION,
  ),
  Fault(
    'partition_redraws_off_by_one',
    DRAWS,
    'max_redraws + 1 - single',
    'max_redraws - single',
    OF_PARTITION,
  ),
  Fault(
    'partition_redraws_end_elsewhere',
    DRAWS,  # words of the redraws are used again
    'return int(label), at + 2 * hit + 2',
    'return int(label), at + 2 * hit',
    OF_PARTITION,
  ),
  Fault(
    'partition_window_cut_off',
    DRAWS,  # words that the last example used are used again
    'stream.skip(max(at, _WINDOW))',
    'stream.skip(_WINDOW)',
    OF_PARTITION,
  ),
  Fault(
    'partition_smallest_clients_give_first',
    PARTITION,
    'np.lexsort((donors, -heights))',
    'np.lexsort((donors, heights))',
    OF_PARTITION,
  ),
  Fault(
    'partition_cuts_rounded_down',
    PARTITION,
    'else np.rint(places)',
    'else np.floor(places)',
    OF_PARTITION,
  ),
  Fault(
    'partition_shards_not_dealt',
    PARTITION,
    'dealt = rng.permutation(num)',
    'dealt = np.arange(num)',
    OF_PARTITION,
  ),
  Fault(
    'partition_owners_not_shared',
    PARTITION,
    '(-sizes[c] / owners[c], c)',
    '(-sizes[c], c)',
    OF_PARTITION,
  ),
  Fault(
    'partition_power_law_sign',
    PARTITION,
    'rng.standard_normal(num_clients) - power *',
    'rng.standard_normal(num_clients) + power *',
    OF_PARTITION,
  ),
  Fault(
    'partition_index_off_by_one',
    PARTITION,
    'used.max() >= num_examples',
    'used.max() > num_examples',
    OF_PARTITION,
  ),
  Fault(
    'partition_smallest_remainders',
    PARTITION,
    'np.argsort(sizes - exact,',
    'np.argsort(exact - sizes,',
    OF_PARTITION,
  ),
  # Checkpoints.
  Fault(
    'checkpoint_leaves_one_more',
    CHECKPOINT,
    '  for old in [r for r in rounds(folder) if r <= round_][:-keep]:',
    '  for old in [r for r in rounds(folder) if r <= round_][: -keep - 1]:',
    OF_CHECKPOINT,
  ),
  Fault(
    'checkpoint_later_rounds_count',
    CHECKPOINT,
    '[r for r in rounds(folder) if r <= round_][:-keep]',
    'rounds(folder)[:-keep]',
    OF_CHECKPOINT,
  ),
  Fault(
    'checkpoint_rounds_as_text',
    CHECKPOINT,  # 10 before 9
    'sorted(\n'
    '    int(name) for name in os.listdir(folder) if _ROUND.fullmatch(name)\n'
    '  )',
    '[\n'
    '    int(name)\n'
    '    for name in sorted(os.listdir(folder))\n'
    '    if _ROUND.fullmatch(name)\n'
    '  ]',
    OF_CHECKPOINT,
  ),
  Fault(
    'checkpoint_fingerprint_of_names',
    CHECKPOINT,
    '    digest.update(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]\n',
    '',
    OF_CHECKPOINT,
  ),
  Fault(
    'checkpoint_of_another_run',
    CHECKPOINT,
    "about.get('note') != wanted_note",
    "'note' not in about",
    OF_CHECKPOINT,
  ),
  Fault(
    'checkpoint_of_another_type',
    CHECKPOINT,
    '(got.shape, got.dtype) != (leaf.shape, leaf.dtype)',
    'got.shape != leaf.shape',
    OF_CHECKPOINT,
  ),
  Fault(
    'checkpoint_has_more',
    CHECKPOINT,
    'sorted(wanted.keys() ^ arrays.keys())',
    'sorted(wanted.keys() - arrays.keys())',
    OF_CHECKPOINT,
  ),
  # Codecs; the first three are the defects of UVeQFed's released code.
  Fault(
    'dither_of_half_the_cell',
    LATTICES,
    'return inside - self.points(self.nearest(inside))',
    'return 0.5 * (inside - self.points(self.nearest(inside)))',
    OF_UPLINKS,
  ),
  Fault(
    'hexagon_without_tips',
    LATTICES,
    'return inside - self.points(self.nearest(inside))',
    'drawn = inside - self.points(self.nearest(inside))\n'
    '    return drawn if self.dim != 2 else jnp.clip(drawn, -0.5, 3**0.5 / 4)',
    OF_UPLINKS,
  ),
  Fault(
    'code_book_overflows',
    UVEQFED,
    'return lattice.nearest(scaled + dither)',
    'return jax.numpy.clip(lattice.nearest(scaled + dither), -4, 4)',
    OF_UPLINKS,
  ),
  Fault(
    'dither_shared_by_all',
    UVEQFED,
    'key_step, key_dither = jax.random.split(key)',
    'key_step, key_dither = jax.random.split(jax.random.key(0))',
    OF_UPLINKS,
  ),
  Fault(
    'table_not_billed',
    ENTROPY,
    'return codes_alone + table_bits(codes, lattice) + jnp.uint32(SCALAR_BITS)',
    'return codes_alone + jnp.uint32(SCALAR_BITS)',
    OF_UPLINKS,
  ),
  # Candidates for a GPU, and the memory of one.
  Fault(
    'pallas_last_block_cut',
    'fedftg_jax/models/pallas.py',
    'padding = (0, -num % _ROWS + more)',
    'padding = (0, more)',
    ('models_test.py',),
  ),
  Fault(
    'mixed_unmapped_repeated',
    'fedftg_jax/models/convolution.py',
    'if not any(is_mapped):',
    'if False:',
    ('models_test.py',),
  ),
  Fault(
    'auto_forgets_slots',
    'fedftg_jax/federation.py',
    'slots * slot + sent',
    'sent',
    ('data_programs_test.py',),
  ),
  # Made images and flat minima.
  Fault(
    'dm_logits_do_not_match',
    FED_DM,
    'for a in (output.features, output.logits)',
    'for a in (output.features,)',
    ('methods_test.py',),
  ),
  Fault(
    'dm_pixels_without_momentum',
    FED_DM,
    'velocity = image_momentum * velocity + gradient',
    'velocity = gradient',
    ('methods_test.py',),
  ),
  Fault(
    'dm_server_without_decay',
    FED_DM,
    'weight_decay=server_weight_decay,',
    'weight_decay=0.0,',
    ('methods_test.py',),
  ),
)


def with_fault(root: pathlib.Path, fault: Fault) -> str:
  """Returns the text of a fault's file with the fault in it.

  Raises:
    ValueError: if the fault does not fit the file.
  """
  text = (root / fault.path).read_text(encoding='utf-8')
  times = text.count(fault.old)
  if times != 1:
    raise ValueError(
      f'{fault.name}: what it replaces occurs {times} times in '
      f'{fault.path}, must be once:\n{fault.old}'
    )
  text = text.replace(fault.old, fault.new)
  try:
    compile(text, fault.path, 'exec')
  except SyntaxError as error:
    raise ValueError(
      f'{fault.name}: {fault.path} does not compile then ({error})'
    ) from error
  return text


def misfits() -> list[str]:
  """Lists the faults that do not fit, and why."""
  wrong = []
  for fault in FAULTS:
    try:
      with_fault(REPO, fault)
    except (OSError, ValueError) as error:
      wrong.append(str(error))
    wrong += [
      f'{fault.name}: there is no tests/{name}'
      for name in fault.tests
      if not (REPO / 'tests' / name).exists()
    ]
  return wrong


def copy_sources(to: pathlib.Path) -> None:
  """Copies the files that git does not ignore."""
  names = subprocess.run(
    ['git', 'ls-files', '-z', '-co', '--exclude-standard'],
    cwd=REPO,
    check=True,
    capture_output=True,
    text=True,
  ).stdout.split('\0')
  for name in filter(None, names):
    if (REPO / name).is_file():  # one that was removed may still be listed
      (to / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(REPO / name, to / name)


def run_pytest(root: pathlib.Path, *arguments: str) -> tuple[int, str]:
  """Runs tests in the copy `root`; returns pytest's exit status and output.

  All runs share a cache, in which tests/conftest.py keeps compiled programs.
  """
  cache = root.parent / 'cache'
  done = subprocess.run(
    [*PYTEST, '-o', f'cache_dir={cache}', *arguments],
    cwd=root,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    timeout=LIMIT,
    env=os.environ | {'PYTHONPATH': str(root)},
  )
  return done.returncode, done.stdout


def verdict(status: int, output: str) -> str:
  """Describes the result of pytest for a fault."""
  if status == PASSED:
    return MISSED
  # A failed import names a file only; then the fault is not a fair one.
  found = re.search(
    r'^(?:FAILED|ERROR|SUBFAILED.*\]) (tests/\S+?::.+?)(?: - |$)', output, re.M
  )
  if status in (FAILED, STOPPED) and found:
    return f'{CAUGHT} {found[1]}'
  return f'{UNCLEAR} pytest ended with {status}\n{output[-3000:]}'


def judge(scratch: pathlib.Path, fault: Fault) -> tuple[Fault, str, float]:
  """Tests a copy with the fault; returns the fault, the verdict and the
  seconds."""
  begin = time.monotonic()
  root = scratch / fault.name
  shutil.copytree(scratch / 'sources', root)
  if fault.path:
    (root / fault.path).write_text(with_fault(root, fault), encoding='utf-8')
  likely = [f'tests/{name}' for name in fault.tests]
  try:
    status, output = run_pytest(root, *likely) if likely else (PASSED, '')
    if status in (PASSED, NO_TESTS):
      status, output = run_pytest(root, *WHOLE)
    result = verdict(status, output)
  except subprocess.TimeoutExpired:
    result = f'{UNCLEAR} no end after {LIMIT} seconds'
  shutil.rmtree(root, ignore_errors=True)
  seconds = time.monotonic() - begin
  told = 'passed' if fault is CONTROL and result == MISSED else result
  print(f'{fault.name}: {told} ({seconds:.0f} s)', flush=True)
  return fault, result, seconds


def print_list(faults: list[Fault]) -> None:
  """Prints the name and the file of each fault."""
  for fault in faults:
    print(f'{fault.name:<38}{fault.path}')


def print_table(rows: list[tuple[Fault, str, float]]) -> None:
  """Prints a line for each fault."""
  lines = [('name', 'file', 'result', 'seconds')] + [
    (fault.name, fault.path, result.splitlines()[0], f'{seconds:.0f}')
    for fault, result, seconds in rows
  ]
  widths = [max(map(len, column)) for column in zip(*lines)]
  for line in lines:
    print('  '.join(map(str.ljust, line, widths)).rstrip())


def main() -> int:
  """Runs what the command line asks for, and returns the exit status."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--only', metavar='NAME', help='one fault')
  parser.add_argument('--list', action='store_true', help='names, no tests')
  parser.add_argument(
    '--jobs',
    type=int,
    default=1,
    metavar='N',
    help='faults at once, each with up to two processes',
  )
  args = parser.parse_args()
  if args.jobs < 1:
    parser.error('--jobs must be at least 1')
  faults = [f for f in FAULTS if args.only in (None, f.name)]
  if not faults:
    parser.error(f'no fault is named {args.only}, see --list')
  if wrong := misfits():
    print(*wrong, sep='\n', file=sys.stderr)
    return 2
  if args.list:
    print_list(faults)
    return 0

  with tempfile.TemporaryDirectory(prefix='mutations-') as scratch:
    scratch = pathlib.Path(scratch)
    copy_sources(scratch / 'sources')
    if args.only is None and judge(scratch, CONTROL)[1] != MISSED:
      print('the tests do not pass without a fault', file=sys.stderr)
      return 2
    with futures.ThreadPoolExecutor(args.jobs) as pool:
      rows = list(pool.map(lambda fault: judge(scratch, fault), faults))
  print_table(rows)
  results = [result for _, result, _ in rows]
  if any(result.startswith(UNCLEAR) for result in results):
    return 2
  return int(MISSED in results)


if __name__ == '__main__':
  sys.exit(main())
