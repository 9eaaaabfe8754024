"""LLM-to-SLM: a frozen large language model reads the prompt once, a small one writes the answer."""

from llmslm.registration import register

register()
