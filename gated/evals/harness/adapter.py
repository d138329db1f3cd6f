"""A model as lm-eval sees it: its texts -> our tokens, forward passes and generator.

lm-eval (EleutherAI/lm-evaluation-harness 0.4.13) defines the rules: spaces at the end of
a context belong to the continuation; an empty context is the prefix token; what does not
fit is cut on the left; a rolling likelihood reads disjoint windows with one token of
context. All processes have all requests and call the same programs, so lm-eval sees one
process.
"""

import contextlib
import copy
import dataclasses
import functools
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
  handle_stop_sequences,
  normalize_gen_kwargs,
  postprocess_generated_text,
)
from tqdm import tqdm

from gated import model
from gated.data.tokenizer import Tokenizer
from gated.devices import mesh
from gated.evals import generate
from gated.evals.harness import scoring, sharing
from gated.evals.harness.cache import Answers, key
from gated.evals.sampling import Sampling

NEW = 256  # Generated tokens, unless a task has its own number.
# Options of a generation that a task may have.
OPTIONS = {'do_sample', 'max_gen_toks', 'temperature', 'top_k', 'top_p', 'until'}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
  """The evaluated model."""

  read_model: Callable[[], model.Transformer]
  measured: Callable  # `scoring.measure`, compiled for all devices
  shared: Callable  # `sharing.measure`, likewise
  on: Mesh
  tokenizer: Tokenizer
  prefix: tuple[int, ...]  # tokens before each text, such as the beginning of text
  length: int  # tokens that the model reads at most
  info: dict[str, Any]  # entries of the report's 'config'


class Gated(TemplateLM):
  """lm-eval's model. `size` is rows per device at a time; 0: as many as fit TOKENS."""

  def __init__(self, subject: Subject, answers: Answers, *, size: int):
    super().__init__()
    self._subject, self._answers, self._size = subject, answers, size
    self._quiet = jax.process_index() > 0
    self._ids: dict[str, np.ndarray] = {}  # Texts that were encoded together.

  @property
  def eot_token_id(self) -> int:
    return self._subject.tokenizer.eos

  @property
  def prefix_token_id(self) -> int:
    return self._subject.tokenizer.bos

  @property
  def max_length(self) -> int:
    return self._subject.length

  def get_model_info(self) -> dict[str, Any]:
    return self._subject.info

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **_: Any
  ) -> list[int]:
    """A text -> its ids, after the prefix unless `add_special_tokens` is False.

    A text that starts with the beginning-of-text token's name has it once.
    """
    token, prefix = self._subject.tokenizer, [*self._subject.prefix]
    if add_special_tokens is False:
      prefix = []
    elif token.bos_token and string.startswith(token.bos_token):
      prefix, string = [token.bos], string.removeprefix(token.bos_token)
    known = self._ids.get(string)
    return prefix + (token.encode(string)[0] if known is None else known).tolist()

  def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list:
    # lm-eval encodes each of these texts on its own, and a context with every choice.
    pairs = [request.args for request in requests]
    texts = {text: None for pair in pairs for text in (''.join(pair), pair[0].rstrip())}
    try:
      self._ids = dict(zip(texts, self._subject.tokenizer.ids(texts), strict=True))
      return super().loglikelihood(requests, disable_tqdm=disable_tqdm or self._quiet)
    finally:
      self._ids = {}

  def _loglikelihood_tokens(
    self, requests: Sequence, disable_tqdm: bool = False, **_: Any
  ) -> list[tuple[float, bool]]:
    wanted = []
    for texts, context, continuation in requests:
      try:
        wanted.append(scoring.request(context, continuation, self.max_length))
      except ValueError as error:
        raise ValueError(f'{error}: {texts!r:.300}') from error
    keys = {each: key('likelihood', *each) for each in dict.fromkeys(wanted)}
    missing = [each for each in keys if keys[each] not in self._answers]
    with self._bar('likelihoods', len(keys), len(missing), disable_tqdm) as bar:
      for answers in self._score(missing):
        self._answers.add({keys[each]: [*answer] for each, answer in answers.items()})
        bar.update(len(answers))
    return [tuple(self._answers[keys[each]]) for each in wanted]

  def _score(self, requests: list[scoring.Request]) -> Iterator[dict]:
    """Requests -> their answers, a batch at a time."""
    if requests:
      subject = self._subject
      given: dict[str, Any] = dict(on=subject.on, size=self._size)
      shared = functools.partial(sharing.works, measured=subject.shared, **given)
      net, measured = subject.read_model(), subject.measured
      yield from scoring.score(requests, measured, net, shared=shared, **given)

  def loglikelihood_rolling(
    self, requests: Any, disable_tqdm: bool = False
  ) -> list[float]:
    windows = []
    for request in requests:
      tokens = self.tok_encode(request.args[0])
      pairs = utils.get_rolling_token_windows(
        tokens, self.prefix_token_id, self.max_length, context_len=1
      )
      windows.append([(None, *utils.make_disjoint_window(pair)) for pair in pairs])
    flat = [window for group in windows for window in group]
    scored = iter(self._loglikelihood_tokens(flat, disable_tqdm=disable_tqdm))
    return [sum(next(scored)[0] for _ in group) for group in windows]

  def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
    asked = [self._generation(*request.args) for request in requests]
    # Equal greedy requests have one answer; draws differ, and are not kept.
    keys = [
      key('generation', ids, json.dumps(dataclasses.asdict(options)))
      if options.greedy
      else f'{i}'
      for i, (ids, options) in enumerate(asked)
    ]
    drawn: dict[str, str] = {}
    groups: dict[Sampling, dict[str, np.ndarray]] = {}
    for name, (ids, options) in zip(keys, asked):
      if name not in self._answers:
        groups.setdefault(options, {})[name] = ids
    missing = sum(map(len, groups.values()))
    size = self._size or max(1, scoring.TOKENS // self.max_length)
    size *= mesh.ways('batch', self._subject.on)
    with self._bar('generations', len({*keys}), missing, disable_tqdm) as bar:
      for options, prompts in groups.items():
        names = sorted(prompts, key=lambda name: -len(prompts[name]))
        for start in range(0, len(names), size):
          part = names[start : start + size]
          texts = self._generate([prompts[name] for name in part], options, size)
          answers = dict(zip(part, texts))
          if options.greedy:
            self._answers.add(answers)
          drawn |= answers
          bar.update(len(part))
    return [drawn[name] if name in drawn else self._answers[name] for name in keys]

  def _generation(self, context: str, kwargs: Any) -> tuple[np.ndarray, Sampling]:
    """A request's text and options -> the ids to continue, and how."""
    options = dict(normalize_gen_kwargs(copy.deepcopy(kwargs), NEW))
    if unknown := sorted(options.keys() - OPTIONS):
      raise ValueError(f'generation_kwargs of a task: {unknown[0]} is not supported')
    token, most = self._subject.tokenizer, options['max_gen_toks']
    room = self.max_length - most
    if room < 1:
      raise ValueError(
        f'max_gen_toks={most} of a task, but the model reads {self.max_length} tokens'
      )
    stop = handle_stop_sequences(options.get('until'), eos=token.eos_token or None)
    sampling = Sampling(
      max_tokens=most,
      temperature=options.get('temperature', 0.0),
      top_k=options.get('top_k', 0),
      top_p=options.get('top_p', 1.0),
      stop=tuple(string for string in stop if string),
    )
    ids = self.tok_encode(context)[-room:] or [self.prefix_token_id]
    return np.array(ids, np.int32), sampling

  def _generate(
    self, prompts: list[np.ndarray], options: Sampling, size: int
  ) -> list[str]:
    """Prompts of a batch -> their continuations before any stop string."""
    subject, token = self._subject, self._subject.tokenizer
    # Few numbers of rows and lengths occur, so that few programs are compiled.
    rows = min(size, 1 << (len(prompts) - 1).bit_length())
    whole = prompts + prompts[-1:] * (rows - len(prompts))
    new = generate.run(
      subject.read_model(),
      whole,
      options,
      on=subject.on,
      tokenizer=token,
      context=subject.length,
    )
    texts = (token.decode(ids).decode(errors='replace') for ids in new[: len(prompts)])
    return [postprocess_generated_text(text, [*options.stop], None) for text in texts]

  @contextlib.contextmanager
  def _bar(self, name: str, total: int, missing: int, off: bool) -> Generator[tqdm]:
    """A progress bar, at whose end all answers are stored; those found are done."""
    off = off or self._quiet
    with tqdm(total=total, initial=total - missing, desc=name, disable=off) as bar:
      try:
        yield bar
      finally:
        self._answers.flush()
