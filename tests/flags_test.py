"""Tests of the methods' flags, which are made from their functions."""

import inspect

from absl import flags as absl_flags
from absl.testing import absltest, parameterized

from fedftg_jax import recipes
from fedftg_jax.configuration import flags

# Names and defaults that command lines and config.json files rely on.
DEFAULTS = {
  'q_fed_avg': {'fair_q': 1.0},
  'fed_prox': {'prox_mu': 1e-4, 'prox_to_zero': False},
  'running_average': {'average_decay': 0.9},
  'moon': {'moon_mu': 0.5, 'moon_tau': 5.0},
  'fed_dyn': {'dyn_alpha': 0.01},
  'scaffold': {
    'scaffold_option': 2,
    'scaffold_lr0': False,
    'scaffold_ref_untuned': False,
    'scaffold_paper': False,
  },
  'fed_ntd': {'ntd_beta': 1.0, 'ntd_tau': 1.0},
  'fed_gen': {
    'gen_alpha': 10.0,
    'gen_beta': 10.0,
    'gen_decay': 0.98,
    'gen_steps': 50,
    'gen_lr': 3e-4,
    'gen_l2': 1e-2,
    'gen_weighting': 'official',
    'gen_lambda_dis': 1.0,
    'gen_lambda_student': 0.0,
    'gen_hidden': 256,
    'gen_noise_dim': 32,
  },
  'fed_align': {'align_mu': 0.45, 'align_width': 0.25, 'align_iterations': 10},
  'fed_mr': {'mr_first_rounds': 0, 'mr_unit': 'leaf', 'mr_segment': 0.0},
  'fed_df': {
    'df_generator_steps': 50,
    'df_student_steps': 20,
    'df_batch_size': 0,
    'df_student_lr': 0.1,
    'df_generator_lr': 0.01,
    'df_lambda_dis': 1.0,
    'df_ensemble': 'prob',
    'df_memory': 0.0,
    'df_eps_root': 0.0,
  },
  'fed_df_public': {
    'df_student_steps': 20,
    'df_batch_size': 0,
    'df_student_lr': 0.1,
    'df_ensemble': 'prob',
  },
  'fed_ftg': {
    'ftg_preset': 'official',
    **{f'ftg_{name}': None for name in recipes.FtgOptions._fields},
  },
}


class FlagsTest(parameterized.TestCase):
  @parameterized.parameters(*DEFAULTS)
  def test_names_and_defaults(self, method):
    found = {
      name: absl_flags.FLAGS[name].default for name in flags.of_method(method)
    }
    self.assertEqual(found, DEFAULTS[method])

  @parameterized.parameters(*recipes.RECIPES)
  def test_every_argument_is_given_or_an_option(self, method):
    """Other arguments could not be set."""
    recipe = recipes.RECIPES[method]
    any_more = inspect.Parameter.VAR_KEYWORD
    for name, argument in inspect.signature(recipe.function).parameters.items():
      if argument.kind is not any_more:
        self.assertIn(name, [*recipe.given, *recipe.options])

  def test_bounds_and_choices(self):
    for name, wrong in (
      ('scaffold_option', '3'),
      ('scaffold_option', '0'),
      ('fair_q', '-1'),
      ('df_ensemble', 'vote'),
      ('ftg_md', 'l2'),
      ('mr_unit', 'model'),
      ('df_student_steps', '1.5'),
    ):
      with self.subTest(name), self.assertRaises(ValueError):
        absl_flags.FLAGS[name].parser.parse(wrong)


if __name__ == '__main__':
  absltest.main()
