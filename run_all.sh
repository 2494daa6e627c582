#!/usr/bin/env bash
# From clone to chat: make the environment, prepare the embedded corpus, pretrain, fine-tune, evaluate, chat.
# Nothing is downloaded but the packages. A second run goes on where the first stopped.
#   ./run_all.sh
set -euo pipefail
cd "$(dirname "$0")"

run() {
  echo
  echo "\$ $*"
  "$@"
}

run ./make_env.sh requirements.txt
source .venv/bin/activate
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1

precision=()
if grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo 2>/dev/null; then
  precision=(--bf16)
else
  echo
  echo "This CPU has no bfloat16 (avx512_bf16 or amx_bf16): training uses fp32."
  echo "Estimate: about 11 minutes on 2 cores (measured once on such a CPU, see BENCHMARKS.md)."
fi

run python prep_text_corpus.py --dataset pydocs --out_dir data/pydocs
run python prep_data.py --dataset pydocs --tokenizer data/pydocs --out_dir data/pydocs_chat \
  --pydocs_passes 3 --seq_len 256 --show 3
run python train.py --recipe configs/recipes/pydocs_text.yaml "${precision[@]}"
run python train.py --recipe configs/recipes/pydocs_chat.yaml "${precision[@]}"
run python evaluate.py --model_dir runs/pydocs_text
run python evaluate.py --model_dir runs/pydocs_chat
run python evaluate.py --model_dir runs/pydocs_chat --report

if [ -t 0 ]; then
  run python inference.py --model_dir runs/pydocs_chat
else
  # No terminal on stdin: five questions of one conversation, and the figures once more.
  run python inference.py --model_dir runs/pydocs_chat \
    --prompt 'Hello' \
    --prompt 'What does `os.listdir` do?' \
    --prompt 'What are its arguments?' \
    --prompt 'Explain `math.sqrt`.' \
    --prompt 'What does `os.frobnicate` do?'
  run cat runs/pydocs_chat/evaluation.json
fi
