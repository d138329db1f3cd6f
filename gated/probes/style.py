"""The style of figures for a paper: fonts, colours, lines and files.

Sizes are those in print. Lines differ in colour (Okabe and Ito's, for the colour-blind),
marker and dash, so that they are distinct in grey print. The same numbers give the same
bytes. Needs matplotlib.
"""

import functools
import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gated import storage

WIDTH = 3.3  # Of a column, in inches.
COLORS = (
  '#0072B2',
  '#D55E00',
  '#009E73',
  '#E69F00',
  '#CC79A7',
  '#56B4E9',
  '#000000',
  '#F0E442',
)
MARKERS = ('o', 's', '^', 'D', 'v', 'P', '>')
DASHES = ('-', (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (3, 1, 1, 1, 1, 1)))
GREY = '#666666'
STYLE: Any = {
  'font.size': 8,
  'axes.titlesize': 8,
  'axes.labelsize': 8,
  'xtick.labelsize': 7,
  'ytick.labelsize': 7,
  'legend.fontsize': 7,
  'legend.frameon': False,
  'axes.linewidth': 0.6,
  'axes.edgecolor': GREY,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.grid': True,
  'grid.color': '#e6e6e6',
  'grid.linewidth': 0.5,
  'axes.axisbelow': True,
  'lines.linewidth': 1.2,
  'lines.markersize': 4,
  'xtick.major.width': 0.6,
  'ytick.major.width': 0.6,
  'figure.constrained_layout.use': True,
  'savefig.dpi': 300,
  'svg.hashsalt': 'gated',
  'pdf.fonttype': 42,  # TrueType, required by conferences.
  # Config values are not formulas.
  'text.parse_math': False,
}
# Format -> metadata; None omits an entry that holds the time.
FORMATS = {'svg': {'Date': None}, 'pdf': {'CreationDate': None}, 'png': {}}


def look(index: int) -> dict[str, Any]:
  """The look of the line with this index; the first 280 are distinct."""
  at = lambda table: table[index % len(table)]
  return {'color': at(COLORS), 'marker': at(MARKERS), 'ls': at(DASHES)}


def wrapped(name: str, width: int) -> str:
  """A name wrapped to at most three lines."""
  return '\n'.join(textwrap.wrap(name, width, max_lines=3, placeholder=' ...'))


def styled(draw: Callable) -> Callable:
  """A function that draws -> the same in STYLE."""

  @functools.wraps(draw)
  def run(*args, **options):
    with matplotlib.rc_context(STYLE):
      return draw(*args, **options)

  return run


@styled
def save(
  figure: Figure,
  folder: storage.PathLike,
  name: str,
  formats: tuple[str, ...] = (*FORMATS,),
) -> None:
  """A figure -> FOLDER/NAME.svg, .pdf and .png."""
  figure.draw_without_rendering()
  # Keep this layout: computing it takes as long as drawing.
  figure.set_layout_engine('none')
  for kind in formats:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata=FORMATS[kind])
    storage.write(storage.path(folder) / f'{name}.{kind}', buffer.getvalue())


def nonempty(given: Mapping[str, Any]) -> Mapping[str, Any]:
  """Reports by label -> the same; ValueError if there are none."""
  if not isinstance(given, Mapping) or not given:
    raise ValueError('nothing to draw: pass {label: report of a run}')
  return given


def value(label: str, report: Mapping[str, Any], name: str) -> Any:
  """-> what a report has by this name; ValueError names the label if it has nothing."""
  try:
    return report[name]
  except (KeyError, TypeError) as error:
    raise ValueError(f'{label}: the report lacks {name!r}') from error


def values(reports: Mapping[str, Any], name: str) -> dict[str, Any]:
  """Reports by label -> what each has by this name; ValueError if one lacks it."""
  return {label: value(label, each, name) for label, each in nonempty(reports).items()}


def entry(label: str, **look: Any) -> Line2D:
  """An entry of a legend."""
  return Line2D([], [], label=label, **look)


def legend(
  figure: Figure,
  labels: Mapping[int, str],
  more: Sequence[Line2D] = (),
  *,
  markers: bool = True,
  place: str = 'lower',
) -> None:
  """A legend below (or above) the figure: the runs by index, then other lines."""
  plain = {} if markers else {'marker': '', 'ls': '-'}
  handles = [entry(wrapped(x, 40), **look(i) | plain) for i, x in labels.items()]
  handles += more
  narrow = max(len(str(h.get_label())) for h in handles) <= 20
  options: Any = dict(loc=f'outside {place} center', ncols=2 if narrow else 1)
  figure.legend(handles=handles, handlelength=3, **options)
