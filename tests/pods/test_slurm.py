"""docs/pods/train.sbatch on a cluster of one node: this machine.

Run by `make test-slurm`, as root, with Debian's slurmctld, slurmd,
slurm-client and munge. Two tasks of one device each train.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.slurm

SCRIPT = pathlib.Path(__file__).parents[2] / 'docs' / 'pods' / 'train.sbatch'
HOST = socket.gethostname().partition('.')[0]
SETTINGS = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={port}
SlurmdPort={other}
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=30
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def _run(*command, **settings):
  done = subprocess.run(
    command, capture_output=True, text=True, check=False, **settings
  )
  assert done.returncode == 0, f'{command}: {done.stderr}'
  return done.stdout


def _until(condition, seconds, text):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline, text()
    time.sleep(0.2)


@pytest.fixture(scope='module')
def cluster(tmp_path_factory):
  """Starts the daemons of SLURM; its commands find them by SLURM_CONF."""
  folder = tmp_path_factory.mktemp('slurm')
  for path in (folder, *list(folder.parents)[:2]):
    path.chmod(0o755)  # munge demands that its folder can be read
  with contextlib.ExitStack() as stack:
    ports = []
    for _ in range(2):
      probe = stack.enter_context(socket.socket())
      probe.bind(('', 0))
      ports.append(probe.getsockname()[1])
  for name in ('state', 'spool'):
    (folder / name).mkdir()
  key, conf = folder / 'munge.key', folder / 'slurm.conf'
  key.write_bytes(os.urandom(64))
  key.chmod(0o600)
  conf.write_text(
    SETTINGS.format(host=HOST, folder=folder, port=ports[0], other=ports[1])
  )
  daemons = [
    [
      *('munged', '--foreground', f'--socket={folder}/munge.socket'),
      *(f'--key-file={key}', f'--pid-file={folder}/munge.pid'),
      *(f'--seed-file={folder}/munge.seed', f'--log-file={folder}/munge.log'),
    ],
    ['slurmctld', '-D', '-f', conf],
    ['slurmd', '-D', '-f', conf],
  ]
  with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
    patch.setenv('SLURM_CONF', str(conf))
    log = stack.enter_context((folder / 'daemons.log').open('w'))
    for command in daemons:
      program = shutil.which(command[0])
      assert program, f'{command[0]} is not installed: see the Makefile'
      daemon = subprocess.Popen(
        [program, *command[1:]], stdout=log, stderr=subprocess.STDOUT
      )
      stack.callback(daemon.wait)
      stack.callback(daemon.terminate)
      time.sleep(0.5)

    def ready():
      shown = subprocess.run(
        ['sinfo', '--noheader', '--format=%T'],
        capture_output=True,
        text=True,
        check=False,
      )
      return shown.stdout.strip() == 'idle'

    _until(ready, 60, (folder / 'daemons.log').read_text)
    yield folder


class _Job:
  """A job of two tasks that train, each on a device."""

  def __init__(self, folder, flags):
    self.folder = folder
    folder.mkdir()
    environment = {
      **os.environ,
      'PATH': f'{pathlib.Path(sys.executable).parent}:{os.environ["PATH"]}',
      'JAX_NUM_CPU_DEVICES': '1',
    }
    sizes = ('--nodes=1', '--ntasks-per-node=2', '--export=ALL')
    arguments = [f'--workdir={folder}/run', *flags]
    command = ['sbatch', '--parsable', *sizes, str(SCRIPT), *arguments]
    _run('sbatch', '--test-only', *command[2:], env=environment)
    self.id = _run(*command, cwd=folder, env=environment).strip()

  def printed(self):
    path = self.folder / f'modelstock-{self.id}.log'
    return path.read_text() if path.exists() else ''

  def until(self, condition):
    _until(condition, 240, self.printed)

  def state(self, key):
    shown = _run('scontrol', 'show', 'job', self.id)
    return re.search(rf'\b{key}=(\S+)', shown)[1]

  def steps(self):
    path = self.folder / 'run' / 'metrics.jsonl'
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(x)['step'] for x in lines if x.endswith('}')]

  def start_again(self):
    """Starts what waits in the queue, where SLURM holds it for two minutes."""
    self.until(lambda: self.state('JobState') == 'PENDING')
    _run('scontrol', 'update', f'JobId={self.id}', 'StartTime=now')

  def finish(self):
    ended = ('COMPLETED', 'FAILED', 'CANCELLED', 'NODE_FAIL')
    self.until(lambda: self.state('JobState') in ended)
    return self.state('ExitCode')


@pytest.fixture(scope='module')
def flags(tiny_flags):
  """A run that takes longer than it takes to act."""
  changes = {'train.epochs': 30, 'checkpoint.every_merges': 10}
  return [
    f'--config={SCRIPT.parents[2]}/configs/digits.py',
    *tiny_flags(changes),
  ]


@pytest.fixture(scope='module')
def unbroken(cluster, flags):
  """The metrics of a run that nobody stops, without times."""
  job = _Job(cluster / 'unbroken', flags)
  assert job.finish() == '0:0', job.printed()
  assert job.state('Restarts') == '0'
  return _values(job)


def _values(job):
  lines = (job.folder / 'run' / 'metrics.jsonl').read_text().splitlines()
  records = [json.loads(line) for line in lines]
  return [
    {k: v for k, v in record.items() if k != 'images_per_second'}
    for record in records
  ]


# As at the end of its time; and killed, as by an administrator.
STOPS = [('scancel --signal=TERM', True), ('scontrol requeue', False)]


@pytest.mark.parametrize(('command', 'saves'), STOPS)
def test_stopped_and_requeued(command, saves, cluster, flags, unbroken):
  job = _Job(cluster / command.split()[0], flags)
  job.until(lambda: max(job.steps(), default=0) >= 40)
  _run(*command.split(), job.id)
  job.until(lambda: job.state('Restarts') == '1')
  job.start_again()
  assert job.finish() == '0:0', job.printed()
  assert ('SIGTERM at step' in job.printed()) == saves
  assert 'Resuming from step' in job.printed()
  assert _values(job) == unbroken
