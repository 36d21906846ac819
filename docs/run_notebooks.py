"""Runs the notebooks and writes them as pages, with what they print and show.

  python -m docs.run_notebooks              # all: minutes on a CPU
  python -m docs.run_notebooks quick_start

The notebooks in experiments/colab/ are kept without outputs. Their pages in
docs/notebooks/ have the outputs, so that building the site runs nothing.
tests/docs_test.py says which page no longer has the cells of its notebook.
"""

import base64
import datetime
import pathlib
import sys

import nbclient
import nbformat

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = ROOT / 'experiments' / 'colab'
PAGES = ROOT / 'docs' / 'notebooks'
_LONG = 25  # lines; longer cells are folded


def code(cell: nbformat.NotebookNode) -> str:
  """Formats a cell of code as Markdown."""
  fence = f'```python\n{cell.source.strip()}\n```'
  if cell.source.count('\n') < _LONG:
    return fence
  return (
    '<details markdown="1"><summary>A long cell of code</summary>\n\n'
    f'{fence}\n\n</details>'
  )


def outputs(cell: nbformat.NotebookNode, stem: str, first: int) -> list[str]:
  """Formats what a cell printed and showed; writes its pictures as files.

  Args:
    cell: a cell of code that has been run.
    stem: beginning of the names of the pictures.
    first: number of the first picture.

  Returns:
    Parts of a page in Markdown.
  """
  parts, printed = [], ''
  for output in [*cell.outputs, {}]:
    data = output.get('data', {})
    picture = data.get('image/png')
    if printed.strip() and (picture or not output):
      text = printed.replace(str(ROOT), 'code').rstrip()
      parts.append(f'```text\n{text}\n```')
      printed = ''
    if picture:
      path = PAGES / f'{stem}_{first}.png'
      path.write_bytes(base64.b64decode(picture))
      parts.append(f'![output {first}]({path.name})')
      first += 1
    elif output.get('name') != 'stderr':
      shown = data.get('text/plain')
      printed += output.get('text', '') if shown is None else f'{shown}\n'
  return parts


def write(name: str) -> None:
  """Runs a notebook and writes its page."""
  notebook = nbformat.read(NOTEBOOKS / f'{name}.ipynb', nbformat.NO_CONVERT)
  nbclient.NotebookClient(
    notebook,
    timeout=3600,
    kernel_name='python3',
    resources={'metadata': {'path': str(NOTEBOOKS)}},
  ).execute()
  for old in PAGES.glob(f'{name}_*.png'):
    old.unlink()
  title, *cells = notebook.cells
  heading, _, text = title.source.partition('\n')
  today = datetime.date.today().isoformat()
  parts = [
    heading,
    f'*The notebook `experiments/colab/{name}.ipynb`, as it ran on {today}. '
    'Seconds depend on the machine.*',
    text.strip(),
  ]
  num_pictures = 0
  for cell in cells:
    if cell.cell_type == 'markdown':
      parts.append(cell.source.strip())
    else:
      made = outputs(cell, name, num_pictures + 1)
      num_pictures += sum(part.startswith('![') for part in made)
      parts += [code(cell), *made]
  (PAGES / f'{name}.md').write_text('\n\n'.join(parts) + '\n')


def main(argv: list[str]) -> None:
  for name in argv or sorted(p.stem for p in NOTEBOOKS.glob('*.ipynb')):
    write(name)
    print('wrote', (PAGES / f'{name}.md').relative_to(ROOT))


if __name__ == '__main__':
  main(sys.argv[1:])
