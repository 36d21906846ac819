"""Trains one federated model and writes metrics, pictures and parameters.

  fedftg train
  fedftg train --method=fed_avg --dirichlet_alpha=0.3 --rounds=50

The bare command runs FedFTG on 5,000 real MNIST images. Everything goes into
--workdir (default: a folder in runs/ named after the configuration):
report.html to look at, metrics.csv for your own tables, and the files that
docs/files.md lists.
"""

from absl import flags as absl_flags

from fedftg_jax.configuration import assembly, folders, resolve
from fedftg_jax.results import page, rows
from fedftg_jax.runs import training
from fedftg_jax.system import devices, files, progress

FLAGS = absl_flags.FLAGS


def main() -> None:
  config = resolve.config()
  resolve.say_unused([config])
  progress.say(
    f'{config["method"]} on {config["dataset"]}, {config["rounds"]} rounds'
  )
  folder = folders.workdir(FLAGS.workdir, config)
  training.complete(
    folder,
    config,
    lambda: assembly.build(config, FLAGS.data_dir, FLAGS.manual_dir),
    training.asked_for(),
  )
  if not devices.is_first():
    return
  if not (folder / 'report.html').exists():
    page.write(folder)
  summary = files.read_json(folder / 'summary.json')
  print(
    f'final accuracy {100 * summary["final_accuracy"]:.2f} % (mean of the '
    f'evaluations in the last {rows.FINAL_ROUNDS} rounds) after '
    f'{summary["rounds"]} rounds; '
    f'{summary["train_seconds"]:.0f} s of training, '
    f'{summary["compile_seconds"]:.0f} s of compilation; results in {folder}'
  )
