"""The gate of each token, drawn over the text: one self-contained HTML page.

The page fetches nothing. Its script only recolours the text for another layer or head.

L layers  H heads  T tokens
"""

import html
import json
from collections.abc import Sequence

import numpy as np

from gated.probes.document import document

LOW, HIGH = (255, 255, 255), (46, 152, 216)  # Black text is legible on both.
# The text stays on white paper: its colours mean scores.
STYLE = """\
:root { color-scheme: light; --ink: #1b1b1b; --paper: #fff; }
#text { font: 15px/1.9 ui-monospace, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; border-top: 1px solid #d5d5d5; padding-top: 1rem; }
#text span { padding: 0.15em 0; border-radius: 2px; }
#bar { display: inline-block; width: 8rem; height: 0.8rem; border: 1px solid #d5d5d5;
  background: linear-gradient(to right, rgb(LOW), rgb(HIGH)); }
label { margin-right: 1rem; }
"""
# scores[layer][head][token] are thousandths of the range; the last layer is the mean of
# all, and so is the last head.
SCRIPT = """\
const data = JSON.parse(document.getElementById('scores').textContent);
const spans = document.querySelectorAll('#text span');
const layer = document.getElementById('layer'), head = document.getElementById('head');
const mix = share => 'rgb(' + data.low.map(
  (x, i) => Math.round(x + share * (data.high[i] - x))).join(',') + ')';
function draw() {
  const row = data.scores[layer.value][head.value];
  spans.forEach((span, i) => {
    span.style.background = mix(row[i] / 1000);
    const score = data.least + (data.most - data.least) * row[i] / 1000;
    span.title = 'token ' + i + ': ' + score.toFixed(3);
  });
}
layer.onchange = head.onchange = draw;
draw();
"""


def page(
  score: np.ndarray,
  tokens: Sequence[str],
  *,
  title: str,
  limits: tuple[float, float] = (0.0, 1.0),
) -> str:
  """Scores (L, H, T) or (L, H, T, K), and the text of each token -> an HTML page.

  Channels are averaged. Colours range over `limits`; `gates.score_range` gives those of
  each activation. ValueError unless every token has a score.
  """
  score = np.asarray(score, float)
  if score.ndim not in (3, 4) or score.shape[2] != len(tokens) or not score.size:
    raise ValueError(
      f'scores of shape {score.shape} for {len(tokens)} tokens, but (L, H, T) or '
      '(L, H, T, K) is needed'
    )
  score_LHT = score if score.ndim == 3 else score.mean(-1)
  least, most = limits
  share_LHT = np.clip((score_LHT - least) / (most - least), 0, 1)
  share_LHT = np.concatenate([share_LHT, share_LHT.mean(0, keepdims=True)])
  share_LHT = np.concatenate([share_LHT, share_LHT.mean(1, keepdims=True)], 1)
  numbers = {'scores': np.rint(1000 * share_LHT).astype(int).tolist()}
  numbers |= dict(low=LOW, high=HIGH, least=least, most=most)
  depth, heads = score_LHT.shape[:2]
  channels = 'shared by all channels' if score.ndim == 3 else 'mean over channels'
  shades = share_LHT[-1, -1]
  text = ''.join(_token(*pair) for pair in zip(tokens, shades, strict=True))
  css = STYLE.replace('LOW', _color(0)[4:-1]).replace('HIGH', _color(1)[4:-1])
  body = f"""\
<h1>{html.escape(title)}</h1>
<p>The gate score of each token ({channels}); point at a token to read it.</p>
<p>{_select('layer', depth)}{_select('head', heads)}
{least:g} <span id="bar"></span> {most:g}</p>
<div id="text">{text}</div>
<script type="application/json" id="scores">{json.dumps(numbers)}</script>
<script>
{SCRIPT}</script>"""
  return document(title, body, style=css, allow="script-src 'unsafe-inline'")


def shown(token: str) -> str:
  """A token with its line ends and tabs made visible."""
  return token.replace('\n', '⏎').replace('\t', '⇥').replace('\r', '␍')


def _token(token: str, share: float) -> str:
  after = '\n' * token.count('\n')
  text = html.escape(shown(token))
  return f'<span style="background: {_color(share)}">{text}</span>{after}'


def _color(share: float) -> str:
  mixed = (round(a + share * (b - a)) for a, b in zip(LOW, HIGH, strict=True))
  return f'rgb({", ".join(map(str, mixed))})'


def _select(name: str, count: int) -> str:
  numbers = ''.join(f'<option value="{i}">{i}</option>' for i in range(count))
  mean = f'<option value="{count}" selected>mean of {count}</option>'
  # A browser may restore an earlier choice after the script has run; not with `off`.
  select = f'<select id="{name}" autocomplete="off">{mean}{numbers}</select>'
  return f'<label>{name} {select}</label>'
