"""What the rows say about each other: speedups end to end, and where llm_to_slm begins to pay."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_SETTING = ("batch", "prompt", "new")

# name: (the slower system and arm, the faster one)
RATIOS = {
    "llm_engine_over_generate": (("llm", "generate"), ("llm", "engine")),
    "slm_engine_over_generate": (("slm", "generate"), ("slm", "engine")),
    "llm_to_slm_over_llm_engine": (("llm", "engine"), ("llm_to_slm", "engine")),
    "llm_to_slm_over_llm_generate": (("llm", "generate"), ("llm_to_slm", "engine")),
    "llm_to_slm_over_llm_static": (("llm", "static"), ("llm_to_slm", "engine")),
    "llm_to_slm_over_llm_assisted": (("llm", "assisted"), ("llm_to_slm", "engine")),
    "llm_to_slm_over_ctranslate2": (("llm", "ctranslate2"), ("llm_to_slm", "engine")),
    "llm_engine_over_ctranslate2": (("llm", "ctranslate2"), ("llm", "engine")),
}


def ratios(rows: Iterable[Row]) -> list[Row]:
    """Ratios of median times from prompt to last token, and of those to the first token, by setting."""
    by_key = {(*(row[key] for key in _SETTING), row["system"], row["arm"]): row for row in rows if row["total_s"]}
    settings = list(dict.fromkeys(key[:3] for key in by_key))
    found = []
    for setting in settings:
        for name, (slow, fast) in RATIOS.items():
            pair = by_key.get((*setting, *slow)), by_key.get((*setting, *fast))
            if pair[0] is None or pair[1] is None:
                continue
            total, first = (pair[0][time]["p50"] / pair[1][time]["p50"] for time in ("total_s", "ttft_s"))
            found.append({**dict(zip(_SETTING, setting, strict=True)), "ratio": name, "total": total, "ttft": first})
    return found


def plot_break_even(rows: list[Row], path: Path) -> None:
    """Draw how many times as fast as the llm llm_to_slm is, both on the engine, over the tokens produced."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    points = [row for row in ratios(rows) if row["ratio"] == "llm_to_slm_over_llm_engine"]
    with mpl.rc_context({"svg.hashsalt": "llmslm"}):
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot()
        for batch, prompt in sorted({(point["batch"], point["prompt"]) for point in points}):
            line = sorted((p["new"], p["total"]) for p in points if (p["batch"], p["prompt"]) == (batch, prompt))
            axes.plot(*zip(*line, strict=True), marker="o", label=f"batch {batch}, prompt {prompt}")
        axes.axhline(1, color="grey", linestyle=":")
        axes.set(xscale="log", xlabel="new tokens", ylabel="llm_to_slm, times the speed of the llm", ylim=(0, None))
        axes.legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
