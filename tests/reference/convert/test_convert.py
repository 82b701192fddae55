"""Peers' own models, saved as the peers save them: converted without the peer, then run here, or by the peer again."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dalle_reference import weights
from dalle_reference.cli import main
from dalle_reference.config import to_json
from dalle_reference.convert import convert
from dalle_reference.convert.rudalle import caption_tokens
from dalle_reference.dvae import DiscreteVAE, DVAEConfig
from dalle_reference.errors import UserError
from dalle_reference.generate import generate
from dalle_reference.load import load_dvae, load_transformer, load_transformer_alone
from dalle_reference.train import keep_checkpoint
from dalle_reference.transformer import DalleTransformer, TransformerConfig
from omegaconf import OmegaConf
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.integrations.peers import peer

CPU = torch.device("cpu")
PAGE = (Path(__file__).parents[3] / "docs/pages/weights.md").read_text(encoding="utf-8")


def randomise(model: nn.Module, std: float = 0.1) -> nn.Module:
    """Every parameter, biases and gains too, such that none can be mistaken for another."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0
            scale = std if parameter.dim() < 2 else 1 / math.sqrt(parameter[0].numel())
            scale = 1.0 if "embeddings" in name else scale
            parameter.copy_(centre + scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def pictures(side: int, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def run(*arguments: Any) -> None:
    main([str(argument) for argument in arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


# OpenAI's dVAE, and FLAVA's.


@pytest.fixture(scope="module")
def openai(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """An encoder and a decoder of OpenAI's code, a quarter as wide, and the folder in which they are pickled."""
    dall_e = peer("dall_e")
    folder = tmp_path_factory.mktemp("openai")
    encoder = randomise(dall_e.Encoder(n_hid=64, n_blk_per_group=2, vocab_size=512), std=0.01)
    decoder = randomise(dall_e.Decoder(n_hid=64, n_blk_per_group=2, vocab_size=512, n_init=32), std=0.01)
    torch.save(encoder, folder / "encoder.pkl")
    torch.save(decoder, folder / "decoder.pkl", _use_new_zipfile_serialization=False)
    run("convert", folder / "decoder.pkl", folder / "encoder.pkl", folder / "dvae.safetensors")
    return encoder, decoder, folder


def small(model: DiscreteVAE, side: int = 32) -> DiscreteVAE:
    """The same weights for smaller pictures."""
    smaller = DiscreteVAE(replace(model.config, resolution=side))
    smaller.load_state_dict(model.state_dict())
    return smaller.eval()


def test_openais_dvae_runs_here_as_it_runs_there(openai: tuple[Any, Any, Path]) -> None:
    encoder, decoder, folder = openai
    loaded = load_dvae(folder / "dvae.safetensors", CPU)
    assert loaded.config == DVAEConfig(resolution=256, width=64, groups=4, blocks=2, vocab=512, code_width=32)
    model, images, dall_e = small(loaded), pictures(32), peer("dall_e")
    with torch.no_grad():
        logits = encoder(dall_e.map_pixels(images))
        tokens = logits.argmax(dim=1)
        statistics = decoder(F.one_hot(tokens, 512).permute(0, 3, 1, 2).float())
        decoded = dall_e.unmap_pixels(torch.sigmoid(statistics[:, :3]))
        torch.testing.assert_close(model.scores(images), logits.permute(0, 2, 3, 1).flatten(0, 2), rtol=1e-5, atol=1e-5)
        assert torch.equal(model.encode(images), tokens)
        assert len(tokens.unique()) > 3
        torch.testing.assert_close(model.decode(tokens), decoded, rtol=1e-5, atol=1e-5)


def test_openais_dvae_in_float64(openai: tuple[Any, Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, decoder, folder = openai
    # Theirs turns every input to float32; with the dtype of its weights it is the same network.
    monkeypatch.setattr(
        peer("dall_e.utils").Conv2d, "forward", lambda self, x: F.conv2d(x, self.w, self.b, padding=self.kw // 2)
    )
    encoder, decoder = (copy.deepcopy(half).double() for half in (encoder, decoder))
    model, images = small(load_dvae(folder / "dvae.safetensors", CPU)).double(), pictures(32).double()
    with torch.no_grad():
        logits = encoder.blocks(0.8 * images + 0.1)
        torch.testing.assert_close(
            model.scores(images), logits.permute(0, 2, 3, 1).flatten(0, 2), rtol=1e-10, atol=1e-10
        )
        tokens = logits.argmax(dim=1)
        statistics = decoder.blocks(F.one_hot(tokens, 512).permute(0, 3, 1, 2).double())
        latents = model.quantizer.codebook[tokens].flatten(0, 2)
        torch.testing.assert_close(model._decode(latents, len(images)), statistics, rtol=1e-10, atol=1e-10)


def test_the_page_s_example_runs(openai: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Python and its last two commands as they stand there, on files of the published ones' kind."""
    shell, code = re.search(r"```sh\n(.*?)```", PAGE, re.DOTALL), re.search(r"```py\n(.*?)```", PAGE, re.DOTALL)
    for name in ("encoder.pkl", "decoder.pkl"):
        shutil.copy(openai[2] / name, tmp_path / name)
    Image.new("RGB", (300, 256), (200, 30, 90)).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    download, *commands = shell[1].splitlines()
    assert download.startswith("curl")
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "dalle-reference"
        run(*arguments)
    names: dict[str, Any] = {}
    exec(code[1], names)
    assert names["tokens"].shape == (1, 32, 32)
    assert names["pictures"].shape == (1, 3, 256, 256)


def test_a_converted_dvae_goes_with_the_transformer_that_is_trained_on_it(openai: Any, tmp_path: Path) -> None:
    keep_checkpoint(openai[2] / "dvae.safetensors", tmp_path / "dvae", "dvae")
    kept, loaded = load_dvae(tmp_path / "dvae", CPU), load_dvae(openai[2] / "dvae.safetensors", CPU)
    assert kept.config == loaded.config
    assert all(map(torch.equal, kept.state_dict().values(), loaded.state_dict().values()))


def test_the_header_says_what_the_file_holds(openai: tuple[Any, Any, Path]) -> None:
    folder = openai[2]
    with safe_open(folder / "dvae.safetensors", framework="pt") as file:
        header = file.metadata()
    assert (header["format"], header["kind"], header["model"]) == ("dalle-reference 1", "openai-dvae", "dvae")
    assert json.loads(header["config"])["code_width"] == 32
    assert json.loads(header["sources"]) == {
        hashlib.sha256((folder / name).read_bytes()).hexdigest(): name for name in ("encoder.pkl", "decoder.pkl")
    }


@pytest.fixture(scope="module")
def flava() -> nn.Module:
    from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

    return randomise(FlavaImageCodebook(FlavaImageCodebookConfig(hidden_size=64, vocab_size=512)))


@pytest.mark.parametrize("form", ["pytorch_model.bin", "model.safetensors", "flava-full.bin"])
def test_flavas_codebook_is_the_dvaes_encoder(flava: Any, tmp_path: Path, form: str, openai: Any) -> None:
    state = flava.state_dict()
    if form.endswith(".safetensors"):
        save_file(state, tmp_path / form)
    elif form.startswith("flava"):
        torch.save(
            {f"image_codebook.{n}": t for n, t in state.items()} | {"logit_scale": torch.ones(())}, tmp_path / form
        )
    else:
        torch.save(state, tmp_path / form)
    alone = convert([tmp_path / form])
    assert (alone.kind, alone.model) == ("flava-codebook", "")
    model = DiscreteVAE(DVAEConfig(**alone.config, code_width=1))
    absent = model.load_state_dict(dict(alone.tensors), strict=False)
    assert not absent.unexpected_keys
    assert all(name.startswith(("decoder.", "quantizer.codebook", "code_bias")) for name in absent.missing_keys)
    images = pictures(32)
    model = small(model)
    with torch.no_grad():
        assert torch.equal(model.encode(images), flava.get_codebook_indices(0.8 * images + 0.1))
        logits = copy.deepcopy(flava).double()(0.8 * images.double() + 0.1).permute(0, 2, 3, 1).flatten(0, 2)
        torch.testing.assert_close(model.double().scores(images.double()), logits, rtol=1e-10, atol=1e-10)
    both = convert([tmp_path / form, openai[2] / "decoder.pkl"])
    assert (both.kind, both.model) == ("flava-codebook", "dvae")
    torch.testing.assert_close(both.tensors["to_scores.bias"], state["blocks.output.conv.bias"])


def test_an_encoder_alone_is_said_to_run_nowhere(openai: Any, tmp_path: Path) -> None:
    run("convert", openai[2] / "encoder.pkl", tmp_path / "out.safetensors")
    with pytest.raises(
        UserError, match="openai-dvae, which can be run by no model of this package alone; wanted a dvae"
    ):
        load_dvae(tmp_path / "out.safetensors", CPU)


# ruDALL-E's transformer.

RU = {
    "num_layers": 4,
    "vocab_size": 30 + 6,
    "hidden_size": 48,
    "num_attention_heads": 3,
    "embedding_dropout_prob": 0.1,
    "attention_dropout_prob": 0.1,
    "output_dropout_prob": 0.1,
    "text_seq_length": 6,
    "image_tokens_per_dim": 13,  # wide enough for 11 x 11 to see the edges
    "image_vocab_size": 40,
    "cogview_sandwich_layernorm": True,
    "cogview_pb_relax": True,
}


def rudalle(**changes: Any) -> Any:
    return randomise(peer("rudalle.dalle.model").DalleModel("cpu", **{**RU, **changes}))


CAPTIONS = torch.tensor([[2, 17, 5, 3, 0, 0], [2, 29, 4, 9, 11, 3], [2, 3, 0, 0, 0, 0]])


def logits_there(model: Any, cells: Tensor) -> Tensor:
    ids = torch.cat([CAPTIONS, cells], dim=1)
    length = model.total_seq_length
    mask = torch.ones(len(ids), 1, length, length, dtype=next(model.parameters()).dtype).tril()
    return model(ids, mask)[0]


@pytest.mark.parametrize("changes", [{}, {"cogview_sandwich_layernorm": False, "cogview_pb_relax": False}])
@pytest.mark.parametrize("version", ["v2", "v3"])
def test_rudalles_transformer_runs_here_as_it_runs_there(tmp_path: Path, version: str, changes: dict) -> None:
    theirs = rudalle(hf_version=version, **changes)
    torch.save(theirs.state_dict(), tmp_path / "model.bin")
    run("convert", tmp_path / "model.bin", tmp_path / "out.safetensors", "--heads", 3)
    ours = load_transformer_alone(tmp_path / "out.safetensors", CPU)
    assert ours.config.sandwich_norm == (not changes)
    cells = torch.randint(40, (3, 169), generator=torch.Generator().manual_seed(2))
    text = caption_tokens(CAPTIONS, ours.config)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        with torch.no_grad():
            wanted = logits_there(theirs.to(CPU, dtype), cells)
            ours_text, ours_image = ours.to(dtype)(text, cells)
        start = 6 if version == "v2" else 5  # the last text position, which predicts the first cell
        torch.testing.assert_close(ours_image, wanted[:, start : start + 169, 36:], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(ours_text, wanted[:, :start, :30], rtol=tolerance, atol=tolerance)
    if version == "v2":  # whose last cell has no place
        with pytest.raises(ValueError, match=r"image_tokens: got shape \(3, 169\), wanted \[3, at most 168\]"):
            ours.hidden(text, cells)


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_rudalles_greedy_generation_token_for_token(tmp_path: Path, version: str) -> None:
    theirs = rudalle(hf_version=version, image_tokens_per_dim=4).double()
    torch.save(theirs.state_dict(), tmp_path / "model.bin")
    found = convert([tmp_path / "model.bin"], kind=f"rudalle-{version}", heads=3)  # its masks fit both generations
    config = TransformerConfig(**{**found.config, "grid": tuple(found.config["grid"])})
    ours = DalleTransformer(config).double()
    ours.load_state_dict(dict(found.tensors))
    cells = torch.empty(3, 0, dtype=torch.int64)
    with torch.no_grad():
        for _ in range(16):
            drawn = logits_there(theirs, cells)[:, -1, 36:].argmax(dim=-1)
            cells = torch.cat([cells, drawn[:, None]], dim=1)
    assert torch.equal(generate(ours, caption_tokens(CAPTIONS, config), seed=0, temperature=0.0), cells)
    assert len(cells.unique()) > 3


def test_rudalle_in_half_precision_and_in_a_wrapper(tmp_path: Path) -> None:
    """As Kandinsky is published: float16, and from its FP16Module, whose prefix goes."""
    state = rudalle(hf_version="v3").half().state_dict()
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "model.bin")
    run("convert", tmp_path / "model.bin", tmp_path / "half.safetensors", "--heads", 3)
    run("convert", tmp_path / "model.bin", tmp_path / "full.safetensors", "--heads", 3, "--dtype", "float32")
    half, full = weights.read(tmp_path / "half.safetensors"), weights.read(tmp_path / "full.safetensors")
    assert {tensor.dtype for tensor in half.tensors.values()} == {torch.float16}
    assert {tensor.dtype for tensor in full.tensors.values()} == {torch.float32}
    for name, tensor in half.tensors.items():
        assert torch.equal(full.tensors[name], tensor.float())
    model = load_transformer_alone(tmp_path / "half.safetensors", CPU)
    assert torch.equal(model.text_head.weight, state["to_logits.1.weight"][:30].float())


def test_published_sizes_of_rudalle_need_no_heads() -> None:
    """The sizes in the converter are those that ruDALL-E publishes."""
    from dalle_reference.convert.rudalle import _HEADS

    published = [entry["model_params"] for entry in peer("rudalle.dalle").MODELS.values()]
    assert len(published) > 4
    assert {(p["num_layers"], p["hidden_size"]): p["num_attention_heads"] for p in published} == _HEADS


def test_what_rudalle_cannot_have_converted_is_said(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"

    def refusal(state: dict[str, Tensor], **options: Any) -> str:
        torch.save(state, path)
        with pytest.raises(UserError) as caught:
            convert([path], **options)
        return str(caught.value)

    state = rudalle(hf_version="v3").state_dict()
    assert "4 layers of width 48 are no published size; give --heads" in refusal(state)
    assert "heads: got 5, wanted a divisor of the width 48" in refusal(state, heads=5)
    assert "its masks are those of rudalle-v3, not of rudalle-v2" in refusal(state, heads=3, kind="rudalle-v2")
    other = {**state, "transformer.row_mask": state["transformer.row_mask"].t()}
    assert "does not tell its generation" in refusal(other, heads=3)
    maskless = {name: tensor for name, tensor in state.items() if not name.endswith("_mask")}
    assert "does not tell its generation; give --kind rudalle-v3" in refusal(maskless, heads=3)
    torch.save(maskless, path)
    assert convert([path], heads=3, kind="rudalle-v3").kind == "rudalle-v3"
    missing = {name: tensor for name, tensor in state.items() if "layers.2.mlp" not in name}
    message = refusal(missing, heads=3)
    assert "not the weights of a ruDALL-E transformer: blocks.2.contract.bias, blocks.2.contract.weight" in message
    assert "missing" in message
    assert "surprise unexpected" in refusal({**state, "surprise": torch.ones(1)}, heads=3)
    assert "the last of its 6 layers attends by columns" in refusal(rudalle(num_layers=6).state_dict(), heads=3)
    with pytest.raises(ValueError, match=r"input_ids: got \[17\] at the first position, wanted 2"):
        caption_tokens(torch.tensor([[17, 2]]), TransformerConfig(text_length=2))
    with pytest.raises(ValueError, match=r"input_ids: got shape \(1, 2\), wanted \[B, 6\]"):
        caption_tokens(torch.tensor([[2, 5]]), TransformerConfig(text_length=6))


# What keeps its own names.


@pytest.mark.parametrize("prefix", ["", "model."])
def test_tamings_gumbel_vqgan(tmp_path: Path, prefix: str) -> None:
    ddconfig = {
        "double_z": False,
        "z_channels": 24,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 1, 2],
        "num_res_blocks": 2,
        "attn_resolutions": [64],
        "dropout": 0.0,
    }
    make: Callable[..., Any] = peer("rudalle.vae.model").GumbelVQ
    theirs = randomise(make(ddconfig=ddconfig, n_embed=50, embed_dim=24))
    state = {prefix + name: tensor for name, tensor in theirs.state_dict().items()}
    state[f"{prefix}loss.discriminator.main.0.weight"] = torch.ones(3)
    checkpoint = {"epoch": 3, "state_dict": state, "hyper_parameters": OmegaConf.create(ddconfig), "callbacks": {}}
    torch.save(checkpoint, tmp_path / "last.ckpt")
    run("convert", tmp_path / "last.ckpt", tmp_path / "out.safetensors")
    found = weights.read(tmp_path / "out.safetensors")
    assert (found.kind, found.model) == ("taming-gumbel", "")
    assert found.config == {"embed_dim": 24, "n_embed": 50, "ddconfig": ddconfig}
    again = make(**found.config).eval()
    again.load_state_dict(dict(found.tensors))
    images = 2 * pictures(32) - 1
    with torch.no_grad():
        tokens = theirs.encode(images, disable_gumbel_softmax=True)[2][2]
        assert torch.equal(again.encode(images, disable_gumbel_softmax=True)[2][2], tokens)
        latents = theirs.quantize.embed(tokens).permute(0, 3, 1, 2)
        assert torch.equal(again.decode(latents), theirs.decode(latents))
    broken = {name: tensor for name, tensor in state.items() if "mid.attn_1.q" not in name}
    torch.save({"state_dict": broken}, tmp_path / "broken.ckpt")
    with pytest.raises(UserError, match=r"Gumbel VQGAN: decoder\.mid\.attn_1\.q\.bias.*encoder.* missing"):
        convert([tmp_path / "broken.ckpt"])


VAE = {"image_size": 16, "num_tokens": 32, "codebook_dim": 12, "num_layers": 2, "hidden_dim": 8}
DALLE = {"num_text_tokens": 20, "text_seq_len": 6, "dim": 32, "depth": 3, "heads": 2, "dim_head": 16}


@pytest.mark.parametrize("blocks", [0, 2])
def test_dalle_pytorchs_vae(tmp_path: Path, blocks: int) -> None:
    settings = {**VAE, "num_resnet_blocks": blocks}
    theirs = randomise(peer("dalle_pytorch").DiscreteVAE(**settings))
    torch.save({"hparams": settings, "weights": theirs.state_dict()}, tmp_path / "vae.pt")
    run("convert", tmp_path / "vae.pt", tmp_path / "out.safetensors")
    found = weights.read(tmp_path / "out.safetensors")
    assert (found.kind, found.model, found.config) == ("dalle-pytorch-vae", "", {"hparams": settings})
    again = peer("dalle_pytorch").DiscreteVAE(**found.config["hparams"])
    again.load_state_dict(dict(found.tensors))
    images = pictures(16)
    with torch.no_grad():
        tokens = theirs.get_codebook_indices(images)
        assert torch.equal(again.get_codebook_indices(images), tokens)
        assert torch.equal(again.decode(tokens), theirs.decode(tokens))
    torch.save({"hparams": {**settings, "num_layers": 3}, "weights": theirs.state_dict()}, tmp_path / "vae.pt")
    with pytest.raises(UserError, match=r"not the weights of DALLE-pytorch's DiscreteVAE: .* missing"):
        convert([tmp_path / "vae.pt"])


VARIANTS = {
    "of every layer type": {"attn_types": ("full", "axial_row", "conv_like")},
    "reversible, shared": {
        "reversible": True,
        "rotary_emb": False,
        "shift_tokens": False,
        "stable": True,
        "sandwich_norm": True,
        "share_input_output_emb": True,
        "shared_attn_ids": (0, 1, 0),
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_dalle_pytorchs_dalle(tmp_path: Path, variant: str) -> None:
    dalle_pytorch = peer("dalle_pytorch")
    settings = {**DALLE, **VARIANTS[variant]}
    theirs = randomise(dalle_pytorch.DALLE(vae=dalle_pytorch.DiscreteVAE(**VAE), **settings))
    optimizer = torch.optim.Adam(theirs.parameters())
    saved = {
        "hparams": settings,
        "vae_params": VAE,
        "epoch": 3,
        "version": "1.6.6",
        "vae_class_name": "DiscreteVAE",
        "weights": theirs.state_dict(),
        "opt_state": optimizer.state_dict(),
        "scheduler_state": None,
    }
    torch.save(saved, tmp_path / "dalle.pt")
    run("convert", tmp_path / "dalle.pt", tmp_path / "out.safetensors")
    found = weights.read(tmp_path / "out.safetensors")
    assert (found.kind, found.model) == ("dalle-pytorch", "")
    assert found.config["vae_params"] == VAE
    assert found.config["version"] == "1.6.6"
    vae = dalle_pytorch.DiscreteVAE(**found.config["vae_params"])
    again = dalle_pytorch.DALLE(vae=vae, **found.config["hparams"]).eval()
    again.load_state_dict(dict(found.tensors))
    text, image = torch.randint(1, 20, (2, 6)), torch.randint(32, (2, 16))
    with torch.no_grad():
        assert torch.equal(again(text, image), theirs(text, image))
    broken = {name: tensor for name, tensor in theirs.state_dict().items() if not name.endswith("to_qkv.weight")}
    torch.save({**saved, "weights": broken}, tmp_path / "dalle.pt")
    with pytest.raises(UserError, match=r"DALLE-pytorch's DALLE: transformer\.layers\..*to_qkv\.weight.* missing"):
        convert([tmp_path / "dalle.pt"])
    torch.save({**saved, "hparams": {**settings, "depth": 10**9}}, tmp_path / "dalle.pt")
    with pytest.raises(UserError, match=r"hparams: depth is 1000000000, wanted an int in 0 \.\. 1000"):
        convert([tmp_path / "dalle.pt"])


# The command.


def test_an_output_is_replaced_only_when_told(openai: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder, out = openai[2] / "encoder.pkl", tmp_path / "out.safetensors"
    out.write_text("mine")
    assert "out.safetensors: is there already; --force replaces it" in refused(capsys, "convert", encoder, out)
    assert out.read_text() == "mine"
    run("convert", encoder, out, "--force")
    assert "openai-dvae" in capsys.readouterr().out
    assert weights.read(out).kind == "openai-dvae"


def test_a_refused_input_leaves_no_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.safetensors"
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pt")
    assert "of no known kind: its tensors are weight; wanted one of openai-dvae" in refused(
        capsys, "convert", tmp_path / "other.pt", out
    )
    assert "absent.pt: no such file" in refused(capsys, "convert", tmp_path / "absent.pt", out)
    assert "files: got 1, wanted at least an input and the output" in refused(capsys, "convert", out)
    torch.save([1, 2], tmp_path / "other.pt")
    assert "holds no tensors" in refused(capsys, "convert", tmp_path / "other.pt", out)
    torch.save(torch.optim.SGD([nn.Parameter(torch.ones(1))]), tmp_path / "other.pt")
    assert "names torch.optim.sgd.SGD" in refused(capsys, "convert", tmp_path / "other.pt", out)
    assert [path.name for path in tmp_path.iterdir()] == ["other.pt"]


def test_halves_that_do_not_belong_together(openai: Any, tmp_path: Path) -> None:
    _, _, folder = openai
    narrow = peer("dall_e").Decoder(n_hid=64, n_blk_per_group=1, vocab_size=512)
    torch.save(narrow, tmp_path / "narrow.pkl")
    with pytest.raises(UserError, match=r"narrow\.pkl: its blocks is 1, that of the other file is 2"):
        convert([folder / "encoder.pkl", tmp_path / "narrow.pkl"])
    with pytest.raises(UserError, match=r"encoder\.pkl: is a second encoder"):
        convert([folder / "encoder.pkl", folder / "encoder.pkl"])
    with pytest.raises(UserError, match="is a decoder alone"):
        convert([folder / "decoder.pkl"])
    other = peer("dall_e").Encoder(n_hid=64, n_blk_per_group=2, vocab_size=512)
    other.blocks.group_1.block_1.post_gain = 1.0
    torch.save(other, tmp_path / "gain.pkl")
    with pytest.raises(UserError, match=r"blocks\.group_1\.block_1\.post_gain is 1\.0, wanted 1 / 8\^2"):
        convert([tmp_path / "gain.pkl"])
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="inputs: got 2 files, wanted one"):
        convert([tmp_path / "a.pt", folder / "encoder.pkl"])
    with pytest.raises(UserError, match=r"kind: got flava-codebook, but .*encoder\.pkl is of kind openai-dvae"):
        convert([folder / "encoder.pkl"], kind="flava-codebook")
    with pytest.raises(UserError, match="heads: got 16, but only ruDALL-E's"):
        convert([folder / "encoder.pkl"], heads=16)


@pytest.mark.parametrize(
    ("option", "message"),
    [({"kind": "clip"}, "kind: got 'clip'"), ({"dtype": "int8"}, "dtype: got"), ({}, "paths: got none")],
)
def test_bad_options(option: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert([], **option)


def test_weights_in_the_wrong_place(openai: Any, tmp_path: Path) -> None:
    file = openai[2] / "dvae.safetensors"
    with pytest.raises(UserError, match="openai-dvae, which runs as a dvae; wanted a transformer"):
        load_transformer_alone(file, CPU)
    with pytest.raises(UserError, match="a file of weights; wanted the folder of a stage 2"):
        load_transformer(file, CPU)
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="no weights of this package"):
        load_dvae(tmp_path / "other.safetensors", CPU)
    (tmp_path / "text").write_text("text")
    with pytest.raises(UserError, match="cannot be read as weights"):
        load_dvae(tmp_path / "text", CPU)


def test_a_configuration_with_other_fields_is_refused(tmp_path: Path) -> None:
    config = to_json(TransformerConfig())
    config.pop("sandwich_norm")
    weights.write(
        tmp_path / "old.safetensors", weights.Weights("rudalle-v3", "transformer", config, {"a": torch.zeros(1)})
    )
    with pytest.raises(UserError, match=r"old\.safetensors: made with another configuration"):
        load_transformer_alone(tmp_path / "old.safetensors", CPU)
