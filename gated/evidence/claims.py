"""The claims of the paper (arXiv 2505.06708), and two beyond it, as comparisons of arms.

C1 to C25 are our numbers. A figure of the paper in nats is the logarithm of a ratio of
two perplexities.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from gated.evidence import measures as m
from gated.evidence.parts import Part, difference, level, quotient, ratio, share

# Arms beside the gate, in the order of the ledger.
RIVALS = (
  *('sink_token', 'sink_logit', 'off_by_one', 'softpick', 'sigmoid', 'elastic'),
  *('differential', 'v_scale', 'gated_norm', 'pre_affine', 'dyt'),
)


@dataclass(frozen=True, kw_only=True)
class Claim:
  """A claim; it is supported if all its parts are."""

  name: str  # C1
  words: str  # One plain sentence.
  parts: Sequence[Part] = ()
  # The measurement, and the paper's figure, if results do not contain it yet.
  missing: str = ''
  paper: str = ''
  elsewhere: str = ''  # Figures outside of the results, in words.


VARIANTS = 'elementwise', 'headwise', 'shared', 'g2', 'input_independent', 'ns_sigmoid'
SINK, MASSIVE = (m.has_sink,), (m.has_massive_activations,)


def sensitivity(weights: dict[str, float], words: str, *, sense='>', **more: Any) -> Part:
  """A sum of LR sensitivities."""
  words = f'LR sensitivity, {words},'
  fixed: dict[str, Any] = {'sample': m.sensitivity, 'kind': 'nats', 'bound': 0.0}
  return Part(weights=weights, words=words, sense=sense, **fixed, **more)


def across(knobs: tuple[str, ...], part: Part, words: str) -> Part:
  """A part -> the part about its change between two settings (`Part.across`)."""
  return replace(part, across=knobs, words=f'{part.words[:-1]}: {words},')


def _gain(knobs: tuple[str, ...], words: str, paper: str) -> Part:
  """The change between settings of the elementwise gate's difference in loss."""
  return across(knobs, difference('elementwise', paper=paper), words)


def _steady(number: m.Number) -> Part:
  return ratio(number, 'attached', bound=1.25, sense='=', paper='unchanged')


def _compare(a: str, b: str, paper: str) -> Part:
  return difference(a, b, paper=paper)


CLAIMS: tuple[Claim, ...] = (
  Claim(
    name='C1',
    words='An elementwise gate after SDPA lowers the loss at equal parameters.',
    parts=[
      difference(
        'elementwise', paper='-0.0127 (28 layers), -0.0181 (48 layers)', matched=True
      )
    ],
  ),
  Claim(
    name='C2',
    words='The best position is after SDPA, then the value; query, key and output '
    'gates gain little.',
    parts=[
      _compare('elementwise', 'g2', '-0.0102'),
      _compare('g2', 'g4', '-0.0273'),
      share('g4', sense='<', bound=0.25, paper='0.17'),
      share('g3', sense='<', bound=0.25, paper='0.04'),
      share('g5', sense='<', bound=0.25, paper='0.03'),
    ],
  ),
  Claim(
    name='C3',
    words='A headwise gate keeps most of the gain.',
    parts=[share('headwise', sense='>', bound=0.5, paper='0.88 (MoE), 0.38 (48 layers)')],
  ),
  Claim(
    name='C4',
    words='Gates of single heads beat one gate that all heads share.',
    parts=[
      difference('shared', 'headwise', sense='>', paper='+0.0016'),
      ratio(
        m.F_ATTN, 'shared', 'headwise', sense='>', bound=2.0, needs=SINK, paper='4.1'
      ),
    ],
  ),
  Claim(
    name='C5',
    words='Multiplying beats adding, and the sigmoid beats SiLU.',
    parts=[
      _compare('elementwise', 'additive_silu', '-0.0104'),
      _compare('elementwise', 'multiplicative_silu', '-0.0105'),
    ],
  ),
  Claim(
    name='C6',
    words='The gate gains more than as many parameters elsewhere.',
    parts=[
      _compare('elementwise', 'kv_heads_x2', '-0.0371'),
      _compare('elementwise', 'heads_x1.5', '-0.0328'),
      _compare('elementwise', 'experts_plus_4', '-0.0346'),
    ],
  ),
  Claim(
    name='C7',
    words='A non-linearity between value and output projection helps by itself.',
    parts=[
      difference('sdpa_rmsnorm', paper='-0.0302'),
      difference('sdpa_silu', paper='-0.0085'),
      difference('additive_identity', paper='-0.0242'),
    ],
  ),
  Claim(
    name='C8',
    words='Gate scores are sparse after training.',
    parts=[
      level(m.GATE, 'elementwise', sense='<', bound=0.3, paper='0.116'),
      level(m.GATE_SMALL, 'elementwise', sense='>', bound=0.5, paper='0.61 (released)'),
      level(m.GATE_MODE, 'elementwise', sense='<', bound=0.1, paper='0'),
    ],
  ),
  Claim(
    name='C9',
    words='The gate removes the attention sink.',
    parts=[
      ratio(m.F_ATTN, 'elementwise', sense='<', bound=0.2, needs=SINK, paper='0.10'),
      quotient(m.SINK, 'elementwise', sense='<', bound=0.2, needs=SINK, paper='–'),
    ],
  ),
  Claim(
    name='C10',
    words='The gate removes massive activations.',
    parts=[
      ratio(m.M_ACT, 'elementwise', sense='<', bound=0.2, needs=MASSIVE, paper='0.09'),
      ratio(m.KURTOSIS, 'elementwise', sense='<', bound=1.0, needs=MASSIVE, paper='–'),
    ],
  ),
  Claim(
    name='C11',
    words='A sink needs no massive activations: a value gate removes only these.',
    parts=[
      ratio(m.M_ACT, 'g2', sense='<', bound=0.2, needs=MASSIVE, paper='0.12'),
      ratio(m.F_ATTN, 'g2', sense='>', bound=0.5, needs=SINK, paper='0.64'),
    ],
  ),
  Claim(
    name='C12',
    words='Sparse, input-dependent scores remove the sink; a non-linearity does not.',
    parts=[
      ratio(m.F_ATTN, 'ns_sigmoid', sense='>', bound=0.5, needs=SINK, paper='0.97'),
      ratio(m.M_ACT, 'ns_sigmoid', sense='>', bound=0.5, needs=MASSIVE, paper='0.85'),
      ratio(
        m.F_ATTN, 'input_independent', sense='>', bound=0.5, needs=SINK, paper='0.78'
      ),
      Part(
        words="Spearman's rho of mean gate score and F-Attn over six gates",
        weights={'all arms': 1.0},
        of=VARIANTS,
        sample=m.correlation(m.GATE, m.F_ATTN),
        sense='>',
        bound=0.8,
        kind='level',
        needs=SINK,
        paper='1.0',
      ),
    ],
  ),
  Claim(
    name='C13',
    words='Sink and massive activations begin at the same layer.',
    parts=[
      level(
        m.ONSETS,
        'baseline',
        sense='<',
        bound=1.5,
        needs=SINK + MASSIVE,
        paper='the same layer',
      )
    ],
  ),
  Claim(
    name='C14',
    words='The gate makes outputs sparse beyond scaling them.',
    parts=[
      level(m.SPARSER[0], 'elementwise', sense='>', bound=0.0, paper='0.11'),
      level(m.SPARSER[1], 'elementwise', sense='>', bound=0.0, paper='0.046'),
    ],
  ),
  Claim(
    name='C15',
    words='The gate removes loss spikes at the learning rate that is best without it.',
    parts=[
      quotient(
        m.SPIKES,
        'elementwise',
        sample=m.at_best_of_baseline,
        sense='<',
        bound=0.1,
        needs=(m.has_spikes,),
        paper='0 (0 against 75 spikes)',
      )
    ],
  ),
  Claim(
    name='C16',
    words='The gate allows larger learning rates.',
    parts=[
      sensitivity(
        {'baseline': 1.0, 'elementwise': -1.0}, 'baseline minus elementwise', paper='–'
      ),
      Part(
        words="loss at twice the baseline's best learning rate minus loss at it, "
        'baseline minus elementwise,',
        weights={'baseline': 1.0, 'elementwise': -1.0},
        sample=m.rise,
        sense='>',
        bound=0.0,
        kind='nats',
        paper='+0.209',
      ),
    ],
  ),
  Claim(
    name='C17',
    words='Sandwich norm also allows larger learning rates, but gains nothing.',
    parts=[
      sensitivity(
        {'baseline': 1.0, 'sandwich': -1.0},
        'baseline minus sandwich',
        needs=(m.is_unstable,),
        paper='–',
      ),
      difference('sandwich', sense='=', bound=0.01, paper='-0.0019'),
    ],
  ),
  Claim(
    name='C18',
    words='Clipping the branches does not restore stability.',
    parts=[
      sensitivity(
        {name: 1.0, 'baseline': -0.5},
        f"{name} minus half of baseline's",
        needs=(m.is_unstable,),
        paper='diverges',
      )
      for name in ('clip300', 'clip100')
    ],
  ),
  Claim(
    name='C19',
    words='The gate gains more in deeper models and with more training.',
    parts=[
      _gain(('model.depth',), 'deepest minus shallowest', '-0.0054 (48 and 28 layers)'),
      _gain(
        ('steps', 'optim.warmup', 'optim.decay', 'eval.every'),
        'most minus fewest steps',
        '-0.0181 (with batch and learning rate)',
      ),
    ],
  ),
  Claim(
    name='C20',
    words='After YaRN, long contexts are better with the gate; short ones are equal.',
    missing='loss by position and retrieval, within and beyond the trained length, after '
    'a larger RoPE base, a short continuation and YaRN with factor 4',
    paper='+0.3 to +1.7 points; with YaRN +5 to +35, and +27 to +29 beyond',
    elsewhere='experiments/long/README.md has those of 1 seed, with mixed signs',
  ),
  Claim(
    name='C21',
    words='A gate that is added in continued training changes nothing.',
    parts=[
      replace(part, continued=True, needs=needs)
      for part, needs in (
        (_steady(m.F_ATTN), SINK),
        (_steady(m.M_ACT), MASSIVE),
        (difference('attached', sense='=', bound=0.01, paper='no gain'), ()),
      )
    ],
  ),
  Claim(
    name='C22',
    words="SwitchHead's gain survives with one expert.",
    parts=[
      share('switch_v_1top1', 'switch_v_4top4', sense='>', bound=0.75, paper='1.06'),
      share('switch_v_1top1', 'switch_v_8top2', sense='>', bound=0.75, paper='1.41'),
    ],
  ),
  Claim(
    name='C23',
    words='The gate costs at most 2% of the time.',
    missing='time of a step with and without each gate, alternating on one device, over '
    'that without; the points of a campaign may share theirs',
    paper='below 2%',
    elsewhere='README.md has 1.7% (headwise) and 6.6% (elementwise) for 1.7B parameters',
  ),
  Claim(
    name='C24',
    words='Beyond the paper: instability without a gate comes from bfloat16.',
    parts=[
      across(
        ('model.numerics.compute',),
        sensitivity(weights, words, sense='<', paper='untested'),
        'float32 minus bfloat16',
      )
      for weights, words in (
        ({'baseline': 1.0}, 'baseline'),
        ({'baseline': 1.0, 'elementwise': -1.0}, 'baseline minus elementwise'),
      )
    ],
  ),
  Claim(
    name='C25',
    words='Beyond the paper: the gate beats other remedies for sinks.',
    parts=[_compare('elementwise', name, '–') for name in RIVALS],
  ),
)
