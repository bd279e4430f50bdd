import signal
import sys

import jax
import pytest

import modelstock_jax
from modelstock_jax.report import provenance
from modelstock_jax.training import loop


def test_here_names_what_runs(monkeypatch):
  monkeypatch.setattr(sys, 'argv', ['/a/b/modelstock', 'train', '--x=a b'])
  texts = provenance.here()
  assert texts['Command'] == "modelstock train '--x=a b'"
  assert texts['Hardware'].startswith(f'{jax.device_count()} x cpu, ')
  for text in (modelstock_jax.__version__, f'jax {jax.__version__}'):
    assert text in texts['Versions']


def test_a_session_that_is_interrupted_counts_and_one_that_fails_does_not(
  tmp_path,
):
  assert provenance.read(tmp_path) == []
  with provenance.session(tmp_path) as texts:
    texts['Time of training'] = '1 s'
  with pytest.raises(loop.Interrupted), provenance.session(tmp_path):
    raise loop.Interrupted(signal.SIGINT, 3, tmp_path)
  with pytest.raises(ValueError, match='bad'), provenance.session(tmp_path):
    raise ValueError('bad')
  assert [path.name for path in tmp_path.iterdir()] == ['run.json']
  sessions = provenance.read(tmp_path)
  assert len(sessions) == 2
  assert sessions[0].pop('Time of training') == '1 s'
  for session in sessions:
    assert session['Time'].endswith(' s')
    assert {*provenance.here(), 'Time', 'Peak memory'} == set(session)


def test_only_process_0_writes(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  with provenance.session(tmp_path):
    pass
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('text', ['', '{}', '[1]', '[{"Time": 1}]', '[{'])
def test_damaged_file_is_named(tmp_path, text):
  (tmp_path / 'run.json').write_text(text)
  with pytest.raises(ValueError, match=r'run\.json: cannot be read'):
    provenance.read(tmp_path)
  with (
    pytest.raises(ValueError, match='move it away'),
    provenance.session(tmp_path),
  ):
    pass


def test_peak_memory_is_that_of_a_process():
  # Python and jax take some 0.1 GiB; no test takes a hundred.
  assert 0.02 < float(provenance.peak_memory().removesuffix(' GiB')) < 100
