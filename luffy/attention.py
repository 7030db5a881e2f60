"""Attention over packed sequences, strictly per sequence, with the prompt of a group computed once.

A packed stream holds segments; a segment is a prompt followed by the answers (rows) to it:

    [ prompt | row 0 | row 1 | ... ][ prompt | row 0 ] ...

Token i attends to token j <= i of the same segment if j belongs to the prompt or to i's own row. That is exactly what
each (prompt + row) sequence would see alone; sharing the prompt saves (rows - 1) * prompt tokens of the whole body.

On CPU every row is one scaled_dot_product_attention call against its prompt and itself: no padding and no
[T, T] mask. On a GPU it is one call of flash attention for sequences of different lengths (`luffy.varlen`), or where
that cannot be, in float32 say, one flex_attention call that takes the rule as a block mask. `register()` makes them
known to transformers as the attention implementation "luffy_packed"; the layout travels as a keyword of the body's
forward.
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from luffy import exchange, varlen
from luffy.errors import UserError

NAME = "luffy_packed"


@dataclass(slots=True)
class Segment:
    """Half-open token spans in the packed stream: the prompt [start, prompt_end) and the rows that follow it."""

    start: int
    prompt_end: int
    rows: list[tuple[int, int]]

    @property
    def end(self) -> int:
        return self.rows[-1][1] if self.rows else self.prompt_end

    @property
    def is_plain(self) -> bool:
        """One sequence: nothing is shared, prompt and row are a single causal span."""
        return len(self.rows) <= 1

    @property
    def spans(self) -> list[int]:
        """Lengths of the pieces that attention treats apart."""
        if self.is_plain:
            return [self.end - self.start]
        return [self.prompt_end - self.start, *(end - begin for begin, end in self.rows)]


@dataclass(slots=True)
class Layout:
    """Segments of one packed stream of `num_tokens` tokens, with what attention derives from them once per batch."""

    segments: list[Segment]
    num_tokens: int
    group: Any = None
    """Ranks that hold a slice of the stream each (`luffy.sequence`); None: this rank holds all of it."""
    _masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _block_mask: Any = None
    _bounds: varlen.Bounds | None = None

    def continuation_mask(self, queries: int, prompt: int, device: torch.device) -> Tensor:
        """[queries, prompt + queries] bool: the whole prompt, then causal over the row itself."""
        key = (queries, prompt)
        if key not in self._masks:
            full = torch.ones(queries, prompt + queries, dtype=torch.bool, device=device)
            self._masks[key] = full.tril(prompt)
        return self._masks[key]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence: a prompt and one of its rows."""
        return max(
            segment.prompt_end - segment.start + max((end - begin for begin, end in segment.rows), default=0)
            for segment in self.segments
        )

    def bounds(self, device: torch.device) -> varlen.Bounds:
        """Where sequences begin and end, for `varlen`; of one device."""
        if self._bounds is None:
            self._bounds = varlen.Bounds.of(self, device)
        return self._bounds

    def labels(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """[T] segment of each token, and [T] row of each token within it (0 for the prompt, rows from 1)."""
        segment = torch.empty(self.num_tokens, dtype=torch.int32)
        row = torch.zeros(self.num_tokens, dtype=torch.int32)
        for index, item in enumerate(self.segments):
            segment[item.start : item.end] = index
            for number, (begin, end) in enumerate(item.rows, start=1):
                row[begin:end] = number
        return segment.to(device), row.to(device)

    def block_mask(self, device: torch.device):
        """The rule of this module as flex_attention's [T, T] mask in blocks; of one device."""
        from torch.nn.attention.flex_attention import create_block_mask

        if self._block_mask is None:
            segment, row = self.labels(device)

            def visible(_batch, _head, q, k):
                return (q >= k) & (segment[q] == segment[k]) & ((row[k] == 0) | (row[q] == row[k]))

            self._block_mask = create_block_mask(visible, None, None, self.num_tokens, self.num_tokens, device=device)
        return self._block_mask


def per_row_attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float | None) -> Tensor:
    """query [1, Hq, T, D], key and value [1, Hkv, T, D] -> [1, Hq, T, D], one call per row; any device, any dtype.

    Runs in float32: the backward of torch's 16-bit CPU attention is slower than converting (bench/attention.py).
    The stream is split once, for the gradient of a slice is a zero-filled copy of the whole.
    """
    dtype = query.dtype
    query, key, value = (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x for x in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    spans = [span for segment in layout.segments for span in segment.spans]
    pieces = zip(*(x.split(spans, dim=2) for x in (query, key, value)), strict=True)
    outputs = []
    for segment in layout.segments:
        q, k_prompt, v_prompt = next(pieces)
        outputs.append(scaled_dot_product_attention(q, k_prompt, v_prompt, is_causal=True, scale=scale))
        if segment.is_plain:
            continue
        for _ in segment.rows:
            q, k, v = next(pieces)
            mask = layout.continuation_mask(q.shape[2], k_prompt.shape[2], q.device)
            k, v = torch.cat((k_prompt, k), dim=2), torch.cat((v_prompt, v), dim=2)
            outputs.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale))
    return torch.cat(outputs, dim=2).to(dtype)


@cache
def _flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def packed_attention(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask, *, scaling=None, layout: Layout, **options
) -> tuple[Tensor, None]:
    """transformers' attention signature; returns [1, T, Hq, D].

    Raises:
        UserError: the model's attention has a window shorter than a sequence here, a soft cap or sinks.
    """
    refuse_unknown(layout, **options)
    if layout.group is not None:
        query, key, value = (exchange.to_heads(x, layout.group) for x in (query, key, value))
    if on_cpu(query):
        out = per_row_attention(query, key, value, layout, scaling)
    elif kernel := varlen.kernel_for(query, value):
        out = varlen.varlen_attention(query, key, value, layout, scaling, kernel)
    else:
        enable_gqa = query.shape[1] != key.shape[1]
        mask = layout.block_mask(query.device)
        out = _flex()(query, key, value, block_mask=mask, scale=scaling, enable_gqa=enable_gqa)
    if layout.group is not None:
        out = exchange.to_tokens(out, layout.group)
    return out.transpose(1, 2).contiguous(), None


def on_cpu(query: Tensor) -> bool:
    return query.device.type == "cpu"


def refuse_unknown(layout: Layout, *, sliding_window: int | None = None, softcap=None, s_aux=None, **_) -> None:
    """Raises UserError where a model wants more than plain causal attention, for it would be trained wrongly without a
    word."""
    if sliding_window is not None and layout.longest > sliding_window:
        raise UserError(
            f"model: its attention window is {sliding_window} tokens and a sequence here has {layout.longest}; windows "
            f"are not supported, so keep data.max_prompt_tokens + rollout.max_tokens within it"
        )
    if softcap is not None or s_aux is not None:
        raise UserError("model: attention with a soft cap or sinks is not supported; choose another model")


def register() -> str:
    """Make the implementation known to transformers; returns its name."""
    AttentionInterface.register(NAME, packed_attention)
    return NAME
