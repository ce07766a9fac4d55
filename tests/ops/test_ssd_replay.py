"""State rollback by replay at op level, on the reference backend: exact against the recurrence in fp64, bit for bit
across histories. The failures in its names are those that users of other packages met. The kernels' tests are in
tests/csrc.
"""

import pytest
import torch
from replay_cases import Decoder, conv_oracle, oracle, sequences

TIGHT = dict(rtol=1e-12, atol=1e-12)


def check_rows(decoder, ys, vs):
    """Outputs of the committed tokens, states and windows against the oracle, in fp64."""
    for row, (y, v, done) in enumerate(zip(ys, vs, decoder.done)):
        expected, state, _ = oracle(decoder, row, done)
        torch.testing.assert_close(y, expected, **TIGHT)
        torch.testing.assert_close(decoder.current()[row], state, **TIGHT)
        torch.testing.assert_close(v, conv_oracle(decoder.seqs, row, done), **TIGHT)
        u = decoder.seqs.tokens["u"][row, :done]
        window = torch.cat([torch.zeros_like(u[:3]), u])[-3:]
        torch.testing.assert_close(decoder.window()[row].T, window, rtol=0, atol=0)


@pytest.mark.parametrize("flush", [4, 5, 8])
@pytest.mark.parametrize("start", [0, 3])
def test_every_accepted_count_gives_the_sequential_state_and_window(flush, start):
    m = 4
    for accepted in range(m + 1):
        for before in range(flush):
            d = Decoder(sequences(l=40), [2, 0], flush=flush, start=start)
            if start:
                d.seqs.tokens["u"][:] = d.seqs.tokens["u"]
            history = [(1, 1)] * before + [(m, accepted), (m, 2), (1, 1), (m, m)]
            ys, vs = d.run(history)
            if start:
                vs = None
            for row, done in enumerate(d.done):
                y, state, _ = oracle(d, row, done)
                torch.testing.assert_close(ys[row], y, **TIGHT)
                torch.testing.assert_close(d.current()[row], state, **TIGHT)
            if not start:
                check_rows(d, ys, vs)
