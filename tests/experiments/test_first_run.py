"""The ladder of the first run, on a tiny ImageNet: its figures are missed."""

import json

from experiments import first_run


def test_the_ladder(imagenet_run, tmp_path, capsys, monkeypatch):
  arguments = [f'--config={imagenet_run(tmp_path)}']
  arguments += [
    f'--workdir={tmp_path / "first"}',
    '--config.train.batch_size=8',
    '--config.train.warmup_steps=0',
  ]
  rungs = '--rungs=zero_shot,one_epoch,merged_once,final'
  assert first_run.main([*arguments, rungs]) == 1  # stops at the first
  printed = capsys.readouterr().out
  assert 'zero_shot: missed (imagenet 0' in printed
  assert 'expected 63.24 to 63.44' in printed
  assert 'one_epoch' not in printed
  path = tmp_path / 'first' / first_run.FILE
  assert [*json.loads(path.read_text())] == ['zero_shot']

  assert first_run.main([*arguments, rungs, '--keep_going']) == 1
  measured = json.loads(path.read_text())
  assert [*measured] == ['zero_shot', 'one_epoch', 'merged_once', 'final']
  # The pair of one block: a layer each, and the angle of vectors.
  angles = {k: v for k, v in measured['merged_once'].items() if 'angle' in k}
  assert [*angles] == [f'angle of {x} in block 0' for x in first_run.LAYERS]
  assert all(0 < angle < 180 for angle in angles.values())
  assert set(measured['final']) == {'imagenet', 'shifts'}

  # Nothing is measured twice, and figures as expected pass.
  monkeypatch.setattr(first_run.loop, 'train', None)
  measured['final'] = {'imagenet': 79.89, 'shifts': 50.99}
  path.write_text(json.dumps(measured))
  assert first_run.main([*arguments, '--rungs=final']) == 0
  assert 'final: as expected' in capsys.readouterr().out
