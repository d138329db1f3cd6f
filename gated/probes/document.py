"""One self-contained HTML page, which fetches nothing."""

import html

# The colours of the page and of its lines, light and dark.
STYLE = """\
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --line: #d5d5d5; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e4; --paper: #16181b; --line: #3b3f45; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); overflow-wrap: anywhere;
  background: var(--paper); max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
"""


def document(title: str, body: str, *, style: str, allow: str) -> str:
  """A title, the HTML of a body, more style -> a page.

  `allow` holds the sources of its Content-Security-Policy beside inline style.
  """
  policy = f"default-src 'none'; style-src 'unsafe-inline'; {allow}"
  return f"""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>
{STYLE}{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
