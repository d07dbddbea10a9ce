# SPDX-License-Identifier: Apache-2.0
"""Attention over packed items: many token sequences of different lengths in one row, each attending to itself only.

`TokenLayout` brings ragged items into such a row and back, `Segments` says where they lie in it. `attend` is the one
door to every attention function of transformers: functions that know packing get the segment boundaries,
`flex_attention` gets a block mask, all others are called once per group of equally long items. `torch_varlen` is our
own function, on PyTorch's variable-length kernel.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface
from transformers.utils.generic import is_flash_attention_requested

from .inputs_onevision_encoder import read_lengths

TORCH_VARLEN = "torch_varlen"
FLEX_BLOCK_SIZE = 128


@dataclass(frozen=True)
class Segments:
    """Where the items of a packed row lie; the row itself is `(1, sum(lengths), dim)`.

    Attributes:
        lengths: tokens per item, on the host: Python code splits and groups by them without a device sync.
        cu_seqlens: `(num_items + 1,)` int32 boundaries 0, lengths[0], lengths[0] + lengths[1], ..., on the device.
        block_mask: the same as a block mask, for `flex_attention` only.
    """

    lengths: tuple[int, ...]
    cu_seqlens: torch.Tensor
    block_mask: BlockMask | None = None

    @property
    def max_length(self) -> int:
        """Tokens of the longest item."""
        return max(self.lengths)

    @classmethod
    def from_lengths(cls, lengths: list[int], device: torch.device, attn_implementation: str) -> "Segments":
        """Build the boundaries of items of the given `lengths`, in tokens, for one attention implementation."""
        cumulative = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        block_mask = segment_block_mask(lengths, device) if attn_implementation == "flex_attention" else None
        return cls(tuple(lengths), cumulative.to(device, non_blocking=True), block_mask)


def segment_block_mask(lengths: list[int], device: torch.device) -> BlockMask:
    """Build the block-diagonal mask of packed items without materialising the token-by-token mask.

    Args:
        lengths: tokens per item.
        device: where the mask is used.

    Returns:
        A block mask over `sum(lengths)` queries and keys; query and key see each other if their item is the same.
    """
    total = sum(lengths)
    item_of_token = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    starts = torch.arange(0, total, FLEX_BLOCK_SIZE, device=device)
    first = item_of_token[starts]
    last = item_of_token[(starts + FLEX_BLOCK_SIZE - 1).clamp(max=total - 1)]
    # items are contiguous, so two blocks share an item exactly when their item ranges overlap
    overlap = (first[:, None] <= last[None, :]) & (first[None, :] <= last[:, None])
    inside_one_item = (first == last) & (starts + FLEX_BLOCK_SIZE <= total)
    full = overlap & inside_one_item[:, None] & inside_one_item[None, :]

    def same_item(batch, head, query_index, key_index):
        return item_of_token[query_index] == item_of_token[key_index]

    return BlockMask.from_kv_blocks(
        *_ordered_blocks(overlap & ~full),
        *_ordered_blocks(full),
        BLOCK_SIZE=FLEX_BLOCK_SIZE,
        mask_mod=same_item,
        seq_lengths=(total, total),
    )


def _ordered_blocks(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn a `(query_blocks, key_blocks)` bool table into flex_attention's counts and index lists, int32."""
    counts = blocks.sum(-1, dtype=torch.int32)
    indices = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return counts[None, None], indices[None, None].contiguous()


@dataclass(frozen=True)
class TokenLayout:
    """Where the input's tokens lie while they are encoded: one batch, a packed row, or a masked batch.

    Attributes:
        shape: `(num_items, max_patches)` of the input.
        segments: the items of a packed row, else None.
        valid_index: `(num_tokens,)` flat places of the tokens that are no padding; None if the input has none.
        valid: `(num_items, max_patches)` bool, False on padding; None if the input has none.
    """

    shape: tuple[int, int]
    segments: Segments | None = None
    valid_index: torch.Tensor | None = None
    valid: torch.Tensor | None = None

    @classmethod
    def read(cls, pixel_values: torch.Tensor, position_ids: torch.Tensor, attn_implementation: str) -> "TokenLayout":
        """Find the padding of a patch sequence and check its values, with a single device-to-host copy.

        While `torch.compile` traces, lengths on the host are out of reach: padding then stays in place, masked.
        """
        shape = tuple(position_ids.shape[:2])
        valid = (position_ids >= 0).all(-1)
        if torch.compiler.is_compiling():
            return cls(shape, valid=valid)
        lengths = read_lengths(pixel_values, position_ids, valid)
        if min(lengths) == shape[1]:
            return cls(shape)
        segments = Segments.from_lengths(lengths, valid.device, attn_implementation)
        valid_index = torch.nonzero_static(valid.flatten(), size=sum(lengths)).squeeze(1)
        return cls(shape, segments, valid_index, valid)

    def enter(self, tokens: torch.Tensor) -> torch.Tensor:
        """Bring `(num_items, max_patches, dim)` into the encoder's shape: `(1, num_tokens, dim)` if packed."""
        if self.valid_index is not None:
            return tokens.flatten(0, 1).index_select(0, self.valid_index)[None]
        if self.valid is not None:
            return tokens.masked_fill(~self.valid[..., None], 0)  # a NaN there would spread through masked attention
        return tokens

    def leave(self, tokens: torch.Tensor | None) -> torch.Tensor | None:
        """Undo `enter`: back to `(num_items, max_patches, dim)`, zeros on padding; None stays None."""
        if tokens is None or self.valid is None:
            return tokens
        if self.valid_index is None:
            return tokens.masked_fill(~self.valid[..., None], 0)
        rows = tokens.new_zeros(self.shape[0] * self.shape[1], tokens.shape[-1])
        return rows.index_copy(0, self.valid_index, tokens[0]).unflatten(0, self.shape)

    def leave_attentions(self, weights: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Bring attention weights into `(num_items, heads, max_patches, max_patches)`, zeros on padding."""
        if self.segments is None:
            return weights
        heads, size = weights[0].shape[0], self.shape[1]
        padded = weights[0].new_zeros(self.shape[0], heads, size, size)
        for item, (rows, weight) in enumerate(zip(self.valid, weights)):
            places = rows.nonzero().squeeze(1)
            padded[item, :, places[:, None], places] = weight
        return padded


def attend(
    attention_function: Callable,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | BlockMask | None = None,
    segments: Segments | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | tuple[torch.Tensor, ...] | None]:
    """Run an attention function of transformers on a batch or on a packed row.

    Args:
        attention_function: taken from `ALL_ATTENTION_FUNCTIONS`, or the eager one.
        module: the attention layer; its `config` names the implementation.
        query: `(batch, heads, tokens, head_dim)`; batch is 1 for a packed row.
        key: as `query`.
        value: as `query`.
        attention_mask: mask of a padded batch, None for a packed row.
        segments: the items of a packed row, None for a batch.
        **kwargs: `scaling`, `dropout`, `is_causal` and what else the function takes.

    Returns:
        The attended values, `(batch, tokens, heads, head_dim)`, and the attention weights where the function returns
        them: `(batch, heads, tokens, tokens)`, for a packed row a tuple with `(heads, length, length)` per item.
    """
    implementation = module.config._attn_implementation
    if segments is None:
        return attention_function(module, query, key, value, attention_mask, **kwargs)
    if implementation == "flex_attention":
        output, _ = attention_function(module, query, key, value, segments.block_mask, **kwargs)
        return output, None
    if implementation == TORCH_VARLEN or is_flash_attention_requested(module.config):
        packing = {
            "cu_seq_lens_q": segments.cu_seqlens,
            "cu_seq_lens_k": segments.cu_seqlens,
            "max_length_q": segments.max_length,
            "max_length_k": segments.max_length,
        }
        return attention_function(module, query, key, value, None, **packing, **kwargs)
    return _attend_by_length(attention_function, module, query, key, value, segments.lengths, **kwargs)


def _attend_by_length(attention_function, module, query, key, value, lengths, **kwargs):
    """Attend item by item, items of equal length together as one batch; shapes as in `attend`."""
    queries, keys, values = (x.split(lengths, dim=2) for x in (query, key, value))
    items_of_length = defaultdict(list)
    for item, length in enumerate(lengths):
        items_of_length[length].append(item)
    outputs, weights = [None] * len(lengths), [None] * len(lengths)
    for items in items_of_length.values():
        batch = (torch.cat([x[item] for item in items]) for x in (queries, keys, values))
        output, weight = attention_function(module, *batch, None, **kwargs)
        for row, item in enumerate(items):
            outputs[item] = output[row : row + 1]
            weights[item] = None if weight is None else weight[row]
    return torch.cat(outputs, dim=1), None if weights[0] is None else tuple(weights)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend with plain matrix products; the softmax stays in the input dtype, as published. Shapes as in `attend`."""
    weights = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def torch_varlen_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attend within the items of a packed row by `torch.nn.attention.varlen`; shapes as in `attend`.

    The kernel needs CUDA, half precision and no dropout. Everything else takes scaled dot-product attention, once per
    item of a packed row, once for a whole batch: a batch has no boundaries to respect, so nothing is lost there.
    """
    if cu_seq_lens_q is None:
        return _sdpa(query, key, value, attention_mask, scaling, dropout), None
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and dropout == 0.0:
        from torch.nn.attention.varlen import varlen_attn  # here: older builds lack the kernel

        # (1, heads, tokens, head_dim) -> (tokens, heads, head_dim)
        rows = (x.squeeze(0).transpose(0, 1).contiguous() for x in (query, key, value))
        output = varlen_attn(*rows, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, scale=scaling)
        return output[None], None
    lengths = cu_seq_lens_q.diff().tolist()
    items = zip(*(x.split(lengths, dim=2) for x in (query, key, value)))
    return torch.cat([_sdpa(q, k, v, None, scaling, dropout) for q, k, v in items], dim=1), None


def _sdpa(query, key, value, attention_mask, scaling, dropout):
    """Scaled dot-product attention with the heads moved behind the tokens, as attention functions return them."""
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
    )
    return output.transpose(1, 2).contiguous()


AttentionInterface.register(TORCH_VARLEN, torch_varlen_attention_forward)
AttentionMaskInterface.register(TORCH_VARLEN, sdpa_mask)

__all__ = [
    "TORCH_VARLEN",
    "Segments",
    "TokenLayout",
    "attend",
    "eager_attention_forward",
    "torch_varlen_attention_forward",
]
