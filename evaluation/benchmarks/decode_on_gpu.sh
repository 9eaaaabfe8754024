#!/bin/sh
# All that is measured of decoding on one GPU, in some thirteen minutes: the tests of graphs and kernels, predicted against
# measured memory of four shapes, the sweeps of batch, prompt and output length (break-even), all arms side by side, the
# waterfall from generate(), growth of memory over 1,000 prompts, products of a few rows, passes over prompts, a block of the verified mode.
#
#     sh evaluation/benchmarks/decode_on_gpu.sh FOLDER     # records, the curve and the log of the tests go there
#
# What fails does not stop the rest; the exit status is the number of failures. DEVICE, LLM, SLM, LARGE, SMALL, BATCHES,
# PROMPTS, NEW, RUNS, COUNT, VERIFIER, DRAFTER, DTYPE and PYTHON may be set, to try the script elsewhere.
out=${1:?a folder for the records is expected}
python=${PYTHON:-python3}
llm=${LLM:-t5-3b} slm=${SLM:-t5-small} device=${DEVICE:-cuda}
failed=0
mkdir -p "$out"

step() {
  name=$1 limit=$2
  shift 2
  start=$(date +%s)
  timeout "$limit" "$@" >"$out/$name.log" 2>&1 || { failed=$((failed + 1)); echo "$name FAILED"; }
  echo "$name: $(($(date +%s) - start)) s"
  grep -v '^{' "$out/$name.log" | tail -n 25
}

speed() {
  name=$1 limit=$2
  shift 2
  step "$name" "$limit" "$python" -m evaluation speed --device "$device" --dtype "${DTYPE:-bfloat16}" --arms engine \
    --warmups 2 --runs "${RUNS:-5}" --out "$out/h200-$name.json" "$@"
}

step tests 420 "$python" -m pytest -p no:cacheprovider -p no:xdist -q --durations=5 tests/unit/generation/test_cuda.py \
  tests/unit/generation/test_verified_cuda.py tests/unit/generation/test_kernels.py tests/unit/generation/test_block_kernels.py
speed batches 60 --systems llm --llm gpt2 --slm gpt2 --batch ${BATCHES:-1 8 32 64 256 1024}
# A process each: what a later system of a process adds to the workspaces that are there is less than its own peak.
speed large 60 --systems llm --llm "${LARGE:-llama-22x2048}" --slm "${SMALL:-llama-4x512}"
speed small 60 --systems slm --llm "${LARGE:-llama-22x2048}" --slm "${SMALL:-llama-4x512}"
speed break-even 90 --systems llm llm_to_slm --llm "$llm" --slm "$slm" --new ${NEW:-8 16 32 64 128 256} --plot "$out/break-even.svg"
speed prompts 60 --systems llm llm_to_slm --llm "$llm" --slm "$slm" --prompt ${PROMPTS:-16 64 256 1024} --new 64
# Drafts of random weights are hardly ever accepted: assisted shows what it costs at worst. Trained pairs: headline/speed.
speed arms 200 --systems llm slm llm_to_slm --llm "${LARGE:-llama-22x2048}" --slm "${SMALL:-llama-4x512}" \
  --arms engine generate static assisted prompt_lookup
step waterfall 180 "$python" -m evaluation.benchmarks.waterfall --device "$device" --runs "${RUNS:-5}" \
  --out "$out/h200-waterfall.json"
step growth 120 "$python" -m evaluation.benchmarks.memory_growth --device "$device" --shape "${SMALL:-llama-4x512}" \
  --prompts "${COUNT:-1000}" --out "$out/h200-growth.json"
step row-products 240 "$python" -m evaluation.benchmarks.row_products --out "$out/h200-row-products.json"
step prompt-passes 120 "$python" -m evaluation.benchmarks.prompt_passes --out "$out/h200-prompt-passes.json"
step verified 120 "$python" -m evaluation.benchmarks.verified_block --device "$device" --llm "${VERIFIER:-llama-24x576}" \
  --slm "${DRAFTER:-llama-4x256}" --out "$out/h200-verified-block.json"
exit $failed
