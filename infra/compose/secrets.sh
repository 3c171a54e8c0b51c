#!/bin/sh
# Makes the passwords that compose.yaml mounts, once. Only this user can look into the folder; the
# files are readable because the containers, who get them one by one, are other users.
set -eu
cd "$(dirname "$0")"
mkdir -p corpora
mkdir -m 700 -p secrets
for name in postgres ray_token grafana; do
  test -s "secrets/$name" || od -An -tx1 -N32 /dev/urandom | tr -d ' \n' > "secrets/$name"
  chmod 644 "secrets/$name"
done
