"""RULER from local texts: published definitions, oracles that read items, lengths."""

import collections
import random
import re
import string
import uuid

import numpy as np
import pytest
from scipy.special import zeta

from gated.data import tokenizer
from gated.evals import ruler
from gated.evals.ruler import scores
from gated.evals.ruler.tasks import Place
from gated.evals.ruler.texts import Question, Texts, local

ADJECTIVES = ['able', 'ablebodied', 'calm', 'eager']
NOUNS = ['bird', 'cloud', 'door', 'elk', 'fig']
ESSAY = 'One day it rains. Is it so? It is! ' + 'And then the sun shines for hours. ' * 40
DOCUMENTS = tuple(f'Text {i} says something.' for i in range(40))
TEXTS = Texts(
  essay=tuple(ESSAY.split()),
  adjectives=tuple(ADJECTIVES),
  nouns=tuple(NOUNS),
  words=tuple(f'w{a}{b}' for a in 'abcdefghij' for b in 'klmnopqrst'),
  documents={'qa_1': DOCUMENTS, 'qa_2': DOCUMENTS},
  questions={
    'qa_1': (
      Question(query='Who?', answers=('I', 'we'), needed=(7,), related=(8, 9, 5)),
    ),
    'qa_2': (Question(query='Where?', answers=('here',), needed=(3, 1)),),
  },
)


# What follows is a transcription of RULER's scripts (scripts/data/synthetic/*.py, the
# arguments of synthetic.yaml and the templates of constants.py). `rng` replaces the
# modules random and numpy.random, and args.random_seed is 42.
def niah(rng, size, hay, k, v, num_k=1, num_v=1, num_q=1):
  template = """Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize it. I will quiz you about the {type_needle_v} afterwards.\n{context}\nWhat are all the special magic {type_needle_v} for {query} mentioned in the provided text?"""  # noqa: E501
  template += """ The special magic {type_needle_v} for {query} mentioned in the provided text are"""  # noqa: E501
  needle = 'One of the special magic {type_needle_v} for {key} is: {value}.'
  words = sorted({f'{a}-{n}' for a in ADJECTIVES for n in NOUNS})

  def generate_random(kind):
    if kind == 'numbers':
      return str(rng.randint(10**6, 10**7 - 1))
    if kind == 'words':
      return rng.choice(words)
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))

  keys, values, needles = [], [], []
  for _ in range(max(num_k, num_q)):
    keys.append(generate_random(k))
    value = []
    for _ in range(num_v):
      value.append(generate_random(v))
      needles.append(needle.format(type_needle_v=v, key=keys[-1], value=value[-1]))
    values.append(value)
  random.Random(42).shuffle(needles)
  if hay == 'essay':
    text = ' '.join(ESSAY.split()[:size])
    sents = re.findall(r'[^.!?]+[.!?]*', text)  # In place of NLTK's tokenizer.
    sents = [sent.strip() for sent in sents]
    depths = np.round(np.linspace(0, 100, num=40, endpoint=True)).astype(int)
    chosen = rng.sample(list(depths), len(needles))
    positions = [0, *sorted([int(len(sents) * (d / 100)) for d in chosen]), len(sents)]
    pieces = []
    for i in range(1, len(positions)):
      pieces.append(' '.join(sents[positions[i - 1] : positions[i]]))
      if i - 1 < len(needles):
        pieces.append(needles[i - 1])
    context = ' '.join(pieces)
  else:
    noise = 'The grass is green. The sky is blue. The sun is yellow. Here we go. '
    sentences = [noise + 'There and back again.'] * size
    if hay == 'needle':
      sentences = [
        needle.format(type_needle_v=v, key=generate_random(k), value=generate_random(v))
        for _ in range(size)
      ]
    indexes = sorted(rng.sample(range(size), len(needles)), reverse=True)
    for index, element in zip(indexes, needles, strict=True):
      sentences.insert(index, element)
    context = '\n'.join(sentences)
  indices = rng.sample(range(max(num_k, num_q)), num_q)
  queries = [keys[i] for i in indices]
  answers = [a for i in indices for a in values[i]]
  query = queries[0]
  if len(queries) > 1:
    query = ', '.join(queries[:-1]) + ', and ' + queries[-1]
  if num_q * num_v == 1:
    template = template.replace('Some', 'A').replace('are all', 'is')
    template = template.replace('are', 'is').replace('answers', 'answer')
    v = v[:-1]
  return template.format(type_needle_v=v, context=context, query=query), answers


VT = """Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find all variables that are assigned the value {query} in the text above. Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are assgined the value {query}, they are: """  # noqa: E501


def vt(rng, size, icl_example=None):
  k = 5 if icl_example else 3
  vars_ = [''.join(rng.choices(string.ascii_uppercase, k=k)).upper() for _ in range(5)]
  this_chain = [f'VAR {vars_[0]} = {rng.randrange(10000, 99999)}']
  for j in range(4):
    this_chain.append(f'VAR {vars_[j + 1]} = VAR {vars_[j]} ')
  noise = 'The grass is green. The sky is blue. The sun is yellow. Here we go. '
  noise += 'There and back again.\n'
  sentences = [noise] * size
  if len(sentences) <= len(this_chain):
    sentences = [
      n + '.' if len(n.strip()) > 0 else n
      for n in [x for noise in sentences for x in noise.split('.')]
    ]
  positions = sorted(rng.sample(range(len(sentences)), len(this_chain)))
  for insert_pi, j in zip(positions, range(len(this_chain)), strict=True):
    sentences.insert(insert_pi + j, this_chain[j])
  context = ' '.join(sentences).replace('. \n', '.\n')
  value = this_chain[0].split('=')[-1].strip()
  text = VT.format(context=context, query=value, num_v=5)
  if icl_example:
    example, outputs = icl_example
    example = example + ' ' + ' '.join(outputs) + '\n\n'
    for item in example[example.index('they are: ') + 10 :].strip().split():
      new_item = ''.join(rng.choices(string.ascii_uppercase, k=len(item))).upper()
      example = example.replace(item, new_item)
    text = example + '\n\n' + text
  return text, vars_


def cwe(rng, size, max_seq_length):
  template = """Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words that appear most often in the list are:"""  # noqa: E501

  def get_example(num_words, common_repeats, uncommon_repeats):
    full = rng.sample(TEXTS.words, num_words)
    common, uncommon = full[:10], full[10:]
    word_list = common * common_repeats + uncommon * uncommon_repeats
    random.Random(42).shuffle(word_list)
    return ' '.join([f'{i + 1}. {word}' for i, word in enumerate(word_list)]), common

  if max_seq_length < 4096:
    context_example, answer_example = get_example(20, 3, 1)
    context, answer = get_example(size, 6, 1)
  else:
    context_example, answer_example = get_example(40, 10, 3)
    context, answer = get_example(size, 30, 3)
  input_example = template.format(context=context_example) + ' '.join(
    [f'{i + 1}. {word}' for i, word in enumerate(answer_example)]
  )
  return input_example + '\n' + template.format(context=context), answer


def fwe(rng, size, max_seq_length):
  template = """Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently appeared words in the above coded text? Answer: According to the coded text above, the three most frequently appeared words are:"""  # noqa: E501
  vocab_size = max_seq_length // 50
  vocab = [''.join(rng.choices(string.ascii_lowercase, k=6)) for _ in range(vocab_size)]
  vocab = sorted(set(vocab))
  assert len(vocab) == vocab_size
  random.Random(42).shuffle(vocab)
  vocab[0] = '...'
  k = np.arange(1, len(vocab) + 1)
  sampled_cnt = size * (k**-2.0) / zeta(2.0)
  words = [[w] * zi for w, zi in zip(vocab, sampled_cnt.astype(int), strict=True)]
  words = [x for wlst in words for x in wlst]
  random.Random(42).shuffle(words)
  return template.format(context=' '.join(words)), vocab[1:4]


def qa(rng, size, name):
  template = """Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\nThe following are given documents.\n\n{context}\n\nAnswer the question based on the given documents. Only give me the answer and do not output any other words.\n\nQuestion: {query} Answer:"""  # noqa: E501
  question = TEXTS.questions[name][0]
  docs, more = list(question.needed), list(question.related)
  if (size - len(docs)) > len(more):
    addition = [i for i, _ in enumerate(DOCUMENTS) if i not in docs + more]
    every = docs + more + rng.sample(addition, max(0, size - len(docs) - len(more)))
  else:
    every = docs + rng.sample(more, size - len(docs))
  shown = [DOCUMENTS[idx] for idx in every]
  random.Random(42).shuffle(shown)
  context = '\n\n'.join([f'Document {i + 1}:\n{d}' for i, d in enumerate(shown)])
  return template.format(context=context, query=question.query), list(question.answers)


ICL = ('VAR ABC = 12345 they are: ', ['ABC', 'DEF', 'GHI', 'JKL', 'MNO'])
# Task -> (sizes, the published item of a size).
PUBLISHED = {
  'niah_single_1': ((3, 25), lambda r, n: niah(r, n, 'repeat', 'words', 'numbers')),
  'niah_single_2': ((30, 200), lambda r, n: niah(r, n, 'essay', 'words', 'numbers')),
  'niah_single_3': ((30, 200), lambda r, n: niah(r, n, 'essay', 'words', 'uuids')),
  'niah_multikey_1': ((99,), lambda r, n: niah(r, n, 'essay', 'words', 'numbers', 4)),
  'niah_multikey_2': ((5, 25), lambda r, n: niah(r, n, 'needle', 'words', 'numbers')),
  'niah_multikey_3': ((5, 25), lambda r, n: niah(r, n, 'needle', 'uuids', 'uuids')),
  'niah_multivalue': ((99,), lambda r, n: niah(r, n, 'essay', 'words', 'numbers', 1, 4)),
  'niah_multiquery': (
    (99,),
    lambda r, n: niah(r, n, 'essay', 'words', 'numbers', 1, 1, 4),
  ),
  'vt': ((1, 5, 10), lambda r, n: vt(r, n, ICL)),
  'cwe': ((20, 60), lambda r, n: cwe(r, n, 2048)),
  'fwe': ((170, 341), lambda r, n: fwe(r, n, 2048)),
  'qa_1': ((2, 4, 20), lambda r, n: qa(r, n, 'qa_1')),
  'qa_2': ((2, 20), lambda r, n: qa(r, n, 'qa_2')),
}


@pytest.mark.parametrize('name', ruler.TASKS)
def test_an_item_is_the_published_one_of_the_same_words_and_draws(name):
  sizes, published = PUBLISHED[name]
  for size in sizes:
    for seed in range(3):
      example = f'{ICL[0]} {" ".join(ICL[1])}\n\n' if name == 'vt' else ''
      place = Place(length=2048, index=0, example=example)
      draw = ruler.TASKS[name].draw(random.Random(seed), TEXTS, size, place)
      text, answers = published(random.Random(seed), size)
      assert draw.prompt == text and list(draw.answers) == answers


def test_long_lists_and_the_example_of_vt_are_the_published_ones():
  place = Place(length=4096, index=0)
  draw = ruler.TASKS['cwe'].draw(random.Random(5), TEXTS, 50, place)
  assert draw.prompt == cwe(random.Random(5), 50, 4096)[0]
  draw = ruler.tasks.EXAMPLE.draw(random.Random(5), TEXTS, 5, place)
  text, names = vt(random.Random(5), 5)
  assert (draw.prompt, [*draw.answers]) == (text, names)


def test_numbers_of_the_tasks_are_the_published_ones():
  """Tokens of answers, scores of one answer or all, and steps of the context's size."""
  news = [task.new for task in ruler.TASKS.values()]
  assert news == [128] * 8 + [30, 120, 50, 32, 32]
  assert [n for n, task in ruler.TASKS.items() if task.any_of] == ['qa_1', 'qa_2']
  steps = lambda length: [task.sizes(TEXTS, length)[:2] for task in ruler.TASKS.values()]
  essay = [(500, 500)]
  rest = [(10, 10), (20, 10), (1365, 256), (10, 10), (10, 10)]
  assert steps(8192) == [(25, 25), *essay * 3, *[(25, 25)] * 2, *essay * 2, *rest]
  assert [steps(2048)[i] for i in (0, 4, 5)] == [(5, 5)] * 3


@pytest.fixture(scope='module')
def maker(tmp_path_factory):
  path = tmp_path_factory.mktemp('bpe') / 'tokenizer.json'
  words = (f' {word}' for word in (*local().essay, *local().words, *map(str, range(999))))
  token = tokenizer.train_bpe(words, 8192, str(path))
  return ruler.Maker(tokenizer=token, prefix=(7,), texts=local(), seed=42)


def needle(text, wrong):
  asked = re.findall(r'[\w-]+-[\w-]+', text.splitlines()[-1].partition('?')[0])
  pairs = re.findall(r'special magic \w+ for (\S+) is: (\S+)\.', text)
  found = [value for key, value in pairs if (key in asked) != wrong]
  return ' '.join(found or asked)


def chained(text, wrong):
  if wrong:  # The variables of the example.
    return ' '.join(re.findall('VAR ([A-Z]+)', text[: text.index('Question')]))
  value = re.findall(r'the value (\d+)', text)[-1]
  names = [re.findall(rf'VAR (\w+) = {value}\b', text)[-1]]
  links = {a: b for b, a in re.findall(r'VAR (\w+) = VAR (\w+)', text)}
  while names[-1] in links:
    names.append(links[names[-1]])
  return ', '.join(names)


def counted(text, wrong):
  entries = re.findall(r'\d+\. (\w+)', text.rpartition('\n1. ')[2])
  order = collections.Counter(entries).most_common()
  return ' '.join(word for word, _ in (order[-10:] if wrong else order[:10]))


def decoded(text, wrong):
  words = re.findall(r'\b[a-z]{6}\b', text.splitlines()[0].partition('words. ')[2])
  order = collections.Counter(words).most_common()
  return ' '.join(word for word, _ in (order[3:] if wrong else order[:3]))


def found(text, wrong):
  body, shown = text.rpartition('\n\nAnswer')[0], re.findall('"(.*)"', text)[-1]
  parts = body.split('\n\nDocument ')
  if '____' in shown:
    pattern = re.escape(shown).replace('____', r'(\w+)')
    [number] = [i for i, part in enumerate(parts) if re.search(pattern, part)]
    right = re.search(pattern, parts[number])[1]
    others = re.findall(r'\w+', parts[number - 1])
    return max((word for word in others if word != right), key=len) if wrong else right
  [name] = {part.splitlines()[1] for part in parts if shown in part}
  defined = re.findall(r'The module (\S+) defines (.*)\.', body)
  [right] = [module for module, names in defined if name in names.split(', ')]
  return next((m for m, _ in defined if m != right), 'none') if wrong else right


# The first word of a prompt -> an oracle that reads it: (prompt, whether it takes a wrong
# needle) -> the answer.
ORACLES = {'A': needle, 'Some': needle, 'Memorize': chained, 'Below': counted}
ORACLES |= {'Read': decoded, 'Answer': found}


def examine(maker, length, count):
  """All tasks of a length: both oracles, and the lengths in tokens."""
  for name, task in ruler.TASKS.items():
    maker.check(name, length, count)
    items = [*maker.items(name, length, count)]
    assert len(items) == count, name
    for item in items:
      assert len(item.prompt) + item.new <= length
      assert len(item.context) + len(item.reference) <= length
      assert item.prompt[0] == item.context[0] == 7
      assert maker.tokenizer.decode(item.prompt[1:]).decode() == item.text
      oracle = ORACLES[item.text.split()[0]]
      right, wrong = (
        scores.score(oracle(item.text, bad), item.answers, any_of=task.any_of)
        for bad in (False, True)
      )
      assert (right, wrong) == (100, 0), (name, item.text[-300:], item.answers)
      reference = maker.tokenizer.decode(item.reference).decode()
      assert scores.score(reference, item.answers, any_of=task.any_of) == 100
      whole = [*item.context[1:], *item.reference]
      assert maker.tokenizer.decode(whole).decode().startswith(item.text)
    sizes = [len(item.prompt) + item.new for item in items]
    assert max(sizes) > 0.75 * length or name.startswith(('niah', 'qa')), (name, sizes)


def test_an_oracle_answers_all_items_and_one_of_wrong_needles_none(maker):
  examine(maker, 1024, 8)


@pytest.mark.slow
def test_oracles_at_4096_tokens(maker):
  examine(maker, 4096, 5)


@pytest.mark.full
@pytest.mark.parametrize(('length', 'count'), [(1024, 20), (4096, 15), (16384, 5)])
def test_oracles_of_many_items(length, count, maker):
  examine(maker, length, count)


def test_items_are_the_same_whatever_their_number_and_needles_lie_at_all_depths(maker):
  few, many = ([*maker.items('niah_single_1', 1024, n)] for n in (3, 30))
  assert [item.text for item in few] == [item.text for item in many[:3]]
  depths = sorted(item.depth for item in many)
  assert depths[0] < 0.1 and 0.8 < depths[-1] < 1
  needle = f'is: {few[0].answers[0]}.'
  context = few[0].text.split('\n', 1)[1].rpartition('\nWhat')[0]
  assert few[0].depth == pytest.approx(context.index(needle) / len(context), abs=0.03)


def test_a_length_below_a_tasks_template_is_refused_by_its_name(maker):
  with pytest.raises(ValueError, match='--ruler=256 is too short for vt, which needs'):
    maker.check('vt', 256, 5)
  with pytest.raises(
    ValueError, match=r'for niah_single_2, which needs (\d+)'
  ) as refused:
    maker.check('niah_single_2', 150, 5)
  [needed] = map(int, re.findall(r'needs (\d+)', str(refused.value)))
  maker.check('niah_single_2', needed, 5)
  items = [*maker.items('niah_single_2', needed, 5)]
  assert max(len(item.prompt) + item.new for item in items) <= needed


def test_a_small_vocabulary_gets_the_tokens_that_an_answer_needs():
  maker = ruler.Maker(
    tokenizer=tokenizer.load('bytes'), prefix=(), texts=local(), seed=42
  )
  items = [*maker.items('cwe', 3000, 4)]
  for item in items:
    answer = ' '.join(f'{i}. {word}' for i, word in enumerate(item.answers, 1))
    assert len(item.reference) == len(answer) and item.new == max(120, len(answer))
    assert len(item.prompt) + item.new <= 3000
  assert max(item.new for item in items) > 120
