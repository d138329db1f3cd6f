"""The convention of each number of a report, in words."""

from gated.probes import attention, gates, outputs

QUERIES = {
  '': 'over all queries',
  '_without_query_0': 'over all queries but the first, which attends only to itself',
  f'_from_{attention.LATER}': f'over the queries from position {attention.LATER} on',
}
_FIRST = {
  'first_token_attention': 'attention weight to the first token of the row, mean {} '
  '(F-Attn of the paper, arXiv 2505.06708)',
  'first_token_attention_documents': 'attention weight to the first token of the '
  "query's document, mean {}, positions counted in the document",
  'first_token_uniform': 'first_token_attention if all visible keys had equal weight, {}',
  'first_token_uniform_documents': 'first_token_attention_documents if all visible keys '
  'had equal weight, {}',
}
_SINK = (
  f'share of rows and heads with alpha_0 > {attention.EPSILON}; alpha_k is the mean '
  f'weight of key k over the queries from k on; "keys" has k = 0 to '
  f'{attention.KEYS - 1} (Gu et al., arXiv 2410.10781), in {{}}'
)
POINTS = {
  'attn_branch': 'the summand of attention in the residual stream',
  'middle': 'the residual stream between attention and FFN',
  'ffn_branch': 'the summand of the FFN in the residual stream',
  'output': "each layer's output",
}
_RANK = 'mean over heads of the {} rank of '
_KINDS = {
  '': 'effective (exp of the entropy of normalized singular values)',
  '_stable': 'stable (sum of squared singular values over the largest square)',
}

CONVENTIONS: dict[str, str] = {
  'loss': 'nats per target, mean over the targets of the rows; only eval.py measures it',
  **{
    f'{k}{q}': words.format(q_words)
    for k, words in _FIRST.items()
    for q, q_words in QUERIES.items()
  },
  'sink_rate_64': _SINK.format(
    f'the first {attention.PREFIX} tokens of each row; shorter rows do not count'
  ),
  'sink_rate': _SINK.format('the whole row'),
  'largest_key_weight': 'the largest mean weight that one key receives, over the queries '
  f'from it on in its document, of keys with at least {attention.LATER} such queries; '
  '"value" is the mean over layers, rows and heads, "largest" the largest of all',
  'attention_entropy': 'entropy of the weights to keys, without the share of sinks, in '
  'nats, mean over queries and heads',
  'attention_mass': 'sum of the weights to all keys, mean over queries and heads; 1 for '
  'a softmax without sinks',
  'sink_mass': "share of the softmax's denominator that sinks take (off-by-one, sink "
  'logits or sink tokens), mean over queries and heads',
  'attention_logit_max': 'the largest |q k| / sqrt(K) over all visible pairs, '
  'before a soft cap; "value" is the largest of all layers',
  'm_act': "M-Act of the paper: each layer's largest |h| at its output, over all tokens "
  'and channels; "value" is the mean over layers',
  'm_act_max': 'the largest |h| of all, with its layer, row, token and channel',
  'm_act_top3': 'the three largest |h| of each row, mean over rows (Sun et al., arXiv '
  '2402.17762); "value" is the mean over layers',
  'm_act_median': 'the median of |h| of each row, mean over rows (Sun et al.)',
  'm_act_jump': 'the layer whose m_act is the largest multiple of the one before',
  'first_token_jump': 'the layer whose first_token_attention is furthest above the one '
  'before',
  'kurtosis': 'mean(h^4) / mean(h^2)^2 over the channels of a token, mean over tokens; 3 '
  'for a normal distribution',
  'gate_mean': 'mean of the scores over tokens, heads and channels; of several gates, '
  'those of the first one',
  'gate_std': 'standard deviation of the scores over tokens, heads and channels',
  **{f'gate_below_{x:g}': f'share of scores below {x:g}' for x in gates.BELOW},
  'gate_histogram': 'number of scores in each bin; "edges" are the limits of the bins, '
  'and scores outside count in the outer bins',
  'gate_heads': 'mean of the scores of each head',
  'gate_classes': 'mean of the scores over the tokens of a class',
  'gate_weight_norm': "norm of each head's gate weight",
  'gate_vocabulary': "layer 0's scores of every token of the vocabulary, averaged over "
  f'channels; "open" counts the tokens at which a head reaches {gates.OPEN}',
  'gates': 'the numbers of further gates of a layer, by position',
  'output_mean': 'mean |y| of the SDPA output after its gate',
  'output_mean_before': 'mean |y| of the SDPA output before its gate',
  **{
    f'output_below_{limit:.0e}'.replace('e-0', 'e-') + suffix: f'share of |y| below '
    f'{limit:g} of the SDPA output {words}'
    for limit in outputs.SMALL
    for suffix, words in {
      '': 'after its gate',
      '_before': 'before its gate',
      '_scaled': "before its gate, times the layer's mean score over the row",
    }.items()
  },
  'output_rank_before': _RANK.format(_KINDS['']) + 'the SDPA outputs before the gate',
  'output_rank_after': _RANK.format(_KINDS['']) + 'the SDPA outputs after the gate',
  'value_norm_first': "mean norm of the values of documents' first tokens, per KV head",
  'value_norm_other': 'the same of all other tokens',
  'points': '; '.join(f'{name}: {words}' for name, words in POINTS.items()),
  'rank_value_output': _RANK.format(_KINDS['']) + 'the map W_V W_O; null with SwitchHead',
  'rank_value_output_stable': _RANK.format(_KINDS['_stable']) + 'the same map',
}
