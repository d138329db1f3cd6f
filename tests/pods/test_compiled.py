"""The reader of compiled programs, on texts written by hand and on programs of XLA."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gated import model, plan
from gated.devices import mesh
from gated.pods import compiled
from gated.pods.compiled import collectives, flops, hlo, limits, loops, places

N = 16
PRODUCT = 2 * N**3


def program(entry: str, *others: str, header: str = '') -> compiled.Program:
  """Lines of an entry computation, and whole other computations -> their cost."""
  lines = '\n'.join(f'  {line}' for line in entry.strip().splitlines())
  rest = '\n\n'.join(others)
  text = f'HloModule made{header}\n\n{rest}\n\nENTRY %main () -> f32[] {{\n{lines}\n}}\n'
  return compiled.read(text)


def exact(program: compiled.Program) -> bool:
  """Every custom call and every loop is counted."""
  return not program.uncounted and not program.unknown_loops


def compile(run, *args):
  return jax.jit(run).lower(*args).compile()


def count(run, *args) -> compiled.Program:
  """A function -> the cost of its program."""
  return compiled.read(compile(run, *args).as_text())


def matrices(*shape):
  return jnp.ones((*shape, N, N), jnp.float32)


@pytest.mark.parametrize('drop', ['', r'"known_trip_count":\{"n":"\d+"\}'])
def test_products_in_nested_loops_count_by_their_trips(drop):
  inner = lambda x, w: (jnp.tanh(x @ w), None)
  outer = lambda x, ws: (jax.lax.scan(inner, x, ws)[0] @ ws[0], None)
  run = lambda x, ws: jax.lax.scan(outer, x, ws)[0]
  text = compile(run, matrices(), matrices(3, 5)).as_text()
  text = re.sub(drop or '$^', '', text)
  cost = compiled.read(text)
  assert cost.flops == (3 * 5 + 3) * PRODUCT
  runs = loops.count(hlo.parse(text), lambda computation, op: 0.0)
  assert sorted(runs.trips.values()) == [3, 5]
  assert exact(cost)


def test_the_trips_of_a_loop_that_counts_down_by_three_are_known():
  def run(x, w):
    body = lambda at: (at[0] - 3, jnp.tanh(at[1] @ w))
    return jax.lax.while_loop(lambda at: at[0] > 1, body, (14, x))[1]

  # 14, 11, 8, 5, 2 are above one.
  assert count(run, matrices(), matrices()).flops == 5 * PRODUCT


def test_a_loop_of_unknown_length_is_listed():
  def run(x, w, n):
    return jax.lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ w), x)

  cost = count(run, matrices(), matrices(), jnp.int32(3))
  assert cost.flops == PRODUCT
  assert len(cost.unknown_loops) == 1 and 'while' in cost.unknown_loops[0]
  assert not exact(cost)


def test_a_conditional_counts_by_its_costliest_branch():
  def run(x, w, on):
    return jax.lax.cond(on, lambda: jnp.tanh(x @ w) @ w, lambda: jnp.tanh(x @ w))

  cost = count(run, matrices(), matrices(), jnp.bool(True))
  assert cost.flops == 2 * PRODUCT
  assert cost.conditionals == 1


def test_a_gradient_adds_two_products():
  run = lambda x, w: jnp.square(jnp.tanh(x @ w)).sum()
  cost = count(jax.grad(run, argnums=(0, 1)), matrices(), matrices())
  assert cost.flops == 3 * PRODUCT


def test_batched_and_transposed_products_count_by_their_sizes():
  q, k = jnp.ones((2, 5, 3, 7)), jnp.ones((2, 11, 3, 7))
  cost = count(lambda q, k: jnp.einsum('bthk,bshk->bhts', q, k), q, k)
  assert cost.flops == 2 * 2 * 3 * 5 * 11 * 7


def meetings(left, right, out, stride, low, left_step, right_step):
  """The same count, by trial of all positions."""
  count = 0
  for o, k in itertools.product(range(out), range(right)):
    at = o * stride + k * right_step - low
    count += at % left_step == 0 and 0 <= at // left_step < left
  return count


def test_a_convolution_counts_only_real_inputs():
  rng = np.random.default_rng(0)
  for _ in range(300):
    left, right, out, stride, left_step, right_step = (
      int(n) for n in rng.integers(1, 7, 6)
    )
    low = int(rng.integers(-3, 8))
    steps = dict(stride=stride, low=low, left_step=left_step, right_step=right_step)
    count = flops._meetings(left, right, out, **steps)
    assert count == meetings(left, right, out, **steps), (left, right, out, steps)


CONVOLUTIONS = {
  # TPUs' compiler writes products with the batch, or a sum, as dims of a window.
  'heads': (
    'f32[8,2,256,256,2]',
    'bf16[8,256,2,64,1]',
    'bf16[8,256,2,2,64]',
    'window={size=8x2x2 stride=7x1x1 pad=0_0x0_0x1_1 lhs_dilate=8x2x1 '
    'rhs_reversal=0x0x1}, dim_labels=0b1f2_0o12i->01bf2',
    2 * 8 * 256 * 256 * 4 * 64,
  ),
  'rows': (
    'bf16[8,256,704]',
    'bf16[256,704,1]',
    'bf16[8,256,256]',
    'window={size=8 pad=7_7 rhs_reversal=1}, dim_labels=fb0_0oi->0fb',
    2 * 8 * 256 * 704 * 256,
  ),
  'summed': (
    'bf16[2048,1,256]',
    'bf16[2048,4,64]',
    'bf16[256,4,64]',
    'window={size=4}, dim_labels=b0f_o0i->b0f',
    2 * 8 * 256 * 256 * 4 * 64,
  ),
  'plain': (
    'f32[32,48]',
    'f32[32,64]',
    'f32[48,64]',
    'dim_labels=bf_oi->bf',
    2 * 32 * 48 * 64,
  ),
}


@pytest.mark.parametrize('name', CONVOLUTIONS)
def test_a_product_written_as_a_convolution_counts_as_a_product(name):
  out, left, right, words, expected = CONVOLUTIONS[name]
  cost = program(f"""%a = {left} parameter(0)
%b = {right} parameter(1)
ROOT %c = {out} convolution(%a, %b), {words}""")
  assert cost.flops == expected


def kernel(name: str, results: str, operands: str, words: str = '') -> compiled.Program:
  shapes = re.findall(r'\w+\[[\d,]*\]', operands)
  lines = [f'%p{n} = {shape} parameter({n})' for n, shape in enumerate(shapes)]
  inputs = ', '.join(f'%p{n}' for n in range(len(shapes)))
  call = f'ROOT %k = {results} custom-call({inputs}), {words}'
  source = f'metadata={{op_name="jit(f)/{name}/pallas_call"}}'
  return program('\n'.join([*lines, call + source]))


TPU = 'custom_call_target="tpu_custom_call", '
HEADS = 's8[1,8,8], bf16[4,512,128], bf16[2,512,128], bf16[2,512,128]'
PAIRS = 4 * 512 * 512 * 128


@pytest.mark.parametrize(
  ('name', 'results', 'operands', 'words', 'expected'),
  [
    ('splash_mha_fwd_segmented', '(bf16[4,512,128])', HEADS, TPU, 4 * PAIRS / 2),
    ('splash_mha_dq_segmented', '(bf16[4,512,128])', HEADS, TPU, 6 * PAIRS / 2),
    (
      'splash_mha_dkv_segmented',
      '(f32[512,128], bf16[2,512,128], bf16[2,512,128])',
      HEADS,
      TPU,
      8 * PAIRS / 2,
    ),
    (
      'splash_mha_dkv_segmented',
      '(bf16[1,4,512,128], bf16[2,512,128], bf16[2,512,128])',
      HEADS,
      TPU,
      10 * PAIRS / 2,
    ),
    (
      'jit(gmm)',
      'bf16[64,48]',
      's32[9], bf16[64,32], bf16[8,32,48]',
      TPU,
      2 * 64 * 32 * 48,
    ),
    (
      'jit(tgmm)',
      'bf16[8,32,48]',
      's32[9], bf16[32,64], bf16[64,48]',
      TPU,
      2 * 64 * 32 * 48,
    ),
    (
      'grouped_outer_products',
      'f32[8,32,48]',
      's32[8], bf16[64,32], bf16[64,48]',
      'custom_call_target="__gpu$xla.gpu.triton", ',
      2 * 64 * 32 * 48,
    ),
    (
      'dot_general',
      '(bf16[64,48], s8[1024])',
      'bf16[64,32], bf16[32,48]',
      'custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":'
      '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}, ',
      2 * 64 * 32 * 48,
    ),
    (
      'fused_attention',
      '(bf16[2,4,512,64], f32[2,4,512])',
      'bf16[2,512,4,64], bf16[2,512,2,64], bf16[2,512,2,64]',
      'custom_call_target="__cudnn$fmhaSoftmax", backend_config={"mask_type":"CAUSAL"}, ',
      4 * 2 * 4 * 512 * 512 * 64 / 2,
    ),
    (
      'fused_attention',
      '(bf16[2,4,512,64], bf16[2,2,512,64], bf16[2,2,512,64])',
      'bf16[2,512,4,64], bf16[2,512,2,64], bf16[2,512,2,64]',
      'custom_call_target="__cudnn$fmhaSoftmaxBackward", ',
      10 * 2 * 4 * 512 * 512 * 64,
    ),
  ],
)
def test_kernels_count_by_their_operands(name, results, operands, words, expected):
  cost = kernel(name, results, operands, words)
  assert cost.flops == expected
  assert sum(cost.kernels.values()) == expected
  assert exact(cost)


def test_an_unknown_custom_call_is_listed():
  cost = kernel('jit(mystery)', 'f32[8]', 'f32[8]', TPU)
  assert cost.uncounted == {'jit(mystery)': 1}
  assert not exact(cost)
  free = kernel('f', 'f32[8]', 'f32[8]', 'custom_call_target="AllocateBuffer", ')
  assert exact(free)


@pytest.mark.parametrize(
  ('words', 'expected'),
  [
    ('replica_groups={{0,1},{2,3},{4,5},{6,7}}, x=1', [(0, 1), (2, 3), (4, 5), (6, 7)]),
    ('replica_groups={}, x=1', [tuple(range(8))]),
    ('replica_groups=[2,4]<=[8], x=1', [(0, 1, 2, 3), (4, 5, 6, 7)]),
    ('replica_groups=[4,2]<=[2,4]T(1,0)', [(0, 4), (1, 5), (2, 6), (3, 7)]),
    (
      "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, x=1",
      [(0, 1, 2, 3), (4, 5, 6, 7)],
    ),
    (
      "replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_0'}",
      [(0, 1), (2, 3), (4, 5), (6, 7)],
    ),
    (
      "replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}",
      [(0, 1, 4, 5), (2, 3, 6, 7)],
    ),
    ("replica_groups=mesh['a'=8] {'a':(2)2}", [(0, 2), (1, 3), (4, 6), (5, 7)]),
    ('source_target_pairs={{0,1},{1,0},{2,2}}, metadata={}', [(0, 1), (1, 0), (2, 2)]),
  ],
)
def test_groups_are_read_in_all_their_forms(words, expected):
  assert collectives.groups(words, 8) == expected


HEADER = ', num_partitions=8'
GROUPS = 'replica_groups=[2,4]<=[8]'


@pytest.mark.parametrize(
  ('line', 'kind', 'expected'),
  [
    ('f32[64] all-gather(%p), dimensions={0}', 'all-gather', 256 * 3 / 4),
    ('(f32[16], f32[64]) all-gather-start(%p), x={0}', 'all-gather', 256 * 3 / 4),
    ('f32[16] all-reduce(%p), to_apply=%add', 'all-reduce', 2 * 64 * 3 / 4),
    ('f32[4] reduce-scatter(%p), to_apply=%add', 'reduce-scatter', 64 * 3 / 4),
    ('f32[16] all-to-all(%p)', 'all-to-all', 64 * 3 / 4),
  ],
)
def test_a_collective_counts_the_bytes_that_a_chip_receives(line, kind, expected):
  text = f'%p = f32[16] parameter(0)\nROOT %c = {line}, {GROUPS}'
  (traffic,) = program(text, header=HEADER).collectives
  assert (traffic.kind, traffic.count, traffic.bytes) == (kind, 1, expected)


def test_a_permutation_counts_its_whole_result():
  permute = '%p = f32[16] parameter(0)\nROOT %c = f32[16] collective-permute(%p), '
  (traffic,) = program(permute + 'source_target_pairs={{0,1},{1,0}}').collectives
  assert traffic.bytes == 64
  assert not program(permute + 'source_target_pairs={{0,0},{1,1}}').collectives


def test_an_asynchronous_collective_split_into_fusions_counts_once():
  gather = f'all-gather(%p), channel_id=7, dimensions={{0}}, {GROUPS}'
  part = """%{name} () -> f32[64] {{
  %p = f32[16] parameter(0)
  %g = f32[64] {gather}
  ROOT %r = {root}
}}"""
  call = '(f32[16], f32[64]) custom-call(%g), custom_call_target="AsyncCollective{}"'
  texts = [
    part.format(name='start', gather=gather, root=call.format('Start')),
    part.format(name='async_collective_fusion.1', gather=gather, root='f32[64] copy(%g)'),
    part.format(name='done', gather=gather, root=call.format('Done')),
  ]
  entry = """%p = f32[16] parameter(0)
%a = (f32[16], f32[64]) fusion(%p), kind=kCustom, calls=%start
%b = f32[64] fusion(%p), kind=kCustom, calls=%async_collective_fusion.1
ROOT %c = f32[64] fusion(%p), kind=kCustom, calls=%done"""
  (traffic,) = program(entry, *texts, header=HEADER).collectives
  assert (traffic.count, traffic.bytes) == (1, 256 * 3 / 4)


def test_an_all_reduce_whose_result_is_sliced_is_a_reduce_scatter():
  inside = f"""%all-reduce-scatter.3 (p: f32[64]) -> f32[16] {{
  %p = f32[64] parameter(0)
  %r = f32[64] all-reduce(%p), to_apply=%add, {GROUPS}
  ROOT %s = f32[16] slice(%r), slice={{[0:16]}}
}}"""
  entry = """%p = f32[64] parameter(0)
ROOT %f = f32[16] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.3"""
  (traffic,) = program(entry, inside, header=HEADER).collectives
  assert (traffic.kind, traffic.bytes) == ('reduce-scatter', 256 * 3 / 4)


def test_traffic_between_slices_has_its_own_network():
  text = f"""HloModule made{HEADER}

ENTRY %main () -> f32[16] {{
  %p = f32[16] parameter(0)
  %a = f32[16] all-reduce(%p), to_apply=%add, replica_groups=[4,2]<=[8]
  ROOT %b = f32[16] all-reduce(%a), to_apply=%add, replica_groups=[4,2]<=[2,4]T(1,0)
}}"""
  axes = {'data': 2, 'fsdp': 2, 'expert': 1, 'tensor': 2, 'context': 1}
  cost = compiled.read(text, axes, [0] * 4 + [1] * 4)
  assert {(t.network, t.axis, t.bytes) for t in cost.collectives} == {
    ('links', 'tensor', 64),
    ('network', 'data', 64),
  }


def test_transfers_of_a_tpus_host_between_slices_count():
  words = 'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
  words += '_xla_megascale_transfer_type="ALL_REDUCE"}'
  text = f"""HloModule made, num_partitions=4

ENTRY %main () -> f32[] {{
  %t = token[] after-all()
  ROOT %r = (f32[16], u32[], token[]) recv(%t), is_host_transfer=true, {words}
}}"""
  axes = {'data': 2, 'fsdp': 4, 'expert': 1, 'tensor': 1, 'context': 1}
  (traffic,) = compiled.read(text, axes, [0] * 4 + [1] * 4).collectives
  assert (traffic.kind, traffic.axis, traffic.network) == (
    'all-reduce',
    'data',
    'network',
  )
  assert traffic.bytes == 64


def test_collectives_in_a_loop_of_a_real_program_count_by_axis():
  on = mesh.make(data=2, fsdp=4, expert=1, tensor=1, context=1)
  sharding = NamedSharding(on, P('fsdp'))

  def local(x):
    body = lambda x, _: (jnp.tanh(jax.lax.psum(x, 'fsdp') + x), None)
    return jax.lax.scan(body, x, None, length=5)[0]

  run = jax.shard_map(local, mesh=on, in_specs=P('fsdp'), out_specs=P('fsdp'))
  x = jax.ShapeDtypeStruct((4 * N, N), jnp.float32, sharding=sharding)
  cost = compiled.read(jax.jit(run).lower(x).compile().as_text(), dict(on.shape))
  (reduce,) = cost.collectives
  assert (reduce.kind, reduce.axis, reduce.count) == ('all-reduce', 'fsdp', 5)
  assert reduce.bytes == 5 * 2 * (N * N * 4) * 3 / 4


def test_a_loop_writes_a_stack_one_slice_at_a_time():
  def run(x):
    body = lambda x, _: (jnp.tanh(x) + 1, x)
    return jax.lax.scan(body, x, None, length=100)[1]

  x = jnp.ones((1000,), jnp.float32)
  cost = count(run, x)
  # A round reads and writes a few rows; whole stacks would be 100 of 400 kB.
  assert 100 * 2 * 4000 <= cost.bytes <= 100 * 10 * 4000


def test_a_product_reads_and_writes_its_arrays_once():
  cost = count(lambda x, w: x @ w, jnp.ones((64, 128)), jnp.ones((128, 256)))
  assert cost.bytes == 4 * (64 * 128 + 128 * 256 + 64 * 256)


def test_values_in_a_tpus_vector_memory_cost_no_traffic():
  text = """%p = f32[1024]{0:T(1024)} parameter(0)
%s = (f32[1024]{0:T(1024)S(1)}, f32[1024]{0:T(1024)}, u32[]{:S(2)}) copy-start(%p)
%d = f32[1024]{0:T(1024)S(1)} copy-done(%s)
%n = f32[1024]{0:T(1024)S(1)} negate(%d)
ROOT %c = f32[1024]{0:T(1024)} negate(%n)"""
  assert program(text).bytes == 2 * 4096


def test_the_largest_arrays_come_first_with_their_source_line():
  cost = count(lambda x, w: swiglu(x @ w), matrices(4), matrices(4))
  assert cost.buffers[0].bytes == 4 * N * N * 4
  sizes = [buffer.bytes for buffer in cost.buffers]
  assert sizes == sorted(sizes, reverse=True)
  assert any(str(b.place).startswith('gated/model/layers.py:') for b in cost.buffers)


def swiglu(x):
  from gated.model import layers

  return layers.swiglu(x, x)


def test_an_instruction_may_span_several_lines():
  text = """%p = f32[4]{0} parameter(0)
%k = (f32[4]{0}, /*index=1*/s32[]) custom-call(%p), custom_call_target="x", note={a={
"b":"c"
}}, metadata={op_name="f/g" stack_frame_id=1}
ROOT %g = f32[4]{0} get-tuple-element(%k), index=0"""
  lines = '\n'.join(f'  {line}' if '%' in line else line for line in text.splitlines())
  parsed = hlo.parse(f'HloModule m\n\nENTRY %main () -> f32[4] {{\n{lines}\n}}\n')
  op = parsed['main'].body['k']
  assert [str(shape) for shape in op.shapes] == ['f32[4]', 's32[]']
  assert (op.source, op.target, op.operands) == ('f/g', 'x', ('p',))
  assert parsed['main'].root.name == 'g'


def test_bytes_depend_on_the_type():
  kinds = {'pred[8]': 8, 's4[3]': 2, 'bf16[2,3]': 12, 'f8e4m3fn[5]': 5, 'c64[2]': 16}
  for text, size in kinds.items():
    assert hlo.shapes(text)[0].bytes == size, text
  with pytest.raises(ValueError, match='unknown type'):
    hlo.bits('wide')


def test_a_counter_inside_a_fusion_is_simulated():
  body = """%body (t: (s32[], f32[])) -> (s32[], f32[]) {
  %t = (s32[], f32[]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[] get-tuple-element(%t), index=1
  %two = s32[] constant(2)
  %f = s32[] fusion(%i, %two), kind=kLoop, calls=%step
  ROOT %r = (s32[], f32[]) tuple(%f, %x)
}"""
  step = """%step (a: s32[], b: s32[]) -> s32[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %c = s32[] add(%a, %b)
}"""
  condition = """%condition (t: (s32[], f32[])) -> pred[] {
  %t = (s32[], f32[]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %end = s32[] constant(9)
  ROOT %c = pred[] compare(%i, %end), direction=LT
}"""
  entry = """%x = f32[] parameter(0)
%one = s32[] constant(1)
%start = (s32[], f32[]) tuple(%one, %x)
%w = (s32[], f32[]) while(%start), condition=%condition, body=%body
ROOT %r = f32[] get-tuple-element(%w), index=1"""
  parsed = hlo.parse(
    f'HloModule m\n\n{step}\n\n{body}\n\n{condition}\n\nENTRY %e () -> f32[] '
    f'{{\n  {entry.replace(chr(10), chr(10) + "  ")}\n}}\n'
  )
  runs = loops.count(parsed, lambda computation, op: 0.0)
  assert runs.trips == {'w': 4} and not runs.unknown
  assert runs.alone['body'] == 4 and runs.alone['condition'] == 5
  assert runs.fused['step'] == 4 and runs.alone['step'] == 0


# Checks of a program.

FRAMES = f"""HloModule made

FileNames
1 "{places.PACKAGE}kernels/attention/contract.py"
2 "{places.PACKAGE}kernels/cross_entropy.py"
3 "{places.PACKAGE}model/layers.py"

FunctionNames
1 "run"

FileLocations
1 {{file_name_id=1 function_name_id=1 line=5 end_line=5 column=4 end_column=4}}
2 {{file_name_id=2 function_name_id=1 line=6 end_line=6 column=4 end_column=4}}
3 {{file_name_id=3 function_name_id=1 line=7 end_line=7 column=4 end_column=4}}

StackFrames
1 {{file_location_id=1 parent_frame_id=1}}
2 {{file_location_id=2 parent_frame_id=1}}
3 {{file_location_id=3 parent_frame_id=1}}

"""
FRAME = {'attention': 1, 'loss': 2, 'layers': 3}


def arrays(*made: tuple[str, str]) -> compiled.Program:
  """Pairs (shape, module) -> a program in which the modules make such arrays."""
  lines = ['%p = f32[1] parameter(0)']
  for n, (shape, where) in enumerate(made):
    frame = f'metadata={{op_name="f" stack_frame_id={FRAME[where]}}}'
    lines.append(f'%a{n} = {shape} broadcast(%p), dimensions={{0}}, {frame}')
  lines.append('ROOT %r = f32[1] negate(%p)')
  body = '\n'.join(f'  {line}' for line in lines)
  return compiled.read(f'{FRAMES}ENTRY %main () -> f32[1] {{\n{body}\n}}\n')


def test_a_large_array_of_the_loss_or_attention_is_a_violation():
  large, fair = 'f32[4096,131072]', 'f32[2048,131072]'
  assert limits.large_buffers(arrays((large, 'layers'), (fair, 'loss'))) == []
  (loss,) = limits.large_buffers(arrays((large, 'loss')))
  assert (
    'the loss' in loss and 'f32[4096,131072]' in loss and 'cross_entropy.py:6 run' in loss
  )
  (attention,) = limits.large_buffers(arrays((large, 'attention')))
  assert 'of attention' in attention


def test_an_array_of_tokens_by_tokens_is_a_violation():
  check = functools.partial(limits.squares, length=4096)
  scores, shard = ('f32[2,8,4096,4096]', 'layers'), ('f32[2,8,1024,4096]', 'attention')
  projected = ('bf16[2,4096,4096]', 'layers')
  assert len(check(arrays(scores), parts=1, also=())) == 1
  assert len(check(arrays(shard), parts=4, also=())) == 1
  assert check(arrays(shard), parts=1, also=()) == []
  # A projection to 4096 channels is allowed if the model has as many.
  assert check(arrays(projected), parts=1, also=(4096,)) == []
  in_attention = arrays(('f32[2,8,4096,4096]', 'attention'))
  assert len(check(in_attention, parts=1, also=(4096,))) == 1


@pytest.mark.parametrize(
  ('shape', 'bad'),
  [
    ('bf16[1,128,64,24]', True),  # all experts of a layer
    ('bf16[196608]', True),  # the same, flat
    ('bf16[128,64,12]', True),  # a part of each expert
    ('bf16[16,64,24]', False),  # a shard's experts
    ('bf16[512,64]', False),  # another matrix
    ('f32[2,64,128]', False),  # routers
  ],
)
def test_an_all_gather_of_all_experts_is_a_violation(shape, bad):
  text = f'%p = bf16[2] parameter(0)\nROOT %g = {shape} all-gather(%p), {GROUPS}'
  cost = program(text, header=HEADER)
  violations = limits.whole_experts(cost, experts=128, width=64, ffn=24)
  assert bool(violations) == bad


# The whole train step.

WIDE = dict(
  batch=16,
  accum=2,
  data__length=16,
  model__width=64,
  model__ffn=96,
  model__vocab=256,
  model__attn__head_dim=16,
)
MOE = dict(
  model__moe__experts=4,
  model__moe__top_k=2,
  model__moe__dispatch='capacity',
  model__moe__capacity=1.0,
)
STEPS = {
  'dense': dict(mesh__fsdp=4, mesh__tensor=2),
  'dense, recomputed': dict(mesh__fsdp=8, model__remat='full'),
  'moe': MOE | dict(mesh__fsdp=8, loss__balance_over='micro'),
  'moe, routed first': MOE
  | dict(mesh__fsdp=4, mesh__data=2, loss__balance_over='global'),
}


def analytic(cfg: plan.Config) -> float:
  """FLOPs of a step: the model's, recomputation, and the routers' own pass."""
  m, tokens = cfg.model, cfg.batch * cfg.data.length
  length = cfg.data.length
  total = model.flops_per_token(m, length)
  # The reference computes all pairs of tokens, not the causal half.
  pairs = m.depth * m.attn.heads * m.attn.head_dim * (length - (length + 1) / 2)
  total += 12 * pairs
  blocks = total / 3 - 2 * m.vocab * m.width
  if m.remat == 'full':
    # One more forward pass, without the last product of each layer: no gradient needs it.
    total += blocks - 2 * m.depth * m.width * m.ffn
  if m.moe.experts and cfg.accum > 1 and cfg.loss.balance_over == 'global':
    # A first forward pass counts the routers' choices.
    total += blocks
  return total * tokens


@pytest.mark.parametrize('name', STEPS)
@pytest.mark.full
def test_a_train_step_has_the_analytic_flops(name):
  cfg = small.whole(**WIDE, **STEPS[name])
  layout = plan.Plan(cfg)
  step = layout.train_step().compile()
  cost = compiled.read(step.as_text(), dict(layout.mesh.shape))
  assert exact(cost), (cost.uncounted, cost.unknown_loops)
  assert math.isclose(cost.flops * layout.mesh.size, analytic(cfg), rel_tol=0.05)
