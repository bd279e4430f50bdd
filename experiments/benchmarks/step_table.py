"""The tables of step.py, and the peaks that its MFU is of."""

from typing import Any

import common

# bfloat16 products of dense matrices in a second, by the data sheets.
PEAKS = {
  'NVIDIA H200': 989e12,
  'NVIDIA H100 80GB HBM3': 989e12,
  'NVIDIA A100': 312e12,
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5p': 459e12,
  'TPU v5': 459e12,  # what a v5p calls itself
  'TPU v6 lite': 918e12,
}


def peak(kind: str, dtype: str) -> float | None:
  """Return FLOP/s of the data sheet; None where it is not known."""
  if dtype != 'bfloat16':
    return None
  if kind in PEAKS:
    return PEAKS[kind]
  return next((v for k, v in PEAKS.items() if kind.startswith(k + '-')), None)


def ratios(case: dict[str, Any]) -> dict[str, float]:
  """Return the ratios of the least times to those of separate steps."""
  least = {row: v['min_ms'] for row, v in case['rows'].items()}
  others = {
    row: 'one' if row.startswith('torch') else 'two_singles'
    for row in least
    if row not in ('one', 'two_singles')
  }
  return {
    f'{row} / {other}': least[row] / least[other]
    for row, other in others.items()
    if other in least
  }


def table_of(case: dict[str, Any]) -> str:
  """Return a case as Markdown."""
  lines = [
    f'{case["size"]}, {case["dtype"]}, {case["parameters"] / 1e6:.1f} M '
    'parameters',
    '',
    '| row | ms/step min | median | images/s | MFU | / matmul | peak GB |',
    '|---|--:|--:|--:|--:|--:|--:|',
  ]
  for row, values in case['rows'].items():
    peak = values.get('peak_bytes')
    lines.append(
      f'| {row} | {values["min_ms"]:.1f} | {values["median_ms"]:.1f} '
      f'| {values["images_per_s"]:.1f} | {values["mfu"]:.1%} '
      f'| {values["of_matmul"]:.1%} | {f"{peak / 1e9:.2f}" if peak else ""} |'
    )
  lines += [''] + [f'{k}: {v:.3f}' for k, v in ratios(case).items()]
  lines += [
    f'{row}: not measured: {why}' for row, why in case['failed'].items()
  ]
  lines.append(
    f'MFU of {case["peak_flops"] / 1e12:.3g} TFLOP/s ({case["peak_of"]}); '
    f'matmul {case["matmul_flops"] / 1e12:.3g} TFLOP/s; '
    f'{case["flops_per_image"] / 1e9:.3g} GFLOP an image'
  )
  if case['logits_error'] is not None:
    lines.append(
      f'logits, ours and torch in float32: {case["logits_error"]:.1e} apart'
    )
  return '\n'.join(lines) + '\n'


def footer(result: dict[str, Any]) -> str:
  """Return the lines under the tables."""
  return (
    f'batch {result["batch_size"]} for each model; {result["repeats"]} '
    f'repeats of {result["steps"]} steps\n' + common.describe(result['setting'])
  )
