#!/usr/bin/env bash
# Has the wire contract changed so that clients of an older version would not understand this one?
# Compares proto/ with that of the last tag; without tags, of the commit where this branch left
# main; on main, of the commit before. Where git knows none of them, as in a shallow clone, it says
# so and does nothing.
#
#     proto/breaking.sh [BUF]        the program buf, default: buf
set -euo pipefail
buf=${1:-buf}
cd "$(dirname "$0")/.."

older() {
    git describe --tags --abbrev=0 HEAD^ && return
    for main in origin/main main; do
        commit=$(git merge-base HEAD "$main") || continue
        [ "$commit" = "$(git rev-parse HEAD)" ] || { echo "$commit"; return; }
    done
    git rev-parse --verify --quiet HEAD^
}

commit=$(older 2>/dev/null || true)
if [ -z "$commit" ] || ! git cat-file -e "$commit:proto/buf.yaml" 2>/dev/null; then
    echo "buf breaking: skipped, there is no older version of proto/ to compare with"
    exit
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
git archive "$commit" proto | tar -x -C "$scratch"
echo "buf breaking: comparing with $commit"
"$buf" breaking proto --against "$scratch/proto"
