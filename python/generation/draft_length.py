"""How many tokens to draft: the K with the most expected tokens for the measured time of a step, K = 0 among them.

    tokens(K) = 1 + sum_{i<=K} a_i        a_i: the share of drafts at depth i that were kept with all before them
    K         = argmax tokens(K) / seconds(K)

Both are running means. Every K is tried a few times at first; later, once in a while, one beside the best. After Hu et
al. 2025, "Taming the Long Tail" (arXiv 2511.16665), whose drafts also end where they do not pay.
"""

TRIES = 3  # of every K, before any is believed
PERIOD = 32  # steps between two looks at a neighbour
FADE = 0.9  # weight of what was known of a mean, once it is known
SHARE_FADE = 0.97


class DraftLength:
    """most: the largest K. Times depend on the rows of a step, so they are kept by their number's power of two."""

    def __init__(self, most: int):
        self.most = most
        self.seconds: dict[tuple[int, int], tuple[float, int]] = {}
        self.share = [0.0] * most
        self.offered = [0] * most
        self.step = 0

    def choose(self, rows: int) -> int:
        self.step += 1
        bucket = rows.bit_length()
        tries = [self.seconds.get((bucket, k), (0.0, 0))[1] for k in range(self.most + 1)]
        if min(tries) < TRIES:
            return max(k for k, n in enumerate(tries) if n < TRIES)
        best = self.best(rows)
        if self.step % PERIOD == 0:
            beside = best + 1 if self.step // PERIOD % 2 and best < self.most else best - 1
            return max(beside, 0)
        return best

    def best(self, rows: int) -> int:
        """By what is known; ties go to the smaller one."""
        bucket = rows.bit_length()
        rates = {}
        for k in range(self.most + 1):
            seconds = self.seconds.get((bucket, k), (0.0, 0))[0]
            if seconds:
                rates[k] = (1 + sum(self.share[:k])) / seconds
        return max(rates, key=lambda k: (rates[k], -k)) if rates else self.most

    def observe(self, drafts: int, accepted: list[int], seconds: float) -> None:
        """A step: K, the drafts that each row kept, its time."""
        key = (len(accepted).bit_length(), drafts)
        mean, n = self.seconds.get(key, (0.0, 0))
        # The first one pays for memory and compilation.
        mean = seconds if n <= 1 else FADE * mean + (1 - FADE) * seconds
        self.seconds[key] = (mean, n + 1)
        for depth in range(drafts):
            kept = sum(a > depth for a in accepted) / len(accepted)
            n = self.offered[depth]
            keep = min(n / (n + 1), SHARE_FADE)
            self.share[depth] = keep * self.share[depth] + (1 - keep) * kept
            self.offered[depth] += 1
