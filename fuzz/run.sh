#!/usr/bin/env bash
# Runs every fuzz target for a while: run.sh [SECONDS PER TARGET]
# Needs cargo, cargo-fuzz (`make fuzz` installs it) and a C++ compiler. Seeds stand in corpus/;
# what is found besides goes to grown/, and inputs that break something to artifacts/.
set -euo pipefail

seconds=${1:-30}
cd "$(dirname "${BASH_SOURCE[0]}")"
# The sanitizers need a nightly Rust, and find little where unsafe code is forbidden.
fuzz() {
    local command=$1
    shift
    cargo-fuzz "$command" --fuzz-dir . --sanitizer none "$@"
}
fuzz build

failed=0
# run TARGET LONGEST_INPUT
run() {
    local target=$1 longest=$2 log=grown/$1.log dictionary=()
    mkdir -p "grown/$target"
    [[ -f dictionaries/$target.dict ]] && dictionary=(-dict="dictionaries/$target.dict")
    # libFuzzer adds what it finds to the first folder.
    if fuzz run "$target" "grown/$target" "corpus/$target" -- "${dictionary[@]}" \
        -max_len="$longest" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 \
        -print_final_stats=1 >"$log" 2>&1; then
        echo "ok      $target: $(sed -n 's/^stat::number_of_executed_units: *//p' "$log") executions"
    else
        failed=$((failed + 1))
        echo "FAILED  $target:"
        grep -A 1 -E 'panicked at|ERROR: |Test unit written' "$log" | cut -c 1-300 || tail "$log"
    fi
}

run batch_answer 32768
run error_body 65536
run metadata 16384
run statuses 16384

echo "$((4 - failed)) passed, $failed failed"
((failed == 0))
