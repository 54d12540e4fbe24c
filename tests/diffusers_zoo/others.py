"""What single pipelines need beside the rules: sizes that fit together, a scheduler of their own, arguments.

sizes      of components, over those of `sizes.SIZES`; {"needed": True} for one that the pipeline cannot do without
given      arguments of `__init__`
scheduler  where it is not the one that the annotation names
set        attributes of the pipeline that say what sizes pictures have, and of its module
module
call       arguments of `__call__`
tolerance  of the results, where pictures are decoded in whole steps
leave      arguments of `__call__` that are left out
"""

from __future__ import annotations

from typing import Any

from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_zoo.sizes import IF, MOTION, SIZE, TEXT_OR_IMAGE, WIDTH, XL
from diffusers_zoo.stand_ins import ImageEncoder, picture
from noise_schedules import SD

BETAS = {**SD, "clip_sample": False}


def each(names: tuple[str, ...], entry: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`entry` for all of `names`."""
    return {name: entry for name in names}


def flow() -> Any:
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


KANDINSKY = {"sizes": {"unet": {**TEXT_OR_IMAGE, "addition_embed_type": "image", "encoder_hid_dim_type": "image_proj"}}}
KANDINSKY_TEXT = {
    "sizes": {"unet": {
        **TEXT_OR_IMAGE, "addition_embed_type": "text_image", "encoder_hid_dim_type": "text_image_proj",
        "cross_attention_dim": WIDTH,
    }},
}  # fmt: skip
HINTED = {
    "sizes": {"unet": {
        **TEXT_OR_IMAGE, "in_channels": 8, "addition_embed_type": "image_hint", "encoder_hid_dim_type": "image_proj",
    }},
}  # fmt: skip


def learned_range() -> Any:
    return DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range")


IF_ALONE = {"sizes": {"unet": IF}, "scheduler": learned_range, "call": {"output_type": "pt"}}
IF_LARGER = {
    "sizes": {"unet": {**IF, "in_channels": 6, "class_embed_type": "timestep", "mid_block_scale_factor": 1.414,
                       "time_embedding_act_fn": "gelu", "time_embedding_dim": 32}},
    "scheduler": learned_range, "given": {"image_noising_scheduler": DDPMScheduler},
    "call": {"output_type": "pt"},
}  # fmt: skip

NEEDED = {"needed": True}


def vocoder() -> Any:
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    return SpeechT5HifiGan(SpeechT5HifiGanConfig(
        model_in_dim=32, sampling_rate=64, upsample_initial_channel=8, upsample_rates=[2], upsample_kernel_sizes=[4],
        resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1]],
    ))  # fmt: skip


def betas() -> Any:
    return DDIMScheduler(**BETAS)


CLOZE = {"transformer": {"in_channels": 16 + 16 + 16, "out_channels": 16}}
CLOZE_CALL = {
    "task_prompt": "a picture of two", "content_prompt": "a cat",
    "image": lambda rows: [[picture(0), picture(1)], [picture(2), None]],
}  # fmt: skip


ATTENTION_FIRST = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
EDIT = '{"edit_instruction": "a red cat", "short_description": "a cat"}'

SOUND = {
    "sizes": {
        "unet": {
            "class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": WIDTH,
            "class_embeddings_concat": True, "cross_attention_dim": (8, 16),
        },
        "vae": {"in_channels": 1, "out_channels": 1},
    },
    "given": {"vocoder": vocoder}, "leave": ("height",), "call": {"audio_length_in_s": 0.25},
}  # fmt: skip

OTHERS: dict[str, dict[str, Any]] = {
    "AudioLDMPipeline": SOUND,
    "HunyuanVideoImageToVideoPipeline": {
        "sizes": {"transformer": {"in_channels": 9, "image_condition_type": "latent_concat"}},
    },
    "Krea2Pipeline": {"given": {"text_encoder_select_layers": (0, 1, 2)}},
    "StableDiffusionXLControlNetUnionPipeline": {"sizes": {"unet": XL}, "call": {"control_mode": [0]}},
    "StableDiffusionControlNetXSPipeline": {"sizes": {"unet": {"layers_per_block": 2}}},
    "StableDiffusionXLControlNetXSPipeline": {
        "sizes": {"unet": {**XL, "layers_per_block": 2}, "controlnet": {"cross_attention_dim": 2 * WIDTH}},
    },
    "Ideogram4Pipeline": {"call": {"guidance_schedule": None, "guidance_scale": 5.0, "max_sequence_length": 64}},
    "StableUnCLIPImg2ImgPipeline": {"sizes": {"image_encoder": NEEDED}, "leave": ("image_embeds",)},
    "AnimateDiffSDXLPipeline": {"sizes": {"unet": XL, "motion_adapter": {**MOTION, "use_motion_mid_block": False}}},
    "BriaFiboEditPipeline": {"call": {"prompt": EDIT}},
    **each(("CogVideoXFunControlPipeline", "CogVideoXImageToVideoPipeline", "CogView4ControlPipeline",
            "HunyuanSkyreelsImageToVideoPipeline"), {"sizes": {"transformer": {"in_channels": 8}}}),
    "DiTPipeline": {"call": {"class_labels": list}},
    **each(("BriaFibo2Pipeline", "Flux2KleinKVPipeline", "Flux2KleinPipeline", "Flux2Pipeline"), {"leave": ("image",)}),
    **each(("FluxControlImg2ImgPipeline", "FluxControlInpaintPipeline", "FluxControlPipeline"), {
        "sizes": {"transformer": {"in_channels": 32, "out_channels": 16}},
    }),
    "FluxFillPipeline": {"sizes": {"transformer": {"in_channels": 48, "out_channels": 16}}},
    **each(("FluxKontextInpaintPipeline", "FluxKontextPipeline"), {
        "call": {"_auto_resize": False, "max_area": 1024},
    }),
    **each(("IFPipeline", "IFImg2ImgPipeline", "IFInpaintingPipeline"), IF_ALONE),
    **each(
        ("IFSuperResolutionPipeline", "IFImg2ImgSuperResolutionPipeline", "IFInpaintingSuperResolutionPipeline"),
        IF_LARGER,
    ),
    **each(("KandinskyV22Pipeline", "KandinskyV22Img2ImgPipeline"), KANDINSKY),
    "KandinskyV22InpaintPipeline": {"sizes": {"unet": {**KANDINSKY["sizes"]["unet"], "in_channels": 9}}},
    **each(("KandinskyPipeline", "KandinskyImg2ImgPipeline"), KANDINSKY_TEXT),
    "KandinskyInpaintPipeline": {"sizes": {"unet": {**KANDINSKY_TEXT["sizes"]["unet"], "in_channels": 9}}},
    **each(("KandinskyV22ControlnetPipeline", "KandinskyV22ControlnetImg2ImgPipeline"), HINTED),
    **each(("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline"), {
        "sizes": {"unet": {"time_cond_proj_dim": 8}},
    }),
    "LDMPipeline": {"sizes": {"vqvae": {"latent_channels": 3}}, "tolerance": 1e-2},
    "LDMSuperResolutionPipeline": {"sizes": {"vqvae": {"latent_channels": 3}, "unet": {"in_channels": 6}}},
    **each(("PIAPipeline", "PaintByExamplePipeline"), {"sizes": {"unet": {"in_channels": 9}}}),
    "OmniGenPipeline": {"leave": ("input_images",)},
    **each(("Cosmos2TextToImagePipeline", "Cosmos2VideoToWorldPipeline"), {
        "scheduler": FlowMatchEulerDiscreteScheduler,
    }),
    **each(("ChronoEditPipeline", "SkyReelsV2DiffusionForcingImageToVideoPipeline", "WanAnimatePipeline"), {
        "leave": ("image_embeds",),
    }),
    "LucyEditPipeline": {"sizes": {"transformer": {"in_channels": 32}}},
    "StableDiffusionImageVariationPipeline": {"sizes": {"image_encoder": NEEDED}},
    "StableDiffusionInstructPix2PixPipeline": {"sizes": {"unet": {"in_channels": 8}}},
    "StableDiffusionXLInstructPix2PixPipeline": {"sizes": {"unet": {**XL, "in_channels": 8}}},
    "StableDiffusionLDM3DPipeline": {"call": {"output_type": "np"}},
    "StableDiffusionUpscalePipeline": {
        "sizes": {"unet": {"in_channels": 7, "num_class_embeds": 1000}}, "given": {"low_res_scheduler": DDPMScheduler},
    },
    "StableDiffusionAttendAndExcitePipeline": {"call": {"token_indices": [1], "max_iter_to_alter": 1}},
    "StableDiffusionAdapterPipeline": {"sizes": {"unet": ATTENTION_FIRST}},
    "StableDiffusionXLAdapterPipeline": {"sizes": {"unet": {**XL, **ATTENTION_FIRST}}},
    "StableDiffusionGLIGENPipeline": {
        "sizes": {"unet": {"attention_type": "gated"}},
        "call": {"gligen_phrases": ["a cat"], "gligen_boxes": [[0.1, 0.2, 0.6, 0.7]]},
    },
    "StableVideoDiffusionPipeline": {"sizes": {"image_encoder": NEEDED, "feature_extractor": NEEDED}},
    **each(("HunyuanDiTPipeline", "HunyuanDiTControlNetPipeline", "HunyuanDiTPAGPipeline"), {
        "sizes": {
            "vae": {"block_out_channels": (8,) * 4, "down_block_types": ("DownEncoderBlock2D",) * 4,
                    "up_block_types": ("UpDecoderBlock2D",) * 4},
            "transformer": {"sample_size": 4}, "controlnet": {"sample_size": 4},
        },
        "call": {"use_resolution_binning": False},
    }),
    "HunyuanImageRefinerPipeline": {"sizes": {"transformer": {"in_channels": 8, "patch_size": (1, 1, 1),
                                                              "rope_axes_dim": (2, 4, 2)}}},
    "StableDiffusionLatentUpscalePipeline": {"sizes": {"unet": {"in_channels": 8}}},
    "Kandinsky5I2VPipeline": {"sizes": {"transformer": {"in_visual_dim": 4}}, "call": {"num_frames": 9}},
    **each(("Kandinsky5I2IPipeline", "Kandinsky5T2IPipeline"), {"set": {"resolutions": [(SIZE, SIZE)]}}),
    **each(("MotifVideoPipeline", "MotifVideoImage2VideoPipeline"), {"scheduler": flow}),
    "LTX2ImageToVideoPipeline": {"call": {"crf": 0}},
    "PixArtSigmaPAGPipeline": {"sizes": {"transformer": {"num_layers": 2}}, "call": {"use_resolution_binning": False}},
    **each(("SanaVideoPipeline", "SanaImageToVideoPipeline"), {
        "sizes": {"vae": {"class": "AutoencoderKLWan"}}, "call": {"use_resolution_binning": False},
    }),
    "VisualClozeGenerationPipeline": {"sizes": CLOZE, "given": {"resolution": SIZE}, "call": CLOZE_CALL},
    "VisualClozePipeline": {
        "sizes": CLOZE, "given": {"resolution": SIZE},
        "call": {**CLOZE_CALL, "upsampling_height": SIZE, "upsampling_width": SIZE},
    },
    "LDMTextToImagePipeline": {"sizes": {"unet": {"class": "UNet2DConditionModel"}}},
    **each(("QwenImageEditPipeline", "QwenImageEditInpaintPipeline"),
           {"module": {"calculate_dimensions": lambda *area: (SIZE, SIZE, None)}}),
    **each(("QwenImageEditPlusPipeline", "QwenImageLayeredPipeline"),
           {"module": {"calculate_dimensions": lambda *area: (SIZE, SIZE)}}),
    **each(("MarigoldDepthPipeline", "MarigoldNormalsPipeline"), {
        "sizes": {"unet": {"in_channels": 8}}, "call": {"processing_resolution": 32, "output_type": "pt"},
    }),
    "MarigoldIntrinsicsPipeline": {
        "sizes": {"unet": {"in_channels": 12, "out_channels": 8}},
        "call": {"processing_resolution": 32, "output_type": "pt"},
    },
    **each(("PRXPipeline", "PRXPixelPipeline", "PixArtAlphaPipeline", "PixArtSigmaPipeline", "SanaPipeline",
            "SanaPAGPipeline", "SanaControlNetPipeline", "SanaSprintPipeline", "SanaSprintImg2ImgPipeline"), {
        "call": {"use_resolution_binning": False},
    }),
    "SkyReelsV2ImageToVideoPipeline": {
        "sizes": {"transformer": {"in_channels": 36, "image_dim": WIDTH}}, "leave": ("image_embeds",),
    },
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": {"call": {"overlap_history": 1, "base_num_frames": 5}},
    "LongCatImagePipeline": {"call": {"enable_prompt_rewrite": False}},
    **each(("EasyAnimatePipeline", "EasyAnimateControlPipeline", "EasyAnimateInpaintPipeline"), {
        "call": {"negative_prompt": "a dog"},
    }),
    "StableAudioPipeline": {"leave": ("height",), "call": {"audio_end_in_s": 1.0}, "scheduler": betas},
    "WanImageToVideoPipeline": {"sizes": {"transformer": {"in_channels": 36}}, "leave": ("image_embeds",)},
    "ZImageOmniPipeline": {"leave": ("image",), "given": {"siglip": ImageEncoder}},
}  # fmt: skip


def others(name: str) -> dict[str, Any]:
    """What the pipeline class `name` needs, by its own entry or by its family."""
    name = name.replace("Combined", "")  # its parts are those of the pipeline that decodes
    if name.startswith("Kandinsky") and not name[len("Kandinsky")].isdigit():
        return {"call": {"output_type": "pt"}, **OTHERS.get(name, {})}
    if name in OTHERS:
        return OTHERS[name]
    if "XL" in name and "I2VGen" not in name:
        return {"sizes": {"unet": XL, "controlnet": XL}}
    if name.startswith("StableDiffusion3"):
        two = {"num_layers": 2}
        channels = {"in_channels": 16, "out_channels": 16} if "Inpaint" in name else {}
        return {"sizes": {
            "text_encoder_3": {"width": 2 * WIDTH}, "transformer": {**two, **channels},
            "controlnet": {**two, **channels},
            "vae": {"latent_channels": channels.get("in_channels", 4)},
        }}  # fmt: skip
    return {}
