"""The table of merge.py."""

from typing import Any


def table(results: list[dict[str, Any]]) -> str:
  """Return the results as a Markdown table, times in milliseconds."""
  lines = [
    '| model | merge | median ms | min ms | GB/s | x limit (min) '
    '| mergekit / it (min) |',
    '|---|---|--:|--:|--:|--:|--:|',
  ]
  for result in results:
    model = f'{result["size"]}, {result["dtype"]}'
    if 'left_out' in result:
      lines.append(f'| {model} | left out: {result["left_out"]} | | | | | |')
      continue
    for name, row in result['merges'].items():
      if row is None:
        lines.append(f'| {model} | {name} | not installed | | | | |')
        continue
      ratio = f'{row["mergekit_x"]:.2f}' if 'mergekit_x' in row else ''
      lines.append(
        f'| {model} | {name} | {row["median_ms"]:.1f} | {row["min_ms"]:.1f} '
        f'| {row["gb_s"]:.1f} | {row["x_limit"]:.2f} | {ratio} |'
      )
    limit, moved = result['limit_ms'], result['bytes_moved']
    arrays = moved // result['array_bytes']
    lines.append(
      f'| {model} | limit: {arrays} arrays, {moved * 1e-9:.2f} GB | '
      f'| {limit:.1f} | {moved / limit * 1e-6:.1f} | 1.00 | |'
    )
  lines.append('')
  for result in results:
    if 'left_out' not in result:
      rates = result['bandwidth_gb_s'].items()
      shown = ', '.join(f'{name} {rate:.1f} GB/s' for name, rate in rates)
      lines.append(
        f'{result["size"]}, {result["dtype"]}: '
        f'{result["parameters"] / 1e6:.1f} M parameters in '
        f'{result["leaves"]} leaves, load {result["load"]:.1f}; {shown}'
      )
  return '\n'.join(lines)
