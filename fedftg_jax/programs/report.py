"""Makes report.html of a run, comparison or sweep, from the files in its
folder.

  fedftg report runs/demo

One page that needs nothing else: no network, no scripts, pictures inside. It is
written by `train`, `compare` and `sweep`; this makes it anew, also while a run
goes on.
"""

from upath import UPath

from fedftg_jax.results import page
from fedftg_jax.system import cli

ARGUMENT = 'FOLDER'


def main(folder: str) -> None:
  try:
    place = UPath(folder)
  except (ValueError, ImportError) as error:  # a store that is not known here
    raise cli.ArgumentError(folder, str(error)) from error
  print(f'written: {page.write(place)}')
