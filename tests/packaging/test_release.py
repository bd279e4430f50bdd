"""Check that the descriptions of a release agree with it."""

import datetime
import importlib.metadata
import pathlib
import re
import runpy
import sys
import types
import urllib.parse

import pytest
import yaml

import modelstock_jax as ms
from modelstock_jax.cli import main

ROOT = pathlib.Path(__file__).parents[2]
# Of https://github.com/citation-file-format, schema 1.2.0: the keys of a
# citation and of a reference that are used here, or could be.
CITATION_KEYS = {
  'abstract',
  'authors',
  'cff-version',
  'commit',
  'contact',
  'date-released',
  'doi',
  'identifiers',
  'keywords',
  'license',
  'license-url',
  'message',
  'preferred-citation',
  'references',
  'repository',
  'repository-artifact',
  'repository-code',
  'title',
  'type',
  'url',
  'version',
}
REFERENCE_KEYS = {
  'authors',
  'collection-title',
  'conference',
  'doi',
  'identifiers',
  'title',
  'type',
  'url',
  'year',
}
PERSON_KEYS = {'family-names', 'given-names', 'orcid', 'affiliation'}
IDENTIFIER_TYPES = {'doi', 'url', 'swh', 'other'}


def _read(name):
  return (ROOT / name).read_text('utf-8')


def _yaml(name):
  return yaml.safe_load(_read(name))


def test_the_version_is_stated_once():
  stated = re.compile(rf'(?<![\d.]){re.escape(ms.__version__)}(?![\d.])')
  actual = {
    name
    for name in ('setup.py', 'pyproject.toml', 'CITATION.cff', 'mkdocs.yml')
    if stated.search(_read(name))
  }
  assert actual == set()
  assert importlib.metadata.version('modelstock_jax') == ms.__version__


def test_changelog():
  """The form of Keep a Changelog 1.1.0."""
  text = _read('CHANGELOG.md')
  assert text.startswith('# Changelog\n')
  heads = re.findall(r'^## (.*)$', text, re.MULTILINE)
  form = r'\[(Unreleased|\d+\.\d+\.\d+)\](?: - (.*))?'
  releases = [re.fullmatch(form, head).groups() for head in heads]
  versions = [v for v, _ in releases if v != 'Unreleased']
  assert versions[0] == ms.__version__
  numbers = [tuple(map(int, version.split('.'))) for version in versions]
  assert numbers == sorted(numbers, reverse=True)
  dates = [date for v, date in releases if v != 'Unreleased']
  # The newest may be on its way.
  for date in dates[dates[0] == 'unreleased' :]:
    datetime.date.fromisoformat(date)
  kinds = re.findall(r'^### (.*)$', text, re.MULTILINE)
  known = {'Added', 'Changed', 'Deprecated', 'Removed', 'Fixed', 'Security'}
  assert kinds
  assert set(kinds) <= known


def test_changelog_names_what_there_is():
  named = set(re.findall(r'`(\w+)`', _read('CHANGELOG.md')))
  named -= {'jit', 'vmap', 'grad', 'report'}
  assert named <= set(ms.__all__)
  functions = {n for n in ms.__all__ if callable(getattr(ms, n))}
  made_of = {'displacement_cosine', 'displacement_gram', 'interpolation_ratio'}
  tools = {'describe', 'not_finite', 'stack', 'unstack'}
  classes = {n for n in functions if n[0].isupper()}
  assert named == functions - made_of - tools - classes


def _check_entry(entry, keys):
  """A citation or a reference against the schema's required keys and types."""
  assert set(entry) <= keys
  assert isinstance(entry['title'], str)
  assert entry['title']
  assert entry['authors']
  for author in entry['authors']:
    # An entity has a name; a person has names.
    assert set(author) == {'name'} or set(author) <= PERSON_KEYS
    assert all(isinstance(value, str) for value in author.values())
  for identifier in entry.get('identifiers', []):
    assert set(identifier) <= {'type', 'value', 'description'}
    assert identifier['type'] in IDENTIFIER_TYPES
    if identifier['type'] == 'doi':
      assert re.fullmatch(r'10\.\d{4,9}(\.\d+)?/\S+', identifier['value'])
  if 'url' in entry:
    assert urllib.parse.urlsplit(entry['url']).scheme == 'https'


def test_citation():
  """Citation File Format 1.2.0: the software, and the paper to cite."""
  citation = _yaml('CITATION.cff')
  _check_entry(citation, CITATION_KEYS)
  assert {'cff-version', 'message', 'title', 'authors'} <= set(citation)
  assert citation['cff-version'] == '1.2.0'
  assert citation['type'] == 'software'
  assert citation['title'] == 'modelstock_jax'
  assert citation['license'] == 'Apache-2.0'
  assert len(set(citation['keywords'])) == len(citation['keywords'])

  paper = citation['preferred-citation']
  _check_entry(paper, REFERENCE_KEYS)
  assert paper['type'] == 'conference-paper'
  assert set(paper['conference']) == {'name'}
  # As the README's BibTeX has it.
  bibtex = dict(re.findall(r'^  (\w+)=\{(.*?)\}', _read('README.md'), re.M))
  assert paper['title'] == bibtex['title']
  names = [f'{a["family-names"]}, {a["given-names"]}' for a in paper['authors']]
  assert ' and '.join(names) == bibtex['author']
  assert paper['year'] == int(bibtex['year'])
  assert paper['conference']['name'] in bibtex['booktitle']


def _setup_arguments(monkeypatch):
  arguments = {}
  setuptools = types.SimpleNamespace(
    setup=arguments.update, find_packages=lambda include: []
  )
  monkeypatch.setitem(sys.modules, 'setuptools', setuptools)
  runpy.run_path(str(ROOT / 'setup.py'))
  return arguments


def test_every_floor_is_installed_by_test_oldest(monkeypatch):
  lines = _read('constraints-oldest.txt').splitlines()[1:]
  oldest = dict(line.split('==') for line in lines)
  assert oldest.pop('jaxlib') == oldest['jax']
  arguments = _setup_arguments(monkeypatch)
  extras = arguments['extras_require']
  needed = {*arguments['install_requires'], *extras['train'], *extras['files']}
  digits = next(r for r in extras['prepare'] if 'scikit-learn' in r)
  assert digits in extras['test']  # which `make test-oldest` installs
  floors = dict(requirement.split('>=') for requirement in {*needed, digits})
  assert floors == oldest
  assert 'scikit-learn' not in str(needed)


def test_install_hints_name_what_pip_finds(monkeypatch):
  """Extras of this package, or distributions that are known to be there."""
  arguments = _setup_arguments(monkeypatch)
  extras = {*arguments['extras_require']}
  assert {*main.EXTRAS.values(), 'files', 'train'} <= extras
  known = re.findall(r'^([\w.-]+)==', _read('constraints.txt'), re.M)
  hint = re.compile(
    r"pip install (?:--[a-z-]+ )*[\s']*([\w.]+)(?:\[([\w,]+)\])?"
  )
  seen = set()
  for path in (ROOT / 'modelstock_jax').rglob('*.py'):
    text = re.sub(r"""['"]\n\s*f?['"]""", '', path.read_text('utf-8'))
    for name, wanted in hint.findall(text):
      seen.add(name)
      assert {*wanted.split(',')} <= {*extras, ''}, path
  assert seen - {*known} <= {arguments['name'], 'scenic', '.'}
  assert {arguments['name'], 'open_clip_torch'} <= seen


def test_links_of_the_readme_lead_to_the_repository(monkeypatch):
  """On the index, where there are no files beside it."""
  address = 'https://example.org/us/modelstock_jax'
  monkeypatch.setenv('PROJECT_URL', address)
  arguments = _setup_arguments(monkeypatch)
  assert arguments['project_urls'] == {'Source': address}
  links = re.findall(r'\]\((.*?)\)', arguments['long_description'])
  files = f'{address}/blob/v{ms.__version__}/'
  inside = [
    link.removeprefix(files) for link in links if link.startswith(files)
  ]
  assert len(inside) > 10
  for link in inside:
    assert (ROOT / link.split('#')[0]).exists(), link
  outside = [link for link in links if not link.startswith(files)]
  assert all(link.startswith('https://') for link in outside)


def test_the_release_is_tested_built_and_uploaded():
  """A tag is published if it passes what `main` passes and says its version."""
  jobs = _yaml('.github/workflows/release.yml')['jobs']
  assert jobs['test'] == {'uses': './.github/workflows/ci.yml'}
  # YAML 1.1 reads the key `on` as True.
  assert 'workflow_call' in _yaml('.github/workflows/ci.yml')[True]
  assert jobs['build']['needs'] == 'test'
  assert jobs['publish']['needs'] == 'build'
  (built,) = [s for s in jobs['build']['steps'] if 'make' in s.get('run', '')]
  assert built['run'] == 'make test-wheel'
  assert set(built['env']) == {'PROJECT_URL'}


@pytest.fixture
def job():
  (job,) = _yaml('.github/workflows/ci.yml')['jobs'].values()
  return job


def test_the_workflow_does_what_ci_run_does(job):
  made = re.findall(r'^make (\S+)', _read('.ci/run'), re.MULTILINE)
  run = [target for target in made if target != 'environments']
  assert job['strategy']['matrix']['target'] == run
  commands = [step['run'] for step in job['steps'] if 'run' in step]
  assert commands == ['make ${{ matrix.target }}']
  (share,) = re.findall(r'ATTACK_SHARE=(\S+)', _read('.ci/run'))
  assert job['env']['ATTACK_SHARE'] == share
  targets = re.findall(r'^([\w-]+):', _read('Makefile'), re.MULTILINE)
  assert set(run) <= set(targets)
  # Every target that tests something is run, but for the one that takes root.
  tests = {t for t in targets if t.startswith(('test', 'lint'))}
  assert tests == {*run, 'test-slurm'}


def test_the_workflow_has_the_pythons_that_make_asks_for(job):
  (setup,) = [s for s in job['steps'] if 'setup-python' in s.get('uses', '')]
  versions = setup['with']['python-version'].split()
  asked = re.findall(r'python(3\.\d+)', _read('Makefile'))
  assert set(versions) == set(asked)
  assert job['strategy']['fail-fast'] is False
