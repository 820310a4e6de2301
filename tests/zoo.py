"""One table of architectures, which all tests that range over architectures go through.

Each case says how to build its model, what to feed it, and where its attention is expected:
stack by stack, the level, and the layers that have attention.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import towers
import transformers
from tiny import (
    BART,
    GPT,
    N_HEADS,
    PAIR_STACKS,
    SIZE,
    SPECIAL,
    T5,
    VOCAB,
    Case,
    decoder,
    image_inputs,
    native,
    of_class,
    pair,
    pair_inputs,
    reader,
    spectrogram_inputs,
    text_inputs,
    wave_inputs,
)

import sat_lens as sl

GQA = {"num_key_value_heads": 2}
WIDE = {"head_dim": 8, "num_key_value_heads": 2}
WINDOW = {"sliding_window": 4}
BOTH_KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
GEMMA = {**BOTH_KINDS, "query_pre_attn_scalar": 8, **WIDE}
TOP_2 = {"num_experts_per_tok": 2}
MOE = {"num_experts": 4, "moe_intermediate_size": 16, **TOP_2}
LOCAL_MOE = {"num_local_experts": 4, **TOP_2}
ROUTED_MOE = {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    **TOP_2,
}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": N_HEADS,
}
DEEPSEEK = {"first_k_dense_replace": 2, **ROUTED_MOE, **LATENT}
DENSE = {"mlp_layer_types": ["dense", "dense"]}
MAMBA = {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_n_groups": 1}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
CONVOLUTION = {"layer_types": ["conv", "full_attention"]}
IMAGE = {**SIZE, "image_size": 16, "patch_size": 4}
AUDIO = {
    **SIZE,
    "conv_dim": (16, 16),
    "conv_stride": (10, 8),
    "conv_kernel": (10, 8),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
}
SPECTROGRAM = {
    **SIZE,
    "num_mel_bins": 16,
    "max_length": 24,
    "patch_size": 8,
    "frequency_stride": 8,
    "time_stride": 8,
}
GPT_NEO = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": N_HEADS,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 4,
}
XGLM = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "ffn_dim": 64,
    "num_layers": 2,
    "attention_heads": N_HEADS,
    "max_position_embeddings": 64,
}
BLOOM = {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": N_HEADS}
MPT = {"vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "n_heads": N_HEADS, "max_seq_len": 64}
LAST = (1,)


def t5gemma() -> Any:
    """Encoder and decoder as Gemma-2 has them, cross attention apart."""
    part = transformers.T5GemmaModuleConfig(**SIZE, **GEMMA)
    build = of_class(
        "T5GemmaForConditionalGeneration",
        "T5GemmaConfig",
        encoder=part,
        decoder=part,
        vocab_size=VOCAB,
    )
    return build()


def t5gemma2() -> Any:
    """A decoder whose one softmax ranges over its own keys and those of the encoder."""
    size = SIZE | GEMMA
    vision = {k: v for k, v in IMAGE.items() if k not in SPECIAL and k != "vocab_size"}
    encoder = transformers.T5Gemma2EncoderConfig(
        text_config=size, vision_config=vision, mm_tokens_per_image=4
    )
    build = of_class(
        "T5Gemma2ForConditionalGeneration",
        "T5Gemma2Config",
        encoder=encoder,
        decoder=transformers.T5Gemma2DecoderConfig(**size),
        vocab_size=VOCAB,
    )
    return build()


CASES = [
    # Decoders whose attention TransformerLens computes itself, from scores to pattern.
    reader("gpt2", "GPT2LMHeadModel", "GPT2Config", "scores", settings=GPT),
    decoder("gpt_bigcode", "GPTBigCode", size=GPT),
    reader("openai_gpt", "OpenAIGPTLMHeadModel", "OpenAIGPTConfig", "scores", settings=GPT),
    decoder("codegen", "CodeGen", size=GPT, rotary_dim=4),
    decoder("gpt_neox", "GPTNeoX"),
    decoder("llama", "Llama", **GQA),
    decoder("mistral_window", "Mistral", **WINDOW, **WIDE),
    decoder("ministral3", "Ministral3", **WIDE),
    decoder("mixtral", "Mixtral", **LOCAL_MOE, **GQA),
    decoder("qwen2", "Qwen2", **GQA),
    decoder("qwen2_moe", "Qwen2Moe", shared_expert_intermediate_size=16, **GQA, **MOE),
    decoder("qwen3", "Qwen3", **WIDE),
    decoder("qwen3_moe", "Qwen3Moe", **WIDE, **MOE),
    decoder("gemma", "Gemma", **WIDE),
    decoder("gemma2_soft_cap", "Gemma2", attn_logit_softcapping=0.5, **GEMMA),
    reader("gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", "scores", settings=SIZE | GEMMA),
    decoder("vaultgemma", "VaultGemma", **GEMMA),
    decoder("phi", "Phi", **GQA),
    decoder("phi3", "Phi3", **GQA),
    decoder("olmo", "Olmo", **GQA),
    decoder("olmo2", "Olmo2", **GQA),
    decoder("olmo3", "Olmo3", **BOTH_KINDS, **GQA),
    decoder("olmoe", "Olmoe", num_experts=4, **TOP_2, **GQA),
    decoder("flex_olmo", "FlexOlmo", num_experts=4, **TOP_2, **GQA),
    decoder("granite", "Granite", **GQA),
    decoder("granitemoe", "GraniteMoe", **LOCAL_MOE, **GQA),
    decoder("cohere", "Cohere", **GQA),
    decoder("cohere2", "Cohere2", **BOTH_KINDS, **GQA),
    decoder("stablelm", "StableLm", **GQA),
    decoder("starcoder2", "Starcoder2", **GQA),
    decoder("smollm3", "SmolLM3", **GQA),
    decoder("glm", "Glm", **WIDE),
    decoder("glm4", "Glm4", **WIDE),
    decoder("glm4_moe", "Glm4Moe", **ROUTED_MOE, **WIDE),
    decoder("glm4_moe_lite", "Glm4MoeLite", **DENSE, **ROUTED_MOE, **LATENT),
    decoder(
        "glm_moe_dsa",
        "GlmMoeDsa",
        index_topk=4,
        index_n_heads=2,
        index_head_dim=8,
        **DENSE,
        **ROUTED_MOE,
        **LATENT,
    ),
    decoder("nemotron", "Nemotron", **WIDE),
    decoder("seed_oss", "SeedOss", **WIDE),
    decoder("arcee", "Arcee", **WIDE),
    decoder("apertus", "Apertus", **GQA),
    decoder("bitnet", "BitNet", **GQA),
    decoder("ernie4_5", "Ernie4_5", **WIDE),
    decoder(
        "ernie4_5_moe", "Ernie4_5_Moe", moe_num_experts=4, moe_k=2, moe_intermediate_size=16, **GQA
    ),
    decoder("minimax_m2", "MiniMaxM2", rotary_dim=4, **LOCAL_MOE, **WIDE),
    decoder("hunyuan", "HunYuanDenseV1", **WIDE),
    decoder("exaone4", "Exaone4", **BOTH_KINDS, **WIDE),
    decoder("jais2", "Jais2", **GQA),
    decoder("youtu", "Youtu", **DEEPSEEK),
    decoder("deepseek_v2", "DeepseekV2", **DEEPSEEK),
    decoder("deepseek_v3", "DeepseekV3", **DEEPSEEK),
    decoder("bloom", "Bloom", size=BLOOM),
    decoder("mpt", "Mpt", size=MPT),
    decoder("falcon_alibi", "Falcon", alibi=True),
    decoder("falcon_rope", "Falcon", alibi=False),
    # Attention in some layers, something else in the others.
    decoder(
        "qwen3_next",
        "Qwen3Next",
        layers=LAST,
        shared_expert_intermediate_size=16,
        **LINEAR,
        **WIDE,
        **MOE,
    ),
    reader(
        "qwen3_5", "Qwen3_5ForCausalLM", "Qwen3_5TextConfig", "scores", LAST, SIZE | LINEAR | WIDE
    ),
    reader(
        "qwen3_5_moe",
        "Qwen3_5MoeForCausalLM",
        "Qwen3_5MoeTextConfig",
        "scores",
        LAST,
        SIZE | LINEAR | WIDE | MOE | {"shared_expert_intermediate_size": 16},
    ),
    decoder("olmo_hybrid", "OlmoHybrid", "softmax", layers=LAST, **LINEAR, **GQA),
    decoder("lfm2", "Lfm2", layers=LAST, **CONVOLUTION, **GQA),
    decoder("lfm2_moe", "Lfm2Moe", layers=LAST, num_dense_layers=1, **CONVOLUTION, **MOE, **GQA),
    decoder("bamba", "Bamba", layers=LAST, attn_layer_indices=[1], mamba_d_head=16, **MAMBA, **GQA),
    decoder(
        "granite_moe_hybrid",
        "GraniteMoeHybrid",
        layers=LAST,
        layer_types=["mamba", "attention"],
        position_embedding_type="rope",
        num_local_experts=4,
        mamba_d_head=16,
        **MAMBA,
        **GQA,
    ),
    decoder("falcon_h1", "FalconH1", mamba_d_head=8, mamba_d_ssm=32, **MAMBA, **WIDE),
    decoder(
        "jamba",
        "Jamba",
        "softmax",
        layers=LAST,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=4,
        mamba_dt_rank=4,
        num_experts=2,
        use_mamba_kernels=False,
        **GQA,
    ),
    # The same, where TransformerLens wraps all layers alike and shows no attention.
    decoder(
        "nemotron_h",
        "NemotronH",
        "softmax",
        layers=LAST,
        layer_types=["mamba", "attention"],
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=1,
        **WIDE,
    ),
    decoder(
        "recurrent_gemma",
        "RecurrentGemma",
        "softmax",
        layers=LAST,
        num_key_value_heads=1,
        lru_width=32,
        attention_window_size=4,
        block_types=["recurrent", "attention"],
    ),
    # One block of attention that two layers share.
    decoder(
        "zamba2",
        "Zamba2",
        "softmax",
        layers=(1, 2),
        size=SIZE | {"num_hidden_layers": 3},
        layers_block_type=["mamba", "hybrid", "hybrid"],
        mamba_d_state=8,
        mamba_headdim=16,
        n_mamba_heads=4,
        mamba_ngroups=1,
        num_mem_blocks=1,
        use_mem_rope=True,
    ),
    # Layers that run several times per forward pass.
    Case(
        "hrm_text",
        of_class("HrmTextForCausalLM", "HrmTextConfig", **SIZE, **WIDE),
        text_inputs,
        {"L_blocks": "scores", "H_blocks": "scores"},
    ),
    # Attention that Hugging Face's own code computes, or that has a learned sink.
    decoder("gpt_oss_sink", "GptOss", "softmax", **BOTH_KINDS, **LOCAL_MOE, **WIDE),
    # Keys of whole blocks beside single ones, and residual streams that softmax mixes as well.
    decoder(
        "deepseek_v4",
        "DeepseekV4",
        "softmax",
        num_key_value_heads=1,
        head_dim=8,
        q_lora_rank=16,
        o_lora_rank=8,
        o_groups=2,
        qk_rope_head_dim=4,
        n_routed_experts=4,
        moe_intermediate_size=16,
        sliding_window=4,
        index_n_heads=2,
        index_head_dim=8,
        index_topk=4,
        **TOP_2,
    ),
    decoder("gptj", "GPTJ", "softmax", size=GPT, rotary_dim=4),
    decoder("gpt_neo", "GPTNeo", "softmax", size=GPT_NEO),
    decoder(
        "opt", "OPT", "softmax", ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64
    ),
    decoder("xglm", "XGLM", "softmax", size=XGLM),
    reader(
        "gemma4_text",
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        "softmax",
        settings=SIZE | WINDOW | WIDE | {"global_head_dim": 8},
    ),
    reader(
        "llama4",
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        "softmax",
        settings=SIZE
        | WIDE
        | {
            "intermediate_size_mlp": 64,
            "num_local_experts": 2,
            "attention_chunk_size": 4,
            "no_rope_layers": [1, 0],
        },
    ),
    decoder("jetmoe", "JetMoe", "softmax", kv_channels=8, **GQA, **LOCAL_MOE),
    decoder("nanochat", "NanoChat", "softmax", **GQA),
    decoder("afmoe", "Afmoe", "softmax", num_dense_layers=1, **BOTH_KINDS, **MOE, **WIDE),
    decoder("laguna", "Laguna", "softmax", **MOE, **WIDE),
    decoder(
        "modernbert_decoder",
        "ModernBertDecoder",
        "softmax",
        local_attention=4,
        global_attn_every_n_layers=2,
    ),
    reader(
        "bert_decoder",
        "BertLMHeadModel",
        "BertConfig",
        "softmax",
        settings=SIZE | {"is_decoder": True},
    ),
    # Encoders.
    reader("bert", "BertForMaskedLM", "BertConfig", "softmax"),
    reader("roberta", "RobertaForMaskedLM", "RobertaConfig", "softmax"),
    Case(
        "vit",
        of_class("ViTForImageClassification", "ViTConfig", **IMAGE),
        image_inputs,
        {"": "softmax"},
    ),
    Case(
        "deit",
        of_class("DeiTForImageClassification", "DeiTConfig", **IMAGE),
        image_inputs,
        {"": "softmax"},
    ),
    Case("hubert", of_class("HubertForCTC", "HubertConfig", **AUDIO), wave_inputs, {"": "softmax"}),
    Case(
        "wav2vec2",
        of_class("Wav2Vec2ForCTC", "Wav2Vec2Config", **AUDIO),
        wave_inputs,
        {"": "softmax"},
    ),
    Case(
        "ast",
        of_class("ASTForAudioClassification", "ASTConfig", **SPECTROGRAM),
        spectrogram_inputs,
        {"": "softmax"},
    ),
    # Encoder-decoders.
    pair("t5", "T5", T5),
    pair("mt5", "MT5", T5),
    pair("longt5_local", "LongT5", T5, local_radius=3),
    pair(
        "longt5_global",
        "LongT5",
        T5,
        local_radius=3,
        global_block_size=2,
        encoder_attention_type="transient-global",
    ),
    pair(
        "switch",
        "SwitchTransformers",
        T5,
        num_experts=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
    ),
    Case(
        "t5gemma",
        t5gemma,
        pair_inputs,
        {"encoder": "scores", "decoder": "scores", "cross": "softmax"},
    ),
    Case("t5gemma2", t5gemma2, pair_inputs, {"encoder": "softmax", "decoder": "softmax"}),
    pair("bart", "Bart", BART),
    pair("mbart", "MBart", BART),
    pair("m2m100", "M2M100", BART),
    pair("blenderbot", "Blenderbot", BART),
    pair("pegasus", "Pegasus", BART),
    pair(
        "led",
        "LED",
        BART,
        attention_window=4,
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
    ),
    Case(
        "marian",
        of_class("MarianMTModel", "MarianConfig", **BART),
        pair_inputs,
        dict.fromkeys(PAIR_STACKS, "softmax"),
    ),
    # TransformerLens's own models.
    Case("native", native, text_inputs, {"": "softmax"}),
    Case(
        "native_rotary_gqa_cap",
        lambda: native(
            positional_embedding_type="rotary",
            rotary_dim=8,
            n_key_value_heads=2,
            attn_scores_soft_cap=5.0,
        ),
        text_inputs,
        {"": "softmax"},
    ),
    Case(
        "native_bidirectional",
        lambda: native(attention_dir="bidirectional"),
        text_inputs,
        {"": "softmax"},
    ),
    Case(
        "native_attn_only", lambda: native(attn_only=True, d_mlp=None), text_inputs, {"": "softmax"}
    ),
    *towers.CASES,
]


# One of each way to build blocks and attention: what sweeps are compared with whole passes on.
MAKES = [
    "gpt2",
    "llama",
    "gpt_neox",
    "gptj",
    "bert",
    "olmo2",
    "t5",
    "native",
    "opt",
    "gpt_oss_sink",
]

# One case of each kind; `make test` runs these, `make test-all` the others too.
EVERYDAY = {
    *("gpt2", "llama", "native"),  # decoders: plain, with shared keys, TransformerLens's own
    *("opt", "gpt_oss_sink", "deepseek_v4"),  # computed elsewhere, with a sink, with keys of blocks
    *("qwen3_next", "jamba", "zamba2", "hrm_text"),  # hybrid at each level, shared block, loops
    *("bert", "vit", "wav2vec2"),  # encoders of text, images and sound
    *("t5", "t5gemma", "led"),  # encoder-decoders: one level, two levels, windows
    *("llava", "qwen2_5_vl"),  # towers: one softmax a layer, one for each window
}


def everyday_cases(chosen: Callable[[Case], bool] = lambda case: True) -> list[Any]:
    """All cases as parameters, marked slow but for one of each kind."""
    return [
        pytest.param(
            found, id=found.name, marks=[] if found.name in EVERYDAY else [pytest.mark.slow]
        )
        for found in CASES
        if chosen(found)
    ]


def everyday_names(chosen: Callable[[Case], bool]) -> list[Any]:
    """The same by name."""
    return [
        pytest.param(found.values[0].name, marks=found.marks) for found in everyday_cases(chosen)
    ]


@functools.cache
def model_of(name: str) -> Any:
    """The model of a case, built once per session."""
    model = case(name).build()
    if case(name).is_shown:
        args, kwargs = case(name).inputs()
        sl.attention_sites(model, *args, **kwargs)
    return model


def case(name: str) -> Case:
    """The case of that name."""
    return next(found for found in CASES if found.name == name)
