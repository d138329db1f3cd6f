"""Cost of the probes on one long row, beside the forward pass for the loss.

  python bench/probes.py [--scale=proxy --length=32768 --gate=elementwise]

`dense_1b7:28l` at a scale, in bfloat16, random weights, one row that is one document.
Peak memory is what the compiled program needs: arguments, results and temporaries.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing

from configs import dense_1b7
from gated import config, data, model, probes
from gated.train import losses


def main():
  parser = timing.options(__doc__, scale='proxy', length=32768, gate='elementwise')
  a = parser.parse_args()
  print(timing.title(vars(a)))
  c = dense_1b7.get_config(f'28l,gate={a.gate},scale={a.scale}').to_dict()
  c['model']['numerics'] |= dict(weights='bfloat16', compute='bfloat16')
  c['model'] |= dict(layers='scan')
  cfg = config.build(model.Config, c['model'], 'config.model')
  net = jax.jit(lambda key: model.Transformer(cfg, key))(jax.random.key(0))
  token_BT = jax.random.randint(jax.random.key(1), (1, a.length), 0, cfg.vocab)
  ones, index = (
    np.ones((1, a.length), np.int32),
    np.arange(a.length, dtype=np.int32)[None],
  )
  host = data.Batch(
    np.asarray(token_BT), np.asarray(token_BT), ones.astype(np.float32), ones, index
  )
  batch = jax.device_put(host)
  class_V = jnp.zeros(cfg.vocab, jnp.int32)
  print(f'{model.count(net) / 1e6:.0f}M parameters')
  forward = lambda net, batch, _: losses.per_row(net, batch, chunk=1024)
  measured = {}
  for name, run in (('loss', forward), ('probes', probes.measure)):
    compiled = jax.jit(run).lower(net, batch, class_V).compile()
    memory: Any = compiled.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes
    peak += memory.temp_size_in_bytes
    measured[name] = timing.milliseconds(compiled, net, batch, class_V), peak / 2**30
    print(f'{name:8} {measured[name][0]:8.1f} ms  {measured[name][1]:6.2f} GiB')
  ratios = [b / a for a, b in zip(measured['loss'], measured['probes'])]
  print(f'probes / loss: {ratios[0]:.2f} times the time, {ratios[1]:.2f} the memory')


if __name__ == '__main__':
  main()
