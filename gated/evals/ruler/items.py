"""Items of a task that fit a number of the model's tokens.

RULER makes contexts longer, in steps, until an item does not fit, and shorter again
where a later item does not. Here the first size is found by bisection, and every loop
ends. An item's draws depend on its task, its number and the seed alone.
"""

import bisect
import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from gated.data.tokenizer import Tokenizer
from gated.evals.ruler.tasks import (
  EXAMPLE,
  EXAMPLE_TOKENS,
  TASKS,
  Draw,
  Place,
  Sizes,
  Task,
)
from gated.evals.ruler.texts import Texts

SMALL = 16  # A step is small if a size has at least so many.


@dataclass(frozen=True, kw_only=True)
class Item:
  """A prompt, its answers, and a reference for the loss, all as the model reads them."""

  prompt: np.ndarray  # token ids
  text: str  # of the prompt
  answers: tuple[str, ...]
  context: np.ndarray  # token ids before the reference
  reference: np.ndarray  # token ids
  new: int  # tokens to generate
  depth: float | None  # of the needle, from 0 to 1


@dataclass(frozen=True, kw_only=True)
class Maker:
  """Makes items; `prefix` is put before each prompt, such as the beginning of text."""

  tokenizer: Tokenizer
  prefix: tuple[int, ...]
  texts: Texts
  seed: int

  def count(self, name: str, limit: int) -> int:
    """How many items of a task there are, at most `limit`: questions are few."""
    return min(limit, len(self.texts.questions.get(name, range(limit))))

  def items(self, name: str, length: int, limit: int) -> Iterator[Item]:
    """The first items of a task; prompt and answer have at most `length` tokens.

    `check` must have passed.
    """
    make = self._maker(name, length)
    sizes = TASKS[name].sizes(self.texts, length)
    size = _fitting(lambda size: _tokens(make(size, 0)) <= length, sizes)
    for index in range(self.count(name, limit)):
      smaller = range(size, min(size, sizes.first) - 1, -sizes.step)
      tried = ((each, make(each, index)) for each in smaller)
      fitting = ((each, item) for each, item in tried if _tokens(item) <= length)
      least, item = next(fitting, (0, None))
      if least and SMALL * sizes.step <= size:
        size = least  # Later items start here: most would not fit the first size.
      if item is None:
        fits = lambda size, index=index: _tokens(make(size, index)) <= length
        item = make(_largest(fits, sizes.least, min(size, sizes.first) - 1), index)
      yield item

  def check(self, name: str, length: int, limit: int) -> None:
    """ValueError names --ruler if `length` cannot hold all items of a task."""
    make, sizes = self._maker(name, length), TASKS[name].sizes(self.texts, length)
    needed = _tokens(make(sizes.least, 0))
    if 4 * needed > length:  # Items of the least size differ by less.
      least = (make(sizes.least, index) for index in range(self.count(name, limit)))
      needed = max(map(_tokens, least))
    if needed > length:
      raise ValueError(
        f'--ruler={length} is too short for {name}, which needs {needed} tokens'
      )

  def _maker(self, name: str, length: int) -> Callable[[int, int], Item]:
    """-> a function: a size and the number of an item -> the item."""
    task, example = TASKS[name], self._example if name == 'vt' else ''
    return lambda size, index: self._item(name, task, size, Place(length, index, example))

  @functools.cached_property
  def _example(self) -> str:
    """The solved item before those of `vt`; at its least size it may be longer."""
    place, sizes = Place(EXAMPLE_TOKENS, 0), EXAMPLE.sizes(self.texts, EXAMPLE_TOKENS)
    make = lambda size: self._item('example', EXAMPLE, size, place)
    size = _fitting(lambda size: _tokens(make(size)) <= EXAMPLE_TOKENS, sizes)
    draw = self._draw('example', EXAMPLE, max(size, sizes.least), place)
    return f'{draw.prompt}{draw.reference}\n\n'

  def _draw(self, name: str, task: Task, size: int, place: Place) -> Draw:
    rng = random.Random(f'{self.seed} {name} {place.index}')
    return task.draw(rng, self.texts, size, place)

  def _item(self, name: str, task: Task, size: int, place: Place) -> Item:
    draw = self._draw(name, task, size, place)
    encode = lambda text: self.tokenizer.encode(text)[0]
    prompt = encode(draw.prompt)
    # Only the last line is encoded again, with and without the reference.
    tail = draw.prompt[draw.prompt.rindex('\n') :]
    short, long = encode(tail), encode(tail + draw.reference)
    same = _shared(short, long)
    context = prompt[: len(prompt) - (len(short) - same)]
    prefix = np.array(self.prefix, np.int32)
    return Item(
      prompt=np.concatenate([prefix, prompt]),
      text=draw.prompt,
      answers=draw.answers,
      context=np.concatenate([prefix, context]),
      reference=long[same:],
      # A small vocabulary spells the answer with more tokens than RULER expects.
      new=max(task.new, len(long) - same),
      depth=draw.depth,
    )


def _tokens(item: Item) -> int:
  return len(item.prompt) + item.new


def _shared(a: np.ndarray, b: np.ndarray) -> int:
  """The number of equal elements at the start of two arrays."""
  size = min(len(a), len(b))
  different = np.flatnonzero(a[:size] != b[:size])
  return int(different[0]) if different.size else size


def _fitting(fits: Callable[[int], bool], sizes: Sizes) -> int:
  """The size of the items of a task; less than the least one if none fits."""
  whole = lambda steps: fits(sizes.first + steps * sizes.step)
  steps = _largest(whole, 0, (sizes.most - sizes.first) // sizes.step)
  if steps >= 0:
    return sizes.first + steps * sizes.step
  return _largest(fits, sizes.least, min(sizes.first - 1, sizes.most))


def _largest(fits: Callable[[int], bool], low: int, high: int) -> int:
  """The largest number that fits, from `low` to `high`; low - 1 if none does."""
  known, ahead = low - 1, 1
  while known + ahead <= high and fits(known + ahead):
    known, ahead = known + ahead, ahead * 2
  rest = range(known + 1, min(known + ahead, high + 1))
  return known + bisect.bisect_left(rest, True, key=lambda n: not fits(n))
