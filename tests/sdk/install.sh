#!/bin/sh
# Install Debian packages that the tests need, or say what is missing and fail.
set -eu
say() { echo "make test needs $*: please install it (Debian: apt-get install $*)" >&2; exit 1; }
command -v apt-get >/dev/null || say "$@"
if [ "$(id -u)" = 0 ]; then as=; elif command -v sudo >/dev/null; then as="sudo -n"; else say "$@"; fi
$as apt-get update -qq || say "$@"
DEBIAN_FRONTEND=noninteractive $as apt-get install -y -qq --no-install-recommends "$@" >/dev/null || say "$@"
