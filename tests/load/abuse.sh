#!/usr/bin/env bash
# Misuses of HTTP/2, one after another: abuse.sh [SECONDS EACH]
# Memory must stay within bounds, and a call of somebody else must be answered
# meanwhile and afterwards.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
seconds=${1:-10}
command -v python3 >/dev/null || cannot "python3 is not installed"
most=$((256 * 1024)) # KiB of RSS

ulimit -n "$(ulimit -Hn)"
for abuse in rapid_reset continuation empty_continuation ping settings header_bomb gzip_bomb \
    zero_window unfinished silent; do
    start_both # each its own, for the peak of RSS
    python3 "$root/tests/load/abuse.py" "$(value gateway listen)" $abuse "$seconds" >"$tmp/said" &
    abusing=$!
    slowest=0 answers=0
    while kill -0 $abusing 2>/dev/null; do
        called=$(now)
        # An abuse that makes calls may take all that --max-in-flight allows.
        [[ $(one_call) =~ ^(0 APPLIED|14 NOT_APPLIED)$ ]] && answers=$((answers + 1)) || answers=-1000
        took=$(($(now) - called))
        ((took <= slowest)) || slowest=$took
        sleep 0.2
    done
    wait $abusing || cannot "$abuse did not run"
    recovery=$(until_served)
    peak=$(awk '/^VmHWM/ { print $2 }' "/proc/$pid/status")
    row "$abuse" "$(<"$tmp/said")"
    row "$abuse: peak of RSS in KiB" "$peak"
    row "$abuse: calls meanwhile, slowest" "$answers, $slowest ms"
    row "$abuse: served afterwards" "$recovery ms"
    check "$abuse" $((peak <= most && answers > 0 && slowest <= 2000 && recovery <= 1000))
    end_all
    started=()
done
finish
