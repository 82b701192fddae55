"""CLIP: the network against transformers' on the same random weights; its loss; other projects' weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
import transformers
from dalle_reference import cli
from dalle_reference.clip import CLIP, PRESETS, CLIPConfig, end_captions
from dalle_reference.load import load_clip_alone
from dalle_reference.transformer import NO_TOKEN
from safetensors.torch import save_file
from transformers import CLIPModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

TINY = PRESETS["tiny"]


def pictures(count: int = 3, side: int = TINY.resolution) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def captions(config: CLIPConfig = TINY) -> torch.Tensor:
    """A full one, a short one, and one of nothing but its end."""
    tokens = torch.randint(
        config.vocab_text - 1, (3, config.text_length - 1), generator=torch.Generator().manual_seed(2)
    )
    tokens[1, 3:] = NO_TOKEN
    tokens[2] = NO_TOKEN
    return end_captions(tokens, config.vocab_text - 1)


def make(config: CLIPConfig = TINY) -> CLIP:
    """A model whose biases and gains matter too."""
    torch.manual_seed(0)
    model = CLIP(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_the_loss_is_two_cross_entropies_over_the_batch() -> None:
    model, own = make(), torch.arange(3)
    image, text = model.encode_pictures(pictures()), model.encode_captions(captions())
    for vectors in (image, text):
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    logits = image @ text.T * model.log_scale.exp()
    loss = model.loss(pictures(), captions())
    wanted = -(logits.log_softmax(1)[own, own].mean() + logits.log_softmax(0)[own, own].mean()) / 2
    torch.testing.assert_close(loss.total, wanted)
    assert float(loss.right) == float((logits.argmax(1) == own).float().mean())


def test_the_scale_begins_at_the_inverse_of_7_percent_and_ends_at_100() -> None:
    model = CLIP(TINY)
    assert float(model.scale.detach()) == pytest.approx(1 / 0.07)
    with torch.no_grad():
        model.log_scale.fill_(9.0)
    model.loss(pictures(), captions()).total.backward()
    assert float(model.scale.detach()) == pytest.approx(100.0, rel=1e-5)
    assert model.log_scale.grad is not None
    assert float(model.log_scale.grad) != 0.0  # it can come down again


def test_what_stands_after_the_end_changes_nothing() -> None:
    model, tokens = make(), captions()
    whole = model.encode_captions(tokens)
    for row, count in enumerate((tokens != NO_TOKEN).sum(1).tolist()):
        torch.testing.assert_close(model.encode_captions(tokens[row : row + 1, :count])[0], whole[row])
    swapped = tokens.clone()
    swapped[0, 0] = (swapped[0, 0] + 1) % (TINY.vocab_text - 1)  # and every token before it does
    assert not torch.allclose(model.encode_captions(swapped)[0], whole[0])


def test_every_weight_learns_and_a_few_steps_match_captions_to_pictures() -> None:
    torch.manual_seed(0)
    model = CLIP(TINY)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model.loss(pictures(), captions())
        loss.total.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        optimizer.step()
    assert float(loss.right) == 1.0
    assert float(loss.total.detach()) < 0.2


def test_pictures_of_another_size_are_resized() -> None:
    model = make()
    flat = torch.full((1, 3, 1, 1), 0.3)
    one, other = (model.encode_pictures(flat.expand(1, 3, side, side)) for side in (16, 40))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_paper_preset_is_vit_b_32() -> None:
    with torch.device("meta"):
        model = CLIP(PRESETS["paper"])
    assert sum(parameter.numel() for parameter in model.parameters()) == 151_277_313  # as OpenAI's file has


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": 5}, "patch: got 5, wanted a divisor of the resolution 16"),
        ({"heads": 3}, "heads: got 3, wanted a divisor of the width 16"),
        ({"text_heads": 3}, "text_heads: got 3"),
        ({"embedding": 0}, "embedding: got 0"),
        ({"activation": "relu"}, "activation: got 'relu'"),
    ],
)
def test_bad_configurations(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


def test_bad_captions() -> None:
    with pytest.raises(ValueError, match="a caption without a token"):
        make().encode_captions(torch.full((2, 3), NO_TOKEN))
    with pytest.raises(ValueError, match=r"tokens: got shape \(1, 13\)"):
        make().encode_captions(torch.zeros(1, 13, dtype=torch.int64))


LIKE_PUBLISHED = replace(TINY, width=128, text_width=64, heads=2, text_heads=1)
"""With heads of 64, which is how those of a file are known."""


def transformers_clip(config: CLIPConfig) -> CLIPModel:
    """transformers' model of that shape, with random weights that all matter."""
    torch.manual_seed(0)
    model = CLIPModel(
        transformers.CLIPConfig(
            text_config={
                "vocab_size": config.vocab_text,
                "hidden_size": config.text_width,
                "intermediate_size": 4 * config.text_width,
                "num_hidden_layers": config.text_layers,
                "num_attention_heads": config.text_heads,
                "max_position_embeddings": config.text_length,
                "hidden_act": config.activation,
                "bos_token_id": 0,
                "eos_token_id": config.vocab_text - 1,
            },
            vision_config={
                "hidden_size": config.width,
                "intermediate_size": 4 * config.width,
                "num_hidden_layers": config.layers,
                "num_attention_heads": config.heads,
                "image_size": config.resolution,
                "patch_size": config.patch,
                "hidden_act": config.activation,
            },
            projection_dim=config.embedding,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def normalised(images: torch.Tensor) -> torch.Tensor:
    """As CLIPImageProcessor does it, which is not part of the model there."""
    return (images - torch.tensor(OPENAI_CLIP_MEAN)[:, None, None]) / torch.tensor(OPENAI_CLIP_STD)[:, None, None]


@pytest.mark.parametrize(("kind", "activation"), [("openai-clip", "quick_gelu"), ("open-clip", "gelu")])
@pytest.mark.parametrize("names", ["transformers", "openai"])
def test_published_weights_give_here_what_they_give_there(
    kind: str, activation: Literal["gelu", "quick_gelu"], names: str, tmp_path: Path
) -> None:
    config = replace(LIKE_PUBLISHED, activation=activation)
    theirs = transformers_clip(config)
    tensors = theirs.state_dict()
    if names == "openai":
        tensors = openai_names(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    cli.main(["convert", str(tmp_path / "model.safetensors"), str(tmp_path / "clip.safetensors"), "--kind", kind])
    ours = load_clip_alone(tmp_path / "clip.safetensors", torch.device("cpu")).double()
    assert ours.config == config
    theirs = theirs.double()
    images, tokens = pictures().double(), captions(config)
    padded = tokens.masked_fill(tokens == NO_TOKEN, 0)
    result = theirs(input_ids=padded, pixel_values=normalised(images))
    for got, wanted in (
        (ours.encode_pictures(images), result.image_embeds),
        (ours.encode_captions(tokens), result.text_embeds),
        (ours(images, tokens), result.logits_per_image),
    ):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)  # the last step is in float32
    loss = theirs(input_ids=padded, pixel_values=normalised(images), return_loss=True).loss
    torch.testing.assert_close(ours.loss(images, tokens).total.double(), loss, rtol=1e-5, atol=1e-5)


def test_several_captions_of_a_picture_are_as_many_batches_of_it() -> None:
    torch.manual_seed(0)
    model = CLIP(LIKE_PUBLISHED)
    images, tokens = pictures(), captions(LIKE_PUBLISHED)
    both = torch.stack([tokens, tokens.roll(1, 0)])
    got = model.loss(images, both)
    first, second = (model.loss(images, each) for each in both)
    torch.testing.assert_close(got.total, (first.total + second.total) / 2)
    torch.testing.assert_close(got.right, (first.right + second.right) / 2)
    assert first.total != second.total


def openai_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' tensors as OpenAI's model.py names them and lays them out."""
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in (
            ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
            ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
            ("vision_model.embeddings.patch_embedding", "visual.conv1"),
            ("vision_model.pre_layrnorm", "visual.ln_pre"),
            ("vision_model.post_layernorm", "visual.ln_post"),
            ("vision_model.encoder.layers", "visual.transformer.resblocks"),
            ("text_model.embeddings.token_embedding", "token_embedding"),
            ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
            ("text_model.final_layer_norm", "ln_final"),
            ("text_model.encoder.layers", "transformer.resblocks"),
            ("layer_norm1", "ln_1"),
            ("layer_norm2", "ln_2"),
            ("self_attn.out_proj", "attn.out_proj"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
        ):
            name = name.replace(old, new)
        if name in ("visual_projection.weight", "text_projection.weight"):
            renamed["visual.proj" if name.startswith("visual") else "text_projection"] = tensor.t()
        elif ".self_attn.q_proj." in name:
            parts = [tensors[old_name(name, part)] for part in "qkv"]
            renamed[name.replace("self_attn.q_proj.", "attn.in_proj_")] = torch.cat(parts)
        elif ".self_attn." not in name:
            renamed[name] = tensor
    return renamed


def old_name(name: str, part: str) -> str:
    place = name.replace("visual.transformer.resblocks", "vision_model.encoder.layers")
    return place.replace("transformer.resblocks", "text_model.encoder.layers").replace("q_proj", f"{part}_proj")


def test_the_kind_is_asked_for_and_other_shapes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = transformers_clip(LIKE_PUBLISHED).state_dict()
    source, out = tmp_path / "model.safetensors", tmp_path / "clip.safetensors"
    save_file(tensors, source)
    with pytest.raises(SystemExit):
        cli.main(["convert", str(source), str(out)])
    assert "a CLIP; give --kind openai-clip, or open-clip" in capsys.readouterr().err
    tensors["text_model.final_layer_norm.bias"] = torch.zeros(3)
    tensors.pop("vision_model.encoder.layers.1.self_attn.k_proj.bias")
    save_file(tensors, source)
    with pytest.raises(SystemExit):
        cli.main(["convert", str(source), str(out), "--kind", "openai-clip"])
    said = capsys.readouterr().err
    assert "not the weights of a CLIP: blocks.1.attention.project_qkv.bias missing" in said
    assert "text_norm.bias has shape (3,), wanted (64,)" in said
    assert not out.exists()
