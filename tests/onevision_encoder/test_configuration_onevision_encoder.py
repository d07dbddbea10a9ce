# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from onevision_encoder import OneVisionEncoderConfig


def test_defaults_are_the_published_large_model():
    config = OneVisionEncoderConfig()
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (1024, 4096, 24)
    assert (config.num_attention_heads, config.head_dim, config.patch_size, config.image_size) == (16, 64, 14, 448)
    assert (config.rope_theta, config.rope_temporal_size, config.use_head) == (10000.0, 64, True)
    assert (config.layer_norm_eps, config.layer_norm_type, config.hidden_act) == (1e-6, "layer_norm", "gelu")


def test_save_and_load(tmp_path):
    config = OneVisionEncoderConfig(rope_theta=500.0, rope_temporal_size=None, out_features=["stem", "stage3"])
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["rope_theta"] == 500.0  # where the published code looks for it


def test_published_config_keeps_every_field(case_folder):
    published = json.loads((case_folder / "config.json").read_text())
    config = AutoConfig.from_pretrained(case_folder)
    fields = {"model_type", *(name for name in OneVisionEncoderConfig.__annotations__ if not name.startswith("_"))}
    assert fields <= published.keys()
    assert {name: getattr(config, name) for name in fields} == {name: published[name] for name in fields}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 100, "num_attention_heads": 3}, "divisible by num_attention_heads.*100.*3"),
        ({"hidden_size": 96, "num_attention_heads": 2}, "multiple of 32.*96 / 2 = 48"),
        ({"hidden_size": "wide"}, "hidden_size.*expected int"),
        ({"layer_norm_type": "batch_norm"}, "layer_norm_type"),
        ({"patch_size": 0}, "patch_size must be at least 1, got 0"),
        ({"rope_temporal_size": 0}, "rope_temporal_size must be at least 1"),
    ],
)
def test_fields_that_do_not_fit_raise(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        OneVisionEncoderConfig(**fields)
