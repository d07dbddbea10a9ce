# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import transformers
from packaging import version
from transformers import AutoBackbone, AutoModel, PreTrainedModel
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from onevision_encoder import OneVisionEncoderBackbone, OneVisionEncoderConfig, OneVisionEncoderModel
from onevision_encoder.conversion import PRESETS
from onevision_encoder.modeling_onevision_encoder import apply_rotary, rotary_embeddings

ATOL = 2e-6  # float32 rounding of sums in another order


def assert_same(found, expected, atol=ATOL):
    assert found.keys() == expected.keys()
    for a, b in zip(found.to_tuple(), expected.to_tuple()):
        torch.testing.assert_close(a, b, atol=atol, rtol=0)


def test_rotary_golden_values():
    cos, sin = rotary_embeddings(torch.tensor([[[1, 2, 3]]]), 64, 10000.0)
    rotated = apply_rotary((torch.arange(64) + 1.0)[None, None, None] / 64, cos[:, None], sin[:, None])[0, 0, 0]
    expected = [-0.017854, 0.03456, 0.040401, 0.063951, 0.077184, 0.093997, 0.10925, 0.125035]
    torch.testing.assert_close(rotated[:8], torch.tensor(expected), atol=1e-6, rtol=0)
    expected = [-0.168438, 0.665259, 0.487987, 0.57951]
    torch.testing.assert_close(rotated[32:36], torch.tensor(expected), atol=1e-6, rtol=0)


def test_image_is_frame_zero(build_model):
    model, image = build_model(), torch.randn(2, 3, 8, 12)
    with torch.no_grad():
        assert_same(model(image), model(image.unsqueeze(2)))


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa", "torch_varlen"])
def test_ragged_batch_is_its_items_one_by_one(build_model, ragged, attn_implementation):
    model = build_model(attn_implementation)
    with torch.no_grad():
        batch = model(**ragged, output_hidden_states=True)
        for item, keep in enumerate((ragged["image_position_ids"] >= 0).all(-1)):
            alone = model(
                **{name: value[item, keep][None] for name, value in ragged.items()}, output_hidden_states=True
            )
            for a, b in zip(batch.hidden_states, alone.hidden_states):
                torch.testing.assert_close(a[item, keep], b[0], atol=ATOL, rtol=0)
                assert not a[item, ~keep].any()
            torch.testing.assert_close(
                batch.last_hidden_state[item, keep], alone.last_hidden_state[0], atol=ATOL, rtol=0
            )
            torch.testing.assert_close(batch.pooler_output[item], alone.pooler_output[0], atol=ATOL, rtol=0)
            assert not batch.last_hidden_state[item, ~keep].any()


def test_ragged_attentions_lie_where_the_patches_are(build_model, ragged):
    attentions = build_model("eager")(**ragged, output_attentions=True).attentions
    valid = (ragged["image_position_ids"] >= 0).all(-1).float()
    assert len(attentions) == 2
    for weights in attentions:
        assert weights.shape == (4, 2, 20, 20)
        torch.testing.assert_close(weights.sum(-1), valid[:, None].expand(-1, 2, -1), atol=1e-5, rtol=0)
        assert not weights.masked_select(valid[:, None, None] == 0).any()


def test_no_gradient_reaches_padding(build_model, ragged):
    pixel_values = ragged["pixel_values"].nan_to_num(0).requires_grad_()
    build_model()(pixel_values, image_position_ids=ragged["image_position_ids"]).pooler_output.sum().backward()
    is_padding = (ragged["image_position_ids"] < 0).all(-1)
    assert not pixel_values.grad[is_padding].any()
    assert pixel_values.grad[~is_padding].any(-1).all()


@pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.23"), reason="transformers 5.23 added it"
)
def test_hidden_states_can_be_selected(build_model, ragged):
    model = build_model()
    with torch.no_grad():
        every = model(**ragged, output_hidden_states=True).hidden_states
        chosen = model(**ragged, output_hidden_states=[-2]).hidden_states
    assert chosen[0] is None
    assert chosen[2] is None
    assert torch.equal(chosen[1], every[1])


def test_an_outer_model_does_not_record_twice(build_model, config):
    class Outer(PreTrainedModel):
        config_class = OneVisionEncoderConfig
        _can_record_outputs = {"hidden_states": torch.nn.Identity}  # noqa: RUF012

        def __init__(self, config):
            super().__init__(config)
            self.vision_tower = OneVisionEncoderModel(config)
            self.post_init()

    outer = Outer(config)
    maybe_install_capturing_hooks(outer)
    assert len(outer.vision_tower(torch.randn(1, 3, 8, 8), output_hidden_states=True).hidden_states) == 3


def test_checkpointed_gradients_are_the_same(build_model, ragged):
    gradients = []
    for checkpointed in (False, True):
        model = build_model().train()
        if checkpointed:
            model.gradient_checkpointing_enable()
            assert model.encoder.layers[0].gradient_checkpointing
        model(**ragged).pooler_output.square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_every_parameter_trains(build_model, ragged):
    model = build_model().train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(2):
        model(**ragged).pooler_output.square().sum().backward()
        optimizer.step()
    assert [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])] == []


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa", "torch_varlen", "flex_attention"])
@pytest.mark.parametrize("layout", ["image", "video", "sparse", "ragged"])
def test_compiles_without_graph_breaks(build_model, ragged, attn_implementation, layout):
    inputs = {
        "image": {"pixel_values": torch.randn(2, 3, 8, 12)},
        "video": {"pixel_values": torch.randn(2, 3, 3, 8, 12), "patch_positions": torch.randint(0, 9, (1, 18, 3))},
        "sparse": {"pixel_values": torch.randn(2, 3, 6, 8, 12), "visible_indices": torch.randint(0, 36, (2, 9))},
        "ragged": ragged,
    }[layout]
    torch._dynamo.reset()
    compiled = torch.compile(build_model(attn_implementation), backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = build_model("eager")(**inputs, output_hidden_states=True)
        assert_same(compiled(**inputs, output_hidden_states=True), expected)


def test_packed_blocks_compile_without_graph_breaks(build_model, ragged):
    model = build_model("sdpa")
    stack = model.encoder.forward
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(**ragged)
        model.encoder.forward = torch.compile(stack, backend="eager", fullgraph=True)
        assert_same(model(**ragged), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_angles_stay_float32_in_half_precision(build_model, monkeypatch, dtype):
    import onevision_encoder.modeling_onevision_encoder as modeling

    seen = []

    def record(*args):
        seen.extend(rotary_embeddings(*args))
        return seen[-2:]

    monkeypatch.setattr(modeling, "rotary_embeddings", record)
    positions = torch.tensor([[[63, 120, 119]] * 4])
    build_model().to(dtype)(torch.randn(1, 3, 8, 8, dtype=dtype), patch_positions=positions)
    expected = rotary_embeddings(positions, 32, 10000.0)
    assert [x.dtype for x in seen] == [torch.float32] * 2
    assert torch.equal(seen[0], expected[0])
    assert torch.equal(seen[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cast_and_load_agree(build_model, ragged, tmp_path, dtype):
    build_model().save_pretrained(tmp_path)
    ragged["pixel_values"] = ragged["pixel_values"].to(dtype)
    with torch.no_grad():
        loaded = AutoModel.from_pretrained(tmp_path, dtype=dtype)(**ragged)
        cast = AutoModel.from_pretrained(tmp_path, dtype=torch.float32).to(dtype)(**ragged)
    assert loaded.last_hidden_state.dtype == dtype
    assert_same(loaded, cast, atol=0)


def test_autocast(build_model, ragged):
    model = build_model()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = model(**ragged)
    with torch.no_grad():
        expected = model(**ragged)
    torch.testing.assert_close(found.pooler_output.float(), expected.pooler_output, atol=6e-2, rtol=0)


@pytest.mark.parametrize("fields", [{}, {"use_head": False}, {"layer_norm_type": "rms_norm"}])
def test_saved_is_loaded(build_model, ragged, tmp_path, fields):
    model = build_model(**fields)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        assert_same(loaded(**ragged), model(**ragged), atol=0)


@torch.no_grad()
def test_initialisation():
    model = OneVisionEncoderModel(OneVisionEncoderConfig(num_hidden_layers=1))
    assert model.embeddings.patch_embedding.weight.std() == pytest.approx(0.02, rel=0.05)
    assert model.encoder.layers[0].mlp.fc1.weight.std() == pytest.approx(0.02, rel=0.05)
    assert model.head.attention.out_proj.weight.std() == pytest.approx(0.02, rel=0.05)
    assert model.head.probe.std() == pytest.approx(1, rel=0.1)
    assert model.head.attention.in_proj_weight.abs().max() <= (6 / 4096) ** 0.5  # Xavier-uniform of (3D, D)
    assert not model.head.attention.in_proj_bias.any()
    assert (model.head.norm.weight == 1).all()


@pytest.mark.parametrize(("preset", "millions"), [("base", 92.6), ("large", 315.5), ("huge", 650.1)])
def test_parameter_counts_of_the_published_sizes(preset, millions):
    with torch.device("meta"):
        model = OneVisionEncoderModel(OneVisionEncoderConfig(**PRESETS[preset]))
    assert sum(x.numel() for x in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_backbone_maps_are_the_hidden_states(build_model, tmp_path):
    model, image = build_model(), torch.randn(2, 3, 8, 12)
    model.save_pretrained(tmp_path)
    backbone, info = OneVisionEncoderBackbone.from_pretrained(
        tmp_path, out_features=["stem", "stage1", "stage2"], output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        maps = backbone(image).feature_maps
        outputs = model(image, output_hidden_states=True)
    expected = (*outputs.hidden_states[:2], outputs.last_hidden_state)
    for feature_map, tokens in zip(maps, expected, strict=True):
        assert feature_map.shape == (2, 64, 2, 3)
        assert torch.equal(feature_map.flatten(2).transpose(1, 2), tokens)
    assert backbone.channels == [64, 64, 64]


def test_auto_backbone(config):
    config.out_features = ["stage1"]
    backbone = AutoBackbone.from_config(config)
    assert isinstance(backbone, OneVisionEncoderBackbone)
    assert [x.shape for x in backbone(torch.randn(1, 3, 8, 8)).feature_maps] == [(1, 64, 2, 2)]
    with pytest.raises(ValueError, match=r"images \(B, C, H, W\).*\(1, 3, 2, 8, 8\)"):
        backbone(torch.randn(1, 3, 2, 8, 8))
    with pytest.raises(ValueError, match=r"multiples of patch_size=4.*\(1, 3, 9, 8\)"):
        backbone(torch.randn(1, 3, 9, 8))
