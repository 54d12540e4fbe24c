"""Tiny pipelines of the families that people use, whole: text encoders, tokenizers and autoencoders are real classes.

They can be saved and loaded again. `FAMILIES` has what makes each, and how it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor

import tiny_pipelines as tiny
from tiny_networks import WIDTH as POOLED
from tiny_networks import XL, ready, small

WIDTH, TOKENS = 32, 8
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]


def t5(kind: str = "T5") -> Any:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=40, d_model=WIDTH, d_ff=16, d_kv=4, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return ready(getattr(transformers, f"{kind}EncoderModel")(config))


def t5_tokenizer() -> Any:
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -5.0), ("▁", -2.0), *((letter, -2.0) for letter in LETTERS)]
    return transformers.T5Tokenizer(vocab=words, extra_ids=0, model_max_length=TOKENS)


def texts(layers: int = 2, projection: bool = False) -> dict[str, Any]:
    """Both CLIPs with their tokenizers; `projection`: of the first one too."""
    first, second = tiny.clip(layers, projection), tiny.clip(layers, projection=True)
    tokenizers = {"tokenizer": tiny.tokenizer(), "tokenizer_2": tiny.tokenizer()}
    return {"text_encoder": first, "text_encoder_2": second, **tokenizers}


def stable_diffusion_xl() -> Any:
    return tiny.stable_diffusion_xl(unet=tiny.text_unet(**XL | {"cross_attention_dim": 2 * POOLED}), **texts())


def playground() -> Any:
    """SDXL with EDM's noise."""
    pipe = stable_diffusion_xl()
    pipe.scheduler = diffusers.EDMDPMSolverMultistepScheduler()
    return pipe


def stable_diffusion_3() -> Any:
    transformer = small("SD3Transformer2DModel", joint_attention_dim=WIDTH, pooled_projection_dim=2 * POOLED)
    return tiny.stable_diffusion_3(
        transformer=transformer, text_encoder_3=t5(), tokenizer_3=t5_tokenizer(), **texts(projection=True)
    )


def flux() -> Any:
    transformer = small(
        "FluxTransformer2DModel", joint_attention_dim=WIDTH, pooled_projection_dim=POOLED, guidance_embeds=True
    )
    return tiny.flux(
        transformer=transformer, text_encoder=tiny.clip(), tokenizer=tiny.tokenizer(), text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
    )  # fmt: skip


def qwen_image() -> Any:
    transformer = small("QwenImageTransformer2DModel", in_channels=16, out_channels=4, joint_attention_dim=16)
    text = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 40, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}, "rope_theta": 1e6,
    }  # fmt: skip
    sight = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    encoder = transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(text_config=text, vision_config=sight)
    )
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "Ġ", *LETTERS]
    tokenizer = transformers.Qwen2Tokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])
    return diffusers.QwenImagePipeline(
        scheduler=tiny.flow(use_dynamic_shifting=True), vae=small("AutoencoderKLQwenImage"),
        text_encoder=ready(encoder), tokenizer=tokenizer, transformer=transformer,
    )  # fmt: skip


def sana() -> Any:
    config = transformers.Gemma2Config(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=0, eos_token_id=1, bos_token_id=2, query_pre_attn_scalar=8,
    )  # fmt: skip
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", *LETTERS]
    tokenizer = transformers.GemmaTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])
    return diffusers.SanaPipeline(
        tokenizer=tokenizer, text_encoder=ready(transformers.Gemma2Model(config)), vae=small("AutoencoderDC"),
        transformer=small("SanaTransformer2DModel", caption_channels=16, sample_size=8), scheduler=tiny.flow(),
    )  # fmt: skip


def wan() -> Any:
    return diffusers.WanPipeline(
        tokenizer=t5_tokenizer(), text_encoder=t5("UMT5"), vae=small("AutoencoderKLWan"), scheduler=tiny.flow(),
        transformer=small("WanTransformer3DModel", text_dim=WIDTH),
        transformer_2=small("WanTransformer3DModel", text_dim=WIDTH), boundary_ratio=0.5,
    )  # fmt: skip


def pixart() -> Any:
    transformer = small("PixArtTransformer2DModel", caption_channels=WIDTH, use_additional_conditions=False)
    return diffusers.PixArtSigmaPipeline(
        tokenizer=t5_tokenizer(), text_encoder=t5(), vae=tiny.vae(), transformer=transformer, scheduler=tiny.betas(),
    )  # fmt: skip


def ltx() -> Any:
    return diffusers.LTXPipeline(
        scheduler=tiny.flow(), vae=small("AutoencoderKLLTXVideo"), text_encoder=t5(), tokenizer=t5_tokenizer(),
        transformer=small("LTXVideoTransformer3DModel"),
    )  # fmt: skip


SMALL = {"height": 16, "width": 16}
FAMILIES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "sd15": (tiny.stable_diffusion, {"guidance_scale": 3.0, "negative_prompt": "bad", **SMALL}),
    "sdxl": (stable_diffusion_xl, {"guidance_scale": 3.0, "negative_prompt": "bad", **SMALL}),
    "playground": (playground, {"guidance_scale": 3.0, **SMALL}),
    "sd35": (stable_diffusion_3, {"guidance_scale": 3.0, "max_sequence_length": TOKENS, **SMALL}),
    "flux": (flux, {"guidance_scale": 3.5, "max_sequence_length": TOKENS, **SMALL}),
    "qwen-image": (qwen_image, {"true_cfg_scale": 4.0, "negative_prompt": " ", **SMALL}),
    "sana": (
        sana,
        {"guidance_scale": 4.5, "use_resolution_binning": False, "complex_human_instruction": None,
         "max_sequence_length": TOKENS, "height": 32, "width": 32},
    ),
    "wan": (
        wan,
        {"guidance_scale": 4.0, "guidance_scale_2": 3.0, "num_frames": 5, "max_sequence_length": TOKENS, **SMALL},
    ),
    "pixart": (pixart, {"use_resolution_binning": False, "max_sequence_length": TOKENS, **SMALL}),
    "ltx": (ltx, {"num_frames": 9, "height": 32, "width": 32, "max_sequence_length": TOKENS}),
}  # fmt: skip


def family(name: str) -> tuple[Any, dict[str, Any]]:
    """The pipeline, with random weights that are the same at each call, and the arguments of its call."""
    make, call = FAMILIES[name]
    torch.manual_seed(0)
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    return pipe, dict(call)


def last_state(pipe: Any, call: dict[str, Any], prompts: list[str], latents: Tensor, steps: int) -> Tensor:
    """Where the pipeline's own run for `prompts` ends, from `latents`, a row each; `call`: its other arguments."""
    texts: dict[str, Any] = {"prompt": prompts}
    if "negative_prompt" in call:
        texts["negative_prompt"] = [call["negative_prompt"]] * len(prompts)
    out = pipe(**{**call, **texts}, latents=latents, num_inference_steps=steps, output_type="latent", return_dict=False)
    end: Tensor = out[0]
    return end
