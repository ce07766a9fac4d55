"""`generate`: prompts in, tokens out; drafts by multi-token prediction, more prompts than slots, stops, a report."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tigon.generation.decoder import Decoder, Step
from tigon.generation.draft_length import DraftLength
from tigon.generation.drafter import Drafter
from tigon.generation.graphs import StepGraphs
from tigon.generation.report import Clock, Report
from tigon.generation.sampling import RULES, Sampling
from tigon.generation.tree import DraftTree
from tigon.modules import Reducible, TokenReducer
from tigon.modules.token_reducer import as_reducer
from tigon.native.mamba2 import replay_flush
from tigon.ops.checks import INDEX
from tigon.ops.dispatch import is_batch_invariant

AUTO_MOST = 6  # drafts a step that "auto" tries
MOST = 15  # with the last token 16 a step, which is what a ring of 16 holds
INBOX = 64  # tokens that a drafter may leave unread while it does not draft
GOLDEN = 0x9E3779B97F4A7C15  # spreads seeds over the keys of Philox


@dataclass
class _Request:
    row: int
    prompt: Tensor
    slot: int = -1
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    done: bool = False


@dataclass
class _Stops:
    """When a row ends: at a token, at a text, at a number of tokens."""

    ids: frozenset[int]
    strings: tuple[str, ...]
    decode: Callable[[list[int]], str] | None
    most: int

    def cut(self, tokens: list[int], new: list[int]) -> tuple[list[int], bool]:
        """What of `new` still belongs to the row, and whether it ends there."""
        said = self._said(tokens + new)  # else no beginning of it need be looked at
        for i, token in enumerate(new):
            length = len(tokens) + i + 1
            ends = token in self.ids or length >= self.most
            if ends or (said and self._said(tokens + new[: i + 1])):
                return new[: i + 1], True
        return new, False

    def _said(self, tokens: list[int]) -> bool:
        if not self.strings:
            return False
        text = self.decode(tokens)
        return any(s in text for s in self.strings)


@torch.no_grad()
def generate(
    model,
    prompts: Tensor | Sequence[Tensor],
    max_new_tokens: int,
    *,
    draft_tokens: int | str | None = None,
    tree: Sequence[int] | None = None,
    temperature: float | Tensor = 0.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    seed: int | Tensor | None = None,
    rule: str = "token",
    stop_ids: int | Iterable[int] | None = None,
    stop_strings: Sequence[str] = (),
    decode: Callable[[list[int]], str] | None = None,
    max_slots: int | None = None,
    logprobs: bool = False,
    streamer: Callable[[int, list[int]], None] | None = None,
    return_report: bool = False,
    rollback: str = "replay",
    flush: int | None = None,
    ssm_dtype: torch.dtype | None = None,
    rounding: str = "nearest",
    reduction: TokenReducer | None = None,
    reducible: Tensor | Sequence[Tensor | None] | None = None,
) -> list[Tensor] | tuple:
    """Continue prompts of any lengths, with drafts of the model's MTP head where it has one.

    A step drafts K tokens a row, lets the model read them in one pass, and keeps those that the rule accepts and one
    token of the model's own. Every rule is lossless: tokens are distributed as the model's, and the greedy and strict
    ones do not depend on K beyond rounding (in batch-invariant mode, not at all for chains of up to 15 drafts).

    Args:
        model: a `tigon.models.HybridLM`.
        prompts: (r,l) int64, or r tensors (l_i) int64, none empty.
        max_new_tokens: of a row, at most.
        draft_tokens: K, 0 to 15; "auto": the K of 0 to 6 with the most expected tokens for the measured time; None: 3
            where the model has an MTP head and the tree decides nothing, else 0.
        tree: children by depth, such as (3, 2, 1): a tree of at most 32 nodes, the last token among them, is drafted in
            place of a chain, at most 15 deep. Rules greedy and strict, rollback "replay".
        temperature, top_k, top_p: of the draws, as in `tigon.sample`; temperature 0 takes the likeliest token. Numbers,
            or (r) tensors, one a row.
        seed: an int for all rows, or (r) int64, one a row: a row's draws depend on its own seed, its positions and
            nothing else. None: from torch's generator.
        rule: "token" or "block" (rejection sampling), "strict" (the model's own draw, drafts drawn with the same noise:
            the text does not depend on K), "greedy". See `tigon.verify_draft`.
        stop_ids: tokens that end a row, themselves included; None: the config's eos_token_id.
        stop_strings: a text or texts that end a row where they first appear in its decoded new tokens.
        decode: a list of token ids to their text; needed with stop_strings.
        max_slots: rows decoded at a time; the others wait, and slots are used again. None: all.
        logprobs: also return each token's log-probability under the model, before temperature, top_k and top_p.
        streamer: called with (row, new tokens) after each step.
        return_report: also return a `Report`.
        rollback: how rejected tokens are undone, "replay" or "snapshot". flush, ssm_dtype, rounding: of states, as in
            `HybridCache`.
        reduction: a `tigon.modules.TokenReducer`, or the `ReductionSchedule` of one: prompts are read with tokens
            dropped between the layers, and attention layers hold the ones that they had.
        reducible: with it, (r,l) bool or r masks (l_i), True where a token may be dropped; None for a prompt of text.

    Returns:
        r tensors of new tokens int64 on the model's device; with logprobs, a list of fp32 tensors; with return_report,
        the report; as a tuple where there is more than the first.

    Raises:
        ValueError, TypeError: arguments that are out of range or contradict each other, by name. RuntimeError: NaN
            logits, by row.
    """
    start = time.perf_counter()
    device = model.lm_head.weight.device
    prompts = _prompts(prompts, device)
    tree = None if tree is None else DraftTree(tuple(tree), device)
    temperature = _setting("temperature", temperature, torch.float32, len(prompts))
    top_k = _setting("top_k", top_k, torch.int32, len(prompts))
    top_p = _setting("top_p", top_p, torch.float32, len(prompts))
    drafts = _drafts(model, draft_tokens, tree, temperature, rule, seed)
    if tree is not None and rollback != "replay":
        raise ValueError(f"generate: a tree needs rollback='replay', got {rollback!r}")
    stops = _stops(model, stop_ids, stop_strings, decode, max_new_tokens)
    most = drafts.most if isinstance(drafts, DraftLength) else drafts
    width = tree.nodes if tree else most + 1
    slots = len(prompts) if max_slots is None else min(len(prompts), max_slots)
    if slots < 1:
        raise ValueError(f"generate: max_slots={max_slots} must be positive")
    longest = max(p.numel() for p in prompts)
    length = longest + max_new_tokens + width
    cache_options = {"ssm_dtype": ssm_dtype, "rounding": rounding}
    reduced = _Reduced.of(model, reduction, reducible, prompts)
    if reduced is not None:
        cache_options["attention_lengths"] = reduced.rooms(max_new_tokens + width)
    if most or is_batch_invariant():
        cache_options |= {"rollback": rollback, "tokens": width, "flush": flush}
    elif device.type == "cuda" and "M" in model.config.pattern:
        cache_options |= _plain_or_replay(model, slots, ssm_dtype)
    cache = model.allocate_cache(slots, length, **cache_options)
    drafter = Drafter(model, slots, length, max(INBOX, 2 * width)) if most else None
    clock = Clock(device) if return_report else Clock(None)
    sampling = Sampling(rule, cache.seeds, *_by_slot((temperature, top_k, top_p), slots, device))
    options = {"tree": tree, "logprobs": logprobs, "clock": clock}
    decoder = Decoder(model, cache, sampling, drafter, **options)
    per_row = (_seeds(seed, len(prompts), device), temperature, top_k, top_p)
    run = _Run(decoder, prompts, per_row, stops, drafts, streamer, reduced)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        run.all()
    run.report.seconds = time.perf_counter() - start
    run.report.parts = clock.read()
    found = ([torch.tensor(r.tokens, dtype=torch.int64, device=device) for r in run.requests],)
    if logprobs:
        found += ([torch.tensor(r.logprobs, device=device) for r in run.requests],)
    if return_report:
        found += (run.report,)
    return found if len(found) > 1 else found[0]


class _Run:
    """Requests through slots: those that wait are read when a slot is free, then all that run decode together."""

    def __init__(
        self, decoder: Decoder, prompts, per_row, stops: _Stops, drafts, streamer, reduced
    ):
        self.reduced = reduced
        self.decoder, self.stops, self.drafts, self.streamer = decoder, stops, drafts, streamer
        self.requests = [_Request(i, p) for i, p in enumerate(prompts)]
        self.waiting = deque(self.requests if stops.most else ())
        self.running: list[_Request] = []
        self.free = list(range(decoder.cache.slots))[::-1]
        self.per_row = per_row
        self.device = decoder.cache.lengths.device
        self.slots = self.last = torch.empty(0, dtype=torch.int64, device=self.device)
        self.advance = _steps(decoder).step
        prompt_tokens = sum(p.numel() for p in prompts)
        self.report = Report(prompt_tokens=prompt_tokens)

    def all(self) -> None:
        while self.waiting or self.running:
            if self.waiting and self.free:
                self._admit()
            if self.running:
                self._step()

    def _admit(self) -> None:
        new = [self.waiting.popleft() for _ in range(min(len(self.free), len(self.waiting)))]
        for request in new:
            request.slot = self.free.pop()
        slots = torch.tensor([r.slot for r in new], device=self.device)
        rows = torch.tensor([r.row for r in new], device=self.device)
        decoder = self.decoder
        decoder.cache.reset(slots)
        if decoder.drafter is not None:
            decoder.drafter.reset(slots)
        sampling = decoder.sampling
        kept = (sampling.seeds, sampling.temperature, sampling.top_k, sampling.top_p)
        for place, values in zip(kept, self.per_row):
            if isinstance(values, Tensor):
                place[slots] = values.to(place)[rows]
        ids = torch.nn.utils.rnn.pad_sequence([r.prompt for r in new], batch_first=True)
        lengths = torch.tensor([r.prompt.numel() for r in new], device=self.device)
        decoder.bound_lengths(self._longest())  # those that run; the new slots are empty
        feed = () if self.reduced is None else self.reduced.feed([r.row for r in new], ids)
        step = decoder.prefill(slots, ids, lengths, *feed)
        self.running += new
        self.slots = torch.cat([self.slots, slots])
        self.last = torch.cat([self.last, step.tokens[:, 0]])
        self._emit(new, step)
        self._retire()

    def _longest(self) -> int:
        """Tokens that the fullest slot holds: all of a row but its last one, which the model has yet to read."""
        return max((r.prompt.numel() + len(r.tokens) - 1 for r in self.running), default=0)

    def _step(self) -> None:
        adaptive = isinstance(self.drafts, DraftLength)
        drafts = self.drafts.choose(len(self.running)) if adaptive else self.drafts
        self.decoder.longest = self._longest()
        self.decoder.bound_lengths(self.decoder.longest)
        start = time.perf_counter()
        step = self.advance(self.slots, self.last, drafts)
        row = torch.arange(len(self.running), device=self.device)
        self.last = step.tokens[row, step.accepted.clamp(min=0).to(torch.int64)].clamp(min=0)
        before = self.report.new_tokens
        accepted = self._emit(self.running, step)
        depth = min(drafts, step.tokens.shape[1] - 1)
        self.report.count(depth, accepted, self.report.new_tokens - before)
        if adaptive and self.decoder.settled:
            self.drafts.observe(depth, accepted, time.perf_counter() - start)
        self._retire()

    def _emit(self, requests: list[_Request], step: Step) -> list[int]:
        """Give each row its new tokens; the only place that waits for the device. The accepted drafts of each row."""
        both = torch.cat([step.accepted[:, None].to(torch.int64), step.tokens], 1).tolist()
        logprobs = None if step.logprobs is None else step.logprobs.tolist()
        for i, request in enumerate(requests):
            count = both[i][0] + 1
            if count <= 0:
                raise RuntimeError(
                    f"generate: the model's logits are NaN in row {request.row} after {len(request.tokens)} new tokens"
                )
            new, request.done = self.stops.cut(request.tokens, both[i][1 : 1 + count])
            request.tokens += new
            if logprobs is not None:
                request.logprobs += logprobs[i][: len(new)]
            self.report.new_tokens += len(new)
            if self.streamer is not None:
                self.streamer(request.row, new)
        return [row[0] for row in both]

    def _retire(self) -> None:
        if not any(r.done for r in self.running):
            return
        stay = [i for i, r in enumerate(self.running) if not r.done]
        self.free += [r.slot for r in self.running if r.done]
        self.running = [self.running[i] for i in stay]
        index = torch.tensor(stay, dtype=torch.int64, device=self.device)
        self.slots, self.last = self.slots[index], self.last[index]


@dataclass
class _Reduced:
    """How prompts are read with tokens dropped between the layers. masks: on the CPU."""

    reducer: TokenReducer
    pattern: str
    masks: list[Tensor]

    @classmethod
    def of(cls, model, reduction, reducible, prompts: list[Tensor]) -> "_Reduced | None":
        if (reduction is None) != (reducible is None):
            raise ValueError("generate: reduction and reducible come together")
        if reduction is None:
            return None
        masks = list(reducible)
        if len(masks) != len(prompts):
            raise ValueError(f"generate: {len(masks)} reducible masks for {len(prompts)} prompts")
        for i, (mask, prompt) in enumerate(zip(masks, prompts)):
            if mask is None:
                masks[i] = torch.zeros(prompt.shape, dtype=torch.bool)
            elif mask.shape != prompt.shape or mask.dtype != torch.bool:
                raise ValueError(
                    f"generate: reducible of prompt {i} must be a bool {tuple(prompt.shape)}, got "
                    f"{tuple(mask.shape)} {mask.dtype}"
                )
        masks = [mask.cpu() for mask in masks]
        return cls(as_reducer(reduction), model.config.pattern, masks)

    def rooms(self, more: int) -> list[int]:
        """Tokens by attention layer of the prompt that leaves most there, and `more`."""
        visual = [int(mask.sum()) for mask in self.masks]
        text = [mask.numel() - n for mask, n in zip(self.masks, visual)]
        counts = self.reducer.counts(self.pattern, visual, text)
        return [max(n) + more for kind, n in zip(self.pattern, counts) if kind == "*"]

    def feed(self, rows: list[int], ids: Tensor) -> tuple[TokenReducer, Reducible]:
        """Arguments of `Decoder.prefill` for some prompts, ids (b,l) of which are padded on the right."""
        masks = [self.masks[row] for row in rows]
        padded = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True)
        lengths = [mask.numel() for mask in masks]
        return self.reducer, Reducible.of(padded, num_tokens=lengths).to(ids.device)


def _steps(decoder: Decoder) -> "Decoder | StepGraphs":
    """What makes the steps: graphs where there are any."""
    return StepGraphs(decoder) if decoder.cache.lengths.is_cuda else decoder


def _prompts(prompts, device) -> list[Tensor]:
    rows = list(prompts)
    if not rows:
        raise ValueError("generate: there are no prompts")
    for i, row in enumerate(rows):
        ids = isinstance(row, Tensor) and row.dtype in INDEX
        if not ids or row.dim() != 1 or not row.numel():
            raise ValueError(
                f"generate: prompt {i} must be a tensor (l) of int32 or int64 with at least one token"
            )
    return [row.to(device=device, dtype=torch.int64) for row in rows]


def _setting(name: str, value, dtype: torch.dtype, rows: int):
    """A number, or a tensor of one a row in the dtype that the ops take."""
    if not isinstance(value, Tensor):
        return value
    if tuple(value.shape) != (rows,):
        raise ValueError(
            f"generate: {name} has shape {tuple(value.shape)}, expected ({rows},) or a number"
        )
    return value.to(dtype)


def _drafts(model, drafts, tree, temperature, rule: str, seed) -> "int | DraftLength":
    """K of every step, or what chooses it; checks what depends on it."""
    if rule not in RULES:
        raise ValueError(f"generate: rule={rule!r}, allowed: {', '.join(RULES)}")
    scalar = not isinstance(temperature, Tensor)
    if scalar and temperature < 0:
        raise ValueError(f"generate: temperature must not be negative, got {temperature}")
    has_mtp = getattr(model, "mtp", None) is not None
    greedy = rule == "greedy" or (scalar and temperature == 0)
    if tree is not None:
        if not greedy and rule != "strict":
            raise ValueError(
                f"generate: a tree is verified by rule 'strict' or 'greedy', got {rule!r}"
            )
        if drafts not in (None, tree.depth):
            raise ValueError(f"generate: draft_tokens={drafts} and a tree of depth {tree.depth}")
        if tree.depth > MOST:
            raise ValueError(
                f"generate: tree={tree.branches} is {tree.depth} deep, allowed: {MOST}"
            )
        drafts = tree.depth
    if drafts is None:
        drafts = 3 if has_mtp else 0
    if drafts != "auto" and not (isinstance(drafts, int) and 0 <= drafts <= MOST):
        raise ValueError(f"generate: draft_tokens={drafts!r} must be 0 to {MOST} or 'auto'")
    if drafts and not has_mtp:
        raise ValueError(
            f"generate: draft_tokens={drafts!r}, but the model has no MTP head (config.mtp_pattern)"
        )
    if drafts != "auto":
        return drafts
    if seed is not None and not greedy and rule != "strict":
        raise ValueError(
            f"generate: with a seed, draft_tokens='auto' needs rule 'strict' or 'greedy', whose text does not depend "
            f"on how many tokens are drafted; got {rule!r}"
        )
    return DraftLength(AUTO_MOST)


def _stops(model, ids, strings, decode, most: int) -> _Stops:
    if most < 0:
        raise ValueError(f"generate: max_new_tokens must not be negative, got {most}")
    if strings and decode is None:
        raise ValueError("generate: stop_strings need decode, a function of a list of tokens")
    if ids is None:
        ids = getattr(model.config, "eos_token_id", None)
    ids = () if ids is None else (ids,) if isinstance(ids, int) else ids
    strings = (strings,) if isinstance(strings, str) else tuple(strings)
    if "" in strings:
        raise ValueError("generate: an empty stop string would end every row")
    return _Stops(frozenset(int(i) for i in ids), strings, decode, most)


def _by_slot(values: tuple, slots: int, device) -> list:
    """Numbers as they are; of tensors by row, room for a value a slot."""
    return [
        torch.zeros(slots, dtype=v.dtype, device=device) if isinstance(v, Tensor) else v
        for v in values
    ]


def _seeds(seed, rows: int, device) -> Tensor:
    """(rows) int64: an int is spread over the rows; None draws them."""
    if seed is None:
        return torch.randint(2**62, (rows,)).to(device)
    if isinstance(seed, Tensor):
        if tuple(seed.shape) != (rows,):
            raise ValueError(
                f"generate: seed has shape {tuple(seed.shape)}, expected ({rows},) or an int"
            )
        return seed.to(device=device, dtype=torch.int64)
    return torch.tensor([(seed * GOLDEN + i) % 2**63 for i in range(rows)], device=device)


def _plain_or_replay(model, slots: int, ssm_dtype: torch.dtype | None) -> dict:
    """Without drafts, whether states are rewritten at every token: what the launch table says."""
    c = model.config
    size = (ssm_dtype or getattr(torch, c.mamba_ssm_cache_dtype)).itemsize
    flush = replay_flush(slots, 1, c.mamba_num_heads, c.mamba_head_dim, c.ssm_state_size, size)
    return {} if flush == 1 else {"rollback": "replay", "tokens": 1, "flush": flush}
