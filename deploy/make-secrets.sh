#!/bin/sh
# Makes the passwords and the token of compose.yaml, one file each; those that exist stay as they are.
#   deploy/make-secrets.sh [FOLDER]      deploy/secrets if left out
# Containers see the files with the rights that they have here, under users of their own: so the files
# are readable by all, and the folder is closed.
set -eu
folder=${1:-$(dirname "$0")/secrets}
mkdir -p "$folder"
chmod 700 "$folder"
for name in redis_host redis_worker redis_reader redis_admin token grafana_admin; do
  [ -s "$folder/$name" ] && continue
  head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' >"$folder/$name"
  chmod 444 "$folder/$name"
  echo "made $folder/$name"
done
