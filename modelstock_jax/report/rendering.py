"""Pages and model cards, written from the files in templates/."""

import functools
import re
from typing import Any

import jinja2
import markupsafe


def render(template: str, **values: Any) -> str:
  """Render a file of templates/; values of a .html are escaped.

  Args:
    template: the name of the file.
    **values: that it names, all of them.

  Returns:
    The text.
  """
  return _environment().get_template(template).render(**values)


def words(text: str) -> markupsafe.Markup:
  """Escape words; of Markdown it knows **bold** and `code`, and it knows ± sd.

  >>> str(words('**2 ± 1** is `t < 3`'))
  '<strong>2<small> ± 1</small></strong> is <code>t &lt; 3</code>'
  """
  escaped = str(markupsafe.escape(text))
  escaped = re.sub(r' ± [\d.]+', r'<small>\g<0></small>', escaped)
  escaped = re.sub(r'\*\*(.+?)\*\*', r'<strong>\1</strong>', escaped)

  def code(match: re.Match[str]) -> str:
    # A path may be broken after a slash.
    return f'<code>{match[1].replace("/", "/<wbr>")}</code>'

  return markupsafe.Markup(re.sub(r'`(.+?)`', code, escaped))


def minus(text: str) -> str:
  r"""Write the minus signs of numbers as such.

  >>> minus('-1.5, 1.0-2.0').encode('ascii', 'namereplace').decode()
  '\\N{MINUS SIGN}1.5, 1.0-2.0'
  """
  return re.sub(r'(?<![\w`.-])-(?=\d)', '\N{MINUS SIGN}', text)


@functools.cache
def _environment() -> jinja2.Environment:
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader('modelstock_jax.report'),
    autoescape=jinja2.select_autoescape(['html']),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
  )
  environment.filters |= {'words': words, 'minus': minus}
  return environment
