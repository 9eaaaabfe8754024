#!/bin/sh
# All that is measured of training on one GPU, in some twelve minutes: the encoder-decoder of 145M beside the Seq2SeqTrainer,
# llm_to_slm on the fly and from the feature cache, the 350M with its share of the arithmetic, predicted against measured
# memory and time, loss curves of three seeds beside the plain loop's.
#
#     make headline-data                                  # once, on a machine with apt and the network
#     sh evaluation/benchmarks/training_on_gpu.sh FOLDER  # records and the log go there
#
# What fails does not stop the rest; the exit status is the number of failures. DATA is the folder of `make headline-data`
# (its parts en_it and docstrings are read), WORK one for a model and its features, which a later call takes over. ONLY names
# steps; TOTAL (seconds) cuts off what comes late. HARDWARE, ENCODER, T5, LARGE, ROWS, T5_ROWS, LARGE_ROWS, CURVE_ROWS, STEPS,
# PEERS, CURVE, EVERY, SLOWER (times the limits) and PYTHON may be set, to try the script elsewhere. What a trial on a CPU read
# and tokenised lies in $LLMSLM_CACHE under names made of the texts alone: copied along, it spares the GPU a minute or two.
out=${1:?a folder for the records is expected}
python=${PYTHON:-python3} data=${DATA:-runs/headline/data} work=${WORK:-runs/training_on_gpu}
hardware=${HARDWARE:-hardware/1gpu} steps=${STEPS:-60}
llama='model_type: llama, tie_word_embeddings: true'
encoder=${ENCODER:-"{$llama, hidden_size: 768, intermediate_size: 2048, num_hidden_layers: 19, num_attention_heads: 12, num_key_value_heads: 12}"}
large=${LARGE:-"{$llama, hidden_size: 1024, intermediate_size: 2816, num_hidden_layers: 26, num_attention_heads: 16, num_key_value_heads: 16}"}
t5=${T5:-'{model_type: t5, d_model: 768, d_kv: 64, d_ff: 2048, num_layers: 8, num_decoder_layers: 8, num_heads: 12, feed_forward_proj: gated-gelu, dropout_rate: 0.1}'}
adamw='{class_path: torch.optim.AdamW, init_args: {lr: 8.0e-4, weight_decay: 0.1, betas: [0.9, 0.98], fused: true, foreach: false}}'
failed=0 begun=$(date +%s)
mkdir -p "$out" "$work"
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}" # the Seq2SeqTrainer would take all that there are

# Run a command, keep what it prints in FOLDER/log.txt, and its last JSON object, if it prints one, as a record.
step() {
  name=$1 limit=$(($2 * ${SLOWER:-1}))
  shift 2
  case " ${ONLY:-$name} " in *" $name "*) ;; *) return ;; esac
  start=$(date +%s)
  left=$((${TOTAL:-800} - start + begun))
  [ "$left" -ge "$limit" ] || limit=$left
  [ "$limit" -gt 0 ] || { failed=$((failed + 1)); echo "$name: no time left"; return; }
  timeout "$limit" "$@" >"$work/$name.log" 2>&1 || { failed=$((failed + 1)); echo "$name FAILED"; }
  echo "$name: $(($(date +%s) - start)) s"
  { echo "== $name"; cat "$work/$name.log"; } >>"$out/log.txt"
  grep '^{"' "$work/$name.log" | tail -n 1 >"$work/$name.json"
  [ -s "$work/$name.json" ] && "$python" -m json.tool --indent 1 "$work/$name.json" "$out/h200-$name.json"
  grep -v '^{"' "$work/$name.log" | tail -n 8
}

files() {
  echo "--data.source={\"class_path\": \"llmslm.data.sources.TextFiles\", \"init_args\": {\"train\": \"$data/$1/train.parquet\", \"validation\": \"$data/$1/validation.parquet\"}}"
}

speed() {
  name=$1 limit=$2 measured=$3 options=$4
  shift 4
  # $options are several words.
  step "$name" "$limit" "$python" -m evaluation.benchmarks.training_speed --config headline/pretrain --steps "$measured" \
    $options -- "$@"
}

quiet='--trainer.logger=false --trainer.enable_progress_bar=false --trainer.enable_model_summary=false'
pair="--model.system=llm_to_slm --model.encoder.source=$work/llm/system"

speed encoder-decoder 220 "$steps" "--peer ${PEERS:-128 256}" --config headline/t5 --config "$hardware" "$(files en_it)" \
  --model.system llm --model.llm.config "$t5" --model.optimizer "$adamw" --data.micro_batch_size "${T5_ROWS:-64}"

# An LLM of one step costs what a trained one does.
[ -d "$work/llm/system" ] || step llm 120 "$python" -m llmslm fit --config headline/pretrain --config "$hardware" \
  "$(files en_it)" --model.system llm --model.llm.config "$encoder" --model.compile false --trainer.max_steps 1 \
  --trainer.limit_val_batches 0 --checkpoint.save_top_k 0 --checkpoint.save_last false $quiet \
  --trainer.default_root_dir "$work/llm"
step features 120 "$python" -m llmslm features --config headline/pretrain --config "$hardware" "$(files en_it)" $pair $quiet \
  --out "$work/features"
speed pair 120 $((2 * steps)) "--cached $work/features" --config "$hardware" "$(files en_it)" $pair \
  --data.micro_batch_size "${ROWS:-128}"

shape="--model.system slm --model.dropout 0.0 --data.pack_tokens 1024 --data.max_prompt_tokens 512 --data.max_target_tokens 96"
shape="$shape --data.micro_batch_size ${LARGE_ROWS:-32}"
speed 350m-docstrings 100 "$steps" "" --config "$hardware" "$(files docstrings)" $shape --model.slm.config "$large"

step plan-350m 90 "$python" -m llmslm plan --measure --config headline/pretrain --config "$hardware" $shape \
  --model.slm.config "$large"
step plan-pair 90 "$python" -m llmslm plan --measure --config headline/pretrain --config "$hardware" \
  --model.system llm_to_slm --model.llm.config "$encoder" --data.micro_batch_size "${ROWS:-128}"

step loss-curve 400 "$python" -m evaluation.benchmarks.loss_curve --config headline/pretrain --steps "${CURVE:-200}" \
  --every "${EVERY:-50}" --seeds 1 2 3 -- --config "$hardware" "$(files en_it)" --model.system slm --model.dropout 0.0 \
  --model.label_smoothing 0.0 --model.warmup_steps 50 --data.micro_batch_size "${CURVE_ROWS:-16}"
exit $failed
