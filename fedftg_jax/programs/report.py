"""Makes the report of a run, a comparison, a sweep or of influence.

  fedftg report runs/demo

report.html is one page that needs no network and no scripts. Its pictures are
inside. Beside it, report/ has the tables as CSV and the pictures as SVG, and
ro-crate-metadata.json describes all files of the folder. `train`, `compare`,
`sweep` and `influence` write all this when they are done. This program writes
it again, also while a run is still training.
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
