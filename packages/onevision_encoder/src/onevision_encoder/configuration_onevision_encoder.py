# SPDX-License-Identifier: Apache-2.0
"""Configuration of the OneVision encoder: the published fields with their defaults, and the checks that join them."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

PADDING_POSITION = -1  # all three columns of a padded row of image_position_ids
ROPE_DIM_UNIT = 32  # head_dim / 2 splits 4 : 6 : 6 over (t, h, w), so head_dim comes in steps of 2 * 16


@strict
class OneVisionEncoderConfig(BackboneConfigMixin, PreTrainedConfig):
    """Sizes and switches of one encoder; the defaults are the published large model.

    Old `config.json` files load as they are. As a backbone config it names the feature maps `stem`, `stage1`, ...,
    `stageL` and takes `out_features` or `out_indices`.

    Args:
        hidden_size: width of the tokens; `hidden_size / num_attention_heads` must be a multiple of 32.
        intermediate_size: width inside the MLPs, of the blocks and of the pooling head.
        num_hidden_layers: number of blocks.
        num_attention_heads: heads of the blocks and of the pooling head.
        num_channels: channels of a pixel.
        image_size: side in pixels that the image processor aims at; the encoder itself takes any size.
        patch_size: side of a patch in pixels.
        hidden_act: activation of the MLPs; `"gelu"` is the exact (erf) one.
        layer_norm_eps: epsilon of every norm, the one of the pooling head included.
        layer_norm_type: norm around and inside the blocks; the pooling head always uses RMSNorm.
        attention_dropout: dropout on attention weights, in training only.
        initializer_range: standard deviation of freshly initialised weights.
        rope_theta: base of the rotary frequencies.
        rope_temporal_size: time slots of the grid that `visible_indices` counts in for 5-D input; None: the real T.
        use_head: keep the post-norm and the attention-pooling head; without it neither exists.

    Raises:
        ValueError: if the sizes do not fit together; the message names the fields.
    """

    model_type = "onevision_encoder"

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 448
    patch_size: int = 14
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    layer_norm_type: Literal["layer_norm", "rms_norm"] = "layer_norm"
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02
    rope_theta: float | int = 10000.0
    rope_temporal_size: int | None = 64
    use_head: bool = True
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        self.stage_names = ["stem"] + [f"stage{i}" for i in range(1, self.num_hidden_layers + 1)]
        kwargs.pop("stage_names", None)  # derived; an old file must not override it
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def validate_architecture(self):
        """Check the fields against each other; run by `@strict` after the type checks."""
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be divisible by num_attention_heads, got hidden_size={self.hidden_size} and "
                f"num_attention_heads={self.num_attention_heads}."
            )
        if self.head_dim % ROPE_DIM_UNIT:
            raise ValueError(
                f"hidden_size / num_attention_heads must be a multiple of {ROPE_DIM_UNIT}, because the rotary angles "
                f"split 4:6:6 over time, height and width; got {self.hidden_size} / {self.num_attention_heads} = "
                f"{self.head_dim}."
            )
        if self.rope_temporal_size is not None and self.rope_temporal_size < 1:
            raise ValueError(f"rope_temporal_size must be at least 1 or None, got {self.rope_temporal_size}.")


__all__ = ["PADDING_POSITION", "OneVisionEncoderConfig"]
