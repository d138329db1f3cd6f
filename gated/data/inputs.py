"""The input of a preparation -> units of work, after a look at the first documents."""

import dataclasses

from gated.data import faults, ids, pieces, shards, sources, tokenizer
from gated.data.options import Options


def survey(
  domains: dict[str, list[str]],
  options: Options,
  tallies: dict[str, faults.Tally],
  token: tokenizer.Tokenizer | None,
  pins: dict[str, str],
) -> dict[str, list[pieces.Unit]]:
  if not domains:
    raise ValueError('--domain=NAME=PATH[,PATH]: at least one is needed')
  reading = pieces.Reading(options.field, options.encoding)
  if options.ids and token:
    wide = 'uint16' if token.vocab <= 1 << 16 else 'uint32'
    dtype = wide if options.ids == 'auto' else options.ids
    reading = reading._replace(ids=dtype, eos=token.eos)
  groups = {}
  for domain, paths in domains.items():
    flag = f'--domain={domain}={",".join(paths)}'
    if not shards.NAME.fullmatch(domain):
      raise ValueError(f'{flag}: a name consists of letters, digits, ".", "_" and "-"')
    if twin := next((n for n in groups if n.lower() == domain.lower()), ''):
      raise ValueError(f'{flag}: {twin} differs only in case, and may be the same file')
    report = tallies[domain].add
    try:
      groups[domain] = sources.survey(
        paths, reading, suffixes=options.suffixes, report=report, pins=pins
      )
    except ValueError as error:
      faulty = f': {tallies[domain]}' if tallies[domain] else ''
      raise ValueError(f'{flag}: {error}{faulty}') from error
  check(tallies, options)
  _check_first(groups, options, token)
  return groups


def _check_first(
  groups: dict[str, list[pieces.Unit]],
  options: Options,
  token: tokenizer.Tokenizer | None,
) -> None:
  """ValueError for a fault of a first document, which usually shows a wrong flag."""
  tallies = {domain: faults.Tally() for domain in groups}
  for domain, group in groups.items():
    # A later pass names all faults of lines before the first document.
    tally = faults.Tally()
    for _, document in sources.documents(group[0], tally.add):
      tally = tallies[domain]
      try:
        next(iter(document.blocks), None)
        if token:
          ids.check_sample(document, token)
      except faults.Fault as fault:
        tally.add(fault)
      break
    tallies[domain].merge(tally.plain())
  # Ids of another tokenizer cannot be told from good ones later.
  if options.ids:
    options = dataclasses.replace(options, on_error='stop')
  check(tallies, options)


def check(tallies: dict[str, faults.Tally], options: Options, *, enough: int = 1) -> None:
  """ValueError for faults, all together, unless they are skipped."""
  total = faults.Tally()
  for tally in tallies.values():
    total.merge(tally.plain())
  if options.on_error == 'stop' and total.total() >= enough:
    raise ValueError(f'{total}\n--on_error=skip leaves out what cannot be read')
