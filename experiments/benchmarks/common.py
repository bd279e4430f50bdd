"""Parts that the benchmarks share: flags, settings, alternating rows.

jax is imported where it is needed: a process that is measured may not need it.
"""

import argparse
from collections.abc import Callable
from collections.abc import Iterable
from concurrent import futures
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import platform
import resource
import shlex
import sys
import time
import traceback
from typing import Any


def parser(description: str | None, repeats: int) -> argparse.ArgumentParser:
  """Return a parser with the flags that benchmarks share."""
  result = argparse.ArgumentParser(
    description=description,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  result.add_argument('--json', type=pathlib.Path, help='write the result here')
  result.add_argument('--repeats', type=int, default=repeats)
  return result


def write(result: dict[str, Any], path: pathlib.Path | None) -> None:
  """Write a result as JSON, where a path is given."""
  if path:
    path.write_text(json.dumps(result, indent=1) + '\n', encoding='utf-8')


def peak_bytes() -> int:
  """Return the most memory this process ever had."""
  unit = 1 if sys.platform == 'darwin' else 1024
  return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def setting(packages: Iterable[str]) -> dict[str, Any]:
  """Return where and when a benchmark runs; call it before measuring.

  Args:
    packages: distributions whose versions matter.

  Returns:
    What JSON can hold: date, command, device, devices (their number), load
    (the average of the last minute) and versions.
  """
  import jax

  script, *flags = sys.argv
  return {
    'date': datetime.date.today().isoformat(),
    'command': shlex.join(
      ['python', f'experiments/benchmarks/{pathlib.Path(script).name}', *flags]
    ),
    'device': device_name(),
    'devices': jax.device_count(),
    'load': os.getloadavg()[0],
    'versions': versions(packages),
  }


def describe(setting: dict[str, Any]) -> str:
  """A setting as the lines under a table."""
  found = ', '.join(f'{k} {v}' for k, v in setting['versions'].items())
  return '\n'.join(
    [
      f'`{setting["command"]}`',
      f'{setting["date"]}; {setting["devices"]} x {setting["device"]}; load '
      f'{setting["load"]:.1f} at the start; {found}',
    ]
  )


def device_name() -> str:
  """The accelerator, or the processor and its cores."""
  import jax

  device = jax.devices()[0]
  if device.platform != 'cpu':
    return device.device_kind
  info = pathlib.Path('/proc/cpuinfo')
  lines = info.read_text().splitlines() if info.exists() else []
  names = [x.split(':')[1].strip() for x in lines if x.startswith('model name')]
  model = names[0] if names else platform.processor()
  return f'{model}, {os.cpu_count()} cores'


def versions(packages: Iterable[str]) -> dict[str, str]:
  """Versions of Python and of packages, 'not installed' where one is not."""
  found = {'python': platform.python_version()}
  for name in packages:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = 'not installed'
  return found


def measure(
  rows: dict[str, Callable[[], Any]], repeats: int, warmup: int = 2
) -> dict[str, list[float]]:
  """Times functions, which take turns within every repeat.

  So a busy machine is busy for all of them: compare figures of one call.

  Args:
    rows: what to call. jax arrays in the result are waited for; what others
      have started on a device, a row has to wait for by itself.
    repeats: how often each is timed.
    warmup: rounds before, which are not.

  Returns:
    Milliseconds of each repeat of each row.
  """
  import jax

  times: dict[str, list[float]] = {name: [] for name in rows}
  for repeat in range(warmup + repeats):
    for name, run in rows.items():
      start = time.perf_counter()
      result = run()
      jax.block_until_ready(result)
      elapsed = 1e3 * (time.perf_counter() - start)
      del result  # or its memory would be in the way of the next row
      if repeat >= warmup:
        times[name].append(elapsed)
  return times


def alone(function: Callable, *args: Any) -> Any:
  """Call a function in a new process of its own."""
  spawn = multiprocessing.get_context('spawn')
  with futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
    return pool.submit(function, *args).result()


def one_line(error: BaseException) -> str:
  """Return an error as a line of at most 200 characters."""
  text = ''.join(traceback.format_exception_only(error))
  return ' '.join(text.split())[:200]
