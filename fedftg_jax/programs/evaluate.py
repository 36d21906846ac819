"""Scores the trained model of a finished run on a data set.

  fedftg evaluate runs/demo/fed_avg/seed0 --dataset=npz:mine.npz
  fedftg evaluate runs/demo/fed_avg/seed0 --dataset=emnist/mnist --split=train

The folder is that of a run of any method (a comparison has one for each method
and seed). The images must have the shape, the type and the number of classes of
the images in training. Without --dataset, the data set of the training is used.
Prints accuracy, loss, calibration and the accuracy on each class, and writes
them with the confusion matrix to evaluations/ in the folder.
"""

import sys

from absl import flags as absl_flags
from upath import UPath

from fedftg_jax.configuration import folders
from fedftg_jax.runs import run
from fedftg_jax.system import cli, files, own_flags, progress

ARGUMENT = 'FOLDER'
GROUPS = ('Data',)  # of common flags in --help
_USED = 'dataset', 'num_classes', 'data_dir', 'manual_dir'  # of a run's
FLAGS = absl_flags.FLAGS

absl_flags.DEFINE_enum('split', 'test', run.SPLITS, 'Split to score.')
absl_flags.DEFINE_string(
  'which',
  'broadcast',
  'Model to score: broadcast, or another one in models.npz, such as '
  'running_average.',
)


def main(folder: str) -> None:
  try:
    place = UPath(folder)
  except (ValueError, ImportError) as error:  # a store that is not known here
    raise cli.ArgumentError(folder, str(error)) from error
  _say_unused()
  trained = run.Run(place)
  name = (
    FLAGS.dataset if FLAGS['dataset'].present else trained.config['dataset']
  )
  which, chosen = FLAGS.which, None
  if which != 'broadcast':
    chosen = trained.models.get(which)
    if chosen is None:
      known = ', '.join(['broadcast', *trained.models])
      raise cli.UsageError('which', which, f'must be one of {known}')
  try:
    scores = trained.evaluate(
      name,
      FLAGS.split,
      chosen,
      num_classes=FLAGS.num_classes,
      data_dir=FLAGS.data_dir,
      manual_dir=FLAGS.manual_dir,
    )
  except cli.ArgumentError:  # of the folder
    raise
  except ValueError as error:
    raise cli.UsageError('dataset', name, str(error)) from error
  file = f'{folders.folder_name(name)}-{FLAGS.split}'
  if which != 'broadcast':
    file += f'-{which}'
  path = place / 'evaluations' / f'{file}.json'
  files.write_json(
    path, {'dataset': name, 'split': FLAGS.split, 'model': which, **scores}
  )
  progress.show(
    ['measure', f'{which}: {name}, {FLAGS.split}'],
    [
      ['examples', f'{scores["examples"]:,d}'],
      ['accuracy, percent', f'{100 * scores["accuracy"]:.2f}'],
      ['loss', f'{scores["loss"]:.4f}'],
      ['expected calibration error', f'{scores["calibration_error"]:.4f}'],
      ['Brier score', f'{scores["brier"]:.4f}'],
      *(
        [f'accuracy on class {c}, percent', f'{100 * accuracy:.2f}']
        for c, accuracy in enumerate(scores['class_accuracy'])
        if accuracy is not None
      ),
    ],
  )
  print(f'written: {path}')
  if trained.config.get('merge_test') and name == trained.config['dataset']:
    progress.say(
      'The model was trained on images of this data set (--merge_test), so '
      'this is no accuracy on new images.'
    )


def _say_unused() -> None:
  """Prints, on stderr, the given flags of a run that change nothing here."""
  idle = cli.given() & {*own_flags.FLAGS} - {*_USED}
  if idle:
    names = ', '.join(f'--{name}' for name in sorted(idle))
    print(f'note: {names}: not used by evaluate', file=sys.stderr)
