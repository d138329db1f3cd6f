"""Markdown -> one self-contained HTML page, which runs no script."""

import base64
import html
from collections.abc import Mapping

from markdown_it import MarkdownIt

from gated.probes.document import document

# A wide table scrolls inside itself.
STYLE = """\
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0;
  font-size: 0.85rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: 0.25rem 0.5rem; border-bottom: 1px solid var(--line);
  text-align: left; }
th { border-bottom-width: 2px; }
th, td[style] { white-space: nowrap; }
@media (max-width: 40rem) { td:not([style]) { min-width: 9rem; } }
p, ul { max-width: 60rem; }
img { background: #fff; max-width: 100%; border-radius: 4px; }
"""


def page(text: str, title: str, pictures: Mapping[str, bytes]) -> str:
  """Markdown, and its SVGs by file name -> an HTML page."""
  reader = MarkdownIt('commonmark', {'html': False}).enable('table')

  def image(self, tokens, index, options, env) -> str:
    token = tokens[index]
    data = base64.b64encode(pictures[token.attrs['src']]).decode()
    alt = html.escape(token.content, quote=True)
    return f'<img alt="{alt}" src="data:image/svg+xml;base64,{data}">'

  reader.add_render_rule('image', image)
  body = reader.render(text).rstrip()
  return document(title, body, style=STYLE, allow='img-src data:')
