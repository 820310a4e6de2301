"""Models that read images or sound beside text: a tower encodes them, and its output stands among
the tokens.

Some towers have hook points, others TransformerLens wraps as a whole.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import transformers
from tiny import BART, N_HEADS, SIZE, VOCAB, Case, Inputs, noise, of_class, tokens
from torch import Tensor
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter

PLACEHOLDER = 3
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": N_HEADS,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
}
SPEECH = {
    "num_mel_bins": 16,
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": N_HEADS,
    "encoder_ffn_dim": 64,
    "max_source_positions": 20,
}
# Windows of 4 x 4 patches, and a second stage with twice the heads.
WINDOWS = {
    "depths": [1, 1],
    "patch_size": [7, 3],
    "patch_stride": [4, 2],
    "patch_padding": [3, 1],
    "patch_prenorm": [False, True],
    "embed_dim": [16, 32],
    "num_heads": [2, 4],
    "num_groups": [2, 4],
    "window_size": 4,
    "projection_dim": 32,
    "max_temporal_embeddings": 4,
    "max_position_embeddings": 20,
}
QWEN2 = SIZE | {"num_key_value_heads": 2}
# Patches of all images in one sequence; windows of 2 x 2 patches in the first layer.
PACKED = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": N_HEADS,
    "intermediate_size": 64,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 8,
    "fullatt_block_indexes": [1],
    "out_hidden_size": 32,
}
LLAMA4 = SIZE | {
    "head_dim": 8,
    "num_key_value_heads": 2,
    "intermediate_size_mlp": 64,
    "num_local_experts": 2,
    "attention_chunk_size": 4,
}


def prompts(n_places: int) -> Tensor:
    """Two prompts, each with places for what a tower gives."""
    text = tokens(length=6)
    places = torch.full((len(text), n_places), PLACEHOLDER)
    return torch.cat([text[:, :2], places, text[:, 2:]], dim=1)


def llava_inputs() -> Inputs:
    """A place for each patch."""
    return (prompts(16),), {"pixel_values": noise(2, 3, 16, 16)}


def mistral3_inputs() -> Inputs:
    """A place for each square of four patches."""
    sizes = torch.tensor([[16, 16], [16, 16]])
    return (prompts(4),), {"pixel_values": noise(2, 3, 16, 16), "image_sizes": sizes}


def llama4_inputs() -> Inputs:
    """The same, for images that all have one size."""
    return (prompts(4),), {"pixel_values": noise(2, 3, 16, 16)}


def packed_inputs() -> Inputs:
    """16 patches of one image and 8 of another in one row; a place for each square of four."""
    ids = prompts(4)
    ids[1, 4:6] = PLACEHOLDER + 1
    return (ids,), {
        "pixel_values": noise(24, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 2, 4]]),
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == PLACEHOLDER).long(),
    }


def speech_inputs() -> Inputs:
    """Two recordings; each place stands for four steps of a spectrogram."""
    ids = prompts(10)
    lengths = torch.ones(2, 40, dtype=torch.long)
    return (ids,), {
        "input_features": noise(2, 16, 40),
        "feature_attention_mask": lengths,
        "attention_mask": torch.ones_like(ids),
    }


def florence_inputs() -> Inputs:
    """Images beside text for the encoder, text for the decoder."""
    kwargs = {"pixel_values": noise(2, 3, 16, 16), "decoder_input": tokens(length=7, seed=1)}
    return (prompts(5),), kwargs


def florence() -> Any:
    """A model whose tower attends in windows, with other numbers of heads than its text has."""
    text = transformers.BartConfig(**BART).to_dict()
    build = of_class(
        "Florence2ForConditionalGeneration",
        "Florence2Config",
        text_config=text,
        vision_config=WINDOWS,
        image_token_id=PLACEHOLDER,
    )
    return build()


def qwen2_5_vl() -> Any:
    """A tower that runs a softmax for each image or window of the row."""
    build = of_class(
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        text_config=QWEN2 | {"rope_parameters": {"rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
        vision_config=PACKED,
        image_token_id=PLACEHOLDER,
        video_token_id=VOCAB - 1,
        vision_start_token_id=VOCAB - 2,
        vision_end_token_id=VOCAB - 3,
    )
    # TransformerLens asks for torchvision, which only prepares images.
    with mock.patch.object(ArchitectureAdapter, "_check_required_libraries"):
        return build()


CASES = [
    Case(
        "llava",
        of_class(
            "LlavaForConditionalGeneration",
            "LlavaConfig",
            text_config=transformers.LlamaConfig(**SIZE),
            vision_config=transformers.CLIPVisionConfig(**VISION),
            image_token_index=PLACEHOLDER,
            vision_feature_layer=-1,
        ),
        llava_inputs,
        {"vision_encoder.encoder_layers": "softmax", "": "scores"},
        is_shown=True,
    ),
    Case(
        "mistral3",
        of_class(
            "Mistral3ForConditionalGeneration",
            "Mistral3Config",
            text_config=transformers.MistralConfig(**QWEN2),
            vision_config=transformers.PixtralVisionConfig(**VISION),
            image_token_index=PLACEHOLDER,
            spatial_merge_size=2,
        ),
        mistral3_inputs,
        {"": "scores", "vision_encoder.transformer.layers": "softmax"},
        is_shown=True,
    ),
    Case(
        "llama4_vision",
        of_class(
            "Llama4ForConditionalGeneration",
            "Llama4Config",
            text_config=LLAMA4,
            vision_config=VISION
            | {
                "intermediate_size": 128,
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
            },
            image_token_index=PLACEHOLDER,
        ),
        llama4_inputs,
        {"": "softmax", "vision_encoder.model.layers": "softmax"},
        is_shown=True,
    ),
    Case(
        "qwen2_audio",
        of_class(
            "Qwen2AudioForConditionalGeneration",
            "Qwen2AudioConfig",
            text_config=transformers.Qwen2Config(**QWEN2).to_dict(),
            audio_config=SPEECH,
            audio_token_index=PLACEHOLDER,
        ),
        speech_inputs,
        {"": "scores", "audio_encoder.layers": "softmax"},
        is_shown=True,
    ),
    Case(
        "qwen2_5_vl",
        qwen2_5_vl,
        packed_inputs,
        {"vision_encoder.blocks": "softmax", "": "softmax"},
        is_shown=True,
    ),
]
