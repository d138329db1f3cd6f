"""The texts of RULER's items, from the documentation of the running Python.

RULER takes essays, lists of words, SQuAD and HotpotQA from the network. In their place:

- essay: the language reference (`pydoc_data.topics`), which is not in the embedded
  corpus;
- words: those of the reference and of the library's docstrings;
- qa_1, as SQuAD: paragraphs, of the reference and of docstrings. A question shows a
  sentence of the reference without one of its words;
- qa_2, as HotpotQA: a document for each function and each module, and those paragraphs.
  A question describes a function. The function's document has its name, and the document
  of a module lists that name.

The same Python version gives the same texts.
"""

import functools
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pydoc_data import topics

from gated.data import embedded

SEED = 42  # As RULER's.
LISTED = 12  # Names that the document of a module lists, at most.
WORDS = range(15, 151)  # Words of a paragraph.
SENTENCE = range(8, 31)  # Words of a sentence that is asked for.
ADJECTIVE = re.compile('[a-z]*(?:able|ible|al|ful|ic|ive|less|ous|ed|ary|ent|ant)')
DOCSTRING = re.compile(r'"""(.*?)"""', re.DOTALL)
DEFINITION = re.compile(r'^(?:def|class) (\w+)[^\n]*:\n +r?"""(.*?)"""', re.M | re.DOTALL)
BLANK = '____'


@dataclass(frozen=True, kw_only=True)
class Question:
  """A question, its answers, and the documents that it needs, by their numbers."""

  query: str
  answers: tuple[str, ...]
  needed: tuple[int, ...]
  related: tuple[int, ...] = ()  # come next, before those of other topics


@dataclass(frozen=True, kw_only=True)
class Texts:
  """The words and documents of items."""

  essay: tuple[str, ...]  # words, in their order
  adjectives: tuple[str, ...]  # sorted
  nouns: tuple[str, ...]  # sorted
  words: tuple[str, ...]  # shuffled
  documents: dict[str, tuple[str, ...]]  # by task
  questions: dict[str, tuple[Question, ...]]  # by task

  @property
  def pairs(self) -> int:
    return len(self.adjectives) * len(self.nouns)

  def pair(self, number: int) -> str:
    """The pair 'adjective-noun' of this number, in the order of the alphabet."""
    i, j = divmod(number, len(self.nouns))
    return f'{self.adjectives[i]}-{self.nouns[j]}'


@functools.cache
def local() -> Texts:
  """The texts of this machine's Python."""
  sources = _sources()
  docstrings = {name: DOCSTRING.findall(text) for name, text in sources.items()}
  prose = [
    *topics.topics.values(),
    *(text for group in docstrings.values() for text in group),
  ]
  words = _apart(
    {word for text in prose for word in re.findall(r'\b[a-z]{4,12}\b', text)}
  )
  adjectives = [word for word in words if ADJECTIVE.fullmatch(word)]
  random.Random(SEED).shuffle(shuffled := [*words])
  paragraphs, of_paragraphs = _paragraphs(docstrings)
  modules, of_modules = _modules(sources)
  known = '\n'.join(modules)
  others = [text for text in paragraphs if text not in known]
  return Texts(
    essay=tuple(' '.join(topics.topics.values()).split()),
    adjectives=tuple(adjectives),
    nouns=tuple(sorted({*words} - {*adjectives})),
    words=tuple(shuffled),
    documents={'qa_1': paragraphs, 'qa_2': (*modules, *others)},
    questions={'qa_1': of_paragraphs, 'qa_2': of_modules},
  )


def sentences(text: str) -> list[str]:
  """A text without line breaks -> its sentences."""
  return re.split(r'(?<=[.!?]) +', text.strip())


def _sources() -> dict[str, str]:
  """The library's modules: dotted names and contents."""
  contents = {}
  for name, path in embedded.files().items():
    with open(path, encoding='utf-8', errors='replace') as file:
      module = name.removesuffix('.py').removesuffix('/__init__').replace('/', '.')
      contents[module] = file.read()
  return contents


def _apart(words: Iterable[str]) -> list[str]:
  """Words -> those that are no part of a longer one, sorted: answers are substrings."""
  kept: list[str] = []
  parts: set[str] = set()
  for word in sorted(words, key=lambda word: (-len(word), word)):
    if word not in parts:
      kept.append(word)
      parts |= {word[i:j] for i in range(len(word)) for j in range(i + 4, len(word) + 1)}
  return sorted(kept)


def _paragraphs(
  docstrings: dict[str, list[str]],
) -> tuple[tuple[str, ...], tuple[Question, ...]]:
  """-> paragraphs, and a question for each one of the reference that has a sentence."""
  articles = [_prose(text) for text in topics.topics.values()]
  asked = len(articles)
  articles += [_prose('\n\n'.join(group)) for group in docstrings.values()]
  # Some topics quote others.
  documents = [*dict.fromkeys(text for article in articles for text in article)]
  number = {text: i for i, text in enumerate(documents)}
  counts = Counter(sentence for text in documents for sentence in sentences(text))
  found: dict[str, Question] = {}
  for article in articles[:asked]:
    for text in article:
      chosen = [
        sentence
        for sentence in sentences(text)
        if counts[sentence] == 1 and len(sentence.split()) in SENTENCE
      ]
      if chosen and (word := _word(chosen[0])) and text not in found:
        shown = re.sub(rf'\b{word}\b', BLANK, chosen[0])
        found[text] = Question(
          query=f'Which word is missing in the sentence "{shown}"?',
          answers=(word,),
          needed=(number[text],),
          related=tuple({number[other] for other in article} - {number[text]}),
        )
  return tuple(documents), _shuffled(found.values())


def _prose(text: str) -> list[str]:
  """A text -> its paragraphs that are prose, on one line each."""
  parts = (' '.join(part.split()) for part in text.split('\n\n'))
  return [
    part
    for part in parts
    if re.fullmatch('[A-Z][^_<>=|*]*[.]', part) and len(part.split()) in WORDS
  ]


def _word(sentence: str) -> str:
  """The longest word that a sentence has once; '' if it is short."""
  words = re.findall(r'\b[a-z]{6,12}\b', sentence)
  once = [word for word in words if sentence.lower().count(word) == 1]
  return max(once, key=len, default='')


def _modules(
  sources: dict[str, str],
) -> tuple[tuple[str, ...], tuple[Question, ...]]:
  """-> documents of functions and of modules, and a question for each function."""
  described: dict[str, dict[str, str]] = {}
  for module, source in sources.items():
    pairs = ((name, _prose(text + '\n')) for name, text in DEFINITION.findall(source))
    described[module] = {
      name: text[0] for name, text in pairs if text and not name.startswith('_')
    }
  counts = Counter(name for group in described.values() for name in group)
  firsts = Counter(
    sentences(t)[0] for group in described.values() for t in group.values()
  )
  # A module is an answer: none is a part of another one, or of a description.
  names = {*_apart(m for m, group in described.items() if len(m) > 3 and group)}
  documents: list[str] = []
  found: list[Question] = []
  for module in sorted(names):
    group = [name for name in described[module] if counts[name] == 1][:LISTED]
    listing = len(documents)
    documents.append(f'{module}\nThe module {module} defines {", ".join(group)}.')
    for name in group:
      text = described[module][name]
      first = sentences(text)[0]
      said = any(part in text for part in (module, module.rpartition('.')[2]))
      if said or name in first or firsts[first] > 1:
        continue
      documents.append(f'{name}\n{text}')
      query = f'Which module defines the object with the description "{first}"?'
      needed = (len(documents) - 1, listing)
      found.append(Question(query=query, answers=(module,), needed=needed))
  return tuple(documents), _shuffled(found)


def _shuffled(questions: Iterable[Question]) -> tuple[Question, ...]:
  order: Sequence[Question] = [*questions]
  return tuple(random.Random(SEED).sample(order, len(order)))
