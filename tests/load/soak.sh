#!/usr/bin/env bash
# 70 % of what the gateway can do, for long: soak.sh [SECONDS]
# A few creates meet faults, and connections come and go. Memory and open files
# must not grow.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
seconds=${1:-600}
round=30 # seconds that a connection lasts

start_both --share 0.01 --fault status-503 --fault reset-after-create --fault half-answer
load 5 10 100 --rps $((capacity * 7 / 100)) # warm
before=$(created)
begin=$(now)
begin_samples soak 3
for ((left = seconds; left > 0; left -= round)); do
    load $((left < round ? left : round)) 10 100 --rps $((capacity * 7 / 100))
done
end_samples
row "creates per second" $((($(created) - before) * 1000 / ($(now) - begin)))
row "retries" "$(metric aep_gateway_retries_total)"
for outcome in APPLIED UNKNOWN NOT_APPLIED; do
    row "creates with outcome $outcome" \
        "$(metric "aep_gateway_creates_total[{]outcome=\"$outcome\"")"
done
flat soak soak
sleep 1
check "no call is left" $(($(metric aep_gateway_calls_in_flight) == 0))
check "a call is served" $(($(until_served) <= 1000))
finish
