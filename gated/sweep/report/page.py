"""Markdown -> one self-contained HTML page."""

import base64
import html
from collections.abc import Mapping

from markdown_it import MarkdownIt

# The page fetches nothing and runs no script.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
HEAD = f"""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --line: #d5d5d5; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e4e4e4; --paper: #16181b; --line: #3b3f45; }}
}}
body {{ font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
h1, h2 {{ line-height: 1.2; }} h2 {{ margin-top: 2.5rem; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0;
  font-size: 0.85rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.25rem 0.7rem; border-bottom: 1px solid var(--line);
  text-align: left; }}
th {{ border-bottom-width: 2px; }}
th, td[style] {{ white-space: nowrap; }}
img {{ background: #fff; max-width: 100%; border-radius: 4px; }}
</style>
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
  title = f'<title>{html.escape(title)}</title>\n</head>'
  return f'{HEAD}{title}\n<body>\n{body}\n</body>\n</html>\n'
