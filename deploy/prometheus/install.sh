#!/bin/sh
# Put prometheus and promtool of Debian or Ubuntu into a directory, without installing the service:
# install.sh [DIRECTORY], by default .venv/bin, where the tests look beside PATH.
set -eu
directory=$(realpath "${1:-.venv/bin}")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"
apt-get download --quiet prometheus || { apt-get update --quiet && apt-get download --quiet prometheus; }
dpkg-deb --extract prometheus_*.deb .
install usr/bin/prometheus usr/bin/promtool "$directory"
