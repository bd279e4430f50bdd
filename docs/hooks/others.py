"""Shows Markdown files from elsewhere in the repository as pages."""

import pathlib

from mkdocs.structure import files as files_lib

ROOT = pathlib.Path(__file__).parents[2]
# Page: the file. Those of one folder keep their links to each other.
PAGES = {
  'changelog.md': 'CHANGELOG.md',
  'experiments/README.md': 'experiments/README.md',
  'experiments/large_angles.md': 'experiments/large_angles.md',
  'experiments/periodic_merging.md': 'experiments/periodic_merging.md',
  'experiments/shrinkage.md': 'experiments/shrinkage.md',
  'experiments/tpu_plans.md': 'experiments/tpu_plans.md',
}


def on_files(files: files_lib.Files, *, config, **_) -> files_lib.Files:
  """Called by mkdocs with all files of the site."""
  for page, path in PAGES.items():
    if (ROOT / path).exists():  # if not, the navigation says what is missing
      text = (ROOT / path).read_text(encoding='utf-8')
      files.append(files_lib.File.generated(config, page, content=text))
  return files
