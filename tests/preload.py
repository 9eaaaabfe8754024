"""What the server of test processes imports once, before it forks."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import transformers.models.llama.modeling_llama
import transformers.models.t5.modeling_t5  # noqa: F401

import llmslm.training  # noqa: F401
