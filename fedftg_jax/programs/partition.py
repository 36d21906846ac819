"""Draws a partition and measures how skewed it is, before any training.

  fedftg partition --partition=dirichlet --dirichlet_alpha=0.1
  fedftg partition --partition=classes --num_clients=100

It takes the flags of `train`; those about data and partition have an effect. It
prints the measures as a table and writes them into --workdir (default: a folder
in runs/ named after the configuration): measures.json, heatmap.png (the number
of examples by client and class), partition.npz (for --partition=file:PATH) and
config.json. The partition includes what clients keep as tests
(--client_test_share).
"""

from absl import flags as absl_flags

from fedftg_jax.configuration import assembly, flags, folders, resolve
from fedftg_jax.data import partition, skew
from fedftg_jax.results import plots
from fedftg_jax.system import files, progress

FLAGS = absl_flags.FLAGS
GROUPS = ('Data', 'Partition')  # of common flags in --help

# The flags that a partition depends on.
_USED = (
  'dataset',
  'train_examples',
  'merge_test',
  'validation_share',
  'public_data',
  'partition',
  'partition_seed',
  'num_clients',
)


def main() -> None:
  config = resolve.config(cohort=1)  # without rounds, any cohort will do
  _, arguments = flags.PARTITIONS.get(config['partition'], (None, ()))
  claim = {
    'program': 'partition',
    **{k: v for k, v in config.items() if k in (*_USED, *arguments)},
  }
  folder = folders.workdir(
    FLAGS.workdir,
    claim,
    'partition',
    config['dataset'].split(':')[0],
    config['partition'].split(':')[0],
  )
  with folders.opened(folder, folders.identity(claim)):
    _draw(folder, config, claim)


def _draw(folder, config, claim) -> None:
  """Draws the partition and writes the results."""
  dataset, _, parts = assembly.share_out(
    config, assembly.load(config, FLAGS.data_dir, FLAGS.manual_dir)
  )
  counts = skew.class_counts(dataset.train_y, parts, dataset.num_classes)
  measures = skew.measures(counts)
  folders.claim_folder(folder, claim)
  with files.replacing(folder / 'partition.npz') as temporary:
    partition.save(temporary, parts)
  with files.replacing(folder / 'heatmap.png') as temporary:
    plots.heatmap(temporary, counts, dataset.class_names)
  files.write_json(folder / 'measures.json', measures)
  progress.show(
    ['measure', config['partition']],
    [
      [
        name.removeprefix('num_').replace('_', ' '),
        f'{value:,d}' if isinstance(value, int) else f'{value:.4g}',
      ]
      for name, value in measures.items()
    ],
  )
  print(f'results in {folder}')
