# SPDX-License-Identifier: Apache-2.0
"""OneVision encoder for transformers 5: images, dense frames and sparse codec patches through one path."""

from importlib.metadata import version

from transformers import AutoBackbone, AutoConfig, AutoModel

# from their modules: without torchvision the top-level names can be placeholders, depending on transformers' version
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.video_processing_auto import AutoVideoProcessor

from .configuration_onevision_encoder import OneVisionEncoderConfig
from .image_processing_onevision_encoder import OneVisionEncoderImageProcessor
from .modeling_onevision_encoder import (
    OneVisionEncoderBackbone,
    OneVisionEncoderModel,
    OneVisionEncoderPreTrainedModel,
)
from .video_processing_onevision_encoder import OneVisionEncoderVideoProcessor

__version__ = version("onevision-encoder")

__all__ = [
    "OneVisionEncoderBackbone",
    "OneVisionEncoderConfig",
    "OneVisionEncoderImageProcessor",
    "OneVisionEncoderModel",
    "OneVisionEncoderPreTrainedModel",
    "OneVisionEncoderVideoProcessor",
]

AutoConfig.register("onevision_encoder", OneVisionEncoderConfig)
AutoModel.register(OneVisionEncoderConfig, OneVisionEncoderModel)
AutoBackbone.register(OneVisionEncoderConfig, OneVisionEncoderBackbone)
# one processor for both backend names: transformers asks for "torchvision" first and would warn about the other one
AutoImageProcessor.register(
    OneVisionEncoderConfig,
    image_processor_classes={"pil": OneVisionEncoderImageProcessor, "torchvision": OneVisionEncoderImageProcessor},
)
AutoVideoProcessor.register(OneVisionEncoderConfig, OneVisionEncoderVideoProcessor)

# saved folders carry the code, so that they load with trust_remote_code=True where this package is not installed
OneVisionEncoderConfig.register_for_auto_class("AutoConfig")
OneVisionEncoderModel.register_for_auto_class("AutoModel")
OneVisionEncoderBackbone.register_for_auto_class("AutoBackbone")
OneVisionEncoderImageProcessor.register_for_auto_class("AutoImageProcessor")
OneVisionEncoderVideoProcessor.register_for_auto_class("AutoVideoProcessor")

del AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoVideoProcessor, version  # dir() shows names of ours
