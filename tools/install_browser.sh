#!/usr/bin/env bash
# Chromium for tests/inference/test_chat_page.py, by apt where this user may install; one line says when it cannot.
set -uo pipefail
for program in chromium-headless-shell chromium chromium-browser google-chrome; do
    command -v "$program" >/dev/null && exit 0
done
as_root=()
[ "$(id -u)" = 0 ] || as_root=(sudo -n)
if ! command -v apt-get >/dev/null || ! "${as_root[@]}" true 2>/dev/null; then
    echo "coati: no Chromium here, and apt-get as root or by passwordless sudo is needed to install it:" \
        "the tests of the chat page are skipped" >&2
    exit 0
fi
log=$(mktemp)
{ "${as_root[@]}" apt-get update -qq && "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends chromium; } >"$log" 2>&1 ||
    echo "coati: apt-get could not install chromium ($(tail -n 1 "$log")): the tests of the chat page are skipped" >&2
rm -f "$log"
