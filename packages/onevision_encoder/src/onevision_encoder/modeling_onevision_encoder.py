# SPDX-License-Identifier: Apache-2.0
"""The OneVision encoder: patches with `(t, h, w)` positions in, visual features out.

Three input layouts meet in one path. Images `(B, C, H, W)` and frame stacks `(B, C, T, H, W)` are cut into patches;
the patch sequence `(num_items, max_patches, C * P * P)` already is patches. From there on there are only patches and
positions. Without padding they run as one batch; ragged items are packed into a single row, so padding costs nothing,
and the outputs are put back into `(num_items, max_patches, dim)` with zeros where the input was padded.

The rotary embedding is not a rotation: it pairs neighbouring channels (2i, 2i+1) but lays the angles out as two equal
halves, so the members of a pair turn by different angles. The published weights were trained that way.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, BaseModelOutput, BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs, maybe_install_capturing_hooks

from .attention_onevision_encoder import Segments, TokenLayout, attend, eager_attention_forward
from .configuration_onevision_encoder import OneVisionEncoderConfig
from .inputs_onevision_encoder import check_frames, check_sequence, check_shapes, tokens_from_frames


class OneVisionEncoderPatchEmbedding(nn.Conv2d):
    """The patch convolution, applied as the linear map it is: its input is patches, already cut."""

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(patches.to(self.weight.dtype), self.weight.flatten(1))


class OneVisionEncoderEmbeddings(nn.Module):
    """Patches `(B, S, C * P * P)` to tokens `(B, S, hidden_size)`."""

    def __init__(self, config: OneVisionEncoderConfig):
        super().__init__()
        self.patch_embedding = OneVisionEncoderPatchEmbedding(
            config.num_channels, config.hidden_size, config.patch_size, config.patch_size, bias=False
        )

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return self.patch_embedding(patches)


def rotary_embeddings(positions: torch.Tensor, head_dim: int, rope_theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute cosine and sine of the rotary angles, in float32 whatever the model's dtype.

    The frequencies are made here from the config, not kept in a buffer: nothing to cast, to load or to rebuild. Each
    axis has its own geometric series `theta ** (-k / n)` without the usual factor 2; head_dim / 2 splits 4:6:6.

    Args:
        positions: `(B, S, 3)`, columns (t, h, w).
        head_dim: channels of one head, a multiple of 32.
        rope_theta: base of the series.

    Returns:
        Two `(B, S, head_dim)` float32 tensors, each of two equal halves.
    """
    unit = head_dim // 32
    angles = []
    for axis, size in enumerate((4 * unit, 6 * unit, 6 * unit)):
        exponents = torch.arange(size, dtype=torch.float32, device=positions.device) / size
        angles.append(positions[..., axis, None].to(torch.float32) / torch.pow(rope_theta, exponents))
    half = torch.cat(angles, dim=-1)
    full = torch.cat((half, half), dim=-1)
    return full.cos(), full.sin()


def apply_rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn pairs of neighbouring channels of `(B, heads, S, head_dim)` by angles `(B, 1, S, head_dim)`."""
    turned = torch.stack((-states[..., 1::2], states[..., ::2]), dim=-1).flatten(-2)
    return states * cos + turned * sin


class RecordedOnce:
    """Takes transformers' output-capturing hook at most once.

    Hooks are installed with the model, because `torch.compile` cannot trace their lazy installation. An outer model
    that records outputs installs them again in all its sub-models; the second one would double every entry.
    """

    def register_forward_hook(self, hook: Callable, **kwargs) -> RemovableHandle:
        name = getattr(hook, "__qualname__", "")
        if "output_capturing_hook" in name and any(
            getattr(known, "__qualname__", "") == name for known in self._forward_hooks.values()
        ):
            return RemovableHandle(self._forward_hooks)  # removes nothing: its id is not in use
        return super().register_forward_hook(hook, **kwargs)


class OneVisionEncoderAttention(RecordedOnce, nn.Module):
    """Multi-head self-attention with the rotary embedding on queries and keys."""

    def __init__(self, config: OneVisionEncoderConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | tuple[torch.Tensor, ...] | None]:
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(heads).transpose(1, 2)
        key = self.k_proj(hidden_states).view(heads).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        cos, sin = (x.to(query.dtype) for x in position_embeddings)
        query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        attention_function: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            attention_function,
            self,
            query,
            key,
            value,
            scaling=self.head_dim**-0.5,
            dropout=self.config.attention_dropout if self.training else 0.0,
            is_causal=False,
            **kwargs,
        )
        return self.out_proj(output.reshape(hidden_states.shape)), weights


class OneVisionEncoderMLP(nn.Module):
    def __init__(self, config: OneVisionEncoderConfig):
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


def build_norm(config: OneVisionEncoderConfig) -> nn.Module:
    """Build the norm that `layer_norm_type` names."""
    norm = nn.RMSNorm if config.layer_norm_type == "rms_norm" else nn.LayerNorm
    return norm(config.hidden_size, eps=config.layer_norm_eps)


class OneVisionEncoderLayer(RecordedOnce, GradientCheckpointingLayer):
    """One pre-norm block."""

    def __init__(self, config: OneVisionEncoderConfig):
        super().__init__()
        self.self_attn = OneVisionEncoderAttention(config)
        self.layer_norm1 = build_norm(config)
        self.mlp = OneVisionEncoderMLP(config)
        self.layer_norm2 = build_norm(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attended, _ = self.self_attn(self.layer_norm1(hidden_states), position_embeddings, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class OneVisionEncoderPooling(nn.Module):
    """Attention of one query over the tokens of each item; parameters are named as in `nn.MultiheadAttention`."""

    def __init__(self, config: OneVisionEncoderConfig):
        super().__init__()
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.in_proj_weight = nn.Parameter(torch.empty(3 * config.hidden_size, config.hidden_size))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * config.hidden_size))
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, query: torch.Tensor, tokens: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        """Pool tokens, in the encoder's shape, by `query` `(1, 1, dim)` into `(num_items, 1, dim)`."""
        query_weight, *memory_weights = self.in_proj_weight.chunk(3)
        query_bias, *memory_biases = self.in_proj_bias.chunk(3)
        heads = (self.num_heads, self.head_dim)
        query = nn.functional.linear(query, query_weight, query_bias).unflatten(-1, heads).transpose(1, 2)
        # projected before they are padded, so padding is not projected
        key, value = (
            layout.leave(nn.functional.linear(tokens, weight, bias)).unflatten(-1, heads).transpose(1, 2)
            for weight, bias in zip(memory_weights, memory_biases)
        )
        pooled = nn.functional.scaled_dot_product_attention(
            query.expand(key.shape[0], -1, -1, -1),
            key,
            value,
            attn_mask=None if layout.valid is None else layout.valid[:, None, None, :],
        )
        return self.out_proj(pooled.transpose(1, 2).flatten(-2))


class OneVisionEncoderHead(nn.Module):
    """Attention pooling by a learned probe, then a residual MLP; the norm is RMSNorm for every `layer_norm_type`."""

    def __init__(self, config: OneVisionEncoderConfig):
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.attention = OneVisionEncoderPooling(config)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = OneVisionEncoderMLP(config)

    def forward(self, tokens: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        pooled = self.attention(self.probe, tokens, layout)
        return (pooled + self.mlp(self.norm(pooled))).squeeze(1)


class OneVisionEncoderPreTrainedModel(PreTrainedModel):
    """Flags and initialisation shared by the encoder and the backbone."""

    config: OneVisionEncoderConfig
    base_model_prefix = "onevision_encoder"
    main_input_name = "pixel_values"
    input_modalities = ("image", "video")
    supports_gradient_checkpointing = True
    _no_split_modules = ("OneVisionEncoderLayer", "OneVisionEncoderHead")
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": OneVisionEncoderLayer, "attentions": OneVisionEncoderAttention}  # noqa: RUF012
    _input_embed_layer = "patch_embedding"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # linear, convolution and norm layers
        if isinstance(module, OneVisionEncoderHead):
            init.normal_(module.probe)
        elif isinstance(module, OneVisionEncoderPooling):
            init.xavier_uniform_(module.in_proj_weight)
            init.zeros_(module.in_proj_bias)


class OneVisionEncoderStack(OneVisionEncoderPreTrainedModel):
    """The blocks: a batch or a packed row of tokens in, tokens and everything recorded out."""

    def __init__(self, config: OneVisionEncoderConfig):
        super().__init__(config)
        self.layers = nn.ModuleList([OneVisionEncoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        segments: Segments | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """Run the blocks.

        Args:
            hidden_states: `(B, S, dim)`, or a packed row `(1, num_tokens, dim)`.
            position_embeddings: cosine and sine, `(B or 1, 1, S, head_dim)`.
            attention_mask: mask of a padded batch, as the attention implementation wants it.
            segments: the items of a packed row.
            **kwargs: `output_hidden_states`, `output_attentions`, and arguments of the attention function.
        """
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                segments=segments,
                **kwargs,
            )
        return BaseModelOutput(last_hidden_state=hidden_states)


def padding_mask(
    config: OneVisionEncoderConfig, hidden_states: torch.Tensor, valid: torch.Tensor
) -> torch.Tensor | None:
    """Build the mask of a padded batch, in the form the attention implementation wants, without reading values.

    Args:
        config: names the implementation.
        hidden_states: `(B, S, dim)`.
        valid: `(B, S)` bool, False on padding.
    """
    if config._attn_implementation != "flex_attention":
        return create_bidirectional_mask(config, hidden_states, valid)
    # a block mask would be built from the values of `valid`, which are out of reach while compiling: added to scores
    bias = torch.zeros_like(valid, dtype=hidden_states.dtype)
    bias = bias.masked_fill(~valid, torch.finfo(hidden_states.dtype).min)
    return bias[:, None, None, :].expand(-1, 1, valid.shape[1], -1)


class OneVisionEncoderTower(OneVisionEncoderPreTrainedModel):
    """What encoder and backbone share: embedding, blocks, post-norm."""

    def __init__(self, config: OneVisionEncoderConfig):
        super().__init__(config)
        self.embeddings = OneVisionEncoderEmbeddings(config)
        self.layernorm_pre = build_norm(config)
        self.encoder = OneVisionEncoderStack(config)
        self.layernorm_post = build_norm(config) if config.use_head else None

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embedding

    def encode(self, patches: torch.Tensor, positions: torch.Tensor, layout: TokenLayout, **kwargs) -> BaseModelOutput:
        """Embed patches `(num_items, max_patches, C * P * P)` and run the blocks, in the encoder's shape."""
        positions = positions if layout.valid is None else layout.enter(positions)
        cos, sin = rotary_embeddings(positions, self.config.head_dim, self.config.rope_theta)
        hidden_states = self.layernorm_pre(self.embeddings(layout.enter(patches)))
        cos, sin = (x.to(hidden_states.dtype).unsqueeze(1) for x in (cos, sin))
        attention_mask = None
        if layout.valid is not None and layout.segments is None:
            attention_mask = padding_mask(self.config, hidden_states, layout.valid)
        return self.encoder(
            hidden_states, (cos, sin), attention_mask=attention_mask, segments=layout.segments, **kwargs
        )


class OneVisionEncoderModel(OneVisionEncoderTower):
    """OneVision encoder with the attention-pooling head.

    ```python
    model = AutoModel.from_pretrained(folder)
    outputs = model(**processor("clip.mp4", sampling="codec", return_tensors="pt"))
    ```
    """

    def __init__(self, config: OneVisionEncoderConfig):
        super().__init__(config)
        self.head = OneVisionEncoderHead(config) if config.use_head else None
        self.post_init()
        maybe_install_capturing_hooks(self)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        visible_indices: torch.Tensor | None = None,
        patch_positions: torch.Tensor | None = None,
        image_position_ids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encode images, frame stacks or patch sequences.

        Shapes are always checked. Values are checked on CPU tensors and, for patch sequences, on every device, because
        their lengths have to reach the host anyway; 4-D and 5-D inputs on an accelerator are not read. Nothing is read
        while `torch.compile` traces, where ragged patch sequences run as a masked batch instead of a packed row.

        Args:
            pixel_values: normalised pixels. `(B, C, H, W)`: images, at t = 0. `(B, C, T, H, W)`: frames.
                `(num_items, max_patches, C * P * P)`: a patch sequence, each patch flattened as `(C, P, P)`.
            visible_indices: 4-D and 5-D input: `(B or 1, S)` flat indices into a grid of `rope_temporal_size`
                frames. Fewer or more than there are patches: they select. As many: they place, and move nothing.
            patch_positions: 4-D and 5-D input: `(B or 1, S, 3)` positions (t, h, w) of the patches that stay;
                default the grid's own.
            image_position_ids: patch sequence: `(num_items, max_patches, 3)` integer positions (t, h, w); a row of -1
                is padding, anywhere in an item.
            **kwargs: `output_hidden_states`, `output_attentions` (eager only), `return_dict`, and arguments of the
                attention function.

        Returns:
            `last_hidden_state` `(B, S, dim)` or `(num_items, max_patches, dim)`, zeros on padding, after the post-norm
            if `use_head`; `pooler_output` `(B or num_items, dim)`, None without head; `hidden_states`, L + 1 tensors
            before the post-norm; `attentions`.

        Raises:
            ValueError: if shapes, positions, indices or pixel values are not as described; the message has the shapes.
        """
        patches, positions, layout = self._read_inputs(
            pixel_values, patch_positions, visible_indices, image_position_ids
        )
        outputs = self.encode(patches, positions, layout, **kwargs)
        tokens = outputs.last_hidden_state
        if self.head is not None:
            tokens = self.layernorm_post(tokens)
        attentions = outputs.attentions
        return BaseModelOutputWithPooling(
            last_hidden_state=layout.leave(tokens),
            pooler_output=None if self.head is None else self.head(tokens, layout),
            hidden_states=outputs.hidden_states and tuple(layout.leave(x) for x in outputs.hidden_states),
            attentions=attentions and tuple(layout.leave_attentions(x) for x in attentions),
        )

    def _read_inputs(self, pixel_values, patch_positions, visible_indices, image_position_ids):
        """Check the inputs of `forward` and bring them to patches, positions and layout."""
        check_shapes(pixel_values, self.config)
        if pixel_values.ndim == 3:
            if patch_positions is not None or visible_indices is not None:
                raise ValueError(
                    f"pixel_values of shape {tuple(pixel_values.shape)} is a patch sequence: pass image_position_ids. "
                    "patch_positions and visible_indices belong to (B, C, H, W) and (B, C, T, H, W) input."
                )
            check_sequence(pixel_values, image_position_ids)
            positions = image_position_ids.to(pixel_values.device)
            layout = TokenLayout.read(pixel_values, positions, self.config._attn_implementation)
            return pixel_values, positions, layout
        if image_position_ids is not None:
            raise ValueError(
                f"image_position_ids belongs to patch sequences (num_items, max_patches, C*P*P); for pixel_values of "
                f"shape {tuple(pixel_values.shape)} pass patch_positions."
            )
        check_frames(pixel_values, visible_indices, patch_positions, self.config)
        frames = pixel_values if pixel_values.ndim == 5 else pixel_values.unsqueeze(2)
        patches, positions = tokens_from_frames(frames, visible_indices, patch_positions, self.config.patch_size)
        return patches, positions, TokenLayout(tuple(patches.shape[:2]))


class OneVisionEncoderBackbone(BackboneMixin, OneVisionEncoderTower):
    """The encoder as a source of feature maps `(B, dim, H/P, W/P)` of images, for detection and segmentation heads."""

    _keys_to_ignore_on_load_unexpected = (r"^head\.",)  # a published checkpoint has the pooling head as well

    def __init__(self, config: OneVisionEncoderConfig):
        super().__init__(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:
        """Compute the feature maps that `out_features` names; the last stage has the post-norm if there is one.

        Args:
            pixel_values: `(B, C, H, W)` normalised pixels.
            **kwargs: as of the encoder.

        Raises:
            ValueError: for frames and patch sequences, which have no feature map, and for wrong sizes.
        """
        if pixel_values.ndim != 4:
            raise ValueError(f"Expected images (B, C, H, W), got pixel_values of shape {tuple(pixel_values.shape)}.")
        check_shapes(pixel_values, self.config)
        check_frames(pixel_values, None, None, self.config)
        patch_size = self.config.patch_size
        grid = (pixel_values.shape[-2] // patch_size, pixel_values.shape[-1] // patch_size)
        patches, positions = tokens_from_frames(pixel_values.unsqueeze(2), None, None, patch_size)
        outputs = self.encode(patches, positions, TokenLayout(tuple(patches.shape[:2])), **kwargs)
        stages = list(outputs.hidden_states)
        if self.layernorm_post is not None:
            stages[-1] = self.layernorm_post(stages[-1])
        maps = [
            stage.transpose(1, 2).unflatten(-1, grid).contiguous()
            for name, stage in zip(self.stage_names, stages)
            if name in self.out_features
        ]
        return BackboneOutput(
            feature_maps=tuple(maps), hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = ["OneVisionEncoderBackbone", "OneVisionEncoderModel", "OneVisionEncoderPreTrainedModel"]
