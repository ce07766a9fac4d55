"""Ragged lists of queries and keys, and token scores from the dense weights of every sequence in fp64."""

import torch

from tigon.reference import token_scores as reference

LENGTHS = {"one": [40], "several": [21, 3, 0, 30], "long": [700, 80]}


def bounds(lengths, dtype=torch.int32):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=dtype)


def ragged_lists(lengths, queries, share=0.6):
    """(query rows, their bounds, key rows, their bounds): a sequence's last tokens ask, random ones are scored."""
    rows, keys, starts = [], [], bounds(lengths).tolist()
    for start, length in zip(starts, lengths):
        rows.append(torch.arange(start + max(0, length - queries), start + length))
        picked = torch.randperm(length)[: int(share * length)].sort()[0]
        keys.append(start + picked)
    sizes = [bounds([len(p) for p in parts]) for parts in (rows, keys)]
    return torch.cat(rows).int(), sizes[0], torch.cat(keys).int(), sizes[1]


def attention_oracle(q, k, lists, lengths_q, lengths_k, scale, causal, head_reduce, query_reduce):
    rows, cu_rows, keys, cu_keys = lists
    out, starts_q, starts_k = [], bounds(lengths_q), bounds(lengths_k)
    for i in range(len(lengths_q)):
        w = reference.attention_weights(
            q[starts_q[i] : starts_q[i + 1]].double(),
            k[starts_k[i] : starts_k[i + 1]].double(),
            scale,
            causal,
        )
        at = rows[cu_rows[i] : cu_rows[i + 1]].long() - starts_q[i]
        to = keys[cu_keys[i] : cu_keys[i + 1]].long() - starts_k[i]
        out.append(reference.reduced(w[:, at][:, :, to], head_reduce, query_reduce))
    return torch.cat(out)


def ssd_oracle(C, B, dt, A, lists, lengths, decay, head_reduce, query_reduce):
    rows, cu_rows, keys, cu_keys = lists
    out, starts = [], bounds(lengths)
    for i in range(len(lengths)):
        part = slice(starts[i], starts[i + 1])
        w = reference.ssd_weights(*(v[part].double() for v in (C, B, dt)), A.double(), decay)
        at = rows[cu_rows[i] : cu_rows[i + 1]].long() - starts[i]
        to = keys[cu_keys[i] : cu_keys[i + 1]].long() - starts[i]
        out.append(reference.reduced(w[:, at][:, :, to], head_reduce, query_reduce))
    return torch.cat(out)
