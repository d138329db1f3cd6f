"""The 13 tasks of RULER (arXiv 2404.06654): random draws -> items.

Templates, numbers and the order of the draws are those of github.com/NVIDIA/RULER
(scripts/data/synthetic, scripts/synthetic.yaml), and so are the shuffles, which are the
same in all items. Texts and words are parameters. A generator of random numbers makes all
draws of an item.
"""

import functools
import math
import random
import string
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gated.evals.ruler.texts import Texts, sentences

SEED = 42  # Of the shuffles.
SHORT = 4096  # Tokens below which RULER takes smaller steps and fewer words.
NEEDLE = 'One of the special magic {kind} for {key} is: {value}.'
NOISE = (
  'The grass is green. The sky is blue. The sun is yellow. Here we go. There and back '
  'again.'
)
DEPTHS = [*np.round(np.linspace(0, 100, num=40)).astype(int).tolist()]  # Percent.
SEVERAL = (
  'Some special magic {kind} are hidden within the following text. Make sure to memorize '
  'it. I will quiz you about the {kind} afterwards.\n{context}\nWhat are all the special '
  'magic {kind} for {query} mentioned in the provided text? The special magic {kind} for '
  '{query} mentioned in the provided text are'
)
ONE = SEVERAL.replace('Some', 'A').replace('are all', 'is').replace('are', 'is')
CHAIN = (
  'Memorize and track the chain(s) of variable assignment hidden in the following text.'
  '\n\n{context}\nQuestion: Find all variables that are assigned the value {query} in '
  'the text above. Answer: According to the chain(s) of variable assignment in the text '
  'above, {count} variables are assgined the value {query}, they are: '
)
COMMON = (
  'Below is a numbered list of words. In these words, some appear more often than '
  'others. Memorize the ones that appear most often.\n{context}\nQuestion: What are the '
  '10 most common words in the above list? Answer: The top 10 words that appear most '
  'often in the list are:'
)
FREQUENT = (
  'Read the following coded text and track the frequency of each coded word. Find the '
  'three most frequently appeared coded words. {context}\nQuestion: Do not provide any '
  "explanation. Please ignore the dots '....'. What are the three most frequently "
  'appeared words in the above coded text? Answer: According to the coded text above, '
  'the three most frequently appeared words are:'
)
ASK = (
  'Answer the question based on the given documents. Only give me the answer and do not '
  'output any other words.'
)
DOCUMENTS = (
  f'{ASK}\n\nThe following are given documents.\n\n{{context}}\n\n{ASK}\n\nQuestion: '
  '{query} Answer:'
)
LETTERS = 6  # Of a coded word.
UNIQUE = 60  # Coded words with which the three most frequent ones are unique.
HOPS = 4


class Draw(NamedTuple):
  """An item as text."""

  prompt: str  # with the start of the answer
  answers: tuple[str, ...]
  reference: str  # an answer, as it continues the prompt
  depth: float | None = None  # of the first needle, from 0 to 1


class Place(NamedTuple):
  """The item to draw."""

  length: int  # tokens, as asked
  index: int  # its number
  example: str = ''  # a solved item, before the item of `vt`


class Sizes(NamedTuple):
  """Sizes that a task tries: first, first + step, ...; below first, all from least."""

  first: int
  step: int
  least: int
  most: int


@dataclass(frozen=True, kw_only=True)
class Task:
  """draw(rng, texts, size, place) -> an item of `size` units of context."""

  draw: Callable[[random.Random, Texts, int, Place], Draw]
  sizes: Callable[[Texts, int], Sizes]  # of a length
  new: int  # generated tokens
  any_of: bool = False  # one of the answers is enough


def needles(
  rng: random.Random,
  texts: Texts,
  size: int,
  place: Place,
  *,
  haystack: str,
  key: str = 'words',
  value: str = 'numbers',
  keys: int = 1,
  values: int = 1,
  queries: int = 1,
) -> Draw:
  """Needles 'key: value' in a haystack of words, noise or other needles.

  The size is words of an essay, or sentences.
  """
  names, found, lines = [], [], []
  line_of = lambda name, each: NEEDLE.format(kind=value, key=name, value=each)
  for _ in range(max(keys, queries)):
    names.append(DRAWS[key](rng, texts))
    found.append([DRAWS[value](rng, texts) for _ in range(values)])
    lines += [line_of(names[-1], each) for each in found[-1]]
  random.Random(SEED).shuffle(lines)
  if haystack == 'essay':
    context = _in_essay(rng, texts, size, lines)
  else:
    hay = [NOISE] * size
    if haystack == 'needles':
      hay = [line_of(DRAWS[key](rng, texts), DRAWS[value](rng, texts)) for _ in hay]
    places = sorted(rng.sample(range(size), len(lines)), reverse=True)
    for i, line in zip(places, lines):
      hay.insert(i, line)
    context = '\n'.join(hay)
  chosen = rng.sample(range(len(names)), queries)
  asked = [names[i] for i in chosen]
  answers = [each for i in chosen for each in found[i]]
  query = ', '.join(asked[:-1]) + ', and ' + asked[-1] if asked[1:] else asked[0]
  one = queries * values == 1
  prompt = (ONE if one else SEVERAL).format(
    kind=value[:-1] if one else value, context=context, query=query
  )
  depth = context.index(line_of(asked[0], answers[0])) / len(context)
  return Draw(prompt, tuple(answers), ' ' + ', '.join(answers), depth)


def _in_essay(rng: random.Random, texts: Texts, size: int, lines: list[str]) -> str:
  """Lines between the sentences of an essay's first words; a short essay is repeated."""
  parts = _opening(texts.essay, size)
  ends = sorted(int(len(parts) * (d / 100)) for d in rng.sample(DEPTHS, len(lines)))
  pieces, start = [], 0
  for end, line in zip(ends, lines):
    pieces += [' '.join(parts[start:end]), line]
    start = end
  return ' '.join([*pieces, ' '.join(parts[start:])])


@functools.lru_cache(maxsize=8)
def _opening(essay: tuple[str, ...], size: int) -> list[str]:
  repeated = essay * -(-size // len(essay))
  return sentences(' '.join(repeated[:size]))


DRAWS: dict[str, Callable[[random.Random, Texts], str]] = {
  'numbers': lambda rng, _: str(rng.randint(10**6, 10**7 - 1)),
  'words': lambda rng, texts: texts.pair(rng.randrange(texts.pairs)),
  'uuids': lambda rng, _: str(uuid.UUID(int=rng.getrandbits(128), version=4)),
}


def chain(
  rng: random.Random, texts: Texts, size: int, place: Place, *, letters: int = 5
) -> Draw:
  """Assignments X = 12345, Y = X, ... in `size` times the noise, after an example."""
  count = HOPS + 1
  names: dict[str, None] = {}
  while len(names) < count:
    names |= {''.join(rng.choices(string.ascii_uppercase, k=letters)): None}
  first, *others = names
  value = rng.randrange(10000, 99999)
  lines = [f'VAR {first} = {value}']
  lines += [f'VAR {b} = VAR {a} ' for a, b in zip(names, others)]
  noise = [NOISE + '\n'] * size
  if size <= count:
    parts = [part for text in noise for part in text.split('.')]
    noise = [part + '.' if part.strip() else part for part in parts]
  for i, at in enumerate(sorted(rng.sample(range(len(noise)), count))):
    noise.insert(at + i, lines[i])
  context = ' '.join(noise).replace('. \n', '.\n')
  prompt = CHAIN.format(context=context, query=value, count=count)
  example = f'{renamed(rng, place.example)}\n\n' if place.example else ''
  return Draw(example + prompt, tuple(names), ' ' + ' '.join(names))


def renamed(rng: random.Random, example: str) -> str:
  """An example of `chain` -> the same with other variables."""
  for name in example.rpartition('they are: ')[2].split():
    example = example.replace(
      name, ''.join(rng.choices(string.ascii_uppercase, k=len(name)))
    )
  return example


def common(rng: random.Random, texts: Texts, size: int, place: Place) -> Draw:
  """A numbered list of `size` words, ten of which are frequent, after an example."""
  short = place.length < SHORT
  example, solved = _list(rng, texts, *((20, 3, 1) if short else (40, 10, 3)))
  context, answers = _list(rng, texts, size, *((6, 1) if short else (30, 3)))
  prompts = [COMMON.format(context=each) for each in (example, context)]
  prompt = f'{prompts[0]}{_numbered(solved)}\n{prompts[1]}'
  return Draw(prompt, tuple(answers), _numbered(answers))


def _list(
  rng: random.Random, texts: Texts, size: int, often: int, seldom: int
) -> tuple[str, list[str]]:
  words = rng.sample(texts.words, size)
  entries = words[:10] * often + words[10:] * seldom
  random.Random(SEED).shuffle(entries)
  return _numbered(entries), words[:10]


def _numbered(words: list[str]) -> str:
  return ' '.join(f'{i}. {word}' for i, word in enumerate(words, 1))


def frequent(rng: random.Random, texts: Texts, size: int, place: Place) -> Draw:
  """About `size` coded words, word k in proportion to 1 / k^2; the first is '...'."""
  draw = lambda: ''.join(rng.choices(string.ascii_lowercase, k=LETTERS))
  drawn = [draw() for _ in range(place.length // 50)]
  while len({*drawn}) < place.length // 50:
    drawn.append(draw())
  words = sorted({*drawn})
  random.Random(SEED).shuffle(words)
  words[0] = '...'
  rank = np.arange(1, len(words) + 1)
  counts = (size * rank**-2.0 / (np.pi**2 / 6)).astype(int)
  text = [word for word, count in zip(words, counts.tolist()) for _ in range(count)]
  random.Random(SEED).shuffle(text)
  prompt = FREQUENT.format(context=' '.join(text))
  return Draw(prompt, tuple(words[1:4]), ' ' + ' '.join(words[1:4]))


def answering(
  rng: random.Random, texts: Texts, size: int, place: Place, *, name: str
) -> Draw:
  """A question about one or two of `size` documents."""
  documents = texts.documents[name]
  question = texts.questions[name][place.index]
  chosen, more = [*question.needed], [*question.related]
  missing = size - len(chosen)
  if missing > len(more):
    known = {*chosen, *more}
    others = [i for i in range(len(documents)) if i not in known]
    chosen += more + rng.sample(others, missing - len(more))
  else:
    chosen += rng.sample(more, missing)
  shown = [documents[i] for i in chosen]
  random.Random(SEED).shuffle(shown)
  context = '\n\n'.join(f'Document {i}:\n{text}' for i, text in enumerate(shown, 1))
  prompt = DOCUMENTS.format(context=context, query=question.query)
  return Draw(prompt, question.answers, ' ' + question.answers[0])


def _needles(haystack: str, **options) -> Task:
  count = math.prod(value for value in options.values() if isinstance(value, int))

  def sizes(texts: Texts, length: int) -> Sizes:
    if haystack == 'essay':
      return Sizes(500, 500, 1, length)
    step = 5 if length < SHORT else 25
    return Sizes(step, step, count, length)

  draw = functools.partial(needles, haystack=haystack, **options)
  return Task(draw=draw, sizes=sizes, new=128)


def _answering(name: str, needed: int) -> Task:
  sizes = lambda texts, length: Sizes(10, 10, needed, len(texts.documents[name]) - 1)
  draw = functools.partial(answering, name=name)
  return Task(draw=draw, sizes=sizes, new=32, any_of=True)


EXAMPLE = Task(
  draw=functools.partial(chain, letters=3),
  sizes=lambda texts, length: Sizes(5, 5, 1, length),
  new=30,
)
EXAMPLE_TOKENS = 500

TASKS = {
  'niah_single_1': _needles('noise'),
  'niah_single_2': _needles('essay'),
  'niah_single_3': _needles('essay', value='uuids'),
  'niah_multikey_1': _needles('essay', keys=4),
  'niah_multikey_2': _needles('needles'),
  'niah_multikey_3': _needles('needles', key='uuids', value='uuids'),
  'niah_multivalue': _needles('essay', values=4),
  'niah_multiquery': _needles('essay', queries=4),
  'vt': Task(draw=chain, sizes=lambda texts, length: Sizes(10, 10, 1, length), new=30),
  'cwe': Task(
    draw=common, sizes=lambda texts, length: Sizes(20, 10, 20, len(texts.words)), new=120
  ),
  'fwe': Task(
    draw=frequent,
    sizes=lambda texts, length: Sizes(
      max(length // LETTERS, UNIQUE), length // 32, UNIQUE, length
    ),
    new=50,
  ),
  'qa_1': _answering('qa_1', 1),
  'qa_2': _answering('qa_2', 2),
}
