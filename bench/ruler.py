"""The time to make 100 items of each task of RULER, by length; wanted: 10 s at most.

  python bench/ruler.py --lengths 1024 4096 16384 --tokenizer=TOKENIZER.json

CPU seconds of this process, without the model. With `bytes`, cwe needs more than 4096.
"""

import time

import timing

from gated.data import tokenizer
from gated.evals import ruler


def main():
  parser = timing.options(__doc__, tokenizer='bytes', items=100)
  parser.add_argument('--lengths', type=int, nargs='+', default=[1024, 4096, 16384])
  a = parser.parse_args()
  print(timing.title(f'{a.items} items, tokenizer {a.tokenizer}'))
  print(f'{"":18}' + ''.join(f'{length:>9}' for length in a.lengths))
  token = tokenizer.load(a.tokenizer)
  maker = ruler.Maker(tokenizer=token, prefix=(), texts=ruler.local(), seed=42)
  for name in ruler.TASKS:
    cells = []
    for length in a.lengths:
      try:
        maker.check(name, length, a.items)
      except ValueError:
        cells.append('too short')
        continue
      begun = time.process_time()
      list(maker.items(name, length, a.items))
      cells.append(f'{time.process_time() - begun:.1f} s')
    print(f'{name:18}' + ''.join(f'{cell:>9}' for cell in cells), flush=True)


if __name__ == '__main__':
  main()
