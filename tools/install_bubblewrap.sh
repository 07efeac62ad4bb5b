#!/usr/bin/env bash
# bubblewrap for tests/rewards/sandbox, by apt where this user may install; one line says when it cannot.
set -uo pipefail
command -v bwrap >/dev/null && exit 0
as_root=()
[ "$(id -u)" = 0 ] || as_root=(sudo -n)
if ! command -v apt-get >/dev/null || ! "${as_root[@]}" true 2>/dev/null; then
    echo "coati: no bubblewrap here, and apt-get as root or by passwordless sudo is needed to install it:" \
        "its tests are skipped" >&2
    exit 0
fi
log=$(mktemp)
{ "${as_root[@]}" apt-get update -qq && "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends bubblewrap; } >"$log" 2>&1 ||
    echo "coati: apt-get could not install bubblewrap ($(tail -n 1 "$log")): its tests are skipped" >&2
rm -f "$log"
