"""bench/traffic.py: the bytes of each kernel of a program's text."""

import importlib
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parents[1] / 'bench'

HLO = """HloModule step

%part (stack: f32[4,8], i: s32[]) -> bf16[8] {
  %stack = f32[4,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %one = f32[1,8]{1,0} dynamic-slice(%stack, %i), dynamic_slice_sizes={1,8}
  ROOT %out = bf16[8]{0} convert(%one)
}

%put (rows: f32[4,8], row: f32[1,8], j: s32[]) -> f32[4,8] {
  %rows = f32[4,8]{1,0} parameter(0)
  %row = f32[1,8]{1,0} parameter(1)
  %j = s32[] parameter(2)
  ROOT %all = f32[4,8]{1,0} dynamic-update-slice(%rows, %row, %j)
}

%product (a: bf16[8,8], b: bf16[8,8]) -> (bf16[8,8], s8[64]) {
  %a = bf16[8,8]{1,0} parameter(0)
  %b = bf16[8,8]{1,0} parameter(1)
  ROOT %call = (bf16[8,8]{1,0}, s8[64]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul"
}

%body (state: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %state = (s32[], f32[4,8]{1,0}) parameter(0)
  %at = s32[] get-tuple-element(%state), index=0
  %kept = f32[4,8]{1,0} get-tuple-element(%state), index=1
  %new = f32[1,8]{1,0} broadcast(%at), dimensions={}
  %put.1 = f32[4,8]{1,0} fusion(%kept, %new, %at), kind=kLoop, calls=%put
  ROOT %next = (s32[], f32[4,8]{1,0}) tuple(%at, %put.1)
}

ENTRY %step (p: f32[4,8], i: s32[], a: bf16[8,8]) -> bf16[8] {
  %p = f32[4,8]{1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %a.1 = bf16[8,8]{1,0} parameter(2)
  %slice = bf16[8]{0} fusion(%p, %i.1), kind=kLoop, calls=%part
  %square = (bf16[8,8]{1,0}, s8[64]{0}) fusion(%a.1, %a.1), kind=kCustom, calls=%product
  %start = (s32[], f32[4,8]{1,0}) tuple(%i.1, %p)
  %loop = (s32[], f32[4,8]{1,0}) while(%start), condition=%no, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %copy = bf16[8]{0} copy(%slice)
}
"""  # noqa: E501


def test_kernels_count_what_they_read_and_write(monkeypatch):
  monkeypatch.syspath_prepend(str(BENCH))
  traffic = importlib.import_module('traffic')
  found = {names[0]: rest for names, *rest in traffic.kernels(HLO)}
  matmul = '__cublas$lt$matmul'
  assert found == {
    # One row of four bytes a number, the index, and the row in two bytes.
    'slice': ['', 'bf16[8]', 32 + 4 + 16, 1],
    # The same operand counts once; the product within is a product.
    'square': [matmul, '(bf16[8,8], s8[64])', 128 + 128 + 64, 1],
    # Three times: a row, written in place.
    'new': ['', 'f32[1,8]', 4 + 32, 3],
    'put.1': ['', 'f32[4,8]', 32 + 4 + 32, 3],
    'copy': ['', 'bf16[8]', 32, 1],
  }
  assert traffic.size('(pred[3], f8e4m3fn[2,2]{1,0}, s4[2], f32[])') == 3 + 4 + 1 + 4
  for name in ('traffic', 'step_profile', 'train_step', 'timing'):
    sys.modules.pop(name, None)
