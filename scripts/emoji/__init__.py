"""Two text-to-image models trained on emoji, from the pictures on: `python -m emoji`, or `make emoji`.

    packages      the packages of npm that the pictures and their names are in, and their licences
    captions      what a picture is called
    data          the data set: pictures, captions, and which of them no training sees
    autoencoder   AutoencoderKL, of both models
    text          tokenizer and text encoders
    examples      latents and prompts that the models are trained on
    sd            a StableDiffusionPipeline
    sd3           a StableDiffusion3Pipeline
    judges        two feature networks
    matching      a dual encoder of pictures and captions
    sheet         a page of held-out prompts: real pictures and a pipeline's

Every training is the loop of training.py beside this folder: killed and started again, it goes on.
"""

import ts_adapt  # noqa: F401  (first: it makes torchvision, hence diffusers, importable beside a CPU torch)
