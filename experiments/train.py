"""Trains one federated model and writes metrics, pictures and parameters.

  python -m experiments.train
  python -m experiments.train --method=fed_avg --dirichlet_alpha=0.3 --rounds=50

The bare command runs FedFTG on 5,000 real MNIST images. Everything goes into
--workdir (default: a folder in runs/ named after the configuration):
report.html to look at, metrics.csv to go on with, and the rest that BUILD.md
lists.
"""

import json

from absl import flags as absl_flags

from experiments import assembly
from experiments import cli
from experiments import devices
from experiments import flags
from experiments import folders
from experiments import progress
from experiments import records
from experiments import report
from experiments import runner

absl_flags.adopt_module_key_flags(flags)  # for --help
FLAGS = absl_flags.FLAGS


def main() -> None:
  config = flags.config()
  progress.say(f'{config["method"]} on {config["dataset"]}, '
               f'{config["rounds"]} rounds')
  folder = folders.workdir(FLAGS.workdir, config)
  if devices.agree(folders.is_finished(folder, config)):
    progress.say(f'already finished: {folder}')
  else:
    runner.train(
        assembly.build(config, FLAGS.data_dir, FLAGS.manual_dir),
        [config['seed']], [folder], config['method'], runner.asked_for())
  if not devices.is_first():
    return
  if not (folder / 'report.html').exists():
    report.write(folder)
  summary = json.loads((folder / 'summary.json').read_text())
  print(f'final accuracy {summary["final_accuracy"]:.4f} (mean over the last '
        f'{records.FINAL_ROUNDS} rounds) after {summary["rounds"]} rounds; '
        f'{summary["train_seconds"]:.0f} s of training, '
        f'{summary["compile_seconds"]:.0f} s of compilation; results in {folder}')


if __name__ == '__main__':
  cli.run(main)
