"""Tasks from the standard library's documentation: docstrings -> items of lm-eval.

Every machine has these texts, so the tasks run offline. The items are those of the
running interpreter's files, in the order of their names, and each draw is seeded by the
item: the same Python version gives the same items. Test items come from the files that
the embedded corpus holds out, so no model that was trained on it has seen them; few-shot
examples come from the others. The YAML files in tasks/ name the functions of this module.
"""

import ast
import functools
import random
import re
import tokenize
from collections.abc import Iterator
from typing import Any, NamedTuple

from gated.data import embedded, units

LETTERS = 'ABCD'
EXAMPLES = 64  # Documents of few-shot examples, at most.
EACH = 4  # Items from one docstring, at most.
CONTEXT = 12  # Words before the cut of an ending, at least.
ENDING = range(5, 25)  # Words of an ending.
PASSAGE = range(15, 120)  # Words before a word to be guessed.


class Document(NamedTuple):
  """A docstring."""

  name: str  # of its class or function; '' for a module
  words: tuple[str, ...]
  seed: str


def names(split: str) -> list[dict[str, Any]]:
  """Which of four names does a description belong to? By letter, as in MMLU.

  The answers take turns, so that any constant letter scores 1/4.
  """
  described = [
    document
    for document in _documents(split)
    if 5 <= len(document.words) <= 60
    and not document.name.startswith('__')
    and document.name
    and document.name.strip('_').lower() not in ' '.join(document.words).lower()
  ]
  pool = sorted({document.name for document in described})
  items = []
  for i, document in enumerate(described):
    others = [name for name in pool if name != document.name]
    choices = random.Random(document.seed).sample(others, 3)
    choices.insert(i % 4, document.name)
    items.append(
      {'question': ' '.join(document.words), 'choices': choices, 'answer': i % 4}
    )
  return items


def endings(split: str) -> list[dict[str, Any]]:
  """Which of four endings continues a text? As in HellaSwag; chance is 1/4.

  The wrong endings are those of other texts, of the most similar length.
  """
  cuts: list[tuple[Document, int]] = []
  for document in _documents(split):
    most = len(document.words) - ENDING.start
    places = range(CONTEXT, min(most, CONTEXT + 4 * ENDING.stop) + 1, ENDING.stop)
    cuts += [(document, place) for place in places[:EACH]]
  right = [
    ' '.join(document.words[place : place + ENDING.stop - 1]) for document, place in cuts
  ]
  items = []
  for i, (document, place) in enumerate(cuts):
    rng = random.Random(f'{document.seed} {place}')
    distance = lambda j, i=i: abs(len(right[j].split()) - len(right[i].split()))
    others = [j for j, (other, _) in enumerate(cuts) if other.seed != document.seed]
    rng.shuffle(others)
    choices: list[str] = []
    for j in sorted(others, key=distance):
      if right[j] not in (right[i], *choices) and len(choices) < 3:
        choices.append(right[j])
    answer = rng.randrange(4)
    choices.insert(answer, right[i])
    text = ' '.join(document.words[:place])
    items.append({'text': text, 'choices': choices, 'answer': answer})
  return items


def words(split: str) -> list[dict[str, Any]]:
  """The next word of a text that has occurred in it, as in LAMBADA."""
  items = []
  for document in _documents(split):
    found: dict[str, int] = {}
    for i, word in enumerate(document.words[: PASSAGE.stop]):
      is_word = i in PASSAGE and re.fullmatch('[A-Za-z]{4,}', word)
      if is_word and word in document.words[:i]:
        found.setdefault(word, i)
    items += [
      {'text': ' '.join(document.words[:i]), 'word': word}
      for word, i in list(found.items())[:EACH]
    ]
  return items


def prose(split: str) -> list[dict[str, Any]]:
  """The docstrings and comments of a file: a document, for its perplexity."""
  texts = (embedded.take_apart(source)[1].strip() for _, source in _sources(split))
  return [{'text': text} for text in texts if len(text) >= 200]


KINDS = {'names': names, 'endings': endings, 'words': words, 'prose': prose}


def dataset(kind: str, **_: Any) -> Any:
  """One of KINDS -> a `datasets.DatasetDict`: 'test', and 'train' for examples."""
  import datasets

  splits = ('test',) if kind == 'prose' else ('test', 'train')
  return datasets.DatasetDict(
    {split: datasets.Dataset.from_list(KINDS[kind](split)) for split in splits}
  )


def _sources(split: str) -> Iterator[tuple[str, str]]:
  """The files of a split that this Python can parse: their names and contents."""
  for name, path in embedded.files().items():
    if units.is_heldout(name, embedded.HELDOUT) != (split == 'test'):
      continue
    try:
      with tokenize.open(path) as file:
        source = file.read()
      ast.parse(source)
    except (SyntaxError, UnicodeDecodeError, ValueError, tokenize.TokenError):
      continue  # Packages such as lib2to3 contain files of other Python versions.
    yield name, source


@functools.cache
def _documents(split: str) -> list[Document]:
  """The docstrings of a split, each text once; of 'train' the first EXAMPLES."""
  documents: dict[tuple[str, ...], Document] = {}
  for file, source in _sources(split):
    for node in ast.walk(ast.parse(source)):
      if not isinstance(node, embedded.DOCUMENTED):
        continue
      text = ast.get_docstring(node)
      if not text or '>>>' in text:
        continue
      name = getattr(node, 'name', '')
      split_words = tuple(text.split())
      document = Document(name, split_words, f'{file} {node.body[0].lineno}')
      documents.setdefault(split_words, document)
    if split == 'train' and len(documents) >= EXAMPLES:
      break
  return list(documents.values())
