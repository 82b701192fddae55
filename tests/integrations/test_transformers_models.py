"""Every causal model of the installed transformers, made tiny: what ours gives is its own eager attention under the
pattern's dense mask, and no token sees a later one; or it is refused, by one error that says why.
"""

from __future__ import annotations

import copy
import inspect
import re
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dalle_kernels import Row, TokenLayout
from dalle_kernels.integrations.transformers import register

LAYOUT = TokenLayout(8, (4, 4))
LENGTH = LAYOUT.length
MODELS = [
    (kind, name)
    for kind, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
    for name in ((names,) if isinstance(names, str) else names)
]

# What a configuration gets of this, where it has something of that name.
_SIZES: dict[int, str] = {
    64: "vocab_size n_words hidden_size d_model n_embd dim emb_dim embed_dim embedding_size word_embed_proj_dim "
    "ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner intermediate_size max_position_embeddings n_positions n_ctx "
    "vocab_size_per_layer_input sliding_window index_topk mamba_d_ssm ffn_hidden_size",
    32: "moe_intermediate_size shared_expert_intermediate_size mamba_d_head mamba_head_dim qk_head_dim "
    "expert_ffn_hidden_size",
    16: "head_dim global_head_dim q_lora_rank kv_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim rotary_dim "
    "hidden_size_per_layer_input index_head_dim mamba_d_state linear_key_head_dim linear_value_head_dim",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_experts "
    "num_local_experts n_routed_experts mamba_n_heads mamba_num_heads linear_num_key_heads linear_num_value_heads",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers eos_token_id "
    "num_encoder_layers num_key_value_heads num_global_key_value_heads num_experts_per_tok top_k moe_topk "
    "index_n_heads type_vocab_size zero_expert_num",
    1: "n_group topk_group bos_token_id first_k_dense_replace",
    0: "pad_token_id num_kv_shared_layers",
}
SIZES: dict[str, Any] = {name: size for size, names in _SIZES.items() for name in names.split()} | {
    "is_decoder": True,
    "add_cross_attention": False,
    "attention_dropout": 0.0,
    "attn_pdrop": 0.0,
    "rotary_pct": 1.0,
}


def _all(names: str, value: Any) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


LATENT = {"num_key_value_heads": 4}  # multi-head latent attention has no groups
OTHERS: dict[str, dict[str, Any]] = {
    **_all("axk1 bailing_hybrid deepseek_v2 deepseek_v3 glm4_moe_lite kimi_linear", LATENT),
    **_all("longcat_flash minicpm3 sarvam_mla youtu", LATENT),
    "bamba": {"num_hidden_layers": 2, "attn_layer_indices": [1]},
    "dots1": {"n_shared_experts": 1},
    "falcon_h1": {"mamba_d_head": 16},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "gpt_neo": {"attention_types": [[["global"], 2]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 32},
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [4, 6], "attn_layers": ["local"]},
    "roc_bert": {
        "pronunciation_vocab_size": 16,
        "shape_vocab_size": 16,
        "pronunciation_embed_dim": 16,
        "shape_embed_dim": 16,
    },
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}

OWN = "has no attention that goes by name, so that the dalle_kernels patterns cannot take its place"
TAKES_THE_MASK = "computes attention itself, not by the name that it was given"
REFUSED = {
    **_all("big_bird bloom cpmant falcon gpt_neo gpt_neox_japanese megatron-bert mpt mvp", OWN),
    **_all("openai-gpt prophetnet reformer rembert roformer trocr xglm xlm xlnet", OWN),
    **_all("falcon_mamba mamba mamba2 rwkv xlstm", OWN),  # they have no attention at all
    **_all("axk2 deepseek_v32 doge glm_moe_dsa hy_v4", TAKES_THE_MASK),
    **_all("deepseek_v4 flint gpt_oss granite_swa granitemoe_swa", "s_aux: .* passes one"),
    **_all("inkling2_text inkling2_loop_text", "sinks: .* passes one"),
    "inkling_text": "position_bias: .* passes one",
    "bigbird_pegasus": "BigBirdPegasusDecoderAttention is not causal",
}
# Models of models, whose language model is tried under its own name, and those that a few numbers do not make small.
NOT_TINY = _all(
    "blt cohere_compass_text dbrx dots3_note dots3_note_text fuyu gemma3 gemma3n gemma4 gemma4_assistant "
    "gemma4_unified gemma4_unified_assistant git got_ocr2 moss_transcribe_diarize musicgen "
    "musicgen_melody phi4_multimodal qwen4_exp qwen4_exp_text zamba zamba2",
    None,
)


def tiny(kind: str, model: Any) -> Any:
    plain = model.config_class()
    known = {*vars(plain), *inspect.signature(model.config_class.__init__).parameters}
    changes = {name: size for name, size in SIZES.items() if name in known}
    layers = getattr(plain, "layer_types", None)
    stored = model.config_class.attribute_map.get("layer_types", "layer_types")
    if layers and not isinstance(inspect.getattr_static(model.config_class, stored, None), property):
        changes["layer_types"] = ["full_attention"] * 2 if "full_attention" in layers else [*dict.fromkeys(layers)] * 2
        changes["layer_types"] = changes["layer_types"][:2]
    return model.config_class(**changes | OTHERS.get(kind, {}))


def make(model: Any, config: Any, name: str) -> Any:
    return model._from_config(copy.deepcopy(config), attn_implementation=name).eval().float()


@pytest.fixture(autouse=True)
def registered(attention_names: None) -> None:
    register(LAYOUT)


@pytest.mark.parametrize(("kind", "name"), MODELS, ids=[kind for kind, _ in MODELS])
def test_right_or_refused(kind: str, name: str) -> None:
    if kind in NOT_TINY:
        pytest.skip("not made small by a few numbers of its configuration")
    model = getattr(transformers, name)
    config = tiny(kind, model)
    eager = make(model, config, "eager")
    assert sum(parameter.numel() for parameter in eager.parameters()) < 2e7
    torch.manual_seed(0)
    for parameter in eager.parameters():
        if parameter.dim() > 1:  # sharper attention than fresh weights give: errors would show
            torch.nn.init.normal_(parameter, std=0.15)
    ids = torch.randint(3, 50, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    if kind in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[kind]):
            make(model, config, "dalle_row")(ids, use_cache=False)
        return
    ours = make(model, config, "dalle_row")
    ours.load_state_dict(eager.state_dict())
    later = ids.clone()
    later[:, -1] = (ids[:, -1] + 7) % 47 + 3
    with torch.no_grad():
        got, changed, dense = run(ours, ids), run(ours, later), run(eager, ids)
        wanted = run(eager, ids, attention_mask=mask_of(Row(LAYOUT), len(ids)))
    size = wanted.abs().max()
    assert (got[:, :-1] - changed[:, :-1]).abs().max() < 1e-5 * size, "a later token was seen"
    assert (got - wanted).abs().max() < 1e-4 * size
    assert (got - dense).abs().max() > 1e-3 * size, "the pattern makes no difference"
    with pytest.raises(ValueError, match="output_attentions: got True"):
        run(ours, ids, output_attentions=True)


def run(model: Any, ids: Tensor, **named: Any) -> Tensor:
    if "position_ids" in inspect.signature(model.forward).parameters:  # some would count them from the mask
        named["position_ids"] = torch.arange(LENGTH).expand(len(ids), -1)
    return model(ids, use_cache=False, **named).logits


def mask_of(pattern: Row, batch: int) -> Tensor:
    """What is added to the scores, float32 [batch, 1, S, S]."""
    seen = pattern.mask()[None, None].expand(batch, 1, -1, -1)
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


def test_the_lists_name_models_that_there_are() -> None:
    kinds = {kind for kind, _ in MODELS}
    assert kinds.issuperset(REFUSED)
    assert kinds.issuperset(NOT_TINY)


def test_a_refused_model_can_be_switched_to_no_name_of_ours() -> None:
    bloom = transformers.BloomForCausalLM
    model = make(bloom, tiny("bloom", bloom), "eager")
    with pytest.raises(ValueError, match=re.escape("attn_implementation")):
        make(bloom, tiny("bloom", bloom), "dalle")
    model.set_attn_implementation("dalle")  # transformers logs that it does not, and keeps what there was
    assert model.config._attn_implementation == "eager"
