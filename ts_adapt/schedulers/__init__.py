"""Plug-ins of diffusers: a scheduler with learned times, and per-sample times inside unmodified pipelines."""
