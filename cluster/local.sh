#!/usr/bin/env bash
# A cluster on this machine: a head and some worker nodes, with token authentication, dashboard on loopback.
#   cluster/local.sh start [NUM_WORKERS] [CPUS_EACH]
#   cluster/local.sh stop
# `start` prints the two lines to export before `ray job submit`.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH" # `python` in a job's command is looked up on the nodes' PATH
PORT=${PORT:-6379}
DASHBOARD_PORT=${DASHBOARD_PORT:-8265}
export RAY_AUTH_MODE=token
export RAY_idle_worker_killing_time_threshold_ms=60000 # as pipeline/runtime.py says
export RAY_AUTH_TOKEN_PATH=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}

case ${1:-} in
start)
  if [ ! -s "$RAY_AUTH_TOKEN_PATH" ]; then
    mkdir -p "$(dirname "$RAY_AUTH_TOKEN_PATH")"
    (umask 077 && python3 -c 'import secrets; print(secrets.token_hex(32))' >"$RAY_AUTH_TOKEN_PATH")
  fi
  ray start --head --port="$PORT" --dashboard-host=127.0.0.1 --dashboard-port="$DASHBOARD_PORT" \
    --node-ip-address=127.0.0.1 ${3:+--num-cpus="$3"} --disable-usage-stats
  for _ in $(seq 1 "${2:-0}"); do
    ray start --address="127.0.0.1:$PORT" ${3:+--num-cpus="$3"} --disable-usage-stats
  done
  echo
  echo "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$RAY_AUTH_TOKEN_PATH"
  echo "export RAY_API_SERVER_ADDRESS=http://127.0.0.1:$DASHBOARD_PORT"
  ;;
stop)
  ray stop
  ;;
*)
  sed -n '2,5s/^# //p' "$0"
  exit 2
  ;;
esac
