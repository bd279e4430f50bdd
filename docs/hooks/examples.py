"""Lets the examples of docstrings, which begin with `>>>`, be shown as code."""

from typing import Any

import griffe


def fence(text: str) -> str:
  """Puts fences around paragraphs that are examples.

  Args:
    text: a docstring, dedented.

  Returns:
    The same, in which no paragraph begins with `>>>`, a quotation in Markdown.
  """
  paragraphs = text.split('\n\n')
  return '\n\n'.join(
    f'```pycon\n{p.strip()}\n```' if p.lstrip().startswith('>>>') else p
    for p in paragraphs
  )


class Examples(griffe.Extension):
  """Changes docstrings as they are read."""

  def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
    """Called by griffe with each module, class, function and attribute."""
    if obj.docstring:
      obj.docstring.value = fence(obj.docstring.value)
