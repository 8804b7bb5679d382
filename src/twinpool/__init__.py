"""Twinpool serves a language model from two pools of workers: prefill reads prompts, decode writes answers."""

__version__ = "0.1.0"
