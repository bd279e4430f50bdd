"""Flags, timing, memory and the table that all benchmarks share.

A benchmark makes rows, dicts from column to figure: they are printed as a table
and written as JSON. jax is imported where it is needed, as a process that is
measured may not need it.
"""

import argparse
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
from concurrent import futures
import datetime
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import pathlib
import resource
import shlex
import statistics
import subprocess
import sys
import time
from typing import Any

import tabulate

from modelstock_jax.formats import write


def parser(description: str | None, repeats: int) -> argparse.ArgumentParser:
  """Return a parser with the flags of every benchmark."""
  result = argparse.ArgumentParser(
    description=description,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  result.add_argument(
    '--json', type=pathlib.Path, help='file; all figures are written there'
  )
  result.add_argument(
    '--repeats', type=int, default=repeats, help='timings of each row'
  )
  return result


def setting(packages: Iterable[str]) -> dict[str, Any]:
  """Return where and when a benchmark runs; call it before measuring.

  Args:
    packages: distributions whose versions matter, if they are installed.
  """
  import jax

  return {
    'date': datetime.date.today().isoformat(),
    'command': shlex.join(['python', *sys.argv]),
    'device': f'{jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores',
    'load': os.getloadavg()[0],
    'versions': {
      name: importlib.metadata.version(name)
      for name in packages
      if importlib.util.find_spec(name)
    },
  }


def finish(
  args: argparse.Namespace,
  setting: dict[str, Any],
  rows: Sequence[dict[str, Any]],
  notes: Sequence[str] = (),
) -> None:
  """Print the table, and below it notes and setting; write `--json`."""
  print(tabulate.tabulate(rows, 'keys', 'github', floatfmt='.4g'), '\n')
  print(*notes, sep='\n')
  print(*(f'{name}: {value}' for name, value in setting.items()), sep='\n')
  if args.json:
    result = {'setting': setting, 'rows': rows, 'notes': notes}
    write.write_text(args.json, json.dumps(result, indent=1))


def measure(
  rows: dict[str, Callable[[], Any]], repeats: int, warmup: int = 2
) -> dict[str, list[float]]:
  """Time functions, which take turns within every repeat.

  A busy machine is then busy for all of them: compare figures of one call.

  Args:
    rows: what to call. jax arrays in the result are waited for.
    repeats: timings of each.
    warmup: rounds before these.

  Returns:
    Seconds of each repeat of each row.
  """
  import jax

  times: dict[str, list[float]] = {name: [] for name in rows}
  for repeat in range(warmup + repeats):
    for name, run in rows.items():
      start = time.perf_counter()
      result = run()
      jax.block_until_ready(result)
      elapsed = time.perf_counter() - start
      del result  # its memory would be in the way of the next row
      if repeat >= warmup:
        times[name].append(elapsed)
  return times


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
  """Return the columns of the median and the least of times."""
  return {
    'median ms': 1e3 * statistics.median(seconds),
    'min ms': 1e3 * min(seconds),
  }


def alone(function: Callable, *args: Any) -> Any:
  """Call a function in a new process of its own."""
  spawn = multiprocessing.get_context('spawn')
  with futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
    return pool.submit(function, *args).result()


def peak_bytes(who: int = resource.RUSAGE_SELF) -> int:
  """Return the most resident memory that this process, or a child, had."""
  unit = 1 if sys.platform == 'darwin' else 1024
  return unit * resource.getrusage(who).ru_maxrss


def run_command(command: Sequence[str]) -> tuple[float, int]:
  """Run a command; return its seconds and the peak of its memory in bytes.

  A process begins with the resident memory of the one that starts it, and the
  peak is that of all children: call this in a small process, `alone`.
  """
  start = time.perf_counter()
  done = subprocess.run(command, capture_output=True, text=True)
  seconds = time.perf_counter() - start
  if done.returncode:
    raise RuntimeError(f'{shlex.join(command)} failed:\n{done.stderr}')
  return seconds, peak_bytes(resource.RUSAGE_CHILDREN)
