"""A whole tiny run in a temporary folder: files of a copying task and a recipe for them."""

import json
from pathlib import Path

import yaml

T5 = {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "dropout_rate": 0.0}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def write_files(folder: Path, rows: int = 48) -> dict[str, str]:
    """JSONL files of the three splits: repeat a word."""
    words = ["alpha", "beta", "gamma", "delta", "omega", "sigma"]
    paths = {}
    for split, count in (("train", rows), ("validation", 9), ("test", 9)):
        lines = [
            json.dumps({"id": f"{split}-{i}", "prompt": f"say {words[i % 6]} {i}", "target": words[i % 6]})
            for i in range(count)
        ]
        paths[split] = str(folder / f"{split}.jsonl")
        Path(paths[split]).write_text("\n".join(lines) + "\n")
    return paths


def write_recipe(folder: Path, **trainer) -> str:
    """A recipe `toy` over those files; keyword arguments go to the trainer."""
    recipe = {
        "seed_everything": 1,
        "model": {"llm": {"config": T5}, "slm": {"config": LLAMA}, "warmup_steps": 2, "bleu_examples": 4},
        "data": {
            "source": {"class_path": "llmslm.data.sources.TextFiles", "init_args": write_files(folder)},
            "tokenizer": {"vocab_size": 300},
            "micro_batch_size": 8,
            "max_prompt_tokens": 32,
            "max_target_tokens": 8,
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 4,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "check_val_every_n_epoch": None,
            "val_check_interval": 2,
        }
        | trainer,
    }
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)
