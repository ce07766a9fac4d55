"""Which launches of the token scores the code-generation gate compiles: layers of Nemotron Nano and Super."""

import torch


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def lists(nq: int, nk: int, packed: bool) -> tuple:
    """(query_index, key_index, bounds: two of the lists and those of the tokens)"""
    cu = meta(5, dtype=torch.int32) if packed else None
    return meta(nq, dtype=torch.int32), meta(nk, dtype=torch.int64), cu


def attention(hq: int, hkv: int, dim: int, nq=64, nk=32768, lse=False, packed=False, reduce="mean"):
    def call(dtype):
        rows = meta(nk + nq, (hq + 2 * hkv) * dim, dtype=dtype)
        q = rows[:, : hq * dim].unflatten(1, (hq, dim))
        k = rows[:, hq * dim : (hq + hkv) * dim].unflatten(1, (hkv, dim))
        queries, keys, cu = lists(nq, nk, packed)
        given = meta(hq, nk + nq) if lse else None
        rest = (queries, keys, cu, cu, cu, cu, 0.1, True, reduce, "mean", False)

        def launch():
            from tigon.kernels.token_scores import attention_token_scores

            attention_token_scores(q, k, given, *rest)

        return launch

    return call


def ssd(h: int, g: int, n: int, nq=64, nk=32768, decay=False, packed=False, reduce="mean"):
    def call(dtype):
        C, B = meta(nk + nq, 2 * g * n, dtype=dtype).unflatten(1, (2, g, n)).unbind(1)
        queries, keys, cu = lists(nq, nk, packed)
        args = (C, B, meta(nk + nq, h), meta(h), queries, keys, cu, cu, cu)

        def launch():
            from tigon.kernels.token_scores import ssd_token_scores

            ssd_token_scores(*args, decay, reduce, "mean", False)

        return launch

    return call


# name, call, whether fp32 is compiled too
SCORES = [
    ("attention super", attention(32, 2, 128), True),
    ("attention nano packed lse", attention(40, 8, 128, lse=True, packed=True), False),
    ("attention max one query", attention(32, 8, 128, nq=1, reduce="max"), False),
    ("attention d256", attention(16, 2, 256, reduce="max"), True),
    ("attention d40", attention(6, 3, 40, nq=20, nk=700), False),
    ("ssd super", ssd(128, 8, 128), True),
    ("ssd super packed max", ssd(128, 8, 128, packed=True, reduce="max"), False),
    ("ssd super decay", ssd(128, 8, 128, decay=True), True),
    ("ssd decay max one query", ssd(128, 8, 128, nq=1, decay=True, reduce="max"), False),
    ("ssd n256", ssd(64, 1, 256, decay=True), True),
]
