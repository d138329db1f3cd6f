"""The dense and the mixture-of-experts models of our recipes, in plain PyTorch.

Written for the speed of `torch.compile`: matrices that read the same input are one
matrix, a layer's experts are two grouped products, and the vocabulary loss computes its
gradient in the forward pass, some tokens at a time. Weights are cast to the compute dtype
where they are used, as autocast does. bench/torch_peer.py measures this model, and
compares it with ours.

B batch  T tokens  N = B * T  D width  H heads  G KV heads  K head width  V vocabulary
E experts  k experts of a token  M = N * k selections
"""

import functools

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

grouped_mm = getattr(F, 'grouped_mm', None) or torch._grouped_mm

# Rows of the matrix of queries, keys and values that are a gate: H heads of width K.
GATE_ROWS = {
  'none': lambda H, K: 0,
  'headwise': lambda H, K: H,
  'elementwise': lambda H, K: H * K,
}


class Matrix(nn.Module):
  """Weights (..., rows, columns): x (..., columns) -> (..., rows)."""

  def __init__(self, *shape, std, dtype):
    super().__init__()
    self.weight = nn.Parameter((std * torch.randn(shape)).to(dtype))

  def forward(self, x):
    return F.linear(x, self.weight.to(x.dtype))

  def grouped(self, x_MD, end_E):
    """Rows sorted by expert, and the end of each expert's rows."""
    weight = self.weight.to(x_MD.dtype).transpose(-2, -1)
    return grouped_mm(x_MD, weight, offs=end_E)


class RMSNorm(nn.Module):
  def __init__(self, width, eps):
    super().__init__()
    self.scale, self.eps = nn.Parameter(torch.ones(width)), eps

  def forward(self, x):
    z = x.float()
    z = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + self.eps)
    return (z * self.scale).to(x.dtype)


def rope(x_BTHK, cos_Tk, sin_Tk):
  """Rotates the pairs (i, i + K/2) of each head, in float32."""
  a, b = x_BTHK.float().chunk(2, -1)
  cos, sin = cos_Tk[:, None], sin_Tk[:, None]
  return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x_BTHK.dtype)


class Attention(nn.Module):
  def __init__(self, cfg, matrix, std_out):
    super().__init__()
    own, eps = cfg.attn, cfg.numerics.norm_eps
    self.heads, self.head_dim = H, K = own.heads, own.head_dim
    self.grouped = own.kv_heads != H
    gate = own.gate.granularity if own.gate.at else 'none'
    self.rows = [H * K, own.kv_heads * K, own.kv_heads * K, GATE_ROWS[gate](H, K)]
    self.inward = matrix(sum(self.rows), cfg.width)
    self.out = matrix(cfg.width, H * K, std=std_out)
    self.query_norm = RMSNorm(K, eps) if own.qk_norm else nn.Identity()
    self.key_norm = RMSNorm(K, eps) if own.qk_norm else nn.Identity()

  def forward(self, x_BTD, cos_Tk, sin_Tk):
    *qkv, gate = self.inward(x_BTD).split(self.rows, -1)
    q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in qkv)
    q, k = (
      rope(self.query_norm(q), cos_Tk, sin_Tk),
      rope(self.key_norm(k), cos_Tk, sin_Tk),
    )
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    attend = functools.partial(F.scaled_dot_product_attention, is_causal=True)
    y_BTHK = attend(q, k, v, enable_gqa=self.grouped).transpose(1, 2)
    if self.rows[-1]:
      score = torch.sigmoid(gate.float()).unflatten(-1, (self.heads, -1))
      y_BTHK = (y_BTHK.float() * score).to(y_BTHK.dtype)
    return self.out(y_BTHK.flatten(2))


class SwiGLU(nn.Module):
  def __init__(self, cfg, matrix, std_out):
    super().__init__()
    self.inward = matrix(2 * cfg.ffn, cfg.width)
    self.out = matrix(cfg.width, cfg.ffn, std=std_out)

  def forward(self, x_BTD):
    act, up = self.inward(x_BTD).chunk(2, -1)
    return self.out(F.silu(act) * up), None


def _spread(x_ND, order_M, k):
  return x_ND[order_M // k]


def _gathered(y_MD, back_M, k):
  return y_MD[back_M].unflatten(0, (-1, k)).sum(1)


class Spread(torch.autograd.Function):
  """Each token k times, sorted by expert. Its gradient gathers, where autograd's adds."""

  @staticmethod
  def forward(ctx, x_ND, order_M, back_M, k):
    ctx.save_for_backward(back_M)
    ctx.k = k
    return _spread(x_ND, order_M, k)

  @staticmethod
  def backward(ctx, g_MD):
    [back_M] = ctx.saved_tensors
    return _gathered(g_MD, back_M, ctx.k), None, None, None


class Gathered(torch.autograd.Function):
  """The sum of each token's k rows."""

  @staticmethod
  def forward(ctx, y_MD, order_M, back_M, k):
    ctx.save_for_backward(order_M)
    ctx.k = k
    return _gathered(y_MD, back_M, k)

  @staticmethod
  def backward(ctx, g_ND):
    [order_M] = ctx.saved_tensors
    return _spread(g_ND, order_M, ctx.k), None, None, None


class MoE(nn.Module):
  """x_BTD -> (y_BTD, the layer's load-balancing loss and router z-loss)."""

  def __init__(self, cfg, matrix, std_out):
    super().__init__()
    self.cfg, E = cfg.moe, cfg.moe.experts
    self.router = matrix(E, cfg.width, dtype=torch.float32)
    self.inward = matrix(E, 2 * cfg.ffn, cfg.width)
    self.out = matrix(E, cfg.width, cfg.ffn, std=std_out)

  def forward(self, x_BTD):
    x_ND, E, k = x_BTD.flatten(0, 1), self.cfg.experts, self.cfg.top_k
    logit_NE = self.router(x_ND.float())
    prob_NE = logit_NE.softmax(-1)
    weight_Nk, choice_Nk = prob_NE.topk(k)
    if self.cfg.norm_topk:
      weight_Nk = weight_Nk / weight_Nk.sum(-1, keepdim=True)
    expert_M, order_M = choice_Nk.flatten().sort(stable=True)
    place = torch.arange(len(order_M), device=x_ND.device)
    back_M = torch.empty_like(order_M).scatter(0, order_M, place)
    each_E = torch.arange(E, device=x_ND.device)
    end_E = torch.searchsorted(expert_M, each_E, right=True, out_int32=True)
    act, up = self.inward.grouped(Spread.apply(x_ND, order_M, back_M, k), end_E).chunk(
      2, -1
    )
    # Times the router's weights here: F is smaller than D.
    weight_M = weight_Nk.flatten()[order_M][:, None]
    hidden = (F.silu(act.float()) * up.float() * weight_M).to(up.dtype)
    y_ND = Gathered.apply(self.out.grouped(hidden, end_E), order_M, back_M, k)
    load_E = end_E.diff(prepend=end_E.new_zeros(1)) / len(order_M)
    balance = E * (load_E * prob_NE.mean(0)).sum()
    z = logit_NE.logsumexp(-1).square().mean()
    return y_ND.view_as(x_BTD), torch.stack([balance, z])


class Block(nn.Module):
  def __init__(self, cfg, matrix, std_out):
    super().__init__()
    norm = functools.partial(RMSNorm, cfg.width, cfg.numerics.norm_eps)
    self.attn_norm, self.ffn_norm = norm(), norm()
    self.attn = Attention(cfg, matrix, std_out)
    self.ffn = (MoE if cfg.moe.experts else SwiGLU)(cfg, matrix, std_out)

  def forward(self, x_BTD, cos_Tk, sin_Tk):
    x_BTD = x_BTD + self.attn(self.attn_norm(x_BTD), cos_Tk, sin_Tk)
    y_BTD, routed = self.ffn(self.ffn_norm(x_BTD))
    return x_BTD + y_BTD, routed


class VocabLoss(torch.autograd.Function):
  """Mean cross-entropy of x_ND and w_VD; the logits of `chunk` tokens are in memory.

  As in Liger: the gradient of w is summed over the chunks in the compute dtype.
  """

  @staticmethod
  def forward(ctx, x_ND, w_VD, target_N, chunk):
    id_V = torch.arange(len(w_VD), device=w_VD.device)
    total, dx, dw = 0.0, [], None
    for x, target in zip(x_ND.split(chunk), target_N[:, None].split(chunk)):
      logit = (x @ w_VD.T).float()
      lse = logit.logsumexp(-1, keepdim=True)
      total = total + (lse - logit.gather(1, target)).sum()
      dlogit = ((logit - lse).exp() - (id_V == target).float()) / len(x_ND)
      dlogit = dlogit.to(x.dtype)
      dx.append(dlogit @ w_VD)
      dw = dlogit.T @ x if dw is None else torch.addmm(dw, dlogit.T, x)
    ctx.save_for_backward(torch.cat(dx), dw)
    return total / len(x_ND)

  @staticmethod
  def backward(ctx, g):
    dx, dw = ctx.saved_tensors
    return (g * dx).to(dx.dtype), (g * dw).to(dw.dtype), None, None


class Model(nn.Module):
  """A recipe's model and its losses, for rows of `length` tokens of one document."""

  def __init__(self, cfg, loss, length):
    super().__init__()
    self.loss, self.compute = loss, getattr(torch, cfg.numerics.compute)
    opts = dict(std=cfg.numerics.init_std, dtype=getattr(torch, cfg.numerics.weights))
    matrix = functools.partial(Matrix, **opts)
    self.embed = matrix(cfg.vocab, cfg.width)
    std_out = cfg.numerics.residual_std(cfg.depth)
    self.blocks = nn.ModuleList(Block(cfg, matrix, std_out) for _ in range(cfg.depth))
    self.norm = RMSNorm(cfg.width, cfg.numerics.norm_eps)
    self.head = self.embed if cfg.tied else matrix(cfg.vocab, cfg.width)
    pair = torch.arange(0, cfg.attn.head_dim, 2) / cfg.attn.head_dim
    angle_Tk = torch.arange(length)[:, None] * cfg.attn.rope_base**-pair
    self.register_buffer('cos', angle_Tk.cos())
    self.register_buffer('sin', angle_Tk.sin())

  def forward(self, token_BT, target_BT):
    """-> (the minimized loss, the cross-entropy), in nats per token."""
    x = F.embedding(token_BT, self.embed.weight).to(self.compute)
    routed = []
    for block in self.blocks:
      x, losses = block(x, self.cos, self.sin)
      routed += [] if losses is None else [losses]
    args = self.head.weight.to(x.dtype), target_BT.flatten(), self.loss.chunk
    nll = VocabLoss.apply(self.norm(x).flatten(0, 1), *args)
    if not routed:
      return nll, nll
    balance, z = torch.stack(routed).sum(0)
    return nll + self.loss.balance * balance + self.loss.router_z * z, nll

  def groups(self, decay):
    """Groups of parameters for AdamW: the scales of norms do not decay."""
    scales = [p for p in self.parameters() if p.ndim == 1]
    matrices = [p for p in self.parameters() if p.ndim > 1]
    return [
      dict(params=matrices, weight_decay=decay),
      dict(params=scales, weight_decay=0),
    ]


_rows = lambda w: w.reshape(len(w), -1).T  # (D, ...) -> (rows, D)
_columns = lambda w: w.reshape(-1, w.shape[-1]).T  # (..., D) -> (D, columns)
_experts = lambda w: w.swapaxes(-1, -2)
_plain = lambda w: w

# A parameter of a block: our leaves, whose rows it joins, and how each is turned.
OURS = {
  'attn_norm.scale': (_plain, 'attn_norm.scale'),
  'ffn_norm.scale': (_plain, 'ffn_norm.scale'),
  'attn.query_norm.scale': (_plain, 'attn.query_norm.scale'),
  'attn.key_norm.scale': (_plain, 'attn.key_norm.scale'),
  'attn.inward.weight': (
    _rows,
    *(f'attn.{n}.weight' for n in ['query', 'key', 'value', 'gate']),
  ),
  'attn.out.weight': (_columns, 'attn.out.weight'),
}
DENSE = {
  'ffn.inward.weight': (_rows, 'ffn.act.weight', 'ffn.up.weight'),
  'ffn.out.weight': (_rows, 'ffn.down.weight'),
}
SPARSE = {
  'ffn.router.weight': (_rows, 'ffn.router.weight'),
  'ffn.inward.weight': (_experts, 'ffn.experts.act', 'ffn.experts.up'),
  'ffn.out.weight': (_experts, 'ffn.experts.down'),
}


@torch.no_grad()
def load(model, leaves):
  """Copies our weights, by name, into the model."""
  put = lambda p, array: p.copy_(torch.tensor(np.asarray(array)))
  put(model.embed.weight, leaves['embed.table'])
  put(model.norm.scale, leaves['norm.scale'])
  put(
    model.head.weight,
    leaves['embed.table' if model.head is model.embed else 'head.table'],
  )
  for i, block in enumerate(model.blocks):
    table = OURS | (SPARSE if isinstance(block.ffn, MoE) else DENSE)
    for name, parameter in block.named_parameters():
      form, *ours = table[name]
      parts = [form(leaves[f'blocks.{n}'][i]) for n in ours if f'blocks.{n}' in leaves]
      put(parameter, parts[0] if len(parts) == 1 else np.concatenate(parts, -2))
